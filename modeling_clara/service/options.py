"""All that a request may say about its answer.

Requests with equal options are searched for together.
"""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class AskOptions:
    """All that a request may say; most of it is explained at `CLaRaForRAG.answer`.

    Attributes:
        where: JSON text of a filter.
        hybrid: also rank by BM25 over the text; None as the corpus that is served does.
        temperature: 0 is greedy search.
        top_p: the share of probability that is sampled from.
        seed: of the sampling; with equal seeds an answer is the same.
    """

    top_k: int | None = None
    memory_size: int | None = None
    retrieval_memory_size: int | None = None
    min_score: float | None = None
    max_new_tokens: int = 64
    expand: int = 0
    expand_below: float | None = None
    explain: bool = False
    where: str | None = None
    hybrid: bool | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


WRITING = {"max_new_tokens", "temperature", "top_p", "seed"}  # what a search does not depend on
SEARCHING = [field.name for field in fields(AskOptions) if field.name not in WRITING]

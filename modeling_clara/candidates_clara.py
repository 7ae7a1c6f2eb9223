"""Candidates of a retrieval: checks the documents of a call, splits them, computes missing memories, ranks them.

Stands between the text-level calls and the tensor functions of `retrieval_clara.py`. It knows nothing of prompts,
generation or corpora on disk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .retrieval_clara import flatten_memory
from .text_clara import check_list, read_document


@dataclass(frozen=True)
class Source:
    """A chunk that was retrieved. `score` is the cosine of eq. 3.1, in [-1, 1].

    `read_as` is "text" if `answer` or `stream` read the title and the text, else "memory".
    """

    document_id: str
    span: int
    score: float
    title: str
    text: str
    read_as: str = "memory"


@dataclass
class Candidate:
    """One span on offer; `order` is its document's place in the list, `row` its row in the memory tensor."""

    document_id: str
    order: int
    span: int
    title: str
    text: str
    row: int = -1


def collect_candidates(
    model, documents, n_questions: int, top_k: int | None, memory_size: int
) -> tuple[list[list[Candidate]], torch.Tensor]:
    """Check the documents of a call and compute the memories that are not stored yet.

    Args:
        model: `CLaRaForRAG`.
        documents: one list for all questions, or a list for every question; see `CLaRaForRAG.retrieve`.
        n_questions: number of questions.
        top_k: what the user asked for, or None.
        memory_size: k of the memories.

    Returns:
        The spans on offer for each question, and the (spans, k, hidden) memories that their rows point to.

    Raises:
        TypeError, ValueError: naming argument, index, rule and remedy.
    """
    documents = check_list(documents, "documents")
    nested = [isinstance(entry, Sequence) and not isinstance(entry, str | bytes) for entry in documents]
    if any(nested):
        if not all(nested):
            raise TypeError(
                f"`documents[{nested.index(False)}]` must be a list like the others, got "
                f"{type(documents[nested.index(False)]).__name__}. Pass one list for all questions, or a list for "
                "every question."
            )
        if len(documents) != n_questions:
            raise ValueError(
                f"`documents` must have one list per question ({n_questions}), got {len(documents)}. Make the "
                "lists equally long, or pass one flat list for all questions."
            )
        lists = [(entry, f"documents[{index}]") for index, entry in enumerate(documents)]
    else:
        lists = [(documents, "documents")]
    pool = _MemoryPool(model, memory_size)
    candidates = []
    for entry, name in lists:
        row = pool.add(check_list(entry, name), name)
        n_documents = row[-1].order + 1
        if top_k is not None and top_k > n_documents:
            raise ValueError(
                f"`top_k` must be <= number of documents ({n_documents}) in `{name}`, got {top_k}. Lower `top_k` or "
                "pass more documents."
            )
        candidates.append(row)
    return (candidates if any(nested) else candidates * n_questions), pool.memory()


def rank_candidates(
    queries: torch.Tensor, candidates: list[list[Candidate]], memory: torch.Tensor, memory_size: int, top_k: int
) -> list[list[tuple[Source, torch.Tensor]]]:
    """Score each question's spans, keep the best span of every document, sort; scores leave the device once.

    Args:
        queries: (questions, n, hidden) query memories.
        candidates: spans on offer for each question.
        memory: (spans, n, hidden).
        memory_size: k that is compared.
        top_k: documents per question.

    Returns:
        For each question (source, memory (n, hidden)) pairs, best first; ties go to the lower index, then the id.
    """
    vectors, queries = flatten_memory(memory, memory_size), flatten_memory(queries, memory_size)
    rows_of = {}  # one index tensor for each list of candidates, shared lists share it
    for row in candidates:
        rows_of.setdefault(id(row), torch.tensor([candidate.row for candidate in row], device=vectors.device))
    # A matrix product may round equal rows differently, by their place in it: duplicates would not tie.
    scores = torch.cat(
        [(vectors[rows_of[id(row)]] * query).sum(-1) for row, query in zip(candidates, queries, strict=True)]
    ).tolist()
    ranked, start = [], 0
    for row in candidates:
        best = {}
        for candidate, score in zip(row, scores[start : start + len(row)], strict=True):
            if candidate.order not in best or score > best[candidate.order][1]:
                best[candidate.order] = (candidate, score)
        start += len(row)
        kept = sorted(best.values(), key=lambda hit: (-hit[1], hit[0].order, hit[0].document_id))
        ranked.append(
            [
                (Source(hit.document_id, hit.span, score, hit.title, hit.text), memory[hit.row])
                for hit, score in kept[:top_k]
            ]
        )
    return ranked


class _MemoryPool:
    """Collects spans of all candidate lists, each different text once, and computes their memories together."""

    def __init__(self, model, memory_size: int):
        self.model, self.memory_size = model, memory_size
        self.rows: dict[tuple, int] = {}
        self.spans: list[dict] = []
        self.stored: dict[int, torch.Tensor] = {}

    def add(self, documents: list, name: str) -> list[Candidate]:
        """Candidates of one list, their rows pointing into `memory()`."""
        candidates, seen = [], {}
        for order, document in enumerate(documents):
            place = f"{name}[{order}]"
            document_id = _document_id(document, order, place)
            if seen.setdefault(document_id, order) != order:
                raise ValueError(
                    f"`{place}` must have an id of its own, got {document_id!r} like `{name}[{seen[document_id]}]`. "
                    "Give each document a different `id`, or none at all."
                )
            stored = document.get("memory") if isinstance(document, Mapping) else None
            if stored is not None:
                title, text = read_document(document, place)
                row = self._new_row(None)
                self.stored[row] = read_stored_memory(self.model, stored, self.memory_size, f"{place}['memory']")
                span = int(document.get("span", 0))
                candidates.append(Candidate(document_id, order, span, title, text, row))
                continue
            for part in self.model.text_processor().split_document(document, place):
                key = (part["title"], part["text"])
                if key not in self.rows:
                    self.rows[key] = self._new_row(part)
                candidates.append(
                    Candidate(document_id, order, part["span"], part["title"], part["text"], self.rows[key])
                )
        return candidates

    def _new_row(self, span: dict | None) -> int:
        self.spans.append(span)
        return len(self.spans) - 1

    def memory(self) -> torch.Tensor:
        """(rows, k, hidden) float32: computed for the texts, as given for the stored ones."""
        texts = [row for row, span in enumerate(self.spans) if span is not None]
        if not self.stored:
            return self.model.compress(self.spans, memory_size=self.memory_size)
        rows = dict(self.stored)
        if texts:
            computed = self.model.compress([self.spans[row] for row in texts], memory_size=self.memory_size)
            rows |= dict(zip(texts, computed, strict=True))
        return torch.stack([rows[row] for row in range(len(self.spans))])


def read_stored_memory(model, memory, memory_size: int, name: str) -> torch.Tensor:
    """(k, hidden) float32 on the model's device of a memory that was computed before.

    Raises:
        TypeError, ValueError: naming what is no array, of another shape or not finite.
    """
    try:
        memory = torch.as_tensor(memory, dtype=torch.float32, device=model.memory_embeddings.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`{name}` must be numbers, got {type(memory).__name__}. Pass a tensor.") from error
    hidden_size = model.config.text_config.hidden_size
    if memory.ndim != 2 or memory.shape[0] < memory_size or memory.shape[1] != hidden_size:
        raise ValueError(
            f"`{name}` must have the shape (>= {memory_size}, {hidden_size}), got {tuple(memory.shape)}. Compress the "
            "document with this model and a `memory_size` that large."
        )
    if not memory.isfinite().all():
        raise ValueError(f"`{name}` must be finite, got NaN or infinity. Compress the document again.")
    return memory[:memory_size]


def _document_id(document, order: int, place: str) -> str:
    if not isinstance(document, Mapping):
        return str(order)
    given = document.get("document_id", document.get("id"))
    if given is None:
        return str(order)
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise TypeError(f"`{place}['id']` must be a str or int, got {type(given).__name__}. Pass text.")
    return str(given)

"""What the generator reads of a question's sources: memories in the slots of a prompt, texts, or one after the other.

A reading is made before anything is generated, so what is wrong with a question is said at once.
"""

import contextlib
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import GenerationConfig

from .candidates_clara import Source, text_processor
from .configuration_clara import WindowError
from .passes_clara import CLaRaPasses
from .processing_clara import Prompt


class Reading(NamedTuple):
    """Input of the generator for one question."""

    prompt: Prompt  # with slots for the memories, after them the text
    memory: torch.Tensor  # (sources read from memory, k, hidden) float32
    sources: list[Source]  # all that are read, best first, `read_as` filled in


def prepare_readings(
    model: CLaRaPasses,
    question: str,
    hits: list[tuple[Source, torch.Tensor]],
    memory_size: int | None,
    expand: int,
    expand_below: float | None,
    generation: GenerationConfig,
    name: str,
) -> list[Reading]:
    """What the generator reads: once, or with `expand_below` all memories and, if these leave it unsure, again.

    Texts of no more tokens than their memories have vectors are read at once. What does not fit into the backbone's
    window with the text is read from memory alone.
    """
    given, readings = (model, question, hits, memory_size), []
    most = model.config.check_memory_size(memory_size)
    lengths = token_counts(model, [(source.title, source.text) for source, _ in hits[:expand]])
    is_once = expand_below is None or all(0 < length <= most for length in lengths)
    for n_texts in [expand] if is_once else [0, expand]:
        with contextlib.suppress(WindowError) if readings else contextlib.nullcontext():
            readings.append(prepare_reading(*given, n_texts, generation, name))
    return readings


def prepare_reading(
    model: CLaRaPasses,
    question: str | None,
    hits: list[tuple[Source, torch.Tensor]],
    memory_size: int | None,
    expand: int,
    generation: GenerationConfig,
    name: str,
) -> Reading:
    """What the generator reads: the memories of all hits but the best `expand`, then the text of these.

    Without a question it is a paraphrase. k is `memory_size`, by default `default_memory_size` of the sources that are
    read from memory; those of at most k tokens are read token by token (`whole_tokens`). A ValueError if a source has
    no text, or prompt and answer do not fit into the backbone's window.
    """
    texts = [replace(source, read_as="text") for source, _ in hits[:expand]]
    remembered = [source for source, _ in hits[expand:]]
    for source in texts:
        if not isinstance(source.text, str) or not source.text.strip():
            raise ValueError(
                f"the text of document {source.document_id!r} must be stored to read it with `expand`={expand}, "
                f"got {source.text!r}. Pass expand=0, which reads memories only, or store the text in the corpus."
            )
    documents = [{"title": source.title, "text": source.text} for source in texts]
    lengths = [0] * len(remembered)
    if model.config.memory_layout == "windows":
        lengths = token_counts(model, [(source.title, source.text) for source in remembered])
    if memory_size is None:
        memory_size = default_memory_size(model, lengths)
    prompt = text_processor(model).build_prompt(
        question, len(remembered), memory_size, text_documents=documents, name=name
    )
    options = "`expand`, `top_k`, `memory_size`" if texts else "`top_k`, `memory_size`"
    remedy = f"Shorten the question, or lower {options} or `max_new_tokens`."
    model.config.check_window(len(prompt.input_ids) + generation.max_new_tokens, name, remedy)
    memory = torch.stack([memory[:memory_size] for _, memory in hits])[expand:]
    memory = model.with_whole_tokens(memory, torch.tensor(lengths)) if lengths else memory
    return Reading(prompt, memory, texts + remembered)


def token_counts(model: CLaRaPasses, documents: list[tuple[str, str]]) -> list[int]:
    """Tokens of each (title, text) as the compressor read it; 0 if not known or longer than a chunk."""
    split = text_processor(model).split_document
    counts = []
    for title, text in documents:
        is_known = isinstance(text, str) and text.strip()
        chunks = split({"title": title or "", "text": text}) if is_known else []
        counts.append(chunks[0]["n_tokens"] if len(chunks) == 1 else 0)
    return counts


def default_memory_size(model: CLaRaPasses, lengths: list[int]) -> int:
    """k that is read by default of documents of so many tokens: the largest.

    Of windows the smallest that has one for every token, if the largest has: more would only be zeros.
    """
    sizes = model.config.memory_sizes
    if not all(lengths):  # of memory tokens as well
        return sizes[-1]
    return min((size for size in sizes if size >= max(lengths, default=0)), default=sizes[-1])


def check_expand_below(expand_below: float | None, expand: int, num_beams: int | None = None) -> None:
    """Raise a ValueError unless `expand_below` is None or a probability that can decide what is read as text."""
    if expand_below is None:
        return
    is_number = isinstance(expand_below, int | float) and not isinstance(expand_below, bool)
    if not is_number or not 0 < expand_below <= 1:
        raise ValueError(
            f"`expand_below` must be a probability above 0 and at most 1, got {expand_below!r}. Leave it out to read "
            "`expand` sources as text in any case."
        )
    if not expand:
        raise ValueError("`expand` must be >= 1 with `expand_below`, got 0: no source would be read as text. Pass 1.")
    if (num_beams or 1) > 1:
        raise ValueError(
            f"`num_beams` must be 1 with `expand_below`, got {num_beams}: an answer of beam search has no "
            "confidence. Leave one of them out."
        )

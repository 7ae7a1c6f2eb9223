"""The two readers that `clara demo` compares: the generator on memories, the plain backbone on the same text.

Both write their answer as it is generated and report their times. They use the public API, as a user's script would,
and of the model's inside only how a prompt is generated from.
"""

import re
import string
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from transformers.generation import BaseStreamer

from .. import Answer, CLaRaForRAG
from .models import silent

MAX_NEW_TOKENS = 64
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class _Writer(BaseStreamer):
    """Writes text as it is generated, and keeps when its first token came.

    Args:
        decode: ids -> text.
        write: takes each new piece.
    """

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], None]):
        self.decode, self.write, self.ids, self.n_written, self.first_token_at = decode, write, [], 0, None

    def put(self, value):
        if not value.numel():  # the prompt, which is given as embeddings
            return
        self.first_token_at = self.first_token_at or time.perf_counter()
        self.ids += value.flatten().tolist()
        self._send(self.decode(self.ids).rstrip("\ufffd"))

    def end(self):
        self._send(self.decode(self.ids))

    def _send(self, text: str):
        if len(text) > self.n_written:
            self.write(text[self.n_written :])
            self.n_written = len(text)


def compress_documents(model: CLaRaForRAG, documents: Sequence[Mapping]) -> list[dict]:
    """Split documents into chunks and store each chunk's memory; a chunk is a document of its own to the reader."""
    chunks = [chunk for document in documents for chunk in model.processor.split_document(document)]
    with model.bulk_compression():
        memory = model.compress(chunks)
    counts = {}
    for chunk in chunks:
        counts[chunk["id"]] = counts.get(chunk["id"], 0) + 1
    for chunk, vectors in zip(chunks, memory, strict=True):
        chunk["memory"] = vectors
        if counts[chunk["id"]] > 1:
            chunk["id"] = f"{chunk['id']}#{chunk['span']}"
    return chunks


def contains_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether an answer has a right one in it, word for word: `containment` of recipes/spaces/metrics/rag_answer.

    >>> contains_answer("It is in the Black Forest.", ["Black Forest"]), contains_answer("Newark", ["New"])
    (True, False)
    """
    said = f" {_words(text)} "
    return any(f" {words} " in said if words else not said.strip() for words in map(_words, answers))


def _words(text: str) -> str:
    return " ".join(ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())


def answer_from_text(
    model: CLaRaForRAG, question: str, documents: Sequence[Mapping], write: Callable[[str], None] = silent
) -> tuple[str, dict[str, float]]:
    """The plain backbone reads the text of the documents.

    Returns:
        The answer; `prompt_tokens`, `first_token_ms` and `decode_ms`.
    """
    prompt = _text_prompt(model, question, documents)
    generation = model.build_generation_config(None, MAX_NEW_TOKENS)
    writer = _Writer(lambda ids: model.decode_answer(ids, generation.eos_token_id), write)
    start = time.perf_counter()
    with model.lock, torch.no_grad():
        text = model.generate_texts([prompt], [_no_memory(model)], generation, role=None, streamer=writer)[0]
    times = {"first_token_ms": writer.first_token_at - start, "decode_ms": time.perf_counter() - writer.first_token_at}
    return text, {"prompt_tokens": len(prompt.input_ids)} | {name: 1e3 * value for name, value in times.items()}


def _text_prompt(model: CLaRaForRAG, question: str, documents: Sequence[Mapping]):
    prompt = model.processor.build_prompt(question, 0, model.config.max_memory_size, text_documents=documents)
    model.config.check_window(len(prompt.input_ids) + MAX_NEW_TOKENS, question, "Lower `top_k`.")
    return prompt


def _no_memory(model: CLaRaForRAG) -> torch.Tensor:
    return model.memory_embeddings.new_zeros(0, model.config.max_memory_size, model.config.text_config.hidden_size)


def answer_from_memory(
    model: CLaRaForRAG,
    question: str,
    documents: Sequence[Mapping],
    write: Callable[[str], None] = silent,
    **options,
) -> tuple[Answer, dict[str, float]]:
    """The generator reads the memories of the best documents, and what `options` of `answer` say.

    Returns:
        The `Answer`; `prompt_tokens`, `retrieve_ms` (question encoded and documents ranked), `first_token_ms` and
        `decode_ms`.
    """
    start = time.perf_counter()
    stream = model.stream(question, documents=documents, max_new_tokens=MAX_NEW_TOKENS, **options)
    marks = [time.perf_counter()]
    while True:
        try:
            piece = next(stream)
            marks.append(time.perf_counter())
            write(piece)
        except StopIteration as stop:
            marks.append(time.perf_counter())
            answer = stop.value
            break
    return answer, {
        "prompt_tokens": answer.prompt_tokens,
        "retrieve_ms": 1e3 * (marks[0] - start),
        "first_token_ms": 1e3 * (marks[1] - marks[0]),
        "decode_ms": 1e3 * (marks[-1] - marks[1]),
    }


def count_right(
    model: CLaRaForRAG, questions: Sequence[Mapping], chunks: Sequence[Mapping], *, top_k: int, **options
) -> dict[str, int]:
    """Ask questions `{question, answers}` together, from memory and, with the same documents, from text.

    Returns:
        `questions`; `memory` and `text`: answers that contain a right one; `refused`: not answered from memory;
        `expanded`: read with a text after all, as `options` of `answer` say.
    """
    texts = [row["question"] for row in questions]
    answers = model.answer(texts, documents=chunks, top_k=top_k, max_new_tokens=MAX_NEW_TOKENS, **options)
    by_id = {chunk["id"]: chunk for chunk in chunks}
    read = model.retrieve(texts, documents=chunks, top_k=top_k)
    prompts = [
        _text_prompt(model, text, [by_id[source.document_id] for source in sources])
        for text, sources in zip(texts, read, strict=True)
    ]
    generation = model.build_generation_config(None, MAX_NEW_TOKENS)
    with model.lock, torch.no_grad():
        plain = model.generate_texts(prompts, [_no_memory(model)] * len(prompts), generation, role=None)
    pairs = {"memory": [answer.text for answer in answers], "text": plain}
    right = {
        reader: sum(contains_answer(text, row["answers"]) for text, row in zip(found, questions, strict=True))
        for reader, found in pairs.items()
    }
    counts = {"refused": sum(answer.abstained for answer in answers)}
    counts["expanded"] = sum(any(source.read_as == "text" for source in answer.sources) for answer in answers)
    return {"questions": len(questions), **counts, **right}

"""Looks at a run before it costs much: what a few documents become, and about what all of them would take.

Nothing is written. An estimate makes no call.
"""

import asyncio
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from ..corpus.sources import InputRow
from .ask import Asker
from .client import Completion
from .distractors import Bm25Search
from .documents import read_chunks
from .output import cost_of
from .run import Run, needs_search, task_call
from .schemas import SCHEMAS

SENTENCE = re.compile(r"[.!?。！？]+(?:\s|$)|$", re.MULTILINE)
BYTES_PER_TOKEN = 4  # of English
SAMPLE = 200  # chunks whose prompts are rendered
ANSWER_TOKENS = {"pair": 45, "verdict": 30, "coverage": 60, "question": 40, "answer": 25}


def first_chunks(run: Run, n: int | None = None) -> Iterator[dict]:
    """The first chunks of the documents; default all."""
    documents = (found for found in read_chunks(run.source, run.splitter) if not isinstance(found, InputRow))
    return itertools.islice(itertools.chain.from_iterable(documents), n)


def preview(run: Run, teacher: Callable, n: int) -> list[dict]:
    """What becomes of the first n chunks: `{document, calls: [{messages, answer}], record, rejects}` of each."""
    chunks = list(first_chunks(run, None if needs_search(run) else n))
    ask_task = task_call(run, Bm25Search(chunks) if needs_search(run) else run.search)

    async def look() -> list[dict]:
        async with teacher() as opened:
            return await asyncio.gather(*(_look_at(chunk, run, ask_task, opened) for chunk in chunks[:n]))

    return asyncio.run(look())


async def _look_at(chunk: dict, run: Run, ask_task: Callable, teacher) -> dict:
    calls = []

    async def complete(messages: list[dict], **options) -> Completion:
        completion = await teacher.complete(messages, **options)
        calls.append({"messages": messages, "answer": completion.text})
        return completion

    outcome = await ask_task(chunk, Asker(complete, run.prompts))
    return {"document": chunk, "calls": calls, "record": outcome.record, "rejects": outcome.rejects}


def estimate(run: Run, prices: Mapping[str, float] | None = None) -> dict:
    """About how many calls and tokens a run takes, if most of what the teacher writes passes; no call is made.

    Returns:
        `documents`, `chunks`, `calls`, `prompt_tokens`, `completion_tokens`, and `cost` if prices are given.
    """
    sums, n_chunks, n_sampled, documents = Counter(), 0, 0, set()
    for chunk in first_chunks(run):
        n_chunks += 1
        documents.add(chunk["document_id"]) if chunk["span"] == 0 else None
        if n_chunks <= SAMPLE:
            n_sampled += 1
            for name, calls, n_tokens, fields in expected_calls(run, chunk):
                sums["calls"] += calls
                sums["prompt_tokens"] += calls * prompt_tokens(run, name, fields)
                sums["completion_tokens"] += calls * n_tokens
    factor = n_chunks / n_sampled if n_sampled else 0
    report = {"documents": len(documents), "chunks": n_chunks}
    report |= {name: round(sums[name] * factor) for name in ("calls", "prompt_tokens", "completion_tokens")}
    if prices:
        report["cost"] = cost_of(report["prompt_tokens"], report["completion_tokens"], prices)
    return report


def prompt_tokens(run: Run, name: str, fields: Mapping) -> float:
    """Tokens of a prompt with its schema."""
    text = "".join(message["content"] for message in run.prompts.render(name, fields))
    schema = SCHEMAS.get(name.replace("supplementary", "simple"))
    return (len(text.encode()) + len(json.dumps(schema))) / BYTES_PER_TOKEN


def expected_calls(run: Run, chunk: Mapping) -> Iterator[tuple[str, float, float, dict]]:
    """(prompt, number of calls, tokens of an answer, fields) of what a task asks about a chunk."""
    place, settings = {"title": chunk["title"], "text": chunk["text"]}, run.settings
    size, token = len(chunk["text"].encode()) / BYTES_PER_TOKEN, ANSWER_TOKENS
    pair = {"question": "?" * 40, "answer": "." * 20}
    if run.options["task"] != "scp":
        n = settings.documents if run.options["task"] == "instruct" else 1
        if n > 1:
            yield "instruct_question", 1, token["question"], {"documents": [place], "n": 1}
            yield "teacher_answer", 1, token["answer"], {"question": pair["question"], "documents": [place] * n}
        else:
            yield "retrieval_question", 1, token["question"] + token["answer"], place
        yield "verdict", 1, token["verdict"], {**place, **pair}
        return
    n_facts = sum(1 for _ in SENTENCE.finditer(chunk["text"]))
    n_simple, n_complex = min(settings.simple, n_facts), min(settings.complex, n_facts // 2)
    pairs = [pair] * (n_simple + n_complex)
    if settings.simple:
        yield "simple_pairs", 1, n_simple * token["pair"], {**place, "limit": settings.simple}
    if settings.complex:
        yield "complex_pairs", 1, n_complex * token["pair"], {**place, "limit": settings.complex}
    yield "verdict", len(pairs), token["verdict"], {**place, **pair}
    if settings.rounds and pairs:  # one of them finds something to ask for
        yield "coverage", min(2, settings.rounds + 1), token["coverage"], {**place, "pairs": pairs}
        fields = {**place, "facts": ["." * 80] * 2, "pairs": pairs}
        yield "supplementary_pairs", 1, 2 * token["pair"], fields
        yield "verdict", 2, token["verdict"], {**place, **pair}
    if settings.paraphrases:
        yield "paraphrase", min(1.3, settings.paraphrases), 1.1 * size, {**place, "problem": None}
        yield "paraphrase_verdict", min(1.3, settings.paraphrases), 30, {**place, "paraphrase": chunk["text"]}

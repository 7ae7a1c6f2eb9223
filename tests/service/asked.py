"""What the tests of the engine share: a corpus, questions with options, and the answers of the model alone."""

import asyncio
import dataclasses
import json

import pytest

from modeling_clara.service.engine import AskOptions, Engine

PLACES = ["Paris", "Berlin", "Rome", "Vienna", "Oslo", "Madrid", "Lisbon", "Athens"]
ROWS = [
    {"id": place, "title": place, "text": f"{place} is the capital of country {n}, a city.", "year": 2000 + n}
    for n, place in enumerate(PLACES)
]
ASKED = [f"What is the capital of country {n}{', and why is that so?' if n % 3 else '?'}" for n in range(8)]
OPTIONS = [
    AskOptions(max_new_tokens=12),
    AskOptions(max_new_tokens=5, expand=1, explain=True),
    AskOptions(top_k=3, memory_size=2, retrieval_memory_size=2, max_new_tokens=9),
    AskOptions(max_new_tokens=7, expand=9, hybrid=True),
    AskOptions(max_new_tokens=4, where='{"year": {"$gte": 2004}}'),
    AskOptions(max_new_tokens=4, min_score=1.0),  # abstains
    AskOptions(max_new_tokens=5, expand=1, expand_below=1.0),  # always reads again
    AskOptions(max_new_tokens=5, expand=1, expand_below=1e-9, explain=True),  # never does
]


def directly(model, corpus, question: str, options: AskOptions):
    """What `model.answer` gives."""
    given = dataclasses.asdict(options)
    where, hybrid = given.pop("where"), given.pop("hybrid")
    assert not given.pop("temperature") and given.pop("top_p") == 1.0 and given.pop("seed") is None
    view = corpus.with_options(where=where and json.loads(where), hybrid=hybrid)
    return model.answer([question], corpus=view, **given)[0]


def assert_same(found, wanted) -> None:
    """Equal answers; the cosines of a batch are rounded differently."""

    def plain(answer):
        return dataclasses.replace(answer, sources=[dataclasses.replace(s, score=0.0) for s in answer.sources])

    assert plain(found) == plain(wanted)
    scores = ([source.score for source in answer.sources] for answer in (found, wanted))
    assert next(scores) == pytest.approx(next(scores), abs=1e-5)


def run(work, *arguments, **options):
    """The result of `work(engine)` with a running engine of these arguments."""

    async def main():
        async with asyncio.timeout(60), Engine(*arguments, **options) as engine:
            return await work(engine)

    return asyncio.run(main())


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def collect(stream) -> list:
    return [item async for item in stream]

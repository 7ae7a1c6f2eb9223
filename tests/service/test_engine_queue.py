"""The engine's queue and its callers: limits, callers that leave, an orderly end; changes that are durable."""

import asyncio
import contextlib
import itertools
import threading
import time

import pytest
from asked import ASKED, OPTIONS, ROWS, assert_same, collect, directly, run, until

from modeling_clara import CompressedCorpus
from modeling_clara.service import engine as engine_module
from modeling_clara.service import writing
from modeling_clara.service.engine import AskOptions, Engine, Overloaded, Stopping


@pytest.fixture(scope="module")
def corpus(shared_model, tmp_path_factory) -> CompressedCorpus:
    """For tests that only read it."""
    return CompressedCorpus.build(shared_model, ROWS, tmp_path_factory.mktemp("corpora") / "corpus")


@pytest.fixture
def own_corpus(shared_model, tmp_path) -> CompressedCorpus:
    """To change."""
    return CompressedCorpus.build(shared_model, ROWS, tmp_path / "corpus")


# --- the queue and callers that leave --------------------------------------------------------------------------------


def test_the_queue_is_bounded(shared_model, corpus):
    async def work(engine):
        with shared_model.lock:
            tasks = [asyncio.ensure_future(engine.answer(question, OPTIONS[0])) for question in ASKED]
            await until(lambda: engine.n_waiting == 4)
            with pytest.raises(Overloaded) as error:
                engine.stream(ASKED[0])
            assert error.value.retry_after > 0 and not isinstance(error.value, Stopping)
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = run(work, shared_model, corpus, max_queue=4)
    refused = [answer for answer in found if isinstance(answer, Overloaded)]
    assert len(refused) == len(ASKED) - 4  # the lock is ours: nothing ran
    for answer, question in zip(found, ASKED, strict=True):
        if answer not in refused:
            assert_same(answer, directly(shared_model, corpus, question, OPTIONS[0]))


def test_what_has_not_begun_is_cancelled_with_its_caller(shared_model, corpus):
    async def work(engine):
        with shared_model.lock:
            tasks = [asyncio.ensure_future(engine.answer(question, OPTIONS[0])) for question in ASKED]
            await until(lambda: engine.n_waiting == 8)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(tasks[0], 0.01)
            tasks[1].cancel()
            await until(lambda: engine.n_waiting == 6)
        answers = await asyncio.gather(*tasks[2:])
        await until(lambda: not engine.n_running)
        return answers

    for answer, question in zip(run(work, shared_model, corpus), ASKED[2:], strict=True):
        assert_same(answer, directly(shared_model, corpus, question, OPTIONS[0]))


def two_long(model, corpus) -> tuple[AskOptions, list[str], list]:
    """Options, two questions, and their answers of as many tokens as the options allow."""
    options = AskOptions(max_new_tokens=120)
    answers = ((question, directly(model, corpus, question, options)) for question in ASKED)
    pairs = list(itertools.islice((pair for pair in answers if len(pair[1].text) > 150), 2))
    return options, [question for question, _ in pairs], [answer for _, answer in pairs]


def test_a_stream_that_is_closed_stops(shared_model, corpus):
    options, questions, wanted = two_long(shared_model, corpus)

    async def work(engine):
        n_requests, passes = [], threading.Semaphore(20)
        engine.on_pass = lambda n: (n_requests.append(n), passes.acquire(timeout=60))
        first, second = (engine.stream(question, options) for question in questions)
        pieces = [await anext(second)]  # of the first 20 passes
        await first.aclose()
        assert await collect(first) == []
        passes.release(1000)
        pieces += await collect(second)
        assert set(n_requests[21:40]) == {1}  # the row of the first is gone, and the second goes on
        async with contextlib.aclosing(engine.stream(questions[0], options)) as stream:
            await anext(stream)
        await until(lambda: not engine.n_running)
        return pieces

    *pieces, answer = run(work, shared_model, corpus)
    assert_same(answer, wanted[1])
    assert "".join(pieces) == answer.text and len(pieces) > 50


def test_a_short_answer_does_not_wait_for_a_long_one(shared_model, corpus):
    options, questions, wanted = two_long(shared_model, corpus)

    async def work(engine):
        stream = engine.stream(questions[0], options)
        await anext(stream)
        await engine.answer(ASKED[1], AskOptions(max_new_tokens=2))
        assert engine.n_running  # the long one
        return (await collect(stream))[-1]

    assert_same(run(work, shared_model, corpus), wanted[0])


def test_what_fails_for_all_is_told_to_all_and_the_next_is_answered(shared_model, corpus, monkeypatch):
    decode, broken = engine_module.decode_answer, [True]

    def fail_once(*arguments):
        if broken.pop() if broken else False:
            raise RuntimeError("cannot be delivered")
        return decode(*arguments)

    async def work(engine):
        monkeypatch.setattr(engine_module, "decode_answer", fail_once)
        with pytest.raises(RuntimeError, match="cannot be delivered"):
            await asyncio.wait_for(engine.answer(ASKED[0], OPTIONS[0]), 60)
        return await asyncio.wait_for(engine.answer(ASKED[0], OPTIONS[0]), 60)

    assert_same(run(work, shared_model, corpus), directly(shared_model, corpus, ASKED[0], OPTIONS[0]))


def test_close_finishes_what_was_taken(shared_model, corpus):
    async def main():
        engine = Engine(shared_model, corpus, max_batch=3)
        with pytest.raises(Stopping):
            await engine.answer(ASKED[0])
        await engine.start()
        tasks = [asyncio.ensure_future(engine.answer(question, OPTIONS[0])) for question in ASKED]
        await until(lambda: engine.n_waiting + engine.n_running)
        closing = asyncio.ensure_future(engine.close())
        await asyncio.sleep(0)
        for call in (engine.answer(ASKED[0]), engine.search(ASKED[0]), engine.embed(ASKED), engine.write(len)):
            with pytest.raises(Stopping):
                await call
        await closing
        await engine.close()
        assert not shared_model.roles.merged_weights
        return [task.result() for task in tasks]

    for answer, question in zip(asyncio.run(main()), ASKED, strict=True):
        assert_same(answer, directly(shared_model, corpus, question, OPTIONS[0]))


# --- writes ----------------------------------------------------------------------------------------------------------


def test_a_write_is_durable_and_seen_by_the_next_search(shared_model, own_corpus):
    new = {"id": "Quito", "title": "Quito", "text": "Quito is the capital of country 99, a city.", "year": 2020}
    asked = "What is the capital of country 99?"
    changed = {**ROWS[0], "text": "Paris flows through Italy."}

    async def work(engine):
        before = await engine.answer(asked, AskOptions(where='{"year": 2020}'))
        changes = await engine.write(lambda corpus: corpus.add([new], batch_size=4))
        assert changes.n_documents == 1 and "Quito" in CompressedCorpus.open(own_corpus.folder)
        after = await engine.answer(asked, AskOptions(where='{"year": 2020}'))
        paris = AskOptions(where='{"document_id": "Paris"}', max_new_tokens=9)
        answers = [await engine.answer(asked, paris)]
        await engine.write(lambda corpus: corpus.update([changed]))
        answers.append(await engine.answer(asked, paris))  # no beginning of the old text is read
        assert_same(answers[1], directly(shared_model, own_corpus, asked, paris))
        with pytest.raises(KeyError):
            await engine.write(lambda corpus: corpus.delete(["nobody"]))
        assert await engine.write(lambda corpus: corpus.delete(["Quito"])) == 1
        return before, after, answers

    before, after, answers = run(work, shared_model, own_corpus)
    assert before.abstained and [source.document_id for source in after.sources] == ["Quito"]
    assert answers[0].sources[0].text != answers[1].sources[0].text == "Paris flows through Italy."


def test_writes_run_one_after_the_other_and_answers_go_on_meanwhile(shared_model, own_corpus):
    running, gate = [], threading.Event()

    def change(corpus):
        running.append(1)
        assert len(running) == 1
        gate.wait(30)
        running.pop()

    async def work(engine):
        writes = [asyncio.ensure_future(engine.write(change)) for _ in range(3)]
        await until(lambda: running)
        answer = await engine.answer(ASKED[0], OPTIONS[0])
        gate.set()
        await asyncio.gather(*writes)
        return answer

    assert_same(run(work, shared_model, own_corpus), directly(shared_model, own_corpus, ASKED[0], OPTIONS[0]))


def test_many_small_writes_are_compacted(shared_model, own_corpus, monkeypatch):
    monkeypatch.setattr(writing, "SMALL_SHARDS", 3)

    async def work(engine):
        rows = [{"id": f"new{n}", "text": f"Text {n} of France.", "year": n} for n in range(6)]
        await asyncio.gather(*(engine.write(lambda corpus, row=row: corpus.add([row])) for row in rows))

    run(work, shared_model, own_corpus)
    opened = CompressedCorpus.open(own_corpus.folder)
    assert len(opened) == len(own_corpus) == len(ROWS) + 6 and len(opened.manifest.shards) <= 3
    assert sum(1 for _ in opened.folder.glob("data/*.parquet")) == len(opened.manifest.shards)


def test_the_lock_of_a_model_is_fair(shared_model):
    stop, passes = threading.Event(), []

    def compress():
        while not stop.is_set():
            with shared_model.lock, shared_model.lock:
                passes.append(1)
                time.sleep(0.001)

    thread = threading.Thread(target=compress)
    thread.start()
    try:
        for _ in range(20):
            n_before = len(passes)
            with shared_model.lock:
                assert len(passes) - n_before <= 3
    finally:
        stop.set()
        thread.join()

"""The engine of the service: equal answers in any company, a bounded queue, callers that leave, durable writes."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import threading
import time

import pytest
import torch
from tiny import HIDDEN, randomize_adapters, save_backbone

from modeling_clara import CLaRaForRAG, CompressedCorpus
from modeling_clara.generation_clara import decode_answer
from modeling_clara.service import engine as engine_module
from modeling_clara.service.engine import AskOptions, Engine, Overloaded, Stopping

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
]


@pytest.fixture(scope="module")
def corpus(shared_model, tmp_path_factory) -> CompressedCorpus:
    """For tests that only read it."""
    return CompressedCorpus.build(shared_model, ROWS, tmp_path_factory.mktemp("corpora") / "corpus")


@pytest.fixture
def own_corpus(shared_model, tmp_path) -> CompressedCorpus:
    """To change."""
    return CompressedCorpus.build(shared_model, ROWS, tmp_path / "corpus")


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


# --- answers ---------------------------------------------------------------------------------------------------------


BARE = {"prefix_bytes": 0, "merge": False, "max_batch": 3}


@pytest.mark.parametrize(
    ("name", "settings"), [("shared_model", BARE), ("shared_windows", {})], ids=["bare", "default"]
)
def test_answers_in_any_company_are_those_of_the_model_alone(name, settings, request, tmp_path):
    model = request.getfixturevalue(name)
    corpus = CompressedCorpus.build(model, ROWS, tmp_path / "corpus")
    jobs = [(question, options) for question in ASKED[:5] for options in OPTIONS]
    wanted = [directly(model, corpus, *job) for job in jobs]
    assert len({answer.text for answer in wanted}) > 8 and any(answer.abstained for answer in wanted)

    async def ask_twice(engine):
        for _ in range(2):  # the second time beginnings of prompts are there
            found = await asyncio.gather(*(engine.answer(*job) for job in jobs))
            for answer, expected in zip(found, wanted, strict=True):
                assert_same(answer, expected)

    run(ask_twice, model, corpus, max_queue=len(jobs), **settings)
    assert not model.roles.merged_weights and not model.training


@pytest.mark.parametrize("architecture", ["gemma2", "gpt_neox", "mistral"])
def test_other_architectures(architecture, tmp_path):
    window = {"sliding_window": 64} if architecture == "mistral" else {}
    folder = save_backbone(tmp_path / "backbone", architecture, **window)
    model = CLaRaForRAG.from_backbone(folder, memory_sizes=(2, 4), lora_rank=4, config_kwargs={"retrieval_top_k": 1})
    randomize_adapters(model)
    corpus = CompressedCorpus.build(model, ROWS, tmp_path / "corpus")
    jobs = [(question, OPTIONS[number % 2]) for number, question in enumerate(ASKED[:4])]
    wanted = [directly(model, corpus, *job) for job in jobs]
    found = run(lambda engine: asyncio.gather(*(engine.answer(*job) for job in jobs)), model, corpus)
    assert [answer.text for answer in found] == [answer.text for answer in wanted]


def test_answers_in_a_batch_can_be_read_as_they_come(shared_model, corpus):
    options = [AskOptions(max_new_tokens=6 + 3 * number) for number in range(6)]
    wanted = [directly(shared_model, corpus, *job) for job in zip(ASKED[:6], options, strict=True)]

    async def work(engine):
        with shared_model.lock:  # so that all wait
            streams = [engine.stream(*job) for job in zip(ASKED[:6:2], options[::2], strict=True)]
            jobs = zip(ASKED[1:6:2], options[1::2], strict=True)
            whole = [asyncio.ensure_future(engine.answer(*job)) for job in jobs]
            await until(lambda: engine.n_waiting + engine.n_running == 6)
        return await asyncio.gather(*map(collect, streams)), await asyncio.gather(*whole)

    streamed, whole = run(work, shared_model, corpus)
    for (*pieces, answer), expected in zip(streamed, wanted[::2], strict=True):
        assert_same(answer, expected)
        assert "".join(pieces) == answer.text and len(pieces) > 1
    for answer, expected in zip(whole, wanted[1::2], strict=True):
        assert_same(answer, expected)


def test_what_is_wrong_with_one_request_is_told_to_its_caller_alone(shared_model, corpus):
    wrong = [
        ("Paris " * 900, OPTIONS[0], "must fit into the backbone's window"),
        (ASKED[0], AskOptions(top_k=0), "`top_k` must be an int >= 1"),
        (ASKED[0], AskOptions(memory_size=3), "`memory_size` must be one of"),
        (ASKED[0], AskOptions(max_new_tokens=True), "`max_new_tokens` must be an int >= 1"),
        (ASKED[0], AskOptions(where="{"), "`where` must be JSON"),
        (ASKED[0], AskOptions(where="[" * 100_000), "`where` must be JSON"),
        (ASKED[0], AskOptions(where='{"colour": 1}'), "colour"),
        (ASKED[0], AskOptions(max_new_tokens=480, expand=1), "must fit into the backbone's window"),
        (ASKED[0], AskOptions(temperature=-1.0), "`temperature` must be"),
        (ASKED[0], AskOptions(temperature=1.0, top_p=0), "`top_p` must be"),
        (ASKED[0], AskOptions(temperature=1.0, seed=2**70), "`seed` must be"),
        (" ", OPTIONS[0], "`question` must not be empty"),
    ]
    jobs = [(question, options) for question, options, _ in wrong] + [(question, OPTIONS[0]) for question in ASKED[:3]]

    async def work(engine):
        found = await asyncio.gather(*(engine.answer(*job) for job in jobs), return_exceptions=True)
        with pytest.raises(TypeError, match="`question` must be a str"):
            engine.stream(None)
        with pytest.raises(ValueError, match="must fit into the backbone's window"):
            await collect(engine.stream(*jobs[0]))
        with pytest.raises(TypeError, match=r"`history\[0\]` must be \(question, answer\)"):
            await engine.answer(ASKED[0], history=["What?"])
        return found

    found = run(work, shared_model, corpus, max_queue=99)
    for error, (_, _, message) in zip(found[: len(wrong)], wrong, strict=True):
        assert isinstance(error, ValueError) and message in str(error)
    for answer, question in zip(found[len(wrong) :], ASKED[:3], strict=True):
        assert_same(answer, directly(shared_model, corpus, question, OPTIONS[0]))


def test_broken_weights_are_an_error_and_no_end_of_the_service(model, corpus):
    weight = model.get_output_embeddings().weight.detach()
    kept = weight.clone()

    async def work(engine):
        with model.lock:
            weight.fill_(torch.nan)
        with pytest.raises(ValueError, match="the generator must give finite logits"):
            await engine.answer(ASKED[0])
        with model.lock:
            weight.copy_(kept)
        return await engine.answer(ASKED[0], OPTIONS[0])

    assert_same(run(work, model, corpus), directly(model, corpus, ASKED[0], OPTIONS[0]))


def test_search_and_embed(shared_model, corpus):
    async def work(engine):
        found = await asyncio.gather(*(engine.search(question, AskOptions(top_k=3)) for question in ASKED))
        return found, await asyncio.gather(engine.embed(ASKED[:3]), engine.embed(ASKED[3:5]), engine.embed(ASKED, 2))

    found, (first, second, small) = run(work, shared_model, corpus)
    wanted = shared_model.retrieve(ASKED, corpus=corpus, top_k=3)
    assert [[s.document_id for s in row] for row in found] == [[s.document_id for s in row] for row in wanted]
    queries = shared_model.encode_queries(ASKED)
    torch.testing.assert_close(torch.cat([first, second]), queries[:5])
    torch.testing.assert_close(small, queries[:, :2])
    assert first.shape == (3, 4, HIDDEN)


# --- sampling --------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_text_in_any_company(shared_model, corpus):
    jobs = [
        (question, AskOptions(max_new_tokens=9, temperature=1.0, seed=seed))
        for question in ASKED[:4]
        for seed in (7, 8)
    ]

    async def work(engine):
        alone = [(await engine.answer(*job)).text for job in jobs]
        together = await asyncio.gather(*(engine.answer(*job) for job in jobs))
        narrow = AskOptions(max_new_tokens=9, temperature=1.0, top_p=1e-6, seed=1)
        return alone, [answer.text for answer in together], await engine.answer(ASKED[0], narrow)

    alone, together, narrow = run(work, shared_model, corpus)
    assert alone == together and alone[::2] != alone[1::2]
    assert narrow.text == directly(shared_model, corpus, ASKED[0], AskOptions(max_new_tokens=9)).text


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
        first, second = (engine.stream(question, options) for question in questions)
        await anext(first)
        await first.aclose()
        assert await collect(first) == []
        pieces = [await anext(second) for _ in range(3)]
        assert engine.n_running == 1  # the row of the first is gone, and the second goes on
        pieces += await collect(second)
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
    monkeypatch.setattr(engine_module, "SMALL_SHARDS", 3)

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


# --- several turns, another generator --------------------------------------------------------------------------------


def test_earlier_turns_are_context_of_the_search(shared_model, corpus):
    asked, options = "And of Spain?", AskOptions(max_new_tokens=4, top_k=1)
    turns = [(ASKED[6], "Lisbon"), (ASKED[1], "Berlin")]
    histories = [(), turns, [("Older?", ""), *turns], [turns[0], ("Long " * 500, ""), turns[1]]]

    async def work(engine):
        return [await engine.answer(asked, options, history) for history in histories]

    found = run(work, shared_model, corpus)
    queries = [asked, f"{ASKED[6]} {ASKED[1]} {asked}", f"{ASKED[6]} {ASKED[1]} {asked}", f"{ASKED[1]} {asked}"]
    for answer, (hit,) in zip(found, shared_model.retrieve(queries, corpus=corpus, top_k=1), strict=True):
        assert answer.sources[0].document_id == hit.document_id
        assert answer.sources[0].score == pytest.approx(hit.score, abs=1e-5)
        only = corpus.with_options(where={"document_id": hit.document_id})
        wanted = shared_model.answer([asked], corpus=only, max_new_tokens=4, top_k=1)[0]
        assert (answer.text, answer.prompt_tokens) == (wanted.text, wanted.prompt_tokens)


class Generator:
    """Another server's part, done here: text of nothing but embeddings."""

    def __init__(self):
        self.calls, self.model, self.is_closed = [], None, False

    async def connect(self, model) -> None:
        self.model = model

    async def close(self) -> None:
        self.is_closed = True

    async def generate(self, inputs_embeds, max_new_tokens, temperature, top_p, seed, stop_ids) -> list[str]:
        self.calls.append((max_new_tokens, temperature, top_p, seed))
        texts = []
        for rows in inputs_embeds:
            config = self.model.build_generation_config(None, max_new_tokens)
            assert config.eos_token_id == stop_ids
            with self.model.lock, torch.no_grad(), self.model.roles.use("generator"):
                mask = torch.ones(1, len(rows), dtype=torch.long)
                ids = self.model.backbone.generate(
                    inputs_embeds=rows[None], attention_mask=mask, generation_config=config
                )
            texts.append(decode_answer(self.model, ids[0].tolist(), stop_ids))
        return texts

    async def stream(self, inputs_embeds, max_new_tokens, temperature, top_p, seed, stop_ids):
        (text,) = await self.generate([inputs_embeds], max_new_tokens, temperature, top_p, seed, stop_ids)
        for start in range(0, len(text), 3):
            yield text[start : start + 3]


def test_another_generator_reads_the_same_embeddings(shared_model, corpus):
    generator = Generator()
    jobs = [(question, options) for question in ASKED[:2] for options in OPTIONS]

    async def work(engine):
        found = await asyncio.gather(*(engine.answer(*job) for job in jobs))
        *pieces, streamed = await collect(engine.stream(*jobs[0]))
        assert "".join(pieces) == streamed.text and len(pieces) > 1
        assert [item.abstained for item in await collect(engine.stream(ASKED[0], OPTIONS[5]))] == [True]
        await engine.answer(ASKED[0], AskOptions(max_new_tokens=3, temperature=0.5, top_p=0.9, seed=4))
        return [*found, streamed]

    found = run(work, shared_model, corpus, generator=generator, max_queue=99)
    for answer, job in zip(found, [*jobs, jobs[0]], strict=True):
        assert_same(answer, directly(shared_model, corpus, *job))
    assert generator.is_closed and generator.calls[-1] == (3, 0.5, 0.9, 4)

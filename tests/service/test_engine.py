"""The engine of the service: the same answers in any company, errors for whom they are, other generators."""

import asyncio

import pytest
import torch
from asked import ASKED, OPTIONS, ROWS, assert_same, collect, directly, run, until
from tiny import HIDDEN, randomize_adapters, save_backbone

from modeling_clara import CLaRaForRAG, CompressedCorpus
from modeling_clara.generation_clara import decode_answer
from modeling_clara.service.decoding import Decoder
from modeling_clara.service.engine import AskOptions


@pytest.fixture(scope="module")
def corpus(shared_model, tmp_path_factory) -> CompressedCorpus:
    """For tests that only read it."""
    return CompressedCorpus.build(shared_model, ROWS, tmp_path_factory.mktemp("corpora") / "corpus")


# --- answers ---------------------------------------------------------------------------------------------------------


BARE = {"prefix_bytes": 0, "merge": False, "max_batch": 3}


@pytest.mark.parametrize(
    ("name", "settings"), [("shared_model", BARE), ("shared_windows", {})], ids=["bare", "default"]
)
def test_answers_in_any_company_are_those_of_the_model_alone(name, settings, request, tmp_path):
    model = request.getfixturevalue(name)
    corpus = CompressedCorpus.build(model, ROWS, tmp_path / "corpus")
    jobs = [(question, options) for question in ASKED[:4] for options in OPTIONS]
    wanted = [directly(model, corpus, *job) for job in jobs]
    assert len({answer.text for answer in wanted}) > 6 and any(answer.abstained for answer in wanted)

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


def test_a_stream_of_two_readings_shows_the_one_that_counts(shared_model, corpus):
    """Half of the answers from memory are read again, beside the others."""
    from_memory = [directly(shared_model, corpus, question, AskOptions(max_new_tokens=6)) for question in ASKED]
    threshold = sorted(answer.confidence for answer in from_memory)[len(ASKED) // 2]
    options = AskOptions(max_new_tokens=6, expand=1, expand_below=threshold)
    wanted = [directly(shared_model, corpus, question, options) for question in ASKED]
    assert {answer.sources[0].read_as for answer in wanted} == {"memory", "text"}

    async def work(engine):
        return await asyncio.gather(*(collect(engine.stream(question, options)) for question in ASKED))

    for (*pieces, answer), expected in zip(run(work, shared_model, corpus), wanted, strict=True):
        assert_same(answer, expected)
        assert "".join(pieces) == answer.text and answer.confidence == pytest.approx(expected.confidence, rel=1e-3)


def test_an_error_of_the_second_reading_reaches_its_caller(shared_model, corpus, monkeypatch):
    add = Decoder.add

    def failing(decoder, drafts):
        if any(source.read_as == "text" for draft in drafts for source in draft.reading.sources):
            raise RuntimeError("out of memory")
        add(decoder, drafts)

    monkeypatch.setattr(Decoder, "add", failing)

    async def work(engine):
        with pytest.raises(RuntimeError, match="out of memory"):
            await engine.answer(ASKED[0], AskOptions(max_new_tokens=3, expand=1, expand_below=1.0))
        return await engine.answer(ASKED[0], AskOptions(max_new_tokens=3))

    assert (
        run(work, shared_model, corpus).text
        == directly(shared_model, corpus, ASKED[0], AskOptions(max_new_tokens=3)).text
    )


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


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-45, 1e-30])
def test_the_smallest_temperatures_are_greedy_and_harm_no_other(temperature, shared_model, corpus):
    cold = AskOptions(max_new_tokens=9, temperature=temperature, top_p=1e-300, seed=1)

    async def work(engine):
        return await asyncio.gather(*(engine.answer(q, o) for q in ASKED[:2] for o in (OPTIONS[0], cold)))

    found = run(work, shared_model, corpus)
    for place, question in enumerate(ASKED[:2]):
        for answer, n_tokens in zip(found[2 * place :], (12, 9), strict=False):
            assert_same(answer, directly(shared_model, corpus, question, AskOptions(max_new_tokens=n_tokens)))


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
    local = [options for options in OPTIONS if options.expand_below is not None]
    jobs = [(question, options) for question in ASKED[:2] for options in OPTIONS if options not in local]

    async def work(engine):
        found = await asyncio.gather(*(engine.answer(*job) for job in jobs))
        with pytest.raises(ValueError, match="`expand_below` must be left out where another server writes"):
            await engine.answer(ASKED[0], local[0])
        *pieces, streamed = await collect(engine.stream(*jobs[0]))
        assert "".join(pieces) == streamed.text and len(pieces) > 1
        assert [item.abstained for item in await collect(engine.stream(ASKED[0], OPTIONS[5]))] == [True]
        await engine.answer(ASKED[0], AskOptions(max_new_tokens=3, temperature=0.5, top_p=0.9, seed=4))
        return [*found, streamed]

    found = run(work, shared_model, corpus, generator=generator, max_queue=99)
    for answer, job in zip(found, [*jobs, jobs[0]], strict=True):
        assert_same(answer, directly(shared_model, corpus, *job))
    assert generator.is_closed and generator.calls[-1] == (3, 0.5, 0.9, 4)

"""`evaluation/systems.py` and `spans.py` on a tiny model: every system against the public calls of the model itself.

Documents are short and one is long, so that it has several spans. Memories lie in a float16 corpus; what it decodes
is handed to the public calls as stored memories, so that answers must be equal.
"""

import numpy as np
import pytest
import torch
from evaluation.questions import EvaluationData, Question
from evaluation.run import _predict
from evaluation.spans import Spans, compress_documents, finish_codec, open_memories
from evaluation.systems import (
    COMPARING,
    RANKING,
    SYSTEMS,
    Bench,
    Clock,
    read,
    retrieve,
    rows_to_read,
    span_bytes,
    time_one,
    wrong_rows,
)
from evaluation.tasks import Task, make_tasks, needed_documents

from modeling_clara.codecs_clara import Codec
from modeling_clara.generation_clara import eval_mode

N_TOKENS = 8
SAME_IN_ANY_BATCH = [
    "clara",
    "clara_expand",
    "text",
    "bm25_text",
    "bm25_memory",
    "hybrid",
    "hybrid_scores",
    "closed_book",
]
SAME_IN_ANY_BATCH += ["wrong_memory"]
PLACES = "France Germany Italy Spain Norway Egypt Peru Japan India Kenya Chile Cuba".split()
LONG = " ".join(f"The river number {number} of Austria flows through the city {number}." for number in range(9))


def documents() -> dict[str, dict]:
    found = {}
    for n, place in enumerate(PLACES):
        if n == 5:
            found["long"] = {"title": "Austria", "text": LONG}
        found[f"d{n}"] = {"title": "" if n % 3 else place, "text": f"City {n} is the capital of {place}."}
    return found


def make_data() -> EvaluationData:
    names, questions = list(documents()), []
    for n, place in enumerate(PLACES[:6]):
        others = [names[(3 * n + step) % len(names)] for step in range(4)]
        candidates = tuple(dict.fromkeys(("long", f"d{n}", *others)))
        text = f"What is the capital of {place}?" if n else "Which river flows through Austria, and where?"
        questions.append(Question(f"q{n}", text, ("Rome",), candidates[::-1], (f"d{n}",), f"x.jsonl:{n + 1}"))
    return EvaluationData("x.jsonl", "0" * 64, "multihop", questions, documents())


def nothing(texts, n):
    raise AssertionError("no candidates need to be chosen")


@pytest.fixture(scope="session")
def memories(shared_model, tmp_path_factory) -> dict[str, Spans]:
    """The spans with their memories, by codec."""
    folder = tmp_path_factory.mktemp("memories")
    found = {}
    for codec in ("float16", "int8", "int4"):
        compress_documents(shared_model, documents(), folder)
        finish_codec(folder, codec)
        found[codec] = open_memories(shared_model, folder, codec, len(documents()))
    return found


@pytest.fixture
def bench(shared_model, memories) -> Bench:
    return Bench(shared_model, memories["float16"], top_k=2, memory_size=4, retrieval_memory_size=2,
                 max_new_tokens=N_TOKENS, text_reader=shared_model)  # fmt: skip


@pytest.fixture
def tasks() -> list[Task]:
    return make_tasks(make_data(), "normal", nothing)


def predict(bench: Bench, name: str, tasks) -> list[dict]:
    return _predict(bench, SYSTEMS[name], tasks)


def without_seconds(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if not key.endswith("seconds")} for row in rows]


def stored(spans: Spans, names) -> list[dict]:
    """Documents for the public calls, each span one with the memory that the corpus gives back."""
    return [
        {"id": f"{name}/{row}", **spans.document(row), "memory": spans.memories([row], 4)[0]}
        for name in names
        for row in spans.rows[name]
    ]


def generate(model, question: str, texts: list[dict], role: str | None) -> str:
    """The answer of one question to texts in the prompt, without any of the evaluation's code."""
    prompt = model.processor.build_prompt(question, 0, 4, text_documents=texts)
    ids = torch.tensor([prompt.input_ids])
    config = model.build_generation_config(None, N_TOKENS)
    with torch.no_grad(), eval_mode(model), model.roles.use(role):
        embeddings = model.backbone.get_input_embeddings()(ids)
        found = model.backbone.generate(
            inputs_embeds=embeddings, attention_mask=torch.ones_like(ids), generation_config=config
        )
    return model.decode_answer(found[0].tolist(), config.eos_token_id)


# --- clara -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_size, compared", [(4, 2), (2, 4), (2, 2)])
def test_clara_is_the_public_answer(bench, tasks, memory_size, compared):
    """Rankings, cosines and answers are those of `retrieve` and `answer` over the same stored memories."""
    bench.memory_size, bench.retrieval_memory_size = memory_size, compared
    for task, row in zip(tasks, predict(bench, "clara", tasks), strict=True):
        given = stored(bench.spans, task.candidates)
        (ranked,) = bench.model.retrieve(
            [task.question.text], documents=given, top_k=len(given), retrieval_memory_size=compared
        )
        names, scores, best = [], [], []
        for source in ranked:  # a document counts once, by its best span
            name = source.document_id.partition("/")[0]
            if name not in names:
                names.append(name)
                scores.append(source.score)
                best.append(source.document_id)
        assert row["retrieved"] == names and sorted(names) == sorted(task.candidates)
        assert row["scores"] == pytest.approx(scores, abs=2e-6)
        assert row["read"] == names[:2]
        chosen = [next(document for document in given if document["id"] == name) for name in best[:2]]
        (answer,) = bench.model.answer(
            [task.question.text], documents=chosen, top_k=2, memory_size=memory_size,
            retrieval_memory_size=compared, max_new_tokens=N_TOKENS,
        )  # fmt: skip
        assert (row["prediction"] or "") == answer.text and (row["failure"] is None) == bool(answer.text)
        prompt = bench.model.processor.build_prompt(task.question.text, 2, memory_size)
        assert row["n_tokens"] == len(prompt.input_ids)


def test_float16_ranks_as_fresh_memories(bench, tasks):
    """Against documents that are compressed at once: cosines agree to what float16 rounds."""
    for task, row in zip(tasks, predict(bench, "clara", tasks), strict=True):
        given = [{"id": name, **documents()[name]} for name in task.candidates]
        (ranked,) = bench.model.retrieve(
            [task.question.text], documents=given, top_k=len(given), retrieval_memory_size=2
        )
        fresh = {source.document_id: source.score for source in ranked}
        assert row["scores"] == pytest.approx([fresh[name] for name in row["retrieved"]], abs=2e-3)


def test_long_documents_are_read_by_their_best_span(bench, tasks):
    spans = bench.spans
    assert len(spans.rows["long"]) > 2 and len(spans) == len(spans.rows["long"]) + len(PLACES)
    parts = bench.model.processor.split_document(documents()["long"])
    assert [spans.document(row) for row in spans.rows["long"]] == [{k: p[k] for k in ("title", "text")} for p in parts]
    (hits,) = retrieve(bench, SYSTEMS["clara"], tasks[:1], Clock())
    assert sum(spans.document_ids[row] == "long" for row, _ in hits) == 1
    query = bench.model.encode_queries([tasks[0].question.text], memory_size=2)[0].flatten()
    vectors = spans.memories(list(spans.rows["long"]), 2).flatten(1)
    cosines = torch.cosine_similarity(vectors, query[None], dim=1)
    row, score = next(hit for hit in hits if spans.document_ids[hit[0]] == "long")
    assert row == spans.rows["long"].start + int(cosines.argmax())
    assert score == pytest.approx(float(cosines.max()), abs=1e-5)


@pytest.mark.parametrize("name", SAME_IN_ANY_BATCH)
def test_batches_change_nothing(bench, tasks, name):
    """One question at a time, all at once, in another order: the same rows."""
    together = without_seconds(predict(bench, name, tasks))
    alone = [without_seconds(predict(bench, name, [task]))[0] for task in tasks]
    backwards = without_seconds(predict(bench, name, tasks[::-1]))[::-1]
    for row, *others in zip(together, alone, backwards, strict=True):
        scores = row.pop("scores")
        for other in others:
            assert other.pop("scores") == pytest.approx(scores, abs=2e-6)
            assert row == other


def test_the_whole_corpus_is_all_documents_as_candidates(bench):
    data = make_data()
    for everywhere in make_tasks(data, "corpus", nothing):
        listed = Task(everywhere.question, tuple(documents()), everywhere.gold)
        ours, theirs = (without_seconds(predict(bench, "clara", [task]))[0] for task in (everywhere, listed))
        assert ours.pop("scores") == pytest.approx(theirs.pop("scores"), abs=2e-6)
        assert ours == theirs and len(ours["retrieved"]) == len(documents())


# --- texts and closed book -------------------------------------------------------------------------------------------


def test_text_reads_the_texts_that_clara_retrieved(bench, tasks):
    """The same spans, written out, into the plain backbone: as `generate` by itself would answer."""
    memory, text = predict(bench, "clara", tasks), predict(bench, "text", tasks)
    hits = retrieve(bench, SYSTEMS["clara"], tasks, Clock())
    for task, mine, other, row in zip(tasks, memory, text, hits, strict=True):
        for key in ("retrieved", "scores", "read"):
            assert mine[key] == other[key]
        chosen = [bench.spans.document(number) for number in rows_to_read(bench, SYSTEMS["text"], row)]
        assert [bench.spans.document_ids[number] for number in rows_to_read(bench, SYSTEMS["text"], row)] == other[
            "read"
        ]
        assert (other["prediction"] or "") == generate(bench.model, task.question.text, chosen, None)
        prompt = bench.model.processor.build_prompt(task.question.text, 0, 4, text_documents=chosen)
        assert other["n_tokens"] == len(prompt.input_ids)
        expected = np.mean([len(f"{d['title']}\n{d['text']}".strip().encode()) for d in chosen])
        assert other["span_bytes"] == pytest.approx(expected)


@pytest.mark.parametrize("name, role", [("closed_book", "generator"), ("closed_book_backbone", None)])
def test_closed_book_reads_nothing(bench, tasks, name, role):
    for task, row in zip(tasks, predict(bench, name, tasks), strict=True):
        assert (row["prediction"] or "") == generate(bench.model, task.question.text, [], role)
        assert row["retrieved"] == row["scores"] == row["read"] == [] and not row["abstained"]
        assert row["span_bytes"] is None


def test_adapters_matter_to_the_readers(bench, tasks):
    """The plain backbone and the generator give different answers here, so the tests above tell them apart."""
    ours, plain = (predict(bench, name, tasks) for name in ("closed_book", "closed_book_backbone"))
    assert [row["prediction"] for row in ours] != [row["prediction"] for row in plain]


def test_bm25_systems_share_their_ranking(bench, tasks):
    text, memory = predict(bench, "bm25_text", tasks), predict(bench, "bm25_memory", tasks)
    assert [row["retrieved"] for row in text] == [row["retrieved"] for row in memory]
    for task, row in zip(tasks[1:], text[1:], strict=True):
        place = task.question.text.rpartition(" ")[2].strip("?")
        assert place in documents()[row["retrieved"][0]]["text"]


@pytest.mark.parametrize("name", ["hybrid", "hybrid_scores"])
def test_hybrid_fuses_the_cosine_with_bm25(bench, tasks, name):
    """The orders of `clara` and `bm25_memory` over the same candidates, fused by hand; scores are the cosines."""
    ours, clara, words = (predict(bench, system, tasks) for system in (name, "clara", "bm25_memory"))
    differs = []
    for row, by_memory, by_words in zip(ours, clara, words, strict=True):
        cosines = dict(zip(by_memory["retrieved"], by_memory["scores"], strict=True))
        found = dict(zip(by_words["retrieved"], by_words["scores"], strict=True))
        fused = dict.fromkeys(cosines, 0.0)
        if name == "hybrid":
            for order in (list(cosines), [document for document in found if found[document] > 0]):
                for rank, document in enumerate(order, 1):
                    fused[document] += 1 / (60 + rank)
        else:
            for share, scores in ((0.3, cosines), (0.7, found)):
                values = np.array(list(scores.values()))
                for document, score in scores.items():
                    fused[document] += share * (score - values.mean()) / (values.std() or 1.0)
        assert [fused[document] for document in row["retrieved"]] == pytest.approx(
            sorted(fused.values(), reverse=True), abs=1e-5
        )
        assert row["scores"] == pytest.approx([cosines[document] for document in row["retrieved"]], abs=2e-6)
        assert row["read"] == row["retrieved"][:2] and sorted(row["retrieved"]) == sorted(cosines)
        differs.append(row["retrieved"] != by_memory["retrieved"])
    assert any(differs)


@pytest.mark.parametrize("name, fusion", [("hybrid", "ranks"), ("hybrid_scores", "scores")])
def test_hybrid_searches_a_corpus_as_users_do(bench, name, fusion):
    tasks = make_tasks(make_data(), "corpus", nothing)
    for task, row in zip(tasks, predict(bench, name, tasks), strict=True):
        query = bench.model.encode_queries([task.question.text], memory_size=2)
        options = {"questions": [task.question.text], "hybrid": fusion}
        (hits,) = bench.spans.corpus.search(query, len(documents()), **options)
        assert row["retrieved"] == [hit["document_id"] for hit in hits]


def test_a_call_leaves_the_model_as_it_was(bench, tasks):
    model = bench.model
    before = (model.roles.active, model.training)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    for name in ("clara", "text", "closed_book"):
        predict(bench, name, tasks[:2])
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert before == (model.roles.active, model.training)


# --- the control -----------------------------------------------------------------------------------------------------


def test_the_control_reads_other_documents(bench, tasks):
    """Neither gold nor candidates where there are others; a function of (seed, id) and of nothing else."""
    for task in tasks:
        rows = wrong_rows(bench, task)
        names = [bench.spans.document_ids[row] for row in rows]
        assert len(set(names)) == 2 and not set(names) & {*task.gold, *task.candidates}
        assert [bench.spans.numbers[row] for row in rows] == [0, 0]
        assert wrong_rows(bench, task) == rows
    rows = predict(bench, "wrong_memory", tasks)
    for task, row in zip(tasks, rows, strict=True):
        assert row["read"] == [bench.spans.document_ids[number] for number in wrong_rows(bench, task)]
    assert all(row["retrieved"] == [] for row in rows)
    before = [row["read"] for row in rows]
    bench.seed = 1
    assert [row["read"] for row in predict(bench, "wrong_memory", tasks)] != before


def test_the_control_reads_as_many_documents_as_the_gold_ones(bench, memories):
    """In the setting gold_only, where `top_k` counts for nothing: else more memories, not wrong ones, are compared."""
    for task in make_tasks(make_data(), "gold_only", nothing):
        alone = Bench(**{**vars(bench), "read_all": True, "top_k": 3})
        rows = wrong_rows(alone, task)
        assert len(rows) == len(task.gold) == 1 and bench.spans.document_ids[rows[0]] not in task.gold


def test_the_control_with_few_documents(bench, tasks):
    """Everything is a candidate: those that are not gold. Everything is gold: an error that says so."""
    names, question = list(documents()), tasks[1].question
    everything = Task(question, tuple(names), ("d1", "long"))
    for seed in range(20):
        bench.seed = seed
        chosen = {bench.spans.document_ids[row] for row in wrong_rows(bench, everything)}
        assert len(chosen) == 2 and not chosen & {"d1", "long"}
    with pytest.raises(ValueError, match="Leave out 'wrong_memory'"):
        wrong_rows(bench, Task(question, tuple(names), tuple(names)))


def test_the_control_reads_as_many_documents_as_clara(bench, tasks):
    """One document that is no candidate, two to be read: the second is a candidate that is not gold."""
    names = list(documents())
    task = Task(tasks[1].question, tuple(names[:-1]), ("d1",))
    chosen = [bench.spans.document_ids[row] for row in wrong_rows(bench, task)]
    assert chosen[0] == names[-1] and len(set(chosen)) == 2 and "d1" not in chosen


# --- settings --------------------------------------------------------------------------------------------------------


def test_min_score_abstains(bench, tasks):
    """Above the best cosine nothing is read; in between only what reaches it, as `retrieve` does."""
    scores = [row["scores"] for row in predict(bench, "clara", tasks)]
    bench.min_score = 1.1
    for name in ("clara", "text"):
        for row in predict(bench, name, tasks):
            assert row["abstained"] and row["prediction"] is None and row["failure"] is None
            assert row["read"] == [] and row["n_tokens"] is None and row["span_bytes"] is None
    bench.min_score = float(np.median([row[0] for row in scores]))
    rows = predict(bench, "clara", tasks)
    assert 0 < sum(row["abstained"] for row in rows) < len(rows)
    for row, all_scores in zip(rows, scores, strict=True):
        assert row["abstained"] == (all_scores[0] < bench.min_score)
        assert len(row["read"]) == sum(score >= bench.min_score for score in all_scores[: bench.top_k])
        assert row["scores"] == all_scores  # the ranking is measured whole


@pytest.mark.parametrize("n_gold", [3, 12])
def test_gold_only_reads_all_gold(bench, n_gold):
    """More gold documents than top_k are read, all of them, and no other."""
    gold = tuple(f"d{n}" for n in range(n_gold))
    task = Task(make_data().questions[0], gold, gold)
    bench.read_all, bench.memory_size = True, 2
    for name in ("clara", "clara_expand", "text", "bm25_text", "bm25_memory"):
        (row,) = predict(bench, name, [task])
        assert sorted(row["read"]) == sorted(gold), name


def test_needed_documents():
    """Candidates and gold in the order of the data; all of them where the whole corpus is searched."""
    data = make_data()
    tasks = make_tasks(data, "gold_only", nothing)
    assert list(needed_documents(tasks, data)) == [f"d{n}" for n in range(6)]
    assert needed_documents(make_tasks(data, "corpus", nothing), data) == data.documents


# --- time and size ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SYSTEMS)
def test_parts_of_the_time(bench, tasks, name):
    """Milliseconds of what a system does; what it does not do takes none; the parts sum to the total."""
    if name == "dense_text":
        pytest.skip("needs an encoder")
    times = time_one(bench, SYSTEMS[name], tasks[0])
    assert list(times) == ["query", "search", "read", "decode", "total"]
    assert times["total"] == pytest.approx(sum(times[part] for part in ("query", "search", "read", "decode")))
    assert times["read"] > 0 and times["decode"] > 0
    assert (times["query"] > 0) == (SYSTEMS[name].retriever in COMPARING)
    assert (times["search"] > 0) == (SYSTEMS[name].retriever in RANKING)


def test_more_tokens_take_longer_to_decode_and_not_to_read(bench, tasks):
    """What comes after the first token falls into `decode`: `read` ends with it."""
    found = {}
    for n in (1, 60):
        bench.max_new_tokens = n
        times = [time_one(bench, SYSTEMS["clara"], tasks[1]) for _ in range(4)]
        found[n] = {part: min(time[part] for time in times) for part in ("read", "decode")}
    assert found[1]["decode"] < found[1]["read"]
    assert found[60]["decode"] > 5 * found[1]["decode"] and found[60]["read"] < found[60]["decode"]


@pytest.mark.parametrize("codec", ["float16", "int8", "int4"])
def test_bytes_of_a_span(shared_model, memories, codec):
    """k vectors as the codec stores them; of a text its title and text in UTF-8."""
    spans, hidden = memories[codec], shared_model.config.text_config.hidden_size
    for size in (2, 4):
        bench = Bench(shared_model, spans, 2, size, 2, N_TOKENS)
        expected = size * Codec(codec, 4, hidden, spans.corpus.snapshot.codec.state).vector_bytes
        assert span_bytes(bench, SYSTEMS["clara"], [0, 5]) == expected
    least = {"float16": 2 * hidden, "int8": hidden, "int4": hidden // 2}[codec]
    assert least <= spans.corpus.snapshot.codec.vector_bytes <= least + 16
    assert span_bytes(bench, SYSTEMS["text"], [0]) == len("France\nCity 0 is the capital of France.")
    assert span_bytes(bench, SYSTEMS["text"], []) is None


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_codecs_rank_nearly_as_float16(bench, memories, tasks, codec):
    scores = predict(bench, "clara", tasks)
    bench.spans = memories[codec]
    for row, exact in zip(predict(bench, "clara", tasks), scores, strict=True):
        ours, theirs = (dict(zip(r["retrieved"], r["scores"], strict=True)) for r in (row, exact))
        assert ours == pytest.approx(theirs, abs=0.02 if codec == "int8" else 0.2)
        assert row["span_bytes"] < exact["span_bytes"]


def test_a_prompt_beyond_the_window_is_named(bench, tasks):
    long = Question("q", "river " * 400, ("x",), tasks[0].question.candidates, (), "x.jsonl:1")
    for name in ("clara", "clara_expand", "text", "closed_book"):
        with pytest.raises(ValueError, match="window of 512 tokens"):
            read(bench, SYSTEMS[name], [Task(long, long.candidates, ())], [[0]], Clock())

"""`evaluation/systems.py` and `spans.py` on a tiny model: every system against the public calls of the model itself.

Documents are short and one is long, so that it has several spans. Memories lie in a float16 corpus; what it decodes
is handed to the public calls as stored memories, so that answers must be equal.
"""

import dataclasses

import numpy as np
import pytest
import torch
from evaluation_systems import (
    N_TOKENS,
    PLACES,
    documents,
    generate,
    make_data,
    nothing,
    predict,
    stored,
    without_seconds,
)

from recipes.evaluation.systems import (
    SYSTEMS,
    Clock,
    retrieve,
    rows_to_read,
    wrong_rows,
)
from recipes.evaluation.tasks import Task, make_tasks, needed_documents

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
        alone = dataclasses.replace(bench, read_all=True, top_k=3)
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
    """Above the best cosine nothing is read; if it is reached, all documents are, whatever their own cosine."""
    whole = predict(bench, "clara", tasks)
    bench.min_score = 1.1
    for name in ("clara", "text"):
        for row in predict(bench, name, tasks):
            assert row["abstained"] and row["prediction"] is None and row["failure"] is None
            assert row["read"] == [] and row["n_tokens"] is None and row["span_bytes"] is None
    bench.min_score = float(np.median([row["scores"][0] for row in whole]))
    rows = predict(bench, "clara", tasks)
    assert 0 < sum(row["abstained"] for row in rows) < len(rows)
    assert any(row["scores"][1] < bench.min_score for row in rows if not row["abstained"])
    for row, free in zip(rows, whole, strict=True):
        assert row["abstained"] == (free["scores"][0] < bench.min_score)
        assert row["read"] == ([] if row["abstained"] else free["read"])
        assert row["prediction"] == (None if row["abstained"] else free["prediction"])
        assert row["scores"] == free["scores"]  # the ranking is measured whole


def test_min_score_means_what_it_means_in_the_config_of_a_model(bench, tasks, model):
    """The same questions are refused, and documents of a lower cosine are read beside one that reaches it."""
    best = [row["scores"][0] for row in predict(bench, "clara", tasks)]
    bench.min_score = model.config.min_score = float(np.median(best)) + 1e-5
    model.config.retrieval_memory_size = bench.retrieval_memory_size
    rows = predict(bench, "clara", tasks)
    for task, row in zip(tasks, rows, strict=True):
        given = stored(bench.spans, task.candidates)
        (answer,) = model.answer([task.question.text], documents=given, top_k=2, max_new_tokens=1)
        assert answer.abstained == row["abstained"]
        assert len(answer.sources) == len(row["read"]) == (0 if row["abstained"] else 2)
    assert 0 < sum(row["abstained"] for row in rows) < len(rows)


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

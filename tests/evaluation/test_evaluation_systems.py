"""`evaluation/systems.py` and `spans.py` on a tiny model: every system against the public calls of the model itself.

Memories lie in a float16 corpus; what it decodes is given to the public calls, so that answers must be equal.
"""

import dataclasses

import numpy as np
import pytest
import torch
from evaluation_runs import assert_same
from evaluation_systems import DOCUMENTS, N_TOKENS, PLACES, generate, make_data, nothing, predict, stored, text_of

from modeling_clara.text_clara import word_overlap
from recipes.evaluation.evaluation import weights_digest
from recipes.evaluation.formats import Question
from recipes.evaluation.systems import SYSTEMS, Clock, read, retrieve, rows_to_read, span_bytes, time_one, wrong_rows
from recipes.evaluation.tasks import Task, make_tasks

WITHOUT_ENCODER = [name for name in SYSTEMS if name != "dense_text"]


@pytest.mark.parametrize("memory_size, compared", [(4, 2), (2, 4)])
def test_clara_is_the_public_answer(bench, tasks, memory_size, compared):
    """Rankings, cosines and answers are those of `retrieve` and `answer` over the same stored memories."""
    bench.memory_size, bench.retrieval_memory_size = memory_size, compared
    for task, row in zip(tasks, predict(bench, "clara", tasks), strict=True):
        question, given = task.question.text, stored(bench.spans, bench.spans.rows_of(task.candidates))
        options = {"retrieval_memory_size": compared}
        (ranked,) = bench.model.retrieve([question], documents=given, top_k=len(given), **options)
        best = {}  # a document counts once, by its best chunk
        for source in ranked:
            best.setdefault(source.document_id.partition("/")[0], source)
        assert row["retrieved"] == list(best) and sorted(best) == sorted(task.candidates)
        assert row["scores"] == pytest.approx([source.score for source in best.values()], abs=2e-6)
        assert row["read"] == list(best)[:2]
        ids = [best[name].document_id for name in row["read"]]
        chosen = [next(document for document in given if document["id"] == name) for name in ids]
        options |= {"top_k": 2, "memory_size": memory_size, "max_new_tokens": N_TOKENS}
        (answer,) = bench.model.answer([question], documents=chosen, **options)
        assert (row["prediction"] or "") == answer.text and (row["failure"] is None) == bool(answer.text)
        assert row["n_tokens"] == len(bench.model.processor.build_prompt(question, 2, memory_size).input_ids)


def test_float16_ranks_as_fresh_memories(bench, tasks):
    """Against documents that are compressed at once: cosines agree to what float16 rounds."""
    for task, row in zip(tasks, predict(bench, "clara", tasks), strict=True):
        given = [{"id": name, **DOCUMENTS[name]} for name in task.candidates]
        options = {"top_k": len(given), "retrieval_memory_size": 2}
        (ranked,) = bench.model.retrieve([task.question.text], documents=given, **options)
        fresh = {source.document_id: source.score for source in ranked}
        assert row["scores"] == pytest.approx([fresh[name] for name in row["retrieved"]], abs=2e-3)


def test_long_documents_are_read_by_their_best_chunk(bench, tasks):
    spans = bench.spans
    rows = spans.rows["long"]
    assert len(rows) > 2 and len(spans) == len(rows) + len(PLACES)
    parts = bench.model.processor.split_document(DOCUMENTS["long"])
    assert [spans.document(row) for row in rows] == [{k: p[k] for k in ("title", "text")} for p in parts]
    (hits,) = retrieve(bench, SYSTEMS["clara"], tasks[:1], Clock())
    ((row, score),) = [hit for hit in hits if spans.document_ids[hit[0]] == "long"]
    query = bench.model.encode_queries([tasks[0].question.text], memory_size=2)[0].flatten()
    cosines = torch.cosine_similarity(spans.memories(list(rows), 2).flatten(1), query[None], dim=1)
    assert row == rows.start + int(cosines.argmax()) and score == pytest.approx(float(cosines.max()), abs=1e-5)


@pytest.mark.parametrize("name", WITHOUT_ENCODER)
def test_batches_change_nothing(bench, tasks, name):
    """One question at a time, all at once, in another order: the same rows."""
    together = predict(bench, name, tasks)
    assert_same(together, [row for task in tasks for row in predict(bench, name, [task])])
    assert_same(together, predict(bench, name, tasks[::-1])[::-1])


def test_the_whole_corpus_is_all_documents_as_candidates(bench):
    everywhere = make_tasks(make_data(), "corpus", nothing)
    listed = [Task(task.question, tuple(DOCUMENTS), task.gold) for task in everywhere]
    ours = predict(bench, "clara", everywhere)
    assert_same(ours, predict(bench, "clara", listed))
    assert all(len(row["retrieved"]) == len(DOCUMENTS) for row in ours)


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_codecs_rank_nearly_as_float16(bench, memories, tasks, codec):
    scores = predict(bench, "clara", tasks)
    bench.spans = memories[codec]
    for row, exact in zip(predict(bench, "clara", tasks), scores, strict=True):
        ours, theirs = (dict(zip(r["retrieved"], r["scores"], strict=True)) for r in (row, exact))
        assert ours == pytest.approx(theirs, abs=0.02 if codec == "int8" else 0.2)
        assert row["span_bytes"] < exact["span_bytes"]


def test_text_reads_the_texts_that_clara_retrieved(bench, tasks):
    """The same chunks, written out, into the plain backbone: as greedy decoding by itself would answer."""
    memory, text = predict(bench, "clara", tasks), predict(bench, "text", tasks)
    hits = retrieve(bench, SYSTEMS["clara"], tasks, Clock())
    for task, mine, other, found in zip(tasks, memory, text, hits, strict=True):
        for key in ("retrieved", "scores", "read"):
            assert mine[key] == other[key]
        rows = rows_to_read(bench, SYSTEMS["text"], task, found)
        chosen = [bench.spans.document(number) for number in rows]
        assert [bench.spans.document_ids[number] for number in rows] == other["read"]
        assert (other["prediction"] or "") == generate(bench.model, task.question.text, chosen, None)
        prompt = bench.model.processor.build_prompt(task.question.text, 0, 4, text_documents=chosen)
        assert other["n_tokens"] == len(prompt.input_ids)
        assert other["span_bytes"] == pytest.approx(np.mean([len(text_of(document)) for document in chosen]))


def test_closed_book_reads_nothing(bench, tasks):
    predicted = {}
    for name, role in (("closed_book", "generator"), ("closed_book_backbone", None)):
        predicted[name] = predict(bench, name, tasks)
        for task, row in zip(tasks, predicted[name], strict=True):
            assert (row["prediction"] or "") == generate(bench.model, task.question.text, [], role)
            assert row["retrieved"] == row["scores"] == row["read"] == [] and not row["abstained"]
            assert row["span_bytes"] is None
    ours, plain = ([row["prediction"] for row in rows] for rows in predicted.values())
    assert ours != plain  # the adapters matter here


def test_bm25_systems_share_their_ranking(bench, tasks):
    text, memory = predict(bench, "bm25_text", tasks), predict(bench, "bm25_memory", tasks)
    assert [row["retrieved"] for row in text] == [row["retrieved"] for row in memory]
    for task, row in zip(tasks[1:], text[1:], strict=True):
        place = task.question.text.rpartition(" ")[2].strip("?")
        assert place in DOCUMENTS[row["retrieved"][0]]["text"]


@pytest.mark.parametrize("name", ["hybrid", "hybrid_scores"])
def test_hybrid_fuses_the_cosine_with_bm25(bench, tasks, name):
    """The orders of `clara` and `bm25_memory` over the same candidates, fused by hand; scores are the cosines."""
    ours, clara, words = (predict(bench, system, tasks) for system in (name, "clara", "bm25_memory"))
    for row, by_memory, by_words in zip(ours, clara, words, strict=True):
        cosines, found = (dict(zip(r["retrieved"], r["scores"], strict=True)) for r in (by_memory, by_words))
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
        best_first = sorted(fused.values(), reverse=True)
        assert [fused[document] for document in row["retrieved"]] == pytest.approx(best_first, abs=1e-5)
        assert row["scores"] == pytest.approx([cosines[document] for document in row["retrieved"]], abs=2e-6)
        assert row["read"] == row["retrieved"][:2] and sorted(row["retrieved"]) == sorted(cosines)
    assert [row["retrieved"] for row in ours] != [row["retrieved"] for row in clara]


@pytest.mark.parametrize("name, fusion", [("hybrid", "ranks"), ("hybrid_scores", "scores")])
def test_hybrid_searches_a_corpus_as_users_do(bench, name, fusion):
    tasks = make_tasks(make_data(), "corpus", nothing)
    for task, row in zip(tasks, predict(bench, name, tasks), strict=True):
        query = bench.model.encode_queries([task.question.text], memory_size=2)
        options = {"questions": [task.question.text], "hybrid": fusion}
        (hits,) = bench.spans.corpus.search(query, len(DOCUMENTS), **options)
        assert row["retrieved"] == [hit["document_id"] for hit in hits]


def test_a_call_leaves_the_models_as_they_were(bench, tasks):
    def state(m) -> tuple:
        return weights_digest(m), m.roles.active, m.training, [p.requires_grad for p in m.parameters()]

    before = state(bench.model), state(bench.text_reader)
    for name in ("clara", "text", "tuned_text", "closed_book"):
        predict(bench, name, tasks[:2])
    assert (state(bench.model), state(bench.text_reader)) == before


def test_the_control_reads_other_documents(bench, tasks):
    """Neither gold nor candidates if there are others; a function of (seed, id) and of nothing else."""
    rows = predict(bench, "wrong_memory", tasks)
    for task, row in zip(tasks, rows, strict=True):
        chosen = wrong_rows(bench, task)
        names = [bench.spans.document_ids[number] for number in chosen]
        assert len(set(names)) == 2 and not set(names) & {*task.gold, *task.candidates}
        assert [bench.spans.numbers[number] for number in chosen] == [0, 0] and wrong_rows(bench, task) == chosen
        assert row["read"] == names and row["retrieved"] == []
    bench.seed = 1
    assert [row["read"] for row in predict(bench, "wrong_memory", tasks)] != [row["read"] for row in rows]


def test_the_control_reads_as_many_documents_as_the_gold_ones(bench):
    """In the setting gold_only, where `top_k` counts for nothing: else more memories, not wrong ones, are compared."""
    for task in make_tasks(make_data(), "gold_only", nothing):
        rows = wrong_rows(dataclasses.replace(bench, read_all=True, top_k=3), task)
        assert len(rows) == len(task.gold) == 1 and bench.spans.document_ids[rows[0]] not in task.gold


def test_the_control_with_few_documents(bench, tasks):
    """Everything or all but one is a candidate: then those that are not gold. Everything is gold: an error."""
    names, question = list(DOCUMENTS), tasks[1].question
    for seed in range(20):
        bench.seed = seed
        everything, but_one = (
            [bench.spans.document_ids[row] for row in wrong_rows(bench, Task(question, tuple(given), ("d1", "long")))]
            for given in (names, names[:-1])
        )
        assert len(set(everything)) == 2 and not {*everything} & {"d1", "long"}
        assert but_one[0] == names[-1] and len(set(but_one)) == 2 and not {*but_one} & {"d1", "long"}
    with pytest.raises(ValueError, match="Leave out 'wrong_memory'"):
        wrong_rows(bench, Task(question, tuple(names), tuple(names)))


def test_min_score_abstains(bench, tasks):
    """Above the best cosine nothing is read; if it is reached, all documents are, whatever their own cosine."""
    whole = predict(bench, "clara", tasks)
    bench.min_score = 1.1
    for name in ("clara", "clara_expand", "text", "tuned_text"):
        for row in predict(bench, name, tasks):
            assert row["abstained"] and row["prediction"] is row["failure"] is None
            assert row["read"] == [] and row["n_tokens"] is row["span_bytes"] is None
    assert not any(row["abstained"] for row in predict(bench, "bm25_tuned_text", tasks))  # there is no cosine
    bench.min_score = float(np.median([row["scores"][0] for row in whole]))
    for name in ("clara", "clara_expand"):
        rows = predict(bench, name, tasks)
        assert 0 < sum(row["abstained"] for row in rows) < len(rows)
        assert any(row["scores"][1] < bench.min_score for row in rows if not row["abstained"])
        for row, free in zip(rows, whole, strict=True):
            assert row["abstained"] == (free["scores"][0] < bench.min_score)
            assert row["read"] == ([] if row["abstained"] else free["read"])
            assert row["scores"] == free["scores"]  # the ranking is measured whole
            if name == "clara":
                assert row["prediction"] == (None if row["abstained"] else free["prediction"])


@pytest.mark.parametrize("weight, top_k", [(0.0, 2), (0.5, 1)])
def test_min_score_means_what_it_means_in_the_config_of_a_model(bench, tasks, model, weight, top_k, monkeypatch):
    """The same questions are refused, and documents of a lower cosine are read beside one that reaches it."""
    best = [
        score + weight * word_overlap(task.question.text, bench.spans.texts[row])
        for task, found in zip(tasks, predict(bench, "clara", tasks), strict=True)
        for row, score in [(bench.spans.rows_of([found["retrieved"][0]])[0], found["scores"][0])]
    ]
    bench.min_score = model.config.min_score = float(np.median(best)) + 1e-5
    bench.top_k, model.config.overlap_weight = top_k, weight
    monkeypatch.setattr(bench.model.config, "overlap_weight", weight)
    model.config.retrieval_memory_size = bench.retrieval_memory_size
    rows = predict(bench, "clara", tasks)
    for task, row in zip(tasks, rows, strict=True):
        given = stored(bench.spans, bench.spans.rows_of(task.candidates))
        (answer,) = model.answer([task.question.text], documents=given, top_k=top_k, max_new_tokens=1)
        assert answer.abstained == row["abstained"]
        assert len(answer.sources) == len(row["read"]) == (0 if row["abstained"] else top_k)
    assert 0 < sum(row["abstained"] for row in rows) < len(rows)


def test_gold_only_reads_all_gold(bench):
    """More gold documents than top_k are read, all of them, and no other; nothing is ranked."""
    gold = tuple(f"d{n}" for n in range(12))
    task = Task(make_data().questions[0], gold, gold)
    bench.read_all, bench.memory_size = True, 2
    for name in ("clara", "clara_expand", "text", "bm25_text", "bm25_memory"):
        (row,) = predict(bench, name, [task])
        assert row["read"] == list(gold) and row["retrieved"] == [], name


@pytest.mark.parametrize("name", WITHOUT_ENCODER)
def test_parts_of_the_time(bench, tasks, name):
    """Milliseconds of what a system does; what it does not do takes none; the parts sum to the total."""
    times = time_one(bench, SYSTEMS[name], tasks[0])
    assert list(times) == ["query", "search", "read", "decode", "total"]
    assert times["total"] == pytest.approx(sum(times[part] for part in ("query", "search", "read", "decode")))
    assert times["read"] > 0 and times["decode"] > 0
    assert (times["query"] > 0) == (SYSTEMS[name].retriever in ("clara", "hybrid", "hybrid_scores"))
    assert (times["search"] > 0) == (SYSTEMS[name].ranks)


def test_more_tokens_take_longer_to_decode_and_not_to_read(bench, tasks):
    """What comes after the first token falls into `decode`: `read` ends with it."""
    found = {}
    for n in (1, 60):
        bench.max_new_tokens = n
        times = [time_one(bench, SYSTEMS["clara"], tasks[1]) for _ in range(4)]
        found[n] = {part: min(time[part] for time in times) for part in ("read", "decode")}
    assert found[1]["decode"] < found[1]["read"]
    assert found[60]["decode"] > 5 * found[1]["decode"] and found[60]["read"] < found[60]["decode"]


def test_bytes_of_a_chunk(bench, memories):
    """k vectors as the codec stores them, each with at most 16 bytes more; of a text its title and text in UTF-8."""
    for codec, least in {"float16": 64, "int8": 32, "int4": 16}.items():
        bench.spans = memories[codec]
        vector = bench.spans.corpus.snapshot.codec.vector_bytes
        assert least <= vector <= least + 16 and span_bytes(bench, [0, 5], 0) == 4 * vector
    assert span_bytes(bench, [0], 1) == len("France\nCity 0 is the capital of France.")
    assert span_bytes(bench, [], 0) is None


def test_a_prompt_beyond_the_window_is_named(bench, tasks):
    long = Question("q", "river " * 400, ("x",), tasks[0].question.candidates, (), "x.jsonl:1")
    for name in ("clara", "clara_expand", "text", "tuned_text", "closed_book"):
        with pytest.raises(ValueError, match="window of 512 tokens, got .* [Ll]ower"):
            read(bench, SYSTEMS[name], [Task(long, long.candidates, ())], [[0]], Clock())

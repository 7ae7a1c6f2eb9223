"""Readers of text: `clara_expand` against the model's own `answer(expand=n)`, the tuned ones against the reader."""

import copy
import json
import shutil
from pathlib import Path

import board  # noqa: F401
import numpy as np
import pytest
from evaluation_runs import N_QUESTIONS, assert_same, predictions, results
from evaluation_systems import DOCUMENTS, N_TOKENS, generate, make_data, predict, stored, text_of
from leaderboard_source import identity
from tiny import randomize_adapters

from modeling_clara import CLaRaForRAG
from recipes.evaluation.evaluation import weights_digest
from recipes.evaluation.systems import SYSTEMS, Clock, retrieve, rows_to_read
from recipes.evaluation.tasks import Task

TUNED = {"tuned_text": "text", "bm25_tuned_text": "bm25_text"}  # and the system with the same ranking
MEMORY_BYTES = 4 * 2 * 32


@pytest.mark.parametrize("expand, expand_below", [(1, None), (2, None), (9, None), (1, 1e-9), (2, 1.0), (1, "some")])
def test_expand_is_the_public_answer(bench, tasks, expand, expand_below):
    """The same documents as `clara`, in the same order; answers, tokens and bytes of mixed reading."""
    bench.top_k, bench.expand = 3, expand
    if expand_below == "some":
        options = {"top_k": 3, "retrieval_memory_size": 2, "max_new_tokens": N_TOKENS}
        documents = [[DOCUMENTS[name] for name in task.candidates] for task in tasks]
        answers = bench.model.answer([task.question.text for task in tasks], documents=documents, **options)
        expand_below = sorted(answer.confidence for answer in answers)[len(tasks) // 2]
    bench.expand_below = expand_below
    ours, from_memory, as_text = predict(bench, "clara_expand", tasks), predict(bench, "clara", tasks), set()
    for task, row, other in zip(tasks, ours, from_memory, strict=True):
        for key in ("retrieved", "scores", "read"):
            assert row[key] == other[key]
        query = bench.model.encode_queries([task.question.text], memory_size=2)[0]
        rows = [row for row, _ in bench.spans.cosines(query, bench.spans.rows_of(task.candidates), 3)]
        given = stored(bench.spans, rows)
        options = {"top_k": 3, "retrieval_memory_size": 2, "max_new_tokens": N_TOKENS, "expand": expand}
        options["expand_below"] = expand_below
        (answer,) = bench.model.answer([task.question.text], documents=given, **options)
        assert [source.document_id for source in answer.sources] == [document["id"] for document in given]
        assert (row["prediction"] or "") == answer.text and row["n_tokens"] == answer.prompt_tokens
        n_texts = sum(source.read_as == "text" for source in answer.sources)
        as_text.add(n_texts)
        sizes = [bench.spans.text_bytes(row) for row in rows[:n_texts]] + [MEMORY_BYTES] * (3 - n_texts)
        assert row["span_bytes"] == pytest.approx(np.mean(sizes))
    assert as_text == {None: {min(3, expand)}, 1e-9: {0}, 1.0: {expand}}.get(expand_below, {0, expand})


def test_with_all_as_text_the_generator_reads_the_prompt_of_text(bench, tasks):
    bench.expand = 9
    ours, text = predict(bench, "clara_expand", tasks), predict(bench, "text", tasks)
    for key in ("n_tokens", "span_bytes"):
        assert [row[key] for row in ours] == [row[key] for row in text]
    assert [row["prediction"] for row in ours] != [row["prediction"] for row in text]  # not the plain backbone


@pytest.mark.parametrize("expand, n_gold", [(1, 1), (2, 3), (5, 3)])
def test_gold_only_reads_the_first_gold_chunks_as_text(bench, expand, n_gold):
    gold = tuple(f"d{n}" for n in range(n_gold))
    question = make_data().questions[1]
    bench.read_all, bench.expand = True, expand
    (row,) = predict(bench, "clara_expand", [Task(question, gold, gold)])
    as_text, n_memories = [DOCUMENTS[name] for name in gold[:expand]], max(0, n_gold - expand)
    prompt = bench.model.processor.build_prompt(question.text, n_memories, 4, text_documents=as_text)
    assert row["read"] == list(gold) and row["retrieved"] == [] and row["n_tokens"] == len(prompt.input_ids)
    sizes = [len(text_of(document)) for document in as_text] + [MEMORY_BYTES] * n_memories
    assert row["span_bytes"] == pytest.approx(np.mean(sizes))


@pytest.mark.parametrize("name, plain", TUNED.items())
def test_the_text_reader_reads_the_retrieved_texts_in_its_own_prompt(bench, text_reader, tasks, name, plain):
    """Its answers; the ranking of the plain reader and other answers than that one's or the compressor's generator."""
    hits = retrieve(bench, SYSTEMS[name], tasks, Clock())
    tuned, plainly = predict(bench, name, tasks), predict(bench, plain, tasks)
    for task, mine, row, other in zip(tasks, hits, tuned, plainly, strict=True):
        texts = [bench.spans.document(row) for row in rows_to_read(bench, SYSTEMS[name], task, mine)]
        answer = generate(text_reader, task.question.text, texts, "generator")
        assert (row["prediction"] or "") == answer and (row["failure"] is None) == bool(answer)
        prompt = text_reader.processor.build_prompt(task.question.text, 0, 4, text_documents=texts)
        assert row["n_tokens"] == len(prompt.input_ids) > other["n_tokens"]
        for key in ("retrieved", "scores", "read", "span_bytes", "abstained"):
            assert row[key] == other[key], key
    answers = [row["prediction"] for row in tuned]
    bench.text_reader = bench.model
    assert answers not in ([row["prediction"] for row in rows] for rows in (plainly, predict(bench, name, tasks)))


@pytest.fixture(scope="module")
def reader_folder(text_reader, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text-reader")
    text_reader.save_pretrained(folder)
    return folder


def test_a_run_and_its_results(evaluate, reader_folder, tmp_path):
    """Valid by the schema; named as tables show it; what a system depends on is among its options."""
    names = ["clara-expand", "clara", "tuned-text", "bm25-tuned-text"]
    printed = evaluate("--systems", *(name.replace("-", "_") for name in names), text_reader=reader_folder)
    folders = {name: tmp_path / "run" / "baselines" / name for name in names} | {names[0]: tmp_path / "run"}
    found = {name: results(folder) for name, folder in folders.items()}
    assert {line["system"] for line in found[names[0]]["comparisons"]} == set(names[1:])
    digest = weights_digest(CLaRaForRAG.from_pretrained(reader_folder))
    described = {
        "clara-expand": ("clara", "clara", "memory_and_text", 4, 4, "float16"),
        "clara": ("clara", "clara", "memory", 4, 4, "float16"),
        "tuned-text": ("text", "clara", "tuned_text", None, 4, "float16"),
        "bm25-tuned-text": ("text", "bm25", "tuned_text", None, None, None),
    }
    keys = ("kind", "retriever", "reader", "memory_size", "retrieval_memory_size", "codec")
    for name, content in found.items():
        assert tuple(content["system"][key] for key in keys) == described[name] and f"| {name} |" in printed
        assert content["counts"]["questions"] == N_QUESTIONS and content["counts"]["failed"] == 0
        options = content["options"]
        assert options["expand"] == (1 if name == "clara-expand" else None)
        assert options["text_reader"] == (digest if "tuned" in name else None) and options["weights"] != digest


def test_another_text_reader_is_another_run_and_another_entry(evaluate, text_reader, reader_folder, tmp_path):
    evaluate("--systems", "tuned_text", text_reader=reader_folder)
    content = results(tmp_path / "run")
    assert content["system"]["name"] == "tuned-text" and not (tmp_path / "run" / "baselines").exists()
    before = (tmp_path / "run" / "predictions.jsonl").read_bytes()
    moved = shutil.copytree(reader_folder, tmp_path / "moved")
    evaluate("--systems", "tuned_text", text_reader=moved)  # the same weights in another place are the same reader
    assert identity(results(tmp_path / "run")) == identity(content)
    config = json.loads((moved / "processor_config.json").read_text())
    (moved / "processor_config.json").write_text(json.dumps({**config, "system_prompt": "Answer at length."}))
    trained_more = copy.deepcopy(text_reader)
    randomize_adapters(trained_more, seed=8)
    trained_more.save_pretrained(tmp_path / "other")
    for reader in (moved, tmp_path / "other"):
        printed = evaluate("--systems", "tuned_text", text_reader=reader, expect=1)
        assert "`text_reader` must be" in printed and "as when" in printed and "Choose another --output" in printed
    assert (tmp_path / "run" / "predictions.jsonl").read_bytes() == before and results(tmp_path / "run")
    evaluate("--systems", "tuned_text", text_reader=tmp_path / "other", output="two")
    assert identity(results(tmp_path / "two")) != identity(content)


def test_another_expand_is_another_run_and_another_entry(evaluate, tmp_path):
    evaluate("--systems", "clara_expand")
    assert "`expand` must be 1" in evaluate("--systems", "clara_expand", "--expand", "2", expect=1)
    evaluate("--systems", "clara_expand", "--expand", "2", output="two")
    one, two = results(tmp_path / "run"), results(tmp_path / "two")
    assert identity(one) != identity(two) and two["efficiency"]["tokens_read"] > one["efficiency"]["tokens_read"]
    options = ("--systems", "clara_expand", "--expand-below", "1e-9")
    assert "`expand_below` must be None" in evaluate(*options, expect=1)
    evaluate(*options, "--latency-questions", "2", output="three")
    three = results(tmp_path / "three")
    assert identity(three) != identity(one) and three["efficiency"]["tokens_read"] < one["efficiency"]["tokens_read"]


def test_other_systems_do_not_depend_on_it(evaluate, finished, reader_folder, tmp_path):
    """With and without the readers beside it, `clara` is one system: the same answers, one entry of a leaderboard."""
    evaluate("--systems", "clara", "clara_expand", "tuned_text", "--expand", "2", text_reader=reader_folder)
    assert_same(predictions(tmp_path / "run"), predictions(finished))
    assert identity(results(tmp_path / "run")) == identity(results(finished))


def test_what_is_no_checkpoint_is_an_error_and_leaves_no_run(evaluate, backbone_folder, tmp_path):
    for place in (backbone_folder, tmp_path):
        printed = evaluate("--systems", "clara", "tuned_text", text_reader=place, expect=1)
        assert printed.startswith("error: ") and str(place) in printed and len(printed.splitlines()) < 4, printed
        assert not (tmp_path / "run" / "run.json").exists()

"""The system `clara_expand`: the best spans as text, the rest from memory, against the model's own `answer(expand=n)`.

A float16 corpus holds the memories, and what it decodes is given to `answer` as stored memories. Whole runs call the
command on the tiny checkpoint.
"""

import json

import board  # noqa: F401
import numpy as np
import pytest
from evaluation_runs import N_QUESTIONS, predictions, results, without_seconds, write_data
from evaluation_systems import N_TOKENS, documents, make_data, nothing, predict
from leaderboard_source import identity

from recipes.evaluation.cli import build_parser, check_arguments, main
from recipes.evaluation.spans import Spans, compress_documents, open_memories
from recipes.evaluation.systems import Bench
from recipes.evaluation.tasks import Task, make_tasks


@pytest.fixture(scope="module")
def spans(shared_model, tmp_path_factory) -> Spans:
    folder = tmp_path_factory.mktemp("memories")
    compress_documents(shared_model, documents(), folder)
    return open_memories(shared_model, folder, "float16", len(documents()))


@pytest.fixture
def bench(shared_model, spans) -> Bench:
    return Bench(shared_model, spans, top_k=3, memory_size=4, retrieval_memory_size=2, max_new_tokens=N_TOKENS)


@pytest.fixture
def tasks() -> list[Task]:
    return make_tasks(make_data(), "normal", nothing)


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expand", [1, 2, 9])
def test_it_is_the_public_answer_with_expand(bench, tasks, expand):
    """The same documents as `clara`, in the same order; answers, tokens and bytes of mixed reading."""
    bench.expand = expand
    ours, from_memory = predict(bench, "clara_expand", tasks), predict(bench, "clara", tasks)
    for task, row, other in zip(tasks, ours, from_memory, strict=True):
        for key in ("retrieved", "scores", "read"):
            assert row[key] == other[key]
        query = bench.model.encode_queries([task.question.text], memory_size=2)[0]
        rows = [row for row, _ in bench.spans.cosines(query, bench.spans.rows_of(task.candidates), 3)]
        given = [
            {"id": str(row), **bench.spans.document(row), "memory": bench.spans.memories([row], 4)[0]} for row in rows
        ]
        (answer,) = bench.model.answer(
            [task.question.text], documents=given, top_k=3, retrieval_memory_size=2, max_new_tokens=N_TOKENS,
            expand=expand,
        )  # fmt: skip
        assert [int(source.document_id) for source in answer.sources] == rows
        assert (row["prediction"] or "") == answer.text and row["n_tokens"] == answer.prompt_tokens
        sizes = [bench.spans.text_bytes(row) for row in rows[:expand]] + [4 * 2 * 32] * max(0, 3 - expand)
        assert row["span_bytes"] == pytest.approx(np.mean(sizes))


def test_no_more_than_what_was_retrieved_is_text(bench, tasks):
    """With all as text the prompt is that of `text`, and the generator reads it, not the plain backbone."""
    bench.expand = 9
    ours, text = predict(bench, "clara_expand", tasks), predict(bench, "text", tasks)
    assert [row["n_tokens"] for row in ours] == [row["n_tokens"] for row in text]
    assert [row["span_bytes"] for row in ours] == [row["span_bytes"] for row in text]
    assert [row["prediction"] for row in ours] != [row["prediction"] for row in text]


@pytest.mark.parametrize("expand, n_gold", [(1, 1), (1, 3), (2, 3), (5, 3)])
def test_gold_only_reads_the_first_gold_spans_as_text(bench, expand, n_gold):
    gold = tuple(f"d{n}" for n in range(n_gold))
    task = Task(make_data().questions[1], gold, gold)
    bench.read_all, bench.expand = True, expand
    (row,) = predict(bench, "clara_expand", [task])
    as_text = [documents()[name] for name in gold[:expand]]
    prompt = bench.model.processor.build_prompt(task.question.text, max(0, n_gold - expand), 4, text_documents=as_text)
    assert row["read"] == list(gold) and row["retrieved"] == [] and row["n_tokens"] == len(prompt.input_ids)
    sizes = [len(f"{d['title']}\n{d['text']}".strip().encode()) for d in as_text]
    sizes += [4 * 2 * 32] * max(0, n_gold - expand)
    assert row["span_bytes"] == pytest.approx(np.mean(sizes))


def test_min_score_abstains_as_clara_does(bench, tasks):
    best = [row["scores"][0] for row in predict(bench, "clara", tasks)]
    bench.min_score = float(np.median(best))
    rows = predict(bench, "clara_expand", tasks)
    assert [row["abstained"] for row in rows] == [score < bench.min_score for score in best]
    assert all(row["n_tokens"] is row["span_bytes"] is None for row in rows if row["abstained"])


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluate(checkpoint, tmp_path, capsys):
    """`evaluate(*options, expect=0, output="run")`: what the command prints, errors included."""
    data = write_data(tmp_path / "data.jsonl")

    def call(*options: str, expect: int = 0, output: str = "run") -> str:
        given = {"model": checkpoint, "data": data, "output": tmp_path / output, "memories": tmp_path / "memories"}
        named = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        named += ["--resamples", "100", "--max-new-tokens", "6", "--top-k", "3", "--batch-size", "4"]
        capsys.readouterr()
        status = main([*named, *options])
        captured = capsys.readouterr()
        assert status == expect, captured.err
        return captured.out + captured.err

    return call


def test_a_run_and_its_results(evaluate, tmp_path):
    """Valid by the schema, of the kind `clara`, between `clara` and `text` in what it costs."""
    printed = evaluate("--systems", "clara_expand", "clara", "text", "--latency-questions", "2")
    folder = tmp_path / "run"
    content = results(folder)
    system, options = content["system"], content["options"]
    assert (system["name"], system["kind"], system["reader"]) == ("clara-expand", "clara", "memory_and_text")
    assert (system["retriever"], system["memory_size"], system["codec"]) == ("clara", 4, "float16")
    assert options["expand"] == 1 and "| clara-expand |" in printed
    assert json.loads((folder / "run.json").read_text())["expand"] == 1
    others = {name: results(folder / "baselines" / name) for name in ("clara", "text")}
    assert all(other["options"]["expand"] is None for other in others.values())
    for key in ("tokens_read", "bytes_per_span"):
        cost = {name: other["efficiency"][key] for name, other in {**others, "ours": content}.items()}
        assert min(cost["clara"], cost["text"]) < cost["ours"] < max(cost["clara"], cost["text"])
    for name in ("recall@1", "mrr"):
        assert content["metrics"][name] == others["clara"]["metrics"][name]
    assert {line["system"] for line in content["comparisons"]} == {"clara", "text"}
    assert content["counts"]["failed"] == 0 and content["efficiency"]["latency_questions"] == 2


def test_gold_only_end_to_end(evaluate, tmp_path):
    evaluate("--systems", "clara", "clara_expand", "--setting", "gold_only", "--latency-questions", "0")
    rows = predictions(tmp_path / "run" / "baselines" / "clara-expand")
    assert len(rows) == N_QUESTIONS and all(len(row["read"]) == 1 for row in rows)
    content = results(tmp_path / "run" / "baselines" / "clara-expand")
    assert content["system"]["retriever"] is content["system"]["top_k"] is None
    assert content["efficiency"]["tokens_read"] == np.mean([row["n_tokens"] for row in rows])


def test_another_expand_is_another_run_and_another_entry(evaluate, tmp_path):
    latency = ("--latency-questions", "0")
    evaluate("--systems", "clara_expand", *latency)
    assert "`expand` must be 1" in evaluate("--systems", "clara_expand", "--expand", "2", *latency, expect=1)
    evaluate("--systems", "clara_expand", "--expand", "2", *latency, output="two")
    one, two = results(tmp_path / "run"), results(tmp_path / "two")
    assert identity(one) != identity(two)
    assert two["efficiency"]["tokens_read"] > one["efficiency"]["tokens_read"]
    # what `clara` says does not depend on it: with and without the other system one and the same
    evaluate("--systems", "clara", *latency, output="alone")
    evaluate("--systems", "clara", "clara_expand", "--expand", "2", *latency, output="beside")
    assert without_seconds(predictions(tmp_path / "alone")) == without_seconds(predictions(tmp_path / "beside"))
    assert identity(results(tmp_path / "alone")) == identity(results(tmp_path / "beside"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--systems", "clara_expand", "--expand", "0"], "--expand must be >= 1, got 0"),
        (["--systems", "clara", "--expand", "2"], "--expand has no effect without the system clara_expand, got 2"),
        (["--setting", "closed_book", "--systems", "clara_expand"], "has no documents, but --systems has 'clara_exp"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_options_that_cannot_be(options, message):
    arguments = build_parser().parse_args(["--model", "m", "--data", "d", "--output", "o", *options])
    with pytest.raises(ValueError, match=message):
        check_arguments(arguments)

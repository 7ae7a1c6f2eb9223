"""`recipes.evaluate` as a user runs it: what a run writes, failures counted, and going on after any interruption."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from evaluation_runs import N_QUESTIONS, assert_same, failing, predictions, results, without_seconds, write_rows

from modeling_clara import CLaRaForRAG
from recipes.evaluation import run as run_module
from recipes.evaluation.evaluation import weights_digest


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A finished run of the command, to go on with."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def replace_reading(monkeypatch):
    """`replace_reading(function)`: `generate_texts` becomes `function(original, model, prompts, *args, **kwargs)`."""
    original = CLaRaForRAG.generate_texts
    return lambda function: monkeypatch.setattr(
        CLaRaForRAG, "generate_texts", lambda model, *args, **kwargs: function(original, model, *args, **kwargs)
    )


def test_a_run_and_what_it_writes(evaluate, tmp_path):
    sizes = ["--codec", "int4", "--memory-size", "2", "--retrieval-memory-size", "4"]
    printed = evaluate("--systems", "clara", "text", "closed_book", "wrong_memory", "--latency-questions", "2", *sizes)
    folder = tmp_path / "run"
    content, rows = results(folder), predictions(folder)
    assert [row["id"] for row in rows] == [f"q{number}" for number in range(N_QUESTIONS)]
    for row in rows:
        assert (row["prediction"] is not None) + row["abstained"] + (row["failure"] is not None) == 1
    assert content["counts"]["questions"] == N_QUESTIONS and content["counts"]["failed"] == 0
    system, efficiency = content["system"], content["efficiency"]
    assert (system["codec"], system["memory_size"], system["retrieval_memory_size"]) == ("int4", 2, 4)
    assert efficiency["bytes_per_span"] < 2 * 2 * 32 and efficiency["latency_questions"] == 2
    assert all(part["p95"] >= part["p50"] > 0 for part in efficiency["latency_ms"].values())
    assert efficiency["seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert efficiency["tokens_read"] == pytest.approx(sum(row["n_tokens"] for row in rows) / N_QUESTIONS)
    kinds = {"text": "text", "closed-book": "closed_book", "wrong-memory": "control"}
    assert {line["system"] for line in content["comparisons"]} == set(kinds) and "| clara |" in printed
    assert kinds == {name: results(folder / "baselines" / name)["system"]["kind"] for name in kinds}
    assert not list(tmp_path.rglob("parts"))


def test_two_halves_are_the_whole(evaluate, finished, tmp_path):
    """Each half asks its own questions, says so in results.json, and answers as the whole run does."""
    for half in ("first", "second"):
        printed = evaluate("--half", half, output=half)
        content = results(tmp_path / half)
        assert content["data"]["half"] == half and f"data.jsonl, {half} half" in printed
        assert content["data"]["questions"] == len(predictions(tmp_path / half)) < N_QUESTIONS
    halves = [row for half in ("first", "second") for row in predictions(tmp_path / half)]
    assert_same(sorted(halves, key=lambda row: row["id"]), predictions(finished))
    assert results(finished)["data"]["half"] is None
    evaluate("--half", "first", "--limit", "1", output="one")
    assert_same(predictions(tmp_path / "one"), predictions(tmp_path / "first")[:1])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory: 20 GiB"), ValueError("odd"), KeyError("key")])
def test_one_question_that_fails_is_counted_alone(evaluate, finished, tmp_path, monkeypatch, error):
    failing(monkeypatch, error, "number 5?")
    evaluate()
    rows, whole = predictions(tmp_path / "run"), predictions(finished)
    assert rows[5]["failure"] == f"{type(error).__name__}: {error}" and rows[5]["prediction"] is None
    assert rows[5]["retrieved"] == [] and not rows[5]["abstained"]
    assert_same(rows[:5] + rows[6:], whole[:5] + whole[6:])
    content = results(tmp_path / "run")
    assert content["counts"]["failed"] == 1 and content["counts"]["answered"] == N_QUESTIONS - 1
    assert content["failures"] == {type(error).__name__: 1}
    assert content["metrics"]["f1"]["n"] == N_QUESTIONS  # it stays in the mean, with 0


def test_a_failed_batch_does_not_fail_its_questions(evaluate, finished, tmp_path, replace_reading):
    """Out of memory with four questions together, enough for one: nothing failed."""

    def read(original, model, prompts, *args, **kwargs):
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("too many")
        return original(model, prompts, *args, **kwargs)

    replace_reading(read)
    evaluate()
    assert_same(predictions(tmp_path / "run"), predictions(finished))


@pytest.mark.parametrize("systems", [["clara"], ["clara", "closed_book"]])
def test_nothing_but_failures_is_an_error(evaluate, tmp_path, monkeypatch, systems):
    failing(monkeypatch, ValueError("broken"), "What")
    printed = evaluate("--systems", *systems, expect=1)
    assert "all 10 questions failed" in printed and "ValueError: broken" in printed and "q0" in printed
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_baseline_that_fails_everywhere_is_not_compared(evaluate, tmp_path, replace_reading):
    """A comparison with a system that never ran is not written as if it had answered wrongly."""

    def read(original, model, *args, role="generator", **kwargs):
        if role is None:
            raise ValueError("the prompt must fit")
        return original(model, *args, role=role, **kwargs)

    replace_reading(read)
    assert "all 10 questions failed" in evaluate("--systems", "clara", "text", "closed_book", expect=1)
    assert not (tmp_path / "run" / "baselines" / "text" / "results.json").exists()
    assert {line["system"] for line in results(tmp_path / "run")["comparisons"]} == {"closed-book"}


def test_an_empty_generation_is_a_failure(evaluate, tmp_path, replace_reading):
    def read(original, *args, **kwargs):
        texts = original(*args, **kwargs)
        return ["", *texts[1:]] if len(texts) == 4 else texts

    replace_reading(read)
    evaluate()
    rows = predictions(tmp_path / "run")
    for number, row in enumerate(rows):
        assert (row["failure"] == "empty answer") == (row["prediction"] is None) == (number in (0, 4))
        assert row["prediction"] != "" and len(row["retrieved"]) == 5
    assert results(tmp_path / "run")["failures"] == {"empty answer": 2}


def test_interrupted_and_begun_again(evaluate, tmp_path, monkeypatch):
    """Nothing is asked twice, and predictions.jsonl is that of a run without interruption, byte for byte."""
    evaluate("--systems", "clara", "text", output="whole")
    with monkeypatch.context() as patch:
        first = failing(patch, KeyboardInterrupt(), "number 4?", after=4)
        assert "the same command goes on" in evaluate("--systems", "clara", "text", expect=130)
    assert not (tmp_path / "run" / "predictions.jsonl").exists() and len(first) == 4
    second = failing(monkeypatch, ValueError(), "no such text")
    evaluate("--systems", "clara", "text")
    assert not set(first) & set(second[:6]) and len(second) == 6 + N_QUESTIONS
    for folder in (".", "baselines/text"):
        ours, theirs = (predictions(tmp_path / name / folder) for name in ("run", "whole"))
        assert json.dumps(without_seconds(ours)) == json.dumps(without_seconds(theirs))
        a, b = (results(tmp_path / name / folder) for name in ("run", "whole"))
        assert all(a[part] == b[part] for part in ("metrics", "counts", "comparisons"))


@pytest.mark.parametrize("damage, n_asked", [("torn", 5), ("empty", 10), ("moved", 5), ("both", 0)])
def test_what_a_killed_process_leaves(evaluate, run, monkeypatch, damage, n_asked):
    """A torn last line, an empty part, parts of another number of processes, parts beside the finished file."""
    lines = (run / "predictions.jsonl").read_text().splitlines(keepends=True)
    (run / "parts").mkdir()
    (run / "results.json").unlink()
    if damage != "both":
        (run / "predictions.jsonl").unlink()
    kept = {"torn": [*lines[:5], lines[5][:40]], "empty": [], "moved": lines[:5], "both": lines}[damage]
    (run / "parts" / ("1-of-3.jsonl" if damage == "moved" else "0-of-1.jsonl")).write_text("".join(kept))
    asked = failing(monkeypatch, ValueError(), "no such text")
    evaluate()
    assert len(asked) == n_asked
    assert_same(predictions(run), [json.loads(line) for line in lines])
    assert not (run / "parts").exists() and results(run)["counts"]["answered"] == N_QUESTIONS


def test_a_finished_folder_is_only_scored_again(evaluate, run, finished, monkeypatch):
    """Also if the timing afterwards runs out of memory, which must not lose the answers."""

    def time_one(*args):
        raise torch.OutOfMemoryError("one too many")

    monkeypatch.setattr(run_module, "time_one", time_one)
    asked = failing(monkeypatch, ValueError(), "no such text")
    evaluate("--resamples", "300", "--batch-size", "2", "--latency-questions", "2")
    assert results(run)["efficiency"]["latency_ms"] is None
    assert asked == [] and predictions(run) == predictions(finished)
    values = ({name: metric["value"] for name, metric in results(f)["metrics"].items()} for f in (run, finished))
    assert next(values) == next(values) and results(run)["options"]["resamples"] == 300


def test_another_option_in_the_same_folder(evaluate, data, run, finished):
    """What was begun with other options is named and stays as it is."""
    changes = {
        "top_k": 1, "memory_size": 2, "codec": "int8", "max_new_tokens": 7, "setting": "oracle", "seed": 1,
        "retrieval_memory_size": 2, "min_score": 0.5, "limit": 9, "half": "first", "num_candidates": 7
    }  # fmt: skip
    for name, value in changes.items():
        assert f"`{name}` must be" in evaluate(f"--{name.replace('_', '-')}", str(value), expect=1), name
    assert "`system` must be" in evaluate("--systems", "text", expect=1)
    data.write_bytes(data.read_bytes() + b"\n")
    assert "`data` must be" in evaluate(expect=1)
    assert predictions(run) == predictions(finished) and results(run) == results(finished)


def test_another_model_in_the_same_folder(evaluate, run, model, checkpoint, backbone_folder, tmp_path):
    """Whatever of a model is not as before is noticed, and nothing else, not its name; the run stays as it is."""
    digest = weights_digest(model)
    for name, tensor in model.state_dict().items():
        tensor.neg_()
        assert weights_digest(model) != digest, name
        tensor.neg_()
    assert weights_digest(model) == digest
    mine, base = shutil.copytree(checkpoint, tmp_path / "mine"), shutil.copytree(backbone_folder, tmp_path / "base")
    evaluate("--backbone", str(base), model=mine)
    config = json.loads((mine / "processor_config.json").read_text())
    (mine / "processor_config.json").write_text(json.dumps({**config, "system_prompt": "Answer at length."}))
    printed = evaluate(model=mine, expect=1)
    assert "`weights` must be" in printed and "as when" in printed and results(run)


@pytest.mark.parametrize("name, expect", [(".run.json.12-0a1b2c3d.partial", 0), ("thesis.txt", 1)])
def test_a_folder_with_other_files(evaluate, tmp_path, name, expect):
    """Half of run.json, as a killed start leaves it: the same command begins. Anything else is left alone."""
    write_rows(tmp_path / "run" / name, [b"mine"])
    printed = evaluate(expect=expect)
    left = [path.name for path in (tmp_path / "run").iterdir()]
    assert ("Choose another one" in printed and left == [name]) if expect else results(tmp_path / "run")


@pytest.mark.parametrize("option, value", [("memory-size", "3"), ("memory-size", "0"), ("retrieval-memory-size", "5")])
def test_what_cannot_be_scored_is_refused_before_anything_is_asked(evaluate, tmp_path, monkeypatch, option, value):
    """Hours of answers that no later call could score would be lost."""
    asked = failing(monkeypatch, ValueError(), "no such text")
    printed = evaluate(f"--{option}", value, memories=tmp_path / "fresh", expect=1)
    assert "error: " in printed and option in printed.replace("_", "-") and value in printed
    assert asked == [] and not (tmp_path / "fresh").exists()


def test_predictions_of_another_system_do_not_mix_with_a_run(evaluate, run, finished, tmp_path):
    """They are refused in the folder of a run; otherwise going on would take them for the model's."""
    theirs = [{"id": f"q{number}", "prediction": f"City {number}"} for number in range(N_QUESTIONS)]
    external = {"model": None, "memories": None, "name": "other"}
    external["predictions"] = write_rows(tmp_path / "theirs.jsonl", theirs)
    assert "must be" in evaluate(expect=1, **external)
    assert predictions(run) == predictions(finished) and results(run) == results(finished)
    evaluate(output="external", **external)
    assert results(tmp_path / "external")["metrics"]["em"]["value"] == 1.0
    evaluate(expect=1, output="external")
    assert results(tmp_path / "external")["system"]["kind"] == "external"

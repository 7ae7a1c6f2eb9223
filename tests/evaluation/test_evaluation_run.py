"""`recipes.evaluate` as a user runs it: what a run writes, failures counted, and going on after any interruption.

Runs are calls of its `main` in this process, on the tiny checkpoint; test_evaluation_processes.py kills and launches.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from evaluation_runs import N_QUESTIONS, assert_same, failing, predictions, results, without_seconds, write_data
from safetensors.torch import load_file, save_file

from modeling_clara import CLaRaForRAG
from recipes.evaluation import run as run_module

# --- a whole run -----------------------------------------------------------------------------------------------------


def test_a_run_and_what_it_writes(evaluate, tmp_path):
    printed = evaluate("--systems", "clara", "text", "closed_book", "wrong_memory", "--latency-questions", "2")
    folder = tmp_path / "run"
    content, rows = results(folder), predictions(folder)
    assert [row["id"] for row in rows] == [f"q{number}" for number in range(N_QUESTIONS)]
    for row in rows:
        assert (row["prediction"] is not None) + row["abstained"] + (row["failure"] is not None) == 1
    assert content["counts"]["questions"] == N_QUESTIONS and content["counts"]["failed"] == 0
    assert content["efficiency"]["latency_questions"] == 2
    times = content["efficiency"]["latency_ms"]
    assert all(times[part]["p95"] >= times[part]["p50"] > 0 for part in times)
    assert content["efficiency"]["seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert content["efficiency"]["tokens_read"] == pytest.approx(sum(row["n_tokens"] for row in rows) / N_QUESTIONS)
    assert {line["system"] for line in content["comparisons"]} == {"text", "closed-book", "wrong-memory"}
    kinds = {name: results(folder / "baselines" / name)["system"]["kind"] for name in ("text", "closed-book")}
    assert kinds == {"text": "text", "closed-book": "closed_book"} and "| clara |" in printed
    assert results(folder / "baselines" / "wrong-memory")["system"]["kind"] == "control"
    assert not list(tmp_path.rglob("parts"))


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_codecs_and_memory_sizes(evaluate, tmp_path, codec):
    evaluate("--codec", codec, "--memory-size", "2", "--retrieval-memory-size", "4", output=codec)
    content = results(tmp_path / codec)
    system = content["system"]
    assert (system["codec"], system["memory_size"], system["retrieval_memory_size"]) == (codec, 2, 4)
    assert content["efficiency"]["bytes_per_span"] < 2 * 2 * 32


def test_gold_only_reads_every_gold_document(evaluate, tmp_path):
    """The gold documents alone, all of them read: also where they are many."""
    docs = [f"City {number} is the capital of a country." for number in range(25)]
    row = {"id": "q", "question": "Which cities are capitals?", "answers": ["all"], "docs": docs}
    path = tmp_path / "many.jsonl"
    path.write_text(json.dumps({**row, "pos_index": list(range(25))}) + "\n")
    evaluate("--setting", "gold_only", "--memory-size", "2", data=str(path))
    assert len(predictions(tmp_path / "run")[0]["read"]) == 25


def test_two_halves_are_the_whole(evaluate, tmp_path):
    """Each half asks its own questions, says so in results.json, and answers as the whole run does."""
    evaluate()
    for half in ("first", "second"):
        printed = evaluate("--half", half, output=half)
        content = results(tmp_path / half)
        assert content["data"]["half"] == half and f"data.jsonl, {half} half" in printed
        assert content["data"]["questions"] == len(predictions(tmp_path / half)) < N_QUESTIONS
    halves = [row for half in ("first", "second") for row in predictions(tmp_path / half)]
    assert_same(sorted(halves, key=lambda row: row["id"]), predictions(tmp_path / "run"))
    assert results(tmp_path / "run")["data"]["half"] is None
    evaluate("--half", "first", "--limit", "1", output="one")
    assert_same(predictions(tmp_path / "one"), predictions(tmp_path / "first")[:1])


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory: 20 GiB"), ValueError("odd"), KeyError("key")])
def test_one_question_that_fails_is_counted_alone(evaluate, tmp_path, monkeypatch, error):
    evaluate(output="whole")
    failing(monkeypatch, error, "number 5?")
    evaluate()
    rows, whole = predictions(tmp_path / "run"), predictions(tmp_path / "whole")
    assert rows[5]["failure"] == f"{type(error).__name__}: {error}" and rows[5]["prediction"] is None
    assert rows[5]["retrieved"] == [] and not rows[5]["abstained"]
    assert_same(rows[:5] + rows[6:], whole[:5] + whole[6:])
    content = results(tmp_path / "run")
    assert content["counts"]["failed"] == 1 and content["counts"]["answered"] == N_QUESTIONS - 1
    assert content["failures"] == {type(error).__name__: 1}
    assert content["metrics"]["f1"]["n"] == N_QUESTIONS  # it stays in the mean, with 0


def test_a_failed_batch_does_not_fail_its_questions(evaluate, tmp_path, monkeypatch):
    """Out of memory with four questions together, enough for one: nothing failed."""
    evaluate(output="whole")
    original = CLaRaForRAG.generate_texts

    def generate_texts(self, prompts, *args, **kwargs):
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("too many")
        return original(self, prompts, *args, **kwargs)

    monkeypatch.setattr(CLaRaForRAG, "generate_texts", generate_texts)
    evaluate()
    assert_same(predictions(tmp_path / "run"), predictions(tmp_path / "whole"))


@pytest.mark.parametrize("systems", [["clara"], ["clara", "closed_book"]])
def test_nothing_but_failures_is_an_error(evaluate, tmp_path, monkeypatch, systems):
    failing(monkeypatch, ValueError("broken"), "What")
    printed = evaluate("--systems", *systems, expect=1)
    assert "all 10 questions failed" in printed and "ValueError: broken" in printed and "q0" in printed
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_baseline_that_fails_everywhere_is_no_rival(evaluate, tmp_path, monkeypatch):
    """A comparison with a system that never ran is not written as if it had answered wrongly."""
    original = CLaRaForRAG.generate_texts

    def generate_texts(self, *args, role="generator", **kwargs):
        if role is None:
            raise ValueError("the prompt must fit")
        return original(self, *args, role=role, **kwargs)

    monkeypatch.setattr(CLaRaForRAG, "generate_texts", generate_texts)
    printed = evaluate("--systems", "clara", "text", "closed_book", expect=1)
    assert "all 10 questions failed" in printed
    folder = tmp_path / "run"
    assert not (folder / "baselines" / "text" / "results.json").exists()
    if (folder / "results.json").exists():
        assert "text" not in {line["system"] for line in results(folder)["comparisons"]}


def test_an_empty_generation_is_a_failure(evaluate, tmp_path, monkeypatch):
    original = CLaRaForRAG.generate_texts

    def generate_texts(self, *args, **kwargs):
        texts = original(self, *args, **kwargs)
        return [""] + texts[1:] if len(texts) == 4 else texts

    monkeypatch.setattr(CLaRaForRAG, "generate_texts", generate_texts)
    evaluate()
    rows = predictions(tmp_path / "run")
    for number, row in enumerate(rows):
        assert (row["failure"] == "empty answer") == (number in (0, 4))
        assert (row["prediction"] is None) == (number in (0, 4)) and row["prediction"] != ""
    assert results(tmp_path / "run")["failures"] == {"empty answer": 2}
    assert len(rows[0]["retrieved"]) == 5


def test_time_that_cannot_be_taken_costs_no_results(evaluate, tmp_path, monkeypatch):
    """All questions are answered; that the timing afterwards runs out of memory must not lose them."""

    def time_one(*args):
        raise torch.OutOfMemoryError("one too many")

    monkeypatch.setattr(run_module, "time_one", time_one)
    evaluate("--latency-questions", "2")
    assert results(tmp_path / "run")["efficiency"]["latency_ms"] is None


# --- going on --------------------------------------------------------------------------------------------------------


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
        dump = [json.dumps(row) for row in without_seconds(ours)]
        assert dump == [json.dumps(row) for row in without_seconds(theirs)]
        a, b = (results(tmp_path / name / folder) for name in ("run", "whole"))
        assert a["metrics"] == b["metrics"] and a["counts"] == b["counts"] and a["comparisons"] == b["comparisons"]


@pytest.mark.parametrize("damage", ["torn", "empty", "moved", "both"])
def test_what_a_killed_process_leaves(evaluate, tmp_path, monkeypatch, damage):
    """A torn last line, an empty part, parts of another number of processes, parts beside the finished file."""
    evaluate()
    folder = tmp_path / "run"
    lines = (folder / "predictions.jsonl").read_text().splitlines(keepends=True)
    (folder / "parts").mkdir()
    (folder / "results.json").unlink()
    name = "1-of-3.jsonl" if damage == "moved" else "0-of-1.jsonl"
    if damage != "both":
        (folder / "predictions.jsonl").unlink()
    kept = {"torn": [*lines[:5], lines[5][:40]], "empty": [], "moved": lines[:5], "both": lines}[damage]
    (folder / "parts" / name).write_text("".join(kept))
    asked = failing(monkeypatch, ValueError(), "no such text")
    evaluate()
    assert len(asked) == {"torn": 5, "empty": 10, "moved": 5, "both": 0}[damage]
    rows = predictions(folder)
    assert_same(rows, [json.loads(line) for line in lines])
    assert not (folder / "parts").exists() and results(folder)["counts"]["answered"] == N_QUESTIONS


def test_a_finished_folder_is_only_scored_again(evaluate, tmp_path, monkeypatch):
    evaluate()
    folder = tmp_path / "run"
    before, first = (folder / "predictions.jsonl").read_bytes(), results(folder)
    asked = failing(monkeypatch, ValueError(), "no such text")
    evaluate("--resamples", "300", "--batch-size", "2")
    assert asked == [] and (folder / "predictions.jsonl").read_bytes() == before
    again = results(folder)
    assert {name: metric["value"] for name, metric in again["metrics"].items()} == {
        name: metric["value"] for name, metric in first["metrics"].items()
    }
    assert again["options"]["resamples"] == 300


def test_another_option_in_the_same_folder(evaluate, data, tmp_path):
    """What was begun with other options is named and stays as it is."""
    evaluate()
    folder = tmp_path / "run"
    before = (folder / "predictions.jsonl").read_bytes()
    changes = {
        "top_k": ["--top-k", "1"], "memory_size": ["--memory-size", "2"], "codec": ["--codec", "int8"],
        "max_new_tokens": ["--max-new-tokens", "7"], "setting": ["--setting", "oracle"], "seed": ["--seed", "1"],
        "retrieval_memory_size": ["--retrieval-memory-size", "2"], "min_score": ["--min-score", "0.5"],
        "limit": ["--limit", "9"], "half": ["--half", "first"], "system": ["--systems", "text"],
        "num_candidates": ["--num-candidates", "7"],
    }  # fmt: skip
    for name, options in changes.items():
        assert f"`{name}` must be" in evaluate(*options, expect=1), name
    write_data(data, N_QUESTIONS + 1)
    assert "`data` must be" in evaluate(expect=1)
    assert (folder / "predictions.jsonl").read_bytes() == before and results(folder)


def change(part: str, mine: Path, base: Path) -> None:
    """Another prompt in the checkpoint, or the other sign of one tensor of it or of its backbone."""
    if part == "prompt":
        config = json.loads((mine / "processor_config.json").read_text())
        (mine / "processor_config.json").write_text(json.dumps({**config, "system_prompt": "Answer at length."}))
        return
    folder = base if part in ("backbone", "lm_head") else mine / part if (mine / part).is_dir() else mine
    path = next(folder.glob("*.safetensors"))
    weights = load_file(path)
    wanted = {"memory_embeddings": "memory", "backbone": "layers.0.mlp.up_proj", "lm_head": "lm_head"}.get(part, "")
    name = next(name for name in sorted(weights) if wanted in name)
    save_file({**weights, name: -weights[name]}, path, metadata={"format": "pt"})


def test_another_model_in_the_same_folder(evaluate, checkpoint, backbone_folder, tmp_path):
    """Whatever of a model is not as before is noticed, also if its name is the same; the run stays as it is."""
    mine, base = tmp_path / "mine", tmp_path / "base"
    parts = ["", "generator", "reasoner", "compressor", "memory_embeddings", "backbone", "lm_head", "prompt", ""]
    for part in parts:
        for target, source in ((mine, checkpoint), (base, backbone_folder)):
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target)
        if part:
            change(part, mine, base)
        printed = evaluate("--backbone", str(base), model=str(mine), expect=1 if part else 0)
        assert not part or ("must be" in printed and "as when" in printed), part


def test_killed_before_the_run_was_written_down(evaluate, tmp_path):
    """All that lies in the folder is the half of run.json: the same command begins."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.12-0a1b2c3d.partial").write_text('{"weig')
    evaluate()
    assert results(tmp_path / "run")


def test_a_folder_with_other_files_is_left_alone(evaluate, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert "Choose another one" in evaluate(expect=1)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("option, value", [("seed", "-1"), ("memory-size", "3"), ("retrieval-memory-size", "5")])
def test_what_cannot_be_scored_is_refused_before_anything_is_asked(evaluate, tmp_path, monkeypatch, option, value):
    """Hours of answers that no later call could score would be lost."""
    asked = failing(monkeypatch, ValueError(), "no such text")
    printed = evaluate(f"--{option}", value, "--memories", str(tmp_path / "fresh"), expect=1)
    assert "error: " in printed and option.replace("-", "_") in printed.replace("-", "_") and value in printed
    assert asked == [] and not (tmp_path / "fresh").exists()


def test_predictions_of_another_system_do_not_mix_with_a_run(evaluate, data, tmp_path):
    """They are refused in the folder of a run; otherwise going on would take them for the model's."""
    evaluate()
    folder, theirs = tmp_path / "run", tmp_path / "theirs.jsonl"
    before = (folder / "predictions.jsonl").read_bytes()
    lines = [json.dumps({"id": f"q{number}", "prediction": f"City {number}"}) for number in range(N_QUESTIONS)]
    theirs.write_text("\n".join(lines) + "\n")
    external = {"model": "", "predictions": str(theirs), "name": "other"}
    assert "must be" in evaluate(expect=1, **external)
    assert (folder / "predictions.jsonl").read_bytes() == before
    assert results(folder)["system"]["kind"] == "clara"
    evaluate(output="external", **external)
    assert results(tmp_path / "external")["metrics"]["em"]["value"] == 1.0
    evaluate(expect=1, output="external")
    assert results(tmp_path / "external")["system"]["kind"] == "external"

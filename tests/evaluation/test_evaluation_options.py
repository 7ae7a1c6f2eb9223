"""Options of `recipes.evaluate` that cannot be or have no effect: refused before anything is read or written."""

import shlex
from pathlib import Path

import pytest

from recipes.evaluation.cli import build_parser, check_arguments, main, shown_command
from recipes.evaluation.systems import SYSTEMS

MODEL, PREDICTIONS = "--model m", "--predictions p.jsonl --name n"
TUNED = ("tuned_text", "bm25_tuned_text")
REFUSED = [
    ("", "--model or --predictions"),
    (f"{MODEL} {PREDICTIONS}", "not both"),
    (f"{MODEL} --setting Normal", "`setting` must be one of normal"),
    ("--predictions p", "--name must say"),
    ("--predictions p --name ' '", "--name must say"),
    (f"--predictions p --name {'x' * 101}", "--name must say"),
    (f"{PREDICTIONS} --url example", "--url must be an http(s) address, got 'example'"),
    (f"{PREDICTIONS} --limit 0", "--limit must be >= 1"),
    (f"{PREDICTIONS} --seed -1", "--seed must be >= 0"),
    (f"{PREDICTIONS} --resamples 1", "--resamples must be >= 100"),
    (f"{PREDICTIONS} --corpus x", "--corpus has no effect with --predictions"),
    (f"{PREDICTIONS} --codec int8", "--codec has no effect with --predictions"),
    (f"{PREDICTIONS} --top-k 3", "--top-k has no effect with --predictions"),
    (f"{PREDICTIONS} --text-reader r", "--text-reader has no effect with --predictions, got 'r'. Leave it out"),
    (f"{MODEL} --url https://a.org", "--url has no effect with --model"),
    (f"{MODEL} --dtype foo", "--dtype must be a torch dtype"),
    (f"{MODEL} --codec int3", "--codec must be one of"),
    (f"{MODEL} --setting corpus --corpus c --codec int4", "--codec must be left out with --corpus"),
    (f"{MODEL} --corpus c", "--corpus needs --setting corpus"),
    (f"{MODEL} --min-score nan", "--min-score must be a finite number"),
    (f"{MODEL} --min-score inf", "--min-score must be a finite number"),
    (f"{MODEL} --systems clara clara", "--systems must be of"),
    (f"{MODEL} --systems nothing", "got nothing. Correct it"),
    (f"{MODEL} --systems dense_text", "needs --dense MODEL"),
    (f"{MODEL} --setting gold_only --systems clara bm25_text", "nothing to rank"),
    (f"{MODEL} --setting gold_only --systems clara hybrid", "nothing to rank"),
    (f"{MODEL} --setting gold_only --systems bm25_tuned_text --text-reader r", "--systems has 'bm25_tuned_text'"),
    (f"{MODEL} --setting closed_book --systems tuned_text --text-reader r", "has no documents, but --systems has 'tu"),
    (f"{MODEL} --setting closed_book --systems clara_expand", "has no documents, but --systems has 'clara_expand'"),
    (f"{MODEL} --systems clara_expand --expand 0", "--expand must be >= 1, got 0"),
    (f"{MODEL} --systems clara --expand 2", "--expand has no effect without the system clara_expand, got 2"),
    (f"{MODEL} --systems clara --expand-below 0.5", "--expand-below has no effect without the system clara_expand"),
    (f"{MODEL} --systems clara_expand --expand-below 2", "`expand_below` must be a probability above 0 and at most"),
    (f"{MODEL} --systems tuned_text", "'tuned_text' needs --text-reader CHECKPOINT. Pass it, or leave out"),
    (f"{MODEL} --systems clara bm25_tuned_text", "the system 'bm25_tuned_text' needs --text-reader CHECKPOINT"),
    (f"{MODEL} --text-reader r", "--text-reader has no effect without the systems tuned_text or bm25_tuned"),
    (f"{MODEL} --text-reader r --systems text bm25_text", "--text-reader has no effect without"),
    (f"{MODEL} --text-reader r --setting closed_book --systems all", "--text-reader has no effect without"),
]


@pytest.mark.parametrize("options, message", REFUSED)
def test_options_that_are_refused(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(["--data", "d.jsonl", "--output", "o", *shlex.split(options)]) == 1
    shown, errors = capsys.readouterr()
    assert shown == "" and errors.startswith("error: ") and message in errors and not Path("o").exists()


def systems(options: str) -> list[str]:
    arguments = build_parser().parse_args(f"--model m --data d --output o --systems {options}".split())
    check_arguments(arguments)
    return arguments.systems


def test_all_systems_are_those_that_can_be():
    everything = [name for name in SYSTEMS if name != "dense_text"]
    assert systems("all --text-reader r --dense e") == list(SYSTEMS)
    assert systems("all --text-reader r") == everything
    assert systems("all") == [name for name in everything if name not in TUNED]
    gold_only = systems("all --text-reader r --setting gold_only")
    assert set(gold_only) == {name for name in everything if not name.startswith(("bm25", "hybrid"))}
    assert systems("bm25_tuned_text tuned_text --text-reader r") == ["bm25_tuned_text", "tuned_text"]


def test_a_command_tells_no_paths_of_a_machine():
    shown = shown_command(["--model", "/home/me/models/clara", "--data", "data/q.jsonl", "--limit", "3"])
    assert shown == "python -m recipes.evaluate --model clara --data data/q.jsonl --limit 3"

"""Legs of clara-smollm2-135m: their order, what each starts from, time, kills."""

import doctest
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import smollm2_legs
import smollm2_stages as stages
from evaluation.cli import build_parser, check_arguments
from smollm2_call import DATA, FILES, PUBLISHED, RUNS, STARTS, Call
from smollm2_stages import LEGS, leg_name

from smollm2.home import (
    ALL_EVALUATIONS,
    EVALUATED,
    FRESH,
    TEXT,
    TINY,
    changed,
    fails,
    load,
    log,
    run,
    weights,
)

SCRIPT = Path(smollm2_legs.__file__)


def test_every_leg_goes_on_from_the_one_before(trained):
    runs = trained / RUNS
    read = {"compressor", "generator", "memory_embeddings", "separator_embedding"}
    assert changed(runs / "pretrain", runs / "curriculum") == read
    assert changed(runs / "instruct", runs / "pretrain") == read
    assert changed(runs / "contrastive", runs / "instruct") == {"reasoner"}
    assert changed(runs / "joint", runs / "contrastive") == {*read, "reasoner"}
    assert changed(runs / "joint-search", runs / "joint") == {"reasoner", "generator"}
    assert changed(runs / "joint-label-free", runs / "instruct") == {"reasoner", "generator"}
    for name, start in (("joint", "contrastive"), ("joint-label-free", "instruct")):
        given = json.loads((runs / name / "run.json").read_text())
        assert given["model"]["checkpoint"] == str(RUNS / start)
        assert not (runs / name / "memories").exists()  # of the first they move, the second has those of contrastive
    text = weights(runs / "text")
    assert not any(tensor.any() for name, tensor in text.items() if "lora_B" in name and "generator" not in name)
    assert (runs / "instruct" / "samples.jsonl").read_text().count("\n") > 0
    for name in ("curriculum", *STARTS, "text"):
        assert name == "publish" or log(runs / name)["global_step"] == (6 if name == "text" else 3)


def test_finished_legs_are_not_run_again(published, no_command, capfd):
    before = {path: path.stat().st_mtime_ns for path in published.rglob("*")}
    names = [name for name in LEGS if name not in ("evaluate", "corpus")]
    assert run(published, *names, tiny=[]) == 0
    assert "joint-label-free is finished" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in published.rglob("*")} == before


def test_variants_stand_by_themselves(trained, forks, tmp_path, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in (trained / RUNS).glob("*")}
    variant, results, back = RUNS / "variants" / "curriculum" / "rank-16", tmp_path / "results", tmp_path / "back"
    assert run(trained, "curriculum", "--variants", "rank-16", "--results", results, tiny=[*TINY, *FRESH[2:]]) == 0
    assert load(trained / variant, trained).config.lora["generator"]["rank"] == 16
    assert {path: path.stat().st_mtime_ns for path in before} == before  # the run itself is finished
    assert smollm2_legs.main(["collect", str(results), "--home", str(back)]) == 0
    assert (back / variant / "trainer_state.json").exists()
    assert not (back / variant / "generator").exists()  # curves alone
    lines = []
    monkeypatch.setattr(Call, "command", lambda call, *words: lines.append([str(word) for word in words]))
    assert run(trained, "pretrain", "--variants", "base", "paraphrase-0") == 0
    for name, line in zip(("base", "paraphrase-0"), lines, strict=True):
        assert f"output_dir={RUNS}/variants/pretrain/{name}" in line
        assert line.index("max_steps=300") < line.index("max_steps=3")  # what is given last wins
        assert any(word.startswith("datasets=[{") for word in line) == (name == "paraphrase-0")


def test_variants_of_two_legs_of_one_stage_do_not_meet(trained, monkeypatch):
    places = []
    monkeypatch.setattr(Call, "command", lambda call, *words: places.append(words[-2]))
    assert run(trained, "joint", "--variants", "base") == run(trained, "joint-label-free", "--variants", "base") == 0
    assert len(set(places)) == 2 and all(place.startswith("output_dir=") for place in places)


def test_list_and_names():
    assert doctest.testmod(stages).failed == 0
    done = subprocess.run([sys.executable, "-S", "-s", str(SCRIPT), "list"], capture_output=True, text=True)
    named = [line.split()[:2] for line in done.stdout.splitlines()]  # with the standard library alone
    assert done.returncode == 0 and named == [[str(number), name] for number, name in enumerate(LEGS, 1)]
    assert [leg_name(number) for number, _ in named] == [leg_name(name) for name in LEGS] == list(LEGS)


NEEDED = {**STARTS, "evaluate": "publish", "corpus": "publish"}


def test_legs_can_be_skipped(trained, prepared, forks, tmp_path, capsys):
    """Another run to start from, and one of the first to publish."""
    home = shutil.copytree(prepared, tmp_path / "home")
    ignored = shutil.ignore_patterns("dataset_cache", "checkpoint-*")
    shutil.copytree(trained / RUNS / "curriculum", home / RUNS / "curriculum", ignore=ignored)
    assert run(home, "contrastive", "--from", "curriculum") == 0
    assert changed(home / RUNS / "contrastive", home / RUNS / "curriculum") == {"reasoner"}
    assert run(home, "publish", "--from", "contrastive", tiny=[]) == 0
    assert load(home / PUBLISHED, home).fingerprint  # it loads
    card = (home / PUBLISHED / "README.md").read_text(encoding="utf-8")
    assert "| curriculum | pieces of passages" in card and "| joint |" not in card
    assert "known | a CPU | 3 |" in card and "not trained" not in card
    given = ["--home", home, "--cpu", "--from"]
    assert "pretrain, which is not finished" in fails(capsys, "run", "publish", *given, "pretrain")
    for legs in (["instruct", "contrastive"], ["prepare"], ["text"], ["evaluate"], ["curriculum"]):
        assert "--from must be of one leg of pretrain," in fails(capsys, "run", *legs, *given, "curriculum")
    # what is finished, and is asked for from elsewhere
    shutil.copytree(trained / RUNS / "instruct", home / RUNS / "instruct", ignore=ignored)
    assert "started from curriculum, and is asked for from instruct" in fails(
        capsys, "run", "contrastive", "--home", home, "--cpu"
    )
    assert "is of contrastive" in fails(capsys, "run", "publish", *given, "curriculum")
    # its memories are not those of instruct's compressor
    assert run(home, "joint-label-free") == 0
    assert (home / RUNS / "joint-label-free" / "memories" / "corpus.json").exists()


def test_data_of_an_older_version_is_made_again(prepared, forks, source, tmp_path):
    home = shutil.copytree(prepared, tmp_path / "home")
    counts = home / DATA / "counts.json"
    rows = json.loads(counts.read_text())
    assert {name for name in rows["rows"] if "/" not in name} == set(FILES)
    counts.write_text(json.dumps({**rows, "rows": {n: v for n, v in rows["rows"].items() if n != "curriculum"}}))
    (home / DATA / "curriculum.jsonl").unlink()
    assert run(home, "prepare", "--source", source, tiny=[]) == 0
    assert (home / DATA / "curriculum.jsonl").exists() and json.loads(counts.read_text()) == rows


@pytest.mark.parametrize("leg", NEEDED)
def test_a_leg_names_the_one_it_needs(leg, tmp_path, no_command, capsys):
    assert f"Run the leg {NEEDED[leg]}," in fails(capsys, "run", leg, "--home", tmp_path / "home", "--cpu")


def test_what_is_wrong_is_said_before_anything_runs(trained, tmp_path, no_command, capsys):
    home = ["--home", trained, "--cpu"]
    for word in ("0", "13", "-1", "1.5", "train", "", "²"):
        assert "from 1 to 12" in fails(capsys, "run", "pretrain", word, *home)
    for minutes in ("0", "-1", "nan"):
        assert "--minutes" in fails(capsys, "run", "pretrain", *home, f"--minutes={minutes}")
    assert "'lr-3'" in fails(capsys, "run", "pretrain", *home, "--variants", "base", "lr-3")
    (tmp_path / "file").write_text("kept")
    for results in (tmp_path, tmp_path / "file"):
        fails(capsys, "run", "pretrain", *home, "--results", results)
    assert (tmp_path / "file").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


def test_all_evaluations_are_of_known_options_and_files(prepared):
    lines = dict(ALL_EVALUATIONS(True, True))
    assert len(lines) == 2 * 5 + 3 * 4 and set(EVALUATED) < set(lines)
    for line in lines.values():
        arguments = build_parser().parse_args([*map(str, line), "--output", "x"])
        check_arguments(arguments)
        assert (prepared / arguments.data).exists()


# --- time and kills --------------------------------------------------------------------------------------------------


def test_no_time_at_all(prepared, tmp_path):
    """Interrupted while it is still starting: there is nothing to take home, and the next legs do not run."""
    line = [sys.executable, SCRIPT, "run", "text", "pretrain", "--home", prepared, "--cpu", "--minutes", "0.02"]
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    try:
        done = subprocess.run([*line, "--results", tmp_path / "out"], capture_output=True, text=True)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert done.returncode == 3 and "leg text: its time is over" in done.stdout
    assert "leg pretrain" not in done.stdout and not (tmp_path / "out").exists()
    assert not (prepared / RUNS / "text").exists()


def test_killed_paused_carried_and_gone_on(trained, prepared, forks, tmp_path, monkeypatch):
    """A kill there, then the end of the time, then the last checkpoint goes on here: weights as if nothing was."""
    there, here = (shutil.copytree(prepared, tmp_path / name) for name in ("there", "here"))
    line = [sys.executable, str(SCRIPT), "run", "text", "--home", str(there), "--cpu", "--set", *TEXT]
    process = subprocess.Popen(line, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    text = there / RUNS / "text"
    while process.poll() is None and not (text / "checkpoint-1").exists():
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (text / "run.json").exists() and not (text / "config.json").exists()

    command = Call.command

    def one_step(call, script, *arguments):
        words = ["max_minutes=0.0001" if str(word).startswith("max_minutes=") else word for word in arguments]
        command(call, script, *words)

    monkeypatch.setattr(Call, "command", one_step)
    monkeypatch.setattr(smollm2_legs, "RESULT_PART", 10_000)
    results = tmp_path / "results"
    assert run(there, "text", "pretrain", "--results", results, tiny=TEXT) == 3
    monkeypatch.setattr(Call, "command", command)
    assert not (there / RUNS / "pretrain").exists()
    sizes = [part.stat().st_size for part in results.glob("part-*")]
    assert len(sizes) > 3 and max(sizes) <= 10_000
    assert smollm2_legs.main(["collect", str(results), "--home", str(here)]) == 0
    (checkpoint,) = (here / RUNS / "text").glob("checkpoint-*")
    assert 1 <= int(checkpoint.name.partition("-")[2]) < 6
    assert not (here / RUNS / "text" / "dataset_cache").exists()
    assert run(here, "text", tiny=TEXT) == 0
    ours, theirs = (home / RUNS / "text" for home in (here, trained))
    assert changed(ours, theirs) == set()
    losses = [[entry["loss"] for entry in log(run)["log_history"] if "loss" in entry] for run in (ours, theirs)]
    assert losses[0] == losses[1] and len(losses[0]) == 6


@pytest.mark.parametrize("leg", ["joint", "joint-label-free"])
def test_a_paused_leg_goes_on_without_the_memories(trained, prepared, forks, tmp_path, leg):
    """They do not travel, nor does what was mined with them, and are made again."""
    home = shutil.copytree(prepared, tmp_path / "home")
    for name in (STARTS[leg], "contrastive", leg):
        ignored = shutil.ignore_patterns("memories", "dataset_cache")
        shutil.copytree(trained / RUNS / name, home / RUNS / name, ignore=ignored, dirs_exist_ok=True)
    (home / RUNS / leg / "config.json").unlink()  # paused at its last step
    assert run(home, leg) == 0
    assert changed(home / RUNS / leg, trained / RUNS / leg) == set()
    mined = [(place / DATA / "retrieval_hard.jsonl") for place in (home, trained)]
    assert leg != "joint" or mined[0].read_bytes() == mined[1].read_bytes()


def test_what_an_earlier_start_chose_is_mined_again(trained, forks, tmp_path):
    home = shutil.copytree(trained, tmp_path / "home", symlinks=True)
    hard = home / DATA / "retrieval_hard.jsonl"
    before = hard.read_bytes()
    hard.write_text("{}\n")
    os.utime(hard, (0, 0))  # older than the checkpoint whose choice it should be
    shutil.rmtree(home / RUNS / "joint")
    assert run(home, "joint") == 0
    assert hard.read_bytes() == before and changed(home / RUNS / "joint", trained / RUNS / "joint") == set()

"""What travels between two machines for clara-smollm2-135m: data, runs, wheels, results."""

import json
import os
import shutil
import subprocess
import time

import smollm2_call
import smollm2_legs
import smollm2_stages as stages
from parcels import pack
from smollm2_call import RUNS, SOURCE, Call

from smollm2.home import EVALUATED, ROOT, changed, fails, write_wheel


def test_results_are_packed_even_if_a_leg_fails(trained, tmp_path, no_command, capsys):
    """And come in whole: what other machines need of a finished run, and nothing else."""
    home, results = tmp_path / "home", tmp_path / "results"
    for name in ("curriculum", "pretrain"):
        shutil.copytree(trained / RUNS / name, home / RUNS / name)
    words = ["run", "pretrain", "publish", "--home", home, "--cpu", "--results", results]
    assert "Run the leg joint-search," in fails(capsys, *words)
    assert "new or empty folder" in fails(capsys, *words)
    assert smollm2_legs.main(["collect", str(results), "--home", str(tmp_path / "back")]) == 0
    back = tmp_path / "back" / RUNS / "pretrain"
    names = {path.name for path in (home / RUNS / "pretrain").iterdir()}
    assert {path.name for path in back.iterdir()} == {n for n in names if n != "dataset_cache" and "-" not in n}
    assert changed(back, home / RUNS / "pretrain") == set()
    assert {path.name for path in (tmp_path / "back" / RUNS).iterdir()} == {"pretrain"}


def test_results_of_evaluations(measured, tmp_path):
    """Of the card, the published folder's and the corpus's figures, not of memories."""
    assert smollm2_legs.main(["collect", str(measured / "results"), "--home", str(tmp_path)]) == 0
    names = {path.relative_to(tmp_path / RUNS).parts[0] for path in (tmp_path / RUNS).rglob("*") if path.is_file()}
    assert names == {"clara-smollm2-135m", "evaluation"}
    for name in (*EVALUATED, "multihop_hotpotqa_dev-corpus"):
        results = json.loads((tmp_path / RUNS / "evaluation" / name / "results.json").read_text())
        assert results == json.loads((measured / RUNS / "evaluation" / name / "results.json").read_text())
    assert not (tmp_path / RUNS / "evaluation" / "memories").exists()


def test_pack_and_receive(trained, source, tmp_path, capsys):
    """Data, a finished run and one that goes on, in parts, into a home that goes on from there."""
    there, home = tmp_path / "there", tmp_path / "home"
    shutil.copytree(trained / RUNS / "pretrain", home / RUNS / "pretrain")
    paused = shutil.copytree(trained / RUNS / "text", home / RUNS / "text")
    (paused / "config.json").unlink()
    shutil.copytree(next(paused.glob("checkpoint-*")), paused / "checkpoint-2")
    shutil.copytree(paused / "checkpoint-2", paused / "checkpoint-10")
    (paused / "checkpoint-10" / "trainer_state.json").unlink()  # half written
    words = ["pack", source, tmp_path / "parcels", "--no-backbone", "--home", home]
    assert "'joint'" in fails(capsys, *words, "--runs", "pretrain", "joint")
    assert "no folder" in fails(capsys, "pack", source / "no folder", tmp_path / "parcels", "--no-backbone")
    words += ["--limit", "0.03", "--runs", "pretrain", "text"]
    assert smollm2_legs.main([str(word) for word in words]) == 0
    places = sorted((tmp_path / "parcels").iterdir())
    statuses = [smollm2_legs.main(["receive", str(place), "--home", str(there)]) for place in places]
    assert len(places) > 2 and statuses == [3] * (len(places) - 1) + [0]
    ours, theirs = ({path.name: path.read_bytes() for path in f.iterdir()} for f in (there / SOURCE, source))
    assert ours == theirs
    assert changed(there / RUNS / "pretrain", home / RUNS / "pretrain") == set()
    assert [stages.is_finished(there / RUNS / name) for name in ("pretrain", "text")] == [True, False]
    assert [path.name for path in (there / RUNS / "text").glob("checkpoint-*")] == ["checkpoint-6"]
    assert not list(there.rglob("dataset_cache"))


def test_wheels_are_installed_and_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2_call, "subprocess", subprocess)
    wheel = write_wheel(tmp_path)
    (place,) = pack({f"wheels/{wheel.name}": wheel}, tmp_path / "parcels")
    for _ in range(2):  # once more does no harm
        assert smollm2_legs.main(["receive", str(place.parent), "--home", str(tmp_path / "home")]) == 0
    call = Call(tmp_path / "home", deadline=time.monotonic() + 600)
    call.command("-m", "clara_test_module")
    assert call.environment()["PYTHONPATH"].split(os.pathsep)[:2] == [str(tmp_path / "home" / "site"), str(ROOT)]

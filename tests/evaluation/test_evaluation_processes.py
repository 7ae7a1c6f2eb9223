"""`recipes.evaluate` in processes of its own: killed and started again, and in two processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from evaluation_runs import assert_same, command, failing, predictions, results, write_data

from recipes.evaluation.run import finished_rows

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PLACE = {"env": os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, "cwd": ROOT}
EVALUATE = ["-m", "recipes.evaluate"]


def test_killed_and_started_again(evaluate, checkpoint, tmp_path):
    """SIGKILL while answers are written: the same command goes on, and the predictions are those of a whole run."""
    data, killed, memories = write_data(tmp_path / "long.jsonl", 60), tmp_path / "run", tmp_path / "own"
    evaluate(data=data, output="whole")
    arguments = command(model=checkpoint, data=data, output=killed, memories=memories)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *EVALUATE, *arguments], **quiet, **PLACE)
    part = killed / "parts" / "0-of-1.jsonl"
    while process.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") >= 5):
        time.sleep(0.002)
    process.kill()
    process.wait()
    done = [row["id"] for row in finished_rows(killed)]
    assert 5 <= len(done) < 60 and not (killed / "results.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        asked = failing(patch, ValueError(), "no such text")
        evaluate(data=data, memories=memories)
    assert len(asked) == 60 - len(done)
    assert_same(predictions(killed), predictions(tmp_path / "whole"))
    ours, theirs = results(killed), results(tmp_path / "whole")
    assert ours["counts"] == theirs["counts"] and ours["metrics"]["f1"] == theirs["metrics"]["f1"]


def test_two_processes_are_as_one(evaluate, checkpoint, data, tmp_path):
    """Gloo on the CPU: documents and questions are shared out, and the predictions are those of one process."""
    options = ["--systems", "clara", "text", "bm25_memory", "wrong_memory", "--codec", "int8"]
    evaluate(*options, output="one")
    config = str(ROOT / "recipes" / "configs" / "accelerate" / "ddp.yaml")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    given = {"model": checkpoint, "data": data, "output": tmp_path / "two", "memories": tmp_path / "own"}
    arguments = [sys.executable, *launcher, *EVALUATE, *command(*options, **given)]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=200, **PLACE)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert result.stdout.count("| clara |") == 1
    for folder in (".", "baselines/text", "baselines/bm25-memory", "baselines/wrong-memory"):
        assert_same(predictions(tmp_path / "two" / folder), predictions(tmp_path / "one" / folder))
        ours, theirs = (results(tmp_path / name / folder) for name in ("two", "one"))
        assert ours["metrics"]["f1"] == theirs["metrics"]["f1"] and ours["counts"] == theirs["counts"]
        assert ours["hardware"]["processes"] == 2 and not (tmp_path / "two" / folder / "parts").exists()

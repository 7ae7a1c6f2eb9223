"""`recipes.evaluate` in processes of its own: killed and started again, and in two processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from evaluation_runs import assert_same, failing, predictions, results, write_data

from recipes.evaluation.run import finished_rows

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def command(checkpoint, data, output, memories, *options: str) -> list[str]:
    """The command after the name of Python."""
    paths = {"model": checkpoint, "data": data, "output": output, "memories": memories}
    named = [part for name, value in paths.items() for part in (f"--{name}", str(value))]
    quick = "--max-new-tokens 6 --latency-questions 0 --resamples 100".split()
    return ["-m", "recipes.evaluate", *named, *quick, *options]


PLACE = {"env": os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, "cwd": ROOT}


def test_killed_and_started_again(evaluate, checkpoint, tmp_path):
    """SIGKILL while answers are written: the same command goes on, and the predictions are those of a whole run."""
    data, killed = write_data(tmp_path / "long.jsonl", 60), tmp_path / "run"
    evaluate(data=str(data), output="whole")
    arguments = command(checkpoint, data, killed, tmp_path / "own", "--batch-size", "4")
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **PLACE
    )
    part = killed / "parts" / "0-of-1.jsonl"
    while process.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") >= 5):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = [row["id"] for row in finished_rows(killed)]
    assert 5 <= len(done) < 60 and not (killed / "results.json").exists()
    started = part.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        asked = failing(patch, ValueError(), "no such text")
        evaluate("--memories", str(tmp_path / "own"), data=str(data))
    assert len(asked) == 60 - len(done) and started
    assert_same(predictions(killed), predictions(tmp_path / "whole"))
    ours, theirs = results(killed), results(tmp_path / "whole")
    assert ours["counts"] == theirs["counts"] and ours["metrics"]["f1"] == theirs["metrics"]["f1"]


def test_two_processes_are_as_one(evaluate, checkpoint, data, tmp_path):
    """Gloo on the CPU: documents and questions are shared out, and the predictions are those of one process."""
    systems = ["clara", "text", "bm25_memory", "wrong_memory"]
    options = ["--systems", *systems, "--codec", "int8", "--batch-size", "4"]
    evaluate(*options, output="one")
    config = str(ROOT / "recipes" / "configs" / "accelerate" / "ddp.yaml")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    arguments = command(checkpoint, data, tmp_path / "two", tmp_path / "own", *options)
    result = subprocess.run(
        [sys.executable, *launcher, *arguments], capture_output=True, text=True, timeout=200, **PLACE
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert result.stdout.count("| clara |") == 1
    for folder in (".", "baselines/text", "baselines/bm25-memory", "baselines/wrong-memory"):
        assert_same(predictions(tmp_path / "two" / folder), predictions(tmp_path / "one" / folder))
        ours, theirs = (results(tmp_path / name / folder) for name in ("two", "one"))
        assert ours["metrics"]["f1"] == theirs["metrics"]["f1"] and ours["counts"] == theirs["counts"]
        assert ours["hardware"]["processes"] == 2 and not (tmp_path / "two" / folder / "parts").exists()

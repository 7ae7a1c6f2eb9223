"""`max_minutes`: stops that change nothing, runs killed at their last step, and two processes that stop together.

Rows are those of `test_text_stage.py`; the runs go through `train.main`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_text_stage import write_rows
from test_train_script import COMMON, CONFIGS, ROOT
from training_runs import assert_equal
from transformers import TrainerControl

from modeling_clara import CLaRaForRAG
from recipes import train
from recipes.training import time_limit
from recipes.training.arguments import parse_arguments
from recipes.training.checkpoints import describe_run

# of the 12 records with one target each an epoch has two steps
SHORT = ["max_steps=3", "per_device_train_batch_size=6", "gradient_accumulation_steps=1", "num_samples=1"]
ACCUMULATED = ["per_device_train_batch_size=3", "gradient_accumulation_steps=2", "targets_per_document=2"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "text.jsonl")


@pytest.fixture
def start(rows, backbone_folder, tmp_path, monkeypatch):
    """`start(name, *overrides)`: `train.py` on the recipe of the stage; whether the run is finished."""

    def run(name: str, *overrides: str, stage: str = "text") -> bool:
        given = [f"backbone={backbone_folder}", f"datasets=[{{path: {rows}}}]", f"output_dir={tmp_path / name}"]
        options = [*COMMON, *SHORT, *overrides]
        monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(CONFIGS / f"{stage}.yaml"), *given, *options])
        train.train(*train.prepare())
        return (tmp_path / name / "config.json").exists()

    return run


def until_done(start, folder: Path, *overrides: str, **kwargs) -> int:
    """Start a run again and again, each time over its limit at once; how often it stopped before its end."""
    stops = 0
    while not start(folder.name, f"max_minutes={(1 + stops) / 1e9}", *overrides, **kwargs):
        stops += 1
        assert not list(folder.glob("*.safetensors"))
        assert (folder / f"checkpoint-{stops}" / "trainer_state.json").exists()
        assert not (folder / f"checkpoint-{stops + 1}").exists() and stops < 20
    return stops


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def losses(folder: Path, name: str = "loss") -> list[tuple[int, float]]:
    return [(entry["step"], entry[name]) for entry in history(folder) if name in entry]


def assert_same_run(whole: Path, stopped: Path) -> None:
    ours, theirs = (CLaRaForRAG.from_pretrained(folder).state_dict() for folder in (whole, stopped))
    assert_equal(ours, theirs)
    assert len(losses(whole)) and losses(whole) == losses(stopped)


# --- stops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage, overrides",
    [
        ("text", ["save_total_limit=1", "save_steps=100"]),
        ("text", ["save_strategy=no", "train_sampling_strategy=random", *ACCUMULATED]),
        ("pretrain", [*ACCUMULATED]),
    ],
)
def test_stopping_after_every_step_equals_not_stopping(start, tmp_path, stage, overrides):
    """Bit-equal weights and losses into the second epoch, dropout and k drawn; the limit may differ every time."""
    assert start("whole", *overrides, stage=stage)
    assert until_done(start, tmp_path / "paused", *overrides, stage=stage) == 2
    assert_same_run(tmp_path / "whole", tmp_path / "paused")
    assert history(tmp_path / "paused")[-1]["epoch"] > 1


def test_stops_with_more_time_or_none_between_them(start, tmp_path, capsys):
    """Over at once, then far away, then given up: neither is another run; a finished one is never stopped."""
    assert start("whole") and start("unhurried", "max_minutes=1e6")
    assert "resumes" not in capsys.readouterr().out
    assert not start("paused", "max_minutes=1e-8") and not start("paused", "max_minutes=1e-9")
    told = "Stopped at step {} of 3: the same command resumes {}."
    assert [line for line in capsys.readouterr().out.splitlines() if "resumes" in line] == [
        told.format(step, tmp_path / "paused") for step in (1, 2)
    ]
    assert start("paused")
    assert start("last", "max_steps=1", "max_minutes=1e-9")  # the first step is the last one
    for name in ("unhurried", "paused"):
        assert_same_run(tmp_path / "whole", tmp_path / name)
    with pytest.raises(ValueError, match="is finished"):
        start("paused", "max_minutes=1e-9")


def test_the_clock_starts_with_training(monkeypatch):
    """What comes before the first step does not count, nor does an earlier training of the same process."""
    now, times = [0.0], []
    monkeypatch.setattr(time_limit.time, "monotonic", lambda: now[0])
    limit = time_limit.TimeLimit(1, SimpleNamespace(reduce=lambda value, how: value))
    arguments, state = SimpleNamespace(device="cpu"), SimpleNamespace(epoch=0.5, global_step=1, max_steps=9)
    for start in (100.0, 500.0):
        now[0] = start
        limit.on_train_begin(arguments, state, None)
        for seconds in (0, 59, 61):
            now[0] = start + seconds
            times.append(limit.on_step_end(arguments, state, TrainerControl()).should_training_stop)
    assert times == [False, False, True] * 2


def test_killed_between_the_last_checkpoint_and_the_end(start, tmp_path):
    """Such as in the last evaluation: every step is done, so that no further one is."""
    assert start("run")
    before, steps = CLaRaForRAG.from_pretrained(tmp_path / "run").state_dict(), losses(tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    assert start("run")
    assert losses(tmp_path / "run") == steps
    assert_equal(before, CLaRaForRAG.from_pretrained(tmp_path / "run").state_dict())


@pytest.mark.parametrize("minutes", ["0", "-1", "-0.5", ".nan", "-.inf"])
def test_a_limit_that_is_no_time_is_refused(start, tmp_path, minutes):
    with pytest.raises(ValueError, match=r"`max_minutes` must be > 0, got .*\. Raise it or leave it out"):
        start("run", f"max_minutes={minutes}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("minutes", ["ten", "true", "[1]", "{a: 1}"])
def test_a_limit_that_is_no_number_is_refused(start, tmp_path, minutes):
    with pytest.raises(ValueError, match="`max_minutes` must be of type float, got"):
        start("run", f"max_minutes={minutes}")
    assert not (tmp_path / "run").exists()


def test_the_limit_is_no_part_of_what_a_run_is(tmp_path):
    (tmp_path / "recipe.yaml").write_text("stage: text\nbackbone: x\ndatasets: [{path: y}]\nuse_cpu: true\n")
    limits = ([], ["max_minutes=1"], ["max_minutes=0.5"], ["max_minutes=null"])
    parsed = [parse_arguments(["--config", str(tmp_path / "recipe.yaml"), *limit]) for limit in limits]
    assert [training.max_minutes for _, _, training in parsed] == [None, 1.0, 0.5, None]
    assert all(describe_run(*arguments) == describe_run(*parsed[0]) for arguments in parsed)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_stops_add_no_evaluations(start, rows, tmp_path, strategy):
    """Held-out losses and samples of the same steps as without stops: an evaluation may take longer than is left."""
    options = [f"eval_datasets=[{{path: {rows}}}]", f"eval_strategy={strategy}", "eval_steps=2"]
    assert start("whole", *options)
    until_done(start, tmp_path / "paused", *options)
    samples = [(tmp_path / name / "samples.jsonl").read_text().splitlines() for name in ("whole", "paused")]
    steps = [[json.loads(line)["step"] for line in lines] for lines in samples]
    assert steps[0] == steps[1]
    assert losses(tmp_path / "whole", "eval_loss") == losses(tmp_path / "paused", "eval_loss")
    assert_same_run(tmp_path / "whole", tmp_path / "paused")
    assert samples[0] == samples[1]


def test_a_limit_with_a_strategy_that_does_not_save_its_step_is_refused(start, rows, tmp_path):
    """With `save_strategy: best` a step that is evaluated and no better would be lost."""
    options = [f"eval_datasets=[{{path: {rows}}}]", "eval_strategy=steps", "eval_steps=1", "save_strategy=best"]
    with pytest.raises(ValueError, match="`save_strategy` must be steps, epoch or no with `max_minutes`, got best"):
        start("run", "max_minutes=1", "metric_for_best_model=eval_ce", *options)
    assert not (tmp_path / "run").exists()


def test_no_step_is_missing_in_the_log_of_a_stopped_run(start, tmp_path):
    """A loss is the mean since the entry before: together they are the sum over all steps, wherever a run stopped."""
    options = ["logging_steps=3"]
    assert start("whole", *options)
    until_done(start, tmp_path / "paused", *options)
    sums = []
    for name in ("whole", "paused"):
        entries = losses(tmp_path / name)
        steps = [0, *(step for step, _ in entries)]
        sums.append(sum(loss * (step - before) for (step, loss), before in zip(entries, steps, strict=False)))
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)


# --- two processes ---------------------------------------------------------------------------------------------------

LAUNCHED = """
import os, time
from recipes import train
from recipes.training import time_limit, trainer
if os.environ["RANK"] == "1":
    begin = time_limit.TimeLimit.on_train_begin
    def early(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self.start -= 1e9  # its time is over, that of the first process is not
    time_limit.TimeLimit.on_train_begin = early
save = trainer.CLaRaTrainer._save
def slow_save(self, *args, **kwargs):
    time.sleep({seconds} * self.args.should_save)  # a large model on a slow disk
    save(self, *args, **kwargs)
trainer.CLaRaTrainer._save = slow_save
train.train(*train.prepare())
"""


def launch(rows: Path, backbone: Path, folder: Path, seconds: float) -> subprocess.CompletedProcess:
    """Two gloo processes with a limit of a day that is over in the second one, the first one slow to save."""
    script = folder.with_suffix(".py")
    script.write_text(LAUNCHED.format(seconds=seconds))
    config = [
        "--config_file",
        str(ROOT / "recipes" / "configs" / "accelerate" / "ddp.yaml"),
        "--main_process_port",
        "0",
    ]
    given = [f"backbone={backbone}", f"datasets=[{{path: {rows}}}]", f"output_dir={folder}", *COMMON]
    given += ["ddp_backend=gloo", "max_minutes=1440", "save_steps=100", "gradient_accumulation_steps=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *config, str(script),
         "--config", str(CONFIGS / "text.yaml"), *given],
        env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_the_checkpoint_is_whole(rows, backbone_folder, tmp_path):
    """The clock of one process is enough; saving is slow, and the other one must not end the run before it is done."""
    folder = tmp_path / "run"
    result = launch(rows, backbone_folder, folder, 3.0)
    shown = (result.stdout + result.stderr)[-4000:]
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"], shown
    found = {path.name for path in (folder / "checkpoint-1").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= found, shown
    assert "trainer_state.json" in found and not (folder / "config.json").exists(), shown
    assert result.returncode == 0 and shown.count(f"the same command resumes {folder}") == 1, shown

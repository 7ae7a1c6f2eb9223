"""`recipes.train` on real files: killed, stopped by `max_minutes` and started again, alone and two processes together.

Most runs are in this process; those that are killed or launched start processes of their own in the repository's root.
"""

import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from training_runs import assert_equal
from transformers import TrainerControl

from modeling_clara import CLaRaForRAG
from modeling_clara.corpus.storage import read_lines, write_lines
from modeling_clara.storage_clara import read_json
from recipes import train
from recipes.training import time_limit

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "configs"
COMMON = [
    "memory_sizes=[2,4]", "lora_rank=4", "document_max_length=64", "max_steps=6", "save_steps=1",
    "save_total_limit=10", "per_device_train_batch_size=2", "gradient_accumulation_steps=2", "warmup_steps=0",
    "learning_rate=1e-2", "use_cpu=true", "disable_tqdm=true", "logging_steps=1", "targets_per_document=1",
]  # fmt: skip
# of the 12 records of text.jsonl with one target each an epoch has two steps
SHORT = ["max_steps=3", "per_device_train_batch_size=6", "gradient_accumulation_steps=1", "num_samples=1"]
ACCUMULATED = ["per_device_train_batch_size=3", "gradient_accumulation_steps=2", "targets_per_document=2"]
DDP = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "accelerate" / "ddp.yaml")]
DDP += ["--main_process_port", "0"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def boxes(tmp_path_factory) -> Path:
    """pretrain.jsonl and joint.jsonl, 12 rows each."""
    folder = tmp_path_factory.mktemp("boxes")
    texts = [f"Box {n} has the number {n * 7}." for n in range(14)]
    pairs = [{"question": f"Which number has box {n}?", "answers": [f"number {n * 7}"]} for n in range(14)]
    write_lines(
        folder / "pretrain.jsonl", [{"title": f"Box {n}", "text": texts[n], "qas": [pairs[n]]} for n in range(12)]
    )
    docs = [[f"Box {n}\n{texts[n]}" for n in range(start, start + 3)] for start in range(12)]
    write_lines(folder / "joint.jsonl", [{**pairs[n + 1], "docs": docs[n], "pos_index": [1]} for n in range(12)])
    return folder


def command(folder: Path, rows: Path, backbone: Path, *overrides: str, stage: str = "pretrain") -> list[str]:
    given = [f"backbone={backbone}", f"datasets=[{{path: {rows}}}]", f"output_dir={folder}", *COMMON, *overrides]
    return ["--config", str(CONFIGS / "stages" / f"{stage}.yaml"), *given]


def run(arguments: list[str], launcher=("-m", "recipes.train")) -> str:
    """What was said by a process of its own that ends well."""
    words = [sys.executable, *launcher, *arguments]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    text = (done.stdout + done.stderr)[-4000:]
    assert done.returncode == 0, text
    return text


@pytest.fixture(scope="module")
def start(training_files, backbone_folder):
    """`start(folder, *overrides)`: a run in this process; whether it is finished."""

    def run_here(folder: Path, *overrides: str, stage: str = "text", rows: Path | None = None) -> bool:
        rows = rows or training_files / f"{stage}.jsonl"
        arguments = command(folder, rows, backbone_folder, *SHORT, *overrides, stage=stage)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py", *arguments])
            train.train(*train.prepare())
        return (folder / "config.json").exists()

    return run_here


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> Path:
    """A run of the text stage that nothing stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert start(folder)
    return folder


def until_done(start, folder: Path, *overrides: str, **kwargs) -> int:
    """Start a run again and again, each time over its limit at once; how often it stopped before its end."""
    stops = 0
    while not start(folder, f"max_minutes={(1 + stops) / 1e9}", *overrides, **kwargs):
        stops += 1
        assert not list(folder.glob("*.safetensors"))
        assert (folder / f"checkpoint-{stops}" / "trainer_state.json").exists()
        assert not (folder / f"checkpoint-{stops + 1}").exists() and stops < 20
    return stops


def history(folder: Path, name: str = "loss") -> list[dict]:
    """Entries of the log that have it."""
    log = read_json(folder / "trainer_state.json")["log_history"]
    return [entry for entry in log if name in entry]


def losses(folder: Path, name: str = "loss") -> list[tuple[int, float]]:
    return [(entry["step"], entry[name]) for entry in history(folder, name)]


def assert_same_run(whole: Path, stopped: Path, **tolerance) -> None:
    ours, theirs = (CLaRaForRAG.from_pretrained(folder).state_dict() for folder in (whole, stopped))
    assert_equal(ours, theirs, **tolerance)
    assert len(losses(whole)) and losses(whole) == losses(stopped)


# --- one process -----------------------------------------------------------------------------------------------------


def test_what_is_wrong_is_said_before_the_first_step(start, boxes, backbone_folder, tmp_path, monkeypatch):
    """One line that names what and where; nothing of a run is left behind that could be taken for one."""
    output, bad = tmp_path / "run", tmp_path / "bad.jsonl"
    with pytest.raises(ValueError, match=r"unknown keys \['learning_rat'\]"):
        start(output, "learning_rat=1")
    assert not output.exists()
    bad.write_text((boxes / "pretrain.jsonl").read_text() + '{"text": "A box.", "question": "Which?", "answer": ""}\n')
    monkeypatch.setattr(sys, "argv", ["train.py", *command(output, bad, backbone_folder)])
    with pytest.raises(SystemExit, match=rf"(?s)^error: 1 row\(s\) cannot .*{bad}:13 must have an answer"):
        runpy.run_path(train.__file__, run_name="__main__")
    assert not list(output.glob("checkpoint-*")) and not (output / "run.json").exists()
    with pytest.raises(ValueError, match="bad.jsonl"):
        start(tmp_path)
    assert bad.exists()


def test_workers_make_the_same_batches(start, boxes, checkpoint, tmp_path):
    options = ["backbone=null", f"checkpoint={checkpoint}", "retrieval_top_k=2"]
    for name, workers in (("with", 2), ("without", 0)):
        prefetched = [f"dataloader_num_workers={workers}", f"dataloader_prefetch_factor={workers or 'null'}"]
        assert start(tmp_path / name, *options, *prefetched, stage="joint", rows=boxes / "joint.jsonl")
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


@pytest.mark.parametrize(
    "stage, overrides",
    [
        ("text", ["save_strategy=no", "train_sampling_strategy=random", *ACCUMULATED]),
        ("pretrain", ["save_total_limit=1", "save_steps=100", *ACCUMULATED]),
    ],
)
def test_stopping_after_every_step_equals_not_stopping(start, tmp_path, stage, overrides):
    """Bit-equal weights and losses into the second epoch, dropout and k drawn; the limit may differ every time."""
    assert start(tmp_path / "whole", *overrides, stage=stage)
    assert until_done(start, tmp_path / "paused", *overrides, stage=stage) == 2
    assert_same_run(tmp_path / "whole", tmp_path / "paused")
    assert history(tmp_path / "paused")[-1]["epoch"] > 1


def test_stops_with_more_time_or_none_between_them(start, whole, tmp_path, capsys):
    """Over at once, then far away: neither is another run; a finished one is never stopped."""
    paused = tmp_path / "paused"
    assert not start(paused, "max_minutes=1e-8") and not start(paused, "max_minutes=1e-9")
    assert start(paused, "max_minutes=1e6")
    assert [line for line in capsys.readouterr().out.splitlines() if "resumes" in line] == [
        f"Stopped at step {step} of 3: the same command resumes {paused}." for step in (1, 2)
    ]
    assert_same_run(whole, paused)
    with pytest.raises(ValueError, match="is finished"):
        start(paused, "max_minutes=1e-9")


def test_killed_between_the_last_checkpoint_and_the_end(start, whole, tmp_path):
    """Such as in the last evaluation: every step is done, so that no further one is."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    for path in (run / "config.json", *run.glob("*.safetensors"), run / "trainer_state.json"):
        path.unlink()
    assert start(run)
    assert_same_run(whole, run)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_stops_add_no_evaluations(start, training_files, tmp_path, strategy):
    """Held-out losses and samples of the same steps as without stops: an evaluation may take longer than is left."""
    sources = f"eval_datasets=[{{path: {training_files / 'text.jsonl'}}}]"
    options = [sources, f"eval_strategy={strategy}", "eval_steps=2"]
    assert start(tmp_path / "whole", *options)
    until_done(start, tmp_path / "paused", *options)
    folders = tmp_path / "whole", tmp_path / "paused"
    assert_same_run(*folders)
    samples = [read_lines(folder / "samples.jsonl") for folder in folders]
    evaluated = [losses(folder, "eval_loss") for folder in folders]
    assert samples[0] == samples[1] and evaluated[0] == evaluated[1] and len(samples[0]) == len(evaluated[0]) == 2


def test_no_step_is_missing_in_the_log_of_a_stopped_run(start, whole, tmp_path):
    """A loss is the mean since the entry before: together they are the sum over all steps, wherever a run stopped."""
    until_done(start, tmp_path / "paused", "logging_steps=3")
    sums = []
    for folder in (whole, tmp_path / "paused"):
        entries = losses(folder)
        steps = [0, *(step for step, _ in entries)]
        sums.append(sum(loss * (step - before) for (step, loss), before in zip(entries, steps, strict=False)))
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)


def test_the_clock_starts_with_training(monkeypatch):
    """What comes before the first step does not count, nor does an earlier training of the same process."""
    now, times = [0.0], []
    monkeypatch.setattr(time_limit.time, "monotonic", lambda: now[0])
    limit = time_limit.TimeLimit(1, SimpleNamespace(reduce=lambda value, how: value))
    arguments, state = SimpleNamespace(device="cpu"), SimpleNamespace(epoch=0.5, global_step=1, max_steps=9)
    for begin in (100.0, 500.0):
        now[0] = begin
        limit.on_train_begin(arguments, state, None)
        for seconds in (0, 59, 61):
            now[0] = begin + seconds
            times.append(limit.on_step_end(arguments, state, TrainerControl()).should_training_stop)
    assert times == [False, False, True] * 2


@pytest.mark.slow
def test_killed_at_any_step_and_started_again(boxes, backbone_folder, tmp_path):
    """SIGKILL twice, while steps and checkpoints are being made: the same weights, bit for bit."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(command(whole, boxes / "pretrain.jsonl", backbone_folder))
    again = command(killed, boxes / "pretrain.jsonl", backbone_folder)
    for step in (2, 4):
        process = subprocess.Popen(
            [sys.executable, "-m", "recipes.train", *again],
            cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while process.poll() is None and not (killed / f"checkpoint-{step}").exists():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (killed / "config.json").exists()
    run(again)
    assert_same_run(whole, killed)
    assert not list(whole.rglob("training_args.bin"))


# --- two processes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "joint"])
def test_two_processes_give_the_curve_of_one(boxes, backbone_folder, tmp_path, stage):
    """Gloo, two ranks with half of the micro-batches each: the same rows a step, the same losses and weights."""
    options = ["dataloader_drop_last=true", "max_steps=3", "optim=sgd", "lr_scheduler_type=constant"]
    options += ["lr_scheduler_kwargs=null"]
    if stage == "joint":
        first = command(tmp_path / "first", boxes / "pretrain.jsonl", backbone_folder)
        run([*first, "lora_dropout=0.0", "max_steps=1"])
        options += ["backbone=null", f"checkpoint={tmp_path / 'first'}", "retrieval_top_k=2"]
    else:
        options += ["lora_dropout=0.0"]
    two = ["gradient_accumulation_steps=1", "ddp_backend=gloo"]
    for name, launcher, more in (("one", [], []), ("two", DDP, two)):
        rows = boxes / f"{stage}.jsonl"
        arguments = command(tmp_path / name, rows, backbone_folder, *options, *more, stage=stage)
        run(arguments, [*launcher, "-m", "recipes.train"])
    for entry, other in zip(*(history(tmp_path / name) for name in ("one", "two")), strict=True):
        names = {"ce", "mse", "recall@1", "mrr", "margin", "exact_match", "grad_norm/generator", "loss"}
        for name in set(entry) & names:
            assert entry[name] == pytest.approx(other[name], rel=1e-4 if name == "loss" else 1e-3, abs=1e-6), name
    ours, theirs = (CLaRaForRAG.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    assert_equal(ours, theirs, rtol=1e-4, atol=1e-6)


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
    time.sleep(3.0 * self.args.should_save)  # a large model on a slow disk
    save(self, *args, **kwargs)
trainer.CLaRaTrainer._save = slow_save
train.train(*train.prepare())
"""


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_the_checkpoint_is_whole(training_files, backbone_folder, tmp_path):
    """The clock of one process is enough; saving is slow, and the other one must not end the run before it is done."""
    folder, script = tmp_path / "run", tmp_path / "script.py"
    script.write_text(LAUNCHED)
    options = ["ddp_backend=gloo", "max_minutes=1440", "save_steps=100", "gradient_accumulation_steps=1"]
    arguments = command(folder, training_files / "text.jsonl", backbone_folder, *options, stage="text")
    shown = run(arguments, [*DDP, str(script)])
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"], shown
    found = {path.name for path in (folder / "checkpoint-1").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= found, shown
    assert "trainer_state.json" in found and not (folder / "config.json").exists(), shown
    assert shown.count(f"the same command resumes {folder}") == 1, shown

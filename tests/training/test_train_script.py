"""`python -m recipes.train` as a user runs it: real files, killed and started again, alone and two together.

Each test starts processes of its own in the repository's root, on a tiny backbone on disk.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from modeling_clara import CLaRaForRAG

ROOT = Path(__file__).parents[2]
SCRIPT = ("-m", "recipes.train")
CONFIGS = ROOT / "recipes" / "configs" / "stages"
COMMON = [
    "memory_sizes=[2,4]", "lora_rank=4", "document_max_length=64", "max_steps=6", "save_steps=1",
    "save_total_limit=10", "per_device_train_batch_size=2", "gradient_accumulation_steps=2", "warmup_steps=0",
    "learning_rate=1e-2", "use_cpu=true", "disable_tqdm=true", "logging_steps=1", "targets_per_document=1",
]  # fmt: skip


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    with open(path, "w") as file:
        for index in range(12):
            pairs = [{"question": f"Which number has box {index}?", "answers": [f"number {index * 7}"]}]
            row = {"title": f"Box {index}", "text": f"Box {index} has the number {index * 7}.", "qas": pairs}
            file.write(json.dumps(row) + "\n")
    return path


def command(rows: Path, backbone: Path, output: Path, *overrides: str, stage: str = "pretrain") -> list[str]:
    config = [str(CONFIGS / f"{stage}.yaml")]
    datasets = f"datasets=[{{path: {rows}}}]"
    return ["--config", *config, f"backbone={backbone}", datasets, f"output_dir={output}", *COMMON, *overrides]


def run(arguments: list[str], launcher: tuple[str, ...] = (), expect: int = 0) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, *launcher, *SCRIPT, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    text = result.stdout + result.stderr
    assert (result.returncode == 0) == (expect == 0), text[-4000:]
    return text


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.slow
def test_killed_at_any_step_and_started_again(rows, backbone_folder, tmp_path):
    """SIGKILL twice, while steps and checkpoints are being made: the same weights, bit for bit."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(command(rows, backbone_folder, whole))
    for step in (2, 4):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(
            [sys.executable, *SCRIPT, *command(rows, backbone_folder, killed)],
            cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while process.poll() is None and not (killed / f"checkpoint-{step}").exists():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (killed / "config.json").exists()
    run(command(rows, backbone_folder, killed))
    ours, theirs = (CLaRaForRAG.from_pretrained(folder).state_dict() for folder in (whole, killed))
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert losses(whole) == losses(killed)
    assert not list(whole.rglob("training_args.bin"))
    text = run(command(rows, backbone_folder, killed), expect=1)
    assert "is finished" in text


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "joint"])
def test_two_processes_give_the_curve_of_one(rows, backbone_folder, tmp_path, stage):
    """Gloo, two ranks with half of the micro-batches each: the same rows a step, the same losses and weights."""
    options = [
        "lora_dropout=0.0",
        "dataloader_drop_last=true",
        "max_steps=3",
        "optim=sgd",
        "lr_scheduler_type=constant",
    ]
    options += ["lr_scheduler_kwargs=null"]
    if stage == "joint":
        first = tmp_path / "first"
        run(command(rows, backbone_folder, first, "lora_dropout=0.0", "max_steps=1"))
        rows = selecting_rows(tmp_path)
        fresh = ["memory_sizes=null", "lora_rank=null", "document_max_length=null", "retrieval_top_k=2"]
        options = [option for option in options if "lora_dropout" not in option]
        options += ["backbone=null", f"checkpoint={first}", *fresh]
    one, two = tmp_path / "one", tmp_path / "two"
    run(command(rows, backbone_folder, one, *options, stage=stage))
    config = "recipes/configs/accelerate/ddp.yaml"
    launcher = ("-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0")
    options += ["gradient_accumulation_steps=1", "ddp_backend=gloo"]
    run(command(rows, backbone_folder, two, *options, stage=stage), launcher)
    assert losses(one) == pytest.approx(losses(two), rel=1e-4)
    histories = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (one, two)]
    for entry, other in zip(*histories, strict=True):
        for name in set(entry) & {"ce", "mse", "recall@1", "mrr", "margin", "exact_match", "grad_norm/generator"}:
            assert entry[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name
    ours, theirs = (CLaRaForRAG.from_pretrained(folder).state_dict() for folder in (one, two))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-6)


def selecting_rows(folder: Path) -> Path:
    path = folder / "select.jsonl"
    with open(path, "w") as file:
        for index in range(12):
            docs = [f"Box {number}\nBox {number} has the number {number * 7}." for number in range(index, index + 3)]
            row = {"question": f"Which number has box {index + 1}?", "answer": f"number {index * 7 + 7}", "docs": docs}
            file.write(json.dumps({**row, "pos_index": [1]}) + "\n")
    return path


def test_what_is_wrong_is_said_before_the_first_step(rows, backbone_folder, tmp_path):
    """One line that names what and where; nothing of a run is left behind that could be taken for one."""
    output = tmp_path / "run"
    text = run(command(rows, backbone_folder, output, "learning_rat=1"), expect=1)
    assert "error: the recipe must not have the unknown keys ['learning_rat']" in text and not output.exists()
    bad = tmp_path / "bad.jsonl"
    bad.write_text(rows.read_text() + json.dumps({"text": "A box.", "question": "Which?", "answer": ""}) + "\n")
    text = run(command(bad, backbone_folder, output), expect=1)
    assert f"{bad}:13 must have an answer" in text and "Traceback" not in text
    assert not list(output.glob("checkpoint-*"))
    output.joinpath("thesis.txt").parent.mkdir(exist_ok=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    text = run(command(rows, backbone_folder, other), expect=1)
    assert "thesis.txt" in text and (other / "thesis.txt").read_text() == "mine"


def test_workers_and_bfloat16(rows, backbone_folder, tmp_path):
    """As on a GPU: workers make the same batches, and every stage runs under autocast to a finite loss."""
    shared = ["lora_dropout=0.0", "max_steps=2", "dataloader_num_workers=2", "dataloader_prefetch_factor=2"]
    half = ["bf16=true", "dtype=bfloat16"]
    first, fresh = tmp_path / "first", ["memory_sizes=null", "lora_rank=null", "document_max_length=null"]
    run(command(rows, backbone_folder, first, *shared, *half))
    assert all(0 < loss < 20 for loss in losses(first))
    chosen = selecting_rows(tmp_path)
    start = ["backbone=null", f"checkpoint={first}", *fresh, "retrieval_top_k=2", *shared[1:]]
    run(command(chosen, backbone_folder, tmp_path / "with", *start, stage="joint"))
    without = [option for option in start if not option.startswith("dataloader")]
    run(command(chosen, backbone_folder, tmp_path / "without", *without, stage="joint"))
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    run(command(chosen, backbone_folder, tmp_path / "half", *start, *half, stage="joint"))
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "with"), rel=0.05)
    fresh_text = ["memory_sizes=[2,4]", *shared, *half]
    run(command(chosen, backbone_folder, tmp_path / "text", *fresh_text, stage="text"))
    assert all(0 < loss < 20 for loss in losses(tmp_path / "text"))

"""`recipes/benchmarks` `gpu.py` and `training.py` on a tiny backbone: figures follow from what was measured."""

import sys

import pytest
import torch
from test_packing import fresh

import modeling_clara.passes_clara as passes
from modeling_clara.corpus.storage import write_lines
from modeling_clara.packing_clara import can_pack
from modeling_clara.storage_clara import read_json
from recipes.benchmarks import gpu, training
from recipes.benchmarks.training import benchmark_targets, padded_passes

WAYS = ["one prompt a row, padded", "shared prefix, padded", "shared prefix, packed"]
ROWS = [
    {
        "title": f"Box {n}",
        "text": f"Box {n} has {n * 7}. " * (2 + n % 3),
        "qas": [{"question": f"Which number has box {n}, {'m' * m}?", "answers": [str(n * m)]} for m in range(4)],
    }
    for n in range(30)
]


@pytest.fixture
def benchmark(backbone_folder, tmp_path, monkeypatch, capsys):
    """`benchmark(main, *options)`: the report of the command, and what it printed."""

    def run(main, *options: str) -> tuple[dict, str]:
        write_lines(tmp_path / "rows.jsonl", ROWS)
        data = ["--data", str(tmp_path / "rows.jsonl"), "--backbone", str(backbone_folder), "--rounds", "1"]
        output = tmp_path / "report.json"
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *data, *options, "--output", str(output)])
        main()
        return read_json(output), capsys.readouterr().out

    return run


GPU = ["--device", "cpu", "--batch-sizes", "4", "8", "--gemm-tokens", "64", "--steps", "2"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_figures_of_a_device(benchmark, dtype):
    report, shown = benchmark(gpu.main, *GPU, "3", "--dtype", dtype)
    compression, steps = report["compression"], report["steps"]
    assert [way["batch_size"] for way in compression["ways"]] == [4, 8]
    for way in compression["ways"]:
        (seconds,) = compression["seconds"][f"compress {way['batch_size']}"]
        assert way["documents_per_second"] == pytest.approx(compression["spans"] / seconds)
        assert way["share_of_gemm"] == pytest.approx(way["tflops"] / compression["gemm_tflops"])
        assert way["share_without_tokenising"] > way["share_of_gemm"] > 0
    assert [way["documents"] for way in steps["ways"]] == [2, 3]
    for way in steps["ways"]:
        (seconds,) = steps["seconds"][f"step {way['documents']}"]
        assert way["tokens_per_second"] == pytest.approx(way["tokens"] / seconds)
        assert way["share_of_gemm"] == pytest.approx(way["tflops"] / steps["gemm_tflops"])
    assert report["dtype"] == dtype and "| 8 |" in shown and "stage-1 step" in shown.lower()


def test_too_few_passages_and_none(benchmark, monkeypatch, capsys):
    with pytest.raises(ValueError, match="--steps must be <= the"):
        benchmark(gpu.main, *GPU, "99", "--dtype", "float32")
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--data must name passages" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["tokens", "windows"])
def test_all_ways_to_train_lose_the_same(backbone_folder, layout):
    model = fresh(backbone_folder, layout)
    before = {name: p.dtype for name, p in model.named_parameters()}
    report = benchmark_targets(model, ROWS, 2, 3, torch.float32)
    assert list(report["losses"]) == WAYS and report["prompts"] == 12
    assert list(report["losses"].values()) == pytest.approx([report["losses"][WAYS[0]]] * 3, rel=1e-5)
    assert report["times_faster"][WAYS[0]] == 1
    for name in WAYS:
        assert len(report["seconds"][name]) == 2
        speed = report["targets"] / (sum(report["seconds"][name]) / 2)
        assert report["targets_per_second"][name] == pytest.approx(speed)
    half = benchmark_targets(model, ROWS, 1, 3, torch.bfloat16)
    assert half["dtype"] == "bfloat16"
    assert list(half["losses"].values()) == pytest.approx([half["losses"][WAYS[0]]] * 3, rel=0.05)
    assert before == {name: p.dtype for name, p in model.named_parameters()}


def test_padding_is_forced_inside_the_context_only():
    with pytest.raises(KeyError), padded_passes():
        assert passes.can_pack is not can_pack
        raise KeyError
    assert passes.can_pack is can_pack


def test_all_tables_of_training_are_printed(benchmark):
    report, shown = benchmark(training.main, "--documents", "2", "--questions", "1")
    assert report["pretraining"]["prompts"] == 8 and all(f"| {name} |" in shown for name in WAYS)
    assert [row["checkpointing"] for row in report["joint"]] == [False, True]

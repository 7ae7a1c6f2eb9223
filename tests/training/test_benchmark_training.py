"""`recipes/benchmarks/training.py` on a tiny backbone: its figures follow from what it measured, its losses agree."""

import json
import sys

import pytest
import torch
from test_packing import fresh

import modeling_clara.passes_clara as passes
from modeling_clara.packing_clara import can_pack
from recipes.benchmarks.training import benchmark_targets, main, padded_passes

WAYS = ["one prompt a row, padded", "shared prefix, padded", "shared prefix, packed"]


@pytest.fixture
def rows() -> list[dict]:
    return [
        {
            "title": f"Box {n}",
            "text": f"Box {n} has {n * 7}. " * (2 + n % 3),
            "qas": [{"question": f"Which number has box {n}, {'m' * m}?", "answers": [str(n * m)]} for m in range(4)],
        }
        for n in range(60)
    ]


@pytest.mark.parametrize("layout", ["tokens", "windows"])
def test_all_ways_lose_the_same(backbone_folder, rows, layout):
    model = fresh(backbone_folder, layout)
    before = {name: p.dtype for name, p in model.named_parameters()}
    report = benchmark_targets(model, rows, 2, 3, torch.float32)
    assert list(report["losses"]) == WAYS and report["prompts"] == 12
    assert list(report["losses"].values()) == pytest.approx([report["losses"][WAYS[0]]] * 3, rel=1e-5)
    assert report["times_faster"][WAYS[0]] == 1
    for name in WAYS:
        assert len(report["seconds"][name]) == 2
        speed = report["targets"] / (sum(report["seconds"][name]) / 2)
        assert report["targets_per_second"][name] == pytest.approx(speed)
    half = benchmark_targets(model, rows, 1, 3, torch.bfloat16)
    assert half["dtype"] == "bfloat16"
    assert list(half["losses"].values()) == pytest.approx([half["losses"][WAYS[0]]] * 3, rel=0.05)
    assert before == {name: p.dtype for name, p in model.named_parameters()}


def test_padding_is_forced_inside_the_context_only():
    with pytest.raises(KeyError), padded_passes():
        assert passes.can_pack is not can_pack
        raise KeyError
    assert passes.can_pack is can_pack


def test_all_tables_are_printed(backbone_folder, rows, tmp_path, monkeypatch, capsys):
    data, output = tmp_path / "rows.jsonl", tmp_path / "report.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data", str(data), "--backbone", str(backbone_folder), "--rounds", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["benchmark_training.py", *options, "--documents", "2", "--questions", "1"])
    main()
    report, shown = json.loads(output.read_text()), capsys.readouterr().out
    assert report["pretraining"]["prompts"] == 8 and all(f"| {name} |" in shown for name in WAYS)
    assert [row["checkpointing"] for row in report["joint"]] == [False, True]

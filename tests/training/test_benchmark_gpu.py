"""`recipes/benchmarks/gpu.py` on a tiny backbone and a CPU: its figures follow from what it measured."""

import json
import sys

import pytest

from recipes.benchmarks.gpu import main


@pytest.fixture
def passages(tmp_path) -> str:
    path = tmp_path / "passages.jsonl"
    with open(path, "w") as file:
        for n in range(12):
            pairs = [{"question": f"Which number has box {n}, {m}?", "answers": [str(n * m)]} for m in range(4)]
            file.write(json.dumps({"title": f"Box {n}", "text": f"Box {n} has {n * 7}. " * 3, "qas": pairs}) + "\n")
    return str(path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_figures(passages, backbone_folder, tmp_path, monkeypatch, capsys, dtype):
    output = tmp_path / "gpu.json"
    options = ["--data", passages, "--backbone", str(backbone_folder), "--device", "cpu", "--dtype", dtype]
    options += ["--rounds", "1", "--batch-sizes", "4", "8", "--steps", "2", "3", "--gemm-tokens", "64"]
    monkeypatch.setattr(sys, "argv", ["benchmark_gpu.py", *options, "--output", str(output)])
    main()
    report, shown = json.loads(output.read_text()), capsys.readouterr().out
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


def test_too_few_passages(passages, backbone_folder, monkeypatch):
    options = ["--data", passages, "--backbone", str(backbone_folder), "--device", "cpu", "--dtype", "float32"]
    options += ["--rounds", "1", "--batch-sizes", "4", "--steps", "99", "--gemm-tokens", "8"]
    monkeypatch.setattr(sys, "argv", ["benchmark_gpu.py", *options])
    with pytest.raises(ValueError, match="--steps must be <= the"):
        main()


def test_without_data(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark_gpu.py"])
    with pytest.raises(SystemExit):
        main()
    assert "--data must name passages" in capsys.readouterr().err

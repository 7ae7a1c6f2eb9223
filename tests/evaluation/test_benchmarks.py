"""The sections that benchmarks write into docs/benchmarks.md, and figures of a tiny model."""

import argparse
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_clara import CLaRaForRAG
from recipes.benchmarks import inference, shared
from recipes.benchmarks.shared import show, write_section

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def test_a_section_is_replaced_and_the_rest_stays(tmp_path):
    path = tmp_path / "docs" / "benchmarks.md"
    write_section(path, "gpu", "first")
    assert path.read_text() == "## Gpu\n\n<!-- gpu -->\n\nfirst\n\n<!-- /gpu -->\n"
    path.write_text(f"# Title, not `<!-- gpu -->`\n\n{path.read_text()}\nby hand\n")
    write_section(path, "training", "| a \\1 |")
    write_section(path, "gpu", "second\n")
    gpu = "## Gpu\n\n<!-- gpu -->\n\nsecond\n\n<!-- /gpu -->\n"
    training = "## Training\n\n<!-- training -->\n\n| a \\1 |\n\n<!-- /training -->\n"
    assert path.read_text() == f"# Title, not `<!-- gpu -->`\n\n{gpu}\nby hand\n\n{training}"
    path.write_text("<!-- gpu -->")
    with pytest.raises(ValueError, match="must have both <!-- gpu --> and <!-- /gpu -->"):
        write_section(path, "gpu", "third")
    assert path.read_text() == "<!-- gpu -->"


def test_the_document_has_a_section_for_every_benchmark():
    text = DOCS.read_text(encoding="utf-8")
    for name in ("inference", "training", "corpus", "codecs", "evaluation"):
        (section,) = re.findall(f"<!-- {name} -->(.+?)<!-- /{name} -->", text, re.DOTALL)
        assert "| --- |" in section and re.search(r"\d{4}-\d\d-\d\d", section)
    assert max(map(len, text.splitlines())) <= 120


def test_show_says_when_where_and_with_what(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--data", "/home/me/rows.jsonl"])
    arguments = argparse.Namespace(output=str(tmp_path / "all.json"), write=tmp_path / "b.md")
    report = {"machine": "a machine", "versions": {"torch": "2"}, "data": "rows.jsonl", "figure": 1.5}
    show("inference", report, "| table |", arguments)
    assert capsys.readouterr().out == "| table |\n" and json.loads((tmp_path / "all.json").read_text()) == report
    text = (tmp_path / "b.md").read_text()
    assert "a machine, torch 2, data rows.jsonl." in text and "| table |" in text and "/home/me" not in text
    assert re.search(r"Measured on \d{4}-\d\d-\d\d by `python -m [\w.]+ --data rows.jsonl`", text)


def test_runs_take_turns_after_a_warm_up():
    calls = []
    seconds = shared.in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == list("ababab") and [len(values) for values in seconds.values()] == [2, 2]
    assert shared.ratio([2.0, 6.0, 9.0], [1.0, 2.0, 3.0]) == 3.0


def test_the_peak_of_a_process_is_its_own():
    """`ru_maxrss` would be that of the process which started it."""
    held = bytearray(3 * 10**8)
    held[::4096] = b"x" * len(held[::4096])
    assert shared.resident_bytes("VmHWM") >= shared.resident_bytes() > len(held)
    code = "import re; from pathlib import Path\n" + inspect.getsource(shared.resident_bytes)
    command = [sys.executable, "-c", f"{code}\nprint(resident_bytes('VmHWM'))"]
    assert int(subprocess.run(command, capture_output=True, check=True).stdout) < len(held)


def test_inference_on_a_tiny_model(backbone_folder):
    rows = [{"title": f"Box {n}", "text": f"Box {n} has {n * 7} stones, and they are heavy. " * 40} for n in range(5)]
    model = CLaRaForRAG.from_backbone(backbone_folder, memory_sizes=(2, 4), lora_rank=2)
    report = inference.benchmark_compression(model, rows, 1)
    assert report["passages"] == 5 and report["spans"] >= 5
    for name in ("bulk", "compress"):
        (naive,), (mine,) = report["seconds"]["naive"], report["seconds"][name]
        assert report["times_naive"][name] == pytest.approx(naive / mine)
        assert report["documents_per_second"][name] == pytest.approx(report["spans"] / mine)
    assert inference.benchmark_decode(model, rows, 1, n_tokens=3)["ms_per_token"] > 0

"""What the benchmarks share: runs that take turns, the model and data that are measured, and where results go.

Ratios are what to quote: every pair is measured in turn, round by round, in one process.
"""

import argparse
import datetime
import gzip
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

from modeling_clara import CLaRaForRAG
from modeling_clara.cli.demo import PASSAGES
from modeling_clara.smollm2 import fetch_backbone

RAW = argparse.RawDescriptionHelpFormatter


def read_rows(path: str | None) -> list[dict]:
    """Rows `{title, text, ...}` of a JSONL file, gzipped or not; default the packaged passages."""
    source = Path(path) if path else PASSAGES
    opener = gzip.open if source.suffix == ".gz" else open
    with opener(source, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# --- timing ----------------------------------------------------------------------------------------------------------


def in_turn(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in every round, the runs taking turns after one warm-up."""
    seconds = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over the rounds of above / below."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def linear_layers(model: CLaRaForRAG) -> list[torch.Tensor]:
    """The weights of all adapted layers: the model-shaped matrices of the GEMM measurement."""
    return [layer.get_base_layer().weight.detach() for layer in model.roles.layers]


# --- the command -----------------------------------------------------------------------------------------------------


def benchmark_parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options of a benchmark on a backbone."""
    parser = argparse.ArgumentParser(description=description, formatter_class=RAW)
    parser.add_argument("--data", help="JSONL of passages, .gz or plain (default: the packaged ones)")
    parser.add_argument("--backbone", help="backbone folder or Hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"rounds of every comparison (default: {rounds})")
    return add_outputs(parser)


def add_outputs(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The options that say where the results go; `show` reads them."""
    parser.add_argument("--output", help="also write all figures to this JSON file")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also replace this benchmark's section of the file")
    return parser


def load_subject(arguments: argparse.Namespace) -> tuple[list[dict], CLaRaForRAG, dict]:
    """The rows, the model with fresh adapters, and the head of the report: machine, versions, data."""
    rows = read_rows(arguments.data)
    torch.manual_seed(0)
    report = {**describe_machine(), "data": Path(arguments.data).name if arguments.data else PASSAGES.name}
    return rows, CLaRaForRAG.from_backbone(arguments.backbone or fetch_backbone()), report


def describe_machine(device: torch.device | None = None) -> dict:
    """`machine` and `versions` of a report."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if device is not None and device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    return {"machine": machine, "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}


def show(name: str, report: dict, text: str, arguments: argparse.Namespace) -> None:
    """Print the tables; on demand write all figures as JSON, and the tables into a section of a document.

    Args:
        name: of the section.
        report: all figures, with `machine` and `versions`.
        text: the tables.
        arguments: with `output` and `write`.
    """
    print(text)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if arguments.write:
        versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
        data = f", data {report['data']}" if "data" in report else ""
        day = datetime.date.today().isoformat()
        head = f"Measured on {day} by `{shown_command()}`: {report['machine']}, {versions}{data}."
        write_section(arguments.write, name, f"{head}\n\n{text}")


def shown_command() -> str:
    """The command without the folders of this machine."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return " ".join(["python -m", module.name if module else "recipes.benchmarks", *words])


def write_section(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- /NAME -->`, or add both at the end of the file.

    Args:
        path: of a Markdown file, which may be new.
        name: of the section.
        text: that stands there afterwards.

    Raises:
        ValueError: only one of the two marks is there.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    section = f"{begin}\n\n{text.strip()}\n\n{end}"
    there = [mark in before.splitlines() for mark in (begin, end)]  # each on a line of its own
    if any(there) and not all(there):
        raise ValueError(f"{path} must have both {begin} and {end}, found one of them. Add the other one.")
    if not any(there):
        content = f"{before.rstrip()}\n\n## {name.capitalize()}\n\n{section}\n".lstrip()
    else:
        content = re.sub(rf"(?ms)^{re.escape(begin)}$.*?^{re.escape(end)}$", lambda _: section, before, count=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")

"""What the benchmarks share: runs that take turns, the model and data that are measured, and where results go.

Ratios are what to quote: every pair is measured in turn, round by round, in one process.
"""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from torch.nn import functional as F
from trl.scripts.utils import DatasetConfig

from modeling_clara import CLaRaForRAG
from modeling_clara.cli.console import allow_any_console
from modeling_clara.cli.demo import PASSAGES
from modeling_clara.smollm2 import fetch_backbone
from recipes.evaluation.report import table
from recipes.training import data


def read_rows(path: str | None) -> list[dict]:
    """Rows `{title, text, ...}` of a JSONL file, gzipped or not; default the packaged passages."""
    return [row for _, row in data.read_rows(DatasetConfig(path or str(PASSAGES)))]


def split_rows(model: CLaRaForRAG, rows: Iterable[Mapping]) -> list[dict]:
    """The chunks of all rows."""
    documents = [{"title": row.get("title", ""), "text": row["text"]} for row in rows]
    return [chunk for document in documents for chunk in model.processor.split_document(document)]


# --- timing ----------------------------------------------------------------------------------------------------------


def seconds_of(run: Callable[[], object]) -> float:
    """How long a run takes, to its end: a GPU works on after a call has returned."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in every round, the runs taking turns after one warm-up."""
    seconds = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            seconds[name].append(seconds_of(run))
    return {name: values[1:] for name, values in seconds.items()}


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over the rounds of above / below."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each run's rounds."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def resident_bytes(field: str = "VmRSS") -> int:
    """Resident memory of this process now, or the most so far ("VmHWM"; `ru_maxrss` begins with the parent's)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status)[1])


def linear_layers(model: CLaRaForRAG) -> list[torch.Tensor]:
    """The weights of all adapted layers: the model-shaped matrices of the GEMM measurement."""
    return [layer.get_base_layer().weight.detach() for layer in model.roles.layers]


def gemm_run(model: CLaRaForRAG, n_tokens: int, repeats: int = 1) -> tuple[Callable[[], None], int]:
    """Products of all adapted layers with `n_tokens` rows, and their operations."""
    weights = linear_layers(model)
    like = {"device": weights[0].device, "dtype": weights[0].dtype}
    inputs = {width: torch.randn(n_tokens, width, **like) for width in {weight.shape[1] for weight in weights}}

    @torch.no_grad()
    def gemm():
        for weight in weights * repeats:
            F.linear(inputs[weight.shape[1]], weight)

    return gemm, 2 * repeats * n_tokens * sum(weight.numel() for weight in weights)


def gemm_speeds(seconds: Mapping[str, Sequence[float]], work: int) -> list[float]:
    """Operations a second in every round, of "gemm" before and "gemm again" after what is measured."""
    return [2 * work / (a + b) for a, b in zip(seconds["gemm"], seconds["gemm again"], strict=True)]


# --- the command -----------------------------------------------------------------------------------------------------


def benchmark_parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options of a benchmark on a backbone; `parse_with_data` where it needs data of its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="JSONL of passages, .gz or plain (default: the packaged ones)")
    parser.add_argument("--backbone", help="backbone folder or Hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"rounds of every comparison (default: {rounds})")
    return add_outputs(parser)


def parse_with_data(parser: argparse.ArgumentParser, needed: str) -> argparse.Namespace:
    """The command line, which must name data."""
    arguments = parser.parse_args()
    if not arguments.data:
        parser.error(f"--data must name {needed}")
    return arguments


def add_outputs(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The options that say where the results go; `show` reads them."""
    parser.add_argument("--output", help="also write all figures to this JSON file")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also replace this benchmark's section of the file")
    return parser


def load_subject(
    arguments: argparse.Namespace, device: str = "cpu", **options
) -> tuple[list[dict], CLaRaForRAG, dict]:
    """The rows, the model with fresh adapters, and the head of the report: machine, versions, data."""
    rows = read_rows(arguments.data)
    torch.manual_seed(0)
    model = CLaRaForRAG.from_backbone(arguments.backbone or fetch_backbone(), **options).to(device)
    if model.memory_embeddings.is_cuda:
        torch.cuda.set_device(model.memory_embeddings.device)  # for which `seconds_of` waits
    return rows, model, describe_machine(device) | {"data": Path(arguments.data or PASSAGES).name}


def describe_machine(device: str = "cpu") -> dict:
    """`machine` and `versions` of a report."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if device.startswith("cuda"):
        machine = torch.cuda.get_device_name(device)
    return {"machine": machine, "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}


def figures(head: str, cells: str, rows: Iterable[Mapping]) -> str:
    """A Markdown table. `head` and `cells` are parted by " | "; `str.format` fills a row into the cells."""
    filled = [[cell.format(**row).replace("%", " %") for cell in cells.split(" | ")] for row in rows]
    return table(head.split(" | "), filled)


def show(name: str, report: dict, text: str, arguments: argparse.Namespace) -> None:
    """Print the tables; on demand write the report as JSON, and the tables into the section `name` of a document."""
    allow_any_console()
    print(text)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if arguments.write:
        versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
        source = f", data {report['data']}" if "data" in report else ""
        day = datetime.date.today().isoformat()
        head = f"Measured on {day} by `{shown_command()}`: {report['machine']}, {versions}{source}."
        lines = [line if line.startswith("|") else _wrapped(line) for line in text.splitlines()]
        write_section(arguments.write, name, "\n".join([_wrapped(head), "", *lines]))


def _wrapped(line: str) -> str:
    return textwrap.fill(line, 119, break_long_words=False, break_on_hyphens=False)


def shown_command() -> str:
    """The command without the folders of this machine."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return " ".join(["python -m", module.name if module else "recipes.benchmarks", *words])


def write_section(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- /NAME -->`, or add both at the end of the file."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    section = f"{begin}\n\n{text.strip()}\n\n{end}"
    there = {begin, end}.intersection(before.splitlines())  # each on a line of its own
    if len(there) == 1:
        raise ValueError(f"{path} must have both {begin} and {end}, found one of them. Add the other one.")
    if there:
        content = re.sub(rf"(?ms)^{re.escape(begin)}$.*?^{re.escape(end)}$", lambda _: section, before, count=1)
    else:
        content = f"{before.rstrip()}\n\n## {name.capitalize()}\n\n{section}\n".lstrip()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")

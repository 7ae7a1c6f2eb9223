"""What the card of a model has measured: quality of answers at each memory size, beside reading the text.

The card is README.md of a checkpoint; its metadata has the figures in the Hub's form.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CONFIG = re.compile(r"(?P<setting>\w+), (?P<system>clara(?:-expand)?) k=(?P<size>\d+) (?P<codec>\w+)")
INTERVAL = re.compile(r"\(([\d.]+) to ([\d.]+)\)")


@dataclass(frozen=True)
class Rate:
    """F1 of answers at one memory size, with its 95 % interval if the card has one; `is_text` if the text was read."""

    data: str
    memory_size: int
    value: float
    low: float | None = None
    high: float | None = None
    is_text: bool = False


def read_rates(model) -> list[Rate]:
    """F1 of the card of a model, by data and memory size; empty if there is no card, or none of several sizes."""
    from huggingface_hub import ModelCard

    from ..files_clara import CheckpointFiles

    try:
        files = CheckpointFiles(model.name_or_path, revision=model.commit)
        results = ModelCard(Path(files.path("README.md")).read_text(encoding="utf-8")).data.eval_results
    except (OSError, ValueError, TypeError):  # no card, or one that its owner wrote by hand
        return []
    return select_rates(results or [])


def select_rates(results: Sequence) -> list[Rate]:
    """Rates of `EvalResult`s of a card: float16, of data that were read at two sizes or more."""
    rates = []
    for result in results:
        match = CONFIG.fullmatch(result.dataset_config or "")
        if result.metric_type != "f1" or match is None or match["codec"] != "float16":
            continue
        setting = match["setting"].replace("_", " ")
        data = result.dataset_name.removesuffix(".jsonl") + ("" if setting == "gold only" else f", {setting}")
        interval = INTERVAL.search(result.metric_name or "")
        low, high = map(float, interval.groups()) if interval else (None, None)
        is_text = match["system"] == "clara-expand"
        rates.append(Rate(data, int(match["size"]), float(result.metric_value), low, high, is_text))
    sizes = {
        data: {rate.memory_size for rate in rates if rate.data == data and not rate.is_text}
        for data in {rate.data for rate in rates}
    }
    return sorted(
        (rate for rate in rates if len(sizes[rate.data]) > 1),
        key=lambda rate: (rate.data, rate.is_text, rate.memory_size),
    )

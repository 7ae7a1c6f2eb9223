"""JSON and JSON lines on disk, for all recipes. It knows nothing of what is in them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path


def write_json(path: Path, value) -> None:
    """Write whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)


def write_jsonl(path: Path, rows: Iterable[Mapping]) -> int:
    """Write rows; how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    n_rows = 0
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            n_rows += 1
    return n_rows

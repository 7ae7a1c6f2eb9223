"""Rows of any kind into a file of JSON lines, for the recipes that make data. It knows nothing of what is in them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from modeling_clara.storage_clara import replacing


def write_jsonl(path: Path, rows: Iterable[Mapping]) -> int:
    """Write rows one by one, in UTF-8, into a file that is whole or not there; how many."""
    n_rows = 0
    with replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            n_rows += 1
    return n_rows

"""What a folder tells by itself, for its card: configuration, training, results and sizes of a checkpoint; data files.

Nothing is loaded: of weights only the headers are read.
"""

import gzip
import json
import math
import re
import zlib
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open

from modeling_clara.corpus.card import size_category
from modeling_clara.storage_clara import read_json
from recipes.publishing.runs import LOG_FILE, training_log

DATA_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")
# Of tables that would be published but not read, in small letters.
TABLE_SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv", ".arrow", ".feather", ".orc", ".xls", ".xlsx")


def model_facts(folder: Path) -> dict:
    """What a checkpoint tells.

    Returns:
        `config` of config.json; `runs`, for each training run its name, data (names of files), device, steps and last
        held-out loss, of training_log.json or of the run that the folder is; `parameters`, a number; with results.json
        `results`; `reasoner_is_compressor`, whether both adapters are the same.
    """
    log = read_json(folder / LOG_FILE) if (folder / LOG_FILE).exists() else {}
    if not log and (folder / "run.json").exists():
        log = training_log(folder)
    adapters = [folder / role / "adapter_model.safetensors" for role in ("compressor", "reasoner")]
    facts = {
        "config": read_json(folder / "config.json"),
        "runs": [{"name": name, **_training(run)} for name, run in log.items()],
        "parameters": sum(map(_n_parameters, sorted(folder.rglob("*.safetensors")))),
        "reasoner_is_compressor": len({path.read_bytes() for path in adapters if path.exists()}) == 1,
    }
    return facts | ({"results": read_json(folder / "results.json")} if (folder / "results.json").exists() else {})


def _training(run: dict) -> dict:
    losses = [entry["eval_loss"] for entry in run["log"] if "eval_loss" in entry]
    steps = max((entry["step"] for entry in run["log"]), default="")
    return {
        "data": run["data"],
        "device": run["device"],
        "steps": steps,
        "loss": f"{losses[-1]:.3f}" if losses else "",
    }


def _n_parameters(path: Path) -> int:
    """Numbers in a safetensors file."""
    total = 0
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            count = 1
            for length in file.get_slice(name).get_shape():
                count *= length
            total += count
    return total


def data_facts(folder: Path) -> dict:
    """What the files of a data set tell.

    Returns:
        `splits`, for each its name, rows, bytes and files; `configs`, name -> splits with the same columns, which can
        be loaded together; `types`, column -> type in words; `size`, the Hub's category.

    Raises:
        ValueError: what `data_files` and `read_table` raise, or two files would be the same split.
    """
    splits, types, kinds, shards = {}, {}, {}, {}  # kinds: columns of each split; shards: what its files are called
    for path in data_files(folder):
        file = path.relative_to(folder).as_posix()
        stem = re.sub(r"-\d{5}-of-\d{5}$", "", re.sub(r"\.(parquet|jsonl|jsonl\.gz)$", "", path.name))
        name = re.sub(r"\W+", "_", stem)  # what `datasets` takes as the name of a split
        shard = re.sub(r"-\d{5}-of-\d{5}(?=\.)", "", file)
        split = splits.setdefault(name, {"name": name, "rows": 0, "bytes": 0, "files": []})
        if shards.setdefault(name, shard) != shard:
            raise ValueError(
                f"{split['files'][0]} and {file} must be of different splits, but both would be `{name}`. Rename one, "
                f"such as {path.parent.name or 'other'}_{path.name}."
            )
        rows, found = read_table(path, file)
        split["rows"] += rows
        split["bytes"] += path.stat().st_size
        split["files"].append(file)
        kinds.setdefault(name, set()).update(found)
        for column, named in found.items():
            types.setdefault(column, {}).update(dict.fromkeys(named))
    n_rows = sum(split["rows"] for split in splits.values())
    types = {column: " or ".join(named) for column, named in types.items()}
    alike = [[split for name, split in splits.items() if kinds[name] == kind] for kind in _unique(kinds.values())]
    configs = {"default" if len(alike) == 1 else group[0]["name"]: group for group in alike}
    return {"splits": list(splits.values()), "configs": configs, "types": types, "size": size_category(n_rows)}


def data_files(folder: Path) -> list[Path]:
    """The files of data in a folder, sorted.

    Raises:
        ValueError: there are none, they have two formats, of which `datasets` reads one, or there are tables that it
            would leave out; the files are named.
    """
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    found = [name for name in names if name.endswith(DATA_SUFFIXES)]
    if not found:
        raise ValueError(f"{folder} must have files of {', '.join(DATA_SUFFIXES)}, found none. Name another folder.")
    others = [n for n in names if n not in found and n.lower().removesuffix(".gz").endswith(TABLE_SUFFIXES)]
    if others:
        raise ValueError(
            f"data must be {', '.join(DATA_SUFFIXES)}, got {', '.join(others[:3])} ({len(others)} files). Convert it "
            "to JSON Lines or Parquet, or remove it."
        )
    tables = [name for name in found if name.endswith(".parquet")]
    if tables and len(tables) < len(found):
        line = next(name for name in found if name not in tables)
        raise ValueError(
            f"the data of a folder must be of one format, got {tables[0]} and {line}. Convert one of them, or publish "
            "two folders."
        )
    return [folder / name for name in found]


def _unique(sets: Iterable[set]) -> list[set]:
    return list({frozenset(found): found for found in sets}.values())


def read_table(path: Path, name: str) -> tuple[int, dict[str, Iterable[str]]]:
    """Rows of a file, and its columns with their types; a ValueError calls it `name` and says which line is wrong."""
    try:
        n_rows, types = _parquet(path) if path.suffix == ".parquet" else _json_lines(path, name)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        what = "Parquet" if path.suffix == ".parquet" else "gzip"
        raise ValueError(f"{name} must be a whole {what} file: {error}. Write or copy it again.") from error
    if not n_rows:
        raise ValueError(f"{name} must have rows, but has no rows. Remove it, or write them.")
    return n_rows, types


def _parquet(path: Path) -> tuple[int, dict[str, list[str]]]:
    with pq.ParquetFile(path) as file:
        return file.metadata.num_rows, {field.name: [str(field.type)] for field in file.schema_arrow}


def _json_lines(path: Path, name: str) -> tuple[int, dict[str, Iterable[str]]]:
    n_rows, types = 0, {}
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode(), parse_constant=_refuse_constant, parse_float=_finite)
            except (ValueError, RecursionError) as error:
                what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise ValueError(f"line {number} of {name} must be JSON in UTF-8: {what}. Correct it.") from error
            if not isinstance(row, dict):
                start = line[:40].decode(errors="replace").strip()
                raise ValueError(f"line {number} of {name} must be an object, got {start!r}. Correct it.")
            for column, value in row.items():
                types.setdefault(column, {})[_json_type(value)] = None
            n_rows += 1
    return n_rows, types


def _refuse_constant(text: str):
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is too large for a number of 64 bits")
    return value


def _json_type(value) -> str:
    names = {str: "string", bool: "bool", int: "int", float: "float", list: "list", dict: "object"}
    return names.get(type(value), "null")

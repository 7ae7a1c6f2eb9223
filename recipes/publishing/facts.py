"""What a folder tells by itself, for its card: configuration, training, results and sizes of a checkpoint; data files.

Nothing is loaded: of weights only the headers are read.
"""

import gzip
import json
import re
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open

from modeling_clara.corpus.card import size_category
from modeling_clara.storage_clara import read_json
from recipes.publishing.runs import LOG_FILE, training_log

DATA_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")


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
        `splits`, for each its name, rows, bytes and files; `configs`, name -> splits of one format with the same
        columns, which can be loaded together; `types`, column -> type in words; `size`, the Hub's category.

    Raises:
        ValueError: there is no data, or a line is no JSON object.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.name.endswith(DATA_SUFFIXES)]
    if not paths:
        raise ValueError(f"{folder} must have files of {', '.join(DATA_SUFFIXES)}, found none. Name another folder.")
    splits, types, kinds = {}, {}, {}  # kinds: format and columns of each split
    for path in paths:
        stem = re.sub(r"-\d{5}-of-\d{5}$", "", re.sub(r"\.(parquet|jsonl|jsonl\.gz)$", "", path.name))
        name = re.sub(r"\W+", "_", stem)  # what `datasets` takes as the name of a split
        split = splits.setdefault(name, {"name": name, "rows": 0, "bytes": 0, "files": []})
        rows, found = _parquet(path) if path.suffix == ".parquet" else _json_lines(path)
        split["rows"] += rows
        split["bytes"] += path.stat().st_size
        split["files"].append(path.relative_to(folder).as_posix())
        kinds.setdefault(name, set()).update([("format", path.suffix == ".parquet"), *found])
        for column, named in found.items():
            types.setdefault(column, {}).update(dict.fromkeys(named))
    n_rows = sum(split["rows"] for split in splits.values())
    types = {column: " or ".join(named) for column, named in types.items()}
    alike = [[split for name, split in splits.items() if kinds[name] == kind] for kind in _unique(kinds.values())]
    configs = {"default" if len(alike) == 1 else group[0]["name"]: group for group in alike}
    return {"splits": list(splits.values()), "configs": configs, "types": types, "size": size_category(n_rows)}


def _unique(sets: Iterable[set]) -> list[set]:
    return list({frozenset(found): found for found in sets}.values())


def _parquet(path: Path) -> tuple[int, dict[str, list[str]]]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    return file.metadata.num_rows, {field.name: [str(field.type)] for field in file.schema_arrow}


def _json_lines(path: Path) -> tuple[int, dict[str, Iterable[str]]]:
    n_rows, types = 0, {}
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as lines:
        for number, line in enumerate(filter(str.strip, lines), 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"row {number} of {path} must be JSON: {error}. Correct it.") from error
            if not isinstance(row, dict):
                raise ValueError(f"row {number} of {path} must be an object, got {line[:40]!r}. Correct it.")
            for column, value in row.items():
                types.setdefault(column, {})[_json_type(value)] = None
            n_rows = number
    return n_rows, types


def _json_type(value) -> str:
    names = {str: "string", bool: "bool", int: "int", float: "float", list: "list", dict: "object"}
    return names.get(type(value), "null")

"""Sources -> one dataset of checked records on disk, mixed by share, cached by what the files and the settings are."""

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from trl.scripts.utils import DatasetConfig

from recipes.training.data import FEATURES, BadRow, document_key, local_files, read_rows
from recipes.training.records import RecordReader

SHOWN = 3  # bad rows that an error names

_READERS: dict[str, RecordReader] = {}  # by key: `Dataset.from_generator` hashes its arguments, so these stay outside


def _records(key: str, source: dict, state: str) -> Iterator[dict]:
    """All records of a source; `state` (size and time of its file) only enters the hash of the cache."""
    bad, n_rows = [], 0
    for place, row in read_rows(DatasetConfig(**source)):
        n_rows += 1
        try:
            yield from _READERS[key](place, row)
        except BadRow as error:
            bad.append(f"  {error}")
    if bad:
        shown = "\n".join(bad[:SHOWN] + ["  ..."] * (len(bad) > SHOWN))
        raise BadRow(f"{len(bad)} row(s) cannot be trained on. Correct or remove them:\n{shown}")
    if not n_rows:
        raise ValueError(f"`{source['path']}` must have at least one row, got none. Correct `path` in `datasets`.")


def load_records(sources: Sequence[DatasetConfig], reader: RecordReader, seed: int, cache_dir: str | Path) -> Dataset:
    """Read, check and mix all sources; a second call with unchanged files reads the Arrow cache in `cache_dir`.

    The seed is that of the choice if `fraction` keeps a part of a source.

    Raises:
        FileNotFoundError, ValueError: naming file, line, rule and remedy, before any step is taken.
    """
    settings = {name: value for name, value in vars(reader).items() if name not in ("processor", "_split")}
    tokenizer = reader.processor.tokenizer.backend_tokenizer.to_str()
    key = hashlib.sha256(f"{settings}{reader.processor.to_json_string()}{tokenizer}".encode()).hexdigest()
    _READERS[key] = reader
    parts = []
    for source in sources:
        arguments = {"key": key, "source": vars(source), "state": _state(source)}
        try:
            part = Dataset.from_generator(_records, features=FEATURES, gen_kwargs=arguments, cache_dir=str(cache_dir))
        except Exception as error:  # datasets wraps what the generator raises
            if (own := _own_error(error)) is None:
                raise
            raise own from None
        parts.append(part)
    return mix(parts, [source.fraction for source in sources], seed)


def _own_error(error: BaseException) -> Exception | None:
    """What the generator raised, out of what `datasets` made of it; None if it was not ours."""
    while error is not None:
        if type(error) in (BadRow, FileNotFoundError, ValueError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _state(source: DatasetConfig) -> str:
    """Sizes and times of the local files of a source. A text, because `from_generator` takes lists for shards."""
    return " ".join(f"{p}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in local_files(source))


def mix(parts: Sequence[Dataset], fractions: Sequence[float | None], seed: int) -> Dataset:
    """Concatenate; with fractions, draw from every part so many rows that it has its share of the mixture.

    The mixture is as large as it can be without showing a row twice. Which rows are kept is drawn with `seed`.
    """
    if all(fraction is None for fraction in fractions):
        return concatenate_datasets(list(parts))
    if any(fraction is None or not fraction > 0 for fraction in fractions):
        raise ValueError(f"`fraction` must be > 0 in all `datasets` or given in none, got {list(fractions)}.")
    shares = [fraction / sum(fractions) for fraction in fractions]
    total = min(len(part) / share for part, share in zip(parts, shares, strict=True))
    kept = []
    for part, share in zip(parts, shares, strict=True):
        rows = sorted(random.Random(seed).sample(range(len(part)), max(1, round(share * total))))
        kept.append(part.select(rows))
    return concatenate_datasets(kept)


def distinct_documents(datasets: Iterable[Dataset]) -> dict[str, dict]:
    """Every document of the records once, by `document_key`, in the order of first appearance."""
    rows = (row for dataset in datasets for row in dataset.select_columns("documents"))
    return {document_key(document): document for row in rows for document in row["documents"]}

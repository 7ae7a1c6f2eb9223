"""A BEIR folder -> rows that `questions.py` reads: documents first, then the queries of a split with what is relevant.

    corpus.jsonl {_id, title?, text}    queries.jsonl {_id, text, metadata?}    qrels/SPLIT.tsv query, document, score

Each may be gzipped.
"""

import csv
import gzip
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from trl.scripts.utils import DatasetConfig

from recipes.training.data import BadRow, read_rows


def beir_files(folder: Path) -> list[Path]:
    """All files of a folder that BEIR names, sorted."""
    patterns = ("corpus.jsonl*", "queries.jsonl*", "qrels/*.tsv*")
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def beir_rows(folder: Path, split: str, reject: Callable[[BadRow], None]) -> Iterator[tuple[str, dict]]:
    """(place, row): documents, then queries with `gold`, the ids of what was judged relevant (score above 0).

    `reject` is called with what cannot be used; a FileNotFoundError names a file that is missing.
    """
    names = ("corpus.jsonl", "queries.jsonl", f"qrels/{split}.tsv")
    corpus, queries, judged = (_existing(folder / name) for name in names)
    gold, asked = _read_judgements(judged, reject), set()
    for path in (corpus, queries):
        for place, row in read_rows(DatasetConfig(path=str(path)), on_bad_row=reject):
            if isinstance(row.get("_id"), bool) or not isinstance(row.get("_id"), str | int):
                reject(BadRow("must have an `_id`", place))
                continue
            row["_id"] = str(row["_id"])
            if path == queries:
                if row["_id"] not in gold:
                    continue  # of another split
                row["gold"] = list(gold[row["_id"]])
                asked.add(row["_id"])
            yield place, row
    for query in [query for query in gold if query not in asked]:
        place = next(iter(gold[query].values()))
        reject(BadRow(f"judges the query {query!r}, which {queries.name} lacks", place))


def _existing(path: Path) -> Path:
    for found in (path, path.with_name(f"{path.name}.gz")):
        if found.exists():
            return found
    raise FileNotFoundError(f"a BEIR folder must have {path}, found none. Correct --data or --split.")


def _read_judgements(path: Path, reject: Callable[[BadRow], None]) -> dict[str, dict[str, str]]:
    """query -> relevant document -> place."""
    gold: dict[str, dict[str, str]] = {}
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), 1):
            if not row or (number == 1 and row[-1] == "score"):
                continue
            try:
                (query, *_, document), score = row[:-1], float(row[-1])
            except ValueError:
                score = math.nan
            if math.isnan(score):
                reject(BadRow(f"must be query, document and score, got {row!r}", f"{path}:{number}"))
            elif score > 0:
                gold.setdefault(query, {}).setdefault(document, f"{path}:{number}")
    return gold

"""Runs of the evaluation command for tests: small data, what a run leaves, and a model that fails on demand."""

import gzip
import json
from pathlib import Path

import pytest

from modeling_clara import CLaRaForRAG
from recipes.evaluation.validation import check_results

PLACES = "France Germany Italy Spain Norway Egypt Peru Japan India Kenya Chile Cuba Ghana Iran Laos Mali Nepal".split()
CAPITALS = [f"{place}\nCity {number} is the capital of {place}." for number, place in enumerate(PLACES)]
N_QUESTIONS = 10
QUICK = "--max-new-tokens 6 --latency-questions 0 --batch-size 4".split()


def write_rows(path: Path, rows: list) -> Path:
    """Lines of JSON, compressed if the name says so; bytes stand for themselves."""
    content = b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_data(path: Path, n: int = N_QUESTIONS) -> Path:
    """Questions with five candidates each, the place of the gold one moving."""
    rows = []
    for number in range(n):
        docs = [CAPITALS[(number + step) % len(PLACES)] for step in range(5)]
        question = f"What is the capital of {PLACES[number % len(PLACES)]}, number {number}?"
        row = {"id": f"q{number}", "question": question, "answers": [f"City {number}"]}
        rows.append(row | {"docs": docs[number % 5 :] + docs[: number % 5], "pos_index": [-number % 5]})
    return write_rows(path, rows)


def command(*options: str, **given) -> list[str]:
    """The arguments of a quick run; options whose value is None are left out."""
    named = [part for name, value in given.items() if value for part in (f"--{name.replace('_', '-')}", str(value))]
    return [*named, "--resamples", "100", *(QUICK if given.get("model") else ()), *options]


def predictions(folder: Path) -> list[dict]:
    return read_rows(folder / "predictions.jsonl")


def without_seconds(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if not key.endswith("seconds")} for row in rows]


def assert_same(rows: list[dict], others: list[dict]) -> None:
    """Equal but for the time, and cosines to their last digit: the batch that a question is in may round them."""
    for row, other in zip(without_seconds(rows), without_seconds(others), strict=True):
        assert row.pop("scores") == pytest.approx(other.pop("scores"), abs=2e-6)
        assert row == other


def results(folder: Path) -> dict:
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert check_results(content) == []
    return content


def failing(monkeypatch, error: BaseException, *texts: str, after: int = 0) -> list[str]:
    """Make `encode_queries` raise if one of these texts is asked, after so many questions; what was asked."""
    original, asked = CLaRaForRAG.encode_queries, []

    def encode_queries(self, questions, **kwargs):
        if any(text in question for text in texts for question in questions) and len(asked) >= after:
            raise error
        asked.extend(questions)
        return original(self, questions, **kwargs)

    monkeypatch.setattr(CLaRaForRAG, "encode_queries", encode_queries)
    return asked

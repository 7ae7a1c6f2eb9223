"""Runs of the evaluation command for tests: small data, what a run leaves, and a model that fails on demand.

Stands beside tests/test_evaluation_run.py, which calls the command. It knows nothing of processes or metrics.
"""

import json
from pathlib import Path

import pytest

from modeling_clara import CLaRaForRAG
from recipes.evaluation.validation import check_results

PLACES = "France Germany Italy Spain Norway Egypt Peru Japan India Kenya Chile Cuba Ghana Iran Laos Mali Nepal".split()
N_QUESTIONS = 10


def write_data(path: Path, n: int = N_QUESTIONS) -> Path:
    """Questions with five candidates each, the place of the gold one moving."""
    docs = [f"{place}\nCity {number} is the capital of {place}." for number, place in enumerate(PLACES)]
    with open(path, "w") as file:
        for number in range(n):
            mine = [docs[(number + step) % len(docs)] for step in range(5)]
            question = f"What is the capital of {PLACES[number % len(docs)]}, number {number}?"
            row = {"id": f"q{number}", "question": question, "answers": [f"City {number}"]}
            row |= {"docs": mine[number % 5 :] + mine[: number % 5], "pos_index": [-number % 5]}
            file.write(json.dumps(row) + "\n")
    return path


def predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def without_seconds(rows: list[dict]) -> list[dict]:
    return [{**row, "seconds": None, "model_seconds": None} for row in rows]


def assert_same(rows: list[dict], others: list[dict]) -> None:
    """Equal but for the time, and cosines to their last digit: the batch that a question is in may round them."""
    for row, other in zip(without_seconds(rows), without_seconds(others), strict=True):
        assert row.pop("scores") == pytest.approx(other.pop("scores"), abs=2e-6)
        assert row == other


def results(folder: Path) -> dict:
    content = json.loads((folder / "results.json").read_text())
    assert check_results(content) == []
    return content


def failing(monkeypatch, error: BaseException, *texts: str, after: int = 0) -> list[str]:
    """Make `encode_queries` raise where one of these texts is asked, after so many questions; what was asked."""
    original, asked = CLaRaForRAG.encode_queries, []

    def encode_queries(self, questions, **kwargs):
        if any(text in question for text in texts for question in questions) and len(asked) >= after:
            raise error
        asked.extend(questions)
        return original(self, questions, **kwargs)

    monkeypatch.setattr(CLaRaForRAG, "encode_queries", encode_queries)
    return asked

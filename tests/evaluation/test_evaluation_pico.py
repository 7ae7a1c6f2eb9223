"""The whole evaluation on clara-pico, a real model: what it says must be what is known of this model.

100 questions about people that training never showed, 10 sheets each. The model card says 0.99 for answers and 0.04
for answers read from a wrong sheet, which is what guessing gives.
"""

import json
from pathlib import Path

import pytest

from recipes.evaluation.cli import main
from recipes.evaluation.validation import check_results
from recipes.models.pico.facts import FactSheets

PICO = Path(__file__).parents[2] / "model_cards" / "clara-pico"
SYSTEMS = ["clara", "bm25_memory", "wrong_memory", "closed_book"]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    """Results by system."""
    folder = tmp_path_factory.mktemp("pico")
    with open(folder / "sheets.jsonl", "w") as file:
        for number, row in enumerate(FactSheets(11, test=True).retrieval_rows(100, 10)):
            file.write(json.dumps({"id": str(number), **row}) + "\n")
    options = ["--systems", *SYSTEMS, "--top-k", "1", "--max-new-tokens", "6", "--latency-questions", "3"]
    given = ["--model", str(PICO), "--data", str(folder / "sheets.jsonl"), "--output", str(folder / "run")]
    assert main([*given, *options, "--codec", "int8", "--resamples", "1000"]) == 0
    paths = {"clara": folder / "run"} | {
        name: folder / "run" / "baselines" / name.replace("_", "-") for name in SYSTEMS[1:]
    }
    found = {name: json.loads((path / "results.json").read_text()) for name, path in paths.items()}
    assert not [problem for content in found.values() for problem in check_results(content)]
    return found


def test_every_question_is_answered(results):
    for content in results.values():
        assert content["counts"] == {
            "questions": 100, "answered": 100, "abstained": 0, "failed": 0, "without_answers": 0, "without_gold": 0
        }  # fmt: skip


def test_a_wrong_memory_is_worth_no_more_than_none(results):
    """Were it worth more, answers would leak past the memory that is read."""
    wrong, closed = (results[name]["metrics"]["f1"] for name in ("wrong_memory", "closed_book"))
    assert wrong["low"] <= closed["high"] and closed["low"] <= wrong["high"]
    assert wrong["value"] < 0.15 and closed["value"] < 0.15


def test_clara_is_better_than_both_beyond_doubt(results):
    clara = results["clara"]["metrics"]["f1"]
    assert clara["value"] > 0.9
    for name in ("wrong_memory", "closed_book"):
        assert clara["low"] > results[name]["metrics"]["f1"]["high"]
    lines = {(line["system"], line["metric"]): line for line in results["clara"]["comparisons"]}
    for name in ("wrong-memory", "closed-book"):
        line = lines[name, "f1"]
        assert line["low"] > 0.5 and line["p_value"] < 0.001 and line["n"] == 100
        difference = clara["value"] - results[name.replace("-", "_")]["metrics"]["f1"]["value"]
        assert line["difference"] == pytest.approx(difference)


def test_retrieval_is_as_the_card_says(results):
    metrics = results["clara"]["metrics"]
    assert metrics["recall@1"]["value"] >= 0.95 and metrics["recall@5"]["value"] >= 0.99
    assert metrics["mrr"]["low"] > 0.9
    assert not [name for name in results["wrong_memory"]["metrics"] if "@" in name]


def test_times_and_sizes(results):
    efficiency = results["clara"]["efficiency"]
    assert efficiency["bytes_per_span"] == 8 * (128 + 2)  # int8, with a scale of a float16 for each vector
    assert results["closed_book"]["efficiency"]["bytes_per_span"] is None
    assert efficiency["tokens_read"] > results["closed_book"]["efficiency"]["tokens_read"] + 8
    query, none = (results[name]["efficiency"]["latency_ms"]["query"]["p50"] for name in ("clara", "closed_book"))
    assert query > 0 and none == 0

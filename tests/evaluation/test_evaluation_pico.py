"""The whole evaluation on clara-pico, a real model: what it says must be what is known of this model.

100 questions about people that training never showed, 10 sheets each. The model card says 0.99 for answers and 0.04
for answers read from a wrong sheet, which is what guessing gives.
"""

from pathlib import Path

import pytest
from evaluation_runs import command, results, write_rows

from recipes.evaluation.cli import main
from recipes.models.pico.facts import FactSheets

PICO = Path(__file__).parents[2] / "model_cards" / "clara-pico"
OTHERS = ["bm25_memory", "wrong_memory", "closed_book"]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    """Valid results by system."""
    folder = tmp_path_factory.mktemp("pico")
    rows = [{"id": str(n), **row} for n, row in enumerate(FactSheets(11, test=True).retrieval_rows(100, 10))]
    given = {"model": PICO, "data": write_rows(folder / "sheets.jsonl", rows), "output": folder / "run"}
    options = ["--top-k", "1", "--latency-questions", "3", "--codec", "int8", "--batch-size", "32"]
    assert main(command("--systems", "clara", *OTHERS, *options, "--resamples", "1000", **given)) == 0
    paths = {name: folder / "run" / "baselines" / name.replace("_", "-") for name in OTHERS}
    return {name: results(path) for name, path in {"clara": folder / "run", **paths}.items()}


def test_every_question_is_answered(found):
    for content in found.values():
        counts = dict(content["counts"])
        assert counts.pop("questions") == counts.pop("answered") == 100 and not any(counts.values())


def test_clara_is_better_than_a_wrong_memory_and_none_beyond_doubt(found):
    """Were a wrong memory worth more than none, answers would leak past the memory that is read."""
    clara, wrong, closed = (found[name]["metrics"]["f1"] for name in ("clara", "wrong_memory", "closed_book"))
    assert wrong["low"] <= closed["high"] and closed["low"] <= wrong["high"]
    lines = {line["system"]: line for line in found["clara"]["comparisons"] if line["metric"] == "f1"}
    for name, other in (("wrong-memory", wrong), ("closed-book", closed)):
        assert clara["value"] > 0.9 and other["value"] < 0.15 and clara["low"] > other["high"]
        line = lines[name]
        assert line["low"] > 0.5 and line["p_value"] < 0.001 and line["n"] == 100
        assert line["difference"] == pytest.approx(clara["value"] - other["value"])


def test_retrieval_is_as_the_card_says(found):
    metrics = found["clara"]["metrics"]
    assert metrics["recall@1"]["value"] >= 0.95 and metrics["recall@5"]["value"] >= 0.99
    assert metrics["mrr"]["low"] > 0.9
    assert not [name for name in found["wrong_memory"]["metrics"] if "@" in name]


def test_times_and_sizes(found):
    clara, none = (found[name]["efficiency"] for name in ("clara", "closed_book"))
    assert clara["bytes_per_span"] == 8 * (128 + 2)  # int8, with a scale of a float16 for each vector
    assert none["bytes_per_span"] is None and clara["tokens_read"] > none["tokens_read"] + 8
    assert clara["latency_ms"]["query"]["p50"] > 0 and none["latency_ms"]["query"]["p50"] == 0

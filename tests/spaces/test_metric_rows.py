"""What holds for every metric: its table of cases, rows in any order and in parts, and what it refuses by name."""

import doctest
import importlib
import json
import math
import random
from pathlib import Path

import evaluate
import pytest

from recipes.spaces.metrics import checked_rows

METRICS = Path(__file__).parents[2] / "recipes" / "spaces" / "metrics"
DOCTESTS = {"rag_answer": 3, "retrieval": 1, "compression_fidelity": 2}
CASES = [(name, case) for name in DOCTESTS for case in json.loads((METRICS / name / "cases.json").read_text("utf-8"))]
NAN = float("nan")
WORDS = ["Paris", "the", "1,200", "Rome", "York", "7", "é"]
RIGHT = {  # two rows that can be scored: predictions and references
    "rag_answer": (["a", "b"], [["b"], ["c"]]),
    "retrieval": ([["a"], ["b"]], [["a"], ["b"]]),
    "compression_fidelity": (["a", "b"], ["b", "c"]),
}
STRING, LIST = "must be a string, got", "must be a list of"
WRONG_TEXTS = [  # values that are no text, the kind of the error and its words
    (None, TypeError, f"{STRING} None"),
    (NAN, TypeError, f"{STRING} nan"),
    (7, TypeError, f"{STRING} 7"),
    (["b"], TypeError, rf"{STRING} \['b'\]"),
    ("", ValueError, "must not be blank"),
    (" \n\u00a0", ValueError, "must not be blank"),
    ("\ud800", ValueError, "must be valid Unicode"),
]
NO_LISTS = ("c", None, NAN)
TWICE = (["b", "c", "b"], ValueError, r"must have each document once, got 'b' 2 times")
WRONG = [  # metric, column, a value that cannot be scored, the kind of the error and its words
    *(("rag_answer", "predictions", value, kind, rf"{words}.*") for value, kind, words in WRONG_TEXTS),
    ("rag_answer", "predictions", None, TypeError, ".*count it as failed"),
    *(("rag_answer", "references", ["c", value], kind, rf"\[1\] {words}") for value, kind, words in WRONG_TEXTS),
    *(("rag_answer", "references", value, TypeError, f"{LIST} gold.*got {value!r}") for value in NO_LISTS),
    ("rag_answer", "references", [], ValueError, "must have a gold answer.*leave the row out"),
    *(("compression_fidelity", "predictions", value, kind, words) for value, kind, words in WRONG_TEXTS),
    *(("compression_fidelity", "references", value, kind, words) for value, kind, words in WRONG_TEXTS),
    ("compression_fidelity", "predictions", "", ValueError, ".*count it as failed"),
    ("compression_fidelity", "references", None, TypeError, ".*leave the row"),
    *(("retrieval", column, *TWICE) for column in ("predictions", "references")),
    *(("retrieval", "predictions", ["b", value], TypeError, rf"\[1\] {STRING} {value}.*str\(") for value in (7, None)),
    *(("retrieval", "references", value, TypeError, f"{LIST} document ids, got {value!r}") for value in NO_LISTS),
    ("retrieval", "predictions", ["\ud800"], ValueError, r"\[0\] must be valid Unicode"),
]
POSITIVE = "`k` must have positive integers only, got"
EACH_ONCE = "`k` must have at least one depth and each once, got"
EVERYWHERE = [
    ({"references": [["b"]]}, ValueError, r"`references` must have one entry per prediction \(2\), got 1"),
    ({"predictions": [], "references": []}, ValueError, "at least one row, got 0"),
    ({"predictions": "ab"}, TypeError, "`predictions` must be a list .*got str"),
    ({"predictions": None}, TypeError, "`predictions` must be a list .*got NoneType"),
    ({"references": None}, TypeError, "`references` must be a list .*got NoneType"),
    ({"ids": ["q", "q"]}, ValueError, "`ids` must be unique, got 'q' 2 times"),
    ({"ids": ["q"]}, ValueError, r"`ids` must have one entry per row \(2\), got 1"),
    ({"ids": ["q", 1.5]}, TypeError, r"`ids\[1\]` must be a string or an integer, got 1.5"),
    ({"ids": "qr"}, TypeError, "`ids` must be a list"),
]
WRONG_INPUTS = [  # metrics, columns or options that do not fit, the kind of the error and its words
    *((name, *rest) for name in DOCTESTS for rest in EVERYWHERE),
    ("retrieval", {"references": [[], []]}, ValueError, "gold documents for at least one question, got none in 2"),
    *(("retrieval", {"k": [depth]}, ValueError, f"{POSITIVE} {depth}") for depth in (0, -1, 1.0, True)),
    ("retrieval", {"k": [5, 1, 5]}, ValueError, rf"{EACH_ONCE} \[5, 1, 5\]"),
    ("retrieval", {"k": []}, ValueError, rf"{EACH_ONCE} \[\]"),
    ("retrieval", {"k": 5}, TypeError, r"`k` must be a list of depths, got 5. Write \[5\]"),
]


@pytest.fixture(scope="module")
def metrics() -> dict[str, evaluate.Metric]:
    return {name: evaluate.load(str(METRICS / name)) for name in DOCTESTS}


@pytest.mark.parametrize("name, case", CASES, ids=[f"{name}-{case['name']}" for name, case in CASES])
def test_a_case_of_the_table(metrics, name, case):
    found = metrics[name].compute(**case["inputs"])
    for measure, expected in case["expected"].items():
        assert found[measure] == pytest.approx(expected, abs=1e-12), measure
    assert case["source"]


@pytest.mark.parametrize("name", DOCTESTS)
def test_doctests_run(name):
    assert doctest.testmod(importlib.import_module(f"recipes.spaces.metrics.{name}.{name}")) == (0, DOCTESTS[name])
    assert doctest.testmod(checked_rows) == (0, 1)


def draw_rows(name: str, count: int = 60) -> tuple[list, list]:
    """Rows that share words; one of them has nothing in common with the others."""
    draw = random.Random(7)
    drawn = [[draw.sample(WORDS, draw.randint(1, 5)) for _ in range(count)] for _ in ("predictions", "references")]
    if name != "retrieval":
        drawn[0] = [" ".join(words) for words in drawn[0]]
    if name == "compression_fidelity":
        drawn[1] = [" ".join(words) for words in drawn[1]]
    return tuple(drawn)


@pytest.mark.parametrize("name", DOCTESTS)
def test_the_result_does_not_depend_on_the_order_or_on_how_rows_are_added(metrics, name):
    metric, (predictions, references) = metrics[name], draw_rows(name)
    whole = metric.compute(predictions=predictions, references=references)
    rows = metric.compute(predictions=predictions, references=references, per_question=True)
    per_question = {key: rows.pop(key) for key in list(rows) if key.endswith("_per_question")}
    assert rows == whole and {key.removesuffix("_per_question") for key in per_question} <= set(whole)
    for key, values in per_question.items():
        there = [value for value in values if value is not None]
        assert len(values) == 60 and there and 0 < math.fsum(there) < len(there)
        assert whole[key.removesuffix("_per_question")] == pytest.approx(math.fsum(there) / len(there), abs=1e-12)
    order = random.Random(7).sample(range(60), 60)
    mixed = [[column[row] for row in order] for column in (predictions, references)]
    assert metric.compute(predictions=mixed[0], references=mixed[1], ids=order) == whole
    metric.add_batch(predictions=predictions[:30], references=references[:30])
    metric.add(prediction=predictions[30], reference=references[30])
    assert metric.compute(predictions=predictions[31:], references=references[31:], ids=range(60)) == whole


@pytest.mark.parametrize("name, column, value, error, message", WRONG)
def test_a_row_that_cannot_be_scored_is_named(metrics, name, column, value, error, message):
    metric, row = metrics[name], dict(zip(("predictions", "references"), map(list, RIGHT[name]), strict=True))
    row[column][1] = value
    with pytest.raises(error, match=rf"(?s)`{column}\[1\]` \(id 'q1'\) ?{message}"):
        metric.compute(**row, ids=["q0", "q1"])
    for add in (metric.compute, metric.add_batch):  # before Arrow makes text of it
        with pytest.raises(error, match=rf"(?s)`{column}\[1\]` ?{message}"):
            add(**row)
    with pytest.raises(error, match=rf"(?s)`{column}\[0\]` ?{message}"):
        metric.add(prediction=row["predictions"][1], reference=row["references"][1])
    predictions, references = RIGHT[name]
    again = metric.compute(predictions=predictions[:1], references=references[:1], per_question=True)
    assert {len(values) for key, values in again.items() if key.endswith("per_question")} == {1}  # none was kept


@pytest.mark.parametrize("name, inputs, error, message", WRONG_INPUTS)
def test_columns_and_options_that_do_not_fit_are_refused(metrics, name, inputs, error, message):
    right = dict(zip(("predictions", "references"), RIGHT[name], strict=True))
    with pytest.raises(error, match=message):
        metrics[name].compute(**(right | inputs))
    assert metrics[name].compute(**right)


def test_ids_and_depths_are_checked_for_rows_that_were_added_before(metrics):
    metrics["rag_answer"].add_batch(predictions=["a", "b"], references=[["b"], ["c"]])
    with pytest.raises(ValueError, match=r"`ids` must have one entry per row \(2\), got 1"):
        metrics["rag_answer"].compute(ids=["q"])
    assert metrics["rag_answer"].compute(predictions=["b"], references=[["b"]])["em"] == 1
    metrics["retrieval"].add(prediction=["a"], reference=["a"])
    with pytest.raises(ValueError, match=POSITIVE):
        metrics["retrieval"].compute(k=[0])
    assert metrics["retrieval"].compute()["questions"] == 1  # the row waits for another depth

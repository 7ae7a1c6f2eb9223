"""The metric of rankings against ranx and ir_measures, two packages of others, and what it refuses."""

import doctest
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import evaluate
import ir_measures
import pytest
from ir_measures import RR, P, R, Success, nDCG

from recipes.spaces.metrics.retrieval import retrieval
from recipes.spaces.metrics.retrieval.retrieval import score_ranking

FOLDER = Path(__file__).parents[2] / "recipes" / "spaces" / "metrics" / "retrieval"
CASES = json.loads((FOLDER / "cases.json").read_text(encoding="utf-8"))
K = (1, 2, 3, 5, 10, 20)
NAMES = [f"{name}@{k}" for k in K for name in ("recall", "precision", "hit", "ndcg")] + ["mrr"]
NAN = float("nan")
# ranx compiles its measures for a minute on a new machine; numba reads this switch when it is imported
RANX = """
import json, sys
from ranx import Qrels, Run, evaluate
qrels, run, names = json.load(sys.stdin)
run = Run(run)
evaluate(Qrels(qrels), run, names, return_mean=False)
json.dump({name: {q: float(v) for q, v in scores.items()} for name, scores in run.scores.items()}, sys.stdout)
"""


@pytest.fixture(scope="module")
def metric() -> evaluate.Metric:
    return evaluate.load(str(FOLDER))


def draw_rows(seed: int, count: int = 60) -> tuple[list[list[str]], list[list[str]]]:
    """Rankings of 1 to 15 documents out of 25 and 1 to 5 gold ones, some of which were not returned."""
    draw = random.Random(seed)
    documents = [f"d{number}" for number in range(25)]
    predictions = [draw.sample(documents, draw.randint(1, 15)) for _ in range(count)]
    return predictions, [draw.sample(documents, draw.randint(1, 5)) for _ in range(count)]


def as_trec(predictions, references) -> tuple[dict, dict]:
    """The same as judgements and scores, by question and document; a better rank has a higher score."""
    qrels = {f"q{row}": dict.fromkeys(gold, 1) for row, gold in enumerate(references)}
    run = {
        f"q{row}": {document: 1.0 / rank for rank, document in enumerate(ranking, start=1)}
        for row, ranking in enumerate(predictions)
    }
    return qrels, run


def per_question(metric, predictions, references) -> dict[str, dict[str, float]]:
    scores = metric.compute(predictions=predictions, references=references, k=K, per_question=True)
    return {name: {f"q{row}": value for row, value in enumerate(scores[f"{name}_per_question"])} for name in NAMES}


def test_every_question_scores_as_in_ranx(metric):
    predictions, references = draw_rows(0, count=200)
    spelled = {name: name.replace("hit@", "hit_rate@") for name in NAMES}
    finished = subprocess.run(
        [sys.executable, "-c", RANX],
        input=json.dumps([*as_trec(predictions, references), list(spelled.values())]),
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    theirs = json.loads(finished.stdout)
    for name, ours in per_question(metric, predictions, references).items():
        assert ours == pytest.approx(theirs[spelled[name]], abs=1e-9), name


@pytest.mark.parametrize("seed", range(3))
def test_every_question_scores_as_in_ir_measures(metric, seed):
    predictions, references = draw_rows(seed)
    families = {"recall": R, "precision": P, "hit": Success, "ndcg": nDCG}
    measures = {f"{name}@{k}": measure @ k for name, measure in families.items() for k in K} | {"mrr": RR}
    theirs = {name: {} for name in measures}
    spelled = {measure: name for name, measure in measures.items()}
    for found in ir_measures.iter_calc(list(measures.values()), *as_trec(predictions, references)):
        theirs[spelled[found.measure]][found.query_id] = found.value
    for name, ours in per_question(metric, predictions, references).items():
        assert ours == pytest.approx(theirs[name], abs=1e-9), name


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_a_case_of_the_table(metric, case):
    found = metric.compute(**case["inputs"])
    for name, expected in case["expected"].items():
        assert found[name] == pytest.approx(expected, abs=1e-12), name
    assert case["source"]


# --- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_scores_move_the_right_way(seed):
    draw = random.Random(seed)
    for ranking, gold in zip(*draw_rows(seed), strict=True):
        scores = score_ranking(ranking, gold, K)
        assert list(scores) == NAMES and all(0 <= value <= 1 + 1e-12 for value in scores.values())
        for lower, higher in zip(K, K[1:], strict=False):
            assert scores[f"recall@{lower}"] <= scores[f"recall@{higher}"]
            assert scores[f"hit@{lower}"] <= scores[f"hit@{higher}"]
        for k in K:
            assert scores[f"precision@{k}"] * k == pytest.approx(scores[f"recall@{k}"] * len(gold))
            assert scores[f"hit@{k}"] == (scores[f"recall@{k}"] > 0) == (scores[f"ndcg@{k}"] > 0)
        assert score_ranking(ranking, draw.sample(gold, len(gold)), K) == scores  # gold has no order
        best = score_ranking([*gold, *(d for d in ranking if d not in gold)], gold, K)
        assert all(best[f"ndcg@{k}"] == pytest.approx(1) for k in K) and best["mrr"] == best["recall@5"] == 1
        places = [place for place, document in enumerate(ranking) if document in gold and place]
        if places:  # a gold document that moves up never costs anything
            place = draw.choice(places)
            moved = [*ranking[: place - 1], ranking[place], ranking[place - 1], *ranking[place + 1 :]]
            assert all(value >= scores[name] - 1e-12 for name, value in score_ranking(moved, gold, K).items())


def test_the_result_does_not_depend_on_the_order_or_on_how_rows_are_added(metric):
    predictions, references = draw_rows(7)
    references[3], predictions[5] = [], []
    whole = metric.compute(predictions=predictions, references=references)
    assert whole["questions"] == 59 and whole["without_gold"] == 1
    assert [name.split("@")[1] for name in whole if name.startswith("recall@")] == ["1", "3", "5", "10"]
    order = random.Random(7).sample(range(60), 60)
    mixed = [[rows[row] for row in order] for rows in (predictions, references)]
    assert metric.compute(predictions=mixed[0], references=mixed[1], ids=order) == whole
    metric.add_batch(predictions=predictions[:30], references=references[:30])
    metric.add(prediction=predictions[30], reference=references[30])
    assert metric.compute(predictions=predictions[31:], references=references[31:]) == whole


def test_a_question_without_gold_changes_nothing_but_its_count(metric):
    predictions, references = draw_rows(9)
    before = metric.compute(predictions=predictions, references=references, k=K, per_question=True)
    after = metric.compute(predictions=[["x"], *predictions], references=[[], *references], k=K, per_question=True)
    assert after["without_gold"] == 1 and before["without_gold"] == 0 and after["questions"] == 60
    for name in NAMES:
        assert after[name] == before[name]
        assert after[f"{name}_per_question"] == [None, *before[f"{name}_per_question"]]


def test_doctests_run():
    assert doctest.testmod(retrieval) == (0, 1)


# --- what is refused -------------------------------------------------------------------------------------------------

ERRORS = [  # predictions, references, error, its words; the row at fault has the id q1
    (
        [["a"], ["b", "c", "b"]],
        [["a"], ["b"]],
        ValueError,
        r"`predictions\[1\]` \(id 'q1'\) must have each.*'b' 2",
    ),
    ([["a"], ["b"]], [["a"], ["b", "b"]], ValueError, r"`references\[1\]` \(id 'q1'\) must have each.*'b' 2"),
    (
        [["a"], ["b", 7]],
        [["a"], ["b"]],
        TypeError,
        r"`predictions\[1\]` \(id 'q1'\)\[1\] must be a string, got 7.*str\(",
    ),
    ([["a"], ["b"]], [["a"], [7]], TypeError, r"`references\[1\]` \(id 'q1'\)\[0\] must be a string, got 7"),
    ([["a"], [None]], [["a"], ["b"]], TypeError, r"`predictions\[1\]` \(id 'q1'\)\[0\] must be a string, got None"),
    ([["a"], ["b"]], [["a"], [NAN]], TypeError, r"`references\[1\]` \(id 'q1'\)\[0\] must be a string, got nan"),
    (
        [["a"], None],
        [["a"], ["b"]],
        TypeError,
        r"`predictions\[1\]` \(id 'q1'\) must be a list .*, got None",
    ),
    (
        [["a"], "b"],
        [["a"], ["b"]],
        TypeError,
        r"`predictions\[1\]` \(id 'q1'\) must be a list .*, got 'b'",
    ),
    (
        [["a"], ["b"]],
        [["a"], NAN],
        TypeError,
        r"`references\[1\]` \(id 'q1'\) must be a list .*, got nan",
    ),
    ([["a"], ["\ud800"]], [["a"], ["b"]], ValueError, r"`predictions\[1\]` \(id 'q1'\)\[0\] must be valid Unicode"),
]


@pytest.mark.parametrize("predictions, references, error, message", ERRORS)
def test_a_row_that_cannot_be_scored_is_named(metric, predictions, references, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        metric.compute(predictions=predictions, references=references, ids=["q0", "q1"])
    without_id = message.replace(r" \(id 'q1'\)", "")
    with pytest.raises(error, match=f"(?s){without_id}"):  # before Arrow makes text of it
        metric.add_batch(predictions=predictions, references=references)
    with pytest.raises(error, match=f"(?s){without_id}".replace(r"\[1\]`", r"\[0\]`")):
        metric.add(prediction=predictions[1], reference=references[1])
    assert metric.compute(predictions=[["a"]], references=[["a"]])["questions"] == 1  # none of these rows was kept


@pytest.mark.parametrize(
    "inputs, error, message",
    [
        ({"references": [["a"]]}, ValueError, r"`references` must have one entry per prediction \(2\), got 1"),
        ({"predictions": [], "references": []}, ValueError, r"at least one row, got 0"),
        ({"references": [[], []]}, ValueError, r"gold documents for at least one question, got none in 2"),
        ({"predictions": "ab"}, TypeError, r"`predictions` must be a list"),
        ({"references": None}, TypeError, r"`references` must be a list"),
        ({"ids": ["q", "q"]}, ValueError, r"`ids` must be unique, got 'q' 2 times"),
        ({"ids": ["q"]}, ValueError, r"`ids` must have one entry per row \(2\), got 1"),
        ({"ids": ["q", 1.5]}, TypeError, r"`ids\[1\]` must be a string or an integer, got 1.5"),
        ({"k": [0]}, ValueError, r"`k` must have positive integers only, got 0"),
        ({"k": [-1]}, ValueError, r"`k` must have positive integers only, got -1"),
        ({"k": [1.0]}, ValueError, r"`k` must have positive integers only, got 1.0"),
        ({"k": [True]}, ValueError, r"`k` must have positive integers only, got True"),
        ({"k": [5, 1, 5]}, ValueError, r"`k` must have at least one depth and each once, got \[5, 1, 5\]"),
        ({"k": []}, ValueError, r"`k` must have at least one depth and each once, got \[\]"),
        ({"k": 5}, TypeError, r"`k` must be a list of depths, got 5. Write \[5\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(metric, inputs, error, message):
    with pytest.raises(error, match=message):
        metric.compute(**({"predictions": [["a"], ["b"]], "references": [["a"], ["b"]]} | inputs))


def test_the_pure_function_wants_gold():
    with pytest.raises(ValueError, match="`gold` must have at least one document id"):
        score_ranking(["a"], [])

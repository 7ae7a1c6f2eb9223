"""The metric of rankings against ranx and ir_measures, two packages of others."""

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

from recipes.spaces.metrics.retrieval.retrieval import score_ranking

FOLDER = Path(__file__).parents[2] / "recipes" / "spaces" / "metrics" / "retrieval"
K = (1, 2, 3, 5, 10, 20)
NAMES = [f"{name}@{k}" for k in K for name in ("recall", "precision", "hit", "ndcg")] + ["mrr"]
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


def test_a_question_without_gold_changes_nothing_but_its_count(metric):
    predictions, references = draw_rows(9)
    before = metric.compute(predictions=predictions, references=references, k=K, per_question=True)
    after = metric.compute(predictions=[["x"], *predictions], references=[[], *references], k=K, per_question=True)
    assert after["without_gold"] == 1 and before["without_gold"] == 0 and after["questions"] == 60
    for name in NAMES:
        assert after[name] == before[name]
        assert after[f"{name}_per_question"] == [None, *before[f"{name}_per_question"]]


def test_the_pure_function_wants_gold():
    with pytest.raises(ValueError, match="`gold` must have at least one document id"):
        score_ranking(["a"], [])

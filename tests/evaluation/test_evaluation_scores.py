"""`evaluation/scores.py`: what counts for a question, and the statistics against scipy and by simulation."""

import warnings

import numpy as np
import pytest
from scipy import stats

from recipes.evaluation.formats import Question
from recipes.evaluation.run import prediction_row
from recipes.evaluation.scores import (
    bootstrap_means,
    compare,
    quantiles,
    score_questions,
    sign_flip_test,
    with_intervals,
)
from recipes.evaluation.tasks import Task

NAN = float("nan")


def task(name: str, answers=("Paris",), gold=("g",)) -> Task:
    return Task(Question(name, f"{name}?", answers, ("g", "h", "i"), gold, "x.jsonl:1"), None, gold)


def test_failed_and_abstained_score_zero_and_stay_in_the_mean():
    rows = [
        prediction_row("right", prediction="in Paris, the", retrieved=["g", "h"]),
        prediction_row("failed", failure="ValueError: no"),
        prediction_row("abstained", abstained=True),
        prediction_row("half", prediction="Paris Rome", retrieved=["h", "g"]),
    ]
    scores = score_questions([task(row["id"]) for row in rows], rows, with_retrieval=True)
    expected = {
        "em": [0, 0, 0, 0], "f1": [2 / 3, 0, 0, 2 / 3], "containment": [1, 0, 0, 1], "recall@1": [1, 0, 0, 0],
        "recall@3": [1, 0, 0, 1], "precision@10": [0.1, 0, 0, 0.1], "mrr": [1, 0, 0, 0.5],
    }  # fmt: skip
    assert {name: scores[name].tolist() for name in expected} == {k: pytest.approx(v) for k, v in expected.items()}
    assert "abstention" not in scores  # every question has an answer
    assert with_intervals(scores)["f1"] == pytest.approx({"value": 1 / 3, "low": 0, "high": 2 / 3, "n": 4})


def test_unanswerable_questions_make_abstention_and_nothing_else():
    tasks = [task("a", answers=()), task("b", answers=()), task("c", answers=()), task("d")]
    rows = [
        prediction_row("a", abstained=True),
        prediction_row("b", prediction="Paris", retrieved=["g"]),
        prediction_row("c", failure="empty answer"),
        prediction_row("d", abstained=True),
    ]
    scores = score_questions(tasks, rows, with_retrieval=False)
    np.testing.assert_array_equal(scores.pop("abstention"), [1, 0, 0, NAN])
    assert set(scores) == {"em", "f1", "containment", "bag_containment"}
    for values in scores.values():
        np.testing.assert_array_equal(values, [NAN, NAN, NAN, 0])


def test_questions_without_gold_are_left_out_of_retrieval():
    tasks = [task("a", gold=()), task("b", gold=("g", "h"))]
    rows = [prediction_row("a", prediction="Paris", retrieved=["g"])]
    rows += [prediction_row("b", prediction="Rome", retrieved=["i", "h"])]
    scores = score_questions(tasks, rows, with_retrieval=True)
    for name in ("recall@3", "mrr"):
        np.testing.assert_array_equal(scores[name], [NAN, 0.5])
    assert with_intervals(scores)["recall@3"]["n"] == 1
    assert not [name for name in score_questions(tasks, rows, with_retrieval=False) if "@" in name or name == "mrr"]
    assert not [name for name in score_questions(tasks[:1], rows[:1], with_retrieval=True) if "@" in name]
    scores = score_questions([task("a", answers=())], rows[:1], with_retrieval=True)  # retrieval alone is asked for
    assert scores["recall@1"].tolist() == [1.0] and "f1" not in scores


@pytest.mark.parametrize("kind", ["binary", "skewed"])
def test_intervals_agree_with_scipy(kind):
    generator = np.random.default_rng(3)
    values = generator.integers(0, 2, 80).astype(float) if kind == "binary" else generator.beta(0.3, 2.0, 80)
    ours = with_intervals({"x": values}, resamples=20_000)["x"]
    options = {"n_resamples": 20_000, "method": "percentile", "random_state": np.random.default_rng(9)}
    theirs = stats.bootstrap((values,), np.mean, **options).confidence_interval
    bounds = pytest.approx((theirs.low, theirs.high), abs=0.15 * values.std() / np.sqrt(len(values)))
    assert (ours["low"], ours["high"]) == bounds and ours["value"] == pytest.approx(values.mean(), abs=1e-15)


def test_bootstrap_is_the_mean_of_whole_rows_and_skips_nan(monkeypatch):
    """Columns share their draws; NaN does not count in the mean of a draw; draws in blocks are all made and count."""
    values = np.random.default_rng(0).random((50, 1))
    table = np.concatenate([values, 1 - values, np.where(np.arange(50)[:, None] < 25, values, NAN)], axis=1)
    means = bootstrap_means(table, seed=4, resamples=500)
    assert means.shape == (500, 3)
    np.testing.assert_allclose(means[:, 0] + means[:, 1], 1.0, atol=1e-12)
    assert means[:, 2].mean() == pytest.approx(values[:25].mean(), abs=0.02)
    np.testing.assert_array_equal(means, bootstrap_means(table, seed=4, resamples=500))
    assert not np.array_equal(means, bootstrap_means(table, seed=5, resamples=500))
    np.testing.assert_allclose(means[:, 2:], bootstrap_means(table[:, 2:], seed=4, resamples=500), atol=1e-12)
    assert means[:, 0].std() == pytest.approx(values.std() / np.sqrt(50), rel=0.15)
    monkeypatch.setattr("recipes.evaluation.scores.BLOCK", 64)
    blocks = bootstrap_means(table[:20, :2], resamples=101)
    assert blocks.shape == (101, 2) and blocks.mean(0) == pytest.approx(table[:20, :2].mean(0), abs=0.05)
    assert sign_flip_test(np.ones((4, 1)), flips=3001)[0] == pytest.approx(2 / 16, abs=0.03)


def test_interval_edge_cases():
    """One question, equal questions, one value among NaN: no NaN comes out, no warning is given."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert with_intervals({}) == {}
        one = with_intervals({"em": np.array([0.25])})["em"]
        assert one == {"value": 0.25, "low": 0.25, "high": 0.25, "n": 1}
        rare = np.full(400, NAN)
        rare[7] = 0.75
        found = with_intervals({"a": rare, "b": np.ones(400)}, resamples=200)["a"]
        assert found == {"value": 0.75, "low": 0.75, "high": 0.75, "n": 1}
        same = with_intervals({"x": np.full(7, 0.1)})["x"]
        assert same["low"] <= same["value"] + 1e-12 and same["high"] >= same["value"] - 1e-12


@pytest.mark.parametrize(
    "values",
    [
        *(np.random.default_rng(5).normal(shift, 1.0, 12) for shift in (0.0, 0.4, 1.5)),
        np.array([1, 1, 1, 1, 1, -1, 0, 0, 0, 1.0]),  # as of exact match: sums that equal the observed one are extreme
    ],
)
def test_sign_flips_agree_with_the_exact_test(values):
    """All signs by scipy against 20,000 random ones."""
    exact = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    ours = sign_flip_test(values[:, None], flips=20_000)[0]
    assert ours == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 20_000) + 2 / 20_000)


def test_sign_flip_edge_cases():
    """No difference gives 1; NaN is no difference; the smallest value is 1 / (flips + 1); zeros change nothing."""
    assert sign_flip_test(np.zeros((5, 2))).tolist() == [1.0, 1.0]
    assert sign_flip_test(np.full((5, 1), NAN)).tolist() == [1.0]
    assert sign_flip_test(np.ones((200, 1)), flips=999)[0] == pytest.approx(1 / 1000)
    values = np.random.default_rng(0).normal(0.3, 1, (30, 1))
    padded = np.concatenate([values, np.zeros((50, 1)), np.full((20, 1), NAN)])
    assert sign_flip_test(values, seed=3) == sign_flip_test(padded, seed=3) == sign_flip_test(-values, seed=3)
    assert sign_flip_test(values, seed=3) != sign_flip_test(values, seed=4)


def test_sign_flips_do_not_depend_on_the_scale():
    """Differences a thousandth as large have the same p: a tolerance for rounding must not grow past them."""
    values = np.random.default_rng(2).normal(0.002, 0.1, (3000, 1))
    p = sign_flip_test(values)[0]
    assert 0.05 < p < 0.95 and sign_flip_test(values * 1e-3)[0] == pytest.approx(p, abs=0.01)


def test_compare_is_antisymmetric_and_paired():
    generator = np.random.default_rng(2)
    hard = generator.random(60)
    mine = {"f1": np.clip(hard + 0.05, 0, 1), "em": np.round(hard), "mrr": hard}
    other = {"f1": hard, "em": np.round(generator.random(60)), "recall@1": hard}
    forth, back = compare(mine, other, "b"), compare(other, mine, "a")
    assert [(line["metric"], line["system"]) for line in forth] == [("em", "b"), ("f1", "b")]
    for line, mirror in zip(forth, back, strict=True):
        assert line["difference"] == pytest.approx(-mirror["difference"], abs=1e-15)
        assert (line["low"], line["high"]) == pytest.approx((-mirror["high"], -mirror["low"]), abs=1e-12)
        assert (line["p_value"], line["n"]) == (mirror["p_value"], mirror["n"])
        assert line["low"] <= line["difference"] <= line["high"]
    assert forth[1]["low"] > 0 and forth[1]["p_value"] < 0.001  # small, but on every question: a sure difference
    for line in compare(mine, mine, "mine"):
        assert (line["difference"], line["low"], line["high"], line["p_value"]) == (0, 0, 0, 1)


def test_compare_leaves_out_what_one_of_both_lacks():
    mine, other = {"f1": np.array([1.0, NAN, 0.5])}, {"f1": np.array([0.0, 0.2, NAN])}
    (line,) = compare(mine, other, "other")
    assert (line["difference"], line["n"], line["low"], line["high"]) == (1.0, 1, 1.0, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compare({"f1": np.array([1.0, NAN])}, {"f1": np.array([NAN, 1.0])}, "other") == []
    assert compare({"f1": np.ones(2)}, {"em": np.ones(2)}, "other") == []


def test_quantiles():
    times = [{"query": float(value), "total": 2.0 * value} for value in range(1, 101)]
    found = {name: (values["p50"], values["p95"]) for name, values in quantiles(times).items()}
    assert found == {"query": pytest.approx((50.5, 95.05)), "total": pytest.approx((101.0, 190.1))}
    assert quantiles(times[:1])["query"] == {"p50": 1.0, "p95": 1.0} and quantiles([]) is None

"""Predictions -> metrics with intervals, and paired comparisons of systems.

The metrics are those of `recipes/spaces/metrics/`; here they become means over questions with their uncertainty.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from recipes.evaluation.tasks import Task
from recipes.spaces.metrics.rag_answer.rag_answer import MEASURES, score_answer
from recipes.spaces.metrics.retrieval.retrieval import score_ranking

CUTOFFS = (1, 3, 5, 10)
COMPARED = ("em", "f1", "containment", "recall@1", "recall@5", "mrr")
CONFIDENCE = 0.95
RESAMPLES, FLIPS = 2000, 10_000
BLOCK = 2**24  # random numbers drawn at a time

Scores = dict[str, np.ndarray]


def score_questions(tasks: Sequence[Task], rows: Sequence[Mapping], *, with_retrieval: bool) -> Scores:
    """Every metric of every question; one that failed or was abstained from scores 0.

    A question without gold answers has, instead of answer metrics, `abstention`: 1 if the system abstained. One
    without known gold documents has no retrieval metrics.

    `rows` are those of predictions.jsonl, in the order of the tasks. The result is metric -> (questions,) float64, NaN
    for a question to which it does not apply; a metric that applies to none is left out.
    """
    scores = defaultdict(lambda: np.full(len(tasks), np.nan))
    for index, (task, row) in enumerate(zip(tasks, rows, strict=True)):
        found = {}
        if task.question.answers:
            found = dict.fromkeys(MEASURES, 0.0)
            if row["prediction"]:
                found = score_answer(row["prediction"], task.question.answers)
        elif task.question.asks_answer:
            found = {"abstention": float(row["abstained"])}
        if with_retrieval and task.gold:
            found |= score_ranking(row["retrieved"], task.gold, CUTOFFS)
        for name, value in found.items():
            scores[name][index] = value
    order = dict.fromkeys((*MEASURES, "abstention", *scores))
    return {name: scores[name] for name in order if name in scores}


def bootstrap_means(values: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """Means of columns over resampled rows.

    `scipy.stats.bootstrap` takes one column; drawing the same rows for all keeps them comparable and is faster.
    `values` is (questions, columns) float64, in which NaN does not count; the result (resamples, columns) float64, NaN
    if a draw has no value.
    """
    generator, n = np.random.default_rng(seed), len(values)
    present = ~np.isnan(values)
    both = np.concatenate([np.where(present, values, 0.0), present], axis=1)
    step, means = max(1, BLOCK // n), []
    for start in range(0, resamples, step):
        draws = generator.integers(0, n, (min(step, resamples - start), n), dtype=np.int32)
        counts = np.stack([np.bincount(draw, minlength=n) for draw in draws])
        sums, sizes = np.split(counts @ both, 2, axis=1)
        with np.errstate(invalid="ignore"):
            means.append(sums / sizes)
    return np.concatenate(means)


def with_intervals(scores: Scores, *, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, dict]:
    """metric -> `{value, low, high, n}`: mean, percentile bootstrap interval (95 %) and number of questions.

    >>> with_intervals({"em": np.array([1.0, 1.0])})
    {'em': {'value': 1.0, 'low': 1.0, 'high': 1.0, 'n': 2}}
    """
    if not scores:
        return {}
    means = bootstrap_means(np.stack(list(scores.values()), axis=1), seed=seed, resamples=resamples)
    tail = 100 * (1 - CONFIDENCE) / 2
    lows, highs = np.nanpercentile(means, [tail, 100 - tail], axis=0)
    return {
        name: {
            "value": float(np.nanmean(values)),
            "low": float(low),
            "high": float(high),
            "n": int((~np.isnan(values)).sum()),
        }
        for (name, values), low, high in zip(scores.items(), lows, highs, strict=True)
    }


def sign_flip_test(differences: np.ndarray, *, seed: int = 0, flips: int = FLIPS) -> np.ndarray:
    """Two-sided p-values of the means of paired differences under random signs (Fisher's randomisation test).

    `differences` is (questions, columns) float64, in which NaN counts as no difference; the result (columns,) float64.
    All columns share the signs. The observed ones count as a draw, so the smallest value is 1 / (flips + 1).
    """
    differences = np.nan_to_num(differences)
    differences = differences[differences.any(axis=1)].astype(np.float32)
    generator, n = np.random.default_rng(seed), len(differences)
    observed, extreme = np.abs(differences.sum(axis=0)), np.zeros(differences.shape[1])
    step = max(1, BLOCK // max(1, n))
    for start in range(0, flips, step):
        rows = min(step, flips - start)
        bits = np.unpackbits(np.frombuffer(generator.bytes((rows * n + 7) // 8), np.uint8), count=rows * n)
        sums = 2 * (bits.reshape(rows, n).astype(np.float32) @ differences) - differences.sum(axis=0)
        extreme += (np.abs(sums) >= observed - 1e-6 * np.abs(differences).sum(axis=0)).sum(axis=0)
    return (extreme + 1) / (flips + 1)


def compare(mine: Scores, other: Scores, name: str, *, seed: int = 0, resamples: int = RESAMPLES) -> list[dict]:
    """This system minus the other one, called `name`, on the same questions in the same order, of every shared metric.

    Rows `{system, metric, difference, low, high, p_value, n}`.
    """
    shared = {metric: mine[metric] - other[metric] for metric in COMPARED if metric in mine and metric in other}
    differences = {metric: values for metric, values in shared.items() if not np.isnan(values).all()}
    if not differences:
        return []
    found = with_intervals(differences, seed=seed, resamples=resamples)
    p_values = sign_flip_test(np.stack(list(differences.values()), axis=1), seed=seed)
    return [
        {
            "system": name,
            "metric": metric,
            "difference": mean["value"],
            "low": mean["low"],
            "high": mean["high"],
            "p_value": float(p_value),
            "n": mean["n"],
        }
        for (metric, mean), p_value in zip(found.items(), p_values, strict=True)
    ]


def quantiles(times: Sequence[Mapping[str, float]]) -> dict[str, dict] | None:
    """name -> `{p50, p95}` of times a question; None if none was timed."""
    if not times:
        return None
    columns = {name: [row[name] for row in times] for name in times[0]}
    return {
        name: {"p50": float(np.percentile(values, 50)), "p95": float(np.percentile(values, 95))}
        for name, values in columns.items()
    }

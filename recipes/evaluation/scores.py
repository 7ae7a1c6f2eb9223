"""Predictions -> metrics with intervals, and paired comparisons of systems.

Stands between predictions.jsonl and results.json. The metrics are those of `metrics/`; here they become means over
questions with their uncertainty. It knows nothing of models.
"""

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
    """Every metric of every question.

    A question that failed or was abstained from scores 0. A question without gold answers has no answer metrics and
    instead `abstention`: 1 where the system abstained. A question without known gold documents has no retrieval
    metrics.

    Args:
        tasks: of the run.
        rows: of predictions.jsonl, in the order of the tasks.
        with_retrieval: whether the system ranks documents.

    Returns:
        metric -> (questions,) float64, NaN where it does not apply; a metric that applies to none is left out.
    """
    scores = {name: np.full(len(tasks), np.nan) for name in (*MEASURES, "abstention")}
    for index, (task, row) in enumerate(zip(tasks, rows, strict=True)):
        if not task.question.answers:
            if task.question.asks_answer:
                scores["abstention"][index] = float(row["abstained"])
        else:
            found = score_answer(row["prediction"], task.question.answers) if row["prediction"] else {}
            for name in MEASURES:
                scores[name][index] = found.get(name, 0.0)
        if with_retrieval and task.gold:
            for name, value in score_ranking(row["retrieved"], task.gold, CUTOFFS).items():
                if name not in scores:
                    scores[name] = np.full(len(tasks), np.nan)
                scores[name][index] = value
    return {name: values for name, values in scores.items() if not np.isnan(values).all()}


def bootstrap_means(values: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """Means of columns over resampled rows: the same rows are drawn for all columns.

    `scipy.stats.bootstrap` does the same a column at a time; drawing once keeps the columns comparable and takes a
    fraction of the time.

    Args:
        values: (questions, columns) float64; NaN does not count.
        seed: of the draws.
        resamples: number of draws.

    Returns:
        (resamples, columns) float64, NaN where a draw has no value.
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
    names = list(scores)
    if not names:
        return {}
    table = np.stack([scores[name] for name in names], axis=1)
    low, high = _interval(bootstrap_means(table, seed=seed, resamples=resamples))
    return {
        name: {
            "value": float(np.nanmean(table[:, column])),
            "low": float(low[column]),
            "high": float(high[column]),
            "n": int((~np.isnan(table[:, column])).sum()),
        }
        for column, name in enumerate(names)
    }


def _interval(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tail = 100 * (1 - CONFIDENCE) / 2
    return tuple(np.nanpercentile(means, [tail, 100 - tail], axis=0))


def sign_flip_test(differences: np.ndarray, *, seed: int = 0, flips: int = FLIPS) -> np.ndarray:
    """Two-sided p-values of the means of paired differences under random signs (Fisher's randomisation test).

    The observed signs count as one of the draws, so the smallest value is 1 / (flips + 1).

    Args:
        differences: (questions, columns) float64; NaN counts as no difference.
        seed: of the signs, which all columns share.
        flips: number of draws.

    Returns:
        (columns,) float64.
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


def compare(
    mine: Scores, other: Scores, name: str, *, seed: int = 0, resamples: int = RESAMPLES, flips: int = FLIPS
) -> list[dict]:
    """This system minus another one on the same questions.

    Args:
        mine: scores of this system.
        other: of the other one, over the same questions in the same order.
        name: of the other one.
        seed: of draws and signs.
        resamples: of the bootstrap.
        flips: of the test.

    Returns:
        For each metric that both have: `{system, metric, difference, low, high, p_value, n}`.
    """
    shared = [metric for metric in COMPARED if metric in mine and metric in other]
    metrics = [metric for metric in shared if not np.isnan(mine[metric] - other[metric]).all()]
    if not metrics:
        return []
    table = np.stack([mine[metric] - other[metric] for metric in metrics], axis=1)
    low, high = _interval(bootstrap_means(table, seed=seed, resamples=resamples))
    p_values = sign_flip_test(table, seed=seed, flips=flips)
    rows = []
    for column, metric in enumerate(metrics):
        differences = table[:, column][~np.isnan(table[:, column])]
        rows.append(
            {
                "system": name,
                "metric": metric,
                "difference": float(differences.mean()),
                "low": float(low[column]),
                "high": float(high[column]),
                "p_value": float(p_values[column]),
                "n": len(differences),
            }
        )
    return rows


def quantiles(times: Sequence[Mapping[str, float]]) -> dict[str, dict] | None:
    """name -> `{p50, p95}` of times a question; None where none was timed."""
    if not times:
        return None
    return {
        name: {"p50": float(np.percentile(values, 50)), "p95": float(np.percentile(values, 95))}
        for name in times[0]
        for values in [[row[name] for row in times]]
    }

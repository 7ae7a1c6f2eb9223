"""Metrics of a step against loops in plain Python, and sums that any grouping of rows leaves the same.

Scores are drawn from few values, so that ties are common; missing candidates score -inf.
"""

import doctest
import math
import random
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator

from recipes.training import training_metrics
from recipes.training.training_metrics import MetricSums, exact_matches, ranking_metrics

INF = float("inf")
NAMES = ["recall@1", "recall@3", "recall@5", "mrr", "margin"]


def random_rows(seed: int, rows: int = 30, candidates: int = 7) -> tuple[list[list[float]], list[list[bool]]]:
    """Scores with ties and missing candidates; none to several gold documents a row, always among the real ones."""
    draw = random.Random(seed)
    scores, gold = [], []
    for _ in range(rows):
        real = draw.randint(1, candidates)
        scores.append([draw.choice([-0.5, 0.0, 0.25, 0.75]) for _ in range(real)] + [-INF] * (candidates - real))
        gold.append([draw.random() < 0.3 for _ in range(real)] + [False] * (candidates - real))
    return scores, gold


def expected_metrics(scores: list[list[float]], gold: list[list[bool]]) -> dict[str, float]:
    """The mean over all rows that have the metric."""
    found = {name: [] for name in NAMES}
    for row, marks in zip(scores, gold, strict=True):
        golds = [i for i, mark in enumerate(marks) if mark]
        others = [i for i, mark in enumerate(marks) if not mark]
        if not golds:
            continue
        # the place of a gold document after all that score better, and after the others that score the same
        places = [
            1 + sum(row[j] > row[i] for j in range(len(row))) + sum(row[j] == row[i] for j in others) for i in golds
        ]
        for k in (1, 3, 5):
            found[f"recall@{k}"].append(sum(place <= k for place in places) / len(golds))
        found["mrr"].append(1 / min(places))
        margin = max(row[i] for i in golds) - max((row[i] for i in others), default=-INF)
        if math.isfinite(margin):
            found["margin"].append(margin)
    return {name: sum(values) / max(1, len(values)) for name, values in found.items()}


def reduce(sums: MetricSums) -> dict[str, float]:
    return sums.reduce(Accelerator())


def test_docstring_examples():
    assert doctest.testmod(training_metrics, extraglobs={"torch": torch}).failed == 0


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("n_cuts", [0, 1, 5, 29])
def test_any_grouping_of_the_rows_gives_the_means_of_a_loop(seed, n_cuts):
    scores, gold = random_rows(seed)
    sums = MetricSums()
    for start, end in pairwise([0, *sorted(random.Random(seed).sample(range(1, 30), n_cuts)), 30]):
        for metric in ranking_metrics(torch.tensor(scores[start:end]), torch.tensor(gold[start:end])):
            sums.add(*metric)
    assert reduce(sums) == pytest.approx(expected_metrics(scores, gold), abs=1e-6)


@pytest.mark.parametrize(
    "scores, gold, expected",
    [
        ([0.9, 0.5, 0.1], [1, 0, 0], [1, 1, 1, 1, 0.4]),
        ([0.9, 0.5, 0.1], [0, 1, 0], [0, 1, 1, 1 / 2, -0.4]),
        ([0.5, 0.5, 0.1], [1, 0, 0], [0, 1, 1, 1 / 2, 0.0]),  # a tie counts against gold
        ([0.5, 0.5, 0.1], [1, 1, 0], [1, 1, 1, 1, 0.4]),  # but not one between gold documents
        ([0.9, 0.5, 0.4, 0.3], [1, 0, 0, 1], [1 / 2, 1 / 2, 1, 1, 0.4]),
        ([0.2, -INF], [1, 0], [1, 1, 1, 1, None]),  # nothing to lead
        ([0.2, 0.1], [1, 1], [1 / 2, 1, 1, 1, None]),
        ([0.2, 0.1], [0, 0], [None] * 5),
    ],
)
def test_ranking_metrics_written_out(scores, gold, expected):
    """As `(total, count)`; rows without a metric count nowhere. Scores of low precision are compared as they are."""
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        found = ranking_metrics(torch.tensor([scores], dtype=dtype), torch.tensor([gold], dtype=torch.bool))
        assert [name for name, *_ in found] == NAMES and {total.dtype for _, total, _ in found} == {torch.float32}
        assert [int(count) for *_, count in found] == [value is not None for value in expected]
        assert [float(total) for _, total, _ in found] == pytest.approx([value or 0 for value in expected], abs=bound)


def test_sums_are_kept_in_float64_and_without_a_graph():
    sums = MetricSums()
    weight = torch.tensor(1.0, requires_grad=True)
    for value in [2.0**24, *[1.0] * 64]:  # float32 would lose every one of the 64
        sums.add("a", weight * value, 1)
        sums.add("b", value, 0)
    assert not any(pair.requires_grad for pair in sums.sums.values())
    assert reduce(sums) == {"a": (2**24 + 64) / 65, "b": 2.0**24 + 64}


def test_nothing_counted_is_a_plain_sum_and_nothing_added_is_nothing():
    sums = MetricSums()
    assert reduce(sums) == {}
    sums.add("tokens", 3, 0)
    sums.add("tokens", torch.tensor(4), 0)
    sums.add("mean", torch.tensor(0.0), torch.tensor(0))
    assert reduce(sums) == {"tokens": 7.0, "mean": 0.0}


@pytest.mark.parametrize("seed", range(10))
def test_exact_matches_are_prompts_with_every_target_right(seed):
    draw = random.Random(seed)
    labels = [[draw.randrange(3) if draw.random() < 0.4 else -100 for _ in range(8)] for _ in range(6)]
    labels[0] = [1] + [-100] * 7  # a target that nothing predicts
    guesses, right, n_asked = [], 0, 0
    for row in labels:
        targets = [label for label in row[1:] if label != -100]
        guessed = [label if draw.random() < 0.8 else (label + 1) % 3 for label in targets]
        guesses += guessed
        right, n_asked = right + (bool(targets) and targets == guessed), n_asked + bool(targets)
    found, count = exact_matches(torch.eye(3)[guesses], torch.tensor(labels))
    assert (int(found), count) == (right, n_asked)

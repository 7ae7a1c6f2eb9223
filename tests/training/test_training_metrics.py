"""Metrics of a step against loops in plain Python, and sums that any grouping of rows leaves the same.

Scores are drawn from few values, so that ties are common; missing candidates score -inf.
"""

import doctest
import math
import random

import pytest
import torch
from accelerate import Accelerator

from recipes.training import training_metrics
from recipes.training.training_metrics import MetricSums, exact_matches, ranking_metrics

INF = float("inf")


def random_rows(seed: int, rows: int = 12, candidates: int = 7) -> tuple[list[list[float]], list[list[bool]]]:
    """Scores with ties and missing candidates; none to several gold documents a row, always among the real ones."""
    draw = random.Random(seed)
    scores, gold = [], []
    for _ in range(rows):
        real = draw.randint(1, candidates)
        scores.append([draw.choice([-0.5, 0.0, 0.25, 0.75]) for _ in range(real)] + [-INF] * (candidates - real))
        gold.append([draw.random() < 0.3 for _ in range(real)] + [False] * (candidates - real))
    return scores, gold


def expected_metrics(scores: list[list[float]], gold: list[list[bool]]) -> dict[str, list[float]]:
    """name -> value of every row that has it."""
    found = {name: [] for name in ("recall@1", "recall@3", "recall@5", "mrr", "margin")}
    for row, marks in zip(scores, gold, strict=True):
        golds = [i for i, mark in enumerate(marks) if mark]
        others = [i for i, mark in enumerate(marks) if not mark]
        if not golds:
            continue
        # the place of a gold document behind all that score better, and behind the others that score the same
        places = [
            1 + sum(row[j] > row[i] for j in range(len(row))) + sum(row[j] == row[i] for j in others) for i in golds
        ]
        for k in (1, 3, 5):
            found[f"recall@{k}"].append(sum(place <= k for place in places) / len(golds))
        found["mrr"].append(1 / min(places))
        margin = max(row[i] for i in golds) - max((row[i] for i in others), default=-INF)
        if math.isfinite(margin):
            found["margin"].append(margin)
    return found


def reduce(sums: MetricSums) -> dict[str, float]:
    return sums.reduce(Accelerator())


@pytest.mark.parametrize("seed", range(20))
def test_ranking_metrics_are_those_of_a_loop(seed):
    scores, gold = random_rows(seed)
    expected = expected_metrics(scores, gold)
    found = {name: (total, count) for name, total, count in ranking_metrics(torch.tensor(scores), torch.tensor(gold))}
    assert list(found) == list(expected)
    for name, values in expected.items():
        total, count = found[name]
        assert int(count) == len(values)
        assert float(total) == pytest.approx(sum(values), abs=1e-5), name


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
    ],
)
def test_ranking_metrics_written_out(scores, gold, expected):
    sums = MetricSums()
    for metric in ranking_metrics(torch.tensor([scores]), torch.tensor([gold], dtype=torch.bool)):
        sums.add(*metric)
    found = reduce(sums)
    names = ["recall@1", "recall@3", "recall@5", "mrr", "margin"]
    # without any row a metric is left at its total, which is 0
    assert found == pytest.approx({n: 0.0 if v is None else v for n, v in zip(names, expected, strict=True)}, abs=1e-6)


def test_rows_without_gold_count_nowhere():
    found = ranking_metrics(torch.rand(3, 4), torch.zeros(3, 4, dtype=torch.bool))
    assert [(float(total), int(count)) for _, total, count in found] == [(0.0, 0)] * 5


def test_low_precision_scores_are_compared_as_they_are():
    scores = torch.tensor([[0.5, 0.25, -INF]], dtype=torch.bfloat16)
    for name, total, _ in ranking_metrics(scores, torch.tensor([[True, False, False]])):
        assert total.dtype == torch.float32 and float(total) == (0.25 if name == "margin" else 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_any_grouping_of_the_rows_gives_the_same_means(seed):
    scores, gold = random_rows(seed, rows=30)
    expected = {name: sum(values) / len(values) for name, values in expected_metrics(scores, gold).items()}
    for n_cuts in (0, 1, 5, 29):
        cuts = [0, *sorted(random.Random(seed).sample(range(1, 30), n_cuts)), 30]
        sums = MetricSums()
        for start, end in zip(cuts, cuts[1:], strict=False):
            for metric in ranking_metrics(torch.tensor(scores[start:end]), torch.tensor(gold[start:end])):
                sums.add(*metric)
        assert reduce(sums) == pytest.approx(expected, abs=1e-6)


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
    rows, length, vocabulary = 6, 8, 3
    labels = [
        [draw.randrange(vocabulary) if draw.random() < 0.4 else -100 for _ in range(length)] for _ in range(rows)
    ]
    labels[0] = [1] + [-100] * (length - 1)  # a target that nothing predicts
    logits, right, with_targets = [], 0, 0
    for row in labels:
        hits = []
        for label in row[1:]:
            if label != -100:
                guess = label if draw.random() < 0.8 else (label + 1) % vocabulary
                logits.append([float(guess == token) for token in range(vocabulary)])
                hits.append(guess == label)
        right, with_targets = right + (bool(hits) and all(hits)), with_targets + bool(hits)
    found, count = exact_matches(torch.tensor(logits), torch.tensor(labels))
    assert (int(found), count) == (right, with_targets)


def test_docstring_examples():
    assert doctest.testmod(training_metrics, extraglobs={"torch": torch}).failed == 0

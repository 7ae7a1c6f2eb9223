"""Scores of questions that can and cannot be answered -> a threshold, and what it refuses and loses.

Pure functions; `calibrate.py` measures the scores.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

LOSSES = (0.01, 0.02, 0.05, 0.1, 0.2)
DIGITS = 4  # of a threshold, rounded down


def threshold_at(answerable: Sequence[float], max_loss: float) -> float:
    """The largest score that at most a share `max_loss` of the answerable questions stays below.

    >>> threshold_at([0.9, 0.2, 0.5, 0.7], 0.25)
    0.5
    """
    ordered = sorted(answerable)
    return float(ordered[min(int(max_loss * len(ordered) + 1e-9), len(ordered) - 1)])


def share_below(scores: Sequence[float], threshold: float) -> float:
    """Share of scores below a threshold: of questions that are refused."""
    return float(np.mean(np.asarray(scores) < threshold))


def area_under_curve(answerable: Sequence[float], unanswerable: Sequence[float]) -> float:
    """How often an answerable question scores higher than an unanswerable one; ties count half. 0.5 is chance.

    >>> area_under_curve([0.9, 0.5], [0.5, 0.1])
    0.875
    """
    first, second = np.asarray(answerable)[:, None], np.asarray(unanswerable)[None]
    return float(np.mean((first > second) + 0.5 * (first == second)))


def trade_off(
    answerable: Sequence[float], unanswerable: Mapping[str, Sequence[float]], losses: Sequence[float] = LOSSES
) -> list[dict]:
    """`{max_loss, threshold, lost, refused: {kind: share}}` for each share of answerable questions that may be lost.

    A score is that of a question's best source; those of questions that cannot be answered come by kind.
    """
    rows = []
    for loss in losses:
        threshold = math.floor(threshold_at(answerable, loss) * 10**DIGITS) / 10**DIGITS
        refused = {kind: share_below(scores, threshold) for kind, scores in unanswerable.items()}
        lost = share_below(answerable, threshold)
        rows.append({"max_loss": loss, "threshold": threshold, "lost": lost, "refused": refused})
    return rows


def signals(sources: Sequence[Sequence[tuple[float, float]]], overlap_weight: float) -> dict[str, list[float]]:
    """Two scores a question out of (cosine, `word_overlap`) of each source that would be read.

    `cosine` is the largest, `with words` the largest sum of cosine and weighted overlap, which a model's `min_score`
    and `overlap_weight` compare.

    >>> signals([[(0.5, 0.0), (0.4, 1.0)]], 0.2)
    {'cosine': [0.5], 'with words': [0.6000000000000001]}
    """
    weights = {"cosine": 0.0, "with words": overlap_weight}
    return {
        name: [max(cosine + weight * overlap for cosine, overlap in row) for row in sources]
        for name, weight in weights.items()
    }

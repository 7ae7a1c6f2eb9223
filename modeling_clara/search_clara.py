"""Exact cosine over a shortlist, or over everything: the second level of search.

Stands between a snapshot with its index and the corpus. Rows go in and come out; it knows nothing of text.
"""

from collections.abc import Callable

import numpy as np
import torch

from .retrieval_clara import flatten_memory
from .snapshot_clara import Snapshot

SCAN_SCORES = 32 * 2**20  # scores of questions x rows that are held at a time
QUERY_BLOCK = 32  # questions whose shortlists are decoded together
ROW_BLOCK = 64  # rows that are decoded and compared at a time
ROUNDING = 1e-6  # of a cosine in float32
SMALL = 1024  # rows up to which all are compared exactly

Ranked = list[list[tuple[int, float]]]  # for each question (row, cosine), best first, one row a document


def rank_documents(
    snapshot: Snapshot,
    query_memory: torch.Tensor,
    top_k: int,
    find: Callable[[torch.Tensor, int, np.ndarray | None], np.ndarray],
    *,
    shortlist: int,
    allowed: np.ndarray | None = None,
) -> Ranked:
    """The best documents of every question, each by its best span.

    Args:
        snapshot: that is searched.
        query_memory: (questions, k, H) float32 on the CPU.
        top_k: documents a question.
        find: `(query_memory, n, allowed) -> (questions, n) rows`, as `VectorIndex.shortlist` or `scan`.
        shortlist: rows a question that are compared exactly.
        allowed: (rows,) bool; None for all.
    """
    candidates = None if allowed is None else np.flatnonzero(allowed)
    n_allowed = snapshot.n_rows if candidates is None else len(candidates)
    if not n_allowed:
        return [[] for _ in query_memory]
    ranked: Ranked = [[] for _ in query_memory]
    open_questions, n = np.arange(len(query_memory)), max(shortlist, top_k)
    n_documents = None
    while len(open_questions):
        questions = query_memory[torch.from_numpy(open_questions)]
        if n_allowed <= max(n, SMALL):
            n = n_allowed
            all_rows = np.arange(n_allowed) if candidates is None else candidates
            rows = np.broadcast_to(all_rows, (len(questions), n_allowed))
        else:
            rows = find(questions, n, allowed)
        for question, hits in zip(open_questions, exact_cosines(snapshot, questions, rows), strict=True):
            ranked[question] = hits[:top_k]
        open_questions = np.array([q for q in open_questions if len(ranked[q]) < top_k], dtype=np.int64)
        if n >= n_allowed:
            break
        if len(open_questions) and n_documents is None:  # long documents may fill a shortlist with their spans
            everything = np.arange(snapshot.n_rows) if candidates is None else candidates
            n_documents = len(np.unique(everything - snapshot.spans[everything]))
            open_questions = np.array(
                [q for q in open_questions if len(ranked[q]) < min(top_k, n_documents)], dtype=np.int64
            )
        n = min(4 * n, n_allowed)
    return ranked


def exact_cosines(snapshot: Snapshot, query_memory: torch.Tensor, rows: np.ndarray) -> Ranked:
    """Cosines of the given rows (eq. 3.1), the best row of every document, best first; ties go to the lower row.

    Args:
        snapshot: that holds the rows.
        query_memory: (questions, k, H) float32 on the CPU.
        rows: (questions, n) int64, -1 where there is none.
    """
    k = query_memory.shape[1]
    queries = flatten_memory(query_memory, k)
    ranked = []
    for start in range(0, len(rows), QUERY_BLOCK):
        mine = [np.unique(row[row >= 0]) for row in rows[start : start + QUERY_BLOCK]]
        needed = np.unique(np.concatenate(mine))
        scores = np.empty((len(mine), len(needed)), np.float32)
        for first in range(0, len(needed), ROW_BLOCK):
            vectors = snapshot.decode(needed[first : first + ROW_BLOCK], k).flatten(1)
            products = queries[start : start + QUERY_BLOCK] @ vectors.T
            norms = torch.linalg.vector_norm(vectors, dim=-1).clamp_min(1e-12)
            scores[:, first : first + ROW_BLOCK] = (products / norms).numpy()
        for row, row_scores in zip(mine, scores, strict=True):
            ranked.append(_best_spans(snapshot, k, row, row_scores[np.searchsorted(needed, row)]))
    return ranked


def _best_spans(snapshot: Snapshot, memory_size: int, rows: np.ndarray, scores: np.ndarray) -> list[tuple[int, float]]:
    order = np.lexsort((rows, -scores))
    # A matrix product may round equal rows differently, by their place in it: memories that are equal shall tie.
    for close in np.flatnonzero(-np.diff(scores[order]) < ROUNDING):
        first, second = order[close], order[close + 1]
        pair = snapshot.decode(rows[[first, second]], memory_size)
        if torch.equal(pair[0], pair[1]):
            scores[second] = scores[first]
    order = np.lexsort((rows, -scores))
    documents = (rows - snapshot.spans[rows])[order]
    _, first = np.unique(documents, return_index=True)
    best = order[np.sort(first)]
    return [(int(row), float(score)) for row, score in zip(rows[best], scores[best], strict=True)]


def best_rows(scores: np.ndarray, n: int) -> np.ndarray:
    """(min(n, rows),) rows with the largest scores, in no particular order; of ties at the end the lowest rows."""
    if n >= len(scores):
        return np.arange(len(scores))
    last = np.partition(scores, len(scores) - n)[len(scores) - n]
    if np.isneginf(last):
        return np.argpartition(-scores, n - 1)[:n]
    better = np.flatnonzero(scores > last + ROUNDING)
    tied = np.flatnonzero((scores <= last + ROUNDING) & (scores >= last - ROUNDING))
    return np.concatenate([better, tied[: n - len(better)]])


def scan(snapshot: Snapshot, query_memory: torch.Tensor, n: int, allowed: np.ndarray | None) -> np.ndarray:
    """(questions, n) rows with the largest cosine over all rows: the exact search that the index is measured by."""
    k, n = query_memory.shape[1], min(n, snapshot.n_rows)
    queries = flatten_memory(query_memory, k)
    found, step = [], max(1, SCAN_SCORES // max(1, snapshot.n_rows))
    for start in range(0, len(queries), step):
        block = queries[start : start + step]
        scores = np.empty((len(block), snapshot.n_rows), np.float32)
        for first, memory in snapshot.blocks(k):
            scores[:, first : first + len(memory)] = (block @ flatten_memory(memory, k).T).numpy()
        if allowed is not None:
            scores[:, ~allowed] = -np.inf
        best = np.stack([best_rows(row, n) for row in scores])
        found.append(np.where(np.isneginf(np.take_along_axis(scores, best, 1)), -1, best))
    return np.concatenate(found)

"""Finds rows of a snapshot by their memories: an index gives a shortlist, the exact cosine ranks it.

A projected vector is the memory's retrieval vector on its main directions (truncated SVD of a sample). The vectors
are not centred: all memories share most of their direction, and so do questions, so the inner product with what is
left out would otherwise decide the order (docs/experiments.md has the figures).
"""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from .retrieval_clara import flatten_memory
from .snapshot_clara import Snapshot
from .storage_clara import replacing

try:
    import faiss
except ImportError:  # `VectorIndex` names the remedy
    faiss = None

logger = logging.getLogger(__name__)

INDEX_DIMENSIONS = 128
SAMPLE_ROWS = 4096
SAMPLE_BYTES = 256 * 2**20
KINDS = ("flat", "hnsw", "ivf")
# Rows up to which a kind is taken. Measured with 128 dimensions on one core: flat 0.025 us a row; at 300,000 rows HNSW
# 0.9 ms and 400 bytes a row, IVF 1.6 ms and 140 bytes.
KIND_LIMITS = {"flat": 50_000, "hnsw": 200_000}
HNSW_LINKS, HNSW_EF_CONSTRUCTION, HNSW_EF_SEARCH = 32, 80, 400
PROBED_SHARE = 8  # one list of IVF in 8 is searched
SCAN_SCORES = 32 * 2**20  # scores of questions x rows that are held at a time
QUERY_BLOCK = 32  # questions whose shortlists are decoded together
ROW_BLOCK = 64  # rows that are decoded and compared at a time
ROUNDING = 1e-6  # of a cosine in float32
SMALL = 1024  # rows up to which all are compared exactly
FILTERED_SHARE = 0.3  # below this share of rows that a filter leaves, HNSW's graph misses too much


Ranked = list[list[tuple[int, float]]]  # for each question (row, cosine), best first, one row a document


def choose_kind(n_rows: int) -> str:
    """The kind of index for so many rows."""
    return next((kind for kind, limit in KIND_LIMITS.items() if n_rows <= limit), "ivf")


class VectorIndex:
    """Projected vectors of a snapshot, compared by inner product.

    The first segment is in FAISS, later ones beside it.

    Args:
        snapshot: whose rows are found.
        memory_size: k that is compared.
        kind: one of `KINDS`; default by size.
        progress: called with a number of rows while the index is built.
        previous: an index of an earlier snapshot, whose parts are used again.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        memory_size: int,
        kind: str | None = None,
        *,
        progress: Callable[[int], None],
        previous: "VectorIndex | None" = None,
    ):
        if faiss is None:
            raise ImportError(
                "searching a corpus of this size needs FAISS: pip install faiss-cpu, or the extra `corpus` from a "
                "clone of the repository."
            )
        if kind is not None and kind not in KINDS:
            raise ValueError(f"`index` must be one of {', '.join(KINDS)}, got {kind!r}. Leave it out for the default.")
        self.memory_size = memory_size
        base = snapshot.segments[0]
        self.kind = kind or choose_kind(base.n_rows)
        self.folder = snapshot.index_folder / f"k{memory_size}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.n_base, self.base_key = base.n_rows, base.key
        self.tails: dict[str, np.ndarray] = {}  # projected vectors of the later segments, by key
        if previous is not None and (previous.base_key, previous.kind) == (self.base_key, self.kind):
            self.components, self.index, self.tails = previous.components, previous.index, previous.tails
        else:
            self.components, self.index = self._open_base(snapshot, progress)
        self.tails = {
            segment.key: self.tails[segment.key] if segment.key in self.tails else self._tail(snapshot, number)
            for number, segment in enumerate(snapshot.segments)
            if number
        }
        self.starts = snapshot.starts

    # --- building ----------------------------------------------------------------------------------------------------

    def _open_base(self, snapshot: Snapshot, progress):
        """(components, FAISS index) of the first segment, made if they are not there."""
        projection = self.folder / f"{self.base_key}.safetensors"
        path = self.folder / f"{self.base_key}-{self.kind}.faiss"
        found = self._read_base(projection, path)
        if found is None:
            with FileLock(self.folder / "lock"):
                if (found := self._read_base(projection, path)) is None:  # else another process was faster
                    path.unlink(missing_ok=True)
                    self._build(snapshot, projection, path, progress)
                    found = self._read_base(projection, path)
        return found

    def _read_base(self, projection: Path, path: Path):
        """(components, FAISS index); None if they are not there or damaged."""
        try:
            components = load_file(projection)["components"]
            # Flat codes and inverted lists stay on disk, memory-mapped; a graph is read.
            flags = {"flat": faiss.IO_FLAG_MMAP_IFC, "hnsw": 0, "ivf": faiss.IO_FLAG_MMAP}
            index = faiss.read_index(str(path), flags[self.kind])
        except (OSError, RuntimeError, SafetensorError, KeyError) as error:
            logger.debug("the index %s is made: %s", path, error)
            return None
        return (components, index) if (index.ntotal, index.d) == (self.n_base, len(components)) else None

    def _build(self, snapshot: Snapshot, projection: Path, path: Path, progress) -> None:
        with replacing(projection) as partial:
            partial.write_bytes(save({"components": fit_components(snapshot, self.memory_size)}))
        self.components = load_file(projection)["components"]
        index = _empty_index(self.kind, self.components.shape[0], self.n_base)
        if not index.is_trained:
            n_train = min(self.n_base, max(64 * getattr(index, "nlist", 0), 20_000))
            rows = np.linspace(0, self.n_base - 1, n_train).astype(np.int64)
            # Into one array made before: small ones between large temporaries would keep the heap from shrinking.
            sample = np.empty((n_train, len(self.components)), np.float32)
            for part in np.array_split(np.arange(n_train), max(1, n_train // 256)):
                sample[part] = self.project(snapshot.decode(rows[part], self.memory_size))
            index.train(sample)
        for _, memory in snapshot.blocks(self.memory_size, [0]):
            index.add(self.project(memory))
            progress(len(memory))
        for old in self.folder.glob("*"):
            if not old.name.startswith(self.base_key) and old.name != "lock":
                old.unlink(missing_ok=True)
        with replacing(path) as partial:
            faiss.write_index(index, str(partial))

    def _tail(self, snapshot: Snapshot, number: int) -> np.ndarray:
        """(rows, d) float32 projected vectors of a later segment, kept in a file."""
        path = self.folder / f"{self.base_key}-{snapshot.segments[number].key}.npy"
        try:
            return np.load(path)
        except (OSError, ValueError, EOFError):
            blocks = snapshot.blocks(self.memory_size, [number])
            vectors = np.concatenate([self.project(memory) for _, memory in blocks])
            # another process that makes the index of a newer base removes what is not its own
            with contextlib.suppress(OSError), replacing(path) as partial, open(partial, "wb") as file:
                np.save(file, vectors)
            return vectors

    def project(self, memory: torch.Tensor) -> np.ndarray:
        """(rows, d) float32 of (rows, k, H) memories or query memories."""
        return project_memory(memory, self.memory_size, self.components)

    # --- searching ---------------------------------------------------------------------------------------------------

    def shortlist(
        self, query_memory: torch.Tensor, n: int, allowed: np.ndarray | None, where: Mapping | None = None
    ) -> np.ndarray:
        """The rows with the largest inner products.

        Args:
            query_memory: (questions, k, H) float32 on the CPU.
            n: rows a question.
            allowed: (rows,) bool, or None for all.
            where: the filter that `allowed` comes from, for engines that filter by themselves.

        Returns:
            (questions, n) int64 rows of the snapshot in no particular order, -1 if there are no more.
        """
        queries = self.project(query_memory)
        scores, rows = self._search_base(queries, n, None if allowed is None else allowed[: self.n_base])
        for start, vectors in zip(self.starts[1:], self.tails.values(), strict=False):
            tail_scores = queries @ vectors.T
            if allowed is not None:
                tail_scores[:, ~allowed[start : start + len(vectors)]] = -np.inf
            tail_rows = np.broadcast_to(np.arange(start, start + len(vectors)), tail_scores.shape)
            tail_rows = np.where(np.isneginf(tail_scores), -1, tail_rows)
            scores, rows = np.concatenate([scores, tail_scores], 1), np.concatenate([rows, tail_rows], 1)
            if scores.shape[1] > n:
                best = np.argpartition(-scores, n - 1, axis=1)[:, :n]
                scores, rows = np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)
        return rows

    def _search_base(self, queries: np.ndarray, n: int, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        n = min(n, self.n_base)
        selector, index = None, self.index
        if mask is not None and not mask.all():
            selector = faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
            if self.kind == "hnsw" and mask.mean() < FILTERED_SHARE:
                index = faiss.downcast_index(self.index.storage)
        if index is not self.index or self.kind == "flat":
            parameters = faiss.SearchParameters(sel=selector)
        elif self.kind == "hnsw":
            parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=max(HNSW_EF_SEARCH, 2 * n))
        else:
            inverted = faiss.extract_index_ivf(index)
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=max(1, inverted.nlist // PROBED_SHARE))
        scores, rows = index.search(queries, n, params=parameters)
        return np.where(rows < 0, -np.inf, scores), rows


def project_memory(memory: torch.Tensor, memory_size: int, components: torch.Tensor) -> np.ndarray:
    """(rows, d) float32: retrieval vectors of (rows, n, H) memories on (d, k * H) main directions, n >= k."""
    return (flatten_memory(memory, memory_size) @ components.T).numpy()


def fit_components(snapshot: Snapshot, memory_size: int) -> torch.Tensor:
    """(d, k * H) float32: the main directions of a sample of retrieval vectors, d <= `INDEX_DIMENSIONS`."""
    size = memory_size * snapshot.codec.hidden_size
    n_rows = snapshot.segments[0].n_rows
    n_sample = min(n_rows, SAMPLE_ROWS, max(2 * INDEX_DIMENSIONS, SAMPLE_BYTES // (4 * size)))
    rows = np.unique(np.linspace(0, n_rows - 1, n_sample).astype(np.int64))
    sample = torch.empty(len(rows), size)
    for part in np.array_split(np.arange(len(rows)), max(1, len(rows) // 256)):  # each row maps 64 KiB around it
        sample[torch.from_numpy(part)] = flatten_memory(snapshot.decode(rows[part], memory_size), memory_size)
    d = min(INDEX_DIMENSIONS, *sample.shape)
    with torch.random.fork_rng(devices=[]):  # the decomposition starts at random: always alike, and nobody else's draw
        torch.manual_seed(0)
        _, _, directions = torch.svd_lowrank(sample, q=min(d + 16, *sample.shape), niter=2)
    components = directions[:, :d].T.contiguous()
    largest = components.abs().argmax(-1, keepdim=True)
    return components * components.gather(-1, largest).sign()  # a direction's sign is free: always alike


def _empty_index(kind: str, dimensions: int, n_rows: int):
    """An index whose codes are 8 bits a dimension."""
    n_lists = max(1, min(int(4 * n_rows**0.5), n_rows // 16))
    description = {"flat": "SQ8", "hnsw": f"HNSW{HNSW_LINKS},SQ8", "ivf": f"IVF{n_lists},SQ8"}[kind]
    index = faiss.index_factory(dimensions, description, faiss.METRIC_INNER_PRODUCT)
    if kind == "hnsw":
        index.hnsw.efConstruction = HNSW_EF_CONSTRUCTION
    elif kind == "ivf":
        index.cp.max_points_per_centroid = 64
        index.cp.min_points_per_centroid = 1  # a small corpus whose user asked for this kind
    return index


# --- exact search ----------------------------------------------------------------------------------------------------


def rank_documents(
    snapshot: Snapshot,
    query_memory: torch.Tensor,
    top_k: int,
    find: Callable[[torch.Tensor, int, np.ndarray | None], np.ndarray],
    shortlist: int,
    allowed: np.ndarray | None,
) -> Ranked:
    """The best documents of every question, each by its best chunk.

    Args:
        snapshot: that is searched.
        query_memory: (questions, k, H) float32 on the CPU.
        top_k: documents a question.
        find: `(query_memory, n, allowed) -> (questions, n) rows`, as `VectorIndex.shortlist` or `scan`.
        shortlist: rows a question that are compared exactly.
        allowed: (rows,) bool; None for all.
    """
    n_allowed = snapshot.n_rows if allowed is None else int(allowed.sum())
    ranked: Ranked = [[] for _ in query_memory]
    waiting, n, wanted = np.arange(len(query_memory)), max(shortlist, top_k), None
    while len(waiting) and n_allowed:
        questions = query_memory[torch.from_numpy(waiting)]
        if n_allowed <= max(n, SMALL):
            n = n_allowed
            rows = np.broadcast_to(_candidates(snapshot, allowed), (len(questions), n_allowed))
        else:
            rows = find(questions, n, allowed)
        for question, hits in zip(waiting, exact_cosines(snapshot, questions, rows), strict=True):
            ranked[question] = hits[:top_k]
        if n >= n_allowed:
            break
        if wanted is None and any(len(ranked[question]) < top_k for question in waiting):
            candidates = _candidates(snapshot, allowed)  # long documents may fill a shortlist with their chunks
            wanted = min(top_k, len(np.unique(candidates - snapshot.spans[candidates])))
        waiting = np.array([q for q in waiting if len(ranked[q]) < (wanted or top_k)], dtype=np.int64)
        n = min(4 * n, n_allowed)
    return ranked


def _candidates(snapshot: Snapshot, allowed: np.ndarray | None) -> np.ndarray:
    return np.arange(snapshot.n_rows) if allowed is None else np.flatnonzero(allowed)


def exact_cosines(snapshot: Snapshot, query_memory: torch.Tensor, rows: Sequence[np.ndarray]) -> Ranked:
    """Cosines of the given rows (eq. 3.1), the best row of every document, best first; ties go to the lower row.

    `query_memory` is (questions, k, H) float32 on the CPU, `rows` has (n,) int64 for each question; -1 is none.
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
            ranked.append(_best_rows(snapshot, k, row, row_scores[np.searchsorted(needed, row)]))
    return ranked


def _best_rows(snapshot: Snapshot, memory_size: int, rows: np.ndarray, scores: np.ndarray) -> list[tuple[int, float]]:
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

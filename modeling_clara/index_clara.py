"""The search index: short vectors of all memories in FAISS, which find a shortlist in the whole corpus.

Stands between a snapshot and its search. It knows nothing of documents, filters' meaning or exact scores.

A short vector is the memory's retrieval vector on its main directions (truncated SVD of a sample). The vectors are not
centred: all memories share most of their direction, and so do questions, so the inner product with what is left out
would otherwise decide the order (recipes/LOG.md has the figures).
"""

import logging
from collections.abc import Callable, Mapping
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
except ImportError:  # `require_faiss` names the remedy
    faiss = None

logger = logging.getLogger(__name__)

INDEX_DIMENSIONS = 128
SAMPLE_ROWS = 4096
SAMPLE_BYTES = 256 * 2**20
KINDS = ("flat", "hnsw", "ivf", "ivf_rabitq")
# Rows up to which a kind is taken. Measured with 128 dimensions on one core: flat 0.025 us a row; at 300,000 rows HNSW
# 0.9 ms and 400 bytes a row, IVF 1.6 ms and 140 bytes.
KIND_LIMITS = {"flat": 50_000, "hnsw": 200_000, "ivf": 5_000_000}
HNSW_LINKS, HNSW_EF_CONSTRUCTION, HNSW_EF_SEARCH = 32, 80, 400
PROBED_SHARE = 8  # one list of IVF in 8 is searched
FILTERED_SHARE = 0.3  # below this share of rows that a filter leaves, HNSW's graph misses too much


def require_faiss() -> None:
    """Raise an ImportError that names the remedy where FAISS is missing."""
    if faiss is None:
        raise ImportError(
            'searching a corpus of this size needs FAISS. Install it: pip install "clara-rag[corpus]", or pip install '
            "faiss-cpu."
        )


def choose_kind(n_rows: int) -> str:
    """The kind of index for so many rows."""
    return next((kind for kind, limit in KIND_LIMITS.items() if n_rows <= limit), "ivf_rabitq")


class VectorIndex:
    """Short vectors of a snapshot, compared by inner product. The first segment lies in FAISS, later ones beside it.

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
        progress: Callable[[int], None] | None = None,
        previous: "VectorIndex | None" = None,
    ):
        require_faiss()
        if kind is not None and kind not in KINDS:
            raise ValueError(f"`index` must be one of {', '.join(KINDS)}, got {kind!r}. Leave it out for the default.")
        self.memory_size = memory_size
        base = snapshot.segments[0]
        self.kind = kind or choose_kind(base.n_rows)
        self.folder = snapshot.index_folder / f"k{memory_size}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.n_base, self.base_key = base.n_rows, base.key
        if previous is not None and (previous.base_key, previous.kind) == (self.base_key, self.kind):
            self.components, self.index, known = previous.components, previous.index, dict(previous.tails)
        else:
            self.components, self.index = self._open_base(snapshot, progress)
            known = {}
        self.tails = [  # (key of the segment, short vectors)
            (segment.key, known[segment.key] if segment.key in known else self._tail(snapshot, number))
            for number, segment in enumerate(snapshot.segments)
            if number
        ]
        self.starts = snapshot.starts

    # --- building ----------------------------------------------------------------------------------------------------

    def _open_base(self, snapshot: Snapshot, progress):
        """(components, FAISS index) of the first segment, made where they are not there."""
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
        """(components, FAISS index); None where they are not there or damaged."""
        try:
            components, index = (
                load_file(projection)["components"],
                faiss.read_index(str(path), _read_flags(self.kind)),
            )
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
                sample[part] = self.shorten(snapshot.decode(rows[part], self.memory_size))
            index.train(sample)
        for _, memory in snapshot.blocks(self.memory_size, [0]):
            index.add(self.shorten(memory))
            if progress is not None:
                progress(len(memory))
        for old in self.folder.glob("*"):
            if not old.name.startswith(self.base_key) and old.name != "lock":
                old.unlink(missing_ok=True)
        with replacing(path) as partial:
            faiss.write_index(index, str(partial))

    def _tail(self, snapshot: Snapshot, number: int) -> np.ndarray:
        """(rows, d) float32 short vectors of a later segment, kept in a file."""
        path = self.folder / f"{self.base_key}-{snapshot.segments[number].key}.npy"
        try:
            return np.load(path)
        except (OSError, ValueError, EOFError):
            vectors = np.concatenate(
                [self.shorten(memory) for _, memory in snapshot.blocks(self.memory_size, [number])]
            )
            with replacing(path) as partial, open(partial, "wb") as file:
                np.save(file, vectors)
            return vectors

    def shorten(self, memory: torch.Tensor) -> np.ndarray:
        """(rows, d) float32 of (rows, k, H) memories or query memories."""
        return short_vectors(memory, self.memory_size, self.components)

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
            (questions, n) int64 rows of the snapshot in no particular order, -1 where there are no more.
        """
        queries = self.shorten(query_memory)
        mask = None if allowed is None else allowed[: self.n_base]
        scores, rows = self._search_base(queries, n, mask)
        for start, (_, vectors) in zip(self.starts[1:], self.tails, strict=False):
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
            bits = np.packbits(mask, bitorder="little")
            selector = faiss.IDSelectorBitmap(bits)
            if self.kind == "hnsw" and mask.mean() < FILTERED_SHARE:
                index = faiss.downcast_index(self.index.storage)
        if index is not self.index or self.kind == "flat":
            parameters = faiss.SearchParameters(sel=selector)
        elif self.kind == "hnsw":
            parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=max(HNSW_EF_SEARCH, 2 * n))
        else:
            inverted = faiss.extract_index_ivf(index)
            options = {"sel": selector, "nprobe": max(1, inverted.nlist // PROBED_SHARE)}
            if self.kind == "ivf_rabitq":
                parameters = faiss.IVFRaBitQSearchParameters(**options)
            else:
                parameters = faiss.SearchParametersIVF(**options)
        scores, rows = index.search(queries, n, params=parameters)
        return np.where(rows < 0, -np.inf, scores), rows


def short_vectors(memory: torch.Tensor, memory_size: int, components: torch.Tensor) -> np.ndarray:
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
    """An index whose codes are 8 bits a dimension, or 4 bits of RaBitQ."""
    metric = faiss.METRIC_INNER_PRODUCT
    if kind == "flat":
        return faiss.index_factory(dimensions, "SQ8", metric)
    if kind == "hnsw":
        index = faiss.index_factory(dimensions, f"HNSW{HNSW_LINKS},SQ8", metric)
        index.hnsw.efConstruction = HNSW_EF_CONSTRUCTION
        return index
    codes = "SQ8" if kind == "ivf" else "RaBitQ4"
    index = faiss.index_factory(dimensions, f"IVF{max(1, min(int(4 * n_rows**0.5), n_rows // 16))},{codes}", metric)
    index.cp.max_points_per_centroid = 64
    index.cp.min_points_per_centroid = 1  # a small corpus whose user asked for this kind
    return index


def _read_flags(kind: str) -> int:
    """Flat codes and inverted lists stay on disk, memory-mapped; a graph is read."""
    return {"flat": faiss.IO_FLAG_MMAP_IFC, "hnsw": 0}.get(kind, faiss.IO_FLAG_MMAP)

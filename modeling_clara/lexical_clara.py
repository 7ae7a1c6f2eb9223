"""BM25 over the text of a corpus, and the fusion of its order with that of the memories.

Stands beside the search index. At small sizes BM25 is the rival of retrieval by memory, and together they are better
than either. It knows nothing of memories.
"""

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock

from .search_clara import best_rows
from .snapshot_clara import Snapshot

try:
    import bm25s
except ImportError:  # `require_bm25` names the remedy
    bm25s = None

FUSION_CONSTANT = 60  # k of reciprocal rank fusion (Cormack et al. 2009)


def require_bm25() -> None:
    """Raise an ImportError that names the remedy where bm25s is missing."""
    if bm25s is None:
        raise ImportError('`hybrid` needs bm25s. Install it: pip install "clara-rag[corpus]", or pip install bm25s.')


class LexicalIndex:
    """BM25 over title and text of every row of a snapshot, made once and memory-mapped.

    Args:
        snapshot: whose rows are found.
    """

    def __init__(self, snapshot: Snapshot):
        require_bm25()
        self.key = lexical_key(snapshot)
        folder = snapshot.index_folder / f"bm25-{self.key}"
        with FileLock(snapshot.index_folder / "lock"):  # whoever builds for another snapshot removes this one
            if not (folder / "complete").exists():
                self._build(snapshot, folder)
            self.index = None  # where no text has a word
            if not (folder / "empty").exists():
                self.index = bm25s.BM25.load(str(folder), mmap=True, show_progress=False)
        self.n_rows = snapshot.n_rows

    def _build(self, snapshot: Snapshot, folder: Path) -> None:
        for old in snapshot.index_folder.glob("bm25-*"):
            shutil.rmtree(old, ignore_errors=True)
        texts = [
            f"{title} {text}"
            for segment in snapshot.segments
            for title, text in zip(segment.table["title"].to_pylist(), segment.table["text"].to_pylist(), strict=True)
        ]
        folder.mkdir(parents=True)
        tokens = _tokens(texts)
        if any(map(len, tokens.ids)):
            index = bm25s.BM25()
            index.index(tokens, show_progress=False)
            index.save(str(folder))
        else:
            (folder / "empty").touch()
        (folder / "complete").touch()

    def shortlist(self, questions: Sequence[str], n: int, allowed: np.ndarray | None) -> list[np.ndarray]:
        """For each question the rows with the largest scores above zero, best first, at most n."""
        found = []
        for question in questions:
            words = _tokens([question], words=True)[0]
            scores = self.index.get_scores(words) if words and self.index else np.zeros(self.n_rows)
            if allowed is not None:
                scores = np.where(allowed, scores, 0.0)
            best = best_rows(scores, n)
            best = best[np.lexsort((best, -scores[best]))]
            found.append(best[scores[best] > 0])
        return found


def lexical_key(snapshot: Snapshot) -> str:
    """Changes with the segments of a snapshot."""
    return hashlib.sha256("".join(segment.key for segment in snapshot.segments).encode()).hexdigest()[:16]


def _tokens(texts: list[str], words: bool = False):
    return bm25s.tokenize(texts, stopwords=[], return_ids=not words, show_progress=False)


def fuse_ranks(rankings: Iterable[Sequence[int]]) -> dict[int, float]:
    """Reciprocal rank fusion: the sum of 1 / (60 + rank) over the rankings that have an item, rank from 1.

    >>> fuse_ranks([[7, 5], [5]])
    {7: 0.01639344262295082, 5: 0.03252247488101534}
    """
    fused = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, start=1):
            fused[item] = fused.get(item, 0.0) + 1 / (FUSION_CONSTANT + rank)
    return fused

"""BM25 over the text of a corpus, and the fusion of its order with that of the memories.

Stands beside the search index. At small sizes BM25 is the rival of retrieval by memory, and together they are better
than either. It knows nothing of memories.
"""

import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock

from .search_clara import best_rows
from .snapshot_clara import Snapshot

try:
    import bm25s
except ImportError:  # `require_bm25` names the remedy
    bm25s = None

FUSIONS = ("ranks", "scores")
FUSION_CONSTANT = 60  # k of reciprocal rank fusion (Cormack et al. 2009)
WORDS_WEIGHT = 0.7  # of BM25 where scores are fused; the cosine has the rest (recipes/LOG.md)
SMALLEST_DEVIATION = 1e-6  # of scores in float32; what differs by less is rounding


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

    def shortlist(
        self, questions: Sequence[str], n: int, allowed: np.ndarray | None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each question the rows with the largest scores above zero, best first, at most n; and these scores."""
        found = []
        for question in questions:
            words = _tokens([question], words=True)[0]
            scores = self.index.get_scores(words) if words and self.index else np.zeros(self.n_rows)
            if allowed is not None:
                scores = np.where(allowed, scores, 0.0)
            best = best_rows(scores, n)
            best = best[np.lexsort((best, -scores[best]))]
            best = best[scores[best] > 0]
            found.append((best, scores[best]))
        return found


def lexical_key(snapshot: Snapshot) -> str:
    """Changes with the segments of a snapshot."""
    return hashlib.sha256("".join(segment.key for segment in snapshot.segments).encode()).hexdigest()[:16]


def _tokens(texts: list[str], words: bool = False):
    return bm25s.tokenize(texts, stopwords=[], return_ids=not words, show_progress=False)


def fuse(
    by_memory: Sequence[int], by_words: Mapping[int, float], cosines: Mapping[int, float], fusion: str = "ranks"
) -> list[int]:
    """One order of what memories and words have found for a question, best first.

    Args:
        by_memory: items that the memories found, best first.
        by_words: item -> BM25 score above 0 of the items that the words found, best first.
        cosines: item -> cosine, of all items of both.
        fusion: "ranks" sums reciprocal ranks (`fuse_ranks`), "scores" adds standardised scores (`fuse_scores`). For
            these an item that the words did not find has the BM25 score 0.

    Returns:
        All items; ties go to the larger cosine, then to the lower item.

    >>> fuse([7, 5, 6], {5: 2.0}, {7: 0.9, 5: 0.8, 6: 0.1})
    [5, 7, 6]
    """
    if fusion == "scores":
        items = list(cosines)
        words = [by_words.get(item, 0.0) for item in items]
        fused = dict(zip(items, fuse_scores([cosines[item] for item in items], words).tolist(), strict=True))
    else:
        fused = fuse_ranks([by_memory, list(by_words)])
    return sorted(cosines, key=lambda item: (-fused[item], -cosines[item], item))


def fuse_scores(cosines: Sequence[float], words: Sequence[float], weight: float = WORDS_WEIGHT) -> np.ndarray:
    """Linear fusion: (1 - weight) times the cosine plus weight times BM25, both with mean 0 and deviation 1.

    Args:
        cosines: (items,) of the candidates of one question.
        words: (items,) BM25 scores of the same candidates.
        weight: of BM25, 0 to 1.

    Returns:
        (items,) float64. Scores that are all equal count as zeros, so that the others decide.

    >>> fuse_scores([0.1, 0.3], [4.0, 2.0]).round(6).tolist()
    [0.4, -0.4]
    """
    return (1 - weight) * _standardised(cosines) + weight * _standardised(words)


def _standardised(scores: Sequence[float]) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if not len(scores) or scores.std() < SMALLEST_DEVIATION:
        return np.zeros(len(scores))
    return (scores - scores.mean()) / scores.std()


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

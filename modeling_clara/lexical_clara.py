"""BM25 over title and text, and the fusion of its order with that of the memories.

The hybrid search of a corpus and the BM25 baseline of the evaluation are both this `Bm25`.
"""

import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock

from .index_clara import best_rows
from .snapshot_clara import Snapshot

try:
    import bm25s
    import Stemmer
except ImportError:  # `require_bm25` names the remedy
    bm25s = Stemmer = None

FUSIONS = ("ranks", "scores")
FUSION_CONSTANT = 60  # k of reciprocal rank fusion (Cormack et al. 2009)
WORDS_WEIGHT = 0.7  # of BM25 if scores are fused; the cosine has the rest (docs/experiments.md)
SMALLEST_DEVIATION = 1e-6  # of scores in float32; what differs by less is rounding
WORDS = "english words, stemmed"  # part of an index's name: one of other words is made again


def require_bm25() -> None:
    """Raise an ImportError that names the remedy if bm25s or PyStemmer is missing."""
    if bm25s is None:
        raise ImportError(
            "BM25 needs bm25s and PyStemmer: pip install bm25s PyStemmer, or the extra `corpus` from a clone of the "
            "repository."
        )


class Bm25:
    """BM25 scores of rows: bm25s with its default k1 and b, English stop words left out, words stemmed.

    `index` is a `bm25s.BM25`, or None if no row has a word.
    """

    def __init__(self, index, n_rows: int):
        self.index, self.n_rows = index, n_rows

    @classmethod
    def of_texts(cls, texts: Sequence[str]) -> "Bm25":
        """An index of texts."""
        tokens = _tokens(texts, return_ids=True)
        return cls(_index(tokens) if any(tokens.vocab) else None, len(texts))

    @classmethod
    def of_words(cls, words: Sequence[list[str]]) -> "Bm25":
        """An index of the words of some rows, see `split_words`: rarity is counted among these rows."""
        return cls(_index(list(words)) if any(map(any, words)) else None, len(words))

    def scores(self, words: Sequence[str]) -> np.ndarray:
        """(rows,) float32 for the words of one question."""
        known = [word for word in words if word and self.index is not None and word in self.index.vocab_dict]
        return self.index.get_scores(known) if known else np.zeros(self.n_rows, np.float32)


def split_words(texts: Sequence[str]) -> list[list[str]]:
    """The words of every text, as `Bm25` compares them."""
    return _tokens(texts, return_ids=False)


def _tokens(texts: Sequence[str], return_ids: bool):
    require_bm25()
    stemmer = Stemmer.Stemmer("english")  # one for each call: threads cannot share it
    options = {"stopwords": "en", "stemmer": stemmer, "show_progress": False, "allow_empty": True}
    return bm25s.tokenize(list(texts), return_ids=return_ids, **options)


def _index(tokens) -> "bm25s.BM25":
    index = bm25s.BM25()
    index.index(tokens, show_progress=False)
    return index


class LexicalIndex:
    """BM25 over title and text of every row of a snapshot, made once and memory-mapped."""

    def __init__(self, snapshot: Snapshot):
        require_bm25()
        self.key = lexical_key(snapshot)
        folder = snapshot.index_folder / f"bm25-{self.key}"
        with FileLock(snapshot.index_folder / "lock"):  # whoever builds for another snapshot removes this one
            if not (folder / "complete").exists():
                self._build(snapshot, folder)
            is_empty = (folder / "empty").exists()  # no text has a word
            index = None if is_empty else bm25s.BM25.load(str(folder), mmap=True, show_progress=False)
        self.bm25 = Bm25(index, snapshot.n_rows)

    def _build(self, snapshot: Snapshot, folder: Path) -> None:
        for old in snapshot.index_folder.glob("bm25-*"):
            shutil.rmtree(old, ignore_errors=True)
        rows = (row for segment in snapshot.segments for row in segment.table.select(["title", "text"]).to_pylist())
        bm25 = Bm25.of_texts(["{title} {text}".format(**row) for row in rows])
        folder.mkdir(parents=True)
        if bm25.index is None:
            (folder / "empty").touch()
        else:
            bm25.index.save(str(folder))
        (folder / "complete").touch()

    def shortlist(
        self, questions: Sequence[str], n: int, allowed: np.ndarray | None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each question the rows with the largest scores above zero, best first, at most n; and these scores."""
        found = []
        for words in split_words(questions) if questions else []:
            scores = self.bm25.scores(words)
            if allowed is not None:
                scores = np.where(allowed, scores, 0.0)
            best = best_rows(scores, n)
            best = best[np.lexsort((best, -scores[best]))]
            best = best[scores[best] > 0]
            found.append((best, scores[best]))
        return found


def lexical_key(snapshot: Snapshot) -> str:
    """Changes with the segments of a snapshot."""
    return hashlib.sha256("".join([WORDS, *(segment.key for segment in snapshot.segments)]).encode()).hexdigest()[:16]


# --- fusion ----------------------------------------------------------------------------------------------------------


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
    """(items,) float64 linear fusion: (1 - weight) times the cosine plus weight times BM25, both standardised.

    Scores that are all equal count as zeros, so that the others decide.

    Args:
        cosines: (items,) of the candidates of one question.
        words: (items,) BM25 scores of the same candidates.
        weight: of BM25, 0 to 1.

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

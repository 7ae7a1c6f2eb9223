"""BM25 over title and text, and the fusion of its order with that of the memories.

The hybrid search of a corpus and the BM25 baseline of the evaluation are both this `Bm25`.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock

from .index_clara import best_rows
from .snapshot_clara import Snapshot
from .text_clara import raw_words

try:
    import bm25s
    import Stemmer
    from bm25s.stopwords import STOPWORDS_EN
except ImportError:  # `require_bm25` names the remedy
    bm25s = Stemmer = None

FUSIONS = ("scores", "ranks")  # the first unless told otherwise: docs/experiments.md, "Among 12,598 documents"
FUSION_CONSTANT = 60  # k of reciprocal rank fusion (Cormack et al. 2009)
WORDS_WEIGHT = 0.7  # of BM25 if scores are fused; the cosine has the rest (docs/experiments.md)
SMALLEST_DEVIATION = 1e-6  # of scores in float32; what differs by less is rounding
WORDS = "stemmed words, pairs of characters"  # part of an index's name: one of other words is made again


def require_bm25() -> None:
    """Raise an ImportError that names the remedy if bm25s or PyStemmer is missing."""
    if bm25s is None:
        raise ImportError(
            "BM25 needs bm25s and PyStemmer: pip install bm25s PyStemmer, or the extra `corpus` from a clone of the "
            "repository."
        )


class Bm25:
    """BM25 scores of rows: bm25s with its default k1 and b over the words of `split_words`.

    `index` is a `bm25s.BM25`, or None if no row has a word.
    """

    def __init__(self, index, n_rows: int):
        self.index, self.n_rows = index, n_rows

    @classmethod
    def of_words(cls, words: Iterable[list[str]]) -> "Bm25":
        """An index of the words of some rows, see `split_words`: rarity is counted among these rows."""
        require_bm25()
        numbers, index = {}, bm25s.BM25()
        rows = [[numbers.setdefault(word, len(numbers)) for word in row] for row in words]
        if numbers:
            index.index((rows, numbers), show_progress=False)
        return cls(index if numbers else None, len(rows))

    @classmethod
    def stored(cls, folder: Path, n_rows: int, words: Callable[[], Iterable[list[str]]]) -> "Bm25":
        """The index in a folder, memory-mapped; unless it is there, it is made of `words()` before."""
        require_bm25()
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            made = cls.of_words(words())
            folder.mkdir(parents=True)
            if made.index is None:
                (folder / "empty").touch()
            else:
                made.index.save(str(folder))
            (folder / "complete").touch()
        is_empty = (folder / "empty").exists()  # no row has a word
        return cls(None if is_empty else bm25s.BM25.load(str(folder), mmap=True, show_progress=False), n_rows)

    def scores(self, words: Sequence[str]) -> np.ndarray:
        """(rows,) float32 for the words of one question."""
        known = [word for word in words if self.index is not None and word in self.index.vocab_dict]
        return self.index.get_scores(known) if known else np.zeros(self.n_rows, np.float32)


# --- words -----------------------------------------------------------------------------------------------------------


def split_words(texts: Sequence[str]) -> list[list[str]]:
    """The words of every text, as `Bm25` compares them.

    Letters, digits and combining marks make words. They are compared in NFKC without case; English stop words are left
    out, and words are stemmed by the English Snowball stemmer. Of scripts that are written without spaces each two
    neighbouring characters are a word.

    >>> split_words(["The rivers of Vitamin C", "東京都 in 2024", "हिन्दी"])
    [['river', 'vitamin', 'c'], ['東京', '京都', '2024'], ['हिन्दी']]
    """
    require_bm25()
    stems = _Stems(dict.fromkeys(STOPWORDS_EN, ""))
    return [list(filter(None, map(stems.__getitem__, raw_words(text)))) for text in texts]


class _Stems(dict):
    """Stems of the words that were asked for; one for each call, because threads cannot share a stemmer."""

    def __init__(self, known: Mapping[str, str]):
        super().__init__(known)
        self.stem = Stemmer.Stemmer("english").stemWord

    def __missing__(self, word: str) -> str:
        stem = self[word] = self.stem(word)
        return stem


class LexicalIndex:
    """BM25 over title and text of every row of a snapshot, made once and memory-mapped."""

    def __init__(self, snapshot: Snapshot):
        require_bm25()
        self.key = lexical_key(snapshot)
        folder = snapshot.index_folder / f"bm25-{self.key}"
        with FileLock(snapshot.index_folder / "lock"):  # whoever builds for another snapshot removes this one
            if not (folder / "complete").exists():
                for old in snapshot.index_folder.glob("bm25-*"):
                    shutil.rmtree(old, ignore_errors=True)
            self.bm25 = Bm25.stored(folder, snapshot.n_rows, lambda: self._words(snapshot))

    @staticmethod
    def _words(snapshot: Snapshot) -> Iterable[list[str]]:
        for segment in snapshot.segments:
            rows = segment.table.select(["title", "text"]).to_pylist()
            yield from split_words(["{title} {text}".format(**row) for row in rows])

    def shortlist(
        self, questions: Sequence[str], n: int, allowed: np.ndarray | None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each question the rows with the largest scores above zero, best first, at most n; and these scores."""
        found = []
        for words in split_words(questions):
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
    by_memory: Sequence[int], by_words: Mapping[int, float], cosines: Mapping[int, float], fusion: str
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

    >>> fuse([7, 5, 6], {5: 2.0}, {7: 0.9, 5: 0.8, 6: 0.1}, "ranks")
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

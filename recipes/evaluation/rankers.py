"""What ranks spans by text, BM25 and a dense encoder, and BM25 together with the model's cosine.

Stands beside the model's own retrieval and has the same surface. It knows nothing of answers.
"""

from collections.abc import Sequence

import numpy as np
import torch

from evaluation.spans import Spans
from modeling_clara.lexical_clara import fuse
from modeling_clara.search_clara import best_rows

try:
    import bm25s
    import Stemmer
except ImportError:
    bm25s = None


class Bm25Ranker:
    """BM25 over title and text of spans: bm25s with its default k1 and b, English stop words left out, words stemmed.

    Where a question brings its candidates, words are weighted by their rarity among these: on development samples of
    HotpotQA, MuSiQue and 2Wiki that gives a recall@5 of 0.87, 0.54 and 0.84; rarity in the whole file gives 0.82, 0.47
    and 0.72.

    Args:
        spans: that are ranked.
    """

    def __init__(self, spans: Spans):
        if bm25s is None:
            raise ImportError('BM25 needs bm25s and PyStemmer. Install them: pip install "clara-rag[eval]".')
        self.spans, self.stemmer = spans, Stemmer.Stemmer("english")
        self.words = self._words([f"{title} {text}" for title, text in zip(spans.titles, spans.texts, strict=True)])
        self.index = None  # of all rows, made when it is first needed

    def _words(self, texts: list[str]) -> list[list[str]]:
        return bm25s.tokenize(
            texts, stopwords="en", stemmer=self.stemmer, return_ids=False, show_progress=False, allow_empty=True
        )

    def rank(self, questions: Sequence[str], rows: Sequence[np.ndarray | None], depth: int) -> list[list[tuple]]:
        """For each question (row, score) of the best `depth` documents among its rows; None ranks all."""
        ranked = []
        for words, mine in zip(self._words(list(questions)), rows, strict=True):
            if mine is None:
                self.index = self.index or _index(self.words)
                ranked.append(_rank_all(self.spans, _scores(self.index, words, len(self.spans)), depth))
            else:
                scores = _scores(_index([self.words[row] for row in mine]), words, len(mine))
                ranked.append(self.spans.best_of_documents(mine, scores, depth))
        return ranked


def _index(words: list[list[str]]):
    index = bm25s.BM25()
    if any(words):  # bm25s refuses texts without a word
        index.index(words, show_progress=False)
    return index


def _scores(index, words: list[str], n_rows: int) -> np.ndarray:
    known = [word for word in words if word and word in getattr(index, "vocab_dict", ())]
    return index.get_scores(known) if known else np.zeros(n_rows, np.float32)


class DenseRanker:
    """Cosine of sentence embeddings (sentence-transformers) of title and text of all spans.

    Args:
        spans: that are ranked.
        model_name_or_path: id or folder of a sentence-transformers model, such as
            sentence-transformers/all-MiniLM-L6-v2.
        device: of the encoder.
        batch_size: texts a pass.
    """

    def __init__(self, spans: Spans, model_name_or_path: str, *, device: str = "cpu", batch_size: int = 64):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError(
                "--dense needs sentence-transformers. Install it: pip install sentence-transformers."
            ) from error
        self.spans = spans
        try:
            self.encoder = SentenceTransformer(str(model_name_or_path), device=device)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--dense must name a sentence-transformers model, got {model_name_or_path}: {error}"
            ) from error
        self.options = {"batch_size": batch_size, "normalize_embeddings": True, "show_progress_bar": False}
        texts = [f"{title}\n{text}".strip() for title, text in zip(spans.titles, spans.texts, strict=True)]
        self.vectors = self.encoder.encode(texts, **self.options)  # (spans, size) float32

    def rank(self, questions: Sequence[str], rows: Sequence[np.ndarray | None], depth: int) -> list[list[tuple]]:
        """As `Bm25Ranker.rank`."""
        queries = self.encoder.encode(list(questions), **self.options)
        return [
            _rank_all(self.spans, self.vectors @ query, depth)
            if mine is None
            else self.spans.best_of_documents(mine, self.vectors[mine] @ query, depth)
            for query, mine in zip(queries, rows, strict=True)
        ]


class HybridRanker:
    """The model's cosine and BM25, fused as a corpus fuses them (`lexical_clara.fuse`).

    Args:
        spans: that are ranked, with memories.
        bm25: over the same spans. A whole corpus is searched as users do, with its own BM25.
        fusion: one of `lexical_clara.FUSIONS`.
    """

    def __init__(self, spans: Spans, bm25: Bm25Ranker, fusion: str):
        self.spans, self.bm25, self.fusion = spans, bm25, fusion

    def rank(
        self, questions: Sequence[str], rows: Sequence[np.ndarray | None], depth: int, queries: torch.Tensor
    ) -> list[list[tuple]]:
        """As `Bm25Ranker.rank`, but the row is a document's best by cosine and the score is this cosine.

        `queries` are the query memories, (questions, k, H) float32 on the CPU.
        """
        ranked = []
        for question, query, mine in zip(questions, queries, rows, strict=True):
            if mine is None:
                options = {"questions": [question], "hybrid": self.fusion}
                ranked.append(self.spans.cosines(query, None, depth, **options))
            else:
                ranked.append(self._rank_candidates(question, query, mine)[:depth] if len(mine) else [])
        return ranked

    def _rank_candidates(self, question: str, query: torch.Tensor, rows: np.ndarray) -> list[tuple[int, float]]:
        best = {self._document(row): (row, cosine) for row, cosine in self.spans.cosines(query, rows, len(rows))}
        (words,) = self.bm25.rank([question], [rows], len(rows))
        by_words = {self._document(row): score for row, score in words if score > 0}
        order = fuse(list(best), by_words, {name: cosine for name, (_, cosine) in best.items()}, self.fusion)
        return [best[document] for document in order]

    def _document(self, row: int) -> int:
        return row - int(self.spans.numbers[row])


def _rank_all(spans: Spans, scores: np.ndarray, depth: int) -> list[tuple[int, float]]:
    """The best documents of all live rows."""
    scores = np.where(spans.live, scores, -np.inf)
    shortlist = 4 * depth
    while True:  # a long document may fill a shortlist with its spans
        rows = np.sort(best_rows(scores, shortlist))
        rows = rows[np.isfinite(scores[rows])]
        ranked = spans.best_of_documents(rows, scores[rows], depth)
        if len(ranked) == min(depth, len(spans.rows)) or shortlist >= len(spans):
            return ranked
        shortlist *= 4

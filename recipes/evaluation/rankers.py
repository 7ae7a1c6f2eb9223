"""What ranks spans by text, BM25 and a dense encoder, and BM25 together with the model's cosine.

All of them rank like `Bm25Ranker.rank`.
"""

import logging
import zlib
from collections.abc import Sequence

import numpy as np
import torch

from modeling_clara.index_clara import best_rows
from modeling_clara.lexical_clara import Bm25, fuse, split_words
from recipes.evaluation.spans import Spans

logger = logging.getLogger(__name__)


class Bm25Ranker:
    """`lexical_clara.Bm25` over title and text of spans, which is also the BM25 of the hybrid search of a corpus.

    If a question brings its candidates, words are weighted by their rarity among these: on development samples of
    HotpotQA, MuSiQue and 2Wiki that gives a recall@5 of 0.87, 0.54 and 0.84; rarity in the whole file gives 0.82, 0.47
    and 0.72.

    If no word of a question is in any text, the order is one by chance, with scores of 0: the order of the rows would
    say something of the data. Such questions are counted.
    """

    def __init__(self, spans: Spans):
        self.asked: set[str] = set()
        self.by_chance: set[str] = set()  # questions of which no word was found
        self.spans = spans
        self.words = split_words([f"{title} {text}" for title, text in zip(spans.titles, spans.texts, strict=True)])
        self.bm25 = None  # of all rows, made when it is first needed

    def rank(self, questions: Sequence[str], rows: Sequence[np.ndarray | None], depth: int) -> list[list[tuple]]:
        """For each question (row, score) of the best `depth` documents among its rows; None ranks all."""
        ranked = []
        for question, words, mine in zip(questions, split_words(questions), rows, strict=True):
            if mine is None:
                self.bm25 = self.bm25 or Bm25.of_words(self.words)
            bm25 = self.bm25 if mine is None else Bm25.of_words([self.words[row] for row in mine])
            scores = bm25.scores(words)
            self.asked.add(question)
            found = len(scores) == 0 or scores.max() > 0
            if not found:
                self.by_chance.add(question)
                scores = np.random.default_rng(zlib.crc32(question.encode())).random(len(scores), np.float32)
            best = _best(self.spans, mine, scores, depth)
            ranked.append(best if found else [(row, 0.0) for row, _ in best])
        return ranked

    def warn_of_chance(self) -> None:
        """Log how many questions have no word in the texts, if there are any."""
        if self.by_chance:
            logger.warning(
                "BM25 found no word of %d of %d questions in the documents; its order of their documents is one by "
                "chance. Leave BM25 out for such texts: rows with `docs`, or --setting corpus, need none.",
                len(self.by_chance),
                len(self.asked),
            )


class DenseRanker:
    """Cosine of sentence embeddings (sentence-transformers) of title and text of all spans."""

    def __init__(self, spans: Spans, model_name_or_path: str, *, device: str = "cpu"):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError(
                "--dense needs sentence-transformers. Install it: pip install sentence-transformers."
            ) from error
        try:
            self.encoder = SentenceTransformer(str(model_name_or_path), device=device)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--dense must name a sentence-transformers model, got {model_name_or_path}: {error}"
            ) from error
        self.spans = spans
        texts = [f"{title}\n{text}".strip() for title, text in zip(spans.titles, spans.texts, strict=True)]
        self.vectors = self._encode(texts)  # (spans, size) float32

    def _encode(self, texts: Sequence[str]) -> np.ndarray:
        return self.encoder.encode(list(texts), batch_size=64, normalize_embeddings=True, show_progress_bar=False)

    def rank(self, questions: Sequence[str], rows: Sequence[np.ndarray | None], depth: int) -> list[list[tuple]]:
        """As `Bm25Ranker.rank`."""
        return [
            _best(self.spans, mine, (self.vectors if mine is None else self.vectors[mine]) @ query, depth)
            for query, mine in zip(self._encode(questions), rows, strict=True)
        ]


class HybridRanker:
    """The model's cosine and BM25, fused as a corpus fuses them (`lexical_clara.fuse`).

    A whole corpus is searched as users do, with its own BM25.
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
        first = rows - self.spans.numbers[rows]  # a document is its first row
        document = dict(zip(rows.tolist(), first.tolist(), strict=True))
        best = {document[row]: (row, cosine) for row, cosine in self.spans.cosines(query, rows, len(rows))}
        (words,) = self.bm25.rank([question], [rows], len(rows))
        by_words = {document[row]: score for row, score in words if score > 0}
        order = fuse(list(best), by_words, {name: cosine for name, (_, cosine) in best.items()}, self.fusion)
        return [best[name] for name in order]


def _best(spans: Spans, rows: np.ndarray | None, scores: np.ndarray, depth: int) -> list[tuple[int, float]]:
    """The best documents of these rows by their scores; None stands for all live rows."""
    if rows is not None:
        return spans.best_of_documents(rows, scores, depth)
    scores = np.where(spans.live, scores, -np.inf)
    shortlist = 4 * depth
    while True:  # a long document may fill a shortlist with its spans
        rows = np.sort(best_rows(scores, shortlist))
        rows = rows[np.isfinite(scores[rows])]
        ranked = spans.best_of_documents(rows, scores[rows], depth)
        if len(ranked) == min(depth, len(spans.rows)) or shortlist >= len(spans):
            return ranked
        shortlist *= 4

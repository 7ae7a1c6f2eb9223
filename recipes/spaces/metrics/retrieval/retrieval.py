"""Scores rankings of documents against the gold documents of a question: recall, precision, hits, MRR and nDCG.

A module of Hugging Face `evaluate`, read from a folder or from a Space on the Hub; scripts import the pure functions.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import datasets
import evaluate

from recipes.spaces.metrics.checked_rows import CheckedRows, check_list, check_string, summarize

DEFAULT_K = (1, 3, 5, 10)

TEXTS = datasets.Sequence(datasets.Value("string"))
INFO = {
    "description": """\
Scores rankings of document ids, as a retriever returns them, against the ids of the gold documents: recall@k,
precision@k, hit@k, MRR and nDCG@k with binary relevance, averaged over the questions that have a gold document.
""",
    "inputs_description": """
Args:
    predictions (`list[list[str]]`): document ids of each question, the best first, each id once; may be empty.
    references (`list[list[str]]`): gold document ids of each question, in any order, each id once; a question without
        any is left out and counted in `without_gold`.
    k (`Sequence[int]`): how many of the first documents to look at; positive, each once.
    per_question (`bool`): whether to add the score of every question as well, in the order of the predictions.
    ids (`list[str | int]`, optional): one unique name per question, for error messages.

Returns:
    `recall@k`, `precision@k`, `hit@k`, `ndcg@k` for each k, and `mrr`: floats from 0 to 1, means over the questions
    with gold; `questions` and `without_gold`: how many were scored and left out; with `per_question` also
    `mrr_per_question` and so on, lists of floats, None where a question has no gold.
""",
    "citation": """\
@article{jarvelin-kekalainen-2002-cumulated,
    title = "Cumulated gain-based evaluation of {IR} techniques",
    author = "J{\\"a}rvelin, Kalervo and Kek{\\"a}l{\\"a}inen, Jaana",
    journal = "ACM Transactions on Information Systems",
    volume = "20", number = "4", pages = "422--446", year = "2002",
    url = "https://doi.org/10.1145/582415.582418",
}
""",
    "features": datasets.Features({"predictions": TEXTS, "references": TEXTS}),
    "reference_urls": ["https://github.com/AmenRa/ranx", "https://ir-measur.es/en/latest/measures.html"],
    "license": "apache-2.0",
}


def sum_gains(ranks: Iterable[int]) -> float:
    """Discounted cumulative gain of gold documents at these ranks, which count from 1."""
    return math.fsum(1 / math.log2(rank + 1) for rank in ranks)


def score_ranking(ranking: Sequence[str], gold: Sequence[str], k: Sequence[int] = DEFAULT_K) -> dict[str, float]:
    """The measures of one ranking of different ids: recall@k, precision@k, hit@k, ndcg@k of each k, then mrr; 0 to 1.

    recall@k is the share of the gold documents among the first k, precision@k the share of gold among k places (also
    if fewer were returned), hit@k whether there is any, mrr 1 / rank of the first gold document at any depth,
    ndcg@k the sum of 1 / log2(rank + 1) over the gold documents among the first k, divided by the best possible one.

    >>> score_ranking(["d7", "d2"], ["d2"], k=[2])
    {'recall@2': 1.0, 'precision@2': 0.5, 'hit@2': 1.0, 'ndcg@2': 0.6309297535714575, 'mrr': 0.5}
    """
    gold = frozenset(gold)
    if not gold:
        raise ValueError("`gold` must have at least one document id, got none. Leave the question out and count it.")
    ranks = [rank for rank, document in enumerate(ranking, start=1) if document in gold]
    scores = {}
    for depth in k:
        found = [rank for rank in ranks if rank <= depth]
        best = range(1, min(depth, len(gold)) + 1)
        scores[f"recall@{depth}"] = len(found) / len(gold)
        scores[f"precision@{depth}"] = len(found) / depth
        scores[f"hit@{depth}"] = float(bool(found))
        scores[f"ndcg@{depth}"] = sum_gains(found) / sum_gains(best)
    return scores | {"mrr": 1 / ranks[0] if ranks else 0.0}


def check_k(k: Sequence[int]) -> None:
    """Refuses what is no list of positive integers, each once."""
    if not isinstance(k, list | tuple | range):
        raise TypeError(f"`k` must be a list of depths, got {k!r}. Write [{k}] for a single one.")
    for depth in k:
        if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
            raise ValueError(f"`k` must have positive integers only, got {depth!r}. Write e.g. {list(DEFAULT_K)}.")
    if not k or len(set(k)) < len(k):
        raise ValueError(f"`k` must have at least one depth and each once, got {list(k)}. Remove the repeated ones.")


def check_documents(documents: Sequence[str], where: str) -> None:
    """Refuses what is no list of different strings; `where` goes into the message."""
    check_list(documents, where, "document ids", "Write [] for none.")
    for place, document in enumerate(documents):
        check_string(document, f"{where}[{place}]", "Write ids as str(id) in both columns.")
    if len(set(documents)) < len(documents):
        document, count = Counter(documents).most_common(1)[0]
        raise ValueError(f"{where} must have each document once, got {document!r} {count} times. Keep its best rank.")


class Retrieval(CheckedRows, evaluate.Metric):
    """The metric as `evaluate` loads it."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(**INFO)

    check_prediction = check_reference = staticmethod(check_documents)

    def compute(self, *, k: Sequence[int] = DEFAULT_K, **kwargs):
        """Scores these rows and those added before; `k` is checked before a row is read."""
        check_k(k)
        return super().compute(k=k, **kwargs)

    def _compute(
        self, predictions, references, k: Sequence[int], per_question: bool = False, ids: Sequence | None = None
    ) -> dict:
        self.check_rows(predictions, references, ids)
        if not any(references):
            raise ValueError(
                f"`references` must have gold documents for at least one question, got none in {len(references)}. "
                "Check that the ids of the gold documents were read."
            )
        rows = [score_ranking(*row, k) if row[1] else {} for row in zip(predictions, references, strict=True)]
        without_gold = rows.count({})
        counts = {"questions": len(rows) - without_gold, "without_gold": without_gold}
        return summarize(rows, per_question, **counts)

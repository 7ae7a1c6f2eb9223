"""Rows `{question, answers, docs, pos_index}`: questions with gold documents, among what BM25 takes for the best."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence

from recipes.evaluation.rankers import Bm25Ranker
from recipes.evaluation.spans import Spans


def with_distractors(
    rows: Sequence[Mapping], n_documents: int, generator: random.Random, others: Iterable[Mapping] = ()
) -> Iterator[dict]:
    """Rows among the documents that BM25 takes for the best, the gold ones at random places.

    Args:
        rows: `{question, answers, gold}`, gold a list of `{title, text}`.
        n_documents: of a row that comes out, the gold ones with them.
        generator: of the places.
        others: documents to search beside all gold ones.
    """
    documents = {}
    for document in [*(document for row in rows for document in row["gold"]), *others]:
        documents.setdefault((document["title"], document["text"]), len(documents))
    keys = list(documents)
    spans = Spans([str(n) for n in range(len(keys))], [0] * len(keys), [k[0] for k in keys], [k[1] for k in keys])
    ranked = Bm25Ranker(spans).rank([row["question"] for row in rows], [None] * len(rows), n_documents)
    for row, hits in zip(rows, ranked, strict=True):
        gold = list(dict.fromkeys(documents[document["title"], document["text"]] for document in row["gold"]))
        distractors = [number for number, _ in hits if number not in gold]
        order = [*gold, *distractors[: max(0, n_documents - len(gold))]]
        generator.shuffle(order)
        yield {
            "question": row["question"],
            "answers": row["answers"],
            "docs": [{"title": keys[number][0], "text": keys[number][1]} for number in order],
            "pos_index": sorted(order.index(number) for number in gold),
        }

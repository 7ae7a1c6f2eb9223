"""Rows of `{question, answers, docs, pos_index}` from questions with gold documents, and from documents alone.

Stands between the readers of `smollm2_data.py` and what the contrastive and the joint stage learn from. It knows
nothing of models, files, or of what is held back.
"""

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from curriculum import sentences
from evaluation.rankers import Bm25Ranker
from evaluation.spans import Spans

FRAGMENT = range(5, 13)  # words of a document that a made question quotes
SHARE_QUOTING = 0.6  # of made questions, where there is something to quote
ABOUT_TWO = (
    "Which is older, {a} or {b}?",
    "Who was born first, {a} or {b}?",
    "Which came out first, {a} or {b}?",
    "Which has more members, {a} or {b}?",
    "Are {a} and {b} both from the same country?",
    "What do {a} and {b} have in common?",
    "Are both {a} and {b} of the same kind?",
    "Is {a} in the same place as {b}?",
)
QUOTING = (
    "What is it that {quote}, and has to do with {b}?",
    "When did {b} come to the one who {quote}?",
    "Where is {b}, of which it is said: {quote}?",
    "{b} and {quote}: who is it?",
)


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


def made_questions(documents: Sequence[Mapping], n_questions: int, generator: random.Random) -> Iterator[dict]:
    """Questions that name or quote two of the documents, which are their gold ones; they have no true answer.

    They teach a reasoner which words tell alike documents apart, from documents without any question.

    Args:
        documents: `{title, text}`, alike, such as the candidates of one question.
        n_questions: none are made where fewer than two documents have a title.
        generator: of documents, words and templates.

    Yields:
        `{question, answers, gold}` for `with_distractors`; the answer is the first document's title.
    """
    named = [document for document in documents if name_of(document)]
    for _ in range(n_questions if len(named) > 1 else 0):
        first, second = generator.sample(named, 2)
        quoted = quote(first, generator)
        if quoted and generator.random() < SHARE_QUOTING:
            question = generator.choice(QUOTING).format(quote=quoted, b=name_of(second))
        else:
            question = generator.choice(ABOUT_TWO).format(a=name_of(first), b=name_of(second))
        yield {"question": question, "answers": [name_of(first)], "gold": [first, second]}


def name_of(document: Mapping) -> str:
    """A title without what tells it apart.

    >>> name_of({"title": "Mystère (Cirque du Soleil)"})
    'Mystère'
    """
    return re.sub(r"\s*\([^()]*\)\s*$", "", document["title"]).strip()


def quote(document: Mapping, generator: random.Random) -> str:
    """Some words of a sentence that does not begin with the title; empty where there is none.

    >>> quote({"title": "Oslo", "text": "Oslo has a port. It had a mayor in 1900."}, random.Random(0))
    'It had a mayor in 1900'
    """
    name = name_of(document).casefold()
    found = [part.split() for part in sentences(document["text"]) if name not in part.casefold()]
    found = [words for words in found if len(words) >= FRAGMENT.start]
    if not found:
        return ""
    words = generator.choice(found)
    n_words = min(len(words), generator.choice(FRAGMENT))
    start = generator.randint(0, len(words) - n_words)
    return " ".join(words[start : start + n_words]).strip(" .,;:!?\"'")

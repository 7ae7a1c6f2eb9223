"""Rows and questions of these tests, and what `model.retrieve` finds of them, which every framework must give."""

from datetime import date

PLACES = ["Paris", "Berlin", "Rome", "Lima", "Oslo", "Cairo"]
ROWS = [
    {
        "id": f"d{number}",
        "title": place if number % 2 else "",
        "text": f"{place} is the capital number {number}. " * (12 if number == 5 else 1),
        "year": 2018 + number if number != 3 else None,
        "lang": "en" if number < 4 else "de",
        "tags": ["big", "old"] if number % 2 else ["small"],
        "day": date(2021, number + 1, 15),
        "price": 1.5 * number,
        "open": number % 3 == 0,
        "score": 99.0,  # a name that retrievers use themselves
    }
    for number, place in enumerate(PLACES)
]
QUESTIONS = ["What is the capital of Italy?", "Which river flows through Paris?", "Who lives in Lima?"]
GERMAN, RECENT = {"lang": "de"}, {"year": {"$gte": 2019}}
# of a retriever, and the same for `with_options` and `retrieve`
OPTIONS = [
    ({}, {}, {}),
    ({"k": 4}, {}, {"top_k": 4}),
    ({"k": 6, "where": GERMAN}, {"where": GERMAN}, {"top_k": 6}),
    ({"k": 6, "hybrid": True}, {"hybrid": True}, {"top_k": 6}),
    ({"k": 6, "hybrid": "scores", "where": RECENT}, {"hybrid": "scores", "where": RECENT}, {"top_k": 6}),
    ({"k": 6, "min_score": -0.15}, {}, {"top_k": 6, "min_score": -0.15}),
]


def retrieve(model, corpus, question: str, view: dict | None = None, call: dict | None = None) -> list[tuple]:
    """(id, score, text, title, metadata) of every source that `model.retrieve` finds."""
    corpus = corpus.with_options(**view) if view else corpus
    (sources,) = model.retrieve([question], corpus=corpus, **(call or {}))
    return [(f"{s.document_id}#{s.span}", s.score, s.text, s.title, s.metadata) for s in sources]

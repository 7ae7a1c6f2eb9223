"""Documents, questions and direct calls for tests of the evaluation's systems on a tiny model.

Documents are short and one is long, so that it has several chunks; tests/evaluation/conftest.py compresses them.
"""

import torch
from evaluation_runs import PLACES
from readings import greedy_reference

from recipes.evaluation.formats import Question
from recipes.evaluation.questions import EvaluationData
from recipes.evaluation.run import _predict
from recipes.evaluation.spans import Spans
from recipes.evaluation.systems import SYSTEMS, Bench

N_TOKENS = 8
PLACES = PLACES[:12]
LONG = " ".join(f"The river number {number} of Austria flows through the city {number}." for number in range(9))
CAPITALS = [
    (f"d{n}", {"title": "" if n % 3 else place, "text": f"City {n} is the capital of {place}."})
    for n, place in enumerate(PLACES)
]
DOCUMENTS = dict([*CAPITALS[:5], ("long", {"title": "Austria", "text": LONG}), *CAPITALS[5:]])


def make_data() -> EvaluationData:
    names, questions = list(DOCUMENTS), []
    for n, place in enumerate(PLACES[:6]):
        others = [names[(3 * n + step) % len(names)] for step in range(4)]
        candidates = tuple(dict.fromkeys(("long", f"d{n}", *others)))
        text = f"What is the capital of {place}?" if n else "Which river flows through Austria, and where?"
        questions.append(Question(f"q{n}", text, ("Rome",), candidates[::-1], (f"d{n}",), f"x.jsonl:{n + 1}"))
    return EvaluationData("x.jsonl", "0" * 64, "multihop", questions, dict(DOCUMENTS))


def nothing(texts, n):
    raise AssertionError("no candidates need to be chosen")


def predict(bench: Bench, name: str, tasks) -> list[dict]:
    return _predict(bench, SYSTEMS[name], tasks)


def stored(spans: Spans, rows) -> list[dict]:
    """Documents for the public calls, each chunk one with the memory that the corpus gives back."""
    return [
        {"id": f"{spans.document_ids[row]}/{row}", **spans.document(row), "memory": spans.memories([row], 4)[0]}
        for row in rows
    ]


def generate(model, question: str, texts: list[dict], role: str | None) -> str:
    """The answer of one question to texts in the prompt, without any of the evaluation's code."""
    return greedy_reference(model, question, torch.zeros(0, 4, 32), N_TOKENS, texts, role)


def text_of(document: dict) -> str:
    """What is read of a chunk as text."""
    return f"{document['title']}\n{document['text']}".strip()

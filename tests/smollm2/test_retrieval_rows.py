"""Rows for retrieval: gold documents are kept and marked, made questions name or quote what they are about."""

import doctest
import random

import pytest
import retrieval_rows
from retrieval_rows import ABOUT_TWO, made_questions, name_of, quote, with_distractors

COLOURS = ("red", "green", "blue", "white", "black", "grey")
DOCUMENTS = [
    {
        "title": f"The {colour} ship (vessel)",
        "text": f"It was built of wood in {1800 + n}. All its masts were {colour}.",
    }
    for n, colour in enumerate(COLOURS)
]


def test_examples():
    assert doctest.testmod(retrieval_rows).failed == 0


@pytest.mark.parametrize("n_documents", [1, 2, 4, 20])
def test_all_gold_documents_are_kept_and_marked(n_documents):
    row = {"question": "Is the red or the blue ship older?", "answers": ["red"], "gold": [DOCUMENTS[0], DOCUMENTS[2]]}
    (made,) = with_distractors([row], n_documents, random.Random(0), DOCUMENTS)
    assert [made["docs"][index] for index in made["pos_index"]] in ([DOCUMENTS[0], DOCUMENTS[2]], row["gold"][::-1])
    assert len(made["docs"]) == max(2, min(n_documents, len(DOCUMENTS))) == len({d["text"] for d in made["docs"]})
    assert made["question"] == row["question"] and made["answers"] == ["red"]


def test_a_document_that_is_gold_twice_stands_once():
    row = {"question": "Red?", "answers": ["red"], "gold": [DOCUMENTS[0], DOCUMENTS[0]]}
    (made,) = with_distractors([row], 3, random.Random(0), DOCUMENTS)
    assert len(made["pos_index"]) == 1 and made["docs"].count(DOCUMENTS[0]) == 1


def test_the_best_of_bm25_are_the_distractors():
    rows = [
        {"question": f"Which masts were {c}?", "answers": [c], "gold": [DOCUMENTS[n]]} for n, c in enumerate(COLOURS)
    ]
    asked = {"question": "Green or white masts, or grey ones?", "answers": ["red"], "gold": [DOCUMENTS[0]]}
    *_, made = with_distractors([*rows, asked], 4, random.Random(0))
    assert {d["title"].split()[1] for d in made["docs"]} == {"red", "green", "white", "grey"}


def test_made_questions_name_or_quote_their_two_documents():
    made = list(made_questions(DOCUMENTS, 40, random.Random(0)))
    assert len(made) == 40 and len({row["question"] for row in made}) > 20
    plain = 0
    for row in made:
        first, second = row["gold"]
        assert first != second and first in DOCUMENTS and second in DOCUMENTS
        question = row["question"].replace(name_of(second), "", 1)
        assert question != row["question"] and row["answers"] == [name_of(first)] and "(vessel)" not in question
        plain += name_of(first) in question
        words = question.split()
        runs = [" ".join(words[start : start + 4]) for start in range(len(words) - 3)]
        assert name_of(first) in question or any(run in first["text"] for run in runs)
    assert 0 < plain < 40


@pytest.mark.parametrize("group", [[], DOCUMENTS[:1], [{"title": "", "text": "Nothing has a name here."}] * 3])
def test_nothing_is_made_of_fewer_than_two_named_documents(group):
    assert list(made_questions(group, 3, random.Random(0))) == []


def test_documents_without_a_sentence_to_quote_are_named():
    group = [{"title": "Oslo", "text": "Oslo is a town."}, {"title": "Rome", "text": "Short."}]
    assert [quote(document, random.Random(0)) for document in group] == ["", ""]
    for row in made_questions(group, 10, random.Random(0)):
        assert row["question"] in {
            t.format(a=a, b=b) for t in ABOUT_TWO for a, b in (("Oslo", "Rome"), ("Rome", "Oslo"))
        }

"""Rows for retrieval: gold documents are kept and marked, the others are what BM25 takes for the best."""

import random

import pytest

from recipes.models.smollm2_135m.data import with_distractors

COLOURS = ("red", "green", "blue", "white", "black", "grey")
DOCUMENTS = [
    {
        "title": f"The {colour} ship (vessel)",
        "text": f"It was built of wood in {1800 + n}. All its masts were {colour}.",
    }
    for n, colour in enumerate(COLOURS)
]


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

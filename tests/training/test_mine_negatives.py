"""Hard negatives out of rows with gold documents, by a real tiny model on real files."""

import json
from pathlib import Path

import pytest

from recipes.training.data import document_key
from recipes.training.mine_negatives import has_answer, main, mine, read_questions

TEXTS = [
    "Paris is the capital of France.",
    "Rome is the capital of Italy.",
    "The Seine flows through Paris.",
    "Berlin is a city of 3.7 million people.",
    "Oslo lies on a fjord.",
    "Bern is on the Aare.",
    "Vienna and its coffee " * 40,
]
DOCUMENTS = [{"title": "", "text": text.strip()} for text in TEXTS]


def row(question: str, answers: list[str], places: list[int], gold: list[int]) -> dict:
    documents = [DOCUMENTS[place] for place in places]
    return {"question": question, "answers": answers, "docs": documents, "pos_index": gold}


ROWS = [
    row("Where does the Seine flow?", ["Paris"], [3, 2, 4], [1]),
    row("Is Bern in Italy?", ["no"], [1, 5, 0], [0, 1]),
    row("What is drunk in Vienna?", ["coffee"], [6, 0], [0]),
]


@pytest.fixture
def rows_file(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in ROWS))
    return path


def test_the_hardest_documents_without_an_answer_are_the_negatives(shared_model, rows_file, tmp_path):
    rows = list(read_questions([str(rows_file)]))
    mined = mine(shared_model, [*rows, rows[0]], tmp_path / "memories", num_documents=3, max_words=20)
    # the gold one of the third is long, the fourth is the first again
    assert [one["question"] for one in mined] == [one["question"] for one in ROWS[:2]]
    for found, given in zip(mined, rows, strict=False):
        gold = [given["docs"][index]["text"] for index in given["pos_index"]]
        assert sorted(found["docs"][index]["text"] for index in found["pos_index"]) == sorted(gold)
        allowed = [d for d in DOCUMENTS[:6] if d["text"] not in gold and not has_answer(d, given["answers"])]
        texts = [document["text"] for document in found["docs"]]
        assert len(set(texts)) == 3
        ranked = shared_model.retrieve([given["question"]], documents=allowed, top_k=3 - len(gold))[0]
        assert sorted(set(texts) - set(gold)) == sorted(source.text for source in ranked)


def test_a_second_run_reads_the_memories_of_the_first(shared_model, rows_file, tmp_path, monkeypatch):
    rows = list(read_questions([str(rows_file)]))
    options = {"num_documents": 3, "max_words": 20}
    first = mine(shared_model, rows, tmp_path / "memories", **options)
    monkeypatch.setattr(type(shared_model), "compress", lambda *arguments, **keywords: pytest.fail("compressed again"))
    assert mine(shared_model, rows, tmp_path / "memories", **options) == first


def test_answers_that_tell_nothing_make_no_document_right():
    document = {"title": "Oslo", "text": "There is no fjord like it."}
    assert has_answer(document, ["x", "OSLO"]) and has_answer(document, ["the fjord"])
    assert not has_answer(document, ["no"]) and not has_answer(document, ["the"]) and not has_answer(document, ["slo"])


def test_the_command_writes_rows_that_training_reads(shared_model, rows_file, tmp_path, capsys):
    model, output = tmp_path / "model", tmp_path / "hard.jsonl"
    shared_model.save_pretrained(model)
    options = ["--model", str(model), "--memories", str(tmp_path / "m"), "--output", str(output), "--max-words", "20"]
    assert main([str(rows_file), *options, "--num-documents", "3", "--rows-of-step", "2"]) == 0
    assert "2 of 3 rows" in capsys.readouterr().out
    mined = list(read_questions([str(output)]))
    assert {document_key(d) for one in mined for d in one["docs"]} <= {document_key(d) for d in DOCUMENTS}
    assert all(len(one["docs"]) == 3 for one in mined)
    assert sorted(len(one["pos_index"]) for one in mined) == [1, 2]
    assert main([str(rows_file), *options, "--num-documents", "3", "--single-share", "0.3"]) == 0
    assert [len(one["pos_index"]) for one in read_questions([str(output)])] == [2]
    with pytest.raises(SystemExit):
        main([str(rows_file), *options, "--single-share", "1"])
    assert "--single-share must be from 0 to below 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            {"question": "Q?", "answers": ["a"], "docs": DOCUMENTS[:2]},
            "rows.jsonl:1 must have `question`, `answers` and",
        ),
        (
            {"question": "Q?", "answers": ["a"], "docs": DOCUMENTS[:2], "pos_index": [7]},
            r"rows.jsonl:1 `pos_index` must",
        ),
        ({"question": "Q?", "answers": ["a"], "docs": DOCUMENTS[6:], "pos_index": [0]}, "Raise --max-words"),
    ],
)
def test_rows_that_cannot_be_used_are_named(shared_model, tmp_path, capsys, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(line) + "\n")
    shared_model.save_pretrained(tmp_path / "model")
    arguments = [
        "--model",
        str(tmp_path / "model"),
        "--memories",
        str(tmp_path / "m"),
        "--output",
        str(tmp_path / "o.jsonl"),
    ]
    assert main([str(path), *arguments, "--max-words", "20"]) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "o.jsonl").exists()

"""Hard negatives out of rows with gold documents, by a real tiny model on real files."""

import pytest

from modeling_clara.corpus.storage import write_lines
from recipes.training.data import document_key
from recipes.training.mine_negatives import has_answer, main, mine, read_questions

TEXTS = [
    "Paris is the capital of France.",
    "Rome is the capital of Italy.",
    "The Seine flows through Paris.",
    "Berlin is a city of 3.7 million people.",
    "Oslo lies on a fjord.",
    "Bern is on the Aare.",
    " ".join(["Vienna and its coffee"] * 40),
]
DOCUMENTS = [{"title": "", "text": text} for text in TEXTS]
OPTIONS = {"num_documents": 3, "max_words": 20}


def row(question: str, answers: list[str], places: list[int], gold: list[int]) -> dict:
    return {"question": question, "answers": answers, "docs": [DOCUMENTS[n] for n in places], "pos_index": gold}


ROWS = [
    row("Where does the Seine flow?", ["Paris"], [3, 2, 4], [1]),
    row("Is Bern in Italy?", ["no"], [1, 5, 0], [0, 1]),
    row("What is drunk in Vienna?", ["coffee"], [6, 0], [0]),
]


def test_the_hardest_documents_without_an_answer_are_the_negatives(shared_model, tmp_path, monkeypatch):
    mined = mine(shared_model, [*ROWS, ROWS[0]], tmp_path / "memories", **OPTIONS)
    # the gold one of the third is long, the fourth is the first again
    assert [one["question"] for one in mined] == [one["question"] for one in ROWS[:2]]
    for found, given in zip(mined, ROWS, strict=False):
        gold = [given["docs"][index]["text"] for index in given["pos_index"]]
        assert sorted(found["docs"][index]["text"] for index in found["pos_index"]) == sorted(gold)
        allowed = [d for d in DOCUMENTS[:6] if d["text"] not in gold and not has_answer(d, given["answers"])]
        texts = [document["text"] for document in found["docs"]]
        assert len(set(texts)) == 3
        (ranked,) = shared_model.retrieve([given["question"]], documents=allowed, top_k=3 - len(gold))
        assert set(texts) - set(gold) == {source.text for source in ranked}
    # a second run reads the memories of the first
    monkeypatch.setattr(type(shared_model), "compress", lambda *arguments, **keywords: pytest.fail("compressed again"))
    assert mine(shared_model, ROWS, tmp_path / "memories", **OPTIONS) == mined


def test_answers_that_tell_nothing_make_no_document_right():
    document = {"title": "Oslo", "text": "There is no fjord like it."}
    assert has_answer(document, ["x", "OSLO"]) and has_answer(document, ["the fjord"])
    assert not has_answer(document, ["no"]) and not has_answer(document, ["the"]) and not has_answer(document, ["slo"])


@pytest.fixture
def command(checkpoint, tmp_path):
    """`command(rows, ...)`: the exit status of the command, and the rows that it wrote as training reads them."""

    def run(rows: list[dict], *options: str) -> tuple[int, list[dict] | None]:
        output = tmp_path / "hard.jsonl"
        output.unlink(missing_ok=True)
        write_lines(tmp_path / "rows.jsonl", rows)
        folders = ["--model", str(checkpoint), "--memories", str(tmp_path / "m"), "--output", str(output)]
        sizes = ["--max-words", "20", "--num-documents", "3"]
        status = main([str(tmp_path / "rows.jsonl"), *folders, *sizes, *options])
        return status, list(read_questions([str(output)])) if output.exists() else None

    return run


def test_the_command_writes_rows_that_training_reads(command, capsys):
    status, mined = command(ROWS, "--rows-of-step", "2")
    assert status == 0 and "2 of 3 rows" in capsys.readouterr().out
    assert {document_key(d) for one in mined for d in one["docs"]} <= {document_key(d) for d in DOCUMENTS}
    assert all(len(one["docs"]) == 3 for one in mined)
    assert sorted(len(one["pos_index"]) for one in mined) == [1, 2]
    _, thinned = command(ROWS, "--single-share", "0.3")
    assert [len(one["pos_index"]) for one in thinned] == [2]
    with pytest.raises(SystemExit):
        command(ROWS, "--single-share", "1")
    assert "--single-share must be from 0 to below 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pos_index": []}, "rows.jsonl:1 must have `question`, `answers` and"),
        ({"pos_index": [7]}, "rows.jsonl:1 `pos_index` must"),
        ({"docs": DOCUMENTS[6:], "pos_index": [0]}, "Raise --max-words"),
    ],
)
def test_rows_that_cannot_be_used_are_named(command, capsys, changes, message):
    assert command([{**ROWS[0], **changes}]) == (1, None)
    assert message in capsys.readouterr().err

"""Data of clara-smollm2-135m: nothing that is held out is in a training file, rows are what the stages read."""

import doctest
import gzip
import json
import random
from pathlib import Path

import pytest

from recipes.models.smollm2_135m import data as data
from recipes.models.smollm2_135m.data import NO_ANSWER, cloze, cut, is_held_back, paraphrased, words, write_files

N_PASSAGES = 60
KINDS = {"questions": "qas", "paraphrase": "paraphrase", "cloze": "qas"}
TEXT = "In {year} the town of Oslo {n} had a harbour, and its mayor was Otto Berg {n}, who liked old boats very much."


def passage(n: int) -> dict:
    text = TEXT.format(year=1800 + n, n=n)
    return {"title": f"Town {n}", "text": text, "qas": [{"question": f"Mayor of {n}?", "answers": [f"Otto Berg {n}"]}]}


def multihop(name: str, *numbers: int) -> dict:
    docs = [f"Town {n}\n {passage(n)['text']}" for n in numbers]
    return {"id": name, "question": f"Which of {name}?", "answers": ["x"], "docs": docs, "pos_index": [0, 1]}


def write_rows(folder: Path, name: str, rows: list[dict]) -> None:
    content = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(content.encode()))


@pytest.fixture
def source(tmp_path) -> Path:
    passages = [passage(n) for n in range(N_PASSAGES)]
    files = {
        "passages_a": passages,
        "corpus_b": [*passages, {"id": "1", "title": "New", "text": TEXT.format(year=1999, n="x")}],
        "multihop_c_train": [multihop("one", 100, 101, 102, 103, 104, 105), multihop("two", 200, 101, 103, 104, 105)],
        "multihop_c_dev": [multihop("three", 200, 201, 202, 203, 204)],
        "unanswerable_d": [
            {"question": "Why?", "answers": [], "docs": [f"Town {n}\n{passage(n)['text']}"]} for n in range(9)
        ],
    }
    folder = tmp_path / "source"
    folder.mkdir()
    for name, rows in files.items():
        write_rows(folder, name, rows)
    return folder


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_development_question_finds_its_documents_in_the_corpus(source, tmp_path):
    texts = [{"id": 7, "title": "TOWN 201", "text": passage(201)["text"]}, {"id": "8", "text": "No title has this."}]
    write_rows(source, "corpus_wikipedia_2wiki", texts)
    counts = write_files(source, tmp_path / "out")
    rows = read(tmp_path / "out" / "corpus.jsonl")
    assert counts["corpus"] == len(rows) == len({row["id"] for row in rows}) == 6
    assert rows[:2] == [{**texts[0], "id": "7"}, {**texts[1], "title": ""}]  # the corpus's own, and each once
    assert {row["title"].title() for row in rows[:1] + rows[2:]} == {f"Town {n}" for n in (200, 201, 202, 203, 204)}
    assert "multihop_c_dev" in rows[2]["id"]


def test_examples():
    assert doctest.testmod(data).failed == 0


def test_nothing_held_out_is_trained_on(source, tmp_path):
    counts = write_files(source, tmp_path / "out")
    held = read(tmp_path / "out" / "dev" / "passages_a.jsonl")
    assert 0 < len(held) < N_PASSAGES / 3 and all(is_held_back(row["title"], row["text"]) for row in held)
    texts, titles = {words(row["text"]) for row in held}, {row["title"] for row in held}
    pretrain = [row for kind in KINDS for row in read(tmp_path / "out" / f"pretrain_{kind}.jsonl")]
    pieces = read(tmp_path / "out" / "curriculum.jsonl")
    assert len(pieces) == counts["curriculum"] > N_PASSAGES / 2
    pretrain += pieces
    assert not [row for row in pretrain if words(row["text"]) in texts or row["title"] in titles]
    for name in ("instruct", "retrieval"):
        documents = [d for row in read(tmp_path / "out" / f"{name}.jsonl") for d in row["docs"]]
        assert not [d for d in documents if words(d["text"]) in texts or d["title"] in titles]
        for row in read(tmp_path / "out" / f"{name}.jsonl"):
            gold = [row["docs"][index] for index in row["pos_index"]]
            assert not [document for document in gold if words(document["text"]) in texts]
    questions = {row["question"] for row in read(tmp_path / "out" / "retrieval.jsonl")}
    assert "Which of one?" in questions and "Which of two?" not in questions  # its gold is gold in a development file
    assert counts["dev/multihop_c_dev"] == 1
    trained = {row["title"] for row in pretrain} - {"New"}
    assert trained == {f"Town {n}" for n in range(N_PASSAGES)} - titles


def test_rows_are_what_the_stages_read(source, tmp_path):
    write_files(source, tmp_path / "out")
    instruct, retrieval = (read(tmp_path / "out" / f"{name}.jsonl") for name in ("instruct", "retrieval"))
    for row in instruct:
        assert len(row["docs"]) <= 5 and (row["pos_index"] or row["answers"] == [NO_ANSWER])
    assert sum(row["answers"] == [NO_ANSWER] for row in instruct) > 0
    for row in retrieval:
        assert 5 <= len(row["docs"]) <= 20 and row["pos_index"]
        if row["question"].startswith("Mayor"):
            number = row["question"].split()[-1].rstrip("?")
            (index,) = row["pos_index"]
            assert row["docs"][index]["title"] == f"Town {number}" and row["answers"] == [f"Otto Berg {number}"]
    for kind, field in KINDS.items():
        rows = read(tmp_path / "out" / f"pretrain_{kind}.jsonl")
        assert rows and all({"title", "text", field} == set(row) for row in rows)


def test_the_same_twice(source, tmp_path):
    whole = write_files(source, tmp_path / "one")
    assert write_files(source, tmp_path / "two") == whole
    paths = list((tmp_path / "one").rglob("*.jsonl"))
    assert {str(path.relative_to(tmp_path / "one").with_suffix("")) for path in paths} == {
        name for name in whole if whole[name]
    }
    for path in paths:
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
        assert len(read(path)) == whole[str(path.relative_to(tmp_path / "one").with_suffix(""))]
    assert json.loads((tmp_path / "one" / "counts.json").read_text()) == {"rows": whole}


def test_a_piece_that_is_held_out_elsewhere_is_left_out():
    """A sentence of a passage can be a gold document of a development file."""
    long = {"title": "Long", "text": " ".join(TEXT.format(year=1900, n=n) for n in range(3)), "qas": []}
    long["qas"] = [{"question": f"Mayor of {n}?", "answers": [f"Otto Berg {n}"]} for n in range(3)]
    gold = {**multihop("x", 7, 8), "docs": [f"Other\n{TEXT.format(year=1900, n=1)}", "Other\n Nothing."]}
    held = data.HeldBack({}, [gold])
    kept = {row["text"] for row in data.piece_rows([long], held)}
    assert {TEXT.format(year=1900, n=n) in kept for n in (0, 2)} == {True}
    assert TEXT.format(year=1900, n=1) not in kept and long["text"] in kept


def test_cut_keeps_the_gold_documents():
    row = {"question": "?", "answers": ["x"], "docs": list("abcdefgh"), "pos_index": [2, 7]}
    for n in range(1, 9):
        short = cut(row, n, random.Random(0))
        assert [short["docs"][index] for index in short["pos_index"]] == ["c", "h"]
        assert len(short["docs"]) == max(2, n) and short["docs"] == sorted(short["docs"])


def test_cloze_takes_out_what_stands_once():
    text = "Nobody knows. The city of Kingston Upon Hull grew fast, and in 1897 it became a city of 12,500 people."
    row = cloze("Hull", text)
    (pair,) = row["qas"]
    assert pair["answers"] == ["Kingston Upon Hull"] and "____" in pair["question"] and "Hull" not in pair["question"]
    assert cloze("", "Too short.") is None and paraphrased("", "Too short.") is None


def test_what_is_missing_is_named(tmp_path, capsys):
    assert data.main([str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    assert "passages_*.jsonl.gz" in capsys.readouterr().err
    (tmp_path / "passages_a.jsonl.gz").write_bytes(b"no gzip")
    assert data.main([str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    assert "passages_a.jsonl.gz must be a whole gzip file" in capsys.readouterr().err

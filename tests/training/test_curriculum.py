"""`curriculum.py`: pieces of passages that grow longer, each with the questions that it answers."""

import doctest
from itertools import pairwise

import pytest

from modeling_clara.corpus.storage import read_lines, write_lines
from recipes.training import curriculum
from recipes.training.curriculum import BOUNDS, ROWS, curriculum_rows, pieces, stands_in, to_passage

SENTENCE = "The mayor of {town} was {name} who ruled for {n} years."  # 12 words


def passage(n: int, length: int = 6) -> dict:
    """Sentences of one town, a question for each."""
    names = [f"Otto {n}x{place}" for place in range(length)]
    lines = [SENTENCE.format(town=f"Town{n}", name=name, n=n + 7) for name in names]
    pairs = [{"question": f"Which mayor ruled, the {place}th?", "answers": [name]} for place, name in enumerate(names)]
    return {"title": f"Town {n}", "text": " ".join(lines), "qas": pairs}


FILE = [passage(n, 1 + n % 10) for n in range(100)]
PASSAGES = [to_passage(row) for row in FILE]


def level_of(row: dict) -> int:
    n_words = len(row["text"].split())
    return next(i for i, (low, high) in enumerate(pairwise(BOUNDS)) if low <= n_words < high)


def test_examples():
    assert doctest.testmod(curriculum).failed == 0


def test_rows_grow_longer_and_are_whole_sentences_of_passages_once():
    rows = curriculum_rows(PASSAGES)
    levels = [level_of(row) for row in rows]
    assert levels == sorted(levels) and set(levels) == {0, 2, 3, 4, 5, 6, 7}  # no piece has 13 to 18 words
    assert all(levels.count(level) <= n for level, n in enumerate(ROWS))
    texts = {row["title"]: row["text"] for row in PASSAGES}
    for row in rows:
        assert row["text"] in texts[row["title"]] and row["text"].endswith("years.")
        assert set(row) <= {"title", "text", "qas", "paraphrase"} and {"qas", "paraphrase"} & set(row)
        assert row.get("paraphrase", row["text"]) == row["text"] and len(row.get("qas", ())) <= 4
        assert all(stands_in(pair["answers"][0], row["text"]) == 1 for pair in row.get("qas", ()))
    assert len({(row["title"], row["text"]) for row in rows}) == len(rows)
    assert curriculum_rows([*PASSAGES, *PASSAGES]) == rows != curriculum_rows(PASSAGES, seed=1)
    shares = []
    for level in (0, 4, 6):  # the longer a piece the more rarely it is paraphrased
        again = ["paraphrase" in row for row in rows if level_of(row) == level]
        shares.append(sum(again) / len(again))
    assert shares[0] == 1 and shares == sorted(shares, reverse=True) and 0 < shares[2] < 0.4


def test_a_piece_is_asked_only_what_it_answers_alone():
    """An answer that stands in two sentences, or in none, belongs to the whole passage."""
    text = "In May 1901 the harbour of Oslo was opened. In June the harbour of Oslo was closed for the winter."
    pairs = [
        {"question": "Where?", "answers": ["Oslo", "June"]},  # the first answer counts
        {"question": "When was it closed?", "answers": ["June"]},
        {"question": "Was it cold?", "answers": ["yes"]},
        {"question": "Why?", "answers": ["the wint"]},  # part of a word
        {"question": "Which year?", "answers": [1901]},
    ]
    rows = curriculum_rows([to_passage({"text": text, "qas": pairs})])
    asked = {row["text"]: [pair["question"] for pair in row.get("qas", ())] for row in rows}
    first, second = pieces(text)[1:]
    assert asked[first] == ["Which year?"] and asked[second] == ["When was it closed?"]
    whole = [row for row in rows if row["text"] == text]
    assert len(whole) == 1 and len(whole[0]["qas"]) == 4 and whole[0]["title"] == ""
    assert all(len(pair["answers"]) == 1 and pair["answers"][0] for row in rows for pair in row.get("qas", ()))


@pytest.mark.parametrize("rows_of_step", [4, 8])
def test_steps_are_of_rows_that_are_alike_in_the_whole_file(rows_of_step):
    """Step by step from the first row on, as the trainer reads them."""
    rows = curriculum_rows(PASSAGES, rows_of_step=rows_of_step)
    kinds = [(level_of(row), "paraphrase" in row, len(row.get("qas", ()))) for row in rows]
    steps = [kinds[start : start + rows_of_step] for start in range(0, len(kinds), rows_of_step)]
    assert len(rows) % rows_of_step == 0 and all(len({level for level, *_ in step}) == 1 for step in steps)
    mixed = [step for step in steps if len(set(step)) > 1]
    assert len(mixed) < len(set(kinds))  # one at most where one kind ends and the next begins
    assert kinds != sorted(kinds)  # but the steps are not in this order


def test_white_space_is_one_space():
    loose = {**passage(1, 3), "text": "  " + passage(1, 3)["text"].replace(". ", ".\n\n  ") + "\n"}
    assert to_passage(loose) == to_passage(passage(1, 3))


def test_scale_is_a_share_of_every_level():
    wanted = [level for level, n in enumerate(ROWS) if level != 1 for _ in range(max(1, round(n / 100)))]
    assert [level_of(row) for row in curriculum_rows(PASSAGES, scale=0.01)] == wanted


# --- the command -----------------------------------------------------------------------------------------------------


def test_files_to_a_file(tmp_path, capsys):
    """Other fields, answers as texts, and passages without a title or a question are read."""
    short, asked = "A sentence of six words only.", "Another sentence of six words only."
    rows = [{**row, "source": "x"} for row in FILE[:20]]
    rows += [{"text": short, "qas": []}, {"title": None, "text": asked, "qas": [{"question": "?", "answer": "six"}]}]
    files, output = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "new" / "curriculum.jsonl"
    for path, part in zip(files, (rows[:12], rows[12:]), strict=True):
        write_lines(path, part)
    assert curriculum.main([*map(str, files), "-o", str(output)]) == 0
    written = read_lines(output)
    assert f"{len(written):,} rows" in capsys.readouterr().out and len(written) > 50
    last = {row["text"]: row.get("qas") for row in written if row["title"] == ""}
    assert last == {short: None, asked: [{"question": "?", "answers": ["six"]}]}


PAIR = {"question": "?", "answers": ["x"]}
CALLS = {
    "a.jsonl:2 must have `text` and a list `qas`": {"text": "A sentence of six words only."},
    "a.jsonl:2 must have `text` and a list": {"qas": []},
    "a.jsonl:2 must have `text` and": {"text": "x", "qas": PAIR},
    "a.jsonl:2 `docs[0]['text']` must not be empty": {"text": " ", "qas": []},
    "a.jsonl:2 `docs[0]": {"text": "x", "title": 7, "qas": []},
    "a.jsonl:2 must have an answer": {"text": "x", "qas": [{**PAIR, "answers": []}]},
    "must be a file": ["none.jsonl"],
    "--scale must be above 0, got 0": ["a.jsonl", "--scale", "0"],
    "--scale must be above 0, got inf": ["a.jsonl", "--scale", "inf"],
    "--rows-of-step must be at least 1": ["a.jsonl", "--rows-of-step", "0"],
    "must not be one of the files": ["a.jsonl", "-o", "a.jsonl"],
    "must be a .jsonl file": ["a.jsonl", "-o", "out.jsonl.gz"],
    "6 to 130 words, with a question from 13 words on": ["short.jsonl"],
}


@pytest.mark.parametrize("message", CALLS)
def test_what_cannot_be_made_is_said_and_nothing_is_written(tmp_path, monkeypatch, capsys, message):
    """Bad rows and bad calls."""
    monkeypatch.chdir(tmp_path)
    given = CALLS[message]
    row, arguments = (given, ["a.jsonl"]) if isinstance(given, dict) else (passage(2), given)
    write_lines(tmp_path / "a.jsonl", [passage(1), row])
    write_lines(tmp_path / "short.jsonl", [{"text": "Too short.", "qas": []}, {"text": "long " * 131, "qas": []}])
    (tmp_path / "out.jsonl").write_text("kept")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert curriculum.main(["-o", "out.jsonl", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

"""`curriculum.py`: pieces of passages that grow longer, each with the questions that it answers."""

import doctest
import json
import random
from itertools import pairwise

import curriculum
import pytest
from curriculum import BOUNDS, ROWS, curriculum_rows, pieces, stands_in

SENTENCE = "The mayor of {town} was {name} who ruled for {n} years."  # 12 words


def passage(n: int, length: int = 6) -> dict:
    """Sentences of one town, a question for each."""
    names = [f"Otto {n}x{place}" for place in range(length)]
    lines = [SENTENCE.format(town=f"Town{n}", name=name, n=n + 7) for name in names]
    pairs = [{"question": f"Which mayor ruled, the {place}th?", "answers": [name]} for place, name in enumerate(names)]
    return {"title": f"Town {n}", "text": " ".join(lines), "qas": pairs}


@pytest.fixture(scope="module")
def passages() -> list[dict]:
    return [passage(n, 1 + n % 10) for n in range(100)]


def level_of(row: dict) -> int:
    n_words = len(row["text"].split())
    return next(i for i, (low, high) in enumerate(pairwise(BOUNDS)) if low <= n_words < high)


def test_examples():
    assert doctest.testmod(curriculum).failed == 0


def test_rows_grow_longer_and_are_whole_sentences_of_passages(passages):
    rows = curriculum_rows(passages)
    levels = [level_of(row) for row in rows]
    assert levels == sorted(levels) and set(levels) == {0, 2, 3, 4, 5, 6, 7}  # no piece has 13 to 18 words
    assert all(levels.count(level) <= n for level, n in enumerate(ROWS))
    texts = {row["title"]: row["text"] for row in passages}
    for row in rows:
        assert row["text"] in texts[row["title"]] and row["text"].endswith("years.")
        assert set(row) <= {"title", "text", "qas", "paraphrase"} and {"qas", "paraphrase"} & set(row)
        assert row.get("paraphrase", row["text"]) == row["text"] and len(row.get("qas", ())) <= 4
        assert all(stands_in(pair["answers"][0], row["text"]) == 1 for pair in row.get("qas", ()))


def test_the_longer_a_piece_the_more_rarely_it_is_said_again(passages):
    rows = curriculum_rows(passages)
    shares = []
    for level in (0, 4, 6):
        said = ["paraphrase" in row for row in rows if level_of(row) == level]
        shares.append(sum(said) / len(said))
    assert shares[0] == 1 and shares == sorted(shares, reverse=True) and 0 < shares[2] < 0.4


def test_a_piece_is_asked_only_what_it_answers_alone():
    """An answer that stands in two sentences, or in none, belongs to the whole passage."""
    text = "In May 1901 the harbour of Oslo was opened. In June the harbour of Oslo was closed for the winter."
    pairs = [
        {"question": "Where?", "answers": ["Oslo", "June"]},  # the first answer counts
        {"question": "When was it closed?", "answers": ["June"]},
        {"question": "Was it cold?", "answers": ["yes"]},
        {"question": "Open question?", "answers": []},
        {"question": "Why?", "answers": ["the wint"]},  # part of a word
    ]
    rows = curriculum_rows([{"text": text, "qas": pairs}])
    asked = {row["text"]: [pair["question"] for pair in row.get("qas", ())] for row in rows}
    first, second = pieces(text)[1:]
    assert asked[first] == [] and asked[second] == ["When was it closed?"]
    whole = [row for row in rows if row["text"] == text]
    assert len(whole) == 1 and len(whole[0]["qas"]) == 4 and whole[0]["title"] == ""


def test_rows_of_a_step_are_alike(passages):
    for rows_of_step in (4, 8):
        rows = [row for row in curriculum_rows(passages, rows_of_step=rows_of_step) if level_of(row) == 4]
        kinds = [("paraphrase" in row, len(row["qas"])) for row in rows]
        steps = [kinds[start : start + rows_of_step] for start in range(0, len(kinds), rows_of_step)]
        mixed = [step for step in steps if len(set(step)) > 1]
        assert len(steps) > 5 and len(mixed) < len(set(kinds)) + 1
        assert kinds != sorted(kinds)  # but the steps are not


def test_seed_and_scale(passages):
    rows = curriculum_rows(passages)
    assert rows == curriculum_rows(random.Random(0).sample(passages, 0) + passages)
    assert rows != curriculum_rows(passages, seed=1)
    part = curriculum_rows(passages, scale=0.01)
    assert [level_of(row) for row in part] == [
        level for level, n in enumerate(ROWS) if level != 1 for _ in range(max(1, round(n / 100)))
    ]


# --- the command -----------------------------------------------------------------------------------------------------


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_files_to_a_file(passages, tmp_path, capsys):
    """Other fields, answers as texts, and passages without a title or a question are read."""
    mine = [{**row, "source": "x"} for row in passages]
    mine.append({"text": "A sentence of six words only.", "qas": []})
    mine.append(
        {"title": None, "text": "Another sentence of six words only.", "qas": [{"question": "?", "answer": "six"}]}
    )
    files = [write(tmp_path / "a.jsonl", mine[:50]), write(tmp_path / "b.jsonl", mine[50:])]
    output = tmp_path / "new" / "curriculum.jsonl"
    assert curriculum.main([*files, "-o", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert f"{len(rows):,} rows" in capsys.readouterr().out and len(rows) > 300
    last = {row["text"]: row for row in rows if row["title"] == ""}
    assert set(last) == {"A sentence of six words only.", "Another sentence of six words only."}
    assert last["Another sentence of six words only."]["qas"] == [{"question": "?", "answers": ["six"]}]


BAD = {
    "no questions": ({"text": "A sentence of six words only."}, "a.jsonl:2 must have `text` and `qas`"),
    "no text": ({"qas": []}, "a.jsonl:2 must have `text` and `qas`"),
    "no answer": ({"text": "x", "qas": [{"question": "?", "answers": []}]}, "a.jsonl:2 must have an answer"),
    "no list": ({"text": "x", "qas": {"question": "?"}}, "a.jsonl:2 `qas` must be a list"),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_a_bad_row_is_named_and_nothing_is_written(row, message, tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", [passage(1), row])
    assert curriculum.main([file, "-o", str(tmp_path / "out.jsonl")]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()


def test_what_cannot_be_made_is_said(tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    output.write_text("kept")
    short = write(tmp_path / "short.jsonl", [{"text": "Too short.", "qas": []}])
    calls = {
        "must be a file": [str(tmp_path / "none.jsonl")],
        "at least 6 words": [short],
        "--scale must be above 0": [short, "--scale", "0"],
        "--rows-of-step must be above 0": [short, "--rows-of-step", "0"],
    }
    for message, arguments in calls.items():
        assert curriculum.main([*arguments, "-o", str(output)]) == 1
        assert message in capsys.readouterr().err
    assert output.read_text() == "kept"

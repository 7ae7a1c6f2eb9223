"""`curriculum.py`: pieces of passages that grow longer, each with the questions that it answers."""

import doctest
import json
from itertools import pairwise

import pytest

from recipes.training import curriculum
from recipes.training.curriculum import BOUNDS, ROWS, curriculum_rows, pieces, stands_in, to_passage

SENTENCE = "The mayor of {town} was {name} who ruled for {n} years."  # 12 words


def passage(n: int, length: int = 6) -> dict:
    """Sentences of one town, a question for each."""
    names = [f"Otto {n}x{place}" for place in range(length)]
    lines = [SENTENCE.format(town=f"Town{n}", name=name, n=n + 7) for name in names]
    pairs = [{"question": f"Which mayor ruled, the {place}th?", "answers": [name]} for place, name in enumerate(names)]
    return {"title": f"Town {n}", "text": " ".join(lines), "qas": pairs}


@pytest.fixture(scope="module")
def rows_of_files() -> list[dict]:
    return [passage(n, 1 + n % 10) for n in range(100)]


@pytest.fixture(scope="module")
def passages(rows_of_files) -> list[dict]:
    return [to_passage(row) for row in rows_of_files]


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


def test_steps_are_of_rows_that_are_alike_in_the_whole_file(passages):
    """Step by step from the first row on, as the trainer reads them."""
    for rows_of_step in (4, 8):
        rows = curriculum_rows(passages, rows_of_step=rows_of_step)
        kinds = [(level_of(row), "paraphrase" in row, len(row.get("qas", ()))) for row in rows]
        steps = [kinds[start : start + rows_of_step] for start in range(0, len(kinds), rows_of_step)]
        assert len(rows) % rows_of_step == 0 and all(len({level for level, *_ in step}) == 1 for step in steps)
        mixed = [step for step in steps if len(set(step)) > 1]
        assert len(mixed) < len(set(kinds))  # one at most where one kind ends and the next begins
        assert kinds != sorted(kinds)  # but the steps are not in this order


def test_nothing_is_there_twice_and_white_space_is_one_space(passages):
    rows = curriculum_rows(passages)
    assert len({(row["title"], row["text"]) for row in rows}) == len(rows)
    assert curriculum_rows([*passages, *passages]) == rows
    loose = {**passage(1, 3), "text": "  " + passage(1, 3)["text"].replace(". ", ".\n\n  ") + "\n"}
    assert to_passage(loose) == to_passage(passage(1, 3))


def test_seed_and_scale(passages):
    assert curriculum_rows(passages) == curriculum_rows(passages) != curriculum_rows(passages, seed=1)
    part = curriculum_rows(passages, scale=0.01)
    wanted = [level for level, n in enumerate(ROWS) if level != 1 for _ in range(max(1, round(n / 100)))]
    assert [level_of(row) for row in part] == wanted


# --- the command -----------------------------------------------------------------------------------------------------


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_files_to_a_file(rows_of_files, tmp_path, capsys):
    """Other fields, answers as texts, and passages without a title or a question are read."""
    mine = [{**row, "source": "x"} for row in rows_of_files[:20]]
    mine.append({"text": "A sentence of six words only.", "qas": []})
    mine.append(
        {"title": None, "text": "Another sentence of six words only.", "qas": [{"question": "?", "answer": "six"}]}
    )
    files = [write(tmp_path / "a.jsonl", mine[:12]), write(tmp_path / "b.jsonl", mine[12:])]
    output = tmp_path / "new" / "curriculum.jsonl"
    assert curriculum.main([*files, "-o", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert f"{len(rows):,} rows" in capsys.readouterr().out and len(rows) > 50
    last = {row["text"]: row for row in rows if row["title"] == ""}
    assert set(last) == {"A sentence of six words only.", "Another sentence of six words only."}
    assert last["Another sentence of six words only."]["qas"] == [{"question": "?", "answers": ["six"]}]


BAD = {
    "no questions": ({"text": "A sentence of six words only."}, "a.jsonl:2 must have `text` and a list `qas`"),
    "no text": ({"qas": []}, "a.jsonl:2 must have `text` and a list `qas`"),
    "empty text": ({"text": " ", "qas": []}, "a.jsonl:2 `docs[0]"),
    "a title that is none": ({"text": "x", "title": 7, "qas": []}, "a.jsonl:2 `docs[0]"),
    "no answer": ({"text": "x", "qas": [{"question": "?", "answers": []}]}, "a.jsonl:2 must have an answer"),
    "no list": ({"text": "x", "qas": {"question": "?"}}, "a.jsonl:2 must have `text` and a list `qas`"),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_a_bad_row_is_named_and_nothing_is_written(row, message, tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", [passage(1), row])
    assert curriculum.main([file, "-o", str(tmp_path / "out.jsonl")]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()


def test_what_cannot_be_made_is_said(tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    output.write_text("kept")
    short = write(tmp_path / "short.jsonl", [{"text": "Too short.", "qas": []}, {"text": "long " * 131, "qas": []}])
    before = (tmp_path / "short.jsonl").read_text()
    calls = {
        "must be a file": [str(tmp_path / "none.jsonl")],
        "6 to 130 words, with a question from 13 words on": [short],
        "--scale must be above 0, got 0": [short, "--scale", "0"],
        "--scale must be above 0, got inf": [short, "--scale", "inf"],
        "--rows-of-step must be at least 1": [short, "--rows-of-step", "0"],
        "must not be one of the files": [short, "-o", short],
        "must be a .jsonl file": [short, "-o", str(tmp_path / "out.jsonl.gz")],
    }
    for message, arguments in calls.items():
        assert curriculum.main(["-o", str(output), *arguments]) == 1
        assert message in capsys.readouterr().err
    assert output.read_text() == "kept" and (tmp_path / "short.jsonl").read_text() == before
    assert len(list(tmp_path.iterdir())) == 2

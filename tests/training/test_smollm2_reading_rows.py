"""`reading.jsonl`: every question once, nothing held out, steps of stated kinds, the same rows every time."""

import json
import random

import pytest
import smollm2_source

from recipes.models.smollm2_135m import reading_rows as reading
from recipes.models.smollm2_135m.data import HeldBack, is_held_back, questions_of, words, write_files

N_STEP = sum(reading.STEP.values())


def passage(n: int, n_questions: int, n_words: int = 20) -> dict:
    qas = [{"question": f"Question {m} of {n}?", "answers": [f"{n}-{m}"]} for m in range(n_questions)]
    return {"title": f"Title {n // 7}", "text": f"passage {n} " * (n_words // 2), "qas": qas}


def multihop(n: int, n_gold: int = 2, n_documents: int = 6) -> dict:
    gold = random.Random(n).sample(range(n_documents), n_gold)
    docs = [{"title": f"D{n}", "text": f"document {m} of {n}"} for m in range(n_documents)]
    return {"question": f"Hop {n}?", "answers": ["x"], "docs": docs, "pos_index": sorted(gold)}


@pytest.fixture(scope="module")
def sources() -> dict:
    return {
        "pieces": [{"title": "", "text": f"piece {n}", "paraphrase": f"piece {n}"} for n in range(1000)],
        "passages": [passage(n, 1 + n % 13) for n in range(200)] + [passage(900, 3, 300)],
        "multihop": [multihop(n) for n in range(40)] + [multihop(50, n_gold=4), multihop(51, n_gold=0)],
        "texts": [passage(n, 2) for n in range(2000, 2050)],
    }


@pytest.fixture(scope="module")
def rows(sources) -> list[dict]:
    return reading.reading_rows(**sources)


def kind_of(row: dict) -> str:
    if "docs" in row:
        return "multihop"
    return "texts" if int(row["text"].split()[1]) >= 2000 else "passages"


def test_pieces_are_evenly_spaced_and_come_first(rows, sources):
    numbers = [int(row["text"].split()[1]) for row in rows[: reading.PIECES]]
    assert rows[: reading.PIECES] == [sources["pieces"][n] for n in numbers]
    assert numbers == sorted(set(numbers)) and numbers[0] == 0 and numbers[-1] >= 1000 - 3
    assert {later - earlier for earlier, later in zip(numbers, numbers[1:], strict=False)} == {2, 3}
    few = reading.reading_rows(**{**sources, "pieces": sources["pieces"][:5]})
    assert few[:5] == sources["pieces"][:5] and few[5:] == rows[reading.PIECES :]
    assert reading.reading_rows(**{**sources, "pieces": []}) == few[5:]


def test_every_step_has_the_stated_kinds(rows):
    steps = rows[reading.PIECES :]
    assert len(steps) % N_STEP == 0 and N_STEP == 16
    for start in range(0, len(steps), N_STEP):
        kinds = [kind_of(row) for row in steps[start : start + N_STEP]]
        assert {kind: kinds.count(kind) for kind in reading.STEP} == reading.STEP


def test_every_question_comes_once_and_long_passages_not_at_all(rows, sources):
    """But for the rows behind the last whole step, of which there are fewer than a step takes."""
    found = [row for row in rows[reading.PIECES :] if kind_of(row) == "passages"]
    assert all(1 <= len(row["qas"]) <= reading.MAX_QUESTIONS for row in found)
    asked = [pair["question"] for row in found for pair in row["qas"]]
    known = {pair["question"] for row in sources["passages"][:-1] for pair in row["qas"]}
    missing = known - set(asked)
    assert len(asked) == len(set(asked)) and set(asked) <= known
    assert len(missing) < reading.STEP["passages"] * reading.MAX_QUESTIONS
    by_text = {row["text"]: row["qas"] for row in sources["passages"]}
    assert all(pair in by_text[row["text"]] for row in found for pair in row["qas"])
    answered = [row for row in reading.passage_rows(sources["passages"], random.Random(0)) for _ in row["qas"]]
    assert len(answered) == len(known)


def test_passages_of_a_title_stand_in_runs(sources):
    rows = reading.passage_rows(sources["passages"], random.Random(1))
    runs, start = [], 0
    for place in range(1, len(rows) + 1):
        if place == len(rows) or rows[place]["title"] != rows[start]["title"]:
            runs.append(place - start)
            start = place
    assert sum(length >= reading.TITLE_RUN for length in runs) > len(runs) / 2
    assert len({row["title"] for row in rows[:40]}) > 5  # and the runs are mixed


def test_multihop_rows_read_their_gold_documents_among_others(rows, sources):
    found = [row for row in rows[reading.PIECES :] if kind_of(row) == "multihop"]
    by_question = {row["question"]: row for row in sources["multihop"]}
    places = set()
    for row in found:
        own = by_question[row["question"]]
        gold = [own["docs"][index]["text"] for index in own["pos_index"]]
        assert len(row["docs"]) == reading.NUM_READ["multihop"] and all(
            document in own["docs"] for document in row["docs"]
        )
        assert sorted(row["docs"][place]["text"] for place in row["pos_index"]) == sorted(gold)
        places |= set(row["pos_index"])
    assert places == {0, 1, 2} and {row["question"] for row in found} == {f"Hop {n}?" for n in range(40)}


def test_a_share_is_said_again(rows):
    for kind in ("passages", "texts"):
        found = [row for row in rows[reading.PIECES :] if kind_of(row) == kind]
        again = [row for row in found if "paraphrase" in row]
        assert all(row["paraphrase"] == row["text"] for row in again)
        assert len(again) / len(found) == pytest.approx(reading.PARAPHRASED, abs=0.12)


def test_the_same_seed_gives_the_same_rows(rows, sources):
    assert reading.reading_rows(**sources) == rows
    other = reading.reading_rows(**sources, seed=7)
    assert other != rows and len(other) == len(rows)


def test_the_second_run_reads_several_documents_in_every_step(sources):
    candidates = [multihop(n, n_gold=1, n_documents=3) for n in range(3000, 3040)]
    rows = reading.hard_reading_rows(sources["passages"], sources["multihop"], candidates, sources["texts"])
    assert sum(reading.HARD_STEP.values()) == N_STEP and len(rows) % N_STEP == 0
    asked = {row["question"] for row in candidates}
    for start in range(0, len(rows), N_STEP):
        kinds = [
            "candidates" if row.get("question") in asked else kind_of(row) for row in rows[start : start + N_STEP]
        ]
        assert {kind: kinds.count(kind) for kind in reading.HARD_STEP} == reading.HARD_STEP
    for row in rows:
        if "docs" in row:
            kind = "candidates" if row["question"] in asked else "multihop"
            assert len(row["docs"]) == reading.HARD_NUM_READ[kind]
            assert len(row["pos_index"]) == (1 if kind == "candidates" else 4 if row["question"] == "Hop 50?" else 2)
    assert reading.hard_reading_rows(sources["passages"], sources["multihop"], candidates, sources["texts"]) == rows


# --- of files --------------------------------------------------------------------------------------------------------


def test_questions_are_merged_by_passage_and_what_is_held_out_is_left_out():
    kept = [n for n in range(40) if not is_held_back(f"Town {n}", "")][:2]
    held_title = next(n for n in range(40) if is_held_back(f"Town {n}", ""))
    one, other, gone = (smollm2_source.passage(n) for n in (*kept, held_title))
    asked = {"question": "Asked in a development file?", "answers": ["x"]}
    unanswered = {"question": "No answer?", "answers": []}
    again = {
        **one,
        "text": one["text"].upper(),
        "qas": [*one["qas"], asked, unanswered, {**asked, "question": "New?"}],
    }
    held = HeldBack({"a": [gone]}, [{"question": asked["question"], "docs": ["T\nt", "U\nu"], "pos_index": [0]}])
    found = questions_of([one, gone, again, other], held)
    assert [row["text"] for row in found] == [one["text"], other["text"]]
    assert [pair["question"] for pair in found[0]["qas"]] == [one["qas"][0]["question"], "New?"]
    assert found[1]["qas"] == other["qas"]


def test_nothing_held_out_is_in_the_file(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    counts = write_files(smollm2_source.write_source(source), tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "reading.jsonl").read_text().splitlines()]
    assert len(rows) == counts["reading"] > N_STEP
    held = [
        json.loads(line)
        for path in (tmp_path / "out" / "dev").glob("passages_*.jsonl")
        for line in path.read_text().splitlines()
    ]
    texts, titles = {words(row["text"]) for row in held}, {row["title"] for row in held}
    questions = {pair["question"] for row in held for pair in row["qas"]}
    assert titles
    for row in rows:
        documents = row.get("docs") or [row]
        assert not [d for d in documents if words(d["text"]) in texts or d["title"] in titles]
        assert not {pair["question"] for pair in row.get("qas", ())} & questions
    assert not [row for row in rows if "dev" in row.get("question", "")]

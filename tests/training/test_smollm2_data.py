"""Data of clara-smollm2-135m: nothing held out is in a training file, and rows are what the stages and the runs read.

Files are made of `smollm2_source.py`; the steps of the runs of rows that are written here.
"""

import doctest
import random
from collections import Counter
from itertools import groupby, pairwise

import pytest
from smollm2_source import N_PASSAGES, TOWN, multihop, passage, write_source

from modeling_clara.corpus.storage import read_lines
from modeling_clara.storage_clara import read_json
from recipes.models.smollm2_135m import data
from recipes.models.smollm2_135m import reading_rows as reading
from recipes.models.smollm2_135m.data import (
    NO_ANSWER,
    cloze,
    cut,
    is_held_back,
    paraphrased,
    with_distractors,
    words,
    write_files,
)

KINDS = {"questions": "qas", "paraphrase": "paraphrase", "cloze": "qas"}
RUNS = ("reading", "reading_hard", "reading_passages", "finding")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, list[dict]]:
    """Name -> rows of every file."""
    folder = tmp_path_factory.mktemp("written")
    counts = write_files(write_source(folder / "source"), folder / "out")
    assert read_json(folder / "out" / "counts.json") == {"rows": counts}
    files = {name: read_lines(folder / "out" / f"{name}.jsonl") for name in counts}
    assert {name: len(rows) for name, rows in files.items()} == counts and all(counts.values())
    return files


def test_examples():
    assert doctest.testmod(data).failed == 0


def test_every_development_question_finds_its_documents_in_the_corpus(written):
    rows = written["corpus"]
    assert len(rows) == len({row["id"] for row in rows}) == 12  # Town 200 to 210, and the text without a title
    assert rows[0] == {"id": "201", "title": "TOWN 201", "text": passage(201)["text"]}  # the corpus's own, and once
    assert rows[10] == {"id": "no title", "title": "", "text": "No title has this."}
    assert rows[11]["title"] == "Town 200" and "multihop_hotpotqa_dev" in rows[11]["id"]


def test_nothing_held_out_is_trained_on(written):
    held = [row for name, rows in written.items() if name.startswith("dev/passages") for row in rows]
    assert 0 < len(held) < N_PASSAGES / 3 and all(is_held_back(row["title"], row["text"]) for row in held)
    titles, texts = {row["title"] for row in held}, {words(row["text"]) for row in held}
    texts |= {words(passage(n)["text"]) for n in (200, 201, 202, 203)}  # gold of development questions
    asked, trained = {pair["question"] for row in held for pair in row["qas"]}, set()
    for name, rows in written.items():
        if name.startswith("dev/") or name == "corpus":
            continue
        for row in rows:
            documents = row.get("docs") or [row]
            assert not [d for d in documents if words(d["text"]) in texts or d["title"] in titles], name
            assert not {row.get("question"), *(pair["question"] for pair in row.get("qas", ()))} & asked, name
            trained |= {document["title"] for document in documents} if "pretrain" in name else set()
    assert trained >= {"New", *(f"Town {n}" for n in range(N_PASSAGES))} - titles
    for name in ("retrieval", *RUNS):
        hops = {row["question"] for row in written[name] if "of musique" in str(row) or "of gold" in str(row)}
        known = {f"Who of musique {n}?" for n in range(3)}
        assert hops == known or (name == "reading_passages" and hops and hops < known), name  # it has too few steps
    others = {f"Town {n}" for n in range(62, N_PASSAGES)}  # of another licence than the published model's
    assert not [row for name in RUNS for row in written[name] if row.get("title") in others and "____" not in str(row)]


def test_rows_are_what_the_stages_read(written):
    for kind, field in KINDS.items():
        assert all({"title", "text", field} == set(row) for row in written[f"pretrain_{kind}"])
    assert any(row["answers"] == [NO_ANSWER] for row in written["instruct"])
    for row in written["instruct"]:
        assert len(row["docs"]) <= 5 and bool(row["pos_index"]) == (row["answers"] != [NO_ANSWER])
    for row in written["retrieval"]:
        assert 5 <= len(row["docs"]) <= 20 and row["pos_index"]
        if "mayor" in row["question"]:
            number, (index,) = row["question"].split()[-1].rstrip("?"), row["pos_index"]
            assert row["docs"][index]["title"] == f"Town {number}" and row["answers"] == [f"Otto Berg {number}"]


def test_the_same_twice(written, tmp_path):
    write_files(write_source(tmp_path / "source"), tmp_path / "out")
    assert {name: read_lines(tmp_path / "out" / f"{name}.jsonl") for name in written} == written


def test_a_piece_that_is_held_out_elsewhere_is_left_out():
    """A sentence of a passage can be a gold document of a development file."""
    sentences = [TOWN.format(year=1900, n=n).partition(" It had")[0] for n in range(3)]
    pairs = [{"question": f"Mayor of {n}?", "answers": [f"Otto Berg {n}"]} for n in range(3)]
    long = {"title": "Long", "text": " ".join(sentences), "qas": pairs}
    held = data.HeldBack({}, [{**multihop("x", 7)[0], "docs": [f"Other\n{sentences[1]}", "Other\n Nothing."]}])
    kept = {row["text"] for row in data.piece_rows([long], held)}
    assert [sentence in kept for sentence in sentences] == [True, False, True] and long["text"] in kept


@pytest.mark.parametrize("n", range(1, 9))
def test_cut_keeps_the_gold_documents(n):
    row = {"question": "?", "answers": ["x"], "docs": list("abcdefgh"), "pos_index": [2, 7]}
    short = cut(row, n, random.Random(0))
    assert [short["docs"][index] for index in short["pos_index"]] == ["c", "h"]
    assert len(short["docs"]) == max(2, n) and short["docs"] == sorted(short["docs"])


def test_cloze_takes_out_what_stands_once():
    text = "Nobody knows. The city of Kingston Upon Hull grew fast, and in 1897 it became a city of 12,500 people."
    (pair,) = cloze("Hull", text)["qas"]
    assert pair["answers"] == ["Kingston Upon Hull"] and "____" in pair["question"] and "Hull" not in pair["question"]
    assert cloze("", "Too short.") is None and paraphrased("", "Too short.") is None


def test_questions_are_merged_by_passage_and_what_is_held_out_is_left_out():
    kept = [n for n in range(40) if not is_held_back(f"Town {n}", "")][:2]
    one, other, gone = map(passage, (*kept, next(n for n in range(40) if is_held_back(f"Town {n}", ""))))
    asked, new = {"question": "Asked in a development file?", "answers": ["x"]}, {"question": "New?", "answers": ["x"]}
    again = {**one, "text": one["text"].upper(), "qas": [*one["qas"], asked, {"question": "No?", "answers": []}, new]}
    held = data.HeldBack({"a": [gone]}, [{**asked, "docs": ["T\nt", "U\nu"], "pos_index": [0]}])
    found = data.questions_of([one, gone, again, other], held)
    assert found == [{**one, "qas": [*one["qas"], new]}, other]


def test_what_is_missing_is_named(tmp_path, capsys):
    for message in ("passages_*.jsonl.gz", "passages_a.jsonl.gz must be a whole gzip file"):
        assert data.main([str(tmp_path), "--output", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
        (tmp_path / "passages_a.jsonl.gz").write_bytes(b"no gzip")


# --- steps of the runs -----------------------------------------------------------------------------------------------


def asked_passage(n: int, n_questions: int, n_words: int = 20) -> dict:
    qas = [{"question": f"Question {m} of {n}?", "answers": [f"{n}-{m}"]} for m in range(n_questions)]
    return {"title": f"Title {n // 7}", "text": f"passage {n} " * (n_words // 2), "qas": qas}


def hop(n: int, n_gold: int = 2, n_documents: int = 6) -> dict:
    docs = [{"title": f"D{n}", "text": f"document {m} of {n}"} for m in range(n_documents)]
    gold = sorted(random.Random(n).sample(range(n_documents), n_gold))
    return {"question": f"Hop {n}?", "answers": ["x"], "docs": docs, "pos_index": gold}


SOURCES = {
    "pieces": [{"title": "", "text": f"piece {n}", "paraphrase": f"piece {n}"} for n in range(1000)],
    "passages": [asked_passage(n, 1 + n % 13) for n in range(200)] + [asked_passage(900, 3, 300)],
    "multihop": [hop(n) for n in range(40)] + [hop(50, n_gold=4), hop(51, n_gold=0)],
    "texts": [asked_passage(n, 2) for n in range(2000, 2050)],
}
CANDIDATES = [{**hop(n, n_gold=1, n_documents=3), "question": f"Which {n}?"} for n in range(40)]
ROWS = reading.reading_rows(**SOURCES)
STEPS = ROWS[reading.PIECES :]
LATER = reading.later_reading_rows(
    **{name: SOURCES[name] for name in ("passages", "multihop", "texts")}, candidates=CANDIDATES
)


def kind_of(row: dict) -> str:
    if "docs" in row:
        return "multihop" if row["question"].startswith("Hop") else "candidates"
    return "texts" if int(row["text"].split()[1]) >= 2000 else "passages"


def test_pieces_are_evenly_spaced_and_come_first():
    numbers = [int(row["text"].split()[1]) for row in ROWS[: reading.PIECES]]
    assert ROWS[: reading.PIECES] == [SOURCES["pieces"][n] for n in numbers]
    assert numbers[0] == 0 and numbers[-1] >= 1000 - 3
    assert {later - earlier for earlier, later in pairwise(numbers)} == {2, 3}
    for few in (SOURCES["pieces"][:5], []):
        assert reading.reading_rows(**{**SOURCES, "pieces": few}) == few + STEPS
    assert reading.reading_rows(**SOURCES, seed=7) != ROWS


@pytest.mark.parametrize(
    "step, rows, num_read",
    [
        (reading.STEP, STEPS, reading.NUM_READ),
        (reading.HARD_STEP, LATER["reading_hard"], reading.HARD_NUM_READ),
        (reading.PASSAGES_STEP, LATER["reading_passages"], reading.HARD_NUM_READ),
    ],
)
def test_every_step_has_the_stated_kinds_and_all_gold_documents(step, rows, num_read):
    """Among others of their row, at any place."""
    assert sum(step.values()) == 16 and len(rows) % 16 == 0 and len(rows)
    for start in range(0, len(rows), 16):
        assert Counter(map(kind_of, rows[start : start + 16])) == step
    own, places, asked = {row["question"]: row for row in [*SOURCES["multihop"], *CANDIDATES]}, set(), set()
    for row in rows:
        if "docs" in row:
            given = own[row["question"]]
            gold = [given["docs"][index] for index in given["pos_index"]]
            assert len(row["docs"]) == num_read[kind_of(row)] and all(doc in given["docs"] for doc in row["docs"])
            assert len(row["pos_index"]) == len(gold) and all(row["docs"][place] in gold for place in row["pos_index"])
            places |= set(row["pos_index"])
            asked.add(row["question"])
    assert places == set(range(max(num_read.values())))
    fitting = [*range(40), *([50] if num_read["multihop"] > 3 else [])]  # of the rows with 1 to so many gold ones
    hops = {question for question in asked if own[question] in SOURCES["multihop"]}
    known = {f"Hop {n}?" for n in fitting}
    n_asked = min(len(known), step["multihop"] * len(rows) // 16)  # a short file has fewer
    assert hops <= known and len(hops) == n_asked


def test_every_question_comes_once_and_long_passages_not_at_all():
    """But for the rows after the last whole step, of which there are fewer than a step takes."""
    found = [row for row in STEPS if kind_of(row) == "passages"]
    assert all(1 <= len(row["qas"]) <= reading.MAX_QUESTIONS for row in found)
    asked = [pair["question"] for row in found for pair in row["qas"]]
    known = {pair["question"] for row in SOURCES["passages"][:-1] for pair in row["qas"]}
    assert len(asked) == len(set(asked)) and set(asked) <= known
    assert len(known) - len(asked) < reading.STEP["passages"] * reading.MAX_QUESTIONS
    by_text = {row["text"]: row["qas"] for row in SOURCES["passages"]}
    assert all(pair in by_text[row["text"]] for row in found for pair in row["qas"])
    assert len(known) == sum(len(row["qas"]) for row in reading.passage_rows(SOURCES["passages"], random.Random(0)))


def test_questions_that_find_are_half_multihop_and_ask_all_passages_before_one_again():
    questions = [{**pair, "gold": [data.bare(row)]} for row in SOURCES["passages"] for pair in row["qas"]]
    n_steps, size, gold = 20, reading.FINDING_STEP, {row["question"]: row["gold"] for row in questions}
    rows = reading.finding_rows(questions, SOURCES["multihop"], n_steps)
    assert len(rows) == n_steps * 2 * size and rows != reading.finding_rows(questions, SOURCES["multihop"], n_steps, 7)
    single = [row for place, row in enumerate(rows) if place % (2 * size) < size]
    several = [row for place, row in enumerate(rows) if place % (2 * size) >= size]
    assert all(row["docs"] == gold[row["question"]] and row["pos_index"] == [0] for row in single)
    times = Counter(row["docs"][0]["text"] for row in single)
    assert len(times) == len(SOURCES["passages"]) and set(times.values()) == {1, 2}
    assert len({row["question"] for row in single}) == len(single)
    known = [row for row in SOURCES["multihop"] if row["pos_index"]]
    assert all(several.count(row) in (len(several) // len(known), len(several) // len(known) + 1) for row in known)
    few = reading.finding_rows(questions[:40], SOURCES["multihop"], n_steps)
    assert len(few) == 2 * 2 * size  # whole steps


def test_passages_of_a_title_stand_in_runs():
    rows = reading.passage_rows(SOURCES["passages"], random.Random(1))
    runs = [len(list(run)) for _, run in groupby(rows, key=lambda row: row["title"])]
    assert sum(length >= reading.TITLE_RUN for length in runs) > len(runs) / 2
    assert len({row["title"] for row in rows[:40]}) > 5  # and the runs are mixed


@pytest.mark.parametrize("kind", ["passages", "texts"])
def test_a_share_is_paraphrased(kind):
    found = [row for row in STEPS if kind_of(row) == kind]
    again = [row for row in found if "paraphrase" in row]
    assert all(row["paraphrase"] == row["text"] for row in again)
    assert len(again) / len(found) == pytest.approx(reading.PARAPHRASED, abs=0.12)


# --- candidates ------------------------------------------------------------------------------------------------------

COLOURS = ("red", "green", "blue", "white", "black", "grey")
SHIPS = [
    {"title": f"The {colour} ship (vessel)", "text": f"It was built of wood in {n}. All its masts were {colour}."}
    for n, colour in enumerate(COLOURS, 1800)
]


@pytest.mark.parametrize("n_documents", [1, 2, 4, 20])
def test_all_gold_documents_are_kept_once_and_marked(n_documents):
    gold = [SHIPS[0], SHIPS[2]]
    row = {"question": "Is the red or the blue ship older?", "answers": ["red"], "gold": [*gold, SHIPS[0]]}
    (made,) = with_distractors([row], n_documents, random.Random(0), SHIPS)
    assert [made["docs"][index] for index in made["pos_index"]] in (gold, gold[::-1])
    assert len(made["docs"]) == max(2, min(n_documents, len(SHIPS))) == len({d["text"] for d in made["docs"]})
    assert made["question"] == row["question"] and made["answers"] == ["red"]


def test_the_best_of_bm25_are_the_distractors():
    rows = [{"question": f"Which masts were {c}?", "answers": [c], "gold": [SHIPS[n]]} for n, c in enumerate(COLOURS)]
    asked = {"question": "Green or white masts, or grey ones?", "answers": ["red"], "gold": [SHIPS[0]]}
    *_, made = with_distractors([*rows, asked], 4, random.Random(0))
    assert {document["title"].split()[1] for document in made["docs"]} == {"red", "green", "white", "grey"}

"""Checks without a model as filters and figures of data sets; leaks of evaluation files."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from modeling_clara.corpus.sources import DocumentSource
from modeling_clara.synthesis.budget import read_prices
from modeling_clara.synthesis.checks import (
    check_of,
    keep_passing,
    passes,
    run_checks,
    summarize,
)
from modeling_clara.synthesis.documents import WordSplitter, read_chunks
from modeling_clara.synthesis.leakage import LeakageGuard

TARN = (
    "Tarn is a town of 12,500 people in the north of Poland. Its tower was built in 1912 by Ilse Brand, a German "
    "architect, and is 43.5 m high. The season 2012–13 brought 1.5 million visitors. The U.L.A. has three members."
)


# --- all checks, rows, data sets -------------------------------------------------------------------------------------

GOOD = {"question": "Who built the tower of Tarn?", "answers": ["Ilse Brand"]}
BAD = {"question": "When was the tower of Tarn built?", "answers": ["in 1913"]}
ROWS = [
    {"title": "Tarn", "text": TARN, "qas": [GOOD, BAD], "paraphrase": TARN},
    {"title": "Tarn", "text": TARN, "qas": [GOOD], "paraphrase": None},
]


def test_every_reason_is_named():
    reasons = run_checks(TARN, "Wer?", "Otto Wagner in 1850", others=[("Wer?", "Otto Wagner in 1850")])
    assert [check_of(reason) for reason in reasons] == ["length", "numbers", "names", "answer", "duplicate"]


def test_filter_and_map_of_datasets():
    rows = Dataset.from_list(ROWS)
    assert rows.filter(passes).to_list() == [ROWS[1]]
    kept = rows.map(keep_passing).to_list()
    assert [row["qas"] for row in kept] == [[GOOD], [GOOD]] and [row["paraphrase"] for row in kept] == [None, None]
    assert [[check_of(r["reasons"][0]) for r in row["rejects"]] for row in kept] == [["numbers", "copied"], []]


def test_the_summary_counts_shares():
    summary = summarize(ROWS)
    assert summary["pair"] == {
        "n": 3,
        "passed": 2 / 3,
        "failed": {"numbers": 1 / 3},
        "stands_in_document": 2 / 3,
    }
    assert summary["paraphrase"] == {"n": 1, "passed": 0.0, "failed": {"copied": 1.0}}


# --- leaks -----------------------------------------------------------------------------------------------------------

LONG = "Which architect from Germany built the tower of the town of Tarn in the year 1912?"
EVALUATION = [
    {
        "question": "Who built it, then?",
        "docs": [{"title": "A", "text": TARN}, "Other\nA text that is no gold document of the row."],
        "pos_index": [0],
    },
    {"title": "B", "text": "The lake of Orme lies deep in the woods behind the mill.", "qas": [{"question": LONG}]},
]


@pytest.fixture(params=["dev.jsonl", "dev.jsonl.gz", "dev.parquet"])
def files(request, tmp_path):
    """One file a row, because their columns differ."""
    paths = []
    for number, row in enumerate(EVALUATION):
        path = tmp_path / f"{number}-{request.param}"
        if path.suffix == ".parquet":
            row = {
                **row,
                "docs": [entry if isinstance(entry, str) else entry["text"] for entry in row.get("docs", [])],
            }
            pq.write_table(pa.Table.from_pylist([{**row, "docs": row["docs"] or None}]), path)
        else:
            with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
                file.write(json.dumps(row) + "\n")
        paths.append(path)
    return paths


def test_the_same_and_nearly_the_same_are_leaks(files):
    guard = LeakageGuard(files)
    for text in ("who built it then", LONG.upper(), TARN, EVALUATION[1]["text"]):
        assert guard.check(text).startswith("leakage: it is in ")
    near = LONG.replace("Which architect", "What architect")
    assert guard.check(near).startswith("leakage: ") and guard.check(f"Poland. {TARN} It rains.")
    for text in ("Who built it?", "A text that is no gold document of the row.", "Which architect built the tower?"):
        assert guard.check(text) is None
    assert check_of(run_checks(TARN, LONG, "Ilse Brand", guard=guard)[-1]) == "leakage"
    assert not passes({**ROWS[1], "qas": [{"question": LONG, "answers": ["Ilse Brand"]}]}, guard)


def test_an_evaluation_on_the_documents_themselves_guards_questions_only(files):
    guard = LeakageGuard(files, documents=False)
    assert guard.check(TARN) is None and guard.check(LONG)


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"a": 1}\n', "must have questions or texts, found none"), ("[1]\n", "dev.jsonl:1 must be a JSON object")],
)
def test_a_file_that_guards_nothing_is_an_error(tmp_path, content, message):
    (tmp_path / "dev.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        LeakageGuard([tmp_path / "dev.jsonl"])


def test_one_changed_word_makes_no_new_question_and_a_longer_document_no_new_text(tmp_path):
    text = " ".join(f"In {1900 + n} the tower of Tarn had {n} floors." for n in range(8))
    rows = [{"question": "In which year was the great tower of Tarn built?"}, {"text": text}]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    guard = LeakageGuard([tmp_path / "dev.jsonl"])
    assert guard.check("in which year was the big tower of tarn built") is not None
    assert guard.check("In which year was the great tower of Selby built?") is None  # another tower
    around = " ".join(f"The mill of Selby ground {n} sacks that year." for n in range(30))
    assert guard.check(f"{around} {text} {around}") == "leakage: it has 100% of a text of evaluation files"
    assert guard.check(around) is None


def test_half_a_character_costs_its_document_alone():
    rows = [{"text": "Half a \ud83d here."}, {"text": "The mill of Orme."}]
    bad, (chunk,) = read_chunks(DocumentSource(rows), WordSplitter())
    assert bad.status == "failed" and "lone surrogate" in bad.problem and chunk["text"] == "The mill of Orme."


def test_the_second_document_of_an_id_is_left_out():
    rows = [{"id": "a", "text": "One."}, {"id": "a", "text": "Two."}, {"id": "b", "text": "Three."}]
    (first,), bad, (last,) = read_chunks(DocumentSource(rows), WordSplitter())
    assert (first["text"], last["id"]) == ("One.", "b#0") and "the id 'a', which is there already" in bad.problem


@pytest.mark.parametrize(
    "text", ["{bad", '{"m": {"prompt": -1, "completion": 1}}', '{"m": {"prompt": 1, "completion": NaN}}']
)
def test_prices_that_are_none_name_the_file(tmp_path, text):
    (tmp_path / "prices.json").write_text(text)
    with pytest.raises(ValueError, match="prices.json must"):
        read_prices(tmp_path / "prices.json", "m")

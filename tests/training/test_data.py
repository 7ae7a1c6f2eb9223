"""Rows of every format into records: exact records, spans with their gold ones, errors with file and line.

Files are written to disk and read through `load_records`; expectations are written out or computed with the processor.
"""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from tiny import build_tokenizer
from trl.scripts.utils import DatasetConfig

from modeling_clara import CLaRaProcessor
from recipes.training.data import BadRow
from recipes.training.mixtures import load_records
from recipes.training.records import RecordReader

LONG = " ".join(f"w{number}" for number in range(40))


@pytest.fixture(scope="module")
def processor() -> CLaRaProcessor:
    return CLaRaProcessor(build_tokenizer(), document_max_length=32, document_overlap=4)


@pytest.fixture
def reader(processor):
    """`reader(stage, **settings)` with a window in which everything fits."""

    def build(stage: str = "instruct", **settings) -> RecordReader:
        return RecordReader(processor, stage, **{"window": 512, "memory_size": 4, "top_k": 1, **settings})

    return build


def write(path: Path, rows: list) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        for row in rows:
            file.write((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n")
    return path


@pytest.fixture
def load(tmp_path):
    """`load(reader, rows)` writes rows.jsonl and reads it; `load(reader, path, ...)` reads what is there."""

    def run(reader: RecordReader, *sources, seed: int = 0) -> Dataset:
        if isinstance(sources[0], list):
            sources = [write(tmp_path / "rows.jsonl", sources[0])]
        configs = [s if isinstance(s, DatasetConfig) else DatasetConfig(path=str(s)) for s in sources]
        return load_records(configs, reader, seed, tmp_path / "run")

    return run


def plain(text: str, title: str = "") -> dict:
    return {"title": title, "text": text}


def without(record: dict, *names: str) -> dict:
    return {name: value for name, value in record.items() if name not in names}


# --- formats ---------------------------------------------------------------------------------------------------------

FORMATS = {
    "passage": (
        {
            "title": " Rome ",
            "text": " Rome is old.\n",
            "qas": [{"question": " How old? ", "answers": ["very", "old"]}, {"question": "Is it?", "answer": "yes"}],
            "paraphrase": "An old city.",
        },
        [plain("Rome is old.", "Rome")],
        [("How old?", "very"), ("Is it?", "yes"), (None, "An old city.")],
    ),
    "passage, paraphrase alone": ({"text": "a", "paraphrase": "b"}, [plain("a")], [(None, "b")]),
    "reference, questions": (
        {"data_type": "qa", "question": ["q1", "q2"], "answers": ["a1", "a2"], "docs": ["T\na\nb"]},
        [plain("a\nb", "T")],
        [("q1", "a1"), ("q2", "a2")],
    ),
    "reference, nested answers": (
        {"data_type": "qa", "question": ["q1"], "answers": [["a1", "a2"]], "docs": ["a"]},
        [plain("a")],
        [("q1", "a1")],
    ),
    "reference, paraphrase": (
        {"data_type": "paraphrase", "question": ["Restate: "], "answers": ["b"], "docs": ["a"]},
        [plain("a")],
        [(None, "b")],
    ),
    "one answer": ({"question": "q", "docs": ["a"], "answer": "b"}, [plain("a")], [("q", "b")]),
    "gold answers": ({"question": "q", "docs": ["a"], "gold_answer": ["b", "c"]}, [plain("a")], [("q", "b")]),
    "answers": ({"question": "q", "docs": ["a"], "answers": ["b", "c"]}, [plain("a")], [("q", "b")]),
    "a number": ({"question": "q", "docs": ["a"], "answer": 1969}, [plain("a")], [("q", "1969")]),
    "documents of all kinds": (
        {
            "question": "q",
            "documents": [
                "a",
                "T\nb",
                {"text": "c"},
                {"title": None, "text": "d"},
                {"title": "U", "text": "e", "id": 1},
            ],
            "answer": "x",
        },
        [plain("a"), plain("b", "T"), plain("c"), plain("d"), plain("e", "U")],
        [("q", "x")],
    ),
    "a document by itself": ({"question": "q", "docs": "a", "answer": "x"}, [plain("a")], [("q", "x")]),
    "first lines that are no title": (
        {"question": "q", "docs": ["\na", "  \na", "a\n \n"], "answer": "x"},
        [plain("a"), plain("a"), plain("a")],
        [("q", "x")],
    ),
    "missing fields as null": (
        {"question": "q", "docs": None, "text": "a", "answer": None, "gold_answer": "x", "pos_index": None},
        [plain("a")],
        [("q", "x")],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("stage", ["pretrain", "joint"])
def test_every_format_gives_exactly_these_records(load, reader, name, stage):
    row, documents, targets = FORMATS[name]
    if stage == "joint":  # a record of each question; a paraphrase selects nothing
        chunks = [[target] for target in targets if target[0] is not None]
        if not chunks:
            with pytest.raises(BadRow, match="rows.jsonl:1 must have a question: this stage learns no paraphrases"):
                load(reader(stage), [row])
            return
    else:
        chunks = [targets[:2], *([targets[2:]] if targets[2:] else [])]
    records = list(load(reader(stage, targets_per_document=2), [row]))
    assert [without(record, "source", "length") for record in records] == [
        {
            "documents": documents,
            "positives": [],
            "questions": [question for question, _ in chunk],
            "answers": [answer for _, answer in chunk],
        }
        for chunk in chunks
    ]
    assert {record["source"].rpartition("/")[2] for record in records} == {"rows.jsonl:1"}


def test_a_field_that_is_null_is_one_that_is_missing(load, reader):
    row = {"question": "q", "documents": ["a"], "answer": "x"}
    expected = list(load(reader(), [row]))
    for name in ("qas", "docs", "answers", "gold_answer", "pos_index", "paraphrase", "data_type", "text"):
        assert list(load(reader(), [{**row, name: None}])) == expected
    pair = {"question": "q", "answers": None, "answer": "x"}
    assert list(load(reader(), [{"text": "a", "qas": [pair]}])) == expected


def test_a_text_whose_first_line_is_long_has_no_title(load, reader):
    (record,) = load(reader(window=2000), [{"question": "q", "docs": ["x" * 300 + "\ny"], "answer": "a"}])
    assert {document["title"] for document in record["documents"]} == {""}


def test_stage_three_learns_the_gold_answer_and_the_others_the_teachers(load, reader):
    row = {"question": "q", "docs": ["a"], "answers": ["third"], "gold_answer": ["gold"], "answer": "teacher"}
    assert [load(reader(stage), [row])["answers"] for stage in ("instruct", "joint")] == [[["teacher"]], [["gold"]]]


def test_parquet_gz_and_a_folder_give_the_records_of_the_plain_file(load, reader, tmp_path):
    rows = [
        {"question": "q1", "docs": ["T\na", "b"], "gold_answer": "x", "pos_index": [1]},
        {"question": "q2", "docs": ["c"], "answers": ["y", "z"]},
    ]
    expected = [without(record, "source") for record in load(reader(), rows)]
    (tmp_path / "folder").mkdir()
    paths = [
        write(tmp_path / "rows.jsonl.gz", rows),
        write(tmp_path / "folder" / "train.jsonl", rows).parent,
        tmp_path / "rows.parquet",
    ]
    pq.write_table(pa.Table.from_pylist([dict.fromkeys(rows[0] | rows[1]) | row for row in rows]), paths[-1])
    for path in paths:
        records = list(load(reader(), path))
        assert [without(record, "source") for record in records] == expected
        assert [record["source"] for record in records] == [f"{path}:1", f"{path}:2"]


def test_blank_lines_are_skipped_and_counted(load, reader):
    row = {"question": "q", "docs": ["a"], "answer": "x"}
    records = load(reader(), [b"", row, b"  ", row])
    assert [record["source"].rpartition(":")[2] for record in records] == ["2", "4"]


def test_the_length_of_a_record_is_that_of_its_longest_prompt(load, reader, processor):
    row = {"text": "a", "qas": [{"question": "q", "answer": "x" * n} for n in (3, 9, 5)]}
    lengths = [len(processor.build_prompt("q", 1, 4, "x" * n).input_ids) for n in (9, 5)]
    assert load(reader("pretrain", targets_per_document=2), [row])["length"] == lengths
    row = {"question": "q", "docs": list("abcde"), "answer": "x"}
    assert load(reader("joint", top_k=3), [row])["length"] == [len(processor.build_prompt("q", 3, 4, "x").input_ids)]


# --- spans and candidates --------------------------------------------------------------------------------------------


def test_long_documents_are_split_and_their_spans_stay_gold(load, reader, processor):
    rows = [{"question": "q", "docs": ["a", {"title": "T", "text": LONG}, "b"], "answer": "x", "pos_index": [2, 1]}]
    spans = [plain(span["text"], "T") for span in processor.split_document(plain(LONG, "T"))]
    assert len(spans) > 2
    (record,) = load(reader(window=4000), rows)
    assert record["documents"] == [plain("a"), *spans, plain("b")]
    assert record["positives"] == list(range(1, len(spans) + 2))
    (record,) = load(reader(long_documents="first_span"), rows)
    assert record["documents"] == [plain("a"), spans[0], plain("b")]
    assert record["positives"] == [1, 2]


def test_candidates_are_cut_behind_num_candidates_and_gold_is_kept_in_its_place(load, reader):
    row = {"question": "q", "docs": list("abcdef"), "answer": "x", "pos_index": [1, 5]}
    for n, kept, positives in ((6, "abcdef", [1, 5]), (4, "abcf", [1, 3]), (2, "bf", [0, 1]), (1, "b", [0])):
        (record,) = load(reader("joint", num_candidates=n), [row])
        assert "".join(document["text"] for document in record["documents"]) == kept
        assert record["positives"] == positives
    (record,) = load(reader("instruct", num_candidates=2), [row])
    assert len(record["documents"]) == 6  # a stage that reads all documents cuts none


def test_pos_index_may_be_a_number(load, reader):
    row = {"question": "q", "docs": ["a", "b"], "answer": "x", "pos_index": 1}
    assert load(reader(), [row])["positives"] == [[1]]


def test_pos_index_may_be_the_number_zero(load, reader):
    row = {"question": "q", "docs": ["a", "b"], "answer": "x", "pos_index": 0}
    assert load(reader(), [row])["positives"] == [[0]]


def test_targets_are_chunked_and_share_their_document(load, reader):
    row = {"text": "a", "qas": [{"question": f"q{i}", "answer": f"a{i}"} for i in range(5)], "paraphrase": "p"}
    for size, counts in ((1, [1] * 6), (4, [4, 2]), (6, [6]), (9, [6])):
        records = load(reader("pretrain", targets_per_document=size), [row])
        assert [len(record["questions"]) for record in records] == counts
        assert sum(records["questions"], []) == [*(f"q{i}" for i in range(5)), None]
        assert sum(records["answers"], []) == [*(f"a{i}" for i in range(5)), "p"]


# --- errors ----------------------------------------------------------------------------------------------------------

GOOD = {"question": "q", "docs": ["a", "b"], "answer": "x"}
BAD_ROWS = {
    "no answer": ("joint", without(GOOD, "answer"), r"must have an answer that is a text and not empty, got None"),
    "an empty answer": ("joint", {**GOOD, "answer": " "}, r"must have an answer .* got ' '"),
    "a truth value": ("joint", {**GOOD, "answer": True}, r"must have an answer .* got True"),
    "no question": ("joint", without(GOOD, "question"), r"must have `question` and `answers`, `qas`, or `paraphrase`"),
    "an empty question": ("joint", {**GOOD, "question": ""}, r"`question` must be a text that is not empty, got ''"),
    "unpaired": (
        "pretrain",
        {"question": ["q", "r"], "answers": ["x"], "docs": ["a"]},
        r"must have as many `answers` as entries in `question`",
    ),
    "no documents": ("joint", {**GOOD, "docs": []}, r"must have `docs` or `text` with at least one document"),
    "an empty document": ("joint", {**GOOD, "docs": ["a", "\n"]}, r"`docs\[1\]` must not be empty"),
    "a document without text": (
        "joint",
        {**GOOD, "docs": [{"title": "T"}]},
        r"`docs\[0\]` must have the field 'text'",
    ),
    "a document of no text": ("joint", {**GOOD, "docs": [3]}, r"`docs\[0\]` must be a str or a dict, got int"),
    "a lone surrogate": ("joint", {**GOOD, "docs": ["a\ud800"]}, r"`docs\[0\]` must be valid UTF-8"),
    "a gold index too high": (
        "joint",
        {**GOOD, "pos_index": [0, 2]},
        r"`pos_index` must hold numbers from 0 to 1, got \[0, 2\]",
    ),
    "a negative gold index": ("joint", {**GOOD, "pos_index": [-1]}, r"`pos_index` must .* from 0 to 1, got \[-1\]"),
    "a gold index that is a text": ("joint", {**GOOD, "pos_index": ["0"]}, r"`pos_index` must .* got \['0'\]"),
    "few candidates": (
        "joint",
        {**GOOD, "docs": ["a"]},
        r"must have at least `retrieval_top_k` \(2\) candidates, got 1; lower `retrieval_top_k` or add documents",
    ),
    "unknown gold": ("contrastive", GOOD, r"must have `pos_index`: the stage learns from known gold"),
    "a long target": (
        "pretrain",
        {**GOOD, "answer": "x" * 500},
        r"needs \d{3} positions for 2 memories of 4, question and answer, the backbone has 512; shorten the answer",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_cannot_be_trained_on_is_named_with_file_line_and_rule(load, reader, tmp_path, name):
    stage, row, message = BAD_ROWS[name]
    good = {**GOOD, "pos_index": [1]}
    with pytest.raises(
        BadRow, match=rf"1 row\(s\) cannot be trained on. Correct .*:\n  {tmp_path}/rows.jsonl:3 {message}"
    ):
        load(reader(stage, top_k=2), [good, good, row, good])


MALFORMED = {
    "docs is a number": {**GOOD, "docs": 5},
    "docs holds a number": {**GOOD, "docs": [5]},
    "qas holds no dicts": {"text": "a", "qas": ["q"]},
    "qas is a text": {"text": "a", "qas": "q"},
    "a pair without question": {"text": "a", "qas": [{"answers": ["x"]}]},
    "a question that is null": {"question": [None], "answers": ["x"], "docs": ["a"]},
    "a gold index that is no int": {**GOOD, "pos_index": 1.0},
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_field_of_the_wrong_type_is_a_bad_row(reader, name):
    with pytest.raises(BadRow, match="^rows.jsonl:7 "):
        reader("pretrain")("rows.jsonl:7", MALFORMED[name])


def test_one_document_needs_no_list(reader):
    (record,) = reader("pretrain")("rows.jsonl:7", {**GOOD, "docs": {"title": "T", "text": "a"}, "pos_index": 0})
    assert record["documents"] == [{"title": "T", "text": "a"}] and record["positives"] == [0]


def test_bad_rows_are_counted_and_three_are_named(load, reader):
    bad = without(GOOD, "answer")
    with pytest.raises(BadRow) as raised:
        load(reader(), [bad, GOOD, bad, bad, bad, bad])
    lines = str(raised.value).split("\n")
    assert lines[0].startswith("5 row(s) cannot be trained on.")
    assert [line.partition("rows.jsonl:")[2][:1] for line in lines[1:4]] == ["1", "3", "4"]
    assert lines[4:] == ["  ..."]
    with pytest.raises(BadRow) as raised:
        load(reader(), [bad, bad, bad])
    assert len(str(raised.value).split("\n")) == 4


def test_a_line_that_is_no_object_is_named(load, reader, tmp_path):
    expected = f"{tmp_path}/rows.jsonl:2 must be a JSON object, got list. Correct or remove the line"
    with pytest.raises(ValueError, match=expected):
        load(reader(), [GOOD, b"[1]"])


@pytest.mark.parametrize("line", [b'{"a": ', b'"\xff"'], ids=["JSON", "UTF-8"])
def test_a_line_that_is_no_json_in_utf8_is_named(load, reader, tmp_path, line):
    with pytest.raises(
        ValueError, match=f"{tmp_path}/rows.jsonl:2 must be JSON in UTF-8: .*Correct or remove the line"
    ):
        load(reader(), [GOOD, line])


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.jsonl.gz", "absent.parquet"])
def test_a_missing_file_is_named(load, reader, tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"`{tmp_path}/{name}` must be a file, found none. Correct the path"):
        load(reader(), tmp_path / name)


@pytest.mark.parametrize("damage", [lambda data: data[:-12], lambda data: b"plain" + data], ids=["cut", "no gzip"])
def test_a_damaged_gz_is_named(load, reader, tmp_path, damage):
    path = write(tmp_path / "rows.jsonl.gz", [GOOD] * 9)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises((OSError, ValueError), match="rows.jsonl.gz"):
        load(reader(), path)


def test_a_source_without_rows_is_named(load, reader, tmp_path):
    with pytest.raises(ValueError, match=f"`{tmp_path}/rows.jsonl` must have at least one row, got none"):
        load(reader(), [b"", b""])

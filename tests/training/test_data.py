"""Rows of every format into records: exact records, chunks with their gold ones, errors with file and line.

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
from recipes.training.data import BadRow, text_places
from recipes.training.mixtures import load_records
from recipes.training.records import RecordReader

LONG = " ".join(f"w{number}" for number in range(40))
GOOD = {"question": "q", "docs": ["a", "b"], "answer": "x"}
PROCESSOR = CLaRaProcessor(build_tokenizer(), document_max_length=32, document_overlap=4)


def write(path: Path, rows: list) -> Path:
    """Rows, or lines of bytes, as the end of the file's name asks for."""
    if path.suffix == ".parquet":
        names = dict.fromkeys(name for row in rows for name in row)
        pq.write_table(pa.Table.from_pylist([{**names, **row} for row in rows]), path)
        return path
    with gzip.open(path, "wb") if path.suffix == ".gz" else open(path, "wb") as file:
        for row in rows:
            file.write((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n")
    return path


def load(folder: Path, rows, stage: str = "instruct", *, processor: CLaRaProcessor = PROCESSOR, **settings) -> Dataset:
    """The records of rows in rows.jsonl, or of the files and data sets that are named."""
    sources = [rows] if isinstance(rows, Path | DatasetConfig) else rows
    if not isinstance(sources[0], Path | DatasetConfig):
        sources = [write(folder / "rows.jsonl", rows)]
    configs = [s if isinstance(s, DatasetConfig) else DatasetConfig(path=str(s)) for s in sources]
    reader = RecordReader(processor, stage, **{"window": 512, "memory_size": 4, "top_k": 1, **settings})
    return load_records(configs, reader, 0, folder / "run")


def plain(text: str, title: str = "") -> dict:
    return {"title": title, "text": text}


def without(record: dict, *names: str) -> dict:
    return {name: value for name, value in record.items() if name not in names}


# --- formats ---------------------------------------------------------------------------------------------------------

QAS = [{"question": " How old? ", "answers": ["very", "old"]}, {"question": "Is it?", "answer": "yes"}]
KINDS = ["a", "T\nb", {"text": "c"}, {"title": None, "text": "d"}, {"title": "U", "text": "e", "id": 1}]
NULLS = dict.fromkeys(["qas", "docs", "answer", "answers", "pos_index", "paraphrase", "data_type", "title"])
NO_TITLES = ["\na", "  \na", "a\n \n", "x" * 201 + "\ny"]
ASKED, X = {"question": "q", "answer": "x"}, [("q", "x")]
PUBLISHED = {"data_type": "qa", "docs": ["T\na\nb"]}
FORMATS = {
    "passage": (
        {"title": " Rome ", "text": " Rome is old.\n", "qas": QAS, "paraphrase": "An old city."},
        [plain("Rome is old.", "Rome")],
        [("How old?", "very"), ("Is it?", "yes"), (None, "An old city.")],
    ),
    "paraphrase alone": ({"text": "a", "paraphrase": "b"}, [plain("a")], [(None, "b")]),
    "reference, questions": (
        {**PUBLISHED, "question": ["q1", "q2"], "answers": ["a1", ["a2", "a3"]]},
        [plain("a\nb", "T")],
        [("q1", "a1"), ("q2", "a2")],
    ),
    "reference, paraphrase": (
        {**PUBLISHED, "data_type": "paraphrase", "question": ["Restate: "], "answers": ["b"]},
        [plain("a\nb", "T")],
        [(None, "b")],
    ),
    "one answer": ({**ASKED, "docs": ["a"]}, [plain("a")], X),
    "gold answers": ({"question": "q", "docs": ["a"], "gold_answer": ["x", "c"]}, [plain("a")], X),
    "answers": ({"question": "q", "docs": ["a"], "answers": ["x", "c"]}, [plain("a")], X),
    "a number": ({**ASKED, "docs": ["a"], "answer": 1969}, [plain("a")], [("q", "1969")]),
    "documents of all kinds": (
        {**ASKED, "documents": KINDS},
        [plain("a"), plain("b", "T"), plain("c"), plain("d"), plain("e", "U")],
        X,
    ),
    "a text by itself": ({**ASKED, "docs": "a"}, [plain("a")], X),
    "one document": ({**ASKED, "docs": plain("a", "T")}, [plain("a", "T")], X),
    "no titles": ({**ASKED, "docs": NO_TITLES}, [*[plain("a")] * 3, plain(NO_TITLES[3])], X),
    "null fields": ({**NULLS, "question": "q", "text": "a", "gold_answer": "x"}, [plain("a")], X),
    "null in a pair": ({"text": "a", "qas": [{**ASKED, "answers": None}]}, [plain("a")], X),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("stage", ["pretrain", "joint", "text"])
def test_every_format_gives_exactly_these_records(tmp_path, name, stage):
    row, documents, targets = FORMATS[name]
    settings = {"targets_per_document": 2, "long_documents": "first_span", "window": 2000}
    if stage != "pretrain":  # a paraphrase selects nothing, and would copy a text
        targets = [target for target in targets if target[0] is not None]
    if not targets:
        with pytest.raises(
            BadRow, match=r"(?s)1 row\(s\).*rows.jsonl:2 must have a question: this stage learns no par"
        ):
            load(tmp_path, [GOOD, row, GOOD], stage, **settings)
        return
    size = 1 if stage == "joint" else 2  # a record of each question
    chunks = [PROCESSOR.split_document(document)[0] for document in documents]
    assert [without(record, "length") for record in load(tmp_path, [row], stage, **settings)] == [
        {
            "documents": [plain(chunk["text"], chunk["title"]) for chunk in chunks],
            "positives": [],
            "questions": [question for question, _ in targets[start : start + size]],
            "answers": [answer for _, answer in targets[start : start + size]],
            "source": f"{tmp_path}/rows.jsonl:1",
        }
        for start in range(0, len(targets), size)
    ]


def test_stage_three_learns_the_gold_answer_and_the_others_the_teachers(tmp_path):
    row = {"question": "q", "docs": ["a"], "answers": ["third"], "gold_answer": ["gold"], "answer": "teacher"}
    answers = [load(tmp_path, [row], stage)["answers"] for stage in ("instruct", "text", "joint")]
    assert answers == [[["teacher"]], [["teacher"]], [["gold"]]]


def test_parquet_gz_and_a_folder_give_the_records_of_the_plain_file(tmp_path):
    rows = [
        {"question": "q1", "docs": ["T\na", "b"], "gold_answer": "x", "pos_index": [1]},
        {"question": "q2", "docs": ["c"], "answers": ["y", "z"]},
    ]
    expected = [without(record, "source") for record in load(tmp_path, rows)]
    (tmp_path / "folder").mkdir()
    paths = [write(tmp_path / name, rows) for name in ("rows.jsonl.gz", "rows.parquet", "folder/train.jsonl")]
    for path in (*paths[:2], paths[2].parent):
        records = list(load(tmp_path, path))
        assert [without(record, "source") for record in records] == expected
        assert [record["source"] for record in records] == [f"{path}:1", f"{path}:2"]


def test_blank_lines_are_skipped_and_counted(tmp_path):
    records = load(tmp_path, [b"", GOOD, b"  ", GOOD])
    assert [record["source"].rpartition(":")[2] for record in records] == ["2", "4"]


# --- lengths ---------------------------------------------------------------------------------------------------------


def length(question: str, n_memories: int, answer: str, texts=()) -> int:
    return len(PROCESSOR.build_prompt(question, n_memories, 4, answer, text_documents=texts).input_ids)


def test_the_length_of_a_record_is_that_of_its_longest_prompt(tmp_path):
    row = {"docs": ["a" * 20, "b" * 9], "qas": [{"question": "q", "answer": "x" * n} for n in (3, 9, 5)]}
    texts = [plain(text) for text in row["docs"]]
    found = [
        load(tmp_path, [row], stage, targets_per_document=2, top_k=2)["length"] for stage in ("pretrain", "joint")
    ]
    assert found == [[length("q", 2, "x" * n) for n in ns] for ns in ((9, 5), (3, 9, 5))]
    found = load(tmp_path, [row], "text", targets_per_document=2)["length"]
    assert found == [length("q", 0, "x" * n, texts) for n in (9, 5)]
    (one,) = load(tmp_path, [{**GOOD, "docs": list("abcde")}], "joint", top_k=3)["length"]
    assert one == length("q", 3, "x")


def test_lengths_and_the_window_count_the_document_that_is_read_as_text(tmp_path):
    row, settings = {"docs": ["Rome " * 5, "Seine " * 4], "qas": QAS[1:]}, {"targets_per_document": 2}
    (plainly,), (one,) = (load(tmp_path, [row], text_share=share, **settings) for share in (0.0, 1.0))
    texts = [one["documents"][place] for place in text_places(one, 1.0)]
    assert one["length"] == length("Is it?", 1, "yes", texts) > plainly["length"]
    assert without(one, "length") == without(plainly, "length")
    assert list(load(tmp_path, [row], window=one["length"] - 1, **settings)) == [plainly]
    with pytest.raises(
        BadRow, match=r"rows.jsonl:1 .*positions for 1 memories of 4 and one text, question and answer"
    ):
        load(tmp_path, [row], text_share=1.0, window=one["length"] - 1, **settings)
    # beside a paraphrase the questions read no text either
    row["paraphrase"] = "R"
    (plainly,), (one,) = (load(tmp_path, [row], "pretrain", text_share=share, **settings) for share in (0.0, 1.0))
    assert one == plainly and one["questions"] == ["Is it?", None]


@pytest.mark.parametrize("stage, read", [("pretrain", "2 memories of 4"), ("text", "2 texts")])
def test_the_window_is_full_or_the_row_is_refused(tmp_path, stage, read):
    """At its exact length a record passes, one position less refuses it and says which row, how much and of what."""
    row = {"docs": ["a" * 20, "b" * 9], "qas": [{"question": "q", "answer": "x" * n} for n in (3, 9)]}
    longest = max(load(tmp_path, [row], stage)["length"])
    assert load(tmp_path, [row], stage, window=longest)["length"] == [longest - 6, longest]
    message = (
        rf"rows.jsonl:2 needs {longest} positions for {read}, question and answer, the backbone has {longest - 1}"
    )
    with pytest.raises(BadRow, match=rf"(?s)1 row\(s\) cannot.*{message}; shorten the answer"):
        load(tmp_path, [GOOD, row], stage, window=longest - 1)


# --- chunks and candidates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["instruct", "text"])
def test_long_documents_are_split_and_their_chunks_stay_gold(tmp_path, stage):
    rows = [{"question": "q", "docs": ["a", plain(LONG, "T"), "b"], "answer": "x", "pos_index": [2, 1]}]
    chunks = [plain(chunk["text"], "T") for chunk in PROCESSOR.split_document(plain(LONG, "T"))]
    assert len(chunks) > 2
    for long_documents, kept in (("split", chunks), ("first_span", chunks[:1])):
        (record,) = load(tmp_path, rows, stage, window=4000, long_documents=long_documents, num_candidates=2)
        assert record["documents"] == [plain("a"), *kept, plain("b")]  # a stage that reads all documents cuts none
        assert record["positives"] == list(range(1, len(kept) + 2))


@pytest.mark.parametrize(
    "n, kept, gold", [(6, "abcdef", [1, 5]), (4, "abcf", [1, 3]), (2, "bf", [0, 1]), (1, "b", [0])]
)
def test_candidates_are_cut_after_num_candidates_and_gold_is_kept_in_its_place(tmp_path, n, kept, gold):
    row = {"question": "q", "docs": list("abcdef"), "answer": "x", "pos_index": [1, 5]}
    (record,) = load(tmp_path, [row], "joint", num_candidates=n)
    assert [document["text"] for document in record["documents"]] == list(kept)
    assert record["positives"] == gold


@pytest.mark.parametrize("number", [0, 1])
def test_pos_index_may_be_a_number(tmp_path, number):
    assert load(tmp_path, [{**GOOD, "pos_index": number}])["positives"] == [[number]]


# --- errors ----------------------------------------------------------------------------------------------------------

PAIRED = {**GOOD, "question": ["q", "r"], "answers": ["x"]}
FEW = r"must have at least `retrieval_top_k` \(2\) candidates, got 1; lower `retrieval_top_k` or add documents"
BAD_ROWS = [
    ("joint", without(GOOD, "answer"), "must have an answer that is a text and not empty, got None"),
    ("joint", {**GOOD, "answer": " "}, "must have an answer .* got ' '"),
    ("joint", {**GOOD, "answer": True}, "must have an answer .* got True"),
    ("joint", without(GOOD, "question"), "must have `question` and `answers`, `qas`, or `paraphrase`"),
    ("joint", {**GOOD, "question": ""}, "`question` must be a text that is not empty, got ''"),
    ("pretrain", {**GOOD, "question": [None], "answers": ["x"]}, "`question` must be a text"),
    ("pretrain", PAIRED, "must have as many `answers` as entries in `question`"),
    ("pretrain", {"text": "a", "qas": ["q"]}, "`qas` must be a list of"),
    ("pretrain", {"text": "a", "qas": "q"}, "`qas` must be a list of"),
    ("pretrain", {"text": "a", "qas": [{"answers": ["x"]}]}, "`question` must be a text that is not empty"),
    ("text", {"text": "a", "qas": [], "paraphrase": "b"}, "must have a question"),
    ("joint", {**GOOD, "docs": []}, "must have `docs` or `text` with at least one document"),
    ("joint", {**GOOD, "docs": 5}, "must have `docs` or `text` with at least one document"),
    ("joint", {**GOOD, "docs": ["a", "\n"]}, r"`docs\[1\]` must not be empty"),
    ("joint", {**GOOD, "docs": [{"title": "T"}]}, r"`docs\[0\]` must have the field 'text'"),
    ("joint", {**GOOD, "docs": [3]}, r"`docs\[0\]` must be a str or a dict, got int"),
    ("joint", {**GOOD, "docs": ["a\ud800"]}, r"`docs\[0\]` must be valid UTF-8"),
    ("joint", {**GOOD, "pos_index": [0, 2]}, r"`pos_index` must hold numbers from 0 to 1, got \[0, 2\]"),
    ("joint", {**GOOD, "pos_index": [-1]}, r"`pos_index` must .* from 0 to 1, got \[-1\]"),
    ("joint", {**GOOD, "pos_index": ["0"]}, r"`pos_index` must .* got \['0'\]"),
    ("joint", {**GOOD, "pos_index": 1.0}, r"`pos_index` must .* got \[1.0\]"),
    ("joint", {**GOOD, "docs": ["a"]}, FEW),
    ("contrastive", GOOD, "must have `pos_index`: the stage learns from known gold"),
]


@pytest.mark.parametrize("stage, row, message", BAD_ROWS)
def test_a_row_that_cannot_be_trained_on_is_named_with_file_line_and_rule(tmp_path, stage, row, message):
    good = {**GOOD, "pos_index": [1]}
    named = rf"1 row\(s\) cannot be trained on. Correct .*:\n  {tmp_path}/rows.jsonl:3 {message}"
    with pytest.raises(BadRow, match=named):
        load(tmp_path, [good, good, row, good], stage, top_k=2)


def test_bad_rows_are_counted_and_three_are_named(tmp_path):
    bad = without(GOOD, "answer")
    with pytest.raises(BadRow) as raised:
        load(tmp_path, [bad, GOOD, bad, bad, bad, bad])
    first, *named, last = str(raised.value).split("\n")
    assert first.startswith("5 row(s) cannot be trained on.") and last == "  ..."
    assert [line.partition("rows.jsonl:")[2][:1] for line in named] == ["1", "3", "4"]
    with pytest.raises(BadRow) as raised:
        load(tmp_path, [bad, bad, bad])
    assert len(str(raised.value).split("\n")) == 4


@pytest.mark.parametrize(
    "line, message",
    [
        (b"[1]", "must be a JSON object, got list. Correct or remove the line"),
        (b'{"a": ', "must be JSON in UTF-8: .*Correct or remove the line"),
        (b'"\xff"', "must be JSON in UTF-8: .*Correct or remove the line"),
    ],
)
def test_a_line_that_is_no_object_is_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=f"{tmp_path}/rows.jsonl:2 {message}"):
        load(tmp_path, [GOOD, line])


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.jsonl.gz", "absent.parquet"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"`{tmp_path}/{name}` must be a file, found none. Correct the path"):
        load(tmp_path, tmp_path / name)


@pytest.mark.parametrize(
    "name, damaged", [("rows.jsonl.gz", "must be a whole gzip"), ("rows.parquet", "cannot be read")]
)
@pytest.mark.parametrize("damage", [lambda data: data[:-12], lambda data: b"plain" * 9, lambda data: b""])
def test_a_damaged_file_is_named(tmp_path, name, damaged, damage):
    path = write(tmp_path / name, [GOOD] * 9)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{name}`? ({damaged}.*: .*Copy|must have at least one row)"):
        load(tmp_path, path)


def test_a_source_without_rows_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"`{tmp_path}/rows.jsonl` must have at least one row, got none"):
        load(tmp_path, [b"", b""])

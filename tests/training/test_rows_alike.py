"""The same rows in JSONL and in Parquet, which fills in nulls, are the same to everything that reads rows."""

import doctest
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from trl.scripts.utils import DatasetConfig

from recipes.evaluation.questions import read_data
from recipes.training import data
from recipes.training.curriculum import to_passage
from recipes.training.data import convert_rows, read_rows, read_targets
from recipes.training.mine_negatives import read_questions

PASSAGES = [
    {
        "title": "T",
        "text": "one text",
        "qas": [{"question": "Q?", "answers": ["a"]}, {"question": "R?", "answer": "b"}],
    },
    {"text": "two", "qas": [{"id": "mine", "question": "S?", "answers": ["c"]}]},
]
QUESTIONS = [
    {"id": "x", "question": "Q?", "answers": ["a"], "docs": ["one", "two"], "pos_index": [1]},
    {
        "question": "R?",
        "answers": ["b"],
        "documents": [{"text": "one"}, {"title": "T", "text": "x"}],
        "pos_index": [0],
    },
]


def write(folder: Path, rows: list[dict]) -> list[Path]:
    """As JSONL, as JSONL in which every row has all keys, and as Parquet; the names look like patterns."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    plain, full, parquet = (folder / name for name in ("rows[1].jsonl", "rows*.jsonl", "rows[1].parquet"))
    plain.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    full.write_text("".join(json.dumps({n: row.get(n) for n in names}) + "\n" for row in rows), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), parquet)
    return [plain, full, parquet]


def test_the_examples():
    assert doctest.testmod(data).failed == 0


def test_rows_are_read_alike(tmp_path):
    for rows, convert in ((PASSAGES, to_passage), (PASSAGES, read_targets), (QUESTIONS, read_targets)):
        for path in (files := write(tmp_path, rows)):
            assert [row for _, row in read_rows(DatasetConfig(path=str(path)))] == rows
            assert list(convert_rows([path], convert)) == [convert(row) for row in rows]
    mined = [list(read_questions([path])) for path in files]
    assert mined[0] == mined[1] == mined[2] and mined[0][1]["pos_index"] == [0]
    asked = [read_data(str(path)) for path in files]
    ours = [[{**vars(question), "place": ""} for question in read.questions] for read in asked]
    assert ours[0] == ours[1] == ours[2] and [question["id"] for question in ours[0]] == ["x", "2"]


def test_an_id_twice_is_refused_in_every_format(tmp_path):
    for path in write(tmp_path, [{**row, "id": "x"} for row in QUESTIONS]):
        with pytest.raises(ValueError, match="must have an id of its own, got 'x' like .*:1"):
            read_data(str(path))


def test_two_columns_of_one_name_are_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table([["Q?"], ["a"], ["b"]], names=["question", "answer", "answer"]), path)
    pairs = pa.StructArray.from_arrays([pa.array(["q"]), pa.array(["r"])], names=["question", "question"])
    pq.write_table(pa.table({"text": ["t"], "qas": pairs}), tmp_path / "inner.parquet")
    for read in (lambda path: list(read_rows(DatasetConfig(path=str(path)))), lambda path: read_data(str(path))):
        with pytest.raises(ValueError, match="rows.parquet cannot be read: it has two columns 'answer'"):
            read(path)
        with pytest.raises(ValueError, match="inner.parquet cannot be read: .*duplicate field names"):
            read(tmp_path / "inner.parquet")

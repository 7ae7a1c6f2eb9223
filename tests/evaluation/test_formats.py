"""The same rows as JSONL and as Parquet, which has every key in every row, are the same questions."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from recipes.evaluation.questions import read_data

BARE = {"id": "a", "question": "Where?", "answers": ["Paris"]}
ROW = {**BARE, "docs": ["one", "two"], "pos_index": [1]}
PASSAGE = {"title": "T", "text": "body", "qas": [{"question": "Q0?", "answers": ["x"]}]}
KILT = {
    "id": "k",
    "input": "Who?",
    "output": [{"answer": "A", "provenance": [{"wikipedia_id": "9", "title": "Nine"}]}],
}


def test_nulls_that_parquet_fills_in_change_nothing(tmp_path):
    """A key that some entries have is a null in the others: the same rows in any format are the same questions."""
    pairs = [{"id": "mine", "question": "Q0?", "answers": ["x"]}, {"question": "Q1?", "answers": ["y"]}]
    files = {
        "passages": [{**PASSAGE, "qas": pairs}, {"text": "untitled", "qas": [{"question": "Q2?", "answers": []}]}],
        "multihop": [{**ROW, "docs": [{"text": "one"}, {"title": "T", "text": "two"}]}, {**BARE, "id": "b"}],
        "kilt": [KILT, {"id": "l", "input": "Where?", "output": [{"answer": "B"}]}],
    }
    for name, rows in files.items():
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        theirs = read_data(str(tmp_path / f"{name}.parquet"))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        ours = read_data(str(tmp_path / f"{name}.jsonl"))
        assert [vars(q) | {"place": ""} for q in theirs.questions] == [vars(q) | {"place": ""} for q in ours.questions]
        assert theirs.documents == ours.documents and theirs.titles == ours.titles and len(ours.questions) >= 2
    assert [q.id for q in read_data(str(tmp_path / "passages.parquet")).questions] == ["mine", "1#1", "2#0"]

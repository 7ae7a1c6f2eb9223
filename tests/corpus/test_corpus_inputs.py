"""What a corpus is built from: kinds of input, metadata, and what becomes of rows that cannot be used."""

import datetime
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from corpora import ERRORS, LONG, make_memory, memory, read_all, rejected, relative_error, texts

from modeling_clara import CompressedCorpus

ROWS = [
    {"id": "rome", "title": "Rome", "text": "Rome is the capital of Italy.", "year": 1861},
    {"id": "paris", "title": "Paris", "text": LONG, "year": None},
    {"id": "seine", "title": "", "text": "Die Seine fließt durch Paris. 🇫🇷", "year": -52},
]


def test_an_input_without_documents_can_be_replaced_and_the_corpus_lie_inside_of_it(shared_model, tmp_path):
    for rows in ([], ["", {"text": None}]):
        with pytest.raises(ValueError, match="at least one usable document"):
            CompressedCorpus.build(shared_model, rows, tmp_path / "c")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for _ in range(2):
        assert len(CompressedCorpus.build(shared_model, tmp_path, tmp_path / "c")) == 3


def test_a_generator_that_breaks_goes_on_with_the_same_rows(shared_model, tmp_path):
    rows = [{"id": f"d{number}", "text": "a", "memory": memory(0)} for number in range(1100)]
    with pytest.raises(KeyError, match="missing"):
        broken = (row if number < 1059 else row["missing"] for number, row in enumerate(rows))
        CompressedCorpus.build(shared_model, broken, tmp_path / "c", shard_size=50)
    shards = {path: path.stat().st_ino for path in (tmp_path / "c" / "data").glob("0*.parquet")}
    assert len(shards) == 21
    corpus = CompressedCorpus.build(shared_model, iter(rows), tmp_path / "c", shard_size=50)
    assert list(corpus.document_ids()) == [row["id"] for row in rows] and corpus.verify() == []
    assert {path: path.stat().st_ino for path in shards} == shards  # what was written is not written again


def test_metadata_keeps_its_types(shared_model, tmp_path):
    day = datetime.date(2024, 2, 29)
    time = datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.UTC)
    row = {"n": 2**40, "x": 1.5, "flag": True, "tags": ["a", "b"], "day": day, "time": time, "who": {"name": "é"}}
    rows = [{"text": "first", **row}, {"text": "second"}, {"text": "third", "tags": [], "none": None, "x": 2}]
    corpus = CompressedCorpus.build(shared_model, rows, tmp_path / "c", metadata={"extra": "int16"})
    nothing = dict.fromkeys([*row, "none", "extra"])
    expected = [nothing | row, nothing, nothing | {"tags": [], "x": 2.0}]
    assert [document["metadata"] for document in corpus.get(["0", "1", "2"])] == expected
    data = datasets.load_dataset("parquet", data_files=str(tmp_path / "c" / "data" / "*.parquet"), split="train")
    assert data["text"] == ["first", "second", "third"] and data["id"] == ["0#0", "1#0", "2#0"]
    assert [data[name][0] for name in row] == [*row.values()]
    kinds = dict(n="int64", x="float64", flag="bool", day="date32", extra="int16", none="string")
    assert {name: data.features[name].dtype for name in kinds} == kinds
    codes = np.frombuffer(data[0]["memory"], np.uint8)[None].copy()
    assert torch.equal(corpus.snapshot.codec.decode(codes)[0], corpus.get(["0"])[0]["memory"][0])
    assert len(datasets.load_dataset(str(tmp_path / "c"), split="train")) == 3  # as the card says
    for number, rows in enumerate(([{"text": "a", "who": {}}, {"text": "b"}], [{"text": "a", "tags": [[]]}])):
        assert len(CompressedCorpus.build(shared_model, rows, tmp_path / str(number))) == len(rows)
    corpus = CompressedCorpus.build(shared_model, ROWS, tmp_path / "declared", metadata={"year": "int32"})
    assert corpus.manifest.metadata == {"year": "int32"} and len(corpus) == 3


def test_a_dictionary_column_of_parquet(shared_model, tmp_path):
    table = pa.table({"text": ["a", "b", "c"], "kind": pa.array(["x", "y", None]).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet")
    corpus = CompressedCorpus.build(shared_model, tmp_path / "a.parquet", tmp_path / "c")
    assert [document["metadata"]["kind"] for document in read_all(corpus)] == ["x", "y", None]
    assert len(corpus.search(memory(0)[None], 3, {"kind": {"$ne": "x"}})[0]) == 2


GOOD = {"id": "good", "title": "Rome", "text": "Rome.", "year": 1861, "tags": ["x"], "author": "me"}
IDS = ["", True, 1.5, "\ud800", "good"]  # the last is there already
TEXTS = ["", " \n\t", None, 5, "a\ud800"]
TITLES = [5, "\udfff"]
FIELDS = [("year", "1861"), ("year", True), ("year", 2**70), ("tags", "ab"), ("author", 5)]
FIELDS += [("author", "\ud800"), ("\ud800", 1), (5, "x"), ("colour", {("a", 1): 2}), ("shade", {1: "a", "b": 2})]
FIELDS += [("deep", json.loads("[" * 100 + "1" + "]" * 100)), ("deeper", json.loads("[" * 900 + "1" + "]" * 900))]
FIELDS += [("span", 3)]  # is our column
MEMORIES = [torch.full((4, 32), torch.nan), [[1e300] * 32] * 4, torch.zeros(128), torch.zeros(4, 31), "abc", b"abc"]
MEMORIES += [memory(0)[:2], [[1.0], [1.0, 2.0]]]
BAD = [
    *("", None, 5, ["a", "b"], {"id": "bad", "title": "t"}),
    *({"id": value, "text": "a"} for value in IDS),
    *({"id": "bad", "text": value} for value in TEXTS),
    *({"id": "bad", "title": value, "text": "a"} for value in TITLES),
    *({"id": "bad", "text": "a", name: value} for name, value in FIELDS),
    *({"id": "bad", "text": "a", "memory": value} for value in MEMORIES),
    *({"id": "bad", "text": value, "memory": memory(0)} for value in ("", "\ud800")),
]


def test_a_row_that_cannot_be_used_is_left_out_and_listed(shared_model, tmp_path):
    n = len(BAD)
    late = [{"id": str(n + 2), "text": "It has the id of the next one."}, "no id"]
    rows = [GOOD, *BAD, *late, {"id": "last", "text": "The last one."}, "no id"]
    for options in ({"shard_size": 2}, {"shard_size": 1024}):
        corpus = CompressedCorpus.build(shared_model, rows, tmp_path / f"c{options['shard_size']}", **options)
        assert [*corpus.document_ids()] == ["good", str(n + 2), f"#{n + 2}", "last", str(n + 4)]
        found = rejected(corpus.folder)
        assert [row["row"] for row in found] == [*range(1, n + 1)]
        assert all(row["place"] == f"documents[{row['row']}]" and row["reason"] for row in found)
        assert corpus.manifest.n_rejected == len(found) and corpus.verify() == []
        assert len(CompressedCorpus.build(shared_model, rows, corpus.folder, **options)) == 5


def test_what_only_a_later_row_has_is_listed(shared_model, tmp_path):
    rows = [{"id": f"m{n}", "text": "m", "memory": memory(0), "who": {"name": "a"}} for n in range(1024)]
    rows += [{"id": "late", "text": "m", "memory": memory(0), "who": {"name": "a", "age": 5}}]
    rows += [{"id": "red", "text": "m", "memory": memory(0), "colour": "red"}]
    corpus = CompressedCorpus.build(shared_model, rows, tmp_path / "list")  # which is read to its end for its types
    assert corpus.get(["late"])[0]["metadata"] == {"who": {"name": "a", "age": 5}, "colour": None}
    assert corpus.get(["red"])[0]["metadata"]["colour"] == "red" and len(corpus) == 1026
    corpus = CompressedCorpus.build(shared_model, iter(rows), tmp_path / "stream")  # which comes only once
    assert "late" not in corpus and "red" not in corpus and len(corpus) + corpus.manifest.n_rejected == 1026
    assert "'colour'" in rejected(tmp_path / "stream")[-1]["reason"]


@pytest.mark.parametrize("codec", ERRORS)
def test_a_given_memory_is_stored_and_its_text_is_not_cut(shared_model, tmp_path, codec):
    given = memory(0)
    kinds = {"tensor": given, "numpy": given.numpy(), "list": given.tolist(), "half": given.half()}
    kinds |= {"wider": torch.cat([given, given]), "trained": given.clone().requires_grad_()}
    rows = [{"id": name, "text": LONG, "memory": value} for name, value in kinds.items()] + [{"id": "x", "text": "x"}]
    corpus = CompressedCorpus.build(shared_model, rows, tmp_path / "c", codec=codec, shard_size=3)
    assert [*corpus.document_ids()] == [*kinds, "x"] and corpus.manifest.n_rejected == 0
    for document in corpus.get([*kinds]):
        (span,) = document["spans"]
        assert (span["text"], span["n_tokens"]) == (LONG, None)
        assert relative_error(document["memory"][0], given) < ERRORS[codec]


@pytest.mark.parametrize(("n", "shard_size"), [(3, 1), (3, 2), (3, 2048), (1024, 2048)])
def test_memories_that_float16_cannot_hold_are_left_out_and_leave_their_ids(shared_model, tmp_path, n, shard_size):
    bad = [{"id": f"bad{number}", "text": "b", "memory": memory(0) + 1e6} for number in range(n)]
    good = [{"id": name, "text": name, "memory": memory(0)} for name in ("good0", "bad0", "good1", "bad0")]
    rows = [*bad, good[0], bad[1], *good[1:]]
    corpus = CompressedCorpus.build(shared_model, rows, tmp_path / "c", codec="float16", shard_size=shard_size)
    assert [*texts(corpus).items()] == [(name, name) for name in ("good0", "bad0", "good1")]
    assert [row["row"] for row in rejected(corpus.folder)] == [*range(n), n + 1, n + 4] and corpus.verify() == []
    assert "is there already" in rejected(corpus.folder)[-1]["reason"]
    corpus.delete(["bad0"])
    for change in (corpus.add, corpus.update):
        changes = change([bad[0], good[1], good[3]], shard_size=shard_size)
        assert (changes.n_documents, [row["row"] for row in changes.rejected]) == (1, [0, 2])


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_one_absurd_memory_does_not_spoil_the_others(shared_model, tmp_path, codec):
    given = make_memory(40)
    rows = [{"id": f"d{n}", "text": "d", "memory": each} for n, each in enumerate(given)]
    rows.insert(3, {"id": "absurd", "text": "a", "memory": memory(0) * 1e25})
    corpus = CompressedCorpus.build(shared_model, rows, tmp_path / "c", codec=codec)
    found = torch.cat([corpus.get([f"d{n}"])[0]["memory"] for n in range(40)])
    assert corpus.verify() == [] and relative_error(found, given) < ERRORS[codec]
    hits = corpus.search(given[[0, 10, 39]], 5)
    assert [row[0]["document_id"] for row in hits] == ["d0", "d10", "d39"]
    assert all(-1.001 <= hit["score"] <= 1.001 for row in hits for hit in row)


@pytest.mark.parametrize("order", [1, -1])
def test_a_row_without_an_id_never_takes_that_of_another(shared_model, tmp_path, order):
    ids = [None, None, "0", 1, None, "#0"][::order]
    rows = [f"row {n}" if name is None else {"id": name, "text": f"of {name}"} for n, name in enumerate(ids)]
    corpus = CompressedCorpus.build(shared_model, rows, tmp_path / "c", codec="float16")
    assert len(corpus) == 6 and corpus.manifest.n_rejected == 0
    assert [texts(corpus)[name] for name in ("0", "1", "#0")] == ["of 0", "of 1", "of #0"]
    assert corpus.add(["x", {"id": "6", "text": "six"}]).n_documents == 2 and texts(corpus)["6"] == "six"


def test_the_queries_of_a_beir_folder_are_no_documents(shared_model, tmp_path):
    (tmp_path / "in" / "qrels").mkdir(parents=True)
    (tmp_path / "in" / "corpus.jsonl").write_text(json.dumps({"_id": "d1", "title": "A", "text": "Alpha."}))
    (tmp_path / "in" / "queries.jsonl").write_text(json.dumps({"_id": "q1", "text": "What?"}))
    (tmp_path / "in" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    corpus = CompressedCorpus.build(shared_model, tmp_path / "in", tmp_path / "c")
    assert texts(corpus) == {"d1": "Alpha."}
    assert {row["file"]: row["status"] for row in rejected(tmp_path / "c")} == {
        "queries.jsonl": "skipped",
        "qrels/test.tsv": "skipped",
    }


def test_numbers_in_a_column_that_is_declared_as_text_are_kept(shared_model, tmp_path):
    rows = [{"text": f"text {number}", "code": code} for number, code in enumerate((7, "x", 2**70, 0.5))]
    corpus = CompressedCorpus.build(shared_model, rows, tmp_path / "c", metadata={"code": "string"})
    assert [document["metadata"]["code"] for document in read_all(corpus)] == ["7", "x", str(2**70), "0.5"]


def test_a_number_that_a_float_cannot_hold_is_left_out(shared_model, tmp_path, caplog):
    rows = [{"text": "a", "n": 0.5}, {"text": "b", "n": 2**60 + 1}, {"text": "c", "n": 3}, {"text": "d", "n": "x"}]
    corpus = CompressedCorpus.build(shared_model, rows, tmp_path / "c")
    assert [document["metadata"]["n"] for document in read_all(corpus)] == [0.5, 3.0]
    assert "1 of the values of `n` are not double (the first: 'x' in documents[3])" in caplog.text

"""What a corpus is built from: every kind of input, and what becomes of rows and inputs that cannot be used."""

import datetime
import gzip
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import HfApi

from modeling_clara import CompressedCorpus

LONG = " ".join(f"Sentence number {n} says that Paris is the capital of France." for n in range(12))
ROWS = [
    {"id": "rome", "title": "Rome", "text": "Rome is the capital of Italy.", "year": 1861},
    {"id": "paris", "title": "Paris", "text": LONG, "year": None},
    {"id": "seine", "title": "", "text": "Die Seine fließt durch Paris. 🇫🇷", "year": -52},
]


def texts(corpus: CompressedCorpus) -> dict[str, str]:
    """The first span of every document, by id."""
    return {document["document_id"]: document["spans"][0]["text"] for document in corpus.get([*corpus.document_ids()])}


def rejected(folder: Path) -> list[dict]:
    path = folder / "rejected.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def json_lines(rows: list) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def memory(value: float = 0.0) -> torch.Tensor:
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(0)) + value


# --- kinds of input --------------------------------------------------------------------------------------------------


def as_input(kind: str, folder: Path):
    """`ROWS` as an input of this kind."""
    folder.mkdir()
    if kind == "jsonl":
        (folder / "a.jsonl").write_text(json_lines(ROWS[:1]) + "\n \n" + json_lines(ROWS[1:]))
        return str(folder / "a.jsonl")
    if kind == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(ROWS).encode()))
        return folder / "a.jsonl.gz"
    if kind in ("parquet", "PARQUET"):
        pq.write_table(pa.Table.from_pylist(ROWS), folder / f"a.{kind}")
        return folder / f"a.{kind}"
    if kind == "folder":
        (folder / "README.md").write_text("# A data set")
        (folder / "b.ndjson").write_text(json_lines(ROWS[1:]))
        (folder / "a.JSONL").write_text(json_lines(ROWS[:1]))
        return folder
    if kind == "parquet folder":
        (folder / "deep").mkdir()
        pq.write_table(pa.Table.from_pylist(ROWS[:2]), folder / "0.parquet")
        pq.write_table(pa.Table.from_pylist(ROWS[2:]), folder / "deep" / "1.parquet")
        return folder
    objects = {
        "list": lambda: ROWS,
        "generator": lambda: (row for row in ROWS),
        "Dataset": lambda: datasets.Dataset.from_list(ROWS),
        "IterableDataset": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    }
    return objects[kind]()


@pytest.mark.parametrize(
    "kind",
    ["jsonl", "jsonl.gz", "parquet", "PARQUET", "folder", "parquet folder"]
    + ["list", "generator", "Dataset", "IterableDataset"],
)
def test_every_kind_of_input_gives_the_same_corpus(shared_model, tmp_path, kind):
    expected = CompressedCorpus.build(shared_model, ROWS, tmp_path / "expected", codec="float16")
    corpus = CompressedCorpus.build(shared_model, as_input(kind, tmp_path / "in"), tmp_path / "c", codec="float16")
    assert [*corpus.document_ids()] == [*expected.document_ids()] == ["rome", "paris", "seine"]
    for found, wanted in zip(
        corpus.get(["rome", "paris", "seine"]), expected.get(["rome", "paris", "seine"]), strict=True
    ):
        assert torch.equal(found.pop("memory"), wanted.pop("memory")) and found == wanted
    assert [document["metadata"]["year"] for document in corpus.get(["rome", "paris", "seine"])] == [1861, None, -52]
    assert corpus.manifest.metadata == {"year": "int64"} and corpus.manifest.n_rejected == 0


def test_a_data_set_of_the_hub(shared_model, tmp_path, hub):
    api = HfApi()
    api.create_repo("me/documents", repo_type="dataset")
    path = tmp_path / "train.jsonl"
    path.write_text(json_lines(ROWS))
    api.upload_file(path_or_fileobj=path, path_in_repo="train.jsonl", repo_id="me/documents", repo_type="dataset")
    corpus = CompressedCorpus.build(shared_model, "me/documents", tmp_path / "c")
    assert [*corpus.document_ids()] == ["rome", "paris", "seine"]
    with pytest.raises(FileNotFoundError, match="me/nothing"):
        CompressedCorpus.build(shared_model, "me/nothing", tmp_path / "d")


def test_a_folder_of_texts(shared_model, tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "b_c.md").write_text("Berlin is the capital of Germany.")
    (folder / "sub" / "a.TXT").write_text("Rome is the capital of Italy.")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "empty.txt").write_text(" \n")
    (folder / "latin.txt").write_bytes("Zürich".encode("latin-1"))
    Path(os.fsdecode(os.fsencode(folder / "caf") + b"\xe9.txt")).write_text("A name that is not UTF-8.")
    corpus = CompressedCorpus.build(shared_model, folder, tmp_path / "c")
    assert texts(corpus) == {
        "b_c.md": "Berlin is the capital of Germany.",
        "sub/a.TXT": "Rome is the capital of Italy.",
    }
    assert [document["title"] for document in corpus.get(["b_c.md", "sub/a.TXT"])] == ["b c", "a"]
    assert {row["place"] for row in rejected(tmp_path / "c")} >= {"empty.txt", "latin.txt"}
    assert corpus.manifest.n_rejected == 3


def test_no_file_of_a_folder_is_passed_over_in_silence(shared_model, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("A text.")
    (tmp_path / "in" / "rows.jsonl").write_text(json_lines(ROWS))
    try:
        corpus = CompressedCorpus.build(shared_model, tmp_path / "in", tmp_path / "c")
    except ValueError:  # which asks to separate them
        return
    assert set(texts(corpus)) == {"notes.txt", "rome", "paris", "seine"}


def test_an_input_whose_name_is_not_utf8(shared_model, tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path / "caf") + b"\xe9.jsonl"))
    path.write_text(json_lines(ROWS))
    assert len(CompressedCorpus.build(shared_model, path, tmp_path / "c")) == 3


def test_a_corpus_inside_of_its_input_folder(shared_model, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json_lines(ROWS))
    assert len(CompressedCorpus.build(shared_model, tmp_path, tmp_path / "corpus")) == 3
    assert len(CompressedCorpus.build(shared_model, tmp_path, tmp_path / "corpus")) == 3


def test_named_columns_win_over_others(shared_model, tmp_path):
    rows = [
        {"body": "the body", "name": "A", "key": 5, "text": "no", "title": "no", "id": "no"},
        {"text": "no", "title": "no", "id": "no", "body": "another body", "name": "B", "key": 6},
    ]
    columns = {"text_column": "body", "title_column": "name", "id_column": "key"}
    corpus = CompressedCorpus.build(shared_model, rows, tmp_path / "c", **columns)
    assert texts(corpus) == {"5": "the body", "6": "another body"}
    assert [document["title"] for document in corpus.get(["5", "6"])] == ["A", "B"]


def test_a_data_frame_is_read_by_rows_or_refused(shared_model, tmp_path):
    try:
        corpus = CompressedCorpus.build(shared_model, pd.DataFrame(ROWS), tmp_path / "c")
    except TypeError:
        return
    assert set(texts(corpus)) == {"rome", "paris", "seine"}


@pytest.mark.parametrize("documents", [{"text": "a"}, b"bytes", 5, None, pa.table({"text": ["a"]})])
def test_what_is_no_input_is_a_type_error(shared_model, tmp_path, documents):
    with pytest.raises(TypeError, match="`documents` must be"):
        CompressedCorpus.build(shared_model, documents, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_an_input_that_cannot_be_read_is_named(shared_model, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json_lines(ROWS * 500).encode())[:-300])
    for name in ("empty", "a.pdf", "broken.parquet", "cut.jsonl.gz"):
        with pytest.raises(ValueError, match=name):
            CompressedCorpus.build(shared_model, tmp_path / name, tmp_path / "c")
    with pytest.raises((FileNotFoundError, ValueError, TypeError), match="documents"):
        CompressedCorpus.build(shared_model, "Paris is the capital of France. " * 200, tmp_path / "d")


def test_an_input_without_documents_can_be_replaced(shared_model, tmp_path):
    for rows in ([], ["", {"text": None}]):
        with pytest.raises(ValueError, match="at least one usable document"):
            CompressedCorpus.build(shared_model, rows, tmp_path / "c")
    assert len(CompressedCorpus.build(shared_model, ROWS, tmp_path / "c")) == 3


def test_a_generator_that_breaks_goes_on_with_the_same_rows(shared_model, tmp_path):
    rows = [{"id": f"d{number}", "text": "a", "memory": memory()} for number in range(1100)]

    def broken():
        yield from rows[:1059]
        raise OSError("the source breaks")

    with pytest.raises(OSError, match="the source breaks"):
        CompressedCorpus.build(shared_model, broken(), tmp_path / "c", shard_size=50)
    shards = {path: path.stat().st_ino for path in (tmp_path / "c" / "data").glob("0*.parquet")}
    assert len(shards) == 21
    corpus = CompressedCorpus.build(shared_model, iter(rows), tmp_path / "c", shard_size=50)
    assert list(corpus.document_ids()) == [row["id"] for row in rows] and corpus.verify() == []
    assert {path: path.stat().st_ino for path in shards} == shards  # what was written is not written again


# --- metadata --------------------------------------------------------------------------------------------------------


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
    kinds = {name: str(data.features[name].dtype) for name in ("n", "x", "flag", "day", "extra", "none")}
    assert kinds == {
        **{"n": "int64", "x": "float64", "flag": "bool"},
        **{"day": "date32", "extra": "int16", "none": "string"},
    }
    codes = np.frombuffer(data[0]["memory"], np.uint8)[None].copy()
    assert torch.equal(corpus.snapshot.codec.decode(codes)[0], corpus.get(["0"])[0]["memory"][0])
    assert len(datasets.load_dataset(str(tmp_path / "c"), split="train")) == 3  # as the card says


def test_a_dictionary_column_of_parquet(shared_model, tmp_path):
    table = pa.table({"text": ["a", "b", "c"], "kind": pa.array(["x", "y", None]).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet")
    corpus = CompressedCorpus.build(shared_model, tmp_path / "a.parquet", tmp_path / "c")
    assert [document["metadata"]["kind"] for document in corpus.get(["0", "1", "2"])] == ["x", "y", None]


@pytest.mark.parametrize("rows", [[{"text": "a", "who": {}}, {"text": "b", "who": {}}], [{"text": "a", "tags": [[]]}]])
def test_empty_metadata(shared_model, tmp_path, rows):
    assert len(CompressedCorpus.build(shared_model, rows, tmp_path / "c")) == len(rows)


@pytest.mark.parametrize("metadata", [{"year": "integer"}, {"year": "list<>"}, {"text": "string"}, {"span": "int32"}])
def test_a_wrong_metadata_type_is_named_and_can_be_corrected(shared_model, tmp_path, metadata):
    with pytest.raises(ValueError, match="`metadata`"):
        CompressedCorpus.build(shared_model, ROWS, tmp_path / "c", metadata=metadata)
    corpus = CompressedCorpus.build(shared_model, ROWS, tmp_path / "c", metadata={"year": "int32"})
    assert corpus.manifest.metadata == {"year": "int32"} and len(corpus) == 3


def test_a_source_that_no_card_can_show_is_refused_at_once_or_shown(shared_model, tmp_path):
    try:
        CompressedCorpus.build(shared_model, ROWS, tmp_path / "c", source={"name": "x", "language": ["en", "de"]})
    except (TypeError, ValueError):
        assert not (tmp_path / "c").exists()


# --- rows that cannot be used ----------------------------------------------------------------------------------------

BAD = {
    "empty": "",
    "blank": {"id": "bad", "text": " \n\t"},
    "no text": {"id": "bad", "title": "t"},
    "null": None,
    "number": 5,
    "list": ["a", "b"],
    "text is a number": {"id": "bad", "text": 5},
    "title is a number": {"id": "bad", "title": 5, "text": "a"},
    "id is a bool": {"id": True, "text": "a"},
    "id is a float": {"id": 1.5, "text": "a"},
    "id is empty": {"id": "", "text": "a"},
    "id is there": {"id": "good", "text": "a"},
    "default id is there": {"id": "2", "text": "a"},
    "surrogate": {"id": "bad", "text": "a\ud800"},
    "surrogate in the title": {"id": "bad", "title": "\udfff", "text": "a"},
    "surrogate in the id": {"id": "\ud800", "text": "a"},
    "surrogate in metadata": {"id": "bad", "text": "a", "author": "\ud800"},
    "surrogate in a name": {"id": "bad", "text": "a", "\ud800": 1},
    "surrogate beside a memory": {"id": "bad", "text": "\ud800", "memory": memory()},
    "type of metadata": {"id": "bad", "text": "a", "year": "1861"},
    "bool for a number": {"id": "bad", "text": "a", "year": True},
    "fraction for a whole number": {"id": "bad", "text": "a", "year": 1861.5},
    "text for a list": {"id": "bad", "text": "a", "tags": "ab"},
    "number for text": {"id": "bad", "text": "a", "author": 5},
    "too large": {"id": "bad", "text": "a", "year": 2**70},
    "unknown metadata": {"id": "bad", "text": "a", "colour": "red"},
    "name is a number": {"id": "bad", "text": "a", 5: "x"},
    "key of a dict": {"id": "bad", "text": "a", "colour": {("a", 1): 2}},
    "keys of a dict": {"id": "bad", "text": "a", "colour": {1: "a", "b": 2}},
    "deep": {"id": "bad", "text": "a", "deep": json.loads("[" * 100 + "1" + "]" * 100)},
    "deeper": {"id": "bad", "text": "a", "deep": json.loads("[" * 900 + "1" + "]" * 900)},
    "our column": {"id": "bad", "text": "a", "span": 3},
    "NaN memory": {"id": "bad", "text": "a", "memory": torch.full((4, 32), torch.nan)},
    "infinite memory": {"id": "bad", "text": "a", "memory": [[1e300] * 32] * 4},
    "flat memory": {"id": "bad", "text": "a", "memory": torch.zeros(128)},
    "short memory": {"id": "bad", "text": "a", "memory": memory()[:2]},
    "memory of text": {"id": "bad", "text": "a", "memory": "abc"},
    "memory of bytes": {"id": "bad", "text": "a", "memory": b"abc"},
    "ragged memory": {"id": "bad", "text": "a", "memory": [[1.0], [1.0, 2.0]]},
    "memory without text": {"id": "bad", "text": "", "memory": memory()},
}
GOOD = {"id": "good", "title": "Rome", "text": "Rome.", "year": 1861, "tags": ["x"], "author": "me"}


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_cannot_be_used_is_left_out_and_listed(shared_model, tmp_path, name):
    row, last = BAD[name], {"id": "last", "text": "The last one."}
    peeked = [{"id": f"m{n}", "text": "m", "memory": memory()} for n in range(1024)] if "unknown" in name else []
    rows = [GOOD, *peeked, row, "no id", last] if peeked else [GOOD, row, "no id", last]
    options = {"shard_size": 1024 if peeked else 2, "metadata": {"year": "int64"}}
    corpus = CompressedCorpus.build(shared_model, rows, tmp_path / "c", **options)
    ids = [*corpus.document_ids()]
    if name == "default id is there":  # the one that has it by its place comes too late
        assert ids == ["good", "2", "last"]
    else:
        assert [i for i in ids if i[0] != "m"] == ["good", "2" if not peeked else "1026", "last"]
    (found,) = rejected(tmp_path / "c")
    index = len(peeked) + 1 + (name == "default id is there")
    assert (found["row"], found["place"]) == (index, f"documents[{index}]") and found["reason"]
    assert corpus.manifest.n_rejected == 1 and corpus.verify() == []
    assert len(CompressedCorpus.build(shared_model, rows, tmp_path / "c", **options)) == len(ids)


def test_hostile_lines_of_json(shared_model, tmp_path):
    lines = [b'{"text": "good"}', b"{", b'{"text": "caf\xe9"}', b"null", b"NaN", b"[" * 200_000, b'"just text"']
    lines += [b"\xff\xfe", b'{"text": "\\ud800"}', b"9" * 5000, b'{"text": "a", "text": "twice"}', b"\x00"]
    (tmp_path / "a.jsonl").write_bytes(b"\r\n".join(lines))
    corpus = CompressedCorpus.build(shared_model, tmp_path / "a.jsonl", tmp_path / "c")
    assert texts(corpus) == {"0": "good", "6": "just text", "10": "twice"}
    assert [row["row"] for row in rejected(tmp_path / "c")] == [1, 2, 3, 4, 5, 7, 8, 9, 11]
    assert [row["place"] for row in rejected(tmp_path / "c")][:3] == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4"]


def test_a_key_that_only_a_later_row_has_is_not_lost(shared_model, tmp_path):
    rows = [{"id": f"m{n}", "text": "m", "memory": memory(), "who": {"name": "a"}} for n in range(1024)]
    rows += [{"id": "late", "text": "m", "memory": memory(), "who": {"name": "a", "age": 5}}]
    corpus = CompressedCorpus.build(shared_model, rows, tmp_path / "c")
    assert "late" not in corpus or corpus.get(["late"])[0]["metadata"]["who"] == {"name": "a", "age": 5}
    assert len(corpus) + corpus.manifest.n_rejected == 1025


# --- documents that bring a memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["float16", "int8", "int4"])
def test_a_given_memory_is_stored_and_its_text_is_not_cut(shared_model, tmp_path, codec):
    given = memory()
    kinds = {"tensor": given, "numpy": given.numpy(), "list": given.tolist(), "half": given.half()}
    kinds |= {"wider": torch.cat([given, given]), "trained": given.clone().requires_grad_()}
    rows = [{"id": name, "text": LONG, "memory": value} for name, value in kinds.items()] + [{"id": "x", "text": "x"}]
    corpus = CompressedCorpus.build(shared_model, rows, tmp_path / "c", codec=codec, shard_size=3)
    assert [*corpus.document_ids()] == [*kinds, "x"] and corpus.manifest.n_rejected == 0
    for document in corpus.get([*kinds]):
        (span,) = document["spans"]
        assert (span["text"], span["n_tokens"]) == (LONG, None)
        error = (document["memory"][0] - given).norm(dim=-1) / given.norm(dim=-1)
        assert error.max() < {"float16": 2e-3, "int8": 0.02, "int4": 0.25}[codec]


def test_memories_that_float16_cannot_hold_are_left_out(shared_model, tmp_path):
    rows = [{"id": f"bad{n}", "text": "b", "memory": memory(1e6)} for n in range(2)]
    rows += [{"id": f"good{n}", "text": "g", "memory": memory()} for n in range(2)]
    rows += [{"id": "bad0", "text": "now it is good", "memory": memory()}]  # what was left out has not taken the id
    corpus = CompressedCorpus.build(shared_model, rows, tmp_path / "c", codec="float16", shard_size=2)
    assert [*corpus.document_ids()] == ["good0", "good1", "bad0"]
    assert [row["row"] for row in rejected(tmp_path / "c")] == [0, 1]


def test_many_memories_that_float16_cannot_hold(shared_model, tmp_path):
    rows = [{"id": f"bad{n}", "text": "b", "memory": memory(1e6)} for n in range(1024)]
    rows += [{"id": "good", "text": "g", "memory": memory()}]
    corpus = CompressedCorpus.build(shared_model, rows, tmp_path / "c", codec="float16", shard_size=2048)
    assert [*corpus.document_ids()] == ["good"] and corpus.manifest.n_rejected == 1024


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_one_absurd_memory_does_not_spoil_the_others(shared_model, tmp_path, codec):
    rows = [{"id": f"d{n}", "text": f"Document number {n}."} for n in range(40)]
    rows.insert(3, {"id": "absurd", "text": "a", "memory": memory() * 1e25})
    corpus = CompressedCorpus.build(shared_model, rows, tmp_path / "c", codec=codec)
    expected = shared_model.compress([row["text"] for row in rows if row["id"] != "absurd"])
    found = torch.cat([corpus.get([f"d{n}"])[0]["memory"] for n in range(40)])
    assert corpus.verify() == [] and found.isfinite().all()
    cosines = torch.cosine_similarity(found.flatten(1), expected.flatten(1))
    assert cosines.min() > 0.9

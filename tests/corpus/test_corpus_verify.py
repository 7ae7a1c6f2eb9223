"""Damage to a corpus, byte by byte and field by field: `verify` and `clara info --verify` find it and name the file.

Shards that are crafted here get the checksum that corpus.json names, as a hostile or careless tool would leave them.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from corpora import damage, edit_json, make, make_many, read_json

from modeling_clara import CompressedCorpus, cli

REMEDY = r"[Cc]opy|[Dd]ownload|[Bb]uild|[Rr]emove|`compact`"


@pytest.fixture(scope="module")
def original(shared_model, tmp_path_factory) -> Path:
    """d0 to d9 as int8 in three shards of four spans."""
    folder = tmp_path_factory.mktemp("verify") / "corpus"
    corpus = CompressedCorpus.build(shared_model, make_many(8), folder, codec="int8", shard_size=4)
    long = {"id": "long", "text": "The Seine flows through Paris. " * 30, "year": 1}
    corpus.add([long, {"id": "rome", "text": "Rome is the capital of Italy."}])
    return folder


@pytest.fixture
def corpus(original, tmp_path) -> CompressedCorpus:
    """A copy to damage, open."""
    return CompressedCorpus.open(shutil.copytree(original, tmp_path / "corpus"))


def shard_path(corpus, number: int = 0) -> Path:
    return corpus.folder / read_json(corpus)["shards"][number]["file"]


def flip(path: Path, place: int) -> None:
    """Change one byte and keep size and time, as a failing disk does."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def edit_shard_entry(corpus, number: int, **fields) -> None:
    content = read_json(corpus)
    content["shards"][number] |= fields
    edit_json(corpus, shards=content["shards"])


def replace_shard(corpus, number: int, table: pa.Table) -> str:
    """Put a table in place of a shard, with its true checksum and size in corpus.json; returns its path there."""
    path = shard_path(corpus, number)
    pq.write_table(table, path)
    data = path.read_bytes()
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "n_bytes": len(data), "n_spans": len(table)}
    edit_shard_entry(corpus, number, **entry)
    return path.relative_to(corpus.folder).as_posix()


def put_column(table: pa.Table, name: str, values: list, kind=None) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, name, pa.array(values, kind or table.schema.field(place).type))


def assert_found(corpus, named: str, capsys) -> None:
    """The open corpus and the command line find a problem first of all; it names the file and what to do."""
    problems = corpus.verify()
    assert problems and named in problems[0]
    assert re.search(REMEDY, problems[0]), problems[0]
    assert cli.main(["info", str(corpus.folder), "--verify", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert named in report.get("problems", [report.get("problem")])[0]


def test_a_whole_corpus_has_no_problem(corpus, capsys):
    assert corpus.verify() == []
    assert cli.main(["info", str(corpus.folder), "--verify", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == [] and report["documents"] == len(corpus) == 10
    assert not [path for path in corpus.folder.rglob("*") if path.name.endswith(".ids")]


def test_a_flipped_byte_in_a_shard_is_found_and_no_derived_file_is_blamed(corpus, capsys):
    path = shard_path(corpus)
    code = path.read_bytes().index(corpus.snapshot.segments[0].rows[2].tobytes())
    for place in (0, *(int(share * path.stat().st_size) for share in (0.2, 0.5, 0.8, 0.999)), code + 40):
        flip(path, place)
        assert_found(corpus, str(path), capsys)
        (problem,) = corpus.verify()  # to remove the index, the only whole copy, would be bad advice
        assert "checksum" in problem
        flip(path, place)
    assert corpus.verify() == []


@pytest.mark.parametrize("kind", ["short", "empty", "missing", "longer", "a folder", "another shard"])
def test_a_shard_that_is_not_whole_is_found(corpus, capsys, kind):
    path = shard_path(corpus)
    if kind == "a folder":
        path.unlink()
        path.mkdir()
    elif kind == "another shard":
        shutil.copy(shard_path(corpus, 1), path)
    else:
        damage(path, kind)
    assert_found(corpus, str(path), capsys)
    for _ in range(2):
        with pytest.raises((ValueError, FileNotFoundError), match=str(path)):
            CompressedCorpus.open(corpus.folder)
        shutil.rmtree(corpus.folder / "index")  # as if it was opened for the first time


CHANGES = {
    "compact": lambda corpus: corpus.compact(),
    "convert": lambda corpus: corpus.convert("float16"),
    "update": lambda corpus: (corpus.update([make("d3", 30)]), corpus.compact()),
    "push_to_hub": lambda corpus: corpus.push_to_hub("verify/damaged", compressor="verify/model"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_damage_is_not_copied_into_new_shards(corpus, change):
    """A byte that has flipped inside a memory must not get a fresh checksum."""
    path = shard_path(corpus)
    corpus.delete(["d1"])
    code = corpus.snapshot.segments[0].rows[2].tobytes()
    flip(path, path.read_bytes().index(code) + 40)
    before = corpus.get(["d2"])[0]["memory"]
    with pytest.raises(ValueError, match="checksum.*[Cc]opy"):
        CHANGES[change](corpus)
    problems = corpus.verify()
    assert len(problems) >= 1 and path.name in problems[0]
    assert torch.equal(CompressedCorpus.open(corpus.folder).get(["d2"])[0]["memory"], before)


@pytest.fixture
def long_shard(corpus) -> tuple[int, pa.Table]:
    """The shard with a document of several spans, and its rows."""
    tables = [pq.read_table(shard_path(corpus, number)) for number in range(len(read_json(corpus)["shards"]))]
    return next((number, table) for number, table in enumerate(tables) if max(table["span"].to_pylist()) > 0)


WRONG = {"id": ["wrong#0", None], "text": [None], "document_id": ["other", None], "span": [7, None]}


def test_spans_out_of_order_and_wrong_values_in_a_row_are_found(corpus, long_shard, capsys):
    number, table = long_shard
    tables = [table.take([*first, *range(2, len(table))]) for first in ([1, 0], [0], [1], [0, 0])]
    for column, values in WRONG.items():
        tables += [put_column(table, column, [value, *table[column].to_pylist()[1:]]) for value in values]
    for wrong in tables:
        assert_found(corpus, replace_shard(corpus, number, wrong), capsys)


def test_memories_that_cannot_be_decoded_are_found(corpus, capsys):
    table = pq.read_table(shard_path(corpus))
    cells = table["memory"].to_pylist()
    for wrong in (cells[2][:-1], None, b"\0\x7e" + cells[2][2:]):  # short, none, and a first scale that is no number
        file = replace_shard(corpus, 0, put_column(table, "memory", [*cells[:2], wrong, *cells[3:]]))
        assert_found(corpus, file, capsys)
    file = replace_shard(corpus, 0, put_column(table, "memory", ["x"] * len(cells), pa.string()))
    assert_found(corpus, file, capsys)
    # the same bytes, as other tools write them: read, or refused with the file's name
    file = replace_shard(corpus, 0, put_column(table, "memory", cells, pa.binary()))
    problems = corpus.verify()
    assert not problems or file in problems[0]


@pytest.mark.parametrize("column", ["year", "memory", "title", "n_tokens"])
def test_a_missing_column_is_found(corpus, capsys, column):
    file = replace_shard(corpus, 1, pq.read_table(shard_path(corpus, 1)).drop_columns([column]))
    assert_found(corpus, file, capsys)
    with pytest.raises(ValueError, match=file):
        CompressedCorpus.open(corpus.folder)


def test_a_document_in_two_shards_is_found(corpus, capsys):
    content = read_json(corpus)
    copied = content["shards"][0] | {"file": "data/copied.parquet"}
    shutil.copy(shard_path(corpus), corpus.folder / "data" / "copied.parquet")
    counts = {name: content[name] + copied[name] for name in ("n_documents", "n_spans")}
    edit_json(corpus, shards=[*content["shards"], copied], **counts)
    assert_found(corpus, "data/copied.parquet", capsys)


def test_wrong_counts_columns_and_tombstones_are_found(corpus, long_shard, capsys):
    right = read_json(corpus)
    metadata = {"year": "int64", "lang": "string"}  # which the shards do not have
    for fields in ({"n_documents": 11}, {"n_spans": 9}, {"n_documents": 0, "n_spans": 0}, {"metadata": metadata}):
        edit_json(corpus, **right | fields)
        assert_found(corpus, "corpus.json", capsys)
    for fields in ({"n_documents": 5}, {"n_deleted": 1}, {"n_documents": 5, "n_deleted": 1}):
        edit_json(corpus, **right)
        edit_shard_entry(corpus, 0, **fields)
        assert_found(corpus, "corpus.json", capsys)
    edit_json(corpus, **right | {"n_spans": right["n_spans"] - 1})
    edit_shard_entry(corpus, long_shard[0], tombstones=[[1, 2]])  # on a part of a document
    assert_found(corpus, "", capsys)


def test_a_damaged_corpus_json_is_found(corpus, capsys):
    for text in ("", "{", '{"format_version": 99}', '{"shards": 3}'):
        (corpus.folder / "corpus.json").write_text(text)
        (problem,) = corpus.verify()
        assert "corpus.json" in problem
        assert cli.main(["info", str(corpus.folder), "--verify", "--json"]) == 1
        assert "corpus.json" in json.dumps(json.loads(capsys.readouterr().out))
        with pytest.raises(ValueError, match="corpus.json"):
            CompressedCorpus.open(corpus.folder)


@pytest.mark.parametrize("kind", ["flipped", "cut", "missing", "text"])
def test_a_damaged_codec_state_is_found(corpus, capsys, kind):
    (path,) = (corpus.folder / "codec").iterdir()
    damage(path, kind)
    assert_found(corpus, str(path), capsys)
    with pytest.raises((ValueError, FileNotFoundError), match=str(path)):
        CompressedCorpus.open(corpus.folder)


@pytest.mark.parametrize("name, place", [("rows.bin", 40), ("table.arrow", b"text 3 of"), ("ids.npy", -12)])
def test_damaged_derived_files_are_found(corpus, capsys, name, place):
    path = corpus.snapshot.segments[0].folder / name  # the shards are right
    flip(path, place if isinstance(place, int) else path.read_bytes().index(place))
    opened = CompressedCorpus.open(corpus.folder)
    assert_found(opened, str(path.parent), capsys)
    assert len(opened.verify()) == 1
    shutil.rmtree(path.parent)  # the remedy
    assert CompressedCorpus.open(corpus.folder).verify() == []


def test_at_most_so_many_problems_are_listed(corpus, monkeypatch):
    monkeypatch.setattr("modeling_clara.corpus.verify.MAX_PROBLEMS", 2)
    for shard in read_json(corpus)["shards"]:
        (corpus.folder / shard["file"]).unlink()
    assert len(read_json(corpus)["shards"]) > 2 == len(corpus.verify())

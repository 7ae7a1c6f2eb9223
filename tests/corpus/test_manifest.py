"""corpus.json: round trips, every damage that a stranger or half a download can bring, and ranges of deleted rows.

A damaged file is an error that names the corpus and the remedy; it is never read half.
"""

import copy
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from modeling_clara.corpus.shards import count_live, delete_rows, merge_ranges, write_manifest
from modeling_clara.manifest_clara import FORMAT_VERSION, Manifest, Shard

KEY = "0123456789ab"


def manifest() -> Manifest:
    """Two shards of a codec with a state; the second has deleted documents."""
    return Manifest(
        compressor={"fingerprint": "ab" * 32, "name_or_path": "org/modèle", "revision": None},
        hidden_size=576,
        memory_size=16,
        memory_sizes=[4, 8, 16],
        retrieval_memory_size=8,
        document_max_length=256,
        document_overlap=32,
        codec="int8",
        codec_states={KEY: "cd" * 32},
        source={"name": 'Flüsse "und" Seen', "license": "cc0-1.0", "language": "de"},
        metadata={"year": "int64", "tags": "list<item: string>"},
        generation=3,
        n_documents=11,
        n_spans=15,
        n_rejected=2,
        build={"codec": "int8", "input": {"kind": "list", "rows": 14}},
        measured={"recall@5": 0.99},
        shards=[
            Shard("data/00000-000000-abc.parquet", "ef" * 32, 12345, 10, 8, KEY),
            Shard("data/00000-000001-def.parquet", "01" * 32, 2345, 8, 6, KEY, 3, [[0, 1], [4, 6]]),
        ],
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    write_manifest(tmp_path / "corpus", manifest())
    return tmp_path / "corpus"


def edit(folder: Path, change) -> None:
    path = folder / "corpus.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_a_manifest_comes_back_from_its_file(folder):
    assert Manifest.read(folder) == Manifest.read(str(folder)) == manifest()
    first = (folder / "corpus.json").read_bytes()
    write_manifest(folder, Manifest.read(folder))
    assert (folder / "corpus.json").read_bytes() == first
    assert json.loads(first)["format_version"] == FORMAT_VERSION and next(iter(json.loads(first))) == "format_version"
    assert sorted(path.name for path in folder.iterdir()) == ["corpus.json"]
    for shards in ([], [Shard("data/a.parquet", "00" * 32, 5, 1, 1)]):
        given = replace(manifest(), codec="float16", codec_states={}, shards=shards)
        write_manifest(folder, given)
        edit(folder, lambda content: content.update(comment="of a later release of the same format"))
        assert Manifest.read(folder) == given


def test_what_the_manifest_says_of_itself(folder):
    read = Manifest.read(folder)
    assert read.fingerprint == "ab" * 32 and read.has_tombstones
    count_live(read)
    assert (read.n_documents, read.n_spans) == (11, 15)
    delete_rows(read.shards[1], range(1, 4))
    assert read.shards[1].tombstones == [[0, 6]] and read.shards[1].n_deleted == 4
    count_live(read)
    read.check()
    assert (read.n_documents, read.n_spans) == (10, 12)
    read.shards[1].tombstones = []
    assert not read.has_tombstones
    assert manifest().shards[1].tombstones == [[0, 1], [4, 6]]


def test_no_manifest_is_an_error_with_a_remedy(tmp_path):
    (tmp_path / "begun" / "build").mkdir(parents=True)
    no_file = "`corpus.json` must be in .*clara compress"
    for name, message in {"": no_file, "none": no_file, "begun": "must be finished first.*same build again"}.items():
        with pytest.raises(FileNotFoundError, match=message):
            Manifest.read(tmp_path / name)


def test_what_is_no_manifest_is_an_error_that_names_the_folder(folder):
    whole = (folder / "corpus.json").read_bytes()
    contents = [b"", b"{", b"null", b"[]", b"5", b'"text"', b"\xff\xfe{}", b"{}", b'{"a": 1}{"b": 2}', b"[" * 100_000]
    contents += [b"9" * 9999, *(whole[:end] for end in random.Random(0).sample(range(len(whole) - 2), 50))]
    for content in contents:
        (folder / "corpus.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"`corpus.json` of .*corpus is damaged.*build the corpus again"):
            Manifest.read(folder)


def test_a_newer_format_is_an_error_that_says_so_and_another_one_is_damaged(folder):
    for version in (FORMAT_VERSION + 1, 99):
        edit(folder, lambda content, version=version: (content.clear(), content.update(format_version=version)))
        with pytest.raises(ValueError, match=f"`format_version` of .* must be <= 1, got {version}.*upgrade clara-rag"):
            Manifest.read(folder)
    for version in (0, -1, None, "1", [1], 1.5):
        edit(folder, lambda content, version=version: content.update(format_version=version))
        with pytest.raises(ValueError, match="damaged: its format_version is"):
            Manifest.read(folder)


@pytest.mark.parametrize("name", [name for name in vars(manifest()) if name != "format_version"])
def test_a_field_that_is_missing_or_of_another_type_is_damaged(folder, name):
    value = vars(manifest())[name]
    for other in [None, "5", -1, 1.5, True, ["x"], {"x": "y"}, [[]], {"x": []}]:
        if not isinstance(value, dict) or not isinstance(other, dict):
            edit(folder, lambda content, other=other: content.update({name: other}))
            with pytest.raises(ValueError, match="is damaged"):
                Manifest.read(folder)
    edit(folder, lambda content: content.pop(name))
    with pytest.raises(ValueError, match=f"damaged: it lacks .*'{name}'"):
        Manifest.read(folder)


WRONG = {
    "compressor": [{}, {"fingerprint": None}, {"fingerprint": 5}],
    "memory_size": [0],
    "retrieval_memory_size": [5],
    "memory_sizes": [[4, 8], [], [0, 8, 16], [8, 16, "32"], [8, 16, 32]],
    "codec": ["zip"],
    "codec_states": [{}, {"../../../etc": "x"}, {KEY: "x", f"{KEY}\n": "x"}, {KEY.upper(): "x"}, {KEY: None}, [KEY]],
    "metadata": [{"year": 5}],
    "shards": [{"file": "data/a.parquet"}, ["data/a.parquet"], [None], [{}], [vars(manifest().shards[0])] * 2],
}
FILES = ["../x.parquet", "/etc/x.parquet", "data/../x.parquet", "data/../../x.parquet", "data/sub/x.parquet"]
FILES += ["data//etc/x.parquet", "./data/x.parquet", "data\\x.parquet", "data/x.parquet\n", "data/x\0.parquet"]
FILES += ["data/x.txt", "data/.parquet/../../x", "data/é.parquet", "corpus.json", "", None, 5]
RANGES = [[[0]], [[0, 1, 2]], [[0, 11]], [[-1, 2]], [[3, 3]], [[4, 2]], [[4, 6], [0, 1]], [[0, 4], [3, 6]]]
RANGES += [[[0.0, 1.0]], [[0, 1.5]], [[False, True]], {"0": 1}, None, 5, [5], ["ab"]]
WRONG_IN_A_SHARD = {
    "file": FILES,  # a shard lies under data/ and nowhere else
    "codec_state": ["ffffffffffff", "", None, [KEY]],  # memories of int8 without a state cannot be read
    "sha256": [5],
    "n_bytes": [None, -1],
    "n_spans": ["10", 0, -10],
    "n_documents": [9.5, 11],  # more than chunks
    "n_deleted": [None, 9],  # more than documents
    "tombstones": RANGES,
    "unknown": [5],
}


@pytest.mark.parametrize(("place", "values"), [("manifest", WRONG), ("shard", WRONG_IN_A_SHARD)])
def test_a_field_that_cannot_be_right_is_damaged(folder, place, values):
    whole = (folder / "corpus.json").read_bytes()
    for name, value in [(name, value) for name, wrong in values.items() for value in wrong]:
        content = json.loads(whole)
        (content if place == "manifest" else content["shards"][0])[name] = value
        (folder / "corpus.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="is damaged"):
            raise AssertionError(f"{name} {value!r} is read as {Manifest.read(folder)}")


def test_a_shard_without_a_field_is_damaged(folder):
    whole = (folder / "corpus.json").read_bytes()
    for name in ("file", "sha256", "n_bytes", "n_spans", "n_documents"):
        (folder / "corpus.json").write_bytes(whole)
        edit(folder, lambda content, name=name: content["shards"][1].pop(name))
        with pytest.raises(ValueError, match=f"is damaged.*{name}"):
            Manifest.read(folder)


def test_merged_ranges_cover_what_was_given():
    random_ = random.Random(0)
    assert merge_ranges([]) == []
    for _ in range(300):
        firsts = random_.choices(range(40), k=random_.randint(1, 9))
        ranges = [[first, first + random_.randint(1, 6)] for first in firsts]
        before = copy.deepcopy(ranges)
        merged = merge_ranges(ranges)
        assert ranges == before and merge_ranges(merged) == merged
        covered = {row for first, last in ranges for row in range(first, last)}
        assert [row for first, last in merged for row in range(first, last)] == sorted(covered)
        assert all(one[1] < other[0] for one, other in zip(merged, merged[1:], strict=False))

"""Files of a corpus: whole or not there, locks that die with their process, lines that were cut, ids, corpus.json.

Locks are held by real processes, one of which is killed. A damaged corpus.json is an error that names the corpus and
the remedy; it is never read half.
"""

import copy
import json
import os
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from corpora import receive, start

from modeling_clara.corpus.ids import SeenIds
from modeling_clara.corpus.shards import count_live, delete_rows, merge_ranges, write_manifest
from modeling_clara.corpus.storage import append_lines, read_lines, write_lines, writer_lock
from modeling_clara.manifest_clara import FORMAT_VERSION, Manifest, Shard
from modeling_clara.storage_clara import file_sha256, replacing, write_json


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    for failure in (ValueError, KeyboardInterrupt, OSError):
        with pytest.raises(failure), replacing(path) as partial:
            partial.write_bytes(b"half")
            raise failure
    with pytest.raises(FileNotFoundError), replacing(path):
        pass  # nothing was written
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as partial:
        partial.write_bytes(b"new")
        assert path.read_bytes() == b"old" and partial.parent == path.parent
    with replacing(path) as first, replacing(path) as second:  # two writers do not share a temporary
        first.write_bytes(b"new")
        second.write_bytes(b"second")
        assert first != second
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
    assert file_sha256(path) == "11507a0e2f5e69d5dfa40a62a1bd7b6ee57e6bcd85c67c9b8431b36fff21c437"


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"ä": "ü"})
    for content in ({"a": 1j}, {"a": "\ud800"}, {("a",): 1}):
        with pytest.raises((TypeError, ValueError)):
            write_json(path, content)
        assert json.loads(path.read_text(encoding="utf-8")) == {"ä": "ü"} and list(path.parent.iterdir()) == [path]


def hold(connection, path):
    with writer_lock(path, "the corpus"):
        connection.send("held")
        time.sleep(60)


def test_a_second_process_is_told_who_writes_and_a_killed_one_lets_go(tmp_path):
    path = tmp_path / "deep" / ".lock"
    holder, connection = start(hold, path)
    assert receive(connection) == "held"
    for _ in range(2):  # a refusal takes nothing away
        with pytest.raises(RuntimeError, match=f"the folder .*one writer.*process {holder.pid} "):
            with writer_lock(path, "the folder"):
                pass
    holder.kill()
    with writer_lock(path, "the folder", timeout=10):
        with pytest.raises(RuntimeError, match=f"process {os.getpid()} "), writer_lock(path, "the folder"):
            pass
        path.with_name(path.name + ".pid").unlink()  # as a holder does that is about to release it
        with pytest.raises(RuntimeError, match="process unknown "), writer_lock(path, "the folder"):
            pass
    with pytest.raises(KeyError), writer_lock(path, "the folder"):
        raise KeyError
    with writer_lock(path, "the folder"):
        pass


def test_another_thread_waits_its_turn(tmp_path):
    path, entered = tmp_path / ".lock", []

    def second() -> None:
        with writer_lock(path, "it", timeout=10):
            entered.append("second")

    thread = threading.Thread(target=second)
    with writer_lock(path, "it"):
        thread.start()
        thread.join(0.2)
        entered.append("first")
    thread.join()
    assert entered == ["first", "second"]


LINES = [{"a": 1}, {"id": None, "reason": "ü \u2028 \x85 \n \ud800"}, {"path": Path("x")}]


def test_lines_come_back_up_to_one_that_was_not_finished(tmp_path):
    path, rows = tmp_path / "rows.jsonl", [*LINES[:2], {"path": "x"}]
    append_lines(path, [])
    assert read_lines(path) == [] and not path.exists()
    append_lines(path, LINES[:1])
    append_lines(path, iter(LINES[1:]))
    assert read_lines(path) == rows
    content = path.read_bytes()
    ends = [number + 1 for number, byte in enumerate(content) if byte == ord("\n")]
    for end in range(len(content)):
        path.write_bytes(content[:end])
        whole = sum(last <= end + 1 for last in ends)  # the newline itself may be missing
        assert read_lines(path) == rows[:whole]


def test_a_line_that_was_not_finished_is_cut_off_whatever_its_length(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    for n_bytes in (1, 2**16 - 1, 2**16, 2**16 + 1, 2**17 + 3):
        for whole in ([], [{"a": "x" * n_bytes}, {"a": 2}]):
            write_lines(path, whole)
            with open(path, "ab") as file:
                file.write(b"{" * n_bytes)
            append_lines(path, [{"a": 3}])
            assert read_lines(path) == [*whole, {"a": 3}] and path.read_bytes().endswith(b'{"a": 3}\n')


def test_written_lines_replace_the_file_at_once(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    assert write_lines(path, []) == 0 and not path.exists()
    assert write_lines(path, iter(LINES)) == 3
    assert read_lines(path) == [*LINES[:2], {"path": "x"}]
    assert write_lines(path, [{"title": "Zürich"}]) == 1 and "Zürich" in path.read_text(encoding="utf-8")
    with pytest.raises(KeyError):
        write_lines(path, ({"a": row["missing"]} for row in LINES))
    assert read_lines(path) == [{"title": "Zürich"}] and list(path.parent.iterdir()) == [path]
    assert write_lines(path, []) == 0 and list(path.parent.iterdir()) == []


TEXTS = ["a", "A", "", "ü", "u\u0308", "1", "1.0", "a\0b", "a\0c", "x" * 10_000, " a", "a ", "\ud800"]


@pytest.mark.parametrize("n_hashes", [None, 1, 3])
def test_ids_are_seen_once_also_if_their_hashes_are_equal(monkeypatch, n_hashes):
    """With one hash for all ids, only reading the shards tells them apart."""
    if n_hashes is not None:
        monkeypatch.setattr("modeling_clara.corpus.ids.id_hash", lambda text: np.uint64(len(text) % n_hashes))
    shards = [TEXTS[:4], TEXTS[4:5], [], TEXTS[5:]]
    n_read: list[int] = []
    seen = SeenIds(lambda number: n_read.append(number) or shards[number])
    for number, ids in enumerate(shards):
        assert [seen.add(text) for text in ids] == [True] * len(ids)
        assert [seen.add(text) for text in ids] == [False] * len(ids)  # before the shard is written
        seen.settle(number, ids)
        assert [seen.add(text) for text in ids] == [False] * len(ids)
    assert [seen.add(text) for text in TEXTS] == [False] * len(TEXTS)
    if n_hashes is None:
        assert len(n_read) == 2 * len(TEXTS)  # an id is looked up in its own shard, and only when it comes again
    assert seen.add("new")
    seen.remove("new")
    assert seen.add("new") and not seen.add("new")


def test_ids_beyond_those_in_the_dictionary_are_seen_too():
    n, size = 100_000, 1000  # more than 65,536
    names = [f"document {number}" for number in range(n)]
    seen = SeenIds(lambda number: names[number * size : (number + 1) * size])
    for number in range(n // size):
        seen.settle(number, names[number * size : (number + 1) * size])
    assert len(seen.hashes) > n // 2 and np.all(seen.hashes[:-1] <= seen.hashes[1:])
    assert not any(seen.add(name) for name in names[::997])
    assert all(seen.add(f"other {number}") for number in range(1000))


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

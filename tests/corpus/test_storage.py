"""Files that are whole or not there, locks that die with their process, JSON lines that were cut, the set of ids.

Locks are held by real processes, one of which is killed.
"""

import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from corpora import receive, start

from modeling_clara.corpus.ids import SeenIds
from modeling_clara.corpus.storage import append_lines, read_lines, write_lines, writer_lock
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


NASTY = [{"a": 1}, {"id": None, "reason": "ü \u2028 \x85 \n \ud800"}, {"path": Path("x")}]


def test_lines_come_back_up_to_one_that_was_not_finished(tmp_path):
    path, rows = tmp_path / "rows.jsonl", [*NASTY[:2], {"path": "x"}]
    append_lines(path, [])
    assert read_lines(path) == [] and not path.exists()
    append_lines(path, NASTY[:1])
    append_lines(path, iter(NASTY[1:]))
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
    assert write_lines(path, iter(NASTY)) == 3
    assert read_lines(path) == [*NASTY[:2], {"path": "x"}]
    assert write_lines(path, [{"title": "Zürich"}]) == 1 and "Zürich" in path.read_text(encoding="utf-8")
    with pytest.raises(KeyError):
        write_lines(path, ({"a": row["missing"]} for row in NASTY))
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

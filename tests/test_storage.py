"""Files that are whole or not there, locks that die with their process, lines that were cut, ids on disk.

Locks are held by real processes, one of which is killed.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from modeling_clara.storage_clara import (
    SeenIds,
    append_lines,
    file_sha256,
    read_lines,
    replacing,
    write_json,
    writer_lock,
)

# --- files that are whole or not there -------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, OSError])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(failure), replacing(path) as partial:
        partial.write_bytes(b"half")
        raise failure
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError), replacing(path):
        pass  # nothing was written
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as partial:
        partial.write_bytes(b"new")
        assert path.read_bytes() == b"old" and partial.parent == path.parent
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
    assert file_sha256(path) == "11507a0e2f5e69d5dfa40a62a1bd7b6ee57e6bcd85c67c9b8431b36fff21c437"


@pytest.mark.parametrize("content", [{"a": 1j}, {"a": "\ud800"}, {("a",): 1}], ids=ascii)
def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path, content):
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"ä": "ü"})
    with pytest.raises((TypeError, ValueError)):
        write_json(path, content)
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": "ü"} and list(path.parent.iterdir()) == [path]


def test_two_threads_that_write_one_file_do_not_share_a_temporary(tmp_path):
    path, failures = tmp_path / "file.json", []
    barrier = threading.Barrier(2)

    def work(value: str) -> None:
        try:
            with replacing(path) as partial:
                barrier.wait(10)
                partial.write_text(value * 1000)
                barrier.wait(10)
        except (OSError, threading.BrokenBarrierError) as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(value,)) for value in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and path.read_text() in ("a" * 1000, "b" * 1000)


# --- locks -----------------------------------------------------------------------------------------------------------

# the package without its __init__, which imports transformers
HOLD = """
import sys, time, types
from pathlib import Path
package = sys.modules["modeling_clara"] = types.ModuleType("modeling_clara")
package.__path__ = [sys.argv[2]]
from modeling_clara.storage_clara import writer_lock
with writer_lock(Path(sys.argv[1]), "the corpus"):
    print("held", flush=True)
    time.sleep(60)
"""
PACKAGE = Path(__file__).parent.parent / "modeling_clara"


def test_a_second_process_is_told_who_writes_and_a_killed_one_lets_go(tmp_path):
    path = tmp_path / "deep" / ".lock"
    command = [sys.executable, "-c", HOLD, str(path), str(PACKAGE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            for _ in range(2):  # a refusal takes nothing away
                with pytest.raises(RuntimeError, match=f"the folder .*one writer.*process {holder.pid} "):
                    with writer_lock(path, "the folder"):
                        pass
        finally:
            holder.kill()
    with writer_lock(path, "the folder", timeout=10):
        with pytest.raises(RuntimeError, match=f"process {os.getpid()} "), writer_lock(path, "the folder"):
            pass
    with writer_lock(path, "the folder"):
        path.with_name(path.name + ".pid").unlink()  # as a holder does that is about to release it
        with pytest.raises(RuntimeError, match="process unknown "), writer_lock(path, "the folder"):
            pass
    with pytest.raises(KeyError), writer_lock(path, "the folder"):
        raise KeyError
    with writer_lock(path, "the folder"):
        pass


def test_another_thread_waits_its_turn(tmp_path):
    path, inside, entered = tmp_path / ".lock", threading.Event(), []

    def second() -> None:
        inside.wait(10)
        with writer_lock(path, "it", timeout=10):
            entered.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with writer_lock(path, "it"):
        inside.set()
        thread.join(0.2)
        entered.append("first")
    thread.join()
    assert entered == ["first", "second"]


# --- lines and ids ---------------------------------------------------------------------------------------------------

NASTY = [{"a": 1}, {"id": None, "reason": "ü \u2028 \x85 \n \ud800"}, {"path": Path("x")}]


def test_lines_come_back_up_to_one_that_was_not_finished(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_lines(path) == []
    append_lines(path, [])
    assert not path.exists()
    append_lines(path, NASTY[:1])
    append_lines(path, iter(NASTY[1:]))
    rows = [*NASTY[:2], {"path": "x"}]
    assert read_lines(path) == rows
    content = path.read_bytes()
    ends = [number + 1 for number, byte in enumerate(content) if byte == ord("\n")]
    for end in range(len(content)):
        path.write_bytes(content[:end])
        whole = sum(last <= end + 1 for last in ends)  # the newline itself may be missing
        assert read_lines(path) == rows[:whole]


def test_lines_after_one_that_was_not_finished_are_not_lost(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_lines(path, [{"a": 1}, {"a": 2}])
    path.write_bytes(path.read_bytes()[:-4])
    append_lines(path, [{"a": 3}])
    assert {"a": 1} in read_lines(path) and {"a": 3} in read_lines(path)


def test_ids_are_seen_once(tmp_path):
    texts = [
        "a",
        "A",
        "",
        "ü",
        "u\u0308",
        "1",
        "1.0",
        "a\0b",
        "a\0c",
        "x" * 10_000,
        "'; drop table ids; --",
        " a",
        "a ",
    ]
    path = tmp_path / "ids"
    with SeenIds(path) as seen:
        assert [seen.add(text) for text in texts] == [True] * len(texts)
        assert [seen.add(text) for text in texts] == [False] * len(texts)
        assert path.exists()
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"what a killed process left")
    with pytest.raises(KeyError), SeenIds(path) as seen:
        assert seen.add("a")
        raise KeyError
    assert not path.exists()


def test_ids_can_be_seen_from_another_thread(tmp_path):
    found = []
    with SeenIds(tmp_path / "ids") as seen:
        seen.add("a")
        thread = threading.Thread(target=lambda: found.extend([seen.add("a"), seen.add("b")]))
        thread.start()
        thread.join()
    assert found == [False, True]

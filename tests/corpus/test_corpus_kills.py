"""Processes that are killed, or interrupted from the keyboard, while they change a corpus.

Some end at random moments of a long change, others before a given file operation of a short one. What is left must be
a whole corpus, before or after each change.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from corpora import (
    CODECS,
    ERRORS,
    build,
    files,
    make,
    make_many,
    named_files,
    read_all,
    read_json,
    rejected,
    relative_error,
    texts,
)
from test_corpus_histories import receive, start

from modeling_clara import CompressedCorpus

COUNT, SHARD = 120, 3
OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


@pytest.fixture(scope="module")
def original(shared_model, tmp_path_factory) -> Path:
    """d0 to d119 as float16."""
    return build(shared_model, tmp_path_factory.mktemp("kills") / "corpus", COUNT, shard_size=40).folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy to change; derived files stay valid."""
    return Path(shutil.copytree(original, tmp_path / "corpus"))


def updated(index: int) -> dict:
    return make(f"d{index}", 1000 + index)


# --- long changes, killed at random ----------------------------------------------------------------------------------


def work(connection, path, kind):
    """Change a corpus for seconds."""
    torch.set_num_threads(1)
    corpus = CompressedCorpus.open(path)
    connection.send("ready")
    if kind == "add":
        corpus.add((make(f"new{index}", index) for index in range(10_000)), shard_size=SHARD)
    elif kind == "update":
        corpus.update((updated(index) for index in range(COUNT)), shard_size=SHARD)
    elif kind == "delete":
        for index in range(COUNT):
            corpus.delete([f"d{index}"])
    for step in range(10_000):
        if kind == "compact":
            corpus.compact(shard_size=random.choice([5, 30, 1024]))
        elif kind == "convert":
            corpus.convert(CODECS[step % 2], shard_size=random.choice([5, 30, 1024]))
    connection.recv()


def assert_is_whole(path: Path, kind: str) -> int:
    """The corpus holds what a number of whole changes have left; returns the number."""
    corpus = CompressedCorpus.open(path)
    assert corpus.verify() == []
    documents, found = make_many(COUNT), texts(corpus)
    if kind == "add":
        steps, rest = divmod(len(found) - COUNT, SHARD)
        documents += [make(f"new{index}", index) for index in range(steps * SHARD)]
    elif kind == "update":
        steps, rest = divmod(sum(found[document["id"]] != document["text"] for document in documents), SHARD)
        documents = documents[steps * SHARD :] + [updated(index) for index in range(steps * SHARD)]
    elif kind == "delete":
        steps, rest = COUNT - len(found), 0
        documents = documents[steps:]
    else:
        steps, rest = read_json(corpus)["generation"], 0
    assert rest == 0
    assert list(found.items()) == [(document["id"], document["text"]) for document in documents]
    error = ERRORS["float16"] if kind != "convert" else 0.2  # rounded to int8 many times
    for stored, document in zip(read_all(corpus), documents, strict=True):
        assert relative_error(stored["memory"][0], document["memory"]) <= error
    return steps


def assert_has_no_strays(corpus: CompressedCorpus) -> None:
    """Every file is one that corpus.json names, a card, or derived and in use."""
    found = files(corpus.folder)
    derived = {name for name in found if name.startswith("index/segments/")}
    assert {name.split("/")[2] for name in derived} == {segment.key for segment in corpus.snapshot.segments}
    assert {name for name in found if not name.startswith("index/")} <= named_files(corpus)
    assert not [name for name in found if "partial" in name or name.endswith((".pid", ".ids", ".tmp"))]


def kill_at_random(folder: Path, kind: str, draw: random.Random) -> int:
    """Kill a change, or several changes that undo nothing, and check what is left."""
    for _ in range(2 if kind in ("compact", "convert") else 1):
        process, connection = start(work, folder, kind)
        assert receive(connection) == "ready"
        time.sleep(draw.uniform(0, 0.8))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    steps = assert_is_whole(folder, kind)
    corpus = CompressedCorpus.open(folder)
    corpus.add([make("last", 5000)])
    assert corpus.verify() == [] and "last" in corpus
    assert_has_no_strays(corpus)
    return steps


@pytest.mark.parametrize("kind", ["add", "update", "delete", "compact", "convert"])
def test_a_change_that_is_killed_leaves_a_whole_corpus(folder, kind):
    kill_at_random(folder, kind, random.Random(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["add", "update", "delete", "compact", "convert"])
def test_twenty_changes_that_are_killed_leave_whole_corpora(original, tmp_path, kind):
    draw = random.Random(kind)
    steps = [kill_at_random(shutil.copytree(original, tmp_path / str(run)), kind, draw) for run in range(20)]
    assert len(set(steps)) > 3  # they were killed at different moments


# --- short changes, ended before a file operation --------------------------------------------------------------------

CHANGES = {
    "add": lambda corpus: corpus.add([make("new", 1)]),
    "update": lambda corpus: corpus.update([updated(3), updated(50)]),
    "delete": lambda corpus: corpus.delete(["d3", "d50"]),
    "compact": lambda corpus: corpus.compact(),
    "convert": lambda corpus: corpus.convert("int8"),
    "reject": lambda corpus: corpus.add([make("d3", 1)]),
}


def change_until(connection, path, kind, number, sent):
    """Make a change, and send this process a signal before its file operation of this number; sends how it ended."""
    torch.set_num_threads(1)
    corpus, count, root = CompressedCorpus.open(path), 0, str(path)
    if kind in ("compact", "convert"):
        corpus.delete(["d7"])

    def watch(event, arguments):
        nonlocal count
        if event in OPERATIONS and arguments and str(arguments[0]).startswith(root):
            count += 1
            if count == number + 1:
                os.kill(os.getpid(), sent)

    sys.addaudithook(watch)
    try:
        CHANGES[kind](corpus)
    except KeyboardInterrupt:
        connection.send("interrupted")
        return
    connection.send("done")


def end_before_operation(folder: Path, kind: str, number: int, sent: signal.Signals) -> bool:
    """Whether the change has this many operations; its corpus must be whole."""
    process, connection = start(change_until, folder, kind, number, sent)
    try:
        is_ended = receive(connection) == "interrupted"
    except EOFError:
        is_ended = True
    process.join(60)
    corpus = CompressedCorpus.open(folder)
    assert corpus.verify() == []
    before = {document["id"]: document["text"] for document in make_many(COUNT)}
    if kind in ("compact", "convert"):
        del before["d7"]
    after = {
        "add": before | {"new": make("new", 1)["text"]},
        "update": before | {f"d{index}": updated(index)["text"] for index in (3, 50)},
        "delete": {name: text for name, text in before.items() if name not in ("d3", "d50")},
    }.get(kind, before)
    found = texts(corpus)
    assert found in (before, after) and (is_ended or found == after)
    corpus.add([make("last", 5000)])
    assert corpus.verify() == []
    assert len(rejected(folder)) == read_json(corpus)["n_rejected"] <= (kind == "reject")
    (folder / "rejected.jsonl").unlink(missing_ok=True)
    assert_has_no_strays(corpus)
    return is_ended


SIGNALS = pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])


@SIGNALS
@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_that_ends_before_a_file_operation_leaves_a_whole_corpus(original, tmp_path, kind, sent):
    number = random.Random(f"{kind} {sent}").randrange(45 if kind in ("add", "update") else 18)
    end_before_operation(shutil.copytree(original, tmp_path / "copy"), kind, number, sent)


@pytest.mark.slow
@SIGNALS
@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_that_ends_before_any_file_operation_leaves_a_whole_corpus(original, tmp_path, kind, sent):
    problems, number, is_ended = [], 0, True
    while is_ended:
        try:
            is_ended = end_before_operation(shutil.copytree(original, tmp_path / str(number)), kind, number, sent)
        except (AssertionError, OSError, ValueError) as error:
            problems.append(f"before operation {number}: {type(error).__name__} {str(error)[:120]}")
        number += 1
    assert number > 10 and problems == []

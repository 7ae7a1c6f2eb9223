"""Changes that are killed, interrupted from the keyboard, or find no room on the disk.

Some end at random moments of a long change, others before a given file operation of a short one. What is left must be
a whole corpus, before or after each change.
"""

import itertools
import os
import random
import resource
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
    assert_has_no_strays,
    build,
    by_id,
    make,
    make_many,
    read_all,
    read_json,
    receive,
    rejected,
    relative_error,
    start,
    texts,
)

from modeling_clara import CompressedCorpus

COUNT, SHARD = 120, 3
OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


@pytest.fixture(scope="module")
def original(shared_model, tmp_path_factory) -> Path:
    """d0 to d119 as float16."""
    return build(shared_model, tmp_path_factory.mktemp("kills") / "corpus", COUNT, shard_size=40).folder


def updated(index: int) -> dict:
    return make(f"d{index}", 1000 + index)


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


def assert_takes_another(folder: Path) -> None:
    corpus = CompressedCorpus.open(folder)
    assert corpus.add([make("last", 5000)]).n_documents == 1 and corpus.verify() == []
    assert_has_no_strays(corpus)


@pytest.mark.parametrize("n_runs", [1, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["add", "update", "delete", "compact", "convert"])
def test_a_change_that_is_killed_leaves_a_whole_corpus(original, tmp_path, kind, n_runs):
    draw, steps = random.Random(kind), set()
    for run in range(n_runs):
        folder = shutil.copytree(original, tmp_path / str(run))
        for _ in range(2 if kind in ("compact", "convert") else 1):  # twice one that keeps all documents
            process, connection = start(work, folder, kind)
            assert receive(connection) == "ready"
            time.sleep(draw.uniform(0, 0.8))
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
        steps.add(assert_is_whole(folder, kind))
        assert_takes_another(folder)
    assert n_runs == 1 or len(steps) > 3  # they were killed at different moments


LARGE = "long " * 40_000
CHANGES = {
    "add": lambda corpus: corpus.add([make("new", 1, text=LARGE)]),
    "update": lambda corpus: corpus.update([make("d3", 1003, text=LARGE), updated(50)]),
    "delete": lambda corpus: corpus.delete(["d3", "d50"]),
    "compact": lambda corpus: corpus.compact(),
    "convert": lambda corpus: corpus.convert("int8"),
    "reject": lambda corpus: corpus.add([make("d3", 1)]),
}


def change(connection, path, kind, number, sent, n_bytes):
    """Make a change, and send this process a signal before its file operation of this number; sends how it ended.

    No file may grow beyond `n_bytes`.
    """
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

    if number is not None:
        sys.addaudithook(watch)
    if n_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))
    try:
        CHANGES[kind](corpus)
        connection.send("done")
    except (KeyboardInterrupt, OSError):
        connection.send("ended")


def change_and_check(folder: Path, kind: str, number=None, sent=None, n_bytes=None) -> bool:
    """Whether the change was ended; the corpus must be what it was before, or what it shall be after it."""
    process, connection = start(change, folder, kind, number, sent, n_bytes)
    try:
        is_ended = receive(connection) == "ended"
    except EOFError:
        is_ended = process.exitcode in (None, -signal.SIGKILL)
    process.join(60)
    assert process.exitcode == 0 or (is_ended and process.exitcode == -signal.SIGKILL)
    corpus = CompressedCorpus.open(folder)
    assert corpus.verify() == []
    before = {name: document["text"] for name, document in by_id(make_many(COUNT)).items()}
    if kind in ("compact", "convert"):
        del before["d7"]
    after = {
        "add": before | {"new": LARGE},
        "update": before | {"d3": LARGE, "d50": updated(50)["text"]},
        "delete": {name: text for name, text in before.items() if name not in ("d3", "d50")},
    }.get(kind, before)
    assert texts(corpus) in (before, after) and (is_ended or texts(corpus) == after)
    assert is_ended or kind != "convert" or read_json(corpus)["codec"] == "int8"
    assert_takes_another(folder)
    assert len(rejected(folder)) == read_json(corpus)["n_rejected"] <= (kind == "reject")
    return is_ended


@pytest.mark.parametrize("is_every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one", "every"])
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_that_ends_before_a_file_operation_leaves_a_whole_corpus(original, tmp_path, kind, sent, is_every):
    one = random.Random(f"{kind} {sent}").randrange(45 if kind in ("add", "update") else 18)
    for number in itertools.count() if is_every else [one]:
        if not change_and_check(shutil.copytree(original, tmp_path / str(number)), kind, number, sent):
            break
    assert number > 10 or not is_every


@pytest.mark.parametrize("n_bytes", [100, 3500, 20_000])
@pytest.mark.parametrize("kind", ["add", "compact", "convert"])
def test_a_full_disk_loses_nothing(original, tmp_path, kind, n_bytes):
    assert change_and_check(shutil.copytree(original, tmp_path / "copy"), kind, n_bytes=n_bytes) or n_bytes > 3500

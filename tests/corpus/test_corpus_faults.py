"""Builds and changes that are killed, interrupted or find no room on the disk, and damaged files.

They run in other processes. Nothing may be lost, doubled or taken for good, and a change is made whole or not at all.
"""

import itertools
import json
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
    assert_takes_another,
    build,
    by_id,
    check_same,
    contents,
    damage,
    ids,
    limit_files,
    make,
    make_many,
    n_shards,
    read_all,
    read_json,
    receive,
    rejected,
    relative_error,
    stamps,
    start,
    texts,
)
from tiny import randomize_adapters, save_backbone

from modeling_clara import CLaRaForRAG, CompressedCorpus

OPTIONS = {"shard_size": 8, "batch_size": 1}


def keep_building(connection, checkpoint, documents, path, limit):
    """Build where no file may grow beyond `limit` bytes; sends the number of documents or the error."""
    torch.set_num_threads(1)
    model = CLaRaForRAG.from_pretrained(checkpoint)
    limit_files(limit)
    try:
        connection.send(len(CompressedCorpus.build(model, documents, path, **OPTIONS)))
    except Exception as error:
        connection.send(f"{'OSError' if isinstance(error, OSError) else ''} {error!r}")


def build_apart(checkpoint, documents, path, limit: int = 0) -> int | str:
    """Build in another process; the number of documents, or the error."""
    process, connection = start(keep_building, checkpoint, documents, path, limit)
    outcome = receive(connection)
    process.join()
    return outcome


def kill_when(checkpoint, documents, path, condition) -> bool:
    """Kill a build as soon as a condition holds; whether it was still at work."""
    process, _ = start(keep_building, checkpoint, documents, path, 0)
    while process.is_alive() and not condition():
        pass
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Rows with long documents, ids given twice and lines that are broken."""
    lines = []
    for number in range(72):
        row = {"id": f"d{number}", "text": f"Document number {number} is about Paris.", "year": number}
        if number % 10 == 3:
            row["text"] = " ".join(f"Part {part} of document {number} is about Rome." for part in range(9))
        if number % 25 == 7:
            row["id"] = f"d{number - 5}"
        lines.append("{" if number % 17 == 5 else json.dumps(row))
    path = tmp_path_factory.mktemp("source") / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def finished(shared_model, source, tmp_path_factory) -> Path:
    """A build that was left alone; copy it."""
    folder = tmp_path_factory.mktemp("finished") / "c"
    assert len(CompressedCorpus.build(shared_model, source, folder, **OPTIONS)) == 65
    return folder


@pytest.fixture(scope="module")
def expected(finished) -> tuple:
    return contents(CompressedCorpus.open(finished))


@pytest.fixture(scope="module")
def killed(checkpoint, source, tmp_path_factory) -> Path:
    """An unfinished build with five shards or a few more; copy it."""
    folder = tmp_path_factory.mktemp("killed") / "c"
    assert kill_when(checkpoint, source, folder, lambda: n_shards(folder) >= 5)
    assert not (folder / "corpus.json").exists()
    return folder


@pytest.fixture
def unfinished(killed, tmp_path) -> Path:
    return Path(shutil.copytree(killed, tmp_path / "c"))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_a_build_that_is_killed_again_and_again_goes_on(checkpoint, source, expected, tmp_path, seed):
    folder, draw = tmp_path / "c", random.Random(seed)
    for number in range(20 if seed else 2):  # of twenty, every second gets at least one shard further
        shards = {path: path.stat().st_ino for path in (folder / "data").glob("0*.parquet")}
        wanted, pause = (len(shards) + number % 2, draw.uniform(0, 0.05)) if seed else (len(shards) + 2 + number, 0)

        def is_time(wanted=wanted, pause=pause) -> bool:
            return n_shards(folder) >= wanted and time.sleep(pause) is None

        if not kill_when(checkpoint, source, folder, is_time):
            assert seed and number
            break
        kept = [path for path, inode in shards.items() if path.exists() and path.stat().st_ino == inode]
        assert len(kept) >= len(shards) - 1  # the last may have been written and not recorded
    assert build_apart(checkpoint, source, folder) == len(expected[0])
    check_same(CompressedCorpus.open(folder), expected)


MOMENTS = ["build/*.json", "codec/.*.partial", "codec/*", "data/.*.partial", "build/*.rejected.jsonl"]
MOMENTS += ["README.md", ".README.md.*.partial", ".corpus.json.*.partial", "corpus.json", "index", "rejected.jsonl"]
MOMENTS += ["index/segments/.*.partial", "index/segments/*/segment.json"]


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_build_that_is_killed_at_a_certain_moment_goes_on(checkpoint, source, expected, tmp_path, moment):
    folder = tmp_path / "c"
    kill_when(checkpoint, source, folder, lambda: any(folder.glob(moment)))
    assert build_apart(checkpoint, source, folder) == len(expected[0])
    check_same(CompressedCorpus.open(folder), expected)


def test_what_a_killed_writer_leaves_and_opening_it_stop_nothing(shared_model, source, expected, unfinished, tmp_path):
    for name in (".corpus.json.4711.partial", ".README.md.4711.partial", "data/.00000-000002.4711.partial"):
        (unfinished / name).write_text("half of it")
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="corpus.json"):
        CompressedCorpus.open(tmp_path / "none")
    assert not list((tmp_path / "none").iterdir())
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="must be finished first. Run the same build again"):
            CompressedCorpus.open(unfinished)
    check_same(CompressedCorpus.build(shared_model, source, unfinished, **OPTIONS), expected)


@pytest.mark.parametrize(("folder", "kind"), [("data", "short"), ("data", "missing"), ("codec", "flipped")])
def test_what_was_damaged_before_a_build_goes_on_is_made_again(
    shared_model, source, expected, unfinished, folder, kind
):
    damage(min((unfinished / folder).glob("[0-9a-f]*")), kind)
    check_same(CompressedCorpus.build(shared_model, source, unfinished, **OPTIONS), expected)


def test_an_unfinished_build_goes_on_with_its_rows_and_options_alone(shared_model, source, expected, unfinished):
    def kept() -> dict:
        return {name: stamp for name, stamp in stamps(unfinished).items() if not name.endswith((".pid", ".ids"))}

    rows, before = source.read_text(), kept()
    options = [{"codec": "int4"}, {"shard_size": 5}, {"memory_size": 2}, {"metadata": {"year": "int32"}}]
    options += [{"title_column": "name"}, {"rank": 0, "world_size": 2}]
    changes = [("number 2 is", "number 2 IS"), ('"d2"', '"x2"'), ('"year": 2}', '"year": 3}'), ('"d71"', '"d711"')]
    for other in options:
        with pytest.raises(ValueError, match="must go on with the input"):
            CompressedCorpus.build(shared_model, source, unfinished, **OPTIONS | other)
    try:
        for old, new in changes:
            source.write_text(rows.replace(old, new))
            with pytest.raises(ValueError, match="must go on with the input|first rows are others than before"):
                CompressedCorpus.build(shared_model, source, unfinished, **OPTIONS)
    finally:
        source.write_text(rows)
    assert kept() == before
    check_same(CompressedCorpus.build(shared_model, source, unfinished, **OPTIONS), expected)


@pytest.mark.parametrize("limit", [100, 9000])
def test_a_full_disk_under_a_build_loses_nothing(checkpoint, shared_model, source, expected, tmp_path, limit):
    assert build_apart(checkpoint, source, tmp_path / "c", limit).startswith("OSError")
    check_same(CompressedCorpus.build(shared_model, source, tmp_path / "c", **OPTIONS), expected)


def test_a_full_disk_under_the_codecs_state(source, tmp_path):
    model = CLaRaForRAG.from_backbone(save_backbone(tmp_path / "b", hidden_size=128), memory_sizes=(8,), lora_rank=2)
    randomize_adapters(model)
    model.save_pretrained(tmp_path / "checkpoint")
    assert build_apart(tmp_path / "checkpoint", source, tmp_path / "c", 8200).startswith("OSError")


def test_a_full_disk_does_not_lose_the_list_of_rejected_rows(checkpoint, shared_model, source, expected, unfinished):
    assert build_apart(checkpoint, source, unfinished, 150).startswith("OSError")
    check_same(CompressedCorpus.build(shared_model, source, unfinished, **OPTIONS), expected)


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy that keeps the times of the files."""
    return Path(shutil.copytree(finished, tmp_path / "c"))


KINDS = ("missing", "cut", "empty", "garbage")
FILES = [*(f"index/segments/*/{name}" for name in ("rows.bin", "table.arrow", "ids.npy"))]
FILES += [f"index/{name}" for name in ("segments/*/segment.json", "k4/*.faiss", "k4/*.safetensors")]
DERIVED = [(name, kind) for name in FILES for kind in KINDS]
DERIVED += [("index/segments/*/segment.json", text) for text in ("[]", "null", "{}", '{"shards": 5}')]


@pytest.mark.parametrize(("pattern", "kind"), DERIVED)
def test_damaged_derived_files_are_made_again(folder, shared_model, expected, pattern, kind):
    query = shared_model.encode_queries(["What is about Rome?"])
    before = CompressedCorpus.open(folder, index="flat").search(query, 5)
    (path,) = folder.glob(pattern)
    damage(path, kind)
    opened = CompressedCorpus.open(folder, index="flat")
    assert ids(opened.search(query, 5)) == ids(before)
    check_same(opened, expected)


def test_a_second_builder_is_told_who_works(checkpoint, shared_model, source, expected, tmp_path):
    folder = tmp_path / "c"
    process, connection = start(keep_building, checkpoint, source, folder, 0)
    while not n_shards(folder):
        pass
    with pytest.raises(RuntimeError, match=f"process {process.pid} writes to it. Wait until it is done, or end it"):
        CompressedCorpus.build(shared_model, source, folder, **OPTIONS)
    assert receive(connection) == len(expected[0])
    check_same(CompressedCorpus.open(folder), expected)


COUNT, SHARD = 120, 3
OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


@pytest.fixture(scope="module")
def original(shared_model, tmp_path_factory) -> Path:
    """d0 to d119 as float16."""
    return build(shared_model, tmp_path_factory.mktemp("kills") / "corpus", COUNT, shard_size=40).folder


def updated(index: int) -> dict:
    return make(f"d{index}", 1000 + index)


def keep_changing(connection, path, kind):
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


@pytest.mark.parametrize("n_runs", [1, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["add", "update", "delete", "compact", "convert"])
def test_a_change_that_is_killed_leaves_a_whole_corpus(original, tmp_path, kind, n_runs):
    draw, steps = random.Random(kind), set()
    for run in range(n_runs):
        folder = shutil.copytree(original, tmp_path / str(run))
        for _ in range(2 if kind in ("compact", "convert") else 1):  # twice one that keeps all documents
            process, connection = start(keep_changing, folder, kind)
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
    """Make a change, with a signal before its file operation of this number and this limit; sends how it ended."""
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
    limit_files(n_bytes)
    try:
        CHANGES[kind](corpus)
        connection.send("done")
    except (KeyboardInterrupt, OSError):
        connection.send("ended")


def change_and_check(folder: Path, kind: str, number=None, sent=None, n_bytes=0) -> bool:
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
def test_a_full_disk_under_a_change_loses_nothing(original, tmp_path, kind, n_bytes):
    assert change_and_check(shutil.copytree(original, tmp_path / "copy"), kind, n_bytes=n_bytes) or n_bytes > 3500

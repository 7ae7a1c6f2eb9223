"""Long histories of changes, and what others see of them: readers, a second writer, changes that fail half-way.

Other processes are forked from a server that has imported the package once; they open the corpus by its path.
"""

import multiprocessing
import os
import random
import resource
import shutil
import signal

import pytest
import torch
from corpora import CODECS, ERRORS, assert_holds, build, by_id, ids, make, make_many, read_json, texts, top

from modeling_clara import CompressedCorpus

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["modeling_clara", "datasets"])


def start(function, *arguments):
    """Call `function(connection, *arguments)` in another process; returns it and our end of the connection."""
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=function, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def receive(connection):
    assert connection.poll(60), "the other process does not answer"
    return connection.recv()


# --- long histories --------------------------------------------------------------------------------------------------


def test_a_random_sequence_of_changes_is_that_of_a_dictionary(shared_model, tmp_path):
    draw, expected = random.Random(0), by_id(make_many(10))
    corpus, error = build(shared_model, tmp_path / "corpus"), ERRORS["float16"]
    for step in range(40):
        kind = draw.choices(("add", "update", "delete", "compact", "convert"), (5, 3, 5, 1, 1))[0]
        some = draw.sample(sorted(expected), min(len(expected), draw.randint(1, 4)))
        if kind == "add":
            new = [make(f"s{step}-{i}", 1000 * step + i) for i in range(draw.randint(1, 4))]
            corpus.add(new, shard_size=draw.randint(1, 4))
            expected |= by_id(new)
        elif kind == "update" and some:
            new = [make(name, 1000 * step + 500 + i) for i, name in enumerate(some)]
            corpus.update(new, shard_size=draw.randint(1, 4))
            expected = {name: document for name, document in expected.items() if name not in some} | by_id(new)
        elif kind == "delete" and some:
            assert corpus.delete(some) == len(some)
            expected = {name: document for name, document in expected.items() if name not in some}
        elif kind == "compact":
            corpus.compact(shard_size=draw.randint(1, 20))
        elif kind == "convert":
            codec = draw.choice([codec for codec in CODECS if codec != corpus.manifest.codec])
            corpus.convert(codec, shard_size=draw.randint(1, 20))
            error += 2 * ERRORS[codec]
        assert_holds(corpus, expected, error)
        opened = CompressedCorpus.open(corpus.folder)
        assert list(texts(opened).items()) == [(name, document["text"]) for name, document in expected.items()]
        query = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(step))
        assert ids(corpus.search(query, 9)) == ids(opened.search(query, 9))


def test_many_single_adds_keep_the_number_of_segments_bounded(corpus):
    documents = make_many(100, "new")
    for document in documents:
        corpus.add([document])
        assert len(corpus.snapshot.segments) <= 70
    assert_holds(corpus, by_id(make_many(10) + documents))
    opened = CompressedCorpus.open(corpus.folder)
    assert len(opened.snapshot.segments) <= 10
    assert_holds(opened, by_id(make_many(10) + documents))
    corpus.compact()
    assert len(read_json(corpus)["shards"]) == len(corpus.snapshot.segments) == 1


# --- readers ---------------------------------------------------------------------------------------------------------


def test_a_reader_keeps_its_snapshot_until_it_refreshes(corpus):
    def seen(reader):
        hits = reader.search(make("d3", 3)["memory"][None], 20)[0]
        return texts(reader), [(hit["document_id"], hit["score"], hit["text"]) for hit in hits], len(reader)

    reader = CompressedCorpus.open(corpus.folder)
    changes = [
        lambda: corpus.add(make_many(3, "new", 20)),
        lambda: corpus.update([make("d3", 203)]),
        lambda: corpus.delete(["d0", "new21"]),
        lambda: corpus.compact(shard_size=2),
        lambda: corpus.convert("int8"),
        lambda: corpus.delete(sorted(texts(corpus))),
    ]
    for change in changes:
        before = seen(reader)
        change()
        assert seen(reader) == before
        assert seen(reader.refresh()) == seen(corpus) == seen(CompressedCorpus.open(corpus.folder))
        assert len(reader) == read_json(corpus)["n_documents"]


def test_two_objects_change_one_corpus_in_turn(corpus):
    other = CompressedCorpus.open(corpus.folder)
    corpus.add([make("a", 40)])
    other.add([make("b", 41)])
    assert other.add([make("a", 42)]).rejected and len(other) == 12
    corpus.delete(["b"])
    other.update([make("a", 43)])
    corpus.compact()
    with pytest.raises(KeyError):
        other.delete(["b"])
    other.convert("int8")
    corpus.convert("float16")  # back: what counts is the corpus, not what this object last saw of it
    assert CompressedCorpus.open(corpus.folder).manifest.codec == corpus.manifest.codec == "float16"
    assert_holds(corpus, by_id([*make_many(10), make("a", 43)]), ERRORS["int8"] + ERRORS["float16"])


@pytest.mark.parametrize("change", ["refresh", "add", "delete"])
def test_a_corpus_that_was_replaced_by_another_of_as_many_changes_is_not_mixed_with_it(shared_model, corpus, change):
    shutil.rmtree(corpus.folder)
    CompressedCorpus.build(shared_model, make_many(4, "other"), corpus.folder, codec="float16")
    expected = by_id(make_many(4, "other"))
    if change == "refresh":
        corpus.refresh()
    elif change == "add":
        corpus.add([make("new", 50)])
        expected["new"] = make("new", 50)
    else:
        with pytest.raises(KeyError):
            corpus.delete(["d1"])
    for seen in (CompressedCorpus.open(corpus.folder), corpus):
        assert_holds(seen, expected)


def keep_reading(connection, path):
    """Open, refresh and search until told to stop; sends the number of rounds, or what was wrong."""
    torch.set_num_threads(1)
    refreshed, rounds = CompressedCorpus.open(path), 0
    connection.send("ready")
    while not connection.poll():
        for reader in (refreshed.refresh(), CompressedCorpus.open(path)):
            for index in (0, 4, 9):
                hit = top(reader, make(f"d{index}", index))
                if (hit["document_id"], hit["text"]) != (f"d{index}", f"text {index} of d{index}"):
                    raise ValueError(hit)
            ids = [name for name in reader.document_ids() if name.startswith("d")]
            if ids != [f"d{index}" for index in range(10)]:
                raise ValueError(ids)
        rounds += 1
    connection.send(rounds)


def test_a_reader_in_another_process_while_this_one_changes_everything(corpus):
    process, connection = start(keep_reading, corpus.folder)
    assert receive(connection) == "ready"
    for round_ in range(5):
        corpus.compact(shard_size=1 + round_)
        corpus.add(make_many(2, f"r{round_}-", 50), shard_size=1)
        corpus.convert(CODECS[(round_ + 1) % 2])
        corpus.delete([f"r{round_}-50"])
    connection.send("stop")
    assert receive(connection) > 1  # EOFError: the reader has failed, its error is above
    process.join(30)
    assert process.exitcode == 0
    assert corpus.verify() == [] and len(corpus) == 10 + 5


# --- a second writer -------------------------------------------------------------------------------------------------


def hold_the_lock(connection, path):
    """Add from an input that stops after its first document until told to go on."""

    def rows():
        yield make("held", 60)
        connection.send(os.getpid())
        connection.recv()
        yield make("last", 61)

    torch.set_num_threads(1)
    CompressedCorpus.open(path).add(rows())


def test_a_second_writer_is_told_the_pid_of_the_first(corpus):
    process, connection = start(hold_the_lock, corpus.folder)
    pid = receive(connection)
    assert pid == process.pid
    changes = [
        lambda: corpus.add([make("x", 1)]),
        lambda: corpus.update([make("d1", 1)]),
        lambda: corpus.delete(["d1"]),
        lambda: corpus.compact(),
        lambda: corpus.convert("int4"),
        lambda: corpus.push_to_hub("histories/locked", compressor="histories/model"),
    ]
    before = read_json(corpus)
    for change in changes:
        with pytest.raises(RuntimeError, match=rf"{corpus.folder}.*process {pid} .*[Ww]ait"):
            change()
    assert read_json(corpus) == before and len(corpus) == 10
    assert top(corpus, make("d1", 1))["document_id"] == "d1"
    connection.send("go on")
    process.join(60)
    assert process.exitcode == 0
    corpus.add([make("x", 62)])
    assert_holds(corpus, by_id([*make_many(10), make("held", 60), make("last", 61), make("x", 62)]))


def test_a_writer_that_is_killed_leaves_no_lock(corpus):
    process, connection = start(hold_the_lock, corpus.folder)
    receive(connection)
    process.kill()
    process.join()
    corpus.add([make("x", 62)])
    assert_holds(corpus, by_id([*make_many(10), make("x", 62)]))


def test_a_change_inside_a_change_is_refused(corpus):
    def rows():
        yield make("x", 1)
        assert top(corpus, make("d1", 1))["document_id"] == "d1"
        corpus.delete(["d1"])

    with pytest.raises(RuntimeError, match=f"process {os.getpid()}"):
        corpus.add(rows())
    corpus.delete(["d0"])
    assert_holds(corpus, by_id(make_many(10)[1:]))


# --- changes that fail half-way --------------------------------------------------------------------------------------

CHANGES = {
    "add": lambda corpus: corpus.add([make("new", 70, text="long " * 40_000)]),
    "update": lambda corpus: corpus.update([make("d3", 71, text="long " * 40_000)]),
    "delete": lambda corpus: corpus.delete(["d3"]),
    "compact": lambda corpus: corpus.compact(),
    "convert": lambda corpus: corpus.convert("int8"),
}


def assert_is_before_or_after(folder, kind: str) -> None:
    """The corpus is what it was before one of `CHANGES`, or what it shall be after it."""
    opened = CompressedCorpus.open(folder)
    assert opened.verify() == []
    before = {document["id"]: document["text"] for document in make_many(10)}
    after = {"add": before | {"new": "long " * 40_000}, "update": before | {"d3": "long " * 40_000}}
    after["delete"] = {name: text for name, text in before.items() if name != "d3"}
    assert texts(opened) in (before, after.get(kind, before))
    assert opened.add([make("next", 72)]).n_documents == 1 and opened.verify() == []


@pytest.mark.parametrize("kind", ["update", "convert"])
def test_a_change_whose_derived_files_cannot_be_written_loses_nothing(corpus, kind):
    segments = corpus.folder / "index" / "segments"
    shutil.rmtree(segments)
    segments.write_text("a file where the folder should be")
    with pytest.raises(OSError):
        CHANGES[kind](corpus)
    segments.unlink()
    assert_is_before_or_after(corpus.folder, kind)


def change_with_limit(connection, path, kind, n_bytes):
    """Make a change where no file may grow beyond `n_bytes`; sends the classes of the error, none where it worked."""
    torch.set_num_threads(1)
    corpus = CompressedCorpus.open(path)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))
    try:
        CHANGES[kind](corpus)
        connection.send([])
    except Exception as error:
        connection.send([kind.__name__ for kind in type(error).__mro__])


@pytest.mark.parametrize("n_bytes", [100, 3500, 20_000, 10**8])
@pytest.mark.parametrize("kind", ["add", "compact", "convert"])
def test_a_full_disk_loses_nothing(corpus, kind, n_bytes):
    process, connection = start(change_with_limit, corpus.folder, kind, n_bytes)
    classes = receive(connection)
    process.join(30)
    assert process.exitcode == 0 and (not classes or n_bytes < 10**8)
    assert_is_before_or_after(corpus.folder, kind)
    assert not classes or "OSError" in classes
    if not classes:
        assert kind != "add" or "new" in CompressedCorpus.open(corpus.folder)
        assert kind != "convert" or read_json(corpus)["codec"] == "int8"

"""Long histories of changes, what readers see of them, and second writers."""

import os
import random
import shutil

import pytest
import torch
from corpora import (
    CODECS,
    ERRORS,
    assert_has_no_strays,
    assert_holds,
    build,
    by_id,
    ids,
    make,
    make_many,
    read_all,
    read_json,
    receive,
    start,
    texts,
    top,
)

from modeling_clara import CompressedCorpus


def stored(corpus) -> bytes:
    return torch.cat([document["memory"] for document in read_all(corpus)]).numpy().tobytes()


@pytest.mark.parametrize("codec", CODECS)
def test_a_random_sequence_of_changes_is_that_of_a_dictionary(shared_model, tmp_path, codec):
    draw, expected = random.Random(codec), by_id(make_many(10))
    corpus, error = build(shared_model, tmp_path / "corpus", codec=codec), ERRORS[codec]
    kinds = [*draw.choices(("add", "update", "delete", "compact"), (5, 3, 5, 2), k=20), "compact", "convert", "add"]
    for step, kind in enumerate(kinds):
        some = draw.sample(sorted(expected), min(len(expected), draw.randint(1, 4)))
        size = draw.randint(1, 7)
        if kind == "add":
            new = [make(f"s{step}-{i}", 1000 * step + i) for i in range(draw.randint(1, 4))]
            assert corpus.add(new, shard_size=size).n_documents == len(new)
            expected |= by_id(new)
        elif kind == "update" and some:
            new = [make(name, 1000 * step + 500 + i) for i, name in enumerate(some)]
            assert corpus.update(new, shard_size=size).n_documents == len(new)
            expected = {name: document for name, document in expected.items() if name not in some} | by_id(new)
        elif kind == "delete" and some:
            assert corpus.delete(some) == len(some)
            expected = {name: document for name, document in expected.items() if name not in some}
        elif kind == "compact":
            before = stored(corpus)
            corpus.compact(shard_size=size)
            shards = read_json(corpus)["shards"]
            assert stored(corpus) == before and [shard["n_spans"] for shard in shards[:-1]] == [size] * len(shards[1:])
            assert all(shard["tombstones"] == [] and shard["n_deleted"] == 0 for shard in shards)
        elif kind == "convert":
            target = CODECS[CODECS.index(codec) - 1]
            corpus.convert(target, shard_size=size)
            error += ERRORS[target]
            assert read_json(corpus)["codec"] == target
            assert len(read_json(corpus)["codec_states"]) == (target != "float16")
        assert_has_no_strays(corpus)
        assert_holds(corpus, expected, 2 * error)
        opened = CompressedCorpus.open(corpus.folder)
        assert list(texts(opened).items()) == [(name, document["text"]) for name, document in expected.items()]
        query = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(step))
        assert ids(corpus.search(query, 9)) == ids(opened.search(query, 9))


def test_many_single_adds_keep_the_number_of_segments_bounded(corpus):
    documents = make_many(75, "new")
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
    """Open, refresh and search until told to stop; sends the number of rounds, or fails."""
    torch.set_num_threads(1)
    refreshed, rounds = CompressedCorpus.open(path), 0
    connection.send("ready")
    while not connection.poll():
        for reader in (refreshed.refresh(), CompressedCorpus.open(path)):
            for index in (0, 4, 9):
                hit = top(reader, make(f"d{index}", index))
                assert (hit["document_id"], hit["text"]) == (f"d{index}", f"text {index} of d{index}")
            assert [name for name in reader.document_ids() if name[0] == "d"] == [f"d{index}" for index in range(10)]
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
    assert process.exitcode == 0 and corpus.verify() == [] and len(corpus) == 10 + 5


# --- a second writer -------------------------------------------------------------------------------------------------


def hold_the_lock(connection, path):
    """Add from an input that stops after its first document until told to go on."""

    def rows():
        yield make("held", 60)
        connection.send("held")
        connection.recv()
        yield make("last", 61)

    torch.set_num_threads(1)
    CompressedCorpus.open(path).add(rows())


def test_a_second_writer_is_told_the_pid_of_the_first(corpus):
    process, connection = start(hold_the_lock, corpus.folder)
    receive(connection)
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
        with pytest.raises(RuntimeError, match=rf"{corpus.folder}.*process {process.pid} .*[Ww]ait"):
            change()
    assert read_json(corpus) == before and top(corpus, make("d1", 1))["document_id"] == "d1"
    connection.send("go on")
    process.join(60)
    assert process.exitcode == 0
    corpus.add([make("x", 62)])
    assert_holds(corpus, by_id([*make_many(10), make("held", 60), make("last", 61), make("x", 62)]))


def test_a_change_inside_a_change_is_refused(corpus):
    def rows():
        yield make("x", 1)
        assert top(corpus, make("d1", 1))["document_id"] == "d1"
        corpus.delete(["d1"])

    with pytest.raises(RuntimeError, match=f"process {os.getpid()}"):
        corpus.add(rows())
    corpus.delete(["d0"])
    assert_holds(corpus, by_id(make_many(10)[1:]))

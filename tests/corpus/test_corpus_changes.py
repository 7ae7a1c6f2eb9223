"""Changing a corpus: each change and long histories, against what a plain dictionary would hold; readers and writers.

Documents bring their memories.
"""

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
    assert_ranked,
    build,
    by_id,
    files,
    ids,
    make,
    make_many,
    memory,
    ranking,
    read_all,
    read_json,
    receive,
    rejected,
    start,
    texts,
    top,
)

from modeling_clara import CompressedCorpus


def stored(corpus) -> dict[str, bytes]:
    return {document["document_id"]: document["memory"].numpy().tobytes() for document in read_all(corpus)}


def test_an_id_that_is_there_or_given_twice_is_rejected_and_the_rest_is_added(corpus):
    rows = [make("d3", 50), make("x", 51), make("x", 52), make("y", 53)]
    changes = corpus.add(rows, shard_size=1)
    assert (changes.n_documents, changes.n_spans) == (2, 2)
    found = [(row["row"], row["place"], row["id"]) for row in changes.rejected]
    assert found == [(0, "documents[0]", "d3"), (2, "documents[2]", "x")]
    assert "update" in changes.rejected[0]["reason"] and "twice" in changes.rejected[1]["reason"]
    assert_holds(corpus, by_id(make_many(10) + [rows[1], rows[3]]))
    assert rejected(corpus.folder) == changes.rejected and read_json(corpus)["n_rejected"] == 2


def test_default_ids_never_collide(corpus):
    nameless = [{"text": f"nameless {seed}", "memory": memory(seed)} for seed in range(5)]
    corpus.add([make("10", 60), make("12", 61)])
    corpus.add([nameless[0], make("14", 63), *nameless[1:3]])
    corpus.delete(["d1", "d2"])
    corpus.add(nameless[3:4])
    corpus.compact()
    corpus.add(nameless[4:])
    found = texts(corpus)
    assert len(found) == len(corpus) == 8 + 2 + 6 == len(set(found.values())) and corpus.verify() == []


def test_a_model_compresses_what_has_no_memory(corpus, shared_model):
    long = "The Seine flows through Paris. " * 20
    changes = corpus.add([{"id": "rome", "title": "Rome", "text": "Rome is in Italy."}, {"id": "long", "text": long}])
    assert changes.n_documents == 2 and changes.n_spans == 1 + len(corpus.get(["long"])[0]["spans"]) > 3
    found = corpus.get(["rome"])[0]
    expected = shared_model.compress([{"title": "Rome", "text": "Rome is in Italy."}])
    torch.testing.assert_close(found["memory"], expected, rtol=2e-3, atol=2e-3)
    assert found["metadata"] == {"year": None} and corpus.verify() == []
    corpus.compact(shard_size=2)
    assert corpus.get(["long"])[0]["spans"][-1]["span"] == changes.n_spans - 2
    query = torch.stack([memory(1), memory(2)])
    assert_ranked(corpus.search(query, 7), ranking(corpus, query, 7))
    corpus.delete(["long"])
    assert read_json(corpus)["n_spans"] == len(corpus) == 11


def test_rows_that_cannot_be_used_are_rejected_and_change_nothing(corpus):
    opened, before = CompressedCorpus.open(corpus.folder), read_json(corpus)
    for call in (opened.add, opened.update):  # all would be rejected
        with pytest.raises(ValueError, match=r"`documents\[1\]` must have a `memory`.*model"):
            call([make("d1", 70), {"id": "d2", "text": "no memory"}])
    assert read_json(corpus) == before
    bad = [{"memory": torch.full((4, 32), wrong)} for wrong in (torch.nan, 7e4)] + [{"text": " "}, {"title": 3}]
    bad += [{"lang": "en"}, *({"year": wrong} for wrong in ("soon", 1.5, 2.0**70)), {"span": 1}]
    rows = [make(f"d{n}", 90) | fields for n, fields in enumerate(bad)]
    good = [make("good", 91) | {"year": None}, {"id": "other", "text": "t", "memory": memory(86)}]
    changes = corpus.add([*({**row, "id": f"bad{n}"} for n, row in enumerate(rows)), *good])
    assert changes.n_documents == 2 and [row["row"] for row in changes.rejected] == [*range(len(rows))]
    assert all(f"documents[{row['row']}" in row["reason"] for row in changes.rejected)
    assert "'lang'" in changes.rejected[4]["reason"] and "'year'" in changes.rejected[5]["reason"]
    assert [document["metadata"] for document in corpus.get(["good", "other"])] == [{"year": None}] * 2
    changes = corpus.update([make("good", 92), *rows])
    assert changes.n_documents == 1 and [row["row"] for row in changes.rejected] == [*range(1, 1 + len(rows))]
    assert_holds(corpus, by_id([*make_many(10), good[1] | {"year": None}, make("good", 92)]))


def test_a_generator_that_fails_leaves_whole_shards(corpus):
    def rows():
        yield from make_many(5, "new")
        raise OSError("the source is gone")

    with pytest.raises(OSError, match="the source is gone"):
        corpus.add(rows(), shard_size=2)
    added = len(corpus) - 10
    assert added in (0, 2, 4)
    assert_holds(CompressedCorpus.open(corpus.folder), by_id(make_many(10) + make_many(5, "new")[:added]))


def test_update_puts_documents_in_place_of_others_and_rejects_the_rest(corpus):
    new = [make("d8", 208), make("d2", 202)]
    changes = corpus.update(new, shard_size=1)
    assert (changes.n_documents, changes.n_spans, changes.rejected) == (2, 2, [])
    old = make_many(10)
    assert_holds(corpus, by_id([d for d in old if d["id"] not in ("d8", "d2")] + new))
    assert top(corpus, new[1])["text"] == new[1]["text"]
    hits = corpus.search(old[2]["memory"][None], 10)[0]
    assert old[2]["text"] not in [hit["text"] for hit in hits] and len(hits) == 10
    assert top(corpus.with_options(where={"document_id": "d2"}), old[2])["text"] == new[1]["text"]
    corpus.update([make("d2", 302)])
    rows = [make("d2", 402), make("none", 403), make("d2", 404), {"text": "nameless", "memory": memory(405)}]
    changes = corpus.update(rows)
    assert changes.n_documents == 1 and [row["row"] for row in changes.rejected] == [1, 2, 3]
    assert "`add`" in changes.rejected[0]["reason"] and "must have an id" in changes.rejected[2]["reason"]
    assert_holds(corpus, by_id([d for d in old if d["id"] not in ("d8", "d2")] + [new[0], rows[0]]))


def test_delete_takes_all_of_its_ids_or_none(corpus):
    before = read_json(corpus)
    wrong = [(["d1", "nobody", "d2"], KeyError, "'nobody' is none"), (["d1", "d1"], ValueError, "different.*twice")]
    wrong += [("d1", TypeError, "must be a list"), ([], ValueError, "at least one")]
    for given, error, match in wrong:
        with pytest.raises(error, match=match):
            corpus.delete(given)
    for wrong in (3, None, 1.5, b"d1"):
        for call in (corpus.delete, corpus.get):
            with pytest.raises((KeyError, TypeError), match="`ids`"):
                call([wrong])
    assert read_json(corpus) == before and len(corpus) == 10
    assert corpus.delete(["d9", "d0", "d4"]) == 3
    assert_holds(corpus, by_id([d for d in make_many(10) if d["id"] not in ("d9", "d0", "d4")]))
    assert "d4" not in corpus and "d5" in corpus
    for call in (corpus.get, corpus.delete):
        with pytest.raises(KeyError, match="d4"):
            call(["d4"])


@pytest.mark.parametrize(("codec", "is_compacted"), [("float16", False), ("int8", True), ("int4", True)])
def test_all_documents_can_be_deleted_and_the_same_ids_added_again(shared_model, tmp_path, codec, is_compacted):
    corpus = build(shared_model, tmp_path / "corpus", codec=codec)
    corpus.delete([f"d{index}" for index in range(10)])
    if is_compacted:
        corpus.compact()
        assert read_json(corpus)["shards"] == []
    for empty in (corpus, *(CompressedCorpus.open(corpus.folder, index=index) for index in (None, "flat"))):
        assert len(empty) == 0 and list(empty.document_ids()) == [] and empty.verify() == []
        assert empty.search(torch.randn(2, 4, 32), 3) == [[], []]
        assert empty.search(torch.randn(1, 4, 32), 3, {"year": 1}, hybrid=True, questions=["text"]) == [[]]
    again = [make(f"d{index}", 300 + index) for index in range(10)]
    corpus.add(again[:5])
    corpus.add(again[5:])
    for whole in (corpus, CompressedCorpus.open(corpus.folder)):
        assert_holds(whole, by_id(again), 2 * ERRORS[codec])


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_shards_of_two_codec_states_are_compacted_and_converted(shared_model, tmp_path, codec):
    documents = make_many(12)
    for index in (0, 1):
        options = {"codec": codec, "shard_size": 3, "rank": index, "world_size": 2}
        corpus = CompressedCorpus.build(shared_model, documents, tmp_path / "corpus", **options)
    assert len(read_json(corpus)["codec_states"]) == 2
    corpus.delete(["d0", "d5"])
    before = stored(corpus)
    corpus.compact(shard_size=100)
    assert stored(corpus) == before and len(read_json(corpus)["codec_states"]) == 2
    corpus.delete([f"d{index}" for index in range(2, 12, 2)])  # all of the first rank
    corpus.compact()
    content = read_json(corpus)
    assert len(content["codec_states"]) == 1 == len(list((corpus.folder / "codec").iterdir()))
    assert stored(corpus) == {name: value for name, value in before.items() if int(name[1:]) % 2}
    corpus.convert("float16")
    corpus.add(make_many(2, "new"))
    kept = [document for document in documents if int(document["id"][1:]) % 2 and document["id"] != "d5"]
    assert_holds(corpus, by_id(kept + make_many(2, "new")), 2 * ERRORS[codec])


def test_deleted_text_is_in_no_file_and_convert_changes_nothing_that_does_not_fit(shared_model, tmp_path):
    large = [make(f"d{index}", index, memory=memory(index) * 1e5) for index in range(6)]
    corpus = CompressedCorpus.build(shared_model, large, tmp_path / "corpus", codec="int8", shard_size=2)
    corpus.delete(["d5"])
    corpus.compact()
    assert not any(b"of d5" in (corpus.folder / name).read_bytes() for name in files(corpus.folder))
    before, before_files = read_json(corpus), files(corpus.folder)
    corpus.convert("int8")  # which it has
    with pytest.raises(ValueError, match="fit into float16"):
        corpus.convert("float16")
    with pytest.raises(ValueError, match="`codec` must be one of"):
        corpus.convert("int2")
    assert read_json(corpus) == before and files(corpus.folder) == before_files and corpus.verify() == []
    assert_holds(corpus, by_id(large[:5]), ERRORS["int8"])


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
        elif kind in ("update", "delete") and some:
            expected = {name: document for name, document in expected.items() if name not in some}
            if kind == "update":
                new = [make(name, 1000 * step + 500 + i) for i, name in enumerate(some)]
                assert corpus.update(new, shard_size=size).n_documents == len(new)
                expected |= by_id(new)
            else:
                assert corpus.delete(some) == len(some)
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


def test_a_reader_keeps_its_snapshot_until_it_refreshes(corpus):
    def seen(reader):
        hits = reader.search(make("d3", 3)["memory"][None], 20)[0]
        return texts(reader), [(hit["document_id"], hit["score"], hit["text"]) for hit in hits], len(reader)

    reader = CompressedCorpus.open(corpus.folder)
    changes = [
        (corpus.add, make_many(3, "new", 20)),
        (corpus.update, [make("d3", 203)]),
        (corpus.delete, ["d0", "new21"]),
        (corpus.compact,),
        (corpus.convert, "int8"),
        (corpus.delete, ["d3", *(f"d{n}" for n in (1, 2, *range(4, 10))), "new20", "new22"]),
    ]
    for change, *arguments in changes:
        before = seen(reader)
        change(*arguments)
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
    others = make_many(4, "other")
    CompressedCorpus.build(shared_model, others, corpus.folder, codec="float16")
    if change == "refresh":
        corpus.refresh()
    elif change == "add":
        others.append(make("new", 50))
        corpus.add(others[-1:])
    else:
        with pytest.raises(KeyError):
            corpus.delete(["d1"])
    for seen in (CompressedCorpus.open(corpus.folder), corpus):
        assert_holds(seen, by_id(others))


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
    changes = [(corpus.add, [make("x", 1)]), (corpus.update, [make("d1", 1)]), (corpus.delete, ["d1"])]
    changes += [(corpus.compact,), (corpus.convert, "int4")]
    changes += [(lambda: corpus.push_to_hub("o/locked", compressor="o/model"),)]
    before = read_json(corpus)
    for change, *arguments in changes:
        with pytest.raises(RuntimeError, match=rf"{corpus.folder}.*process {process.pid} .*[Ww]ait"):
            change(*arguments)
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

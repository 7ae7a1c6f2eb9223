"""Changing a corpus: add, update, delete, compact and convert, each against what a plain dictionary would hold.

Documents bring their memories. Long histories and other processes are in test_corpus_histories.py.
"""

import pytest
import torch
from corpora import (
    ERRORS,
    assert_holds,
    assert_ranked,
    build,
    by_id,
    files,
    make,
    make_many,
    memory,
    ranking,
    read_all,
    read_json,
    rejected,
    texts,
    top,
)

from modeling_clara import CompressedCorpus

# --- add -------------------------------------------------------------------------------------------------------------


def test_what_is_added_is_found_by_the_next_search(corpus):
    more = make_many(5, "new", 100)
    changes = corpus.add(more, shard_size=2)
    assert (changes.n_documents, changes.n_spans, changes.rejected) == (5, 5, [])
    for document in more:
        hit = top(corpus, document)
        assert (hit["document_id"], hit["text"]) == (document["id"], document["text"])
        assert hit["score"] == pytest.approx(1.0, abs=1e-6)
    assert len(read_json(corpus)["shards"]) == 3 + 3
    assert_holds(corpus, by_id(make_many(10) + more))
    hits = corpus.search(memory(0)[None], 20, {"year": {"$gte": 2100}})[0]
    assert {hit["document_id"] for hit in hits} == set(by_id(more))


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
    def nameless(seed):
        return {"text": f"nameless {seed}", "memory": memory(seed)}

    corpus.add([make("10", 60), make("12", 61)])
    corpus.add([nameless(62), make("14", 63), nameless(64), nameless(65)])
    corpus.delete(["d1", "d2"])
    corpus.add([nameless(66)])
    corpus.compact()
    corpus.add([nameless(67)])
    found = texts(corpus)
    assert len(found) == len(corpus) == 8 + 2 + 6 == len(set(found.values())) and corpus.verify() == []


def test_a_text_without_a_model_is_an_error_and_adds_nothing(corpus):
    before = read_json(corpus)
    opened = CompressedCorpus.open(corpus.folder)
    for call in (opened.add, opened.update):
        with pytest.raises(ValueError, match=r"`documents\[1\]` must have a `memory`.*model"):
            call([make("d1", 70), {"id": "d2", "text": "no memory"}])
    assert read_json(corpus) == before


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


def test_metadata_has_the_columns_and_types_of_the_corpus(corpus):
    rows = [make("a", 80, lang="en"), make("b", 81, year="soon"), make("c", 82, year=None), make("d", 83, span=1)]
    rows += [make("e", 84, year=1.5), make("f", 85, year=2.0**70), {"id": "g", "text": "t", "memory": memory(86)}]
    changes = corpus.add(rows)
    assert [row["id"] for row in changes.rejected] == ["a", "b", "d", "e", "f"]
    assert "'lang'" in changes.rejected[0]["reason"] and "'year'" in changes.rejected[1]["reason"]
    assert [document["metadata"] for document in corpus.get(["c", "g"])] == [{"year": None}, {"year": None}]
    assert corpus.verify() == []


def test_a_row_that_cannot_be_used_is_rejected_and_changes_nothing(corpus):
    memories = [torch.full((4, 32), torch.nan), torch.full((4, 32), 7e4), torch.zeros(2, 32), "text"]
    bad = [{"memory": wrong} for wrong in memories] + [{"text": " "}, {"title": 3}]
    rows = [make(f"bad{number}", 90) | fields for number, fields in enumerate([*bad, {"id": ""}, {"id": True}])]
    changes = corpus.add([*rows, make("good", 91)])
    assert changes.n_documents == 1 and [row["row"] for row in changes.rejected] == list(range(len(rows)))
    assert all(f"documents[{row['row']}]" in row["reason"] for row in changes.rejected)
    assert [row["id"] for row in changes.rejected][:4] == ["bad0", "bad1", "bad2", "bad3"]
    changes = corpus.update([make("good", 92), *(make(f"d{n}", 93) | fields for n, fields in enumerate(bad))])
    assert changes.n_documents == 1 and [row["row"] for row in changes.rejected] == list(range(1, 1 + len(bad)))
    assert_holds(corpus, by_id([*make_many(10), make("good", 92)]))


def test_a_generator_that_fails_leaves_whole_shards(corpus):
    def rows():
        yield from make_many(5, "new")
        raise OSError("the source is gone")

    with pytest.raises(OSError, match="the source is gone"):
        corpus.add(rows(), shard_size=2)
    added = len(corpus) - 10
    assert added in (0, 2, 4)
    assert_holds(CompressedCorpus.open(corpus.folder), by_id(make_many(10) + make_many(5, "new")[:added]))


# --- update and delete -----------------------------------------------------------------------------------------------


def test_update_puts_documents_in_place_of_others(corpus):
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
    corpus.update([make("d2", 402)])
    assert corpus.get(["d2"])[0]["spans"][0]["text"] == make("d2", 402)["text"] and len(corpus) == 10


def test_update_rejects_unknown_ids_twice_the_same_and_none(corpus):
    before = texts(corpus)
    rows = [make("d1", 201), make("none", 202), make("d1", 203), {"text": "nameless", "memory": memory(204)}]
    changes = corpus.update(rows)
    assert changes.n_documents == 1 and [row["row"] for row in changes.rejected] == [1, 2, 3]
    assert "`add`" in changes.rejected[0]["reason"] and "must have an id" in changes.rejected[2]["reason"]
    assert texts(corpus) == before | {"d1": rows[0]["text"]} and corpus.verify() == []


def test_delete_takes_all_of_its_ids_or_none(corpus):
    before = read_json(corpus)
    wrong = [(["d1", "nobody", "d2"], KeyError, "'nobody' is none"), (["d1", "d1"], ValueError, "different.*twice")]
    wrong += [("d1", TypeError, "must be a list"), ([], ValueError, "at least one")]
    for ids, error, match in wrong:
        with pytest.raises(error, match=match):
            corpus.delete(ids)
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


# --- compact and convert ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_shards_of_two_codec_states_are_compacted_and_converted(shared_model, tmp_path, codec):
    def stored(corpus) -> dict[str, bytes]:
        return {document["document_id"]: document["memory"].numpy().tobytes() for document in read_all(corpus)}

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


def test_deleted_text_is_in_no_file_after_compaction_and_the_same_codec_changes_nothing(corpus):
    corpus.delete(["d5"])
    before = read_json(corpus)
    corpus.convert("float16")
    assert read_json(corpus) == before
    corpus.compact()
    assert not [path for path in corpus.folder.rglob("*") if path.is_file() and b"of d5" in path.read_bytes()]


def test_convert_refuses_what_does_not_fit_and_unknown_codecs(shared_model, tmp_path):
    large = [make(f"d{index}", index, memory=memory(index) * 1e5) for index in range(6)]
    corpus = CompressedCorpus.build(shared_model, large, tmp_path / "corpus", codec="int8", shard_size=2)
    before, before_files = read_json(corpus), files(corpus.folder)
    with pytest.raises(ValueError, match="fit into float16"):
        corpus.convert("float16")
    with pytest.raises(ValueError, match="`codec` must be one of"):
        corpus.convert("int2")
    assert read_json(corpus) == before and files(corpus.folder) == before_files and corpus.verify() == []
    assert_holds(corpus, by_id(large), ERRORS["int8"])

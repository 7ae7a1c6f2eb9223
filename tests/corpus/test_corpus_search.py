"""Search of a compressed corpus against plain tensor arithmetic: codecs, sizes, indexes, chunks, ties, changes."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from corpora import CODECS, assert_alike, assert_ranked, ids, make_documents, make_memory, ranking, stamps

from modeling_clara import CompressedCorpus

KINDS = ["flat", "hnsw", "ivf"]
LONG = " ".join(f"Paris {number} is the capital of France." for number in range(60))


def assert_finds_the_exact(corpus, queries: torch.Tensor, where: dict | None = None) -> None:
    """The index finds at least 95 % of the exact results."""
    assert_alike(corpus.search(queries, 10, where), corpus.search(queries, 10, where, exact=True))


@pytest.fixture(scope="module")
def queries() -> torch.Tensor:
    return make_memory(20, seed=7)


@pytest.fixture(scope="module", params=CODECS)
def corpus(request, shared_model, tmp_path_factory) -> CompressedCorpus:
    """100 documents with memories and three long texts, in several shards; only read."""
    folder = tmp_path_factory.mktemp("corpus") / request.param
    texts = [
        {"id": f"long{row}", "title": f"Book {row}", "text": LONG.replace("Paris", name), "year": 1990}
        for row, name in enumerate(["Paris", "Rome", "Berlin"])
    ]
    documents = make_documents(50) + texts[:2] + make_documents(50, seed=1, prefix="e") + texts[2:]
    return CompressedCorpus.build(shared_model, documents, folder, codec=request.param, shard_size=30)


@pytest.fixture(scope="module")
def large(shared_model, tmp_path_factory) -> Path:
    """A corpus of 4,000 rows in six shards; copy the folder before changing it."""
    folder = tmp_path_factory.mktemp("large") / "corpus"
    return CompressedCorpus.build(shared_model, make_documents(4000), folder, shard_size=700).folder


@pytest.fixture(scope="module")
def with_long_document(shared_model, tmp_path_factory) -> Path:
    """1,100 documents of one chunk and one of more than a hundred."""
    long = {"id": "long", "text": " ".join(f"Paris {number} is the capital of France." for number in range(800))}
    folder = tmp_path_factory.mktemp("long") / "corpus"
    return CompressedCorpus.build(shared_model, [*make_documents(1100), long], folder, codec="float16").folder


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("top_k", [1, 7, 500])
def test_search_is_the_cosine_of_the_stored_memories(corpus, queries, shared_model, size, top_k):
    texts = shared_model.encode_queries(["Where is Paris 17?", "Rome"], memory_size=size)
    asked = torch.cat([queries[:6, :size], texts])
    expected = ranking(corpus, asked, top_k)
    assert_ranked(corpus.search(asked, top_k), expected)
    assert_ranked(corpus.search(asked, top_k, exact=True), expected)
    assert_ranked(corpus.search(asked, top_k, shortlist=1), expected)


def test_questions_of_any_dtype_do_not_hang_on_each_other_and_stay_as_they_were(corpus, queries):
    many = torch.cat([queries * factor for factor in (1.0, 0.5, 100.0)])  # more than one block
    together = corpus.search(many, 9)
    for number, query in enumerate(many):
        (alone,) = corpus.search(query[None], 9)
        assert [hit["document_id"] for hit in alone] == [hit["document_id"] for hit in together[number]]
        assert [hit["score"] for hit in alone] == pytest.approx([hit["score"] for hit in together[number]], abs=1e-6)
    assert ids(together[:20]) == ids(together[20:40]) == ids(together[40:])
    assert corpus.search(queries[:0], 5) == []
    asked = queries[:2].clone().requires_grad_()
    for given in (asked, asked.double(), queries[:2].tolist(), queries[:2].numpy()):
        assert ids(corpus.search(given, 9)) == ids(together[:2])
    assert asked.grad is None and torch.equal(asked, queries[:2])
    assert len(corpus.search(queries[:2].bfloat16(), 3)[0]) == 3


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_index_finds_what_the_exact_scan_finds(large, queries, kind, size):
    opened, asked = CompressedCorpus.open(large, index=kind), queries[:, :size]
    for where in (None, {"part": {"$lt": 27}}, {"part": {"$lt": 60}}, {"part": 3}):
        assert_finds_the_exact(opened, asked, where)
    assert opened.search(asked, 10, {"part": 100}) == [[]] * len(asked)
    if kind == "flat":  # the exact search has no index
        assert_ranked(opened.search(asked, 10, exact=True), ranking(opened, asked, 10))


@pytest.mark.parametrize("kind", KINDS)
def test_indexes_see_what_was_added_and_deleted(large, queries, kind, tmp_path):
    shutil.copytree(large, tmp_path / "copy")
    opened = CompressedCorpus.open(tmp_path / "copy", index=kind)
    best = sorted({row[0] for row in ids(opened.search(queries, 1))})
    assert opened.delete(best) == len(best)
    opened.add([{**document, "memory": queries[row]} for row, document in enumerate(make_documents(9, prefix="new"))])
    assert len(opened.snapshot.segments) == 2
    found = ids(opened.search(queries, 10))
    assert [row[0] for row in found[:9]] == [f"new{row}" for row in range(9)]
    assert not set(best) & set(sum(found, []))
    assert_finds_the_exact(opened, queries)
    assert_finds_the_exact(opened, queries[:, :2], {"part": {"$gte": 5}})
    again = CompressedCorpus.open(tmp_path / "copy", index=kind)
    assert ids(again.search(queries, 10)) == found
    again.compact()
    assert ids(again.search(queries, 10, exact=True)) == ids(opened.search(queries, 10, exact=True))
    assert_finds_the_exact(again, queries)


def test_a_corpus_that_grew_from_almost_nothing_is_searched_well(shared_model, queries, tmp_path):
    opened = CompressedCorpus.build(shared_model, make_documents(1, prefix="first"), tmp_path / "corpus")
    for n in (1, 15, 1984):  # two, 17, 2001 documents
        for kind in KINDS:
            few = CompressedCorpus.open(opened.folder, index=kind)
            assert_ranked(few.search(queries, 5), ranking(few, queries, 5))
        opened.add(make_documents(n, seed=n, prefix=f"{n}-"))
    assert_finds_the_exact(opened, queries)


def test_top_k_counts_documents_each_with_its_best_span(corpus, shared_model):
    spans = shared_model.processor.split_document({"title": "Book 1", "text": LONG.replace("Paris", "Rome")})
    assert len(spans) > 5
    asked = corpus.get(["long1"])[0]["memory"]
    found = corpus.search(asked, 4)
    assert len(asked) == len(spans)
    for number, hits in enumerate(found):
        assert (hits[0]["document_id"], hits[0]["span"], hits[0]["text"]) == ("long1", number, spans[number]["text"])
        assert hits[0]["score"] == pytest.approx(1, abs=1e-5)
        assert len({hit["document_id"] for hit in hits}) == 4


@pytest.mark.parametrize("kind", ["exact", "flat", "hnsw"])
def test_a_document_of_many_chunks_leaves_room_for_others(with_long_document, kind):
    opened = CompressedCorpus.open(with_long_document, index=None if kind == "exact" else kind)
    memory = opened.get(["long"])[0]["memory"]
    assert len(memory) > 150
    for top_k, shortlist in ((5, 10), (5, 1), (20, 100), (1101, 100), (5000, 100)):
        found = opened.search(memory[[0, 120]], top_k, shortlist=shortlist, exact=kind == "exact")
        assert [(hits[0]["document_id"], hits[0]["span"]) for hits in found] == [("long", 0), ("long", 120)]
        assert [len(hits) for hits in found] == [min(top_k, 1101)] * 2
        assert all(len({hit["document_id"] for hit in hits}) == len(hits) for hits in found)
    if kind != "hnsw":
        assert_ranked(opened.search(memory[[0, 120]], 20), ranking(opened, memory[[0, 120]], 20))


def test_more_equal_memories_than_the_shortlist_holds_tie_to_the_lower_row(shared_model, queries, tmp_path):
    documents = make_documents(2000)
    for row in range(1000, 1400):
        documents[row]["memory"] = queries[0]
    folder = CompressedCorpus.build(shared_model, documents, tmp_path / "corpus", shard_size=70).folder
    for kind in KINDS:
        opened = CompressedCorpus.open(folder, index=kind)
        for exact in (False, True):
            (hits,) = opened.search(queries[:1], 5, exact=exact)
            assert [hit["document_id"] for hit in hits] == [f"d{row}" for row in range(1000, 1005)]
            assert len({hit["score"] for hit in hits}) == 1
    opened.delete(["d1000", "d1002"])
    opened.add([{"id": "last", "text": "x", "memory": queries[0]}])
    found = ids(opened.search(queries[:1], 399, exact=True))[0]
    assert found[:3] == ["d1001", "d1003", "d1004"] and found[-1] == "last"


def test_memories_of_zeros_score_zero(shared_model, queries, tmp_path):
    documents = [{**document, "memory": torch.zeros(4, 32)} for document in make_documents(5)]
    opened = CompressedCorpus.build(shared_model, documents, tmp_path / "corpus", codec="float16")
    for asked in (queries[:1], torch.zeros(1, 4, 32)):
        assert [(hit["document_id"], hit["score"]) for hit in opened.search(asked, 2)[0]] == [("d0", 0), ("d1", 0)]


def test_hits_have_everything_that_was_stored(corpus, queries):
    for hits in corpus.search(queries[:3], 103):
        for hit in hits:
            assert list(hit) == ["document_id", "span", "title", "text", "score", "memory", "metadata"]
            (document,) = corpus.get([hit["document_id"]])
            assert hit["memory"].shape == (4, 32) and hit["memory"].dtype == torch.float32
            assert torch.equal(hit["memory"], document["memory"][hit["span"]])
            assert hit["metadata"] == document["metadata"] and set(hit["metadata"]) == {"year", "part"}
            span = document["spans"][hit["span"]]
            assert (hit["title"], hit["text"], hit["span"]) == (span["title"], span["text"], span["span"])
            assert type(hit["score"]) is float and type(hit["span"]) is int
    assert corpus.get(["d7"])[0]["metadata"] == {"year": 2007, "part": 7}
    assert corpus.get(["long2"])[0]["metadata"] == {"year": 1990, "part": None}


def test_documents_by_id(corpus):
    every = list(corpus.document_ids())
    assert every == [f"d{n}" for n in range(50)] + ["long0", "long1"] + [f"e{n}" for n in range(50)] + ["long2"]
    assert [document["document_id"] for document in corpus.get(["e3", "d0", "e3"])] == ["e3", "d0", "e3"]
    assert "d49" in corpus and "long2" in corpus
    assert not any(wrong in corpus for wrong in ("d50", "", "d49#0", 5, None))
    (long,) = corpus.get(["long0"])
    assert long["title"] == "Book 0" and [span["span"] for span in long["spans"]] == [*range(len(long["spans"]))]
    assert long["memory"].shape == (len(long["spans"]), 4, 32) and all(span["n_tokens"] > 0 for span in long["spans"])
    with pytest.raises(KeyError, match="nobody"):
        corpus.get(["d0", "nobody"])


def test_options_are_those_of_the_view_alone_and_changes_are_not(corpus, queries, tmp_path):
    opened = CompressedCorpus.open(shutil.copytree(corpus.folder, tmp_path / "copy"))
    before = ids(opened.search(queries, 5))
    view = opened.with_options(where={"year": {"$gte": 2005}}, exact=True, shortlist=7)
    assert ids(opened.search(queries, 5)) == before and view is not opened
    found = view.search(queries, 5)
    assert all(hit["metadata"]["year"] >= 2005 for hits in found for hit in hits)
    assert ids(found) == ids(opened.search(queries, 5, {"year": {"$gte": 2005}}))
    assert ids(view.search(queries, 5, {"year": 2001})) == ids(opened.search(queries, 5, {"year": 2001}))
    assert ids(view.with_options(shortlist=9).search(queries, 5)) == ids(found)  # what is left out stays
    opened.add([{"id": "new", "text": "new", "memory": queries[0], "year": 2042}])
    assert ids(view.search(queries[:1], 1)) == [["new"]] and "new" in view and len(view) == len(opened) == 104
    view.delete(["new"])
    assert "new" not in opened and ids(opened.search(queries[:1], 5, {"year": 2042})) == [[]]


def test_opening_again_derives_nothing(large, queries, tmp_path):
    shutil.copytree(large, tmp_path / "copy", ignore=shutil.ignore_patterns("index"))
    first = CompressedCorpus.open(tmp_path / "copy").prepare(2)
    written = stamps(tmp_path)
    again = CompressedCorpus.open(tmp_path / "copy").prepare(2)
    for size in (2, 4):
        assert ids(again.search(queries[:, :size], 9)) == ids(first.search(queries[:, :size], 9))
    assert stamps(tmp_path) == written


@pytest.mark.parametrize("obstacle", ["a file", "permissions"])
def test_a_folder_that_cannot_be_written_is_indexed_in_the_cache(large, queries, tmp_path, obstacle):
    folder = shutil.copytree(large, tmp_path / "copy", ignore=shutil.ignore_patterns("index"))
    if obstacle == "a file":
        (folder / "index").touch()
    else:
        folder.chmod(0o555)
        if os.access(folder, os.W_OK):
            pytest.skip("this user can write everywhere")
    before = stamps(folder)
    opened = CompressedCorpus.open(folder)
    assert ids(opened.search(queries, 9)) == ids(CompressedCorpus.open(large).search(queries, 9))
    assert opened.index_folder.is_relative_to(os.environ["HF_HOME"]) and stamps(folder) == before
    folder.chmod(0o755)

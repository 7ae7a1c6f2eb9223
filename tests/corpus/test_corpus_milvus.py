"""A corpus whose shortlist comes from Milvus Lite: the same results as with FAISS, kept up to date, in a file.

Milvus Lite lets one process at a time open a file, so clients are closed before another process comes.
"""

import shutil
from pathlib import Path

import pytest
import torch
from corpora import assert_alike, ids, make_documents, make_memory, receive, start
from test_corpus_filters import FILTERS, NASTY, columns_of, make_rows, meets

from modeling_clara import CompressedCorpus

pytest.importorskip("pymilvus")
lite = pytest.importorskip("milvus_lite.server_manager").server_manager_instance

# They leave more rows than are compared one by one, so that Milvus has to understand them.
BROAD = [
    {"year": {"$gt": 2000, "$lte": 2008}},
    {"year": {"$ne": 2003}},
    {"lang": {"$gte": ""}},
    {"lang": {"$nin": ["en", 'a"b']}},
    {"lang": {"$in": NASTY[2:]}},
    {"$not": {"year": 2003, "lang": "en"}},
    {"$or": [{"$not": {"year": {"$lt": 2002}}}, {"lang": "en"}]},
    {"$or": [{"is_new": False}, {"year": {"$gte": 2006}}]},
    {"title": {"$ne": "Title 1"}, "weight": {"$gte": 0}},
    {"weight": {"$lt": 5}, "birth year": {"$lt": 1906}},
    {"in": {"$lte": 2}},
    {"vector": {"$in": ["v0", "v1"]}, "shard": {"$lt": "s9"}},
    *({"$or": [{"year": {"$lt": 2008}}, {"lang": text}]} for text in NASTY),  # none may end its quotes
]


def close(corpus: CompressedCorpus, uri: str) -> None:
    """Give the file to other processes; closing the client does not."""
    for index in corpus._state.indexes.values():
        index.client.close()
    corpus._state.indexes.clear()
    lite.release_server(uri)


@pytest.fixture(scope="module")
def queries() -> torch.Tensor:
    return make_memory(6, seed=7)


@pytest.fixture(scope="module")
def built(shared_model, tmp_path_factory) -> Path:
    """1,600 documents in two shards; copy the folder before changing it."""
    return CompressedCorpus.build(shared_model, make_rows(1600), tmp_path_factory.mktemp("built") / "corpus").folder


@pytest.fixture(scope="module")
def opened(built, tmp_path_factory):
    """The corpus with Milvus in the default file, and without; only read."""
    folder = shutil.copytree(built, tmp_path_factory.mktemp("opened") / "corpus")
    corpus = CompressedCorpus.open(folder, backend="milvus")
    yield corpus, CompressedCorpus.open(built)
    assert (folder / "index" / "milvus.db").exists()
    close(corpus, str(folder / "index" / "milvus.db"))


@pytest.mark.parametrize("size", [2, 4])
def test_milvus_finds_what_faiss_finds(opened, queries, size):
    corpus, plain = opened
    asked = queries[:, :size]
    for top_k in (1, 10, 50):
        assert_alike(corpus.search(asked, top_k), plain.search(asked, top_k, exact=True))
    assert ids(corpus.search(asked, 10, exact=True)) == ids(plain.search(asked, 10, exact=True))
    alone = [corpus.search(query[None], 5)[0] for query in asked]
    assert_alike(alone, corpus.search(asked, 5))
    questions = ["text 7"] * len(asked)
    fused = [view.search(asked, 10, hybrid=True, questions=questions) for view in (corpus, plain)]
    assert_alike([sorted(hits, key=lambda hit: -hit["score"]) for hits in fused[0]], fused[1])


def test_filters_mean_the_same_to_milvus(opened, queries):
    corpus, plain = opened
    columns = columns_of(plain)
    for where in BROAD + FILTERS:
        assert where in FILTERS or sum(meets(row, where) for row in columns.values()) > 1024, where
        found = corpus.search(queries, 10, where)
        assert all(meets(columns[hit["document_id"]], where) for hits in found for hit in hits), where
        assert_alike(found, plain.search(queries, 10, where, exact=True))


def search(connection, path, uri, queries):
    """What another process finds."""
    torch.set_num_threads(1)
    corpus = CompressedCorpus.open(path, backend="milvus", uri=uri)
    connection.send(ids(corpus.search(queries, 10)))
    close(corpus, uri)


def test_changes_reach_milvus_and_stay_in_its_file(built, queries, tmp_path):
    copied, uri = shutil.copytree(built, tmp_path / "copy"), str(tmp_path / "vectors.db")
    corpus, plain = CompressedCorpus.open(copied, backend="milvus", uri=uri), CompressedCorpus.open(copied)
    best = sorted({row[0] for row in ids(corpus.search(queries, 1))})
    corpus.delete(best)
    new = make_documents(6, prefix="new")
    corpus.add([{"id": row["id"], "text": "new", "memory": queries[n], "year": 3000} for n, row in enumerate(new)])
    corpus.update([{"id": "d7", "text": "other", "memory": -queries[0]}])
    found = corpus.search(queries, 10)
    assert [row[0] for row in ids(found)] == [row["id"] for row in new]
    assert not set(best) & set(sum(ids(found), []))
    assert_alike(found, plain.refresh().search(queries, 10, exact=True))
    assert ids(corpus.search(queries[:2], 9, {"year": {"$gte": 3000}}))[0][0] == "new0"
    assert "d7" in ids(corpus.search(-queries[:1], 1))[0]
    close(corpus, uri)
    process, connection = start(search, copied, uri, queries)
    assert receive(connection) == ids(found)
    process.join()
    again = CompressedCorpus.open(copied, backend="milvus", uri=uri)
    again.compact()
    assert_alike(again.search(queries, 10), found)
    assert "new3" in ids(again.search(queries[3:4], 1))[0]
    close(again, uri)


def test_two_corpora_under_one_name_have_collections_of_their_own(built, shared_model, queries, tmp_path):
    uri = str(tmp_path / "vectors.db")
    other = CompressedCorpus.build(shared_model, make_documents(1100, seed=3), tmp_path / "other")
    corpus = CompressedCorpus.open(built, backend="milvus", uri=uri, collection="mine")
    expected = ids(corpus.search(queries, 5))
    beside = CompressedCorpus.open(other.folder, backend="milvus", uri=uri, collection="mine")
    assert_alike(beside.search(queries, 5), other.search(queries, 5, exact=True))
    assert ids(corpus.search(queries, 5)) == expected
    close(corpus, uri)


def test_wrong_options_are_named(built, tmp_path):
    with pytest.raises(ValueError, match="`index`"):
        CompressedCorpus.open(built, backend="milvus", uri=str(tmp_path / "vectors.db"), index="annoy")
    with pytest.raises((RuntimeError, ValueError), match="Milvus"):
        CompressedCorpus.open(built, backend="milvus", uri=str(tmp_path / "no folder" / "vectors.db"))

"""Filters and wrong arguments of a search: results are all that meets the filter, errors name what is wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_corpus_search import assert_ranked, ids, make_documents, make_memory, ranking

import modeling_clara
from modeling_clara import CompressedCorpus

LANGUAGES = [None, "en", "de", "q\"uo'te\\", "日本 語", ""]


def is_at_least(value, limit) -> bool:
    return value is not None and value >= limit


# filter -> the same condition on a row's columns
FILTERS = {
    "equal": ({"year": 2003}, lambda row: row["year"] == 2003),
    "equal to another number type": ({"year": 2003.0}, lambda row: row["year"] == 2003),
    "two columns": ({"year": 2003, "lang": "en"}, lambda row: row["year"] == 2003 and row["lang"] == "en"),
    "range": ({"year": {"$gt": 2002, "$lte": 2005}}, lambda row: row["year"] in (2003, 2004, 2005)),
    "at least": ({"year": {"$gte": 2007}}, lambda row: is_at_least(row["year"], 2007)),
    "less": ({"weight": {"$lt": 3.5}}, lambda row: row["weight"] < 3.5),
    "in": ({"lang": {"$in": ["en", "q\"uo'te\\"]}}, lambda row: row["lang"] in ("en", "q\"uo'te\\")),
    "in a tuple": ({"year": {"$in": (2001, 2002)}}, lambda row: row["year"] in (2001, 2002)),
    "in nothing": ({"year": {"$in": []}}, lambda row: False),
    "not in nothing": ({"year": {"$nin": []}}, lambda row: True),
    "not in": ({"lang": {"$nin": ["en", "de"]}}, lambda row: row["lang"] not in ("en", "de")),
    "unequal, missing values meet it": ({"lang": {"$ne": "en"}}, lambda row: row["lang"] != "en"),
    "empty text is not missing": ({"lang": ""}, lambda row: row["lang"] == ""),
    "unicode": ({"lang": "日本 語"}, lambda row: row["lang"] == "日本 語"),
    "order of texts": ({"lang": {"$gte": "en"}}, lambda row: is_at_least(row["lang"], "en")),
    "bool": ({"is_new": True}, lambda row: row["is_new"]),
    "unequal bool": ({"is_new": {"$ne": True}}, lambda row: not row["is_new"]),
    "not": ({"$not": {"year": 2003}}, lambda row: row["year"] != 2003),
    "not unequal": ({"$not": {"lang": {"$ne": "en"}}}, lambda row: row["lang"] == "en"),
    "not of two": (
        {"$not": {"year": 2003, "lang": "en"}},
        lambda row: not (row["year"] == 2003 and row["lang"] == "en"),
    ),
    "or": ({"$or": [{"year": 2001}, {"lang": "de"}]}, lambda row: row["year"] == 2001 or row["lang"] == "de"),
    "and": ({"$and": [{"year": {"$gt": 2001}}, {"year": {"$lt": 2003}}]}, lambda row: row["year"] == 2002),
    "or beside a column": (
        {"is_new": False, "$or": [{"year": 2001}, {"year": 2002}]},
        lambda row: not row["is_new"] and row["year"] in (2001, 2002),
    ),
    "deep": (
        {
            "$or": [
                {"$and": [{"lang": "en"}, {"$not": {"is_new": True}}]},
                {"$not": {"$or": [{"year": {"$lte": 2008}}]}},
            ]
        },
        lambda row: (
            (row["lang"] == "en" and not row["is_new"]) or not (row["year"] is not None and row["year"] <= 2008)
        ),
    ),
    "id": ({"document_id": {"$in": ["d3", "d77", "none"]}}, lambda row: row["document_id"] in ("d3", "d77")),
    "title": ({"title": "Title 1"}, lambda row: row["title"] == "Title 1"),
    "name with a space": ({"birth year": {"$lt": 1903}}, lambda row: row["birth year"] < 1903),
    "name of an operator": ({"in": 2}, lambda row: row["in"] == 2),
    "name of a field of ours": ({"vector": "v1"}, lambda row: row["vector"] == "v1"),
    "name of another field of ours": ({"shard": "s1"}, lambda row: row["shard"] == "s1"),
    "met by nothing": ({"year": 1066}, lambda row: False),
}


def make_rows(n: int) -> list[dict]:
    """Documents with metadata of every kind, some of it missing."""
    rows = make_documents(n)
    for number, row in enumerate(rows):
        row |= {
            "title": f"Title {number % 3}",
            "lang": LANGUAGES[number % 6],
            "is_new": number % 7 < 3,
            "weight": number % 13 / 2,
            "birth year": 1900 + number % 6,
            "in": number % 4,
            "vector": f"v{number % 2}",
            "shard": f"s{number % 2}",
        }
        if number % 11 == 5:
            row["year"] = None
        if number % 11 == 6:
            del row["year"]
    return rows


def columns_of(document: dict) -> dict:
    return {"document_id": document["document_id"], "title": document["title"], **document["metadata"]}


@pytest.fixture(scope="module")
def queries() -> torch.Tensor:
    return make_memory(5, seed=7)


@pytest.fixture(scope="module")
def corpus(shared_model, tmp_path_factory) -> CompressedCorpus:
    """200 documents in several shards, a second segment and some deleted documents; only read."""
    opened = CompressedCorpus.build(
        shared_model, make_rows(180), tmp_path_factory.mktemp("corpus") / "corpus", shard_size=50
    )
    opened.add([{**row, "id": f"late{number}"} for number, row in enumerate(make_rows(20))])
    opened.delete([f"d{row}" for row in range(1, 180, 9)])
    assert len(opened.snapshot.segments) == 2
    return opened


@pytest.fixture(scope="module")
def large(shared_model, tmp_path_factory) -> Path:
    """3,000 documents, of which many filters leave more than are compared one by one."""
    folder = tmp_path_factory.mktemp("large") / "corpus"
    CompressedCorpus.build(shared_model, make_rows(3000), folder)
    return folder


# --- filters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_leaves_what_meets_it_and_nothing_else(corpus, queries, name):
    where, is_met = FILTERS[name]
    expected = ranking(corpus, queries, 200, lambda document: is_met(columns_of(document)))
    assert_ranked(corpus.search(queries, 200, where), expected)
    assert_ranked(corpus.with_options(where=where).search(queries, 3), [row[:3] for row in expected])


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_filters_with_an_index(large, queries, kind):
    opened = CompressedCorpus.open(large, index=kind)
    documents = {document["document_id"]: columns_of(document) for document in opened.get([*opened.document_ids()])}
    for name, (where, is_met) in FILTERS.items():
        found = opened.search(queries[:3], 10, where)
        exact = opened.search(queries[:3], 10, where, exact=True)
        assert all(is_met(documents[hit["document_id"]]) for hits in found for hit in hits), name
        n_met = sum(map(is_met, documents.values()))
        assert [len(hits) for hits in found] == [min(10, n_met)] * 3, name
        both = sum(len(set(mine) & set(other)) for mine, other in zip(ids(found), ids(exact), strict=True))
        assert both >= 0.95 * sum(map(len, exact)), name


def test_dates_and_lists_come_back_and_lists_cannot_be_compared(shared_model, queries, tmp_path):
    documents = [{**row, "tags": ["a", f"t{number}"]} for number, row in enumerate(make_documents(4))]
    opened = CompressedCorpus.build(shared_model, documents, tmp_path / "corpus")
    assert opened.search(queries[:1], 4)[0][0]["metadata"]["tags"][0] == "a"
    with pytest.raises(TypeError, match=r"where\['tags'\].*list"):
        opened.search(queries, 4, {"tags": "a"})


@pytest.mark.parametrize(
    "where, error, match",
    [
        ([("year", 2000)], TypeError, "`where` must be a dict, got list"),
        ("year", TypeError, "`where` must be a dict"),
        ({}, ValueError, "`where` must have a condition"),
        ({"year": {}}, ValueError, r"`where\['year'\]`"),
        ({"$and": []}, TypeError, r"`where\['\$and'\]` must be a list"),
        ({"$or": {"year": 1}}, TypeError, r"`where\['\$or'\]` must be a list"),
        ({"$or": "year"}, TypeError, "must be a list"),
        ({"$or": [{"year": 1}, 3]}, TypeError, r"`where\['\$or'\]\[1\]` must be a dict"),
        ({"$and": [{}]}, ValueError, "must have a condition"),
        ({"$not": [{"year": 1}]}, TypeError, r"`where\['\$not'\]` must be a dict"),
        ({"colour": "red"}, ValueError, r"columns of the corpus \(document_id, title,.* got 'colour'"),
        ({"text": "text 3"}, ValueError, "got 'text'"),
        ({"memory": 1}, ValueError, "got 'memory'"),
        ({5: 1}, ValueError, "got 5"),
        ({"$nor": [{"year": 1}]}, ValueError, r"got '\$nor'"),
        ({"year": {"$near": 3}}, ValueError, r"must use one of \$eq.*got '\$near'"),
        ({"year": {"gte": 3}}, ValueError, "must use one of"),
        ({"year": {"$in": 2000}}, TypeError, "must be a list"),
        ({"lang": {"$in": "en"}}, TypeError, "must be a list"),
        ({"year": None}, TypeError, "got NoneType"),
        ({"year": {"$in": [2000, None]}}, TypeError, "got NoneType"),
        ({"year": [2000]}, TypeError, "got list"),
        ({"year": torch.tensor(3)}, TypeError, "got Tensor"),
        ({"year": "2000"}, TypeError, r"`where\['year'\]` must be comparable with the column, which is int64"),
        ({"year": True}, TypeError, "comparable"),
        ({"year": 10**30}, TypeError, "comparable"),
        ({"lang": 3}, TypeError, "comparable"),
        ({"is_new": "yes"}, TypeError, "comparable"),
        ({"title": "\ud800"}, (TypeError, ValueError), "title"),
    ],
    ids=str,
)
def test_a_malformed_filter_is_named(corpus, queries, where, error, match):
    with pytest.raises(error, match=match):
        corpus.search(queries, 5, where)
    with pytest.raises(error, match=match):
        corpus.with_options(where=where).search(queries, 5)


# --- wrong arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query, match",
    [
        (torch.zeros(2, 3, 32), r"\(questions, k, 32\) with k one of \[2, 4\], got \(2, 3, 32\)"),
        (torch.zeros(2, 8, 32), "with k one of"),
        (torch.zeros(2, 4, 16), r"got \(2, 4, 16\)"),
        (torch.zeros(4, 32), r"got \(4, 32\)"),
        (torch.zeros(1, 1, 4, 32), "`query_memory` must have the shape"),
        (torch.tensor(1.0), "`query_memory` must have the shape"),
        (torch.full((1, 4, 32), torch.nan), "`query_memory` must be finite"),
        (torch.full((1, 4, 32), torch.inf), "`query_memory` must be finite"),
        ("What is it?", "query_memory"),
        (["What is it?"], "query_memory"),
        (None, "query_memory"),
    ],
    ids=["k", "k too large", "hidden", "2-D", "4-D", "number", "NaN", "infinity", "text", "texts", "None"],
)
def test_a_wrong_query_is_named(corpus, query, match):
    with pytest.raises((TypeError, ValueError), match=match):
        corpus.search(query, 5)


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "5", None])
def test_a_wrong_count_is_named(corpus, queries, value):
    with pytest.raises(ValueError, match="`top_k` must be an int >= 1"):
        corpus.search(queries, value)
    if value is not None:
        with pytest.raises(ValueError, match="`shortlist` must be an int >= 1"):
            corpus.search(queries, 5, shortlist=value)
        with pytest.raises(ValueError, match="`shortlist` must be an int >= 1"):
            corpus.with_options(shortlist=value)


@pytest.mark.parametrize("questions", [None, ["one"], "five!", [1, 2, 3, 4, 5]], ids=["none", "few", "text", "ints"])
def test_hybrid_without_the_questions_is_an_error(corpus, queries, questions):
    with pytest.raises((TypeError, ValueError), match="questions"):
        corpus.search(queries, 5, hybrid=True, questions=questions)
    with pytest.raises((TypeError, ValueError), match="questions"):
        corpus.with_options(hybrid=True).search(queries, 5, questions=questions)


def test_unknown_indexes_backends_and_sizes_are_named(corpus, large):
    with pytest.raises(ValueError, match="`index` must be one of flat, hnsw, ivf, got 'annoy'"):
        CompressedCorpus.open(large, index="annoy")
    with pytest.raises(ValueError, match="`index` must be one of"):
        CompressedCorpus.open(corpus.folder, index="annoy")
    with pytest.raises(ValueError, match="`backend` must be 'faiss' or 'milvus', got 'qdrant'"):
        CompressedCorpus.open(large, backend="qdrant")
    for option in ({"uri": "milvus.db"}, {"collection": "mine"}):
        with pytest.raises(ValueError, match="must go with `backend='milvus'`"):
            CompressedCorpus.open(large, **option)
    for size in (3, 8, 0, True, "4"):
        with pytest.raises((TypeError, ValueError), match="memory_size"):
            CompressedCorpus.open(large).prepare(size)


# --- several processes -----------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from modeling_clara import CompressedCorpus
corpus = CompressedCorpus.open(sys.argv[2], index="hnsw").prepare(2)
queries = torch.load(sys.argv[3])
found = corpus.search(queries, 5) + corpus.search(queries[:, :2], 5, {"is_new": True})
found += corpus.search(queries, 5, hybrid=True, questions=["text 5"] * len(queries))
print(json.dumps([[(hit["document_id"], hit["score"]) for hit in hits] for hits in found]))
"""


def test_two_processes_open_a_corpus_for_the_first_time_at_once(large, queries, tmp_path):
    shutil.copytree(large, tmp_path / "copy", ignore=shutil.ignore_patterns("index"))
    torch.save(queries, tmp_path / "queries.pt")
    package = Path(modeling_clara.__file__).parent.parent
    command = [sys.executable, "-c", SCRIPT, str(package), str(tmp_path / "copy"), str(tmp_path / "queries.pt")]
    options = {"cwd": tmp_path, "text": True, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) for _ in range(2)]
    results = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], results
    assert results[0][0] == results[1][0] and "d" in results[0][0]
    opened = CompressedCorpus.open(tmp_path / "copy", index="hnsw")
    mine = opened.search(queries, 5) + opened.search(queries[:, :2], 5, {"is_new": True})
    assert ids(mine) == [[name for name, _ in hits] for hits in json.loads(results[0][0])][: len(mine)]
    leftovers = [path for path in (tmp_path / "copy").rglob("*") if "partial" in path.name]
    assert leftovers == []


def test_a_change_that_cannot_be_indexed_leaves_the_corpus_whole(large, queries, tmp_path):
    shutil.copytree(large, tmp_path / "copy")
    opened = CompressedCorpus.open(tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "index" / "k4")
    (tmp_path / "copy" / "index" / "k4").touch()  # as a full disk: nothing can be written there
    with pytest.raises(OSError):
        opened.add([{"id": "new", "text": "new", "memory": queries[0]}])
    (tmp_path / "copy" / "index" / "k4").unlink()
    again = CompressedCorpus.open(tmp_path / "copy")
    assert len(again) == 3000 + ("new" in again) == len(list(again.document_ids()))
    assert all(len(hits) == 5 for hits in again.search(queries, 5))

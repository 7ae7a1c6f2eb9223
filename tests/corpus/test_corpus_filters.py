"""Filters and wrong arguments of a search: results are all that meets the filter, errors name what is wrong.

`meets` is the definition of a filter in plain Python. Columns have missing values, and text as nasty as a user's.
"""

import operator
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from corpora import assert_alike, assert_ranked, ids, make_documents, make_memory, ranking, read_all, receive, start

from modeling_clara import CompressedCorpus
from modeling_clara.corpus.milvus import milvus_expression

NASTY = ["", "en", "EN", "de ", 'a"b', "a'b", "back\\slash", "new\nline", "ünï 🎉", '" or 1 == 1 or "', "%", "null"]
VALUES = {
    "year": [1999, 2000, 2003.0, 2004, 2009, 2**40],
    "rank": [-1, 0, 1, 2.0, 3, 2**40],  # beyond what its int32 holds
    "weight": [-1.5, 0, 0.5, 3, 5.5, float("nan"), float("inf")],
    "lang": NASTY,
    "is_new": [True, False],
    "shard": ["s0", "s1", "s2"],
}
PYTHON = {
    "$eq": operator.eq,
    "$ne": operator.ne,
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
    "$in": lambda value, many: any(value == one for one in many),
    "$nin": lambda value, many: all(value != one for one in many),
}


def meets(row: dict, where: dict) -> bool:
    """The definition: a missing value meets only $ne and $nin."""

    def meets_one(key, value) -> bool:
        if key in ("$and", "$or"):
            return (all if key == "$and" else any)(meets(row, part) for part in value)
        if key == "$not":
            return not meets(row, value)
        conditions = value if isinstance(value, dict) else {"$eq": value}
        return all(
            sign in ("$ne", "$nin") if row[key] is None else PYTHON[sign](row[key], operand)
            for sign, operand in conditions.items()
        )

    return all(meets_one(key, value) for key, value in where.items())


def random_where(draw: random.Random, depth: int) -> dict:
    kind = draw.choice(["columns", "columns", "$and", "$or", "$not"]) if depth else "columns"
    if kind == "$not":
        return {"$not": random_where(draw, depth - 1)}
    if kind != "columns":
        parts = [random_where(draw, depth - 1) for _ in range(draw.randint(1, 3))]
        return {kind: tuple(parts) if draw.random() < 0.3 else parts}
    where = {}
    for name in draw.sample(list(VALUES), draw.randint(1, 2)):
        where[name] = {
            sign: draw.choices(VALUES[name], k=draw.randint(0, 3)) if "in" in sign else draw.choice(VALUES[name])
            for sign in draw.sample(list(PYTHON), draw.randint(1, 2))
        }
        if draw.random() < 0.3:
            where[name] = draw.choice(VALUES[name])
    return where


def make_rows(n: int) -> list[dict]:
    """Documents with metadata of every kind, some of it missing."""
    rows = make_documents(n)
    for number, row in enumerate(rows):
        row |= {
            "title": f"Title {number % 3}",
            "lang": [None, *NASTY][number % 13],
            "rank": number % 5 - 1 if number % 4 else None,
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


def columns_of(corpus) -> dict[str, dict]:
    """The columns of every document that filters see, by id."""
    return {
        found["document_id"]: {"document_id": found["document_id"], "title": found["title"], **found["metadata"]}
        for found in read_all(corpus)
    }


FILTERS = [
    {"year": 2003, "lang": "en"},
    {"year": {"$gt": 2002, "$lte": 2005}},
    {"lang": {"$in": ["en", 'a"b']}},
    {"year": {"$in": (2001, 2002)}},
    {"year": {"$in": []}},
    {"year": {"$nin": []}},
    {"is_new": False, "$or": [{"year": 2001}, {"year": 2002}]},
    {"$or": [{"$and": [{"lang": "en"}, {"$not": {"is_new": True}}]}, {"$not": {"$or": [{"year": {"$lte": 2008}}]}}]},
    {"document_id": {"$in": ["d3", "d77", "none"]}},
    {"title": "Title 1"},
    {"birth year": {"$lt": 1903}},
    {"in": 2},
    {"vector": "v1"},
    {"shard": "s1"},
    {"year": 1066},
]


@pytest.fixture(scope="module")
def queries() -> torch.Tensor:
    return make_memory(5, seed=7)


@pytest.fixture(scope="module")
def corpus(shared_model, tmp_path_factory) -> CompressedCorpus:
    """200 documents in several shards, a second segment and some deleted documents; only read."""
    folder, types = tmp_path_factory.mktemp("corpus") / "corpus", {"rank": "int32", "shard": "large_string"}
    rows = [{**row, "tags": ["a"]} for row in make_rows(180)]
    opened = CompressedCorpus.build(shared_model, rows, folder, shard_size=50, metadata=types)
    opened.add([{**row, "id": f"late{number}"} for number, row in enumerate(make_rows(20))])
    opened.delete([f"d{row}" for row in range(1, 180, 9)])
    assert len(opened.snapshot.segments) == 2
    return opened


@pytest.fixture(scope="module")
def large(shared_model, tmp_path_factory) -> Path:
    """3,000 documents, of which many filters leave more than are compared one by one."""
    folder = tmp_path_factory.mktemp("large") / "corpus"
    return CompressedCorpus.build(shared_model, make_rows(3000), folder).folder


def test_a_filter_leaves_what_meets_it_and_nothing_else(corpus, queries):
    columns, (order,) = columns_of(corpus), ids(corpus.search(queries[:1], 200))
    for seed in range(400):
        where = random_where(random.Random(seed), depth=seed % 4)
        before = repr(where)
        expected = [name for name in order if meets(columns[name], where)]
        assert ids(corpus.search(queries[:1], 200, where)) == [expected], where
        milvus_expression(where)
        assert repr(where) == before


def test_results_with_a_filter_are_ranked_as_without(corpus, queries):
    columns = columns_of(corpus)
    deep = {"in": 2}
    for _ in range(20):
        deep = {"$not": {"$and": [{"$or": [deep]}]}}
    for where in [*FILTERS, deep]:
        expected = ranking(
            corpus, queries, 200, lambda found, where=where: meets(columns[found["document_id"]], where)
        )
        assert_ranked(corpus.search(queries, 200, where), expected)
        assert_ranked(corpus.with_options(where=where).search(queries, 3), [row[:3] for row in expected])


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_filters_with_an_index(large, queries, kind):
    opened = CompressedCorpus.open(large, index=kind)
    columns = columns_of(opened)
    for where in FILTERS:
        found = opened.search(queries[:3], 10, where)
        assert all(meets(columns[hit["document_id"]], where) for hits in found for hit in hits), where
        assert len(found[0]) == min(10, sum(meets(row, where) for row in columns.values())), where
        assert_alike(found, opened.search(queries[:3], 10, where, exact=True))


WRONG = [
    ([("year", 2000)], "`where` must be a dict, got list"),
    ("year > 5", "`where` must be a dict, got str"),
    ({}, "`where` must have a condition"),
    ({"colour": "red"}, r"columns of the corpus \(document_id, title,.* got 'colour'.*\$and, \$or, \$not"),
    *(({name: 1}, f"got {re.escape(repr(name))}") for name in ("Year", "text", "memory", 5, "$gt")),
    ({"$nor": [{"year": 1}]}, r"got '\$nor'"),
    ({"$and": []}, r"`where\['\$and'\]` must be a list of filters"),
    ({"$or": {"year": 1}}, r"`where\['\$or'\]` must be a list of filters"),
    ({"$or": "year"}, r"`where\['\$or'\]` must be a list of filters"),
    ({"$or": [{"year": 1}, 3]}, r"`where\['\$or'\]\[1\]` must be a dict, got int"),
    ({"$and": [{"year": 1}, {}]}, r"`where\['\$and'\]\[1\]` must have a condition"),
    ({"$not": [{"year": 1}]}, r"`where\['\$not'\]` must be a dict, got list"),
    ({"$not": {}}, r"`where\['\$not'\]` must have a condition"),
    ({"$or": [{"$not": {"a": 1}}]}, r"`where\['\$or'\]\[0\]\['\$not'\]` must name columns"),
    ({"year": None}, r"`where\['year'\]\['\$eq'\]` must be text, a number, a bool, a date or a time, got NoneType"),
    ({"year": [2000]}, r"`where\['year'\]\['\$eq'\]` .* got list"),
    ({"year": torch.tensor(3)}, "got Tensor"),
    ({"lang": 1j}, "got complex"),
    ({"year": {}}, r"`where\['year'\]` must have a condition"),
    ({"year": {"gte": 3}}, r"`where\['year'\]` must use one of \$eq, .*got 'gte'"),
    ({"year": {"$not": {"$gt": 5}}}, r"got '\$not'"),
    ({"year": {"$gt": 1, "$max": 2}}, r"got '\$max'"),
    ({"year": {None: 2}}, "got None"),
    ({"year": {"$gt": None}}, r"`where\['year'\]\['\$gt'\]` .* got NoneType"),
    ({"lang": {"$in": "en"}}, r"`where\['lang'\]\['\$in'\]` must be a list, got str"),
    ({"lang": {"$in": b"en"}}, r"`where\['lang'\]\['\$in'\]` must be a list, got bytes"),
    ({"lang": {"$nin": {"en"}}}, r"`where\['lang'\]\['\$nin'\]` must be a list, got set"),
    ({"lang": {"$in": ["en", None]}}, r"`where\['lang'\]\['\$in'\]` .* got NoneType"),
    ({"lang": {"$in": [["en"]]}}, r"`where\['lang'\]\['\$in'\]` .* got list"),
]
OTHER_TYPES = {
    "int64": [{"year": "2000"}, {"year": True}, {"year": {"$nin": ["x"]}}],
    "string": [
        {"lang": 10**30},
        {"lang": {"$in": ["en", 5]}},
        {"$not": {"$or": [{"lang": {"$lte": 1.5}}]}},
        {"title": "\ud800"},
    ],
    "bool": [{"is_new": "true"}],
    "list": [{"tags": 5}],
}
WRONG += [
    (where, rf"`where\['\w+'\]` must be comparable with the column, which is {kind}")
    for kind, filters in OTHER_TYPES.items()
    for where in filters
]


@pytest.mark.parametrize(("where", "match"), WRONG, ids=ascii)
def test_a_malformed_filter_is_named(corpus, queries, where, match):
    for call in (corpus.search, lambda queries, _, where: corpus.with_options(where=where).search(queries, 5)):
        with pytest.raises((TypeError, ValueError), match=match):
            call(queries, 5, where)


@pytest.mark.parametrize(
    ("where", "expression"),
    [
        ({"year": {"$gte": 2000, "$lt": 2010}}, "(year >= 2000) and (year < 2010)"),
        ({"open": True, "score": {"$gt": 0.5}}, "(open == true) and (score > 0.5)"),
        ({"lang": {"$in": ["de", "fr"]}, "rank": {"$in": []}}, '(lang in ["de", "fr"]) and (rank in [])'),
        ({"$or": [{"year": 1}, {"lang": "a", "rank": 2}]}, '(((year == 1)) or ((lang == "a") and (rank == 2)))'),
        ({"lang": '\\" or 1 == 1 or lang == "ü'}, r'(lang == "\\\" or 1 == 1 or lang == \"ü")'),
        *(({"year": {sign: [1]}}, None) for sign in ("$ne", "$nin")),
        *((where, None) for where in ({"$not": {"year": 1}}, {"$and": [{"year": 1}, {"$not": {"rank": 2}}]})),
        *(({"lang": {"$in": ["a", text]}}, None) for text in ("nul\0", "bell\7", "escape\x1b[0m", "new\nline")),
        *(
            ({"$or": [{"year": 1}, {name: 5}]}, None)
            for name in ("a b", "in", "not", "a-b", "2nd", "year > 0) or (year")
        ),
        *(({"score": number}, None) for number in (float("nan"), float("inf"), float("-inf"))),
    ],
    ids=ascii,
)
def test_a_filter_in_the_language_of_milvus(where, expression):
    assert milvus_expression(where) == expression  # None: it is not said to Milvus


def test_a_wrong_query_is_named(corpus):
    shapes = [(2, 3, 32), (2, 8, 32), (2, 4, 16), (4, 32), (1, 1, 4, 32), ()]
    for query in [*map(torch.zeros, shapes), "What is it?", ["What is it?"], None]:
        with pytest.raises((TypeError, ValueError), match="query_memory"):
            corpus.search(query, 5)
    with pytest.raises(ValueError, match=r"\(questions, k, 32\) with k one of \[2, 4\], got \(2, 3, 32\)"):
        corpus.search(torch.zeros(2, 3, 32), 5)
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="`query_memory` must be finite"):
            corpus.search(torch.full((1, 4, 32), value), 5)


def test_a_wrong_count_and_hybrid_without_the_questions_are_named(corpus, queries):
    for value in (0, -1, True, 2.0, "5", None):
        with pytest.raises(ValueError, match="`top_k` must be an int >= 1"):
            corpus.search(queries, value)
    for value in (0, -1, True, 2.0, "5"):
        for call in (lambda **options: corpus.search(queries, 5, **options), corpus.with_options):
            with pytest.raises(ValueError, match="`shortlist` must be an int >= 1"):
                call(shortlist=value)
    for questions in (None, ["one"], "five!", [1, 2, 3, 4, 5]):
        with pytest.raises((TypeError, ValueError), match="questions"):
            corpus.search(queries, 5, hybrid=True, questions=questions)


def test_unknown_indexes_backends_and_sizes_are_named(large):
    options = [({"index": "annoy"}, "`index` must be one of flat, hnsw, ivf, got 'annoy'")]
    options += [({"backend": "qdrant"}, "`backend` must be 'faiss' or 'milvus', got 'qdrant'")]
    options += [({name: "mine"}, "must go with `backend='milvus'`") for name in ("uri", "collection")]
    for option, message in options:
        with pytest.raises(ValueError, match=message):
            CompressedCorpus.open(large, **option)
    for size in (3, 8, 0, True, "4"):
        with pytest.raises((TypeError, ValueError), match="memory_size"):
            CompressedCorpus.open(large).prepare(size)


def search_first(connection, path, queries):
    """Open a corpus as soon as told to, and search it in all ways."""
    torch.set_num_threads(1)
    connection.recv()
    opened = CompressedCorpus.open(path, index="hnsw").prepare(2)
    found = opened.search(queries, 5) + opened.search(queries[:, :2], 5, {"is_new": True})
    found += opened.search(queries, 5, hybrid=True, questions=["text 5"] * len(queries))
    connection.send([[(hit["document_id"], hit["score"]) for hit in hits] for hits in found])


def test_two_processes_open_a_corpus_for_the_first_time_at_once(large, queries, tmp_path):
    folder = shutil.copytree(large, tmp_path / "copy", ignore=shutil.ignore_patterns("index"))
    connections = [start(search_first, folder, queries)[1] for _ in range(2)]
    for connection in connections:
        connection.send("go")
    results = [receive(connection) for connection in connections]
    assert results[0] == results[1]
    opened = CompressedCorpus.open(folder, index="hnsw")
    mine = opened.search(queries, 5) + opened.search(queries[:, :2], 5, {"is_new": True})
    assert ids(mine) == [[name for name, _ in hits] for hits in results[0]][: len(mine)]
    assert not [path for path in folder.rglob("*") if "partial" in path.name]


CHANGES = {
    "add": lambda corpus: corpus.add(make_documents(1, prefix="new")),
    "update": lambda corpus: corpus.update(make_documents(1)),
    "convert": lambda corpus: corpus.convert("float16"),
}


@pytest.mark.parametrize("name", ["segments", "k4"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_whose_derived_files_cannot_be_written_loses_nothing(large, queries, tmp_path, name, change):
    folder = shutil.copytree(large, tmp_path / "copy")
    opened, derived = CompressedCorpus.open(folder), folder / "index" / name
    shutil.rmtree(derived)
    derived.touch()  # as a full disk: nothing can be written there
    with pytest.raises(OSError):
        CHANGES[change](opened)
    derived.unlink()
    again = CompressedCorpus.open(folder)
    assert len(again) == 3000 + ("new0" in again) == len(list(again.document_ids())) and again.verify() == []
    assert all(len(hits) == 5 for hits in again.search(queries, 5))
    assert again.add(make_documents(1, prefix="other")).n_documents == 1 and again.verify() == []

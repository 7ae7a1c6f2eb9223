"""Filters on columns that Milvus does not hold as they are: the same rows with and without it, and by `clara`."""

import datetime as dt
import json
import random
from decimal import Decimal

import pytest
from corpora import assert_alike, ids, make_documents, make_memory
from test_corpus_filters import make_rows, random_where
from test_corpus_milvus import close

from modeling_clara import CompressedCorpus
from modeling_clara.cli import main

DAY = dt.date(2021, 1, 1)
TYPES = {
    "day": "date32[day]",
    "at": "timestamp[ns, tz=UTC]",
    "clock": "time64[us]",
    "price": "decimal128(8, 2)",
    "tags": "list<item: string>",
    "sizes": "list<item: int32>",
    "big": "uint64",
    "half": "float",
    "wild": "double",
}
FILTERS = [
    {"day": {"$gte": "2021-02-01"}},
    {"day": {"$lt": dt.date(2021, 4, 1)}, "year": {"$gte": 2003}},
    {"at": {"$gt": "2021-01-02T00:00:00Z"}},
    {"clock": {"$lte": "12:00"}},
    {"price": {"$gte": 0.1}},
    {"price": {"$in": [0.1, Decimal("0.20"), 1]}},
    {"tags": "news"},
    {"tags": {"$ne": "news"}},
    {"tags": {"$in": ["news", "sport"]}},
    {"sizes": {"$gt": 3, "$lt": 10**30}},
    {"big": {"$gte": 2**63}},
    {"half": 0.1},
    {"wild": {"$gt": 1}},
    {"wild": {"$lt": 1e300}},
    {"wild": {"$ne": 5}},
    {"year": {"$lt": 10**30}},
    {"year": 1e300},
    {"year": {"$gte": 2000.5}},
    {"$or": [{"day": {"$lt": "2021-02-01"}}, {"year": 2003}]},
    {"title": "T" * 2000},
    {"title": {"$gte": "T" * 1024}},
]


def make_typed(n: int) -> list[dict]:
    wild = [float("nan"), float("inf"), float("-inf"), 0.5, None, 7.0]
    return [
        document
        | {
            "title": "T" * (1020 + number % 8 * 200),
            "day": None if number % 9 == 4 else DAY + dt.timedelta(number % 150),
            "at": dt.datetime(2021, 1, 1, tzinfo=dt.UTC) + dt.timedelta(hours=number % 100),
            "clock": dt.time(number % 24),
            "price": Decimal(number % 20) / 10,
            "tags": [None, [], ["news"], ["sport", "news"], ["x"]][number % 5],
            "sizes": [number % 6, number % 7],
            "big": 2**63 + number % 3 if number % 2 else number,
            "half": 0.1 if number % 2 else 0.5,
            "wild": wild[number % 6],
        }
        for number, document in enumerate(make_documents(n))
    ]


@pytest.fixture(scope="module")
def folder(shared_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("typed") / "corpus"
    return CompressedCorpus.build(shared_model, make_typed(3600), folder, metadata=TYPES).folder


def test_the_same_rows_with_and_without_milvus(folder, shared_model, tmp_path):
    pytest.importorskip("pymilvus")
    pytest.importorskip("milvus_lite")
    queries = make_memory(3, seed=7)
    uri = str(tmp_path / "vectors.db")
    corpus, plain = CompressedCorpus.open(folder, backend="milvus", uri=uri), CompressedCorpus.open(folder)
    for where in FILTERS:
        expected = plain.search(queries, 10, where, exact=True)
        assert_alike(corpus.search(queries, 10, where), expected)
        assert bool(expected[0]) == (where not in ({"year": 1e300}, {"title": "T" * 2000})), where
    for where in ({"day": "yesterday"}, {"tags": 5}, {"price": "1"}):
        with pytest.raises(TypeError, match="Compare with a value such as"):
            corpus.search(queries, 10, where)
    close(corpus, uri)
    rows = CompressedCorpus.build(shared_model, make_rows(2500), tmp_path / "rows")
    corpus = CompressedCorpus.open(rows.folder, backend="milvus", uri=uri)
    for seed in range(60):
        where = random_where(random.Random(seed), depth=2)
        assert_alike(corpus.search(queries, 10, where), rows.search(queries, 10, where, exact=True))
    close(corpus, uri)


def test_the_command_line_compares_days(shared_model, tmp_path, capsys):
    checkpoint = tmp_path / "model"
    shared_model.save_pretrained(checkpoint, include_backbone=True)
    rows = [{**row, "text": "Otto lives in Lima."} for row in make_typed(40)]
    corpus = CompressedCorpus.build(shared_model, rows, tmp_path / "corpus", metadata=TYPES)
    for where in ({"day": {"$gte": "2021-01-20"}}, {"tags": "sport"}, {"price": {"$lt": 0.3}}):
        command = ["ask", str(corpus.folder), "Where?", "--model", str(checkpoint), "--json"]
        capsys.readouterr()
        assert main([*command, "--where", json.dumps(where), "--max-new-tokens", "1", "--top-k", "2"]) == 0
        (answer,) = json.loads(capsys.readouterr().out)["answers"]
        found = [source["document_id"] for source in answer["sources"]]
        expected = ids(corpus.search(shared_model.encode_queries(["Where?"]), 40, where, exact=True))[0]
        assert len(found) == 2 and set(found) <= set(expected)
    assert main([*command, "--where", '{"day": {"$gte": "soon"}}']) == 1
    assert "which is date32[day], got 'soon'" in json.loads(capsys.readouterr().out)["problem"]

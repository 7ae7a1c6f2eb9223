"""BEIR folders -> questions with gold: judgements, splits, compressed files, hashes, errors with file and line.

Every folder is written and read through `read_data`; nothing here needs a model.
"""

import gzip
import json

import pytest

from recipes.evaluation.questions import hash_data, read_data

CORPUS = [{"_id": "d1", "title": "T", "text": "one"}, {"_id": 2, "text": "two"}]
QUERIES = [{"_id": "q1", "text": "First?"}, {"_id": "q2", "text": "Second?"}]
HEADER = "query-id\tcorpus-id\tscore\n"


def to_bytes(rows: list) -> bytes:
    """Lines of JSON; bytes stand for themselves."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


@pytest.fixture
def beir(tmp_path):
    """`beir(qrels, ...)`: a BEIR folder; names that end in .gz are compressed."""

    def run(qrels: str | bytes, corpus=CORPUS, queries=QUERIES, names=("corpus.jsonl", "queries.jsonl", "test.tsv")):
        folder = tmp_path / "beir"
        contents = (to_bytes(corpus), to_bytes(queries), qrels if isinstance(qrels, bytes) else qrels.encode())
        for name, content in zip(names, contents, strict=True):
            path = folder / "qrels" / name if ".tsv" in name else folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return folder

    return run


def gold(data) -> dict:
    return {question.id: question.gold for question in data.questions}


@pytest.mark.parametrize("header", [HEADER, ""])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_beir_takes_judged_queries_and_what_is_above_zero(beir, header, end):
    lines = f"{header}q1\td1\t1\nq1\t2\t0\nq1\td1\t2\nq2\td1\t0\n".replace("\n", end)
    data = read_data(str(beir(lines, queries=[*QUERIES, {"_id": "q3", "text": "Unjudged?"}])))
    assert gold(data) == {"q1": ("d1",)} and (data.format, data.name) == ("beir", "beir")
    assert data.documents == {"d1": {"title": "T", "text": "one"}, "2": {"title": "", "text": "two"}}


def test_beir_split_names_the_judgements(beir):
    folder = beir(f"{HEADER}q1\td1\t1\n")
    (folder / "qrels" / "dev.tsv").write_text(f"{HEADER}q2\t0\t2\t1\n")  # four columns, as TREC has
    assert gold(read_data(str(folder))) == {"q1": ("d1",)}
    assert gold(read_data(str(folder), split="dev")) == {"q2": ("2",)}
    with pytest.raises(FileNotFoundError, match="train.tsv.*--split"):
        read_data(str(folder), split="train")


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "test.tsv"])
def test_beir_files_may_be_compressed(beir, name):
    names = [f"{n}.gz" if n == name else n for n in ("corpus.jsonl", "queries.jsonl", "test.tsv")]
    assert gold(read_data(str(beir(f"{HEADER}q1\td1\t1\n", names=names)))) == {"q1": ("d1",)}


@pytest.mark.parametrize("qrels", ["q1\td1\t1\n\nq2\t2\t1\n\n", b"\xef\xbb\xbfq1\td1\t1\nq2\t2\t1\n"])
def test_beir_judgements_with_blank_lines_or_a_bom_lose_nothing(beir, qrels):
    assert gold(read_data(str(beir(qrels)))) == {"q1": ("d1",), "q2": ("2",)}


def test_beir_ids_keep_their_quotes(beir):
    corpus = [{"_id": '"d', "text": "one"}, {"_id": '"e"', "text": "two"}]
    data = read_data(str(beir('q1\t"d\t1\nq2\t"e"\t1\n', corpus=corpus)))
    assert gold(data) == {"q1": ('"d',), "q2": ('"e"',)}


@pytest.mark.parametrize("line", ["q1\td1\tnan", "q1\td1\thigh", "q1\td1", "1\t2", "q1"])
def test_beir_judgement_that_is_none_is_named(beir, line):
    corpus = [*CORPUS, {"_id": "1", "text": "three"}]
    queries = [*QUERIES, {"_id": "1", "text": "Third?"}]
    with pytest.raises(ValueError, match="test.tsv:3 "):
        read_data(str(beir(f"{HEADER}q2\t2\t1\n{line}\n", corpus, queries)))


@pytest.mark.parametrize(
    "bad, place",
    [
        ({"corpus": [*CORPUS, {"_id": "d1", "text": "again"}]}, "corpus.jsonl:3 "),
        ({"corpus": [*CORPUS, {"_id": "d3", "title": " ", "text": ""}]}, "corpus.jsonl:3 "),
        ({"corpus": [*CORPUS, {"_id": "d3", "text": None}]}, "corpus.jsonl:3 "),
        ({"corpus": [*CORPUS, {"text": "no id"}]}, "corpus.jsonl:3 "),
        ({"queries": [*QUERIES, QUERIES[0]]}, "queries.jsonl:3 "),
        ({"queries": [{"_id": "q1", "text": ""}, QUERIES[1]]}, "queries.jsonl:1 "),
        ({"queries": [{**QUERIES[0], "metadata": "x"}, QUERIES[1]]}, "queries.jsonl:1 "),
        ({"corpus": CORPUS[1:]}, "queries.jsonl:1 .*'d1'"),  # judged, and not there
    ],
)
def test_beir_rows_that_cannot_be_used_are_named_and_can_be_left_out(beir, bad, place):
    folder = beir(f"{HEADER}q1\td1\t1\nq2\t2\t1\n", **bad)
    with pytest.raises(ValueError, match=place):
        read_data(str(folder))
    data = read_data(str(folder), skip_bad_rows=True)
    assert len(data.rejected) == 1 and gold(data)["q2"] == ("2",)


def test_beir_queries_may_have_answers(beir):
    queries = [{**QUERIES[0], "metadata": {"answer": ["A"]}}, {**QUERIES[1], "metadata": {"answers": None}}]
    data = read_data(str(beir("q1\td1\t1\nq2\td1\t1\n", queries=queries)))
    assert [question.answers for question in data.questions] == [("A",), ()]


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz"])
def test_the_hash_of_a_folder_changes_with_its_files_alone(beir, name):
    names = (name, "queries.jsonl", "test.tsv")
    folder = beir("q1\td1\t1\n", names=names)
    before = hash_data(folder)
    (folder / "run").mkdir()
    (folder / "run" / "predictions.jsonl").write_text("{}\n")  # --output inside of it
    assert hash_data(folder) == before == read_data(str(folder)).sha256
    assert hash_data(beir("q1\td1\t1\n", corpus=[*CORPUS, {"_id": "d3", "text": "new"}], names=names)) != before

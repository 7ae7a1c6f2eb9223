"""BEIR folders -> questions with gold: judgements, splits, compressed files, hashes, errors with file and line."""

import pytest
from evaluation_runs import write_rows

from recipes.evaluation.questions import hash_data, read_data

CORPUS = [{"_id": "d1", "title": "T", "text": "one"}, {"_id": 2, "text": "two"}]
QUERIES = [{"_id": "q1", "text": "First?"}, {"_id": "q2", "text": "Second?"}]
NAMES = ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")
HEADER = "query-id\tcorpus-id\tscore"


@pytest.fixture
def beir(tmp_path):
    """`beir(*lines, ...)`: a BEIR folder with these judgements; names that end in .gz are compressed."""

    def run(*lines: str, corpus=CORPUS, queries=QUERIES, names=NAMES):
        for name, rows in zip(names, (corpus, queries, [line.encode() for line in lines]), strict=True):
            write_rows(tmp_path / "beir" / name, rows)
        return tmp_path / "beir"

    return run


def gold(folder, **options) -> dict:
    return {question.id: question.gold for question in read_data(str(folder), **options).questions}


@pytest.mark.parametrize("header", [[HEADER], []])
@pytest.mark.parametrize("end", ["", "\r"])
def test_beir_takes_judged_queries_and_what_is_above_zero(beir, header, end):
    lines = [f"{line}{end}" for line in [*header, "q1\td1\t1", "q1\t2\t0", "q1\td1\t2", "q2\td1\t0"]]
    folder = beir(*lines, queries=[*QUERIES, {"_id": "q3", "text": "Unjudged?"}])
    data = read_data(str(folder))
    assert gold(folder) == {"q1": ("d1",)} and (data.format, data.name) == ("beir", "beir")
    assert data.documents == {"d1": {"title": "T", "text": "one"}, "2": {"title": "", "text": "two"}}


def test_beir_split_names_the_judgements(beir):
    folder = beir(HEADER, "q1\td1\t1")
    (folder / "qrels" / "dev.tsv").write_text(f"{HEADER}\nq2\t0\t2\t1\n")  # four columns, as TREC has
    assert gold(folder) == {"q1": ("d1",)} and gold(folder, split="dev") == {"q2": ("2",)}
    with pytest.raises(FileNotFoundError, match="train.tsv.*--split"):
        read_data(str(folder), split="train")


@pytest.mark.parametrize("name", NAMES)
def test_beir_files_may_be_compressed(beir, name):
    folder = beir(HEADER, "q1\td1\t1", names=[f"{n}.gz" if n == name else n for n in NAMES])
    assert gold(folder) == {"q1": ("d1",)}


def test_beir_judgements_lose_nothing_by_blank_lines_a_bom_or_quotes(beir):
    for lines in (["q1\td1\t1", "", "q2\t2\t1", ""], ["\ufeffq1\td1\t1", "q2\t2\t1"]):
        assert gold(beir(*lines)) == {"q1": ("d1",), "q2": ("2",)}
    corpus = [{"_id": '"d', "text": "one"}, {"_id": '"e"', "text": "two"}]
    assert gold(beir('q1\t"d\t1', 'q2\t"e"\t1', corpus=corpus)) == {"q1": ('"d',), "q2": ('"e"',)}


@pytest.mark.parametrize("line", ["q1\td1\tnan", "q1\td1\thigh", "q1\td1", "1\t2", "q1"])
def test_beir_judgement_that_is_none_is_named(beir, line):
    more = {"corpus": [*CORPUS, {"_id": "1", "text": "three"}], "queries": [*QUERIES, {"_id": "1", "text": "Third?"}]}
    with pytest.raises(ValueError, match="test.tsv:3 "):
        read_data(str(beir(HEADER, "q2\t2\t1", line, **more)))


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
    folder = beir(HEADER, "q1\td1\t1", "q2\t2\t1", **bad)
    with pytest.raises(ValueError, match=place):
        read_data(str(folder))
    assert len(read_data(str(folder), skip_bad_rows=True).rejected) == 1
    assert gold(folder, skip_bad_rows=True)["q2"] == ("2",)


def test_beir_queries_may_have_answers(beir):
    queries = [{**QUERIES[0], "metadata": {"answer": ["A"]}}, {**QUERIES[1], "metadata": {"answers": None}}]
    data = read_data(str(beir("q1\td1\t1", "q2\td1\t1", queries=queries)))
    assert [question.answers for question in data.questions] == [("A",), ()]


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz"])
def test_the_hash_of_a_folder_changes_with_its_files_alone(beir, name):
    names = (name, *NAMES[1:])
    folder = beir("q1\td1\t1", names=names)
    before = hash_data(folder)
    write_rows(folder / "run" / "predictions.jsonl", [{}])  # --output inside of it
    assert hash_data(folder) == before == read_data(str(folder)).sha256
    assert hash_data(beir("q1\td1\t1", corpus=[*CORPUS, {"_id": "d3", "text": "new"}], names=names)) != before

"""Data files as users have them -> questions: exact ids, answers, candidates and gold, errors with file and line."""

import gzip
import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation_runs import write_rows

from recipes.evaluation.questions import half_of, read_data

ROW = {"id": "a", "question": "Where?", "answers": ["Paris"], "docs": ["one", "two"], "pos_index": [1]}
OTHER = {**ROW, "id": "b"}
PASSAGE = {"title": "T", "text": "body", "qas": [{"question": "Q0?", "answers": ["x"]}]}
SOURCES = [{"answer": "A", "provenance": [{"wikipedia_id": "9", "title": "Nine"}]}]
KILT = {"id": "k", "input": "Who?", "output": SOURCES}
FLASH = {"id": "f", "question": "Who?", "golden_answers": ["A", "B"]}
NAN = float("nan")


@pytest.fixture
def read(tmp_path):
    """`read(rows, **options)` writes rows.jsonl and reads it."""
    return lambda rows, **options: read_data(str(write_rows(tmp_path / "rows.jsonl", rows)), **options)


def gold(data) -> dict:
    return {question.id: question.gold for question in data.questions}


def refuses(rows: list, read, *parts: str, line: int = 1) -> None:
    """The file is refused, and the error has the line, these words and the remedy."""
    with pytest.raises(ValueError) as error:
        read(rows)
    for part in (f"rows.jsonl:{line} ", "--skip-bad-rows", *parts):
        assert part in str(error.value)


def test_multihop_row_gives_exactly_its_question(read):
    data = read([ROW, {**ROW, "id": 7, "docs": ["three", "one"], "pos_index": 0}])
    first, second = data.questions
    assert (first.id, first.text, first.answers) == ("a", "Where?", ("Paris",))
    assert (first.candidates, first.gold) == (("0", "1"), ("1",))
    assert (second.id, second.candidates, second.gold) == ("7", ("2", "0"), ("2",))  # "one" is the same document
    assert data.documents["0"] == {"title": "", "text": "one"} and list(data.documents) == ["0", "1", "2"]
    assert (data.format, data.name, data.rejected) == ("multihop", "rows.jsonl", [])
    assert first.place.endswith("rows.jsonl:1") and second.place.endswith("rows.jsonl:2")


def test_title_and_text_make_a_document_and_both_tell_it_apart(read):
    docs = ["T\nbody", {"title": "T", "text": " body "}, {"title": "U", "text": "body"}, "body", {"text": "body"}]
    data = read([{**ROW, "docs": docs, "pos_index": [1, 0, 0]}])
    assert data.questions[0].candidates == ("0", "0", "1", "2", "2")
    assert data.questions[0].gold == ("0",)  # named twice, counted once
    unknown = {"question": "Where?", "answers": ["Paris"], "docs": ["one"]}
    rows = [unknown, {**unknown, "pos_index": None}, {**unknown, "pos_index": []}]
    assert gold(read(rows)) == {"1": (), "2": (), "3": ()}
    assert [(d["title"], d["text"]) for d in data.documents.values()] == [("T", "body"), ("U", "body"), ("", "body")]


def test_passages_become_questions_whose_gold_is_their_passage(read):
    second = {"text": "other", "qas": [{"question": "Q1?", "answer": 5}, {"question": "Q2?", "answers": ["y", "y"]}]}
    data = read([PASSAGE, second, {"text": "unasked", "qas": []}, PASSAGE])
    assert data.format == "passages" and {question.candidates for question in data.questions} == {()}
    answers = {"1#0": ("x",), "2#0": ("5",), "2#1": ("y",), "4#0": ("x",)}
    assert {question.id: question.answers for question in data.questions} == answers
    assert [question.gold for question in data.questions] == [("0",), ("1",), ("1",), ("0",)]  # a passage twice
    assert [document["text"] for document in data.documents.values()] == ["body", "other", "unasked"]


def test_limit_counts_questions_and_keeps_all_documents(read):
    data = read([PASSAGE, {**PASSAGE, "text": "other"}, {**PASSAGE, "text": "third"}], limit=2)
    assert [question.id for question in data.questions] == ["1#0", "2#0"] and len(data.documents) == 3
    assert len(read([PASSAGE], limit=99).questions) == 1
    with pytest.raises(ValueError, match="`limit` must be >= 1, got 0"):
        read([PASSAGE], limit=0)


def test_halves_are_fixed_by_the_words_of_a_question_alone(read):
    rows = [{**ROW, "id": str(number), "question": f"Where is city {number}?"} for number in range(40)]
    first, second = (read(rows, half=half) for half in ("first", "second"))
    ids = [{question.id for question in data.questions} for data in (first, second)]
    assert not ids[0] & ids[1] and ids[0] | ids[1] == {row["id"] for row in rows} and 10 < len(ids[0]) < 30
    assert (first.half, second.half, read(rows).half) == ("first", "second", None)
    changed = [{**row, "question": f"  where IS city, {row['id']}"} for row in rows[::-2]]  # other order, other rows
    assert {question.id for question in read(changed, half="first").questions} == ids[0] & {r["id"] for r in changed}
    assert half_of("Where is it?") == half_of("where is IT") == "first" and half_of("Who wrote it?") == "second"
    assert first.ids == second.ids and first.sha256 == second.sha256 and first.documents == second.documents
    assert read(rows, half="first", limit=3).questions == first.questions[:3]
    with pytest.raises(ValueError, match="the second half of rows.jsonl must have a question"):
        read([{**ROW, "question": "Where is it?"}], half="second")


@pytest.mark.parametrize("name", ["answer", "gold_answer", "golden_answers"])
def test_reference_rows_read_the_same_with_each_name_of_the_answer(read, name):
    row = {"question": "Where?", "docs": ["one", "two"], "pos_index": [1], name: "Paris"}
    data = read([row, row | {"question": "Again?"}])
    assert data.format == "reference" and gold(data) == {"1": ("1",), "2": ("1",)}
    assert [question.answers for question in data.questions] == [("Paris",)] * 2
    teachers = {"question": "Where?", "docs": ["one"], "answer": "It is in Paris, I think.", "gold_answer": "Paris"}
    assert read([teachers]).questions[0].answers == ("Paris",)  # the gold answer goes before the teacher's


@pytest.mark.parametrize("answer", [{"golden_answers": ["A"]}, {"answer": "A"}])
@pytest.mark.parametrize("optional", [{"pos_index": None}, {}, {"docs": []}])
def test_optional_keys_do_not_change_the_format_of_a_file(read, answer, optional):
    row = {"question": "Q?", "docs": ["one"], **answer}
    data = read([{**row, "pos_index": [0]}, {**row, **optional}])
    assert data.format == "reference" and gold(data) == {"1": ("0",), "2": ()}


def test_flashrag_with_and_without_documents(read):
    hits = [{"id": "8", "contents": "T\nbody", "score": 1.0}, {"contents": "alone"}]
    data = read([FLASH, {**FLASH, "id": "g", "retrieval_result": hits}])
    assert data.format == "flashrag" and data.questions[0].answers == ("A", "B")
    assert [question.candidates for question in data.questions] == [(), ("0", "1")]
    assert [*data.documents.values()] == [{"title": "T", "text": "body"}, {"title": "", "text": "alone"}]


def test_kilt_gathers_answers_and_provenance_of_all_outputs(read):
    """Provenance without an id goes by its title, and without both is none."""
    more = [
        {"answer": "A"},
        {"answer": "B", "provenance": []},
        {"provenance": [{"wikipedia_id": 7, "title": "Seven"}]},
    ]
    data = read([{**KILT, "output": SOURCES + more}])
    assert (data.format, data.documents) == ("kilt", {})
    assert (data.questions[0].answers, data.questions[0].gold) == (("A", "B"), ("9", "7"))
    assert data.titles == {"9": "Nine", "7": "Seven"}
    sources = [{"wikipedia_id": None, "title": "Nine"}, {"wikipedia_id": None, "title": None}]
    sources += [{"wikipedia_id": "", "title": ""}, {"bleu_score": 1.0}]
    data = read([{"input": "Q?", "output": [{"answer": "A", "provenance": [source]}]} for source in sources])
    assert gold(data) == {"1": ("Nine",), "2": (), "3": (), "4": ()} and data.titles == {"Nine": "Nine"}


def test_rows_of_two_formats_are_refused(read):
    refuses([ROW, PASSAGE], read, "multihop", "passages", line=2)
    for row in ({"prompt": "Q?"}, {"_id": "5a", "query": "Q?"}):
        refuses([row], read, ", ".join(row), "multihop")
    data = read([{**ROW, "_id": "mongo", "metadata": {"x": 1}, "type": "bridge"}])  # other keys do not matter
    assert data.format == "multihop" and data.questions[0].gold == ("1",)


def test_an_id_twice_is_refused_and_both_places_are_named(read):
    for ids in (("a", "a"), (1, "1"), ("2", None)):
        refuses([{**ROW, "id": value} for value in ids], read, repr(str(ids[0])), "rows.jsonl:1", line=2)
    pair = {"id": "same", "question": "Q?", "answers": ["x"]}
    refuses([{**PASSAGE, "qas": [pair, {**pair, "question": "R?"}]}], read, "'same'", "rows.jsonl:1")
    data = read([{**PASSAGE, "qas": [pair, pair]}, ROW], skip_bad_rows=True)
    assert [question.id for question in data.questions] == ["a"] and "body" not in str(data.documents)


def test_answers_that_can_be_read(read):
    answers = {"Paris": ("Paris",), 1969: ("1969",), (1, " a ", "a"): ("1", "a"), (): (), "\u6771": ("\u6771",)}
    rows = [{**ROW, "id": str(n), "answers": given} for n, given in enumerate(answers)]
    assert [question.answers for question in read(rows).questions] == list(answers.values())


BAD_FIELDS = {
    "id": ["", "  ", True, 1.0, NAN, ["a"]],
    "answers": ["", " ", [""], ["a", None], True, NAN, {"text": "a"}, [["a"]], None],
    "pos_index": [2, -1, [0, 2], "0", True, 1.0, NAN, [None]],
    "question": ["", 5, ["Q?"]],
    "docs": [[""], [NAN, "x"], [{"title": "T"}, "x"], 5, True, {"title": "T"}, [7]],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD_FIELDS.items() for value in values])
def test_values_that_cannot_be_read_are_named(read, name, value):
    refuses([ROW, {**OTHER, name: value}], read, "doc" if name == "docs" else name, line=2)


BAD_ROWS = [{**ROW, "answers": None}, *({**FLASH, "docs": docs} for docs in (5, True, {"title": "T"}, [7]))]
PROVENANCES = (["Nine"], "Nine", 5, {"wikipedia_id": "9"}, [None])
BAD_ROWS += [{**KILT, "output": [{"answer": "A", "provenance": provenance}]} for provenance in PROVENANCES]


@pytest.mark.parametrize("row", BAD_ROWS)
def test_first_rows_that_cannot_be_read_are_refused(read, row):
    refuses([row], read)


def test_data_that_nothing_can_be_scored_on_is_refused_unless_abstaining_counts(read):
    rows = [{"id": "a", "question": "Q?", "answers": [], "docs": ["one"]}]
    with pytest.raises(ValueError, match="neither.*rows.jsonl:1"):
        read(rows)
    assert len(read(rows, may_abstain=True).questions) == len(read([{**rows[0], "pos_index": [0]}]).questions) == 1


def test_bom_crlf_and_blank_lines_change_nothing_but_the_lines(read):
    others = [{**ROW, "id": value} for value in (0, None, "\u00e9\u6771")]  # texts, or the number of the line
    data = read([b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r", b"\r", b"  ", *others])
    assert [question.id for question in data.questions] == ["a", "0", "5", "\u00e9\u6771"]
    assert data.documents == read([ROW]).documents


def test_the_same_rows_in_any_format_are_the_same_questions(tmp_path):
    """Also with the nulls that Parquet fills in for keys that only some entries have."""
    pairs = [{"id": "mine", "question": "Q0?", "answers": ["x"]}, {"question": "Q1?", "answers": ["y"]}]
    files = {
        "passages": [{**PASSAGE, "qas": pairs}, {"text": "untitled", "qas": [{"question": "Q2?", "answers": []}]}],
        "multihop": [
            {**ROW, "docs": [{"text": "one"}, {"title": "T", "text": "two"}]},
            {"id": "b", "question": "Where?", "answers": ["\u6771\u4eac"]},
        ],
        "kilt": [KILT, {"id": "l", "input": "Where?", "output": [{"answer": "B"}]}],
    }
    for name, rows in files.items():
        paths = [write_rows(tmp_path / f"{name}.{end}", rows) for end in ("jsonl", "jsonl.gz")]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        read = [read_data(str(path)) for path in (*paths, tmp_path / f"{name}.parquet")]
        for data in read[1:]:
            ours, theirs = ([vars(q) | {"place": q.place[-2:]} for q in d.questions] for d in (data, read[0]))
            assert ours == theirs and len(ours) >= 2
            assert data.documents == read[0].documents and data.titles == read[0].titles
    assert [q.id for q in read_data(str(tmp_path / "passages.parquet")).questions] == ["mine", "1#1", "2#0"]


def test_the_hash_is_of_the_bytes_and_of_nothing_else(read, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [ROW])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_data(str(path)).sha256 == read_data(str(path), limit=1).sha256 == digest
    assert read_data(str(path.rename(tmp_path / "other.jsonl"))).sha256 == digest != read([ROW, b""]).sha256


def test_files_that_are_not_there_or_empty(read, tmp_path):
    for name in ("none.jsonl", "none.parquet"):
        with pytest.raises(FileNotFoundError, match=f"{name}` must be a file.*Correct"):
            read_data(str(tmp_path / name))
    for rows in ([], [b"", b" "], [{"text": "unasked", "qas": []}]):
        with pytest.raises(ValueError, match="rows.jsonl must have at least one question"):
            read(rows)
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="rows.parquet must have at least one question"):
        read_data(str(tmp_path / "rows.parquet"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="corpus.jsonl"):
        read_data(str(tmp_path / "folder"))


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("rows.jsonl.gz", gzip.compress(json.dumps(ROW).encode(), mtime=0)[:20], "rows.jsonl.gz"),
        ("rows.jsonl.gz", b"plain", "rows.jsonl.gz"),
        ("rows.parquet", b"none", "rows.parquet"),
        ("rows.csv", b"question,answers\nQ?,A\n", r"(?s)rows\.csv.*\.jsonl"),  # not looked for on the Hub
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=words):
        read_data(str(tmp_path / name))


SURROGATE, NUMBER = b'{"question": "\\ud800", "answers": ["a"]}', b'{"question": "Q?", "answers": NaN}'


@pytest.mark.parametrize("line", [b"{", b"[1]", b"\xff{}", SURROGATE, NUMBER])
def test_a_bad_line_is_named_and_left_out_on_demand(read, line):
    rows = [ROW, line, {**ROW, "id": "c"}]
    refuses(rows, read, line=2)
    data = read(rows, skip_bad_rows=True)
    assert [question.id for question in data.questions] == ["a", "c"]
    (rejected,) = data.rejected
    assert rejected["place"].endswith("rows.jsonl:2") and rejected["reason"]


def test_the_number_of_bad_rows_is_told_and_three_are_named(read):
    data = read([ROW, {**ROW, "docs": ["three"], "pos_index": [0]}, {**PASSAGE, "qas": 3}], skip_bad_rows=True)
    assert len(data.rejected) == 2 and list(data.documents) == ["0", "1"]  # a rejected row leaves no documents
    with pytest.raises(ValueError, match=r"^5 row\(s\) cannot be used") as error:
        read([b"{"] * 5)
    assert [f"rows.jsonl:{n} " in str(error.value) for n in range(1, 6)] == [True] * 3 + [False] * 2

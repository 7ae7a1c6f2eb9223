"""Data files as users have them -> questions: exact ids, answers, candidates and gold, errors with file and line.

Every file is written to a folder and read through `read_data`; nothing here needs a model.
"""

import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipes.evaluation.questions import half_of, read_data

ROW = {"id": "a", "question": "Where?", "answers": ["Paris"], "docs": ["one", "two"], "pos_index": [1]}
PASSAGE = {"title": "T", "text": "body", "qas": [{"question": "Q0?", "answers": ["x"]}]}
KILT = {
    "id": "k",
    "input": "Who?",
    "output": [{"answer": "A", "provenance": [{"wikipedia_id": "9", "title": "Nine"}]}],
}
FLASH = {"id": "f", "question": "Who?", "golden_answers": ["A", "B"]}


def to_bytes(rows: list) -> bytes:
    """Lines of JSON; bytes stand for themselves."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


@pytest.fixture
def write(tmp_path):
    """`write(rows, name)`: a file of these rows; its path."""

    def run(rows: list, name: str = "rows.jsonl") -> Path:
        content = to_bytes(rows)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return tmp_path / name

    return run


@pytest.fixture
def read(write):
    """`read(rows, **options)` writes rows.jsonl and reads it."""
    return lambda rows, **options: read_data(str(write(rows)), **options)


def gold(data) -> dict:
    return {question.id: question.gold for question in data.questions}


def refuses(rows: list, read, *parts: str, line: int = 1) -> None:
    """The file is refused, and the error has the line, these words and the remedy."""
    with pytest.raises(ValueError) as error:
        read(rows)
    assert f"rows.jsonl:{line} " in str(error.value)
    assert "--skip-bad-rows" in str(error.value)
    for part in parts:
        assert part in str(error.value)


# --- formats -------------------------------------------------------------------------------------------------------


def test_multihop_row_gives_exactly_its_question(read):
    data = read([ROW, {**ROW, "id": 7, "docs": ["three", "one"], "pos_index": 0}])
    first, second = data.questions
    assert (first.id, first.text, first.answers, first.candidates, first.gold) == (
        "a",
        "Where?",
        ("Paris",),
        ("0", "1"),
        ("1",),
    )
    assert (second.id, second.candidates, second.gold) == ("7", ("2", "0"), ("2",))  # "one" is the same document
    assert data.documents["0"] == {"title": "", "text": "one"} and list(data.documents) == ["0", "1", "2"]
    assert (data.format, data.name, data.rejected) == ("multihop", "rows.jsonl", [])
    assert first.place.endswith("rows.jsonl:1") and second.place.endswith("rows.jsonl:2")


def test_title_and_text_make_a_document_and_both_tell_it_apart(read):
    docs = ["T\nbody", {"title": "T", "text": " body "}, {"title": "U", "text": "body"}, "body", {"text": "body"}]
    data = read([{**ROW, "docs": docs, "pos_index": [1]}])
    assert data.questions[0].candidates == ("0", "0", "1", "2", "2")
    assert data.questions[0].gold == ("0",)
    assert list(data.documents.values()) == [
        {"title": "T", "text": "body"},
        {"title": "U", "text": "body"},
        {"title": "", "text": "body"},
    ]


def test_gold_that_is_named_twice_counts_once(read):
    data = read([{**ROW, "docs": ["x", "y", "x"], "pos_index": [2, 0, 0]}])
    assert data.questions[0].gold == ("0",) and data.questions[0].candidates == ("0", "1", "0")


@pytest.mark.parametrize("missing", [{}, {"pos_index": None}, {"pos_index": []}])
def test_without_pos_index_gold_is_unknown(read, missing):
    row = {name: value for name, value in ROW.items() if name != "pos_index"}
    assert read([{**row, **missing}]).questions[0].gold == ()


def test_passages_become_questions_whose_gold_is_their_passage(read):
    second = {"text": "other", "qas": [{"question": "Q1?", "answer": 5}, {"question": "Q2?", "answers": ["y", "y"]}]}
    data = read([PASSAGE, second, {"text": "unasked", "qas": []}, PASSAGE])
    assert data.format == "passages"
    assert [(q.id, q.answers, q.candidates) for q in data.questions] == [
        ("1#0", ("x",), ()),
        ("2#0", ("5",), ()),
        ("2#1", ("y",), ()),
        ("4#0", ("x",), ()),
    ]
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
    limited = read(rows, half="first", limit=3)
    assert limited.questions == first.questions[:3]


def test_a_half_that_cannot_be_asked(read):
    with pytest.raises(ValueError, match="the second half of rows.jsonl must have a question"):
        read([{**ROW, "question": "Where is it?"}], half="second")


@pytest.mark.parametrize("name", ["answer", "gold_answer", "golden_answers"])
def test_reference_rows_read_the_same_with_each_name_of_the_answer(read, name):
    row = {"question": "Where?", "docs": ["one", "two"], "pos_index": [1], name: "Paris"}
    data = read([row, row | {"question": "Again?"}])
    assert data.format == "reference" and [question.id for question in data.questions] == ["1", "2"]
    assert [(q.answers, q.gold) for q in data.questions] == [(("Paris",), ("1",))] * 2


def test_the_gold_answer_goes_before_the_teachers(read):
    row = {"question": "Where?", "docs": ["one"], "answer": "It is in Paris, I think.", "gold_answer": "Paris"}
    assert read([row]).questions[0].answers == ("Paris",)


@pytest.mark.parametrize(
    "first, second",
    [
        ({"golden_answers": ["A"], "pos_index": [0]}, {"golden_answers": ["A"], "pos_index": None}),
        ({"golden_answers": ["A"], "pos_index": [0]}, {"golden_answers": ["A"]}),
        ({"answer": "A", "pos_index": [0]}, {"answer": "A", "docs": []}),
    ],
)
def test_optional_keys_do_not_change_the_format_of_a_file(read, first, second):
    base = {"question": "Q?", "docs": ["one"]}
    data = read([{**base, **first}, {**base, **second}])
    assert data.format == "reference" and gold(data) == {"1": ("0",), "2": ()}


def test_flashrag_with_and_without_documents(read):
    data = read([FLASH])
    assert data.format == "flashrag" and data.documents == {}
    assert (data.questions[0].answers, data.questions[0].candidates) == (("A", "B"), ())
    hits = [{"id": "8", "contents": "T\nbody", "score": 1.0}, {"contents": "alone"}]
    data = read([{**FLASH, "retrieval_result": hits}])
    assert data.questions[0].candidates == ("0", "1")
    assert list(data.documents.values()) == [{"title": "T", "text": "body"}, {"title": "", "text": "alone"}]


def test_kilt_gathers_answers_and_provenance_of_all_outputs(read):
    more = [
        {"provenance": [{"wikipedia_id": 7, "title": "Seven"}]},
        {"answer": "A"},
        {"answer": "B", "provenance": []},
    ]
    data = read([{**KILT, "output": KILT["output"] + more}])
    assert (data.format, data.documents) == ("kilt", {})
    assert (data.questions[0].answers, data.questions[0].gold) == (("A", "B"), ("9", "7"))
    assert data.titles == {"9": "Nine", "7": "Seven"}


def test_kilt_provenance_without_an_id_goes_by_its_title_and_without_both_is_none(read):
    def row(**source):
        return {"input": "Q?", "output": [{"answer": "A", "provenance": [source]}]}

    nameless = [row(wikipedia_id=None, title=None), row(wikipedia_id="", title=""), row(bleu_score=1.0)]
    data = read([row(wikipedia_id=None, title="Nine"), *nameless])
    assert gold(data) == {"1": ("Nine",), "2": (), "3": (), "4": ()}
    assert data.titles == {"Nine": "Nine"}


@pytest.mark.parametrize("provenance", [["Nine"], "Nine", 5, {"wikipedia_id": "9"}, [None]])
def test_kilt_provenance_of_another_form_is_a_bad_row(read, provenance):
    refuses([KILT, {**KILT, "id": "m", "output": [{"answer": "A", "provenance": provenance}]}], read, line=2)


def test_rows_of_two_formats_are_refused(read):
    refuses([ROW, PASSAGE], read, "multihop", "passages", line=2)
    refuses([{"prompt": "Q?"}], read, "prompt", "multihop")


# --- ids, answers, positions -------------------------------------------------------------------------------------


def test_ids_are_texts_and_default_to_the_line(read):
    rows = [{**ROW, "id": value} for value in (0, "x", None, "\u00e9\u6771")]
    assert [question.id for question in read([b"", *rows]).questions] == ["0", "x", "4", "\u00e9\u6771"]


@pytest.mark.parametrize("value", ["", "  ", True, 1.0, float("nan"), ["a"], {}])
def test_an_id_that_is_no_text_or_whole_number_is_refused(read, value):
    refuses([{**ROW, "id": value}], read, "`id`")


@pytest.mark.parametrize("ids", [("a", "a"), (1, "1"), ("2", None)])
def test_an_id_twice_is_refused_and_both_places_are_named(read, ids):
    refuses([{**ROW, "id": value} for value in ids], read, repr(str(ids[0])), "rows.jsonl:1", line=2)


def test_an_id_twice_in_one_passage_is_refused(read):
    pair = {"id": "same", "question": "Q?", "answers": ["x"]}
    refuses([{**PASSAGE, "qas": [pair, {**pair, "question": "R?"}]}], read, "'same'", "rows.jsonl:1")
    data = read([{**PASSAGE, "qas": [pair, pair]}, ROW], skip_bad_rows=True)
    assert [question.id for question in data.questions] == ["a"] and "body" not in str(data.documents)


@pytest.mark.parametrize(
    "given, expected",
    [
        ("Paris", ("Paris",)),
        (1969, ("1969",)),
        ([1, " a ", "a"], ("1", "a")),
        ([], ()),
        ("\u6771\u4eac", ("\u6771\u4eac",)),
    ],
)
def test_answers_that_can_be_read(read, given, expected):
    assert read([{**ROW, "answers": given}]).questions[0].answers == expected


@pytest.mark.parametrize("given", ["", " ", [""], ["a", None], True, float("nan"), {"text": "a"}, [["a"]]])
def test_answers_that_cannot_be_read_are_named(read, given):
    refuses([ROW, {**ROW, "id": "b", "answers": given}], read, "answers", line=2)


def test_a_row_without_answers_is_told_so_wherever_it_stands(read):
    for rows, line in (([{**ROW, "answers": None}], 1), ([ROW, {**ROW, "id": "b", "answers": None}], 2)):
        refuses(rows, read, "must have one of `answers`", line=line)


@pytest.mark.parametrize("given", [2, -1, [0, 2], "0", True, 1.0, float("nan"), [None]])
def test_pos_index_out_of_its_documents_is_refused(read, given):
    refuses([{**ROW, "pos_index": given}], read, "`pos_index`")


@pytest.mark.parametrize("field", [{"question": ""}, {"question": 5}, {"question": ["Q?"]}, {"docs": [""]}])
@pytest.mark.parametrize("more", [{}, {"docs": [float("nan"), "x"]}, {"docs": [{"title": "T"}, "x"]}])
def test_texts_that_are_none_are_refused(read, field, more):
    refuses([ROW, {**ROW, "id": "b", **field, **more}], read, line=2)


@pytest.mark.parametrize("docs", [5, True, {"title": "T"}, [7]])
@pytest.mark.parametrize("base", [ROW, FLASH])
def test_documents_of_another_form_are_refused(read, base, docs):
    refuses([{**base, "docs": docs}], read)


def test_keys_that_are_not_known_do_not_matter(read):
    data = read([{**ROW, "_id": "mongo", "metadata": {"x": 1}, "type": "bridge"}])
    assert data.format == "multihop" and data.questions[0].gold == ("1",)
    refuses([{"_id": "5a", "query": "Q?"}], read)


# --- files ---------------------------------------------------------------------------------------------------------


def test_bom_crlf_and_blank_lines_change_nothing_but_the_lines(read):
    plain = read([ROW])
    data = read([b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r", b"\r", b"  "])
    assert (data.questions[0].id, data.documents) == (plain.questions[0].id, plain.documents)
    assert read([b"", b"", ROW | {"id": None}]).questions[0].id == "3"


def test_jsonl_gz_and_parquet_read_alike(write, tmp_path):
    rows = [ROW, {**ROW, "id": "b", "pos_index": None, "answers": ["\u6771\u4eac"]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    write(rows), write(rows, "rows.jsonl.gz")
    read = [read_data(str(tmp_path / name)) for name in ("rows.jsonl", "rows.jsonl.gz", "rows.parquet")]
    seen = [([(q.id, q.text, q.answers, q.candidates, q.gold) for q in d.questions], d.documents) for d in read]
    assert seen[0] == seen[1] == seen[2]
    assert [data.questions[1].place.rpartition(":")[2] for data in read] == ["2"] * 3


def test_the_hash_is_of_the_bytes_and_of_nothing_else(write, tmp_path):
    path = write([ROW])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_data(str(path)).sha256 == read_data(str(path), limit=1).sha256 == digest
    assert read_data(str(path.rename(tmp_path / "other.jsonl"))).sha256 == digest
    assert read_data(str(write([ROW, b""]))).sha256 != digest


def test_files_that_are_not_there_or_empty(write, tmp_path):
    for name in ("none.jsonl", "none.parquet"):
        with pytest.raises(FileNotFoundError, match=f"{name}` must be a file.*Correct"):
            read_data(str(tmp_path / name))
    for rows in ([], [b"", b" "], [{"text": "unasked", "qas": []}]):
        with pytest.raises(ValueError, match="rows.jsonl must have at least one question"):
            read_data(str(write(rows)))
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="corpus.jsonl"):
        read_data(str(tmp_path / "folder"))


@pytest.mark.parametrize(
    "name, content",
    [
        ("rows.jsonl.gz", gzip.compress(to_bytes([ROW]), mtime=0)[:20]),
        ("rows.jsonl.gz", b"plain"),
        ("rows.parquet", b"none"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read_data(str(tmp_path / name))


def test_a_parquet_file_without_rows_is_a_file_without_questions(tmp_path):
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="rows.parquet"):
        read_data(str(tmp_path / "rows.parquet"))


def test_a_file_of_another_kind_is_not_looked_for_on_the_hub(tmp_path):
    (tmp_path / "rows.csv").write_text("question,answers\nQ?,A\n")
    with pytest.raises((ValueError, OSError), match=r"(?s)rows\.csv.*\.jsonl"):
        read_data(str(tmp_path / "rows.csv"))


BAD_LINES = [
    b"{",
    b"[1]",
    b"\xff{}",
    b'{"question": "\\ud800", "answers": ["a"]}',
    b'{"question": "Q?", "answers": NaN}',
]


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_and_left_out_on_demand(read, line):
    refuses([ROW, line, {**ROW, "id": "c"}], read, line=2)
    data = read([ROW, line, {**ROW, "id": "c"}], skip_bad_rows=True)
    assert [question.id for question in data.questions] == ["a", "c"]
    (rejected,) = data.rejected
    assert rejected["place"].endswith("rows.jsonl:2") and rejected["reason"]


def test_a_rejected_row_leaves_no_documents_behind(read):
    data = read([ROW, {**ROW, "docs": ["three"], "pos_index": [0]}, {**PASSAGE, "qas": 3}], skip_bad_rows=True)
    assert len(data.rejected) == 2 and list(data.documents) == ["0", "1"]


def test_the_number_of_bad_rows_is_told_and_three_are_named(read):
    with pytest.raises(ValueError, match=r"^5 row\(s\) cannot be used") as error:
        read([b"{"] * 5)
    assert [f"rows.jsonl:{n} " in str(error.value) for n in range(1, 6)] == [True] * 3 + [False] * 2


def test_data_that_nothing_can_be_scored_on_is_refused_unless_abstaining_counts(read):
    rows = [{"id": "a", "question": "Q?", "answers": [], "docs": ["one"]}]
    with pytest.raises(ValueError, match="neither.*rows.jsonl:1"):
        read(rows)
    assert len(read(rows, may_abstain=True).questions) == 1
    assert len(read([{**rows[0], "pos_index": [0]}]).questions) == 1

"""Predictions of other systems and the command: exact rows, errors with their line, results.json whole or none."""

import hashlib
import json
from pathlib import Path

import pytest
from evaluation_runs import read_rows, results, write_rows

from recipes.evaluation.external import read_predictions
from recipes.evaluation.formats import Question
from recipes.evaluation.run import prediction_row
from recipes.evaluation.tasks import Task

ROWS = [
    {"id": 1, "question": "Where?", "answers": ["Paris"], "docs": ["one", "two", "three"], "pos_index": [1]},
    {"id": "b", "question": "Who?", "answers": ["Ada"], "docs": ["two", "four", "two"], "pos_index": [0]},
    {"id": "c", "question": "Why?", "answers": [], "docs": ["one"]},
]
PREDICTIONS = [
    {"id": "c", "prediction": None, "abstained": True},
    {"id": "1", "prediction": " paris ", "retrieved": [1, 0, "far"], "n_tokens": 12},
    {"id": "b", "prediction": None, "failure": "timeout: 3 s"},
]
QUESTIONS = [
    Question("1", "Where?", ("Paris",), ("0", "1", "2"), ("1",), "rows.jsonl:1"),
    Question("b", "Who?", ("Ada",), ("1", "3", "1"), ("1",), "rows.jsonl:2"),
    Question("c", "Why?", (), (), (), "rows.jsonl:3"),
]
TASKS = [Task(question, tuple(dict.fromkeys(question.candidates)), question.gold) for question in QUESTIONS]
FAILED = [{"id": name, "prediction": None, "failure": "x"} for name in (1, "b", "c")]


@pytest.fixture
def read(tmp_path):
    """`read(rows, name)` writes a file of predictions and reads it."""
    return lambda rows, name="theirs.jsonl": read_predictions(write_rows(tmp_path / name, rows), TASKS)


def test_rows_come_in_the_order_of_the_data(read):
    first, *others = [json.dumps(row).encode() + b"\r" for row in PREDICTIONS]
    with_bom_and_blank_lines = read([b"\xef\xbb\xbf" + first, b"\r", b"", *others])
    for rows in (read(PREDICTIONS), read(PREDICTIONS, "theirs.jsonl.gz"), with_bom_and_blank_lines):
        assert rows == [
            prediction_row("1", prediction="paris", retrieved=["1", "0", "far"], n_tokens=12),
            prediction_row("b", failure="timeout: 3 s"),
            prediction_row("c", abstained=True),
        ]


@pytest.mark.parametrize(
    "name, given, expected",
    [
        ("1", None, []),
        ("1", [], []),
        ("1", [2, 0, 2], ["2", "0"]),  # each once, at its best place
        ("1", ["far away", 1, "\u6771"], ["far away", "1", "\u6771"]),
        ("b", [2, 1, 0], ["1", "3"]),  # the row repeats a document: its places are one
        ("c", ["0", 5, "7"], ["0", "5", "7"]),  # without documents in the row, numbers are ids
    ],
)
def test_retrieved_documents_by_id_and_by_place(read, name, given, expected):
    others = [row for row in PREDICTIONS if row["id"] != name]
    rows = read([*others, {"id": name, "prediction": "x", "retrieved": given}])
    assert [row["retrieved"] for row in rows if row["id"] == name] == [expected]


def test_an_empty_text_beside_its_reason_is_no_prediction(read):
    for given in ({"prediction": "", "abstained": True}, {"prediction": " ", "failure": "x"}):
        row = read([*PREDICTIONS[1:], {"id": "c", **given}])[2]
        assert row["prediction"] is None and (row["abstained"], row["failure"]) != (False, None)


X = {"id": "b", "prediction": "x"}
BAD = [
    (b"{", "JSON"),
    ({"prediction": "x"}, "`id`"),
    ({**X, "id": 1.0}, "`id`"),
    ({**X, "id": "z"}, "'z'"),
    ({**X, "id": "b "}, "'b '"),
    ({"id": "b"}, "one of `prediction`, `abstained` and `failure`"),
    ({**X, "prediction": " \n"}, "empty prediction"),
    ({**X, "abstained": True}, "one of"),
    ({**X, "failure": "y"}, "one of"),
    ({"id": "b", "prediction": None, "abstained": True, "failure": "y"}, "one of"),
    ({**X, "prediction": 5}, "`prediction`, got 5"),
    ({"id": "b", "abstained": 1}, "`abstained`"),
    ({"id": "b", "failure": ""}, "`failure`"),
    ({"id": "b", "failure": True}, "`failure`"),
    ({"id": "b", "failure": "a\nb"}, "printable text of one line"),
    (b'{"id": "b", "failure": "\\ud800"}', "printable text of one line"),
    ({**X, "answer": "x"}, "'answer'"),
    ({**X, "n_tokens": -1}, "`n_tokens`"),
    ({**X, "n_tokens": 1.5}, "`n_tokens`"),
    ({**X, "n_tokens": True}, "`n_tokens`"),
    ({**X, "retrieved": "1"}, "`retrieved`"),
    ({**X, "retrieved": [3]}, "from 0 to 2"),
    ({**X, "retrieved": [-1]}, "from 0 to 2"),
    ({**X, "retrieved": ["1"]}, "as numbers"),  # a place or an id?
    ({**X, "retrieved": [0.0]}, "`retrieved`"),
    ({**X, "retrieved": [True]}, "`retrieved`"),
    ({**X, "retrieved": [None]}, "`retrieved`"),
]


@pytest.mark.parametrize("row, named", BAD)
def test_a_row_that_cannot_be_scored_is_named(read, row, named):
    with pytest.raises(ValueError) as error:
        read([*PREDICTIONS[:2], b"", row])
    assert "theirs.jsonl:4 " in str(error.value) and named in str(error.value)


@pytest.mark.parametrize("twice", ["b", 1])
def test_an_id_twice_names_both_lines(read, twice):
    with pytest.raises(ValueError, match=r"theirs.jsonl:4 .*theirs.jsonl:[23]"):
        read([*PREDICTIONS, {"id": twice, "prediction": "x"}])


def test_what_is_missing_or_bad_is_counted_and_the_first_are_named(read):
    for rows, message in ((PREDICTIONS[1:2], "2 have none, the first is 'b'"), ([], "3 have none, the first is '1'")):
        with pytest.raises(ValueError, match=message):
            read(rows)
    with pytest.raises(ValueError, match=r"^5 row\(s\) of theirs.jsonl") as error:
        read([{"id": f"z{number}"} for number in range(5)])
    assert [f"theirs.jsonl:{n} " in str(error.value) for n in range(1, 6)] == [True] * 3 + [False] * 2


@pytest.fixture
def score(evaluate, tmp_path):
    """`score(*options, data=ROWS, predictions=PREDICTIONS, expect=0)`: what the command prints; rows or paths."""

    def run(*options, data=ROWS, predictions=PREDICTIONS, **more) -> str:
        given = {"rows": data, "theirs": predictions}
        paths = [
            rows if isinstance(rows, Path) else write_rows(tmp_path / f"{name}.jsonl", rows)
            for name, rows in given.items()
        ]
        return evaluate(
            *options, model=None, memories=None, data=paths[0], predictions=paths[1], name="theirs", **more
        )

    return run


def test_scores_of_another_system(score, tmp_path):
    printed = score("--url", "https://example.org/x", "--seed", "3")
    assert "| theirs |" in printed and printed.endswith("results.json\n")  # nothing on standard error
    content = results(tmp_path / "run")
    counts = {"questions": 3, "answered": 1, "abstained": 1, "failed": 1, "without_answers": 1, "without_gold": 1}
    assert content["counts"] == counts and content["failures"] == {"timeout": 1}
    values = {name: (metric["value"], metric["n"]) for name, metric in content["metrics"].items()}
    expected = {"em": (0.5, 2), "f1": (0.5, 2), "containment": (0.5, 2), "abstention": (1.0, 1)}
    expected |= {"recall@1": (0.5, 2), "recall@5": (0.5, 2), "mrr": (0.5, 2), "precision@5": (0.1, 2)}
    assert {name: values[name] for name in expected} == expected
    assert content["system"]["kind"] == "external" and content["system"]["url"] == "https://example.org/x"
    data = {"name": "rows.jsonl", "sha256": hashlib.sha256((tmp_path / "rows.jsonl").read_bytes()).hexdigest()}
    assert content["data"] == {**data, "format": "multihop", "half": None, "questions": 3, "file_questions": 3}
    assert content["model"] == dict.fromkeys(("repo", "revision", "fingerprint", "backbone"))
    assert (content["efficiency"]["tokens_read"], content["efficiency"]["latency_ms"]) == (12.0, None)
    score("--url", "https://example.org/x", "--seed", "3")  # the same command gives the same
    assert results(tmp_path / "run") == content | {"created": results(tmp_path / "run")["created"]}
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    score(predictions=FAILED, expect=1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_without_retrieved_documents_there_are_no_scores_of_retrieval(score, tmp_path):
    score(predictions=[{name: value for name, value in row.items() if name != "retrieved"} for row in PREDICTIONS])
    assert set(results(tmp_path / "run")["metrics"]) == {"em", "f1", "containment", "bag_containment", "abstention"}
    score("--limit", "1", output="first")
    assert results(tmp_path / "first")["counts"]["questions"] == 1


def test_predictions_in_the_output_folder_are_left_as_they_are(score, tmp_path):
    path = write_rows(tmp_path / "run" / "predictions.jsonl", PREDICTIONS)
    before = path.read_bytes()
    for _ in range(2):
        assert "--output" in score(predictions=path, expect=1) and path.read_bytes() == before


def test_rows_that_are_skipped_are_listed(score, tmp_path):
    data = [*ROWS, b"{", {**ROWS[0], "docs": [""]}]
    printed = score(data=data, expect=1)
    assert "rows.jsonl:4 " in printed and "rows.jsonl:5 " in printed and "--skip-bad-rows" in printed
    score("--skip-bad-rows", data=data)
    rejected = read_rows(tmp_path / "run" / "rejected.jsonl")
    assert [row["place"].rpartition("/")[2] for row in rejected] == ["rows.jsonl:4", "rows.jsonl:5"]
    assert results(tmp_path / "run")["counts"]["questions"] == 3
    score("--skip-bad-rows", expect=1)  # other data: refused, and the list of this run stays
    assert read_rows(tmp_path / "run" / "rejected.jsonl") == rejected


FAILING = [
    ({"data": [{"_id": "5", "query": "Q?"}]}, "rows.jsonl:1 "),
    ({"data": []}, "at least one question"),
    ({"data": Path("/nowhere/rows.jsonl")}, "/nowhere/rows.jsonl` must be a file"),
    ({"predictions": Path("/nowhere/theirs.jsonl")}, "/nowhere/theirs.jsonl` must be a file"),
    ({"predictions": [*PREDICTIONS[:2], {"id": "b", "prediction": ""}]}, "theirs.jsonl:3 "),
    ({"predictions": FAILED}, "all 3 questions"),
    ({"setting": "closed_book"}, "must be left out in the setting 'closed_book'"),
    ({"setting": "gold_only"}, "must be left out in the setting 'gold_only'"),
    ({"predictions": [{"id": n, "prediction": "x", "retrieved": ["d_7"]} for n in "1bc"]}, "is 'd_7' of '1'"),
]


@pytest.mark.parametrize("inputs, named", FAILING)
def test_a_command_that_fails_says_why_and_leaves_no_results(score, tmp_path, inputs, named):
    printed = score(**inputs, expect=1)
    assert printed.startswith("error: ") and named in printed and "which is a bug" not in printed
    assert not [path for path in tmp_path.rglob("run/**/*") if "results" in path.name or "partial" in path.name]

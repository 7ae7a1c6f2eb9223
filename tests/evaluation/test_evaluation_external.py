"""Predictions of other systems and the command: exact rows, errors with their line, results.json whole or not there.

The command runs in process; where a model answers it is the tiny one of the session.
"""

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from recipes.evaluation.cli import build_parser, check_arguments, main
from recipes.evaluation.external import read_predictions
from recipes.evaluation.formats import Question
from recipes.evaluation.run import prediction_row
from recipes.evaluation.tasks import Task
from recipes.evaluation.validation import check_results

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


def write(path: Path, rows: list) -> Path:
    content = b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture
def tasks() -> list[Task]:
    questions = [
        Question("1", "Where?", ("Paris",), ("0", "1", "2"), ("1",), "rows.jsonl:1"),
        Question("b", "Who?", ("Ada",), ("1", "3", "1"), ("1",), "rows.jsonl:2"),
        Question("c", "Why?", (), (), (), "rows.jsonl:3"),
    ]
    return [Task(question, tuple(dict.fromkeys(question.candidates)), question.gold) for question in questions]


@pytest.fixture
def read(tmp_path, tasks):
    """`read(rows, name)` writes a file of predictions and reads it."""
    return lambda rows, name="theirs.jsonl": read_predictions(write(tmp_path / name, rows), tasks)


# --- files of predictions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["theirs.jsonl", "theirs.jsonl.gz"])
def test_rows_come_in_the_order_of_the_data(read, name):
    assert read(PREDICTIONS, name) == [
        prediction_row("1", prediction="paris", retrieved=["1", "0", "far"], n_tokens=12),
        prediction_row("b", failure="timeout: 3 s"),
        prediction_row("c", abstained=True),
    ]


def test_bom_crlf_and_blank_lines_change_nothing(read):
    first, *others = [json.dumps(row).encode() + b"\r" for row in PREDICTIONS]
    assert read([b"\xef\xbb\xbf" + first, b"\r", b"", *others]) == read(PREDICTIONS)


@pytest.mark.parametrize(
    "given, expected",
    [
        (None, []),
        ([], []),
        ([2, 0, 2], ["2", "0"]),  # each once, at its best place
        (["far away", 1, "\u6771"], ["far away", "1", "\u6771"]),
    ],
)
def test_retrieved_documents_by_id_and_by_place(read, given, expected):
    rows = [PREDICTIONS[0], {**PREDICTIONS[1], "retrieved": given}, PREDICTIONS[2]]
    assert read(rows)[0]["retrieved"] == expected


def test_places_of_a_document_that_the_row_repeats_are_one_document(read):
    rows = [*PREDICTIONS[:2], {"id": "b", "prediction": "Ada", "retrieved": [2, 1, 0]}]
    assert read(rows)[1]["retrieved"] == ["1", "3"]


@pytest.mark.parametrize("row", [{"prediction": "", "abstained": True}, {"prediction": " ", "failure": "x"}])
def test_an_empty_text_beside_its_reason_is_no_prediction(read, row):
    read_row = read([*PREDICTIONS[1:], {"id": "c", **row}])[2]
    assert read_row["prediction"] is None and (read_row["abstained"], read_row["failure"]) != (False, None)


BAD = [
    (b"{", "JSON"),
    (b"[1]", "JSON object"),
    (b"\xff", "UTF-8"),
    ({"prediction": "x"}, "`id`"),
    ({"id": 1.0, "prediction": "x"}, "`id`"),
    ({"id": float("nan"), "prediction": "x"}, "`id`"),
    ({"id": "z", "prediction": "x"}, "'z'"),
    ({"id": "b "}, "'b '"),
    ({"id": "b"}, "one of `prediction`, `abstained` and `failure`"),
    ({"id": "b", "prediction": ""}, "empty prediction"),
    ({"id": "b", "prediction": " \n"}, "empty prediction"),
    ({"id": "b", "prediction": None}, "empty prediction"),
    ({"id": "b", "prediction": "x", "abstained": True}, "one of"),
    ({"id": "b", "prediction": "x", "failure": "y"}, "one of"),
    ({"id": "b", "prediction": None, "abstained": True, "failure": "y"}, "one of"),
    ({"id": "b", "prediction": float("nan")}, "`prediction`, got nan"),
    ({"id": "b", "prediction": 5}, "`prediction`, got 5"),
    ({"id": "b", "prediction": ["x"]}, "`prediction`"),
    ({"id": "b", "prediction": None, "abstained": "yes"}, "`abstained`"),
    ({"id": "b", "prediction": None, "abstained": 1}, "`abstained`"),
    ({"id": "b", "prediction": None, "failure": ""}, "`failure`"),
    ({"id": "b", "prediction": None, "failure": True}, "`failure`"),
    ({"id": "b", "prediction": "x", "answer": "x"}, "'answer'"),
    ({"id": "b", "prediction": "x", "n_tokens": -1}, "`n_tokens`"),
    ({"id": "b", "prediction": "x", "n_tokens": 1.5}, "`n_tokens`"),
    ({"id": "b", "prediction": "x", "n_tokens": float("nan")}, "`n_tokens`"),
    ({"id": "b", "prediction": "x", "retrieved": "1"}, "`retrieved`"),
    ({"id": "b", "prediction": "x", "retrieved": [3]}, "from 0 to 2"),
    ({"id": "b", "prediction": "x", "retrieved": ["1"]}, "as numbers"),  # a place or an id?
    ({"id": "b", "prediction": "x", "retrieved": [-1]}, "from 0 to 2"),
    ({"id": "b", "prediction": "x", "retrieved": [0.0]}, "`retrieved`"),
    ({"id": "b", "prediction": "x", "retrieved": [True]}, "`retrieved`"),
    ({"id": "b", "prediction": "x", "retrieved": [None]}, "`retrieved`"),
    ({"id": "b", "prediction": "x", "retrieved": [{"id": "1"}]}, "`retrieved`"),
]


@pytest.mark.parametrize("row, named", BAD)
def test_a_row_that_cannot_be_scored_is_named(read, row, named):
    with pytest.raises(ValueError) as error:
        read([*PREDICTIONS[:2], b"", row])
    assert "theirs.jsonl:4 " in str(error.value) and named in str(error.value)


@pytest.mark.parametrize("twice", ["b", "1", 1])
def test_an_id_twice_names_both_lines(read, twice):
    with pytest.raises(ValueError, match=r"theirs.jsonl:4 .*theirs.jsonl:[23]"):
        read([*PREDICTIONS, {"id": twice, "prediction": "x"}])


def test_numbers_are_ids_where_the_question_has_no_documents(read):
    *_, row = read([*PREDICTIONS[1:], {"id": "c", "prediction": "x", "retrieved": [5, "7"]}])
    assert row["retrieved"] == ["5", "7"]


def test_what_is_missing_is_counted_and_the_first_is_named(read):
    with pytest.raises(ValueError, match="2 have none, the first is 'b'"):
        read(PREDICTIONS[1:2])
    with pytest.raises(ValueError, match="3 have none, the first is '1'"):
        read([])


def test_the_number_of_bad_rows_is_told_and_three_are_named(read):
    with pytest.raises(ValueError, match=r"^5 row\(s\) of theirs.jsonl") as error:
        read([{"id": f"z{number}"} for number in range(5)])
    assert [f"theirs.jsonl:{n} " in str(error.value) for n in range(1, 6)] == [True] * 3 + [False] * 2


def test_a_file_that_is_not_there_is_named(tmp_path, tasks):
    with pytest.raises(FileNotFoundError, match="theirs.jsonl` must be a file.*Correct"):
        read_predictions(tmp_path / "theirs.jsonl", tasks)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, capsys):
    """`command(*options, data=..., predictions=...)`: exit status, standard output, errors."""

    def run(*options, data=ROWS, predictions=PREDICTIONS, name="theirs", output="out"):
        data = data if isinstance(data, Path) else write(tmp_path / "rows.jsonl", data)
        arguments = ["--data", str(data), "--output", str(tmp_path / output), "--resamples", "100"]
        if predictions is not None:
            is_path = isinstance(predictions, Path)
            path = predictions if is_path else write(tmp_path / "theirs.jsonl", predictions)
            arguments += ["--predictions", str(path), "--name", name]
        capsys.readouterr()
        status = main([*arguments, *map(str, options)])
        return status, *capsys.readouterr()

    return run


def results_of(folder: Path) -> dict:
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert check_results(content) == []
    return content


def test_scores_of_another_system(command, tmp_path):
    status, shown, errors = command("--url", "https://example.org/x", "--seed", 3)
    assert (status, errors) == (0, "") and "| theirs |" in shown and "results.json" in shown
    content = results_of(tmp_path / "out")
    assert content["counts"] == {
        "questions": 3,
        "answered": 1,
        "abstained": 1,
        "failed": 1,
        "without_answers": 1,
        "without_gold": 1,
    }
    assert content["failures"] == {"timeout": 1}
    values = {name: (metric["value"], metric["n"]) for name, metric in content["metrics"].items()}
    expected = {"em": (0.5, 2), "f1": (0.5, 2), "containment": (0.5, 2), "abstention": (1.0, 1)}
    expected |= {"recall@1": (0.5, 2), "recall@5": (0.5, 2), "mrr": (0.5, 2), "precision@5": (0.1, 2)}
    assert {name: values[name] for name in expected} == expected
    assert content["system"]["kind"] == "external" and content["system"]["url"] == "https://example.org/x"
    digest = hashlib.sha256((tmp_path / "rows.jsonl").read_bytes()).hexdigest()
    assert content["data"] == {
        "name": "rows.jsonl",
        "sha256": digest,
        "format": "multihop",
        "half": None,
        "questions": 3,
        "file_questions": 3,
    }
    assert content["model"] == dict.fromkeys(("repo", "revision", "fingerprint", "backbone"))
    assert (content["efficiency"]["tokens_read"], content["efficiency"]["latency_ms"]) == (12.0, None)


def test_without_retrieved_documents_there_are_no_scores_of_retrieval(command, tmp_path):
    rows = [{name: value for name, value in row.items() if name != "retrieved"} for row in PREDICTIONS]
    assert command(predictions=rows)[0] == 0
    assert set(results_of(tmp_path / "out")["metrics"]) == {"em", "f1", "containment", "bag_containment", "abstention"}


def test_the_same_command_gives_the_same_again(command, tmp_path):
    assert command()[0] == 0
    first = results_of(tmp_path / "out")
    assert command()[0] == 0
    second = results_of(tmp_path / "out")
    assert first | {"created": None, "command": None} == second | {"created": None, "command": None}


def test_predictions_in_the_output_folder_are_left_as_they_are(command, tmp_path):
    (tmp_path / "out").mkdir()
    path = write(tmp_path / "out" / "predictions.jsonl", PREDICTIONS)
    before = path.read_bytes()
    for _ in range(2):
        status, _, errors = command(predictions=path)
        assert path.read_bytes() == before
        assert status == 0 or "--output" in errors


def test_predictions_do_not_replace_a_run_of_a_model(command, tmp_path):
    (tmp_path / "out").mkdir()
    files = {"run.json": b'{"model": "m"}', "predictions.jsonl": b'{"id": "1"}\n', "results.json": b"{}"}
    for name, content in files.items():
        (tmp_path / "out" / name).write_bytes(content)
    status, _, errors = command()
    assert status == 1 and "--output" in errors
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files


def test_rows_that_are_skipped_are_listed(command, tmp_path):
    data = [*ROWS, b"{", {**ROWS[0], "docs": [""]}]
    status, _, errors = command(data=data)
    assert status == 1 and "rows.jsonl:4 " in errors and "rows.jsonl:5 " in errors and "--skip-bad-rows" in errors
    assert command("--skip-bad-rows", data=data)[0] == 0
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [row["place"].rpartition("/")[2] for row in rejected] == ["rows.jsonl:4", "rows.jsonl:5"]
    assert results_of(tmp_path / "out")["counts"]["questions"] == 3
    assert command("--skip-bad-rows")[0] == 1  # other data: refused, and the list of this run stays
    assert len((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()) == 2


def test_limit_scores_the_first_questions_alone(command, tmp_path):
    status, _, errors = command("--limit", 1)
    assert (status, errors) == (0, "")
    assert results_of(tmp_path / "out")["counts"]["questions"] == 1


FAILING = [
    (["--setting", "Normal"], {}, "`setting` must be one of normal"),
    (["--model", "x"], {}, "not both"),
    ([], {"predictions": None}, "--model or --predictions"),
    ([], {"name": ""}, "--name"),
    ([], {"name": " "}, "--name"),
    ([], {"name": "x" * 101}, "--name"),
    (["--url", "example"], {}, "--url"),
    (["--limit", "0"], {}, "--limit must be >= 1"),
    (["--seed", "-1"], {}, "--seed"),
    (["--resamples", "1"], {}, "--resamples must be >= 100"),
    (["--systems", "clara", "clara"], {}, "--systems"),
    (["--systems", "nothing"], {}, "--systems"),
    (["--codec", "int3"], {}, "--codec"),
    (["--corpus", "x"], {}, "--corpus has no effect with --predictions"),
    ([], {"data": [{"_id": "5", "query": "Q?"}]}, "rows.jsonl:1 "),
    ([], {"data": []}, "at least one question"),
    ([], {"data": Path("/nowhere/rows.jsonl")}, "/nowhere/rows.jsonl` must be a file"),
    ([], {"predictions": Path("/nowhere/theirs.jsonl")}, "/nowhere/theirs.jsonl` must be a file"),
    ([], {"predictions": [*PREDICTIONS[:2], {"id": "b", "prediction": ""}]}, "theirs.jsonl:3 "),
    ([], {"predictions": [{"id": n, "prediction": None, "failure": "x"} for n in (1, "b", "c")]}, "all 3 questions"),
    ([], {"predictions": [*PREDICTIONS[:2], b'{"id": "b", "failure": "\\ud800"}']}, "theirs.jsonl:3 "),
]


@pytest.mark.parametrize("options, inputs, named", FAILING)
def test_a_command_that_fails_says_why_and_leaves_no_results(command, tmp_path, options, inputs, named):
    status, shown, errors = command(*options, **inputs)
    assert (status, shown) == (1, "") and errors.startswith("error: ") and named in errors
    assert "which is a bug" not in errors
    left = list((tmp_path / "out").glob("**/*")) if (tmp_path / "out").exists() else []
    assert [path.name for path in left if "results" in path.name or "partial" in path.name] == []


def test_a_command_that_fails_leaves_what_was_written_before(command, tmp_path):
    assert command()[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert command(predictions=[{"id": n, "prediction": None, "failure": "x"} for n in (1, "b", "c")])[0] == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_threshold_that_is_no_number_is_refused(value):
    arguments = build_parser().parse_args(["--data", "x", "--output", "y", "--model", "m", "--min-score", value])
    with pytest.raises(ValueError, match="--min-score"):
        check_arguments(arguments)


@pytest.mark.parametrize("option", ["--memory-size", "--retrieval-memory-size"])
def test_a_memory_of_no_vectors_is_refused(command, checkpoint, option):
    status, _, errors = command("--model", checkpoint, option, 0, predictions=None)
    assert status == 1 and "memory_size" in errors.replace("-", "_")


# --- with a model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def passages(tmp_path_factory) -> Path:
    """30 passages of one word each way, every one asked about; BM25 finds "kilo" in the first ten alone."""
    rows = [
        {"text": f"{'kilo' if n < 10 else 'zulu'} passage {n}", "qas": [{"question": "Kilo?", "answers": [str(n)]}]}
        for n in range(30)
    ]
    return write(tmp_path_factory.mktemp("data") / "passages.jsonl", rows)


@pytest.mark.parametrize("setting", ["normal", "oracle"])
def test_bm25_chooses_candidates_of_passages_and_oracle_adds_the_gold(
    command, checkpoint, passages, tmp_path, setting
):
    options = ["--model", checkpoint, "--systems", "bm25_text", "--setting", setting, "--num-candidates", 4]
    options += ["--max-new-tokens", 1, "--latency-questions", 0, "--top-k", 1]
    status, _, errors = command(*options, data=passages, predictions=None)
    assert (status, errors) == (0, "")
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    chosen = ["0", "1", "2", "3"]
    for n, row in enumerate(lines):
        added = setting == "oracle" and n > 3
        assert sorted(row["retrieved"], key=int) == ([*chosen[:3], str(n)] if added else chosen)
    metrics = results_of(tmp_path / "out")["metrics"]
    assert metrics["recall@5"]["value"] == (1.0 if setting == "oracle" else pytest.approx(4 / 30))
    assert metrics["recall@5"]["n"] == 30

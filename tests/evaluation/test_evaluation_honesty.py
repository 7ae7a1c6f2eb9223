"""Numbers that would be too good, or of something else, without a word: each of them was one once."""

import json
from pathlib import Path

import pytest

from modeling_clara import CompressedCorpus
from recipes.evaluation.cli import main, shown_command
from recipes.evaluation.questions import read_data
from recipes.evaluation.run import prediction_row
from recipes.evaluation.scores import score_questions
from recipes.evaluation.tasks import NOT_THERE, make_tasks

DOCUMENTS = [{"title": f"City {n}", "text": f"The mayor of city {n} is Otto {n}."} for n in range(6)]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def question(number: int, *gold: int) -> dict:
    docs = [f"{document['title']}\n{document['text']}" for document in DOCUMENTS]
    return {"id": f"q{number}", "question": f"Who is the mayor of city {number}?", "answers": [f"Otto {number}"],
            "docs": docs, "pos_index": list(gold)}  # fmt: skip


def run(capsys, *options: str) -> tuple[int, str]:
    capsys.readouterr()
    status = main([*map(str, options), "--latency-questions", "0", "--resamples", "100", "--max-new-tokens", "4"])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_a_corpus_without_the_gold_documents_does_not_score_better(shared_model, checkpoint, tmp_path, capsys, caplog):
    """Two gold documents each, and the corpus has one of them: at most half can be found."""
    data = write(tmp_path / "rows.jsonl", [question(n, n, (n + 1) % 6) for n in (0, 2, 4)])
    CompressedCorpus.build(shared_model, [DOCUMENTS[n] for n in (0, 2, 4)], tmp_path / "corpus", codec="int8")
    options = ("--model", checkpoint, "--data", data, "--setting", "corpus", "--corpus", tmp_path / "corpus")
    status, _ = run(capsys, *options, "--output", tmp_path / "out")
    assert status == 0 and "3 of 6 gold documents are not in the corpus" in caplog.text
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["metrics"]["recall@10"]["value"] == 0.5 and content["options"]["missing_gold"] == 3
    assert content["system"]["codec"] == "int8" and content["corpus"]["documents"] == 3
    status, told = run(capsys, *options, "--codec", "int4", "--output", tmp_path / "other")
    assert status == 1 and "--codec must be left out with --corpus" in told


def test_words_that_bm25_cannot_find_make_no_silent_order(checkpoint, tmp_path, capsys, caplog):
    """A question without any word of the documents: told and counted; its candidates are not the first of the file."""
    rows = [{**document, "qas": []} for document in [{"title": "", "text": f"word{n} same"} for n in range(40)]]
    rows[0]["qas"] = [{"question": "zzz yyy?", "answers": ["x"]}, {"question": "word7?", "answers": ["x"]}]
    rows[1]["qas"] = [{"question": "qqq?", "answers": ["x"]}]
    data = write(tmp_path / "rows.jsonl", rows)
    options = ("--model", checkpoint, "--data", data, "--systems", "closed_book", "bm25_text", "--num-candidates", "5")
    status, _ = run(capsys, *options, "--output", tmp_path / "out")
    assert status == 0 and "BM25 found no word of 2 of 3 questions in the documents" in caplog.text
    lines = (tmp_path / "out" / "baselines" / "bm25-text" / "predictions.jsonl").read_text().splitlines()
    first, second, third = (json.loads(line) for line in lines)
    assert first["scores"] == third["scores"] == [0.0] * 5 and second["scores"][0] > 0
    assert second["retrieved"][0] == "7"
    found = [set(row["retrieved"]) for row in (first, third)]
    assert found[0] != found[1] and {"0", "1", "2", "3", "4"} not in found


def test_documents_alone_measure_no_abstaining(tmp_path):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    write(folder / "corpus.jsonl", [{"_id": "a", "text": "one"}, {"_id": "b", "text": "two"}])
    write(folder / "queries.jsonl", [{"_id": "q", "text": "Which?"}])
    (folder / "qrels" / "test.tsv").write_text("q\ta\t1\n")
    data = read_data(str(folder))
    tasks = make_tasks(data, "corpus", lambda texts, n: [])
    assert "abstention" not in score_questions(tasks, [prediction_row("q", abstained=True)], with_retrieval=False)
    kilt = write(tmp_path / "kilt.jsonl", [{"id": "k", "input": "Q?", "output": [{"provenance": [{"title": "T"}]}]}])
    (found,) = read_data(str(kilt)).questions
    assert not found.asks_answer and found.gold == ("T",)
    (task,) = make_tasks(read_data(str(kilt)), "corpus", lambda texts, n: [], known={})
    assert task.gold == (f"{NOT_THERE}T",)


def test_documents_that_the_data_does_not_know_are_no_ranking(tmp_path, capsys):
    data = write(tmp_path / "rows.jsonl", [question(n, n) for n in range(2)])
    theirs = [{"id": f"q{n}", "prediction": "x", "retrieved": ["doc_7"]} for n in range(2)]
    options = ("--data", data, "--name", "mine", "--output", tmp_path / "out")
    predictions = write(tmp_path / "theirs.jsonl", theirs)
    status = main([*map(str, options), "--predictions", str(predictions)])
    told = capsys.readouterr().err
    assert status == 1 and "has none of them; the first is 'doc_7' of 'q0'" in told
    known = write(tmp_path / "known.jsonl", [{**row, "retrieved": [0]} for row in theirs])
    for setting in ("closed_book", "gold_only"):
        assert main([*map(str, options), "--predictions", str(known), "--setting", setting]) == 1
        assert f"must be left out in the setting '{setting}'" in capsys.readouterr().err
    assert not (tmp_path / "out").joinpath("results.json").exists()


@pytest.mark.parametrize(
    "options, named",
    [
        (["--predictions", "p.jsonl", "--name", "x", "--codec", "int8"], "--codec has no effect with --predictions"),
        (["--predictions", "p.jsonl", "--name", "x", "--top-k", "3"], "--top-k has no effect with --predictions"),
        (["--model", "m", "--url", "https://a.org"], "--url has no effect with --model"),
        (["--model", "m", "--dtype", "foo"], "--dtype must be a torch dtype"),
        (["--model", "m", "--setting", "gold_only", "--systems", "clara", "bm25_text"], "nothing to rank"),
        (["--model", "m", "--setting", "gold_only", "--systems", "clara", "hybrid"], "nothing to rank"),
    ],
)
def test_options_without_effect_are_refused(capsys, options, named):
    assert main(["--data", "d.jsonl", "--output", "o", *options]) == 1
    assert named in capsys.readouterr().err and not Path("o").exists()


def test_gold_only_claims_no_ranking(checkpoint, tmp_path, capsys):
    data = write(tmp_path / "rows.jsonl", [question(n, n, n + 1) for n in range(3)])
    options = ("--model", checkpoint, "--data", data, "--setting", "gold_only", "--systems", "all")
    status, _ = run(capsys, *options, "--output", tmp_path / "out")
    assert status == 0
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["system"]["retriever"] is content["system"]["top_k"] is None
    assert not [name for name in content["metrics"] if "@" in name]
    assert {row["system"] for row in content["comparisons"]} == {
        "clara-expand", "text", "closed-book", "closed-book-backbone", "wrong-memory"
    }  # fmt: skip


def test_a_command_tells_no_paths_of_a_machine():
    shown = shown_command(["--model", "/home/me/models/clara", "--data", "data/q.jsonl", "--limit", "3"])
    assert shown == "python -m recipes.evaluate --model clara --data data/q.jsonl --limit 3"

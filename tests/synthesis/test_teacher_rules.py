"""The loopback teacher itself: what it says is right unless it was planted, and it knows one from the other."""

import json

import pytest
import teacher_rules
from teacher_rules import TASKS, Settings, is_supported, sentences

PAIRS = {
    "type": "object",
    "properties": {
        "pairs": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "question": {"type": "string"},
                    "answer": {"type": "string"},
                    "answers": {"type": "array", "items": {"type": "string"}},
                },
            },
        }
    },
}
TOWNS = ["Arvik", "Bremnes", "Corvo", "Dunholm"]
RIVERS = ["Elva", "Flin", "Grava"]


def document(number: int) -> str:
    town, river = TOWNS[number % 4], RIVERS[number % 3]
    return (
        f"{town} is a town on the {river}. The bridge was built in {1800 + number}. "
        f"It had {number + 2},{500 + number} inhabitants in {1990 + number % 20}. "
        f"The {river} rises in the hills of {TOWNS[(number + 1) % 4]}."
    )


def say(task: str, schema: dict, prompt: str, planted: list | None = None, **settings):
    return json.loads(
        teacher_rules.answer(task, schema, prompt, Settings(**settings), [] if planted is None else planted)
    )


@pytest.mark.parametrize("task", ["simple_pairs", "complex_pairs"])
def test_pairs_are_right_unless_planted(task):
    kinds = set()
    for number in range(60):
        text, planted = document(number), []
        prompt = f"<document>\n{text}\n</document>"
        pairs = say(task, PAIRS, prompt, planted, wrong_every=3)["pairs"]
        assert len(pairs) == (4 if task == "simple_pairs" else 3)
        wrong = {(pair["question"], pair["answer"]) for pair in planted}
        for pair in pairs:
            key = pair["question"], pair["answer"]
            assert is_supported(text, *key) == (key not in wrong) and pair["answers"] == [pair["answer"]]
            verdict = f"{prompt}<question>{key[0]}</question><answer>{key[1]}</answer>"
            schema = {"type": "object", "properties": {"supported": {"type": "boolean"}}}
            assert say("verdict", schema, verdict)["supported"] == (key not in wrong)
        kinds |= {pair["kind"] for pair in planted}
        assert say(task, PAIRS, prompt, wrong_every=3)["pairs"] == pairs
    assert kinds == {"wrong number", "swapped entity", "invented"}


def test_what_is_left_out_is_found_and_asked_for():
    for number in range(20):
        prompt = f"<document>\n{document(number)}\n</document>"
        pairs = say("simple_pairs", PAIRS, prompt, skip_every=3)["pairs"]
        given = "\n".join(f"{pair['question']} -> {pair['answer']}" for pair in pairs)
        schema = {"type": "object", "properties": {"missing": {"type": "array", "items": {"type": "string"}}}}
        missing = say("coverage", schema, f"{prompt}<pairs>{given}</pairs>")["missing"]
        assert len(missing) == 4 - len(pairs)
        if not missing:
            continue
        facts = "\n".join(missing)
        more = say("simple_pairs", PAIRS, f"{prompt}<facts>{facts}</facts>", skip_every=3)["pairs"]
        given += "".join(f"\n{pair['question']} -> {pair['answer']}" for pair in more)
        assert say("coverage", schema, f"{prompt}<pairs>{given}</pairs>")["missing"] == []


def test_paraphrases_are_right_unless_planted():
    schema = {"type": "object", "properties": {"paraphrase": {"type": "string"}}}
    verdict = {"type": "object", "properties": {"added": {"type": "array"}, "lost": {"type": "array"}}}
    kinds = set()
    for number in range(40):
        planted, prompt = [], f"<document>\n{document(number)}\n</document>"
        text = say("paraphrase", schema, prompt, planted, wrong_every=2)["paraphrase"]
        found = say("paraphrase_verdict", verdict, f"{prompt}<paraphrase>{text}</paraphrase>")
        kind = planted[0]["kind"] if planted else "copied"  # which another check has to find
        assert {name for name, entries in found.items() if entries} == {"copied": set()}.get(kind, {kind})
        assert (text == document(number)) == (bool(planted) and kind == "copied")
        kinds |= {entry["kind"] for entry in planted}
    assert kinds == {"added", "lost", "copied"}


def test_questions_over_documents_are_answered_where_the_documents_say_it():
    first, second, third = (f"<document>{document(number)}</document>" for number in range(3))
    text = {"type": "object", "properties": {"question": {"type": "string"}}}
    question = say("instruct_question", text, first + second)["question"]
    answer = {
        "type": "object",
        "properties": {"answerable": {"type": "boolean"}, "answer": {"type": ["string", "null"]}},
    }
    asked = f"<question>{question}</question>"
    assert say("teacher_answer", answer, third + second + first + asked) == {
        "answerable": True,
        "answer": "a town on the Elva; a town on the Flin",
    }
    assert say("teacher_answer", answer, third + asked) == {"answerable": False, "answer": None}
    alone = say("retrieval_question", text, first)["question"]
    assert alone in {teacher_rules.pair_of(sentence)["question"] for sentence in sentences(document(0))}


def test_every_task_has_a_rule():
    assert all(callable(getattr(teacher_rules.Rules, task)) for task in TASKS)

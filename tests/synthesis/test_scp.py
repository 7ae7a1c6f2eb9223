"""Stage 1 of documents, end to end: what is accepted is supported, what is not is a reject, nothing gets lost."""

import asyncio
import json
from collections import Counter

import pytest
from rule_teacher import RuleTeacher, documents, run
from teacher_rules import is_supported
from teacher_server import TeacherServer

from modeling_clara.synthesis.ask import Asker
from modeling_clara.synthesis.backends import Endpoint
from modeling_clara.synthesis.checks import run_checks
from modeling_clara.synthesis.client import BadRequest, OutOfBudget, Teacher
from modeling_clara.synthesis.leakage import LeakageGuard
from modeling_clara.synthesis.scp import Settings, synthesize

FAULTS = {"429": 7, "500": 11, "broken": 5, "truncated": 9, "fenced": 4}


def pairs_of(outcome) -> list[tuple]:
    return [(pair["question"], pair["answers"][0]) for pair in outcome.record["qas"]] if outcome.record else []


def kinds_of(outcome) -> Counter:
    return Counter(reject["kind"] for reject in outcome.rejects)


def assert_accounted(document: dict, outcome) -> None:
    """Everything written is a record's or a reject; accepted pairs are supported, and differ."""
    counts, rejected = Counter(outcome.counts), Counter()
    for reject in outcome.rejects:
        assert set(reject) == {"kind", "reason", "value", "document_id", "round"} and reject["reason"]
        assert reject["document_id"] == document["id"]
        rejected[reject["kind"]] += isinstance(reject["value"], dict)
    kept = Counter(pair["kind"] for pair in outcome.record["qas"]) if outcome.record else Counter()
    for kind in ("simple", "complex"):
        assert counts[f"{kind}_written"] == kept[kind] + rejected[kind]
    assert (outcome.record is None) == (kinds_of(outcome)["document"] == 1)
    known = []
    for question, answer in pairs_of(outcome):
        assert is_supported(document["text"], question, answer)
        assert run_checks(f"{document['title']}\n{document['text']}", question, answer, others=known) == []
        known.append((question, answer))


def test_a_document_becomes_pairs_of_both_kinds_and_a_paraphrase():
    (document,), teacher = documents(1), RuleTeacher()
    outcome = run(synthesize, document, teacher, Settings())
    record = outcome.record
    assert {name: record[name] for name in document} == document and not outcome.rejects
    assert Counter(pair["kind"] for pair in record["qas"]) == {"simple": 5, "complex": 4}
    assert all(pair["round"] == 0 for pair in record["qas"])
    assert record["paraphrase"] and record["paraphrase"] != document["text"]
    assert teacher.tasks == {
        "simple_pairs": 1,
        "complex_pairs": 1,
        "verdict": 9,
        "coverage": 1,
        "paraphrase": 1,
        "paraphrase_verdict": 1,
    }
    assert run(synthesize, document, RuleTeacher(), Settings()) == outcome  # the same once more


def test_end_to_end_on_an_endpoint_that_fails_and_lies():
    rows = documents(10)

    async def all_outcomes(server):
        async with Teacher(Endpoint(server.base_url), "loopback-teacher", backoff=0.01) as teacher:
            asker = Asker(teacher.complete)
            return await asyncio.gather(*(synthesize(row, asker, Settings()) for row in rows))

    with TeacherServer(every=FAULTS, wrong_every=3, skip_every=3) as server:
        outcomes = asyncio.run(all_outcomes(server))
    for document, outcome in zip(rows, outcomes, strict=True):
        assert_accounted(document, outcome)
    wrong = {(pair["document"], pair["question"], pair["answer"]) for pair in server.planted if "question" in pair}
    kept = {(row["text"], *pair) for row, outcome in zip(rows, outcomes, strict=True) for pair in pairs_of(outcome)}
    assert len(wrong) > 10 and not wrong & kept
    spoiled = {plant["paraphrase"] for plant in server.planted if "paraphrase" in plant}
    assert spoiled and spoiled.isdisjoint(outcome.record["paraphrase"] for outcome in outcomes)
    rounds = Counter(pair["round"] for outcome in outcomes for pair in outcome.record["qas"])
    assert rounds[1] > 0 and len(kept) >= 40
    assert set(server.answered.values()) == {1}  # nothing is asked twice


def test_rounds_end_when_nothing_is_uncovered_or_nothing_new_comes():
    (document,) = documents(1)
    skipping = RuleTeacher(skip_every=2)
    outcome = run(synthesize, document, skipping, Settings(paraphrases=0))
    assert {pair["round"] for pair in outcome.record["qas"]} == {0, 1}
    assert outcome.counts["rounds"] == 1 and skipping.tasks["coverage"] == 2 and outcome.counts["facts_uncovered"] == 0
    assert_accounted(document, outcome)
    lying = RuleTeacher(wrong_every=1)  # every pair is wrong, so no round brings anything
    outcome = run(synthesize, document, lying, Settings(paraphrases=0))
    assert outcome.record is None and outcome.counts["rounds"] == 1 and outcome.counts["facts_uncovered"] == 5
    assert [reject["reason"] for reject in outcome.rejects if reject["kind"] == "document"] == ["nothing passed"]
    assert_accounted(document, outcome)


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_there_are_no_more_rounds_than_asked_for(rounds):
    (document,), teacher = documents(1), RuleTeacher(wrong_every=2, skip_every=2)
    outcome = run(synthesize, document, teacher, Settings(rounds=rounds, complex=0, paraphrases=0))
    assert all(pair["round"] <= rounds for pair in (outcome.record or {"qas": []})["qas"])
    assert_accounted(document, outcome)
    assert teacher.tasks["coverage"] <= (rounds + 1 if rounds else 0)


def test_no_more_pairs_are_taken_than_asked_for():
    (document,) = documents(1)
    outcome = run(synthesize, document, RuleTeacher(), Settings(rounds=0, simple=2, complex=0, paraphrases=0))
    assert len(outcome.record["qas"]) == 2
    assert [reject["reason"] for reject in outcome.rejects] == ["too many: more than 2 pairs"] * 3
    assert_accounted(document, outcome)


def test_a_paraphrase_is_tried_again_and_its_failures_are_kept():
    seen = Counter()
    for document in documents(10):
        outcome = run(synthesize, document, RuleTeacher(wrong_every=2), Settings(rounds=0, simple=1, complex=0))
        failed = [reject for reject in outcome.rejects if reject["kind"] == "paraphrase"]
        assert [reject["round"] for reject in failed] == list(range(len(failed)))
        seen.update(reject["reason"].partition(":")[0] for reject in failed)
        seen["passed late"] += bool(outcome.record and outcome.record["paraphrase"] and failed)
    assert seen["copied"] and seen["names"] and seen["passed late"]


def test_the_paper_drops_what_is_not_complete():
    (document,), lying = documents(1), {"wrong_every": 1}
    settings = Settings(complete=True)
    assert run(synthesize, document, RuleTeacher(), settings).record
    outcome = run(synthesize, document, RuleTeacher(**lying), settings)
    assert outcome.record is None
    (reason,) = [reject["reason"] for reject in outcome.rejects if reject["kind"] == "document"]
    assert reason.startswith("incomplete: no pair covers 5 facts, such as: The tower")
    only_paraphrases = run(synthesize, document, RuleTeacher(**lying), Settings(simple=0, complex=0, complete=True))
    assert "no paraphrase passed" in [reject["reason"] for reject in only_paraphrases.rejects][-1]
    mute = RuleTeacher({number: "broken" for number in range(11, 14)})  # the three tries at the coverage
    outcome = run(synthesize, document, mute, settings)
    assert outcome.record is None and kinds_of(outcome) == {
        "coverage": 1,
        "simple": 5,
        "complex": 4,
        "paraphrase": 1,
        "document": 1,
    }


def test_a_leaked_document_costs_no_call(tmp_path):
    (document,), teacher = documents(1), RuleTeacher()
    (tmp_path / "dev.jsonl").write_text(
        json.dumps({"question": "q w e?", "docs": [document["text"]], "answers": ["x"]})
    )
    outcome = run(synthesize, document, teacher, Settings(), guard=LeakageGuard([tmp_path / "dev.jsonl"]))
    assert outcome.record is None and outcome.rejects[0]["reason"] == "leakage: it is in dev.jsonl"
    assert not teacher.options
    question = "When was the tower of Tarn built?"
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question": question.upper(), "answers": ["x"]}))
    outcome = run(synthesize, document, teacher, Settings(), guard=LeakageGuard([tmp_path / "questions.jsonl"]))
    assert question not in [asked for asked, _ in pairs_of(outcome)] and len(pairs_of(outcome)) == 8


@pytest.mark.parametrize("fault", ["broken", "truncated", BadRequest("no")])
def test_a_teacher_that_never_answers_costs_the_document_not_the_run(fault):
    (document,) = documents(1)
    outcome = run(synthesize, document, RuleTeacher(dict.fromkeys(range(99), fault)), Settings())
    assert outcome.record is None and kinds_of(outcome) == {
        "simple": 1,
        "complex": 1,
        "coverage": 1,
        "paraphrase": 3,
        "document": 1,
    }
    assert_accounted(document, outcome)


def test_a_spent_budget_is_no_outcome():
    with pytest.raises(OutOfBudget):
        run(synthesize, documents(1)[0], RuleTeacher({3: OutOfBudget("spent")}), Settings())


@pytest.mark.parametrize("wrong", [{"rounds": -1}, {"simple": 0, "complex": 0, "paraphrases": 0}])
def test_settings_that_ask_for_nothing_are_errors(wrong):
    with pytest.raises(ValueError, match="must be"):
        Settings(**wrong)

"""The benchmark of the checks: errors are planted as they are called, and its command prints what was found."""

import json
import sys

import pytest
from rule_teacher import documents
from teacher_rules import pair_of, sentences
from teacher_server import TeacherServer

from modeling_clara.synthesis.features import words
from recipes.benchmarks import synthesis_checks

ROWS = [
    {
        **row,
        "qas": [{"question": p["question"], "answers": [p["answer"]]} for p in map(pair_of, sentences(row["text"]))],
    }
    for row in documents(10)
]
CLAIMS = synthesis_checks.claims_of(ROWS)


@pytest.mark.parametrize("error", synthesis_checks.ERRORS)
def test_errors_are_planted_where_they_can_be_and_always_the_same(error):
    made = list(synthesis_checks.planted(CLAIMS, error, 8))
    assert 1 <= len(made) <= 8 and made == list(synthesis_checks.planted(CLAIMS, error, 8))
    for (document, _, right), wrong in made:
        strange = set(words(wrong)) - set(words(document))
        assert wrong != right and bool(strange) == (error != "another entity of the document")
        digits = {word for word in strange if word.isdigit()}
        assert bool(digits) == (error in ("wrong number", "invented, with name and year"))


def test_the_command_measures_checks_and_teacher(tmp_path, monkeypatch, capsys):
    passages, output = tmp_path / "passages.jsonl", tmp_path / "report.json"
    passages.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with TeacherServer() as server:
        options = ["--planted", "5", "--teacher", server.base_url, "--model", "rules", "--output", str(output)]
        monkeypatch.setattr(sys, "argv", ["synthesis_checks", str(passages), *options])
        synthesis_checks.main()
    report, text = json.loads(output.read_text()), capsys.readouterr().out
    assert report["pairs"]["n"] == 50 and "50 pairs of 10 passages: 100.0% pass all checks" in text
    for rows, found in (("planted", 3), ("verified", 4)):
        assert [row["alarms"] for row in report[rows]] == [0.0] * 5
        assert sum(row["found"] == 1.0 for row in report[rows]) >= found

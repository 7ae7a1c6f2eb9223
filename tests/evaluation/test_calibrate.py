"""`recipes.evaluation.calibrate`: thresholds of hand-made scores, and a checkpoint that refuses what it was told."""

import argparse
import doctest
import json

import pytest
from evaluation_runs import CAPITALS, PLACES, write_rows

from modeling_clara import CLaRaForRAG
from modeling_clara.text_clara import word_overlap
from recipes.evaluation import abstention, calibrate
from recipes.evaluation.abstention import area_under_curve, share_below, signals, threshold_at, trade_off

TENTHS = [n / 10 for n in range(1, 11)]  # 0.1 to 1.0


def test_examples():
    failed, attempted = doctest.testmod(abstention)
    assert failed == 0 and attempted >= 3


@pytest.mark.parametrize("loss, expected", [(0.0, 0.1), (0.05, 0.1), (0.1, 0.2), (0.3, 0.4), (0.99, 1.0), (1.0, 1.0)])
def test_a_threshold_loses_at_most_what_it_may(loss, expected):
    threshold = threshold_at(TENTHS[::-1], loss)
    assert threshold == expected and share_below(TENTHS, threshold) <= loss
    larger = [score for score in TENTHS if score > threshold]
    assert all(share_below(TENTHS, score) > loss for score in larger)  # none that loses no more is larger
    equal = [0.5, 0.5, 0.5, 0.9]  # lost together or not at all
    assert threshold_at(equal, 0.5) == 0.5 and share_below(equal, 0.5) == 0.0


def test_what_thresholds_refuse_and_lose():
    """Answerable 0.1 to 1.0; of the others half lies below 0.15, and one of four below 0.3."""
    kinds = {"same": [0.1, 0.12, 0.5, 0.9], "other": [0.25, 0.35, 0.45, 0.55]}
    assert trade_off(TENTHS, kinds, (0.0, 0.1, 0.2)) == [
        {"max_loss": 0.0, "threshold": 0.1, "lost": 0.0, "refused": {"same": 0.0, "other": 0.0}},
        {"max_loss": 0.1, "threshold": 0.2, "lost": 0.1, "refused": {"same": 0.5, "other": 0.0}},
        {"max_loss": 0.2, "threshold": 0.3, "lost": 0.2, "refused": {"same": 0.5, "other": 0.25}},
    ]
    for score, threshold in ((0.123456, 0.1234), (-0.123456, -0.1235)):  # rounded down: nothing is lost
        (row,) = trade_off([score, 0.2], {}, (0.0,))
        assert row == {"max_loss": 0.0, "threshold": threshold, "lost": 0.0, "refused": {}}


def test_area_under_the_curve():
    assert area_under_curve([0.9, 0.8], [0.1, 0.2]) == 1.0 and area_under_curve([0.1], [0.9]) == 0.0
    assert area_under_curve([0.5, 0.5], [0.5]) == 0.5 and area_under_curve([0.3, 0.6, 0.9], [0.6]) == 0.5


def test_signals_of_a_question():
    found = signals([[(0.2, 1.0), (0.5, 0.5)], [(0.4, 0.0)]], 0.5)
    assert found == {"cosine": [0.5, 0.4], "with words": [0.75, 0.4]}
    assert signals([[(0.2, 1.0), (0.5, 0.5)]], 0.9)["with words"] == [pytest.approx(1.1)]  # of another source


@pytest.fixture
def files(tmp_path) -> list[str]:
    """`--data` and `--unanswerable`: 12 capitals, and 5 rivers that their passages do not name."""
    answerable = [
        {"question": text, "answers": [f"City {n}"], "docs": CAPITALS[n : min(n + 3, 12)], "pos_index": [0]}
        for n, text in enumerate(f"What is the capital of {place}?" for place in PLACES[:12])
    ]
    without = [
        {"question": f"Which river flows through {place}?", "answers": [], "docs": [CAPITALS[n]]}
        for n, place in enumerate(PLACES[:5])
    ]
    data = write_rows(tmp_path / "capitals.jsonl", [*answerable, without[0]])  # a row without answers is left out
    rivers = write_rows(tmp_path / "rivers.jsonl", [*without, answerable[0]])
    return ["--data", str(data), "--unanswerable", str(rivers)]


def test_a_checkpoint_is_calibrated(checkpoint_copy, shared_model, files, capsys):
    """The command's threshold is that of the sources which `retrieve` gives, and the checkpoint answers by it."""
    options = [str(checkpoint_copy), *files, "--num-candidates", "4", "--max-loss", "0.25"]
    config = checkpoint_copy / "config.json"
    before = config.read_bytes()
    assert calibrate.main(options) == 0
    printed = capsys.readouterr().out
    assert "| cosine | lost of 12 | refused of 5, same subject | refused of 12, other documents |" in printed
    assert "| with words |" in printed and printed.count("| AUC |") == 2 and config.read_bytes() == before
    assert calibrate.main([*options, "--write"]) == 0
    chosen = json.loads((checkpoint_copy / "calibration.json").read_text())
    assert chosen["questions"] == {"answerable": 12, "same subject": 5, "other documents": 12}
    assert chosen["max_loss"] == 0.25 and chosen["lost"] == 0.25 and chosen["data"] == ["capitals.jsonl"]
    written = {"min_score": chosen["min_score"], "overlap_weight": 0.4}
    assert json.loads(config.read_bytes()) == {**json.loads(before), **written}

    data, kept = calibrate.read_questions(files[1], argparse.Namespace(half=None, limit=None), answerable=True)
    asked = calibrate.with_candidates(shared_model, data, kept, 4)
    for (_, names), question in zip(asked, kept, strict=True):
        assert len(set(names)) == 4 and {*question.gold, *question.candidates} <= {*names}
    texts = [text for text, _ in asked]
    documents = [[data.documents[name] for name in names] for _, names in asked]
    best = [
        max(source.score + 0.4 * word_overlap(text, source.text) for source in sources)
        for text, sources in zip(texts, shared_model.retrieve(texts, documents=documents), strict=True)
    ]
    assert chosen["min_score"] == pytest.approx(sorted(best)[3], abs=2e-3)  # float16 memories, four digits
    loaded = CLaRaForRAG.from_pretrained(checkpoint_copy)
    refused = [answer.abstained for answer in loaded.answer(texts, documents=documents, max_new_tokens=1)]
    assert refused == [score < chosen["min_score"] for score in best] and 0 < sum(refused) < len(refused)
    assert calibrate.main([*options, "--write", "--overlap-weight", "0"]) == 0
    alone = json.loads(config.read_bytes())
    assert alone["overlap_weight"] == 0.0 and alone["min_score"] < chosen["min_score"]


def test_training_starts_without_the_threshold_of_its_checkpoint(checkpoint_copy, build):
    """It is of cosines that training changes."""
    path = checkpoint_copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "min_score": 0.5}))
    trainer = build("instruct", model_options={"checkpoint": str(checkpoint_copy)})
    assert trainer.unwrapped.config.min_score is None


def test_other_documents_are_no_candidates():
    asked = [("a", ["1", "2"]), ("b", ["1", "2", "3"]), ("c", ["0", "1", "2", "3", "4"])]
    found = calibrate.with_others(asked, ["0", "1", "2", "3", "4"])
    assert [text for text, _ in found] == ["a", "b"]  # of c all documents are candidates
    for (_, others), (_, own) in zip(found, asked, strict=False):
        assert not {*others} & {*own} and len(others) == len({*others}) == 2
    assert calibrate.with_others(asked, ["0", "1", "2", "3", "4"]) == found


def test_errors_and_files_without_the_wanted_questions(checkpoint, files, capsys):
    swapped = [*files[:2], "--unanswerable", files[1], "--limit", "2"]
    for model, options, message in (
        ("org/nowhere", [*files, "--max-loss", "1"], "--max-loss must be from 0 to below 1, got 1.0"),
        ("org/nowhere", [*files, "--overlap-weight", "nan"], "--overlap-weight must be from 0 to 1, got nan"),
        ("org/nowhere", [*files, "--write", "--limit", "1"], "--write needs a checkpoint in a folder"),
        (str(checkpoint), swapped, "must have questions with `answers: []` and documents"),
    ):
        assert calibrate.main([model, *options]) == 1 and message in capsys.readouterr().err
    assert calibrate.main([str(checkpoint), *files[:2], "--limit", "3"]) == 0  # other documents alone
    assert "same subject" not in capsys.readouterr().out

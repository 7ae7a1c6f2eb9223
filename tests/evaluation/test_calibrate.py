"""`recipes.evaluation.calibrate`: thresholds of hand-made scores, and a checkpoint that refuses what it was told."""

import doctest
import json
from pathlib import Path

import pytest
from results_factory import valid_results

from modeling_clara import CLaRaForRAG
from recipes.evaluation import abstention, calibrate
from recipes.evaluation.abstention import area_under_curve, share_below, signals, threshold_at, trade_off
from recipes.evaluation.report import calibration_text, card_section, update_card

PLACES = "France Germany Italy Spain Norway Egypt Peru Japan India Kenya Chile Cuba".split()
TENTHS = [n / 10 for n in range(1, 11)]  # 0.1 to 1.0


# --- scores ----------------------------------------------------------------------------------------------------------


def test_examples():
    failed, attempted = doctest.testmod(abstention)
    assert failed == 0 and attempted >= 3


@pytest.mark.parametrize("loss, expected", [(0.0, 0.1), (0.05, 0.1), (0.1, 0.2), (0.3, 0.4), (0.99, 1.0), (1.0, 1.0)])
def test_a_threshold_loses_at_most_what_it_may(loss, expected):
    threshold = threshold_at(TENTHS[::-1], loss)
    assert threshold == expected and share_below(TENTHS, threshold) <= loss
    larger = [score for score in TENTHS if score > threshold]
    assert all(share_below(TENTHS, score) > loss for score in larger)  # none that loses no more is larger


def test_equal_scores_are_lost_together_or_not_at_all():
    assert threshold_at([0.5, 0.5, 0.5, 0.9], 0.5) == 0.5 and share_below([0.5, 0.5, 0.5, 0.9], 0.5) == 0.0


def test_what_thresholds_refuse_and_lose():
    """Answerable 0.1 to 1.0; of the others half lies below 0.15, and one of four below 0.3."""
    kinds = {"same": [0.1, 0.12, 0.5, 0.9], "other": [0.25, 0.35, 0.45, 0.55]}
    assert trade_off(TENTHS, kinds, (0.0, 0.1, 0.2)) == [
        {"max_loss": 0.0, "threshold": 0.1, "lost": 0.0, "refused": {"same": 0.0, "other": 0.0}},
        {"max_loss": 0.1, "threshold": 0.2, "lost": 0.1, "refused": {"same": 0.5, "other": 0.0}},
        {"max_loss": 0.2, "threshold": 0.3, "lost": 0.2, "refused": {"same": 0.5, "other": 0.25}},
    ]
    (row,) = trade_off([0.123456, 0.2], {}, (0.0,))
    assert row == {"max_loss": 0.0, "threshold": 0.1234, "lost": 0.0, "refused": {}}  # rounded down: nothing is lost
    (row,) = trade_off([-0.123456, 0.2], {}, (0.0,))
    assert row["threshold"] == -0.1235 and row["lost"] == 0.0


def test_area_under_the_curve():
    assert area_under_curve([0.9, 0.8], [0.1, 0.2]) == 1.0 and area_under_curve([0.1], [0.9]) == 0.0
    assert area_under_curve([0.5, 0.5], [0.5]) == 0.5 and area_under_curve([0.3, 0.6, 0.9], [0.6]) == 0.5


def test_signals_of_a_question():
    found = signals([[0.2, 0.8, 0.2, 0.2, 0.2], [0.4], [0.3, 0.3]])
    assert found["cosine"] == [0.8, 0.4, 0.3]
    assert found["deviations"] == pytest.approx([2.0, 0.0, 0.0])  # (0.8 - 0.32) / 0.24


# --- a model ---------------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path) -> list[str]:
    """`--data` and `--unanswerable`: capitals, and rivers that their passages do not name."""
    docs = [f"{place}\nCity {number} is the capital of {place}." for number, place in enumerate(PLACES)]
    answerable = [
        {"question": f"What is the capital of {place}?", "answers": [f"City {n}"], "docs": docs[n : n + 3][:3],
         "pos_index": [0]}
        for n, place in enumerate(PLACES)
    ]  # fmt: skip
    without = [
        {"question": f"Which river flows through {place}?", "answers": [], "docs": [docs[n]]}
        for n, place in enumerate(PLACES[:5])
    ]
    data = write(tmp_path / "capitals.jsonl", [*answerable, without[0]])  # a row without answers is left out
    return ["--data", str(data), "--unanswerable", str(write(tmp_path / "rivers.jsonl", [*without, answerable[0]]))]


def test_a_checkpoint_is_calibrated(checkpoint_copy, shared_model, files, capsys):
    """The command's threshold is that of the cosines which `retrieve` gives, and the checkpoint answers by it."""
    options = [*files, "--num-candidates", "4", "--max-loss", "0.25"]
    before = (checkpoint_copy / "config.json").read_bytes()
    assert calibrate.main([str(checkpoint_copy), *options]) == 0
    printed = capsys.readouterr().out
    assert "| cosine | lost of 12 | refused of 5, same subject | refused of 12, other documents |" in printed
    assert "| deviations |" in printed and printed.count("| AUC |") == 2
    assert (checkpoint_copy / "config.json").read_bytes() == before
    assert calibrate.main([str(checkpoint_copy), *options, "--write"]) == 0
    chosen = json.loads((checkpoint_copy / "calibration.json").read_text())
    assert chosen["questions"] == {"answerable": 12, "same subject": 5, "other documents": 12}
    assert chosen["max_loss"] == 0.25 and chosen["lost"] == 0.25 and chosen["data"] == ["capitals.jsonl"]
    after = json.loads((checkpoint_copy / "config.json").read_text())
    assert after == {**json.loads(before), "min_score": chosen["min_score"]}

    data, kept = calibrate.read_questions(files[1], namespace(), answerable=True)
    asked = calibrate.with_candidates(shared_model, data, kept, 4)
    best = []
    for (text, names), question in zip(asked, kept, strict=True):
        assert len(set(names)) == 4 and {*question.gold, *question.candidates} <= {*names}
        (ranked,) = shared_model.retrieve([text], documents=[data.documents[name] for name in names], top_k=1)
        best.append(ranked[0].score)
    assert chosen["min_score"] == pytest.approx(sorted(best)[3], abs=2e-3)  # float16 memories, four digits
    loaded = CLaRaForRAG.from_pretrained(checkpoint_copy)
    texts = [text for text, _ in asked]
    documents = [[data.documents[name] for name in names] for _, names in asked]
    refused = [answer.abstained for answer in loaded.answer(texts, documents=documents, max_new_tokens=1)]
    assert refused == [score < chosen["min_score"] for score in best]


def test_training_starts_without_the_threshold_of_its_checkpoint(checkpoint_copy, build):
    """It is of cosines that training changes."""
    path = checkpoint_copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "min_score": 0.5}))
    trainer = build("instruct", model_options={"checkpoint": str(checkpoint_copy)})
    assert trainer.unwrapped.config.min_score is None


def namespace(**changes):
    return type("Arguments", (), {"half": None, "limit": None, **changes})


def test_other_documents_are_no_candidates():
    asked = [("a", ["1", "2"]), ("b", ["1", "2", "3"]), ("c", ["0", "1", "2", "3", "4"])]
    found = calibrate.with_others(asked, ["0", "1", "2", "3", "4"])
    assert [text for text, _ in found] == ["a", "b"]  # of c all documents are candidates
    for (_, others), (_, own) in zip(found, asked, strict=False):
        assert not {*others} & {*own} and len(others) == len({*others}) == 2
    assert calibrate.with_others(asked, ["0", "1", "2", "3", "4"]) == found


@pytest.mark.parametrize(
    "options, message",
    [
        (["--max-loss", "1"], "--max-loss must be from 0 to below 1, got 1.0"),
        (["--write", "--limit", "1"], "--write needs a checkpoint in a folder"),
    ],
)
def test_errors(files, tmp_path, capsys, options, message):
    assert calibrate.main(["org/nowhere", *files, *options]) == 1
    assert message in capsys.readouterr().err


def test_files_without_the_wanted_questions(checkpoint, files, capsys):
    assert calibrate.main([str(checkpoint), *files[:2], "--unanswerable", files[1], "--limit", "2"]) == 1
    assert "must have questions with `answers: []` and documents" in capsys.readouterr().err
    assert calibrate.main([str(checkpoint), *files[:2], "--limit", "3"]) == 0  # other documents alone
    assert "same subject" not in capsys.readouterr().out


# --- the card --------------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_threshold_refuses(tmp_path):
    calibration = {"min_score": 0.4312, "max_loss": 0.05, "lost": 0.045, "refused": {"same subject": 0.31},
                   "questions": {"answerable": 1200, "same subject": 435}, "data": ["hotpotqa.jsonl"],
                   "unanswerable": ["squad2.jsonl"], "half": "first", "num_candidates": 20}  # fmt: skip
    text = calibration_text(calibration)
    assert "cosine of 0.4312" in text and "31.0% of 435 (same subject)" in text and "1,200 answerable" in text
    assert "loses 4.5% (hotpotqa.jsonl, squad2.jsonl, first half; 20 candidates each)" in text
    assert text in card_section([valid_results()], calibration) and text not in card_section([valid_results()])
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    update_card(tmp_path, [valid_results()])
    assert "0.4312" not in (tmp_path / "README.md").read_text()
    (tmp_path / "calibration.json").write_text(json.dumps(calibration))
    update_card(tmp_path, [valid_results()])
    assert text in (tmp_path / "README.md").read_text()

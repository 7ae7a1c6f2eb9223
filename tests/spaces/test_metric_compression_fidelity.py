"""The metric of paraphrases: numbers by value, names by the rule of the card; cases.json has ROUGE."""

import math
import random
import re
import sys
from pathlib import Path

import evaluate
import pytest

from recipes.spaces.metrics.compression_fidelity.compression_fidelity import entities, numbers, score_paraphrase

FOLDER = Path(__file__).parents[2] / "recipes" / "spaces" / "metrics" / "compression_fidelity"
WORDS = "the The river Rivers Paris New York in In 1,200 1200 3.50 7 flows é".split()


@pytest.fixture(scope="module")
def metric() -> evaluate.Metric:
    return evaluate.load(str(FOLDER))


def draw_text(draw: random.Random) -> str:
    return "".join(draw.choice(WORDS) + draw.choice([" ", " ", " ", ", ", ". "]) for _ in range(draw.randint(1, 12)))


def draw_rows(seed: int, count: int = 80) -> tuple[list[str], list[str]]:
    draw = random.Random(seed)
    return [draw_text(draw) for _ in range(count)], [draw_text(draw) for _ in range(count)]


# --- numbers and names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1,200 = 1200 = 1200.0 = 01200", {"1200"}),
        ("3.50 and 3.5", {"3.5"}),
        ("1,234,567.80", {"1234567.8"}),
        ("0.0, 0 and 000", {"0"}),
        (".5 and 0.5", {"0.5"}),
        ("in 1990, 2,0000 and 1,2", {"1990", "2", "0", "1"}),  # no groups of three: separate numbers
        ("1990–1995, 1990-1995", {"1990", "1995"}),
        ("90s, 3rd, 5km, 12%", {"90", "3", "5", "12"}),
        ("H2O, B2B, COVID19", set()),
        ("第3章, 1990年", {"3", "1990"}),
        ("$3.5M, -7, 2024-05-01", {"3.5", "7", "2024", "5", "1"}),
        ("The end is 1990. Then three.", {"1990"}),
        ("no number", set()),
        ("9" * 50 + ".10", {"9" * 50 + ".1"}),  # no rounding
    ],
)
def test_numbers(text, expected):
    assert numbers(text) == expected


@pytest.mark.parametrize("seed", range(3))
def test_a_number_is_found_however_it_is_written(seed):
    draw = random.Random(seed)
    for _ in range(200):
        value, decimals = draw.randrange(10 ** draw.randint(1, 12)), draw.randint(0, 3)
        written = [f"{value}", f"{value:,}", f"{value}.{'0' * decimals}" if decimals else f"0{value}"]
        assert numbers("about " + " or ".join(written) + " metres") == {str(value)}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The Eiffel Tower stands in Paris.", {"eiffel tower", "paris"}),
        ("In Paris, Marie Curie met NASA", {"paris", "marie curie", "nasa"}),
        ("It is here. This is not. I said so.", set()),
        ("Paris\nRome", {"paris", "rome"}),
        ("he read Lord Of The Rings", {"lord of the rings"}),  # function words are dropped at the front only
        ("he lives in The Hague", {"hague"}),
        ("Saint-Denis and Émile Zola", {"saint-denis", "émile zola"}),
        ("France's Paris", {"france", "paris"}),  # only space joins a run
        ("an iPhone of 1990", set()),
        ("Cities are large", {"cities"}),  # nothing says that it is a common word
        ("", set()),
    ],
)
def test_entities(text, expected):
    assert entities(text) == expected


def test_a_common_word_is_dropped_at_the_start_of_a_sentence_only():
    text = "Cities are large. Cities grow; he met Cities"
    assert entities(text, {"cities"}) == entities("he met Cities") == {"cities"}
    assert entities("Large Cities grow. Cities do", {"cities", "large"}) == {"cities"}
    assert entities("Cities grow. Cities do", {"cities"}) == set()


# --- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_swapping_the_texts_swaps_recall_and_precision(seed):
    for prediction, document in zip(*draw_rows(seed), strict=True):
        scores, swapped = score_paraphrase(prediction, document), score_paraphrase(document, prediction)
        assert all(value is None or 0 <= value <= 1 for value in scores.values())
        for thing in ("number", "entity"):
            assert scores[f"{thing}_recall"] == swapped[f"{thing}_precision"]
        assert scores["rouge1"] == pytest.approx(swapped["rouge1"])
        assert scores["rougeL"] <= scores["rouge1"] + 1e-12
        same = score_paraphrase(document, document)
        assert all(value in (None, 1.0) for name, value in same.items()) or not re.search("[a-z0-9]", document.lower())


def test_rows_without_a_measure_are_counted(metric):
    predictions, references = draw_rows(7)
    whole = metric.compute(predictions=predictions, references=references, per_question=True)
    rows = [score_paraphrase(*row) for row in zip(predictions, references, strict=True)]
    assert all(whole[f"{name}_per_question"] == [row[name] for row in rows] for name in rows[0])
    counts = {
        "rows_without_numbers": sum(not numbers(document) for document in references),
        "predictions_without_numbers": sum(not numbers(text) for text in predictions),
        "rows_without_entities": whole["entity_recall_per_question"].count(None),
        "predictions_without_entities": whole["entity_precision_per_question"].count(None),
    }
    assert {name: whole[name] for name in counts} == counts and min(counts.values()) > 0


def test_a_measure_without_rows_is_none_and_never_nan(metric):
    found = metric.compute(predictions=["nothing here", "é 東京"], references=["or there", "東京"], per_question=True)
    for thing, plural in (("number", "numbers"), ("entity", "entities")):
        for kind, rows in (("recall", "rows"), ("precision", "predictions")):
            assert found[f"{thing}_{kind}"] is None and found[f"{rows}_without_{plural}"] == 2
            assert found[f"{thing}_{kind}_per_question"] == [None, None]
    assert found["rouge1"] == found["rougeL"] == 0.0
    flat = [value for values in found.values() for value in (values if isinstance(values, list) else [values])]
    assert not any(isinstance(value, float) and math.isnan(value) for value in flat)
    assert all(value is None or type(value) in (int, float) for value in flat)


def test_bertscore_without_its_package_names_the_package(metric, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bert_score", None)  # as if it were not installed
    with pytest.raises(ImportError, match="needs the package bert_score. Run pip install bert_score"):
        metric.compute(predictions=["a"], references=["b"], bertscore_model=str(tmp_path))

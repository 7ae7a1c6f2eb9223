"""The metric of generated answers against SQuAD's definition written another way, and what it refuses.

Texts are drawn from articles, punctuation and letters in and outside ASCII, joined so that borders fall everywhere.
"""

import doctest
import itertools
import json
import random
import string
from fractions import Fraction
from pathlib import Path

import evaluate
import pytest

from recipes.spaces.metrics.rag_answer import rag_answer
from recipes.spaces.metrics.rag_answer.rag_answer import MEASURES, answer_words, score_answer

FOLDER = Path(__file__).parents[2] / "recipes" / "spaces" / "metrics" / "rag_answer"
CASES = json.loads((FOLDER / "cases.json").read_text(encoding="utf-8"))
PIECES = ["the", "The", "a", "A", "an", "Paris", "paris", "New", "York", "1990", "É", "é", "then", "yes", "True"]
PIECES += ["“", "–", "-", "!", ".", "_", "'s", "ß", "東京", "½", "İ"]
JOINTS = [" ", " ", " ", "", ",", "  ", "\t", "\u00a0", "\n"]
NAN = float("nan")


@pytest.fixture(scope="module")
def metric() -> evaluate.Metric:
    return evaluate.load(str(FOLDER))


def draw_text(draw: random.Random) -> str:
    return "x" * (draw.random() < 0.1) + "".join(
        draw.choice(PIECES) + draw.choice(JOINTS) for _ in range(draw.randint(1, 7))
    )


def draw_rows(seed: int, count: int = 300) -> tuple[list[str], list[list[str]]]:
    draw = random.Random(seed)
    predictions = [draw_text(draw) for _ in range(count)]
    references = [[draw_text(draw) for _ in range(draw.randint(1, 3))] for _ in range(count)]
    for row in range(0, count, 3):  # answers that share words with their gold
        references[row][-1] = predictions[row].upper() if row % 2 else " ".join(predictions[row].split()[::-1]) + " x"
    return predictions, references


# --- SQuAD's definition, character by character ----------------------------------------------------------------------


def squad_words(text: str) -> list[str]:
    """Punctuation vanishes, then each unbroken run of letters and digits that is an article becomes a space."""
    left = [character for character in text.lower() if character not in string.punctuation]
    runs = ("".join(run) for _, run in itertools.groupby(left, str.isalnum))
    return "".join(" " if run in ("a", "an", "the") else run for run in runs).split()


def squad_f1(prediction: str, answer: str) -> Fraction:
    """The harmonic mean of precision and recall, by pairing off equal words; nothing against nothing is right."""
    words, gold = squad_words(prediction), squad_words(answer)
    if not words and not gold:
        return Fraction(1)
    unpaired = list(gold)
    for word in words:
        if word in unpaired:
            unpaired.remove(word)
    shared = len(gold) - len(unpaired)
    if not shared:
        return Fraction(0)
    precision, recall = Fraction(shared, len(words)), Fraction(shared, len(gold))
    return 2 * precision * recall / (precision + recall)


def stands_in(prediction: str, answer: str) -> bool:
    words, gold = squad_words(prediction), squad_words(answer)
    starts = range(len(words) - len(gold) + 1)
    return any(words[start : start + len(gold)] == gold for start in starts) if gold else not words


def all_words_in(prediction: str, answer: str) -> bool:
    booleans = {"True": "yes", "False": "no"}
    words, gold = (squad_words(booleans.get(text, text)) for text in (prediction, answer))
    return all(words.count(word) for word in gold) if gold else not words


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_the_definition(seed):
    for prediction, answers in zip(*draw_rows(seed), strict=True):
        expected = {
            "em": float(any(squad_words(prediction) == squad_words(answer) for answer in answers)),
            "f1": float(max(squad_f1(prediction, answer) for answer in answers)),
            "containment": float(any(stands_in(prediction, answer) for answer in answers)),
            "bag_containment": float(any(all_words_in(prediction, answer) for answer in answers)),
        }
        assert score_answer(prediction, answers) == pytest.approx(expected, abs=1e-12), (prediction, answers)


def test_the_rows_drawn_are_of_every_kind():
    scores = [score_answer(*row) for row in zip(*draw_rows(0), strict=True)]
    for name in MEASURES:
        assert 0.1 < sum(score[name] for score in scores) / len(scores) < 0.9
    assert any(not answer_words(prediction) for prediction in draw_rows(0)[0])


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_a_case_of_the_table(metric, case):
    found = metric.compute(**case["inputs"])
    for name, expected in case["expected"].items():
        assert found[name] == pytest.approx(expected, abs=1e-12), name
    assert case["source"]


# --- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_measures_are_ordered_and_between_0_and_1(seed):
    draw = random.Random(seed)
    for prediction, answers in zip(*draw_rows(seed), strict=True):
        scores = score_answer(prediction, answers)
        assert all(0 <= scores[name] <= 1 for name in MEASURES)
        assert scores["em"] <= scores["f1"] and scores["em"] <= scores["containment"]
        if not {"True", "False"} & {prediction, *answers}:
            assert scores["containment"] <= scores["bag_containment"]
        words = answer_words(prediction)
        shuffled = score_answer(" ".join(draw.sample(words, len(words))) or "!", answers)
        assert shuffled["f1"] == scores["f1"]
        assert score_answer(prediction, answers[::-1]) == scores
        more = score_answer(prediction, [*answers, draw_text(draw)])
        assert all(more[name] >= scores[name] for name in MEASURES)
        swapped = [score_answer(answer, [prediction])["f1"] for answer in answers]
        assert max(swapped) == scores["f1"]  # F1 is symmetric


def test_the_result_does_not_depend_on_the_order_or_on_how_rows_are_added(metric):
    predictions, references = draw_rows(7)
    whole = metric.compute(predictions=predictions, references=references, per_question=True)
    rows = [score_answer(*row) for row in zip(predictions, references, strict=True)]
    assert set(whole) == {*MEASURES, *(f"{name}_per_question" for name in MEASURES)}
    for name in MEASURES:
        assert whole[f"{name}_per_question"] == [row[name] for row in rows]
        assert whole[name] == pytest.approx(sum(row[name] for row in rows) / len(rows), abs=1e-12)
    means = {name: whole[name] for name in MEASURES}
    order = random.Random(7).sample(range(len(predictions)), len(predictions))
    mixed = {
        "predictions": [predictions[row] for row in order],
        "references": [tuple(references[row]) for row in order],
        "ids": [f"q{row}" for row in order],
    }
    assert metric.compute(**mixed) == means
    for start in range(0, 200, 50):
        metric.add_batch(predictions=predictions[start : start + 50], references=references[start : start + 50])
    for prediction, answers in zip(predictions[200:250], references[200:250], strict=True):
        metric.add(prediction=prediction, reference=answers)
    rest = {"predictions": predictions[250:], "references": references[250:], "ids": list(range(len(predictions)))}
    assert metric.compute(**rest) == means


def test_doctests_run():
    assert doctest.testmod(rag_answer) == (0, 3)


# --- what is refused -------------------------------------------------------------------------------------------------

ERRORS = [  # predictions, references, error, its words; the row at fault has the id q1
    (["a", None], [["b"], ["c"]], TypeError, r"`predictions\[1\]` \(id 'q1'\) must be a string, got None.*failure"),
    (["a", NAN], [["b"], ["c"]], TypeError, r"`predictions\[1\]` \(id 'q1'\) must be a string, got nan"),
    (["a", 7], [["b"], ["c"]], TypeError, r"`predictions\[1\]` \(id 'q1'\) must be a string, got 7"),
    (["a", ["b"]], [["b"], ["c"]], TypeError, r"`predictions\[1\]` \(id 'q1'\) must be a string"),
    (["a", ""], [["b"], ["c"]], ValueError, r"`predictions\[1\]` \(id 'q1'\) must not be blank.*count it as failed"),
    (["a", " \n\u00a0"], [["b"], ["c"]], ValueError, r"`predictions\[1\]` \(id 'q1'\) must not be blank"),
    (["a", "\ud800"], [["b"], ["c"]], ValueError, r"`predictions\[1\]` \(id 'q1'\) must be valid Unicode"),
    (["a", "b"], [["b"], []], ValueError, r"`references\[1\]` \(id 'q1'\) must have a gold answer.*leave the row out"),
    (["a", "b"], [["b"], "c"], TypeError, r"`references\[1\]` \(id 'q1'\) must be a list of gold.*got 'c'"),
    (["a", "b"], [["b"], None], TypeError, r"`references\[1\]` \(id 'q1'\) must be a list of gold.*got None"),
    (["a", "b"], [["b"], NAN], TypeError, r"`references\[1\]` \(id 'q1'\) must be a list of gold.*got nan"),
    (["a", "b"], [["b"], ["c", None]], TypeError, r"`references\[1\]` \(id 'q1'\)\[1\] must be a string, got None"),
    (["a", "b"], [["b"], ["c", NAN]], TypeError, r"`references\[1\]` \(id 'q1'\)\[1\] must be a string, got nan"),
    (["a", "b"], [["b"], [3]], TypeError, r"`references\[1\]` \(id 'q1'\)\[0\] must be a string, got 3"),
    (["a", "b"], [["b"], ["c", " "]], ValueError, r"`references\[1\]` \(id 'q1'\)\[1\] must not be blank"),
]


@pytest.mark.parametrize("predictions, references, error, message", ERRORS)
def test_a_row_that_cannot_be_scored_is_named(metric, predictions, references, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        metric.compute(predictions=predictions, references=references, ids=["q0", "q1"])
    without_id = message.replace(r" \(id 'q1'\)", "")
    with pytest.raises(error, match=f"(?s){without_id}"):
        metric.compute(predictions=predictions, references=references)
    with pytest.raises(error, match=f"(?s){without_id}"):  # before Arrow makes text of it
        metric.add_batch(predictions=predictions, references=references)
    with pytest.raises(error, match=f"(?s){without_id}".replace(r"\[1\]`", r"\[0\]`")):
        metric.add(prediction=predictions[1], reference=references[1])
    assert metric.compute(predictions=["a b"], references=[["b"]])["em"] == 1  # none of these rows was kept


@pytest.mark.parametrize(
    "inputs, error, message",
    [
        ({"predictions": ["a"], "references": [["b"], ["c"]]}, ValueError, r"`references` must have one entry per"),
        ({"predictions": [], "references": []}, ValueError, r"at least one row, got 0"),
        ({"predictions": "a", "references": [["b"]]}, TypeError, r"`predictions` must be a list .*got str"),
        ({"predictions": ["a"], "references": "b"}, TypeError, r"`references` must be a list .*got str"),
        ({"predictions": ["a"], "references": None}, TypeError, r"`references` must be a list .*got NoneType"),
        ({"predictions": None, "references": [["b"]]}, TypeError, r"`predictions` must be a list .*got NoneType"),
        ({"ids": ["q", "q"]}, ValueError, r"`ids` must be unique, got 'q' 2 times"),
        ({"ids": ["q"]}, ValueError, r"`ids` must have one entry per row \(2\), got 1"),
        ({"ids": ["q", None]}, TypeError, r"`ids\[1\]` must be a string or an integer, got None"),
        ({"ids": "qr"}, TypeError, r"`ids` must be a list"),
    ],
)
def test_columns_that_do_not_fit_are_refused(metric, inputs, error, message):
    with pytest.raises(error, match=message):
        metric.compute(**({"predictions": ["a", "b"], "references": [["b"], ["c"]]} | inputs))


def test_ids_are_checked_for_rows_that_were_added_before(metric):
    metric.add_batch(predictions=["a", "b"], references=[["b"], ["c"]])
    with pytest.raises(ValueError, match=r"`ids` must have one entry per row \(2\), got 1"):
        metric.compute(ids=["q"])
    assert metric.compute(predictions=["b"], references=[["b"]])["em"] == 1


def test_the_pure_function_wants_a_list_of_answers():
    for answers in ([], "Paris"):
        with pytest.raises(ValueError, match="`answers` must be a list with at least one gold answer"):
            score_answer("Paris", answers)

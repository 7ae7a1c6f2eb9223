"""The metric of generated answers against SQuAD's definition written another way.

Texts are drawn from articles, punctuation and letters in and outside ASCII, joined so that borders fall everywhere.
"""

import itertools
import random
import string
from fractions import Fraction

import pytest

from recipes.spaces.metrics.rag_answer.rag_answer import MEASURES, answer_words, score_answer

PIECES = ["the", "The", "a", "A", "an", "Paris", "paris", "New", "York", "1990", "É", "é", "then", "yes", "True"]
PIECES += ["“", "–", "-", "!", ".", "_", "'s", "ß", "東京", "½", "İ"]
JOINTS = [" ", " ", " ", "", ",", "  ", "\t", "\u00a0", "\n"]


def draw_text(draw: random.Random) -> str:
    pieces = [draw.choice(PIECES) + draw.choice(JOINTS) for _ in range(draw.randint(1, 7))]
    return "x" * (draw.random() < 0.1) + "".join(pieces)


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


@pytest.mark.parametrize("seed", range(3))
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


def test_the_pure_function_wants_a_list_of_answers():
    for answers in ([], "Paris"):
        with pytest.raises(ValueError, match="`answers` must be a list with at least one gold answer"):
            score_answer("Paris", answers)

"""Scores short generated answers against gold answers: exact match, F1 and two kinds of containment.

A module of Hugging Face `evaluate`, read from a folder or from a Space on the Hub; scripts import the pure functions.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import partial

import datasets
import evaluate

from recipes.spaces.metrics.checked_rows import CheckedRows, check_list, check_text, summarize

MEASURES = ("em", "f1", "containment", "bag_containment")
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
YES_NO = {"True": "yes", "False": "no"}  # as the reference implementation of CLaRa spells Boolean answers
NO_PREDICTION = "An empty prediction is a failure, not an answer: leave the row out and count it as failed."
NO_GOLD = "A question without a gold answer cannot be scored: leave the row out and count it."

TEXT = datasets.Value("string")
INFO = {
    "description": """\
Scores short answers, as question answering over retrieved or compressed documents gives them, against one or more gold
answers: SQuAD's exact match and F1, whether the answer contains a gold answer word for word, and whether it has all
words of one in any order. Each takes the best gold answer of a question by itself and is a mean over questions.
""",
    "inputs_description": """
Args:
    predictions (`list[str]`): one answer per question; none may be blank or missing.
    references (`list[list[str]]`): the gold answers of each question, at least one; any of them will do.
    per_question (`bool`): whether to add the score of every question as well, in the order of the predictions.
    ids (`list[str | int]`, optional): one unique name per question, for error messages.

Returns:
    `em`, `f1`, `containment`, `bag_containment`: floats from 0 to 1, means over the questions;
    with `per_question` also `em_per_question` and so on, lists of floats.
""",
    "citation": """\
@inproceedings{rajpurkar-etal-2016-squad,
    title = "{SQ}u{AD}: 100,000+ Questions for Machine Comprehension of Text",
    author = "Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy",
    booktitle = "Proceedings of the 2016 Conference on Empirical Methods in Natural Language Processing",
    year = "2016",
    url = "https://aclanthology.org/D16-1264",
}
""",
    "features": datasets.Features({"predictions": TEXT, "references": datasets.Sequence(TEXT)}),
    "reference_urls": ["https://rajpurkar.github.io/SQuAD-explorer/", "https://github.com/apple/ml-clara"],
    "license": "apache-2.0",
}


def answer_words(text: str) -> list[str]:
    """The words of an answer as SQuAD's evaluation compares them: lower case, no punctuation, no articles.

    >>> answer_words("The Tower, of London.")
    ['tower', 'of', 'london']
    """
    return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()


def words_f1(words: list[str], gold: list[str]) -> float:
    """F1 of two bags of words, 0 to 1; of two empty ones 1, of one empty one 0 (SQuAD 2.0's script)."""
    if not words or not gold:
        return float(words == gold)
    if set(gold).isdisjoint(words):
        return 0.0  # most wrong answers, without counting
    return 2 * (Counter(words) & Counter(gold)).total() / (len(words) + len(gold))


def contains_run(words: list[str], gold: list[str]) -> bool:
    """Whether the gold words stand in `words` one after the other; an empty gold only in an empty answer.

    >>> contains_run(["new", "york", "city"], ["york", "city"]), contains_run(["newark"], ["new"])
    (True, False)
    """
    return f" {' '.join(gold)} " in f" {' '.join(words)} "


def contains_bag(words: list[str], gold: list[str]) -> bool:
    """Whether every gold word is among `words`, in any order and any number; an empty gold only in an empty answer."""
    return set(gold).issubset(words) if gold else not words


def score_answer(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """em, f1, containment and bag_containment of one answer, 0 to 1, each the best over the gold answers by itself.

    >>> score_answer("in the city of Paris", ["Paris", "Rome"])
    {'em': 0.0, 'f1': 0.4, 'containment': 1.0, 'bag_containment': 1.0}
    """
    if isinstance(answers, str) or not answers:
        raise ValueError(f"`answers` must be a list with at least one gold answer, got {answers!r}. {NO_GOLD}")
    words = answer_words(prediction)
    bag = answer_words(YES_NO[prediction]) if prediction in YES_NO else words
    found = []
    for answer in answers:
        gold = answer_words(answer)
        gold_bag = answer_words(YES_NO[answer]) if answer in YES_NO else gold
        found.append((words == gold, words_f1(words, gold), contains_run(words, gold), contains_bag(bag, gold_bag)))
    return {name: float(max(values)) for name, values in zip(MEASURES, zip(*found, strict=True), strict=True)}


class RagAnswer(CheckedRows, evaluate.Metric):
    """The metric as `evaluate` loads it."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(**INFO)

    check_prediction = staticmethod(partial(check_text, remedy=NO_PREDICTION))

    def check_reference(self, answers: Sequence[str], where: str) -> None:
        check_list(answers, where, "gold answers", f"Write ['Paris'] for a single answer. {NO_GOLD}")
        if not answers:
            raise ValueError(f"{where} must have a gold answer, got []. {NO_GOLD}")
        for place, answer in enumerate(answers):
            check_text(answer, f"{where}[{place}]", f"Remove this gold answer. {NO_GOLD}")

    def _compute(self, predictions, references, per_question: bool = False, ids: Sequence | None = None) -> dict:
        self.check_rows(predictions, references, ids)
        return summarize([score_answer(*row) for row in zip(predictions, references, strict=True)], per_question)

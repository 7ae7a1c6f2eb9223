"""Scores short generated answers against gold answers: exact match, F1 and two kinds of containment.

A module of Hugging Face `evaluate`, which reads it from a folder or from a Space on the Hub; scripts import the pure
functions. It knows nothing of models, prompts or documents.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

import datasets
import evaluate

from recipes.spaces.metrics.checked_rows import CheckedRows, check_text, name_row, pair_rows

MEASURES = ("em", "f1", "containment", "bag_containment")
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
YES_NO = {"True": "yes", "False": "no"}  # as the reference implementation of CLaRa spells Boolean answers
NO_PREDICTION = "An empty prediction is a failure, not an answer: leave the row out and count it as failed."
NO_GOLD = "A question without a gold answer cannot be scored: leave the row out and count it."

DESCRIPTION = """\
Scores short answers, as question answering over retrieved or compressed documents gives them, against one or more gold
answers: SQuAD's exact match and F1, whether the answer contains a gold answer word for word, and whether it has all
words of one in any order. Each takes the best gold answer of a question by itself and is a mean over questions.
"""

INPUTS_DESCRIPTION = """
Args:
    predictions (`list[str]`): one answer per question; none may be blank or missing.
    references (`list[list[str]]`): the gold answers of each question, at least one; any of them will do.
    per_question (`bool`): whether to add the score of every question as well, in the order of the predictions.
    ids (`list[str | int]`, optional): one unique name per question, for error messages.

Returns:
    `em`, `f1`, `containment`, `bag_containment`: floats from 0 to 1, means over the questions;
    with `per_question` also `em_per_question` and so on, lists of floats.

Example, with this folder; the id of a Space on the Hub does as well:

    >>> import evaluate
    >>> metric = evaluate.load("recipes/spaces/metrics/rag_answer")
    >>> metric.compute(
    ...     predictions=["in the city of Paris", "Curie, Marie"],
    ...     references=[["Paris", "Paris, France"], ["Marie Curie"]],
    ... )
    {'em': 0.0, 'f1': 0.7, 'containment': 0.5, 'bag_containment': 1.0}
"""

CITATION = """\
@inproceedings{rajpurkar-etal-2016-squad,
    title = "{SQ}u{AD}: 100,000+ Questions for Machine Comprehension of Text",
    author = "Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy",
    booktitle = "Proceedings of the 2016 Conference on Empirical Methods in Natural Language Processing",
    year = "2016",
    url = "https://aclanthology.org/D16-1264",
}
"""


def answer_words(text: str) -> list[str]:
    """The words of an answer as SQuAD's evaluation compares them: lower case, no punctuation, no articles.

    >>> answer_words("The Tower, of London.")
    ['tower', 'of', 'london']
    """
    return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()


def words_f1(words: list[str], gold: list[str]) -> float:
    """F1 of two bags of words, 0 to 1; of two empty ones 1, of one empty one 0 (SQuAD 2.0's script).

    >>> words_f1(["in", "paris"], ["paris"])
    0.6666666666666666
    """
    if not words or not gold:
        return float(words == gold)
    if set(gold).isdisjoint(words):
        return 0.0  # most wrong answers, without counting
    shared = sum((Counter(words) & Counter(gold)).values())
    return 2 * shared / (len(words) + len(gold))


def contains_run(words: list[str], gold: list[str]) -> bool:
    """Whether the gold words stand in `words` one after the other; an empty gold only in an empty answer.

    >>> contains_run(["new", "york", "city"], ["york", "city"]), contains_run(["newark"], ["new"])
    (True, False)
    """
    if not gold:
        return not words
    return f" {' '.join(gold)} " in f" {' '.join(words)} "


def contains_bag(words: list[str], gold: list[str]) -> bool:
    """Whether every gold word is among `words`, in any order and any number; an empty gold only in an empty answer.

    >>> contains_bag(["curie", "marie"], ["marie", "curie"])
    True
    """
    if not gold:
        return not words
    return set(gold).issubset(words)


def score_answer(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """The four measures of one answer, each the best over the gold answers by itself.

    Args:
        prediction: What was generated.
        answers: Gold answers, at least one.

    Returns:
        em, f1, containment and bag_containment, each from 0 to 1.

    >>> score_answer("in the city of Paris", ["Paris", "Rome"])
    {'em': 0.0, 'f1': 0.4, 'containment': 1.0, 'bag_containment': 1.0}
    """
    if isinstance(answers, str) or not answers:
        raise ValueError(f"`answers` must be a list with at least one gold answer, got {answers!r}. {NO_GOLD}")
    words = answer_words(prediction)
    bag = answer_words(YES_NO[prediction]) if prediction in YES_NO else words
    em = f1 = containment = bag_containment = 0.0
    for answer in answers:
        gold = answer_words(answer)
        gold_bag = answer_words(YES_NO[answer]) if answer in YES_NO else gold
        if words == gold:
            em = f1 = containment = 1.0
        else:
            f1 = max(f1, words_f1(words, gold))
            containment = containment or float(contains_run(words, gold))
        bag_containment = bag_containment or float(contains_bag(bag, gold_bag))
    return {"em": em, "f1": f1, "containment": containment, "bag_containment": bag_containment}


def check_rows(predictions: Iterable, references: Iterable, ids: Iterable | None = None) -> tuple[list, list]:
    """The rows as lists, after everything that would make a score meaningless has been refused by name."""
    predictions, references, ids = pair_rows(predictions, references, ids)
    for row, (prediction, answers) in enumerate(zip(predictions, references, strict=True)):
        check_text(prediction, name_row("predictions", row, ids), NO_PREDICTION)
        if not isinstance(answers, list | tuple):
            raise TypeError(
                f"{name_row('references', row, ids)} must be a list of gold answers, got {answers!r}. "
                f"Write ['Paris'] for a single answer. {NO_GOLD}"
            )
        if not answers:
            raise ValueError(f"{name_row('references', row, ids)} must have a gold answer, got []. {NO_GOLD}")
        for place, answer in enumerate(answers):
            check_text(answer, f"{name_row('references', row, ids)}[{place}]", f"Remove this gold answer. {NO_GOLD}")
    return predictions, references


class RagAnswer(CheckedRows, evaluate.Metric):
    """The metric as `evaluate` loads it; see INPUTS_DESCRIPTION."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
            reference_urls=["https://rajpurkar.github.io/SQuAD-explorer/", "https://github.com/apple/ml-clara"],
            license="apache-2.0",
        )

    check_rows = staticmethod(check_rows)

    def _compute(self, predictions, references, per_question: bool = False, ids: Sequence | None = None) -> dict:
        predictions, references = check_rows(predictions, references, ids)
        rows = [score_answer(*row) for row in zip(predictions, references, strict=True)]
        lists = {name: [row[name] for row in rows] for name in MEASURES}
        scores: dict = {name: math.fsum(values) / len(values) for name, values in lists.items()}
        if per_question:
            scores |= {f"{name}_per_question": values for name, values in lists.items()}
        return scores

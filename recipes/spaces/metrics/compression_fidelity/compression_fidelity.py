"""Scores what a memory says back about its document: ROUGE, and the numbers and names that were kept or invented.

A module of Hugging Face `evaluate`, read from a folder or from a Space on the Hub; scripts import the pure functions.
"""

import math
import re
from collections.abc import Sequence, Set
from functools import partial

import datasets
import evaluate
from rouge_score import rouge_scorer

from recipes.spaces.metrics.checked_rows import CheckedRows, check_text, summarize

# 1,200.50, 3.5, .5 and the 90 of 90s, but no digits that follow a letter, as in H2O
NUMBER = re.compile(
    r"(?<![A-Za-z0-9])(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![A-Za-z0-9.])\.[0-9]+"
)
WORD = re.compile(r"\w+(?:-\w+)*")
SENTENCE_END = re.compile(r"[.!?:;…。！？\n]")
# English words that begin many sentences and titles, and that no name is recognised by
FUNCTION_WORDS = frozenset(
    """
    a an the this that these those it its he she they we i you his her their our my your there here
    in on at by of to from for with without as into over under after before during since until between among through
    and or but nor so yet if when while where who what which why how because although though however also then than
    is are was were be been has have had do does did can could may might will would shall should must not no all some
    many most other one two both each every another such only its
    """.split()
)
ROUGE = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
NO_PREDICTION = "An empty paraphrase is a failure, not an answer: leave the row out and count it as failed."
NO_DOCUMENT = "A paraphrase cannot be scored without its document: leave the row out and count it."

TEXT = datasets.Value("string")
INFO = {
    "description": """\
Scores what a compressed memory says back about its document: ROUGE-1 and ROUGE-L of the paraphrase against it, the
share of the document's numbers and names that the paraphrase keeps (recall), and the share of the paraphrase's that
the document has (precision; the rest is made up). BERTScore comes on top where a model for it is named.
""",
    "inputs_description": """
Args:
    predictions (`list[str]`): what each memory says back; none may be blank or missing.
    references (`list[str]`): the document of each memory; none may be blank or missing.
    per_question (`bool`): whether to add the score of every row as well, in the order of the predictions.
    bertscore_model (`str`, optional): folder or id of the encoder for BERTScore, which needs the package bert_score.
    ids (`list[str | int]`, optional): one unique name per row, for error messages.

Returns:
    `rouge1`, `rougeL`, `number_recall`, `number_precision`, `entity_recall`, `entity_precision`: floats from 0 to 1,
    means over the rows that have the thing counted, None where no row has; `rows_without_numbers` and
    `rows_without_entities`: rows whose document has none, left out of the recalls;
    `predictions_without_numbers` and `predictions_without_entities`: rows left out of the precisions; `bertscore`,
    an F1 of at most about 1, where asked for; with `per_question` also `rouge1_per_question` and so on, lists
    with None for what was left out.
""",
    "citation": """\
@inproceedings{lin-2004-rouge,
    title = "{ROUGE}: A Package for Automatic Evaluation of Summaries",
    author = "Lin, Chin-Yew",
    booktitle = "Text Summarization Branches Out",
    year = "2004",
    url = "https://aclanthology.org/W04-1013",
}
""",
    "features": datasets.Features({"predictions": TEXT, "references": TEXT}),
    "reference_urls": ["https://pypi.org/project/rouge-score/", "https://github.com/apple/ml-clara"],
    "license": "apache-2.0",
}


def numbers(text: str) -> frozenset[str]:
    """The different numbers of a text, without thousands separators and needless zeros; signs and units are not read.

    Written the English way: a comma before groups of three digits, a point before decimals, ASCII digits.

    >>> sorted(numbers("1,200 of 1200.0 people (3.50 %), H2O"))
    ['1200', '3.5']
    """
    found = set()
    for match in NUMBER.finditer(text):
        whole, _, decimals = match[0].replace(",", "").partition(".")
        whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
        found.add(f"{whole}.{decimals}" if decimals else whole)
    return frozenset(found)


def entities(text: str, common_words: Set[str] = frozenset()) -> frozenset[str]:
    """The different names of a text by a rule of thumb: runs of capitalised words with nothing but space in between.

    A run loses the English function words that it begins with, and the first word of a sentence if it is one of
    `common_words`, which are known to stand in lower case. Names are case-folded.

    >>> sorted(entities("The Eiffel Tower stands in Paris. Cities like New York do not have it.", {"cities"}))
    ['eiffel tower', 'new york', 'paris']
    """
    runs, end, open_run = [], 0, False
    for match in WORD.finditer(text):
        word, gap, end = match[0], text[end : match.start()], match.end()
        sentence_start = not match.start() or bool(SENTENCE_END.search(gap))
        folded = word.casefold()
        open_run = open_run and gap.isspace() and "\n" not in gap
        skipped = folded in FUNCTION_WORDS or (sentence_start and folded in common_words)
        if not word[0].isupper() or (skipped and not open_run):
            open_run = False
        elif open_run:
            runs[-1].append(folded)
        else:
            runs.append([folded])
            open_run = True
    return frozenset(" ".join(run) for run in runs)


def kept(wanted: Set[str], found: Set[str]) -> float | None:
    """The share of `wanted` that is in `found`, 0 to 1, or None if nothing is wanted."""
    return len(wanted & found) / len(wanted) if wanted else None


def score_paraphrase(prediction: str, document: str) -> dict[str, float | None]:
    """The measures of one paraphrase, 0 to 1, ROUGE as F-measures without stemming; None for a share of nothing."""
    rouge = ROUGE.score(document, prediction)
    said, true = numbers(prediction), numbers(document)
    common_words = {word for text in (prediction, document) for word in WORD.findall(text) if word.islower()}
    said_names, true_names = entities(prediction, common_words), entities(document, common_words)
    return {
        "rouge1": float(rouge["rouge1"].fmeasure),
        "rougeL": float(rouge["rougeL"].fmeasure),
        "number_recall": kept(true, said),
        "number_precision": kept(said, true),
        "entity_recall": kept(true_names, said_names),
        "entity_precision": kept(said_names, true_names),
    }


def bertscore(predictions: list[str], references: list[str], model: str) -> list[float | None]:
    """BERTScore's F1 of each row, at most about 1, not rescaled; of the layer that bert_score recommends or the last.

    A text in which the encoder sees nothing gives no number: None.
    """
    try:
        from bert_score import score
        from bert_score.utils import model2layers
    except ImportError as error:
        raise ImportError("`bertscore_model` needs the package bert_score. Run pip install bert_score.") from error
    from transformers import AutoConfig

    layers = model2layers.get(model) or AutoConfig.from_pretrained(model).num_hidden_layers
    values = score(predictions, references, model_type=model, num_layers=layers)[2].tolist()
    return [value if math.isfinite(value) else None for value in values]


class CompressionFidelity(CheckedRows, evaluate.Metric):
    """The metric as `evaluate` loads it."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(**INFO)

    check_prediction = staticmethod(partial(check_text, remedy=NO_PREDICTION))
    check_reference = staticmethod(partial(check_text, remedy=NO_DOCUMENT))

    def _compute(
        self,
        predictions,
        references,
        per_question: bool = False,
        bertscore_model: str | None = None,
        ids: Sequence | None = None,
    ) -> dict:
        self.check_rows(predictions, references, ids)
        rows = [score_paraphrase(*row) for row in zip(predictions, references, strict=True)]
        counts = {
            f"{kind}_without_{things}": [row[f"{thing}_{measure}"] for row in rows].count(None)
            for thing, things in (("number", "numbers"), ("entity", "entities"))
            for kind, measure in (("rows", "recall"), ("predictions", "precision"))
        }
        if bertscore_model:
            for row, value in zip(rows, bertscore(predictions, references, bertscore_model), strict=True):
                row["bertscore"] = value
        return summarize(rows, per_question, **counts)

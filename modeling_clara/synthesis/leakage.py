"""Keeps the questions and documents of evaluation files out of what is made for training."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..corpus.storage import iter_lines
from .features import ngrams, words

NGRAM = 8  # words
MAX_SHARED = 0.5  # share of a text's runs of 8 words that are those of evaluation texts
QUESTIONS = ("question", "input", "query", "claim")


class LeakageGuard:
    """Texts of evaluation files, to tell what is the same or nearly the same.

    Equal are texts with the same letters and digits; nearly equal those that share half of their runs of eight words
    with the files. A question of fewer than eight words is compared by the first alone.

    Args:
        files: .jsonl, .jsonl.gz or .parquet in the forms that `recipes.evaluate` reads: questions, passages with
            `qas`, documents of BEIR. Of a row with `pos_index` only the gold documents count, so that a corpus that
            training and evaluation share does not count as a leak.
        documents: whether texts of documents count, too. False for an evaluation on the very documents trained on.

    Raises:
        FileNotFoundError, ValueError: a file cannot be read, or has no question and no text.
    """

    def __init__(self, files: Iterable[str | Path], *, documents: bool = True):
        self.exact: dict[str, str] = {}  # letters and digits -> file
        self.runs: set[int] = set()
        for file in map(Path, files):
            n_texts = 0
            for text in (text for row in _rows(file) for text in _texts(row, documents)):
                self.exact.setdefault(_bare(text), file.name)
                self.runs.update(map(hash, ngrams(words(text), NGRAM)))
                n_texts += 1
            if not n_texts:
                raise ValueError(f"{file} must have questions or texts, found none. Check the file and its format.")

    def check(self, text: str) -> str | None:
        """Why a question, a document or a paraphrase is a leak, or None."""
        if file := self.exact.get(_bare(text)):
            return f"leakage: it is in {file}"
        runs = ngrams(words(text), NGRAM)
        shared = sum(hash(run) in self.runs for run in runs) / len(runs) if runs else 0.0
        if shared >= MAX_SHARED:
            return f"leakage: {shared:.0%} of its runs of {NGRAM} words are in evaluation files"
        return None


def _bare(text: str) -> str:
    return re.sub(r"[\W_]+", "", text.casefold())


def _rows(file: Path) -> Iterator[Mapping]:
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches():
                yield from batch.to_pylist()
        return
    for number, row, problem in iter_lines(file):
        if problem or not isinstance(row, Mapping):
            raise ValueError(f"{file}:{number} must be a JSON object, {problem or 'got another value'}. Correct it.")
        yield row


def _texts(row: Mapping, documents: bool) -> Iterator[str]:
    """The questions of a row, and the texts of its documents."""
    asked = [row.get(name) for name in QUESTIONS] + [pair.get("question") for pair in row.get("qas") or []]
    if "text" in row and not documents and "qas" not in row:  # a query of BEIR, or a document: both are texts
        asked.append(row["text"])
    for question in asked:
        yield from question if isinstance(question, list) else [question] if question else []
    if not documents:
        return
    given, gold = row.get("docs") or [], row.get("pos_index")
    given = [given] if isinstance(given, str | Mapping) else given
    if gold is not None:
        places = {gold} if isinstance(gold, int) else set(gold)
        given = [document for place, document in enumerate(given) if place in places]
    for document in [*given, row.get("text")]:
        if document:
            yield document["text"] if isinstance(document, Mapping) else document

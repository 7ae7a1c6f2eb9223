"""Keeps the questions and documents of evaluation files out of what is made for training."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..corpus.storage import iter_lines
from .features import jaccard, names, ngrams, words

NGRAM = 8  # words
MAX_SHARED = 0.5  # share of a text's runs of 8 words that are those of evaluation texts
LEAST = 16  # runs of a text that another one may hold
FEW, SHORT, ALIKE = 6, 40, 0.7  # words of a text that is compared as a whole; Jaccard of its words and pairs of words
QUESTIONS = ("question", "input", "query", "claim")


class LeakageGuard:
    """Texts of evaluation files, to tell what is the same or nearly the same.

    Equal are texts with the same letters and digits; nearly equal those that share half of their runs of eight words
    with the files, or hold half of the runs of one text of them. A text of 6 to 40 words is also nearly equal to
    one of these if they share 70 % of their words and pairs of words, and all names and numbers.

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
        self.runs: dict[int, int] = {}  # hash of a run -> number of the first text that has it
        self.n_runs: list[int] = []  # of each text
        self.short: list[str] = []
        self.having: dict[tuple, list[int]] = {}  # pair of words -> short texts that have it
        for file in map(Path, files):
            n_texts = 0
            for text in (text for row in _rows(file) for text in _texts(row, documents)):
                n_texts += 1
                if _bare(text) not in self.exact:
                    self.exact[_bare(text)] = file.name
                    self._add(text)
            if not n_texts:
                raise ValueError(f"{file} must have questions or texts, found none. Check the file and its format.")

    def _add(self, text: str) -> None:
        runs = set(map(hash, ngrams(words(text), NGRAM)))
        for run in runs:
            self.runs.setdefault(run, len(self.n_runs))
        self.n_runs.append(len(runs))
        if len(words(text)) <= SHORT:
            for pair in ngrams(words(text), 2):
                self.having.setdefault(pair, []).append(len(self.short))
            self.short.append(text)

    def check(self, text: str) -> str | None:
        """Why a question, a document or a paraphrase is a leak, or None."""
        if file := self.exact.get(_bare(text)):
            return f"leakage: it is in {file}"
        runs = ngrams(words(text), NGRAM)
        found = [number for run in runs if (number := self.runs.get(hash(run))) is not None]
        if runs and len(found) >= MAX_SHARED * len(runs):
            return f"leakage: {len(found) / len(runs):.0%} of its runs of {NGRAM} words are in evaluation files"
        for number, n_shared in Counter(found).items():
            if self.n_runs[number] >= LEAST and n_shared >= MAX_SHARED * self.n_runs[number]:
                return f"leakage: it has {n_shared / self.n_runs[number]:.0%} of a text of evaluation files"
        pairs = ngrams(words(text), 2) if FEW <= len(words(text)) <= SHORT else ()
        shared = Counter(number for pair in pairs for number in self.having.get(pair, ()))
        near = (number for number, n in shared.items() if n >= len(pairs) / 2)
        other = next((self.short[number] for number in near if _is_alike(text, self.short[number])), None)
        return f"leakage: evaluation files have {other!r}" if other else None


def _is_alike(text: str, other: str) -> bool:
    """Whether short texts share most words, and all names and numbers: other towns make another question."""
    mine, its = words(text), words(other)
    if jaccard(ngrams(mine, 1) | ngrams(mine, 2), ngrams(its, 1) | ngrams(its, 2)) < ALIKE:
        return False
    return _marks(text) <= set(its) and _marks(other) <= set(mine)


def _marks(text: str) -> set[str]:
    return {word for name in names(text) for word in words(name)} | {word for word in words(text) if word.isdigit()}


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

"""Any known data file -> questions with answers, candidate documents and gold documents.

First in the way of an evaluation. It knows nothing of models, settings or scores. Formats:

    multihop    {id?, question, answers, docs, pos_index?}, one question a row with its candidates
    passages    {title?, text, qas: [{question, answers}]}, one passage a row; all of them are documents
    reference   {question, docs, answer | gold_answer | golden_answers, pos_index?}, as apple/ml-clara evaluates
    flashrag    {id, question, golden_answers, metadata?}, without documents; `docs` or `contents` are taken if there
    kilt        {id, input, output: [{answer?, provenance?: [{wikipedia_id, title}]}]}, without documents
    beir        a folder with corpus.jsonl, queries.jsonl and qrels/*.tsv; retrieval only

A file is .jsonl, .jsonl.gz or .parquet; anything else is the id of a data set on the Hub. A question without an `id`
has that of its line, from 1; one of a passage `LINE#N`, from 0, or `qas[].id`.
"""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from trl.scripts.utils import DatasetConfig

from modeling_clara.storage_clara import file_sha256
from recipes.evaluation.beir import beir_files, beir_rows
from recipes.evaluation.formats import Question, Reader
from recipes.training.data import BadRow, read_rows

HALVES = ("first", "second")
MAX_NAMED = 3  # bad rows that an error names


@dataclass
class EvaluationData:
    """A data file as read, in its order."""

    name: str  # of the file, folder or data set
    sha256: str  # see `hash_data`
    format: str  # one of `formats.FORMATS`
    questions: list[Question]  # that are asked
    documents: dict[str, dict]  # id -> `{title, text}`, every distinct document once
    titles: dict[str, str] = field(default_factory=dict)  # id -> title of gold documents without a text (KILT)
    rejected: list[dict] = field(default_factory=list)  # `{place, reason}` of rows that were left out
    ids: frozenset[str] = frozenset()  # of all questions, those beyond `limit` and of the other half too
    half: str | None = None  # that is asked, one of `HALVES`; None for all


def read_data(
    path: str,
    *,
    split: str | None = None,
    config: str | None = None,
    half: str | None = None,
    limit: int | None = None,
    skip_bad_rows: bool = False,
    may_abstain: bool = False,
) -> EvaluationData:
    """Read a data file.

    Args:
        path: file, BEIR folder or Hub id.
        split: of a Hub data set, or of a BEIR folder's qrels; default "test".
        config: name of a configuration of a Hub data set.
        half: only the questions for which `half_of` gives this; all documents are kept.
        limit: questions that are read at most, of the half if one is given; all documents are kept.
        skip_bad_rows: list rows that cannot be used in `rejected` instead of stopping.
        may_abstain: whether abstaining is scored, so that questions without answers are of use by themselves.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: rows are malformed, ids repeat, or nothing can be scored: file and line are named.
    """
    folder, rejected = Path(path), []
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be >= 1, got {limit}. Leave it out to ask all questions.")

    def reject(error: BadRow) -> None:
        rejected.append({"place": error.place, "reason": str(error)})

    if folder.is_dir():
        rows = beir_rows(folder, split or "test", reject)
    else:
        rows = read_rows(DatasetConfig(path=path, name=config, split=split or "test"), on_bad_row=reject)
    reader = Reader(folder.is_dir())
    for place, row in rows:
        try:
            reader.add(place, row)
        except BadRow as error:
            reject(BadRow(str(error), place))
    if rejected and not skip_bad_rows:
        named = "; ".join(row["reason"].rstrip(".") for row in rejected[:MAX_NAMED])
        raise ValueError(
            f"{len(rejected)} row(s) cannot be used: {named}. Correct them, or pass --skip-bad-rows, which lists "
            "them in rejected.jsonl."
        )
    name, questions = folder.resolve().name if folder.exists() else path, reader.questions
    if not questions:
        raise ValueError(f"{name} must have at least one question, found none. Check the file and its format.")
    if not may_abstain and not any(question.answers or question.gold for question in questions):
        raise ValueError(
            f"{name} must have answers or gold documents, but its {len(questions)} questions have neither (the first "
            f"is {questions[0].place}). Add `answers` or `pos_index`, or let the system abstain with --min-score."
        )
    asked = [question for question in questions if half in (None, half_of(question.text))]
    if not asked:
        raise ValueError(f"the {half} half of {name} must have a question, found none. Leave out --half.")
    return EvaluationData(
        name=name,
        sha256=hash_data(folder) if folder.exists() else reader.digest.hexdigest(),
        format=reader.format,
        questions=asked[:limit],
        documents=reader.documents,
        titles=reader.titles,
        rejected=rejected,
        ids=frozenset(question.id for question in questions),
        half=half,
    )


def half_of(question: str) -> str:
    """The half that a question belongs to, by the words of its text alone: case, punctuation and space do not matter.

    >>> half_of("Where is it?"), half_of("  where IS it"), half_of("Who wrote it?")
    ('first', 'first', 'second')
    """
    words = " ".join(re.findall(r"[^\W_]+", question.casefold()))
    return HALVES[hashlib.sha256(words.encode()).digest()[0] % 2]


def hash_data(path: Path) -> str:
    """SHA-256 in hex of a file as it lies on disk; of a folder over names and hashes of the files that BEIR has."""
    if path.is_file():
        return file_sha256(path)
    lines = [f"{file.relative_to(path).as_posix()} {file_sha256(file)}\n" for file in beir_files(path)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()

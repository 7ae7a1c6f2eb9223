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

from recipes.evaluation.beir import beir_files, beir_rows
from recipes.evaluation.formats import Question, Reader
from recipes.training.data import BadRow, read_rows

HALVES = ("first", "second")
MAX_NAMED = 3  # bad rows that an error names


@dataclass
class EvaluationData:
    """A data file as read.

    Attributes:
        name: of the file, folder or data set.
        sha256: of the file, see `hash_data`.
        format: one of `formats.FORMATS`.
        questions: in the order of the file.
        documents: id -> `{title, text}`, every distinct document once, in the order of the file.
        titles: id -> title of gold documents whose text the data does not have (KILT).
        rejected: `{place, reason}` of rows that were left out.
        ids: of all questions of the file, those behind `limit` and of the other half too.
        half: of the file's questions that is asked, one of `HALVES`; None for all.
    """

    name: str
    sha256: str
    format: str = ""
    questions: list[Question] = field(default_factory=list)
    documents: dict[str, dict] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    rejected: list[dict] = field(default_factory=list)
    ids: frozenset[str] = frozenset()
    half: str | None = None

    @property
    def has_candidates(self) -> bool:
        """Whether the rows bring their own candidates."""
        return any(question.candidates for question in self.questions)


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
        limit: questions that are read at most, of the half if one is given; the documents of the other rows are kept
            as candidates for passages.
        skip_bad_rows: list rows that cannot be used in `rejected` instead of stopping.
        may_abstain: whether abstaining is scored, so that questions without answers are of use by themselves.

    Returns:
        `EvaluationData`

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: rows are malformed, ids repeat, or nothing can be scored: file and line are named.
    """
    folder = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be >= 1, got {limit}. Leave it out to ask all questions.")
    if half is not None and half not in HALVES:
        raise ValueError(
            f"`half` must be one of {', '.join(HALVES)}, got {half!r}. Leave it out to ask all questions."
        )
    reader, rejected = _read_file(folder, path, split or "test", config)
    if not skip_bad_rows:
        _check_rejected(rejected)
    data = EvaluationData(
        name=folder.resolve().name if folder.exists() else path,
        sha256=hash_data(folder) if folder.exists() else reader.digest.hexdigest(),
        format=reader.format,
        questions=reader.questions,
        documents=reader.documents,
        titles=reader.titles,
        rejected=rejected,
        ids=frozenset(question.id for question in reader.questions),
        half=half,
    )
    _check(data, may_abstain)
    if half is not None:
        data.questions = [question for question in data.questions if half_of(question.text) == half]
        if not data.questions:
            raise ValueError(f"the {half} half of {data.name} must have a question, found none. Leave out --half.")
    data.questions = data.questions[:limit]
    return data


def _read_file(folder: Path, path: str, split: str, config: str | None) -> tuple[Reader, list[dict]]:
    """All rows, and `{place, reason}` of those that cannot be used."""
    rejected = []

    def reject(error: BadRow) -> None:
        rejected.append({"place": error.place, "reason": str(error)})

    if folder.is_dir():
        rows = beir_rows(folder, split, reject)
    else:
        rows = read_rows(DatasetConfig(path=path, name=config, split=split), on_bad_row=reject)
    reader = Reader(folder.is_dir())
    for place, row in rows:
        try:
            reader.add(place, row)
        except BadRow as error:
            reject(BadRow(str(error), place))
    return reader, rejected


def _check_rejected(rejected: list[dict]) -> None:
    if rejected:
        named = "; ".join(row["reason"].rstrip(".") for row in rejected[:MAX_NAMED])
        raise ValueError(
            f"{len(rejected)} row(s) cannot be used: {named}. Correct them, or pass --skip-bad-rows, which lists "
            "them in rejected.jsonl."
        )


def half_of(question: str) -> str:
    """The half that a question belongs to, by the words of its text alone.

    Neither the order of a file nor its other questions matter, and a question that is asked again, with other case,
    punctuation or white space, is in the same half.

    >>> half_of("Where is it?"), half_of("  where IS it"), half_of("Who wrote it?")
    ('first', 'first', 'second')
    """
    words = " ".join(re.findall(r"[^\W_]+", question.casefold()))
    return HALVES[hashlib.sha256(words.encode()).digest()[0] % 2]


def hash_data(path: Path) -> str:
    """SHA-256 of a file as it lies on disk; of a folder over the names and hashes of the files that BEIR has.

    Returns:
        64 hexadecimal digits.
    """
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    names = [file.relative_to(path).as_posix() for file in beir_files(path)]
    return hashlib.sha256("".join(f"{name} {hash_data(path / name)}\n" for name in names).encode()).hexdigest()


def _check(data: EvaluationData, may_abstain: bool) -> None:
    if not data.questions:
        raise ValueError(f"{data.name} must have at least one question, found none. Check the file and its format.")
    if not may_abstain and not any(question.answers or question.gold for question in data.questions):
        raise ValueError(
            f"{data.name} must have answers or gold documents, but its {len(data.questions)} questions have neither "
            f"(the first is {data.questions[0].place}). Add `answers` or `pos_index`, or let the system abstain with "
            "--min-score."
        )

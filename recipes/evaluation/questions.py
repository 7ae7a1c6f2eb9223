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
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data import BadRow, document_key, read_documents, read_positives, read_rows
from trl.scripts.utils import DatasetConfig

from evaluation.beir import beir_files, beir_rows

FORMATS = ("multihop", "passages", "reference", "flashrag", "kilt", "beir")
HALVES = ("first", "second")
ALIKE = {"multihop", "reference", "flashrag"}  # differ in names of optional keys; the first row names a file
MAX_NAMED = 3  # bad rows that an error names


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: unique in the file.
        text: as asked.
        answers: gold answers, each equally right; none where the data says that there is no answer, or asks for
            documents only.
        candidates: ids of the documents that the data offers, in its order, repeated where the data repeats them; none
            where it offers none.
        gold: ids of the documents that hold the answer; none where that is not known.
        place: file and line, for errors.
        asks_answer: False where the data asks for documents only, so that no answers do not mean that there is none.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    candidates: tuple[str, ...]
    gold: tuple[str, ...]
    place: str
    asks_answer: bool = True


@dataclass
class EvaluationData:
    """A data file as read.

    Attributes:
        name: of the file, folder or data set.
        sha256: of the file, see `hash_data`.
        format: one of `FORMATS`.
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
    data = EvaluationData(folder.resolve().name if folder.exists() else path, "", half=half)

    def reject(error: BadRow) -> None:
        data.rejected.append({"place": error.place, "reason": str(error)})

    if folder.is_dir():
        rows = beir_rows(folder, split or "test", reject)
    else:
        rows = read_rows(DatasetConfig(path=path, name=config, split=split or "test"), on_bad_row=reject)
    reader = _Reader(data, folder.is_dir())
    for place, row in rows:
        try:
            reader.add(place, row)
        except BadRow as error:
            reject(BadRow(str(error), place))
    if data.rejected and not skip_bad_rows:
        named = "; ".join(row["reason"].rstrip(".") for row in data.rejected[:MAX_NAMED])
        raise ValueError(
            f"{len(data.rejected)} row(s) cannot be used: {named}. Correct them, or pass --skip-bad-rows, which lists "
            "them in rejected.jsonl."
        )
    _check(data, may_abstain)
    data.ids = frozenset(question.id for question in data.questions)
    if half is not None:
        data.questions = [question for question in data.questions if half_of(question.text) == half]
        if not data.questions:
            raise ValueError(f"the {half} half of {data.name} must have a question, found none. Leave out --half.")
    data.questions = data.questions[:limit]
    data.sha256 = hash_data(folder) if folder.exists() else reader.digest.hexdigest()
    return data


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


class _Reader:
    """Adds rows to an `EvaluationData`, every distinct document under one id."""

    def __init__(self, data: EvaluationData, is_beir: bool):
        self.is_beir = is_beir
        self.data, self.digest = data, hashlib.sha256()
        self.ids: dict[str, str] = {}  # document_key -> id
        self.places: dict[str, str] = {}  # question id -> place

    def add(self, place: str, row: Mapping) -> None:
        """One row.

        Raises:
            BadRow: naming the rule.
        """
        try:
            self.digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
        except UnicodeEncodeError as error:
            raise BadRow("must be text in Unicode, but has half of a surrogate pair") from error
        row = {name: value for name, value in row.items() if value is not None}
        kind = "beir" if self.is_beir else row_format(row)
        if self.data.format and kind != self.data.format:
            if not {kind, self.data.format} <= ALIKE:
                raise BadRow(f"must be of the format {self.data.format} like the rows before it, got {kind}")
            kind = self.data.format
        before = len(self.data.documents)
        try:
            found = list(getattr(self, f"_{kind}")(row, place))
            for question in found:
                if question.id in self.places:
                    raise BadRow(f"must have an id of its own, got {question.id!r} like {self.places[question.id]}")
        except BadRow:
            for name in list(self.data.documents)[before:]:
                document = self.data.documents.pop(name)
                self.ids.pop(document_key(document), None)
            raise
        for question in found:
            self.places[question.id] = place
        self.data.format = kind
        self.data.questions += found

    def _documents(self, documents: list[dict]) -> list[str]:
        """Ids of documents, which are numbers from 0; the same title and text is the same document."""
        ids = []
        for document in documents:
            key = document_key(document)
            if key not in self.ids:
                self.ids[key] = str(len(self.ids))
                self.data.documents[self.ids[key]] = document
            ids.append(self.ids[key])
        return ids

    def _passages(self, row: Mapping, place: str) -> Iterator[Question]:
        (document,) = read_documents({"text": row["text"], "title": row.get("title", "")})
        pairs = row["qas"]
        if not isinstance(pairs, list) or not all(isinstance(pair, Mapping) for pair in pairs):
            raise BadRow(f"`qas` must be a list of {{question, answers}}, got {pairs!r}")
        read = [(_text(pair, "question"), _answers(pair)) for pair in pairs]
        ids = self._documents([document])
        for index, (pair, (text, answers)) in enumerate(zip(pairs, read, strict=True)):
            question_id = _id(pair, place) if "id" in pair else f"{_id(row, place)}#{index}"
            yield Question(question_id, text, answers, (), tuple(ids), place)

    def _multihop(self, row: Mapping, place: str) -> Iterator[Question]:
        text, answers = _text(row, "question"), _answers(row)
        documents = read_documents(row) if row.get("docs", row.get("documents")) else []
        positives = read_positives(row, len(documents))
        ids = self._documents(documents)
        gold = dict.fromkeys(ids[index] for index in positives)
        yield Question(_id(row, place), text, answers, tuple(ids), tuple(gold), place)

    _reference = _multihop

    def _flashrag(self, row: Mapping, place: str) -> Iterator[Question]:
        given = row.get("docs") or row.get("retrieval_result") or row.get("contents") or []
        given = [given] if isinstance(given, str | Mapping) else given
        if not isinstance(given, list):
            raise BadRow(f"documents must be a list, got {given!r}")
        documents = [entry.get("contents", entry) if isinstance(entry, Mapping) else entry for entry in given]
        yield from self._multihop({**row, "docs": documents}, place)

    def _kilt(self, row: Mapping, place: str) -> Iterator[Question]:
        outputs = row["output"]
        if not isinstance(outputs, list) or not all(isinstance(output, Mapping) for output in outputs):
            raise BadRow(f"`output` must be a list of {{answer, provenance}}, got {outputs!r}")
        answers = [output["answer"] for output in outputs if output.get("answer")]
        gold = {}
        for output in outputs:
            sources = output.get("provenance") or []
            if not isinstance(sources, list) or not all(isinstance(source, Mapping) for source in sources):
                raise BadRow(f"`provenance` must be a list of {{wikipedia_id, title}}, got {sources!r}")
            for source in sources:
                title = str(source.get("title") or "")
                document_id = str(source.get("wikipedia_id") or title)
                if document_id:
                    gold[document_id] = title
        self.data.titles |= gold
        text = _text(row, "input")
        yield Question(_id(row, place), text, _answers({"answers": answers}), (), tuple(gold), place, bool(answers))

    def _beir(self, row: Mapping, place: str) -> Iterator[Question]:
        if "gold" not in row:  # a document
            text, title = row.get("text", ""), row.get("title", "")
            (document,) = read_documents({"text": text, "title": title} if text else {"text": title})
            if row["_id"] in self.data.documents:
                raise BadRow(f"must have an id of its own, got {row['_id']!r} twice")
            self.data.documents[row["_id"]] = document
            return
        metadata = row.get("metadata") or {}
        if not isinstance(metadata, Mapping):
            raise BadRow(f"`metadata` must be an object, got {metadata!r}")
        given = [row.get("answers"), metadata.get("answers"), metadata.get("answer"), []]
        answers = _answers({"answers": next(value for value in given if value is not None)})
        unknown = [document_id for document_id in row["gold"] if document_id not in self.data.documents]
        if unknown:
            raise BadRow(f"must have judgements of documents in corpus.jsonl, {unknown[0]!r} is not there")
        yield Question(row["_id"], _text(row, "text"), answers, (), tuple(row["gold"]), place, bool(answers))


def row_format(row: Mapping) -> str:
    """The format of a row, by its keys.

    >>> row_format({"question": "Who?", "docs": ["A"], "answers": ["B"]})
    'multihop'

    Raises:
        BadRow: it is none of them.
    """
    if "qas" in row and "text" in row:
        return "passages"
    if "input" in row and "output" in row:
        return "kilt"
    if "question" in row:
        has_documents = bool(row.get("docs", row.get("documents")))
        if "golden_answers" in row and not ("docs" in row and "pos_index" in row):
            return "flashrag"
        if has_documents:
            return "multihop" if "answers" in row else "reference"
        return "multihop"
    raise BadRow(
        f"must have the keys of one of the formats {', '.join(FORMATS)}, got {', '.join(sorted(row)) or 'none'}"
    )


def _id(row: Mapping, place: str) -> str:
    """The id of a row, or the number of its line."""
    given = row.get("id", place.rpartition(":")[2])
    if isinstance(given, bool) or not isinstance(given, str | int) or not str(given).strip():
        raise BadRow(f"`id` must be a text or a whole number, got {given!r}")
    return str(given)


def _text(row: Mapping, name: str) -> str:
    text = row.get(name)
    if not isinstance(text, str) or not text.strip():
        raise BadRow(f"`{name}` must be a text that is not empty, got {text!r}")
    return text.strip()


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value  # NaN is none


def _answers(row: Mapping) -> tuple[str, ...]:
    """All gold answers of a row; none only where the row says so with an empty list."""
    names = ("answers", "golden_answers", "gold_answer", "answer")
    given = next((row[name] for name in names if name in row), None)
    if given is None:
        raise BadRow(f"must have one of {', '.join(f'`{name}`' for name in names)}; an empty list says: no answer")
    given = given if isinstance(given, list | tuple) else [given]
    answers = [str(answer) if _is_number(answer) else answer for answer in given]
    for answer in answers:
        if not isinstance(answer, str) or not answer.strip():
            raise BadRow(f"answers must be texts that are not empty, got {answer!r}")
    return tuple(dict.fromkeys(answer.strip() for answer in answers))


def _check(data: EvaluationData, may_abstain: bool) -> None:
    if not data.questions:
        raise ValueError(f"{data.name} must have at least one question, found none. Check the file and its format.")
    if not may_abstain and not any(question.answers or question.gold for question in data.questions):
        raise ValueError(
            f"{data.name} must have answers or gold documents, but its {len(data.questions)} questions have neither "
            f"(the first is {data.questions[0].place}). Add `answers` or `pos_index`, or let the system abstain with "
            "--min-score."
        )

"""Rows of the known formats -> questions and documents, every distinct document under one id.

`questions.py` has the formats, reads files and decides which questions are asked.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from recipes.training.data import BadRow, document_key, read_documents, read_positives

FORMATS = ("multihop", "passages", "reference", "flashrag", "kilt", "beir")
ALIKE = {"multihop", "reference", "flashrag"}  # differ in names of optional keys; the first row names a file


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


class Reader:
    """Makes questions and documents of rows.

    Attributes:
        format: one of `FORMATS`, that of the first row.
        questions: in the order of the rows.
        documents: id -> `{title, text}`, every distinct document once, in the order of the rows.
        titles: id -> title of gold documents whose text the rows do not have (KILT).
        digest: SHA-256 over the rows as JSON.
    """

    def __init__(self, is_beir: bool = False):
        self.is_beir, self.format, self.digest = is_beir, "", hashlib.sha256()
        self.questions: list[Question] = []
        self.documents: dict[str, dict] = {}
        self.titles: dict[str, str] = {}
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
        row = without_nulls(row)
        kind = "beir" if self.is_beir else row_format(row)
        if self.format and kind != self.format:
            if not {kind, self.format} <= ALIKE:
                raise BadRow(f"must be of the format {self.format} like the rows before it, got {kind}")
            kind = self.format
        before = len(self.documents)
        try:
            found = list(getattr(self, f"_{kind}")(row, place))
            for question in found:
                if question.id in self.places:
                    raise BadRow(f"must have an id of its own, got {question.id!r} like {self.places[question.id]}")
        except BadRow:
            for name in list(self.documents)[before:]:
                document = self.documents.pop(name)
                self.ids.pop(document_key(document), None)
            raise
        for question in found:
            self.places[question.id] = place
        self.format = kind
        self.questions += found

    def _documents(self, documents: list[dict]) -> list[str]:
        """Ids of documents, which are numbers from 0; the same title and text is the same document."""
        ids = []
        for document in documents:
            key = document_key(document)
            if key not in self.ids:
                self.ids[key] = str(len(self.ids))
                self.documents[self.ids[key]] = document
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
        self.titles |= gold
        text = _text(row, "input")
        yield Question(_id(row, place), text, _answers({"answers": answers}), (), tuple(gold), place, bool(answers))

    def _beir(self, row: Mapping, place: str) -> Iterator[Question]:
        if "gold" not in row:  # a document
            text, title = row.get("text", ""), row.get("title", "")
            (document,) = read_documents({"text": text, "title": title} if text else {"text": title})
            if row["_id"] in self.documents:
                raise BadRow(f"must have an id of its own, got {row['_id']!r} twice")
            self.documents[row["_id"]] = document
            return
        metadata = row.get("metadata") or {}
        if not isinstance(metadata, Mapping):
            raise BadRow(f"`metadata` must be an object, got {metadata!r}")
        given = [row.get("answers"), metadata.get("answers"), metadata.get("answer"), []]
        answers = _answers({"answers": next(value for value in given if value is not None)})
        unknown = [document_id for document_id in row["gold"] if document_id not in self.documents]
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


def without_nulls(value):
    """A row without the keys whose value is null, at any depth: Parquet has every key in every row and fills in nulls.

    >>> without_nulls({"qas": [{"id": "a", "question": "Q"}, {"id": None, "question": "R"}], "title": None})
    {'qas': [{'id': 'a', 'question': 'Q'}, {'question': 'R'}]}
    """
    if isinstance(value, Mapping):
        return {name: without_nulls(entry) for name, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value

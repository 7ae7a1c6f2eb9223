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
ANSWERS = ("answers", "golden_answers", "gold_answer", "answer")


@dataclass(frozen=True)
class Question:
    """One question of a file."""

    id: str  # unique in the file
    text: str
    answers: tuple[str, ...]  # each equally right; none if there is no answer, or only documents are asked for
    candidates: tuple[str, ...]  # ids of documents that the data offers, in its order and repeated as there
    gold: tuple[str, ...]  # ids of the documents that hold the answer; none if that is not known
    place: str  # file and line, for errors
    asks_answer: bool = True  # False if the data asks for documents only


class Reader:
    """Makes questions and documents of rows, in their order; all of one format, that of the first row."""

    def __init__(self, is_beir: bool = False):
        self.format = "beir" if is_beir else ""
        self.digest = hashlib.sha256()  # over the rows as JSON
        self.questions: list[Question] = []
        self.documents: dict[str, dict] = {}  # id -> `{title, text}`, every distinct document once
        self.titles: dict[str, str] = {}  # id -> title of gold documents whose text the rows do not have (KILT)
        self.ids: dict[str, str] = {}  # document_key -> id
        self.places: dict[str, str] = {}  # question id -> place

    def add(self, place: str, row: Mapping) -> None:
        """Add one row, or raise a BadRow that names the rule."""
        try:
            self.digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
        except UnicodeEncodeError as error:
            raise BadRow("must be text in Unicode, but has half of a surrogate pair") from error
        kind = "beir" if self.format == "beir" else row_format(row)
        if self.format and kind != self.format:
            if not {kind, self.format} <= ALIKE:
                raise BadRow(f"must be of the format {self.format} like the rows before it, got {kind}")
            kind = self.format
        n_documents, places = len(self.documents), {}
        try:
            found = list(getattr(self, f"_{kind}")(row, place))
            for question in found:
                earlier = self.places.get(question.id) or places.get(question.id)
                if earlier:
                    raise BadRow(f"must have an id of its own, got {question.id!r} like {earlier}")
                places[question.id] = place
        except BadRow:
            for name in list(self.documents)[n_documents:]:
                self.ids.pop(document_key(self.documents.pop(name)), None)
            raise
        self.places |= places
        self.format = kind
        self.questions += found

    def _documents(self, documents: list[dict]) -> tuple[str, ...]:
        """Ids of documents, which are numbers from 0; the same title and text is the same document."""
        ids = tuple(self.ids.setdefault(document_key(document), str(len(self.ids))) for document in documents)
        for name, document in zip(ids, documents, strict=True):
            self.documents.setdefault(name, document)
        return ids

    def _passages(self, row: Mapping, place: str) -> Iterator[Question]:
        documents = read_documents({"text": row["text"], "title": row.get("title", "")})
        read = [(pair, _text(pair, "question"), _answers(pair)) for pair in _objects(row, "qas", "question, answers")]
        gold = self._documents(documents)
        for index, (pair, text, answers) in enumerate(read):
            question_id = _id(pair, place) if "id" in pair else f"{_id(row, place)}#{index}"
            yield Question(question_id, text, answers, (), gold, place)

    def _multihop(self, row: Mapping, place: str) -> Iterator[Question]:
        text, answers = _text(row, "question"), _answers(row)
        documents = read_documents(row) if row.get("docs", row.get("documents")) else []
        positives = read_positives(row, len(documents))
        ids = self._documents(documents)
        gold = dict.fromkeys(ids[index] for index in positives)
        yield Question(_id(row, place), text, answers, ids, tuple(gold), place)

    _reference = _multihop

    def _flashrag(self, row: Mapping, place: str) -> Iterator[Question]:
        given = row.get("docs") or row.get("retrieval_result") or row.get("contents") or []
        given = [given] if isinstance(given, str | Mapping) else given
        if not isinstance(given, list):
            raise BadRow(f"documents must be a list, got {given!r}")
        documents = [entry.get("contents", entry) if isinstance(entry, Mapping) else entry for entry in given]
        yield from self._multihop({**row, "docs": documents}, place)

    def _kilt(self, row: Mapping, place: str) -> Iterator[Question]:
        outputs, gold = _objects(row, "output", "answer, provenance"), {}
        answers = [output["answer"] for output in outputs if output.get("answer")]
        for output in outputs:
            for source in _objects(output, "provenance", "wikipedia_id, title") if output.get("provenance") else []:
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
    """The format of a row, by its keys; a BadRow if it is none of them.

    >>> row_format({"question": "Who?", "docs": ["A"], "answers": ["B"]})
    'multihop'
    """
    if "qas" in row and "text" in row:
        return "passages"
    if "input" in row and "output" in row:
        return "kilt"
    if "question" not in row:
        given = ", ".join(sorted(row)) or "none"
        raise BadRow(f"must have the keys of one of the formats {', '.join(FORMATS)}, got {given}")
    if "golden_answers" in row and not ("docs" in row and "pos_index" in row):
        return "flashrag"
    has_documents = bool(row.get("docs", row.get("documents")))
    return "reference" if has_documents and "answers" not in row else "multihop"


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


def _objects(row: Mapping, name: str, keys: str) -> list[Mapping]:
    given = row[name]
    if not isinstance(given, list) or not all(isinstance(entry, Mapping) for entry in given):
        raise BadRow(f"`{name}` must be a list of {{{keys}}}, got {given!r}")
    return given


def _answers(row: Mapping) -> tuple[str, ...]:
    """All gold answers of a row; none only if the row says so with an empty list."""
    given = next((row[name] for name in ANSWERS if name in row), None)
    if given is None:
        raise BadRow(f"must have one of {', '.join(f'`{name}`' for name in ANSWERS)}; an empty list says: no answer")
    answers = []
    for answer in given if isinstance(given, list | tuple) else [given]:
        is_number = isinstance(answer, int | float) and not isinstance(answer, bool) and answer == answer  # no NaN
        text = str(answer) if is_number else answer
        if not isinstance(text, str) or not text.strip():
            raise BadRow(f"answers must be texts that are not empty, got {answer!r}")
        answers.append(text.strip())
    return tuple(dict.fromkeys(answers))

"""Rows out of files or the Hub, and what a row may say: documents, questions, answers, gold documents.

`records.py` makes records of them. Formats of a row:

    {title?, text, qas: [{question, answers}], paraphrase?}           stage 1; a passage with its questions
    {data_type, question: [], answers: [], docs: []}                  stage 1 as the reference publishes it
    {question, docs, answer | gold_answer | answers, pos_index?}      the other stages, the reference's as well

A document is a text, "title\\n text", or a dict with `text` and optionally `title`.

Raw text needs no questions: a row whose `paraphrase` is its own `text` makes stage 1 reconstruct the document from its
memory. For a file of `{title?, text}`:

    jq -c '{title, text, paraphrase: .text}' documents.jsonl > paraphrase.jsonl
"""

import glob
import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, List, Value, load_dataset
from trl.scripts.utils import DatasetConfig

from modeling_clara.corpus.storage import iter_lines
from modeling_clara.text_clara import read_document

# One record: chunks of the documents, indices of the gold ones among them, targets (a paraphrase has no question), the
# tokens of its longest prompt (for `train_sampling_strategy: group_by_length`), and the file and line.
FEATURES = Features(
    {
        "documents": List({"title": Value("string"), "text": Value("string")}),
        "positives": List(Value("int32")),
        "questions": List(Value("string")),
        "answers": List(Value("string")),
        "length": Value("int32"),
        "source": Value("string"),
    }
)
MAX_TITLE = 200  # characters of a first line that can still be a title


class BadRow(ValueError):
    """A row that cannot be used; `place` is its file and line, which the message begins with, where that is known."""

    def __init__(self, message: str, place: str = ""):
        super().__init__(f"{place} {message}".strip())
        self.place = place


# --- rows out of files ---------------------------------------------------------------------------------------------


def read_rows(source: DatasetConfig, on_bad_row: Callable[[BadRow], None] | None = None) -> Iterator[tuple[str, dict]]:
    """(place, row) of every row of a source, without nulls; the place is "file:line", or the row's number.

    Args:
        source: file or data set.
        on_bad_row: called with what is no JSON object, and reading goes on; without it that is raised.

    Raises:
        FileNotFoundError, ValueError: naming file and line.
    """
    for place, row in _read_source(source, on_bad_row):
        yield place, without_nulls(row)


def _read_source(source: DatasetConfig, on_bad_row: Callable[[BadRow], None] | None) -> Iterator[tuple[str, dict]]:
    path = Path(source.path)
    is_jsonl, is_parquet = path.suffix in (".jsonl", ".gz", ".json"), path.suffix == ".parquet" and not path.is_dir()
    if is_jsonl or is_parquet:
        if not path.exists():
            raise FileNotFoundError(f"`{path}` must be a file, found none. Correct the path.")
        yield from _read_jsonl(path, on_bad_row) if is_jsonl else _read_parquet(path)
        return
    if path.is_file():
        raise ValueError(f"{path} must be a .jsonl, .jsonl.gz or .parquet file. Convert it.")
    if path.is_dir() and glob.has_magic(source.path):
        raise ValueError(
            f"`path` must not have the characters *, ? or [ in the name of a folder, which `datasets` takes for a "
            f"pattern, got {source.path}. Rename the folder, or name its files."
        )
    options = {"data_dir": source.data_dir, "data_files": _exact(source.data_files, source)}
    for number, row in enumerate(load_dataset(source.path, source.name, split=source.split, **options), 1):
        yield f"{source.path}:{number}", row


def _read_jsonl(path: Path, on_bad_row: Callable[[BadRow], None] | None) -> Iterator[tuple[str, dict]]:
    for number, row, problem in iter_lines(path):
        place = f"{path}:{number}"
        if problem is None and isinstance(row, dict):
            yield place, row
            continue
        found = problem or f"must be a JSON object, got {type(row).__name__}"
        error = BadRow(f"{found}. Correct or remove the line.", place)
        if on_bad_row is None:
            raise error
        on_bad_row(error)


def _read_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    """The rows of this very file; `load_dataset` would take its name for a pattern."""
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"it has two columns {twice[0]!r}, one of which must be renamed")
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield f"{path}:{number}", row
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Copy the file again, or write it anew.") from error


def without_nulls(value):
    """A row without the keys whose value is null, at any depth: Parquet has every key in every row and fills in nulls.

    >>> without_nulls({"qas": [{"id": "a", "question": "Q"}, {"id": None, "question": "R"}], "title": None})
    {'qas': [{'id': 'a', 'question': 'Q'}, {'question': 'R'}]}
    """
    if isinstance(value, Mapping):
        return {name: without_nulls(entry) for name, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _exact(files, source: DatasetConfig):
    """`data_files` or a part of it, in which the name of a file that exists is no pattern."""
    if isinstance(files, Mapping):
        return {split: _exact(names, source) for split, names in files.items()}
    if _is_list(files):
        return [_exact(name, source) for name in files]
    folders = (Path(source.path), Path(source.data_dir or "."))
    return glob.escape(str(files)) if files and any((folder / str(files)).is_file() for folder in folders) else files


def _names(files) -> list[str]:
    """All names in `data_files`."""
    if isinstance(files, Mapping):
        files = list(files.values())
    return [name for entry in files for name in _names(entry)] if _is_list(files) else [str(files)]


def local_files(source: DatasetConfig) -> list[Path]:
    """The files of a source on this machine; none of a data set of the Hub."""
    path, names = Path(source.path), _names(source.data_files or [])
    paths = [
        *(sorted(path.rglob("*")) if path.is_dir() else [path]),
        *(path / name for name in names),
        *map(Path, names),
    ]
    return [found for found in dict.fromkeys(paths) if found.is_file()]


def convert_rows(paths: Iterable[str | Path], convert: Callable[[dict], dict]) -> Iterator[dict]:
    """`convert(row)` of every row of files; a `BadRow` of it gets file and line."""
    for path in paths:
        for place, row in read_rows(DatasetConfig(path=str(path))):
            try:
                yield convert(row)
            except BadRow as error:
                raise BadRow(str(error), place) from error


# --- rows to records -------------------------------------------------------------------------------------------------


def read_documents(row: Mapping) -> list[dict]:
    """The documents of a row as `{title, text}`.

    Raises:
        BadRow: there are none, or one is empty.
    """
    documents = row.get("docs", row.get("documents"))
    if documents is None and "text" in row:
        documents = [row]
    if isinstance(documents, str | Mapping):
        documents = [documents]
    if not documents or not _is_list(documents):
        raise BadRow("must have `docs` or `text` with at least one document")
    read = []
    for index, document in enumerate(documents):
        if isinstance(document, str):
            title, newline, text = document.partition("\n")
            if newline and title.strip() and text.strip() and len(title) <= MAX_TITLE:
                document = {"title": title, "text": text}
        try:
            title, text = read_document(document, f"docs[{index}]")
        except (TypeError, ValueError) as error:
            raise BadRow(str(error)) from error
        read.append({"title": title, "text": text.strip()})
    return read


def read_targets(row: Mapping, gold_first: bool = False) -> list[tuple[str | None, str]]:
    """(question, answer) pairs of a row; the question of a paraphrase is None.

    With `gold_first` the gold answer of a row counts before a teacher's.

    Raises:
        BadRow: there is no answer, or questions and answers do not pair.
    """
    question, answers = row.get("question"), row.get("answers")
    is_paraphrase = "qas" not in row and row.get("data_type") == "paraphrase"
    if "qas" in row:
        if not _is_list(row["qas"]) or not all(isinstance(pair, Mapping) for pair in row["qas"]):
            raise BadRow(f"`qas` must be a list of {{question, answers}}, got {row['qas']!r}")
        pairs = [(pair.get("question", ""), pair.get("answers") or pair.get("answer")) for pair in row["qas"]]
    elif is_paraphrase:  # the reference's instruction is left aside for our own
        pairs = [(None, answers)]
    elif _is_list(question):
        if not _is_list(answers) or len(answers) != len(question):
            raise BadRow("must have as many `answers` as entries in `question`")
        pairs = list(zip(question, answers, strict=True))
    elif question is not None:
        order = ("gold_answer", "answer") if gold_first else ("answer", "gold_answer")
        given = [row[name] for name in (*order, "answers") if row.get(name) is not None]
        pairs = [(question, given[0] if given else None)]
    else:
        pairs = []
    targets = [(None if is_paraphrase else _question(question), _answer(answer)) for question, answer in pairs]
    if row.get("paraphrase") is not None:
        targets.append((None, _answer(row["paraphrase"])))
    if not targets:
        raise BadRow("must have `question` and `answers`, `qas`, or `paraphrase`")
    return targets


def _is_list(value) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _question(question) -> str:
    if not isinstance(question, str) or not question.strip():
        raise BadRow(f"`question` must be a text that is not empty, got {question!r}")
    return question.strip()


def _answer(answer) -> str:
    """The first of several answers; never an empty one."""
    if _is_list(answer):
        answer = answer[0] if answer else None
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise BadRow(f"must have an answer that is a text and not empty, got {answer!r}")
    return answer.strip()


def read_positives(row: Mapping, n_documents: int) -> list[int]:
    """Indices of the gold documents, empty if they are not known."""
    positives = row.get("pos_index", [])
    if not n_documents and positives not in ([], ()):
        raise BadRow(f"`pos_index` must be left out where there are no documents, got {positives}")
    positives = list(positives) if _is_list(positives) else [positives]
    if any(type(index) is not int or not 0 <= index < n_documents for index in positives):
        raise BadRow(f"`pos_index` must hold numbers from 0 to {n_documents - 1}, got {positives}")
    return sorted(set(positives))


def text_places(record: Mapping, share: float) -> list[int]:
    """Places of the documents that a record's prompts read as text instead of from memory: one in a share of records.

    The draw depends on the record's source alone, so it is the same in every epoch and process. Every document is as
    likely as the others, gold or not: the answer is not always in the text. A record with a paraphrase reads no text,
    which it would only copy.
    """
    if None in record["questions"]:
        return []
    generator = random.Random(record["source"])
    return [generator.randrange(len(record["documents"]))] if generator.random() < share else []


def document_key(document: Mapping) -> str:
    """What tells documents apart: a hash of title and text."""
    return hashlib.sha256(f"{document['title']}\x00{document['text']}".encode()).hexdigest()


def in_steps(rows: list, rows_of_step: int, generator: random.Random) -> list:
    """Sorted rows in an order for sequential sampling: neighbours make a step, steps come in any order.

    >>> in_steps([1, 2, 3, 4, 5], 2, random.Random(1))
    [3, 4, 1, 2]
    """
    rows = rows[: len(rows) // rows_of_step * rows_of_step] or rows  # a smaller step would shift all after it
    steps = [rows[start : start + rows_of_step] for start in range(0, len(rows), rows_of_step)]
    generator.shuffle(steps)
    return [row for step in steps for row in step]

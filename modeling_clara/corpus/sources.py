"""Reads documents one at a time: folders, JSONL, Parquet, data sets of the Hub, lists and generators.

A row that cannot be read is a row with a problem, not an exception: streams go on.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

from ..manifest_clara import RESERVED_COLUMNS, pa, pq, require_arrow
from ..text_clara import given_id, read_document
from .storage import iter_lines

TEXT_SUFFIXES = (".txt", ".md")
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".parquet")
SUFFIXES = (*TEXT_SUFFIXES, *ROW_SUFFIXES)
MAX_DEPTH = 16  # of nested metadata; Parquet reads no more than some dozens
PEEKED_ROWS = 1024  # from which the types of metadata are inferred where no schema tells them


@dataclass
class InputRow:
    """One row of the input.

    Attributes:
        index: its number in the whole input, from 0.
        place: how an error names it, such as `docs.jsonl:3`.
        document: `{id?, title?, text, ...}` under these names; None where it cannot be read.
        problem: why not.
    """

    index: int
    place: str
    document: dict | None = None
    problem: str | None = None


class DocumentSource:
    """The rows of an input, as often as wanted but for a generator, which gives them once.

    Args:
        documents: path of a folder of .txt and .md files, or of .jsonl, .jsonl.gz and .parquet files, or of one file;
            id of a data set on the Hub; a `datasets.Dataset` or `IterableDataset`; any iterable of texts or dicts.
        text_column, title_column, id_column: the columns that hold them; the id also from `id`, else `document_id`.
        split: of a data set on the Hub.
        config_name: of a data set on the Hub.
        exclude: folder whose files are no input, though it lies in the input's.

    Raises:
        FileNotFoundError, TypeError, ValueError: there is no such input.
    """

    def __init__(
        self,
        documents,
        *,
        text_column: str = "text",
        title_column: str = "title",
        id_column: str | None = None,
        split: str = "train",
        config_name: str | None = None,
        exclude: Path | None = None,
    ):
        require_arrow()
        self.exclude, self._peeked = exclude, None
        self.columns = {text_column: "text", title_column: "title"} | ({id_column: "id"} if id_column else {})
        self.files: list[Path] = []
        self.schema = None  # Arrow types of the columns, where the input tells them
        self.length: int | None = None
        if isinstance(documents, str | os.PathLike):
            if not os.fspath(documents):
                raise ValueError("`documents` must be a path or the id of a data set, got ''. Name one.")
            path = Path(documents)
            if _exists(documents):
                self._read_paths(path)
                return
            documents = _load_hub_dataset(str(documents), split, config_name)
            self.description = {"kind": "hub", "name": str(path), "split": split, "config_name": config_name}
        elif type(documents).__module__.partition(".")[0] in ("pandas", "polars"):
            raise TypeError(
                f"`documents` must be a path, a data set or a list, got a {type(documents).__name__}. Pass "
                "`datasets.Dataset.from_pandas(frame)`, or its rows as dicts."
            )
        elif isinstance(documents, Mapping | bytes) or not isinstance(documents, Iterable):
            raise TypeError(
                f"`documents` must be a path, a data set or a list, got {type(documents).__name__}. Wrap a single "
                "document in []."
            )
        else:
            self.description = {"kind": "list" if isinstance(documents, Sized) else "stream"}
        if isinstance(documents, Sized):
            self.length = len(documents)
            self.description["rows"] = self.length
        features = getattr(documents, "features", None)  # of a data set; a list has none
        if features is not None:
            self.schema = features.arrow_schema
        self._rows = documents

    def _read_paths(self, path: Path) -> None:
        if path.is_file():
            if not path.name.lower().endswith(SUFFIXES):
                raise ValueError(
                    f"`documents` must be a {', '.join(SUFFIXES)} file or a folder of them, got {path}. Convert it."
                )
            self.root, self.files = path.parent, [path]
        else:
            found = sorted(file for file in path.rglob("*") if file.is_file() and file.name.lower().endswith(SUFFIXES))
            if self.exclude is not None:
                found = [file for file in found if not file.resolve().is_relative_to(self.exclude.resolve())]
            texts = [file for file in found if file.suffix.lower() in TEXT_SUFFIXES]
            rows = [file for file in found if file.suffix.lower() not in TEXT_SUFFIXES]
            plain = [file for file in texts if file.suffix.lower() != ".md"]
            if rows and plain:
                raise ValueError(
                    f"`documents` must be a folder of texts or of rows, {path} has both: {plain[0].name} and "
                    f"{rows[0].name}. Name one of the files, or a folder with one kind."
                )
            self.root, self.files = path, rows or texts  # beside rows an .md is their README
            if not self.files:
                raise ValueError(
                    f"`documents` must be a folder with {', '.join(SUFFIXES)} files, found none in {path}. Name "
                    "another."
                )
        sizes = [[file.relative_to(self.root).as_posix(), file.stat().st_size] for file in self.files]
        digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]
        name = path.name.encode("utf-8", "replace").decode()
        self.description = {"kind": "files", "name": name, "files": len(sizes), "sizes": digest}
        if self.files[0].suffix.lower() in TEXT_SUFFIXES:
            self.length = len(self.files)
        parquet = [file for file in self.files if file.suffix.lower() == ".parquet"]
        if len(parquet) == len(self.files):
            self.length = 0
            for file in parquet:
                try:
                    self.length += pq.read_metadata(file).num_rows
                    self.schema = self.schema or pq.read_schema(file)
                except (pa.ArrowException, OSError) as error:
                    raise ValueError(f"{file} must be a whole Parquet file: {error}. Copy it again.") from error

    def peek(self) -> list[InputRow]:
        """The first rows, at most `PEEKED_ROWS`; the next iteration begins with them all the same."""
        if self._peeked is None:
            rows = self._generate()
            self._peeked = list(itertools.islice(rows, PEEKED_ROWS)), rows
        return self._peeked[0]

    def __iter__(self) -> Iterator[InputRow]:
        rows, self._peeked = self._peeked, None
        return self._generate() if rows is None else itertools.chain(*rows)

    def _generate(self) -> Iterator[InputRow]:
        rows = self._file_rows() if self.files else self._object_rows()
        for index, (place, document, problem) in enumerate(rows):
            if document is not None:
                document, problem = self._normalised(document, place)
            yield InputRow(index, place, document, problem)

    def _normalised(self, document, place: str) -> tuple[dict | None, str | None]:
        """The document under our names, or why it is none."""
        if isinstance(document, str):
            return {"text": document}, None
        if not isinstance(document, Mapping):
            return None, f"`{place}` must be a text or a dict, got {type(document).__name__}. Convert it."
        strange = [name for name in document if not isinstance(name, str)]
        if strange or any(not is_utf8(name) for name in document):
            strange = strange or [name for name in document if not is_utf8(name)]
            return None, f"`{place}` must have text as names of its columns, got {strange[0]!r}. Rename it."
        # A column that was named for a field wins over one that has the field's name.
        renamed = {name: value for name, value in document.items() if name not in self.columns}
        renamed |= {self.columns[name]: document[name] for name in document if name in self.columns}
        document_id = given_id(renamed)
        renamed.pop("document_id", None)
        if document_id is not None:
            renamed["id"] = document_id
        if any(_depth(value) > MAX_DEPTH for name, value in renamed.items() if name not in RESERVED_COLUMNS):
            return None, f"`{place}` must have metadata nested at most {MAX_DEPTH} deep. Make it text."
        try:
            read_document(renamed, place)
        except (TypeError, ValueError) as error:
            return None, str(error)
        return renamed, None

    def _object_rows(self) -> Iterator[tuple]:
        for index, document in enumerate(self._rows):
            if document is None:
                yield (
                    f"documents[{index}]",
                    None,
                    f"`documents[{index}]` must be a text or a dict, got None. Remove it.",
                )
            else:
                yield f"documents[{index}]", document, None

    def _file_rows(self) -> Iterator[tuple]:
        for file in self.files:
            name = file.relative_to(self.root).as_posix()
            if file.suffix.lower() in TEXT_SUFFIXES:
                yield _text_row(file, name)
            elif file.suffix.lower() == ".parquet":
                yield from _parquet_rows(file, name)
            else:
                yield from _json_rows(file, name)

    def metadata_types(self) -> "dict[str, pa.DataType] | None":
        """Types of the columns that are neither text, title, id nor ours; None where the input does not tell them."""
        if self.schema is None:
            return None
        return {
            field.name: field.type
            for field in self.schema
            if self.columns.get(field.name, field.name) not in RESERVED_COLUMNS
        }


def is_utf8(text: str) -> bool:
    """Whether a text can be written; one with a lone surrogate cannot."""
    return text.encode("utf-8", "replace").decode() == text


def _depth(value, level: int = 0) -> int:
    """How deep lists and dicts stand in each other, as far as it matters; a list may stand in itself."""
    if level > MAX_DEPTH or not isinstance(value, list | tuple | Mapping):
        return level
    inner = value.values() if isinstance(value, Mapping) else value
    return max((_depth(part, level + 1) for part in inner), default=level + 1)


def _text_row(file: Path, name: str) -> tuple:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        return name, None, f"`{name}` cannot be read as UTF-8 text: {error}"
    if not text.strip():
        return name, None, f"`{name}` is empty"
    return name, {"id": name, "title": file.stem.replace("_", " "), "text": text}, None


def _json_rows(file: Path, name: str) -> Iterator[tuple]:
    for number, document, problem in iter_lines(file):
        place = f"{name}:{number}"
        if problem is None and document is None:
            problem = "must be a text or an object, got null. Remove it."
        yield place, document, problem and f"`{place}` {problem}"


def _parquet_rows(file: Path, name: str) -> Iterator[tuple]:
    try:
        with pq.ParquetFile(file) as parquet:
            number = itertools.count()
            for batch in parquet.iter_batches(batch_size=256):
                for document, problem in _parquet_values(batch):
                    place = f"{name}[{next(number)}]"
                    yield place, document, problem and f"`{place}` cannot be read: {problem}. Correct it."
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} must be a whole Parquet file: {error}. Copy or convert it again.") from error


def _parquet_values(batch: "pa.RecordBatch") -> list[tuple]:
    """(document, problem) of every row."""
    try:
        return [(document, None) for document in batch.to_pylist()]
    except (ValueError, OverflowError):  # of text that is no UTF-8, of a time that Python does not have
        rows = []
        for place in range(len(batch)):
            try:
                rows.append((batch.slice(place, 1).to_pylist()[0], None))
            except (ValueError, OverflowError) as error:
                rows.append((None, str(error)))
        return rows


def _exists(path: str | os.PathLike) -> bool:
    """Whether there is such a file or folder; no for a text that is no path."""
    try:
        return bool(os.fspath(path)) and Path(path).exists()
    except OSError:
        return False


def _load_hub_dataset(name: str, split: str, config_name: str | None):
    """A data set of the Hub, streamed: it is never on this disk as a whole."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"`{name}` is no file; as a data set of the Hub it needs datasets: pip install datasets, or the extra "
            "`corpus` from a clone of the repository."
        ) from error
    try:
        return datasets.load_dataset(name, config_name, split=split, streaming=True)
    except (OSError, ValueError) as error:  # DatasetNotFoundError is a FileNotFoundError
        raise FileNotFoundError(
            f"`documents` must be a file, a folder or a data set of the Hub with the split {split!r}, got {name!r}: "
            f"{error} Check the name."
        ) from error


def infer_types(documents: Sequence[Mapping]) -> "dict[str, pa.DataType]":
    """Arrow types of the metadata of some documents; the first value decides where they disagree."""
    values: dict[str, list] = {}
    for document in documents:
        for name, value in document.items():
            if name not in RESERVED_COLUMNS and value is not None:
                values.setdefault(name, []).append(value)
    for document in documents:  # a column without any value is text
        for name in document:
            if name not in RESERVED_COLUMNS:
                values.setdefault(name, [""])
    return {name: _infer_type(column) for name, column in values.items()}


def _infer_type(column: list) -> "pa.DataType":
    for sample in (column, column[:1]):
        try:
            found = pa.array(sample).type
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            continue
        if found == pa.list_(pa.null()):
            return pa.list_(pa.string())
        return found if _can_be_stored(found) else pa.string()
    return pa.string()


def _can_be_stored(kind: "pa.DataType") -> bool:
    """Whether Parquet has a place for it; it has none for an object without fields."""
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    return not (pa.types.is_struct(kind) and not inner) and all(map(_can_be_stored, inner))


def type_from_name(name: str) -> "pa.DataType":
    """An Arrow type by its name: those of `pyarrow.type_for_alias`, `list<...>`, times with a zone and decimals.

    Raises:
        ValueError: there is none.
    """
    aliases = {"str": "string", "int": "int64", "float": "double"}
    if name.startswith("list<") and name.endswith(">"):
        inner = name[5:-1].partition(":")[2].removesuffix(" not null").strip()
        return pa.list_(type_from_name(inner))
    if zoned := re.fullmatch(r"timestamp\[(\w+), tz=(.+)\]", name):
        return pa.timestamp(*zoned.groups())
    if decimal := re.fullmatch(r"decimal128\((\d+), (\d+)\)", name):
        return pa.decimal128(*map(int, decimal.groups()))
    try:
        return pa.type_for_alias(aliases.get(name, name))
    except ValueError as error:
        raise ValueError(f"`metadata` must name Arrow types, got {name!r}. Example: 'int64', 'string'.") from error

"""Reads documents one at a time: files of every format, data sets of the Hub, lists and generators.

A row that cannot be read is a row with a problem, not an exception: streams go on.
"""

import functools
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..manifest_clara import RESERVED_COLUMNS, pa, require_arrow
from ..text_clara import given_id, read_document
from .converters import Item
from .files import InputFile, find_files, is_remote
from .formats import BY_ENDING, describe_missing, file_columns, format_of, read_file
from .tables import parquet_schema
from .types import ColumnTypes, unite

logger = logging.getLogger(__name__)

MAX_DEPTH = 16  # of nested metadata; Parquet reads no more than some dozens
PEEKED_ROWS = 1024  # from which the types of metadata are inferred if no schema tells them and they come only once
SCANNED_ROWS = 1024  # whose types are united at a time


@dataclass
class InputRow:
    """One row of the input.

    Attributes:
        index: its number in the whole input, from 0.
        place: how an error names it, such as `docs.jsonl:3`.
        document: `{id?, title?, text, ...}` under these names; None if it cannot be read.
        problem: why not.
        status: with a problem: "skipped", "unsupported" or "empty" if it is a file of that kind, else "failed".
        file: name of the file that it comes from, None if it comes from none.
    """

    index: int
    place: str
    document: dict | None = None
    problem: str | None = None
    status: str | None = None
    file: str | None = None


class DocumentSource:
    """The rows of an input, as often as wanted but for a generator, which gives them once.

    Args:
        documents: path or fsspec address of a file or a folder of files (`formats.FORMATS`); id of a data set on the
            Hub; a `datasets.Dataset` or `IterableDataset`; any iterable of texts or dicts; or files that were found.
        text_column, title_column, id_column: the columns that hold them; the id also from `id`, else `document_id`.
        split, config_name: of a data set on the Hub.
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
        self._peeked = None
        self.text_column = text_column
        self.columns = {text_column: "text", title_column: "title"} | ({id_column: "id"} if id_column else {})
        self.files: list[InputFile] = []
        self.is_folder = True
        self.schema = None  # Arrow types of the columns, if the input tells them
        self.length: int | None = None
        self.bytes_read = self.rows_read = 0  # of files that were read to their end
        self._rows: Iterable = ()
        if isinstance(documents, str | os.PathLike):
            if not os.fspath(documents):
                raise ValueError("`documents` must be a path or the id of a data set, got ''. Name one.")
            if is_remote(documents) or _exists(documents):
                self._find(documents, exclude)
                return
            check_location(str(documents))
            name, documents = str(documents), _load_hub_dataset(str(documents), split, config_name)
            self.description = {"kind": "hub", "name": name, "split": split, "config_name": config_name}
        elif isinstance(documents, Sequence) and documents and all(isinstance(file, InputFile) for file in documents):
            self.files, self.description = list(documents), {"kind": "files"}
            return
        else:
            _check_iterable(documents)
            self.description = {"kind": "list" if isinstance(documents, Sized) else "stream"}
        if isinstance(documents, Sized):
            self.length = len(documents)
            self.description["rows"] = self.length
        features = getattr(documents, "features", None)  # of a data set; a list has none
        if features is not None:
            self.schema = features.arrow_schema
        self._rows = documents

    def _find(self, location: str | os.PathLike, exclude: Path | None) -> None:
        self.is_folder, self.files = find_files(location, exclude)
        readable = [file for file in self.files if file.skipped is None and format_of(file)]
        if not readable:
            found = self.files[0].name if self.files else "no file"
            raise ValueError(
                f"`documents` must be a file or have files with one of the endings {' '.join(BY_ENDING)}, got {found} "
                f"in {location}. Convert them, or name another folder."
            )
        if missing := describe_missing(self.files):
            logger.warning(missing)
        name = os.fspath(location).rstrip("/").rpartition("/")[2].encode("utf-8", "replace").decode()
        sizes = [[file.name, file.size] for file in readable]
        digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]
        self.description = {"kind": "files", "name": name, "files": len(sizes), "sizes": digest}

    def share(self, world_size: int = 1) -> int | None:
        """About how many rows one of several processes has; None if nothing tells."""
        length = self.length
        if length is None and self.bytes_read:
            length = round(self.rows_read * self.n_bytes / self.bytes_read)
        return None if length is None else -(-length // world_size)

    @functools.cached_property
    def n_bytes(self) -> int:
        """Bytes of all files that are read, as far as their sizes are known; asked for once for every document."""
        return sum(max(file.size, 0) for file in self.files if file.skipped is None and format_of(file))

    @functools.cached_property
    def given_ids(self) -> frozenset[str]:
        """The ids that the rows of a list bring, which no row without one may take; of what comes once none."""
        if self.files or self.length is None:
            return frozenset()
        ids = (row.document.get("id") for row in self if row.document is not None)
        return frozenset(str(name) for name in ids if name is not None)

    def free_id(self, index: int) -> str:
        """An id for a row without one: its number, unless a row brings that."""
        name = str(index)
        while name in self.given_ids:
            name = f"#{name}"
        return name

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
        self.bytes_read = self.rows_read = rows = 0
        if not self.files:
            for index, document in enumerate(self._rows):
                yield self._row(index, Item(f"documents[{index}]", document))
            return
        for file in self.files:
            for item in read_file(file, self.text_column):
                if not self.is_folder and item.status in ("failed", "unsupported") and item.place == file.name:
                    raise ValueError(f"{item.problem} Correct it or name another file.")
                yield self._row(rows, item, file.name)
                rows += 1
            self.bytes_read += max(file.size, 0) if file.skipped is None and format_of(file) else 0
            self.rows_read = rows

    def _row(self, index: int, item: Item, file: str | None = None) -> InputRow:
        if item.problem is not None:
            problem = item.problem if item.problem.endswith(".") else f"{item.problem}."
            return InputRow(index, item.place, None, problem, item.status, file)
        document, problem = self._normalised(item.document, item.place)
        if problem is not None:
            is_blank = problem.endswith("is empty.")
            return InputRow(index, item.place, None, problem, "empty" if is_blank else "failed", file)
        if file is not None:
            document.setdefault("id", item.place)  # the same in every order of the files
        return InputRow(index, item.place, document, file=file)

    def _normalised(self, document, place: str) -> tuple[dict | None, str | None]:
        """The document under our names, or why it is none."""
        if isinstance(document, str):
            document = {"text": document}
        if not isinstance(document, Mapping):
            return None, f"`{place}` must be a text or a dict, got {type(document).__name__}. Convert it."
        strange = [name for name in document if not isinstance(name, str) or not is_utf8(name)]
        if strange:
            return None, f"`{place}` must have text as names of its columns, got {strange[0]!r}. Rename it."
        # A column that was named for a field wins over one that has the field's name.
        renamed = {name: value for name, value in document.items() if name not in self.columns}
        renamed |= {self.columns[name]: document[name] for name in document if name in self.columns}
        document_id = given_id(renamed)
        if document_id is None:  # as BEIR and MongoDB call it
            document_id = renamed.pop("_id", None)
        renamed.pop("document_id", None)
        renamed.pop("id", None)
        if document_id is not None:
            renamed = {"id": document_id, **renamed}
        if any(_depth(value) > MAX_DEPTH for name, value in renamed.items() if name not in RESERVED_COLUMNS):
            return None, f"`{place}` must have metadata nested at most {MAX_DEPTH} deep. Make it text."
        if isinstance(renamed.get("text"), str) and not renamed["text"].strip():
            return None, f"`{place}` is empty."
        try:
            read_document(renamed, place)
        except (TypeError, ValueError) as error:
            return None, str(error)
        return renamed, None

    # --- types of metadata -------------------------------------------------------------------------------------------

    def scan(self, declared: Iterable[str] = ()) -> ColumnTypes:
        """The types of all columns that are neither text, title, id nor ours, but for those that are `declared`.

        Files and lists are read to their end; of what comes only once, the rows of `peek` decide. A ValueError if
        the schemas of two files cannot be united.
        """
        columns, declared = ColumnTypes(), set(declared)
        if self.schema is not None:
            columns.add_schema(self._metadata(dict(zip(self.schema.names, self.schema.types, strict=True))), "")
        elif not self.files:
            rows = self if self.length is not None else self.peek()
            self._add_rows(columns, rows, declared)
        else:
            parquet = [file for file in self.files if file.skipped is None and file.suffix == ".parquet"]
            for file in parquet:
                self._add_schema(columns, file, declared)
            tables = [file for file in self.files if file.skipped is None and file not in parquet]
            tables = [file for file in tables if format_of(file) and format_of(file).has_rows]
            if tables:
                scanned = DocumentSource(tables, **self._options())
                self._add_rows(columns, scanned, declared)
            for name, kind in file_columns(self.files, self.is_folder).items():
                columns.types[name] = unite(columns.types.get(name, kind), kind) or pa.string()
        return columns

    def _options(self) -> dict:
        names = {field: name for name, field in self.columns.items()}
        return {"text_column": names["text"], "title_column": names["title"], "id_column": names.get("id")}

    def _metadata(self, values: Mapping) -> dict:
        return {name: value for name, value in values.items() if self.columns.get(name, name) not in RESERVED_COLUMNS}

    def _add_rows(self, columns: ColumnTypes, rows: Iterable[InputRow], declared: set[str]) -> None:
        left_out = {*RESERVED_COLUMNS, *declared}
        good = (
            (row.place, {name: value for name, value in row.document.items() if name not in left_out})
            for row in rows
            if row.document is not None
        )
        while batch := list(itertools.islice(good, SCANNED_ROWS)):
            columns.add(batch)

    def _add_schema(self, columns: ColumnTypes, file: InputFile, declared: set[str]) -> None:
        try:
            schema = parquet_schema(file)
        except (pa.ArrowException, OSError):
            return  # which its rows say
        types = self._metadata(dict(zip(schema.names, schema.types, strict=True)))
        columns.add_schema({name: kind for name, kind in types.items() if name not in declared}, file.name)


def _check_iterable(documents) -> None:
    """Raise a TypeError unless these are documents, and not one document or a frame."""
    if type(documents).__module__.partition(".")[0] in ("pandas", "polars"):
        raise TypeError(
            f"`documents` must be a path, a data set or a list, got a {type(documents).__name__}. Pass "
            "`datasets.Dataset.from_pandas(frame)`, or its rows as dicts."
        )
    if isinstance(documents, Mapping | bytes) or not isinstance(documents, Iterable):
        raise TypeError(
            f"`documents` must be a path, a data set or a list, got {type(documents).__name__}. Wrap a single "
            "document in []."
        )


def is_utf8(text: str) -> bool:
    """Whether a text can be written; one with a lone surrogate cannot."""
    return text.encode("utf-8", "replace").decode() == text


def _depth(value, level: int = 0) -> int:
    """How deep lists and dicts stand in each other, as far as it matters; a list may stand in itself."""
    if level > MAX_DEPTH or not isinstance(value, list | tuple | Mapping):
        return level
    inner = value.values() if isinstance(value, Mapping) else value
    return max((_depth(part, level + 1) for part in inner), default=level + 1)


def _exists(path: str | os.PathLike) -> bool:
    """Whether there is such a file or folder; no for a text that is no path."""
    try:
        return bool(os.fspath(path)) and Path(path).exists()
    except OSError:
        return False


def check_location(documents: str) -> None:
    """Raise what can be told about an input before a model is loaded for it.

    Raises:
        FileNotFoundError: it is no file or folder here, no address, and no id that a data set of the Hub can have.
        ImportError: pyarrow is missing.
    """
    require_arrow()
    if is_remote(documents) or _exists(documents):
        return
    try:
        validate_repo_id(documents)
    except HFValidationError:
        raise FileNotFoundError(
            f"`documents` must be a file, a folder or a data set of the Hub, got {documents!r}, where there is no "
            "file or folder. Check the path."
        ) from None


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

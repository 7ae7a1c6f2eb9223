"""Rows out of CSV, Excel, JSON and Parquet files.

A row of a table that has a column of text is a document, and its other columns are metadata. A CSV file or a sheet
without one is a document as a whole, in which every row is a line of `name: value`.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from ..manifest_clara import pa, pq
from .converters import Item, decode, read_whole, seekable, zipped
from .encodings import SAMPLE, find_encoding
from .files import InputFile
from .storage import parse_lines

BATCH_ROWS = 256  # of Parquet, in memory at a time
csv.field_size_limit(2**31 - 1)  # a cell may hold a whole document


class Cell(str):
    """A value of a CSV file, of which only the other values of its column tell whether it is a number or a time."""


def _duplicate(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)


def _check_names(names: Sequence[str]) -> None:
    if (name := _duplicate(names)) is not None:
        raise ValueError(f"must have columns of different names, got {name!r} twice. Rename one")


# --- CSV and Excel ---------------------------------------------------------------------------------------------------


def read_csv(file: InputFile, text_column: str) -> Iterator[Item]:
    """A CSV or TSV file; its delimiter is found in its first line, unless the ending tells it."""
    with file.open() as stream:
        sample = stream.read(SAMPLE)
    encoding = find_encoding(sample)
    first_line = sample.decode(encoding, "replace").lstrip("\ufeff").partition("\n")[0]
    delimiter = "\t" if file.suffix == ".tsv" else max(",;\t|", key=first_line.count)
    with file.open() as stream, io.TextIOWrapper(stream, encoding, newline="") as text:
        yield from _table(file, _csv_rows(text, delimiter), text_column)


def _csv_rows(text: io.TextIOWrapper, delimiter: str) -> Iterator[tuple[int, list]]:
    reader, line = csv.reader(text, delimiter=delimiter), 0
    for cells in reader:
        yield line + 1, [Cell(cell) if cell.strip() else None for cell in cells]
        line = reader.line_num


def read_xlsx(file: InputFile, text_column: str) -> Iterator[Item]:
    """An Excel file, sheet by sheet."""
    import openpyxl

    with zipped(file) as stream:
        book = openpyxl.load_workbook(stream, read_only=True, data_only=True)
        for sheet in book.worksheets:
            sheet.reset_dimensions()  # which some exporters write wrong
            rows = ((number, list(cells)) for number, cells in enumerate(sheet.iter_rows(values_only=True), 1))
            yield from _table(file, rows, text_column, sheet.title)


def _table(
    file: InputFile, rows: Iterator[tuple[int, list]], text_column: str, sheet: str | None = None
) -> Iterator[Item]:
    """Items of (number, cells) rows, the first of which that is not empty has the names."""
    place = file.name if sheet is None else f"{file.name}#sheet={sheet}"
    rows = ((number, cells) for number, cells in rows if any(cell is not None for cell in cells))
    header = next(rows, None)
    if header is None:
        yield Item(place, None, f"`{place}` is empty", "empty")
        return
    names = [str(cell).strip() if cell is not None else None for cell in header[1]]
    sheet_columns = {} if sheet is None else {"sheet": sheet}
    if text_column not in names:
        lines = [", ".join(name for name in names if name)]
        lines += (_line(names, cells) for _, cells in rows)
        document = {"id": place, "title": file.title, "text": "\n".join(lines), "path": file.name, **sheet_columns}
        yield Item(place, document)
        return
    _check_names([name for name in names if name])
    for number, cells in rows:
        row_place = f"{place}:{number}"
        if any(cell is not None for cell in cells[len(names) :]):
            problem = f"`{row_place}` must have {len(names)} cells, got {len(cells)}. Correct its quotes."
            yield Item(row_place, None, problem, "failed")
            continue
        values = {name: cell for name, cell in zip(names, cells, strict=False) if name and cell is not None}
        values |= {name: str(values[name]) for name in (text_column, "title") if name in values}
        yield Item(row_place, {"text": "", **values, **sheet_columns})


def _line(names: Sequence[str | None], cells: Sequence) -> str:
    pairs = itertools.zip_longest(names, cells)
    return ", ".join(f"{name}: {cell}" if name else str(cell) for name, cell in pairs if cell is not None)


# --- JSON ------------------------------------------------------------------------------------------------------------


def read_jsonl(file: InputFile, text_column: str) -> Iterator[Item]:
    """A file of JSON lines."""
    with file.open() as stream:
        for number, value, problem in parse_lines(stream):
            place = f"{file.name}:{number}"
            if problem is None and value is None:
                problem = "must be a text or an object, got null. Remove it."
            yield Item(place, value, problem and f"`{place}` {problem}", problem and "failed")


def read_json(file: InputFile, text_column: str) -> Iterator[Item]:
    """A JSON file: a list of rows, an object that holds one list of them, or one document."""
    content = json.loads(decode(read_whole(file)))
    if isinstance(content, dict) and text_column not in content:
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise ValueError(f"must be a list of objects with {text_column!r}, got one with {sorted(content)[:5]}")
        (content,) = lists
    for number, value in enumerate(content if isinstance(content, list) else [content], 1):
        place = f"{file.name}:{number}"
        problem = f"`{place}` must be a text or an object, got null. Remove it." if value is None else None
        yield Item(place, value, problem, problem and "failed")


# --- Parquet ---------------------------------------------------------------------------------------------------------


def read_parquet(file: InputFile, text_column: str) -> Iterator[Item]:
    """The rows of this very file; a path is never a pattern."""
    with seekable(file) as stream, pq.ParquetFile(stream) as parquet:
        _check_names(parquet.schema_arrow.names)
        number = itertools.count()
        for batch in parquet.iter_batches(batch_size=BATCH_ROWS):
            for document, problem in _parquet_values(batch):
                place = f"{file.name}[{next(number)}]"
                problem = problem and f"`{place}` cannot be read: {problem}. Correct it."
                yield Item(place, document, problem, problem and "failed")


def parquet_schema(file: InputFile) -> "pa.Schema":
    """The Arrow types of a Parquet file."""
    with seekable(file) as stream:
        return pq.read_schema(stream)


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


# --- the values of cells ---------------------------------------------------------------------------------------------

NUMBER = re.compile(r"[+-]?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")


def _parse_int(text: str) -> int:
    if not re.fullmatch(r"-?(0|[1-9]\d{0,17})", text):
        raise ValueError(text)  # 007 is a name, and 20 digits fit into no column
    return int(text)


def _parse_float(text: str) -> float:
    if not NUMBER.fullmatch(text):
        raise ValueError(text)
    return float(text)


def _parse_bool(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _cast(text: str, kind: str):
    return pa.scalar(text).cast(kind).as_py()


CELL_TYPES: "dict[str, Callable]" = {
    "int64": _parse_int,
    "double": _parse_float,
    "bool": _parse_bool,
    "date32[day]": partial(_cast, kind="date32"),
    "timestamp[us]": partial(_cast, kind="timestamp[us]"),
}


def cell_type(cells: Iterable[str]) -> "pa.DataType":
    """The Arrow type that all of these cells can have; text if there is no other."""
    for name, parse in CELL_TYPES.items():
        try:
            for cell in cells:
                parse(cell.strip())
            return pa.type_for_alias(name.partition("[day]")[0])
        except (ValueError, KeyError, pa.ArrowException):
            continue
    return pa.string()


def cell_value(cell: str, kind: "pa.DataType"):
    """A cell as a value of an Arrow type, or the text itself if it is none."""
    try:
        return CELL_TYPES[str(kind)](cell.strip()) if str(kind) in CELL_TYPES else str(cell)
    except (ValueError, KeyError, pa.ArrowException):
        return str(cell)

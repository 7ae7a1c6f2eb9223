"""The formats that a corpus reads: which reader an ending has, what it needs, and what it finds besides text."""

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..manifest_clara import pa
from . import converters, tables
from .converters import Item
from .files import InputFile

REMEDY = "pip install {}, or the extra `documents` from a clone of the repository"


@dataclass(frozen=True)
class Format:
    """How files with some endings are read.

    Attributes:
        read: takes a file, and of rows the name of the column that has the text.
        has_rows: whether each row is a document with metadata of its own.
        columns: Arrow types of the metadata that the reader adds.
        needs: module and package that are not a part of the extra `corpus`.
    """

    endings: tuple[str, ...]
    read: Callable[..., Iterator[Item]]
    has_rows: bool = False
    columns: tuple[tuple[str, str], ...] = ()
    needs: tuple[tuple[str, str], ...] = ()


PATH, PAGE, SECTION, SHEET = ("path", "string"), ("page", "int32"), ("section", "string"), ("sheet", "string")
COLUMNS = ("path", "page", "section", "sheet")
HTML = (("bs4", "beautifulsoup4"), ("lxml", "lxml"))
FORMATS = (
    Format((".txt", ".md", ".markdown", ".rst", ".text"), converters.read_text, columns=(PATH,)),
    Format((".html", ".htm", ".xhtml"), converters.read_html, columns=(PATH,), needs=HTML),
    Format((".pdf",), converters.read_pdf, columns=(PATH, PAGE), needs=(("pypdfium2", "pypdfium2"),)),
    Format((".docx",), converters.read_docx, columns=(PATH, SECTION), needs=(("docx", "python-docx"),)),
    Format((".pptx",), converters.read_pptx, columns=(PATH, PAGE, SECTION), needs=(("pptx", "python-pptx"),)),
    Format((".epub",), converters.read_epub, columns=(PATH, SECTION), needs=HTML),
    Format((".xlsx", ".xlsm"), tables.read_xlsx, True, (PATH, SHEET), (("openpyxl", "openpyxl"),)),
    Format((".csv", ".tsv"), tables.read_csv, True, (PATH,)),
    Format((".jsonl", ".ndjson"), tables.read_jsonl, True),
    Format((".json",), tables.read_json, True),
    Format((".parquet",), tables.read_parquet, True),
)
BY_ENDING = {ending: known for known in FORMATS for ending in known.endings}
ZSTANDARD = ("zstandard", "zstandard")


def format_of(file: InputFile) -> Format | None:
    """The format of a file, by its ending; None if there is none."""
    return BY_ENDING.get(file.suffix)


def missing_packages(file: InputFile) -> list[str]:
    """Packages that must be installed before a file of a known format can be read."""
    needs = [*format_of(file).needs, *([ZSTANDARD] if file.name.lower().endswith(".zst") else [])]
    return [package for module, package in needs if importlib.util.find_spec(module) is None]


def read_file(file: InputFile, text_column: str = "text") -> Iterator[Item]:
    """Everything that a file holds; what it cannot give is an item with a problem, whatever goes wrong."""
    if file.skipped is not None:
        yield Item(file.name, None, f"`{file.name}` {file.skipped}", "failed" if file.is_closed else "skipped")
        return
    known = format_of(file)
    if known is None:
        endings = ", ".join(ending.removeprefix(".") for ending in BY_ENDING)
        reason = f"has the ending {file.suffix!r}" if file.suffix else "has no ending"
        yield Item(file.name, None, f"`{file.name}` {reason}. Known are {endings}.", "unsupported")
        return
    if packages := missing_packages(file):
        reason = f"needs {' and '.join(packages)}: {REMEDY.format(' '.join(packages))}."
        yield Item(file.name, None, f"`{file.name}` {reason}", "unsupported")
        return
    if file.size == 0:
        yield Item(file.name, None, f"`{file.name}` is empty", "empty")
        return
    n_items = 0
    try:
        for item in known.read(file, text_column) if known.has_rows else known.read(file):
            n_items += 1
            yield item
    except Exception as error:  # readers of other people's files raise whatever they like
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        after = f"after {n_items} parts " if n_items else ""
        yield Item(file.name, None, f"`{file.name}` cannot be read {after}as {file.suffix}: {reason}.", "failed")
        return
    if not n_items:
        yield Item(file.name, None, f"`{file.name}` is empty", "empty")


def describe_missing(files: Iterable[InputFile]) -> str | None:
    """One sentence that counts the files that cannot be read for want of a package; None if there is none."""
    missing: Counter[str] = Counter()
    packages: dict[str, None] = {}
    for file in files:
        if file.skipped is None and format_of(file) and (lacking := missing_packages(file)):
            missing[file.suffix] += 1
            packages |= dict.fromkeys(lacking)
    if not missing:
        return None
    counted = ", ".join(f"{number} {ending}" for ending, number in sorted(missing.items()))
    return f"{missing.total()} files are left out ({counted}). To read them: {REMEDY.format(' '.join(packages))}."


def file_columns(files: Iterable[InputFile], is_folder: bool) -> "dict[str, pa.DataType]":
    """Arrow types of the metadata that the readers of some files add; of a folder all, for what it will hold later."""
    formats = {format_of(file) for file in files if file.skipped is None} - {None}
    if is_folder and any(known.columns for known in formats):
        formats = FORMATS
    return {name: pa.type_for_alias(kind) for known in FORMATS if known in formats for name, kind in known.columns}

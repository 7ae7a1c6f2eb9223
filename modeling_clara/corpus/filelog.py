"""Remembers which files a corpus was made of, and the documents of each: files.jsonl, beside corpus.json.

The file is a log that is only appended to while a corpus changes, so that a killed writer loses nothing: the ids of
documents are noted before they become part of the corpus, and a file is noted as read when all of them are. It is not
published.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .files import InputFile
from .storage import append_lines, read_lines, write_lines

FILES_FILE = "files.jsonl"


@dataclass
class KnownFile:
    """A file that was read before.

    Attributes:
        size: in bytes.
        modified: what told its state, see `InputFile.modified`.
        sha256: of its bytes, None if it was never needed.
        ids: of its documents.
        is_complete: False if a writer was killed while it read the file.
        retry: generation of the corpus after which the file is read again though it did not change: another file
            had one of its ids, or it could not be opened (-1).
    """

    size: int = -1
    modified: int | str | None = None
    sha256: str | None = None
    ids: list[str] = field(default_factory=list)
    is_complete: bool = False
    retry: int | None = None


def read_log(folder: Path) -> dict[str, KnownFile]:
    """The files of a corpus by their names."""
    known: dict[str, KnownFile] = {}
    for line in read_lines(folder / FILES_FILE):
        name = line["name"]
        if "ids" in line:
            values = (line["size"], line["modified"], line["sha256"], line["ids"], True, line.get("retry"))
            known[name] = KnownFile(*values)
        elif "pending" in line:
            file = known.setdefault(name, KnownFile())
            file.ids, file.is_complete = list(dict.fromkeys([*file.ids, *line["pending"]])), False
        else:
            known.pop(name, None)
    return known


def read_line(file: InputFile, ids: Iterable[str], sha256: str | None = None, retry: int | None = None) -> dict:
    """The line of a file that was read to its end."""
    line = {"name": file.name, "size": file.size, "modified": file.modified, "sha256": sha256, "ids": list(ids)}
    return line if retry is None else {**line, "retry": retry}


def append_log(folder: Path, lines: Iterable[dict]) -> None:
    """Note something, durably."""
    append_lines(folder / FILES_FILE, lines)


def compact_log(folder: Path) -> None:
    """Leave one line for each file, if most lines say what later ones have changed."""
    lines, known = read_lines(folder / FILES_FILE), read_log(folder)
    if len(lines) > 2 * len(known) + 64 and all(file.is_complete for file in known.values()):
        write_lines(
            folder / FILES_FILE,
            (
                {"name": name, "size": k.size, "modified": k.modified, "sha256": k.sha256, "ids": k.ids}
                | ({} if k.retry is None else {"retry": k.retry})
                for name, k in known.items()
            ),
        )

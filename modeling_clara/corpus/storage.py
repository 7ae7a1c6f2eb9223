"""Locks that die with their process, what a folder may hold, and JSON lines.

It knows nothing of what the files mean; training and evaluation use it too.
"""

import contextlib
import gzip
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from ..storage_clara import derived_folder, replacing

# --- locks -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writer_lock(path: Path, what: str, timeout: float = 0.0):
    """Hold the lock file of `what`; released by the system when the process ends, however it ends.

    Raises:
        RuntimeError: another process or thread still holds it after `timeout` seconds, naming its pid.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(path), path.with_name(path.name + ".pid")
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        pid = "unknown"
        with contextlib.suppress(FileNotFoundError):  # the holder may be done by now
            pid = holder.read_text(encoding="utf-8").strip()
        raise RuntimeError(
            f"{what} must have one writer at a time, but process {pid} writes to it. Wait until it is done, or end it."
        ) from None
    try:
        holder.write_text(f"{os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def corpus_lock(folder: Path, timeout: float = 0.0):
    """Hold the lock of those who change a corpus, see `writer_lock`."""
    with writer_lock(derived_folder(folder) / "writer.lock", f"the corpus {folder}", timeout):
        yield


# --- folders ---------------------------------------------------------------------------------------------------------


def foreign_files(folder: Path, expected: Iterable[str]) -> list[str]:
    """Names in a folder that match none of the patterns of what its writer puts there; none if there is no folder."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [name for name in names if not any(fnmatch(name, pattern) for pattern in expected)]


# --- JSON lines ------------------------------------------------------------------------------------------------------


def iter_lines(path: Path) -> Iterator[tuple[int, object, str | None]]:
    """(number, value, problem) of every line of a .jsonl or .jsonl.gz file that is not blank, numbers from 1.

    `problem` says why a line cannot be read, and is None if it can.

    Raises:
        ValueError: the file is compressed and not whole.
    """
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opener(path, "rb") as lines:
            yield from parse_lines(lines)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} must be a whole gzip file: {error}. Copy or compress it again.") from error


def parse_lines(lines: Iterable[bytes]) -> Iterator[tuple[int, object, str | None]]:
    """(number, value, problem) of JSON lines, see `iter_lines`."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value, problem = json.loads(line.decode("utf-8-sig")), None
        except (ValueError, RecursionError) as error:  # of the encoding, of JSON
            value, problem = None, f"must be JSON in UTF-8: {error}"
        yield number, value, problem


def read_lines(path: Path) -> list:
    """The values of a JSONL file up to a line that was not finished; none if there is no file."""
    lines = iter_lines(path) if path.exists() else ()
    return [value for _, value, _ in itertools.takewhile(lambda line: line[2] is None, lines)]


def write_lines(path: Path, rows: Iterable[Mapping]) -> int:
    """Replace a JSONL file by one with these rows, at once, and return how many; none remove it."""
    n_rows = 0
    with replacing(path) as partial, open(partial, "wb") as file:
        for row in rows:
            file.write(_line(row))
            n_rows += 1
    if not n_rows:
        path.unlink()
    return n_rows


def append_lines(path: Path, rows: Iterable[Mapping]) -> None:
    """Append rows to a JSONL file, after a line that a killed writer did not finish was cut off; none make none."""
    lines = [_line(row) for row in rows]
    if lines:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            file.truncate(whole_size(file))
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())


def _line(row: Mapping) -> bytes:
    try:
        return (json.dumps(row, ensure_ascii=False, default=str) + "\n").encode()
    except UnicodeEncodeError:  # a lone surrogate, which only an escape can hold
        return (json.dumps(row, ensure_ascii=True, default=str) + "\n").encode()


def whole_size(file: BinaryIO) -> int:
    """Bytes up to the end of the last line that was finished."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 2**16)
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0

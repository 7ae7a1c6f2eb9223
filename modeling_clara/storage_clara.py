"""Files that are whole or not there, locks that die with their process, and a set of ids that lies on disk.

Stands below everything that writes a corpus. It knows nothing of what the files mean.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
import uuid
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock, Timeout


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file that is whole or not there."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path):
    """A temporary path beside `path` that takes its place when the block ends well, and is removed when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def writer_lock(path: Path, what: str, timeout: float = 0.0):
    """Hold a lock file; released by the system when the process ends, however it ends.

    Args:
        path: of the lock file; the holder's pid stands in `path` + ".pid".
        what: what is locked, for the error.
        timeout: seconds to wait for it.

    Raises:
        RuntimeError: another process or thread holds it, naming its pid.
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


def derived_folder(folder: Path) -> Path:
    """`index/` of a corpus folder, for what can be made again; git does not see it."""
    index = Path(folder) / "index"
    if not (index / ".gitignore").exists():
        index.mkdir(parents=True, exist_ok=True)
        (index / ".gitignore").write_text("*\n", encoding="utf-8")
    return index


def append_lines(path: Path, rows: Iterable[dict]) -> None:
    """Append rows to a JSONL file; none make none."""
    lines = [json.dumps(row, ensure_ascii=True, default=str) + "\n" for row in rows]
    if lines:
        whole = path.read_bytes().rpartition(b"\n")[:2] if path.exists() else ()
        with open(path, "r+b" if whole else "wb") as file:
            file.truncate(sum(map(len, whole)))  # what a killed writer did not finish
            file.seek(0, os.SEEK_END)
            file.writelines(line.encode() for line in lines)


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """Replace a JSONL file by one with these rows, at once; none remove it."""
    lines = [json.dumps(row, ensure_ascii=True, default=str) + "\n" for row in rows]
    if not lines:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as partial:
        partial.write_text("".join(lines), encoding="utf-8")


def read_lines(path: Path) -> list[dict]:
    """The rows of a JSONL file, up to a line that was not finished; none where there is no file."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


class SeenIds:
    """A set of texts on disk, so that memory does not grow with it. It is thrown away at the end.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path):
        self.path = path
        path.unlink(missing_ok=True)
        with self._disk_errors():
            self.connection = sqlite3.connect(path, check_same_thread=False)
            self.connection.execute("pragma journal_mode = off")
            self.connection.execute("pragma synchronous = off")
            self.connection.execute("create table ids (id text primary key) without rowid")

    @contextlib.contextmanager
    def _disk_errors(self):
        """SQLite's errors as those of the disk, which is what they are here."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise OSError(
                f"ids that were seen must be written to {self.path}, but: {error}. Free the disk."
            ) from error

    def add(self, text: str) -> bool:
        """Add a text; whether it is new."""
        with self._disk_errors():
            cursor = self.connection.execute("insert or ignore into ids values (?)", (text,))
        return cursor.rowcount == 1

    def remove(self, text: str) -> None:
        """Take a text out again."""
        with self._disk_errors():
            self.connection.execute("delete from ids where id = ?", (text,))

    def __enter__(self) -> "SeenIds":
        return self

    def __exit__(self, *_) -> None:
        self.connection.close()
        self.path.unlink(missing_ok=True)

"""The files of an input: found in a folder, a bucket or at an address, and every one of them accounted for.

It knows names and sizes alone; what is in a file is read by `formats.py`.
"""

import bz2
import contextlib
import gzip
import lzma
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

SYSTEM_FOLDERS = {"__MACOSX", "__pycache__", "node_modules", "$RECYCLE.BIN", "System Volume Information"}
SYSTEM_FILES = {"thumbs.db", "desktop.ini"}
CLOSED = "cannot be opened"
BEIR_FILES = {"corpus.jsonl", "queries.jsonl"}  # a folder with both is a retrieval benchmark


def _open_zstd(stream: BinaryIO) -> BinaryIO:
    import zstandard

    return zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True, closefd=True)


DECOMPRESSORS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    ".gz": lambda stream: gzip.GzipFile(fileobj=stream),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zstd,
}


@dataclass(frozen=True)
class InputFile:
    """A file of the input.

    Attributes:
        name: its path below the input's folder, with slashes.
        size: in bytes; -1 if its file system does not tell.
        skipped: why it is no document, None if it may be one.
        modified: time of its last change in nanoseconds, of a remote file any text that changes with it; None if its
            file system does not tell.
        path: on the file system.
        fs: the fsspec file system, None for the local disk.
    """

    name: str
    size: int
    skipped: str | None = None
    modified: int | str | None = None
    path: str = field(default="", repr=False)
    fs: object = field(default=None, repr=False, compare=False)

    @property
    def suffix(self) -> str:
        """The ending that tells its format, in lower case: ".jsonl" of rows.JSONL.gz."""
        path = PurePosixPath(self.name.lower())
        return PurePosixPath(path.stem).suffix if path.suffix in DECOMPRESSORS else path.suffix

    @property
    def title(self) -> str:
        """Its name for a reader, without folders and endings."""
        path = PurePosixPath(self.name)
        return (PurePosixPath(path.stem).stem if self.is_compressed else path.stem).replace("_", " ")

    @property
    def is_compressed(self) -> bool:
        """Whether its last ending is that of a compressed file."""
        return PurePosixPath(self.name.lower()).suffix in DECOMPRESSORS

    @property
    def is_closed(self) -> bool:
        """Whether it may be a document, or a folder of them, but cannot be opened."""
        return self.skipped is not None and self.skipped.startswith(CLOSED)

    @contextlib.contextmanager
    def open_raw(self) -> Iterator[BinaryIO]:
        """The file's bytes as they are stored."""
        with open(self.path, "rb") if self.fs is None else self.fs.open(self.path, "rb") as stream:
            yield stream

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The file's bytes, decompressed."""
        with self.open_raw() as stream:
            if not self.is_compressed:
                yield stream
                return
            with DECOMPRESSORS[PurePosixPath(self.name.lower()).suffix](stream) as plain:
                yield plain


def is_remote(location: str | os.PathLike) -> bool:
    """Whether a location is an address that fsspec opens, such as s3://bucket/folder."""
    return isinstance(location, str) and "://" in location


def find_files(location: str | os.PathLike, exclude: Path | None = None) -> tuple[bool, list[InputFile]]:
    """All files of a location, in the order of their names.

    A folder that is left out as a whole (hidden, of a system) is one entry that ends with a slash.

    Args:
        location: a file or a folder, on this disk or an address of fsspec.
        exclude: a folder on this disk whose files are no input.

    Returns:
        Whether the location is a folder, and its files.

    Raises:
        FileNotFoundError: there is no such location.
    """
    if is_remote(location):
        is_folder, files = _find_remote(location)
    else:
        path = Path(location)
        if not path.exists():
            raise FileNotFoundError(f"`documents` must be a file or a folder, found none at {path}. Check the path.")
        is_folder = path.is_dir()
        files = list(_walk(path, path, exclude and exclude.resolve())) if is_folder else [_local(path, path.parent)]
    return is_folder, _without_queries(sorted(files, key=lambda file: file.name))


def _local(path: Path, root: Path, skipped: str | None = None) -> InputFile:
    name = path.relative_to(root).as_posix()
    try:
        status = path.stat()
    except OSError as error:  # a link to nothing
        return InputFile(name, 0, skipped or f"{CLOSED}: {error.strerror}")
    if not path.is_file():
        return InputFile(name, 0, skipped or "is no regular file")
    return InputFile(name, status.st_size, skipped, status.st_mtime_ns, str(path))


def _walk(folder: Path, root: Path, exclude: Path | None) -> Iterator[InputFile]:
    with os.scandir(folder) as entries:
        for entry in entries:
            path, reason = Path(entry.path), skip_reason(entry.name)
            if not entry.is_dir(follow_symlinks=False) and not (entry.is_symlink() and path.is_dir()):
                yield _local(path, root, reason)
            elif exclude is not None and path.resolve() == exclude:
                continue
            elif reason or entry.is_symlink():
                reason = reason or "links to a folder"
                yield InputFile(path.relative_to(root).as_posix() + "/", 0, reason)
            else:
                try:
                    yield from _walk(path, root, exclude)
                except PermissionError as error:
                    yield InputFile(path.relative_to(root).as_posix() + "/", 0, f"{CLOSED}: {error.strerror}")


def _find_remote(location: str) -> tuple[bool, list[InputFile]]:
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise ImportError(
            f"{location} needs fsspec: pip install fsspec, or the extra `corpus` from a clone of the repository."
        ) from error
    fs, root = url_to_fs(location)  # names a package that it lacks, such as s3fs
    is_folder = location.endswith("/") or not fs.isfile(root)  # of HTTP every address is a file
    found = fs.find(root, detail=True) if is_folder else {root: fs.info(root)}
    if not found:
        raise FileNotFoundError(f"`documents` must be a file or a folder, found none at {location}. Check it.")
    files, folders = [], {}
    for path, info in found.items():
        name = path[len(root) :].strip("/") if is_folder else PurePosixPath(path).name
        parts = name.split("/")
        hidden = next((n for n, part in enumerate(parts) if skip_reason(part)), None)
        if hidden is None or hidden == len(parts) - 1:
            size = -1 if info.get("size") is None else info["size"]
            files.append(InputFile(name, size, skip_reason(parts[-1]), _version(info), path, fs))
        else:
            name = "/".join(parts[: hidden + 1]) + "/"
            folders[name] = InputFile(name, 0, skip_reason(parts[hidden]))
    return is_folder, [*files, *folders.values()]


def _version(info: dict) -> str | None:
    """What a remote file system tells about the state of a file; None if it tells nothing."""
    names = (
        "ETag",
        "etag",
        "md5Hash",
        "md5",
        "sha256",
        "mtime",
        "LastModified",
        "last_modified",
        "updated",
        "created",
    )
    return next((f"{name}={info[name]}" for name in names if info.get(name)), None)


def skip_reason(name: str) -> str | None:
    """Why a file or folder of this name is never a document, None if it may be one.

    >>> skip_reason(".git"), skip_reason("__MACOSX"), skip_reason("~$report.docx"), skip_reason("report.docx")
    ('is hidden', 'belongs to the system', 'belongs to the system', None)
    """
    if name.startswith("."):
        return "is hidden"
    if name in SYSTEM_FOLDERS or name.lower() in SYSTEM_FILES or name.startswith("~$"):
        return "belongs to the system"
    return None


def _without_queries(files: list[InputFile]) -> list[InputFile]:
    """In a folder in the form of BEIR the questions and their judgements are no documents."""
    names = {file.name for file in files}
    roots = {str(PurePosixPath(name).parent) for name in names if PurePosixPath(name).name == "corpus.jsonl"}
    roots = {root for root in roots if {str(PurePosixPath(root) / name) for name in BEIR_FILES} <= names}

    def is_query(file: InputFile) -> bool:
        path = PurePosixPath(file.name)
        return (str(path.parent) in roots and path.name == "queries.jsonl") or (
            path.parent.name == "qrels" and str(path.parent.parent) in roots
        )

    reason = "has the questions of a benchmark, not documents"
    return [
        InputFile(file.name, file.size, reason, file.modified, file.path, file.fs) if is_query(file) else file
        for file in files
    ]

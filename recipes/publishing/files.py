"""Files of a folder with their sizes and hashes: SHA-256, and git's own for what the Hub keeps in git.

It knows nothing of models, corpora or the Hub.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path

KEPT_HIDDEN = {".eval_results"}


class File:
    """A file as it is published: of a path, or of bytes; `sha256` if that is known."""

    def __init__(self, content: Path | bytes, sha256: str | None = None):
        self.content = content
        if sha256 is not None:
            self.sha256 = sha256

    @cached_property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """In hex."""
        return self._digest(hashlib.sha256())

    @cached_property
    def git_id(self) -> str:
        """SHA-1 in hex of the file as a blob of git."""
        return self._digest(hashlib.sha1(b"blob %d\0" % self.size))

    def _digest(self, digest) -> str:
        if isinstance(self.content, bytes):
            digest.update(self.content)
        else:
            with open(self.content, "rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
        return digest.hexdigest()


def is_published(name: str) -> bool:
    """Whether a file or folder of this name can belong to what is published: caches and hidden files do not."""
    is_hidden = name.startswith(".") and name not in KEPT_HIDDEN
    return not is_hidden and name != "__pycache__" and not name.endswith(".pyc")


def find(folder: Path, accept: Callable[[str], bool] = is_published) -> list[Path]:
    """All files of a folder, and links, whose names and folders are accepted; links to folders are not followed."""
    found = []
    for place, folders, names in os.walk(folder):
        linked = [name for name in folders if Path(place, name).is_symlink()]
        folders[:] = [name for name in folders if accept(name) and name not in linked]
        found += [Path(place, name) for name in [*names, *linked] if accept(name)]
    return sorted(found)


def listing(folder: Path) -> dict[str, File]:
    """Name, with forward slashes, -> file of all that is in a built folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): File(path) for path in paths}


def digests(paths: Iterable[Path], known: Mapping[str, list]) -> dict[str, list]:
    """Path -> [bytes, time of the last change in ns, SHA-256]; None for a path that is not there.

    Like git, it reads a file again only if one of the first two is not as known.
    """
    found = {}
    for path in paths:
        name = str(path)
        try:
            state = path.stat()
        except FileNotFoundError:
            found[name] = None
            continue
        now, before = [state.st_size, state.st_mtime_ns], known.get(name)
        found[name] = before if before and before[:2] == now else [*now, File(path).sha256]
    return found


def content_id(files: Mapping[str, File]) -> str:
    """12 hex digits of the names and SHA-256 of files."""
    table = "".join(f"{name}\0{file.sha256}\n" for name, file in sorted(files.items()))
    return hashlib.sha256(table.encode()).hexdigest()[:12]

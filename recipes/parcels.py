"""Folders in parts of a few megabytes, for a machine that takes no more at a time.

    python recipes/parcels.py pack parcels --limit 60 data=../data backbone=model.gguf
    python recipes/parcels.py unpack parcels/1 parcels/2 --output folder

`pack` writes one tar file, cut into parts: parcels/1, parcels/2, ... each hold one part and the list of all of them.
`unpack` takes the parts in any order, in one call or in several, checks their hashes and unpacks when the last one is
there.
Needs nothing but Python, and knows nothing of what it carries.
"""

import argparse
import hashlib
import json
import math
import shutil
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

MIB = 1 << 20
LIST_FILE = "parcel.json"
UNFINISHED = ".parcel.partial"  # the whole, while it is being cut
BLOCK = 1 << 20


def part_name(number: int) -> str:
    """The file of a part, numbered from 1.

    >>> part_name(3)
    'part-003'
    """
    return f"part-{number:03d}"


def sha256_of(path: Path) -> str:
    """In hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- pack ------------------------------------------------------------------------------------------------------------


def pack(content: Mapping[str, Path], folder: Path, *, limit: int = 60 * MIB, own_folders: bool = True) -> list[Path]:
    """Write `content` as parts of at most `limit` bytes. Links travel as what they point to.

    Args:
        content: name in the parcel, a relative path -> file or folder.
        folder: to write to; new, empty, or with what a killed call left.
        limit: bytes of a part.
        own_folders: every part in a folder of its own, 1, 2, ..., each with the list; else all files in `folder`.

    Returns:
        The parts.

    Raises:
        FileNotFoundError, ValueError: something is missing or cannot travel, the folder is in use, or the limit is
            none.
    """
    _check_content(content, folder)
    if limit < 1:
        raise ValueError(f"a part must have at least one byte, got a limit of {limit}. Raise it.")
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {UNFINISHED}):
        raise ValueError(f"parcels must go into a new or empty folder, got {folder}. Choose another name or empty it.")
    folder.mkdir(parents=True, exist_ok=True)
    whole, places = folder / UNFINISHED, []
    try:
        with tarfile.open(whole, "w:gz", compresslevel=1, dereference=True) as archive:
            for name, path in sorted(content.items()):
                archive.add(path, name, filter=_checked)
        with open(whole, "rb") as file:
            for number, size in enumerate(_sizes(whole.stat().st_size, limit), 1):
                place = folder / str(number) if own_folders else folder
                place.mkdir(exist_ok=True)
                places.append(place / part_name(number))
                with open(places[-1], "wb") as part:
                    _copy(file, part, size)
    except BaseException:
        for place in places:
            place.unlink(missing_ok=True)
            if own_folders:
                place.parent.rmdir()
        raise
    finally:
        whole.unlink(missing_ok=True)
    parts = [{"name": path.name, "size": path.stat().st_size, "sha256": sha256_of(path)} for path in places]
    for place in {path.parent for path in places}:
        (place / LIST_FILE).write_text(json.dumps({"parts": parts}, indent=2) + "\n", encoding="utf-8")
    return places


def _check_content(content: Mapping[str, Path], folder: Path) -> None:
    missing = [str(path) for path in content.values() if not path.exists()]
    if missing:
        raise FileNotFoundError(f"what is packed must exist, missing: {missing}. Correct the paths.")
    for name, path in content.items():
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or not pure.parts:
            raise ValueError(f"a name in a parcel must be a relative path without '..', got {name!r}. Correct it.")
        if path.is_dir() and folder.resolve().is_relative_to(path.resolve()):
            raise ValueError(
                f"parcels must not go into what is packed, got {folder} in {path}. Choose another folder."
            )


def _checked(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """A file or folder, without the names and numbers of who packs."""
    if not (member.isfile() or member.isdir()):
        raise ValueError(f"only files and folders can be packed, got {member.name}. Remove it.")
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _sizes(total: int, limit: int) -> Iterator[int]:
    while total > 0:
        yield min(limit, total)
        total -= limit


def _copy(source, target, size: int) -> None:
    while size > 0:
        block = source.read(min(BLOCK, size))
        target.write(block)
        size -= len(block)


# --- unpack ----------------------------------------------------------------------------------------------------------


def unpack(places: Sequence[Path], output: Path) -> list[str]:
    """Take parts in; unpack when all are there.

    Args:
        places: folders with parts and the list.
        output: gets what was packed. Parts wait there in `.parts-HASH/`, so that a later call brings the others;
            `.unpacked-HASH` says that it is done, and another call then does nothing.

    Returns:
        Names of the parts that are still missing; empty when everything is unpacked.

    Raises:
        FileNotFoundError: a folder has no list.
        ValueError: a part is damaged, or the folders are of different parcels; nothing of it is taken in then.
    """
    lists = [_read_list(place) for place in places]
    if not lists or any(listing != lists[0] for listing in lists):
        raise ValueError(f"parts must be of one parcel, got {[str(place) for place in places]}. Sort them.")
    parts = lists[0]
    mark = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    waiting, done = output / f".parts-{mark}", output / f".unpacked-{mark}"
    if done.exists():
        shutil.rmtree(waiting, ignore_errors=True)
        return []
    found = {
        part["name"]: place / part["name"] for place in places for part in parts if (place / part["name"]).exists()
    }
    for part in parts:
        if part["name"] in found:
            _check_part(found[part["name"]], part)
    waiting.mkdir(parents=True, exist_ok=True)
    for name, path in found.items():
        partial = waiting / f".{name}.partial"
        shutil.copyfile(path, partial)
        partial.replace(waiting / name)
    missing = [part["name"] for part in parts if not (waiting / part["name"]).exists()]
    if missing:
        return missing
    for part in parts:  # one may have waited for long
        _check_part(waiting / part["name"], part)
    _extract([waiting / part["name"] for part in parts], output)
    done.touch()
    shutil.rmtree(waiting)
    return []


def _check_part(path: Path, part: Mapping) -> None:
    if path.stat().st_size != part["size"] or sha256_of(path) != part["sha256"]:
        raise ValueError(f"{path} is damaged: its hash is not that of the list. Bring it again.")


def _extract(paths: Sequence[Path], output: Path) -> None:
    try:
        with tarfile.open(fileobj=_Joined(paths), mode="r|gz") as archive:
            archive.extractall(output, filter="data")
    except (tarfile.TarError, EOFError, KeyError, TypeError) as error:  # tarfile's own, for heads that are cut
        raise ValueError(f"the parcel cannot be unpacked: {error}. Pack it again.") from error


def _read_list(place: Path) -> list[dict]:
    """The parts of a parcel by the list in one of its folders."""
    try:
        parts = json.loads((place / LIST_FILE).read_text(encoding="utf-8"))["parts"]
        read = [{"name": part["name"], "size": part["size"], "sha256": part["sha256"]} for part in parts]
        if not read or [part["name"] for part in read] != [part_name(n) for n in range(1, len(read) + 1)]:
            raise ValueError("its parts are not numbered from 1")
        return read
    except FileNotFoundError:
        raise FileNotFoundError(f"{place} must have {LIST_FILE}, found none. Name a folder of a parcel.") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{place / LIST_FILE} is damaged: {error!r}. Bring it again.") from None


class _Joined:
    """Files read one after the other as one stream."""

    def __init__(self, paths: Sequence[Path]):
        self.paths, self.file = list(paths), None

    def read(self, size: int) -> bytes:
        """At most `size` bytes, fewer only at the end."""
        data = b""
        while len(data) < size and (self.file or self.paths):
            self.file = self.file or open(self.paths.pop(0), "rb")
            block = self.file.read(size - len(data))
            if not block:
                self.file.close()
                self.file = None
            data += block
        return data


# --- command line ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Pack or unpack; the exit status: 0 done, 1 an error that is printed, 3 parts are missing yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write parts")
    packing.add_argument("folder", type=Path)
    packing.add_argument("content", nargs="+", metavar="NAME=PATH")
    packing.add_argument("--limit", type=float, default=60, help="MiB of a part (default: 60)")
    unpacking = commands.add_parser("unpack", help="take parts in, and unpack when all are there")
    unpacking.add_argument("places", nargs="+", type=Path)
    unpacking.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "unpack":
            missing = unpack(arguments.places, arguments.output)
            print(f"still missing: {', '.join(missing)}" if missing else f"unpacked into {arguments.output}")
            return 3 if missing else 0
        pairs = [entry.partition("=") for entry in arguments.content]
        if not all(name and equals and path for name, equals, path in pairs):
            raise ValueError(f"content must look like NAME=PATH, got {arguments.content}. Correct it.")
        content = {name: Path(path) for name, _, path in pairs}
        if len(content) < len(pairs):
            raise ValueError(f"a name must be given once, got {arguments.content}. Correct it.")
        if not math.isfinite(arguments.limit):
            raise ValueError(f"--limit must be a number of MiB, got {arguments.limit}. Correct it.")
        for path in pack(content, arguments.folder, limit=int(arguments.limit * MIB)):
            print(f"{path}: {path.stat().st_size / MIB:.1f} MiB")
    except (OSError, ValueError, tarfile.TarError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

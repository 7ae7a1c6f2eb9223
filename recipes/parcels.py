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
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

MIB = 1 << 20
LIST_FILE = "parcel.json"
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


def pack(content: Mapping[str, Path], folder: Path, *, limit: int = 60 * MIB, own_folders: bool = True) -> list[Path]:
    """Write `content` as parts of at most `limit` bytes.

    Args:
        content: name in the parcel -> file or folder.
        folder: to write to; new or empty.
        limit: bytes of a part.
        own_folders: every part in a folder of its own, 1, 2, ..., each with the list; else all files in `folder`.

    Returns:
        The parts.

    Raises:
        FileNotFoundError, ValueError: something is missing, the folder is in use, or the limit is none.
    """
    missing = [str(path) for path in content.values() if not path.exists()]
    if missing:
        raise FileNotFoundError(f"what is packed must exist, missing: {missing}. Correct the paths.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"parcels must go into a new or empty folder, got {folder}. Choose another name or empty it.")
    if limit < 1:
        raise ValueError(f"a part must have at least one byte, got a limit of {limit}. Raise it.")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".parcel-") as temporary:
        whole = Path(temporary) / "whole.tar.gz"
        with tarfile.open(whole, "w:gz", compresslevel=1) as archive:
            for name, path in sorted(content.items()):
                archive.add(path, name, filter=_anonymous)
        places = []
        with open(whole, "rb") as file:
            for number, size in enumerate(_sizes(whole.stat().st_size, limit), 1):
                place = folder / str(number) if own_folders else folder
                place.mkdir(exist_ok=True)
                places.append(place / part_name(number))
                with open(places[-1], "wb") as part:
                    _copy(file, part, size)
        parts = [{"name": p.name, "size": p.stat().st_size, "sha256": sha256_of(p)} for p in places]
        listing = json.dumps({"sha256": sha256_of(whole), "parts": parts}, indent=2) + "\n"
        for place in {path.parent for path in places}:
            (place / LIST_FILE).write_text(listing, encoding="utf-8")
    return places


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without the names and numbers of who packs."""
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
    if any(listing != lists[0] for listing in lists):
        raise ValueError(f"parts must be of one parcel, got different ones in {[str(p) for p in places]}. Sort them.")
    mark = lists[0]["sha256"][:16]
    waiting, done = output / f".parts-{mark}", output / f".unpacked-{mark}"
    if done.exists():
        return []
    found = {}
    for place in places:
        for part in lists[0]["parts"]:
            path = place / part["name"]
            if path.exists():
                if path.stat().st_size != part["size"] or sha256_of(path) != part["sha256"]:
                    raise ValueError(f"{path} is damaged: its hash is not that of the list. Bring it again.")
                found[part["name"]] = path
    waiting.mkdir(parents=True, exist_ok=True)
    for name, path in found.items():
        partial = waiting / f".{name}.partial"
        shutil.copyfile(path, partial)
        partial.replace(waiting / name)
    missing = [part["name"] for part in lists[0]["parts"] if not (waiting / part["name"]).exists()]
    if not missing:
        with tarfile.open(fileobj=_Joined([waiting / part["name"] for part in lists[0]["parts"]]), mode="r|gz") as tar:
            tar.extractall(output, filter="data")
        done.touch()
        shutil.rmtree(waiting)
    return missing


def _read_list(place: Path) -> dict:
    try:
        listing = json.loads((place / LIST_FILE).read_text(encoding="utf-8"))
        names = [part["name"] for part in listing["parts"]]
        if names != [part_name(number) for number in range(1, len(names) + 1)]:
            raise ValueError("the parts are not numbered from 1")
        return listing
    except FileNotFoundError:
        raise FileNotFoundError(f"{place} must have {LIST_FILE}, found none. Name a folder of a parcel.") from None
    except (ValueError, KeyError, TypeError) as error:
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
        for path in pack(content, arguments.folder, limit=int(arguments.limit * MIB)):
            print(f"{path}: {path.stat().st_size / MIB:.1f} MiB")
    except (OSError, ValueError, tarfile.TarError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

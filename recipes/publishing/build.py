"""Builds the folder that is published, checks it, and has a clean process load it; a build is used again if nothing
has changed.

Beside each build stands a record of the files it was made from. The libraries that take seconds to import are needed
only if there is something to build.
"""

import contextlib
import errno
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import constants

from .assemble import copy_files
from .checks import CARD_FILE, check_links
from .files import File, digests, listing
from .kinds import Kind, Options
from .probe import probe

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "huggingface_hub", "datasets", "evaluate")
WRITTEN_ANEW = re.compile(r"(\w+/)?(adapter_)?config\.json must not hold an absolute path")
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Refused(ValueError):
    """What is built must not be published; `problems` has the reasons."""

    def __init__(self, source: Path, problems: list[str]):
        self.problems = problems
        super().__init__(f"{source} must not be published as it is:\n" + "\n".join(f"- {one}" for one in problems))


@dataclass
class Built:
    """A folder that was checked and loaded.

    Attributes:
        kind: of what is published.
        folder: as it will be on the Hub, but for what the card says of the Hub.
        files: its files by name, without the card.
        found: what the clean process said of it; empty if there was none.
        is_reused: whether it was there already.
        cards: folder that keeps the cards that were rendered.
    """

    kind: Kind
    folder: Path
    files: dict[str, File]
    found: dict
    is_reused: bool
    cards: Path

    def card(self, repo_id: str | None, revision: str | None) -> File:
        """README.md for a repo and the commit of its files; rendered once."""
        path = self.cards / hashlib.sha256(f"{repo_id} {revision}".encode()).hexdigest()[:16]
        if not path.exists():
            from .cards import published_card

            self.cards.mkdir(exist_ok=True)
            path.write_bytes(published_card(self.folder, repo_id, revision).encode())
        return File(path.read_bytes())


@contextlib.contextmanager
def building(kind: Kind, source: Path, output: Path | None, options: Options) -> Iterator[Built]:
    """The built folder, which nobody else changes meanwhile.

    Args:
        kind: of what is built.
        source: that it is built from.
        output: folder to write, new or an earlier build; default one in the cache.
        options: of the kind.

    Raises:
        Refused: the checks found something.
        ValueError, OSError: the source is no such thing, the clean process fails or differs, or the disk is full.
        FileExistsError: `output` holds other files.
        RuntimeError: another process publishes the same.
    """
    source = source.absolute()
    key = hashlib.sha256(f"{kind.name} {source}".encode()).hexdigest()[:12]
    place = Path(constants.HF_HOME) / "clara" / "builds" / f"{source.name}-{key}"
    if problems := check_links(source):
        raise Refused(source, problems)
    kind.inputs(source)  # or an error, before anything is made
    place.mkdir(parents=True, exist_ok=True)
    output = output.absolute() if output else place / "built"
    try:
        with FileLock(place / "lock", timeout=0):
            with explain_full_disk(output):
                built = _build(kind, source, output, dict(options), place)
            yield built
    except Timeout:
        raise RuntimeError(
            f"{source} must be published by one process at a time, but another one does it. Wait until it is done."
        ) from None


def _build(kind: Kind, source: Path, output: Path, options: dict, place: Path) -> Built:
    for left in [*place.glob(".building-*"), *place.glob("verify-*")]:  # by a process that was killed
        shutil.rmtree(left)
    record_path, cards = place / "record.json", place / "cards"
    record = json.loads(record_path.read_text(encoding="utf-8")) if record_path.exists() else {}
    key = {"output": str(output), "options": options, "libraries": {name: _version(name) for name in LIBRARIES}}
    made_from = [*kind.inputs(source), *_code()]
    if record.get("key") == key:
        inputs = digests({*made_from, *map(Path, record["read"])}, record["inputs"])
        files = digests(_paths(output), record["files"])
        if _same(files, record["files"]) and (changed := _changed(inputs, record["inputs"])) is not None:
            if changed == {str(source / CARD_FILE)} and kind.name == "model":  # which no program reads
                files = _replace_card(kind, source, output, cards)
                changed = set()
            if not changed:
                record_path.write_text(json.dumps(record | {"inputs": inputs, "files": files}), encoding="utf-8")
                return Built(kind, output, _without_card(output, files), record["found"], True, cards)
    is_earlier = record.get("key", {}).get("output") == str(output)
    is_earlier = is_earlier or any((output / mark).is_file() for mark in kind.marks)
    if output.exists() and not is_earlier and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} must be new or an earlier build, but holds other files. Name another folder.")
    output.parent.mkdir(parents=True, exist_ok=True)
    inputs = digests(made_from, record.get("inputs", {}))
    with tempfile.TemporaryDirectory(prefix=".building-", dir=output.parent) as temporary:
        folder = Path(temporary) / "built"
        found, read = _make(kind, source, folder, options)
        shutil.rmtree(cards, ignore_errors=True)
        record_path.unlink(missing_ok=True)
        _replace(folder, output, Path(temporary) / "old")
    inputs |= digests(read, {})
    files = digests(_paths(output), {})
    record = {"key": key, "read": list(map(str, read)), "inputs": inputs, "files": files, "found": found}
    record_path.write_text(json.dumps(record), encoding="utf-8")
    return Built(kind, output, _without_card(output, files), found, False, cards)


def _make(kind: Kind, source: Path, folder: Path, options: Options) -> tuple[dict, list[Path]]:
    """Write, check and load a new folder: what the clean process found, and what was read outside of the source."""
    folder.mkdir()
    if kind.name == "model":  # before the weights are loaded, all but what is written anew then
        copy_files(source, kind.inputs(source), folder)
        problems = [problem for check in kind.checks for problem in check(folder, source)]
        if problems := [problem for problem in problems if not WRITTEN_ANEW.match(problem)]:
            raise Refused(source, problems)
    assembled = kind.assemble(source, folder, options)
    if not kind.is_in(listing(folder)):
        raise ValueError(f"{source} must be {kind.what}, but has no {' or '.join(kind.marks)}. Name another folder.")
    if problems := [problem for check in kind.checks for problem in check(folder, source)]:
        raise Refused(source, problems)
    if assembled.probe is None:
        return {}, assembled.read
    names = set(listing(folder))
    found = probe(kind.name, folder, **assembled.probe)
    differing = [name for name, value in assembled.expected.items() if found.get(name) != value]
    if differing:
        raise ValueError(f"the built folder must give what {source} gives, but differs in {differing}.")
    for name in set(listing(folder)) - names:  # what loading left there
        (folder / name).unlink()
    return found, assembled.read


def _replace(folder: Path, output: Path, old: Path) -> None:
    """Put a folder in the place of another one."""
    if output.exists():
        output.rename(old)
    try:
        folder.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise


def _replace_card(kind: Kind, source: Path, output: Path, cards: Path) -> dict[str, list]:
    """Take a card that alone has changed into an earlier build; `digests` of the build."""
    before = (output / CARD_FILE).read_bytes()
    shutil.copyfile(source / CARD_FILE, output / CARD_FILE)
    if problems := [problem for check in kind.checks for problem in check(output, source)]:
        (output / CARD_FILE).write_bytes(before)
        raise Refused(source, problems)
    shutil.rmtree(cards, ignore_errors=True)
    return digests(_paths(output), {})


def _paths(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _same(found: dict, known: dict) -> bool:
    """Whether two tables of `digests` have the same files with the same content."""
    return _changed(found, known) == set()


def _changed(found: dict, known: dict) -> set[str] | None:
    """Files whose content differs between two tables of `digests`; None if they are of different files."""
    if set(found) != set(known) or None in found.values():
        return None
    return {name for name, entry in found.items() if entry[2] != known[name][2]}


def _without_card(folder: Path, files: dict[str, list]) -> dict[str, File]:
    named = {Path(path).relative_to(folder).as_posix(): File(Path(path), entry[2]) for path, entry in files.items()}
    return {name: file for name, file in named.items() if name != CARD_FILE}


def _code() -> list[Path]:
    """The project's own code that a build goes through."""
    return [path for name in ("modeling_clara", "recipes/publishing") for path in sorted((ROOT / name).rglob("*.py"))]


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


@contextlib.contextmanager
def explain_full_disk(place: Path) -> Iterator[None]:
    """Say so if a disk is full; safetensors does not tell by an errno."""
    try:
        yield
    except Exception as error:
        number = re.search(r"os error (\d+)", str(error))
        if getattr(error, "errno", int(number[1]) if number else None) not in DISK_FULL:
            raise
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        free = shutil.disk_usage(there).free / 1e6
        raise OSError(
            f"the disk must have room for the build, but is full ({free:,.0f} MB free at {place}): {error}. "
            "Nothing was replaced or published. Make room, or name another place with `--build`."
        ) from error

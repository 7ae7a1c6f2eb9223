"""The SHA-256 list of a card: made from a folder, read from a card, and compared with a copy of the folder.

It finds damaged, mixed and added files. It proves no author: who can change the files can change the card too.
"""

import re
from pathlib import Path, PurePosixPath

from .storage_clara import file_sha256

BEGIN, END = "<!-- clara checksums: begin -->", "<!-- clara checksums: end -->"
MANIFEST = "corpus.json"  # has the digests of a corpus's shards and codecs
WEIGHTS = {".safetensors", ".parquet", ".jsonl", ".csv", ".gz"}
SETTINGS = {".json", ".txt", ".model"}  # configuration, tokenizers, requirements
COMPILED = {".pyc", ".so", ".pyd", ".dll", ".dylib"}
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5"}  # can run anything
CODE = {".py", ".js", ".jinja"} | COMPILED | PICKLES
SECTION = re.compile(rf"\s*{BEGIN}(?:(?!{BEGIN}).)*?{END}", re.DOTALL)
ROW = re.compile(r"^\| `(.+)` \| [\d,]+ \| `([0-9a-f]{64})` \|$", re.MULTILINE)


def checksums_section(folder: Path) -> str:
    """The collapsed table of a folder's files: name, bytes, SHA-256; empty if it has none that belong there."""
    rows = [
        f"| `{name}` | {(folder / name).stat().st_size:,} | `{file_sha256(folder / name)}` |"
        for name in _listed(Path(folder))
        if not name.endswith(".pyc")  # Python leaves them there, and nobody publishes them
    ]
    if not rows:
        return ""
    head = ["<details>", "<summary>SHA-256 of the files</summary>", "", "| file | bytes | SHA-256 |"]
    return "\n".join([BEGIN, *head, "| --- | --- | --- |", *rows, "", "</details>", END])


def insert_checksums(card: str, folder: Path) -> str:
    """The card with the list of a folder, in the place of an earlier one or at the end."""
    section = checksums_section(folder)
    if (earlier := SECTION.search(card)) and section:
        return f"{card[: earlier.start()]}\n\n{section}{card[earlier.end() :]}"
    rest = remove_checksums(card)
    return f"{rest.rstrip()}\n\n{section}\n" if section else rest


def remove_checksums(card: str) -> str:
    """The card without its list, such as that of a folder whose files have changed."""
    return SECTION.sub("", card)


def read_checksums(card: str) -> dict[str, str]:
    """File name -> SHA-256, 64 hex digits, as the card has them; empty if it has no list."""
    section = SECTION.search(card)
    return dict(ROW.findall(section[0])) if section else {}


def compare_checksums(card: str, folder: Path, *, complete: bool = True) -> list[str]:
    """What differs between the list of a card and a folder, a sentence each.

    Args:
        card: text of the README.md.
        folder: of the files.
        complete: a listed file that is not there is a problem; not so in a cache, which has what was asked for.

    Returns:
        Problems: files that differ or are missing, and code that is not listed. Nothing for a card without a list.
    """
    folder, listed, problems = Path(folder), read_checksums(card), []
    if not listed:
        return []
    for name, expected in listed.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            problems.append(f"`{name}` of the card's list must be inside the folder. Do not trust this card.")
        elif not (folder / path).is_file():
            if complete:
                problems.append(f"`{name}` must be there as the card lists it, found none. Download it again.")
        elif (found := file_sha256(folder / path)) != expected:
            problems.append(
                f"`{name}` must have the SHA-256 {expected[:12]}... of the card, got {found[:12]}.... "
                "It is damaged or of another version: download it again."
            )
    problems += [
        f"`{name}` must be in the card's list to be run, but is not. Read it, or remove it."
        for name in _listed(folder)
        if name not in listed and PurePosixPath(name).suffix.lower() in CODE
    ]
    return problems


def _listed(folder: Path) -> list[str]:
    """Names of the files that belong in the list, with forward slashes."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    if (folder / MANIFEST).is_file():  # index/ can be made again; no code is loaded from there
        kept = (p for p in paths if p.as_posix() == MANIFEST or p.suffix.lower() in CODE and p.parts[0] != "index")
    else:
        kept = (path for path in paths if path.suffix.lower() in WEIGHTS | SETTINGS | CODE)
    return sorted(path.as_posix() for path in kept)

"""Builds a corpus: checks the arguments and what lies in the folder, then does one rank's share of the work.

The same call continues a build that was killed.
"""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from ..codecs_clara import check_codec
from ..manifest_clara import BUILD_FOLDER, DATA_FOLDER, MANIFEST_FILE, RESERVED_COLUMNS
from ..text_clara import check_count
from .card import CARD_FILE
from .jobs import REJECTED_FILE, Build
from .pipeline import row_digest
from .sources import DocumentSource, type_from_name
from .storage import foreign_files, writer_lock

# What may lie in a folder before its first corpus.json: what a new repo of the Hub has, and with build/ also shards.
EXPECTED = ("index", REJECTED_FILE, CARD_FILE, ".git", ".gitattributes", ".*.partial")


def build_corpus(
    model,
    documents,
    path,
    *,
    codec: str,
    shard_size: int,
    resume: bool,
    memory_size: int | None,
    batch_size: int,
    metadata: Mapping[str, str] | None,
    source: Mapping[str, str] | None,
    rank: int,
    world_size: int,
    **columns,
) -> str | None:
    """Do what `CompressedCorpus.build` says, up to opening the corpus.

    Returns:
        The model's fingerprint if the corpus is complete; None if other ranks are not finished.
    """
    folder = Path(path)
    check_codec(codec)
    check_count(shard_size, "shard_size", "Default: 1024.")
    check_count(batch_size, "batch_size", "Default: 16.")
    check_rank(rank, world_size)
    source = {name: _check_source(name, value) for name, value in (source or {}).items()}
    memory_size = model.config.check_memory_size(memory_size)
    types = {name: type_from_name(value) for name, value in _check_metadata(metadata).items()}
    rows = DocumentSource(documents, exclude=folder, **columns)
    first = hashlib.sha256(b"".join(map(row_digest, rows.peek()))).hexdigest()
    options = {
        "fingerprint": model.fingerprint,
        "codec": codec,
        "shard_size": shard_size,
        "memory_size": memory_size,
        "jobs": world_size,
        "metadata": dict(metadata or {}),
        "columns": {name: value for name, value in columns.items() if value is not None},
        "input": rows.description,
        "first_rows": first,
    }
    _check_folder(folder, resume)
    folder.mkdir(parents=True, exist_ok=True)
    build = Build(folder, model, options, source, rank, world_size)
    with writer_lock(folder / BUILD_FOLDER / f"{build.name}.lock", f"rank {rank} of {world_size} of {folder}"):
        if (folder / MANIFEST_FILE).exists():
            build.check_finished(rows)
        else:
            build.run(rows, types, batch_size)
    if not build.finish():
        return None
    # Ignored: a rank that waits for its lock keeps the folder a moment longer, and then removes it.
    shutil.rmtree(folder / BUILD_FOLDER, ignore_errors=True)
    return options["fingerprint"]


def _check_folder(folder: Path, resume: bool) -> None:
    """Raise a ValueError unless a folder is new, holds a corpus, or holds an unfinished build that may be resumed."""
    if folder.is_file():
        raise ValueError(f"`path` must be a folder, got the file {folder}. Choose another name.")
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"`path` must be a new folder with `resume=False`, got {folder}. Choose another one.")
    is_begun = (folder / BUILD_FOLDER).is_dir()
    foreign = foreign_files(folder, [*EXPECTED, *((BUILD_FOLDER, DATA_FOLDER, "codec") if is_begun else ())])
    if not (folder / MANIFEST_FILE).exists() and foreign:
        raise ValueError(
            f"`path` must be a new folder or one of an unfinished build, got {folder}, which holds {foreign[0]}. "
            "Choose another one."
        )


def _check_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Return `metadata`, or raise a ValueError unless it names types of columns that are not ours."""
    for name, kind in (metadata or {}).items():
        if not isinstance(name, str) or name in RESERVED_COLUMNS or not isinstance(kind, str):
            raise ValueError(
                f"`metadata` must give Arrow types by name to columns other than {', '.join(RESERVED_COLUMNS)}, got "
                f"{name!r}: {kind!r}. Example: {{'year': 'int64'}}."
            )
    return dict(metadata or {})


def _check_source(name: str, value) -> str:
    """Return a field of `source`, or raise a ValueError unless it is a known one with text for the card."""
    is_text = isinstance(value, str) and value.encode("utf-8", "replace").decode() == value
    if name not in ("name", "license", "language") or not is_text:
        raise ValueError(
            f"`source` must have the texts name, license and language, got {name!r}: {value!r}. Correct it."
        )
    return value


def check_rank(rank, world_size) -> None:
    """Raise a ValueError unless 0 <= rank < world_size."""
    if not all(type(value) is int for value in (rank, world_size)) or not 0 <= rank < world_size:
        raise ValueError(
            f"`rank` must be an int from 0 to `world_size` - 1, got {rank!r} of {world_size!r}. Example: rank=0, "
            "world_size=4, the first of four."
        )

"""Builds a corpus: checks the arguments and what lies in the folder, then does one rank's share of the work.

The same call continues a build that was killed.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from ..codecs_clara import check_codec
from ..manifest_clara import BUILD_FOLDER, DATA_FOLDER, MANIFEST_FILE, RESERVED_COLUMNS
from ..text_clara import check_count
from .card import CARD_FILE
from .filelog import FILES_FILE
from .jobs import REJECTED_FILE, Build
from .pipeline import row_digest
from .sources import DocumentSource, is_utf8
from .storage import foreign_files, writer_lock
from .types import ColumnTypes, type_from_name

logger = logging.getLogger(__name__)

# What may lie in a folder before its first corpus.json: what a new repo of the Hub has, and with build/ also shards.
EXPECTED = ("index", REJECTED_FILE, FILES_FILE, CARD_FILE, ".git", ".gitattributes", ".*.partial")


def is_complete(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a corpus whose build is finished."""
    return (Path(folder) / MANIFEST_FILE).exists()


def build(
    cls,
    model,
    documents,
    path,
    *,
    codec: str = "int8",
    shard_size: int = 1024,
    resume: bool = True,
    memory_size: int | None = None,
    batch_size: int = 16,
    metadata: Mapping[str, str] | None = None,
    source: Mapping[str, str] | None = None,
    rank: int = 0,
    world_size: int = 1,
    **columns,
):
    """Compress documents into a corpus folder.

    Killed at any moment, the same call resumes after the last whole shard. Rows that cannot be used are skipped,
    counted and listed with their reason in rejected.jsonl.

    Args:
        cls: class of the corpus that is returned.
        model: `CLaRaForRAG` whose compressor is used.
        documents: a path or address of files, the id of a dataset on the Hub, a `datasets.Dataset` or an iterable of
            texts or of dicts `{id?, title?, text, ...metadata}`, see `DocumentSource`. A dict's `id` counts before its
            `document_id`. A `memory` (n, H) is not computed again.
        path: folder of the corpus.
        codec: "float16", "int8" or "int4".
        shard_size: chunks of a shard, and what a killed build loses at most. The codec is fitted on the first 1,024
            chunks of the first shard.
        resume: resume where an earlier call stopped; False wants a new folder.
        memory_size: n that is stored; default the largest.
        batch_size: documents per pass, see `compress`.
        metadata: Arrow types of metadata columns; default from the input. Numbers in a column that is declared as
            'string' are kept as text.
        source: `name`, `license` and `language` of the text, for the card.
        rank: of this process, from 0; it takes every `world_size`-th document.
        world_size: number of processes that share the work. The last to finish completes the corpus.
        columns: `text_column`, `title_column`, `id_column`, `split` and `config_name` of `DocumentSource`.

    Returns:
        The corpus, open; None if other ranks are not finished.

    Raises:
        FileNotFoundError, TypeError, ValueError: the input or an argument is wrong, or the folder holds something
            else: another input, other options, a corpus that was built from other documents.
        RuntimeError: another process has this rank; it is named.
        OSError: the disk is full; nothing is lost, and the same call resumes.
    """
    folder = Path(path)
    check_codec(codec)
    check_count(shard_size, "shard_size", "Default: 1024.")
    check_count(batch_size, "batch_size", "Default: 16.")
    _check_rank(rank, world_size)
    metadata, source = dict(metadata or {}), dict(source or {})
    _check_source(source)
    memory_size = model.config.check_memory_size(memory_size)
    declared = _declared_types(metadata)
    rows = DocumentSource(documents, exclude=folder, **columns)
    options = {
        "fingerprint": model.fingerprint,
        "codec": codec,
        "shard_size": shard_size,
        "memory_size": memory_size,
        "jobs": world_size,
        "metadata": metadata,
        "columns": {name: value for name, value in columns.items() if value is not None},
        "input": rows.description,
        "first_rows": hashlib.sha256(b"".join(map(row_digest, rows.peek()))).hexdigest(),
    }
    _check_folder(folder, resume)
    folder.mkdir(parents=True, exist_ok=True)
    job = Build(folder, model, options, source, rank, world_size)
    with writer_lock(job.path.with_suffix(".lock"), f"rank {rank} of {world_size} of {folder}"):
        if is_complete(folder):
            job.check_finished(rows)
        else:
            job.run(rows, _scan(rows, declared), batch_size)
    if not job.finish():
        return None
    # Ignored: a rank that waits for its lock keeps the folder a moment longer, and then removes it.
    shutil.rmtree(folder / BUILD_FOLDER, ignore_errors=True)
    return cls.open(folder).attach(model, fingerprint=options["fingerprint"])


def _scan(rows: DocumentSource, declared: dict) -> dict:
    """The types of all metadata; what they leave out is said before it happens."""
    columns: ColumnTypes = rows.scan(declared)
    for name, misfits in columns.misfits.items():
        logger.warning(
            "%d of the values of `%s` are not %s (the first: %r in %s); their documents are left out. Pass "
            "`metadata={%r: 'string'}` to keep all of them as text.",
            misfits.number, name, columns.stored()[name], misfits.value, misfits.place, name,
        )  # fmt: skip
    return columns.stored() | declared


def _check_folder(folder: Path, resume: bool) -> None:
    """Raise a ValueError unless a folder is new, holds a corpus, or holds an unfinished build that may be resumed."""
    if folder.is_file():
        raise ValueError(f"`path` must be a folder, got the file {folder}. Choose another name.")
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"`path` must be a new folder with `resume=False`, got {folder}. Choose another one.")
    is_begun = (folder / BUILD_FOLDER).is_dir()
    foreign = foreign_files(folder, [*EXPECTED, *((BUILD_FOLDER, DATA_FOLDER, "codec") if is_begun else ())])
    if not is_complete(folder) and foreign:
        raise ValueError(
            f"`path` must be a new folder or one of an unfinished build, got {folder}, which holds {foreign[0]}. "
            "Choose another one."
        )


def _declared_types(metadata: Mapping[str, str]) -> dict:
    """Arrow types by column; a ValueError unless `metadata` gives such types to columns that are not ours."""
    for name, kind in metadata.items():
        if not isinstance(name, str) or name in RESERVED_COLUMNS or not isinstance(kind, str):
            raise ValueError(
                f"`metadata` must give Arrow types by name to columns other than {', '.join(RESERVED_COLUMNS)}, got "
                f"{name!r}: {kind!r}. Example: {{'year': 'int64'}}."
            )
    return {name: type_from_name(kind) for name, kind in metadata.items()}


def _check_source(source: Mapping[str, str]) -> None:
    """Raise a ValueError unless these are known fields with text for the card."""
    for name, value in source.items():
        is_text = isinstance(value, str) and is_utf8(value)
        if name not in ("name", "license", "language") or not is_text:
            raise ValueError(
                f"`source` must have the texts name, license and language, got {name!r}: {value!r}. Correct it."
            )


def _check_rank(rank, world_size) -> None:
    if type(rank) is not int or type(world_size) is not int or not 0 <= rank < world_size:
        raise ValueError(
            f"`rank` must be an int from 0 to `world_size` - 1, got {rank!r} of {world_size!r}. Example: rank=0, "
            "world_size=4, the first of four."
        )

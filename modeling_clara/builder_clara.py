"""`CompressedCorpus.build`: the call, its arguments, and what may lie in the folder.

Stands between the user and the jobs of a build. It knows nothing of shards or search.
"""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from .card_clara import CARD_FILE
from .codecs_clara import check_codec
from .jobs_clara import REJECTED_FILE, Build
from .manifest_clara import BUILD_FOLDER, MANIFEST_FILE
from .pipeline_clara import row_digest
from .shards_clara import (
    DATA_FOLDER,
    RESERVED_COLUMNS,
)
from .sources_clara import DocumentSource, type_from_name
from .storage_clara import writer_lock
from .text_clara import check_count

# What may lie in a folder before its first corpus.json: what a new repo of the Hub has, and with build/ also shards.
EXPECTED = {"index", REJECTED_FILE, CARD_FILE, ".git", ".gitattributes"}


class BuilderMixin:
    """`CompressedCorpus.build`."""

    @classmethod
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
        job: tuple[int, int] = (0, 1),
        **columns,
    ):
        """Compress documents into a corpus folder.

        Killed at any moment, the same call goes on after the last whole shard. Rows that cannot be used are skipped,
        counted and listed with their reason in rejected.jsonl.

        Args:
            model: `CLaRaForRAG` whose compressor is used.
            documents: a path, the id of a data set on the Hub, a `datasets.Dataset` or an iterable of texts or of
                dicts `{id?, title?, text, ...metadata}`, see `DocumentSource`. A `memory` (n, H) is not computed
                again.
            path: folder of the corpus.
            codec: "float16", "int8" or "int4".
            shard_size: spans of a shard, and what a killed build loses at most. The codec is fitted on the first 1,024
                spans of the first shard.
            resume: go on where an earlier call stopped; False wants a new folder.
            memory_size: n that is stored; default the largest.
            batch_size: documents per pass, see `compress`.
            metadata: Arrow types of metadata columns; default from the input's schema or its first 1,024 rows.
            source: `name`, `license` and `language` of the text, for the card.
            job: (i, N), this is job i of N, which takes every N-th document. The last to finish completes the corpus.
            columns: `text_column`, `title_column`, `id_column`, `split` and `config_name` of `DocumentSource`.

        Returns:
            The corpus, open; None where other jobs are not finished.

        Raises:
            FileNotFoundError, TypeError, ValueError: the input or an argument is wrong, or the folder holds something
                else: another input, other options, a corpus that was built from other documents.
            RuntimeError: another process works on this job; it is named.
            OSError: the disk is full; nothing is lost, and the same call goes on.
        """
        folder = Path(path)
        check_codec(codec)
        check_count(shard_size, "shard_size", "Default: 1024.")
        check_count(batch_size, "batch_size", "Default: 16.")
        check_job(job)
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
            "jobs": job[1],
            "metadata": dict(metadata or {}),
            "columns": {name: value for name, value in columns.items() if value is not None},
            "input": rows.description,
            "first_rows": first,
        }
        if folder.is_file():
            raise ValueError(f"`path` must be a folder, got the file {folder}. Choose another name.")
        if not resume and folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"`path` must be a new folder with `resume=False`, got {folder}. Choose another one.")
        if not (folder / MANIFEST_FILE).exists() and _strange_files(folder):
            raise ValueError(
                f"`path` must be a new folder or one of an unfinished build, got {folder}, which holds "
                f"{_strange_files(folder)[0]}. Choose another one."
            )
        folder.mkdir(parents=True, exist_ok=True)
        build = Build(folder, model, options, source, job)
        with writer_lock(folder / BUILD_FOLDER / f"{build.name}.lock", f"job {job[0]} of {job[1]} of {folder}"):
            if (folder / MANIFEST_FILE).exists():
                build.check_finished(rows)
            else:
                build.run(rows, types, batch_size)
        if not build.finish():
            return None
        # Ignored: a job that waits for its lock keeps the folder a moment longer, and then removes it.
        shutil.rmtree(folder / BUILD_FOLDER, ignore_errors=True)
        corpus = cls.open(folder)
        return corpus.attach(model, fingerprint=options["fingerprint"])


def _strange_files(folder: Path) -> list[str]:
    """Names of what is neither of an unfinished build nor of a new repo of the Hub."""
    if not folder.is_dir():
        return []
    expected = EXPECTED | ({BUILD_FOLDER, DATA_FOLDER, "codec"} if (folder / BUILD_FOLDER).is_dir() else set())
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in expected and not (path.name.startswith(".") and path.name.endswith(".partial"))
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


def check_job(job) -> None:
    """Raise a ValueError unless `job` is (i, N) with 0 <= i < N."""
    is_pair = isinstance(job, tuple | list) and len(job) == 2 and all(type(value) is int for value in job)
    if not is_pair or not 0 <= job[0] < job[1]:
        raise ValueError(f"`job` must be (i, N) with 0 <= i < N, got {job!r}. Example: (0, 4), the first of four.")

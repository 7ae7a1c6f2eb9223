"""Writes files atomically, and finds the folders of a corpus and of what is derived from it.

It knows nothing of what the files mean.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import uuid
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

PUBLISHED = ["corpus.json", "README.md", "data/*.parquet", "codec/*.safetensors", "rejected.jsonl"]
HUB_REASONS = {  # in place of the Hub client's own paragraphs
    RepositoryNotFoundError: "the Hub has no such dataset, or the token may not read it",
    RevisionNotFoundError: "the dataset has no such revision",
    LocalEntryNotFoundError: "the Hub did not give it and the cache has no copy of it",
}


def read_json(path: Path):
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


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
        with open(partial, "r+b") as file:  # Windows syncs only what may be written
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def derived_folder(folder: Path) -> Path:
    """`index/` of a corpus folder, for what can be made again; git does not see it."""
    index = Path(folder) / "index"
    if not (index / ".gitignore").exists():
        index.mkdir(parents=True, exist_ok=True)
        (index / ".gitignore").write_text("*\n", encoding="utf-8")
    return index


def writable_index_folder(folder: Path) -> Path:
    """`index/` of a corpus folder; a folder of the cache if that cannot be written."""
    with contextlib.suppress(OSError):
        if os.access(index := derived_folder(folder), os.W_OK):
            return index
    return cached_index_folder(folder)


def cached_index_folder(folder: Path) -> Path:
    """A folder in the Hugging Face cache for what is derived from the corpus at this path."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    path = Path(constants.HF_HOME) / "clara" / "index" / name
    with contextlib.suppress(OSError):
        path.mkdir(parents=True, exist_ok=True)
    # without any place that can be written it is made again by every process
    return path if os.access(path, os.W_OK) else Path(tempfile.mkdtemp(prefix="clara-index-"))


def download_corpus(repo_id: str, revision, token, cache_dir, local_files_only: bool) -> Path:
    """The files of a corpus on the Hub, all of one commit; a FileNotFoundError if there is no such dataset."""
    options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    try:
        return Path(snapshot_download(repo_id, repo_type="dataset", allow_patterns=PUBLISHED, **options))
    except (OSError, ValueError) as error:  # all of the Hub client's own errors are OSErrors
        known = [reason for kind, reason in HUB_REASONS.items() if isinstance(error, kind)]
        reason = known[0] if known else str(error).rstrip(".")
        raise FileNotFoundError(
            f"`{repo_id}` must be a folder with a compressed corpus or the id of a dataset on the Hub, but {reason}. "
            "Check the name, the revision, the token and the connection."
        ) from error

"""`CompressedCorpus`: documents with their memories in a folder that is at the same time a Hub dataset.

Stands between users and the parts of a corpus: opened here, searched here; what changes it comes from
`corpus_writer_clara.py`. It knows nothing of how questions are encoded or answers generated.

    corpus.json  README.md  data/*.parquet  codec/*.safetensors      published
    index/                                                           derived on first open, can be made again
"""

import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from huggingface_hub import constants, snapshot_download
from transformers.utils.logging import tqdm

from .builder_clara import BuilderMixin
from .corpus_search_clara import SHORTLIST, SearchMixin
from .corpus_writer_clara import WriterMixin
from .lexical_clara import LexicalIndex
from .manifest_clara import Manifest
from .publish_clara import PublishMixin
from .shards_clara import require_arrow
from .snapshot_clara import WHEN_CHANGED, WHEN_OPENED, Snapshot
from .storage_clara import derived_folder
from .text_clara import check_id, check_list

PUBLISHED = ["corpus.json", "README.md", "data/*.parquet", "codec/*.safetensors", "rejected.jsonl"]


class CompressedCorpus(SearchMixin, BuilderMixin, WriterMixin, PublishMixin):
    """A compressed corpus. Make one with `build`, `open`, or `CLaRaForRAG.load_corpus`.

    It shows the corpus as it was when it was opened, or as this object has changed it; `refresh` shows what others
    have changed since. Searching is safe from several threads, also while one of them writes.

    Attributes:
        folder: where its files lie.
        model: that compresses what is added; None where it was opened without one.
    """

    def __init__(
        self, folder: Path, index_folder: Path, model=None, *, index: str | None = None, milvus: dict | None = None
    ):
        require_arrow()
        self.folder, self.index_folder, self.model = Path(folder), Path(index_folder), None
        self.repo_id: str | None = None  # of the Hub, where it came from there
        self._index_kind, self._milvus = index, milvus
        self._options = {"where": None, "hybrid": False, "exact": False, "shortlist": SHORTLIST}
        self._shared = _Shared()
        self._load(WHEN_OPENED)
        if model is not None:
            self.attach(model)

    # --- opening -----------------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        path_or_repo: str | os.PathLike,
        revision: str | None = None,
        *,
        model=None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        index: str | None = None,
        backend: str = "faiss",
        uri: str | None = None,
        collection: str | None = None,
    ) -> Self:
        """Open a corpus: a folder, or a dataset of the Hub.

        The first time, the shards are checked and what search needs is derived from them, into `index/` of the folder,
        or of the cache where the folder cannot be written or came from the Hub. Later it is only mapped.

        Args:
            path_or_repo: folder, or id of a dataset on the Hub.
            revision: branch, tag or commit of the dataset.
            model: the `CLaRaForRAG` whose compressor made the memories; needed to add texts.
            token: for the Hub.
            cache_dir: of the Hub's files.
            local_files_only: take what is in the cache.
            index: "flat", "hnsw", "ivf" or "ivf_rabitq"; default by size.
            backend: "faiss", or "milvus" for the shortlist.
            uri: of Milvus: a server, or a file of Milvus Lite; default a file in the index folder. A token goes into
                the environment variable MILVUS_TOKEN.
            collection: of Milvus; default named after the folder.

        Raises:
            FileNotFoundError: there is no corpus, or a file of it is missing.
            ValueError: a file is damaged, of another build, of a newer format, or of another compressor than `model`.
        """
        if backend not in ("faiss", "milvus"):
            raise ValueError(f"`backend` must be 'faiss' or 'milvus', got {backend!r}. Leave it out for FAISS.")
        if backend == "faiss" and (uri is not None or collection is not None):
            raise ValueError("`uri` and `collection` must go with `backend='milvus'`. Add it, or leave them out.")
        if backend == "milvus" and index is not None:
            raise ValueError(f"`index` must be left out with `backend='milvus'`, got {index!r}. Milvus has its own.")
        milvus = {"uri": uri, "collection": collection} if backend == "milvus" else None
        if os.path.isdir(path_or_repo):
            folder = Path(path_or_repo)
            Manifest.read(folder)  # before anything is written
            corpus = cls(folder, writable_index_folder(folder), model, index=index, milvus=milvus)
        else:
            folder = download_corpus(str(path_or_repo), revision, token, cache_dir, local_files_only)
            corpus = cls(folder, cached_index_folder(folder), model, index=index, milvus=milvus)
            corpus.repo_id = str(path_or_repo)
        return corpus.prepare()

    def _load(self, limits: tuple[int, float], manifest: Manifest | None = None) -> None:
        """Put the newest snapshot in place."""
        with self._shared.lock:
            previous = self._shared.snapshot
            manifest = manifest or Manifest.read(self.folder)
            while True:
                total = sum(shard.n_spans for shard in manifest.shards)
                with tqdm(total=total, desc="opening the corpus", unit=" spans", delay=2, leave=False) as bar:
                    try:
                        snapshot = Snapshot(
                            self.folder,
                            self.index_folder,
                            manifest,
                            previous=previous,
                            limits=limits,
                            progress=bar.update,
                        )
                        break
                    except (FileNotFoundError, ValueError):
                        newer = Manifest.read(self.folder)  # a writer may have replaced the shards meanwhile
                        if newer.generation == manifest.generation:
                            raise
                        manifest = newer
            indexes = {}
            for k, index in self._shared.indexes.items():
                if self._is_indexed(snapshot):
                    indexes[k] = self._make_index(snapshot, k, previous=index)
            self._shared.snapshot, self._shared.indexes = snapshot, indexes

    def refresh(self) -> Self:
        """Show what was changed since this object was opened, by other processes or objects too."""
        if Manifest.read(self.folder) != self.manifest:
            self._load(WHEN_CHANGED)
        return self

    def attach(self, model, *, fingerprint: str | None = None) -> Self:
        """Give the corpus the model whose compressor made its memories.

        Args:
            model: `CLaRaForRAG`.
            fingerprint: the model's, where it was just taken; it takes some tenths of a second.

        Raises:
            ValueError: another compressor made them.
        """
        if fingerprint == self.manifest.fingerprint:
            self._shared.checked = (id(model), model.compressor_versions())
        self.check_model(model)
        self.model = model
        return self

    def check_model(self, model) -> None:
        """Raise a ValueError unless a model's compressor made the memories.

        The hash is taken again only when a weight that it covers has changed.
        """
        versions = model.compressor_versions()
        if self._shared.checked != (id(model), versions):
            if model.fingerprint != self.manifest.fingerprint:
                name = self.manifest.compressor.get("name_or_path") or "an unnamed model"
                raise ValueError(
                    f"the compressor of the model must be the one that made the corpus, {name} with the fingerprint "
                    f"{self.manifest.fingerprint[:12]}, got {model.name_or_path or 'a model'} with "
                    f"{model.fingerprint[:12]}. Load that model, or build the corpus again with this one."
                )
            self._shared.checked = (id(model), versions)

    # --- what it is --------------------------------------------------------------------------------------------------

    @property
    def manifest(self) -> Manifest:
        """corpus.json, as this object shows it."""
        return self.snapshot.manifest

    @property
    def snapshot(self) -> Snapshot:
        return self._shared.snapshot

    @property
    def fingerprint(self) -> str:
        """Of the compressor that made the memories."""
        return self.manifest.fingerprint

    def __len__(self) -> int:
        """Documents."""
        return self.manifest.n_documents

    @property
    def metadata_columns(self) -> list[str]:
        """Columns beside id, title and text, for filters."""
        return list(self.manifest.metadata)

    def __repr__(self) -> str:
        m = self.manifest
        return (
            f"CompressedCorpus({str(self.folder)!r}, documents={m.n_documents}, spans={m.n_spans}, "
            f"memory={m.memory_size}x{m.hidden_size}, codec={m.codec!r})"
        )

    # --- reading -----------------------------------------------------------------------------------------------------

    def __contains__(self, document_id: str) -> bool:
        return isinstance(document_id, str) and self.snapshot.find(document_id) is not None

    def document_ids(self) -> Iterator[str]:
        """Ids of all documents, in order."""
        snapshot = self.snapshot
        for segment, start in zip(snapshot.segments, snapshot.starts, strict=False):
            column = segment.table["document_id"]
            for row in np.flatnonzero((segment.spans == 0) & snapshot.live[start : start + segment.n_rows]):
                yield column[int(row)].as_py()

    def get(self, ids: Sequence[str]) -> list[dict]:
        """Documents by id.

        Returns:
            For each id a dict `{document_id, title, spans, memory, metadata}`: `spans` has `{span, title, text,
            n_tokens}` of each span, `memory` is (spans, n, H) float32.

        Raises:
            KeyError: an id that the corpus does not have.
        """
        snapshot, found = self.snapshot, []
        for document_id in check_list(ids, "ids"):
            rows = snapshot.find(check_id(document_id))
            if rows is None:
                raise KeyError(f"`ids` must be documents of the corpus, {document_id!r} is none. Check the id.")
            found.append(rows)
        documents = []
        for document_id, rows in zip(ids, found, strict=True):
            spans = [snapshot.record(row, ["span", "title", "text", "n_tokens"]) for row in rows]
            documents.append(
                {
                    "document_id": document_id,
                    "title": spans[0]["title"],
                    "spans": spans,
                    "memory": snapshot.decode(np.array(rows), self.manifest.memory_size),
                    "metadata": snapshot.record(rows.start, self.metadata_columns),
                }
            )
        return documents


class _Shared:
    """What all views of an open corpus have in common."""

    def __init__(self):
        self.lock = threading.RLock()
        self.snapshot: Snapshot | None = None
        self.indexes: dict = {}  # by k
        self.lexical: LexicalIndex | None = None
        self.checked: tuple | None = None  # the model whose fingerprint was compared, and its weights' versions


def writable_index_folder(folder: Path) -> Path:
    """`index/` of a corpus folder; a folder of the cache where that cannot be written."""
    try:
        index = derived_folder(folder)
    except OSError:
        return cached_index_folder(folder)
    return index if os.access(index, os.W_OK) else cached_index_folder(folder)


def cached_index_folder(folder: Path) -> Path:
    """A folder in the Hugging Face cache for what is derived from the corpus at this path."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    path = Path(constants.HF_HOME) / "clara" / "index" / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def download_corpus(repo_id: str, revision, token, cache_dir, local_files_only: bool) -> Path:
    """The files of a corpus on the Hub, all of one commit.

    Raises:
        FileNotFoundError: there is no such folder and no such dataset.
    """
    try:
        path = snapshot_download(
            repo_id,
            repo_type="dataset",
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=PUBLISHED,
        )
    except (OSError, ValueError) as error:  # all of the Hub client's own errors are OSErrors
        raise FileNotFoundError(
            f"`{repo_id}` must be a folder with a compressed corpus or the id of a dataset on the Hub, but could not "
            f"be read: {error} Check the name, the revision and the token."
        ) from error
    return Path(path)

"""`CompressedCorpus`: opens, searches and reads documents with their memories, in a folder or a dataset of the Hub.

This reader travels with every checkpoint. What builds and changes corpora is `modeling_clara.corpus`, installed only.

    corpus.json  README.md  data/*.parquet  codec/*.safetensors      published
    index/                                                           derived on first open, can be made again
"""

import copy
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from transformers.utils.logging import tqdm

from .index_clara import VectorIndex, exact_cosines, rank_documents, scan
from .manifest_clara import Manifest, require_arrow
from .search_clara import SearchOptions, SearchState, allowed_rows, check_query, check_questions, fuse_words, read_hits
from .snapshot_clara import WHEN_CHANGED, WHEN_OPENED, Snapshot
from .storage_clara import cached_index_folder, download_corpus, writable_index_folder
from .text_clara import check_count, check_id, check_list


def _installed_only(name: str) -> Callable:
    """A method that only the installed package has."""

    def refuse(*_, **__):
        raise ImportError(
            f"`CompressedCorpus.{name}` needs the package clara-rag, because a checkpoint's code only reads corpora: "
            "install it from a clone of the repository (`pip install .`) and `import modeling_clara`."
        )

    return refuse


class CompressedCorpus:
    """A compressed corpus. Make one with `build`, `open`, or `CLaRaForRAG.load_corpus`.

    It shows the corpus as it was when it was opened, or as this object has changed it; `refresh` shows what others
    have changed since. Searching is safe from several threads, also while one of them writes.

    Attributes:
        folder: where its files lie.
        model: that compresses what is added; None if it was opened without one.
        repo_id: of the dataset, if it came from the Hub.
    """

    build = staticmethod(_installed_only("build"))
    add, update, upsert = map(_installed_only, ("add", "update", "upsert"))
    delete, sync = map(_installed_only, ("delete", "sync"))
    compact, convert, verify = map(_installed_only, ("compact", "convert", "verify"))
    push_to_hub, record_measurement = map(_installed_only, ("push_to_hub", "record_measurement"))
    milvus_index = staticmethod(_installed_only("open(backend='milvus')"))

    def __init__(
        self, folder: Path, index_folder: Path, model=None, *, make_index: Callable = VectorIndex, always_index=False
    ):
        require_arrow()
        self.folder, self.index_folder, self.model = Path(folder), Path(index_folder), None
        self.repo_id: str | None = None
        self._options, self._state = SearchOptions(), SearchState(make_index, always_index)
        self.reload(WHEN_OPENED)
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
        or of the cache if the folder cannot be written or came from the Hub. Later it is only mapped.

        Args:
            path_or_repo: folder, or id of a dataset on the Hub.
            revision: branch, tag or commit of the dataset.
            model: the `CLaRaForRAG` whose compressor made the memories; needed to add texts.
            token: for the Hub.
            cache_dir: of the Hub's files.
            local_files_only: take what is in the cache.
            index: "flat", "hnsw" or "ivf"; default by size.
            backend: "faiss", or "milvus" for the shortlist, which needs the installed package.
            uri: of a Milvus server (token in MILVUS_TOKEN) or a file of Milvus Lite; default one in the index folder.
            collection: of Milvus; default named after the folder.

        Raises:
            FileNotFoundError: there is no corpus, or a file of it is missing.
            ValueError: a file is damaged, of another build, of a newer format, or of another compressor than `model`.
        """
        is_milvus = backend == "milvus"
        if not is_milvus and backend != "faiss":
            raise ValueError(f"`backend` must be 'faiss' or 'milvus', got {backend!r}. Leave it out for FAISS.")
        if not is_milvus and (uri is not None or collection is not None):
            raise ValueError("`uri` and `collection` must go with `backend='milvus'`. Add it, or leave them out.")
        if is_milvus and index is not None:
            raise ValueError(f"`index` must be left out with `backend='milvus'`, got {index!r}. Milvus has its own.")
        make_index = cls.milvus_index(uri, collection) if is_milvus else functools.partial(VectorIndex, kind=index)
        options = {"make_index": make_index, "always_index": is_milvus or index is not None}
        if os.path.isdir(path_or_repo):
            folder = Path(path_or_repo)
            Manifest.read(folder)  # before anything is written
            corpus = cls(folder, writable_index_folder(folder), model, **options)
        else:
            folder = download_corpus(str(path_or_repo), revision, token, cache_dir, local_files_only)
            corpus = cls(folder, cached_index_folder(folder), model, **options)
            corpus.repo_id = str(path_or_repo)
        return corpus.prepare()

    def reload(self, limits: tuple[int, float], manifest: Manifest | None = None) -> None:
        """Show the corpus as it is now: `manifest`, which was just written, or that of the folder.

        `limits` are those of scattered segments, see `snapshot_clara.WHEN_OPENED`.
        """
        state = self._state
        with state.lock:
            manifest, snapshot = manifest or Manifest.read(self.folder), None
            while snapshot is None:
                total = sum(shard.n_spans for shard in manifest.shards)
                with tqdm(total=total, desc="opening the corpus", unit=" chunks", delay=2, leave=False) as bar:
                    options = {"previous": state.snapshot, "limits": limits, "progress": bar.update}
                    try:
                        snapshot = Snapshot(self.folder, self.index_folder, manifest, **options)
                    except (FileNotFoundError, ValueError):
                        newer = Manifest.read(self.folder)  # a writer may have replaced the shards meanwhile
                        if newer.generation == manifest.generation:
                            raise
                        manifest = newer
            state.show(snapshot)

    def prepare(self, memory_size: int | None = None) -> Self:
        """Make what searching with k vectors, by default `retrieval_memory_size`, needs now instead of at a search."""
        sizes = self.manifest.memory_sizes
        k = self.manifest.retrieval_memory_size if memory_size is None else memory_size
        if k not in sizes:
            raise ValueError(f"`memory_size` must be one of {sizes}, got {k!r}. Choose one of them.")
        if self._state.is_indexed(self.snapshot):
            self._state.index_of(self.snapshot, k)
        return self

    def refresh(self) -> Self:
        """Show what was changed since this object was opened, by other processes or objects too."""
        if Manifest.read(self.folder) != self.manifest:
            self.reload(WHEN_CHANGED)
        return self

    def attach(self, model, *, fingerprint: str | None = None) -> Self:
        """Give the corpus the model whose compressor made its memories; a ValueError if another one made them.

        `fingerprint` is the model's, if it was just taken: that takes some tenths of a second.
        """
        if fingerprint == self.manifest.fingerprint:
            self._state.checked = (fingerprint, id(model), model.compressor_versions())
        self.check_model(model)
        self.model = model
        return self

    def check_model(self, model) -> None:
        """Raise a ValueError unless a model's compressor made the memories.

        The hash is taken again only when a weight that it covers has changed, or the corpus is another.
        """
        checked = (self.manifest.fingerprint, id(model), model.compressor_versions())
        if self._state.checked != checked:
            if model.fingerprint != self.manifest.fingerprint:
                name = self.manifest.compressor.get("name_or_path") or "an unnamed model"
                raise ValueError(
                    f"the compressor of the model must be the one that made the corpus, {name} with the fingerprint "
                    f"{self.manifest.fingerprint[:12]}, got {model.name_or_path or 'a model'} with "
                    f"{model.fingerprint[:12]}. Load that model, or build the corpus again with this one."
                )
            self._state.checked = checked

    @property
    def manifest(self) -> Manifest:
        """corpus.json, as this object shows it."""
        return self.snapshot.manifest

    @property
    def snapshot(self) -> Snapshot:
        """The rows that this object shows."""
        return self._state.snapshot

    @property
    def fingerprint(self) -> str:
        """Of the compressor that made the memories."""
        return self.manifest.fingerprint

    def __len__(self) -> int:
        """Documents."""
        return self.manifest.n_documents

    @property
    def metadata_columns(self) -> list[str]:
        """Columns beside id, title and text."""
        return list(self.manifest.metadata)

    @property
    def filter_columns(self) -> list[str]:
        """Columns that `where` may name."""
        return ["document_id", "title", "span", *self.metadata_columns]

    def __repr__(self) -> str:
        m, folder = self.manifest, str(self.folder)
        size = f"documents={m.n_documents}, spans={m.n_spans}, memory={m.memory_size}x{m.hidden_size}"
        return f"CompressedCorpus({folder!r}, {size}, codec={m.codec!r})"

    @property
    def hybrid(self) -> bool | str:
        """Whether a search ranks by BM25 as well, unless it is told otherwise: see `search`."""
        return self._options.hybrid

    # --- searching ---------------------------------------------------------------------------------------------------

    def with_options(
        self,
        *,
        where: Mapping | None = None,
        hybrid: bool | str | None = None,
        exact: bool | None = None,
        shortlist: int | None = None,
    ) -> Self:
        """The same corpus with other defaults of `search`, for calls that take `corpus=`. What is left out stays.

        Example: `model.answer(questions, corpus=corpus.with_options(where={"year": {"$gte": 2020}}, hybrid=True))`.
        """
        given = {"where": where, "hybrid": hybrid, "exact": exact, "shortlist": shortlist}
        view = copy.copy(self)  # shares snapshot and index
        view._options = self._options.updated(self.filter_columns, **given)
        return view

    def search(
        self,
        query_memory: torch.Tensor,
        top_k: int = 5,
        where: Mapping | None = None,
        *,
        questions: Sequence[str] | None = None,
        hybrid: bool | str | None = None,
        exact: bool | None = None,
        shortlist: int | None = None,
    ) -> list[list[dict]]:
        """The best documents for each question, each by its best chunk.

        An index finds a shortlist in the whole corpus; the exact cosine of the stored memories (eq. 3.1) ranks it.

        Args:
            query_memory: (questions, k, H) floating point; k, one of `memory_sizes`, is what is compared.
            top_k: documents a question; fewer come back if there are no more.
            where: a filter on `document_id`, `title` and the metadata, see `search_clara.py`.
            questions: their texts, for `hybrid`.
            hybrid: also rank by BM25 over the text and fuse both: True or "scores" by a weighted sum of both scores,
                each standardised over what was found, "ranks" by reciprocal rank (`lexical_clara.fuse`).
            exact: compare all memories, without the index.
            shortlist: chunks a question that are compared exactly; default 100.

        Returns:
            For each question dicts `{document_id, span, score, title, text, memory, metadata}`, best first. `score` is
            the cosine, also if `hybrid` decides the order; `memory` is (n, H) float32. A TypeError or ValueError
            names an argument that cannot be used.
        """
        given = {"where": where, "hybrid": hybrid, "exact": exact, "shortlist": shortlist}
        state, snapshot, query_memory = self._state, self.snapshot, check_query(query_memory, self.manifest)
        check_count(top_k, "top_k", "Default: 5.")
        options = self._options.updated(self.filter_columns, **given)
        if options.hybrid:
            check_questions(questions, len(query_memory))
        allowed = allowed_rows(snapshot, options.where)

        def find(memory: torch.Tensor, n: int, allowed: np.ndarray | None) -> np.ndarray:
            if options.exact or not state.is_indexed(snapshot):
                return scan(snapshot, memory, n, allowed)
            return state.index_of(snapshot, memory.shape[1]).shortlist(memory, n, allowed, options.where)

        depth = max(top_k, options.shortlist) if options.hybrid else top_k
        ranked = rank_documents(snapshot, query_memory, depth, find, options.shortlist, allowed)
        if options.hybrid:
            found = state.lexical_of(snapshot).shortlist(questions, depth, allowed)
            ranked = fuse_words(snapshot, query_memory, ranked, found, options.hybrid)
        return [read_hits(snapshot, row[:top_k]) for row in ranked]

    def cosines(self, query_memory: torch.Tensor, rows: np.ndarray) -> list[list[tuple[int, float]]]:
        """Exact cosines (eq. 3.1) of rows that were chosen otherwise: (questions, n) numbers of `rows()`, -1 for none.

        Returns:
            For each question (row, cosine) of every document's best chunk, best first; ties go to the lower row.
        """
        return exact_cosines(self.snapshot, check_query(query_memory, self.manifest), rows)

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

    def rows(self, columns: Sequence[str] = ("document_id", "span", "title", "text")) -> Iterator[dict]:
        """All chunks in order: their values, and as `row` the number by which `decode` and `cosines` know them.

        Deleted chunks are left out. Numbers change when the corpus does.

        Args:
            columns: any of `document_id`, `span`, `title`, `text`, `n_tokens` and `metadata_columns`.
        """
        snapshot, first = self.snapshot, 0
        for segment in snapshot.segments:
            for batch in segment.table.select(list(columns)).to_batches():
                for row, values in enumerate(batch.to_pylist(), first):
                    if snapshot.live[row]:
                        yield {"row": row, **values}
                first += len(batch)

    def decode(self, rows: Sequence[int], memory_size: int | None = None) -> torch.Tensor:
        """(rows, k, H) float32: the memories of rows by their numbers, see `rows`; k defaults to all vectors."""
        numbers = np.asarray(rows, dtype=np.int64)
        wrong = numbers[(numbers < 0) | (numbers >= self.snapshot.n_rows)]
        if len(wrong):
            raise ValueError(f"`rows` must be numbers of `corpus.rows()`, got {wrong[0]}. Take them from there.")
        return self.snapshot.decode(numbers, self.manifest.memory_size if memory_size is None else memory_size)

    @property
    def vector_bytes(self) -> int:
        """Stored bytes of one vector of a memory."""
        return self.snapshot.codec.vector_bytes

    def get(self, ids: Sequence[str]) -> list[dict]:
        """Documents by id.

        Returns:
            For each id a dict `{document_id, title, spans, memory, metadata}`: `spans` has `{span, title, text,
            n_tokens}` of each chunk, `memory` is (chunks, n, H) float32. A KeyError names an id that is not there.
        """
        snapshot, documents = self.snapshot, []
        for document_id in check_list(ids, "ids"):
            rows = snapshot.find(check_id(document_id))
            if rows is None:
                raise KeyError(f"`ids` must be documents of the corpus, {document_id!r} is none. Check the id.")
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

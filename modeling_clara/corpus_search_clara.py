"""Searching a corpus: options, filters, shortlist, exact order, fusion with BM25, and what a hit holds.

Stands between `CompressedCorpus` and the functions of `search_clara.py`, to which it gives rows and from which it gets
rows. It knows nothing of files or of changing a corpus.
"""

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import torch
from transformers.utils.logging import tqdm

from .filters_clara import check_where, rows_where
from .index_clara import VectorIndex
from .lexical_clara import FUSIONS, LexicalIndex, fuse, lexical_key
from .milvus_clara import MilvusIndex
from .search_clara import SMALL, Ranked, exact_cosines, rank_documents, scan
from .snapshot_clara import Snapshot
from .text_clara import check_count

SHORTLIST = 100


class SearchMixin:
    """`search`, `with_options` and `prepare` of `CompressedCorpus`."""

    def prepare(self, memory_size: int | None = None) -> Self:
        """Make what searching needs now, in place of at the first search.

        Args:
            memory_size: k that will be compared; default `retrieval_memory_size`.
        """
        sizes = self.manifest.memory_sizes
        k = self.manifest.retrieval_memory_size if memory_size is None else memory_size
        if k not in sizes:
            raise ValueError(f"`memory_size` must be one of {sizes}, got {k!r}. Choose one of them.")
        if self._is_indexed(self.snapshot):
            self._index_of(self.snapshot, k)
        return self

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
        view._options = self._options | {name: value for name, value in given.items() if value is not None}
        check_count(view._options["shortlist"], "shortlist", f"Default: {SHORTLIST}.")
        _check_hybrid(view._options["hybrid"])
        if where is not None:
            check_where(where, self._filterable())
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
        """The best documents for each question, each by its best span.

        Short vectors find a shortlist in the whole corpus, the exact cosine over the stored memories (eq. 3.1) ranks
        it.

        Args:
            query_memory: (questions, k, H) floating point; k, one of `memory_sizes`, is what is compared.
            top_k: documents a question; fewer come back where there are no more.
            where: a filter on `document_id`, `title` and the metadata, see `filters_clara.py`.
            questions: their texts, for `hybrid`.
            hybrid: also rank by BM25 over the text and fuse both: True or "ranks" by reciprocal rank, "scores" by a
                weighted sum of both scores, each standardised over what was found (`lexical_clara.fuse`).
            exact: compare all memories, without the index.
            shortlist: spans a question that are compared exactly; default 100.

        Returns:
            For each question dicts `{document_id, span, score, title, text, memory, metadata}`, best first. `score` is
            the cosine, also where `hybrid` decides the order; `memory` is (n, H) float32.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        options = dict(self._options)
        given = {"where": where, "hybrid": hybrid, "exact": exact, "shortlist": shortlist}
        options.update({name: value for name, value in given.items() if value is not None})
        snapshot = self.snapshot
        query_memory = self._check_query(query_memory)
        check_count(top_k, "top_k", "Default: 5.")
        check_count(options["shortlist"], "shortlist", f"Default: {SHORTLIST}.")
        _check_hybrid(options["hybrid"])
        allowed = None if snapshot.n_live == snapshot.n_rows else snapshot.live
        if options["where"] is not None:
            check_where(options["where"], self._filterable())
            masks = [rows_where(segment.table, options["where"]) for segment in snapshot.segments]
            met = np.concatenate(masks) if masks else np.zeros(0, dtype=bool)
            allowed = met if allowed is None else met & allowed
        find = functools.partial(scan, snapshot)
        if not options["exact"] and self._is_indexed(snapshot):
            find = functools.partial(self._shortlist, snapshot, options["where"])
        depth = max(top_k, options["shortlist"]) if options["hybrid"] else top_k
        ranked = rank_documents(snapshot, query_memory, depth, find, shortlist=options["shortlist"], allowed=allowed)
        if options["hybrid"]:
            fusion = options["hybrid"] if options["hybrid"] in FUSIONS else FUSIONS[0]
            ranked = self._fuse(snapshot, query_memory, questions, ranked, depth, allowed, fusion)
        return [self._hits(snapshot, row[:top_k]) for row in ranked]

    def _check_query(self, query_memory: torch.Tensor) -> torch.Tensor:
        hidden, sizes = self.manifest.hidden_size, self.manifest.memory_sizes
        try:
            query_memory = torch.as_tensor(query_memory).detach().float().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"`query_memory` must be a tensor, got {type(query_memory).__name__}. Encode the questions with the "
                "corpus's model: `encode_queries`, or search through `model.retrieve`."
            ) from error
        if query_memory.ndim != 3 or query_memory.shape[2] != hidden or query_memory.shape[1] not in sizes:
            raise ValueError(
                f"`query_memory` must have the shape (questions, k, {hidden}) with k one of {sizes}, got "
                f"{tuple(query_memory.shape)}. Encode the questions with the corpus's model: `encode_queries`."
            )
        if not query_memory.isfinite().all():
            raise ValueError("`query_memory` must be finite, got NaN or infinity. Encode the questions again.")
        return query_memory

    def _filterable(self) -> list[str]:
        return ["document_id", "title", "span", *self.metadata_columns]

    def _is_indexed(self, snapshot: Snapshot) -> bool:
        """Whether the index is worth it: a small corpus is compared row by row."""
        wanted = self._index_kind is not None or self._milvus is not None
        return bool(snapshot.segments) and (snapshot.n_rows > SMALL or wanted) and snapshot.segments[0].n_rows > 0

    def _shortlist(self, snapshot, where, query_memory, n, allowed) -> np.ndarray:
        return self._index_of(snapshot, query_memory.shape[1]).shortlist(query_memory, n, allowed, where)

    def _index_of(self, snapshot: Snapshot, memory_size: int):
        with self._shared.lock:  # made once, however many threads ask
            if snapshot is not self._shared.snapshot:
                return self._make_index(snapshot, memory_size)
            if memory_size not in self._shared.indexes:
                self._shared.indexes[memory_size] = self._make_index(snapshot, memory_size)
            return self._shared.indexes[memory_size]

    def _make_index(self, snapshot: Snapshot, memory_size: int, previous=None):
        with tqdm(total=snapshot.n_rows, desc="indexing the corpus", unit=" spans", delay=2, leave=False) as bar:
            if self._milvus is not None:
                return MilvusIndex(snapshot, memory_size, **self._milvus, progress=bar.update, previous=previous)
            return VectorIndex(snapshot, memory_size, self._index_kind, bar.update, previous)

    def _fuse(self, snapshot, query_memory, questions, ranked: Ranked, depth: int, allowed, fusion: str) -> Ranked:
        """Both orders, of memories and of words, as one."""
        if isinstance(questions, str) or not all(isinstance(question, str) for question in questions or []):
            raise TypeError("`questions` must be a list of texts for `hybrid`. Pass the texts of the query memories.")
        if questions is None or len(questions) != len(query_memory):
            raise ValueError(
                f"`questions` must be the {len(query_memory)} texts of the query memories for `hybrid`, got "
                f"{None if questions is None else len(questions)}. Pass them, or search through the model."
            )
        with self._shared.lock:
            lexical = self._shared.lexical
            if lexical is None or lexical.key != lexical_key(snapshot):
                lexical = self._shared.lexical = LexicalIndex(snapshot)
        found = lexical.shortlist(questions, depth, allowed)
        rows = np.full((len(found), max([1, *(len(mine) for mine, _ in found)])), -1, dtype=np.int64)
        for question, (mine, _) in enumerate(found):
            rows[question, : len(mine)] = mine
        cosines = exact_cosines(snapshot, query_memory, rows)
        fused = []
        for by_memory, by_words, lexical_cosines in zip(ranked, found, cosines, strict=True):
            best = {self._document(snapshot, row): (row, score) for row, score in lexical_cosines}
            best |= {self._document(snapshot, row): (row, score) for row, score in by_memory}
            words = {}
            for row, score in zip(*by_words, strict=True):  # the best span of a document comes first
                words.setdefault(self._document(snapshot, int(row)), float(score))
            memories = [self._document(snapshot, row) for row, _ in by_memory]
            order = fuse(memories, words, {document: score for document, (_, score) in best.items()}, fusion)
            fused.append([best[document] for document in order])
        return fused

    @staticmethod
    def _document(snapshot: Snapshot, row: int) -> int:
        return row - int(snapshot.spans[row])

    def _hits(self, snapshot: Snapshot, ranked: list[tuple[int, float]]) -> list[dict]:
        if not ranked:
            return []
        memory = snapshot.decode(np.array([row for row, _ in ranked]), snapshot.manifest.memory_size)
        hits = []
        for (row, score), rows in zip(ranked, memory, strict=True):
            record = snapshot.record(row, ["document_id", "span", "title", "text", *snapshot.manifest.metadata])
            metadata = {name: record.pop(name) for name in snapshot.manifest.metadata}
            hits.append({**record, "score": score, "memory": rows, "metadata": metadata})
        return hits


def _check_hybrid(hybrid: bool | str) -> None:
    if hybrid not in (True, False, *FUSIONS):
        raise ValueError(
            f"`hybrid` must be True, False, {' or '.join(map(repr, FUSIONS))}, got {hybrid!r}. Pass one of them."
        )

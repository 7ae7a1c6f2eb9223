"""Changing a corpus: add, update, delete, compact, convert to another codec.

Stands between the user and corpus.json. Every change writes new shards, then one new corpus.json, then removes what it
no longer names; killed in between, the corpus is as it was. Readers keep the snapshot that they have.
"""

import base64
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
from transformers.utils.logging import tqdm

from .card_clara import write_card
from .codecs_clara import Codec, check_codec
from .jobs_clara import REJECTED_FILE
from .manifest_clara import Manifest, Shard
from .pipeline_clara import COMPRESSED_SPANS, ShardPipeline, ShardResult
from .shards_clara import (
    ShardWriter,
    binary_array,
    check_shard,
    live_mask,
    memory_rows,
    pa,
    read_batches,
    remove_strangers,
)
from .snapshot_clara import WHEN_CHANGED, WHEN_OPENED, load_codecs, write_state
from .sources_clara import DocumentSource, InputRow
from .storage_clara import append_lines, corpus_lock, read_lines, write_lines
from .text_clara import check_count, check_id, check_list


@dataclass(frozen=True)
class Changes:
    """What a change did.

    Attributes:
        n_documents, n_spans: added or put in place of earlier ones.
        rejected: `{row, place, id, reason}` of the rows that were skipped; they also stand in rejected.jsonl.
    """

    n_documents: int
    n_spans: int
    rejected: list[dict] = field(default_factory=list)


class WriterMixin:
    """`add`, `update`, `delete`, `compact` and `convert` of `CompressedCorpus`."""

    def add(self, documents, *, shard_size: int = 1024, batch_size: int = 16, **columns) -> Changes:
        """Compress further documents and append them.

        They are found by the next search of this object. Each shard becomes part of the corpus as soon as it is
        written: a call that is killed has added its first documents or none, and none twice.

        Args:
            documents: as in `build`. Those that bring their `memory` (n, H) need no model.
            shard_size: spans of a shard.
            batch_size: documents per pass.
            columns: of `DocumentSource`.

        Returns:
            What was added, and which rows were not: an id that is there already is one of the reasons.

        Raises:
            FileNotFoundError, TypeError, ValueError: the input is wrong, or there is no model.
            RuntimeError: another process writes to the corpus; it is named.
        """
        return self._append(documents, shard_size, batch_size, columns, is_update=False)

    def update(self, documents, *, shard_size: int = 1024, batch_size: int = 16, **columns) -> Changes:
        """Put documents in place of those with their ids; arguments as in `add`.

        Returns:
            What was replaced, and which rows were not: an id that is not there is one of the reasons.
        """
        return self._append(documents, shard_size, batch_size, columns, is_update=True)

    def delete(self, ids: Sequence[str]) -> int:
        """Delete documents.

        Their rows are only marked; `compact` takes them out of the files, as publishing does.

        Args:
            ids: of documents of the corpus, each once.

        Returns:
            Their number.

        Raises:
            KeyError: an id that is not there. Nothing is deleted then.
        """
        ids = [check_id(name) for name in check_list(ids, "ids")]
        if len(set(ids)) != len(ids):
            raise ValueError("`ids` must be different, got one twice. Remove the second.")
        with self._writing() as manifest:
            places = []
            for document_id in ids:
                rows = self.snapshot.find(document_id)
                if rows is None:
                    raise KeyError(f"`ids` must be documents of the corpus, {document_id!r} is none. Check the id.")
                places.append(self.snapshot.shard_rows(rows))
            for shard, rows in places:
                manifest.shards[shard].bury(rows)
            self._commit(manifest)
        return len(ids)

    def compact(self, *, shard_size: int = 1024) -> None:
        """Write the shards anew without deleted documents, in shards of `shard_size` spans.

        Memories keep their bytes. The compute cost is that of copying.
        """
        check_count(shard_size, "shard_size", "Default: 1024.")
        with self._writing() as manifest:
            self._rewrite(manifest, shard_size, None)

    def convert(self, codec: str, *, shard_size: int = 1024) -> None:
        """Encode the memories with another codec, without compressing again; deleted documents are left out.

        What a coarser codec has lost a finer one does not bring back.

        Args:
            codec: "float16", "int8" or "int4".
            shard_size: spans of a shard.

        Raises:
            ValueError: unknown codec, or a memory does not fit into it.
        """
        check_codec(codec)
        check_count(shard_size, "shard_size", "Default: 1024.")
        with self._writing() as manifest:
            if codec != manifest.codec:
                self._rewrite(manifest, shard_size, codec)

    # --- how a change is made ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Manifest]:
        """Hold the corpus's lock; gives a copy of the newest manifest to change and commit."""
        if self.repo_id is not None:
            raise ValueError(
                f"a corpus of the Hub must be copied to a folder to be changed, got {self.repo_id}. Copy it: "
                f"`hf download {self.repo_id} --repo-type dataset --local-dir FOLDER`, open FOLDER, then push."
            )
        with corpus_lock(self.folder):
            self.refresh()
            lines = read_lines(self.folder / REJECTED_FILE)
            if len(lines) > self.manifest.n_rejected:  # of a writer that was killed before its commit
                write_lines(self.folder / REJECTED_FILE, lines[: self.manifest.n_rejected])
            try:
                yield deepcopy(self.manifest)
            finally:
                # What is on the disk counts, not what this object shows: a commit may have failed half way.
                with contextlib.suppress(OSError, ValueError):
                    remove_strangers(self.folder, Manifest.read(self.folder))

    def _commit(self, manifest: Manifest, limits=WHEN_CHANGED) -> None:
        """Make a manifest the corpus's, and show it."""
        manifest.generation += 1
        manifest.count()
        write_card(self.folder, manifest)
        manifest.write(self.folder)
        self._load(limits, manifest)

    def _append(self, documents, shard_size: int, batch_size: int, columns: dict, *, is_update: bool) -> Changes:
        rows = DocumentSource(documents, **columns)
        check_count(shard_size, "shard_size", "Default: 1024.")
        check_count(batch_size, "batch_size", "Default: 16.")
        if self.model is not None:
            self.check_model(self.model)
        with self._writing() as manifest:
            snapshot = self.snapshot
            given: set[str] = set()

            def refusal(document_id: str) -> str | None:
                if document_id in given:
                    return "it was given twice. Give it once."
                is_there = snapshot.find(document_id) is not None
                if is_there and not is_update:
                    return "it is there already. Rename it, or use `update`."
                if is_update and not is_there:
                    return "it is not there to be replaced. Use `add`."
                given.add(document_id)
                return None

            numbers = itertools.count(sum(shard.n_documents for shard in manifest.shards))

            def new_id(row: InputRow) -> str:
                return next(name for name in map(str, numbers) if name not in given and snapshot.find(name) is None)

            codecs = [codec for codec in self.snapshot.codecs.values() if codec.is_fitted]
            pipeline = ShardPipeline(
                self.folder,
                self.model,
                codec=codecs[-1] if codecs else manifest.codec,
                memory_size=manifest.memory_size,
                hidden_size=manifest.hidden_size,
                types=self._metadata_types(),
                refusal=refusal,
                forget=given.discard,
                new_id=new_id,
                shard_size=shard_size,
                batch_size=batch_size,
                prefix=f"{manifest.generation + 1:05d}",
            )
            wanted = self._with_remedy(rows, is_update)
            n_documents = n_spans = 0
            rejected: list[dict] = []
            with tqdm(total=rows.length, desc="compressing", unit=" documents", delay=2) as bar:
                for result in pipeline.run(_counted(wanted, bar.update)):
                    self._commit_result(manifest, result, pipeline, is_update)
                    rejected += result.rejected
                    if result.shard is not None:
                        n_documents += result.shard.n_documents
                        n_spans += result.shard.n_spans
        return Changes(n_documents, n_spans, rejected)

    def _with_remedy(self, rows: Iterable[InputRow], is_update: bool) -> Iterator[InputRow]:
        """The rows; a text without a model to compress it stops everything, because all would be rejected."""
        for row in rows:
            if self.model is None and row.document is not None and row.document.get("memory") is None:
                raise ValueError(
                    f"`{row.place}` must have a `memory`, because the corpus was opened without a model. Open it with "
                    "`model.load_corpus(...)`, or `CompressedCorpus.open(..., model=model)`."
                )
            if is_update and row.document is not None and row.document.get("id") is None:
                row = InputRow(row.index, row.place, None, f"`{row.place}` must have an id to replace a document by.")
            yield row

    def _commit_result(
        self, manifest: Manifest, result: ShardResult, pipeline: ShardPipeline, is_update: bool
    ) -> None:
        """Make one shard part of the corpus, and what it replaces no part of it, at once."""
        append_lines(self.folder / REJECTED_FILE, result.rejected)
        manifest.n_rejected += len(result.rejected)
        if result.shard is not None:
            if is_update:
                for document_id in result.document_ids:
                    number, rows = self.snapshot.shard_rows(self.snapshot.find(document_id))
                    manifest.shards[number].bury(rows)
            manifest.codec_states |= pipeline.codec_states
            manifest.shards.append(result.shard)
        if result.shard is not None or result.rejected:
            self._commit(manifest)

    def _metadata_types(self) -> "dict[str, pa.DataType]":
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(self.manifest.metadata_schema)))
        return {column.name: column.type for column in schema}

    def _rewrite(self, manifest: Manifest, shard_size: int, codec: str | None) -> None:
        """New shards of all live rows, and the commit; with a codec the memories are decoded and encoded again."""
        old, total = load_codecs(self.folder, manifest), self.snapshot.n_live
        new = None if codec is None or not total else self._fit(codec)
        states = {} if new is None else write_state(self.folder, new)

        def encode(rows: np.ndarray, state: str) -> np.ndarray:
            return rows if new is None else new.encode(old[state].decode(rows))

        with tqdm(total=total, desc="writing", unit=" spans", delay=2) as bar:
            manifest.shards = list(self._rewritten(manifest, shard_size, encode, new, bar.update))
        manifest.codec = manifest.codec if codec is None else codec
        used = {shard.codec_state for shard in manifest.shards}
        states = states if codec else manifest.codec_states
        manifest.codec_states = {key: sha256 for key, sha256 in states.items() if key in used}
        self._commit(manifest, WHEN_OPENED)

    def _fit(self, name: str) -> Codec:
        """A codec fitted on memories from all over the corpus."""
        rows, size = np.flatnonzero(self.snapshot.live), self.manifest.memory_size
        sample = rows[np.unique(np.linspace(0, len(rows) - 1, COMPRESSED_SPANS).astype(np.int64))]
        return Codec.fit(name, self.snapshot.decode(sample, size))

    def _rewritten(
        self, manifest: Manifest, shard_size: int, encode: Callable, new: Codec | None, count: Callable[[int], object]
    ) -> Iterator[Shard]:
        """Copies of the live rows, cut into shards at the ends of documents, in order."""
        prefix, number = f"{manifest.generation + 1:05d}", itertools.count()
        # Memories of different states cannot share a shard; where all are encoded anew they have one.
        state_of = (lambda shard: shard.codec_state) if new is None else (lambda shard: new.key)
        for state, group in itertools.groupby(manifest.shards, key=state_of):
            writer = None
            try:
                for table in itertools.chain.from_iterable(self._live_tables(shard, encode) for shard in group):
                    starts, first = np.flatnonzero(table["span"].to_numpy() == 0).tolist(), 0
                    while first < len(table):
                        if writer is not None and writer.n_spans >= shard_size and first in starts:
                            yield writer.close()
                            writer = None
                        if writer is None:
                            writer = ShardWriter(self.folder, table.schema, f"{prefix}-{next(number):06d}", state)
                        full = first + max(shard_size - writer.n_spans, 1)
                        last = next((start for start in starts if start >= full), len(table))
                        writer.write_table(table.slice(first, last - first))
                        first = last
                    count(len(table))
                if writer is not None:
                    yield writer.close()
                    writer = None
            finally:
                if writer is not None:
                    writer.abandon()

    def _live_tables(self, shard: Shard, encode: Callable) -> "Iterator[pa.Table]":
        check_shard(self.folder, shard)  # damage shall not get a new checksum
        live, start = live_mask(shard), 0
        for batch in read_batches(self.folder, shard):
            mask = live[start : start + len(batch)]
            start += len(batch)
            kept = batch.filter(pa.array(mask))
            if not len(kept):
                continue
            rows = memory_rows(kept["memory"], self.snapshot.codec.row_bytes, f"the shard {shard.file}")
            memory = binary_array(encode(rows, shard.codec_state))
            arrays = [memory if name == "memory" else kept[name] for name in kept.schema.names]
            yield pa.Table.from_arrays(arrays, schema=kept.schema)


def _counted(rows: Iterable[InputRow], count: Callable[[int], object]) -> Iterator[InputRow]:
    for row in rows:
        count(1)
        yield row

"""Changes a corpus: adds, replaces and deletes documents.

Every change writes new shards, then one new corpus.json, then removes what it no longer names. If it is killed in
between, the corpus is as it was. Readers keep the snapshot that they have.
"""

import base64
import bisect
import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial

from ..manifest_clara import Manifest, pa
from ..snapshot_clara import WHEN_CHANGED
from ..text_clara import check_count, check_id, check_list
from .card import write_card
from .jobs import REJECTED_FILE, counted, text_columns
from .pipeline import ShardDraft, ShardPipeline
from .shards import count_live, delete_rows, remove_unreferenced, write_manifest
from .sources import DocumentSource, InputRow
from .storage import append_lines, corpus_lock, read_lines, write_lines

UNFINISHED = "unfinished"  # memories of a call that was killed, in the index folder


@dataclass
class Changes:
    """What a change did.

    Attributes:
        n_documents, n_spans: added or put in place of earlier ones; spans are chunks.
        n_deleted: documents that were deleted.
        n_unchanged: documents that were there already as they were given; they were not compressed again.
        rejected: `{row, place, id, reason, status, file}` of the rows that were skipped; they also stand in
            rejected.jsonl.
    """

    n_documents: int = 0
    n_spans: int = 0
    n_deleted: int = 0
    n_unchanged: int = 0
    rejected: list[dict] = field(default_factory=list)


def add(corpus, documents, *, shard_size: int = 1024, batch_size: int = 16, **columns) -> Changes:
    """Compress further documents and append them.

    They are found by the next search of this object. Each shard becomes part of the corpus as soon as it is written: a
    call that is killed has added its first documents or none, and none twice.

    Args:
        corpus: that is changed.
        documents: as in `build`. Those that bring their `memory` (n, H) need no model.
        shard_size: chunks of a shard.
        batch_size: documents per pass.
        columns: of `DocumentSource`.

    Returns:
        What was added, and which rows were not: an id that is there already is one of the reasons.

    Raises:
        FileNotFoundError, TypeError, ValueError: the input is wrong, or there is no model.
        RuntimeError: another process writes to the corpus; it is named.
    """
    return _append(corpus, DocumentSource(documents, **columns), shard_size, batch_size, "add")


def update(corpus, documents, *, shard_size: int = 1024, batch_size: int = 16, **columns) -> Changes:
    """Replace the documents that have the same ids; arguments as in `add`.

    Returns:
        What was replaced, and which rows were not: an id that is not there is one of the reasons.
    """
    return _append(corpus, DocumentSource(documents, **columns), shard_size, batch_size, "update")


def upsert(corpus, documents, *, shard_size: int = 1024, batch_size: int = 16, **columns) -> Changes:
    """Add the documents, or replace those that have the same ids; arguments as in `add`.

    Documents that are there with the same text and metadata are not compressed again.
    """
    return _append(corpus, DocumentSource(documents, **columns), shard_size, batch_size, "upsert")


def _append(corpus, rows: DocumentSource, shard_size: int, batch_size: int, mode: str) -> Changes:
    check_count(shard_size, "shard_size", "Default: 1024.")
    check_count(batch_size, "batch_size", "Default: 16.")
    if corpus.model is not None:
        corpus.check_model(corpus.model)
    changes = Changes()
    with writing(corpus) as manifest:
        snapshot = corpus.snapshot
        given: set[str] = set()

        def refusal(document_id: str, row: InputRow) -> str | None:
            if document_id in given:
                return "it was given twice. Give it once."
            is_there = snapshot.find(document_id) is not None
            if is_there and mode == "add":
                return "it is there already. Rename it, or use `update`."
            if mode == "update" and not is_there:
                return "it is not there to be replaced. Use `add`."
            given.add(document_id)
            return None

        numbers = map(str, itertools.count(sum(shard.n_documents for shard in manifest.shards)))

        def new_id(row: InputRow) -> str:
            free = (name for name in numbers if name not in given and name not in rows.given_ids)
            return next(name for name in free if snapshot.find(name) is None)

        pipeline = changing(
            corpus,
            manifest,
            refusal=refusal,
            forget=given.discard,
            new_id=new_id,
            shard_size=shard_size,
            batch_size=batch_size,
            is_stored=partial(is_stored, corpus) if mode == "upsert" else None,
        )
        wanted = _with_remedy(rows, corpus.model is not None, mode == "update")
        with counted(rows) as pipeline.progress:
            for draft in pipeline.run(wanted):
                append_lines(corpus.folder / REJECTED_FILE, draft.rejected)
                replace_ids(corpus, manifest, draft, pipeline.codec_states)
                count_changes(changes, draft)
                if draft.shard is not None or draft.rejected:
                    commit(corpus, manifest)
    return changes


def delete(corpus, ids: Sequence[str]) -> int:
    """Delete documents.

    Their rows are only marked; `compact` takes them out of the files, as publishing does.

    Args:
        corpus: that is changed.
        ids: of documents of the corpus, each once.

    Returns:
        Their number.

    Raises:
        KeyError: an id that is not there. Nothing is deleted then.
    """
    ids = [check_id(name) for name in check_list(ids, "ids")]
    if len(set(ids)) != len(ids):
        raise ValueError("`ids` must be different, got one twice. Remove the second.")
    with writing(corpus) as manifest:
        for document_id in ids:
            if corpus.snapshot.find(document_id) is None:
                raise KeyError(f"`ids` must be documents of the corpus, {document_id!r} is none. Check the id.")
        delete_ids(corpus, manifest, ids)
        commit(corpus, manifest)
    return len(ids)


def record_measurement(corpus, measured: dict) -> None:
    """Write what a codec costs into corpus.json and the card, until documents change.

    Args:
        corpus: that was measured.
        measured: `data`, `questions` and `codecs`: for each codec `bytes` and any of `recall@5`, `f1`, `em`,
            `containment`.
    """
    with writing(corpus) as manifest:
        manifest.measured = measured
        commit(corpus, manifest)


# --- how a change is made --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(corpus) -> Iterator[Manifest]:
    """Hold the corpus's lock; gives a copy of the newest manifest to change and commit."""
    if corpus.repo_id is not None:
        raise ValueError(
            f"a corpus of the Hub must be copied to a folder to be changed, got {corpus.repo_id}. Copy it: "
            f"`hf download {corpus.repo_id} --repo-type dataset --local-dir FOLDER`, open FOLDER, then push."
        )
    with corpus_lock(corpus.folder):
        corpus.refresh()
        lines = read_lines(corpus.folder / REJECTED_FILE)
        if len(lines) > corpus.manifest.n_rejected:  # of a writer that was killed before its commit
            write_lines(corpus.folder / REJECTED_FILE, lines[: corpus.manifest.n_rejected])
        try:
            yield deepcopy(corpus.manifest)
        finally:
            # What is on the disk counts, not what this object shows: a commit may have failed half way.
            with contextlib.suppress(OSError, ValueError):
                remove_unreferenced(corpus.folder, Manifest.read(corpus.folder))


def commit(corpus, manifest: Manifest, limits=WHEN_CHANGED) -> None:
    """Make a manifest the corpus's, and show it."""
    manifest.generation += 1
    count_live(manifest)
    write_card(corpus.folder, manifest)
    write_manifest(corpus.folder, manifest)
    corpus.reload(limits, manifest)


def _with_remedy(rows: Iterable[InputRow], has_model: bool, is_update: bool) -> Iterator[InputRow]:
    """The rows; a text without a model to compress it stops everything, because all would be rejected."""
    for row in rows:
        if not has_model and row.document is not None and row.document.get("memory") is None:
            raise ValueError(
                f"`{row.place}` must have a `memory`, because the corpus was opened without a model. Open it with "
                "`model.load_corpus(...)`, or `CompressedCorpus.open(..., model=model)`."
            )
        if is_update and row.document is not None and row.document.get("id") is None:
            row = InputRow(row.index, row.place, None, f"`{row.place}` must have an id to replace a document by.")
        yield row


def changing(corpus, manifest: Manifest, **options) -> ShardPipeline:
    """The pipeline that makes shards for a corpus; `options` are its own."""
    fitted = [codec for codec in corpus.snapshot.codecs.values() if codec.is_fitted]
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(manifest.metadata_schema)))
    return ShardPipeline(
        corpus.folder,
        corpus.model,
        codec=fitted[-1] if fitted else manifest.codec,
        memory_size=manifest.memory_size,
        hidden_size=manifest.hidden_size,
        types={column.name: column.type for column in schema},
        prefix=f"{manifest.generation + 1:05d}",
        kept=corpus.index_folder / UNFINISHED,
        as_text=text_columns(manifest.build.get("metadata", {})),
        **options,
    )


def is_stored(corpus, spans: Sequence[Mapping]) -> bool:
    """Whether the chunks of a document are those that the corpus has, texts and metadata."""
    rows = corpus.snapshot.find(spans[0]["document_id"])
    if rows is None or len(rows) != len(spans) or "memory" in spans[0]:
        return False
    for row, span in zip(rows, spans, strict=True):
        segment, place = corpus.snapshot.locate(row)
        for name in ("title", "text", "n_tokens", *corpus.metadata_columns):
            kind = segment.table.schema.field(name).type
            stored, given = segment.table[name][place].as_py(), pa.scalar(span[name], kind).as_py()
            if stored != given and (stored == stored or given == given):  # NaN is as it was
                return False
    return True


def replace_ids(corpus, manifest: Manifest, draft: ShardDraft, codec_states: Mapping[str, str]) -> None:
    """Put a shard that was written into a manifest, and take out what has the ids of its documents."""
    manifest.n_rejected += len(draft.rejected)
    if draft.shard is not None:
        delete_ids(corpus, manifest, draft.documents)
        manifest.codec_states |= codec_states
        manifest.shards.append(draft.shard)
        manifest.measured = {}  # of other documents


def delete_ids(corpus, manifest: Manifest, ids: Iterable[str]) -> int:
    """Mark the documents with these ids as deleted in a manifest, as far as the corpus has them; their number."""
    found = [rows for rows in map(corpus.snapshot.find, dict.fromkeys(ids)) if rows is not None]
    starts = list(itertools.accumulate((shard.n_spans for shard in corpus.snapshot.manifest.shards), initial=0))
    for rows in found:  # of all shards, and of one
        number = bisect.bisect_right(starts, rows.start) - 1
        delete_rows(manifest.shards[number], range(rows.start - starts[number], rows.stop - starts[number]))
    if found:
        manifest.measured = {}
    return len(found)


def count_changes(changes: Changes, draft: ShardDraft) -> None:
    """Add what a draft did to the changes of a call."""
    changes.rejected += draft.rejected
    changes.n_unchanged += sum(map(len, draft.stored.values()))
    if draft.shard is not None:
        changes.n_documents += draft.shard.n_documents
        changes.n_spans += draft.shard.n_spans

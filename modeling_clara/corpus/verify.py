"""Verifies a corpus: reads every byte and compares it with what corpus.json and the other files say."""

from pathlib import Path

import numpy as np

from ..codecs_clara import Codec
from ..manifest_clara import (
    MANIFEST_FILE,
    Manifest,
    Shard,
    check_shard,
    live_mask,
    load_codecs,
    memory_rows,
    pa,
    read_batches,
)
from ..snapshot_clara import id_table
from .ids import SeenIds
from .shards import shard_documents

MAX_PROBLEMS = 100
REMEDY = "Copy or download the corpus again, or build it again."


def verify(corpus) -> list[str]:
    """Do what `CompressedCorpus.verify` says."""
    return verify_files(corpus.folder) or _verify_derived(corpus)


def _verify_derived(corpus) -> list[str]:
    """Compare what was derived with the shards, column by column."""
    snapshot, first, wrong = corpus.snapshot, 0, {}
    for shard in snapshot.manifest.shards:
        start = first
        for batch in read_batches(corpus.folder, shard):
            segment, place = snapshot.locate(start)
            rows = memory_rows(batch["memory"], snapshot.codec.row_bytes, shard.file)
            columns = segment.table.schema.names
            table = segment.table.slice(place, len(batch)).combine_chunks()
            same = np.array_equal(rows, segment.rows[place : place + len(batch)])
            if not same or not table.equals(pa.Table.from_batches([batch.select(columns)]).cast(table.schema)):
                wrong[segment.folder] = shard.file
            start += len(batch)
        first += shard.n_spans
    for segment in snapshot.segments:
        if segment.folder not in wrong and not np.array_equal(segment.ids, id_table(segment.table)):
            wrong[segment.folder] = "the ids of its documents"
    return [f"{folder} differs from {what}. Remove it: it is made again." for folder, what in wrong.items()]


def verify_files(folder: Path) -> list[str]:
    """Problems of the published files of a corpus, see `CompressedCorpus.verify`."""
    folder, problems = Path(folder), []
    try:
        manifest = Manifest.read(folder)
        codecs = load_codecs(folder, manifest)
    except (OSError, ValueError) as error:
        return [str(error)]
    n_documents = n_spans = 0
    seen = SeenIds(lambda number: _live_ids(folder, manifest.shards[number]))
    for number, shard in enumerate(manifest.shards):
        try:
            check_shard(folder, shard)
            codec = codecs.get(shard.codec_state)
            if codec is None:
                raise ValueError(f"{shard.file} must name a state of the codec, got {shard.codec_state!r}.")
            ids, n_live_spans = _verify_rows(folder, shard, codec, seen, manifest.metadata)
            seen.settle(number, ids)
            n_documents, n_spans = n_documents + len(ids), n_spans + n_live_spans
        except (OSError, ValueError) as error:
            problems.append(str(error))
    if not problems and (n_documents, n_spans) != (manifest.n_documents, manifest.n_spans):
        problems.append(
            f"{MANIFEST_FILE} must count {n_documents} documents and {n_spans} spans, it says "
            f"{manifest.n_documents} and {manifest.n_spans}. Copy it again."
        )
    return problems[:MAX_PROBLEMS]


def _verify_rows(folder: Path, shard: Shard, codec: Codec, seen: SeenIds, metadata: dict) -> tuple[list[str], int]:
    """Check the rows of a shard; returns the ids of its live documents and the number of their chunks.

    Raises:
        ValueError: naming shard and row.
    """
    live, row, previous = live_mask(shard), 0, (None, -1, True)
    n_documents = n_spans = 0
    ids: list[str] = []
    missing = set(metadata) - set(next(read_batches(folder, shard)).schema.names) if shard.n_spans else set()
    if missing:
        raise ValueError(f"{MANIFEST_FILE} names the columns {sorted(missing)}, which {shard.file} lacks. {REMEDY}")
    for batch in read_batches(folder, shard):
        memory = codec.decode(memory_rows(batch["memory"], codec.row_bytes, shard.file))
        if not memory.isfinite().all():
            raise ValueError(f"{shard.file} must hold finite memories, got NaN or infinity. {REMEDY}")
        columns = [batch[name].to_pylist() for name in ("id", "document_id", "span", "text")]
        for span_id, document_id, span, text in zip(*columns, strict=True):
            is_live = bool(live[row])
            follows = (document_id, span) == (previous[0], previous[1] + 1) and is_live == previous[2]
            if not (span == 0 or follows) or span_id != f"{document_id}#{span}" or text is None:
                raise ValueError(
                    f"{shard.file} must hold the spans of each document in order, all live or all deleted; row {row} "
                    f"is {span_id!r}. {REMEDY}"
                )
            if span == 0:
                n_documents += 1
                if is_live and not seen.add(document_id):
                    raise ValueError(
                        f"{shard.file} has the document {document_id!r}, which is there already. {REMEDY}"
                    )
                if is_live:
                    ids.append(document_id)
            n_spans += is_live
            previous, row = (document_id, span, is_live), row + 1
    if (n_documents, n_documents - len(ids)) != (shard.n_documents, shard.n_deleted):
        raise ValueError(
            f"{shard.file} must count {n_documents} documents, {n_documents - len(ids)} of them deleted; "
            f"{MANIFEST_FILE} says {shard.n_documents} and {shard.n_deleted}. {REMEDY}"
        )
    return ids, n_spans


def _live_ids(folder: Path, shard: Shard) -> set[str]:
    live = live_mask(shard)
    return {name for name, rows in shard_documents(folder, shard).items() if live[rows.start]}

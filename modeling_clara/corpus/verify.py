"""Verifies a corpus: reads every byte and compares it with what corpus.json and the other files say."""

from pathlib import Path

import numpy as np

from ..codecs_clara import Codec
from ..manifest_clara import (
    MANIFEST_FILE,
    RESERVED_COLUMNS,
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
    """Read every byte of the corpus.

    Checked are the checksums of all shards and codec states, the columns, that the chunks of a document stand together
    and in order, that ids are unique, that memories decode to finite values, the counts, and the derived files.

    Returns:
        What is wrong, at most 100 problems; an empty list if all is well.
    """
    return verify_files(corpus.folder) or _verify_derived(corpus)


def _verify_derived(corpus) -> list[str]:
    """Compare what was derived with the shards, column by column."""
    snapshot, start, wrong = corpus.snapshot, 0, {}
    for shard in snapshot.manifest.shards:
        for batch in read_batches(corpus.folder, shard):
            segment, place = snapshot.locate(start)
            table = segment.table.slice(place, len(batch)).combine_chunks()
            stored = pa.Table.from_batches([batch.select(table.schema.names)]).cast(table.schema)
            rows = memory_rows(batch["memory"], snapshot.codec.row_bytes, shard.file)
            if not np.array_equal(rows, segment.rows[place : place + len(batch)]) or not table.equals(stored):
                wrong[segment.folder] = shard.file
            start += len(batch)
    for segment in snapshot.segments:
        if segment.folder not in wrong and not np.array_equal(segment.ids, id_table(segment.table)):
            wrong[segment.folder] = "the ids of its documents"
    return [f"{folder} differs from {what}. Remove it: it is made again." for folder, what in wrong.items()]


def verify_files(folder: Path) -> list[str]:
    """Problems of the published files of a corpus, see `verify`."""
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
            ids, n_live_spans = _verify_rows(folder, shard, codecs[shard.codec_state], seen, list(manifest.metadata))
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


def _verify_rows(folder: Path, shard: Shard, codec: Codec, seen: SeenIds, metadata: list) -> tuple[list[str], int]:
    """Check the rows of a shard; the ids of its live documents, and the number of their chunks.

    Raises:
        ValueError: naming shard and row.
    """
    live, row, expected = live_mask(shard), 0, None
    n_documents, ids = 0, []
    for batch in read_batches(folder, shard, [*RESERVED_COLUMNS, *metadata]):
        memory = codec.decode(memory_rows(batch["memory"], codec.row_bytes, shard.file))
        if not memory.isfinite().all():
            raise ValueError(f"{shard.file} must hold finite memories, got NaN or infinity. {REMEDY}")
        columns = [batch[name].to_pylist() for name in ("id", "document_id", "span", "text")]
        for span_id, document_id, span, text in zip(*columns, strict=True):
            is_placed = span == 0 or (document_id, span, live[row]) == expected
            if not is_placed or span_id != f"{document_id}#{span}" or text is None:
                raise ValueError(
                    f"{shard.file} must hold the chunks of each document in order, all live or all deleted; row {row} "
                    f"is {span_id!r}. {REMEDY}"
                )
            if span == 0:
                n_documents += 1
                if live[row]:
                    ids.append(document_id)
                    if not seen.add(document_id):
                        raise ValueError(
                            f"{shard.file} has the document {document_id!r}, which is there already. {REMEDY}"
                        )
            expected, row = (document_id, span + 1, live[row]), row + 1
    if (n_documents, n_documents - len(ids)) != (shard.n_documents, shard.n_deleted):
        raise ValueError(
            f"{shard.file} must count {n_documents} documents, {n_documents - len(ids)} of them deleted; "
            f"{MANIFEST_FILE} says {shard.n_documents} and {shard.n_deleted}. {REMEDY}"
        )
    return ids, int(live.sum())


def _live_ids(folder: Path, shard: Shard) -> set[str]:
    live = live_mask(shard)
    return {name for name, rows in shard_documents(folder, shard).items() if live[rows.start]}

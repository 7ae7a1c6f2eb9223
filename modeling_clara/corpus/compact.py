"""Rewrites the shards of a corpus: without deleted documents, or converted to another codec.

Memories keep their bytes unless the codec changes.
"""

import itertools
import shutil
from collections.abc import Iterator

import numpy as np
from transformers.utils.logging import tqdm

from ..codecs_clara import Codec, check_codec
from ..manifest_clara import Manifest, Shard, check_shard, live_mask, load_codecs, memory_rows, pa, read_batches
from ..snapshot_clara import WHEN_OPENED
from ..text_clara import check_count
from .changes import UNFINISHED, commit, writing
from .encode import encode, fit_codec
from .pipeline import COMPRESSED_SPANS
from .shards import ShardWriter, binary_array, write_state


def compact(corpus, *, shard_size: int = 1024) -> None:
    """Write the shards anew without deleted documents, in shards of `shard_size` chunks.

    Memories keep their bytes. The compute cost is that of copying.
    """
    check_count(shard_size, "shard_size", "Default: 1024.")
    with writing(corpus) as manifest:
        rewrite(corpus, manifest, shard_size)
        for path in [*corpus.index_folder.glob("bm25-*"), corpus.index_folder / UNFINISHED]:  # they hold old text too
            shutil.rmtree(path, ignore_errors=True)


def convert(corpus, codec: str, *, shard_size: int = 1024) -> None:
    """Encode the memories with another codec, without compressing again; deleted documents are left out.

    What a coarser codec has lost a finer one does not bring back.

    Args:
        corpus: that is changed.
        codec: "float16", "int8" or "int4".
        shard_size: chunks of a shard.

    Raises:
        ValueError: unknown codec, or a memory does not fit into it.
    """
    check_codec(codec)
    check_count(shard_size, "shard_size", "Default: 1024.")
    with writing(corpus) as manifest:
        if codec != manifest.codec:
            rewrite(corpus, manifest, shard_size, codec)


def rewrite(corpus, manifest: Manifest, shard_size: int = 1024, codec: str | None = None) -> None:
    """New shards of all live rows, and the commit; with a codec the memories are decoded and encoded again."""
    old, live = load_codecs(corpus.folder, manifest), np.flatnonzero(corpus.snapshot.live)
    new, states, shards = None, manifest.codec_states, []
    if codec is not None:
        manifest.codec, states = codec, {}
        if len(live):  # fitted on memories from all over the corpus
            sample = live[np.unique(np.linspace(0, len(live) - 1, COMPRESSED_SPANS).astype(np.int64))]
            new = fit_codec(codec, corpus.snapshot.decode(sample, manifest.memory_size))
            states = write_state(corpus.folder, new)

    def live_tables() -> "Iterator[tuple[str, pa.Table]]":
        for shard in manifest.shards:
            codecs = None if new is None else (old[shard.codec_state], new)
            for table in _live_tables(corpus, shard, codecs):
                yield (shard.codec_state if new is None else new.key), table

    with tqdm(total=len(live), desc="writing", unit=" chunks", delay=2) as bar:
        for (number, state), pieces in itertools.groupby(_cut(live_tables(), shard_size), key=lambda piece: piece[0]):
            tables = [table for _, table in pieces]
            name = f"{manifest.generation + 1:05d}-{number:06d}"
            with ShardWriter(corpus.folder, tables[0].schema, name, state) as writer:
                for table in tables:
                    writer.write_table(table)
                shards.append(writer.close())
            bar.update(shards[-1].n_spans)
    used = {shard.codec_state for shard in shards}
    manifest.shards = shards
    manifest.codec_states = {key: sha256 for key, sha256 in states.items() if key in used}
    commit(corpus, manifest, WHEN_OPENED)


def _cut(tables: "Iterator[tuple[str, pa.Table]]", shard_size: int) -> "Iterator[tuple[tuple[int, str], pa.Table]]":
    """((number of the new shard, its codec state), rows of it).

    A shard begins with a document, once the one before it is full or has memories of another state.
    """
    number, n_rows, last_state = -1, 0, None
    for state, table in tables:
        starts, first = np.flatnonzero(table["span"].to_numpy() == 0).tolist(), 0
        while first < len(table):
            if first in starts and (n_rows >= shard_size or state != last_state):
                number, n_rows, last_state = number + 1, 0, state
            full = first + max(shard_size - n_rows, 1)
            last = next((start for start in starts if start >= full), len(table))
            yield (number, state), table.slice(first, last - first)
            n_rows, first = n_rows + last - first, last


def _live_tables(corpus, shard: Shard, codecs: tuple[Codec, Codec] | None) -> "Iterator[pa.Table]":
    """The live rows of a shard, with their memories decoded by the first codec and encoded by the second."""
    check_shard(corpus.folder, shard)  # damage shall not get a new checksum
    live, start = live_mask(shard), 0
    for batch in read_batches(corpus.folder, shard):
        kept = batch.filter(pa.array(live[start : start + len(batch)]))
        start += len(batch)
        if not len(kept):
            continue
        rows = memory_rows(kept["memory"], corpus.snapshot.codec.row_bytes, f"the shard {shard.file}")
        if codecs is not None:
            rows = encode(codecs[1], codecs[0].decode(rows))
        place = kept.schema.get_field_index("memory")
        yield pa.Table.from_batches([kept]).set_column(place, kept.schema.field(place), binary_array(rows))

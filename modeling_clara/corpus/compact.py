"""Rewrites the shards of a corpus: without deleted documents, or converted to another codec.

Memories keep their bytes unless the codec changes.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
from transformers.utils.logging import tqdm

from ..codecs_clara import Codec, check_codec
from ..manifest_clara import Manifest, Shard, check_shard, live_mask, load_codecs, memory_rows, pa, read_batches
from ..snapshot_clara import WHEN_OPENED
from ..text_clara import check_count
from .changes import commit, writing
from .encode import encode as encode_memory
from .encode import fit_codec
from .pipeline import COMPRESSED_SPANS
from .shards import ShardWriter, binary_array, write_state


def compact(corpus, *, shard_size: int) -> None:
    """Do what `CompressedCorpus.compact` says."""
    check_count(shard_size, "shard_size", "Default: 1024.")
    with writing(corpus) as manifest:
        rewrite(corpus, manifest, shard_size, None)


def convert(corpus, codec: str, *, shard_size: int) -> None:
    """Do what `CompressedCorpus.convert` says."""
    check_codec(codec)
    check_count(shard_size, "shard_size", "Default: 1024.")
    with writing(corpus) as manifest:
        if codec != manifest.codec:
            rewrite(corpus, manifest, shard_size, codec)


def rewrite(corpus, manifest: Manifest, shard_size: int, codec: str | None) -> None:
    """New shards of all live rows, and the commit; with a codec the memories are decoded and encoded again."""
    old, total = load_codecs(corpus.folder, manifest), corpus.snapshot.n_live
    new = None if codec is None or not total else _fit(corpus, codec)
    states = {} if new is None else write_state(corpus.folder, new)

    def encode(rows: np.ndarray, state: str) -> np.ndarray:
        return rows if new is None else encode_memory(new, old[state].decode(rows))

    with tqdm(total=total, desc="writing", unit=" spans", delay=2) as bar:
        manifest.shards = list(_rewritten(corpus, manifest, shard_size, encode, new, bar.update))
    manifest.codec = manifest.codec if codec is None else codec
    used = {shard.codec_state for shard in manifest.shards}
    states = states if codec else manifest.codec_states
    manifest.codec_states = {key: sha256 for key, sha256 in states.items() if key in used}
    commit(corpus, manifest, WHEN_OPENED)


def _fit(corpus, name: str) -> Codec:
    """A codec fitted on memories from all over the corpus."""
    rows, size = np.flatnonzero(corpus.snapshot.live), corpus.manifest.memory_size
    sample = rows[np.unique(np.linspace(0, len(rows) - 1, COMPRESSED_SPANS).astype(np.int64))]
    return fit_codec(name, corpus.snapshot.decode(sample, size))


def _rewritten(
    corpus, manifest: Manifest, shard_size: int, encode: Callable, new: Codec | None, count: Callable[[int], object]
) -> Iterator[Shard]:
    """Copies of the live rows, cut into shards at the ends of documents, in order."""
    prefix, number = f"{manifest.generation + 1:05d}", itertools.count()
    # Memories of different states cannot share a shard; where all are encoded anew they have one.
    state_of = (lambda shard: shard.codec_state) if new is None else (lambda shard: new.key)
    for state, group in itertools.groupby(manifest.shards, key=state_of):
        writer = None
        try:
            for table in itertools.chain.from_iterable(_live_tables(corpus, shard, encode) for shard in group):
                starts, first = np.flatnonzero(table["span"].to_numpy() == 0).tolist(), 0
                while first < len(table):
                    if writer is not None and writer.n_spans >= shard_size and first in starts:
                        yield writer.close()
                        writer = None
                    if writer is None:
                        writer = ShardWriter(corpus.folder, table.schema, f"{prefix}-{next(number):06d}", state)
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


def _live_tables(corpus, shard: Shard, encode: Callable) -> "Iterator[pa.Table]":
    check_shard(corpus.folder, shard)  # damage shall not get a new checksum
    live, start = live_mask(shard), 0
    for batch in read_batches(corpus.folder, shard):
        mask = live[start : start + len(batch)]
        start += len(batch)
        kept = batch.filter(pa.array(mask))
        if not len(kept):
            continue
        rows = memory_rows(kept["memory"], corpus.snapshot.codec.row_bytes, f"the shard {shard.file}")
        memory = binary_array(encode(rows, shard.codec_state))
        arrays = [memory if name == "memory" else kept[name] for name in kept.schema.names]
        yield pa.Table.from_arrays(arrays, schema=kept.schema)

"""Writes the files of a corpus: Parquet shards, codec states and corpus.json.

A file gets its final name when it is whole, so that a writer may be killed at any moment.
"""

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

import numpy as np
from safetensors.torch import save

from ..codecs_clara import Codec
from ..manifest_clara import (
    DATA_FOLDER,
    MANIFEST_FILE,
    RESERVED_COLUMNS,
    ROWS_PER_GROUP,
    Manifest,
    Shard,
    pa,
    pq,
    read_batches,
    state_file,
)
from ..storage_clara import file_sha256, replacing, write_json

# Names that a writer gives, whole or not: nothing else is ever removed.
OURS = re.compile(
    r"(data/|codec/)?\..+\.\d+(-[0-9a-f]{8})?\.partial|data/\d{5}-\d{6}-[0-9a-f]{12}\.parquet|codec/[0-9a-f]{12}\.safetensors"
)

# --- corpus.json -----------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put corpus.json in place, at once."""
    content = asdict(manifest)
    write_json(Path(folder) / MANIFEST_FILE, {"format_version": content.pop("format_version"), **content})


def count_live(manifest: Manifest) -> None:
    """Set `n_documents` and `n_spans` to what the tombstones leave."""
    deleted = sum(last - first for shard in manifest.shards for first, last in shard.tombstones)
    manifest.n_spans = sum(shard.n_spans for shard in manifest.shards) - deleted
    manifest.n_documents = sum(shard.n_documents - shard.n_deleted for shard in manifest.shards)


def delete_rows(shard: Shard, rows: range) -> None:
    """Mark the document that has these rows of a shard as deleted."""
    shard.tombstones = merge_ranges([*shard.tombstones, [rows.start, rows.stop]])
    shard.n_deleted += 1


def merge_ranges(ranges: list) -> list[list[int]]:
    """Ascending disjoint (first, last + 1) ranges that cover the given ones.

    >>> merge_ranges([[4, 5], [0, 2], [2, 3]])
    [[0, 3], [4, 5]]
    """
    merged = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    return merged


def write_state(folder: Path, codec: Codec) -> dict[str, str]:
    """Write the state of a codec; `{key: SHA-256 of the file}`, empty if it has none."""
    if not codec.state:
        return {}
    path = folder / state_file(codec.key)
    with replacing(path) as partial:
        partial.write_bytes(save(codec.state))  # not `save_file`, whose error on a full disk is no OSError
    return {codec.key: file_sha256(path)}


# --- shards ----------------------------------------------------------------------------------------------------------


def shard_schema(metadata: "dict[str, pa.DataType]") -> "pa.Schema":
    """The columns of a shard; the memory comes last and is one binary value a row, which reads fastest."""
    types = {"span": pa.int32(), "n_tokens": pa.int32(), "memory": pa.large_binary()}
    *fixed, memory = [(name, types.get(name, pa.string())) for name in RESERVED_COLUMNS]
    return pa.schema([*fixed, *metadata.items(), memory])


class ShardWriter:
    """Writes one shard under a temporary name; `close` gives it its checksum and its final name.

    A context manager: what was not closed at its end is removed. `name` is without the checksum and the suffix that
    `close` appends, `codec_state` is the key of the state that the memories are encoded with.
    """

    def __init__(self, folder: Path, schema: "pa.Schema", name: str, codec_state: str):
        self.folder, self.schema, self.name, self.codec_state = Path(folder), schema, name, codec_state
        (self.folder / DATA_FOLDER).mkdir(parents=True, exist_ok=True)
        self.partial = self.folder / DATA_FOLDER / f".{name}.{os.getpid()}.partial"
        # Memories are noise to a compressor, and every value of them is different.
        compression = {column: "NONE" if column == "memory" else "ZSTD" for column in schema.names}
        dictionary = [column for column in schema.names if column not in ("id", "text", "memory")]
        self.writer = pq.ParquetWriter(
            self.partial, schema, compression=compression, use_dictionary=dictionary, write_statistics=False
        )
        self.n_spans = self.n_documents = 0

    def write(self, rows: Sequence[Mapping], memory: np.ndarray) -> None:
        """Append rows, which have all columns but `memory`, with (rows, row_bytes) uint8 encoded memories."""
        fields = [column for column in self.schema if column.name != "memory"]
        arrays = [pa.array([row[column.name] for row in rows], column.type) for column in fields]
        self.write_table(pa.Table.from_arrays([*arrays, binary_array(memory)], schema=self.schema))

    def write_table(self, table: "pa.Table") -> None:
        """Append rows that already have the columns of the schema."""
        self.writer.write_table(table, row_group_size=ROWS_PER_GROUP)
        self.n_spans += len(table)
        self.n_documents += int((table["span"].to_numpy() == 0).sum())

    def close(self) -> Shard:
        """Finish the file and put it in place."""
        self.writer.close()
        with open(self.partial, "r+b") as file:
            os.fsync(file.fileno())
        sha256, n_bytes = file_sha256(self.partial), self.partial.stat().st_size
        file = f"{DATA_FOLDER}/{self.name}-{sha256[:12]}.parquet"
        os.replace(self.partial, self.folder / file)
        return Shard(file, sha256, n_bytes, self.n_spans, self.n_documents, self.codec_state)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        """Remove what was not closed."""
        with contextlib.suppress(OSError):  # a full disk, which the caller's error tells of
            self.writer.close()
        self.partial.unlink(missing_ok=True)


def binary_array(memory: np.ndarray) -> "pa.Array":
    """(rows, row_bytes) uint8 as a large_binary column, without a copy."""
    offsets = np.arange(len(memory) + 1, dtype=np.int64) * memory.shape[1]
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(memory))]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(memory), buffers)


def shard_documents(folder: Path, shard: Shard) -> dict[str, range]:
    """The rows of every document of a shard, by id."""
    ids, spans = [], []
    for batch in read_batches(folder, shard, ["document_id", "span"]):
        spans.append(batch["span"].to_numpy())
        ids += batch["document_id"].to_pylist()
    starts = np.flatnonzero(np.concatenate(spans) == 0).tolist() if spans else []
    return {ids[first]: range(first, last) for first, last in zip(starts, [*starts[1:], len(ids)], strict=True)}


def remove_unreferenced(folder: Path, manifest: Manifest) -> None:
    """Remove shards and states that corpus.json does not name: what killed writers left behind."""
    named = {shard.file for shard in manifest.shards} | set(map(state_file, manifest.codec_states))
    for path in [*folder.glob(".*"), *folder.glob(f"{DATA_FOLDER}/*"), *folder.glob("codec/*")]:
        name = path.relative_to(folder).as_posix()
        if OURS.fullmatch(name) and name not in named and path.is_file():
            path.unlink(missing_ok=True)

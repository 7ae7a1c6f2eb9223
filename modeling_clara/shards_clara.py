"""The Parquet shards of a compressed corpus: their columns, how they are written and how they are read.

Stands between rows of documents with encoded memories and the files under data/. It knows nothing of models, search,
or which shards belong to a corpus.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .manifest_clara import Manifest, Shard
from .storage_clara import file_sha256

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:  # `require_arrow` names the remedy
    pa = pq = None

DATA_FOLDER = "data"
# Names that a writer gives, whole or not: nothing else is ever removed.
OURS = re.compile(
    r"(data/|codec/)?\..+\.\d+(-[0-9a-f]{8})?\.partial|data/\d{5}-\d{6}-[0-9a-f]{12}\.parquet|codec/[0-9a-f]{12}\.safetensors"
)
ROWS_PER_GROUP = 1024
RESERVED_COLUMNS = ("id", "document_id", "span", "title", "text", "n_tokens", "memory")


def require_arrow() -> None:
    """Raise an ImportError that names the remedy where pyarrow is missing."""
    if pa is None:
        raise ImportError('corpora need pyarrow. Install it: pip install "clara-rag[corpus]", or pip install pyarrow.')


def shard_schema(metadata: "dict[str, pa.DataType]") -> "pa.Schema":
    """The columns of a shard; the memory comes last and is one binary value a row, which reads fastest."""
    fixed = [
        ("id", pa.string()),
        ("document_id", pa.string()),
        ("span", pa.int32()),
        ("title", pa.string()),
        ("text", pa.string()),
        ("n_tokens", pa.int32()),
    ]
    return pa.schema([*fixed, *metadata.items(), ("memory", pa.large_binary())])


def metadata_types(schema: "pa.Schema") -> "dict[str, pa.DataType]":
    """The columns that are neither ours nor reserved."""
    return {column.name: column.type for column in schema if column.name not in RESERVED_COLUMNS}


class ShardWriter:
    """Writes one shard under a temporary name; `close` gives it its checksum and its final name.

    Args:
        folder: of the corpus.
        schema: see `shard_schema`.
        name: of the shard, without the checksum and the suffix that `close` appends.
        codec_state: key of the state that the memories are encoded with.
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

    def write(self, columns: dict[str, Sequence], memory: np.ndarray) -> None:
        """Append rows.

        Args:
            columns: values of all columns but `memory`.
            memory: (rows, row_bytes) uint8, encoded.
        """
        arrays = [pa.array(columns[field.name], field.type) for field in self.schema if field.name != "memory"]
        table = pa.Table.from_arrays([*arrays, binary_array(memory)], schema=self.schema)
        self.write_table(table)

    def write_table(self, table: "pa.Table") -> None:
        """Append rows that already have the columns of the schema."""
        self.writer.write_table(table, row_group_size=ROWS_PER_GROUP)
        self.n_spans += len(table)
        self.n_documents += int((table["span"].to_numpy() == 0).sum())

    def close(self) -> Shard:
        """Finish the file and put it in place."""
        self.writer.close()
        with open(self.partial, "rb") as file:
            os.fsync(file.fileno())
        sha256 = file_sha256(self.partial)
        file = f"{DATA_FOLDER}/{self.name}-{sha256[:12]}.parquet"
        n_bytes = self.partial.stat().st_size
        os.replace(self.partial, self.folder / file)
        return Shard(file, sha256, n_bytes, self.n_spans, self.n_documents, self.codec_state)

    def abandon(self) -> None:
        """Remove what was written."""
        try:
            self.writer.close()
        except OSError:  # a full disk, which the caller's error tells of
            pass
        finally:
            self.partial.unlink(missing_ok=True)


def binary_array(memory: np.ndarray) -> "pa.Array":
    """(rows, row_bytes) uint8 as a large_binary column, without a copy."""
    offsets = np.arange(len(memory) + 1, dtype=np.int64) * memory.shape[1]
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(memory))]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(memory), buffers)


def memory_rows(column: "pa.Array", row_bytes: int, place: str) -> np.ndarray:
    """(rows, row_bytes) uint8 view of a memory column.

    Raises:
        ValueError: a row is missing or of another size, naming it.
    """
    if not pa.types.is_large_binary(column.type):
        raise ValueError(
            f"the column `memory` of {place} must be large_binary, got {column.type}. The shard was not written by "
            "this package: build the corpus again."
        )
    offsets = np.frombuffer(column.buffers()[1], np.int64)[column.offset : column.offset + len(column) + 1]
    wrong = np.flatnonzero(np.diff(offsets) != row_bytes)
    if column.null_count or len(wrong):
        row = int(wrong[0]) if len(wrong) else 0
        raise ValueError(
            f"every `memory` of {place} must have {row_bytes} bytes, row {row} has "
            f"{int(offsets[row + 1] - offsets[row])}. The shard belongs to another corpus or is damaged: copy or "
            "download it again."
        )
    start = int(offsets[0]) if len(offsets) else 0
    data = np.frombuffer(column.buffers()[2] or b"", np.uint8)
    return data[start : start + len(column) * row_bytes].reshape(len(column), row_bytes)


def check_shard(folder: Path, shard: Shard) -> None:
    """Raise unless the file of a shard is there and is, byte for byte, the one that was written.

    Raises:
        FileNotFoundError: missing.
        ValueError: truncated, changed or of another build.
    """
    path = Path(folder) / shard.file
    if not path.is_file():
        raise FileNotFoundError(
            f"the shard {path} must be there, as corpus.json says, but is missing. Copy or download it again."
        )
    n_bytes = path.stat().st_size
    if n_bytes != shard.n_bytes:
        raise ValueError(
            f"the shard {path} must have {shard.n_bytes} bytes, got {n_bytes}. It is truncated or of another build: "
            "copy or download it again."
        )
    if file_sha256(path) != shard.sha256:
        raise ValueError(
            f"the shard {path} must have the checksum {shard.sha256[:12]}..., which corpus.json names. It is damaged "
            "or of another build: copy or download it again."
        )


def read_batches(folder: Path, shard: Shard, columns: list[str] | None = None) -> "Iterator[pa.RecordBatch]":
    """The rows of a shard in batches of at most `ROWS_PER_GROUP`.

    Raises:
        ValueError: the file is no Parquet file or lacks a column.
    """
    path = Path(folder) / shard.file
    try:
        with pq.ParquetFile(path) as file:
            missing = set(columns or RESERVED_COLUMNS) - set(file.schema_arrow.names)
            if missing:
                raise ValueError(f"it lacks the columns {sorted(missing)}")
            if file.metadata.num_rows != shard.n_spans:
                raise ValueError(f"it has {file.metadata.num_rows} rows in place of {shard.n_spans}")
            yield from file.iter_batches(batch_size=ROWS_PER_GROUP, columns=columns)
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(
            f"the shard {path} cannot be read: {error}. Copy or download it again, or build the corpus again."
        ) from error


def live_mask(shard: Shard) -> np.ndarray:
    """(n_spans,) bool, False at deleted rows."""
    mask = np.ones(shard.n_spans, dtype=bool)
    for first, last in shard.tombstones:
        mask[first:last] = False
    return mask


def shard_documents(folder: Path, shard: Shard) -> dict[str, range]:
    """The rows of every document of a shard, by id."""
    ids, spans = [], []
    for batch in read_batches(folder, shard, ["document_id", "span"]):
        spans.append(batch["span"].to_numpy())
        ids += batch["document_id"].to_pylist()
    starts = np.flatnonzero(np.concatenate(spans) == 0).tolist() if spans else []
    return {ids[first]: range(first, last) for first, last in zip(starts, [*starts[1:], len(ids)], strict=True)}


def remove_strangers(folder: Path, manifest: Manifest) -> None:
    """Remove shards and states that corpus.json does not name: what killed writers left behind."""
    named = {shard.file for shard in manifest.shards} | {f"codec/{key}.safetensors" for key in manifest.codec_states}
    for path in [*folder.glob(".*"), *(folder / DATA_FOLDER).iterdir(), *(folder / "codec").glob("*")]:
        is_ours = OURS.fullmatch(path.relative_to(folder).as_posix())
        if is_ours and path.relative_to(folder).as_posix() not in named and path.is_file():
            path.unlink(missing_ok=True)

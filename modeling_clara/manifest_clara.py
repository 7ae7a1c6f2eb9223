"""Reads and checks corpus.json and the Parquet shards that it names.

Whatever corpus.json does not name is not part of the corpus.
"""

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file

from .codecs_clara import Codec, check_codec
from .storage_clara import file_sha256, read_json

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:  # `require_arrow` names the remedy
    pa = pq = None

MANIFEST_FILE = "corpus.json"
FORMAT_VERSION = 1
BUILD_FOLDER = "build"  # progress of a build that is not finished
SHARD_PATTERN = re.compile(r"data/[A-Za-z0-9._-]+\.parquet")
STATE_PATTERN = re.compile(r"[0-9a-f]{12}")
DATA_FOLDER = "data"
ROWS_PER_GROUP = 1024
RESERVED_COLUMNS = ("id", "document_id", "span", "title", "text", "n_tokens", "memory")


@dataclass
class Shard:
    """One Parquet file.

    Attributes:
        file: path inside the corpus.
        sha256: of its bytes, in hex.
        n_bytes, n_spans, n_documents: its size; spans are chunks, and what is deleted counts too.
        codec_state: key of the state that its memories were encoded with; "" for float16.
        n_deleted: deleted documents.
        tombstones: rows of deleted documents as (first, last + 1) pairs, ascending, disjoint.
    """

    file: str
    sha256: str
    n_bytes: int
    n_spans: int
    n_documents: int
    codec_state: str = ""
    n_deleted: int = 0
    tombstones: list[list[int]] = field(default_factory=list)

    def check(self) -> None:
        """Raise a ValueError if a field cannot be right."""
        if not isinstance(self.file, str) or not SHARD_PATTERN.fullmatch(self.file):
            raise ValueError(f"a shard is called {self.file!r}")
        _check_types(self, self.file)
        if not 0 <= self.n_deleted <= self.n_documents <= self.n_spans:
            raise ValueError(f"{self.file} counts {self.n_deleted}, {self.n_documents} and {self.n_spans}")
        previous = 0
        for pair in self.tombstones:
            is_pair = type(pair) is list and [type(row) for row in pair] == [int, int]
            if not is_pair or not previous <= pair[0] < pair[1] <= self.n_spans:
                raise ValueError(f"{self.file} has the tombstone {pair}")
            previous = pair[1]


@dataclass
class Manifest:
    """The fields of corpus.json.

    Attributes:
        compressor: `fingerprint`, `name_or_path` and `revision` of the model that made the memories.
        hidden_size, memory_size: H and n of a memory; `memory_sizes` are the k that may be compared and read.
        retrieval_memory_size: k that is compared by default.
        document_max_length, document_overlap: of the chunks, in tokens.
        codec: one of `codecs_clara.CODECS`.
        codec_states: SHA-256 of the file of every state, by its key: `codec/KEY.safetensors`.
        source: `name`, `license` and `language` of the text.
        metadata: Arrow type of every metadata column; `metadata_schema` the same for programs, as Arrow serialises it.
        generation: number of changes.
        n_documents, n_spans: without deleted ones; spans are chunks.
        n_rejected: rows that rejected.jsonl lists.
        build: options and input of the build, to tell whether another call means the same.
        measured: what the codec costs, see `recipes/benchmarks/corpus.py`.
        shards: in the order of the documents.
    """

    compressor: dict
    hidden_size: int
    memory_size: int
    memory_sizes: list[int]
    retrieval_memory_size: int
    document_max_length: int
    document_overlap: int
    codec: str
    codec_states: dict[str, str] = field(default_factory=dict)
    source: dict = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    metadata_schema: str = ""
    generation: int = 0
    n_documents: int = 0
    n_spans: int = 0
    n_rejected: int = 0
    build: dict = field(default_factory=dict)
    measured: dict = field(default_factory=dict)
    shards: list[Shard] = field(default_factory=list)
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """Of the compressor that made the memories."""
        return self.compressor["fingerprint"]

    @property
    def has_tombstones(self) -> bool:
        return any(shard.tombstones for shard in self.shards)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a corpus folder.

        A FileNotFoundError if there is none or the build is not finished, a ValueError if it is damaged or newer.
        """
        path = Path(folder) / MANIFEST_FILE
        try:
            content = read_json(path)
        except FileNotFoundError:
            if (path.parent / BUILD_FOLDER).is_dir():
                raise FileNotFoundError(
                    f"the build of the corpus in {folder} must be finished first. Run the same build again: it goes "
                    "on where it stopped."
                ) from None
            raise FileNotFoundError(
                f"`{MANIFEST_FILE}` must be in {folder}, found none. Name the folder or the Hub id of a compressed "
                "corpus, or build one with `clara compress`."
            ) from None
        except (ValueError, RecursionError) as error:
            raise _damaged(folder, str(error)) from error
        version = content.get("format_version") if isinstance(content, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ValueError(
                f"`format_version` of {path} must be <= {FORMAT_VERSION}, got {version}. It was made by a newer "
                "release: upgrade clara-rag."
            )
        if version != FORMAT_VERSION:
            raise _damaged(folder, f"its format_version is {version!r}")
        names = {declared.name for declared in fields(cls)}
        if missing := names - set(content):
            raise _damaged(folder, f"it lacks {sorted(missing)}")
        try:
            shards = [Shard(**shard) for shard in content["shards"]]
            manifest = cls(**{name: content[name] for name in names} | {"shards": shards})
            manifest.check()
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise _damaged(folder, str(error)) from error
        return manifest

    def check(self) -> None:
        """Raise a ValueError if a field cannot be right; file names come from strangers."""
        _check_types(self, "corpus.json")
        if not isinstance(self.compressor.get("fingerprint"), str):
            raise ValueError("compressor.fingerprint is no text")
        for name in ("hidden_size", "memory_size", "retrieval_memory_size", "document_max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}")
        check_codec(self.codec)
        base64.b64decode(self.metadata_schema, validate=True)
        if not all(isinstance(kind, str) for kind in self.metadata.values()):
            raise ValueError(f"metadata is {self.metadata}")
        sizes = self.memory_sizes
        if any(type(k) is not int or not 1 <= k <= self.memory_size for k in sizes):
            raise ValueError(f"memory_sizes is {sizes}")
        if self.memory_size not in sizes or self.retrieval_memory_size not in sizes:
            raise ValueError(f"memory_sizes {sizes} lack memory_size or retrieval_memory_size")
        for key, sha256 in self.codec_states.items():
            if not STATE_PATTERN.fullmatch(key) or not isinstance(sha256, str):
                raise ValueError(f"codec_states has the key {key!r}")
        states = {""} if self.codec == "float16" else set(self.codec_states)
        for shard in self.shards:
            shard.check()
            if shard.codec_state not in states:
                raise ValueError(f"{shard.file} names the unknown codec state {shard.codec_state!r}")
        if len({shard.file for shard in self.shards}) != len(self.shards):
            raise ValueError("a shard is named twice")


def _check_types(entry, name: str) -> None:
    """Raise a ValueError unless every field of a dataclass is of the type that it declares."""
    for declared in fields(entry):
        value, kind = getattr(entry, declared.name), declared.type
        kind = getattr(kind, "__origin__", kind)
        if type(value) is not kind or (kind is int and value < 0):
            raise ValueError(f"{declared.name} of {name} is {value!r}")


def _damaged(folder, reason: str) -> ValueError:
    return ValueError(
        f"`{MANIFEST_FILE}` of {folder} is damaged: {reason}. Copy or download it again, or build the corpus again."
    )


def load_codecs(folder: Path, manifest: Manifest) -> dict[str, Codec]:
    """The codec with every state that the shards name, by key; with the key "" if there is no state.

    A FileNotFoundError or ValueError if a state's file is missing or damaged.
    """
    shape = (manifest.codec, manifest.memory_size, manifest.hidden_size)
    codecs = {} if manifest.codec_states else {"": Codec(*shape)}
    for key, sha256 in manifest.codec_states.items():
        path = Path(folder) / state_file(key)
        if not path.is_file():
            raise FileNotFoundError(f"the codec's state {path} must be there, but is missing. Copy it again.")
        if file_sha256(path) != sha256:
            raise ValueError(f"the codec's state {path} must have the checksum that corpus.json names. Copy it again.")
        try:
            codecs[key] = Codec(*shape, load_file(path))
        except SafetensorError as error:
            raise ValueError(f"the codec's state {path} is damaged: {error}. Copy it again.") from error
    return codecs


def state_file(key: str) -> str:
    """Where the state of a codec lies inside a corpus."""
    return f"codec/{key}.safetensors"


# --- shards ----------------------------------------------------------------------------------------------------------


def require_arrow() -> None:
    """Raise an ImportError that names the remedy if pyarrow is missing."""
    if pa is None:
        raise ImportError(
            "corpora need pyarrow: pip install pyarrow, or the extra `corpus` from a clone of the repository."
        )


def metadata_types(schema: "pa.Schema") -> "dict[str, pa.DataType]":
    """The columns that are neither ours nor reserved."""
    return {column.name: column.type for column in schema if column.name not in RESERVED_COLUMNS}


def memory_rows(column: "pa.Array", row_bytes: int, place: str) -> np.ndarray:
    """(rows, row_bytes) uint8 view of a memory column; a ValueError names a row that is missing or of another size."""
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
    """Raise a FileNotFoundError or ValueError unless a shard's file is, byte for byte, the one that was written."""
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
    """The rows of a shard in batches of at most `ROWS_PER_GROUP`; a ValueError if they cannot be read."""
    path = Path(folder) / shard.file
    try:
        with pq.ParquetFile(path) as file:
            missing = set(columns or RESERVED_COLUMNS) - set(file.schema_arrow.names)
            if missing:
                raise ValueError(f"it lacks the columns {sorted(missing)} that corpus.json describes")
            if file.metadata.num_rows != shard.n_spans:
                raise ValueError(f"it has {file.metadata.num_rows} rows instead of {shard.n_spans}")
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

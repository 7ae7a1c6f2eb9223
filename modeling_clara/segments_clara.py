"""Segments: what is derived from shards on first open, so that single rows can be read without reading a shard.

Stands between the Parquet shards and the corpus. A segment holds the rows of one or several shards: memories as raw
bytes and all other columns as an Arrow file, both memory-mapped, and a sorted table of document ids. Segments are
never changed, only replaced; every byte of them can be made again. It knows nothing of codecs, cosines or models.
"""

import bisect
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .manifest_clara import Shard
from .shards_clara import check_shard, memory_rows, metadata_types, pa, read_batches
from .storage_clara import write_json

SEGMENT_FILE = "segment.json"
ROWS_FILE = "rows.bin"
TABLE_FILE = "table.arrow"
IDS_FILE = "ids.npy"
RELEASE_BYTES = 32 * 2**20  # mapped bytes that are touched before they are given back


class Segment:
    """The rows of consecutive shards.

    Args:
        folder: that `derive_segment` wrote.

    Raises:
        OSError, ValueError, KeyError: it is not complete.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        description = json.loads((self.folder / SEGMENT_FILE).read_text(encoding="utf-8"))
        self.shards: list[dict] = description["shards"]
        self.row_bytes: int = description["row_bytes"]
        self.codec_states: list[str] = [state for state, _ in description["codec_states"]]
        starts = [n_rows for _, n_rows in description["codec_states"]]
        self.state_starts = np.cumsum([0, *starts])  # the rows at which a codec state begins
        with pa.memory_map(str(self.folder / TABLE_FILE)) as source:
            self.table = pa.ipc.open_file(source).read_all()
        self.n_rows = len(self.table)
        self.spans = self.table["span"].to_numpy()
        self.chunk_starts = np.cumsum([0, *(len(chunk) for chunk in self.table["span"].chunks)]).tolist()
        self.ids = np.load(self.folder / IDS_FILE, mmap_mode="r")
        path = self.folder / ROWS_FILE
        if path.stat().st_size != self.n_rows * self.row_bytes:
            raise ValueError(f"{path} must have {self.n_rows * self.row_bytes} bytes")
        self._map = None
        if self.n_rows:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(self._map, "madvise"):
                self._map.madvise(mmap.MADV_RANDOM)
        data = np.frombuffer(self._map or b"", np.uint8)
        self.rows = data.reshape(self.n_rows, self.row_bytes)
        self._touched = 0

    @property
    def key(self) -> str:
        """Name of the folder."""
        return self.folder.name

    def gather(self, rows: np.ndarray, n_bytes: int) -> np.ndarray:
        """(len(rows), n_bytes) uint8: the beginning of the memories of these rows."""
        gathered = self.rows[:, :n_bytes][rows]
        self._release(len(rows) * max(n_bytes, 64 * 2**10))  # the system maps 64 KiB around a page that it has
        return gathered

    def _release(self, n_bytes: int) -> None:
        """Give mapped pages back now and then: they stay in the page cache, but are not this process's memory."""
        self._touched += n_bytes
        if self._touched > RELEASE_BYTES and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0

    def record(self, row: int, columns: Sequence[str]) -> dict:
        """Values of one row."""
        chunk = bisect.bisect_right(self.chunk_starts, row) - 1
        place = row - self.chunk_starts[chunk]
        return {name: self.table[name].chunk(chunk)[place].as_py() for name in columns}

    def find(self, document_id: str) -> list[int]:
        """First rows of documents with this id, deleted ones included."""
        key = id_hash(document_id)
        first = np.searchsorted(self.ids["hash"], key, side="left")
        last = np.searchsorted(self.ids["hash"], key, side="right")
        rows = [int(row) for row in self.ids["row"][first:last]]
        return sorted(row for row in rows if self.record(row, ["document_id"])["document_id"] == document_id)

    def n_spans(self, first_row: int) -> int:
        """Spans of the document that begins at this row."""
        following = self.spans[first_row + 1 : first_row + 1 + 1024]
        starts = np.flatnonzero(following == 0)
        if len(starts):
            return int(starts[0]) + 1
        rest = np.flatnonzero(self.spans[first_row + 1 :] == 0)
        return int(rest[0]) + 1 if len(rest) else self.n_rows - first_row


def id_hash(document_id: str) -> np.uint64:
    """64 bits of a document id, to sort by."""
    digest = hashlib.blake2b(document_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def id_table(table: "pa.Table") -> np.ndarray:
    """(documents,) of (hash, row): the id of every document and its first row, sorted."""
    starts = np.flatnonzero(table["span"].to_numpy() == 0)
    ids = np.empty(len(starts), dtype=[("hash", np.uint64), ("row", np.int64)])
    ids["row"] = starts
    names = table["document_id"].take(starts) if len(starts) else []
    ids["hash"] = [id_hash(name.as_py()) for name in names]
    return ids[np.lexsort((ids["row"], ids["hash"]))]


def segment_key(shards: Sequence[Shard]) -> str:
    """The folder name of a segment of these shards."""
    return hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()[:16]


def derive_segment(corpus: Path, shards: Sequence[Shard], row_bytes: int, target: Path, progress=None) -> Segment:
    """Check the shards of a segment and write its files, batch by batch.

    Args:
        corpus: folder of the corpus.
        shards: consecutive, in order.
        row_bytes: of the codec.
        target: folder of all segments.
        progress: called with the number of rows after every batch.

    Raises:
        FileNotFoundError, ValueError: a shard is missing, damaged or does not fit, naming it.
    """
    folder = target / segment_key(shards)
    partial = target / f".{folder.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    writer = schema = None
    try:
        with open(partial / ROWS_FILE, "wb") as rows_file, pa.OSFile(str(partial / TABLE_FILE), "wb") as table_file:
            for shard in shards:
                check_shard(corpus, shard)
                for batch in read_batches(corpus, shard):
                    place = f"the shard {shard.file}"
                    rows_file.write(memory_rows(batch["memory"], row_bytes, place).data)
                    missing = set() if schema is None else set(schema.names) - set(batch.schema.names)
                    if missing:
                        raise ValueError(f"{place} lacks the columns {sorted(missing)}. Copy or download it again.")
                    if writer is None:
                        columns = ["document_id", "span", "title", "text", "n_tokens", *metadata_types(batch.schema)]
                        schema = pa.schema([batch.schema.field(name) for name in columns])
                        writer = pa.ipc.new_file(table_file, schema)
                    writer.write_batch(batch.select(schema.names).cast(schema))
                    if progress is not None:
                        progress(len(batch))
            if writer is not None:
                writer.close()
        with pa.memory_map(str(partial / TABLE_FILE)) as source:
            np.save(partial / IDS_FILE, id_table(pa.ipc.open_file(source).read_all()))
        states = []
        for shard in shards:
            if states and states[-1][0] == shard.codec_state:
                states[-1][1] += shard.n_spans
            else:
                states.append([shard.codec_state, shard.n_spans])
        description = {
            "shards": [shard_stamp(corpus, shard) for shard in shards],
            "row_bytes": row_bytes,
            "codec_states": states,
        }
        write_json(partial / SEGMENT_FILE, description)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Segment(folder)


def shard_stamp(corpus: Path, shard: Shard) -> dict:
    """What tells that a shard has not been touched since it was checked."""
    status = (Path(corpus) / shard.file).stat()
    return {"file": shard.file, "sha256": shard.sha256, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def has_changed(corpus: Path, stamp: dict) -> bool:
    """Whether a shard's file is another one than when its segment was made."""
    try:
        status = (Path(corpus) / stamp["file"]).stat()
    except OSError:
        return True
    return (status.st_size, status.st_mtime_ns) != (stamp["size"], stamp["mtime_ns"])

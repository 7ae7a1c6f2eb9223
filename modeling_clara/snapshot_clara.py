"""Opens a corpus for reading: segments are derived from shards, and a snapshot shows any row of them decoded.

Segments are never changed, only replaced; every byte of them can be made again.
"""

import hashlib
import itertools
import logging
import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from .manifest_clara import (
    Manifest,
    Shard,
    check_shard,
    live_mask,
    load_codecs,
    memory_rows,
    metadata_types,
    pa,
    read_batches,
)
from .storage_clara import read_json, write_json

logger = logging.getLogger(__name__)

BLOCK_BYTES = 64 * 2**20  # of decoded memories at a time
# Segments after the first one, and their share of its rows, above which they are made one. A change of the corpus
# leaves more of them, because it must be quick.
WHEN_OPENED, WHEN_CHANGED = (8, 0.2), (64, 1.0)
SEGMENT_FILE = "segment.json"
ROWS_FILE = "rows.bin"
TABLE_FILE = "table.arrow"
IDS_FILE = "ids.npy"
RELEASE_BYTES = 32 * 2**20  # mapped bytes that are touched before they are given back


class Segment:
    """The rows of consecutive shards, in a folder that `derive_segment` wrote; its name is the `key`.

    An OSError, ValueError or KeyError if the folder is not complete.
    """

    def __init__(self, folder: Path):
        self.folder, self.key = Path(folder), folder.name
        description = read_json(self.folder / SEGMENT_FILE)
        self.shards: list[dict] = description["shards"]
        self.row_bytes: int = description["row_bytes"]
        self.codec_states: list[str] = [state for state, _ in description["codec_states"]]
        # the rows at which a codec state begins
        self.state_starts = np.cumsum([0, *(n_rows for _, n_rows in description["codec_states"])])
        with pa.memory_map(str(self.folder / TABLE_FILE)) as source:
            self.table = pa.ipc.open_file(source).read_all()
        self.n_rows = len(self.table)
        self.spans = self.table["span"].to_numpy()
        self.ids = np.load(self.folder / IDS_FILE, mmap_mode="r")
        path = self.folder / ROWS_FILE
        if path.stat().st_size != self.n_rows * self.row_bytes:
            raise ValueError(f"{path} must have {self.n_rows * self.row_bytes} bytes")
        self._map, self._touched = None, 0
        if self.n_rows:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(self._map, "madvise"):
                self._map.madvise(mmap.MADV_RANDOM)
        self.rows = np.frombuffer(self._map or b"", np.uint8).reshape(self.n_rows, self.row_bytes)

    def gather(self, rows: np.ndarray, n_bytes: int) -> np.ndarray:
        """(len(rows), n_bytes) uint8: the beginning of the memories of these rows."""
        gathered = self.rows[:, :n_bytes][rows]
        # Mapped pages are given back now and then: they stay in the page cache, but are not this process's memory.
        self._touched += len(rows) * max(n_bytes, 64 * 2**10)  # the system maps 64 KiB around a page that it has
        if self._touched > RELEASE_BYTES and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0
        return gathered

    def find(self, document_id: str) -> list[range]:
        """The rows of documents with this id, deleted ones included."""
        key, found = id_hash(document_id), []
        first, last = (np.searchsorted(self.ids["hash"], key, side) for side in ("left", "right"))
        for row in self.ids["row"][first:last].tolist():
            if self.table["document_id"][row].as_py() == document_id:
                end = row + 1
                while end < self.n_rows and self.spans[end]:
                    end += 1
                found.append(range(row, end))
        return found


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


def derive_segment(
    corpus: Path, shards: Sequence[Shard], row_bytes: int, target: Path, progress: Callable[[int], None]
) -> Segment:
    """Check consecutive shards of a corpus and write their segment into the folder of all segments, batch by batch.

    A FileNotFoundError or ValueError names a shard that is missing, damaged or does not fit.
    """
    folder = target / hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()[:16]
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
                    if writer is None:
                        columns = ["document_id", "span", "title", "text", "n_tokens", *metadata_types(batch.schema)]
                        schema = pa.schema([batch.schema.field(name) for name in columns])
                        writer = pa.ipc.new_file(table_file, schema)
                    if missing := set(schema.names) - set(batch.schema.names):
                        raise ValueError(f"{place} lacks the columns {sorted(missing)}. Copy or download it again.")
                    writer.write_batch(batch.select(schema.names).cast(schema))
                    progress(len(batch))
            if writer is not None:
                writer.close()
        with pa.memory_map(str(partial / TABLE_FILE)) as source:
            np.save(partial / IDS_FILE, id_table(pa.ipc.open_file(source).read_all()))
        states = itertools.groupby(shards, key=lambda shard: shard.codec_state)
        description = {
            "shards": [shard_stamp(corpus, shard.file, shard.sha256) for shard in shards],
            "row_bytes": row_bytes,
            "codec_states": [[state, sum(shard.n_spans for shard in group)] for state, group in states],
        }
        write_json(partial / SEGMENT_FILE, description)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Segment(folder)


def shard_stamp(corpus: Path, file: str, sha256: str) -> dict:
    """What tells that a shard has not been touched since it was checked."""
    status = (corpus / file).stat()
    return {"file": file, "sha256": sha256, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


class Snapshot:
    """What a corpus consisted of when corpus.json was read.

    The segments of `previous` may be used again; `limits` are of scattered segments, see `WHEN_OPENED`; `progress` is
    called with numbers of rows. A FileNotFoundError or ValueError names a file that is missing, damaged or unfit.
    """

    def __init__(
        self,
        folder: Path,
        index_folder: Path,
        manifest: Manifest,
        *,
        previous: "Snapshot | None",
        limits: tuple[int, float],
        progress: Callable[[int], None],
    ):
        self.folder, self.index_folder, self.manifest = folder, index_folder, manifest
        self.codecs = load_codecs(folder, manifest)
        self.codec = next(iter(self.codecs.values()))
        opened = {segment.key: segment for segment in previous.segments} if previous else {}
        self.segments = open_segments(folder, index_folder, manifest, self.codec.row_bytes, opened, limits, progress)
        self.starts = np.cumsum([0, *(segment.n_rows for segment in self.segments)])
        self.n_rows = int(self.starts[-1])
        self.live = np.concatenate([np.zeros(0, dtype=bool), *map(live_mask, manifest.shards)])
        self.n_live = int(self.live.sum())
        self.spans = np.concatenate([np.zeros(0, dtype=np.int32), *(segment.spans for segment in self.segments)])

    # --- memories ----------------------------------------------------------------------------------------------------

    def decode(self, rows: np.ndarray, memory_size: int) -> torch.Tensor:
        """(rows, k, H) float32 memories of these rows of the snapshot."""
        n_bytes = memory_size * self.codec.vector_bytes
        codes = np.empty((len(rows), n_bytes), np.uint8)
        state = np.empty(len(rows), dtype=object) if len(self.codecs) > 1 else None
        owner = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(owner):
            mine, segment = owner == number, self.segments[number]
            local = rows[mine] - self.starts[number]
            codes[mine] = segment.gather(local, n_bytes)
            if state is not None:
                places = np.searchsorted(segment.state_starts, local, side="right") - 1
                state[mine] = np.array(segment.codec_states, dtype=object)[places]
        if state is None:
            return self.codec.decode(codes, memory_size)
        memory = torch.empty(len(rows), memory_size, self.codec.hidden_size)
        for key in set(state.tolist()):
            mine = torch.from_numpy(np.flatnonzero(state == key))
            memory[mine] = self.codecs[key].decode(codes[mine.numpy()], memory_size)
        return memory

    def blocks(self, memory_size: int, segments: Sequence[int] | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, (rows, k, H) float32) over all rows of these segments (default: all), in order."""
        size = max(1, BLOCK_BYTES // (4 * memory_size * self.codec.hidden_size))
        for number in range(len(self.segments)) if segments is None else segments:
            for first in range(int(self.starts[number]), int(self.starts[number + 1]), size):
                rows = np.arange(first, min(first + size, int(self.starts[number + 1])))
                yield first, self.decode(rows, memory_size)

    # --- rows and documents ------------------------------------------------------------------------------------------

    def locate(self, row: int) -> tuple[Segment, int]:
        """The segment of a row, and its place in it."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.segments[number], int(row - self.starts[number])

    def record(self, row: int, columns: Sequence[str]) -> dict:
        """Values of one row."""
        segment, place = self.locate(row)
        return {name: segment.table[name][place].as_py() for name in columns}

    def find(self, document_id: str) -> range | None:
        """The rows of a document, or None if there is none or it was deleted."""
        for segment, start in zip(self.segments, self.starts.tolist(), strict=False):
            for rows in segment.find(document_id):
                if self.live[start + rows.start]:
                    return range(start + rows.start, start + rows.stop)
        return None

    def first_row(self, row: int) -> int:
        """The first row of the document that a row belongs to."""
        return row - int(self.spans[row])


def open_segments(
    folder: Path,
    index_folder: Path,
    manifest: Manifest,
    row_bytes: int,
    opened: dict[str, Segment],
    limits: tuple[int, float],
    progress: Callable[[int], None],
) -> list[Segment]:
    """Segments that cover the shards in order: those that are there, the others derived now."""
    target, shards = index_folder / "segments", manifest.shards
    segments = _cover(shards, _known_segments(folder, target, opened))
    if all(isinstance(part, Segment) for part in segments) and not _is_scattered(segments, limits):
        return segments
    target.mkdir(parents=True, exist_ok=True)
    with FileLock(index_folder / "lock"):  # a second process waits here and then finds the segments
        segments = [
            part if isinstance(part, Segment) else derive_segment(folder, part, row_bytes, target, progress)
            for part in _cover(shards, _known_segments(folder, target, opened))
        ]
        if _is_scattered(segments, limits):  # one segment of everything if the tail is large, else one of the tail
            kept = [] if _tail_share(segments) > WHEN_OPENED[1] else segments[:1]
            tail = shards[sum(len(segment.shards) for segment in kept) :]
            segments = [*kept, derive_segment(folder, tail, row_bytes, target, progress)]
        keys = {segment.key for segment in segments}
        for path in target.iterdir():
            if path.name not in keys:  # nothing needs it; whoever has it open keeps it
                shutil.rmtree(path, ignore_errors=True)
    return segments


def _known_segments(folder: Path, target: Path, opened: dict[str, Segment]) -> dict[str, list[Segment]]:
    """The segments that are there and whole, by the checksum of their first shard, long ones first."""
    known = {}
    for path in target.glob("[0-9a-f]*"):
        try:
            segment = opened.get(path.name) or Segment(path)
            stamps = [shard_stamp(folder, shard["file"], shard["sha256"]) for shard in segment.shards]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            logger.debug("the segment %s is derived again: %s", path, error)
            continue
        if stamps and stamps == segment.shards:
            known.setdefault(stamps[0]["sha256"], []).append(segment)
    return {first: sorted(found, key=lambda s: len(s.shards), reverse=True) for first, found in known.items()}


def _cover(shards: list[Shard], known: dict[str, list[Segment]]) -> list[Segment | list[Shard]]:
    """The longest known segments that follow each other, and lists of the shards between them."""
    parts, position = [], 0
    checksums = [shard.sha256 for shard in shards]
    while position < len(shards):
        for segment in known.get(checksums[position], ()):
            following = checksums[position : position + len(segment.shards)]
            if [stamp["sha256"] for stamp in segment.shards] == following:
                parts.append(segment)
                position += len(segment.shards)
                break
        else:
            if not parts or isinstance(parts[-1], Segment):
                parts.append([])
            parts[-1].append(shards[position])
            position += 1
    return parts


def _is_scattered(segments: list[Segment], limits: tuple[int, float]) -> bool:
    return len(segments) - 1 > limits[0] or _tail_share(segments) > limits[1]


def _tail_share(segments: list[Segment]) -> float:
    return sum(segment.n_rows for segment in segments[1:]) / max(1, segments[0].n_rows) if segments else 0.0

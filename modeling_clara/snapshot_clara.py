"""A snapshot of a corpus: its segments in the order of corpus.json, opened or derived, and any row of them decoded.

Stands between segments and search. A snapshot does not change; after a change of the corpus a new one is made, which
shares the segments that are still needed. It knows nothing of questions or ranking.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from .codecs_clara import Codec
from .manifest_clara import Manifest, Shard
from .segments_clara import Segment, derive_segment, has_changed
from .shards_clara import live_mask
from .storage_clara import file_sha256, replacing

logger = logging.getLogger(__name__)

BLOCK_BYTES = 64 * 2**20  # of decoded memories at a time
# Segments behind the first one, and their share of its rows, above which they are made one. A change of the corpus
# leaves more of them, because it must be quick.
WHEN_OPENED, WHEN_CHANGED = (8, 0.2), (64, 1.0)


class Snapshot:
    """What a corpus consisted of when corpus.json was read.

    Args:
        folder: of the corpus.
        index_folder: for derived files.
        manifest: as read.
        previous: a snapshot whose segments may be used again.
        limits: of scattered segments, see `WHEN_OPENED`.
        progress: called with a number of rows while segments are derived.

    Raises:
        FileNotFoundError, ValueError: a file of the corpus is missing, damaged or does not fit.
    """

    def __init__(
        self,
        folder: Path,
        index_folder: Path,
        manifest: Manifest,
        *,
        previous: "Snapshot | None" = None,
        limits: tuple[int, float] = WHEN_OPENED,
        progress: Callable[[int], None] | None = None,
    ):
        self.folder, self.index_folder, self.manifest = folder, index_folder, manifest
        self.codecs = load_codecs(folder, manifest)
        self.codec = next(iter(self.codecs.values()))
        opened = {segment.key: segment for segment in previous.segments} if previous else {}
        self.segments = open_segments(folder, index_folder, manifest, self.codec.row_bytes, opened, limits, progress)
        self.starts = np.cumsum([0, *(segment.n_rows for segment in self.segments)])
        self.n_rows = int(self.starts[-1])
        masks = [live_mask(shard) for shard in manifest.shards]
        self.live = np.concatenate(masks) if masks else np.zeros(0, dtype=bool)
        self.n_live = int(self.live.sum())
        spans = [segment.spans for segment in self.segments]
        self.spans = np.concatenate(spans) if spans else np.zeros(0, dtype=np.int32)

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
        return segment.record(place, columns)

    def find(self, document_id: str) -> range | None:
        """The rows of a document, or None where there is none or it was deleted."""
        for segment, start in zip(self.segments, self.starts, strict=False):
            for row in segment.find(document_id):
                if self.live[start + row]:
                    first = int(start + row)
                    return range(first, first + segment.n_spans(row))
        return None

    def shard_rows(self, rows: range) -> tuple[int, range]:
        """The number of the shard that holds a document, and the document's rows in it."""
        ends = np.cumsum([shard.n_spans for shard in self.manifest.shards])
        number = int(np.searchsorted(ends, rows.start, side="right"))
        offset = int(ends[number]) - self.manifest.shards[number].n_spans
        return number, range(rows.start - offset, rows.stop - offset)


def load_codecs(folder: Path, manifest: Manifest) -> dict[str, Codec]:
    """The codec with every state that the shards name, by key; with the key "" where there is no state.

    Raises:
        FileNotFoundError, ValueError: a state's file is missing or damaged.
    """
    shape = (manifest.codec, manifest.memory_size, manifest.hidden_size)
    if not manifest.codec_states:
        return {"": Codec(*shape)}
    codecs = {}
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


def write_state(folder: Path, codec: Codec) -> dict[str, str]:
    """Write the state of a codec; `{key: SHA-256 of the file}`, empty where it has none."""
    if not codec.state:
        return {}
    path = Path(folder) / state_file(codec.key)
    with replacing(path) as partial:
        partial.write_bytes(save(codec.state))  # not `save_file`, whose error on a full disk is no OSError
    return {codec.key: file_sha256(path)}


def state_file(key: str) -> str:
    """Where the state of a codec lies inside a corpus."""
    return f"codec/{key}.safetensors"


def open_segments(
    folder: Path,
    index_folder: Path,
    manifest: Manifest,
    row_bytes: int,
    opened: dict[str, Segment],
    limits: tuple[int, float],
    progress: Callable[[int], None] | None,
) -> list[Segment]:
    """Segments that cover the shards in order: those that are there, the others derived now."""
    target = index_folder / "segments"
    segments = _covering(folder, target, manifest.shards, opened)
    if segments is None or _is_scattered(segments, limits):
        target.mkdir(parents=True, exist_ok=True)
        with FileLock(index_folder / "lock"):  # a second process waits here and then finds the segments
            segments = _covering(folder, target, manifest.shards, opened, derive=(row_bytes, progress))
            if _is_scattered(segments, limits):
                segments = _joined(folder, target, manifest.shards, segments, row_bytes, progress)
            _remove_others(target, {segment.key for segment in segments})
    return segments


def _covering(folder: Path, target: Path, shards: list[Shard], opened: dict[str, Segment], derive=None):
    """Segments in the order of the shards; None where one is missing and `derive` is not given."""
    known = {}
    for path in target.glob("[0-9a-f]*"):
        try:
            segment = opened.get(path.name) or Segment(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            logger.debug("the segment %s is derived again: %s", path, error)
            continue
        if segment.shards and not any(has_changed(folder, stamp) for stamp in segment.shards):
            known.setdefault(segment.shards[0]["sha256"], []).append(segment)
    segments, position, uncovered = [], 0, []
    while position <= len(shards):
        found = _longest(known, shards, position)
        if (found is not None or position == len(shards)) and uncovered:
            if derive is None:
                return None
            row_bytes, progress = derive
            segments.append(derive_segment(folder, uncovered, row_bytes, target, progress))
            uncovered = []
        if position == len(shards):
            break
        if found is None:
            uncovered.append(shards[position])
            position += 1
        else:
            segments.append(found)
            position += len(found.shards)
    return segments


def _longest(known: dict[str, list[Segment]], shards: list[Shard], position: int) -> Segment | None:
    """The longest known segment of the shards that follow."""
    if position == len(shards):
        return None
    fitting = [
        segment
        for segment in known.get(shards[position].sha256, [])
        if [stamp["sha256"] for stamp in segment.shards]
        == [shard.sha256 for shard in shards[position : position + len(segment.shards)]]
    ]
    return max(fitting, key=lambda segment: len(segment.shards), default=None)


def _is_scattered(segments: list[Segment], limits: tuple[int, float]) -> bool:
    return len(segments) - 1 > limits[0] or _tail_share(segments) > limits[1]


def _tail_share(segments: list[Segment]) -> float:
    return sum(segment.n_rows for segment in segments[1:]) / max(1, segments[0].n_rows) if segments else 0.0


def _joined(folder, target, shards, segments, row_bytes, progress) -> list[Segment]:
    """One segment of everything where the tail is large, else one of the tail."""
    keep = [] if _tail_share(segments) > WHEN_OPENED[1] else segments[:1]
    n_kept = sum(len(segment.shards) for segment in keep)
    return [*keep, derive_segment(folder, shards[n_kept:], row_bytes, target, progress)]


def _remove_others(target: Path, keys: set[str]) -> None:
    """Remove segments that nothing needs; who has one open keeps it."""
    for path in target.iterdir():
        if path.name not in keys:
            shutil.rmtree(path, ignore_errors=True)

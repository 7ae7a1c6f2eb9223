"""The set of ids that tells documents given twice, small enough for tens of millions of them.

Two ids with the same hash are told apart by reading the shard of the first.
"""

from collections.abc import Callable, Iterable

import numpy as np

from ..snapshot_clara import id_hash


class SeenIds:
    """The ids of documents, in 16 bytes each once their shard is written: 64 bits of a hash, and the shard's number.

    If a hash is there already, the ids of that shard are read. Ids whose shard is not written yet are held as text.

    Args:
        read_ids: the ids of the shard with a number.
    """

    def __init__(self, read_ids: Callable[[int], Iterable[str]]):
        self.read_ids, self.pending = read_ids, set()
        self.recent: dict[int, list[int]] = {}  # hash -> numbers of shards, not in the arrays yet
        self.hashes, self.shards = np.empty(0, np.uint64), np.empty(0, np.uint32)

    def add(self, text: str) -> bool:
        """Add an id; whether it is new."""
        if text in self.pending or any(text in self.read_ids(shard) for shard in self._shards_of(id_hash(text))):
            return False
        self.pending.add(text)
        return True

    def remove(self, text: str) -> None:
        """Take an id out again whose shard is not written."""
        self.pending.discard(text)

    def settle(self, shard: int, ids: Iterable[str]) -> None:
        """Note that a shard with these ids, all of them added, can be read from now on."""
        for text in ids:
            self.pending.discard(text)
            self.recent.setdefault(int(id_hash(text)), []).append(shard)
        if len(self.recent) > max(2**16, len(self.hashes) // 16):
            pairs = [(hashed, number) for hashed, numbers in self.recent.items() for number in numbers]
            hashes, shards = np.array(pairs, np.uint64).T
            hashes, shards = np.append(self.hashes, hashes), np.append(self.shards, shards.astype(np.uint32))
            order = np.argsort(hashes, kind="stable")
            self.hashes, self.shards, self.recent = hashes[order], shards[order], {}

    def _shards_of(self, hashed: np.uint64) -> list[int]:
        first, last = (self.hashes.searchsorted(hashed, side) for side in ("left", "right"))
        return [*self.recent.get(int(hashed), ()), *self.shards[first:last].tolist()]

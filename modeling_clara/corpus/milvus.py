"""Gets the shortlist of a search from Milvus: Milvus Lite in a file, or a server by URI.

Milvus holds the projected vectors and what filters compare. The memories stay in the corpus, where the exact cosine
ranks the shortlist.
"""

import functools
import hashlib
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping

import numpy as np
import torch
from safetensors.torch import load_file, save

from ..index_clara import fit_components, project_memory
from ..manifest_clara import Shard
from ..search_clara import JUNCTIONS, conditions
from ..snapshot_clara import Snapshot
from ..storage_clara import replacing

INSERT_ROWS = 1000
MAX_LIMIT = 16_384  # rows that Milvus returns at most
TITLE_LENGTH = 1024
SIGNS = {"$eq": "==", "$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<=", "$in": "in"}
# Arrow types of columns that mean the same there; other columns are compared here
HELD_TYPES = (
    "bool",
    "double",
    "string",
    "large_string",
    "uint8",
    "uint16",
    "uint32",
    "int8",
    "int16",
    "int32",
    "int64",
)
EXACT = 2**53  # up to here Milvus compares whole numbers and floats exactly
IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MILVUS_WORDS = {"and", "or", "not", "in", "like", "true", "false", "is", "null", "exists"}


def import_pymilvus():
    """The module, imported here because it takes a second; an ImportError names the remedy."""
    try:
        import pymilvus
    except ImportError as error:
        raise ImportError(
            '`backend="milvus"` needs pymilvus: pip install pymilvus milvus-lite, or the extra `milvus` from a clone '
            "of the repository."
        ) from error
    return pymilvus


def index_maker(uri: str | None, collection: str | None) -> functools.partial:
    """What makes the index of `CompressedCorpus.open(backend="milvus")`."""
    return functools.partial(MilvusIndex, uri=uri, collection=collection)


class MilvusIndex:
    """Projected vectors of a snapshot in a Milvus collection, which is brought up to date on opening.

    Args:
        snapshot: whose rows are found.
        memory_size: k that is compared.
        uri: of a server, or a file of Milvus Lite; default a file in the index folder.
        collection: the beginning of its name; default from the corpus's folder. k and a digest follow.
        progress: called with a number of rows while they are inserted.
        previous: an index of an earlier snapshot, whose connection is used again.

    Raises:
        RuntimeError: Milvus cannot be reached, or another process has the file open.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        memory_size: int,
        uri: str | None = None,
        collection: str | None = None,
        *,
        progress: Callable[[int], None],
        previous: "MilvusIndex | None" = None,
    ):
        self.memory_size = memory_size
        self.components = self._components(snapshot)
        metadata = snapshot.manifest.metadata.items()
        self.columns = ["document_id", "title", "span", *(name for name, kind in metadata if kind in HELD_TYPES)]
        digest = hashlib.sha256(self.components.numpy().tobytes()).hexdigest()[:12]
        place = hashlib.sha256(str(snapshot.folder.resolve()).encode()).hexdigest()[:8]
        # The directions are part of the name: vectors of others could not be compared.
        self.collection = f"{collection or f'clara_{place}'}_k{memory_size}_{digest}"
        self.client = previous.client if previous else connect(uri or str(snapshot.index_folder / "milvus.db"))
        self._open_collection()
        shards = snapshot.manifest.shards
        ends = itertools.accumulate((shard.n_spans for shard in shards), initial=0)
        self.firsts = dict(zip(map(_shard_key, shards), ends, strict=False))  # the first row of every shard
        self._update(snapshot, progress)

    def _components(self, snapshot: Snapshot) -> torch.Tensor:
        """The main directions, fitted once: a collection can only be compared with the ones it was made with."""
        path = snapshot.index_folder / f"milvus-k{self.memory_size}.safetensors"
        if not path.exists():
            with replacing(path) as partial:
                partial.write_bytes(save({"components": fit_components(snapshot, self.memory_size)}))
        return load_file(path)["components"]

    def _open_collection(self) -> None:
        pymilvus = import_pymilvus()
        if not self.client.has_collection(self.collection):
            schema = self.client.create_schema(enable_dynamic_field=True)
            schema.add_field("clara_row", pymilvus.DataType.VARCHAR, is_primary=True, max_length=64)
            schema.add_field("clara_shard", pymilvus.DataType.VARCHAR, max_length=32)
            schema.add_field("clara_vector", pymilvus.DataType.FLOAT_VECTOR, dim=len(self.components))
            parameters = self.client.prepare_index_params()
            parameters.add_index("clara_vector", index_type="AUTOINDEX", metric_type="IP")
            self.client.create_collection(
                self.collection, schema=schema, index_params=parameters, consistency_level="Strong"
            )
        self.client.load_collection(self.collection)

    def _update(self, snapshot: Snapshot, progress: Callable[[int], None]) -> None:
        """Insert the shards that are missing, remove what is no longer live."""
        if self.firsts:
            listed = ", ".join(f'"{key}"' for key in self.firsts)
            self.client.delete(self.collection, filter=f"clara_shard not in [{listed}]")
        for shard, (key, start) in zip(snapshot.manifest.shards, self.firsts.items(), strict=True):
            live = snapshot.live[start : start + shard.n_spans]
            stored = self.client.query(self.collection, filter=f'clara_shard == "{key}"', output_fields=["count(*)"])
            n_stored = int(stored[0]["count(*)"])
            if n_stored == shard.n_spans > live.sum():
                dead = [f"{key}:{row}" for row in np.flatnonzero(~live)]
                for first in range(0, len(dead), INSERT_ROWS):
                    self.client.delete(self.collection, ids=dead[first : first + INSERT_ROWS])
            elif n_stored != live.sum():
                self.client.delete(self.collection, filter=f'clara_shard == "{key}"')
                places = np.flatnonzero(live)
                for first in range(0, len(places), INSERT_ROWS):
                    rows = self._rows(snapshot, key, places[first : first + INSERT_ROWS])
                    self.client.insert(self.collection, rows)
            progress(shard.n_spans)
        self.client.flush(self.collection)

    def _rows(self, snapshot: Snapshot, key: str, places: np.ndarray) -> list[dict]:
        """What Milvus stores of these rows of a shard."""
        rows = []
        numbers = places + self.firsts[key]
        vectors = self.project(snapshot.decode(numbers, self.memory_size))
        for place, number, vector in zip(places.tolist(), numbers.tolist(), vectors.tolist(), strict=True):
            record = {name: _held(value) for name, value in snapshot.record(number, self.columns).items()}
            record = {name: value for name, value in record.items() if value is not None}
            record["title"] = record["title"][:TITLE_LENGTH]
            rows.append({**record, "clara_row": f"{key}:{place}", "clara_shard": key, "clara_vector": vector})
        return rows

    def project(self, memory: torch.Tensor) -> np.ndarray:
        """(rows, d) float32 of (rows, k, H) memories or query memories."""
        return project_memory(memory, self.memory_size, self.components)

    def shortlist(
        self, query_memory: torch.Tensor, n: int, allowed: np.ndarray | None, where: Mapping | None = None
    ) -> np.ndarray:
        """As `VectorIndex.shortlist`; Milvus filters by itself if its rules on missing values are ours."""
        n = min(n, MAX_LIMIT)
        options = {
            "limit": n,
            "filter": milvus_expression(where or {}, self.columns) or "",
            "anns_field": "clara_vector",
        }
        found = self.client.search(self.collection, data=self.project(query_memory).tolist(), **options)
        rows = np.full((len(query_memory), n), -1, dtype=np.int64)
        for question, hits in enumerate(found):
            keys = [hit["clara_row"].rpartition(":") for hit in hits]
            mine = np.array([self.firsts[key] + int(place) for key, _, place in keys if key in self.firsts], np.int64)
            if allowed is not None:
                mine = mine[allowed[mine]]
            rows[question, : len(mine)] = mine
        return rows


def connect(uri: str):
    """A client of a server, or of a file of Milvus Lite; a RuntimeError if it cannot be reached or opened."""
    pymilvus, token = import_pymilvus(), os.environ.get("MILVUS_TOKEN", "")
    try:
        return pymilvus.MilvusClient(uri, token=token)
    except pymilvus.exceptions.MilvusException as error:
        raise RuntimeError(
            f"Milvus at {uri} must be reachable, and a file of Milvus Lite open in one process only: {error} Start "
            "the server, or close the other process."
        ) from error


def _shard_key(shard: Shard) -> str:
    return shard.sha256[:16]


# --- filters ---------------------------------------------------------------------------------------------------------


def milvus_expression(where: Mapping, columns: Collection[str] | None = None) -> str | None:
    """A checked filter in the language of Milvus; None if Milvus would not say the same.

    That is: a negation, about which missing values disagree, a column that is no identifier or not among `columns`,
    those that Milvus holds (default: any), an order of bools, a number that is not finite or too large to be exact, a
    date, and text with control characters or as long as a title that was cut.
    """
    parts = []
    for key, value in where.items():
        if key in JUNCTIONS:
            inner = [milvus_expression(part, columns) for part in value]
            if None in inner:
                return None
            parts.append((" and " if key == "$and" else " or ").join(f"({part})" for part in inner))
            continue
        is_name = IDENTIFIER.fullmatch(key) and key.lower() not in MILVUS_WORDS and not key.startswith("clara_")
        if not is_name or (columns is not None and key not in columns):
            return None
        for operator, operand in conditions(value):
            if operator not in SIGNS or not _is_plain(operand) or (isinstance(operand, bool) and operator != "$eq"):
                return None
            parts.append(f"{key} {SIGNS[operator]} {json.dumps(operand, ensure_ascii=False)}")
    return " and ".join(f"({part})" for part in parts)


def _is_plain(operand) -> bool:
    """Whether a value is written in Milvus as in JSON and means the same."""
    if isinstance(operand, list | tuple):
        return all(map(_is_plain, operand))
    if isinstance(operand, str):
        return operand.isprintable() and len(operand) < TITLE_LENGTH
    return isinstance(operand, int | float) and -EXACT <= operand <= EXACT


def _held(value):
    """A value as Milvus stores it: NaN, which no comparison meets, is missing there; infinity is the largest float."""
    if isinstance(value, float):
        return None if math.isnan(value) else max(-sys.float_info.max, min(value, sys.float_info.max))
    return value

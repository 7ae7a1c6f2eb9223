"""Stored memories that the contrastive and the joint stage read: compressed once, looked up by document, searched.

Stands between the frozen compressor and the trainer. Memories are float16 in RAM and on disk, in the published form of
a compressed corpus: Parquet shards under data/ and a corpus.json with the compressor's fingerprint. It knows nothing
of losses or records.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from data import document_key

from modeling_clara import CLaRaForRAG
from modeling_clara.retrieval_clara import flatten_memory

FORMAT_VERSION = 1
SHARD = "data/train-00000-of-00001.parquet"
CHUNK = 2048  # documents compressed between two looks at the progress bar


class MemoryStore:
    """Documents with their memories.

    Args:
        documents: `{title, text}`, each one span, no two alike.
        memory: (documents, n, hidden) float16.
        retrieval_memory_size: k that `search` compares.
    """

    def __init__(self, documents: Sequence[Mapping], memory: torch.Tensor, retrieval_memory_size: int):
        self.documents, self.memory = list(documents), memory
        self.retrieval_memory_size = retrieval_memory_size
        self.rows = {document_key(document): row for row, document in enumerate(self.documents)}
        self._vectors = None

    def __len__(self) -> int:
        return len(self.documents)

    @classmethod
    def compress(cls, model: CLaRaForRAG, documents: Sequence[Mapping], batch_size: int = 16) -> "MemoryStore":
        """Compress every document once, with the compressor merged."""
        memory = torch.empty(
            len(documents), model.config.max_memory_size, model.config.text_config.hidden_size, dtype=torch.float16
        )
        with model.bulk_compression():
            for start in range(0, len(documents), CHUNK):
                chunk = list(documents[start : start + CHUNK])
                memory[start : start + CHUNK] = model.compress(chunk, batch_size=batch_size).half().cpu()
        broken = (~memory.isfinite().flatten(1).all(-1)).nonzero()
        if len(broken):
            raise ValueError(
                f"the memory of {documents[int(broken[0])]['text'][:60]!r} must fit into float16, got a value beyond "
                "65,504. Train the compressor longer, or set `compress_online`."
            )
        return cls(documents, memory, model.config.retrieval_memory_size)

    def lookup(self, documents: Sequence[Mapping]) -> torch.Tensor:
        """(documents, n, hidden) float32 memories of these documents.

        Raises:
            KeyError: a document is not stored.
        """
        return self.memory[[self.rows[document_key(document)] for document in documents]].float()

    def search(self, query_memory: torch.Tensor, top_k: int) -> list[list[dict]]:
        """The best documents for each question by exact cosine over all of them (eq. 3.1).

        Args:
            query_memory: (questions, n, hidden), n >= `retrieval_memory_size`.
            top_k: documents per question.

        Returns:
            For each question dicts `{document_id, span, score, title, text, memory}`, best first; the memory is (n,
            hidden) float32.
        """
        if self._vectors is None or self._vectors.device != query_memory.device:
            vectors = flatten_memory(self.memory, self.retrieval_memory_size)
            self._vectors = vectors.to(query_memory.device)
        scores = flatten_memory(query_memory, self.retrieval_memory_size) @ self._vectors.T
        best = scores.topk(min(top_k, len(self)), dim=-1)
        hits = []
        for row_scores, rows in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            hits.append(
                [
                    {
                        "document_id": str(row),
                        "span": 0,
                        "score": score,
                        "title": self.documents[row]["title"],
                        "text": self.documents[row]["text"],
                        "memory": self.memory[row].float(),
                    }
                    for score, row in zip(row_scores, rows, strict=True)
                ]
            )
        return hits

    def save(self, folder: str | Path, fingerprint: str) -> None:
        """Write the folder; corpus.json, which makes it complete, comes last and at once."""
        folder = Path(folder)
        (folder / SHARD).parent.mkdir(parents=True, exist_ok=True)
        table = pa.table(
            {
                "id": [f"{row}#0" for row in range(len(self))],
                "document_id": [str(row) for row in range(len(self))],
                "span": pa.array([0] * len(self), pa.int32()),
                "title": [document["title"] for document in self.documents],
                "text": [document["text"] for document in self.documents],
                "memory": pa.array([memory.numpy().tobytes() for memory in self.memory], pa.large_binary()),
            }
        )
        partial = folder / f"{SHARD}.{os.getpid()}.partial"
        pq.write_table(table, partial)
        checksum = hashlib.sha256(partial.read_bytes()).hexdigest()
        partial.replace(folder / SHARD)
        description = {
            "format_version": FORMAT_VERSION,
            "compressor_fingerprint": fingerprint,
            "memory_size": self.memory.shape[1],
            "hidden_size": self.memory.shape[2],
            "retrieval_memory_size": self.retrieval_memory_size,
            "codec": "float16",
            "n_spans": len(self),
            "shards": {SHARD: checksum},
        }
        partial = folder / f"corpus.json.{os.getpid()}.partial"
        partial.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        partial.replace(folder / "corpus.json")

    @classmethod
    def open(cls, folder: str | Path, fingerprint: str, retrieval_memory_size: int | None = None) -> "MemoryStore":
        """Read a folder that `save` wrote.

        Args:
            folder: of stored memories.
            fingerprint: of the compressor that must have made them.
            retrieval_memory_size: k that `search` compares; default what was stored.

        Raises:
            FileNotFoundError: it is missing or not complete.
            ValueError: another compressor made it, it is of another format, or a shard is damaged.
        """
        folder = Path(folder)
        if not (folder / "corpus.json").exists():
            raise FileNotFoundError(f"`{folder}` must hold corpus.json, found none. Name a folder of stored memories.")
        try:
            description = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
            version = description.get("format_version")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{folder}/corpus.json is damaged: {error}. Build the memories again.") from error
        if version != FORMAT_VERSION:
            raise ValueError(
                f"`format_version` of {folder}/corpus.json must be {FORMAT_VERSION}, got {version}. Build the "
                "memories again."
            )
        missing = {
            "compressor_fingerprint",
            "memory_size",
            "hidden_size",
            "retrieval_memory_size",
            "shards",
        } - set(description)
        if missing:
            raise ValueError(f"{folder}/corpus.json is damaged: it lacks {sorted(missing)}. Build the memories again.")
        if description["compressor_fingerprint"] != fingerprint:
            raise ValueError(
                f"the memories in {folder} must be of this compressor ({fingerprint[:12]}), they are of "
                f"{description['compressor_fingerprint'][:12]}. Build them again with this checkpoint."
            )
        tables = []
        for shard, checksum in description["shards"].items():
            if not (folder / shard).exists():
                raise FileNotFoundError(f"`{folder / shard}` is missing. Build the memories again.")
            if hashlib.sha256((folder / shard).read_bytes()).hexdigest() != checksum:
                raise ValueError(f"`{folder / shard}` is damaged: its checksum is wrong. Build the memories again.")
            tables.append(pq.read_table(folder / shard))
        table = pa.concat_tables(tables)
        buffer = bytearray(b"".join(table["memory"].to_pylist()))
        shape = (-1, description["memory_size"], description["hidden_size"])
        memory = torch.frombuffer(buffer, dtype=torch.float16).view(shape)
        size = retrieval_memory_size or description["retrieval_memory_size"]
        return cls(table.select(["title", "text"]).to_pylist(), memory, size)


def open_or_compress(model: CLaRaForRAG, documents: Sequence[Mapping], folder: Path, batch_size: int) -> MemoryStore:
    """The stored memories of a run: opened where an earlier start has written them, else compressed and written."""
    fingerprint, size = model.fingerprint, model.config.retrieval_memory_size
    try:
        store = MemoryStore.open(folder, fingerprint, size)
        if all(document_key(document) in store.rows for document in documents):
            return store
    except (FileNotFoundError, ValueError):
        pass  # none yet, half written, or of an earlier compressor: made anew
    MemoryStore.compress(model, documents, batch_size).save(folder, fingerprint)
    return MemoryStore.open(folder, fingerprint, size)

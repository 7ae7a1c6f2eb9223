"""Memories that the contrastive and the joint stage read: a compressed corpus, looked up by a document's text.

Stands between the frozen compressor and the trainer. It knows nothing of losses or records.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from modeling_clara import CLaRaForRAG, CompressedCorpus
from recipes.training.data import document_key


class DocumentMemories:
    """A corpus whose documents are known by title and text, as the rows of training data name them.

    Memories stay memory-mapped; of every document that is one span its hash and its row are held.

    Args:
        corpus: open, with the model that trains.
    """

    def __init__(self, corpus: CompressedCorpus):
        self.corpus = corpus
        self.rows: dict[str, int] = {}
        for row in corpus.rows(["title", "text"]):
            self.rows.setdefault(document_key(row), row["row"])

    def __len__(self) -> int:
        return len(self.corpus)

    @property
    def memory_shape(self) -> tuple[int, int]:
        """(n, hidden) of a memory."""
        return self.corpus.manifest.memory_size, self.corpus.manifest.hidden_size

    def lookup(self, documents: Sequence[Mapping]) -> torch.Tensor:
        """(documents, n, hidden) float32 memories of these documents.

        Raises:
            KeyError: a document is not stored.
        """
        return self.corpus.decode([self.rows[document_key(document)] for document in documents])

    def search(self, query_memory: torch.Tensor, top_k: int) -> list[list[dict]]:
        """As `CompressedCorpus.search`."""
        return self.corpus.search(query_memory, top_k)


def compress_documents(
    model: CLaRaForRAG, documents: Sequence[Mapping], folder: Path, batch_size: int = 16
) -> DocumentMemories:
    """Build a float16 corpus of these documents, each one span; what is there already of the same build is kept.

    Raises:
        ValueError: a document has no usable memory.
    """
    corpus = CompressedCorpus.build(model, to_rows(documents), folder, codec="float16", batch_size=batch_size)
    return with_all(corpus, documents)


def to_rows(documents: Sequence[Mapping]) -> list[dict]:
    """Documents under the ids by which they are looked up."""
    return [{"id": document_key(document), **document} for document in documents]


def with_all(corpus: CompressedCorpus, documents: Sequence[Mapping]) -> DocumentMemories:
    """The memories of a corpus; a ValueError if a document has none."""
    memories = DocumentMemories(corpus)
    missing = [document for document in documents if document_key(document) not in memories.rows]
    if missing:
        raise ValueError(
            f"the memory of {missing[0]['text'][:60]!r} must fit into float16, see {corpus.folder}/rejected.jsonl. "
            "Train the compressor longer, or set `compress_online`."
        )
    return memories


def open_or_compress(
    model: CLaRaForRAG, documents: Sequence[Mapping], folder: Path, batch_size: int
) -> DocumentMemories:
    """The stored memories of a run: opened where an earlier start has written them, else compressed and written.

    Documents that are not among the stored ones are added to them.
    """
    try:
        memories = DocumentMemories(CompressedCorpus.open(folder, model=model))
    except (FileNotFoundError, ValueError):
        memories = None  # none yet, not finished, damaged, or of an earlier compressor
    if memories is not None:
        needed = [document for document in documents if document_key(document) not in memories.rows]
        if not needed:
            return memories
        memories.corpus.add(to_rows(needed), batch_size=batch_size)
        return with_all(memories.corpus, documents)
    try:
        if not CompressedCorpus.is_complete(folder):
            return compress_documents(model, documents, folder, batch_size)  # goes on where it was killed
    except ValueError:
        pass  # of other documents, or of an earlier compressor
    shutil.rmtree(folder, ignore_errors=True)
    return compress_documents(model, documents, folder, batch_size)

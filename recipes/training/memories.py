"""Memories that the contrastive and the joint stage read: a compressed corpus, looked up by text or searched live."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from modeling_clara import CLaRaForRAG, CompressedCorpus
from recipes.training.data import document_key


class DocumentMemories:
    """A corpus whose documents are known by title and text, as the rows of training data name them.

    Memories stay memory-mapped; of every document that is one chunk its hash and its row are held.

    Args:
        corpus: open, with the model that trains.
        needed: documents that must be stored, else it is a ValueError.
    """

    def __init__(self, corpus: CompressedCorpus, needed: Sequence[Mapping] = ()):
        self.corpus = corpus
        self.rows: dict[str, int] = {}
        for row in corpus.rows(["title", "text"]):
            self.rows.setdefault(document_key(row), row["row"])
        if missing := self.missing(needed):
            raise ValueError(
                f"the memory of {missing[0]['text'][:60]!r} must fit into float16, see {corpus.folder}/rejected.jsonl."
                " Train the compressor longer, or set `compress_online`."
            )

    def __len__(self) -> int:
        return len(self.corpus)

    def missing(self, documents: Sequence[Mapping]) -> list[Mapping]:
        """Those of the documents that are not stored."""
        return [document for document in documents if document_key(document) not in self.rows]

    def lookup(self, documents: Sequence[Mapping]) -> torch.Tensor:
        """(documents, n, hidden) float32 memories of these documents; a KeyError if one is not stored."""
        return self.corpus.decode([self.rows[document_key(document)] for document in documents])

    def search(self, query_memory: torch.Tensor, top_k: int) -> list[list[dict]]:
        """As `CompressedCorpus.search`."""
        return self.corpus.search(query_memory, top_k)


@dataclass
class CorpusCandidates:
    """Live candidates: the documents of a corpus that are best for each question, searched in every step."""

    corpus: DocumentMemories
    num_candidates: int  # documents of a question
    add_gold: bool = False  # put the gold documents in the last places if the search missed them
    gold_store: DocumentMemories | None = None  # memories of the gold documents, with `add_gold`

    @torch.no_grad()
    def search(self, query: torch.Tensor, gold: list[list[dict]]) -> dict[str, torch.Tensor]:
        """Candidates of (rows, k, hidden) questions, whose graph is left out, with the gold documents of each.

        Returns:
            `memory` (rows, candidates, n, hidden) float32; `document_mask`, `positive_mask` (rows, candidates) bool.
        """
        found = self.corpus.search(query, self.num_candidates)
        memories, positives = zip(*map(self._row, found, gold), strict=True)
        masks = [torch.ones(len(rows), dtype=torch.bool) for rows in memories]
        padded = {"memory": memories, "document_mask": masks, "positive_mask": positives}
        return {name: pad_sequence(parts, batch_first=True).to(query.device) for name, parts in padded.items()}

    def _row(self, hits: list[Mapping], gold: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        """(candidates, n, hidden) float32 memories of a question, and which of them are gold."""
        keys, rows = [document_key(hit) for hit in hits], [torch.as_tensor(hit["memory"]) for hit in hits]
        if self.add_gold and (missing := [document for document in gold if document_key(document) not in keys]):
            keep = max(0, self.num_candidates - len(missing))
            keys = [*keys[:keep], *map(document_key, missing)]
            rows = [*rows[:keep], *self.gold_store.lookup(missing)]
        gold_keys = {document_key(document) for document in gold}
        return torch.stack(rows).float(), torch.tensor([key in gold_keys for key in keys])


def compress_documents(
    model: CLaRaForRAG, documents: Sequence[Mapping], folder: Path, batch_size: int = 16
) -> DocumentMemories:
    """Build a float16 corpus of these documents, each one chunk; what is there already of the same build is kept."""
    corpus = CompressedCorpus.build(model, to_rows(documents), folder, codec="float16", batch_size=batch_size)
    return DocumentMemories(corpus, documents)


def to_rows(documents: Sequence[Mapping]) -> list[dict]:
    """Documents under the ids by which they are looked up."""
    return [{"id": document_key(document), **document} for document in documents]


def open_or_compress(
    model: CLaRaForRAG, documents: Sequence[Mapping], folder: Path, batch_size: int
) -> DocumentMemories:
    """The stored memories of a run: opened where an earlier start has written them, else compressed and written.

    Documents that are not among the stored ones are added to them.
    """
    try:
        memories = DocumentMemories(CompressedCorpus.open(folder, model=model))
    except (FileNotFoundError, ValueError):
        pass  # none yet, not finished, damaged, or of an earlier compressor
    else:
        if missing := memories.missing(documents):
            memories.corpus.add(to_rows(missing), batch_size=batch_size)
            memories = DocumentMemories(memories.corpus, documents)
        return memories
    try:
        if not CompressedCorpus.is_complete(folder):
            return compress_documents(model, documents, folder, batch_size)  # goes on where it was killed
    except ValueError:
        pass  # of other documents, or of an earlier compressor
    shutil.rmtree(folder, ignore_errors=True)
    return compress_documents(model, documents, folder, batch_size)

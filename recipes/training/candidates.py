"""Live candidates: the documents of a corpus that are best for a batch of questions, searched in every step.

Used instead of the rows' own documents with `candidates: corpus`.
"""

from collections.abc import Mapping

import torch
from torch.nn.utils.rnn import pad_sequence

from recipes.training.data import document_key
from recipes.training.memories import DocumentMemories


class CorpusCandidates:
    """The best documents of a corpus for each question.

    Args:
        corpus: to search.
        num_candidates: documents of a question.
        add_gold: put the gold documents in the last places if the search missed them.
        gold_store: memories of the gold documents, with `add_gold`.
    """

    def __init__(
        self,
        corpus: DocumentMemories,
        num_candidates: int,
        *,
        add_gold: bool = False,
        gold_store: DocumentMemories | None = None,
    ):
        self.corpus, self.num_candidates = corpus, num_candidates
        self.add_gold, self.gold_store = add_gold, gold_store

    @torch.no_grad()
    def search(self, query: torch.Tensor, gold: list[list[dict]]) -> dict[str, torch.Tensor]:
        """Candidates of (rows, k, hidden) questions.

        Args:
            query: memories of the questions, without their graph.
            gold: the gold documents of each question.

        Returns:
            `memory` (rows, candidates, n, hidden) float32; `document_mask`, `positive_mask` (rows, candidates) bool.
        """
        memories, positives = [], []
        for hits, documents in zip(self.corpus.search(query, self.num_candidates), gold, strict=True):
            rows, is_gold = self._row(hits, documents)
            memories.append(rows)
            positives.append(is_gold)
        masks = [torch.ones(len(rows), dtype=torch.bool) for rows in memories]
        padded = {"memory": memories, "document_mask": masks, "positive_mask": positives}
        return {name: pad_sequence(parts, batch_first=True).to(query.device) for name, parts in padded.items()}

    def _row(self, hits: list[Mapping], gold: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        """(candidates, n, hidden) float32 memories of a question, and which of them are gold."""
        keys = [document_key(hit) for hit in hits]
        rows = [torch.as_tensor(hit["memory"]) for hit in hits]
        gold_keys = [document_key(document) for document in gold]
        if self.add_gold:
            missing = [index for index, key in enumerate(gold_keys) if key not in keys]
            keep = max(0, self.num_candidates - len(missing))
            keys = keys[:keep] + [gold_keys[index] for index in missing]
            stored = self.gold_store.lookup([gold[index] for index in missing]) if missing else []
            rows = rows[:keep] + list(stored)
        return torch.stack(rows).float(), torch.tensor([key in gold_keys for key in keys])

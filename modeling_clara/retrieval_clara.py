"""Retrieval as tensors: cosine scores, the straight-through top-k, what it chooses and the contrastive term.

Pure functions from a query memory and candidate memories to the chosen memories.
"""

import torch
from torch.nn import functional as F


def flatten_memory(memory: torch.Tensor, memory_size: int) -> torch.Tensor:
    """The retrieval vectors (..., k * hidden) float32 of memories (..., n >= k, hidden).

    Each is the first k memory vectors concatenated and scaled to length one, with one L2 norm over all of them.
    """
    return F.normalize(memory[..., :memory_size, :].float().flatten(-2), dim=-1)


def cosine_scores(query: torch.Tensor, memory: torch.Tensor, memory_size: int) -> torch.Tensor:
    """Score of every candidate, `cos(vec Q, vec M)` (eq. 3.1): (batch, candidates) float32 in [-1, 1].

    Of `query` (batch, n, hidden) and `memory` (batch, candidates, n, hidden) the first `memory_size` vectors count.
    """
    queries = flatten_memory(query, memory_size)[:, None]
    # No matrix product: autocast would take it in bfloat16, which cannot tell apart cosines nearer than 0.004.
    return (queries * flatten_memory(memory, memory_size)).sum(-1)


def batch_scores(query: torch.Tensor, memory: torch.Tensor, memory_size: int) -> torch.Tensor:
    """Scores (questions, batch * candidates) of any number of questions with the candidates of all rows in turn."""
    with torch.autocast(query.device.type, enabled=False):  # see cosine_scores
        return flatten_memory(query, memory_size) @ flatten_memory(memory, memory_size).flatten(0, 1).T


def straight_through_topk(
    scores: torch.Tensor, top_k: int, temperature: float, candidate_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Differentiable top-k (eq. 3.3-3.6): hard one-hot forward, soft slot-by-slot backward.

    Slot j backpropagates through softmax(scores / temperature) over the candidates that slots 0..j-1 have not taken.
    Ties go to the lower index. A `top_k` larger than the number of candidates is a ValueError.

    Args:
        scores: (batch, candidates) float.
        top_k: slots, at most the number of candidates.
        temperature: > 0 (paper: 0.02).
        candidate_mask: (batch, candidates) bool, False where there is no candidate.

    Returns:
        selection: (batch, top_k, candidates), one-hot rows forward; zero rows where candidates ran out.
        selected: (batch, top_k) int64, index of the chosen candidate; -1 where candidates ran out.

    Example:
        >>> selection, selected = straight_through_topk(torch.tensor([[0.1, 0.9, 0.5]]), 2, 0.02)
        >>> selected.tolist(), selection.tolist()
        ([[1, 2]], [[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    """
    if top_k > scores.shape[1]:
        raise ValueError(
            f"`top_k` must be <= number of candidates ({scores.shape[1]}), got {top_k}. Lower `top_k` or pass more "
            "documents."
        )
    if candidate_mask is None:
        candidate_mask = torch.ones_like(scores, dtype=torch.bool)
    ranked = scores.detach().masked_fill(~candidate_mask, -torch.inf).sort(dim=-1, descending=True, stable=True)
    selected = ranked.indices[:, :top_k]  # (batch, top_k)
    is_real = candidate_mask.gather(1, selected)
    one_hot = F.one_hot(selected, scores.shape[1]).to(scores.dtype) * is_real[..., None]
    taken = one_hot.cumsum(1) - one_hot  # (batch, top_k, candidates), what the earlier slots took
    free = candidate_mask[:, None] & (taken == 0) & is_real[..., None]
    # A slot without any free candidate would be a softmax over -inf only: NaN. It gets finite logits and weight zero.
    logits = (scores[:, None] / temperature).masked_fill(~free & is_real[..., None], -torch.inf)
    soft = torch.softmax(logits, dim=-1) * is_real[..., None]
    return one_hot + (soft - soft.detach()), selected.masked_fill(~is_real, -1)


def select_memory(selection: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """The memories (batch, top_k, k, hidden) that a `selection` takes of `memory` (batch, candidates, k, hidden).

    The gradient of the choice goes through it (paper, section 3).
    """
    return torch.einsum("bjn,bnkh->bjkh", selection.to(memory.dtype), memory)


def contrastive_loss(
    scores: torch.Tensor, positive_mask: torch.Tensor, temperature: float, candidate_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """InfoNCE (batch,) float32 over the candidates; with several positives, the log of their summed probability.

    Args:
        scores: (batch, candidates) float.
        positive_mask: (batch, candidates) bool. A question without a positive contributes 0.
        temperature: > 0.
        candidate_mask: (batch, candidates) bool, False where there is no candidate.
    """
    if candidate_mask is None:
        candidate_mask = torch.ones_like(positive_mask)
    logits = (scores.float() / temperature).masked_fill(~candidate_mask, -torch.inf)
    positive_mask = positive_mask & candidate_mask
    has_positive = positive_mask.any(-1)
    positives = logits.masked_fill(~positive_mask & has_positive[:, None], -torch.inf)
    return (logits.logsumexp(-1) - positives.logsumexp(-1)) * has_positive


def contrast_batch(
    query: torch.Tensor,
    memory: torch.Tensor,
    document_mask: torch.Tensor,
    positive_mask: torch.Tensor,
    *,
    score_size: int,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`batch_scores`, -inf where there is no document, and the contrastive terms (questions,) over all rows."""
    mask = document_mask.flatten().expand_as(positive_mask)
    scores = batch_scores(query, memory, score_size).masked_fill(~mask, -torch.inf)
    return scores, contrastive_loss(scores, positive_mask, temperature, mask)


def choose_documents(
    query: torch.Tensor,
    memory: torch.Tensor,
    document_mask: torch.Tensor,
    read_size: int,
    top_k: int,
    *,
    score_size: int,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose up to `top_k` documents by the score of `score_size` vectors and take `read_size` vectors of each.

    Returns:
        memory: (batch, slots, k, hidden), with the gradient of the choice.
        mask: (batch, slots) bool, False where candidates ran out.
        scores, selected: as in `CLaRaOutput`.
    """
    scores = cosine_scores(query, memory, score_size)
    selection, selected = straight_through_topk(scores, min(top_k, memory.shape[1]), temperature, document_mask)
    read = select_memory(selection, memory[:, :, :read_size])
    return read, selected >= 0, scores.masked_fill(~document_mask, -torch.inf), selected

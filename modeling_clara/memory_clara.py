"""Memory tokens as tensors: placing them behind a document, reading them out, writing them into a prompt, L_MSE.

Stands between the embeddings and the backbone. Pure functions: no model, no config, no text, no device.
"""

import torch
from torch.nn import functional as F


def right_padded(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move real tokens to the front: (rows, length) ids and (rows,) lengths, whatever the padding side was."""
    order = attention_mask.long().argsort(dim=-1, descending=True, stable=True)
    return input_ids.gather(-1, order), attention_mask.long().sum(-1)


def place_memory_tokens(
    token_embeddings: torch.Tensor, lengths: torch.Tensor, memory_rows: torch.Tensor
) -> torch.Tensor:
    """Put the learned memory rows directly behind each text.

    Args:
        token_embeddings: (batch, length, hidden), the text right-padded.
        lengths: (batch,) int64, real tokens of each text.
        memory_rows: (k, hidden), the learned rows.

    Returns:
        (batch, length + k, hidden). What follows the memory rows of a shorter text is padding that no earlier position
        attends to, the attention being causal; it needs no mask.
    """
    batch, length, _ = token_embeddings.shape
    n_memory = memory_rows.shape[0]
    positions = torch.arange(length + n_memory, device=lengths.device)
    is_memory = (positions >= lengths[:, None]) & (positions < lengths[:, None] + n_memory)  # (batch, length + k)
    padded = F.pad(token_embeddings, (0, 0, 0, n_memory))
    rows = memory_rows.to(padded.dtype).expand(batch, -1, -1)
    return padded.masked_scatter(is_memory[..., None], rows)


def read_memory(hidden_states: torch.Tensor, lengths: torch.Tensor, memory_size: int) -> torch.Tensor:
    """The final-layer states of the memory tokens: a document's memory (paper, section 2).

    Args:
        hidden_states: (batch, length + k, hidden) of a text followed by its memory tokens.
        lengths: (batch,) int64, real tokens of each text.
        memory_size: k.

    Returns:
        (batch, k, hidden). Its first j vectors are the memory of size j (nested memory).
    """
    positions = lengths[:, None] + torch.arange(memory_size, device=lengths.device)  # (batch, k)
    return hidden_states.gather(1, positions[..., None].expand(-1, -1, hidden_states.shape[-1]))


def normalize_memory(states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Final-layer states as memories: every channel shifted and scaled by fixed numbers.

    A few channels of these states are the same large number in every document. Written into a prompt as they are, they
    drown what differs; see README.md, section Decisions.

    Args:
        states: (..., hidden).
        shift: (hidden,), the mean of every channel.
        scale: (hidden,), the spread of token embeddings over that of every channel.

    Returns:
        (..., hidden) in the dtype of `states`, computed in float32.

    >>> states = torch.tensor([[30.0, 0.5], [32.0, -0.5]])
    >>> normalize_memory(states, *memory_statistics(states, 0.1))
    tensor([[-0.1000,  0.1000],
            [ 0.1000, -0.1000]])
    """
    return ((states.float() - shift.float()) * scale.float()).to(states.dtype)


def restore_states(memory: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The final-layer states (..., hidden) that `normalize_memory` made these memories of."""
    scale = scale.float()
    return (torch.where(scale > 0, memory.float() / scale, 0.0) + shift.float()).to(memory.dtype)


def memory_statistics(states: torch.Tensor, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`shift` and `scale` of `normalize_memory` that give every channel mean 0 and standard deviation `spread`.

    Args:
        states: (states, hidden) of memories of many documents.
        spread: standard deviation that is wanted.

    Returns:
        shift (hidden,), scale (hidden,) float32; a channel that never changes has scale 0.
    """
    states = states.float()
    shift, deviation = states.mean(0), states.std(0, correction=0)
    return shift, torch.where(deviation > 0, spread / deviation, 0.0)


def check_slots(memory_mask: torch.Tensor, n_rows: torch.Tensor) -> None:
    """Raise unless every prompt has as many slots as it gets memory rows; costs one host synchronisation.

    Args:
        memory_mask: (batch, length) bool.
        n_rows: (batch,) int64, rows to write into each prompt.

    Raises:
        ValueError: naming the first prompt that does not fit.
    """
    slots = memory_mask.sum(-1)
    wrong = (slots != n_rows.to(slots.device)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"`memory_mask[{row}]` must mark {int(n_rows[row])} slots (documents x (memory vectors + separator)), got "
            f"{int(slots[row])}. Build prompt and memory with the same number of documents and `memory_size`."
        )


def write_memory(inputs_embeds: torch.Tensor, memory_mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Write memory rows into the slots of a prompt with one masked_scatter.

    Args:
        inputs_embeds: (batch, length, hidden).
        memory_mask: (batch, length) bool, True at slots; see `check_slots`.
        rows: (rows, hidden) in the order of the slots, batch row by batch row.

    Returns:
        (batch, length, hidden)
    """
    return inputs_embeds.masked_scatter(memory_mask[..., None], rows.to(inputs_embeds.dtype))


def memory_alignment_loss(
    document_states: torch.Tensor, document_mask: torch.Tensor, memory: torch.Tensor
) -> torch.Tensor:
    """L_MSE (eq. 2.1): squared distance between the mean state of the document and that of its memory.

    The formula writes a squared norm; the published numbers were made with the mean over the hidden size, and so is
    this.

    Args:
        document_states: (batch, length, hidden), final-layer states of the document tokens.
        document_mask: (batch, length) bool, True at real tokens.
        memory: (batch, k, hidden).

    Returns:
        (batch,) float32
    """
    weight = document_mask[..., None].float()
    mean_document = (document_states.float() * weight).sum(1) / weight.sum(1).clamp(min=1)
    return (mean_document - memory.float().mean(1)).square().mean(-1)

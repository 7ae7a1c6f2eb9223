"""Memories as tensors: memory tokens after a document, windows, normalisation, slots of a prompt, L_MSE.

Pure functions between the embeddings and the backbone.
"""

from functools import lru_cache

import torch
from torch.nn import functional as F

# Of the length of windows, by which those of other tokens miss: 0.12 to 0.4 for a wrong number, 0.05 at most for int4.
MISFIT = 0.1


def right_padded(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move real tokens to the front: (rows, length) ids and (rows,) lengths, whatever the padding side was."""
    order = attention_mask.long().argsort(dim=-1, descending=True, stable=True)
    return input_ids.gather(-1, order), attention_mask.long().sum(-1)


def segment_mask(segments: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """What the tokens of rows with several prompts may attend to: (rows, 1, length, length) bool, query by key.

    `segments` (rows, length) int64 is 0 in the common beginning of a row's prompts and i in the rest of prompt i. It
    has 1 at real tokens in `attention_mask` (rows, length). Padding sees itself: a softmax over nothing is NaN.
    """
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    keys, queries = segments[:, None, :], segments[:, :, None]
    seen = causal & ((keys == 0) | (keys == queries)) & attention_mask[:, None, :].bool()
    return (seen | torch.eye(length, dtype=torch.bool, device=segments.device))[:, None]


def place_memory_tokens(
    token_embeddings: torch.Tensor, lengths: torch.Tensor, memory_rows: torch.Tensor
) -> torch.Tensor:
    """Put the memory-token embeddings (k, hidden) directly after each text: (batch, length + k, hidden).

    The `lengths` (batch,) real tokens of a text come first in `token_embeddings` (batch, length, hidden). What follows
    the memory tokens of a shorter text is padding. It needs no mask, because attention is causal.
    """
    padded = F.pad(token_embeddings, (0, 0, 0, len(memory_rows)))
    positions = torch.arange(padded.shape[1], device=lengths.device) - lengths[:, None]  # (batch, length + k)
    is_memory = (positions >= 0) & (positions < len(memory_rows))
    rows = memory_rows.to(padded.dtype).expand(len(lengths), -1, -1)
    return padded.masked_scatter(is_memory[..., None], rows)


def read_memory(hidden_states: torch.Tensor, lengths: torch.Tensor, memory_size: int) -> torch.Tensor:
    """The final-layer states (batch, k, hidden) of the memory tokens: a document's memory (paper, section 2).

    They follow the `lengths` (batch,) real tokens in `hidden_states` (batch, length + k, hidden). The first j vectors
    are the memory of size j (nested memory).
    """
    positions = lengths[:, None] + torch.arange(memory_size, device=lengths.device)  # (batch, k)
    return hidden_states.gather(1, positions[..., None].expand(-1, -1, hidden_states.shape[-1]))


def window_means(states: torch.Tensor, lengths: torch.Tensor, n_windows: int) -> torch.Tensor:
    """Means (batch, n_windows, hidden) of the states in equal windows of each text, in the dtype of `states`.

    The `lengths` (batch,) real tokens of a text come first in `states` (batch, length, hidden). A state on a border
    counts in both windows by its share, and there may be more windows than tokens. Sums are taken in float32.

    >>> window_means(torch.tensor([[[1.0], [2.0], [6.0], [9.0]]]), torch.tensor([3]), 2).flatten()
    tensor([1.3333, 4.6667])
    """
    borders = torch.arange(n_windows + 1, device=states.device) * (lengths[:, None] / n_windows)  # in tokens
    first = torch.arange(states.shape[1], device=states.device)
    shares = torch.minimum(borders[:, 1:, None], first + 1) - torch.maximum(borders[:, :-1, None], first)
    shares = shares.clamp(min=0)  # (batch, n_windows, length), of a token in a window
    weights = shares / shares.sum(-1, keepdim=True).clamp(min=1e-6)
    with torch.autocast(states.device.type, enabled=False):
        return (weights @ states.float()).to(states.dtype)


def nest_windows(windows: torch.Tensor, n_base: int) -> torch.Tensor:
    """Windows (..., n, hidden) as a nested memory (..., n, hidden), n = n_base * 2^i (a Haar transform).

    The first k vectors give the windows of size k. First come the means of the `n_base` widest windows, then for each
    doubling half the difference of every window's two halves. Those of doubling i are divided by sqrt(2)^(i - 1),
    which makes a cosine of the first k vectors the cosine of the k windows.

    >>> nest_windows(torch.tensor([[1.0], [3.0], [4.0], [8.0]]), 2).flatten()
    tensor([ 2.,  6., -1., -2.])
    """
    n_doublings = (windows.shape[-2] // n_base).bit_length() - 1
    parts = []
    for doubling in range(n_doublings, 0, -1):
        first, second = windows[..., 0::2, :], windows[..., 1::2, :]
        parts.append((first - second) / 2 / 2 ** ((doubling - 1) / 2))
        windows = (first + second) / 2
    return torch.cat([windows, *reversed(parts)], dim=-2)


def read_windows(memory: torch.Tensor, n_base: int) -> torch.Tensor:
    """The windows (..., k, hidden) that `nest_windows` made the first k vectors of a memory of."""
    windows, n_doublings = memory[..., :n_base, :], (memory.shape[-2] // n_base).bit_length() - 1
    for doubling in range(1, n_doublings + 1):
        size = windows.shape[-2]
        half = memory[..., size : 2 * size, :] * 2 ** ((doubling - 1) / 2)
        windows = torch.stack([windows + half, windows - half], dim=-2).flatten(-3, -2)
    return windows


def whole_tokens(windows: torch.Tensor, n_tokens: torch.Tensor) -> torch.Tensor:
    """Windows (rows, k, hidden) of texts of `n_tokens` (rows,) tokens, none of them narrower than a token.

    `window_means` made them. Those of a text of at most k tokens become the vectors of its tokens, which follow from
    them without loss, and then zeros. Longer texts keep theirs, and so do texts of unknown length, 0, and windows that
    so many tokens cannot have: the memory of another text.

    >>> windows = window_means(torch.tensor([[[1.0], [2.0], [6.0]]]), torch.tensor([3]), 4)
    >>> whole_tokens(windows, torch.tensor([3])).flatten().round(decimals=4)
    tensor([1., 2., 6., 0.])
    """
    k = windows.shape[-2]
    pairs = zip(*(token_matrices(n if n <= k else 0, k) for n in n_tokens.tolist()), strict=True)
    to_tokens, and_back = (torch.stack(matrices).to(windows.device) for matrices in pairs)
    with torch.autocast(windows.device.type, enabled=False):
        given = windows.float()
        is_other = (and_back @ given - given).norm(dim=(-2, -1)) > MISFIT * given.norm(dim=(-2, -1))
        return torch.where(is_other[:, None, None], given, to_tokens @ given).to(windows.dtype)


@lru_cache(maxsize=512)
def token_matrices(n_tokens: int, n_windows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(n_windows, n_windows) float32 that make tokens of windows, see `whole_tokens`, and these windows again.

    Of 0 tokens identities. The noise of a codec grows by 2.6 at most (63 tokens in 64 windows).
    """
    if n_tokens == 0:
        return (torch.eye(n_windows, device="cpu"),) * 2
    tokens, lengths = torch.eye(n_tokens, device="cpu")[None], torch.tensor([n_tokens], device="cpu")
    with torch.autocast("cpu", enabled=False):  # what is kept is exact, whoever asks first
        shares = window_means(tokens, lengths, n_windows)[0]
        inverse = torch.linalg.pinv(shares)
        return F.pad(inverse, (0, 0, 0, n_windows - n_tokens)), shares @ inverse


def normalize_memory(states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Final-layer states (..., hidden) as memories in the same dtype: every channel shifted and scaled, in float32.

    A few channels of these states are the same large number in every document, which drowns what differs. `shift` and
    `scale`, (hidden,) each, come from `memory_statistics`.

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
    """`shift` and `scale`, (hidden,) float32, that give each channel mean 0 and standard deviation `spread`.

    They are measured on (states, hidden) of many memories; a channel that never changes has scale 0.
    """
    states = states.float()
    shift, deviation = states.mean(0), states.std(0, correction=0)
    return shift, torch.where(deviation > 0, spread / deviation, 0.0)


def check_slots(memory_mask: torch.Tensor, n_rows: torch.Tensor) -> None:
    """Raise a ValueError unless each prompt of `memory_mask` (batch, length) has its `n_rows` (batch,) slots."""
    slots = memory_mask.sum(-1)
    wrong = (slots != n_rows.to(slots.device)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"`memory_mask[{row}]` must mark {int(n_rows[row])} slots (documents x (memory vectors + separator)), got "
            f"{int(slots[row])}. Build prompt and memory with the same number of documents and `memory_size`."
        )


def write_memory(inputs_embeds: torch.Tensor, memory_mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Prompts (batch, length, hidden) with `rows` (slots, hidden) written into their slots, prompt by prompt."""
    return inputs_embeds.masked_scatter(memory_mask[..., None], rows.to(inputs_embeds.dtype))


def memory_alignment_loss(
    document_states: torch.Tensor, document_mask: torch.Tensor, memory: torch.Tensor
) -> torch.Tensor:
    """L_MSE (eq. 2.1), (batch,) float32: squared distance of a document's mean state from that of its memory.

    `document_states` (batch, length, hidden) are of the final layer, real tokens are True in `document_mask` (batch,
    length), and `memory` is (batch, k, hidden). The formula writes a squared norm; the published numbers were made
    with the mean over the hidden size, and so is this.
    """
    weight = document_mask[..., None].float()
    mean_document = (document_states.float() * weight).sum(1) / weight.sum(1).clamp(min=1)
    return (mean_document - memory.float().mean(1)).square().mean(-1)

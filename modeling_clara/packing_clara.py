"""Packed passes on CPU: texts of different lengths in one row, without a single padding token.

Stands between the encode passes and the attention of the backbone: each text attends to itself alone. It knows nothing
of memories or roles.
"""

import contextlib
from collections.abc import Iterator

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PACKED = "clara_packed_sdpa"
# Tokens of a packed pass. Measured on two cores with SmolLM2-135M: below about 1,000 the matrices are too small, above
# about 2,000 the activations leave the cache (recipes/LOG.md).
MAX_TOKENS = 1600


def cut_batches(order: list[int], lengths: list[int], batch_size: int, is_packed: bool) -> Iterator[list[int]]:
    """Cut `order`, a list of text numbers, into batches of `batch_size` texts; packed ones also at `MAX_TOKENS`.

    Args:
        order: of the texts.
        lengths: tokens of each text, by its number.
        batch_size: texts of a batch at most.
        is_packed: whether the tokens of a batch count.
    """
    batch, n_tokens = [], 0
    for row in order:
        if batch and (len(batch) == batch_size or (is_packed and n_tokens + lengths[row] > MAX_TOKENS)):
            yield batch
            batch, n_tokens = [], 0
        batch.append(row)
        n_tokens += lengths[row]
    yield batch


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: list[int],
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each text of a packed row.

    Args:
        module: the attention layer that calls.
        query: (1, heads, tokens, head size).
        key: (1, key-value heads, tokens, head size).
        value: as `key`.
        attention_mask: None; the texts are told apart by `cu_seq_lens_q`.
        cu_seq_lens_q: cumulative lengths, from 0 to the number of tokens.
        **kwargs: for transformers' own SDPA function.

    Returns:
        (1, tokens, heads, head size) and None.
    """
    kwargs["is_causal"] = True
    outputs = [
        sdpa_attention_forward(module, query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], None, **kwargs)[0]
        for a, b in zip(cu_seq_lens_q[:-1], cu_seq_lens_q[1:], strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def can_pack(backbone: PreTrainedModel, longest: int) -> bool:
    """Whether packed passes give what padded ones give: a transformers model under SDPA on CPU, no window in the way.

    Elsewhere one padded kernel launch is cheaper than one per text.

    Args:
        backbone: the causal language model.
        longest: tokens of the longest text.
    """
    config = backbone.config
    window = config.to_dict().get("sliding_window")
    return (
        backbone.device.type == "cpu"
        and config._attn_implementation == "sdpa"
        and type(backbone).__module__.startswith("transformers.models.")
        and (window is None or longest <= window)
    )


@contextlib.contextmanager
def packed(backbone: PreTrainedModel) -> Iterator[None]:
    """Run the backbone's attention packed; its own attention is restored on leaving."""
    AttentionInterface.register(PACKED, packed_attention)
    before = backbone.config._attn_implementation
    backbone.config._attn_implementation = PACKED
    try:
        yield
    finally:
        backbone.config._attn_implementation = before

"""Packed passes on CPU: texts of different lengths in one row, without a single padding token.

Texts attend to themselves alone; in training, rows may hold several prompts with a common beginning.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel

PACKED = "clara_packed_sdpa"
# Tokens of a packed pass. Measured on two cores with SmolLM2-135M: below about 1,000 the matrices are too small, above
# about 2,000 the activations leave the cache (docs/experiments.md).
MAX_TOKENS = 1600
MAX_WEIGHT_BYTES = 8 * 2**30


def cut_batches(order: list[int], lengths: list[int], batch_size: int, is_packed: bool) -> Iterator[list[int]]:
    """Cut `order`, text numbers, into batches of `batch_size`; packed ones also at `MAX_TOKENS` of their `lengths`."""
    batch, n_tokens = [], 0
    for row in order:
        if batch and (len(batch) == batch_size or (is_packed and n_tokens + lengths[row] > MAX_TOKENS)):
            yield batch
            batch, n_tokens = [], 0
        batch.append(row)
        n_tokens += lengths[row]
    yield batch


class PackedRows:
    """Where the tokens of padded rows are in one packed row, and what each may attend to.

    Args:
        is_real: (rows, length) bool, at least one real token in all.
        seen: (rows, length, length) bool, True where a query (first length) sees a key; default: causal.
    """

    def __init__(self, is_real: torch.Tensor, seen: torch.Tensor | None = None):
        self.is_real = is_real
        self.places = is_real.flatten().nonzero()[:, 0]  # of the packed tokens in the flattened padded rows
        self.sources = torch.zeros(is_real.numel(), dtype=torch.long)  # of the padded tokens in the packed row
        self.sources[self.places] = torch.arange(len(self.places))
        lengths = is_real.sum(-1)
        starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        self.groups = [  # rows of similar length: what they may not see, and the packed places of their tokens
            self._group(rows, lengths, starts, None if seen is None else seen[rows]) for rows in _alike(lengths)
        ]
        self.order = torch.cat([places[mask] for places, mask, _ in self.groups]).argsort()

    def _group(self, rows: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor, seen: torch.Tensor | None):
        length = int(lengths[rows].max())
        steps = torch.arange(length)
        is_real = steps < lengths[rows, None]
        places = (starts[rows, None] + steps).clamp(max=len(self.places) - 1)
        if seen is None:
            keeps = torch.ones(length, length, dtype=torch.bool).tril()[None]
        else:  # by real tokens: padding may stand on either side
            real = self.is_real[rows].long().argsort(dim=-1, descending=True, stable=True)[:, :length]
            keeps = seen.gather(1, real[:, :, None].expand(-1, -1, seen.shape[2]))
            keeps = keeps.gather(2, real[:, None, :].expand(-1, length, -1))
        # nothing attends to padding; padding attends to itself, because a softmax over nothing is NaN
        hidden = ~((keeps & is_real[:, None, :]) | torch.eye(length, dtype=torch.bool))
        return places, is_real, hidden[:, None, None]

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """(rows, length, ...) -> (1, tokens, ...)"""
        return padded.flatten(0, 1).index_select(0, self.places)[None]

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """(1, tokens, ...) -> (rows, length, ...), zeros at padding."""
        padded = packed.new_zeros(self.is_real.numel(), *packed.shape[2:])
        return padded.index_copy(0, self.places, packed[0]).unflatten(0, self.is_real.shape)


def _alike(lengths: torch.Tensor) -> list[torch.Tensor]:
    """Indices of the rows that have tokens, in groups whose shortest has three quarters of the longest's."""
    groups, left = [], lengths.argsort(descending=True)[: int((lengths > 0).sum())]
    while len(left):
        n_alike = int((4 * lengths[left] >= 3 * lengths[left[0]]).sum())
        groups.append(left[:n_alike])
        left = left[n_alike:]
    return groups


class _PackedAttention(torch.autograd.Function):
    """Attention inside each row, written out: the backward pass of SDPA takes most of a training step on a CPU."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)  # one dtype for all of it, as SDPA has
    def forward(ctx, query, key, value, rows: PackedRows, scaling: float):
        n_shared = query.shape[1] // key.shape[1]
        by_token = [states[0].transpose(0, 1).contiguous() for states in (query * scaling, key, value)]
        outputs, saved = [], []
        for places, is_real, hidden in rows.groups:
            # (rows, length, heads, size) -> (rows, heads, length, size); heads that share keys stand in one row
            q, k, v = (states[places].transpose(1, 2) for states in by_token)
            q, k, v = q.unflatten(1, (-1, n_shared)).flatten(2, 3), k.contiguous(), v.contiguous()
            scores = (q @ k.transpose(-1, -2)).unflatten(2, (n_shared, -1))
            scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)
            weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype).flatten(2, 3)
            outputs.append(_by_token(weights @ v, n_shared)[is_real])
            saved += [q, k, v, weights]
        ctx.save_for_backward(*saved)
        ctx.rows, ctx.scaling, ctx.n_shared = rows, scaling, n_shared
        return torch.cat(outputs)[rows.order][None]

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, gradient):
        rows, n_shared = ctx.rows, ctx.n_shared
        gradients = []
        for number, (places, is_real, _) in enumerate(rows.groups):
            q, k, v, weights = ctx.saved_tensors[4 * number : 4 * number + 4]
            grad = gradient[0][places].masked_fill(~is_real[..., None, None], 0.0)  # padding has copies of real tokens
            grad = grad.transpose(1, 2).unflatten(1, (-1, n_shared)).flatten(2, 3)
            grad_scores = torch._softmax_backward_data(grad @ v.transpose(-1, -2), weights, -1, weights.dtype)
            parts = (grad_scores @ k, n_shared), (grad_scores.transpose(-1, -2) @ q, 1)
            parts += ((weights.transpose(-1, -2) @ grad, 1),)
            gradients.append([_by_token(states, shared)[is_real] for states, shared in parts])
        grad_q, grad_k, grad_v = (torch.cat(parts)[rows.order] for parts in zip(*gradients, strict=True))
        return *(states.transpose(0, 1)[None] for states in (grad_q * ctx.scaling, grad_k, grad_v)), None, None


def _by_token(states: torch.Tensor, n_shared: int) -> torch.Tensor:
    """(rows, key heads, shared * length, size) -> (rows, length, heads, size)"""
    return states.unflatten(2, (n_shared, -1)).flatten(1, 2).transpose(1, 2)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed_rows: PackedRows,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention (1, tokens, heads, head size) inside each text of a packed row, in transformers' form of the call."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _PackedAttention.apply(query, key, value, packed_rows, scaling), None


def can_pack(backbone: PreTrainedModel, longest: int, n_rows: int = 1) -> bool:
    """Whether packed passes give what padded ones give: a transformers model under SDPA on CPU, no window in the way.

    On an accelerator padding costs less than moving tokens. A backward pass needs the attention weights of all layers,
    which SDPA would compute again: above `MAX_WEIGHT_BYTES` passes of `n_rows` texts of up to `longest` tokens are
    padded.
    """
    config = backbone.config
    values = config.to_dict()
    window, n_layers = values.get("sliding_window"), config.num_hidden_layers
    weight_bytes = 4 * n_rows * longest**2 * config.num_attention_heads * n_layers if torch.is_grad_enabled() else 0
    return (
        backbone.device.type == "cpu"
        and config._attn_implementation == "sdpa"
        and type(backbone).__module__.startswith("transformers.models.")
        and (window is None or longest <= window)
        and weight_bytes <= MAX_WEIGHT_BYTES
        and not (backbone.training and (values.get("attention_dropout") or values.get("attn_pdrop")))
        and not (backbone.training and backbone.is_activation_checkpointing)  # recomputation would run padded
    )


def full_mask(backbone: PreTrainedModel, seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`seen`, a mask of `segment_mask`, as SDPA takes it, or as `dtype` that eager attention adds to the scores."""
    implementation = backbone.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"`attn_implementation` must be 'sdpa' or 'eager' for rows of several prompts, got {implementation!r}. "
            "Load the model with one of them, or pass one prompt per row."
        )
    if implementation == "sdpa":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


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

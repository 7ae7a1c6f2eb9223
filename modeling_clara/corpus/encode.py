"""Encodes memories for a corpus: fits a codec on a sample, and turns float32 memories into rows of bytes.

Decoding them is `codecs_clara.Codec`, which travels with every checkpoint.
"""

import numpy as np
import torch

from ..codecs_clara import OUTLIER_SHARE, Codec, check_codec

FLOAT16_MAX = 65504.0
# Between 0, the same step for every dimension, and 1, a step in proportion to its spread. Measured on SmolLM2-135M
# memories of Wikipedia paragraphs: recall@5 against float16 peaks around 0.75 (docs/experiments.md).
SPREAD_EXPONENT = 0.75
INT4_STEP = 0.335  # of a uniform 16-level quantiser of least squared error, in standard deviations of a Gaussian
WILD_NORM = 100.0  # times the median, above which a memory is left out of the sample
PRIOR_ROWS = 8  # the common spread counts as much as this many memories, so that a small sample gives no zero spread


def fit_codec(name: str, memory: torch.Tensor) -> Codec:
    """The codec of this name, with its state from a sample of (rows, n, H) memories, at least one."""
    check_codec(name)
    _, n, hidden = memory.shape
    if name == "float16":
        return Codec(name, n, hidden)
    memory = memory.float().cpu()
    norms = memory.flatten(1).norm(dim=1)
    memory = memory[norms <= WILD_NORM * norms.median()]  # one wild memory shall not spoil all others
    mean = memory.mean(0)
    variance = (memory - mean).square().mean(0)  # (n, H)
    prior = variance.mean() + memory.square().mean() / len(memory)
    variance = (len(memory) * variance + PRIOR_ROWS * prior) / (len(memory) + PRIOR_ROWS)
    outliers = variance.mean(0).topk(hidden // OUTLIER_SHARE).indices.sort().values
    weight = torch.where(variance > 0, variance.sqrt(), 1.0).clamp_min(1e-6) ** SPREAD_EXPONENT
    return Codec(name, n, hidden, {"mean": mean, "weight": weight, "outliers": outliers})


def encode(codec: Codec, memory: torch.Tensor) -> np.ndarray:
    """(rows, row_bytes) uint8 of (rows, n, H) memories; a ValueError names one that is not finite or does not fit."""
    codec.check_fitted()
    memory = memory.detach().float().cpu()
    if memory.shape[1:] != (codec.memory_size, codec.hidden_size):
        raise ValueError(
            f"`memory` must have the shape (rows, {codec.memory_size}, {codec.hidden_size}), got "
            f"{tuple(memory.shape)}. Compress with the largest `memory_size`."
        )
    broken = (~fits(codec, memory)).nonzero()
    if len(broken):
        limit = "beyond 65,504" if codec.name == "float16" else "too far from all others"
        raise ValueError(
            f"memory {int(broken[0])} must be finite and fit into {codec.name}, got a value that is {limit}. Train "
            "the compressor longer or take another codec."
        )
    if codec.name == "float16":
        parts = [memory.half().numpy().view(np.uint8)]
    else:
        values = (memory - codec.state["mean"]) / codec.state["weight"]
        parts = _round_to_int8(values) if codec.name == "int8" else _int4_parts(values, codec.state["outliers"])
    return np.concatenate(parts, axis=-1).reshape(len(memory), codec.row_bytes)


def fits(codec: Codec, memory: torch.Tensor) -> torch.Tensor:
    """(rows,) bool of (rows, n, H): which memories can be encoded without being cut off."""
    memory = memory.float()
    largest = {"float16": FLOAT16_MAX, "int8": 127 * FLOAT16_MAX, "int4": 8 * FLOAT16_MAX}[codec.name]
    if codec.state:
        memory = (memory - codec.state["mean"]) / codec.state["weight"]
    return (memory.abs() <= largest).flatten(1).all(-1)  # False for NaN


def _int4_parts(values: torch.Tensor, outliers: torch.Tensor) -> list[np.ndarray]:
    """Bytes of (rows, n, H) standardised values: both scales, the outliers with 8 bits, all others with 4."""
    half = values.shape[-1] // 2
    fine_scale, fine = _round_to_int8(values[..., outliers])
    rest = torch.ones(values.shape[-1], dtype=torch.bool)
    rest[outliers] = False
    ordinary = values[..., rest]
    step = (ordinary.square().mean(-1, keepdim=True).sqrt() * INT4_STEP).clamp_min(1e-30)
    levels = (ordinary / step).round().clamp(-8, 7)
    # the scale that fits these levels best, instead of the one that chose them
    scale = (ordinary * levels).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True).clamp_min(1)
    codes = torch.zeros(values.shape, dtype=torch.int8)
    codes[..., rest] = levels.to(torch.int8)
    packed = ((codes[..., :half] & 15) | (codes[..., half:] << 4)).numpy().view(np.uint8)
    padding = np.zeros((*packed.shape[:-1], len(outliers) % 2), np.uint8)
    return [_half_bytes(scale), fine_scale, fine, padding, packed]


def _round_to_int8(values: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of one float16 scale a vector, (..., 2), and of its codes in [-127, 127], (..., dimensions)."""
    if not values.shape[-1]:
        return _half_bytes(values.new_zeros(*values.shape[:-1], 1)), np.zeros(values.shape, np.uint8)
    # of the scale as it will be stored, rounded up, so that the largest value still has a code
    scale = (values.abs().amax(-1, keepdim=True) / 127).clamp(2**-24, FLOAT16_MAX)
    stored = scale.half().float()
    stored = torch.where(stored < scale, (scale * (1 + 2**-10)).half().float(), stored).clamp(2**-24, FLOAT16_MAX)
    codes = (values / stored).round().clamp(-127, 127).to(torch.int8)
    return _half_bytes(stored), codes.numpy().view(np.uint8)


def _half_bytes(scale: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(scale.clamp(0, FLOAT16_MAX).half().numpy()).view(np.uint8)

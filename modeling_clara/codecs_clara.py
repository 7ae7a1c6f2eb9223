"""Codecs of stored memories: float16, int8 and int4 rows of bytes, and back to float32.

Stands between the memories that a model computes and the rows of a compressed corpus. Pure tensors: it knows nothing
of files, documents or search.

A row holds the vectors of one memory one after another, so the first k vectors of a memory are the first bytes of its
row. Before they are rounded, int8 and int4 subtract the mean of every dimension, which all memories share and which is
most of their length, and divide by a power of its standard deviation. Both are fitted once, on a sample.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch

CODECS = ("float16", "int8", "int4")
FLOAT16_MAX = 65504.0
# Between 0, the same step for every dimension, and 1, a step in proportion to its spread. Measured on SmolLM2-135M
# memories of Wikipedia paragraphs: recall@5 against float16 peaks around 0.75 (recipes/LOG.md).
SPREAD_EXPONENT = 0.75
OUTLIER_SHARE = 32  # int4 keeps one dimension in 32, those of the largest spread, with 8 bits
INT4_STEP = 0.335  # of a uniform 16-level quantiser of least squared error, in standard deviations of a Gaussian
WILD_NORM = 100.0  # times the median, above which a memory is left out of the sample
PRIOR_ROWS = 8  # the common spread counts as much as this many memories, so that a small sample gives no zero spread


class Codec:
    """Memories <-> rows of bytes.

    Args:
        name: one of `CODECS`.
        memory_size: n, vectors of a memory.
        hidden_size: H, an even number.
        state: for int8 and int4 `mean` and `weight` (n, H) float32 and `outliers` (H / 32,) int64, see `fit`; None
            where nothing was fitted yet.

    Raises:
        ValueError: unknown name, or a state that does not fit.
    """

    def __init__(self, name: str, memory_size: int, hidden_size: int, state: Mapping[str, torch.Tensor] | None = None):
        check_codec(name)
        if hidden_size % 2:
            raise ValueError(f"`hidden_size` must be even, got {hidden_size}. Use another backbone.")
        self.name, self.memory_size, self.hidden_size = name, memory_size, hidden_size
        self.state = dict(state or {})
        n_outliers = hidden_size // OUTLIER_SHARE
        self.is_fitted = name == "float16" or bool(self.state)
        shapes = {"mean": (memory_size, hidden_size), "weight": (memory_size, hidden_size), "outliers": (n_outliers,)}
        expected = shapes if name != "float16" and self.is_fitted else {}
        found = {key: tuple(tensor.shape) for key, tensor in self.state.items()}
        if found != expected:
            raise ValueError(
                f"the state of codec {name} must have the shapes {expected}, got {found}. The file belongs to another "
                "corpus or is damaged: build the corpus again or copy the file again."
            )
        if expected:
            self._check_state()
        # bytes of one vector: scales in front, then the codes
        self.vector_bytes = {
            "float16": 2 * hidden_size,
            "int8": 2 + hidden_size,
            "int4": 4 + n_outliers + hidden_size // 2 + n_outliers % 2,
        }[name]

    def _check_state(self) -> None:
        mean, weight, outliers = (self.state[name] for name in ("mean", "weight", "outliers"))
        is_right = mean.dtype == weight.dtype == torch.float32 and outliers.dtype == torch.int64
        is_right = is_right and bool(mean.isfinite().all() and weight.isfinite().all() and (weight > 0).all())
        places = outliers.tolist()
        if not is_right or places != sorted(set(places)) or not all(0 <= place < self.hidden_size for place in places):
            raise ValueError(
                f"the state of codec {self.name} must have a finite float32 mean, a positive float32 weight and "
                "ascending int64 outliers. The file is damaged: copy it again."
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of one memory."""
        return self.memory_size * self.vector_bytes

    @property
    def key(self) -> str:
        """12 hex digits that name this state; "" for float16, which has none."""
        digest = hashlib.sha256(self.name.encode())
        for name in sorted(self.state):
            digest.update(self.state[name].numpy().tobytes())
        return digest.hexdigest()[:12] if self.state else ""

    @classmethod
    def fit(cls, name: str, memory: torch.Tensor) -> "Codec":
        """A codec whose state comes from a sample.

        Args:
            name: one of `CODECS`.
            memory: (rows, n, H) floating point, at least one row.
        """
        check_codec(name)
        _, n, hidden = memory.shape
        if name == "float16":
            return cls(name, n, hidden)
        memory = memory.float().cpu()
        norms = memory.flatten(1).norm(dim=1)
        memory = memory[norms <= WILD_NORM * norms.median()]  # one wild memory shall not spoil all others
        mean = memory.mean(0)
        variance = (memory - mean).square().mean(0)  # (n, H)
        prior = variance.mean() + memory.square().mean() / len(memory)
        variance = (len(memory) * variance + PRIOR_ROWS * prior) / (len(memory) + PRIOR_ROWS)
        outliers = variance.mean(0).topk(hidden // OUTLIER_SHARE).indices.sort().values
        weight = torch.where(variance > 0, variance.sqrt(), 1.0).clamp_min(1e-6) ** SPREAD_EXPONENT
        return cls(name, n, hidden, {"mean": mean, "weight": weight, "outliers": outliers})

    def encode(self, memory: torch.Tensor) -> np.ndarray:
        """Rows of bytes.

        Args:
            memory: (rows, n, H) floating point.

        Returns:
            (rows, row_bytes) uint8

        Raises:
            ValueError: naming the row that is not finite or beyond 65,504.
        """
        self._check_fitted()
        memory = memory.detach().float().cpu()
        if memory.shape[1:] != (self.memory_size, self.hidden_size):
            raise ValueError(
                f"`memory` must have the shape (rows, {self.memory_size}, {self.hidden_size}), got "
                f"{tuple(memory.shape)}. Compress with the largest `memory_size`."
            )
        broken = (~self.fits(memory)).nonzero()
        if len(broken):
            limit = "beyond 65,504" if self.name == "float16" else "too far from all others"
            raise ValueError(
                f"memory {int(broken[0])} must be finite and fit into {self.name}, got a value that is {limit}. Train "
                "the compressor longer or take another codec."
            )
        encoders = {"float16": self._encode_float16, "int8": self._encode_int8, "int4": self._encode_int4}
        return encoders[self.name](memory).reshape(len(memory), self.row_bytes)

    def fits(self, memory: torch.Tensor) -> torch.Tensor:
        """(rows,) bool of (rows, n, H): which memories can be encoded without being cut off."""
        memory = memory.float()
        largest = {"float16": FLOAT16_MAX, "int8": 127 * FLOAT16_MAX, "int4": 8 * FLOAT16_MAX}[self.name]
        if self.state:
            memory = (memory - self.state["mean"]) / self.state["weight"]
        return (memory.abs() <= largest).flatten(1).all(-1)  # False for NaN

    def decode(self, rows: np.ndarray, memory_size: int | None = None) -> torch.Tensor:
        """Memories of rows.

        Args:
            rows: (rows, bytes) uint8, at least the first `memory_size` vectors of each row.
            memory_size: k <= n; default n.

        Returns:
            (rows, k, H) float32

        Raises:
            ValueError: the rows are too short.
        """
        k = self.memory_size if memory_size is None else memory_size
        if not 1 <= k <= self.memory_size or rows.ndim != 2 or rows.shape[1] < k * self.vector_bytes:
            raise ValueError(
                f"`rows` must have the shape (rows, >= {k * self.vector_bytes}) for `memory_size` {k} of at most "
                f"{self.memory_size}, got {rows.shape}. Read whole rows."
            )
        self._check_fitted()
        rows = rows if rows.flags.writeable else rows.copy()  # torch warns of arrays that it cannot write to
        vectors = torch.from_numpy(rows)[:, : k * self.vector_bytes].unflatten(1, (k, self.vector_bytes))
        if self.name == "float16":
            return vectors.contiguous().view(torch.float16).float()
        mean, weight = self.state["mean"][:k], self.state["weight"][:k]
        if self.name == "int8":
            memory = vectors[..., 2:].view(torch.int8).float().mul_(_scales(vectors[..., :2]))
            return torch.addcmul(mean, memory, weight, out=memory)
        half, outliers = self.hidden_size // 2, self.state["outliers"]
        codes = vectors[..., -half:].view(torch.int8)
        memory = torch.empty(len(rows), k, self.hidden_size)
        memory[..., :half] = (codes << 4) >> 4  # arithmetic shifts: they keep the sign
        memory[..., half:] = codes >> 4
        memory.mul_(_scales(vectors[..., :2]))
        fine = vectors[..., 4 : 4 + len(outliers)].view(torch.int8).float()
        memory[..., outliers] = fine.mul_(_scales(vectors[..., 2:4]))
        return torch.addcmul(mean, memory, weight, out=memory)

    def _check_fitted(self) -> None:
        if not self.is_fitted:
            raise ValueError(f"a codec {self.name} must be fitted before it is used. Make it with `Codec.fit`.")

    def _encode_float16(self, memory: torch.Tensor) -> np.ndarray:
        return memory.half().numpy().view(np.uint8)

    def _encode_int8(self, memory: torch.Tensor) -> np.ndarray:
        scale, codes = _round_to_int8((memory - self.state["mean"]) / self.state["weight"])
        return np.concatenate([scale, codes], axis=-1)

    def _encode_int4(self, memory: torch.Tensor) -> np.ndarray:
        values = (memory - self.state["mean"]) / self.state["weight"]
        outliers, half = self.state["outliers"], self.hidden_size // 2
        fine_scale, fine = _round_to_int8(values[..., outliers])
        rest = torch.ones(self.hidden_size, dtype=torch.bool)
        rest[outliers] = False
        ordinary = values[..., rest]
        step = (ordinary.square().mean(-1, keepdim=True).sqrt() * INT4_STEP).clamp_min(1e-30)
        levels = (ordinary / step).round().clamp(-8, 7)
        # the scale that fits these levels best, in place of the one that chose them
        scale = (ordinary * levels).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True).clamp_min(1)
        codes = torch.zeros(values.shape, dtype=torch.int8)
        codes[..., rest] = levels.to(torch.int8)
        packed = ((codes[..., :half] & 15) | (codes[..., half:] << 4)).numpy().view(np.uint8)
        padding = np.zeros((*packed.shape[:-1], len(outliers) % 2), np.uint8)
        return np.concatenate([_half_bytes(scale), fine_scale, fine, padding, packed], axis=-1)


def check_codec(name) -> str:
    """Return `name`, or raise a ValueError that lists the codecs."""
    if name not in CODECS:
        raise ValueError(f"`codec` must be one of {', '.join(CODECS)}, got {name!r}. Choose one of them.")
    return name


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


def _scales(stored: torch.Tensor) -> torch.Tensor:
    """(rows, k, 1) float32 of (rows, k, 2) bytes."""
    return stored.contiguous().view(torch.float16).float()

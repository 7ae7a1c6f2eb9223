"""Decodes stored memories: float16, int8 and int4 rows of bytes become float32.

The first k vectors of a memory are the first bytes of its row. int8 and int4 store what remains after the mean of each
dimension is subtracted and a power of its standard deviation divided out; the installed package fits and encodes.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch

CODECS = ("float16", "int8", "int4")
OUTLIER_SHARE = 32  # int4 keeps one dimension in 32, those of the largest spread, with 8 bits


class Codec:
    """Rows of bytes -> memories; a ValueError if the name is unknown or a state does not fit.

    Args:
        name: one of `CODECS`.
        memory_size: n, vectors of a memory.
        hidden_size: H, an even number.
        state: for int8 and int4 `mean` and `weight` (n, H) float32 and `outliers` (H / 32,) int64; None if nothing
            was fitted yet.
    """

    def __init__(self, name: str, memory_size: int, hidden_size: int, state: Mapping[str, torch.Tensor] | None = None):
        check_codec(name)
        if hidden_size % 2:
            raise ValueError(f"`hidden_size` must be even, got {hidden_size}. Use another backbone.")
        self.name, self.memory_size, self.hidden_size = name, memory_size, hidden_size
        self.state = dict(state or {})
        self.is_fitted = name == "float16" or bool(self.state)
        n_outliers = hidden_size // OUTLIER_SHARE
        # bytes of one vector: scales in front, then the codes
        self.vector_bytes = {
            "float16": 2 * hidden_size,
            "int8": 2 + hidden_size,
            "int4": 4 + n_outliers + hidden_size // 2 + n_outliers % 2,
        }[name]
        self.row_bytes = memory_size * self.vector_bytes
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
    def key(self) -> str:
        """12 hex digits that name this state; "" for float16, which has none."""
        digest = hashlib.sha256(self.name.encode())
        for name in sorted(self.state):
            digest.update(self.state[name].numpy().tobytes())
        return digest.hexdigest()[:12] if self.state else ""

    def decode(self, rows: np.ndarray, memory_size: int | None = None) -> torch.Tensor:
        """(rows, k, H) float32 memories of rows.

        `rows` are (rows, bytes) uint8 with at least the first k = `memory_size` <= n vectors (default n), else it is a
        ValueError.
        """
        k = self.memory_size if memory_size is None else memory_size
        if not 1 <= k <= self.memory_size or rows.ndim != 2 or rows.shape[1] < k * self.vector_bytes:
            raise ValueError(
                f"`rows` must have the shape (rows, >= {k * self.vector_bytes}) for `memory_size` {k} of at most "
                f"{self.memory_size}, got {rows.shape}. Read whole rows."
            )
        self.check_fitted()
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

    def check_fitted(self) -> None:
        """Raise a ValueError if the codec has no state yet but needs one."""
        if not self.is_fitted:
            raise ValueError(f"a codec {self.name} must be fitted before it is used. Make it with `fit_codec`.")


def check_codec(name) -> str:
    """Return `name`, or raise a ValueError that lists the codecs."""
    if name not in CODECS:
        raise ValueError(f"`codec` must be one of {', '.join(CODECS)}, got {name!r}. Choose one of them.")
    return name


def _scales(stored: torch.Tensor) -> torch.Tensor:
    """(rows, k, 1) float32 of (rows, k, 2) bytes."""
    return stored.clone(memory_format=torch.contiguous_format).view(torch.float16).float()

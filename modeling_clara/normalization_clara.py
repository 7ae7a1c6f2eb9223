"""The space of memories: final-layer states with every channel shifted and scaled by numbers that were measured once.

Stands between the passes of `modeling_clara.py` and the pure functions of `memory_clara.py`. A model whose config has
no `memory_normalization` has the states themselves as memories, as in the paper. It knows nothing of roles or losses.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .configuration_clara import MEMORY_STATISTICS
from .memory_clara import memory_statistics, normalize_memory, read_windows, restore_states
from .text_clara import check_list


class NormalizationMixin:
    """The side of `CLaRaForRAG` that knows in which space memories are."""

    def as_memory(self, states: torch.Tensor) -> torch.Tensor:
        """Final-layer states (..., hidden) in the space of memories."""
        if not self.config.memory_normalization:
            return states
        return normalize_memory(states, self.memory_shift, self.memory_scale)

    def as_states(self, memory: torch.Tensor) -> torch.Tensor:
        """Memories (..., hidden) as the final-layer states that the LM head reads."""
        if not self.config.memory_normalization:
            return memory
        return restore_states(memory, self.memory_shift, self.memory_scale)

    def as_read(self, memory: torch.Tensor) -> torch.Tensor:
        """The rows (..., k, hidden) that the generator reads of memories (..., k, hidden)."""
        if self.config.memory_layout == "tokens":
            return memory
        return read_windows(memory, self.config.memory_sizes[0])

    def normalize_memories(self, documents: Sequence[str | Mapping], *, batch_size: int = 16) -> None:
        """Measure the memories of these documents and normalise all memories by that from now on.

        Every channel gets mean 0 and the standard deviation of the token embeddings, see `normalize_memory`. (What
        is measured of windows has their token embeddings in it, which are small beside the states.) For fresh
        adapters, before they train, and for a few hundred documents of the kind that will be compressed. Changes the
        fingerprint; the numbers are saved with the special rows.

        Args:
            documents: at least two, as `compress` takes them.
            batch_size: documents per pass.

        Raises:
            TypeError, ValueError: as `compress`, or there are fewer than two documents. Nothing is changed then.
        """
        if len(check_list(documents, "documents")) < 2:
            raise ValueError(f"`documents` must be at least 2 to measure a spread, got {len(documents)}. Pass more.")
        with self.lock:
            before, self.config.memory_normalization = self.config.memory_normalization, False
            try:
                states = self.as_read(self.compress(documents, batch_size=batch_size)).flatten(0, 1)
            finally:
                self.config.memory_normalization = before
            embeddings = self.get_input_embeddings()
            sample = embeddings.weight.detach()[:: max(1, len(embeddings.weight) // 8192)].float()
            spread = float(sample.std()) * float(getattr(embeddings, "scalar_embed_scale", 1.0))  # Gemma's scale
            for name, values in zip(MEMORY_STATISTICS, memory_statistics(states, spread), strict=True):
                parameter = nn.Parameter(values.to(self.memory_embeddings.device), requires_grad=False)
                self.register_parameter(name, parameter)
            self.config.memory_normalization = True

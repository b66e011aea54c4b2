"""Caches to compare with: sinks and window alone (StreamingLLM-style, Xiao et al. 2023), which is CSKV without its
latents."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer


class WindowOnlyLayer(DynamicLayer):
    """Keeps the first `sinks` and at least the last `window` tokens, with the rotation they were cached with; drops
    the rest."""

    def __init__(self, window: int = 32, sinks: int = 4, block_size: int = 32) -> None:
        super().__init__()
        self.window, self.sinks, self.block_size = window, sinks, block_size
        self.num_seen = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        keys, values = super().update(key_states, value_states)
        self.num_seen += key_states.shape[-2]
        dropped = max(0, (keys.shape[-2] - self.sinks - self.window) // self.block_size) * self.block_size
        if dropped:
            self.keys, self.values = (
                torch.cat([t[:, :, : self.sinks], t[:, :, self.sinks + dropped :]], dim=2) for t in (keys, values)
            )
        return keys, values

    def get_seq_length(self) -> int:
        return self.num_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = 0 if not self.is_initialized else self.keys.shape[-2]
        return (
            held + query_length,
            self.num_seen - held,
        )  # the last columns are the last tokens; all before are in the past


class WindowOnlyCache(Cache):
    """Not croppable and without padding: a baseline for measurements, not for use."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=WindowOnlyLayer)

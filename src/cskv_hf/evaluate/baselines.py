"""What to compare with: sinks and window alone (StreamingLLM-style, Xiao et al. 2023), which is CSKV without its
latents; and latents stored with the quantiser of the paper's published code."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from ..latents import PackedFormat
from ..tuner import sidecars


class WindowOnlyLayer(DynamicLayer):
    """Keeps the first `sinks` and at least the last `window` tokens, with the rotation they were cached with; drops
    the rest."""

    def __init__(self, window: int | Callable[[int], int] = 32, sinks: int = 4, block_size: int = 32) -> None:
        super().__init__()
        self.window, self.sinks, self.block_size = window, sinks, block_size
        self.num_seen = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        if callable(self.window):
            self.window = self.window(key_states.shape[-2])
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
        return held + query_length, self.num_seen - held  # the columns are the last tokens; others lie before them


class WindowOnlyCache(Cache):
    """Not croppable and without padding: a baseline for measurements, not for use.

    Args:
        window, sinks: tokens kept, the last and the first; `window` may be a function of the length of the prompt.
        block_size: tokens leave in blocks of this many.
    """

    pads = False  # of padded rows it would keep padding as sinks

    def __init__(self, window: int | Callable[[int], int] = 32, sinks: int = 4, block_size: int = 32) -> None:
        super().__init__(layer_class_to_replicate=functools.partial(WindowOnlyLayer, window, sinks, block_size))


@dataclass(frozen=True)
class ClampedFormat:
    """The paper's published quantiser as it is there: an integer zero point clamped to [0, 2^bits - 1].

    A baseline only. As there, it stores what it would read back, in the model's dtype; `bytes_per_token` are those of
    its packed counterpart.
    """

    packed: PackedFormat
    per_token: bool

    @property
    def rank(self) -> int:
        return self.packed.rank

    @property
    def block_size(self) -> int:
        return self.packed.block_size

    @property
    def levels(self) -> int:
        return 2 ** max(self.packed.layout.bits) - 1

    def store(self, latents: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        blocks = latents.unflatten(1, (latents.shape[1] // self.block_size, self.block_size))
        dim = 3 if self.per_token else 2
        low, high = blocks.amin(dim, keepdim=True), blocks.amax(dim, keepdim=True)
        scale = ((high - low) / self.levels).clamp_min(1e-8)
        zero = (-low / scale).round().clamp(0, self.levels)
        codes = (blocks / scale + zero).round().clamp(0, self.levels)
        return (((codes - zero) * scale).to(dtype),)

    def read(self, tensors: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
        return tensors[0].to(dtype).flatten(1, 2)

    def bytes_per_token(self, dtype: torch.dtype) -> float:
        return self.packed.bytes_per_token(dtype)


def clamp_formats(model: nn.Module) -> None:
    """Let the adapter in use store its packed latents with the paper's quantiser: keys per channel, values per
    token."""
    for sidecar in sidecars(model):
        keys, values = sidecar.formats[sidecar.adapter_in_use]
        sidecar.formats[sidecar.adapter_in_use] = ClampedFormat(keys, False), ClampedFormat(values, True)

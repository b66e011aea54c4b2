"""Bytes that a cache really holds after a prompt, counted on its tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import Cache


def held_nbytes(cache: Cache) -> int:
    """Bytes of the storages behind a cache's tensors: `nbytes` where the cache counts itself, else its layers' keys
    and values."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))


@torch.no_grad()
def cache_nbytes(model: nn.Module, make_cache: Callable[[], Cache], input_ids: torch.Tensor) -> int:
    """Bytes that a new cache holds after the prompt `input_ids` (batch, length)."""
    cache = make_cache()
    model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return held_nbytes(cache)

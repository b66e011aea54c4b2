"""Bytes that a cache really holds after a prompt, counted on its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..generation import CACHE_ARGUMENT


def held_nbytes(cache: Cache, dtype: torch.dtype | None = None) -> int:
    """Bytes of the tensors of a cache.

    Args:
        dtype: count keys, values and plain latents as a model of this dtype holds them, whatever it computes in here;
            codes, ranges and positions count as they are.
    """
    if hasattr(cache, "nbytes"):
        groups = [tensors for layer in cache.layers for tensors in layer.tensors().values()]
        held, rest = [t for tensors in groups for t in tensors], cache.tokens.nbytes
    else:
        layers = cache.layers
        held = [t for layer in layers for value in vars(layer).values() for t in _plain_tensors(value)]
        rest = 0
    if dtype is None:
        return rest + sum(t.untyped_storage().nbytes() for t in held)
    model_dtype = cache.layers[0].keys.dtype
    return rest + sum(t.numel() * (dtype.itemsize if t.dtype == model_dtype else t.itemsize) for t in held)


def _plain_tensors(value: Any) -> list[torch.Tensor]:
    """A tensor, the tensors that one of a quantised class is made of, or those in a tuple or dict of them."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple):
        return [t for part in value for t in _plain_tensors(part)]
    if not isinstance(value, torch.Tensor):
        return []
    if not hasattr(value, "__tensor_flatten__"):
        return [value]
    return [t for name in value.__tensor_flatten__()[0] for t in _plain_tensors(getattr(value, name))]


@torch.no_grad()
def cache_nbytes(
    model: nn.Module, make_cache: Callable[[], Cache], input_ids: torch.Tensor, dtype: torch.dtype | None = None
) -> int:
    """Bytes that a new cache holds after the prompt `input_ids` (batch, length); `dtype` as in [`held_nbytes`]."""
    cache = make_cache()
    model(input_ids=input_ids, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1)
    return held_nbytes(cache, dtype)

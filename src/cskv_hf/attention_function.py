"""The attention function that transformers calls: compressed attention on what a cache of ours hands over, the model's
own implementation on tensors.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import compressed_attention
from .handover import CompressedKV
from .static_tokens import StaticStep
from .step import Step, once

PREFIX = "cskv_"  # "cskv_sdpa": compressed attention on a compressed past, sdpa on anything else
_untraced_attention = torch.compiler.disable(compressed_attention)  # of a cache whose shapes change with every token


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | CompressedKV,
    value: torch.Tensor | CompressedKV,
    attention_mask: Any,
    *,
    base: str,
    scaling: float,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The registered attention function: compressed attention for a [`CompressedKV`], the `base` implementation for
    tensors.

    Returns:
        (batch, num_queries, num_attention_heads, head_dim), and attention weights only where the base implementation
        gives them: asking eager attention for them rebuilds all keys and values.
    """
    if isinstance(key, CompressedKV) and base == "eager" and kwargs.get("output_attentions"):
        key, value = key.materialize()
    if isinstance(key, CompressedKV):
        if sliding_window is None:  # Qwen2-MoE has it, and does not pass it
            sliding_window = getattr(module, "sliding_window", None)
        masks = column_masks(attention_mask, key.step, sliding_window, query.device)
        attend = compressed_attention if isinstance(key.step, StaticStep) else _untraced_attention
        return attend(query, key, scaling, *masks).transpose(1, 2), None
    function = base_attention(module, base)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:
        attention_mask = attention_mask[..., : key.shape[-2]]  # of a cache of fixed size that was empty
    if sliding_window is not None:
        kwargs["sliding_window"] = sliding_window
    if "flash" in base:
        module = _With(module, config=_With(module.config, _attn_implementation=base))
    return function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


class _With:
    """An object with an attribute replaced. Flash attention loads the kernel that its module's config names."""

    def __init__(self, original: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _original=original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def base_attention(module: nn.Module, base: str) -> Callable:
    """An attention implementation by its transformers name; eager is the model's own."""
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]


def register(base: str) -> str:
    """Register (once) the attention function that falls back to `base`, with base's own mask; returns its name."""
    name = PREFIX + base
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, functools.partial(attention_forward, base=base))
        if base in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def column_masks(
    attention_mask: Any, step: Step | StaticStep, sliding_window: int | None, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The masks of the exact and of the compressed columns, from whatever mask the model made over slots; made once
    for all layers that are given the same.

    Args:
        attention_mask: a 4-D tensor over slots (eager, sdpa, or given by the user), a 2-D padding mask (flash), or
            anything else (None, a flex BlockMask), which stands for causal attention over all real tokens.
        step: of the cache.
        sliding_window: of the layer; used where the mask is not 4-D.
    """
    if attention_mask is None and _sees_all(step, sliding_window):
        return None, None

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        return _column_masks(attention_mask, step, sliding_window, device)

    return once(step.memo, f"masks of {sliding_window} tokens on {device}", make, attention_mask)


def _column_masks(attention_mask, step: Step | StaticStep, sliding_window, device) -> tuple:
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:
        return tuple(
            _gather_columns(attention_mask, slots.to(device)) for slots in (step.exact_slots(), step.old_slots())
        )
    queries = step.start + torch.arange(step.num_new, device=device)[:, None]
    masks = []
    for slots in (step.exact_slots().to(device), step.old_slots().to(device)):
        visible = (slots[:, None] <= queries) & (slots[:, None] >= 0)  # (batch or 1, num_queries, columns)
        if sliding_window is not None:
            visible &= slots[:, None] > queries - sliding_window
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            real = attention_mask.to(device).bool()
            visible = visible & real.gather(1, slots.clamp_min(0).expand(real.shape[0], -1))[:, None]
        masks.append(visible[:, None])
    return tuple(masks)


def _sees_all(step: Step | StaticStep, sliding_window: int | None) -> bool:
    """Whether a causal query sees all that is held."""
    within = sliding_window is None or step.num_slots <= sliding_window
    return step.num_new == 1 and step.slots is None and within


def _gather_columns(mask: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Columns of a 4-D mask over slots at `slots` (batch or 1, n); columns that hold nothing (-1) are masked out."""
    rows = max(mask.shape[0], slots.shape[0])
    index = slots.clamp_min(0).expand(rows, -1)[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
    columns = mask.expand(rows, -1, -1, -1).gather(3, index)
    empty = (slots < 0)[:, None, None, :]
    return columns & ~empty if mask.dtype == torch.bool else columns.masked_fill(empty, torch.finfo(mask.dtype).min)


for _base in ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"):
    register(_base)  # at import, so that an unpickled model finds its function

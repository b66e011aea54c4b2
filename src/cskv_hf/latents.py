"""The latents of one layer's keys or values, stored in whole blocks of tokens, as they are or packed in few bits.

Both ways of storing have the same three methods, so that the cache does not know which it holds: `store` turns
latents into tensors whose second dimension counts blocks, `read` turns such tensors back, `bytes_per_token` says what
they cost. Everything that happens to a cache (grow, crop, reorder, copy) moves whole blocks and changes no bit of
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .quantize import PackedLayout, dequantize, quantize
from .tokens import Index, take


@dataclass(frozen=True)
class PlainFormat:
    """Latents in the dtype of the model."""

    rank: int
    block_size: int = 32

    def store(self, latents: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """(batch, tokens, rank), tokens a multiple of `block_size` -> ((batch, blocks, block_size, rank),)."""
        return (latents.to(dtype).unflatten(1, (latents.shape[1] // self.block_size, self.block_size)),)

    def read(self, tensors: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
        """Undo [`store`], in `dtype`."""
        return tensors[0].to(dtype).flatten(1, 2)

    def bytes_per_token(self, dtype: torch.dtype) -> float:
        return self.rank * dtype.itemsize


@dataclass(frozen=True)
class PackedFormat:
    """Latents quantised and packed as `layout` says; see quantize.py."""

    layout: PackedLayout

    @property
    def rank(self) -> int:
        return self.layout.rank

    @property
    def block_size(self) -> int:
        return self.layout.block_size

    def store(self, latents: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """(batch, tokens, rank) -> codes and ranges, see [`quantize`]; computed in float32 or wider."""
        return quantize(latents.to(torch.promote_types(latents.dtype, torch.float32)), self.layout)

    def read(self, tensors: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
        """Undo [`store`] to rounding; in float32 or wider, then in `dtype`."""
        wide = torch.promote_types(dtype, torch.float32)
        return dequantize(*tensors, self.layout, wide).to(dtype)

    def bytes_per_token(self, dtype: torch.dtype) -> float:
        return self.layout.bytes_per_token


LatentFormat = PlainFormat | PackedFormat


class Latents:
    """What is stored, and the moves of a cache.

    Attributes:
        format: how latents become tensors.
        tensors: each (batch, blocks, ...).
    """

    def __init__(self, format: LatentFormat, tensors: tuple[torch.Tensor, ...]) -> None:
        self.format, self.tensors = format, tensors

    @classmethod
    def of(cls, format: LatentFormat, latents: torch.Tensor, dtype: torch.dtype) -> Latents:
        """Store latents (batch, tokens, rank); tokens is a multiple of the block size, and may be 0; `dtype` is
        the model's."""
        return cls(format, format.store(latents, dtype))

    @property
    def num_blocks(self) -> int:
        return self.tensors[0].shape[1]

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.format.block_size

    def read(self, first_block: int, last_block: int, dtype: torch.dtype) -> torch.Tensor:
        """Blocks ``first_block`` to ``last_block`` (exclusive) as latents (batch, tokens, rank) in `dtype`."""
        return self.format.read(tuple(t[:, first_block:last_block] for t in self.tensors), dtype)

    def _with(self, tensors: Any) -> Latents:
        return Latents(self.format, tuple(tensors))

    def append(self, others: Latents) -> Latents:
        return self._with(torch.cat([mine, more], dim=1) for mine, more in zip(self.tensors, others.tensors))

    def take(self, blocks: Index) -> Latents:
        """The given blocks: a slice, or (batch, n) indices with -1 for "anything"."""
        return self._with(take(t, blocks, 1) for t in self.tensors)

    def select_rows(self, rows: torch.Tensor) -> Latents:
        return self._with(t.index_select(0, rows.to(t.device)) for t in self.tensors)

    def to(self, device: Any, non_blocking: bool = False) -> Latents:
        return self._with(t.to(device, non_blocking=non_blocking) for t in self.tensors)

"""The latents of one layer's keys or values, stored in whole blocks of tokens, as they are or packed in few bits.

Both ways of storing have the same three methods, so that the cache does not know which it holds: `store` turns
latents into tensors whose second dimension counts blocks, `read` turns such tensors back, `bytes_per_token` says what
they cost. Everything that happens to a cache (grow, crop, reorder, copy) moves whole blocks and changes no bit of
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import kernels
from .model_shape import PLAIN_BITS
from .quantize import PackedLayout, dequantize, quantize
from .step import Index, take


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

    @property
    def channel_bits(self) -> tuple[int, ...]:
        """Of every channel, in a 16-bit model."""
        return (PLAIN_BITS,) * self.rank


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

    @property
    def channel_bits(self) -> tuple[int, ...]:
        """Of every channel."""
        return self.layout.bits

    def store(self, latents: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """(batch, tokens, rank) -> codes and ranges, see [`quantize`]; computed in float32 or wider."""
        if latents.shape[-1] != self.rank or latents.shape[1] % self.block_size:
            raise ValueError(
                f"Latents of shape {tuple(latents.shape)} cannot be packed: {self.rank} channels have bits, and a "
                f"block has {self.block_size} tokens."
            )
        wide = latents.to(torch.promote_types(latents.dtype, torch.float32))
        return (kernels.quantizer(wide, self.layout) or quantize)(wide, self.layout)

    def read(self, tensors: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
        """Undo [`store`] to rounding; in float32 or wider, then in `dtype`."""
        wide = torch.promote_types(dtype, torch.float32)
        return dequantize(*tensors, self.layout, wide).to(dtype)

    def bytes_per_token(self, dtype: torch.dtype) -> float:
        return self.layout.bytes_per_token


LatentFormat = PlainFormat | PackedFormat


SEGMENT_BLOCKS = 64  # on a CPU; 2,048 tokens of 32


class Latents:
    """What is stored, and the moves of a cache.

    On a CPU latents grow in segments: a new block is joined to the last few only. Were all joined into one tensor,
    every layer would leave a hole behind that is a little too small for the next, and the process would hold the cache
    twice. On a GPU there is one segment, for the kernels.

    Attributes:
        format: how latents become tensors.
        segments: each the format's tensors, (batch, blocks of the segment, ...).
    """

    def __init__(self, format: LatentFormat, *segments: tuple[torch.Tensor, ...]) -> None:
        self.format, self.segments = format, segments

    @classmethod
    def of(cls, format: LatentFormat, latents: torch.Tensor, dtype: torch.dtype) -> Latents:
        """Store latents (batch, tokens, rank); tokens is a multiple of the block size, and may be 0; `dtype` is
        the model's."""
        return cls(format, format.store(latents, dtype))

    @property
    def held(self) -> tuple[torch.Tensor, ...]:
        """Every tensor."""
        return tuple(t for segment in self.segments for t in segment)

    @property
    def device(self) -> torch.device:
        return self.segments[0][0].device

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The format's tensors, each (batch, num_blocks, ...); copies if there are several segments."""
        if len(self.segments) == 1:
            return self.segments[0]
        return tuple(torch.cat(parts, dim=1) for parts in zip(*self.segments))

    @property
    def num_blocks(self) -> int:
        return sum(segment[0].shape[1] for segment in self.segments)

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.format.block_size

    def spans(self, blocks: int) -> Iterator[tuple[int, int]]:
        """First and last block (exclusive) of pieces of at most `blocks`, none across two segments."""
        start = 0
        for segment in self.segments:
            end = start + segment[0].shape[1]
            for first in range(start, end, blocks):
                yield first, min(first + blocks, end)
            start = end

    def read(self, first_block: int, last_block: int, dtype: torch.dtype) -> torch.Tensor:
        """Blocks ``first_block`` to ``last_block`` (exclusive) as latents (batch, tokens, rank) in `dtype`."""
        parts, start = [], 0
        for segment in self.segments:
            end = start + segment[0].shape[1]
            if max(first_block, start) < min(last_block, end) or len(self.segments) == 1:
                blocks = slice(max(first_block - start, 0), last_block - start)
                parts.append(self.format.read(tuple(t[:, blocks] for t in segment), dtype))
            start = end
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _map(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Latents:
        return Latents(self.format, *(tuple(move(t) for t in segment) for segment in self.segments))

    def append(self, others: Latents) -> Latents:
        *before, last = self.segments
        (new,) = others.segments
        blocks = last[0].shape[1] + new[0].shape[1]
        if last[0].device.type == "cpu" and blocks > SEGMENT_BLOCKS and last[0].shape[1]:
            return Latents(self.format, *before, last, new)
        return Latents(self.format, *before, tuple(torch.cat(pair, dim=1) for pair in zip(last, new)))

    def drop(self, blocks: int) -> Latents:
        """Without the first `blocks`; segments after them stay as they are."""
        segments = list(self.segments)
        while len(segments) > 1 and segments[0][0].shape[1] <= blocks:
            blocks -= segments.pop(0)[0].shape[1]
        if blocks:
            segments[0] = tuple(take(t, slice(blocks, None), 1) for t in segments[0])
        return Latents(self.format, *segments)

    def take(self, blocks: Index) -> Latents:
        """The given blocks: a slice, or (batch, n) indices with -1 for "anything"."""
        return Latents(self.format, tuple(take(t, blocks, 1) for t in self.tensors))

    def select_rows(self, rows: torch.Tensor) -> Latents:
        return self._map(lambda t: t.index_select(0, rows.to(t.device)))

    def to(self, device: Any, non_blocking: bool = False) -> Latents:
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def on(self, device: torch.device) -> Latents:
        """A copy on another device, [`joined`]; themselves if they lie there."""
        return self if self.device == device else self.joined(device)

    def joined(self, device: torch.device) -> Latents:
        """A copy in one segment on `device`; page-locked ones are still on their way when this returns."""
        whole = tuple(t.new_empty(len(t), self.num_blocks, *t.shape[2:], device=device) for t in self.segments[0])
        start = 0
        for segment in self.segments:
            end = start + segment[0].shape[1]
            for target, t in zip(whole, segment):
                target[:, start:end].copy_(t, non_blocking=True)
            start = end
        return Latents(self.format, whole)

    def pinned(self) -> Latents:
        """In memory that a GPU reads on its own; for latents on the CPU."""
        return self._map(lambda t: t if t.is_pinned() or not t.numel() else t.pin_memory())

"""Latents and masks as the kernels of a GPU take them: tensors, numbers, and constants that they are compiled for.

A compiler calls the kernels as operations, whose arguments are tensors and numbers. So a format of latents is
described by numbers: bits of every channel (none of plain ones), their number, and the tokens of a block, and tokens
and channels of a range.
"""

from __future__ import annotations

import functools

import torch
import triton

from ..latents import LatentFormat, Latents, PackedFormat, PlainFormat
from ..quantize import PackedLayout
from .triton_kernels import score_kernel

INTERPRETED = not isinstance(score_kernel, triton.JITFunction)


def stored(latents: Latents) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and ranges; plain latents stand for both."""
    tensors = latents.tensors
    return tensors[0], tensors[-1]


def description(format: LatentFormat) -> tuple[tuple[int, ...], int, tuple[int, int, int]]:
    """A format as numbers, which [`format_of`] turns back into it."""
    if not isinstance(format, PackedFormat):
        return (), format.rank, (format.block_size, 1, 1)
    layout = format.layout
    return layout.bits, layout.rank, (layout.block_size, layout.group_tokens, layout.group_channels)


@functools.cache
def format_of(
    bits: tuple[int, ...], rank: int, block_size: int, group_tokens: int, group_channels: int
) -> LatentFormat:
    if not bits:
        return PlainFormat(rank, block_size)
    return PackedFormat(PackedLayout(bits, block_size, group_tokens, group_channels))


def in_words(*formats: LatentFormat) -> bool:
    """Whether all these latents can be read word by word: a channel has one range in a block."""
    layouts = [format.layout for format in formats if isinstance(format, PackedFormat)]
    return len(layouts) == len(formats) and all(
        layout.block_size in (32, 64) and layout.group_tokens == layout.block_size for layout in layouts
    )


def storage(format: LatentFormat, words: bool) -> tuple[int, ...]:
    """How latents are stored, as the kernels are compiled for it, see triton_latents.py."""
    if not isinstance(format, PackedFormat):
        return False, words, 0, format.block_size, 1, 1, False
    layout = format.layout
    kinds = functools.reduce(int.__or__, layout.bits)
    kinds = kinds if kinds == 4 else 7 if kinds < 8 else 15  # for few ways of compiling
    nvidia = kinds == 4 and torch.version.hip is None and not INTERPRETED  # of no use with several planes
    return True, words, kinds, layout.block_size, layout.group_channels, layout.group_tokens, nvidia


def block_sizes(format: LatentFormat) -> tuple[int, int]:
    """Bytes of codes and number of ranges of a block."""
    if not isinstance(format, PackedFormat):
        return 0, 0
    return format.layout.code_bytes, format.layout.num_ranges


def codes_of(data: torch.Tensor, words: bool) -> torch.Tensor:
    return data.contiguous().view(torch.int32) if words else data.contiguous()


def as_pairs(ranges: torch.Tensor) -> torch.Tensor:
    """Minimum and step, 16 bits each, as one number; plain latents have none."""
    return ranges.contiguous().view(torch.int32) if ranges.dtype == torch.float16 and ranges.shape[-1] == 2 else ranges


def mask_argument(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    if mask is None:
        return like  # never read
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def mask_kind(mask: torch.Tensor | None) -> int:
    return 0 if mask is None else 1 if mask.dtype == torch.bool else 2


def mask_rows(mask: torch.Tensor | None) -> int:
    return 1 if mask is None else mask.shape[2]


def mask_strides(mask: torch.Tensor | None) -> tuple[int, int]:
    """From row to row of the batch, and from query to query."""
    if mask is None:
        return 0, 0
    return tuple(mask.stride(d) if mask.shape[d] > 1 else 0 for d in (0, 2))

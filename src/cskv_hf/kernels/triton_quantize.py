"""Latents in few bits on a GPU: `quantize` of quantize.py, bit for bit, in two kernels for hundreds of short ones.

The first finds the range of every group and the codes, the second packs the codes of every bit plane. Tables say
which channels belong together; they are made once for a layout and a device.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..quantize import PLANES, PackedLayout, rows_together
from .sizes import cdiv, power_of_2

CHANNELS = 64  # of a program that quantises, at least
UNITS = 256  # words or bytes of a program that packs
UNROLLED = tl.constexpr(8)  # tokens that are read at once
LARGEST = 2**10  # channels of a group; larger ones are left to torch
LIMIT = tl.constexpr(65504.0)  # of float16
TO_INTEGER = tl.constexpr(12582912.0)  # added and taken off again: rounds to the nearest, to even


class Tables(NamedTuple):
    """Which channels of a layout belong together, as tables on a device.

    Attributes:
        groups: int32 (groups, 8): first channel, channels, bits, range of the group in a block, ranges from one group
            of tokens to the next; channels in the order of the tiers.
        order: int32 (rank,), the latents' channels in that order.
        planes: int32 (planes, 8): bits of the plane, bits below it, first channel, channels, first word (or byte, if
            rows make no words) in a block, and words of a channel.
        most_units: words of the largest plane.
    """

    groups: torch.Tensor
    order: torch.Tensor
    planes: torch.Tensor
    most_units: int


def serves(layout: PackedLayout) -> bool:
    return _channels(layout) <= LARGEST


def quantize(latents: torch.Tensor, layout: PackedLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise and pack whole blocks.

    Args:
        latents: (batch, tokens, rank) float32, tokens a multiple of ``layout.block_size``.

    Returns:
        As `quantize` of quantize.py.
    """
    batch, blocks = latents.shape[0], latents.shape[1] // layout.block_size
    packed = torch.empty(batch, blocks, layout.code_bytes, dtype=torch.uint8, device=latents.device)
    ranges = torch.empty(batch, blocks, layout.num_ranges, 2, dtype=torch.float16, device=latents.device)
    if batch * blocks:
        quantize_into(packed, ranges, latents, layout)
    return packed, ranges


def quantize_into(
    packed: torch.Tensor,
    ranges: torch.Tensor,
    latents: torch.Tensor,
    layout: PackedLayout,
    target: torch.Tensor | None = None,
) -> None:
    """[`quantize`] into tensors that are there.

    Args:
        packed, ranges: as `quantize` returns them.
        target: (blocks,) int64, for every block of `latents` the one that it is written to, both counted over all
            rows; -1 leaves it out. None has each at its own place.
    """
    blocks = latents.shape[0] * latents.shape[1] // layout.block_size
    codes = torch.empty(blocks, layout.block_size, layout.rank, dtype=torch.uint8, device=latents.device)
    tables, words = tables_of(layout, latents.device), rows_together(layout.block_size) == 4
    channels = power_of_2(layout.group_channels)
    together = _channels(layout)
    times = layout.block_size // layout.group_tokens
    with torch.cuda.device(latents.device) if latents.is_cuda else contextlib.nullcontext():  # where Triton launches
        told = codes if target is None else target, target is not None
        quantize_kernel[blocks, cdiv(len(tables.groups) * channels, together), times](
            latents.contiguous(), tables.groups, tables.order, codes, ranges, told[0], len(tables.groups), layout.rank,
            layout.num_ranges, BLOCK=layout.block_size, GROUP_TOKENS=layout.group_tokens,
            GROUP_CHANNELS=channels, CHANNELS=together, TOLD=told[1], num_warps=min(8, together // 32),
            enable_fp_fusion=False,
        )  # fmt: skip
        pack_kernel[blocks, cdiv(tables.most_units, UNITS), len(tables.planes)](
            codes, tables.planes, packed.view(torch.int32) if words else packed, told[0], layout.rank,
            layout.code_bytes // rows_together(layout.block_size),
            BLOCK=layout.block_size, TOGETHER=rows_together(layout.block_size), UNITS=UNITS, TOLD=told[1],
            enable_fp_fusion=False,
        )  # fmt: skip


def quantize_as_operation(latents: torch.Tensor, layout: PackedLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """[`quantize`] for a compiler, which calls it and does not look into it: a graph of hundreds of nodes less."""
    sizes = layout.block_size, layout.group_tokens, layout.group_channels
    return gpu_quantize(latents, layout.bits, *sizes)


@torch.library.custom_op("cskv_hf::gpu_quantize", mutates_args=())
def gpu_quantize(
    latents: torch.Tensor, bits: Sequence[int], block_size: int, group_tokens: int, group_channels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize(latents, _layout(tuple(bits), block_size, group_tokens, group_channels))


@gpu_quantize.register_fake
def _(latents, bits, *sizes):
    layout = PackedLayout(tuple(bits), *sizes)
    shape = latents.shape[0], latents.shape[1] // layout.block_size
    codes = latents.new_empty(*shape, layout.code_bytes, dtype=torch.uint8)
    return codes, latents.new_empty(*shape, layout.num_ranges, 2, dtype=torch.float16)


@functools.cache
def _layout(*fields) -> PackedLayout:
    return PackedLayout(*fields)


def _channels(layout: PackedLayout) -> int:
    """Of a program, whole groups."""
    return max(CHANNELS, power_of_2(layout.group_channels))


@functools.cache
def tables_of(layout: PackedLayout, device: torch.device) -> Tables:
    groups, order, planes, most_units = [], [], [], 1
    unit = rows_together(layout.block_size)
    for tier in layout.tiers:
        first, width = len(order), len(tier.channels)
        for group in range(tier.num_groups):
            start = group * layout.group_channels
            count = min(layout.group_channels, width - start)
            groups.append((first + start, count, tier.bits, tier.first_range + group, tier.num_groups, 0, 0, 0))
        at, below = tier.first_byte // unit, 0
        for bits in PLANES[tier.bits]:
            units = layout.block_size * bits // 8 // unit
            planes.append((bits, below, first, width, at, units, 0, 0))
            at, below, most_units = at + units * width, below + bits, max(most_units, units * width)
        order += tier.channels

    def table(rows: list) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int32, device=device)

    return Tables(table(groups), table(order), table(planes), most_units)


@triton.jit(do_not_specialize=("num_groups", "rank", "num_ranges"))
def quantize_kernel(
    latents, groups, order, codes, ranges, target, num_groups, rank, num_ranges, BLOCK: tl.constexpr,
    GROUP_TOKENS: tl.constexpr, GROUP_CHANNELS: tl.constexpr, CHANNELS: tl.constexpr, TOLD: tl.constexpr,
):  # fmt: skip
    """Ranges and codes (block, BLOCK, rank) of some groups of channels, one group of tokens of one block.

    Token by token, a channel in each thread, and so twice: of tokens and channels at once, whose order it cannot know,
    a compiler may have neighbouring threads read numbers that are far from each other.

    Args:
        TOLD: whether `target` says where blocks go.
    """
    GROUPS: tl.constexpr = CHANNELS // GROUP_CHANNELS
    block, time = tl.program_id(0).to(tl.int64), tl.program_id(2)
    to = tl.load(target + block) if TOLD else block
    if to < 0:
        return
    own = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    group = tl.program_id(1) * GROUPS + tl.arange(0, CHANNELS) // GROUP_CHANNELS
    at = groups + 8 * tl.minimum(group, num_groups - 1)
    count, within = tl.load(at + 1), tl.arange(0, CHANNELS) % GROUP_CHANNELS
    channel = tl.load(at) + tl.minimum(within, count - 1)  # those that are not there change no range
    first = (block * BLOCK + time * GROUP_TOKENS) * rank
    latent_at = latents + first + tl.load(order + channel)

    x = tl.load(latent_at)
    low, high, unknown = x, x, _is_nan(x)
    for token in tl.range(1, GROUP_TOKENS, loop_unroll_factor=UNROLLED):
        x = tl.load(latent_at + token * rank)
        low, high, unknown = tl.minimum(low, x), tl.maximum(high, x), unknown | _is_nan(x)
    low = tl.min(low.reshape(GROUPS, GROUP_CHANNELS), 1)
    high = tl.max(high.reshape(GROUPS, GROUP_CHANNELS), 1)
    unknown = tl.max(unknown.reshape(GROUPS, GROUP_CHANNELS), 1) != 0
    low, high = tl.where(unknown, float("nan"), low), tl.where(unknown, float("nan"), high)
    at = groups + 8 * tl.minimum(own, num_groups - 1)
    highest = (1 << tl.load(at + 2)) - 1
    minimum = _half_below(_clamped(low))
    step = _half_above(tl.div_rn(_clamped(high) - minimum, highest.to(tl.float32)))
    step = tl.where(step > LIMIT, LIMIT, step)
    range_at = ranges + 2 * (to * num_ranges + tl.load(at + 3) + time * tl.load(at + 4))
    tl.store(range_at, minimum.to(tl.float16), mask=own < num_groups)
    tl.store(range_at + 1, step.to(tl.float16), mask=own < num_groups)

    minimum, highest = _of_channels(minimum, GROUP_CHANNELS), _of_channels(highest, GROUP_CHANNELS).to(tl.float32)
    divisor = _of_channels(tl.where(step == 0, 1.0, step), GROUP_CHANNELS)
    there = (group < num_groups) & (within < count)
    for token in tl.range(0, GROUP_TOKENS, loop_unroll_factor=UNROLLED):
        level = tl.div_rn(tl.load(latent_at + token * rank) - minimum, divisor)
        level = tl.where(level > 0, tl.minimum(level, highest), 0.0)
        code = ((level + TO_INTEGER) - TO_INTEGER).to(tl.int32).to(tl.uint8)
        tl.store(codes + first + token * rank + channel, code, mask=there)


@triton.jit(do_not_specialize=("rank", "block_units"))
def pack_kernel(
    codes, planes, packed, target, rank, block_units, BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
    UNITS: tl.constexpr, TOLD: tl.constexpr,
):  # fmt: skip
    """Words, or bytes where TOGETHER is 1, of one plane of one block; as `pack` of quantize.py. `TOLD` as above."""
    block, at = tl.program_id(0).to(tl.int64), planes + 8 * tl.program_id(2)
    to = tl.load(target + block) if TOLD else block
    if to < 0:
        return
    bits, below, first, width = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    start, units = tl.load(at + 4), tl.load(at + 5)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    there = unit < units * width
    row, channel = unit // width * TOGETHER, first + unit % width
    packed_unit = tl.zeros([UNITS], dtype=tl.int32)
    for i in range(TOGETHER * 8 // bits):
        byte, place = i % TOGETHER, i // TOGETHER
        token = block * BLOCK + row + byte + place * (units * TOGETHER)
        code = tl.load(codes + token * rank + channel, mask=there, other=0).to(tl.int32)
        packed_unit |= (code >> below & (1 << bits) - 1) << (8 * byte + bits * place)
    tl.store(packed + to * block_units + start + unit, packed_unit.to(packed.dtype.element_ty), mask=there)


@triton.jit
def _is_nan(x):
    """1 or 0. A compiler may take numbers to be none where it is asked in floating point."""
    return ((x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) > 0x7F800000).to(tl.int32)


@triton.jit
def _of_channels(x, GROUP_CHANNELS: tl.constexpr):
    """Of every group to all its channels."""
    return tl.broadcast_to(x[:, None], (x.shape[0], GROUP_CHANNELS)).reshape(x.shape[0] * GROUP_CHANNELS)


@triton.jit
def _clamped(x):
    """To what float16 holds; NaN stays."""
    return tl.where(x > LIMIT, LIMIT, tl.where(x < -LIMIT, -LIMIT, x))


@triton.jit
def _half_below(x):
    """The nearest float16 that is not above x."""
    inner, outer = _neighbours(x)
    small = tl.floor(x * 16777216.0) * 5.960464477539063e-08  # 2^24 and back: multiples of the smallest
    return tl.where(tl.abs(x) < 6.103515625e-05, small, tl.where(inner > x, outer, inner))


@triton.jit
def _half_above(x):
    """The nearest float16 that is not below x."""
    inner, outer = _neighbours(x)
    small = tl.ceil(x * 16777216.0) * 5.960464477539063e-08
    return tl.where(tl.abs(x) < 6.103515625e-05, small, tl.where(inner < x, outer, inner))


@triton.jit
def _neighbours(x):
    """x cut to the bits that float16 has room for, and the next number of so many bits away from zero."""
    cut = x.to(tl.int32, bitcast=True) & -8192
    return cut.to(tl.float32, bitcast=True), (cut + 8192).to(tl.float32, bitcast=True)

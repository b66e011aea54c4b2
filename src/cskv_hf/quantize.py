"""Latents in few bits: group-wise min-offset quantisation and real packing into uint8. Pure functions of tensors.

A block of `block_size` tokens is quantised and packed at once, when it leaves the window. Every channel has its own
number of bits (reverse water-filling, see allocate.py); channels with the same number form a *tier*. A *group* is
`group_tokens` tokens by `group_channels` channels of one tier that share a minimum and a step, both 16-bit floats:
``x ≈ minimum + step * code``. The minimum is a float, not an integer zero point, because latents may lie far from
zero. Codes of 3, 5, 6 and 7 bits are split into bit planes of 4, 2 and 1 bits, so that no code crosses a byte.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

MAX_BITS = 8
RANGE_BYTES = 4  # of a group: minimum and step
RANGE_DTYPE = torch.float16
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


@dataclass(frozen=True)
class Tier:
    """Channels stored in the same number of bits.

    Attributes:
        bits: of a code.
        channels: indices of the latents' channels.
        num_groups: groups of channels; the last may be smaller.
        runs: the channels as slices (start, stop).
        first_byte, first_range: where its codes and its ranges begin in a block.
    """

    bits: int
    channels: tuple[int, ...]
    num_groups: int
    runs: tuple[tuple[int, int], ...]
    first_byte: int
    first_range: int


def _runs(numbers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Numbers as slices (start, stop) that give them in their order."""
    starts = [i for i, number in enumerate(numbers) if i == 0 or number != numbers[i - 1] + 1]
    return tuple((numbers[a], numbers[b - 1] + 1) for a, b in zip(starts, [*starts[1:], len(numbers)]))


def _remembered(function: Callable) -> Callable:
    """`functools.cache`, which a compiler goes around: it wants to see what is computed."""
    cached = functools.cache(function)

    @functools.wraps(function)
    def remembering(*args: Any) -> torch.Tensor:
        return (function if torch.compiler.is_compiling() else cached)(*args)

    return remembering


@dataclass(frozen=True)
class PackedLayout:
    """How a block of latents is laid out in bytes.

    Attributes:
        bits: of every channel, 1 to 8.
        block_size: tokens of a block, a multiple of 8.
        group_tokens: tokens that share a range, a divisor of `block_size`.
        group_channels: channels of a tier that share a range.
        tiers: by falling bits.
        pieces: the channels in their own order as slices (start, stop) of the tiers' channels laid end to end.
        code_bytes: of a block, for one row.
        num_ranges: groups of a block, for one row.
    """

    bits: tuple[int, ...]
    block_size: int = 32
    group_tokens: int = 32
    group_channels: int = 1

    def __post_init__(self) -> None:
        wrong = [b for b in self.bits if b not in PLANES]
        if wrong:
            raise ValueError(f"Bits per channel must be 1 to {MAX_BITS}, got {wrong[0]}.")
        if self.block_size % 8 or self.block_size < 8:
            raise ValueError(f"`block_size` must be a multiple of 8 for packed latents, got {self.block_size}.")
        if not 1 <= self.group_tokens <= self.block_size or self.block_size % self.group_tokens:
            raise ValueError(
                f"`group_tokens` must be a divisor of block_size={self.block_size}, got {self.group_tokens}."
            )
        if self.group_channels < 1:
            raise ValueError(f"`group_channels` must be at least 1, got {self.group_channels}.")
        # attributes, not fields, which files would hold; nor cached properties, which a compiler cannot trace
        object.__setattr__(self, "tiers", self._tiers())
        object.__setattr__(self, "pieces", self._pieces())
        num_ranges = sum(tier.num_groups for tier in self.tiers) * (self.block_size // self.group_tokens)
        object.__setattr__(self, "code_bytes", sum(self.bits) * self.block_size // 8)
        object.__setattr__(self, "num_ranges", num_ranges)
        object.__setattr__(self, "_hash", hash((self.bits, self.block_size, self.group_tokens, self.group_channels)))

    def __hash__(self) -> int:
        return self._hash  # every layer of every step looks up what is kept of its layouts

    def _tiers(self) -> tuple[Tier, ...]:
        tiers, first_byte, first_range = [], 0, 0
        for bits in sorted(set(self.bits), reverse=True):
            channels = tuple(i for i, b in enumerate(self.bits) if b == bits)
            num_groups = -(-len(channels) // self.group_channels)
            tiers.append(Tier(bits, channels, num_groups, _runs(channels), first_byte, first_range))
            first_byte += len(channels) * bits * self.block_size // 8
            first_range += num_groups * (self.block_size // self.group_tokens)
        return tuple(tiers)

    def _pieces(self) -> tuple[tuple[int, int], ...]:
        stored = [c for tier in self.tiers for c in tier.channels]
        return _runs(sorted(range(len(stored)), key=stored.__getitem__))

    @property
    def rank(self) -> int:
        return len(self.bits)

    @property
    def bytes_per_token(self) -> float:
        """Codes and ranges."""
        return (self.code_bytes + RANGE_BYTES * self.num_ranges) / self.block_size


def rows_together(tokens: int) -> int:
    """How many bytes of a channel lie together in a plane of so many tokens: 4, a word, if that goes into every
    plane."""
    return 4 if tokens % 32 == 0 else 1


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes below ``2**bits``, (..., tokens, channels) uint8 -> (..., channels * tokens * bits / 8) uint8; tokens is a
    multiple of 8.

    A plane of p bits puts token ``j + i * tokens / n`` into the i-th place of row j, with n = 8 / p codes to a byte.
    Four rows lie together, of one channel after the other, so that whatever unpacks reads words, and walks along many
    channels.
    """
    planes, shift = [], 0
    for width in PLANES[bits]:
        plane = (codes >> shift) & (2**width - 1)
        parts = plane.unflatten(-2, (8 // width, -1)).unbind(-3)
        packed = parts[0].clone()
        for place, part in enumerate(parts[1:], start=1):
            packed |= part << (place * width)
        words = packed.unflatten(-2, (-1, rows_together(codes.shape[-2]))).transpose(-1, -2)
        planes.append(words.flatten(-3))
        shift += width
    return planes[0] if len(planes) == 1 else torch.cat(planes, dim=-1)


def unpack(packed: torch.Tensor, bits: int, tokens: int) -> torch.Tensor:
    """Undo [`pack`]: (..., channels * tokens * bits / 8) -> (..., tokens, channels) uint8."""
    channels, together = packed.shape[-1] * 8 // (tokens * bits), rows_together(tokens)
    start, below, codes = 0, 0, None
    for width in PLANES[bits]:
        size = channels * tokens * width // 8
        words = packed[..., start : start + size].unflatten(-1, (-1, channels, together))
        plane = words.transpose(-1, -2).flatten(-3, -2)
        if width < 8:
            plane = ((plane.unsqueeze(-3) >> _places(width, packed.device)) & (2**width - 1)).flatten(-3, -2)
        codes = plane if codes is None else codes | (plane << below)
        start, below = start + size, below + width
    return codes


@_remembered
def _places(width: int, device: torch.device) -> torch.Tensor:
    """By how much to shift a byte for each of the codes of `width` bits in it, (8 / width, 1, 1)."""
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)[:, None, None]


def group_ranges(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimum and step of groups (..., size), as the 16-bit floats that are stored.

    Rounded outwards (minimum down, step up), so that no value lies more than half a step outside.
    """
    limit = torch.finfo(RANGE_DTYPE).max
    low, high = groups.amin(-1).clamp(-limit, limit), groups.amax(-1).clamp(-limit, limit)
    minimum = _to_half_grid(low, up=False)
    step = _to_half_grid((high - minimum) / (2**bits - 1), up=True).clamp_max(limit)
    return minimum.to(RANGE_DTYPE), step.to(RANGE_DTYPE)


def _to_half_grid(values: torch.Tensor, up: bool) -> torch.Tensor:
    """The nearest float16 that is not below (`up`) or not above each value, as float32 or float64.

    In integers, because a compiler keeps 16-bit floats in 32 bits between operations, unrounded.
    """
    kind, spare = {torch.float32: (torch.int32, 13), torch.float64: (torch.int64, 42)}[values.dtype]
    cut = values.view(kind) & -(1 << spare)  # bits that float16 has no room for
    inner, outer = cut.view(values.dtype), (cut + (1 << spare)).view(values.dtype)
    normal = torch.where(inner < values if up else inner > values, outer, inner)
    scaled = values * 2**24
    subnormal = (scaled.ceil() if up else scaled.floor()) * 2**-24
    return torch.where(values.abs() < 2**-14, subnormal, normal)


def _grouped(latents: torch.Tensor, tier: Tier, layout: PackedLayout) -> torch.Tensor:
    """(batch, tokens, rank) -> the tier's groups (batch, tokens / group_tokens, num_groups, group_tokens *
    group_channels)."""
    last, padding = tier.channels[-1], tier.num_groups * layout.group_channels - len(tier.channels)
    repeats = latents[..., last : last + 1].expand(*latents.shape[:-1], padding)  # change no minimum and no maximum
    parts = [*(latents[..., start:stop] for start, stop in tier.runs), repeats]
    groups = torch.cat(parts, dim=-1).unflatten(-1, (tier.num_groups, layout.group_channels))
    times = latents.shape[1] // layout.group_tokens
    return groups.unflatten(1, (times, layout.group_tokens)).transpose(2, 3).flatten(3)


def _ungrouped(groups: torch.Tensor, tier: Tier, layout: PackedLayout) -> torch.Tensor:
    """Undo [`_grouped`], without the repeats: (batch, tokens, channels of the tier)."""
    by_token = groups.unflatten(3, (layout.group_tokens, layout.group_channels)).transpose(2, 3)
    return by_token.flatten(1, 2).flatten(2)[..., : len(tier.channels)]


def quantize(latents: torch.Tensor, layout: PackedLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise and pack whole blocks.

    Args:
        latents: (batch, tokens, rank), tokens a multiple of ``layout.block_size``; float32 or float64.

    Returns:
        codes (batch, blocks, ``layout.code_bytes``) uint8 and ranges (batch, blocks, ``layout.num_ranges``, 2)
        float16.
    """
    batch, blocks = latents.shape[0], latents.shape[1] // layout.block_size
    codes, ranges = [], []
    for tier in layout.tiers:
        groups = _grouped(latents, tier, layout)
        minimum, step = group_ranges(groups, tier.bits)
        wide_step = step.to(groups.dtype)[..., None]
        scaled = (groups - minimum.to(groups.dtype)[..., None]) / torch.where(wide_step == 0, 1.0, wide_step)
        levels = _ungrouped(scaled.round_().clamp_(0, 2**tier.bits - 1), tier, layout).to(torch.uint8)
        codes.append(pack(levels.unflatten(1, (blocks, layout.block_size)), tier.bits))
        times = layout.block_size // layout.group_tokens
        ranges.append(torch.stack([minimum, step], dim=-1).view(batch, blocks, times * tier.num_groups, 2))
    return torch.cat(codes, dim=-1), torch.cat(ranges, dim=2)


def dequantize(codes: torch.Tensor, ranges: torch.Tensor, layout: PackedLayout, dtype: torch.dtype) -> torch.Tensor:
    """Undo [`quantize`], to rounding: (batch, blocks * block_size, rank) in `dtype`.

    Works on all channels of all tiers at once, in the order they are stored in, and brings them into their own last.
    """
    levels = []
    for tier in layout.tiers:
        num_bytes = len(tier.channels) * layout.block_size * tier.bits // 8
        of_tier = codes[..., tier.first_byte : tier.first_byte + num_bytes]
        levels.append(unpack(of_tier, tier.bits, layout.block_size))
    values = torch.cat(levels, dim=-1).to(dtype).unflatten(2, (-1, layout.group_tokens))
    spread = ranges.index_select(2, _ranges_of(layout, ranges.device)).unflatten(2, (-1, layout.rank)).movedim(-1, 0)
    minimum, step = spread.to(dtype, memory_format=torch.contiguous_format).unsqueeze(-2)
    stored = torch.addcmul(minimum, values, step, out=values).flatten(1, 3)
    if len(layout.pieces) == 1:
        return stored
    return torch.cat([stored[..., start:stop] for start, stop in layout.pieces], dim=-1)


@_remembered
def _ranges_of(layout: PackedLayout, device: torch.device) -> torch.Tensor:
    """Which range of a block belongs to each group of tokens and each channel, in the order they are stored in."""
    times, parts, first = layout.block_size // layout.group_tokens, [], 0
    for tier in layout.tiers:
        group = torch.arange(len(tier.channels), device=device) // layout.group_channels
        parts.append(first + torch.arange(times, device=device)[:, None] * tier.num_groups + group)
        first += times * tier.num_groups
    return torch.cat(parts, dim=1).flatten()


def channel_bits(runs: Sequence[Sequence[Sequence[int]]]) -> tuple[int, ...]:
    """Bits of every channel from runs of (bits, channels) per key group, as adapters store them."""
    return tuple(bits for group in runs for bits, count in group for _ in range(count))


def bit_runs(bits: Sequence[int], ranks: Sequence[int]) -> list[list[list[int]]]:
    """Undo [`channel_bits`], for the given ranks of the key groups."""
    runs, start = [], 0
    for rank in ranks:
        group: list[list[int]] = []
        for b in bits[start : start + rank]:
            if group and group[-1][0] == b:
                group[-1][1] += 1
            else:
                group.append([b, 1])
        runs.append(group)
        start += rank
    return runs

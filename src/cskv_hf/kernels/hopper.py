"""Launches the kernel of hopper_scores.py, and says what it serves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton

from ..quantize import PackedLayout
from .hopper_scores import PARTS, TOKENS, hopper_score_kernel

PROGRAMS = 2048  # at least, if there are tokens enough
MOST_WAYS = 3  # for heads of different ranks, each compiled
ONE_BY_ONE = 64  # channels, of more the parts of a tile are taken together


class Plan(NamedTuple):
    """How the kernel takes the channels of a layer.

    Attributes:
        table: int32 (groups, 4): first channel of a group in `order`, its channels with the constant, and where its
            first word and its first range lie in a block.
        order: int64, the channels group by group, each followed by its constant, as in `Pieces`.
        ways: sizes of the products that rebuild keys, powers of two, for few channels and for more.
        aligned: whether four neighbours can be read at once.
    """

    table: torch.Tensor
    order: torch.Tensor
    ways: tuple[tuple[int, ...], ...]
    aligned: bool


def all_in_4_bits(layout: PackedLayout) -> bool:
    return set(layout.bits) == {4} and layout.block_size == layout.group_tokens == 32


@functools.cache
def plan(layout: PackedLayout, ranks: tuple[int, ...], device: torch.device) -> Plan:
    """The channels of every group."""
    table, order, first = [], [], 0
    for group, rank in enumerate(ranks):
        table.append((len(order), rank + 1, first, 0))
        order += [*range(first, first + rank), layout.rank + group]
        first += rank
    rooms = sorted({-(-(rank + 1) // 16) * 16 for rank in ranks})
    while len(rooms) > MOST_WAYS or rooms[0] < rooms[-1] > ONE_BY_ONE:
        rooms.pop(0)
    aligned = all(rank % 4 == 0 for rank in ranks) and layout.group_channels % 4 == 0
    table = torch.tensor(table, dtype=torch.int32, device=device)
    return Plan(table, torch.tensor(order, device=device), tuple(map(_products, rooms)), aligned)


def _products(room: int) -> tuple[int, ...]:
    """Powers of two, 16 to 64, largest first."""
    largest = 32 if room > ONE_BY_ONE else 64
    sizes = [largest] * (room // largest)
    return tuple(sizes + [size for size in (32, 16) if room % largest & size])


def launch_scores(
    query: torch.Tensor, data: torch.Tensor, ranges: torch.Tensor, layout: PackedLayout, ranks: tuple[int, ...],
    key_B_of: Callable[[torch.Tensor, torch.dtype], torch.Tensor], cos: torch.Tensor, sin: torch.Tensor,
    tile_cos: torch.Tensor, tile_sin: torch.Tensor, scaling: float, weights: torch.Tensor, maxima: torch.Tensor,
) -> None:  # fmt: skip
    batch, heads, rows, head_dim = query.shape
    num_tiles, num_blocks = weights.shape[2], data.shape[1]
    table, order, ways, aligned = plan(layout, ranks, query.device)
    num_large = triton.cdiv(num_tiles, 4)
    splits = max(1, min(num_large, PROGRAMS // (batch * heads)))
    tiles_each = triton.cdiv(num_large, splits)
    one_by_one = sum(ways[-1]) <= ONE_BY_ONE
    hopper_score_kernel[triton.cdiv(num_large, tiles_each), heads, batch](
        query, data.view(torch.int32), ranges.view(torch.int32), table, key_B_of(order, torch.float16), cos, sin,
        tile_cos, tile_sin, weights, maxima, scaling, rows, num_blocks, layout.code_bytes, layout.num_ranges, num_tiles,
        tiles_each, 0x64006400,
        HEADS_PER_GROUP=heads // len(ranks), HEAD_DIM=head_dim, ROWS=triton.next_power_of_2(rows), WAYS=ways,
        GROUP_CHANNELS=layout.group_channels, ALIGNED=aligned, AT_ONCE=1 if one_by_one else 4, AHEAD=AHEAD and one_by_one,
        num_warps=4, **(dict(maxnreg=MAXNREG) if one_by_one and MAXNREG else {}),
    )  # fmt: skip


AHEAD, MAXNREG = False, 128
TILE, STARTS = TOKENS.value, PARTS.value

"""Which layers the kernel of hopper_scores.py serves, and its launch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton

from ..quantize import PackedLayout
from .hopper_scores import COLUMNS, PARTS, TOKENS, hopper_score_kernel
from .triton_latents import THOUSANDS

TILE, STARTS = TOKENS.value, PARTS.value  # tokens of a tile, and those whose turns it needs
HEAD_DIMS = (64, 128)
PROGRAMS = 2048  # at least, if there are tokens enough
MOST_WAYS = 3  # for heads of different ranks, each compiled
FEW_CHANNELS = 64  # whose words fit into registers
MOST_CHANNELS = 512  # whose share of `key_B` fits into shared memory
FEW_REGISTERS = dict(maxnreg=128)  # so that four programs of a multiprocessor run at a time


class Plan(NamedTuple):
    """How the kernel takes the channels of a layer.

    Attributes:
        groups: int32 (groups, 3): where a group begins in `order`, its channels without the constant, and the first.
        order: int64, the channels group by group, each group followed by its constant, ``rank + group``.
        ways: sizes of the products that rebuild keys, for groups of few channels and of more.
        fours: whether four channels are read at once.
    """

    groups: torch.Tensor
    order: torch.Tensor
    ways: tuple[tuple[int, ...], ...]
    fours: bool


def serves(layout: PackedLayout, ranks: tuple[int, ...], rows: int, head_dim: int) -> bool:
    """Whether the kernel takes these latents, all in 4 bits, and so many rows of queries of a KV head."""
    in_4_bits = set(layout.bits) == {4} and layout.block_size == layout.group_tokens == 32
    return in_4_bits and rows <= COLUMNS.value and head_dim in HEAD_DIMS and max(ranks) + 4 <= MOST_CHANNELS


@functools.cache
def plan(layout: PackedLayout, ranks: tuple[int, ...], device: torch.device) -> Plan:
    groups, order, constants, first = [], [], [], 0
    fours = layout.rank % 4 == 0 and layout.group_channels % 4 == 0
    for group, rank in enumerate(ranks):
        groups.append((len(order), rank, first))
        order += [*range(first, first + rank), layout.rank + group]
        constants.append(-(-(first % 4 + rank) // 4) * 4 if fours else rank)
        first += rank
    rooms = sorted({constant // 16 * 16 + 16 for constant in constants})
    if rooms[-1] > FEW_CHANNELS:
        rooms = rooms[-1:]
    while len(rooms) > MOST_WAYS:
        del rooms[-2]  # its heads take the largest way
    table = torch.tensor(groups, dtype=torch.int32, device=device)
    return Plan(table, torch.tensor(order, device=device), tuple(map(_products, rooms)), fours)


def _products(room: int) -> tuple[int, ...]:
    """Powers of two that make a multiple of 16, large ones first."""
    largest = 64 if room <= FEW_CHANNELS else 32
    return (largest,) * (room // largest) + tuple(size for size in (32, 16) if room % largest & size)


def launch(
    query: torch.Tensor, codes: torch.Tensor, ranges: torch.Tensor, layout: PackedLayout, ranks: tuple[int, ...],
    factor_of: Callable[[torch.Tensor, torch.dtype], torch.Tensor], turns: tuple[torch.Tensor, ...], scaling: float,
    weights: torch.Tensor, maxima: torch.Tensor,
) -> None:  # fmt: skip
    """Writes weights and maxima, see `hopper_score_kernel`.

    Args:
        factor_of: ``key_B`` for the channels of an order, in a dtype.
        turns: cos and sin of the places in a tile, cos and sin of its first `STARTS` tokens.
    """
    batch, heads, rows, head_dim = query.shape
    num_tiles, num_blocks = weights.shape[2], codes.shape[1]
    groups, order, ways, fours = plan(layout, ranks, query.device)
    large = triton.cdiv(num_tiles, TILE // 64)
    tiles_each = triton.cdiv(large, max(1, min(large, PROGRAMS // (batch * heads))))
    together = sum(ways[-1]) > FEW_CHANNELS
    hopper_score_kernel[triton.cdiv(large, tiles_each), heads, batch](
        query, codes.contiguous().view(torch.int32), ranges.contiguous().view(torch.int32), groups,
        factor_of(order, torch.float16), *turns, weights, maxima, scaling, rows, num_blocks, layout.code_bytes // 4,
        layout.num_ranges, num_tiles, tiles_each, THOUSANDS,
        HEADS_PER_GROUP=heads // len(ranks), HEAD_DIM=head_dim, ROWS=triton.next_power_of_2(rows), WAYS=ways,
        GROUP_CHANNELS=layout.group_channels, FOURS=fours, TOGETHER=together, STAGED=2 if together else 4,
        num_warps=4, **({} if together else FEW_REGISTERS),
    )  # fmt: skip

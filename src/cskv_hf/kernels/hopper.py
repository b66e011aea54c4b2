"""Which layers the kernels of hopper_scores.py and hopper_values.py serve, and their launches."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from packaging.version import Version
from transformers.utils import logging

from ..latents import LatentFormat, PackedFormat
from ..quantize import PackedLayout
from .hopper_latents import PARTS, TOKENS
from .hopper_scores import COLUMNS, hopper_score_kernel
from .hopper_values import CHUNK, hopper_value_kernel
from .pieces import Pieces, cut
from .sizes import cdiv, power_of_2, row_stride
from .tiles import Seen
from .triton_latents import THOUSANDS

logger = logging.get_logger(__name__)

NEWEST_TRITON = (3, 9)  # whose Gluon the kernels are known to compile with; the oldest is that of all kernels
TILE, STARTS = TOKENS.value, PARTS.value  # tokens of a tile, and those whose turns it needs
HEAD_DIMS = (64, 128)
PROGRAMS = 2048  # about, if there are tokens enough
MOST_WAYS = 3  # for heads of different ranks, each compiled
FEW_CHANNELS = 64  # whose words fit into registers
MOST_CHANNELS = 512  # of 4 bits and by fours: their share of `key_B` fits into shared memory
MOST_OTHERS = 128  # of more, score_kernel was quicker on an H100
MOST_PIECES = 3  # of values that a program sums; its registers suffice for no more
LEAST_ROWS, MOST_ROWS = 8, 32  # of a program that sums values
VALUE_REGISTERS, VALUE_PROGRAMS = 168, 384  # so that three run on each of 132 multiprocessors, all at a time
LEAST_TILES = 20  # of each: with 6 to 11, value_kernel, which has less to prepare, was quicker on an H100


class Share(NamedTuple):
    """Where the channels of one key group lie in one tier; fields in the order in which the kernel reads them.

    Attributes:
        first_row: where its channels begin in the order of a [`Plan`].
        channels: of its own, without the constant.
        index: of its first channel in the tier; 0 if it has none there.
        has_constant: whether the constant follows them.
        word, width, first_range: of the tier: its first word in a block, its channels, and its first range.
    """

    first_row: int
    channels: int
    index: int
    has_constant: int
    word: int
    width: int
    first_range: int
    unused: int = 0

    def room(self, fours: bool) -> int:
        """Places that its channels and its constant take, as `share_at` of hopper_latents.py lays them out."""
        lead = self.index % 4 if fours else 0
        end = lead + self.channels
        return (-(-end // 4) * 4 if fours else end) + 1 if self.has_constant else end


class Plan(NamedTuple):
    """How the kernel takes the channels of a layer.

    Attributes:
        groups: int32 (groups, tiers, 8), a [`Share`] each.
        order: int64, the channels group by group and tier by tier, the constant of a group, ``rank + group``, behind
            its channels of one tier.
        ways: products that rebuild keys: their tier, their first place in it, their channels and bits.
        fours: whether four channels are read at once.
    """

    groups: torch.Tensor
    order: torch.Tensor
    ways: tuple[tuple[tuple[int, int, int, int], ...], ...]
    fours: bool

    @property
    def num_channels(self) -> int:
        return sum(channels for _, _, channels, _ in self.ways[-1])


@functools.cache
def compiles_here() -> bool:
    """Whether Triton's Gluon, which may change with every version, is one that the kernel was compiled with."""
    known = Version(triton.__version__).release[:2] <= NEWEST_TRITON
    if not known:
        newest = ".".join(map(str, NEWEST_TRITON))
        logger.warning(
            f"Attention over a compressed cache runs without CSKV's kernel for Hopper GPUs, and slower: it is known to"
            f" compile with Triton up to {newest}, this is {triton.__version__}."
        )
    return known


def serves(layout: PackedLayout, ranks: tuple[int, ...], rows: int, head_dim: int) -> bool:
    """Whether the kernel takes these latents, and this many rows of queries of a KV head."""
    if layout.block_size != 32 or layout.group_tokens != 32 or rows > COLUMNS.value or head_dim not in HEAD_DIMS:
        return False
    planned = plan(layout, ranks, torch.device("cpu"))
    return planned.num_channels <= (MOST_CHANNELS if planned.fours and set(layout.bits) == {4} else MOST_OTHERS)


def prepare(
    layout: PackedLayout, ranks: tuple[int, ...], factor_of: Callable[[torch.Tensor, torch.dtype], torch.Tensor],
    device: torch.device,
) -> None:  # fmt: skip
    """What a [`launch`] keeps of a layer that the kernel serves."""
    factor_of(plan(layout, ranks, device).order, torch.float16)


@functools.cache
def plan(layout: PackedLayout, ranks: tuple[int, ...], device: torch.device) -> Plan:
    starts = [tier.first_byte for tier in layout.tiers] + [layout.code_bytes]
    fours = layout.group_channels % 4 == 0 and all(start % 16 == 0 for start in starts)
    fours = fours and all(len(tier.channels) % 4 == 0 for tier in layout.tiers)
    plans = [_plan(layout, ranks, fours, home) for home in range(len(layout.tiers))]
    table, order, rooms = min(plans, key=lambda plan: sum(max(of_tier) for of_tier in plan[2]))
    if len(rooms) == 1 and max(rooms[0]) <= FEW_CHANNELS:
        ways = sorted(set(rooms[0]))
        while len(ways) > MOST_WAYS:
            del ways[-2]  # its heads take the largest way
        ways = tuple(_products(0, room, layout.tiers[0].bits, True) for room in ways)
    else:
        most = [max(of_tier) for of_tier in rooms]
        few = sum(most) <= FEW_CHANNELS
        ways = (sum((_products(t, room, layout.tiers[t].bits, few) for t, room in enumerate(most)), ()),)
    groups = torch.tensor(table, dtype=torch.int32, device=device)
    return Plan(groups, torch.tensor(order, device=device), ways, fours)


def _plan(layout: PackedLayout, ranks: tuple[int, ...], fours: bool, home: int) -> tuple[list, list, list]:
    """Shares, order, and the places that groups take in each tier, if constants are in tier `home`."""
    table, order, rooms = [], [], [[] for _ in layout.tiers]
    ends = list(itertools.accumulate(ranks))
    for group, (rank, end) in enumerate(zip(ranks, ends)):
        shares = []
        for t, tier in enumerate(layout.tiers):
            index = bisect.bisect_left(tier.channels, end - rank)
            channels = tier.channels[index : bisect.bisect_left(tier.channels, end)]
            index = index if channels else 0  # there is something to read
            word, width = tier.first_byte // 4, len(tier.channels)
            shares.append(Share(len(order), len(channels), index, int(t == home), word, width, tier.first_range))
            order += [*channels, *([layout.rank + group] if t == home else [])]
            rooms[t].append(-(-shares[-1].room(fours) // 16) * 16)
        table.append(shares)
    return table, order, rooms


def _products(tier: int, room: int, bits: int, few: bool) -> tuple[tuple[int, int, int, int], ...]:
    """Products of powers of two of channels that cover `room`, large ones first."""
    largest, start, products = 64 if few else 32, 0, []
    while start < room:
        size = min(largest, 1 << (room - start).bit_length() - 1)
        products.append((tier, start, size, bits))
        start += size
    return tuple(products)


def launch(
    query: torch.Tensor, codes: torch.Tensor, ranges: torch.Tensor, layout: PackedLayout, ranks: tuple[int, ...],
    factor_of: Callable[[torch.Tensor, torch.dtype], torch.Tensor], turns: tuple[torch.Tensor, ...], scaling: float,
    seen: Seen | None, weights: torch.Tensor, maxima: torch.Tensor,
) -> None:  # fmt: skip
    """Writes weights and maxima, see `hopper_score_kernel`.

    Args:
        factor_of: ``key_B`` for the channels of an order, in a dtype.
        turns: cos and sin of the places in a tile, cos and sin of its first `STARTS` tokens, of each row or of all.
        seen: None sees everything.
    """
    batch, heads, rows, head_dim = query.shape
    num_tiles, num_blocks = weights.shape[2], codes.shape[1]
    planned = plan(layout, ranks, query.device)
    large = cdiv(num_tiles, TILE // 64)
    tiles_each = cdiv(large, min(large, cdiv(PROGRAMS, batch * heads)))
    together = planned.num_channels > FEW_CHANNELS
    hopper_score_kernel[cdiv(large, tiles_each), heads, batch](
        query, codes.contiguous().view(torch.int32), ranges.contiguous().view(torch.int32), planned.groups,
        factor_of(planned.order, torch.float16), *turns, *(seen or (query, query)),
        weights, maxima, scaling, rows, num_blocks, layout.code_bytes // 4, layout.num_ranges, num_tiles, tiles_each,
        row_stride(turns[2]), 0 if seen is None else row_stride(seen.counts), THOUSANDS,
        TOLD=seen is not None, HEADS_PER_GROUP=heads // len(ranks), HEAD_DIM=head_dim, ROWS=power_of_2(rows),
        TIERS=len(layout.tiers), WAYS=planned.ways, GROUP_CHANNELS=layout.group_channels, FOURS=planned.fours,
        TOGETHER=together, STAGED=2 if together else 4, num_warps=4, enable_fp_fusion=True,
        **registers(layout, planned),
    )  # fmt: skip


def registers(layout: PackedLayout, planned: Plan) -> dict[str, int]:
    """How to compile so that several programs of a multiprocessor run at a time: four, where registers suffice."""
    if planned.num_channels > FEW_CHANNELS:
        return {}
    few = max(layout.bits) <= 4 and (planned.fours or planned.num_channels <= 48)
    return dict(maxnreg=128 if few else 168)


class ValuePlan(NamedTuple):
    """How the kernel takes the channels of values.

    Attributes:
        pieces: of `CHUNK` channels each.
        programs: int32 (programs of a split, 2), what each sums: a kind, and its first piece.
        kinds: (bits of the codes, pieces) each, all that there can be of these bits, so that layers need one kernel.
    """

    pieces: Pieces
    programs: torch.Tensor
    kinds: tuple[tuple[int, int], ...]


def sums(format: LatentFormat) -> bool:
    """Whether the kernel takes these values, with weights in float16."""
    return isinstance(format, PackedFormat) and format.layout.block_size == 32 == format.layout.group_tokens


@functools.cache
def value_plan(format: PackedFormat, device: torch.device) -> ValuePlan:
    pieces = cut(format, (format.rank,), CHUNK.value, CHUNK.value)
    bits = []
    for of_piece in pieces.table[0, :, 2].tolist():
        bits.append(of_piece or bits[-1])  # a constant alone is of no tier
    kinds = tuple(itertools.product(sorted(set(bits)), range(1, MOST_PIECES + 1)))
    first, programs = 0, []
    for width, run in itertools.groupby(bits):
        left = len(list(run))
        while left:  # divided evenly
            count = cdiv(left, cdiv(left, MOST_PIECES))
            programs.append([kinds.index((width, count)), first])
            first, left = first + count, left - count
    return ValuePlan(pieces.to(device), torch.tensor(programs, dtype=torch.int32, device=device), kinds)


def programs_of_values(format: PackedFormat, batch: int, rows: int, device: torch.device) -> tuple[int, int]:
    """How many programs divide the channels of a split among them, and how many its rows."""
    return len(value_plan(format, device).programs), batch * cdiv(rows, _rows_of_program(rows))


def _rows_of_program(rows: int) -> int:
    return min(max(power_of_2(rows), LEAST_ROWS), MOST_ROWS)


def launch_values(
    weights: torch.Tensor, maxima: torch.Tensor, codes: torch.Tensor, ranges: torch.Tensor, format: PackedFormat,
    num_seen: torch.Tensor | None, tiles_each: int, summed: torch.Tensor, split_maxima: torch.Tensor,
) -> None:  # fmt: skip
    """Writes sums and maxima of splits, see `hopper_value_kernel`.

    Args:
        num_seen: of `Seen`; None sees everything.
        tiles_each: tiles of 64 tokens that a split has.
    """
    batch, rows, num_tiles, _ = weights.shape
    planned = value_plan(format, weights.device)
    of_channels, of_rows = programs_of_values(format, batch, rows, weights.device)
    hopper_value_kernel[of_channels, len(summed), of_rows](
        weights.view(torch.int32), maxima, codes.contiguous().view(torch.int32), ranges.contiguous().view(torch.int32),
        planned.pieces.table, planned.pieces.order, planned.programs, weights if num_seen is None else num_seen,
        summed, split_maxima, rows, codes.shape[1], format.rank, format.layout.code_bytes // 4,
        format.layout.num_ranges, num_tiles, tiles_each, of_rows // batch, row_stride(num_seen),
        THOUSANDS, TOLD=num_seen is not None, ROWS=_rows_of_program(rows), PARTS=maxima.shape[3], KINDS=planned.kinds,
        GROUP_CHANNELS=format.layout.group_channels, num_warps=4, enable_fp_fusion=True, maxnreg=VALUE_REGISTERS,
    )  # fmt: skip

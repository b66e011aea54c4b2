"""Latent channels cut into pieces that a GPU kernel takes at a time, and where in a block each lies.

The channels of a piece are neighbours in one tier of a packed layout: they have the same number of bits, and lie side
by side. So a kernel needs a handful of numbers for a piece, and none for a channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ..latents import LatentFormat, PackedFormat
from ..quantize import Tier, rows_together


class Piece(NamedTuple):
    """What a kernel knows of a piece, in the order of its fields.

    Attributes:
        start: of its channels in [`Pieces.order`].
        count: channels, with the constant; 0 in a group that needs fewer pieces than another.
        bits: of a code; 0 of plain latents.
        word: where its first channel begins in a block: the first word, or byte if rows make no words; of plain
            latents the channel.
        width: channels of its tier.
        first_range: of its tier in a block.
        index: of its first channel in its tier.
        constant: 1 if its last channel is not stored but always one, else 0.
    """

    start: int
    count: int
    bits: int = 0
    word: int = 0
    width: int = 1
    first_range: int = 0
    index: int = 0
    constant: int = 0


class Pieces(NamedTuple):
    """The channels of some groups, each with a last one that is always one, in pieces.

    Attributes:
        table: int32 (groups, pieces, 8), a [`Piece`] each.
        order: int64, the channels as the pieces take them; ``rank + group`` is the constant of a group.
        sizes: a power of two for every piece of a group, which no group's channels exceed.
        least: pieces that the group of the fewest needs, empty ones between them included.
    """

    table: torch.Tensor
    order: torch.Tensor
    sizes: tuple[int, ...]
    least: int

    def to(self, device: torch.device) -> Pieces:
        return self._replace(table=self.table.to(device), order=self.order.to(device))


def _tiers(format: LatentFormat) -> Sequence[Tier]:
    """Plain latents are like one tier, of which every channel is where its number says."""
    if isinstance(format, PackedFormat):
        return format.layout.tiers
    return [Tier(0, tuple(range(format.rank)), 1, ((0, format.rank),), 0, 0)]


def cut(format: LatentFormat, ranks: Sequence[int], smallest: int, largest: int) -> Pieces:
    """Cut channels into pieces.

    Args:
        ranks: channels of each group, in the order of the latents.
        smallest, largest: sizes of a piece, powers of two.
    """
    tiers, ends = _tiers(format), torch.tensor(ranks).cumsum(0).tolist()
    groups = [range(end - rank, end) for rank, end in zip(ranks, ends)]
    of_tier = [[[i for i, c in enumerate(tier.channels) if c in group] for group in groups] for tier in tiers]
    most = [max(map(len, in_groups)) for in_groups in of_tier]
    sizes = [list(_sizes(count, smallest, largest)) for count in most]
    # the constant goes where there is room for it
    home = next((t for t, count in enumerate(most) if count < sum(sizes[t])), len(tiers) - 1)
    sizes[home] = list(_sizes(most[home] + 1, smallest, largest))
    order, table, unit = [], [], rows_together(format.block_size)
    for number in range(len(groups)):
        pieces = []
        for t, tier in enumerate(tiers):
            inside = of_tier[t][number]
            stored = [(tier.channels[i], i) for i in inside]
            if t == home:
                stored.append((format.rank + number, None))
            for size in sizes[t]:
                part, stored = stored[:size], stored[size:]
                pieces.append(_piece(part, tier, len(order), unit))
                order += [channel for channel, _ in part]
        table.append(pieces)
    needed = [max(i + 1 for i, piece in enumerate(pieces) if piece.count) for pieces in table]
    flat = tuple(size for of_one in sizes for size in of_one)
    return Pieces(torch.tensor(table, dtype=torch.int32), torch.tensor(order), flat, min(needed))


def _piece(part: list[tuple[int, int | None]], tier: Tier, start: int, unit: int) -> Piece:
    """Of channels and their places in the tier, None for the constant; `unit` bytes are what rows make."""
    places = [place for _, place in part if place is not None]
    constant = len(part) - len(places)
    if not places:
        return Piece(start, len(part), constant=constant)
    word, width = tier.first_byte // unit + places[0], len(tier.channels)
    return Piece(start, len(part), tier.bits, word, width, tier.first_range, places[0], constant)


def _sizes(count: int, smallest: int, largest: int) -> Iterator[int]:
    """Powers of two that hold this many channels, and not many more."""
    while count > 0:
        size = smallest
        while size < min(count, largest):
            size *= 2
        if size > 2 * smallest and 4 * count <= 3 * size:
            size //= 2
        yield size
        count -= size

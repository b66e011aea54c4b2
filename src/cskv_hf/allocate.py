"""One byte budget, one water level: how many bits every latent channel of a model gets, 0 for a dropped one.

Reverse water-filling (Cover and Thomas, section 10.3.3) over the channels of all layers, key groups and values at
once. A channel of energy `e` (what the model's output loses without it) quantised to `b` bits loses `n * f(b)`, with
`n` what noise as large as the channel costs, and takes `b` bits per token plus its share of the ranges. Every channel
gets the bits that minimise loss plus price times cost, and the price is the lowest that the budget allows. Rank is the
special case of bits 0 or 16. Pure functions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .model_shape import PLAIN_BITS
from .quantize import RANGE_BYTES

PACKED_LEVELS = (2, 3, 4, 6, 8)  # one bit between minimum and maximum loses more than it keeps; 5 and 7 gain nothing


@dataclass(frozen=True)
class Side:
    """Channels that share a tensor: the keys or the values of one layer.

    Attributes:
        energies: per key group (values have one group), the energy of each channel, falling, in units that all sides
            share.
        group_tokens, group_channels: tokens and channels that share a range.
        rounding: in the form of `energies`, what noise as large as each channel would cost, in any order; None if the
            same.
    """

    energies: tuple[torch.Tensor, ...]
    group_tokens: int = 32
    group_channels: int = 1
    rounding: tuple[torch.Tensor, ...] | None = None

    @property
    def range_bits(self) -> float:
        """Bits of ranges per packed value, where groups are full."""
        return 8 * RANGE_BYTES / (self.group_tokens * self.group_channels)

    def bytes_per_token(self, counts: dict[int, int]) -> float:
        """True bytes of the side for ``counts[bits]`` channels of each number of bits, part-filled groups counted."""
        total = 0.0
        for bits, channels in counts.items():
            total += channels * bits / 8
            if 0 < bits < PLAIN_BITS:
                total += RANGE_BYTES * -(-channels // self.group_channels) / self.group_tokens
        return total


def gaussian_range(samples: int) -> float:
    """Expected range of `samples` independent normal values, in standard deviations.

    Twice the expected maximum, by Blom's approximation; 4.1 for 32.
    """
    if samples < 2:
        return 0.0
    probability = torch.tensor((samples - 0.375) / (samples + 0.25), dtype=torch.float64)
    return 2 * math.sqrt(2) * float(torch.erfinv(2 * probability - 1))


def quantisation_loss(bits: int, group_size: int) -> float:
    """Noise f(b) of `bits` bits as a share of a channel's energy: 1 at none, 0 at 16.

    Uniform noise of one step, the step being a group's expected range over ``2**bits - 1``.
    """
    if bits == 0:
        return 1.0
    if bits == PLAIN_BITS:
        return 0.0
    return gaussian_range(group_size) ** 2 / (12 * (2**bits - 1) ** 2)


Bits = list[list[list[int]]]  # per side and group, the bits of every channel


def allocate(sides: Sequence[Side], budget: float, levels: Sequence[int]) -> Bits:
    """Bits of every channel of every side: what one price for all of them buys within a budget.

    No other choice that costs as much, and keeps the first channels of every group, loses less. Groups of the same
    energies and rounding get the same bits, and so do neighbours of the same of both, so that alike layers stay alike
    and multiples together; what it would take to raise all of them stays unspent.

    Args:
        budget: bytes per token, over all sides.
        levels: bits a channel may have; 0 drops it.

    Returns:
        Per side and group, the bits of its channels; every side keeps at least its first channel.

    Raises:
        ValueError: if not even one channel per side fits, or energies are NaN or infinite.
    """
    for i, side in enumerate(sides):
        if not all(energies.isfinite().all() for energies in (*side.energies, *(side.rounding or ()))):
            raise ValueError(
                f"`sides`[{i}] has NaN or infinite energies, that is, the spectrum or the sensitivity of its layer "
                "has. Fit again, or use `allocation`='uniform'."
            )
    levels = sorted(levels)
    sizes = [len(e) for side in sides for e in side.energies]
    owner = torch.tensor([i for i, side in enumerate(sides) for e in side.energies for _ in range(len(e))])
    energies = torch.cat([e.double() for side in sides for e in side.energies]).clamp_min(0.0)
    rounding = torch.cat([n.double() for side in sides for n in side.rounding or side.energies]).clamp_min(0.0)
    firsts = torch.stack([torch.where(owner == i, energies, -1.0).argmax() for i in range(len(sides))])
    unit = torch.maximum(energies.max(), rounding.max()).clamp_min(torch.finfo(torch.float64).tiny)
    losses, rates = _loss_and_rate(sides, levels)
    losses, rates = rounding[:, None] / unit * losses[owner], rates[owner]  # (channels, levels)
    drops = levels[0] == 0
    if drops:
        losses[:, 0] = energies / unit
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    place = torch.cat([torch.arange(size) for size in sizes])  # within the group

    def at_price(log_price: float) -> torch.Tensor:
        totals = losses + math.exp(log_price) * rates
        if not drops:
            return totals.argmin(1)
        least, bits = totals[:, 1:].min(1)
        dearer = totals.new_zeros(len(sizes), 1 + max(sizes))  # each channel, kept rather than dropped
        dearer[group, place] = least - totals[:, 0]
        saved = dearer.flip(1).cumsum(1).flip(1)  # by dropping this channel and all after it
        saved[group[firsts], 0] = -torch.inf
        return torch.where(place < saved.argmax(1)[group], 1 + bits, 0)

    def total(chosen: torch.Tensor) -> float:
        counts = torch.bincount(owner * len(levels) + chosen, minlength=len(sides) * len(levels))
        by_side = counts.view(len(sides), -1).tolist()
        return sum(side.bytes_per_token(dict(zip(levels, n))) for side, n in zip(sides, by_side))

    low, high = -60.0, 5.0  # of the log price: as many bits as there are; as few as there must be
    best = at_price(high)
    if total(best) > budget:
        raise ValueError(
            f"A budget of {budget:.1f} bytes per token does not hold one channel of keys and of values per layer, "
            f"which takes {total(best):.1f}; use a lower `compression` or fewer `bits`."
        )
    for _ in range(60):
        middle = (low + high) / 2
        chosen = at_price(middle)
        if total(chosen) <= budget:
            high, best = middle, chosen
        else:
            low = middle
    groups = iter([[levels[i] for i in part.tolist()] for part in best.split(sizes)])
    return [[next(groups) for _ in side.energies] for side in sides]


def _loss_and_rate(sides: Sequence[Side], levels: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """f(b) and bits per token of every side and level, (sides, levels)."""
    losses = [[quantisation_loss(b, side.group_tokens * side.group_channels) for b in levels] for side in sides]
    rates = [[b + side.range_bits * (0 < b < PLAIN_BITS) for b in levels] for side in sides]
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(rates, dtype=torch.float64)


def allocate_average(sides: Sequence[Side], budget: float, bits: int) -> Bits:
    """As [`allocate`], with `bits` the average over the channels that are kept.

    As many channels are kept as `bits` each leave room for, those that gain most by them; they share their bits by one
    more water level.
    """
    kept = allocate(sides, budget, (0, bits))
    if bits <= PACKED_LEVELS[0]:
        return kept
    counts = [[sum(b > 0 for b in group) for group in groups] for groups in kept]
    survivors = [
        dataclasses.replace(
            side,
            energies=tuple(e[:n] for e, n in zip(side.energies, ns)),
            rounding=side.rounding and tuple(e[:n] for e, n in zip(side.rounding, ns)),
        )
        for side, ns in zip(sides, counts)
    ]
    spent = sum(side.bytes_per_token({bits: sum(ns)}) for side, ns in zip(sides, counts))
    shared = allocate(survivors, spent, PACKED_LEVELS)
    return [
        [part + [0] * (len(e) - len(part)) for e, part in zip(side.energies, groups)]
        for side, groups in zip(sides, shared)
    ]

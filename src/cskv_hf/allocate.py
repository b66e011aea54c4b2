"""One byte budget, one water level: how many bits every latent channel of a model gets, 0 for a dropped one.

Reverse water-filling (Cover and Thomas, section 10.3.3) over the channels of all layers, key groups and values at
once. A channel of energy `e` (what the model's output loses without it) quantised to `b` bits loses `e * f(b)`, and
costs `b` bits per token plus its share of the ranges. Every channel takes the bits that minimise loss plus price times
cost, and the price is the lowest that the budget allows. Rank is the special case of bits 0 or 16. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .quantize import RANGE_BYTES

PLAIN_BITS = 16
PACKED_LEVELS = (2, 3, 4, 6, 8)  # one bit between minimum and maximum loses more than it keeps; 5 and 7 gain nothing


@dataclass(frozen=True)
class Block:
    """Channels that share a tensor: the keys or the values of one layer.

    Attributes:
        energies: per key group (values have one group), the energy of each channel, falling, in units that all blocks
            share.
        group_tokens, group_channels: tokens and channels that share a range.
    """

    energies: tuple[torch.Tensor, ...]
    group_tokens: int = 32
    group_channels: int = 1

    @property
    def range_bits(self) -> float:
        """Bits of ranges per packed value, where groups are full."""
        return 8 * RANGE_BYTES / (self.group_tokens * self.group_channels)

    def bytes_per_token(self, counts: dict[int, int]) -> float:
        """True bytes of the block for ``counts[bits]`` channels of each number of bits, part-filled groups counted."""
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
    """Share f(b) of a channel's energy that is lost at `bits` bits: 1 at none, 0 at 16.

    Uniform noise of one step, the step being a group's expected range over ``2**bits - 1``.
    """
    if bits == 0:
        return 1.0
    if bits == PLAIN_BITS:
        return 0.0
    return gaussian_range(group_size) ** 2 / (12 * (2**bits - 1) ** 2)


Bits = list[list[list[int]]]  # per block and group, the bits of every channel


def allocate(blocks: Sequence[Block], budget: float, levels: Sequence[int]) -> Bits:
    """Bits of every channel of every block: what one price for all of them buys within a budget.

    No other choice that costs as much loses less. Channels of the same energy get the same bits, so that alike layers
    stay alike and neighbours in multiples together; what it would take to raise all of them stays unspent.

    Args:
        budget: bytes per token, over all blocks.
        levels: bits a channel may have; 0 drops it.

    Returns:
        Per block and group, the bits of its channels; every block keeps at least its first channel.

    Raises:
        ValueError: if not even one channel per block fits, or energies are NaN or infinite.
    """
    for i, block in enumerate(blocks):
        if not all(energies.isfinite().all() for energies in block.energies):
            raise ValueError(
                f"`blocks`[{i}] has NaN or infinite energies, that is, the spectrum or the sensitivity of its layer "
                "has. Fit again, or use `allocation`='uniform'."
            )
    levels = sorted(levels)
    sizes = [len(e) for block in blocks for e in block.energies]
    owner = torch.tensor([i for i, block in enumerate(blocks) for e in block.energies for _ in range(len(e))])
    energies = torch.cat([e.double() for block in blocks for e in block.energies]).clamp_min(0.0)
    firsts = torch.stack([torch.where(owner == i, energies, -1.0).argmax() for i in range(len(blocks))])
    energies = energies / energies.max().clamp_min(torch.finfo(torch.float64).tiny)
    losses, rates = _loss_and_rate(blocks, levels)
    losses, rates = energies[:, None] * losses[owner], rates[owner]  # (channels, levels)

    def at_price(log_price: float) -> torch.Tensor:
        chosen = (losses + math.exp(log_price) * rates).argmin(1)
        if levels[0] == 0:
            chosen[firsts] = chosen[firsts].clamp_min(1)
        return chosen

    def total(chosen: torch.Tensor) -> float:
        counts = torch.bincount(owner * len(levels) + chosen, minlength=len(blocks) * len(levels))
        by_block = counts.view(len(blocks), -1).tolist()
        return sum(block.bytes_per_token(dict(zip(levels, n))) for block, n in zip(blocks, by_block))

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
    return [[next(groups) for _ in block.energies] for block in blocks]


def _loss_and_rate(blocks: Sequence[Block], levels: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """f(b) and bits per token of every block and level, (blocks, levels)."""
    losses = [[quantisation_loss(b, block.group_tokens * block.group_channels) for b in levels] for block in blocks]
    rates = [[b + block.range_bits * (0 < b < PLAIN_BITS) for b in levels] for block in blocks]
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(rates, dtype=torch.float64)


def allocate_average(blocks: Sequence[Block], budget: float, bits: int) -> Bits:
    """As [`allocate`], with `bits` the average over the channels that are kept.

    As many channels are kept as `bits` each leave room for, those of most energy; they share their bits by one more
    water level.
    """
    kept = allocate(blocks, budget, (0, bits))
    if bits <= PACKED_LEVELS[0]:
        return kept
    counts = [[sum(b > 0 for b in group) for group in groups] for groups in kept]
    survivors = [
        Block(tuple(e[:n] for e, n in zip(block.energies, ns)), block.group_tokens, block.group_channels)
        for block, ns in zip(blocks, counts)
    ]
    spent = sum(block.bytes_per_token({bits: sum(ns)}) for block, ns in zip(blocks, counts))
    shared = allocate(survivors, spent, PACKED_LEVELS)
    return [
        [part + [0] * (len(e) - len(part)) for e, part in zip(block.energies, groups)]
        for block, groups in zip(blocks, shared)
    ]

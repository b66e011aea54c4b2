"""From a config and the spectra of a fit to what each layer keeps: ranks, and the bits of every channel.

Used when an adapter is fitted, and again when it is cut to a smaller budget. Numbers only; touches no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .allocate import PACKED_LEVELS, Side, allocate, allocate_average
from .config import CSKVConfig, bits_alike
from .decompose import even_ranks, pooled_ranks
from .model_shape import PLAIN_BITS, ModelShape
from .quantize import bit_runs


class LayerSpectra(NamedTuple):
    """Of a layer, what [`Factors`] calls spectrum of each key group and of the values, and the values' rounding."""

    keys: Sequence[torch.Tensor]
    values: torch.Tensor
    value_rounding: torch.Tensor


@dataclass(frozen=True)
class LayerPlan:
    """What one layer keeps.

    Attributes:
        key_ranks, value_rank: channels, the first ones of each group.
        key_bits, value_bits: of every channel kept, groups one after the other; empty for plain storage.
    """

    key_ranks: tuple[int, ...]
    value_rank: int
    key_bits: tuple[int, ...]
    value_bits: tuple[int, ...]


def plan(config: CSKVConfig, shape: ModelShape, spectra: Sequence[LayerSpectra]) -> list[LayerPlan]:
    """What every layer keeps.

    Args:
        spectra: per layer, energies of all channels there are, falling within a group. With ``config.allocates`` they
            are made comparable by ``config.sensitivity``.

    Raises:
        ValueError: if the budget leaves less than a channel for some layer, or there are fewer channels than asked
            for.
    """
    return _allocated(config, shape, spectra) if config.allocates else _uniform(config, shape, spectra)


def check_budget(config: CSKVConfig, shape: ModelShape) -> None:
    """Refuse ranks that the model does not have, and a budget that leaves less than a channel to some layer.

    Raises:
        ValueError: naming what would fit.
    """
    if config.allocates:
        config.check_room(shape, config.storage_bits or PACKED_LEVELS[0])
    else:
        config.layer_ranks(shape)


def _uniform(config: CSKVConfig, shape: ModelShape, spectra: Sequence[LayerSpectra]) -> list[LayerPlan]:
    bits, plans = config.uniform_bits, []
    for (key_rank, value_rank), (keys, values, _) in zip(config.layer_ranks(shape), spectra):
        held = (sum(map(len, keys)), len(values))
        for wanted, there in zip((key_rank, value_rank), held):
            if wanted > there:
                raise ValueError(
                    f"Cannot cut factors of rank {there} to rank {wanted}: a fitted adapter loads at its own or a "
                    "smaller rank. Fit again for a larger one."
                )
        if config.init == "random":
            key_ranks = even_ranks(key_rank, len(keys))
        else:
            padded = torch.full((len(keys), max(map(len, keys))), -1.0, dtype=torch.float64)  # no channel
            for g, energies in enumerate(keys):
                padded[g, : len(energies)] = energies.double()
            key_ranks = pooled_ranks(padded, key_rank)
        packed = [bits_alike(bits, rank) for rank in (key_rank, value_rank)]
        plans.append(LayerPlan(key_ranks, value_rank, *packed))
    return plans


def _allocated(config: CSKVConfig, shape: ModelShape, spectra: Sequence[LayerSpectra]) -> list[LayerPlan]:
    check_budget(config, shape)
    sides = []
    for layer_idx, ((keys, *values), (key_price, value_price)) in enumerate(zip(spectra, config.sensitivity)):
        known = torch.cat([*keys, *values, values[0].new_tensor([key_price, value_price])])
        if not known.isfinite().all():
            raise ValueError(
                f"The spectra or the `sensitivity` of layer {layer_idx} are NaN or infinite. Fit the adapter again, "
                "or with `allocation`='uniform'."
            )
        *of_keys, energies, rounding = (_in_steps(e.double(), config.rank_multiple) for e in (*keys, *values))
        sides.append(Side(tuple(e * key_price for e in of_keys), *config.group_of("key")))
        sides.append(Side((energies * value_price,), *config.group_of("value"), (rounding * value_price,)))
    budget, bits = config.byte_budget(shape), config.storage_bits
    if bits is None:
        chosen = allocate(sides, budget, (0, *PACKED_LEVELS))
    elif bits == PLAIN_BITS:
        chosen = allocate(sides, budget, (0, PLAIN_BITS))
    else:
        chosen = allocate_average(sides, budget, bits)
    plans = []
    for keys, (values,) in zip(chosen[::2], chosen[1::2]):
        kept = [[b for b in group if b] for group in keys], [b for b in values if b]
        packed = [(), ()] if bits == PLAIN_BITS else [tuple(b for group in kept[0] for b in group), tuple(kept[1])]
        plans.append(LayerPlan(tuple(map(len, kept[0])), len(kept[1]), *packed))
    return plans


def _in_steps(energies: torch.Tensor, multiple: int) -> torch.Tensor:
    """Every channel's energy replaced by the mean of `multiple` neighbours, the last ones of what is left: alike
    channels get alike bits, so that ranks and tiers become multiples."""
    return torch.cat([part.mean().expand(len(part)) for part in energies.split(multiple)])


def store_plan(config: CSKVConfig, plans: Sequence[LayerPlan]) -> None:
    """Write it into a config, as adapters save it."""
    config.key_ranks = [list(p.key_ranks) for p in plans]
    config.value_ranks = [p.value_rank for p in plans]
    packed = bool(plans[0].key_bits)
    config.key_bits = [bit_runs(p.key_bits, p.key_ranks) for p in plans] if packed else None
    config.value_bits = [bit_runs(p.value_bits, [p.value_rank])[0] for p in plans] if packed else None

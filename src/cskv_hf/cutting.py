"""Cutting a fitted adapter to fewer channels, in place and without data."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from .config import CSKVConfig
from .decompose import first_channels
from .fit_report import forget_measurements
from .model_shape import ModelShape
from .plan import LayerPlan, LayerSpectra, plan, store_plan
from .quantize import channel_bits
from .tuner import adapter_config, adapter_in_use, sidecars


@torch.no_grad()
def shrink(
    model: nn.Module,
    compression: float | None = None,
    *,
    key_rank: int | None = None,
    value_rank: int | None = None,
    adapter_name: str | None = None,
) -> nn.Module:
    """Cut a fitted adapter, in place, to a higher compression or smaller ranks; no data needed (nested ranks).

    The factors of a fit are ordered by importance, so that cutting them equals fitting at the smaller rank on the
    same data. What was measured of the adapter before is dropped from its ``fit_report``.

    Args:
        model: with a fitted CSKV adapter.
        compression: the new fraction of KV bytes removed. An adapter that was fitted to ranks has nothing to allocate
            by: all its layers get the same, in the bits it has.
        key_rank, value_rank: instead of `compression`: the new ranks of every layer. Channels that stay keep their
            bits.
        adapter_name: the adapter to cut; the one in use by default.

    Raises:
        ValueError: if the adapter's ranks are smaller than asked for already, if it is not fitted, or unless one kind
            of budget is given; before anything is changed.
    """
    name = adapter_name or adapter_in_use(model)
    config = adapter_config(model, name)
    given = {"compression": compression, "key_rank": key_rank, "value_rank": value_rank}
    stated = [field for field, value in given.items() if value is not None]
    if stated not in (["compression"], ["key_rank", "value_rank"]):
        got = ", ".join(f"`{field}`={value}" for field, value in given.items())
        raise ValueError(f"`shrink` takes either `compression`, or `key_rank` and `value_rank`; got {got}.")
    if not config.is_fitted:
        raise ValueError(f"The CSKV adapter '{name}' has no factors yet. Fit it with `cskv_hf.fit` before cutting it.")
    if config.compression is not None and compression is not None and compression < config.compression:
        raise ValueError(
            f"This adapter was fitted at `compression`={config.compression} and cannot be cut to {compression}: a "
            "fitted adapter loads at its own or a smaller rank. Fit again for less compression."
        )
    if compression is None:
        settings = {"allocation": None, "rank_multiple": 1}
    else:
        unpacked = config.compression is None and config.key_bits is None  # which the new compression must not change
        settings = {
            "allocation": "uniform" if config.sensitivity is None else config.allocation,
            "bits": 16 if unpacked else config.bits,
        }
    wanted = dataclasses.replace(config, **given, **settings)
    layers = sidecars(model)
    spectra = [
        LayerSpectra(
            s.cskv_key_spectrum[name]()[0].cpu().split(s.key_ranks[name]),
            s.cskv_value_spectrum[name]()[0].cpu(),
            s.cskv_value_rounding[name]()[0].cpu(),
        )
        for s in layers
    ]
    if any(layer.values.any() and not layer.value_rounding.any() for layer in spectra):
        raise ValueError(
            f"The file of the CSKV adapter '{name}' has no `cskv_value_rounding`, by which bits are given: an older "
            "version wrote it. Fit the adapter again to cut it."
        )
    kept = plan(wanted, ModelShape(**config.model_shape), spectra)
    channels = [first_channels(s.key_ranks[name], layer.key_ranks) for s, layer in zip(layers, kept)]
    if compression is None and config.key_bits:
        kept = [_as_stored(config, i, layer, keys) for i, (layer, keys) in enumerate(zip(kept, channels))]
    store_plan(wanted, kept)
    for sidecar, layer, keys in zip(layers, kept, channels):
        values = torch.arange(layer.value_rank)
        for module, index, dim in (
            (sidecar.cskv_key_A, keys, 0),
            (sidecar.cskv_key_B, keys, 1),
            (sidecar.cskv_key_spectrum, keys, 1),
            (sidecar.cskv_value_A, values, 0),
            (sidecar.cskv_value_B, values, 1),
            (sidecar.cskv_value_spectrum, values, 1),
            (sidecar.cskv_value_rounding, values, 1),
        ):
            weight = module[name].weight
            module[name].weight = nn.Parameter(weight.index_select(dim, index.to(weight.device)), weight.requires_grad)
        sidecar.key_ranks[name] = layer.key_ranks
        sidecar.formats[name] = wanted.formats(sidecar.layer_idx)
    stored = ("key_ranks", "value_ranks", "key_bits", "value_bits")
    if any(getattr(config, field) != getattr(wanted, field) for field in stored):
        before, after = (list(zip(c.key_ranks, c.value_ranks)) for c in (config, wanted))
        forget_measurements(config, [i for i, ranks in enumerate(after) if ranks != before[i]])
    for field in (*given, *settings, *stored):
        setattr(config, field, getattr(wanted, field))
    return model


def _as_stored(config: CSKVConfig, layer_idx: int, layer: LayerPlan, keys: torch.Tensor) -> LayerPlan:
    """A plan for fewer channels, each in the bits that it has."""
    key_bits, value_bits = channel_bits(config.key_bits[layer_idx]), channel_bits([config.value_bits[layer_idx]])
    return dataclasses.replace(
        layer,
        key_bits=tuple(key_bits[channel] for channel in keys.tolist()),
        value_bits=tuple(value_bits[: layer.value_rank]),
    )

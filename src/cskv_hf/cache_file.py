"""A CSKVCache in a safetensors file: what was read once need not be read again, in another process either."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .cache import CSKVCache
from .cache_layer import CSKVLayer
from .factors import Fingerprint
from .files import replacing
from .latents import LatentFormat, Latents, PackedFormat, PlainFormat
from .quantize import PackedLayout
from .rope import RotaryFrequencies
from .tokens import TokenTable

KEY = "cskv_cache"
FILE_VERSION = OLDEST = 5  # a fingerprint is of all factors
COUNTS = ("num_slots", "num_sinks", "num_old", "num_recent")


def save_cache(cache: CSKVCache, path: str | os.PathLike) -> None:
    """Write a cache that holds tokens; an existing file is replaced only once the new one is complete.

    Raises:
        ValueError: if the cache is empty, or holds a part of the heads (tensor parallelism).
    """
    tokens = cache.tokens
    if tokens is None or not cache.layers:
        raise ValueError("This CSKVCache is empty: there is nothing to save. Put a prompt through the model first.")
    _, count, total = cache.layers[0].heads
    if count < total:
        raise ValueError(
            f"This CSKVCache holds {count} of {total} KV heads, those of one process of a tensor-parallel model, and "
            "cannot be saved. Fill and save a cache of a model in one process."
        )
    tensors = {"positions": tokens.positions, "inv_freq": tokens.frequencies.inv_freq}
    tensors |= {f"slots.{name}": slots for name, slots in (tokens.slots or {}).items()}
    for index, layer in enumerate(cache.layers):
        tensors[f"layers.{index}.fingerprint"] = layer.fingerprint.values
        parts = layer.tensors() | {name: getattr(layer, name).tensors for name in layer.LATENTS}
        for name, held in parts.items():
            tensors |= {f"layers.{index}.{name}.{i}": tensor for i, tensor in enumerate(held)}
    about = {
        "version": FILE_VERSION,
        "window": tokens.window,
        "sinks": tokens.sinks,
        "block_size": tokens.block_size,
        "slack": tokens.slack,
        "materialize": cache.materialize,
        "counts": {name: getattr(tokens, name) for name in COUNTS},
        "attention_scaling": tokens.frequencies.attention_scaling,
        "frequencies_change": tokens.frequencies.change,
        "dtype": str(cache.layers[0].dtype).removeprefix("torch."),
        "sliding_windows": [layer.sliding_window for layer in cache.layers],
        "num_dropped": [layer.dropped_blocks for layer in cache.layers],
        "formats": [[_describe(getattr(layer, name).format) for name in layer.LATENTS] for layer in cache.layers],
    }
    with replacing(Path(path)) as new:
        save_file(_apart(tensors), new, metadata={KEY: json.dumps(about)})


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the CPU and compact; copied only where two share memory, or one is a part of something larger."""
    apart, storages = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() > tensor.nbytes:
            tensor = tensor.clone()
            storage = tensor.untyped_storage()
        storages.add(storage.data_ptr())
        apart[name] = tensor
    return apart


def load_cache(path: str | os.PathLike, device: str | torch.device = "cpu", offloading: bool = False) -> CSKVCache:
    """Read what [`save_cache`] wrote.

    Args:
        device: where all layers go, until they meet the model's.
        offloading: keep the latents on the CPU, as [`CSKVCache`] does.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, corrupt, something else, or of another version; for a `device` that is none.
    """
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"`device` must be one that torch knows, as 'cpu' or 'cuda:0', got {device!r}.") from error
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file '{path}'. Write one with `cache.save(path)`.")
    try:
        with safe_open(path, "pt", device="cpu" if offloading else str(device)) as file:
            metadata = (file.metadata() or {}).get(KEY)
            if metadata is None:
                raise ValueError(f"'{path}' holds no CSKVCache. Write one with `cache.save(path)`.")
            about = json.loads(metadata)
            if "version" not in about:
                raise ValueError(f"'{path}' is corrupt (it lacks 'version'). Save the cache again.")
            if not OLDEST <= about["version"] <= FILE_VERSION:
                newer = about["version"] > FILE_VERSION
                raise ValueError(
                    f"'{path}' was written by {'a newer' if newer else 'an older'} cskv-hf (version "
                    f"{about['version']} of the format, this one reads {OLDEST} to {FILE_VERSION}). "
                    + ("Upgrade it with `pip install -U cskv-hf`." if newer else "Fill and save the cache again.")
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"'{path}' is truncated or corrupt ({error}). Save the cache again.") from error
    if offloading:
        tensors = {name: t if "_latents." in name else t.to(device) for name, t in tensors.items()}
    try:
        return _cache_of(about, tensors, offloading)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' is corrupt (it lacks {error}). Save the cache again.") from error


def _cache_of(about: dict[str, Any], tensors: dict[str, torch.Tensor], offloading: bool) -> CSKVCache:
    materialize = about.get("materialize", False)  # older files do not say
    cache = CSKVCache(about["window"], about["sinks"], offloading=offloading, materialize=materialize)
    cache.slack = about["slack"]
    cache.tokens = TokenTable(about["window"], about["sinks"], about["block_size"], about["slack"])
    for name, count in about["counts"].items():
        setattr(cache.tokens, name, count)
    cache.tokens.positions = tensors["positions"]
    cache.tokens.frequencies = RotaryFrequencies(
        tensors["inv_freq"], about["attention_scaling"], about["frequencies_change"]
    )
    slots = {name: tensors[f"slots.{name}"].cpu() for name in ("sinks", "old", "recent") if f"slots.{name}" in tensors}
    cache.tokens.slots = slots or None
    dtype = getattr(torch, about["dtype"])
    for index, formats in enumerate(about["formats"]):
        layer = CSKVLayer(offloading)
        _fill(layer, f"layers.{index}.", formats, tensors)
        layer.dtype, layer.num_slots = dtype, about["counts"]["num_slots"]
        layer.dropped_blocks, layer.sliding_window = about["num_dropped"][index], about["sliding_windows"][index]
        cache.layers.append(layer)
    cache.has_all_layers = True
    return cache


def _fill(layer: CSKVLayer, prefix: str, formats: list, tensors: dict[str, torch.Tensor]) -> None:
    for name in layer.EXACT:
        setattr(layer, name, tensors[f"{prefix}{name}.0"])
    values = tensors[prefix + "fingerprint"]
    layer.fingerprint = Fingerprint(values, values, ())  # which no adapter's is, until it was compared
    layer.device, layer.is_initialized = layer.keys.device, True
    latents = []
    for name, description in zip(layer.LATENTS, formats):
        count = sum(key.startswith(f"{prefix}{name}.") for key in tensors)
        held = tuple(tensors[f"{prefix}{name}.{i}"] for i in range(count))
        latents.append(Latents(_format(description), held))
    layer.hold(*latents)
    layer.heads = (0, layer.keys.shape[1], layer.keys.shape[1])  # the cache of one process is not of a share of heads


def _describe(format: LatentFormat) -> dict[str, Any]:
    return dataclasses.asdict(format)  # of a PackedFormat: {"layout": ...}


def _format(description: dict[str, Any]) -> LatentFormat:
    if "layout" not in description:
        return PlainFormat(**description)
    layout = description["layout"]
    return PackedFormat(PackedLayout(**layout | {"bits": tuple(layout["bits"])}))

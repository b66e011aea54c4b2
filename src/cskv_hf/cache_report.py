"""What a CSKVCache holds and what it costs, as a table to read."""

from __future__ import annotations

from collections.abc import Sequence

from .cache_layer import CSKVLayer
from .model_shape import tokens_in_full_cache
from .tokens import TokenTable


def report(tokens: TokenTable | None, layers: Sequence[CSKVLayer], offloading: bool) -> str:
    """A line for each part: tokens of a row (with the places of its padding), and bytes of all rows and layers."""
    if tokens is None or tokens.num_slots == 0:
        return "CSKVCache: empty"
    rows, num_heads, _, head_dim = layers[0].keys.shape
    lines = [f"CSKVCache: {tokens.num_slots} tokens x {rows} rows, {len(layers)} layers, {layers[0].dtype}"]
    parts = [
        ("sinks, exact", tokens.num_sinks, ("sink_keys", "sink_values")),
        ("old, latents", tokens.num_old, ("key_latents", "value_latents")),
        ("recent, exact", tokens.num_recent, ("keys", "values")),
    ]
    for name, count, names in parts:
        size = sum(t.numel() * t.itemsize for layer in layers for n in names for t in layer.tensors()[n])
        lines.append(f"  {name:<14}{count:>8} tokens {size:>14,} bytes")
    sliding = [layer for layer in layers if layer.dropped_blocks]
    if sliding:
        dropped = sliding[0].dropped_blocks * tokens.block_size
        lines.append(f"  {'sliding layers':<14}{tokens.num_old - dropped:>8} of these in {len(sliding)} layers")
    lines.append(f"  {'positions':<14}{tokens.num_slots:>8} tokens {tokens.nbytes:>14,} bytes")
    num_tokens = sum(tokens_in_full_cache(tokens.num_slots, layer.sliding_window) for layer in layers)
    full = 2 * num_heads * head_dim * layers[0].keys.itemsize * rows * num_tokens
    held, offloaded = tokens.nbytes + sum(x.nbytes for x in layers), sum(x.offloaded_nbytes for x in layers)
    lines.append(f"  {'total':<22}        {held:>14,} bytes, {100 * held / full:.1f} % of a full cache")
    if offloading:
        devices = ", ".join(sorted({str(layer.device) for layer in layers}))
        lines.append(f"  {'offloaded, on the CPU':<22}        {offloaded:>14,} bytes")
        lines.append(f"  {'on ' + devices:<22}        {held - offloaded:>14,} bytes")
    return "\n".join(lines)

"""What one decode step of one layer's attention costs, counted, and what that takes on a device; which key layout is
quickest there.

A step puts one token into the cache and attends to everything in it. Counted are multiply-adds, passes over elements,
bytes and operations, from sizes alone; a device is a few rates, measured on it in about a second (rates.py).
On a CPU, which does one long operation after the other, the times add up; in a GPU's kernels they overlap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import AutoConfig

from . import kernels
from .attention import CPU_TILE
from .config import CSKVConfig, bits_alike, num_key_groups
from .decompose import even_ranks
from .latents import LatentFormat, PackedFormat
from .model_shape import ModelShape
from .quantize import PLANES, channel_bits
from .rates import Device, between, full_bytes, measure_device

# Passes over float32 elements, each as long as turning a tile by RoPE: what the stages of the torch path took on one
# core, in such passes (benchmarks/cost.py shows what comes of it).
KEY_PASSES = 6  # of a rebuilt key: its mean is written, the product added, RoPE turns it, its score reads it
SOFTMAX_PASSES = 12  # of a score: maximum, difference, exponential, sum, and the copy that joins the heads
ANGLE_PASSES = 30  # of a pair of RoPE: cos and sin; once per step for all layers that turn alike
PLANE_PASSES = {1: 1, 2: 3.5, 3: 6}  # of a code in so many bit planes; joining two takes longer than reading them
RANGE_PASSES = 7.5  # of a code once unpacked: to a float, times its step, plus its minimum
PIECE_ELEMENTS = 300  # that one token's channels of a piece are worth, where latents are brought into their own order
# Operations on next to nothing that the rest is worth: of a step with what the cache does (Python and views included:
# what is left of a short context's time), of a tile, of a key group in it, of a tier of packed latents in it.
STEP_OPERATIONS, TILE_OPERATIONS, GROUP_OPERATIONS, TIER_OPERATIONS = 500, 20, 4, 8
KERNEL_OPERATIONS = 200  # of a step in which the kernels attend
GPU_OPERATIONS = 20  # of a step on a GPU: four launches, and what the cache does
# The same for the kernels of a CPU, in the passes above: of a rebuilt key that is turned, and scored by each query
# head that shares it, and of an angle, which each layer computes for itself.
TURNED_PASSES, SCORED_PASSES, COMPUTED_ANGLE_PASSES = 0.5, 0.15, 2
UNPACKED_PASSES = {1: 0.25, 2: 0.5, 3: 0.75}  # of a code in so many bit planes
# The same for the kernels of a GPU, in multiply-adds of its cores at the rate that `measure_device` finds: of a
# rebuilt key that is turned and scored, of a code in each of its bit planes, of a latent of 16 bits. By an H100, whose
# rate was not measured then and is taken to be 2.5e13 (benchmarks/results/gpu-kernels.json).
GPU_KEY_PASSES, GPU_PLANE_PASSES, GPU_PLAIN_PASSES = 10, 11, 57
KERNEL_ROWS = 32  # query rows for which the kernel of values unpacks once

LONGEST = 2**20  # tokens up to which `quicker_from` looks


@dataclass(frozen=True)
class Work:
    """What is to be done: floating-point operations of matrix products, elements passed over, bytes read from memory,
    operations dispatched."""

    flops: float = 0.0
    elements: float = 0.0
    bytes: float = 0.0
    operations: float = 0.0


@dataclass(frozen=True)
class Kept:
    """What a layer keeps of an old token: channels per key group, and how latents are stored."""

    key_ranks: tuple[int, ...]
    key_format: LatentFormat
    value_format: LatentFormat


@dataclass(frozen=True)
class Prediction:
    """What a step of one layer is predicted to take with one key layout.

    Attributes:
        key_layout: as in [`CSKVConfig`].
        seconds: of a step and layer, the mean over the layers.
        of_dynamic: relative to DynamicCache.
        quicker_from: the context in tokens from which on it is quicker than DynamicCache; None up to `LONGEST`.
    """

    key_layout: str
    seconds: float
    of_dynamic: float
    quicker_from: int | None


@dataclass(frozen=True)
class Recommendation:
    """Predictions for a device, in the order of the layouts, and the layout that is quickest."""

    context: int
    batch: int
    dynamic_seconds: float
    ready_seconds: float
    predictions: tuple[Prediction, ...]
    quickest: str


def recommend(
    config: CSKVConfig,
    shape: ModelShape,
    num_attention_heads: int,
    device: Device,
    context: int = 8192,
    batch: int = 1,
    key_layouts: Sequence[str] | None = None,
) -> Recommendation:
    """Predict a decode step for each key layout, with the sum of key ranks that the config has.

    Args:
        config: fitted, or a budget, which is then spent evenly.
        key_layouts: default: 'head', 'group:2', 'group:4' where they divide the heads, 'joint', and the config's own.

    Raises:
        ValueError: for sizes that do not go together, or a GPU that would have to do without the kernels.
    """
    check_sizes(shape, num_attention_heads, context, batch)
    if device.kind == "cuda":
        problem = kernels.why_not(torch.empty(1, 1, 1, shape.head_dim, dtype=device.dtype, device="meta"))
        if problem:
            raise ValueError(f"On a GPU only attention in the Triton kernels is predicted, and {problem}.")
    sizes = (shape, num_attention_heads)
    dynamic = full_seconds(*sizes, context, batch, device)
    predictions = []
    for key_layout in key_layouts or default_layouts(config.key_layout, shape.num_key_value_heads):
        layers = kept_layers(config, shape, key_layout)

        def mean(tokens: int, layers: Sequence[Kept] = layers) -> float:
            times = [seconds(compressed_work(k, config, *sizes, tokens, batch, device), device) for k in layers]
            return sum(times) / len(times)

        start = quicker_from(mean, lambda tokens: full_seconds(*sizes, tokens, batch, device))
        predictions.append(Prediction(key_layout, mean(context), mean(context) / dynamic, start))
    quickest = min(predictions, key=lambda p: p.seconds).key_layout
    ready = full_seconds(*sizes, context, batch, device, ready=True)
    return Recommendation(context, batch, dynamic, ready, tuple(predictions), quickest)


def predict(config: CSKVConfig, device: str, context: int = 8192, num_attention_heads: int | None = None) -> str:
    """Measure a device and say what a fitted adapter is predicted to take there; see [`recommend`].

    Raises:
        ValueError: for a device that is not there, an adapter without sizes, or one whose base model's config, which
            says how many query heads there are, cannot be read.
    """
    if config.model_shape is None:
        raise ValueError("This adapter does not say what model it was fitted to; fit it again with `cskv fit`.")
    shape = ModelShape(**config.model_shape)
    if num_attention_heads is None:
        try:
            base = AutoConfig.from_pretrained(config.base_model_name_or_path or "")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The config of the base model '{config.base_model_name_or_path}', which says how many query heads "
                "there are, cannot be read; give their number with `--query-heads`."
            ) from error
        config.check_model(ModelShape.from_model_config(base))
        num_attention_heads = base.get_text_config().num_attention_heads
    check_sizes(shape, num_attention_heads, context)
    rates = measure_device(device)
    return format_recommendation(recommend(config, shape, num_attention_heads, rates, context), rates)


def format_recommendation(found: Recommendation, device: Device) -> str:
    """A table of at most 80 columns and one line of advice."""
    lines = [
        f"predicted, not measured: a decode step of one layer on {device.kind}, "
        f"{str(device.dtype).removeprefix('torch.')},",
        f"{found.context:,} tokens x {found.batch}, relative to DynamicCache",
        f"{'keys':<20}{'ms':>10}{'x Dynamic':>12}{'quicker from':>20}",
        f"{'DynamicCache':<20}{1000 * found.dynamic_seconds:>10.3f}{1:>12.2f}",
        f"{'SDPA, ready cache':<20}{1000 * found.ready_seconds:>10.3f}"
        f"{found.ready_seconds / found.dynamic_seconds:>12.2f}",
    ]
    for p in found.predictions:
        start = "never" if p.quicker_from is None else f"{p.quicker_from:,} tokens"
        lines.append(f"{p.key_layout:<20}{1000 * p.seconds:>10.3f}{p.of_dynamic:>12.2f}{start:>20}")
    best = next(p for p in found.predictions if p.key_layout == found.quickest)
    if best.of_dynamic < 1:
        comparison = f"{best.of_dynamic:.2f} times DynamicCache's time"
    else:
        comparison = f"{best.of_dynamic:.2f} times DynamicCache's time (saves bytes only)"
    return "\n".join([*lines, f"quickest: '{best.key_layout}', {comparison}"])


def default_layouts(own: str, num_key_value_heads: int) -> list[str]:
    """The layouts to compare, from the smallest groups to one."""
    sizes = [n for n in (2, 4) if n < num_key_value_heads and num_key_value_heads % n == 0]
    layouts = ["head", *(f"group:{n}" for n in sizes), "joint"]
    return layouts if own in layouts else [*layouts[:-1], own, "joint"]


def kept_layers(config: CSKVConfig, shape: ModelShape, key_layout: str | None = None) -> list[Kept]:
    """What every layer keeps; under another layout than the config's, the same channels spread evenly over its
    groups."""
    own = key_layout in (None, config.key_layout) and config.is_fitted
    groups = num_key_groups(key_layout or config.key_layout, shape.num_key_value_heads)
    layers = []
    for layer_idx in range(shape.num_hidden_layers):
        if config.is_fitted:
            ranks, value_format = tuple(config.key_ranks[layer_idx]), config.formats(layer_idx)[1]
            bits = channel_bits(config.key_bits[layer_idx]) if config.key_bits else ()
        else:
            key_rank, value_rank = config.layer_ranks(shape)[layer_idx]
            ranks, stored = (key_rank,), config.uniform_bits
            bits, value_bits = (bits_alike(stored, r) for r in (key_rank, value_rank))
            value_format = config.format_of("value", value_bits, value_rank)
        if not own:
            ranks = even_ranks(sum(ranks), groups)
            by_value = sorted(bits, reverse=True)
            bits = tuple(b for g in range(groups) for b in by_value[g::groups])  # each group its share of every tier
        layers.append(Kept(ranks, config.format_of("key", bits, sum(ranks)), value_format))
    return layers


def quicker_from(
    compressed: Callable[[int], float], full: Callable[[int], float], longest: int = LONGEST
) -> int | None:
    """The context from which on compressed decoding is predicted quicker, for every power of two up to `longest`; None
    if it is not at the longest."""
    slower, quicker = 0, longest
    while quicker > 1 and compressed(quicker) < full(quicker):
        quicker //= 2
    slower, quicker = quicker, 2 * quicker
    if quicker > longest:
        return None
    while quicker - slower > max(1, quicker // 64):
        middle = (slower + quicker) // 2
        slower, quicker = (slower, middle) if compressed(middle) < full(middle) else (middle, quicker)
    return quicker


def seconds(work: Work, device: Device) -> float:
    """The sum of its parts on a CPU; in kernels the longest of those that overlap, and the launches."""
    parts = work.flops / device.matmul, work.elements / device.elements, work.bytes / device.read
    together = max(parts) if device.kind == "cuda" else sum(parts)
    return together + work.operations * device.operation


def compressed_flops(
    kept: Kept, shape: ModelShape, num_attention_heads: int, num_old: int, num_exact: int, batch: int
) -> int:
    """Of the matrix products of one step, exactly: keys rebuilt, scores and value latents of `num_old` tokens, both
    products with `num_exact` exact ones, and summed latents decoded once."""
    group_dim, value_rank = shape.kv_dim // len(kept.key_ranks), kept.value_format.rank
    wide = num_attention_heads * shape.head_dim
    of_old = sum(kept.key_ranks) * group_dim + wide + num_attention_heads * value_rank
    return 2 * batch * (num_old * of_old + num_exact * 2 * wide + wide * value_rank)


def compressed_work(
    kept: Kept,
    config: CSKVConfig,
    shape: ModelShape,
    num_attention_heads: int,
    context: int,
    batch: int,
    device: Device,
) -> Work:
    """One step of one layer with `context` tokens in the cache, over sinks, latents and window."""
    num_old = config.num_old_tokens(context)
    num_exact, heads_per_group = context - num_old, shape.num_key_value_heads // len(kept.key_ranks)
    flops = compressed_flops(kept, shape, num_attention_heads, num_old, num_exact, batch)
    formats = kept.key_format, kept.value_format
    stored = batch * num_old * sum(f.bytes_per_token(device.dtype) for f in formats)
    exact = batch * num_exact * 2 * shape.kv_dim
    if device.kind == "cuda":
        # a key group's latents are unpacked for each of its heads, values for every few rows; weights are written and
        # read once
        times = heads_per_group, math.ceil(num_attention_heads / KERNEL_ROWS)
        unpacked = sum(
            n * (GPU_PLANE_PASSES * sum(_planes(f)) if _planes(f) else GPU_PLAIN_PASSES * f.rank)
            for n, f in zip(times, formats)
        )
        elements = batch * num_old * (unpacked + GPU_KEY_PASSES * shape.kv_dim)
        moved = stored + (2 * batch * num_old * num_attention_heads + exact) * device.dtype.itemsize
        return Work(flops, elements, moved, GPU_OPERATIONS)
    if device.kernels:
        rows = num_attention_heads // shape.num_key_value_heads
        of_old = (TURNED_PASSES + SCORED_PASSES * rows) * shape.kv_dim
        of_old += sum(UNPACKED_PASSES[n] for f in formats for n in _planes(f))
        of_old += COMPUTED_ANGLE_PASSES * shape.head_dim / 2
        return Work(flops, batch * num_old * of_old + 2 * exact, stored, KERNEL_OPERATIONS)
    copied = batch > 1 and heads_per_group > 1  # a product over batch and heads at once needs them next to each other
    of_old = (KEY_PASSES + copied) * shape.kv_dim + sum(_read_passes(f, device.dtype) for f in formats)
    scores = SOFTMAX_PASSES * num_attention_heads * batch * context
    angles = ANGLE_PASSES * shape.head_dim / 2 * num_old / shape.num_hidden_layers
    factors = sum(kept.key_ranks) * shape.kv_dim / len(kept.key_ranks)  # rearranged for RoPE's pairs
    elements = batch * num_old * of_old + scores + angles + factors + 2 * exact
    widest = max(heads_per_group * shape.head_dim, *(f.rank for f in formats))
    tile = max(1, CPU_TILE // (batch * widest * config.block_size)) * config.block_size
    tiers = sum(len(f.layout.tiers) for f in formats if isinstance(f, PackedFormat))
    of_tile = TILE_OPERATIONS + GROUP_OPERATIONS * len(kept.key_ranks) + TIER_OPERATIONS * tiers
    return Work(flops, elements, stored, STEP_OPERATIONS + math.ceil(num_old / tile) * of_tile)


def _planes(format: LatentFormat) -> list[int]:
    """Bit planes of every channel."""
    return [len(PLANES[b]) for b in format.layout.bits] if isinstance(format, PackedFormat) else []


def _read_passes(format: LatentFormat, dtype: torch.dtype) -> float:
    """Elements passed over to read one token's latents: none, a cast, or unpacking."""
    planes = _planes(format)
    if not planes:
        return 0 if dtype.itemsize >= 4 else format.rank
    pieces = len(format.layout.pieces)
    ordered = PIECE_ELEMENTS * pieces if pieces > 1 else 0
    return sum(PLANE_PASSES[n] + RANGE_PASSES for n in planes) + ordered


def full_seconds(
    shape: ModelShape, num_attention_heads: int, context: int, batch: int, device: Device, ready: bool = False
) -> float:
    """One step of one layer with DynamicCache, or (`ready`) SDPA on keys and values that are simply there."""
    copied, attended = full_bytes(shape, num_attention_heads, context, batch, device.dtype.itemsize)
    of_head = context * shape.head_dim  # what has to stay in a core's cache for the heads that share it
    attention = attended / between(device.attended, of_head) + device.operation
    if ready:
        return attention
    of_layer = batch * shape.num_key_value_heads * of_head / 8
    return copied / between(device.copied, of_layer) + attention + 2 * device.operation


def check_sizes(shape: ModelShape, num_attention_heads: int, context: int, batch: int = 1) -> None:
    if num_attention_heads < 1 or num_attention_heads % shape.num_key_value_heads:
        raise ValueError(
            f"`num_attention_heads` must be a multiple of the model's {shape.num_key_value_heads} KV heads, got "
            f"{num_attention_heads}."
        )
    for name, value in (("context", context), ("batch", batch)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")

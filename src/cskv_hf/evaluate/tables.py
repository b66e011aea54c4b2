"""The tables of the CSKV paper as lists of methods, with this project's beside them (Wang et al. 2024, section 3).

"Removed" is the share of an old token's bytes in a 16-bit model. The paper's recipe keeps the same rank in every
layer, in 16 bits, and trains the factors on the calibration text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..config import POSITION_BYTES, CSKVConfig
from ..model_shape import PLAIN_BYTES, ModelShape
from ..quantize import RANGE_BYTES
from .methods import Method

PLAIN = {"bits": 16, "allocation": "uniform"}
PAPER = {"key_layout": "joint", "sinks": 0}
FULL = Method("full cache", kind="full")
RATIOS = (0.5, 0.6, 0.7, 0.8)
WINDOWS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
PACKED_WINDOWS = (32, 128, 512)
SPLITS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)  # of the channels kept, those of keys


def percent(compression: float) -> str:
    return f"{100 * compression:.3g} %"


def paper(compression: float, init: str = "asvd", train: bool = True) -> Method:
    """The paper's recipe: joint keys, no sinks, the same rank in every layer, 16 bits, an initialisation and, unless
    told otherwise, training."""
    recipe = init + (" + training" if train else "")
    settings = {"compression": compression, "init": init, **PLAIN, **PAPER}
    return Method(f"{percent(compression)} {recipe}", recipe, compression=compression, settings=settings, train=train)


def ours(compression: float, removed: float | None = None, **settings) -> Method:
    """What `compression` gives by default: no training, ranks and bits by one budget."""
    name, settings = f"{percent(compression)} ours", {"compression": compression, **settings}
    return Method(name, "ours", removed, compression=compression, settings=settings)


def alone(compression: float, **exact: int) -> Method:
    """Sinks and a window at the bytes of an adapter; `exact` are its window, sinks and block size."""
    cache = {"share": 1 - compression, **exact}
    return Method(
        f"{percent(compression)} window + sinks", "window + sinks", kind="window", compression=compression, cache=cache
    )


def packed_paper(rank_removed: float, kv_dim: int, *, train: bool, clamped: bool) -> Method:
    """The paper's ranks at `rank_removed`, packed in 4 bits in its layout: keys per channel, values per token.

    With the quantiser of its published code, whose zero point is clamped to the codes, or with a floating minimum.
    """
    rank = kept_rank(rank_removed, kv_dim)
    recipe = f"4 bits {'clamped' if clamped else 'floating'}, {'QAT' if train else 'PTQ'}"
    settings = {
        "key_rank": rank, "value_rank": rank, "init": "asvd", "bits": 4, "allocation": "uniform",
        "key_group": [32, 1], "value_group": [1, rank], **PAPER,
    }  # fmt: skip
    name = f"{percent(rank_removed)} of ranks, {recipe}"
    return Method(name, recipe, rank_removed, settings=settings, train=train, clamped=clamped)


def kept_rank(removed: float, kv_dim: int) -> int:
    """Channels that the paper keeps of a layer's keys or values."""
    return max(1, round((1 - removed) * kv_dim))


def methods_table(shape: ModelShape) -> list[Method]:
    """Table 1: the methods at 50, 80, 90 and 95 %, at equal bytes, and transformers' quantised cache at its own."""
    table = [FULL]
    table += [
        Method(
            f"quantised, {nbits} bits (quanto)",
            f"quantized cache, {nbits} bits",
            kind="quantized",
            cache={"nbits": nbits, "residual_length": 32},
        )
        for nbits in (4, 2)
    ]
    for compression in (0.5, 0.8):
        table += [alone(compression), paper(compression, train=False), paper(compression), ours(compression)]
    table += [alone(0.9), ours(0.9), alone(0.95)]
    packed = [packed_paper(0.8, shape.kv_dim, train=train, clamped=True) for train in (False, True)]
    table += [replace(method, removed=0.95) for method in packed]  # as the paper calls it
    table.append(ours(0.95))
    return table


def initialisation_table(shape: ModelShape) -> list[Method]:
    """Table 2: where training starts from; and the closed form, not trained, in the same ranks and bits."""
    table = [FULL]
    for compression in RATIOS:
        table += [paper(compression, init) for init in ("random", "svd", "asvd")]
        table += [paper(compression, init, train=False) for init in ("mse", "attention")]
        table.append(ours(compression))
    return table


def window_table(shape: ModelShape) -> list[Method]:
    """Table 3: exact tokens at 80 %, in the paper's recipe and in ours, whose packed latents leave the window in
    blocks of 32."""
    recipe = paper(0.8)
    settings = {**recipe.settings, "block_size": min(WINDOWS)}  # or the smallest windows would hold 32 tokens as well
    recipe = replace(recipe, settings=settings)
    table = [FULL]
    for method, windows in ((recipe, WINDOWS), (ours(0.8), PACKED_WINDOWS)):
        table += [replace(method, name=f"{method.name}, window {w}", cache={"window": w}) for w in windows]
    return table


def budget_table(shape: ModelShape) -> list[Method]:
    """Table 4: how the channels are split between keys and values, in the paper's recipe; and the split that the
    allocation finds, in 16 bits."""
    table = [FULL]
    for removed in (0.5, 0.75):
        channels = 2 * kept_rank(removed, shape.kv_dim)
        for share in SPLITS:
            key_rank = max(1, round(share * channels))
            if max(key_rank, channels - key_rank) > shape.kv_dim:
                continue
            ranks = {"key_rank": key_rank, "value_rank": channels - key_rank}
            name = f"{percent(removed)} asvd + training, {percent(share)} for keys"
            settings = {**ranks, "init": "asvd", **PLAIN, **PAPER}
            table.append(Method(name, "asvd + training", removed, settings=settings, train=True, key_share=share))
        table.append(
            replace(ours(removed, bits=16), name=f"{percent(removed)} ours in 16 bits", recipe="ours, 16 bits")
        )
    return table


def quantisation_table(shape: ModelShape) -> list[Method]:
    """Table 5: none, post-training and quantisation-aware, at four ratios, with the paper's quantiser and with ours;
    and this project's allocation at the bytes of each."""
    table = [FULL]
    full = 2 * shape.kv_dim * PLAIN_BYTES
    for removed in RATIOS:
        table.append(paper(removed))
        packed = [
            packed_paper(removed, shape.kv_dim, train=train, clamped=clamped)
            for clamped in (True, False)
            for train in (False, True)
        ]
        rank = kept_rank(removed, shape.kv_dim)
        latents = rank * (4 / 8 + RANGE_BYTES / 32) + rank * 4 / 8 + RANGE_BYTES  # keys and values of a layer
        table += packed
        equal = round(1 - (latents + POSITION_BYTES / shape.num_hidden_layers) / full, 3)
        table.append(ours(equal, removed))
    return table


TABLES: dict[str, Callable[[ModelShape], list[Method]]] = {
    "methods": methods_table,
    "initialisation": initialisation_table,
    "window": window_table,
    "budget": budget_table,
    "quantisation": quantisation_table,
}


def adapter_table(config: CSKVConfig, shape: ModelShape) -> list[Method]:
    """A model with an adapter of its own: the full cache, a window of equal bytes, and the adapter."""
    kept = config.bytes_per_token(shape) / shape.full_bytes_per_token
    window = alone(round(1 - kept, 4), window=config.window, sinks=config.sinks, block_size=config.block_size)
    return [FULL, window, Method("this adapter", compression=config.compression)]

"""Pictures of an adapter."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from .config import CSKVConfig

BITS_COLOURS = {
    2: "#d9e8d2",
    3: "#b7d7b0",
    4: "#8cc3a0",
    5: "#62a893",
    6: "#448a86",
    7: "#336b73",
    8: "#254d5c",
    16: "#15303f",
}


def plot_allocation(path: Path, config: CSKVConfig) -> None:
    """Draw the channels that a fitted adapter keeps in each layer, keys and values, by bits.

    Raises:
        ValueError: if the adapter is not fitted.
        ImportError: without matplotlib, saying how to get it.
    """
    if not config.is_fitted:
        raise ValueError("The adapter has no factors yet, there is nothing to draw.")
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("The plot needs matplotlib: `pip install 'cskv-hf[plot]'`.") from error
    layers = len(config.value_ranks)
    figure = Figure(figsize=(9.5, max(2.6, 0.22 * layers + 1.4)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True, sharex=True)
    used = set()
    for side, (axis, name) in enumerate(zip(axes, ("Keys", "Values"))):
        for layer_idx in range(layers):
            format, left = config.formats(layer_idx)[side], 0
            counts = Counter(format.channel_bits)
            for bits in sorted(counts, reverse=True):
                axis.barh(layer_idx, counts[bits], left=left, color=BITS_COLOURS[bits], height=0.8)
                left += counts[bits]
                used.add(bits)
        axis.set_title(f"{name}: channels kept", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("channels")
    kv_dim = config.model_shape["num_key_value_heads"] * config.model_shape["head_dim"]
    axes[0].set_xlim(0, kv_dim)
    axes[0].set_ylabel("layer")
    axes[0].invert_yaxis()
    axes[0].set_yticks(range(layers) if layers <= 16 else range(0, layers, 4))
    handles = [Patch(color=BITS_COLOURS[bits], label=f"{bits} bits") for bits in sorted(used, reverse=True)]
    axes[1].legend(handles=handles, fontsize=8, frameon=False, loc="lower right")
    figure.savefig(path, dpi=140)

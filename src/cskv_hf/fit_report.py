"""What a fit measured, an adapter's ``fit_report``: as it is made, printed, and dropped where it holds no longer."""

from __future__ import annotations

import textwrap
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from .config import CSKVConfig
from .latents import LatentFormat
from .model_shape import ModelShape

ERRORS = ("key_error", "value_error", "key_attention_error", "value_attention_error")
OF_THE_DATA = ("layer_idx", "key_mean_share", "value_mean_share")  # of a fit's report on a layer; not of its factors
OF_THE_RANKS = ("key_ranks", "value_rank", *ERRORS)


@dataclass(frozen=True)
class LayerReport:
    """What a fit achieved in one layer.

    Attributes:
        key_ranks, value_rank: channels kept, per key group and in total.
        key_bits, value_bits: of a latent, on average.
        key_error, value_error: share of the mean square of keys (before RoPE) and values lost on the calibration data.
        key_attention_error, value_attention_error: share of what queries read of old tokens, weighted by what scores
            and outputs make of it.
        key_mean_share, value_mean_share: share of the mean square of keys (before RoPE) and values that is their mean.
        bytes_per_token: of the layer's latents, ranges included; plain ones at 16 bits.
    """

    layer_idx: int
    key_ranks: tuple[int, ...]
    value_rank: int
    key_bits: float
    value_bits: float
    key_error: float
    value_error: float
    key_attention_error: float
    value_attention_error: float
    key_mean_share: float
    value_mean_share: float
    bytes_per_token: float


def layer_errors(config: CSKVConfig, layer_idx: int) -> dict[str, float] | None:
    """What the fit measured that the ranks of a layer lose; None unless it was measured at these ranks."""
    kept = (list(config.key_ranks[layer_idx]), config.value_ranks[layer_idx])
    for layer in (config.fit_report or {}).get("layers", []):
        if layer["layer_idx"] == layer_idx and (list(layer.get("key_ranks", [])), layer.get("value_rank")) == kept:
            return {name: layer[name] for name in ERRORS if name in layer}
    return None


def forget_measurements(config: CSKVConfig, new_ranks: Collection[int]) -> None:
    """Take out of the report of a fit what is not true of changed factors: the evaluation, storage (which the config
    states), and the errors of the layers `new_ranks`."""
    if config.fit_report:
        report = {name: value for name, value in config.fit_report.items() if name != "evaluation"}
        if "layers" in report:
            report["layers"] = [
                {
                    name: layer[name]
                    for name in (*OF_THE_DATA, *(() if layer["layer_idx"] in new_ranks else OF_THE_RANKS))
                    if name in layer
                }
                for layer in report["layers"]
            ]
        config.fit_report = report


def format_report(config: CSKVConfig) -> str:
    """What a fitted adapter keeps, layer by layer, as a table of at most 80 columns; with what the fit measured, where
    that holds for the ranks kept now."""
    if not config.is_fitted:
        return "not fitted yet"
    shape, report = ModelShape(**config.model_shape), config.fit_report or {}
    again = " with recall" if report.get("recall") else ""
    fitted = f"fitted on {report['num_tokens']:,} tokens{again}; " if "num_tokens" in report else ""
    lines = [
        f"CSKV adapter: init {config.init}, keys {config.key_layout}, window {config.window} + {config.sinks} sinks",
        f"{fitted}kv_dim {shape.kv_dim} ({shape.num_key_value_heads} heads x {shape.head_dim})",
    ]
    if "trained" in report:
        lines.append(f"fine-tuned after the fit, objective '{report['trained']}'")
    lines += [
        "",
        "        channels kept      bits each       energy lost       lost in attention",
        "layer   keys  values   keys  values    keys    values     keys    values",
    ]
    unknown = False
    for layer_idx in range(shape.num_hidden_layers):
        keys, values = config.formats(layer_idx)
        errors = layer_errors(config, layer_idx) or {}
        lost = [f"{100 * errors[name]:>6.2f} %" if name in errors else f"{'-':>6}  " for name in ERRORS]
        unknown |= not errors
        lines.append(
            f"{layer_idx:>5}  {keys.rank:>5}  {values.rank:>6}  {mean_bits(keys):>5.1f}  {mean_bits(values):>6.1f} "
            + " ".join(lost).rstrip()
        )
    if unknown:
        lines.append("- was not measured: the adapter was cut or trained after the fit")
    total = config.bytes_per_token(shape)
    full = shape.full_bytes_per_token
    lines.append("")
    lines.append(f"an old token takes {total:,.1f} of {full:,} bytes at 16 bits: {100 * total / full:.1f} %")
    lines.append("(its position included)")
    return "\n".join(lines)


def format_evaluation(evaluation: dict[str, Any]) -> str:
    """What was recorded in ``fit_report["evaluation"]``, as lines of at most 80 columns."""
    return (
        textwrap.fill(f"on {evaluation['tokens']:,} tokens of {evaluation['source']}:", 80, break_on_hyphens=False)
        + f"\nperplexity x {ratio_text(evaluation)}, KL {evaluation['kl']:.5f} nats per token,\n"
        f"same next token {100 * evaluation['agreement']:.2f} %"
    )


def ratio_text(evaluation: dict[str, Any]) -> str:
    """The ratio of perplexities that was recorded, with its interval where there were rows enough for one."""
    low, high = evaluation["ratio_low"], evaluation["ratio_high"]
    interval = "no interval: few rows" if low is None else f"{low:.4f} to {high:.4f}"
    return f"{evaluation['ratio']:.4f} ({interval})"


def mean_bits(format: LatentFormat) -> float:
    """Bits of a code, averaged over the channels kept; 16 if plain."""
    return sum(format.channel_bits) / format.rank

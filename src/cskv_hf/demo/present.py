"""How the demo's results look: one table, one picture, one JSON file."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

COLOURS = {"random": "#9a9a9a", "svd": "#c98b3c", "asvd": "#b5533c", "mse": "#4c86b0", "attention": "#1f5f3f"}


@dataclass(frozen=True)
class Row:
    """One line of the demo's table.

    Attributes:
        compression: what was asked for; 0 is the full cache, 1 is no latents at all.
        bytes_per_token: that one more old token costs.
        cache_bytes: of one row of text of 1,024 tokens, everything counted.
        ratio: perplexity with a compressed past over that of the full cache; `ratio_low` and `ratio_high` its 95 %
            interval.
        accuracy, margin: line retrieval, and half its 95 % interval.
    """

    name: str
    compression: float
    bytes_per_token: float
    cache_bytes: int
    perplexity: float
    ratio: float
    ratio_low: float
    ratio_high: float
    accuracy: float
    margin: float


def format_table(rows: Sequence[Row]) -> str:
    """At most 80 columns."""
    full = rows[0]
    lines = [
        "                        bytes    cache, 1,024   perplexity,           line",
        "removed  factors    per token    tokens, bytes  times the full  retrieval",
    ]
    last = None
    for row in rows:
        if last is not None and row.compression != last:
            lines.append("")
        last = row.compression
        kept = f"{100 * row.cache_bytes / full.cache_bytes:.1f} %"
        label = "-" if row.compression in (0.0, 1.0) else f"{100 * row.compression:.0f} %"
        lines.append(
            f"{label:>7}  {row.name:<10}{row.bytes_per_token:>9,.0f}  {row.cache_bytes:>9,} {kept:>7}"
            f"  {row.ratio:>6.3f} ±{(row.ratio_high - row.ratio_low) / 2:.3f}  {row.accuracy:.3f} ±{row.margin:.3f}"
        )
    return "\n".join(lines)


def save_results(out: Path, rows: Sequence[Row]) -> None:
    """Write ``demo.json`` and ``demo.png``."""
    out.mkdir(parents=True, exist_ok=True)
    environment = {name: version(name) for name in ("torch", "transformers", "peft")}
    environment |= {"python": platform.python_version(), "machine": platform.machine()}
    (out / "demo.json").write_text(
        json.dumps({"environment": environment, "rows": [asdict(r) for r in rows]}, indent=1)
    )
    plot(out / "demo.png", rows)


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Retrieval and perplexity by initialisation, at every compression; the full cache and window + sinks as lines.

    Raises:
        ImportError: without matplotlib, saying how to get it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The plot needs matplotlib: `pip install 'cskv-hf[plot]'`.") from error
    full, window = rows[0], rows[1]
    compressions = sorted({r.compression for r in rows[2:]})
    names = list(dict.fromkeys(r.name for r in rows[2:]))
    figure = Figure(figsize=(9.5, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        picked = [next(r for r in rows[2:] if r.name == name and r.compression == c) for c in compressions]
        x = [j + (i - (len(names) - 1) / 2) * width for j in range(len(picked))]
        colour = COLOURS.get(name, "#555555")
        left.bar(
            x,
            [r.accuracy for r in picked],
            width * 0.92,
            color=colour,
            label=name,
            yerr=[r.margin for r in picked],
            ecolor="#333333",
            capsize=2,
        )
        right.bar(x, [r.ratio - 1 for r in picked], width * 0.92, color=colour, bottom=1)
        for position, row in zip(x, picked):
            right.annotate(f"{row.ratio:.2f}", (position, row.ratio), ha="center", va="bottom", fontsize=7.5)
    for axis in (left, right):
        axis.set_xticks(range(len(compressions)), [f"{100 * c:.0f} % of the KV bytes removed" for c in compressions])
        axis.spines[["top", "right"]].set_visible(False)
    left.axhline(full.accuracy, color="#111111", linewidth=1, linestyle="--")
    left.annotate("full cache", (len(compressions) - 0.5, full.accuracy), ha="right", va="bottom", fontsize=8)
    left.axhline(window.accuracy, color="#888888", linewidth=1, linestyle=":")
    left.annotate(
        "window + sinks only", (-0.5, window.accuracy + 0.01), ha="left", va="bottom", fontsize=8, color="#666666"
    )
    left.set_title("Line retrieval, 100 lines: share of right answers", fontsize=10)
    left.set_ylim(0, 1.09)
    left.legend(fontsize=8, frameon=False, ncols=len(names), loc="upper center", bbox_to_anchor=(1.05, -0.1))
    right.set_title("Perplexity with a compressed past, times the full cache's", fontsize=10)
    right.set_ylim(1, None)
    figure.savefig(path, dpi=140)

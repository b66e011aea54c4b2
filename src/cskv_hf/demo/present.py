"""How the demo's results look: one table, one picture, one JSON file."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

NUM_LINES = 100
COLOURS = {
    "random": "#9a9a9a",
    "svd": "#c98b3c",
    "asvd": "#b5533c",
    "mse": "#4c86b0",
    "attention": "#1f5f3f",
    "allocated": "#3d9a70",
    "packed": "#7a3e9d",
    "packed+QAT": "#b58ad0",
}


@dataclass(frozen=True)
class Row:
    """One line of the demo's table.

    Attributes:
        compression: what was asked for; 0 is the full cache, 1 is no latents at all.
        bytes_per_token: that one more old token costs, in a 16-bit model.
        cache_bytes: of one row of text of 1,024 tokens in a 16-bit model, everything counted.
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


def check_plots() -> None:
    """Before anything is measured.

    Raises:
        ImportError: without matplotlib, saying how to get it.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("The plot needs matplotlib: `pip install 'cskv-hf[plot]'`.") from error


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Retrieval and perplexity by initialisation, at every compression; the full cache and window + sinks as lines."""
    from matplotlib.figure import Figure

    full, window, measured = rows[0], rows[1], rows[2:]
    places, labels, place = [], [], 0.0
    for last, row in zip([None, *measured], measured):
        place += 1.0 if last is None or last.compression == row.compression else 1.7
        places.append(place)
        labels.append(f"{100 * row.compression:.0f} %  {row.name}")
    colours = [COLOURS.get(row.name, "#555555") for row in measured]
    figure = Figure(figsize=(9.5, 0.27 * place + 1.1), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    margins = [row.margin for row in measured]
    left.barh(places, [row.accuracy for row in measured], color=colours, xerr=margins, ecolor="#333333", capsize=2)
    left.axvline(full.accuracy, color="#111111", linewidth=1, linestyle="--", label="full cache")
    left.axvline(window.accuracy, color="#888888", linewidth=1.2, linestyle=":", label="window + sinks only")
    left.set_title(f"Line retrieval, {NUM_LINES} lines: share of right answers", fontsize=10)
    left.set_xlim(0, 1.05)
    left.set_yticks(places, labels, fontsize=8.5)
    left.invert_yaxis()
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    right.barh(places, [row.ratio - 1 for row in measured], left=1, color=colours)
    for position, row in zip(places, measured):
        right.annotate(f" {row.ratio:.3f}", (max(1.0, row.ratio), position), va="center", fontsize=7.5)
    right.set_title("Perplexity with a compressed past, times the full cache's", fontsize=10)
    right.set_xlim(1, 1 + 1.15 * max(row.ratio - 1 for row in measured) + 1e-3)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)

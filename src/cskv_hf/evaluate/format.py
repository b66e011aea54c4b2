"""Results as tables: text for a terminal of 80 columns, Markdown for a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .benchmarks import ALL

NAME_WIDTH, CELL_WIDTH, MAX_COLUMNS = 42, 6, 5
RATIOS = ("perplexity_ratio", "kl", "agreement")  # of a text, in this order


def text_tables(rows: Sequence[dict[str, Any]]) -> str:
    """Every table of the results, one block per benchmark and a line per method.

    A benchmark of many groups is shown by the mean over all of them; ``results.json`` has each.
    """
    blocks = []
    for table, benchmark in dict.fromkeys((row["table"], row["benchmark"]) for row in rows):
        part = [row for row in rows if row["table"] == table and row["benchmark"] == benchmark]
        columns = columns_of(part)
        width = max(CELL_WIDTH, (80 - NAME_WIDTH - 7) // max(3, len(columns)))
        lines = [
            f"{table}: {benchmark if len(benchmark) < 60 else '…' + benchmark[-58:]}",
            f"{'':<{NAME_WIDTH}}{'cache':>7}" + "".join(f"{c[2]:>{width}}" for c in columns),
        ]
        for name in dict.fromkeys(row["label"] for row in part):
            own = [row for row in part if row["label"] == name]
            cells = [format_value(find(own, *c[:2])) for c in columns]
            short = name if len(name) < NAME_WIDTH else name[: NAME_WIDTH - 2] + "…"
            lines.append(
                f"{short:<{NAME_WIDTH}}{100 * own[0]['cache_share']:>5.1f} %" + "".join(f"{c:>{width}}" for c in cells)
            )
        skipped, cut = max(row["skipped"] for row in part), max(row["details"].get("cases_cut", 0) for row in part)
        if skipped:
            lines.append(f"skipped, too long for the model's context: {skipped}")
        if cut:
            lines.append(f"cut in the middle by --cut: {cut}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def columns_of(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Group, metric and heading of the columns that show one benchmark's rows."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    groups = list(dict.fromkeys(row["group"] for row in rows))
    if "kl" in metrics:
        heads = {"perplexity_ratio": "ppl ratio", "kl": "KL", "agreement": "same"}
        return [(groups[0], metric, heads[metric]) for metric in RATIOS]
    if len(groups) > MAX_COLUMNS:
        groups = [ALL]
    return [(group, metrics[0], group.split(" ")[0] if len(groups) > 1 else metrics[0]) for group in groups]


def find(rows: Sequence[dict[str, Any]], group: str, metric: str, benchmark: str | None = None) -> dict | None:
    """The row of a group and metric, or None."""
    for row in rows:
        if row["group"] == group and row["metric"] == metric and benchmark in (None, row["benchmark"]):
            return row
    return None


def format_value(row: dict[str, Any] | None, interval: bool = False) -> str:
    """A number with as many digits as it deserves; "-" where there is none; with its interval if wanted."""
    if row is None or row["value"] is None:
        return "-"
    digits = 4 if row["metric"] in ("perplexity_ratio", "kl") else 3
    text = f"{row['value']:.{digits}f}"
    if interval and row["low"] is not None:
        text += f" ({row['low']:.{digits}f}–{row['high']:.{digits}f})"
    return text


def markdown_table(rows: Sequence[dict[str, Any]], table: str, columns: Sequence[tuple[str, str, str, str]]) -> str:
    """One table of the results, a line per method.

    Args:
        columns: benchmark, group, metric and heading of each.
    """
    part = [row for row in rows if row["table"] == table]
    lines = [
        "| | bytes per old token | whole cache | " + " | ".join(c[3] for c in columns) + " |",
        "|---|---:|---:|" + "---:|" * len(columns),
    ]
    for name in dict.fromkeys(row["label"] for row in part):
        own = [row for row in part if row["label"] == name]
        per_token = "-" if own[0]["bytes_per_token"] is None else f"{own[0]['bytes_per_token']:,.0f}"
        cells = [format_value(find(own, group, metric, benchmark), True) for benchmark, group, metric, _ in columns]
        lines.append(f"| {name} | {per_token} | {100 * own[0]['cache_share']:.1f} % | {' | '.join(cells)} |")
    return "\n".join(lines)

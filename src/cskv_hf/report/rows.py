"""Measured rows, put in order for charts and tables. Pure functions of the rows of report.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .charts import Axis, Point, Reference, Series
from .formats import (
    METRICS,
    SPACE,
    Style,
    benchmark_name,
    exact,
    is_number,
    is_ours,
    measured,
    metric_of,
    percent,
    short_percent,
    significant,
    style_of,
    unknown_methods,
    with_interval,
)
from .scales import linear_domain, log_domain

Row = dict[str, Any]
FULL = "full cache"
THIS, ANOTHER = "this adapter", "another adapter"
ALL, MOST_GROUPS = "all", 6  # the group of all groups; groups with a chart each
WIDE_RATIO = 30.0  # between the largest and the smallest value, from which on an axis is logarithmic
DASHES = (None, "7 3", "2 3", "9 3 2 3", "4 2")


class Facet(NamedTuple):
    """What values can be compared: one chart, one column of a table."""

    benchmark: str
    group: str
    metric: str

    @property
    def name(self) -> str:
        group = f", {self.group}" if self.group else ""
        return f"{benchmark_name(self.benchmark)}{group}"

    @property
    def title(self) -> str:
        return f"{self.name}: {metric_of(self.metric).name}"


def facet_of(row: Row) -> Facet:
    return Facet(row["benchmark"], row["group"], row["metric"])


def facets(rows: Sequence[Row]) -> list[Facet]:
    """In the order of the benchmarks and groups, known measures first."""
    order, known = list(dict.fromkeys(facet_of(row) for row in rows)), list(METRICS)
    benchmarks = list(dict.fromkeys(facet.benchmark for facet in order))

    def rank(facet: Facet) -> tuple[int, int]:
        place = known.index(facet.metric) if facet.metric in known else len(known)
        return benchmarks.index(facet.benchmark), place

    return sorted(order, key=rank)


def charted(rows: Sequence[Row]) -> list[Facet]:
    """The facets worth a chart: those with a number, no perplexity where its ratio is there, and of a benchmark of
    many groups the mean over all."""
    found = facets([row for row in rows if is_number(row["value"])])
    ratios = {(f.benchmark, f.group) for f in found if f.metric == "perplexity_ratio"}
    groups = {f.benchmark: {g.group for g in found if g.benchmark == f.benchmark} for f in found}
    return [
        f
        for f in found
        if (f.metric != "perplexity" or (f.benchmark, f.group) not in ratios)
        and (f.group == ALL or ALL not in groups[f.benchmark] or len(groups[f.benchmark]) <= MOST_GROUPS)
    ]


def first_of_each(rows: Sequence[Row]) -> list[Row]:
    """Without what was measured before, in an earlier table say: the same method in the same facet."""
    found: dict[tuple[object, ...], Row] = {}
    for row in rows:
        found.setdefault((row["method"], row["removed"], row["window"], row["key_share"], facet_of(row)), row)
    return list(found.values())


def of_table(rows: Sequence[Row], *tables: str) -> list[Row]:
    return [row for row in rows if row["table"] in tables]


def is_placed(row: Row) -> bool:
    """Whether it is a field of a needle map: a depth of a length."""
    return is_number(row["details"].get("depth")) and length_of(row) is not None


def length_of(row: Row) -> float | None:
    """Tokens of the text that the needle was hidden in, or its lines."""
    found = [row["details"].get(name) for name in ("length", "num_lines")]
    return next((value for value in found if is_number(value)), None)


def has_size_of(adapter: dict[str, Any], row: Row) -> bool:
    """Whether a row is of an adapter of the same compression and bytes per token."""
    pairs = [(row["removed"], adapter["compression"]), (row["bytes_per_token"], adapter["bytes_per_token"])]
    return all(math.isclose(a, b, rel_tol=1e-6) if is_number(a) and is_number(b) else a is b for a, b in pairs)


def has_settings_of(adapter: dict[str, Any], row: Row) -> bool:
    """Whether a row of ours is of an adapter of the same size and window."""
    return is_ours(row["method"]) and has_size_of(adapter, row) and row["window"] in (None, adapter["window"])


def named(adapter: dict[str, Any], row: Row) -> tuple[str, str]:
    """The method, and in small that it is another adapter, where it is one of ours with other settings."""
    other = is_ours(row["method"]) and not has_settings_of(adapter, row)
    return row["method"], ANOTHER if other else ""


def removed(row: Row) -> str:
    """What was asked for, as a share removed."""
    return short_percent(row["removed"])


def share_of(row: Row, full_bytes: float) -> float | None:
    """Bytes of an old token as a share of the full cache's, from whichever of the fields says it."""
    if is_number(row["share"]):
        return row["share"]
    return row["bytes_per_token"] / full_bytes if is_number(row["bytes_per_token"]) else None


def place_of(row: Row, full_bytes: float) -> float | None:
    """Where a method stands among those that keep some bytes of every old token; None for the full cache.

    A window alone, whose old tokens cost nothing, stands at the compression that its bytes were made equal to; a
    cache without a number per token at its share of the whole context.
    """
    if row["method"] == FULL:
        return None
    share = share_of(row, full_bytes)
    if share == 0:
        share = 1 - row["removed"] if is_number(row["removed"]) else None
    elif share is None:
        share = row["cache_share"]
    return share if is_number(share) and share > 0 else None


def in_order(rows: Sequence[Row]) -> list[Row]:
    """The full cache first, then what has no compression, then by compression."""

    def rank(row: Row) -> tuple[int, float]:
        if row["method"] == FULL:
            return 0, 0.0
        return (2, row["removed"]) if is_number(row["removed"]) else (1, 0.0)

    return sorted(rows, key=rank)


def cut_text(row: Row) -> str:
    """How many of the questions lost their middle to `--cut`, where some did."""
    cut = row["details"].get("cases_cut")
    return f"{cut:,} cut" if is_number(cut) and cut else ""


def detail_text(row: Row) -> str:
    """The details that are a number or a text."""
    plain = {k: v for k, v in row["details"].items() if isinstance(v, (str, int, float)) and v != ""}
    return ", ".join(f"{key} {significant(v) if is_number(v) else v}" for key, v in plain.items())


def tooltip(row: Row) -> str:
    """Everything about a point in one line."""
    parts = [row["method"]]
    if is_number(row["removed"]):
        parts[0] += f", {removed(row)} removed"
    if is_number(row["window"]):
        parts.append(f"window {row['window']:g}")
    if is_number(row["key_share"]):
        parts.append(f"keys {percent(row['key_share'])}")
    parts.append(with_interval(row["metric"], row))
    if is_number(row["bytes_per_token"]):
        parts.append(f"{exact(row['bytes_per_token'])}{SPACE}bytes per old token")
    if is_number(row["total"]):
        parts.append(f"n{SPACE}={SPACE}{row['total']:,}")
    return "; ".join([*parts, *filter(None, [cut_text(row)])])


def value_axis(facet: Facet, rows: Sequence[Row]) -> Axis:
    """An axis for the values of a facet and their intervals: shares from 0 to 100 %, else what is needed."""
    kind = metric_of(facet.metric)
    values = [row[name] for row in rows for name in ("value", "low", "high") if is_number(row[name])]
    label = kind.name + (f" ({kind.better} is better)" if kind.better else "")
    positive = [v for v in values if v > 0]
    if not kind.share and len(positive) > 1 and min(values) >= 0 and max(positive) / min(positive) > WIDE_RATIO:
        return Axis(label, *log_domain(positive), "log", significant)
    if kind.share:
        low, high = linear_domain(values)
        low, high = 0.0 if low < 0.6 else low, 1.0 if high > 0.7 else high
        return Axis(label, low, high, format=short_percent)
    return Axis(label, *linear_domain(values), format=significant)


def point_of(row: Row, x: float) -> Point:
    ends = (row["low"], row["high"]) if is_number(row["low"]) and is_number(row["high"]) else (None, None)
    return Point(x, row["value"], *ends, title=tooltip(row))


def reference_of(row: Row, style: Style | None = None) -> Reference:
    point = point_of(row, 0.0)
    return Reference(row["method"], style or style_of(row["method"]), point.y, point.low, point.high, point.title)


def series_by(rows: Sequence[Row], x: Callable[[Row], float | None]) -> tuple[list[Series], list[Reference]]:
    """Rows of one facet as lines over `x`, one per method and, where `x` is not the compression, per compression; rows
    without an `x` as references."""
    rows = [row for row in rows if is_number(row["value"])]
    others = unknown_methods([row["method"] for row in rows])
    found: dict[str, list[Row]] = {}
    references = []
    for row in rows:
        if x(row) is None:
            references.append(reference_of(row, style_of(row["method"], others)))
        else:
            found.setdefault(row["method"], []).append(row)
    lines = []
    for method, members in found.items():
        style, points = style_of(method, others), {}
        for row in members:
            points.setdefault(x(row), []).append(row)
        several = any(len(same) > 1 for same in points.values())
        keys = list(dict.fromkeys(removed(row) if several else "" for row in members))
        for key, dash in zip(keys, DASHES * len(keys)):
            kept = [row for row in members if not key or removed(row) == key]
            name = f"{method}, {key}" if len(keys) > 1 else method
            drawn = Style(style.colour, style.marker, style.open, style.strong, style.dash or dash)
            lines.append(Series(name, drawn, tuple(point_of(row, x(row)) for row in kept)))
    return lines, references


def value_of(row: Row) -> tuple[str, str]:
    """A table's cell: the value, and its interval in small."""
    text, ends = measured(row["metric"], row["value"]), ""
    whole = with_interval(row["metric"], row)
    if whole != text:
        ends = whole.removeprefix(text).strip(" ()")
    if not is_number(row["value"]) and is_number(row["skipped"]) and row["skipped"]:
        ends = f"{row['skipped']:,} skipped"
    return text, ends

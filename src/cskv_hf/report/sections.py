"""The sections of the page about what was measured. Pure functions of report.json; a section without data says what to
run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .charts import Axis, Cell, heat_map, line_chart
from .formats import (
    MISSING,
    benchmark_name,
    count,
    exact,
    is_number,
    is_ours,
    measured,
    metric_of,
    percent,
    short_percent,
    significant,
    size,
)
from .markup import Safe, join, tag
from .rows import (
    FULL,
    Facet,
    Row,
    charted,
    detail_text,
    facet_of,
    facets,
    in_order,
    of_table,
    removed,
    series_by,
    share_of,
    tooltip,
    value_axis,
    value_of,
)
from .tables import Head, Line, table

KNOWN_TABLES = ("methods", "initialisation", "window", "budget", "quantisation", "needle")
MEASURE = "cskv eval {adapter} --tables {table} --out results.json"


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        id: its anchor.
        title: its heading, and its name among the contents.
        body: everything below the heading.
        measured: None for what the adapter itself says, else whether there is a measurement.
    """

    id: str
    title: str
    body: Safe
    measured: bool | None = None


def missing(what: str, name: str, data: dict[str, Any]) -> Safe:
    """The line of a section without data."""
    command = MEASURE.format(adapter=data["adapter"]["name"], table=name)
    return tag("p", f"{what} To measure it: ", tag("code", command), class_="missing")


def figure(caption: str, chart: Safe, note: str = "") -> Safe:
    under = tag("small", note) if note else None
    return tag("figure", tag("figcaption", caption, under), tag("div", chart, class_="chart"))


def grid(figures: Sequence[Safe]) -> Safe:
    return tag("div", list(figures), class_="grid")


def quality_section(data: dict[str, Any]) -> Section:
    """Every measure against the bytes that an old token keeps: methods, then initialisations."""
    title, parts = "Quality against size", []
    for name, heading, note in (
        ("methods", "Methods", "Each method at every compression it was measured at."),
        ("initialisation", "Initialisations", "The same storage; only the way to find the factors differs."),
    ):
        parts.append(tag("h3", heading))
        rows = of_table(data["rows"], name)
        charts = [quality_chart(facet, rows, data) for facet in charted(rows)]
        if charts:
            parts.append(tag("p", f"{note} Whiskers and bands are 95", "\u00a0", "% intervals.", class_="note"))
            parts.append(grid(charts))
        else:
            parts.append(missing(f"{heading} were not compared.", name, data))
    return Section("quality", title, join(parts), bool(of_table(data["rows"], "methods", "initialisation")))


def quality_chart(facet: Facet, rows: Sequence[Row], data: dict[str, Any]) -> Safe:
    full_bytes = data["adapter"]["full_bytes_per_token"]
    rows = [row for row in rows if facet_of(row) == facet]

    def share(row: Row) -> float | None:
        kept = share_of(row, full_bytes)
        return None if row["method"] == FULL or kept is None or kept <= 0 else kept

    series, references = series_by(rows, share)
    shares = [point.x for one in series for point in one.points] or [0.05, 0.5]
    x = Axis(
        "bytes kept of an old token, % of the full cache",
        max(shares) * 1.12, min(shares) / 1.12, "log", short_percent, count=6,
    )  # fmt: skip
    chart = line_chart(facet.title, x, value_axis(facet, rows), series, references=_drawable(references, facet, rows))
    return figure(facet.name, chart)


def _drawable(references: Sequence[Any], facet: Facet, rows: Sequence[Row]) -> list[Any]:
    """References but those at 0 on a logarithmic axis, which has no place for them."""
    log = value_axis(facet, rows).kind == "log"
    return [reference for reference in references if not log or reference.y > 0]


def window_section(data: dict[str, Any]) -> Section:
    """Measures against the window."""
    rows = of_table(data["rows"], "window")
    title, adapter = "Window", data["adapter"]
    note = tag(
        "p", f"This adapter keeps the last {adapter['window']} and the first {adapter['sinks']} tokens exactly."
    )
    if not rows:
        return Section(
            "window", title, join([note, missing("Other windows were not measured.", "window", data)]), False
        )
    charts = [
        swept_chart(
            facet, rows, data["rows"], "window", "window, tokens", "log2", count, (adapter["window"], "this adapter")
        )
        for facet in charted(rows)
    ]
    heads = [Head("window", "tokens"), Head("method", text=True), Head("removed")]
    lines = [(count(row["window"]), row["method"], removed(row)) for row in rows]
    return Section("window", title, join([note, grid(charts), pivot("Window", heads, lines, rows)]), True)


def budget_section(data: dict[str, Any]) -> Section:
    """Measures against the share of the bytes that keys get."""
    rows, layers = of_table(data["rows"], "budget"), data["adapter"]["layers"]
    keys, values = (sum(layer[f"{side}_bytes"] for layer in layers) for side in ("key", "value"))
    split = keys / (keys + values)
    note = tag(
        "p",
        f"Of the {exact(keys + values)} bytes that this adapter's latents take per old token, {exact(keys)} are keys' "
        f"({percent(split)}) and {exact(values)} values'.",
    )
    title = "Keys and values"
    if not rows:
        return Section(
            "budget", title, join([note, missing("Other splits were not measured.", "budget", data)]), False
        )
    charts = [
        swept_chart(
            facet, rows, data["rows"], "key_share", "share of the bytes for keys", "linear", short_percent,
            (split, "this adapter"),
        )
        for facet in charted(rows)
    ]  # fmt: skip
    heads = [Head("keys", "of the bytes"), Head("method", text=True), Head("removed")]
    lines = [(percent(row["key_share"]), row["method"], removed(row)) for row in rows]
    return Section("budget", title, join([note, grid(charts), pivot("Keys and values", heads, lines, rows)]), True)


def swept_chart(
    facet: Facet,
    rows: Sequence[Row],
    everything: Sequence[Row],
    field: str,
    label: str,
    kind: str,
    format: Any,
    mark: tuple[float, str],
) -> Safe:
    """A chart of one facet over a field of the rows, the full cache as a reference wherever it was measured."""
    rows = [row for row in rows if facet_of(row) == facet]

    def place(row: Row) -> float | None:
        usable = is_number(row[field]) and row["method"] != FULL and (row[field] > 0 or kind == "linear")
        return row[field] if usable else None

    if not any(row["method"] == FULL for row in rows):
        rows = (
            rows
            + [r for r in everything if r["method"] == FULL and facet_of(r) == facet and is_number(r["value"])][:1]
        )
    series, references = series_by(rows, place)
    places = sorted({point.x for one in series for point in one.points} | {mark[0]})
    low, high = places[0], places[-1]
    if kind == "linear":
        margin = 0.05 * (high - low) or 0.05
        x = Axis(label, max(0.0, low - margin), min(1.0, high + margin), format=format)
    else:
        x = Axis(label, low / 1.2, high * 1.2, kind, format, count=7)
    references = _drawable(references, facet, rows)
    chart = line_chart(facet.title, x, value_axis(facet, rows), series, references=references, marks=[mark])
    return figure(facet.name, chart)


def quantisation_section(data: dict[str, Any]) -> Section:
    """Ways of storing the latents, by compression: one table per measure."""
    rows = of_table(data["rows"], "quantisation")
    groups = ", ".join(f"{s}s {data['adapter'][f'{s}_group']}" for s in ("key", "value"))
    packed = data["adapter"]["key_group"] is not None
    note = f"Latents of this adapter are packed; ranges are shared by [tokens, channels]: {groups}."
    note = tag("p", note if packed else "Latents of this adapter are not packed: 16 bits each.")
    if not rows:
        absent = missing("No way of packing was compared.", "quantisation", data)
        return Section("quantisation", "Quantisation", join([note, absent]), False)
    tables = []
    for facet in facets(rows):
        mine = [row for row in rows if facet_of(row) == facet]
        compressions = sorted({row["compression"] for row in mine if is_number(row["compression"])})
        columns = list(compressions) + ([None] if any(not is_number(r["compression"]) for r in mine) else [])
        names = list(dict.fromkeys((row["method"], detail_text(row)) for row in mine))
        heads = [Head("method", text=True)]
        heads += [Head(MISSING if c is None else f"{short_percent(c)} removed") for c in columns]
        lines = []
        for method, detail in names:
            cells: list[object] = [(method, detail)]
            for column in columns:
                found = [
                    row
                    for row in mine
                    if (row["method"], detail_text(row)) == (method, detail)
                    and (row["compression"] if is_number(row["compression"]) else None) == column
                ]
                cells.append(value_of(found[-1]) if found else "")
            lines.append(Line(cells, is_ours(method)))
        tables.append(table(facet.title, heads, lines))
    return Section("quantisation", "Quantisation", join([note, tag("div", tables, class_="tables")]), True)


def needle_section(data: dict[str, Any]) -> Section:
    """Depth and length, one map per method."""
    rows = of_table(data["rows"], "needle")
    placed = [r for r in rows if is_number(r["details"].get("depth")) and is_number(r["details"].get("length"))]
    if not rows:
        return Section("needle", "Needle map", missing("No needle was looked for.", "needle", data), False)
    panels = dict.fromkeys(
        (row["method"], row["compression"], facet_of(row).benchmark, row["metric"]) for row in placed
    )
    maps = [
        needle_map(panel, [r for r in placed if (r["method"], r["compression"], r["benchmark"], r["metric"]) == panel])
        for panel in panels
    ]
    parts = [tag("p", "A fact hidden at a depth of a text of a length, and asked for: the share of right answers.")]
    parts.append(grid(maps) if maps else None)
    others = [row for row in rows if row not in placed]
    if others:
        heads = [Head("method", text=True), Head("removed")]
        lines = [(row["method"], removed(row)) for row in others]
        parts.append(pivot("Without a depth and a length", heads, lines, others))
    return Section("needle", "Needle map", join(parts), True)


def needle_map(panel: tuple[str, float | None, str, str], rows: Sequence[Row]) -> Safe:
    method, compression, _, metric = panel
    depths = sorted({row["details"]["depth"] for row in rows})
    lengths = sorted({row["details"]["length"] for row in rows})
    cells = {}
    for row in rows:
        where = depths.index(row["details"]["depth"]), lengths.index(row["details"]["length"])
        share = row["value"] if is_number(row["value"]) else None
        text = measured(metric, share).removesuffix("\u00a0%").removesuffix(".0")
        cells[where] = Cell(
            share, text, f"{tooltip(row)}; depth {percent(depths[where[0]], 0)}, {count(lengths[where[1]])} tokens"
        )
    name = method + (f", {short_percent(compression)} removed" if is_number(compression) else "")
    kind = metric_of(metric).name
    title = f"Needle in a haystack, {name}: {kind} by depth and length"
    unit = f"{kind}, %" if metric_of(metric).share else kind
    map_ = heat_map(
        title, "text, tokens", "depth", [count(n) for n in lengths], [percent(d, 0) for d in depths], cells
    )
    return figure(name, map_, unit)


def comparison_section(data: dict[str, Any]) -> Section:
    """All methods side by side: bytes, then every measure with its interval; a table per benchmark."""
    rows = in_order(of_table(data["rows"], "methods", "initialisation"))
    if not rows:
        return Section("comparison", "All methods", missing("Methods were not compared.", "methods", data), False)
    parts = []
    for benchmark in dict.fromkeys(row["benchmark"] for row in rows):
        mine = [row for row in rows if row["benchmark"] == benchmark]
        heads = [
            Head("method", text=True), Head("removed"), Head("bytes", "per old token"),
            Head("share", "of the full cache"), Head("cache", "as measured"),
        ]  # fmt: skip
        full_bytes = data["adapter"]["full_bytes_per_token"]
        lines = [
            (
                row["method"], removed(row), exact(row["bytes_per_token"]), percent(share_of(row, full_bytes)),
                size(row["cache_bytes"]),
            )
            for row in mine
        ]  # fmt: skip
        parts.append(tag("h3", benchmark_name(benchmark)))
        parts.append(pivot(f"All methods: {benchmark_name(benchmark)}", heads, lines, mine, groups=True))
    return Section("comparison", "All methods", join(parts), True)


def pivot(
    caption: str, heads: Sequence[Head], names: Sequence[tuple[object, ...]], rows: Sequence[Row], groups: bool = False
) -> Safe:
    """Rows that share their first cells become one line, with a column for every facet.

    Args:
        names: the first cells of every row; `heads` are theirs.
        groups: whether a rule goes where the compression changes.
    """
    columns = facets(rows)
    one = len({facet.benchmark for facet in columns}) == 1
    found: dict[tuple[object, ...], dict[Facet, Row]] = {}
    for name, row in zip(names, rows):
        facet, key = facet_of(row), name
        while facet in found.get(key, {}) and value_of(found[key][facet]) != value_of(row):
            key = (*key, "again")  # measured twice with different outcomes: two lines
        found.setdefault(key, {})[facet] = row
    all_heads = list(heads)
    for facet in columns:
        totals = {row["total"] for row in (cells.get(facet) for cells in found.values()) if row}
        notes = [facet.group if one else facet.name]
        if len(totals) == 1 and is_number(next(iter(totals))):
            notes.append(f"n = {count(next(iter(totals)))}")
        all_heads.append(Head(metric_of(facet.metric).name, ", ".join(n for n in notes if n)))
    mixed = not all(is_ours(row["method"]) for row in rows)  # else there is nothing to point out
    lines, last = [], None
    for key, cells in found.items():
        some = next(iter(cells.values()))
        values = [value_of(cells[facet]) if facet in cells else "" for facet in columns]
        starts = groups and last is not None and some["compression"] != last["compression"]
        lines.append(Line([*key[: len(heads)], *values], mixed and is_ours(some["method"]), starts))
        last = some
    return table(caption, all_heads, lines)


def other_section(data: dict[str, Any]) -> Section | None:
    """Tables that this page has no picture for, as they are."""
    rows = [row for row in data["rows"] if row["table"] not in KNOWN_TABLES]
    if not rows:
        return None
    parts = []
    for name in dict.fromkeys(row["table"] for row in rows):
        mine = of_table(rows, name)
        heads = [Head("method", text=True), Head("removed"), Head("bytes", "per old token")]
        lines = [((row["method"], detail_text(row)), removed(row), exact(row["bytes_per_token"])) for row in mine]
        parts += [tag("h3", name), pivot(name, heads, lines, mine)]
    return Section("other", "Other measurements", join(parts), True)


def all_rows(rows: Sequence[Row]) -> Safe:
    """Every row with every field, folded away."""
    heads = [
        Head("table", text=True), Head("method", text=True), Head("removed"), Head("window"), Head("keys"),
        Head("bytes", "per old token"), Head("share"), Head("cache", "bytes"), Head("benchmark", text=True),
        Head("group", text=True), Head("measure", text=True), Head("value"), Head("n"), Head("skipped"),
        Head("seconds"), Head("details", text=True),
    ]  # fmt: skip
    lines = [
        Line(
            [
                row["table"], row["method"], removed(row), count(row["window"]), percent(row["key_share"]),
                exact(row["bytes_per_token"]), percent(row["share"]), count(row["cache_bytes"]),
                benchmark_name(row["benchmark"]), row["group"], metric_of(row["metric"]).name, value_of(row),
                count(row["total"]), count(row["skipped"]), significant(row["seconds"], 3), detail_text(row),
            ],
            is_ours(row["method"]),
        )
        for row in rows
    ]  # fmt: skip
    summary = tag("summary", f"Every measurement ({len(rows):,} rows)")
    return tag("details", summary, table("Every measurement", heads, lines))

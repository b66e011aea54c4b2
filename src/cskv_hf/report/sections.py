"""The sections of the page about what was measured. Pure functions of report.json; a section without data says what to
run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .charts import Axis, Cell, heat_map, line_chart
from .formats import (
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
    first_of_each,
    in_order,
    is_placed,
    length_of,
    named,
    of_table,
    place_of,
    removed,
    series_by,
    share_of,
    tooltip,
    value_axis,
    value_of,
)
from .tables import Head, Line, table

KNOWN_TABLES = ("methods", "initialisation", "window", "budget", "quantisation", "adapter", "needle")
MEASURE_TABLE = "cskv eval {base} --tables {table} --benchmark text:FILE --data FILE --out FOLDER"
MEASURE_ADAPTER = "cskv eval {adapter} --benchmark {table}:FILE --out FOLDER"


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
    """The line of a section without data; `name` is a table of `cskv eval`, or "needle" or "text", benchmarks."""
    adapter = data["adapter"]
    command = MEASURE_ADAPTER if name in ("needle", "text") else MEASURE_TABLE
    command = command.format(adapter=adapter["name"], base=adapter["base_model"] or "MODEL", table=name)
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
        rows = of_table(data["rows"], *(("methods", "adapter") if name == "methods" else (name,)))
        rows = first_of_each([row for row in rows if not is_placed(row)])
        charts = [quality_chart(facet, rows, data) for facet in charted(rows)]
        if charts:
            if any(named(data["adapter"], row)[1] for row in rows):
                note += " Those called ours are adapters that cskv eval fitted; where it is marked so, with other "
                note += "settings than this one's."
            parts.append(tag("p", f"{note} Whiskers and bands are 95", "\u00a0", "% intervals.", class_="note"))
            if any(share_of(row, data["adapter"]["full_bytes_per_token"]) in (0, None) for row in rows):
                text = "A window alone stands where its bytes are equal, a cache without bytes per token at its share "
                parts.append(tag("p", text + "of the whole context.", class_="note"))
            parts.append(grid(charts))
        else:
            parts.append(missing(f"{heading} were not compared.", name, data))
    return Section("quality", title, join(parts), bool(of_table(data["rows"], "methods", "adapter", "initialisation")))


def quality_chart(facet: Facet, rows: Sequence[Row], data: dict[str, Any]) -> Safe:
    full_bytes = data["adapter"]["full_bytes_per_token"]
    rows = [row for row in rows if facet_of(row) == facet]

    series, references = series_by(rows, lambda row: place_of(row, full_bytes))
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
    charts = [quality_chart(facet, rows, data) for facet in charted(rows)]
    tables = [storage_table(facet, [row for row in rows if facet_of(row) == facet]) for facet in facets(rows)]
    parts = [note, grid(charts), tag("div", tables, class_="tables")]
    heads, names = byte_columns(rows, data["adapter"])
    parts.append(pivot("Ways of storing, by bytes", heads, names, rows, groups=True))
    return Section("quantisation", "Quantisation", join(parts), True)


def storage_table(facet: Facet, rows: Sequence[Row]) -> Safe:
    """Methods by what was removed; a column where two or more of them meet."""
    asked = [row["removed"] for row in first_of_each(rows) if is_number(row["removed"])]
    columns = sorted({c for c in asked if asked.count(c) > 1}) or sorted(set(asked))
    heads = [Head("method", text=True), *(Head(f"{short_percent(c)} removed") for c in columns)]
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = {row["removed"]: row for row in rows if row["method"] == method}
        if any(c in mine for c in columns):
            cells = [value_of(mine[c]) if c in mine else "" for c in columns]
            lines.append(Line([method, *cells], is_ours(method)))
    return table(facet.title, heads, lines)


def byte_columns(rows: Sequence[Row], adapter: dict[str, Any]) -> tuple[list[Head], list[tuple[object, ...]]]:
    """The first columns of a table of methods: name, what was removed, bytes."""
    heads = [
        Head("method", text=True), Head("removed"), Head("bytes", "per old token"),
        Head("share", "of the full cache's"), Head("cache", "as measured"),
    ]  # fmt: skip
    names: list[tuple[object, ...]] = []
    for row in rows:
        cache = percent(row["cache_share"]) if is_number(row["cache_share"]) else ""
        if cache and is_number(row["context_tokens"]):
            cache += f" of {count(row['context_tokens'])} tokens"
        share = percent(share_of(row, adapter["full_bytes_per_token"]))
        bytes_held = (size(row["cache_bytes"]), cache)
        names.append((named(adapter, row), removed(row), exact(row["bytes_per_token"]), share, bytes_held))
    return heads, names


def needle_section(data: dict[str, Any]) -> Section:
    """Depth and length, one map per method."""
    placed = [row for row in data["rows"] if is_placed(row)]
    others = [row for row in of_table(data["rows"], "needle") if not is_placed(row)]
    if not placed and not others:
        return Section("needle", "Needle map", missing("No needle was looked for.", "needle", data), False)
    panels: dict[tuple[object, ...], list[Row]] = {}
    for row in in_order(placed):
        panels.setdefault((row["benchmark"], row["method"], row["removed"], row["metric"]), []).append(row)
    parts = [tag("p", "A fact hidden at a depth of a text of a length, and asked for: the share of right answers.")]
    parts.append(grid([needle_map(rows) for rows in panels.values()]))
    if others:
        heads = [Head("method", text=True), Head("removed")]
        lines = [(row["method"], removed(row)) for row in others]
        parts.append(pivot("Without a depth and a length", heads, lines, others))
    return Section("needle", "Needle map", join(parts), True)


def needle_map(rows: Sequence[Row]) -> Safe:
    """One method's map."""
    first = rows[0]
    metric, unit = first["metric"], "tokens" if is_number(first["details"].get("length")) else "lines"
    depths = sorted({row["details"]["depth"] for row in rows})
    lengths = sorted({length_of(row) for row in rows})
    cells = {}
    for row in rows:
        where = depths.index(row["details"]["depth"]), lengths.index(length_of(row))
        share = row["value"] if is_number(row["value"]) else None
        text = measured(metric, share).removesuffix("\u00a0%").removesuffix(".0")
        place = f"depth {percent(depths[where[0]], 0)}, {count(lengths[where[1]])} {unit}"
        cells[where] = Cell(share, text, f"{tooltip(row)}; {place}")
    kind = metric_of(metric).name
    name = first["method"] + (f", {removed(first)} removed" if is_number(first["removed"]) else "")
    title = f"{benchmark_name(first['benchmark'])}, {name}: {kind} by depth and length"
    columns, lines = [count(n) for n in lengths], [percent(d, 0) for d in depths]
    chart = heat_map(title, f"text, {unit}", "depth", columns, lines, cells)
    return figure(name, chart, f"{kind}, %" if metric_of(metric).share else kind)


def comparison_section(data: dict[str, Any]) -> Section:
    """All methods side by side: bytes, then every measure with its interval; a table per benchmark."""
    rows = [row for row in of_table(data["rows"], "methods", "adapter", "initialisation") if not is_placed(row)]
    rows = in_order(rows)
    if not rows:
        return Section("comparison", "All methods", missing("Methods were not compared.", "methods", data), False)
    parts = []
    for benchmark in dict.fromkeys(row["benchmark"] for row in rows):
        mine = [row for row in rows if row["benchmark"] == benchmark]
        heads, names = byte_columns(mine, data["adapter"])
        parts.append(tag("h3", benchmark_name(benchmark)))
        parts.append(pivot(f"All methods: {benchmark_name(benchmark)}", heads, names, mine, groups=True))
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
        starts = groups and last is not None and some["removed"] != last["removed"]
        lines.append(Line([*key[: len(heads)], *values], mixed and is_ours(some["method"]), starts))
        last = some
    return table(caption, all_heads, lines)


def other_section(data: dict[str, Any]) -> Section | None:
    """Tables that this page has no picture for, as they are."""
    rows = [row for row in data["rows"] if row["table"] not in KNOWN_TABLES and not is_placed(row)]
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
                row["table"], row["name"], removed(row), count(row["window"]), percent(row["key_share"]),
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

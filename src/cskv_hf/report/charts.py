"""Charts as inline SVG. Pure functions of data; colours, weights and dark mode are the style sheet's.

Every chart is drawn at its natural size and scaled down only on screens narrower than that, so that text stays the
page's size. Marks carry a ``<title>``, which browsers show as a tooltip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .formats import Style
from .markup import Safe, join, number, tag
from .scales import Scale, linear_ticks, log_ticks, power_ticks, spread, text_width

WIDTH, HEIGHT = 420, 270
LABEL, TICK = 12.0, 11.0  # text, pixels
LONGEST_LABEL = 24  # characters
HEAT_TEXT = 0.66  # the share from which on the text of a field has the other colour


@dataclass(frozen=True)
class Axis:
    """One axis of a chart.

    Attributes:
        label: what it shows, with the unit.
        low, high: its ends; the first is left or at the bottom, so that `low` may be the greater.
        kind: "linear", "log" (ticks 1, 2, 5) or "log2" (ticks are powers of two).
        format: of the tick labels.
        ticks: values to label in the place of round ones.
        count: ticks at most.
    """

    label: str
    low: float
    high: float
    kind: str = "linear"
    format: Callable[[float], str] = "{:g}".format
    ticks: tuple[float, ...] | None = None
    count: int = 5

    def scale(self, start: float, stop: float) -> Scale:
        return Scale(self.low, self.high, start, stop, self.kind != "linear")

    def tick_values(self) -> list[float]:
        if self.ticks is not None:
            return list(self.ticks)
        places = {"linear": linear_ticks, "log": log_ticks, "log2": power_ticks}[self.kind]
        return places(min(self.low, self.high), max(self.low, self.high), self.count)


@dataclass(frozen=True)
class Point:
    """A measured point; `low` and `high` are its interval, `title` its tooltip."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    title: str = ""


@dataclass(frozen=True)
class Series:
    """Points joined by a line, labelled at its end."""

    name: str
    style: Style
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Reference:
    """A value without a place on the x axis: a line across the chart, its interval as a band."""

    name: str
    style: Style
    y: float
    low: float | None = None
    high: float | None = None
    title: str = ""


@dataclass(frozen=True)
class Band:
    """An area between two curves, (x, low, high) at every point."""

    style: Style
    points: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Frame:
    """The rectangle that data is drawn in, and its scales."""

    left: float
    right: float
    top: float
    bottom: float
    x: Scale
    y: Scale


def line_chart(
    title: str,
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    *,
    references: Sequence[Reference] = (),
    bands: Sequence[Band] = (),
    marks: Sequence[tuple[float, str]] = (),
    description: str = "",
    labels: bool = True,
    markers: bool = True,
    width: float = WIDTH,
    height: float = HEIGHT,
) -> Safe:
    """Lines, points with their intervals, references; names at the ends of lines.

    Args:
        title, description: for screen readers.
        marks: (x, text) of vertical lines.
        labels, markers: whether to draw them.
    """
    names = [item.name for item in (*series, *references)] if labels else []
    right = 14.0 + max((text_width(_cut(name), LABEL) for name in names), default=0.0)
    frame = _frame(x, y, width, height, right)
    ordered = sorted(series, key=lambda s: s.style.strong)  # ours on top
    parts = [_axes(frame, x, y, height)]
    parts += [_band(frame, band) for band in bands]
    parts += [_reference(frame, reference) for reference in references]
    parts += [_mark(frame, place, text) for place, text in marks]
    parts += [_series(frame, one, markers) for one in ordered]
    if labels:
        parts.append(_end_labels(frame, series, references))
    return _svg(title, description, width, height, parts)


def _frame(x: Axis, y: Axis, width: float, height: float, right: float) -> Frame:
    left = 12.0 + max((text_width(y.format(tick), TICK) for tick in y.tick_values()), default=0.0)
    top, bottom = 30.0, height - 40.0
    return Frame(left, width - right, top, bottom, x.scale(left, width - right), y.scale(bottom, top))


def _axes(frame: Frame, x: Axis, y: Axis, height: float) -> Safe:
    parts = []
    for value in y.tick_values():
        place = frame.y(value)
        parts.append(tag("path", d=f"M{_xy(frame.left, place)}H{number(frame.right)}", class_="grid"))
        parts.append(_text(y.format(value), frame.left - 6, place + 4, "tick", "end"))
    last = -1e9
    for value in sorted(x.tick_values(), key=frame.x):
        place, half = frame.x(value), text_width(x.format(value), TICK) / 2
        parts.append(tag("path", d=f"M{_xy(place, frame.bottom)}v4", class_="axis"))
        if place - half > last + 3:  # a label that would run into the last one is left out
            parts.append(_text(x.format(value), place, frame.bottom + 17, "tick", "middle"))
            last = place + half
    parts.append(tag("path", d=f"M{_xy(frame.left, frame.bottom)}H{number(frame.right)}", class_="axis"))
    parts.append(_text(y.label, 0, 12, "unit"))
    parts.append(_text(x.label, (frame.left + frame.right) / 2, height - 5, "unit", "middle"))
    return join(parts)


def _band(frame: Frame, band: Band) -> Safe:
    there = [_xy(frame.x(x), frame.y(high)) for x, _, high in band.points]
    back = [_xy(frame.x(x), frame.y(low)) for x, low, _ in reversed(band.points)]
    return tag("path", d="M" + "L".join(there + back) + "Z", class_=f"band c-{band.style.colour}")


def _reference(frame: Frame, reference: Reference) -> Safe:
    parts = []
    if reference.low is not None and reference.high is not None:
        top, bottom = frame.y(reference.high), frame.y(reference.low)
        parts.append(
            tag("rect", x=frame.left, y=top, width=frame.right - frame.left, height=bottom - top, class_="band")
        )
    place = frame.y(reference.y)
    line = f"M{_xy(frame.left, place)}H{number(frame.right)}"
    parts.append(tag("path", tag("title", reference.title or reference.name), d=line, class_="reference"))
    return tag("g", parts, class_=f"c-{reference.style.colour}")


def _mark(frame: Frame, place: float, text: str) -> Safe:
    x = frame.x(place)
    return join(
        [
            tag("path", d=f"M{_xy(x, frame.bottom)}V{number(frame.top)}", class_="mark"),
            _text(text, x, frame.top - 3, "tick", "middle"),
        ]
    )


def _series(frame: Frame, series: Series, markers: bool) -> Safe:
    points = sorted(series.points, key=lambda point: frame.x(point.x))
    places = [(frame.x(point.x), frame.y(point.y)) for point in points]
    line = "M" + "L".join(_xy(*place) for place in places)
    parts = []
    if len(points) > 1:
        parts.append(tag("path", d=line, class_="line", stroke_dasharray=series.style.dash))
    for point, (px, _) in zip(points, places):
        if point.low is not None and point.high is not None:
            low, high = frame.y(point.low), frame.y(point.high)
            caps = f"M{_xy(px - 3, high)}h6M{_xy(px - 3, low)}h6"
            parts.append(tag("path", d=f"M{_xy(px, low)}V{number(high)}{caps}", class_="whisker"))
    if markers:
        for point, (px, py) in zip(points, places):
            shape = tag(
                "path",
                d=marker(series.style.marker, px, py),
                class_="marker open" if series.style.open else "marker",
            )
            target = tag("circle", tag("title", point.title or series.name), cx=px, cy=py, r=9, class_="target")
            parts.append(join([shape, target]))
    strong = " strong" if series.style.strong else ""
    return tag("g", parts, class_=f"c-{series.style.colour}{strong}")


def _end_labels(frame: Frame, series: Sequence[Series], references: Sequence[Reference]) -> Safe:
    ends = []  # name, style, x and y of the last point
    for one in series:
        if one.points:
            last = max(one.points, key=lambda point: frame.x(point.x))
            ends.append((one.name, one.style, frame.x(last.x), frame.y(last.y)))
    ends += [(r.name, r.style, frame.right, frame.y(r.y)) for r in references]
    places = spread([end[3] for end in ends], 14.0, frame.top - 4, frame.bottom - 2)
    parts = []
    for (name, style, x, y), place in zip(ends, places):
        if frame.right - x > 6 or abs(place - y) > 3:
            leader = f"M{_xy(min(x + 6, frame.right), y)}L{_xy(frame.right + 5, place)}"
            parts.append(tag("path", d=leader, class_="leader"))
        strong = " strong" if style.strong else ""
        text = tag("text", _cut(name), tag("title", name), x=frame.right + 8, y=place + 4, class_="label")
        parts.append(tag("g", text, class_=f"c-{style.colour}{strong}"))
    return join(parts)


def marker(kind: str, x: float, y: float, radius: float = 4.0) -> str:
    """The path of a marker around a point; all kinds of about the same area."""
    if kind == "circle":
        half = f"a{number(radius)} {number(radius)} 0 1 0"
        return f"M{_xy(x - radius, y)}{half} {number(2 * radius)} 0{half} {number(-2 * radius)} 0Z"
    corners = {
        "square": ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),
        "triangle": ((0, -1.2), (1.1, 0.8), (-1.1, 0.8)),
        "diamond": ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
    }[kind]
    return "M" + "L".join(_xy(x + radius * dx, y + radius * dy) for dx, dy in corners) + "Z"


@dataclass(frozen=True)
class Column:
    """One stacked bar: `parts` are (class of the style sheet, size, tooltip), from the bottom."""

    x: int
    parts: tuple[tuple[str, float, str], ...]


def stacked_bars(
    title: str, x_label: str, y: Axis, columns: Sequence[Column], *, description: str = "", width: float = WIDTH
) -> Safe:
    """Bars side by side, one per whole number on the x axis."""
    first, last = min(c.x for c in columns), max(c.x for c in columns)
    x = Axis(x_label, first - 0.5, last + 0.5, format="{:.0f}".format, ticks=tuple(whole_ticks(first, last, 12)))
    frame = _frame(x, y, width, HEIGHT, 12.0)
    parts = [_axes(frame, x, y, HEIGHT)]
    room = (frame.right - frame.left) / (last - first + 1)
    wide = min(30.0, max(1.5, 0.78 * room))
    for column in columns:
        below = 0.0
        for colour, size, text in column.parts:
            top, bottom = frame.y(below + size), frame.y(below)
            box = {"x": frame.x(column.x) - wide / 2, "y": top, "width": wide, "height": bottom - top}
            parts.append(tag("rect", tag("title", text), **box, class_=f"bar {colour}"))
            below += size
    return _svg(title, description, width, HEIGHT, parts)


def whole_ticks(first: int, last: int, count: int) -> list[int]:
    """At most `count` whole numbers in equal steps of 1, 2, 4, 5, 8 or a multiple of 10, from `first` on."""
    for step in (1, 2, 4, 5, 8, *range(10, last - first + 12, 10)):
        places = list(range(first, last + 1, step))
        if len(places) <= count:
            return places
    return [first]


@dataclass(frozen=True)
class Cell:
    """One field of a heat map: `share` of the full colour, the text in it and its tooltip."""

    share: float | None
    text: str
    title: str


def heat_map(
    title: str,
    x_label: str,
    y_label: str,
    columns: Sequence[str],
    rows: Sequence[str],
    cells: dict[tuple[int, int], Cell],
    *,
    description: str = "",
) -> Safe:
    """Fields in rows and columns; `cells` by (row, column), a missing one is left empty.

    Text is left out where fields are too narrow for it; the tooltip has it.
    """
    left = 12.0 + max(text_width(row, TICK) for row in rows)
    widest = max((text_width(cell.text, TICK) for cell in cells.values()), default=0.0)
    width = float(WIDTH)
    field = min(64.0, (width - left - 4) / len(columns))
    tall, top = 28.0, 26.0
    height = top + tall * len(rows) + 40
    parts = [_text(y_label, 0, 12, "unit")]
    for r, row in enumerate(rows):
        parts.append(_text(row, left - 6, top + tall * (r + 0.5) + 4, "tick", "end"))
        for c in range(len(columns)):
            cell = cells.get((r, c))
            box = {"x": left + field * c + 1, "y": top + tall * r + 1, "width": field - 2, "height": tall - 2}
            if cell is None or cell.share is None:
                parts.append(
                    tag("rect", tag("title", cell.title if cell else "not measured"), **box, class_="nothing")
                )
                parts.append(_text("–", box["x"] + box["width"] / 2, box["y"] + 17, "tick", "middle"))
                continue
            share = min(1.0, max(0.0, cell.share))
            parts.append(
                tag("rect", tag("title", cell.title), **box, class_="heat", fill_opacity=f"{heat_opacity(share):.2f}")
            )
            if widest < field - 4:
                style = "heat-text high" if share > HEAT_TEXT else "heat-text"
                parts.append(_text(cell.text, box["x"] + box["width"] / 2, box["y"] + 17, style, "middle"))
    last = -1e9
    for c, column in enumerate(columns):
        place, half = left + field * (c + 0.5), text_width(column, TICK) / 2
        if place - half > last + 3:
            parts.append(_text(column, place, top + tall * len(rows) + 15, "tick", "middle"))
            last = place + half
    parts.append(_text(x_label, left + field * len(columns) / 2, height - 5, "unit", "middle"))
    return _svg(title, description, width, height, parts)


def heat_opacity(share: float) -> float:
    """Of the colour of a field over the page's: even 0 is told from a field without a value."""
    return 0.04 + 0.96 * share


def _svg(title: str, description: str, width: float, height: float, parts: Sequence[Safe]) -> Safe:
    return tag(
        "svg",
        tag("title", title),
        tag("desc", description) if description else None,
        list(parts),
        role="img",
        aria_label=title + (f". {description}" if description else ""),
        viewBox=f"0 0 {number(float(width))} {number(float(height))}",
        width=number(float(width)),
        height=number(float(height)),
    )


def _text(text: str, x: float, y: float, class_: str, anchor: str | None = None) -> Safe:
    return tag("text", text, x=float(x), y=float(y), class_=class_, text_anchor=anchor)


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST_LABEL else name[: LONGEST_LABEL - 1] + "…"


def _xy(x: float, y: float) -> str:
    return f"{number(float(x))} {number(float(y))}"

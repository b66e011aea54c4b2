"""Tables of a report as HTML: each in a box of its own that scrolls on a narrow screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .markup import Safe, tag


@dataclass(frozen=True)
class Head:
    """A column's heading.

    Attributes:
        note: a second, smaller line.
        text: whether the column holds words rather than numbers.
        span: columns that it covers.
    """

    name: str
    note: str = ""
    text: bool = False
    span: int = 1


@dataclass(frozen=True)
class Line:
    """A row: the first cell names it; `strong` is ours, `starts` begins a group."""

    cells: Sequence[object]
    strong: bool = False
    starts: bool = False


def table(caption: str, heads: Sequence[Head], lines: Sequence[Line], above: Sequence[Head] = ()) -> Safe:
    """A table with a caption; a cell is text, or (text, smaller text).

    Args:
        above: headings that cover several columns, in a row over `heads`.
    """
    rows = []
    if above:
        rows.append(tag("tr", [tag("th", h.name, colspan=h.span, scope="colgroup", class_="above") for h in above]))
    names = [
        tag("th", head.name, tag("small", head.note) if head.note else None, scope="col", class_=_kind(head))
        for head in heads
    ]
    rows.append(tag("tr", names))
    body = []
    for line in lines:
        first = tag("th", _cell(line.cells[0]), scope="row", class_=_kind(heads[0]))
        rest = [tag("td", _cell(cell), class_=_kind(head)) for cell, head in zip(line.cells[1:], heads[1:])]
        style = " ".join(name for name, on in (("strong", line.strong), ("starts", line.starts)) if on)
        body.append(tag("tr", first, rest, class_=style or None))
    whole = tag("table", tag("caption", caption), tag("thead", rows), tag("tbody", body))
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _kind(head: Head) -> str | None:
    return "words" if head.text else None


def _cell(cell: object) -> object:
    if isinstance(cell, tuple):
        return [cell[0], tag("small", cell[1]) if cell[1] else None]
    return cell

"""HTML and SVG as strings. Text is escaped unless it was made here: nothing read from a file becomes markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

VOID = ("meta", "br")  # elements without an end tag
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # no place in a document


class Safe(str):
    """Markup: goes into a page as it is."""


def escape(text: object) -> Safe:
    """Any text, as it goes into an element or a quoted attribute; what no document may hold becomes U+FFFD."""
    if isinstance(text, Safe):
        return text
    whole = str(text).encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair cannot be written
    return Safe(html.escape(CONTROL.sub("\ufffd", whole)))


def tag(name: str, /, *children: object, **attributes: object) -> Safe:
    """An element. Children are escaped unless [`Safe`]; None and False are left out, lists are taken apart.

    Args:
        attributes: a last underscore is dropped (``class_``), others become hyphens (``text_anchor``); None and False
            leave the attribute out, True gives it no value.
    """
    pairs = []
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is None or value is False:
            continue
        pairs.append(f" {key}" if value is True else f' {key}="{escape(number(value))}"')
    opening = f"<{name}{''.join(pairs)}>"
    return Safe(opening if name in VOID else f"{opening}{join(children)}</{name}>")


def join(children: Iterable[object], separator: str = "") -> Safe:
    """Children one after the other, as [`tag`] takes them."""
    parts = []
    for child in children:
        if isinstance(child, (list, tuple)):
            parts.append(join(child))
        elif child is not None and child is not False:
            parts.append(escape(child))
    return Safe(separator.join(parts))


def number(value: object) -> object:
    """Floats, which are coordinates here, to a tenth of a pixel; everything else as it is."""
    if not isinstance(value, float):
        return value
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text

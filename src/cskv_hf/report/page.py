"""report.json as one self-contained HTML page: no request, no script. Pure functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .adapter_sections import layers_section, memory_section, spectra_section
from .markup import Safe, tag
from .provenance import environment_section
from .sections import (
    Section,
    budget_section,
    comparison_section,
    needle_section,
    other_section,
    quality_section,
    quantisation_section,
    window_section,
)
from .summary import summary

STYLE = Path(__file__).with_name("style.css")


def page(data: dict[str, Any]) -> str:
    """The page for what [`report_data`] read."""
    sections = [
        memory_section(data),
        quality_section(data),
        layers_section(data),
        spectra_section(data),
        window_section(data),
        budget_section(data),
        quantisation_section(data),
        needle_section(data),
        comparison_section(data),
        other_section(data),
    ]
    shown = [section for section in sections if section is not None]
    whole = [Section("summary", "Summary", summary(data, shown)), *shown, environment_section(data)]
    name, base = data["adapter"]["name"], data["adapter"]["base_model"]
    title = f"CSKV report: {name}"
    contents = [tag("a", section.title, href=f"#{section.id}") for section in whole]
    body = tag(
        "body",
        tag(
            "header",
            tag("p", "CSKV report", class_="kicker"),
            tag("h1", name),
            tag("p", f"A compressed KV cache for {base}" if base else "A compressed KV cache", class_="subtitle"),
            tag("nav", contents, aria_label="Contents"),
        ),
        tag("main", [tag("section", tag("h2", s.title), s.body, id=s.id) for s in whole]),
        tag("footer", tag("p", f"Made by cskv-hf {data['cskv_hf']} from the files named above.")),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Safe(STYLE.read_text(encoding="utf-8"))),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"

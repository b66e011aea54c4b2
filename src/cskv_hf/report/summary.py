"""The first section of the page: what the adapter is, the numbers to know, what was measured and what was not."""

from __future__ import annotations

from typing import Any

from .formats import (
    MISSING,
    benchmark_name,
    count,
    exact,
    interval,
    is_number,
    measured,
    metric_of,
    percent,
    short_percent,
    size,
)
from .markup import Safe, join, tag
from .rows import FULL, THIS, Row, cut_text, facet_of, facets, has_settings_of, is_placed, of_table, value_of
from .sections import Section, missing
from .tables import Head, Line, table

HEADLINE_CONTEXT = 32768  # tokens, of the tile in the summary
INITS = {
    "attention": "factors optimal for what attention reads of old tokens",
    "mse": "factors of the least mean square error",
    "asvd": "factors by ASVD of the weights",
    "svd": "factors by SVD of the weights",
    "random": "random factors",
}


def summary(data: dict[str, Any], sections: list[Section]) -> Safe:
    """What the adapter is, the numbers to know, what was measured and what was not."""
    adapter = data["adapter"]
    return join(
        [
            tag("p", *_description(adapter), class_="lead"),
            tag("div", _tiles(data), class_="tiles"),
            _quality_table(data),
            _measured_or_not(data, sections),
        ]
    )


def _description(adapter: dict[str, Any]) -> list[object]:
    model = adapter["model"]
    asked = adapter["compression"]
    budget = f"asked to remove {short_percent(asked)}" if is_number(asked) else "with ranks given"
    packed = "packed in few bits" if adapter["key_group"] else "at 16 bits"
    spent = (
        "ranks and bits from one budget over all layers" if adapter["allocates"] else "the same rank in every layer"
    )
    fitted = ""
    if is_number(adapter["calibration_tokens"]):
        fitted = f" Fitted on {count(adapter['calibration_tokens'])} tokens"
        fitted += f" ({adapter['calibration_source']})." if adapter["calibration_source"] else "."
    return [
        "Outside the last ",
        f"{adapter['window']} and the first {adapter['sinks']} tokens, keys and values are kept as low-rank latents, "
        f"{packed}: ",
        tag("strong", f"{percent(adapter['bytes_per_token'] / adapter['full_bytes_per_token'])} of the bytes"),
        f" of a 16-bit cache, {budget}. Made for {model['model_type']} with {model['num_hidden_layers']} layers of "
        f"{model['num_key_value_heads']} KV heads × {model['head_dim']}: {INITS[adapter['init']]}"
        f"{', about the mean' if adapter['centers'] else ''}; {spent}; key layout {adapter['key_layout']}.{fitted}",
    ]


def _tiles(data: dict[str, Any]) -> list[Safe]:
    adapter = data["adapter"]
    full = adapter["full_bytes_per_token"]
    point = next(p for p in adapter["memory"] if p["tokens"] == HEADLINE_CONTEXT)
    tiles = [
        _tile(
            "An old token takes",
            f"{exact(adapter['bytes_per_token'])}\u00a0B",
            f"of {count(full)} B: {percent(adapter['bytes_per_token'] / full)}",
        ),
        _tile(
            f"Cache at {count(HEADLINE_CONTEXT)} tokens",
            size(point["cache_bytes"]),
            f"of {size(point['full_bytes'])}: {percent(point['cache_bytes'] / point['full_bytes'])}",
        ),
    ]
    rows = _headline_rows(data)
    for facet in facets(rows):
        row = next(r for r in rows if facet_of(r) == facet)
        kind = metric_of(facet.metric)
        known = {f.metric for f in facets(rows[: rows.index(row)])}  # one tile for a measure, the first
        if (
            facet.metric not in known
            and facet.metric in ("perplexity_ratio", "accuracy", "f1")
            and len(tiles) < 4
            and is_number(row["value"])
        ):
            name = (
                kind.name[0].upper() + kind.name[1:]
                if facet.metric != "perplexity_ratio"
                else "Perplexity, times the full"
            )
            ends = interval(facet.metric, row["low"], row["high"])
            tiles.append(
                _tile(name, measured(facet.metric, row["value"]), ", ".join(t for t in (facet.name, ends) if t))
            )
    return tiles


def _tile(name: str, value: str, under: str) -> Safe:
    return tag("dl", tag("dt", name), tag("dd", value, class_="big"), tag("dd", under), class_="tile")


def _evaluation_rows(data: dict[str, Any]) -> list[Row]:
    """What `cskv fit --evaluate` recorded in the adapter, as rows."""
    found = data["adapter"]["evaluation"]
    if not found:
        return []
    shared = {"table": "fit", "method": "ours", "benchmark": "text", "group": str(found.get("source") or "")}
    shared |= {"compression": data["adapter"]["compression"], "window": None, "key_share": None, "details": {}}
    shared |= {"bytes_per_token": data["adapter"]["bytes_per_token"], "share": None, "cache_bytes": None}
    shared |= {"name": "ours", "removed": data["adapter"]["compression"], "cache_share": None, "context_tokens": None}
    rows = []
    for metric, key in (
        ("perplexity_ratio", "ratio"),
        ("kl", "kl"),
        ("agreement", "agreement"),
        ("perplexity", "perplexity"),
    ):
        ends = (
            {"low": found.get("ratio_low"), "high": found.get("ratio_high")}
            if key == "ratio"
            else {"low": None, "high": None}
        )
        row = (
            shared
            | ends
            | {"metric": metric, "value": found.get(key), "total": None, "skipped": None, "seconds": None}
        )
        rows.append(row)
        if metric == "perplexity":
            rows.append(row | {"method": FULL, "value": found.get("perplexity_full")})
    return rows


def _headline_rows(data: dict[str, Any]) -> list[Row]:
    """Measurements of this adapter, else of ours with its settings; then those that the fit recorded."""
    mine = [row for row in of_table(data["rows"], "adapter") if row["method"].lower() == THIS]
    methods = [row for row in of_table(data["rows"], "methods") if has_settings_of(data["adapter"], row)]
    plain = [row for row in methods if "+" not in row["method"]]
    found = [*(mine or plain or methods), *(row for row in _evaluation_rows(data) if row["method"] != FULL)]
    return [row for row in found if not is_placed(row)]


def _quality_table(data: dict[str, Any]) -> Safe:
    rows = _headline_rows(data)
    if not rows:
        return missing("No quality of this adapter was measured.", "text", data)
    full = {
        facet_of(r): r
        for r in [*_evaluation_rows(data), *of_table(data["rows"], "adapter", "methods")]
        if r["method"] == FULL
    }
    lines = []
    for facet in facets(rows):
        for row in (r for r in rows if facet_of(r) == facet):
            other = value_of(full[facet]) if facet in full else MISSING
            total = count(row["total"]) if is_number(row["total"]) else ""
            lines.append(
                Line(
                    [
                        (benchmark_name(facet.benchmark), facet.group),
                        metric_of(facet.metric).name,
                        value_of(row),
                        other,
                        (total, cut_text(row)),
                    ]
                )
            )
    fitted = any(row["table"] == "methods" for row in rows)
    heads = [
        Head("benchmark", text=True),
        Head("measure", text=True),
        Head(THIS, "or one that cskv eval fitted with its settings" if fitted else ""),
        Head("full cache"),
        Head("n"),
    ]
    note = tag("p", "Small numbers are 95\u00a0% intervals.", class_="note")
    return join([tag("h3", "Quality at a glance"), table("Quality at a glance", heads, lines), note])


def _measured_or_not(data: dict[str, Any], sections: list[Section]) -> Safe:
    measured_ = [tag("a", s.title, href=f"#{s.id}") for s in sections if s.measured]
    absent = [tag("a", s.title, href=f"#{s.id}") for s in sections if s.measured is False]
    files = ", ".join(f"{r['file']}" for r in data["results"]) or "no results file was given"
    lines = []
    doubts = [tag("li", text) for result in data["results"] for text in whose(result, data["adapter"])]
    if measured_:
        lines.append(tag("li", tag("strong", "Measured: "), join(measured_, ", "), f" ({files})."))
    if absent:
        lines.append(
            tag("li", tag("strong", "Not measured: "), join(absent, ", "), "; each section says what to run.")
        )
    if data["adapter"]["evaluation"]:
        lines.insert(
            0,
            tag(
                "li",
                tag("strong", "Recorded by the fit: "),
                "perplexity, KL divergence and agreement on "
                f"{count(data['adapter']['evaluation'].get('tokens'))} tokens.",
            ),
        )
    return tag("ul", [*lines, *doubts], class_="measured")


def whose(result: dict[str, Any], adapter: dict[str, Any]) -> list[str]:
    """What is to be known about whose numbers a results file holds, where they are not surely the adapter's."""
    file, name, texts = result["file"], result["name"], []
    if result["same_model"] is None:
        base = adapter["base_model"]
        fitted = f"was fitted to {base}" if base else "does not say what it was fitted to"
        texts.append(
            f"{file} was measured on {result['base']}, the adapter {fitted}: the same sizes, but names do not tell "
            "whether they are the same model."
        )
    if result["same_adapter"] is False:
        texts.append(f"{file} was measured on another adapter, {name}, and is shown as that.")
    elif result["same_adapter"] is None and "adapter" in result["tables"]:
        texts.append(
            f"{file} was measured on {name}, an adapter of the same size, and does not say whether it is this one."
        )
    return texts

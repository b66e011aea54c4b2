"""The sections of the page about the adapter itself: memory, layers, spectra. Pure functions of report.json."""

from __future__ import annotations

from typing import Any

from .charts import Axis, Band, Column, Point, Series, line_chart, stacked_bars
from .formats import Style, count, exact, is_number, percent, short_percent, significant, size
from .markup import Safe, join, tag
from .scales import log_domain
from .sections import Section, figure, grid
from .tables import Head, Line, table

MOST_POINTS = 64  # of a line of a spectrum
MOST_MARKERS = 32  # layers; points of more are not marked
KEYS, VALUES = Style("keys", "circle"), Style("values", "square", dash="5 3")
SMALL = {"width": 270.0, "height": 190.0}
LOST, LOST_IN_ATTENTION = Style("plain", "square", open=True, dash="3 3"), Style("ours", "circle", strong=True)


def memory_section(data: dict[str, Any]) -> Section:
    """Bytes against tokens, with the formula."""
    adapter, curve = data["adapter"], data["adapter"]["curve"]
    full, name = Style("full"), "this adapter"
    latent = adapter["bytes_per_token"] - adapter["position_bytes"]
    exactly = adapter["sinks"] + adapter["window"]
    series = [
        Series("full cache", full, tuple(Point(p["tokens"], p["full_bytes"]) for p in curve)),
        Series(name, Style("ours", strong=True), tuple(Point(p["tokens"], p["cache_bytes"]) for p in curve)),
    ]
    band = Band(
        Style("ours"),
        tuple((p["tokens"], p["cache_bytes"], max(p["cache_bytes"], p["before_bytes"])) for p in curve),
    )
    tokens, sizes = [p["tokens"] for p in curve], [p["cache_bytes"] for p in curve] + [p["full_bytes"] for p in curve]
    x = Axis("tokens in the cache", tokens[0], tokens[-1], "log2", count, count=6)
    y = Axis("bytes of the cache, one sequence", *log_domain(sizes), "log", lambda v: size(v, zeros=False), count=6)
    last = curve[-1]
    description = (
        f"At {count(last['tokens'])} tokens the full cache takes {size(last['full_bytes'])}, this adapter "
        f"{size(last['cache_bytes'])}."
    )
    chart = line_chart(
        "Cache size against context length", x, y, series, bands=[band], markers=False, description=description
    )
    lines = [
        Line(
            [
                count(p["tokens"]),
                size(p["full_bytes"]),
                size(p["cache_bytes"]),
                percent(p["cache_bytes"] / p["full_bytes"]),
            ]
        )
        for p in adapter["memory"]
    ]
    heads = [Head("tokens"), Head("full cache"), Head("this adapter"), Head("share")]
    block = adapter["block_size"]
    formula = [
        f"old(n) = max(0, ⌊(n − {exactly}) / {block}⌋ · {block})",
        f"cache(n) = {exact(latent)} · old(n) + {count(adapter['full_bytes_per_token'])} · (n − old(n)) + "
        f"{adapter['position_bytes']} n + {count(adapter['constant_bytes'])}",
        f"full(n) = {count(adapter['full_bytes_per_token'])} · n",
    ]
    text = join(
        [
            tag(
                "p",
                f"Bytes of one sequence of n tokens in a 16-bit model. All but the first {adapter['sinks']} and at "
                f"least the last {adapter['window']} tokens are latents; tokens leave the window {block} at a time, "
                "which is the band in the picture. Every token has a position.",
            ),
            tag("pre", "\n".join(formula)),
            tag(
                "p",
                "RoPE types that change with the length (dynamic, longrope) add "
                f"{2 * adapter['model']['head_dim']} bytes to every token. A layer with a sliding window holds less: "
                "latents that no query can see any more are dropped.",
                class_="note",
            ),
        ]
    )
    side = tag("div", table("Cache size at some lengths", heads, lines), text)
    return Section(
        "memory", "Memory", tag("div", figure("Cache size against context length", chart), side, class_="pair")
    )


def layers_section(data: dict[str, Any]) -> Section:
    """What each layer keeps, and what that loses."""
    layers, kv_dim = data["adapter"]["layers"], data["adapter"]["model"]["kv_dim"]
    used = sorted(
        {bits for layer in layers for side in ("key", "value") for bits, _ in layer[f"{side}_channels"]}, reverse=True
    )
    most = max(layer[f"{side}_rank"] for layer in layers for side in ("key", "value"))
    y = Axis(f"channels kept, of {kv_dim:,}", 0, most * 1.05, format=count)
    charts = []
    for side, name in (("key", "Keys"), ("value", "Values")):
        columns = [
            Column(
                layer["layer_idx"],
                tuple(
                    (f"bits-{bits}", channels, f"layer {layer['layer_idx']}: {channels} channels of {bits} bits")
                    for bits, channels in layer[f"{side}_channels"]
                ),
            )
            for layer in layers
        ]
        charts.append(
            figure(
                f"{name}: channels kept",
                stacked_bars(f"{name}: channels kept, by layer and bits", "layer", y, columns),
            )
        )
    key = [tag("span", tag("i", class_=f"swatch bits-{bits}"), f"{bits} bits") for bits in used]
    parts = [tag("p", "Bits of a channel: ", key, class_="legend"), grid(charts)]
    parts.append(grid(_error_charts(layers)))
    note = "Errors are those of the ranks, on the calibration data, as the fit measured them: "
    note += "before quantisation and any training."
    if any(layer["key_error"] is None for layer in layers):
        note += " Layers without errors were cut since or trained, or fitted by a version that did not record them."
    parts += [tag("p", note, class_="note"), _layer_table(layers)]
    return Section("layers", "Layers", join(parts))


def _error_charts(layers: list[dict[str, Any]]) -> list[Safe]:
    charts = []
    names = [f"{side}{kind}" for side in ("key", "value") for kind in ("_error", "_attention_error")]
    values = [layer[name] for layer in layers for name in names if is_number(layer[name]) and layer[name] > 0]
    if not values:
        return []
    y = Axis("share of the energy lost", *log_domain(values), "log", short_percent, count=6)
    last = layers[-1]["layer_idx"]
    ticks = tuple(range(0, last + 1, max(1, -(-(last + 1) // 12))))
    x = Axis("layer", -0.4, last + 0.4, format="{:.0f}".format, ticks=ticks)
    for side, name in (("key", "Keys"), ("value", "Values")):
        series = []
        for kind, label, style in (
            ("_error", "as it is", LOST),
            ("_attention_error", "in attention", LOST_IN_ATTENTION),
        ):
            points = tuple(
                Point(
                    layer["layer_idx"],
                    layer[side + kind],
                    title=f"layer {layer['layer_idx']}: {short_percent(layer[side + kind])} lost {label}",
                )
                for layer in layers
                if is_number(layer[side + kind]) and layer[side + kind] > 0
            )
            if points:
                series.append(Series(label, style, points))
        charts.append(
            figure(
                f"{name}: energy lost",
                line_chart(
                    f"{name}: share of the energy lost, by layer", x, y, series, markers=len(layers) <= MOST_MARKERS
                ),
            )
        )
    return charts


def _layer_table(layers: list[dict[str, Any]]) -> Safe:
    above = [Head("")] + [
        Head(name, span=2)
        for name in (
            "channels",
            "bits each",
            "bytes per token",
            "energy lost",
            "lost in attention",
            "share of the mean",
        )
    ]
    heads = [Head("layer")] + [Head("keys"), Head("values")] * 6
    lines = []
    for layer in layers:
        cells: list[object] = [str(layer["layer_idx"])]
        for name, write in (
            ("rank", count), ("bits", lambda v: f"{v:.1f}"), ("bytes", exact), ("error", lambda v: percent(v, 2)),
            ("attention_error", lambda v: percent(v, 2)), ("mean_share", lambda v: percent(v, 0)),
        ):  # fmt: skip
            cells += [write(layer[f"{side}_{name}"]) for side in ("key", "value")]
        ranks = layer["key_ranks"]
        several = " + ".join(map(str, ranks)) if len(ranks) <= 4 else f"{min(ranks)} to {max(ranks)} a group"
        cells[1] = (cells[1], several if len(ranks) > 1 else "")
        lines.append(Line(cells))
    return table("What each layer keeps and loses", heads, lines, above)


def spectra_section(data: dict[str, Any]) -> Section:
    """Small multiples: how the energy of keys and values falls over the channels kept."""
    spectra, ours = data["adapter"]["spectra"], data["adapter"]
    if spectra is None:
        text = "The adapter's file holds no spectra. Fitted again with this version, it will: "
        line = tag(
            "p",
            text,
            tag("code", f"cskv fit {ours['base_model'] or 'MODEL'} --data FILE --out {ours['name']}"),
            class_="missing",
        )
        return Section("spectra", "Spectra", line)
    drawn = [
        (layer["layer_idx"], [_relative(g) for g in layer["keys"]], _relative(layer["values"])) for layer in spectra
    ]
    values = [v for _, keys, values in drawn for line in (*keys, values) for v in line]
    longest = max(len(line) for _, keys, values in drawn for line in (*keys, values))
    x = Axis("channel", 1, max(2, longest), format=count, count=5)
    y = Axis("energy, of the strongest", *log_domain([*values, 1.0]), "log", _power, count=5)
    charts = []
    for layer_idx, keys, layer_values in drawn:
        series = [Series("keys", KEYS, _points(line)) for line in keys] + [
            Series("values", VALUES, _points(layer_values))
        ]
        title = f"Layer {layer_idx}: energy of the channels of keys and values"
        charts.append(
            figure(f"Layer {layer_idx}", line_chart(title, x, y, series, labels=False, markers=False, **SMALL))
        )
    groups = len(spectra[0]["keys"])
    by = {"head": "per KV head", "joint": "of all heads jointly"}.get(
        ours["key_layout"], f"in {groups} groups of heads"
    )
    init = ours["init"]
    seen = "of what attention reads" if init == "attention" else f"as the initialisation {init} sees it"
    text = (
        f"Energy (squared singular value) of every channel kept, relative to the strongest of its group, {seen}. "
        "A curve that falls fast needs few channels; one that ends high was cut where it still carried something."
    )
    legend = tag(
        "p",
        tag("span", tag("i", class_="swatch line c-keys"), f"keys, {by}"),
        tag("span", tag("i", class_="swatch line dashed c-values"), "values"),
        class_="legend",
    )
    return Section("spectra", "Spectra", join([tag("p", text), legend, tag("div", charts, class_="grid small")]))


def _relative(energies: list[float]) -> list[float]:
    """Divided by the greatest; what is 0 has no place on a logarithmic axis."""
    positive = [e for e in energies if is_number(e) and e > 0]
    return [e / max(positive) for e in positive]


def _points(line: list[float]) -> tuple[Point, ...]:
    """At most MOST_POINTS of a line, first and last among them."""
    step = max(1, -(-(len(line) - 1) // (MOST_POINTS - 1)))
    places = [*range(0, len(line), step)]
    if line and places[-1] != len(line) - 1:
        places.append(len(line) - 1)
    return tuple(Point(i + 1, line[i]) for i in places)


def _power(value: float) -> str:
    return significant(value, 1)

"""A picture of what decode.py, memory.py or capacity.py measured: python benchmarks/plot.py FILE.json --out FILE.svg

Which of them it was is seen from what the file holds. The same file gives the same picture, to the byte for one
version of matplotlib (`pip install 'cskv-hf[plot]'`).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from cskv_hf.report.scales import spread

WIDTH = 7.3  # inches, 700 pixels of an SVG
GREY, INK = "#666666", "#222222"
SMALL = {"fontsize": 8, "color": GREY, "x": 0.01, "ha": "left"}
FULL = ("DynamicCache", "SDPA, ready cache", "StaticCache", "SDPA, queries packed")
OTHERS = {"quanto 4 bit": "#cc79a7", "hqq 4 bit": "#a0522d", "20% of the tokens": "#8a8a00"}
OURS = {("80%", "16 bit"): "#d55e00", ("80%", "packed"): "#0072b2", ("95%", "packed"): "#009e73"}


def style(name: str) -> dict:
    """Colour by what is stored, joint keys dashed; full caches grey."""
    if name in FULL:
        colour, dashes = INK if name == "DynamicCache" else GREY, ("-", ":", "-.", "--")[FULL.index(name)]
        return {"color": colour, "linestyle": dashes, "marker": "."}
    if name in OTHERS:
        return {"color": OTHERS[name], "linestyle": "-", "marker": "s"}
    removed, layout, storage = name.split(maxsplit=2)
    joint = layout == "joint"
    return {
        "color": OURS.get((removed, storage), "#e69f00"),
        "linestyle": "--" if joint else "-",
        "marker": "D" if joint else "o",
    }


def conditions(data: dict) -> str:
    """One line of what was measured where."""
    machine = data["machine"]
    where = machine["gpu"] if machine["gpu"] != "none" else f"{machine['cpu']}, threads: {machine['threads']}"
    return f"{data['dtype'].removeprefix('torch.')}, {where}"


def relative_times(runs: list[list[dict]], batch: int) -> dict[str, dict[int, list[float]]]:
    """Seconds relative to DynamicCache's of the same run: by cache and length, one number per run."""
    ratios: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        rows = [row for row in run if row["batch"] == batch]
        dynamic = {row["length"]: row["seconds"] for row in rows if row["cache"] == "DynamicCache"}
        for row in rows:
            of_length = ratios.setdefault(row["cache"], {}).setdefault(row["length"], [])
            of_length.append(row["seconds"] / dynamic[row["length"]])
    return ratios


def decode_picture(data: dict) -> Figure:
    """Time over context, a panel per batch; runs are taken to be of the same lengths and batches."""
    batches = sorted({row["batch"] for run in data["runs"] for row in run})
    figure = Figure(figsize=(WIDTH, 0.5 + 4.2 * len(batches)), layout="constrained")
    for axes, batch in zip(figure.subplots(len(batches), squeeze=False)[:, 0], batches):
        relative = relative_times(data["runs"], batch)
        lengths = sorted({length for by_length in relative.values() for length in by_length})
        last: dict[str, tuple[float, float]] = {}
        for i, (name, by_length) in enumerate(relative.items()):
            aside = (lengths[-1] / lengths[0]) ** (0.006 * (i - len(relative) / 2))  # keeps the ranges apart
            places = [length * aside for length in by_length]
            middle = [statistics.median(times) for times in by_length.values()]
            last[name] = places[-1], middle[-1]
            axes.plot(places, middle, **style(name), lw=1.6, ms=4)
            if name != "DynamicCache":
                ends = [(min(times), max(times)) for times in by_length.values()]
                axes.vlines(places, *zip(*ends), color=style(name)["color"], lw=1)
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        low, high = axes.get_ylim()
        ticks = [t for t in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16, 32, 64) if low <= t <= high]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(axis="y", color="#dddddd", lw=0.6)
        axes.set_xlabel("tokens in the cache" + (f", batch {batch}" if batches != [1] else ""))
        label_ends(figure, axes, last)
    title(figure, "Time of a decode step, DynamicCache = 1 (less is quicker)")
    runs = f"; median and range of {len(data['runs'])} runs" if len(data["runs"]) > 1 else ""
    figure.supxlabel(f"attention of one layer, {conditions(data)}{runs}", **SMALL)
    return figure


def label_ends(figure: Figure, axes: Axes, ends: dict[str, tuple[float, float]]) -> None:
    """Names at the right ends of the lines, moved apart where they would overlap."""
    figure.draw_without_rendering()
    heights = [y for _, y in axes.transData.transform(list(ends.values()))]
    bottom, top = axes.bbox.y0, axes.bbox.y1
    gap = 11.5 * figure.dpi / 72
    for (name, place), moved in zip(ends.items(), spread(heights, gap, bottom, top)):
        axes.annotate(
            name,
            place,
            xytext=(1.05, (moved - bottom) / (top - bottom)),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=style(name)["color"],
            arrowprops={"arrowstyle": "-", "color": "#aaaaaa", "lw": 0.6, "shrinkA": 0, "shrinkB": 4},
        )


def memory_picture(data: dict) -> Figure:
    figure = Figure(figsize=(WIDTH, 0.9 + 0.34 * len(data["rows"])), layout="constrained")
    peaks = {row["cache"]: row["peak"] / 1e6 for row in data["rows"]}
    dynamic = peaks["DynamicCache"]
    bars(figure.subplots(), peaks, {name: f"{peak:,.0f} MB, {peak / dynamic:.0%}" for name, peak in peaks.items()})
    title(figure, f"Peak memory of decoding, {data['length']:,} tokens, {data['layers']} layers")
    figure.supxlabel(f"beyond the weights, {conditions(data)}", **SMALL)
    return figure


def capacity_picture(data: dict) -> Figure:
    figure = Figure(figsize=(WIDTH, 1.1 + 0.34 * len(data["rows"])), layout="constrained")
    context, batch = figure.subplots(1, 2, sharey=True)
    for axes, key, text in (
        (context, "context", "longest context of one row"),
        (batch, "batch", f"most rows of {data['length']:,} tokens"),
    ):
        values = {row["cache"]: row[key] for row in data["rows"]}
        bars(axes, values, {name: f"{value:,}" for name, value in values.items()})
        axes.set_title(text, fontsize=9, loc="left")
    title(figure, f"What fits into {data['budget'] / 1e9:,.1f} GB, {data['layers']} layers")
    figure.supxlabel(f"weights not counted, {conditions(data)}", **SMALL)
    return figure


def bars(axes: Axes, values: dict[str, float], labels: dict[str, str]) -> None:
    drawn = axes.barh(list(values), list(values.values()), color=[style(n)["color"] for n in values], height=0.7)
    axes.bar_label(drawn, list(labels.values()), padding=4, fontsize=9)
    axes.margins(x=0.3)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(left=False)
    axes.set_xticks([])


def title(figure: Figure, text: str) -> None:
    figure.suptitle(text, fontsize=11, x=0.01, ha="left")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)


def picture(data: dict) -> Figure:
    """Of the JSON of decode.py, memory.py or capacity.py."""
    if "runs" in data:
        return decode_picture(data)
    return capacity_picture(data) if "budget" in data else memory_picture(data)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the picture: .svg, .png or .pdf")
    args = parser.parse_args(arguments)
    with matplotlib.rc_context({"svg.hashsalt": "cskv-hf", "font.size": 9}):
        figure = picture(json.loads(args.results.read_text()))
        metadata = {"Date": None} if args.out.suffix == ".svg" else None
        figure.savefig(args.out, dpi=140, metadata=metadata)


if __name__ == "__main__":
    main()

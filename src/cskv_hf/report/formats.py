"""How numbers, measures and methods are written and drawn, in one place. Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

MISSING = "–"
SPACE = "\u00a0"  # between a number and its unit: they stay on one line
BENCHMARKS = {
    "lines": "Line retrieval",
    "text": "Text",
    "needle": "Needle in a haystack",
    "longbench": "LongBench",
    "lveval": "LV-Eval",
    "generations": "The model's own text",
    "topics": "Topic retrieval",
}
MARKERS = ("circle", "square", "triangle", "diamond")
METHODS = {  # colour, marker
    "ours": ("ours", "circle"),
    "full cache": ("full", "circle"),
    "window + sinks": ("window", "square"),
    "quantized cache": ("quantized", "diamond"),
    "asvd": ("asvd", "square"),
    "svd": ("svd", "triangle"),
    "mse": ("mse", "diamond"),
    "attention": ("attention", "circle"),
    "random": ("random", "triangle"),
}
OTHERS = ("other-1", "other-2", "other-3", "other-4")


@dataclass(frozen=True)
class Metric:
    """A measure.

    Attributes:
        name: as it is written.
        better: "higher", "lower", or "" where it is not known.
        share: whether it is between 0 and 1, written in percent.
        digits: after the point; None writes four significant digits.
    """

    name: str
    better: str
    share: bool = False
    digits: int | None = None


METRICS = {
    "accuracy": Metric("right answers", "higher", share=True),
    "f1": Metric("F1", "higher", share=True),
    "qa_f1": Metric("F1", "higher", share=True),
    "rouge": Metric("ROUGE-L", "higher", share=True),
    "rouge_l": Metric("ROUGE-L", "higher", share=True),
    "edit_similarity": Metric("edit similarity", "higher", share=True),
    "exact_match": Metric("exact match", "higher", share=True),
    "score": Metric("score", "higher", share=True),
    "perplexity_ratio": Metric("perplexity, times the full cache's", "lower", digits=4),
    "kl": Metric("KL divergence, nats per token", "lower"),
    "agreement": Metric("same next token", "higher", share=True),
    "perplexity": Metric("perplexity", "lower", digits=2),
}


@dataclass(frozen=True)
class Style:
    """How a method is drawn.

    Attributes:
        colour: a class of the style sheet.
        marker: one of MARKERS.
        open: with a hollow marker and a dashed line; trained variants.
        strong: drawn thicker and last; ours.
        dash: pattern of the line, or None.
    """

    colour: str
    marker: str = "circle"
    open: bool = False
    strong: bool = False
    dash: str | None = None


def metric_of(name: str) -> Metric:
    return METRICS.get(name) or Metric(name.replace("_", " "), "")


def benchmark_name(name: str) -> str:
    """In words; of "text:FILE" the kind in words and the file, without its folders."""
    kind, colon, source = name.partition(":")
    source = source.replace("\\", "/").rpartition("/")[2]
    return BENCHMARKS[kind] + (f", {source}" if colon else "") if kind in BENCHMARKS else name


def is_number(value: object) -> bool:
    """Whether there is a number to write: no None, no NaN, no infinity."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_ours(method: str) -> bool:
    return method.lower().startswith("ours") or method.lower() == "this adapter"


def style_of(method: str, others: tuple[str, ...] = ()) -> Style:
    """The style of a method; `others` are the names that this file does not know, in their order."""
    name = method.lower()
    trained = name.endswith(("+ training", "qat"))
    base = "ours" if is_ours(method) else name
    if base not in METHODS and trained:
        base = base.rpartition("+")[0].strip()
    if base.startswith(("quantized", "quantised")):
        base = "quantized cache"
    if base in METHODS:
        colour, marker = METHODS[base]
    else:
        place = others.index(method) if method in others else 0
        colour, marker = OTHERS[place % len(OTHERS)], MARKERS[place % len(MARKERS)]
    return Style(colour, marker, trained, is_ours(method) and not trained, "5 3" if trained else None)


def unknown_methods(methods: list[str]) -> tuple[str, ...]:
    """Those without a colour of their own, each once."""
    return tuple(dict.fromkeys(m for m in methods if style_of(m).colour in OTHERS))


def count(value: object) -> str:
    """A whole number with separators; one decimal where it is not whole."""
    if not is_number(value):
        return MISSING
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def exact(value: object) -> str:
    """A number of bytes with all the decimals it has, at most four."""
    return f"{value:,.4f}".rstrip("0").rstrip(".") if is_number(value) else MISSING


def size(value: object, zeros: bool = True) -> str:
    """A number of bytes in a unit that suits it, three significant digits; 1 kB is 1,000 bytes.

    Args:
        zeros: whether to keep those at the end.
    """
    if not is_number(value):
        return MISSING
    unit = 0
    while unit < 4 and float(f"{value:.3g}") >= 1000:
        value, unit = value / 1000, unit + 1
    places = 0 if unit == 0 and float(value).is_integer() else 2 if value < 9.995 else 1 if value < 99.95 else 0
    text = f"{value:,.{places}f}"
    if places and not zeros:
        text = text.rstrip("0").rstrip(".")
    return f"{text}{SPACE}{('B', 'kB', 'MB', 'GB', 'TB')[unit]}"


def percent(value: object, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}{SPACE}%" if is_number(value) else MISSING


def short_percent(value: object) -> str:
    """As few digits as the number needs."""
    return f"{100 * value:.3g}{SPACE}%" if is_number(value) else MISSING


def significant(value: object, digits: int = 4, zeros: bool = False) -> str:
    """As many digits as asked for, the power of ten apart where the number is below 0.0001 or long; `zeros` keeps
    those at the end."""
    if not is_number(value):
        return MISSING
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    short = -4 <= power < 6
    text = f"{value:,.{max(0, digits - 1 - power)}f}" if short else f"{value / 10.0**power:.{digits - 1}f}"
    if "." in text and not zeros:
        text = text.rstrip("0").rstrip(".")
    return text if short else f"{text}e{power}"


def measured(metric: str, value: object) -> str:
    """A value of a metric; the dash where there is none."""
    if not is_number(value):
        return MISSING
    kind = metric_of(metric)
    if kind.share:
        return percent(value)
    return f"{value:,.{kind.digits}f}" if kind.digits is not None else significant(value, zeros=True)


def interval(metric: str, low: object, high: object) -> str:
    """ "low to high" without a unit; empty where there is no interval."""
    if not is_number(low) or not is_number(high):
        return ""
    ends = [measured(metric, end).removesuffix(f"{SPACE}%") for end in (low, high)]
    return f"{ends[0]} to {ends[1]}"


def with_interval(metric: str, row: dict) -> str:
    ends = interval(metric, row.get("low"), row.get("high"))
    return measured(metric, row.get("value")) + (f" ({ends})" if ends else "")

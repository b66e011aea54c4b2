"""From values to pixels: linear and logarithmic scales, ticks that are round numbers, labels that do not overlap. Pure
functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Maps `low` to pixel `start` and `high` to `stop`, and what lies outside to the nearer of them.

    Attributes:
        log: equal ratios are equal distances; needs `low` and `high` above 0.
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __post_init__(self) -> None:
        if self.low == self.high or (self.log and min(self.low, self.high) <= 0):
            raise ValueError(f"A scale needs two different ends, above 0 if logarithmic; got {self.low}, {self.high}.")

    def __call__(self, value: float) -> float:
        bottom, top = min(self.low, self.high), max(self.low, self.high)
        value = min(max(value, bottom), top)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)


def linear_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """At most `count` multiples of 1, 2 or 5 times a power of ten between `low` and `high`."""
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / max(1, count)))
    for step in (power * factor for factor in (1, 2, 5, 10, 20, 50)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= count:
            return [round(i * step, 12) for i in range(first, last + 1)]
    return [low, high]


def log_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """At most `count` of 1, 2, 5, 10, 20, 50 … between `low` and `high`: all of them, or whole decades, or every
    second, third … decade."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    fine = [
        t
        for e in range(first, last + 1)
        for t in (10.0**e, 2 * 10.0**e, 5 * 10.0**e)
        if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)
    ]
    if len(fine) < 2:
        return linear_ticks(low, high, count)
    if len(fine) <= count:
        return fine
    decades = [e for e in range(first, last + 1) if low * (1 - 1e-9) <= 10.0**e <= high * (1 + 1e-9)]
    return [10.0**e for e in _every(decades, count)]


def power_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """At most `count` powers of two between `low` and `high`, in equal ratios."""
    first, last = math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9)
    return [2.0**e for e in _every(list(range(first, last + 1)), count)] or linear_ticks(low, high, count)


def _every(exponents: list[int], count: int) -> list[int]:
    """Every n-th, the last one included."""
    step = max(1, -(-len(exponents) // max(1, count)))
    return exponents[::-1][::step][::-1]


def linear_domain(values: Sequence[float], low: float | None = None, high: float | None = None) -> tuple[float, float]:
    """Ends that hold all values with a margin; `low` and `high` fix an end."""
    bottom, top = min(values), max(values)
    margin = 0.06 * (top - bottom) or 0.05 * abs(top) or 1.0
    bottom = bottom - margin if low is None else min(low, bottom)
    top = top + margin if high is None else max(high, top)
    return bottom, top


def log_domain(values: Sequence[float]) -> tuple[float, float]:
    """Ends that hold all positive values, a little beyond them."""
    positive = [v for v in values if v > 0]
    bottom, top = min(positive), max(positive)
    margin = max(1.08, (top / bottom) ** 0.05)
    return bottom / margin, top * margin


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions moved as little as possible (in squares) so that neighbours are `gap` apart, within `low` and `high`
    as long as there is room; the order stays."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    pools: list[list[float]] = []  # [sum, count] of what has to move together, gaps taken out
    for rank, i in enumerate(order):
        pools.append([positions[i] - rank * gap, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += count
    flat = [total / count for total, count in pools for _ in range(int(count))]
    room = max(low, high - (len(positions) - 1) * gap)
    moved = [0.0] * len(positions)
    for rank, i in enumerate(order):
        moved[i] = min(max(flat[rank], low), room) + rank * gap
    return moved


def text_width(text: str, size: float = 12.0) -> float:
    """Pixels that a text takes at most, about: system fonts differ."""
    return 0.57 * size * len(text)

"""95 % intervals of what is measured: Wilson's for shares of right answers, a bootstrap for everything else."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Z = 1.959964  # of a two-sided 95 % interval
FEWEST = 5


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Interval of a share of right answers, of independent yes/no trials (Wilson 1927); never leaves [0, 1].

    Raises:
        ValueError: without a trial.
    """
    if total < 1:
        raise ValueError("An interval needs at least one trial, got none.")
    share = correct / total
    scale = 1 / (1 + Z * Z / total)
    centre = scale * (share + Z * Z / (2 * total))
    margin = scale * Z * math.sqrt(share * (1 - share) / total + Z * Z / (4 * total * total))
    return max(0.0, centre - margin), min(1.0, centre + margin)


def mean_interval(
    values: Sequence[float], samples: int = 2000, seed: int = 0
) -> tuple[float, float] | tuple[None, None]:
    """Interval of a mean by the percentile bootstrap; the same for the same values and seed.

    None where there are fewer than `FEWEST` values, which say too little about their spread; with few more the
    interval is somewhat narrow (10 values of a normal distribution: it holds the mean in 90 % of cases).

    Raises:
        ValueError: without a value.
    """
    if len(values) == 0:
        raise ValueError("An interval needs at least one value, got none.")
    if len(values) < FEWEST:
        return None, None
    values = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (samples, len(values)), generator=generator)
    means = values[picks].mean(1)
    return float(means.quantile(0.025)), float(means.quantile(0.975))

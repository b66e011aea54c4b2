"""Which weights a model has, in short hashes: so that what was measured of one is not taken for another's."""

from __future__ import annotations

import hashlib

from torch import nn


def weight_hashes(decoder: nn.Module) -> dict[str, str | None]:
    """By which statistics know their model: a short hash of up to 64 values of every weight, without those of CSKV;
    None for what is not in memory (offloaded)."""
    hashes: dict[str, str | None] = {}
    for name, weight in decoder.named_parameters():
        if ".cskv." not in name:
            hashes[name] = None
            if weight.device.type != "meta":
                values = weight.detach().flatten()[:: max(1, weight.numel() // 64)][:64].cpu().double()
                hashes[name] = hashlib.sha256(values.numpy().tobytes()).hexdigest()[:8]
    return hashes


def same_weights(one: dict[str, str | None], other: dict[str, str | None]) -> bool:
    """Whether two of [`weight_hashes`] can be of the same weights; what was not in memory can be anything."""
    return one.keys() == other.keys() and all(one[n] == other[n] for n in one if one[n] and other[n])

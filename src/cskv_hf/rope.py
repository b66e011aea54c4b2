"""Rotary embeddings as the cache needs them: cos/sin again from stored positions, rotation forward and back. Pure
functions.

The half-rotation convention of the Llama family: channel f and channel f + head_dim / 2 form a pair that turns by
``position * inv_freq[f]``. Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch


class RotaryFrequencies(NamedTuple):
    """What a model's rotary module turned its keys by at one moment, or turned several tokens by.

    Attributes:
        inv_freq: float32, (head_dim / 2,), or (tokens, head_dim / 2) or (batch, tokens, head_dim / 2) where every
            token has its own.
        attention_scaling: factor on cos and sin (yarn, longrope), 1.0 otherwise.
        change: whether they may be others at the next forward (dynamic, longrope).
        kind: names those of a kind of layers, where layers differ; "" where all layers turn alike.
        rounded: whether the model rounds cos and sin to its dtype; else they are float32 (OLMo).
    """

    inv_freq: torch.Tensor
    attention_scaling: float
    change: bool = False
    kind: str = ""
    rounded: bool = True

    def dtype(self, of_model: torch.dtype) -> torch.dtype:
        """Of cos and sin, in a model of that dtype."""
        return of_model if self.rounded else torch.promote_types(of_model, torch.float32)

    def in_layer(self, own: RotaryFrequencies) -> RotaryFrequencies:
        """What turned stored tokens in a layer that turns by `own` now: these, if every token has its own."""
        return self._replace(kind=own.kind, rounded=own.rounded) if self.change else own

    def at(self, slots: slice | torch.Tensor) -> RotaryFrequencies:
        """Those of the tokens at `slots`, a slice or (batch, n) indices; themselves if all tokens share them."""
        if self.inv_freq.ndim == 1:
            return self
        index = slots if isinstance(slots, slice) else slots.clamp_min(0).to(self.inv_freq.device)
        return self._replace(inv_freq=self.inv_freq[index])

    def columns(self, part: slice) -> RotaryFrequencies:
        """Those of a slice of the tokens that these are the frequencies of."""
        return self if self.inv_freq.ndim == 1 else self._replace(inv_freq=self.inv_freq[..., part, :])

    def then(self, other: RotaryFrequencies, count: int) -> RotaryFrequencies:
        """These, followed by `count` tokens that `other` turned; tokens have their own if frequencies change."""
        if not self.change:
            return self
        new = other.inv_freq.detach().float().expand(count, -1).to(self.inv_freq.device)
        return self._replace(inv_freq=torch.cat([self.inv_freq, new]))

    def up_to(self, count: int) -> RotaryFrequencies:
        """Those of the first `count` tokens."""
        return self if self.inv_freq.ndim == 1 else self._replace(inv_freq=self.inv_freq[:count].clone())


class TurnInTiles(NamedTuple):
    """What has turned the latents' keys, as a product, each factor rounded to the dtype that it was asked for in.

    Attributes:
        starts: cos and sin of the first tokens of each tile, (batch or 1, tiles * starts, head_dim / 2).
        within: cos and sin of a tile's tokens, from the first, (tile, head_dim / 2). The tile is whole, also of a
            shorter past.
        positions: (batch or 1, tokens) int32, if they are not known to follow one another, and the product may not be
            what turned all; else None.
        inv_freq: float32, (head_dim / 2,), compact.
        attention_scaling: of the rotary frequencies.
    """

    starts: tuple[torch.Tensor, torch.Tensor]
    within: tuple[torch.Tensor, torch.Tensor]
    positions: torch.Tensor | None
    inv_freq: torch.Tensor
    attention_scaling: float

    @classmethod
    def of(
        cls, positions: torch.Tensor, frequencies: RotaryFrequencies, tile: int, dtype: torch.dtype, starts: int
    ) -> TurnInTiles:
        frequencies = frequencies._replace(rounded=True)  # kernels want the dtype that they ask for, also of OLMo's
        device, once = positions.device, frequencies._replace(attention_scaling=1.0)
        firsts = (positions[:, ::tile, None] + torch.arange(starts, device=device)).flatten(1)
        cos, sin = cos_sin(torch.arange(tile, device=device)[None], frequencies, dtype)
        inv_freq = frequencies.inv_freq.to(device).float().contiguous()
        scaling = frequencies.attention_scaling
        return cls(cos_sin(firsts, once, dtype), (cos[0], sin[0]), positions, inv_freq, scaling)


def cos_sin(
    positions: torch.Tensor, frequencies: RotaryFrequencies, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of half the head dimension, computed and rounded as the model's rotary module does (the same
    values, bit by bit).

    Args:
        positions: (batch, tokens) integer.
        frequencies: of all these tokens, or of each.
        dtype: of the model.

    Returns:
        Two tensors (batch, tokens, head_dim / 2) on the device of `positions`.
    """
    inv_freq = frequencies.inv_freq.to(positions.device)
    angles = positions.unsqueeze(-1).float() * inv_freq.float()
    cos, sin = angles.cos(), angles.sin_()
    if frequencies.attention_scaling != 1.0:
        cos, sin = cos * frequencies.attention_scaling, sin * frequencies.attention_scaling
    return cos.to(frequencies.dtype(dtype)), sin.to(frequencies.dtype(dtype))


def widened(tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """In float32, if they are narrower."""
    return tuple(t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply RoPE to ``states`` (..., tokens, head_dim); cos and sin (..., tokens, head_dim / 2) broadcast against
    it."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def paired(states: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Move the two channels of every RoPE pair next to each other along `dim`, whose size is head_dim."""
    dim %= states.ndim
    return states.unflatten(dim, (2, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def rotate_paired(states: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """[`rotate`] for states that [`paired`] has rearranged, in place and in one pass where the dtype allows it.

    A pair is a complex number, and turning it a multiplication.

    Args:
        states: (..., head_dim); overwritten if float32 or float64.
        turn: complex cos + i sin, (..., head_dim / 2), broadcast against it; or both side by side, (..., head_dim / 2,
            2), for a compiler, which knows no complex numbers and needs no help to make one pass of it.
    """
    if not turn.is_complex():
        first, second = states.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = turn.unbind(-1)
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return turned.flatten(-2).to(states.dtype)
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(turn)
    return wide.to(states.dtype)


def turn_back(
    positions: torch.Tensor, frequencies: RotaryFrequencies, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`cos_sin`] of the turn that undoes [`rotate`] exactly: -sin, divided by ``cos² + sin²``; in float32 or wider.

    That is the square of the rope's attention scaling, but for the rounding of cos and sin, which matters in 16 bits.
    """
    cos, sin = widened(cos_sin(positions, frequencies, dtype))
    norm = cos.square() + sin.square()
    return cos / norm, -sin / norm

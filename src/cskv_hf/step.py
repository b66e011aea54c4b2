"""What one forward of the model sees, what has turned the keys of it, and what moves afterwards.

Made once by the table of tokens (tokens.py) and used by every layer; what a layer computes that the next ones need too
is kept in it. Holds no keys and no values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from .rope import RotaryFrequencies, TurnInTiles, cos_sin, widened

HIDDEN = -1e4  # what is added to the score of a token that is not seen, at most; a bias is less far from 0
TURN_CHUNK = 2**17  # cos that are computed at a time; intermediates are several times the result
Made = TypeVar("Made")
Index = torch.Tensor | slice  # columns to take: a slice for all rows, or (batch, n) with -1 for "nothing here"


@dataclass
class Eviction:
    """How the stored columns change after a forward: always in terms of the columns that were there, new tokens
    appended to `recent`.

    Attributes:
        evicted: columns of `recent` that become latents.
        sinks: columns of ``cat(sinks, recent)`` that are the new sinks.
        recent: columns of `recent` that stay.
        old_blocks: blocks of ``cat(old, evicted)`` that are the new latents; None takes all.
        positions: (batch, n) positions of the evicted tokens.
        frequencies: that their keys were turned by.
    """

    evicted: Index
    sinks: Index
    recent: Index
    old_blocks: torch.Tensor | None
    positions: torch.Tensor
    frequencies: RotaryFrequencies


@dataclass
class Step:
    """What one forward of the model sees and does; made once, used by every layer.

    Attributes:
        start, num_new: slots before, slots added.
        num_sinks, num_old, num_recent: stored columns that the attention of this forward sees, the new ones included.
        slots: for ragged batches, (batch, num_sinks + num_recent) and (batch, num_old) slots of these columns; else
            None.
        old_positions, old_frequencies: of the latents.
        eviction: what to move afterwards, if anything.
        num_dropped: latents that a layer with a sliding window has dropped, before the ``num_old`` that it holds.
        memo: what layers make of the step for all that follow, see [`once`].
    """

    start: int
    num_new: int
    num_sinks: int
    num_old: int
    num_recent: int
    slots: tuple[torch.Tensor, torch.Tensor] | None
    old_positions: torch.Tensor
    old_frequencies: RotaryFrequencies
    eviction: Eviction | None = None
    num_dropped: int = 0
    memo: list = field(default_factory=list)
    _turn: dict = field(default_factory=dict)
    _without: dict = field(default_factory=dict)

    @property
    def num_slots(self) -> int:
        return self.start + self.num_new

    @property
    def sees_every_slot(self) -> bool:
        """Whether the exact columns are all slots in order: nothing is compressed yet, nor moved to where it differs
        by row."""
        in_order = self.slots is None or self.num_sinks == 0
        return in_order and self.num_old == 0 and self.num_sinks + self.num_recent == self.num_slots

    def exact_slots(self) -> torch.Tensor:
        """(batch or 1, num_sinks + num_recent): the slots of the exact columns, -1 for empty ones."""
        if self.slots is not None:
            return self.slots[0]
        first_recent = self.num_slots - self.num_recent
        return torch.cat([torch.arange(self.num_sinks), torch.arange(first_recent, self.num_slots)])[None]

    def old_slots(self) -> torch.Tensor:
        """(batch or 1, num_old): the slots of the latents, -1 for empty ones."""
        if self.slots is not None:
            return self.slots[1]
        first = self.num_sinks + self.num_dropped
        return torch.arange(first, first + self.num_old)[None]

    def without(self, num_dropped: int) -> Step:
        """The same for a layer that has dropped its first `num_dropped` latents; made once for all such layers."""
        if num_dropped == 0:
            return self
        if num_dropped not in self._without:
            held = slice(num_dropped, None)
            self._without[num_dropped] = replace(
                self,
                num_old=self.num_old - num_dropped,
                slots=self.slots and (self.slots[0], self.slots[1][:, held]),
                old_positions=self.old_positions[:, held],
                old_frequencies=self.old_frequencies.columns(held),
                num_dropped=num_dropped,
                memo=[],
                _turn={},
                _without={},
            )
        return self._without[num_dropped]

    def old_cos_sin(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the latents' keys, rounded to the model's dtype, in float32 or wider; computed once for all
        layers.

        Rows that are all alike are one: (batch or 1, num_old, head_dim / 2).
        """
        key = ("cos_sin", device, dtype)
        if key not in self._turn:
            self._turn[key] = widened(cos_sin(self._positions_by_row().to(device), self.old_frequencies, dtype))
        return self._turn[key]

    def old_rope(self, device: torch.device) -> tuple[torch.Tensor, RotaryFrequencies]:
        """What has turned the latents' keys: positions (batch or 1, num_old) int32 and frequencies, compact."""
        key = ("rope", device)
        if key not in self._turn:
            inv_freq = self.old_frequencies.inv_freq.to(device).float().contiguous()
            positions = self._positions_by_row().to(device, torch.int32).contiguous()
            self._turn[key] = positions, self.old_frequencies._replace(inv_freq=inv_freq)
        return self._turn[key]

    def _positions_by_row(self) -> torch.Tensor:
        """Positions of the latents, (batch, num_old), or (1, num_old) if all rows are alike."""
        first = self.old_positions[:1]
        alike = self.slots is None and (len(self.old_positions) == 1 or bool((first == self.old_positions).all()))
        return first if alike else self.old_positions

    def old_turn(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """[`old_cos_sin`] as complex numbers."""
        key = (device, dtype)
        if key not in self._turn:
            positions = self._positions_by_row()
            kind = torch.promote_types(dtype, torch.float32).to_complex()
            turn = torch.empty(*positions.shape, self.old_frequencies.inv_freq.shape[-1], dtype=kind, device=device)
            tokens = max(1, TURN_CHUNK // turn.shape[-1])
            for first in range(0, positions.shape[1], tokens):
                part = slice(first, first + tokens)
                cos, sin = cos_sin(positions[:, part].to(device), self.old_frequencies.columns(part), dtype)
                turn.real[:, part], turn.imag[:, part] = cos, sin
            self._turn[key] = turn
        return self._turn[key]

    def old_turn_in_tiles(
        self, device: torch.device, tile: int, dtype: torch.dtype, starts: int = 1
    ) -> TurnInTiles | None:
        """[`old_turn`] as a product of what turns the first tokens of each tile, as many as `starts`, and what turns a
        tile's tokens from the first. None where tokens have frequencies of their own."""
        if self.old_frequencies.inv_freq.ndim > 1:
            return None
        key = (device, tile, dtype, starts)
        if key not in self._turn:
            positions = self.old_positions.to(device, torch.int32)
            steps = torch.arange(self.num_old, device=device)
            follow = self.slots is None and bool((positions == positions[:1, :1] + steps).all())
            positions = positions[:1] if follow else self._positions_by_row().to(device, torch.int32)
            turn = TurnInTiles.of(positions.contiguous(), self.old_frequencies, tile, dtype, starts)
            self._turn[key] = turn._replace(positions=None) if follow else turn
        return self._turn[key]


def once(memo: list, what: str, make: Callable[[], Made], *of: object) -> Made:
    """What a layer makes of the step, and of some objects, the very same ones, made once for all layers.

    A list that is searched, since a compiler knows no `id`.
    """
    for name, objects, made in memo:
        if name == what and len(objects) == len(of) and all(a is b for a, b in zip(objects, of)):
            return made
    made = make()
    memo.append((what, of, made))
    return made


def take(states: torch.Tensor, index: Index, dim: int) -> torch.Tensor:
    """Columns of `states` along `dim`, as a compact copy that does not keep the whole of `states` alive."""
    if isinstance(index, slice):
        return states[(slice(None),) * dim + (index,)].clone(memory_format=torch.contiguous_format)
    index = index.to(states.device).clamp_min(0)
    shape = [1] * states.ndim
    shape[0], shape[dim] = index.shape
    return states.gather(dim, index.view(shape).expand(*states.shape[:dim], index.shape[1], *states.shape[dim + 1 :]))

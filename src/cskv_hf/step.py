"""What one forward of the model sees, and what moves afterwards.

Made once by the table of tokens (tokens.py) and used by every layer; what a layer computes that the next ones need too
is kept in it. Holds no keys and no values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from .rope import RotaryFrequencies
from .turns import HasOldTurns, OldTurns

HIDDEN = -1e4  # what is added to the score of a token that is not seen, at most; a bias is less far from 0
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
        frequencies: that their keys were turned by in the first layer.
    """

    evicted: Index
    sinks: Index
    recent: Index
    old_blocks: torch.Tensor | None
    positions: torch.Tensor
    frequencies: RotaryFrequencies


@dataclass
class Step(HasOldTurns):
    """What one forward of the model sees and does; made once, used by every layer.

    Attributes:
        start, num_new: slots before, slots added.
        num_sinks, num_old, num_recent: stored columns that the attention of this forward sees, the new ones included.
        slots: for ragged batches, (batch, num_sinks + num_recent) and (batch, num_old) slots of these columns; else
            None.
        old_positions, old_frequencies: of the latents; frequencies in the first layer.
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
    _turns: dict[str, OldTurns] = field(default_factory=dict)
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
                _turns={},
                _without={},
            )
        return self._without[num_dropped]


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

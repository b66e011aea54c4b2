"""Which token of which row is held where: the bookkeeping that all layers of a CSKVCache share.

A *slot* is the index of a token in the padded batch, as DynamicCache and the attention masks count. Per row, the
real (unmasked) tokens are, in order, ``sinks`` first ones kept exactly, then *old* ones kept as latents, then the
*recent* ones kept exactly. As long as no slot was ever masked, all rows agree and three numbers say it all
(*uniform*). Once padding is seen, every row follows its own count of real tokens, so that a padded row is compressed
exactly as it would be alone; then index tensors say which slot each stored column holds, -1 for none (*ragged*).
Holds no keys and no values.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from .rope import RotaryFrequencies, cos_sin, widened

ROLLBACK_TOKENS = 64  # assisted decoding proposes 20 tokens by default
HIDDEN = -1e4  # what is added to the score of a token that is not seen, at most; a bias is less far from 0
TURN_CHUNK = 2**17  # cos that are computed at a time; intermediates are several times the result
Index = torch.Tensor | slice  # columns to take: a slice for all rows, or (batch, n) with -1 for "nothing here"


def take(states: torch.Tensor, index: Index, dim: int) -> torch.Tensor:
    """Columns of `states` along `dim`, as a compact copy that does not keep the whole of `states` alive."""
    if isinstance(index, slice):
        return states[(slice(None),) * dim + (index,)].clone(memory_format=torch.contiguous_format)
    index = index.to(states.device).clamp_min(0)
    shape = [1] * states.ndim
    shape[0], shape[dim] = index.shape
    return states.gather(dim, index.view(shape).expand(*states.shape[:dim], index.shape[1], *states.shape[dim + 1 :]))


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
        device, once = positions.device, frequencies._replace(attention_scaling=1.0)
        firsts = (positions[:, ::tile, None] + torch.arange(starts, device=device)).flatten(1)
        cos, sin = cos_sin(torch.arange(tile, device=device)[None], frequencies, dtype)
        inv_freq = frequencies.inv_freq.to(device).float().contiguous()
        scaling = frequencies.attention_scaling
        return cls(cos_sin(firsts, once, dtype), (cos[0], sin[0]), positions, inv_freq, scaling)


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
        made: what layers make of the step for all that follow, see [`once_for`].
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
    made: list = field(default_factory=list)
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
                made=[],
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


def once_for(made: list, what: str, *of: object) -> list:
    """Where a step keeps what was made of some objects, the very same ones: empty until it is put there.

    A list that is searched, since a compiler knows no `id`.
    """
    for name, objects, found in made:
        if name == what and len(objects) == len(of) and all(a is b for a, b in zip(objects, of)):
            return found
    made.append((what, of, []))
    return made[-1][2]


class TokenTable:
    """The shared bookkeeping; [`advance`] is called once per forward, the other methods mirror those of a cache.

    Args:
        window, sinks, block_size: as in [`CSKVConfig`], in tokens.
        slack: exact tokens kept beyond the window, so that a rejected speculation can be taken back exactly.
    """

    def __init__(self, window: int, sinks: int, block_size: int, slack: int = 0) -> None:
        self.window, self.sinks, self.block_size, self.slack = window, sinks, block_size, slack
        self.reset()

    def reset(self) -> None:
        self.num_slots = 0
        self.num_sinks = self.num_old = self.num_recent = 0  # stored columns
        self.positions: torch.Tensor | None = None  # (batch, num_slots) int32
        # of all tokens, or (num_slots, head_dim / 2) where they change with the length
        self.frequencies: RotaryFrequencies | None = None
        self.slots: dict[str, torch.Tensor] | None = (
            None  # ragged: "sinks", "old", "recent" -> (batch, columns) on the CPU
        )

    def snapshot(self) -> TokenTable:
        """As it is now; shares tensors, none of which is written to."""
        before = copy.copy(self)
        before.slots = None if self.slots is None else dict(self.slots)
        return before

    @property
    def nbytes(self) -> int:
        tensors = [
            self.positions,
            self.frequencies.inv_freq if self.frequencies else None,
            *(self.slots or {}).values(),
        ]
        return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)

    def advance(
        self, positions: torch.Tensor, frequencies: RotaryFrequencies, valid: torch.Tensor | None, batch_size: int
    ) -> Step:
        """Register the tokens of one forward and decide where everything goes.

        Args:
            positions: (batch or 1, num_new) position of every new token.
            frequencies: the rotary frequencies that the new keys were turned by.
            valid: (batch, num_new) bool, False for padding; None if there is none.
            batch_size: rows of the batch.
        """
        positions = positions.to(torch.int32).expand(batch_size, -1)
        held = positions[:, :0] if self.positions is None else self.positions.to(positions.device)
        self.positions = torch.cat([held, positions], dim=1)
        if self.frequencies is None:
            inv_freq = frequencies.inv_freq.detach().float().clone()
            if frequencies.change:
                inv_freq = inv_freq.expand(0, -1)
            self.frequencies = frequencies._replace(inv_freq=inv_freq)
        self.frequencies = self.frequencies.then(frequencies, positions.shape[1])
        num_new, start = positions.shape[-1], self.num_slots
        if valid is not None and not bool(valid.all()) and self.slots is None:
            self._become_ragged(batch_size)
        self.num_slots += num_new
        self.num_recent += num_new
        if self.slots is not None:
            new = torch.arange(start, self.num_slots).expand(batch_size, -1)
            new = new if valid is None else new.masked_fill(~valid.cpu(), -1)
            self.slots["recent"] = torch.cat([self.slots["recent"], new], dim=1)
        slots = None
        if self.slots is not None:
            slots = (torch.cat([self.slots["sinks"], self.slots["recent"]], dim=1), self.slots["old"])
        step = Step(
            start,
            num_new,
            self.num_sinks,
            self.num_old,
            self.num_recent,
            slots,
            *self._of_old(),
        )
        step.eviction = self._evict_uniform() if self.slots is None else self._evict_ragged()
        return step

    def _of_old(self) -> tuple[torch.Tensor, RotaryFrequencies]:
        """Positions and frequencies of the latents."""
        if self.slots is None:
            old = slice(self.num_sinks, self.num_sinks + self.num_old)
            return self.positions[:, old], self.frequencies.at(old)
        return self._positions_at(self.slots["old"]), self.frequencies.at(self.slots["old"])

    def _positions_at(self, slots: torch.Tensor) -> torch.Tensor:
        slots = slots.clamp_min(0).to(self.positions.device)
        return self.positions.gather(1, slots)

    def _num_to_evict(self, num_recent: int, num_sinks: int) -> int:
        """Whole blocks that leave, of `num_recent` exact tokens some of which are still to become sinks."""
        surplus = num_recent - (self.sinks - num_sinks) - self.window - self.slack
        return max(0, surplus // self.block_size) * self.block_size

    def _evict_uniform(self) -> Eviction | None:
        leaving = self._num_to_evict(self.num_recent, self.num_sinks)
        if leaving == 0:
            return None
        to_sinks = self.sinks - self.num_sinks
        first = self.num_sinks + self.num_old + to_sinks  # slot of the first evicted token
        eviction = Eviction(
            evicted=slice(to_sinks, to_sinks + leaving),
            sinks=slice(0, self.sinks),
            recent=slice(to_sinks + leaving, None),
            old_blocks=None,
            positions=self.positions[:, first : first + leaving],
            frequencies=self.frequencies.at(slice(first, first + leaving)),
        )
        self.num_sinks, self.num_old = self.sinks, self.num_old + leaving
        self.num_recent -= to_sinks + leaving
        return eviction

    def _evict_ragged(self) -> Eviction | None:
        sinks, old, recent = self.slots["sinks"], self.slots["old"], self.slots["recent"]
        held_sinks, held_recent = ((slots >= 0).sum(1).tolist() for slots in (sinks, recent))
        held_blocks = self._blocks_in_use(old).sum(1).tolist()  # the first ones of each row
        leaving = [self._num_to_evict(r, s) for r, s in zip(held_recent, held_sinks)]
        if not any(leaving):
            return None
        rows = len(leaving)
        to_sinks = [self.sinks - s if n else 0 for n, s in zip(leaving, held_sinks)]
        staying = [r - s - n for r, s, n in zip(held_recent, to_sinks, leaving)]
        new_sinks = torch.full((rows, self.sinks), -1)
        evicted = torch.full((rows, max(leaving)), -1)
        new_recent = torch.full((rows, max(staying)), -1)
        leaving_blocks = [n // self.block_size for n in leaving]
        new_blocks = torch.full((rows, max(o + n for o, n in zip(held_blocks, leaving_blocks))), -1)
        for b in range(rows):
            columns = (recent[b] >= 0).nonzero().squeeze(1)  # in the order of the slots
            moved, first_staying = to_sinks[b], to_sinks[b] + leaving[b]
            new_sinks[b, : held_sinks[b]] = torch.arange(held_sinks[b])
            new_sinks[b, held_sinks[b] : held_sinks[b] + moved] = sinks.shape[1] + columns[:moved]
            evicted[b, : leaving[b]] = columns[moved:first_staying]
            new_recent[b, new_recent.shape[1] - staying[b] :] = columns[first_staying:]
            held, new = held_blocks[b], leaving_blocks[b]
            new_blocks[b, :held] = torch.arange(held)
            new_blocks[b, held : held + new] = old.shape[1] // self.block_size + torch.arange(new)

        evicted_slots = _pick(recent, evicted)
        self.slots = {
            "sinks": _pick(torch.cat([sinks, recent], dim=1), new_sinks),
            "old": _pick(torch.cat([old, evicted_slots], dim=1), self._columns_of(new_blocks)),
            "recent": _pick(recent, new_recent),
        }
        self._count_columns()
        positions, frequencies = self._positions_at(evicted_slots), self.frequencies.at(evicted_slots)
        return Eviction(evicted, new_sinks, new_recent, new_blocks, positions, frequencies)

    def _blocks_in_use(self, old: torch.Tensor) -> torch.Tensor:
        """(batch, blocks): whether any token of the block is left; a crop may have ended in the middle of one."""
        return (self._by_block(old) >= 0).any(-1)

    def _by_block(self, old: torch.Tensor) -> torch.Tensor:
        return old.unflatten(1, (old.shape[1] // self.block_size, self.block_size))

    def _columns_of(self, blocks: torch.Tensor) -> torch.Tensor:
        """(batch, n) blocks, -1 for none -> (batch, n * block_size) columns."""
        columns = blocks[..., None] * self.block_size + torch.arange(self.block_size)
        return columns.masked_fill(blocks[..., None] < 0, -1).flatten(1)

    def _become_ragged(self, batch_size: int) -> None:
        first_recent = self.num_sinks + self.num_old
        bounds = {
            "sinks": (0, self.num_sinks),
            "old": (self.num_sinks, first_recent),
            "recent": (first_recent, first_recent + self.num_recent),
        }
        self.slots = {name: torch.arange(*ends).repeat(batch_size, 1) for name, ends in bounds.items()}

    def _count_columns(self) -> None:
        self.num_sinks, self.num_old, self.num_recent = (self.slots[n].shape[1] for n in ("sinks", "old", "recent"))

    def unseen_blocks(self, sliding_window: int) -> int:
        """How many of the first blocks of latents no query to come can see through a sliding window, in any row; even
        if `ROLLBACK_TOKENS` tokens are cropped before it comes.

        Counted from where the exact window begins, not from how far it has grown, so that it is the same however the
        tokens came.
        """
        first_recent = self.num_sinks + self.num_old
        if self.slots is not None:
            recent = self.slots["recent"]
            first_recent = min(recent[recent >= 0].tolist(), default=self.num_slots)
        next_slot = min(first_recent + self.window, self.num_slots)
        last_unseen = next_slot - ROLLBACK_TOKENS - sliding_window
        if self.slots is None:
            blocks = max(0, last_unseen + 1 - self.num_sinks) // self.block_size
            return min(blocks, self.num_old // self.block_size)
        last = self._by_block(self.slots["old"]).amax(-1)  # -1 where a row has no such block yet
        return int(((last >= 0) & (last <= last_unseen)).all(0).cumprod(0).sum())

    def check_crop(self, num_slots: int, dropped_blocks: int, sliding_window: int) -> None:
        """Whether a layer that has dropped its first blocks can go on from `num_slots` slots.

        Raises:
            ValueError: if it would need one of them.
        """
        count = dropped_blocks * self.block_size
        if self.slots is None:
            first, last = self.num_sinks, self.num_sinks + count - 1
        else:
            slots = self.slots["old"][:, :count]
            first, last = int(slots.masked_fill(slots < 0, self.num_slots).amin()), int(slots.amax())
        if first < num_slots < last + sliding_window:
            raise ValueError(
                f"Cannot crop this CSKVCache of {self.num_slots} tokens to {num_slots}: layers with a sliding window "
                f"of {sliding_window} tokens have dropped what lies beyond it, so {last + sliding_window} tokens or "
                "more must stay. To go back further, keep a `copy.deepcopy` from then, or use `cache.reset()` and "
                "read the tokens again."
            )

    def crop(self, num_removed: int) -> dict[str, Index]:
        """Forget the last `num_removed` slots; returns the columns of "sinks" and "recent" and the blocks of "old"
        that stay.

        What was compressed stays compressed, and in its block: a crop that ends in the middle of one leaves the rest
        of it empty.
        """
        self.num_slots -= num_removed
        self.positions = self.positions[:, : self.num_slots].clone()
        self.frequencies = self.frequencies.up_to(self.num_slots)
        num_old = max(0, min(self.num_old, self.num_slots - self.num_sinks))
        if self.slots is None and num_old % self.block_size:
            self._become_ragged(self.positions.shape[0])
        if self.slots is None:
            self.num_recent = max(0, self.num_slots - self.num_sinks - self.num_old)
            self.num_old = num_old
            self.num_sinks = min(self.num_sinks, self.num_slots)
            counts = {"sinks": self.num_sinks, "old": num_old // self.block_size, "recent": self.num_recent}
            return {name: slice(0, count) for name, count in counts.items()}
        kept = {}
        for name, slots in self.slots.items():
            slots = slots.masked_fill(slots >= self.num_slots, -1)
            in_use = self._blocks_in_use(slots) if name == "old" else slots >= 0
            kept[name] = in_use.any(0).nonzero().squeeze(1).expand(slots.shape[0], -1)
            self.slots[name] = _pick(slots, self._columns_of(kept[name]) if name == "old" else kept[name])
        self._count_columns()
        return kept

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep (and repeat, and reorder) rows of the batch; `rows` is an index vector."""
        if self.positions is not None:
            self.positions = self.positions.index_select(0, rows.to(self.positions.device))
        if self.slots is not None:
            self.slots = {name: slots.index_select(0, rows.cpu()) for name, slots in self.slots.items()}


def _pick(slots: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Slots at the given columns (batch, n); -1 stays -1."""
    return slots.gather(1, columns.clamp_min(0)).masked_fill(columns < 0, -1)

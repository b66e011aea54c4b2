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

import torch

from .rope import RotaryFrequencies
from .step import Eviction, Index, Step

ROLLBACK_TOKENS = 64  # assisted decoding proposes 20 tokens by default


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
        # in the first layer, of all tokens, or (num_slots, head_dim / 2) where they change with the length
        self.frequencies: RotaryFrequencies | None = None
        # ragged: "sinks", "old", "recent" -> (batch, columns) on the CPU
        self.slots: dict[str, torch.Tensor] | None = None

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
        positions, slots = self.positions, self.slots
        if positions is not None:
            positions = positions.index_select(0, rows.to(positions.device))
        if slots is not None:
            slots = {name: of_part.index_select(0, rows.cpu()) for name, of_part in slots.items()}
        self.positions, self.slots = positions, slots  # both or neither


def check_tokens(**arguments: tuple[int | None, int]) -> None:
    """Check arguments that are a number of tokens or None, each given with the least that is allowed.

    Raises:
        TypeError: for what is not a whole number.
        ValueError: for less.
    """
    for name, (value, least) in arguments.items():
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"`{name}` must be a whole number of tokens, got {value!r}.")
        if value < least:
            raise ValueError(f"`{name}` must be at least {least} token{'s' * (least != 1)}, got {value}.")


def _pick(slots: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Slots at the given columns (batch, n); -1 stays -1."""
    return slots.gather(1, columns.clamp_min(0)).masked_fill(columns < 0, -1)

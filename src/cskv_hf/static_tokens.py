"""Which token of which row is held where in a cache of fixed size: the bookkeeping of a CSKVStaticCache, in tensors.

The same rule as tokens.py, written so that nothing depends on a value: no shape, no branch, only indices. Per row, the
real (unmasked) tokens are numbered in order. Token `t` is kept exactly at *place* `t` if it is a sink, else at
``sinks + (t - sinks) mod (window + block_size)``, a ring; of `n` tokens, ``num_old(n)`` are latents. A block becomes
old in one forward, in which all its tokens are still in the ring, and must be written by it. torch's operations write
the next blocks in every forward, due or not, since until a block is old the mask keeps it out; the kernels of a GPU
write those that are due. Holds no keys and no values.
"""

from __future__ import annotations

from typing import Any

import torch

from .rope import RotaryFrequencies
from .step import HIDDEN, once, take
from .turns import HasOldTurns, OldTurns

FULL = "a CSKVStaticCache is full: it got more tokens than its `max_cache_len`"  # from within a compiled graph


def may_read() -> bool:
    """Whether the host may look at values of tensors: neither `torch.compile` nor a CUDA graph is recording."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


class StaticTable:
    """What all layers share.

    Args:
        max_cache_len: slots, padding included.
        window, sinks, block_size: as in [`CSKVConfig`], in tokens.
        batch_size: rows.

    Attributes:
        length: () int64, slots so far.
        counts: (batch, 1) int64, real tokens of each row.
        positions, slots: (batch, tokens) int32, of each row's real tokens in order.
        is_empty: whether no forward has finished yet.
    """

    def __init__(
        self, max_cache_len: int, window: int, sinks: int, block_size: int, batch_size: int, device: torch.device
    ) -> None:
        self.max_cache_len, self.window, self.sinks, self.block_size = max_cache_len, window, sinks, block_size
        self.ring = window + block_size
        self.num_places = sinks + self.ring
        self.num_blocks = max(0, max_cache_len - 1 - sinks - window) // block_size + 1  # the last one may never be old
        self.length = torch.zeros((), dtype=torch.int64, device=device)
        self.counts = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        size = max(max_cache_len, sinks + self.num_blocks * block_size)
        self.positions = torch.zeros(batch_size, size, dtype=torch.int32, device=device)
        self.slots = torch.zeros(batch_size, size, dtype=torch.int32, device=device)
        self.is_empty = True

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.length, self.counts, self.positions, self.slots

    def num_old(self, counts: torch.Tensor) -> torch.Tensor:
        """How many of the first `counts` tokens of each row are latents."""
        surplus = counts - self.sinks - self.window
        return torch.div(surplus, self.block_size, rounding_mode="floor").clamp_min(0) * self.block_size

    def place_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """The exact place of each token."""
        return torch.where(tokens < self.sinks, tokens, self.sinks + (tokens - self.sinks) % self.ring)

    def token_at(self, counts: torch.Tensor) -> torch.Tensor:
        """(batch, places): the token that each exact place was given last, of so many tokens (batch, 1); below `sinks`
        for places of the ring that were not given any."""
        places = torch.arange(self.num_places, device=counts.device)
        turns = torch.div(counts - 1 - places, self.ring, rounding_mode="floor")
        return torch.where(places < self.sinks, places, places + turns * self.ring)

    def check_space(self, num_new: int) -> None:
        """Refuse tokens beyond the end, before anything is written.

        Raises:
            ValueError: if `num_new` more tokens do not fit.
            RuntimeError: the same, from within a compiled graph, where it can only be found while that runs.
        """
        if not may_read():
            torch._assert_async(self.length + num_new <= self.max_cache_len, FULL)
            return
        held = int(self.length)
        if held + num_new > self.max_cache_len:
            raise ValueError(
                f"This CSKVStaticCache has `max_cache_len`={self.max_cache_len}, holds {held} tokens and got "
                f"{num_new} more. Make it larger, or use `CSKVCache()`, which grows."
            )

    def new_valid(self, attention_mask: Any, num_new: int) -> torch.Tensor | None:
        """(batch, num_new): which of the new tokens are real; None if all are.

        Args:
            attention_mask: (batch, slots) or (batch, max_cache_len) with 0 for padding; or a mask (batch or 1, 1,
                num_new, slots), bool or float, in which padding does not attend to itself; or several such by the type
                of the layer.

        Raises:
            ValueError: if a mask of two dimensions covers another number of tokens, or padding cannot be read off it.
        """
        if isinstance(attention_mask, dict):
            attention_mask = next((m for m in attention_mask.values() if m is not None), None)
        if attention_mask is None:
            return None
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim not in (2, 4):
            raise ValueError(
                f"A CSKVStaticCache cannot read off an attention mask of type {type(attention_mask).__name__} which "
                "tokens are padding. Use `attn_implementation='sdpa'` or 'eager', or a `CSKVCache`."
            )
        rows, width = len(self.counts), attention_mask.shape[-1]
        mask = attention_mask.to(self.length.device)
        own = (self.length + torch.arange(num_new, device=mask.device)).clamp_max(width - 1)
        if mask.ndim == 4:
            own = mask[:, 0].expand(rows, -1, -1).gather(2, own[None, :, None].expand(rows, -1, 1))[..., 0]
            return own if own.dtype == torch.bool else own > HIDDEN
        if width == self.max_cache_len:
            return mask.gather(1, own.expand(rows, -1)).bool()
        if may_read() and width != int(self.length) + num_new:
            held = int(self.length)
            raise ValueError(
                f"`attention_mask` covers {width} tokens; this CSKVStaticCache holds {held} and gets {num_new}, so it "
                f"must cover {held + num_new}, or `max_cache_len`={self.max_cache_len}. To start over, use "
                "`cache.reset()`."
            )
        return mask[:, -num_new:].bool()


class StaticStep(HasOldTurns):
    """What one forward of the model sees and does; made once, used by every layer. As [`Step`], but in tensors.

    Args:
        table: advanced by [`finish`], when all layers are done. Until then only tokens that it does not count yet are
            written, so that a forward of one token that stopped half-way can be repeated.
        positions: (batch or 1, num_new) position of every new token.
        frequencies: the rotary frequencies of the first layer, in which all tokens are turned by them.
        attention_mask: see [`StaticTable.new_valid`].

    Attributes:
        num_new, added: slots added, and how many real tokens those are in each row, (batch, 1).
        was_empty: whether the cache held nothing before.
        start: () slots before.
        old, num_blocks: of the slots of the table, those of old tokens that attention reads; and in how many blocks.
        slots: (batch, exact columns) and (batch, old columns), the slots of what attention sees, -1 for nothing.
        place: (batch, 1), where a single new token is kept.
        kept: (batch, places), for several new tokens, the columns of the exact states and the new ones that stay.
        evicted: (batch, tokens), the columns of the same that are encoded; if there is one new token, of the places.
        blocks: (batch, num_blocks), where to.
        memo: what layers make of the step for all that follow.
    """

    def __init__(
        self, table: StaticTable, positions: torch.Tensor, frequencies: RotaryFrequencies, attention_mask: Any
    ) -> None:
        table.check_space(positions.shape[-1])
        self.table, self.old_frequencies, self.num_new = table, frequencies, positions.shape[-1]
        self.was_empty, self.start = table.is_empty, table.length.clone()
        device, held = table.length.device, table.counts
        valid = table.new_valid(attention_mask, self.num_new)
        each = torch.arange(self.num_new, device=device).expand(len(held), -1)
        self.added = torch.full_like(held, self.num_new) if valid is None else valid.sum(1, keepdim=True)
        order = each if valid is None else _real_ones(valid, self.added)  # columns of the real ones among the new
        at = held + each
        table.positions.scatter_(1, at, take(positions.to(device).expand(len(held), -1), order, 1).int())
        table.slots.scatter_(1, at, (self.start + order).int())

        num_old = table.num_old(held)
        self._plan_reads(valid, each, num_old)
        self._plan_writes(order, num_old)

    def _plan_reads(self, valid: torch.Tensor | None, each: torch.Tensor, num_old: torch.Tensor) -> None:
        """The columns of the attention of this forward."""
        table, held = self.table, self.table.counts
        num_blocks = table.num_blocks
        if may_read() and (held.device.type == "cpu" or self.num_new > 1):  # less work, where that is worth a wait
            num_blocks = int(num_old.max()) // table.block_size
        self.old = slice(table.sinks, table.sinks + num_blocks * table.block_size)
        old_slots = table.slots[:, self.old]
        is_old = torch.arange(old_slots.shape[1], device=held.device) < num_old
        seen = held + 1 if self.num_new == 1 else held
        tokens = table.token_at(seen)
        is_sink = torch.arange(table.num_places, device=held.device) < table.sinks
        is_held = torch.where(is_sink, tokens < seen, tokens >= table.sinks + num_old)
        exact_slots = take(table.slots, tokens, 1).masked_fill(~is_held, -1)
        if self.num_new > 1:
            new_slots = (self.start + each).int()
            new_slots = new_slots if valid is None else new_slots.masked_fill(~valid, -1)
            exact_slots = torch.cat([exact_slots, new_slots], dim=1)
        self.slots = exact_slots.long(), old_slots.masked_fill(~is_old, -1).long()
        self.num_blocks = num_blocks
        self.memo: list = []
        self._turns: dict[str, OldTurns] = {}

    def _plan_writes(self, order: torch.Tensor, num_old: torch.Tensor) -> None:
        """What is written where afterwards."""
        table, held, block_size = self.table, self.table.counts, self.table.block_size
        most = (self.num_new + block_size - 1) // block_size  # blocks that may become due
        if self.was_empty:
            most = max(0, self.num_new - table.sinks - table.window) // block_size
        count = min(most, table.num_blocks)
        new_blocks = torch.arange(count, device=held.device)
        self.blocks = num_old // block_size + new_blocks
        self._num_old_after = table.num_old(held + self.added)
        tokens = table.sinks + num_old + torch.arange(count * block_size, device=held.device)
        self.positions = take(table.positions, tokens.clamp_max(table.positions.shape[1] - 1), 1)
        if self.num_new == 1:
            self.place, self.kept, self.evicted = table.place_of(held), None, table.place_of(tokens)
            return

        def column(tokens: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
            new = take(order, (tokens - held).clamp(0, self.num_new - 1), 1)
            return torch.where(tokens < held, place, table.num_places + new)

        after = table.token_at(held + self.added)
        places = torch.arange(table.num_places, device=held.device).expand_as(after)
        unchanged = (after < held) | (after >= held + self.added)
        self.place, self.kept = None, torch.where(unchanged, places, column(after, places))
        self.evicted = column(tokens, table.place_of(tokens))

    def finish(self) -> None:
        """Count the new tokens."""
        self.table.length.add_(self.num_new)
        self.table.counts.add_(self.added)
        self.table.is_empty = False

    def due_blocks(self, device: torch.device) -> torch.Tensor:
        """(batch,) int64: of one new token, the block that becomes old with it, counted over the blocks of all rows;
        -1 where none does. Such a block is whole, and this is the last step in which its tokens are all exact."""

        def make() -> torch.Tensor:
            block = self.blocks[:, 0]
            due = self._num_old_after[:, 0] > block * self.table.block_size
            row = torch.arange(len(block), device=block.device)
            return torch.where(due, row * self.table.num_blocks + block, -1).to(device)

        return once(self.memo, f"blocks that are due on {device}", make)

    # The rest as attention and encoding know it from `Step` and `Eviction`.

    @property
    def num_slots(self) -> int:
        return self.table.max_cache_len

    def exact_slots(self) -> torch.Tensor:
        return self.slots[0]

    def old_slots(self) -> torch.Tensor:
        return self.slots[1]

    @property
    def old_positions(self) -> torch.Tensor:
        return self.table.positions[:, self.old]


def _real_ones(valid: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """(batch, n): the columns that are valid, in order, the last of them repeated; `count` (batch, 1) of them."""
    rows, n = valid.shape
    each = torch.arange(n, device=valid.device).expand(rows, -1)
    target = torch.where(valid, valid.cumsum(1) - 1, n)  # the last column takes the others
    order = each.new_zeros(rows, n + 1).scatter_(1, target, each)
    return order.gather(1, torch.minimum(each, count - 1).clamp_min(0))

"""One layer of a CSKVCache: its tensors, and what `update` does with new keys and values.

Keys are cached after RoPE, and rotated back when they are encoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from . import kernels
from .factors import Fingerprint, compute_dtype, without_autocast
from .handover import MISSING_FACTORS, CompressedKV, Staged
from .latents import Latents
from .offload import Copies, copy_ahead, copy_now, to_cpu
from .rope import RotaryFrequencies, rotate, turn_back, widened
from .step import Eviction, Index, Step, once, take


class CSKVLayer(CacheLayerMixin):
    """The tensors of one layer.

    Attributes:
        sink_keys, sink_values: (batch, num_key_value_heads, num_sinks, head_dim), keys after RoPE.
        key_latents, value_latents: [`Latents`] of the old tokens, in the dtype of the model or packed.
        keys, values: (batch, num_key_value_heads, num_recent, head_dim), the window; named as in other cache layers.
        fingerprint: [`Fingerprint`] of the factors that fill the layer.
        sliding_window: of the model's layer, in tokens; None if it attends to all.
        dropped_blocks: first blocks of latents that are no longer held, since no query can see them through that
            window.
        copies: of offloaded latents on the compute device, while it is the layer's turn or that comes next.
        heads: which KV heads these are; see [`LayerFactors.heads`].

    Args:
        offloading: keep the latents on the CPU; see [`CSKVCache`].
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False  # a model's sliding window is applied by the mask, over all slots, dropped ones too
    supports_early_init = False

    EXACT = ("sink_keys", "sink_values", "keys", "values")
    LATENTS = ("key_latents", "value_latents")

    def __init__(self, offloading: bool = False) -> None:
        super().__init__()
        self.offloading = offloading
        self.staged: Staged | None = None
        self.copies: Copies | None = None
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"copies": None}  # may still be on their way, and can be made again

    def reset(self) -> None:
        for name in (*self.EXACT, *self.LATENTS, "fingerprint", "heads", "copies"):
            setattr(self, name, None)
        self.is_initialized = False
        self.num_slots = self.dropped_blocks = 0
        self.sliding_window: int | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, heads, _, head_dim = key_states.shape
        factors = self.staged.factors
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self.values = key_states.new_empty(batch, heads, 0, head_dim)
        self.sink_keys = self.sink_values = self.keys
        formats = factors.key_format, factors.value_format
        self.hold(*(Latents.of(f, key_states.new_empty(batch, 0, f.rank), key_states.dtype) for f in formats))
        self.fingerprint, self.heads = Fingerprint.of(factors), factors.heads
        self.is_initialized = True

    @torch.compiler.disable
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        """Append exact keys (after RoPE) and values; return what attention is to see of past and present.

        Returns:
            Plain tensors (batch, num_key_value_heads, num_slots, head_dim) as long as they are all tokens in order,
            so that the model's own attention can take them, or if materialising was asked for; otherwise the same
            [`CompressedKV`] twice.
        """
        with without_autocast(key_states.device):
            return self._update(key_states, value_states)

    def _update(self, key_states: torch.Tensor, value_states: torch.Tensor):
        staged, self.staged = self.staged, None
        if staged is None:
            raise RuntimeError(MISSING_FACTORS)
        if staged.step.num_new != key_states.shape[-2]:
            raise RuntimeError(
                f"This layer of a CSKVCache was told of {staged.step.num_new} new tokens and got the keys of "
                f"{key_states.shape[-2]}. Call `cache.reset()` or use a new cache."
            )
        self.staged = staged  # lazy_initialization reads the ranks
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.keys.device != key_states.device:  # after an `offload` by hand, or a cache from a file
            self.device, self.copies = key_states.device, None
            self.prefetch()
        self.staged = None
        step, old = staged.step, self.fetch()
        self.copies = None
        keys = torch.cat([self.keys, key_states], dim=2)
        values = torch.cat([self.values, value_states], dim=2)
        exact_keys, exact_values = keys, values
        if step.num_sinks:
            exact_keys = torch.cat([self.sink_keys, keys], dim=2)
            exact_values = torch.cat([self.sink_values, values], dim=2)
        held = step.without(self.dropped_blocks * self.key_latents.format.block_size)
        seen = CompressedKV(exact_keys, exact_values, *old, staged.factors, held, held.turns(staged.frequencies))
        if step.eviction is None:
            self.keys, self.values = keys, values
        else:
            self._evict(keys, values, step.eviction, staged)
        self.num_slots = step.num_slots
        if step.sees_every_slot:
            return exact_keys, exact_values
        return seen.materialize() if staged.materialize else (seen, seen)

    def _evict(self, keys: torch.Tensor, values: torch.Tensor, eviction: Eviction, staged: Staged) -> None:
        evicted = take(keys, eviction.evicted, 2), take(values, eviction.evicted, 2)
        frequencies = eviction.frequencies.in_layer(staged.frequencies)
        new = encode(*evicted, eviction.positions, frequencies, staged)
        old = [held.append(latents.to(held.device)) for held, latents in zip(self._latents(), new)]
        if eviction.old_blocks is not None:
            old = [latents.take(self._where(eviction.old_blocks)) for latents in old]
        self.hold(*old)
        self.drop(staged.unseen_blocks)
        if (
            staged.step.num_sinks == 0
            or not isinstance(eviction.sinks, slice)
            or staged.step.num_sinks < eviction.sinks.stop
        ):
            self.sink_keys = take(torch.cat([self.sink_keys, keys], dim=2), eviction.sinks, 2)
            self.sink_values = take(torch.cat([self.sink_values, values], dim=2), eviction.sinks, 2)
        self.keys, self.values = take(keys, eviction.recent, 2), take(values, eviction.recent, 2)

    def get_seq_length(self) -> int:
        return self.num_slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_slots + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    def crop_columns(self, kept: dict[str, Any], num_slots: int) -> None:
        """Keep the given columns of each part; see [`TokenTable.crop`]."""
        self.num_slots = num_slots
        if self.is_initialized:
            self.sink_keys, self.sink_values = (take(t, kept["sinks"], 2) for t in (self.sink_keys, self.sink_values))
            old = kept["old"]
            blocks, held = old.stop if isinstance(old, slice) else old.shape[1], self.key_latents.num_blocks
            if blocks < self.dropped_blocks + held:
                self.dropped_blocks = min(self.dropped_blocks, blocks)  # all, or 0
                self.hold(*(latents.take(self._where(old)) for latents in self._latents()))
            self.keys, self.values = (take(t, kept["recent"], 2) for t in (self.keys, self.values))

    def _where(self, blocks: Index) -> Index:
        """Indices among the blocks that are held, of blocks counted with those that were dropped, which come first."""
        if isinstance(blocks, slice):
            return slice(0, blocks.stop - self.dropped_blocks)
        return blocks[:, self.dropped_blocks :] - self.dropped_blocks

    def drop(self, blocks: int) -> None:
        """Let go of latents, until this many of the first blocks are gone."""
        if blocks > self.dropped_blocks:
            self.hold(*(latents.drop(blocks - self.dropped_blocks) for latents in self._latents()))
            self.dropped_blocks = blocks

    def select_rows(self, rows: torch.Tensor) -> None:
        if self.is_initialized:
            for name in self.EXACT:
                tensor = getattr(self, name)
                setattr(self, name, tensor.index_select(0, rows.to(tensor.device)))
            self.hold(*(latents.select_rows(rows) for latents in self._latents()))

    reorder_cache = select_rows

    def _latents(self) -> tuple[Latents, Latents]:
        return self.key_latents, self.value_latents

    def hold(self, *latents: Latents) -> None:
        """Keep these as the latents of keys and values, where latents live."""
        if self.offloading:
            latents = tuple(to_cpu(x, self.device) for x in latents)
        self.key_latents, self.value_latents = latents
        self.copies = None

    def fetch(self) -> tuple[Latents, Latents]:
        """The latents where attention reads them: those held, or copies of those that are offloaded."""
        if not self.offloading or not self.is_initialized:
            return self._latents()
        if self.copies is None:
            self.copies = copy_now(self._latents(), self.device)
        return self.copies.ready()

    def offload(self) -> None:
        """Move everything to the CPU, sinks and window too; the next `update` brings it back."""
        if self.is_initialized:
            self._move("cpu")
            self.copies = None

    def prefetch(self) -> None:
        """Undo [`offload`]; of latents that live on the CPU, start copies to the device if it makes them on the
        side."""
        if self.is_initialized:
            self._move(self.device)
            if self.offloading and self.copies is None:
                self.copies = copy_ahead(self._latents(), self.device)

    def _move(self, device: Any) -> None:
        wait = torch.device(device).type == "cpu"  # CPU operations may follow at once
        for name in self.EXACT:
            setattr(self, name, getattr(self, name).to(device, non_blocking=not wait))
        if not self.offloading:
            self.hold(*(latents.to(device, non_blocking=not wait) for latents in self._latents()))

    def tensors(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """Every tensor held, by what it belongs to."""
        if not self.is_initialized:
            return {}
        exact = {name: (getattr(self, name),) for name in self.EXACT}
        return exact | {name: getattr(self, name).held for name in self.LATENTS}

    @property
    def nbytes(self) -> int:
        """Bytes of the storages behind the tensors, each counted once."""
        held = [t for tensors in self.tensors().values() for t in tensors]
        if self.copies is not None:
            held += [t for latents in self.copies.latents for t in latents.held]
        return nbytes_of(held)

    @property
    def offloaded_nbytes(self) -> int:
        """Those of the latents, if they live on the CPU."""
        offloaded = self._latents() if self.offloading and self.is_initialized else ()
        return nbytes_of(t for latents in offloaded for t in latents.held)


def nbytes_of(tensors: Iterable[torch.Tensor]) -> int:
    storages = {(t.device, t.untyped_storage().data_ptr()): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def encode(
    key_states: torch.Tensor,
    value_states: torch.Tensor,
    positions: torch.Tensor,
    frequencies: RotaryFrequencies,
    staged: Staged,
) -> tuple[Latents, Latents]:
    """Store exact keys (after RoPE, at the given positions and frequencies) and values as latents; whole blocks.

    Keys are rotated back in float32 or wider, by what is computed once for all layers of the step that turn alike.
    """
    dtype, factors, matmul_dtype = key_states.dtype, staged.factors, compute_dtype(key_states)
    back = turned_back(staged.step, positions, frequencies, dtype, key_states.device)
    center = kernels.centering(key_states, value_states, factors)
    if center is not None:
        keys = factors.project_keys(center(key_states, factors.key_mean, back, matmul_dtype))
        values = factors.project_values(center(value_states, factors.value_mean, None, matmul_dtype))
    else:
        key_states, value_states = widened((key_states, value_states))
        unrotated = rotate(key_states, back[0][:, None], back[1][:, None])
        keys = factors.encode_keys(unrotated, matmul_dtype)
        values = factors.encode_values(value_states, matmul_dtype)
    return Latents.of(factors.key_format, keys, dtype), Latents.of(factors.value_format, values, dtype)


def turned_back(
    step: Step, positions: torch.Tensor, frequencies: RotaryFrequencies, dtype: torch.dtype, device: torch.device
) -> Sequence[torch.Tensor]:
    """[`turn_back`], computed once for all layers of the step that turn alike."""

    def make() -> tuple[torch.Tensor, ...]:
        return turn_back(positions.to(device), frequencies, dtype)

    return once(step.memo, f"turn back of {frequencies.kind} in {dtype} on {device}", make, positions)

"""CSKVStaticCache: CSKVCache in tensors of fixed size, the counterpart of transformers' StaticCache, for
`torch.compile` and CUDA graphs.

It keeps the same tokens exactly and the same as latents as a CSKVCache, by the same rule. Nothing in a decoding step
depends on a value: every step writes its token, encodes the oldest exact block, due or not (on a GPU by kernels that
end at once if it is not), and attends to everything that was allocated under a mask (static_tokens.py).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from . import kernels
from .cache_layer import encode, turned_back
from .config import CSKVConfig
from .factors import Fingerprint, LayerFactors, without_autocast
from .handover import MISSING_FACTORS, CompressedKV, ForwardInputs, Staged
from .latents import LatentFormat, Latents
from .static_tokens import StaticStep, StaticTable
from .step import once, take
from .tokens import check_tokens


class CSKVStaticLayer(CacheLayerMixin):
    """The tensors of one layer, all allocated at once and written in place.

    Attributes:
        keys, values: (batch, num_key_value_heads, places, head_dim), sinks and a ring of the latest tokens; keys after
            RoPE.
        key_latents, value_latents: [`Latents`] for `max_cache_len` tokens, in one segment.
        fingerprint: [`Fingerprint`] of the factors that fill the layer.
    """

    is_compileable = True
    is_croppable = False
    is_sliding = False  # a model's sliding window is applied by the mask, over all slots
    supports_early_init = False

    def __init__(self, table: StaticTable) -> None:
        super().__init__()
        self.table = table
        self.staged: Staged | None = None

    @torch.compiler.disable  # what a graph makes does not stay where it is
    @torch.inference_mode(False)  # later steps may be without it, and write to the same tensors
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, heads, _, head_dim = key_states.shape
        factors = self.staged.factors
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, batch
        self.keys = key_states.new_zeros(batch, heads, self.table.num_places, head_dim)
        self.values = torch.zeros_like(self.keys)
        self.key_latents, self.value_latents = (
            self._room_for(format, key_states) for format in (factors.key_format, factors.value_format)
        )
        self.fingerprint = Fingerprint.of(factors)
        self.is_initialized = True
        kernels.prepare(factors, key_states)
        keep_in_place(self.tensors)

    def _room_for(self, format: LatentFormat, like: torch.Tensor) -> Latents:
        block = format.store(like.new_zeros(1, format.block_size, format.rank), like.dtype)
        size = len(like), self.table.num_blocks
        return Latents(format, tuple(t.new_zeros(*size, *t.shape[2:]) for t in block))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Every tensor held."""
        if not self.is_initialized:
            return ()
        return self.keys, self.values, *self.key_latents.held, *self.value_latents.held

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        """Write exact keys (after RoPE) and values; return what attention is to see of past and present.

        Returns:
            The given tensors if the cache was empty; otherwise the same [`CompressedKV`] twice.
        """
        with without_autocast(key_states.device):
            return self._update(key_states, value_states)

    def _update(self, key_states: torch.Tensor, value_states: torch.Tensor):
        staged = self.staged
        if staged is None:
            raise RuntimeError(MISSING_FACTORS)
        if staged.step.num_new != key_states.shape[-2]:
            raise RuntimeError(
                f"This layer of a CSKVStaticCache was told of {staged.step.num_new} new tokens and got the keys of "
                f"{key_states.shape[-2]}. Call `cache.reset()` or use a new cache."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_states, value_states = key_states.to(self.keys.dtype), value_states.to(self.keys.dtype)  # under autocast
        self.staged = None
        step: StaticStep = staged.step
        if step.num_new == 1:
            place = step.place[:, None, :, None].to(self.device).expand_as(key_states)
            self.keys.scatter_(2, place, key_states)
            self.values.scatter_(2, place, value_states)
            keys, values = self.keys, self.values
        else:
            keys = torch.cat([self.keys, key_states], dim=2)
            values = torch.cat([self.values, value_states], dim=2)
        self._encode(keys, values, staged)
        if step.num_new > 1:
            self.keys.copy_(take(keys, step.kept, 2))
            self.values.copy_(take(values, step.kept, 2))
        if step.was_empty:
            return key_states, value_states
        seen = [
            Latents(latents.format, tuple(t[:, : step.num_blocks] for t in latents.held))
            for latents in (self.key_latents, self.value_latents)
        ]
        kv = CompressedKV(keys, values, *seen, staged.factors, step, step.turns(staged.frequencies))
        return kv, kv

    def _encode(self, keys: torch.Tensor, values: torch.Tensor, staged: Staged) -> None:
        """Encode the blocks that are due, and what else the shapes allow for, which the next forward writes again."""
        step: StaticStep = staged.step
        if step.evicted.shape[1] == 0:
            return
        encode_due = kernels.encoder(keys, values, staged.factors) if step.num_new == 1 else None
        if encode_due is not None:
            back = turned_back(step, step.positions, staged.frequencies, keys.dtype, self.device)
            places, target = step.evicted.to(self.device), step.due_blocks(self.device)
            encode_due(keys, values, places, back, target, staged.factors, self.key_latents, self.value_latents)
            return
        new = encode(
            take(keys, step.evicted, 2),
            take(values, step.evicted, 2),
            step.positions,
            staged.frequencies,
            staged,
        )

        def rows_and_blocks() -> tuple[torch.Tensor, torch.Tensor]:
            return torch.arange(len(step.blocks), device=self.device)[:, None], step.blocks.to(self.device)

        where = once(step.memo, f"where to on {self.device}", rows_and_blocks)
        for latents, block in zip((self.key_latents, self.value_latents), new):
            for target, source in zip(latents.held, block.held):
                target[where] = source

    def get_seq_length(self) -> torch.Tensor | int:
        return 0 if self.table.is_empty else self.table.length.clone()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length if self.table.is_empty else self.table.max_cache_len, 0

    def get_max_length(self) -> int:
        return self.table.max_cache_len

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    def reset(self) -> None:
        for tensor in self.tensors:
            tensor.zero_()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        reorder(self.tensors, beam_idx)

    def offload(self) -> None:
        raise NotImplementedError("A CSKVStaticCache stays where it was allocated; a `CSKVCache` can be moved.")

    prefetch = offload


class CSKVStaticCache(Cache):
    """A [`CSKVCache`] of fixed size, for `torch.compile` and CUDA graphs.

    The same function of the same tokens, in tensors that are allocated at the first forward and never move, so that a
    decoding step is one graph for all steps. ``model.generate(..., past_key_values=CSKVStaticCache(4096))`` compiles
    decoding as it does for transformers' `StaticCache`; a loop of one's own may compile ``model.forward`` with
    ``fullgraph=True``. Read the prompt without compiling. Every compiled step attends to all that was allocated, so
    `max_cache_len` should not be larger than needed. That holds for layers with a sliding window, too, which have
    as many places as the others here, and no more than their window in a `StaticCache`.

    A compiled step does not look whether the adapter is still the one that filled the cache: `reset` it when that
    changes.

    Tokens cannot be taken back: assisted generation and `crop` need a [`CSKVCache`]. A step that was interrupted,
    outside of a graph, can be repeated.

    Args:
        max_cache_len: Tokens that fit, padding included.
        window: Most recent tokens kept exactly, at least; the adapter's setting by default.
        sinks: First tokens kept exactly; the adapter's setting by default.

    Raises:
        ValueError: if `max_cache_len` or `window` is below 1, or `sinks` below 0.
    """

    max_cache_len = 0  # of an instance its own; transformers 5.14 has a property of this name, without a setter

    def __init__(self, max_cache_len: int, window: int | None = None, sinks: int | None = None) -> None:
        super().__init__(layers=[])
        check_tokens(max_cache_len=(max_cache_len, 1), window=(window, 1), sinks=(sinks, 0))
        self.max_cache_len, self.window, self.sinks = max_cache_len, window, sinks
        self.tokens: StaticTable | None = None
        self.attention_mask: Any = None
        self._step: StaticStep | None = None

    @property
    def is_compileable(self) -> bool:
        return True

    @property
    def is_croppable(self) -> bool:
        return False

    def begin_forward(self, attention_mask: Any) -> None:
        """Called by the model-level pre-hook: remember the mask, off which [`StaticTable.new_valid`] reads padding.

        Raises:
            RuntimeError: if an earlier forward of several tokens stopped between two layers.
        """
        unfinished, self._step = self._step, None
        if unfinished is not None and unfinished.num_new > 1 and not unfinished.was_empty:
            self._step = unfinished
            raise RuntimeError(
                "An earlier forward with this CSKVStaticCache was interrupted between two layers, which now hold "
                "different tokens. Call `cache.reset()` or use a new cache."
            )
        if self.tokens is not None and not any(layer.is_initialized for layer in self.layers):
            self.tokens = None  # a first forward was refused, of a batch or adapter that need not be the next one's
            self.layers.clear()
        self.attention_mask = attention_mask

    def stage(self, layer_idx: int, factors: LayerFactors, config: CSKVConfig, inputs: ForwardInputs) -> None:
        """Called by the pre-hook of each attention layer, before that layer's `update`; as [`CSKVCache.stage`].

        A layer's sliding window is not asked for: all places exist anyway, and the mask hides what lies beyond.

        Raises:
            ValueError: if the cache was filled with other factors or another batch, if the new tokens do not fit, or
                if the model's attention or RoPE is of a kind that a cache of fixed size does not serve.
        """
        if self.tokens is None:
            self.tokens = self._new_table(config, inputs)
        while len(self.layers) <= layer_idx:
            self.layers.append(CSKVStaticLayer(self.tokens))
        layer = self.layers[layer_idx]
        if inputs.materialize:
            raise ValueError(
                "The attention implementation was changed after CSKV was attached, and a CSKVStaticCache cannot do "
                "without its own. Change it before the adapter is loaded, or use `CSKVCache()`."
            )
        if layer.is_initialized:
            self._check_same(layer, layer_idx, factors, inputs.batch_size)
        if self._step is None:
            self._step = StaticStep(self.tokens, inputs.positions, inputs.frequencies, self.attention_mask)
        layer.staged = Staged(self._step, factors, inputs.frequencies, materialize=False)

    @torch.compiler.disable
    @torch.inference_mode(False)
    def _new_table(self, config: CSKVConfig, inputs: ForwardInputs) -> StaticTable:
        if inputs.frequencies.change:
            raise ValueError(
                "A CSKVStaticCache does not support RoPE scaling whose frequencies change with the length (dynamic, "
                "longrope). Use `CSKVCache()`."
            )
        window = config.window if self.window is None else self.window
        sinks = config.sinks if self.sinks is None else self.sinks
        rows, device = inputs.batch_size, inputs.positions.device
        table = StaticTable(self.max_cache_len, window, sinks, config.block_size, rows, device)
        keep_in_place(table.tensors)
        return table

    def _check_same(self, layer: CSKVStaticLayer, layer_idx: int, factors: LayerFactors, batch_size: int) -> None:
        held, given = (layer.key_latents, layer.value_latents), (factors.key_format, factors.value_format)
        same = tuple(latents.format for latents in held) == given
        if same and not torch.compiler.is_compiling():
            same = layer.fingerprint.is_of(factors)
        if not same:
            raise ValueError(
                f"This CSKVStaticCache was allocated for another adapter (layer {layer_idx}). A cache belongs to one "
                "model and adapter: use a new one."
            )
        if layer.batch_size != batch_size:
            raise ValueError(
                f"This CSKVStaticCache was allocated for a batch of {layer.batch_size} and got a batch of "
                f"{batch_size}. Use a new one."
            )

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """See [`CSKVStaticLayer.update`].

        Raises:
            RuntimeError: if the model has no CSKV factors in use; the message says how to get them.
        """
        if layer_idx >= len(self.layers):
            raise RuntimeError(MISSING_FACTORS)
        return self.layers[layer_idx].update(key_states, value_states)

    def finish_forward(self) -> None:
        """Called by the hook after the decoder: all layers hold the new tokens, so they count."""
        step, self._step, self.attention_mask = self._step, None, None
        if step is not None:
            step.finish()

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor | int:
        """Slots held, as a tensor once there are any, so that nothing is compiled anew when it grows."""
        return 0 if self.tokens is None or self.tokens.is_empty else self.tokens.length.clone()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length if self.tokens is None or self.tokens.is_empty else self.max_cache_len, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.max_cache_len

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Drop all tokens. The tensors stay where they are, for the same model, adapter and batch size."""
        self._step = self.attention_mask = None
        if self.tokens is not None:
            for tensor in self.tokens.tensors:
                tensor.zero_()
            self.tokens.is_empty = True
        for layer in self.layers:
            layer.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: the ring has no room for tokens that would have to come back.

        Raises:
            NotImplementedError: as described.
        """
        raise NotImplementedError(
            "A CSKVStaticCache cannot take tokens back, which assisted generation and `crop` ask for. Use "
            "`CSKVCache()`."
        )

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows for beam search, in place."""
        if self.tokens is not None:
            reorder(self.tokens.tensors[1:], beam_idx)
        for layer in self.layers:
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused: the batch is allocated.

        Raises:
            NotImplementedError: as described.
        """
        raise NotImplementedError("The batch of a CSKVStaticCache cannot change. Use `CSKVCache()`.")

    batch_select_indices = batch_repeat_interleave

    def activate_past_recording(self) -> None:
        """Nothing: see [`crop`]."""

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor allocated: exact places, latents, positions and bookkeeping."""
        shared = self.tokens.tensors if self.tokens is not None else ()
        return sum(
            t.untyped_storage().nbytes() for t in (*shared, *(t for layer in self.layers for t in layer.tensors))
        )


def keep_in_place(tensors: tuple[torch.Tensor, ...]) -> None:
    """Tell compilers that these tensors do not move, so that CUDA graphs may write to them; as transformers' static
    layers do."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)


def reorder(tensors: tuple[torch.Tensor, ...], rows: torch.Tensor) -> None:
    """Put other rows, of the same number, in place of the rows of each tensor."""
    for tensor in tensors:
        tensor.copy_(tensor.index_select(0, rows.to(tensor.device)))

"""CSKVCache: sinks and a window of exact keys and values, low-rank latents for everything between (CSKV's bi-branch
cache, section 2.1).

The cache owns tensors, not models: the attention pre-hook *stages* this step's positions and factors, the model's
unmodified attention calls [`CSKVCache.update`], and nothing of the model is kept afterwards. Keys are cached after
RoPE, and rotated back when they are encoded.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers.cache_utils import Cache

from .cache_layer import CSKVLayer
from .cache_report import report
from .config import CSKVConfig
from .factors import LayerFactors
from .handover import MISSING_FACTORS, ForwardInputs, Staged
from .step import Step
from .tokens import ROLLBACK_TOKENS, TokenTable, check_tokens

INTERRUPTED = (
    "An earlier forward with this CSKVCache was interrupted between two layers, which now hold different tokens. Call "
    "`cache.reset()` or use a new cache."
)


class CSKVCache(Cache):
    """A KV cache that keeps `sinks` first and `window` last tokens exactly and everything between as low-rank latents.

    Works with any model that has a CSKV adapter, wherever a `DynamicCache` would: ``model.generate(...,
    cache=CSKVCache)`` or ``past_key_values=CSKVCache()``. Prefill attends to exact keys and values; what is kept of
    them is compressed. Tokens leave the window in blocks, and everything that is held exactly is used exactly. Layers
    of the model that have a sliding window drop latents that no query to come can see through it.

    Args:
        window: Most recent tokens kept exactly; the adapter's setting by default.
        sinks: First tokens kept exactly; the adapter's setting by default.
        materialize: Rebuild all keys and values in every step and run the model's own attention implementation on
            them. Slow and large; for comparison, and for attention implementations that the default path does not
            serve.
        offloading: Keep the latents on the CPU, and on the compute device those of the layer at work only; on CUDA
            also the next layer's, which are copied ahead. Sinks and window stay on the device.

    Raises:
        ValueError: if `window` is below 1 or `sinks` below 0.
    """

    def __init__(
        self,
        window: int | None = None,
        sinks: int | None = None,
        materialize: bool = False,
        offloading: bool = False,
    ) -> None:
        super().__init__(layers=[])  # not told of `offloading`: its way moves the window too, and needs CUDA
        check_tokens(window=(window, 1), sinks=(sinks, 0))
        self.window, self.sinks, self.materialize, self.offloading = window, sinks, materialize, offloading
        self.tokens: TokenTable | None = None
        self.padding_mask: torch.Tensor | None = None
        self.has_own_mask = False
        self._step: Step | None = None
        self._before: TokenTable | None = None  # the bookkeeping before a forward of which no layer holds anything yet
        self.slack = 0
        self._moving = False  # whether some layers, and perhaps not all, were cropped or have other rows
        self.has_all_layers = False  # whether a forward has come to its end since the cache was empty

    def begin_forward(self, attention_mask: torch.Tensor | None) -> None:
        """Called by the model-level pre-hook: remember which of the tokens to come are padding.

        Args:
            attention_mask: (batch, slots) with 0 for padding; anything else (None, 4-D masks) means that no token is.
                What is neither may show a layer what lies beyond its sliding window, so that nothing is dropped.

        Raises:
            RuntimeError: if an earlier forward stopped between two layers.
        """
        self._settle()
        is_padding_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
        self.has_own_mask = attention_mask is not None and not is_padding_mask
        self.padding_mask = attention_mask if is_padding_mask else None

    def finish_forward(self) -> None:
        """Called by the hook after the decoder: what belonged to this forward alone is let go."""
        self._step = self._before = self.padding_mask = None
        self.has_all_layers = self.tokens is not None

    def _settle(self) -> None:
        """Make sure that all layers hold the same tokens: undo an earlier forward that stopped before the first.

        Raises:
            RuntimeError: if a forward, or a move of all layers, stopped between two.
        """
        self._step = None
        if self.tokens is None:
            return
        if self._before is not None:  # no layer has been updated since
            self.tokens, self._before = self._before, None
            self.tokens.slack = self.slack  # may have been set since
        if self._moving or any(layer.num_slots != self.tokens.num_slots for layer in self.layers):
            raise RuntimeError(INTERRUPTED)
        if not any(layer.is_initialized for layer in self.layers):
            self.reset()  # of a first forward, by an adapter that need not be the next one's
        elif not self.has_all_layers:
            raise RuntimeError(INTERRUPTED)

    def stage(self, layer_idx: int, factors: LayerFactors, config: CSKVConfig, inputs: ForwardInputs) -> None:
        """Called by the pre-hook of each attention layer, before that layer's `update`.

        Raises:
            ValueError: if the cache was filled with other factors or another batch, or if a mask of the user's own
                meets latents that were dropped.
            RuntimeError: if an earlier forward stopped between two layers.
        """
        while len(self.layers) <= layer_idx:
            self.layers.append(CSKVLayer(self.offloading))
        layer, sliding_window = self.layers[layer_idx], inputs.sliding_window
        if self.tokens is None:
            window = config.window if self.window is None else self.window
            sinks = config.sinks if self.sinks is None else self.sinks
            self.tokens = TokenTable(window, sinks, config.block_size, self.slack)
        if layer.is_initialized:
            self._check_same(layer, layer_idx, factors, inputs)
        if layer.num_slots == self.tokens.num_slots:
            valid, self._before = self._new_tokens_valid(inputs.positions), self.tokens.snapshot()
            self._step = self.tokens.advance(inputs.positions, inputs.frequencies, valid, inputs.batch_size)
        elif self._step is None or layer.num_slots != self._step.start:
            raise RuntimeError(INTERRUPTED)
        layer.sliding_window = sliding_window
        waits_for_crop = self.slack > 0  # of unknown depth; `crop` drops then
        drops = sliding_window is not None and self._step.eviction is not None
        drops = drops and not self.has_own_mask and not waits_for_crop
        unseen_blocks = self.tokens.unseen_blocks(sliding_window) if drops else 0
        materialize = self.materialize or inputs.materialize
        layer.staged = Staged(self._step, factors, inputs.frequencies, materialize, unseen_blocks)

    def _check_same(self, layer: CSKVLayer, layer_idx: int, factors: LayerFactors, inputs: ForwardInputs) -> None:
        if layer.heads != factors.heads:
            raise ValueError(
                f"This CSKVCache holds {_heads(layer.heads)}, layer {layer_idx} of this model has "
                f"{_heads(factors.heads)} here. Under tensor parallelism a cache belongs to one process: use a new "
                "one, or `cache.reset()`."
            )
        held, given = (layer.key_latents, layer.value_latents), (factors.key_format, factors.value_format)
        if tuple(latents.format for latents in held) != given:
            raise ValueError(
                f"This CSKVCache was filled with latents of rank {held[0].format.rank} (keys) and "
                f"{held[1].format.rank} (values), layer {layer_idx} of this model has {given[0].rank} and "
                f"{given[1].rank}, or stores them in other bits. A cache belongs to one model and adapter: use a new "
                "one, or `cache.reset()`."
            )
        if not layer.fingerprint.is_of(factors):
            raise ValueError(
                f"This CSKVCache was filled by another adapter of the same sizes, or before this one was trained "
                f"further (layer {layer_idx}). A cache belongs to one model and adapter: use a new one, or "
                "`cache.reset()`."
            )
        batch_size = layer.keys.shape[0]
        if batch_size != inputs.batch_size:
            raise ValueError(
                f"This CSKVCache holds a batch of {batch_size} and got a batch of {inputs.batch_size}. Use a new "
                "cache, `cache.reset()`, or `batch_repeat_interleave` / `batch_select_indices` to change its batch."
            )
        if layer.dropped_blocks and self.has_own_mask:
            raise ValueError(
                f"`attention_mask` is a mask of single queries and tokens, which may show layer {layer_idx} what "
                f"lies beyond its sliding window of {inputs.sliding_window} tokens, and this CSKVCache has dropped "
                "that. Pass a mask of padding, (batch, tokens), or such a mask from the first token on: then nothing "
                "is dropped."
            )

    def _new_tokens_valid(self, positions: torch.Tensor) -> torch.Tensor | None:
        if self.padding_mask is None:
            return None
        num_new, total = positions.shape[-1], self.tokens.num_slots + positions.shape[-1]
        if self.padding_mask.shape[1] != total:
            raise ValueError(
                f"`attention_mask` covers {self.padding_mask.shape[1]} tokens; this CSKVCache holds "
                f"{self.tokens.num_slots} and gets {num_new}, so it must cover {total}. To start over, use a new "
                "cache or `cache.reset()`."
            )
        return self.padding_mask[:, -num_new:].bool()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """Append a layer's exact keys (after RoPE) and values, (batch, num_key_value_heads, num_new, head_dim); return
        what its attention is to see of past and present. See [`CSKVLayer.update`].

        Raises:
            RuntimeError: if the model has no CSKV factors in use; the message says how to get them.
        """
        if layer_idx >= len(self.layers):
            raise RuntimeError(MISSING_FACTORS)
        layer, self._before = self.layers[layer_idx], None
        if self.offloading:
            layer.fetch()
            self.prefetch(layer_idx + 1)
        return layer.update(key_states, value_states)

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Bring a layer to its device, ahead of its turn: after the last one, the first.

        What [`offload`] took away comes back. Latents of a cache made with `offloading=True` are copied if the device
        can do so beside its work (CUDA), else once it is their turn.

        Args:
            layer_idx: of the layer, or the number of layers.
            only_non_sliding: for transformers; no layer here counts as a sliding one.
        """
        if self.layers:
            self.layers[layer_idx % len(self.layers)].prefetch()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layers[layer_idx].num_slots if layer_idx < len(self.layers) else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + query_length, 0

    def reset(self) -> None:
        """Drop all tokens and what was learnt about the model; the cache can then be used anew."""
        self.layers.clear()
        self.tokens = self._step = self._before = self.padding_mask = None
        self._moving = self.has_all_layers = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: a negative count removes that many (transformers >= 5.14), a positive one is the
        length to keep.

        What was compressed stays compressed. Layers with a sliding window hold what it can show to the next token, and
        `ROLLBACK_TOKENS` tokens more, so that this many can be removed at any time; while a speculation is verified,
        they hold everything.

        Raises:
            ValueError: if there are fewer tokens, or a layer has dropped what it would need then.
            RuntimeError: if an earlier forward stopped between two layers.
        """
        self._settle()
        length, tokens_to_remove = self.get_seq_length(), int(tokens_to_remove)  # older generation gives a tensor
        kept = length + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, length)
        if self.tokens is None:
            return
        if kept < 0:
            raise ValueError(f"Cannot crop {-tokens_to_remove} tokens from a cache of {length}.")
        sliding = [layer for layer in self.layers if layer.is_initialized and layer.sliding_window is not None]
        if kept < length:
            for layer in sliding:
                if layer.dropped_blocks:
                    self.tokens.check_crop(kept, layer.dropped_blocks, layer.sliding_window)
            self._moving = True
            columns = self.tokens.crop(length - kept)
            for layer in self.layers:
                layer.crop_columns(columns, kept)
            self._moving = False
        if self.slack and not self.has_own_mask:
            for layer in sliding:
                layer.drop(self.tokens.unseen_blocks(layer.sliding_window))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._settle()
        if self.layers:
            self.batch_select_indices(torch.arange(self.layers[0].keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows at `indices`, or those where a mask is True."""
        self._settle()
        indices = torch.as_tensor(indices)
        rows = self.layers[0].keys.shape[0] if self.layers and self.layers[0].is_initialized else None
        if indices.dtype == torch.bool:
            if rows is not None and indices.shape != (rows,):
                raise ValueError(f"`indices` is a mask of shape {tuple(indices.shape)}, this cache has {rows} rows.")
            indices = indices.nonzero().squeeze(1)
        elif rows is not None:
            indices = torch.where(indices < 0, indices + rows, indices)  # from the end
            known = indices.device.type == "cpu"  # those of beam search on a GPU would be waited for at every step
            if known and len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < rows:
                raise ValueError(f"`indices` must be from {-rows} to {rows - 1} in a cache of {rows} rows.")
        if self.tokens is not None:
            self.tokens.select_rows(indices)
        self._moving = True
        for layer in self.layers:
            layer.select_rows(indices)
        self._moving = False

    def activate_past_recording(self) -> None:
        """Keep more exact tokens than the window, so that rejected speculations are rolled back exactly, and what lies
        beyond a sliding window until `crop` says what was rejected."""
        self.slack = ROLLBACK_TOKENS
        if self.tokens is not None:
            self.tokens.slack = self.slack

    def stop_past_recording(self) -> None:
        """Undo [`activate_past_recording`]: nothing will be rolled back for now."""
        self.slack = 0
        if self.tokens is not None:
            self.tokens.slack = 0

    def save(self, path: str | os.PathLike) -> None:
        """Write the cache to a safetensors file, to go on from with [`CSKVCache.load`].

        Raises:
            ValueError: if the cache is empty, or holds a part of the heads (tensor parallelism).
            RuntimeError: if an earlier forward stopped between two layers.
        """
        from .cache_file import save_cache

        self._settle()
        save_cache(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu", offloading: bool = False) -> CSKVCache:
        """Read a cache that [`save`] wrote; for the model and adapter that filled it.

        All layers go to `device`, and each moves to that of its layer of the model at the next step; the latents stay
        on the CPU if `offloading`.

        Raises:
            ValueError: if the file is truncated, corrupt, something else, or of another version.
        """
        from .cache_file import load_cache

        return load_cache(path, device, offloading)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held: sinks, latents, window, positions and bookkeeping."""
        return sum(layer.nbytes for layer in self.layers) + (self.tokens.nbytes if self.tokens is not None else 0)

    @property
    def offloaded_nbytes(self) -> int:
        """Those of them that live on the CPU: the latents of a cache made with `offloading=True`, else 0."""
        return sum(layer.offloaded_nbytes for layer in self.layers)

    def report(self) -> str:
        """What is held and what it costs, as a readable table."""
        self._settle()
        return report(self.tokens, self.layers, self.offloading)


def _heads(heads: tuple[int, int, int]) -> str:
    first, count, total = heads
    return f"KV heads {first} to {first + count - 1} of {total}"

"""CSKVConfig: what to keep of a KV cache, as a PEFT adapter config; validation, ranks from a budget, and bytes from
ranks.

Knows shapes and numbers only; nothing here looks at a model's weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import PeftType

from ._peft_type import ensure_peft_type
from .latents import LatentFormat, PackedFormat, PlainFormat
from .model_shape import CHANGING_ROPE_TYPES, PLAIN_BITS, PLAIN_BYTES, ModelShape, sliding_window
from .quantize import PackedLayout, channel_bits
from .tokens import ROLLBACK_TOKENS

INITS = ("attention", "mse", "asvd", "svd", "random")
ALLOCATIONS = ("auto", "uniform")
BITS = (2, 3, 4, 8, 16)
FORMAT_VERSION = 1
POSITION_BYTES = 4  # one int32 per token, shared by all layers
DEFAULT_COMPRESSION = 0.8
PACKED_FROM = 0.5  # the compression from which on latents are packed unless `bits` says otherwise


def bits_alike(bits: int, rank: int) -> tuple[int, ...]:
    """The bits of channels that have as many each, as `format_of` takes them: of plain ones, nothing."""
    return () if bits == PLAIN_BITS else (bits,) * rank


def num_key_groups(key_layout: str, num_key_value_heads: int) -> int:
    """Into how many groups of KV heads a key layout splits a layer: ``head`` all of them, ``joint`` one, ``group:N``
    heads / N."""
    if key_layout == "head":
        return num_key_value_heads
    if key_layout == "joint":
        return 1
    size = int(key_layout.removeprefix("group:"))
    if num_key_value_heads % size:
        raise ValueError(
            f"`key_layout`='{key_layout}' must divide the model's {num_key_value_heads} KV heads; "
            f"use a divisor of {num_key_value_heads}, 'head' or 'joint'."
        )
    return num_key_value_heads // size


@dataclass
class CSKVConfig(PeftConfig):
    """Configuration of a CSKV adapter (Wang et al. 2024, arXiv 2409.10593): a PEFT config, saved as
    ``adapter_config.json``.

    Args:
        compression: Fraction of the KV bytes of an old token (one outside window and sinks) that is removed, in [0,
            1), of a cache in 16 bits and with everything counted: latents, the ranges of packed ones, the position.
            Default 0.8, unless `key_rank` and `value_rank` are given.
        key_rank, value_rank: Instead of `compression`: channels kept per token and layer, of ``kv_dim =
            num_key_value_heads * head_dim``. With `key_layout="head"` this is the sum over the heads.
        key_rank_per_layer, value_rank_per_layer: Overrides, ``{layer_idx: rank}``, of whichever of the above is in
            force.
        key_layout: ``"head"`` (default) factors the keys of each KV head on its own, with ranks pooled over the
            heads of a layer, which makes decoding cheap; ``"joint"`` factors all heads together (the paper's);
            ``"group:N"`` N heads at a time. Values are always factored jointly: they never need to be rebuilt.
        window: Number of most recent tokens kept exactly, at least this many at any time (the paper's 32).
        sinks: Number of first tokens kept exactly. The paper keeps none. With fewer than 4, [`fit`] weighs all tokens
            alike instead of by how much attention reads them.
        block_size: Tokens leave the window in blocks of this many.
        init: How the factors are found by [`fit`]: ``"attention"`` (default; optimal for what queries read of old
            tokens), ``"mse"`` (optimum of the paper's loss), ``"asvd"``, ``"svd"`` (the paper's initialisations),
            ``"random"``.
        center: Whether the mean of keys and values is left to a constant, so that latents hold deviations from it
            only; costs nothing per token. Possible with `init` "attention", where it is the default, and "mse".
        asvd_alpha: Exponent of ASVD's activation scale (the paper's 0.5).
        bits: Storage of the latents. 8, 4, 3 or 2 packs them in that many bits, the average over the channels kept;
            16 leaves them in the model's dtype, as the paper does without quantisation. By default, if `compression`
            is at least 0.5, every channel gets the bits it is worth (2 to 8), or 4 where nothing says what it is
            worth (`allocation` "uniform", `init` "svd", "asvd" or "random"); else 16.
        allocation: ``"auto"`` spends one byte budget on ranks and bits over all layers, KV heads, K and V, where the
            model's output gains most by it; ``"uniform"`` (the paper's) keeps the same rank and bits everywhere. By
            default "auto" where there are energies to go by: a `compression`, and `init` "attention" or "mse".
        key_group, value_group: ``[tokens, channels]`` of packed latents that share a minimum and a step, by default
            ``[block_size, 4]``; ``[block_size, 1]`` is the paper's layout of keys, ``[1, rank]`` that of values.
        rank_multiple: With `allocation="auto"`: channels get their bits in multiples of this many, neighbours within
            a key group, so that a GPU's kernel reads them together (4) or has its tiles filled (16). Less only where
            a group's channels are no multiple, and where keys or values of a layer keep nothing but the one channel
            that they must. What it costs depends on the head dimension; see docs/concepts.md.
        key_ranks, value_ranks, key_bits, value_bits, sensitivity, model_shape, fit_report: Written by [`fit`]: the
            ranks and bits found, per layer (and key group), how much the output cares for each layer, the model they
            belong to, and what was measured. Leave empty.

    Raises:
        ValueError: for any value outside of what is described above; the message names it.
    """

    compression: float | None = field(default=None, metadata={"help": "fraction of KV bytes removed from old tokens"})
    key_rank: int | None = field(default=None, metadata={"help": "channels kept per token and layer for keys"})
    value_rank: int | None = field(default=None, metadata={"help": "channels kept per token and layer for values"})
    key_rank_per_layer: dict[int, int] | None = field(default=None, metadata={"help": "{layer_idx: key rank}"})
    value_rank_per_layer: dict[int, int] | None = field(default=None, metadata={"help": "{layer_idx: value rank}"})
    key_layout: str = field(default="head", metadata={"help": "'head', 'joint' or 'group:N'"})
    window: int = field(default=32, metadata={"help": "most recent tokens kept exactly"})
    sinks: int = field(default=4, metadata={"help": "first tokens kept exactly"})
    block_size: int = field(default=32, metadata={"help": "tokens leave the window in blocks of this many"})
    init: str = field(default="attention", metadata={"help": f"one of {', '.join(INITS)}"})
    center: bool | None = field(default=None, metadata={"help": "latents of deviations from the mean"})
    asvd_alpha: float = field(default=0.5, metadata={"help": "exponent of ASVD's activation scale"})
    bits: int | None = field(default=None, metadata={"help": "bits per latent, on average; 16 is the model's dtype"})
    allocation: str | None = field(default=None, metadata={"help": "'auto' or 'uniform'"})
    key_group: list[int] | None = field(default=None, metadata={"help": "[tokens, channels] that share a range"})
    value_group: list[int] | None = field(default=None, metadata={"help": "[tokens, channels] that share a range"})
    rank_multiple: int = field(default=1, metadata={"help": "channels are allocated in multiples of this many"})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "attention modules; set by the tuner"}
    )
    key_ranks: list[list[int]] | None = field(default=None, metadata={"help": "fitted ranks per layer and key group"})
    value_ranks: list[int] | None = field(default=None, metadata={"help": "fitted ranks per layer"})
    key_bits: list[list[list[list[int]]]] | None = field(
        default=None, metadata={"help": "fitted runs of [bits, channels] per layer and key group"}
    )
    value_bits: list[list[list[int]]] | None = field(
        default=None, metadata={"help": "fitted runs of [bits, channels] per layer"}
    )
    sensitivity: list[list[float]] | None = field(
        default=None, metadata={"help": "per layer: loss of the output per energy lost of keys, of values"}
    )
    model_shape: dict[str, Any] | None = field(default=None, metadata={"help": "sizes of the model it was fitted to"})
    fit_report: dict[str, Any] | None = field(default=None, metadata={"help": "what was measured during the fit"})
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "version of the adapter's file format"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.CSKV
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"This adapter has `format_version`={self.format_version}, this cskv-hf reads up to {FORMAT_VERSION}. "
                "Upgrade it with `pip install -U cskv-hf`."
            )
        for name in ("key_rank_per_layer", "value_rank_per_layer"):
            if getattr(self, name) is not None:  # JSON turns the layer indices into strings
                setattr(self, name, {_layer_index(name, layer): r for layer, r in getattr(self, name).items()})
        self._check_budget()
        if not re.fullmatch(r"head|joint|group:0*[1-9]\d*", str(self.key_layout)):
            raise ValueError(
                f"`key_layout` must be 'head', 'joint' or 'group:N' with N >= 1, got {self.key_layout!r}."
            )
        for name, least, unit in (
            ("window", 1, "tokens"),
            ("sinks", 0, "tokens"),
            ("block_size", 1, "tokens"),
            ("rank_multiple", 1, "channels"),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"`{name}` must be an integer of at least {least}, in {unit}, got {value!r}.")
        if self.init not in INITS:
            raise ValueError(f"`init` must be one of {', '.join(map(repr, INITS))}, got {self.init!r}.")
        if self.center and not self.uses_moments:
            raise ValueError(
                f"`center`=True needs `init` 'attention' or 'mse', whose factors are of the data's moments; got "
                f"`init`='{self.init}'."
            )
        if not 0.0 <= self.asvd_alpha <= 1.0:
            raise ValueError(f"`asvd_alpha` must be in [0, 1], got {self.asvd_alpha}.")
        self._check_storage()

    def _check_storage(self) -> None:
        if self.bits is not None and self.bits not in BITS:
            raise ValueError(f"`bits` must be one of {', '.join(map(str, BITS))}, or None, got {self.bits!r}.")
        if self.allocation not in (None, *ALLOCATIONS):
            raise ValueError(f"`allocation` must be 'auto' or 'uniform', got {self.allocation!r}.")
        if self.allocation == "auto" and (self.compression is None or not self.uses_moments):
            raise ValueError(
                "`allocation`='auto' needs a `compression` to spend and energies to go by: "
                f"`init` 'attention' or 'mse', got `compression`={self.compression} and `init`='{self.init}'."
            )
        if self.allocation == "auto" and (self.key_rank_per_layer or self.value_rank_per_layer):
            raise ValueError(
                "`allocation`='auto' decides the ranks; drop `key_rank_per_layer` and `value_rank_per_layer`."
            )
        if self.rank_multiple > 1 and not self.allocates:
            raise ValueError(
                f"`rank_multiple`={self.rank_multiple} needs `allocation`='auto'; without, ranks are what you ask for."
            )
        if self.storage_bits == PLAIN_BITS:
            for name in ("key_group", "value_group"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}`={getattr(self, name)} is of packed latents, and these are stored in 16 bits; drop "
                        "it, or give `bits`."
                    )
            return
        if self.block_size % 8:
            raise ValueError(f"`block_size` must be a multiple of 8 for packed latents, got {self.block_size}.")
        for name in ("key_group", "value_group"):
            group = self.group_of(name.removesuffix("_group"))
            whole = len(group) == 2 and all(isinstance(n, int) and n >= 1 for n in group)
            if not whole or self.block_size % group[0]:
                raise ValueError(
                    f"`{name}` must be [tokens, channels], tokens a divisor of block_size={self.block_size} and "
                    f"channels at least 1, got {group}."
                )

    @property
    def storage_bits(self) -> int | None:
        """`bits` with its default decided: 16, an average, or None where every channel has its own."""
        packed_by_default = self.compression is not None and self.compression >= PACKED_FROM
        if self.bits is not None or packed_by_default or self.key_bits is not None:
            return self.bits
        return PLAIN_BITS

    @property
    def uniform_bits(self) -> int:
        """Of every channel alike: where ranks are given, and as a guess before a fit decides."""
        return self.storage_bits or 4

    @property
    def allocates(self) -> bool:
        """Whether ranks and bits come from one budget over the whole model."""
        if self.allocation is not None:
            return self.allocation == "auto"
        overrides = self.key_rank_per_layer or self.value_rank_per_layer
        return self.compression is not None and self.uses_moments and not overrides

    @property
    def uses_moments(self) -> bool:
        """Whether `init` takes the factors from the moments of the data, rather than from weights or chance."""
        return self.init in ("attention", "mse")

    @property
    def centers(self) -> bool:
        """`center` with its default decided."""
        return self.init == "attention" if self.center is None else self.center

    @property
    def mean_window(self) -> int:
        """Tokens in the window, which holds `window` after a block has left it and fills up to the next."""
        return self.window + self.block_size // 2

    def _check_budget(self) -> None:
        ranks = (self.key_rank, self.value_rank)
        if self.compression is None and ranks == (None, None):
            self.compression = DEFAULT_COMPRESSION
        if self.compression is not None and ranks != (None, None):
            raise ValueError(
                f"`compression`={self.compression} and explicit ranks (`key_rank`={self.key_rank}, "
                f"`value_rank`={self.value_rank}) exclude each other; give one of them."
            )
        if isinstance(self.compression, str) or not 0.0 <= (self.compression or 0.0) < 1.0:
            raise ValueError(
                f"`compression` is the fraction of KV bytes removed from old tokens, in [0, 1), got "
                f"{self.compression!r}."
            )
        if self.compression is None and None in ranks:
            raise ValueError(f"`key_rank` and `value_rank` must be given together, got {ranks[0]} and {ranks[1]}.")
        per_layer = [
            r for ranks in (self.key_rank_per_layer, self.value_rank_per_layer) for r in (ranks or {}).values()
        ]
        for rank in [r for r in ranks if r is not None] + per_layer:
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"Ranks must be integers of at least 1, got {rank!r}.")

    @property
    def is_fitted(self) -> bool:
        """Whether the ranks have been decided, by [`fit`] or by loading a fitted adapter."""
        return self.key_ranks is not None and self.value_ranks is not None

    def byte_budget(self, shape: ModelShape) -> float:
        """Bytes that `compression` leaves for the latents of one token, over all layers; its position is paid for."""
        full = shape.full_bytes_per_token
        return (1.0 - self.compression) * full - (POSITION_BYTES if self.compression > 0 else 0)

    def group_of(self, side: str) -> list[int]:
        """`key_group` or `value_group` with its default decided."""
        group = self.key_group if side == "key" else self.value_group
        return [self.block_size, 4] if group is None else group

    def format_of(self, side: str, bits: Sequence[int], rank: int) -> LatentFormat:
        """How the latents of the ``"key"`` or ``"value"`` side of a layer are stored; no `bits` is plain storage."""
        if not bits:
            return PlainFormat(rank, self.block_size)
        tokens, channels = self.group_of(side)
        return PackedFormat(PackedLayout(tuple(bits), self.block_size, tokens, channels))

    def formats(self, layer_idx: int) -> tuple[LatentFormat, LatentFormat]:
        """How a fitted adapter stores the keys and values of a layer."""
        key_bits = channel_bits(self.key_bits[layer_idx]) if self.key_bits else ()
        value_bits = channel_bits([self.value_bits[layer_idx]]) if self.value_bits else ()
        return (
            self.format_of("key", key_bits, sum(self.key_ranks[layer_idx])),
            self.format_of("value", value_bits, self.value_ranks[layer_idx]),
        )

    def _uniform_rank(self, shape: ModelShape) -> int:
        """The largest rank that keys and values of every layer can have within the budget."""
        bits = self.uniform_bits
        self.check_room(shape, bits)
        room = self.byte_budget(shape) / shape.num_hidden_layers + 1e-9
        return next(rank for rank in range(shape.kv_dim, 0, -1) if self._layer_bytes(bits, rank) <= room)

    def _layer_bytes(self, bits: int, rank: int) -> float:
        """Bytes that keys and values of a layer take per token, at one rank and number of bits."""
        packed = bits_alike(bits, rank)
        return sum(self.format_of(side, packed, rank).bytes_per_token(torch.bfloat16) for side in ("key", "value"))

    def check_room(self, shape: ModelShape, bits: int) -> None:
        """Refuse a `compression` that leaves less than a channel of `bits` bits to the keys and values of a layer.

        Raises:
            ValueError: naming the largest that fits.
        """
        budget, cost = self.byte_budget(shape) / shape.num_hidden_layers, self._layer_bytes(bits, 1)
        if cost > budget + 1e-9:
            raise ValueError(
                f"`compression`={self.compression} leaves {budget:.2f} bytes for keys and values of a layer with "
                f"kv_dim={shape.kv_dim}; one channel of each at {bits} bits takes {cost:.2f}. Use at most "
                f"{self._largest_compression(shape, cost):.3f}{', or fewer `bits`' if bits > BITS[0] else ''}."
            )

    @staticmethod
    def _largest_compression(shape: ModelShape, layer_bytes: float) -> float:
        full = 2 * shape.kv_dim * PLAIN_BYTES
        return math.floor(1000 * (1.0 - (layer_bytes + POSITION_BYTES / shape.num_hidden_layers) / full)) / 1000

    def layer_ranks(self, shape: ModelShape) -> list[tuple[int, int]]:
        """The (key, value) rank of every layer that the explicit ranks, or `compression` spent evenly, ask for.

        Raises:
            ValueError: if a rank is above ``kv_dim``, an override names a layer that is not there, or the budget
                leaves no rank.
        """
        if self.compression is not None:
            key_rank = value_rank = self._uniform_rank(shape)
        else:
            key_rank, value_rank = self.key_rank, self.value_rank
        layers = []
        for name, overrides in (("key", self.key_rank_per_layer), ("value", self.value_rank_per_layer)):
            for layer_idx in overrides or {}:
                if not 0 <= layer_idx < shape.num_hidden_layers:
                    raise ValueError(
                        f"`{name}_rank_per_layer` names layer {layer_idx}; the model has layers 0 to "
                        f"{shape.num_hidden_layers - 1}."
                    )
        for layer_idx in range(shape.num_hidden_layers):
            ranks = (
                (self.key_rank_per_layer or {}).get(layer_idx, key_rank),
                (self.value_rank_per_layer or {}).get(layer_idx, value_rank),
            )
            for name, rank in zip(("key", "value"), ranks):
                if rank > shape.kv_dim:
                    raise ValueError(
                        f"The {name} rank {rank} of layer {layer_idx} is above the model's kv_dim={shape.kv_dim} "
                        f"({shape.num_key_value_heads} KV heads x {shape.head_dim}); use at most {shape.kv_dim}."
                    )
            layers.append(ranks)
        return layers

    def check_model(self, shape: ModelShape) -> None:
        """Refuse a model other than the one the adapter was fitted to.

        Raises:
            ValueError: naming each size that differs.
        """
        if self.model_shape is None:
            return
        mine, other = ModelShape(**self.model_shape), shape
        if mine != other:
            differences = ", ".join(
                f"{name}: adapter {value}, model {getattr(other, name)}"
                for name, value in vars(mine).items()
                if value != getattr(other, name)
            )
            raise ValueError(
                f"This CSKV adapter was fitted to another model ({differences}). Load it on "
                f"{self.base_model_name_or_path or 'the model it was fitted to'}, or fit a new one with `cskv_hf.fit`."
            )

    def bytes_per_token(self, model_config: Any, dtype: torch.dtype = torch.bfloat16) -> float:
        """Bytes that one old token costs, over all layers, its position included.

        Before the fit this is what the ranks or the budget promise at most, after it what the latents take.
        """
        shape = ModelShape.from_model_config(model_config)
        if not self.is_fitted and self.allocates:
            return (
                self.byte_budget(shape) * (dtype.itemsize / PLAIN_BYTES if self.storage_bits == PLAIN_BITS else 1)
                + POSITION_BYTES
            )
        return sum(self._layer_formats_bytes(shape, dtype)) + POSITION_BYTES

    def _layer_formats_bytes(self, shape: ModelShape, dtype: torch.dtype) -> list[float]:
        """Bytes of the latents of one token, per layer."""
        if self.is_fitted:
            formats = [self.formats(layer_idx) for layer_idx in range(shape.num_hidden_layers)]
        else:
            bits = self.uniform_bits
            formats = [
                [self.format_of(side, bits_alike(bits, rank), rank) for side, rank in zip(("key", "value"), ranks)]
                for ranks in self.layer_ranks(shape)
            ]
        return [sum(f.bytes_per_token(dtype) for f in layer) for layer in formats]

    def cache_nbytes(
        self, model_config: Any, num_tokens: int, batch_size: int = 1, dtype: torch.dtype = torch.bfloat16
    ) -> int:
        """Bytes of a [`CSKVCache`] after a prompt of `num_tokens` tokens without padding: sinks, latents, window and
        positions.

        The same as ``CSKVCache.nbytes`` counts on its tensors; after token-by-token generation the window may hold
        up to ``block_size - 1`` tokens more.

        Args:
            model_config: of transformers; or a [`ModelShape`], whose layers are taken to attend to all tokens by
                frequencies that do not change.
        """
        shape = ModelShape.from_model_config(model_config)
        old = self.num_old_tokens(num_tokens)
        held = [
            old - self.num_dropped_tokens(num_tokens, sliding_window(model_config, layer_idx))
            for layer_idx in range(shape.num_hidden_layers)
        ]
        exact = (num_tokens - old) * shape.num_hidden_layers * 2 * shape.kv_dim * dtype.itemsize
        if len(set(held)) == 1:
            latent = held[0] * (self.bytes_per_token(model_config, dtype) - POSITION_BYTES)
        else:
            latent = sum(n * size for n, size in zip(held, self._layer_formats_bytes(shape, dtype)))
        rope_type = (getattr(model_config, "rope_parameters", None) or {}).get("rope_type", "default")
        with_frequencies = num_tokens if rope_type in CHANGING_ROPE_TYPES else 1
        rope = 4 * shape.head_dim // 2 * with_frequencies
        return batch_size * (exact + round(latent) + num_tokens * POSITION_BYTES) + rope

    def num_old_tokens(self, num_tokens: int) -> int:
        """How many of the first `num_tokens` tokens of a sequence are held as latents."""
        return max(0, (num_tokens - self.sinks - self.window) // self.block_size * self.block_size)

    def num_dropped_tokens(self, num_tokens: int, sliding_window: int | None) -> int:
        """How many of those a layer with a sliding window has dropped again: whole blocks that no query to come can
        see, even after `ROLLBACK_TOKENS` tokens are cropped."""
        if sliding_window is None:
            return 0
        unseen = self.num_old_tokens(num_tokens) + self.window + 1 - ROLLBACK_TOKENS - sliding_window
        return min(max(0, unseen) // self.block_size * self.block_size, self.num_old_tokens(num_tokens))


def _layer_index(name: str, layer: Any) -> int:
    try:
        return int(layer)
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` must have indices of layers as keys, got {layer!r}.") from None


ensure_peft_type()

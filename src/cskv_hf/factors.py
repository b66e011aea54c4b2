"""The factors of one attention layer at work: encode keys and values into latents, decode them again.

`LayerFactors` are plain tensors with pure methods, used by the cache and the attention. `CSKVFactors` is the module
that owns them inside a model, one set per adapter: a PEFT layer that sits beside the projections
(``self_attn.cskv``) and wraps none of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import CSKVConfig, num_key_groups
from .decompose import Factors, even_ranks
from .latents import LatentFormat
from .rope import paired

if TYPE_CHECKING:
    from .sharding import HeadShard


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype to multiply in: the tensor's own, but float32 for 16-bit floats on a CPU, where their matmuls are
    very slow."""
    if tensor.device.type == "cpu" and tensor.dtype in (torch.float16, torch.bfloat16):
        return torch.float32
    return tensor.dtype


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Keeps autocast out of arithmetic that chooses its own dtypes."""
    if _has_autocast(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


@torch.compiler.assume_constant_result  # a compiler of PyTorch 2.11 cannot trace it
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


@dataclass(frozen=True)
class LayerFactors:
    """Factors of one layer as tensors, ready to compute with.

    Attributes:
        key_A, key_B: (key_rank, group_dim), (group_dim, key_rank): keys before RoPE, per group of KV heads.
        value_A, value_B: (value_rank, kv_dim), (kv_dim, value_rank).
        key_mean, value_mean: (1, kv_dim), what encoding takes off and decoding puts back.
        key_spectrum: (1, key_rank), a part of the [`Fingerprint`].
        key_ranks: channels per key group.
        key_format, value_format: how their latents are stored.
        num_key_value_heads, head_dim: of the layer.
    """

    key_A: torch.Tensor
    key_B: torch.Tensor
    value_A: torch.Tensor
    value_B: torch.Tensor
    key_mean: torch.Tensor
    value_mean: torch.Tensor
    key_spectrum: torch.Tensor
    key_ranks: tuple[int, ...]
    key_format: LatentFormat
    value_format: LatentFormat
    num_key_value_heads: int
    head_dim: int

    @property
    def heads_per_group(self) -> int:
        return self.num_key_value_heads // len(self.key_ranks)

    @property
    def heads(self) -> tuple[int, int, int]:
        """The first KV head of these factors, how many they are, and how many the layer has in all processes."""
        return 0, self.num_key_value_heads, self.num_key_value_heads

    def encode_keys(self, key_states: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """(batch, num_key_value_heads, tokens, head_dim) before RoPE -> latents (batch, tokens, key_rank).

        The mean is taken off in the dtype of `key_states`, what is left is multiplied in `dtype` (the same by
        default).
        """
        keys = key_states - self._by_head(self.key_mean, key_states.dtype)
        return self._project_keys(keys if dtype is None else keys.to(dtype))

    def encode_values(self, value_states: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """(batch, num_key_value_heads, tokens, head_dim) -> latents (batch, tokens, value_rank); dtypes as in
        [`encode_keys`]."""
        values = value_states - self._by_head(self.value_mean, value_states.dtype)
        return self._project_values(values if dtype is None else values.to(dtype))

    def _project_keys(self, keys: torch.Tensor) -> torch.Tensor:
        return project_keys(keys, self.key_A, self.key_ranks)

    def _project_values(self, values: torch.Tensor) -> torch.Tensor:
        return values.transpose(1, 2).flatten(2) @ self.value_A.to(values.dtype).mT

    def _by_head(self, mean: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return mean.to(dtype).view(self.num_key_value_heads, 1, self.head_dim)

    def decode_key_group(self, latents: torch.Tensor, group: int) -> torch.Tensor:
        """The keys before RoPE of one group: latents of that group alone (batch, tokens, rank of the group) ->
        (batch, heads_per_group, tokens, head_dim)."""
        start, group_dim = sum(self.key_ranks[:group]), len(self.key_B)
        B = self.key_B[:, start : start + self.key_ranks[group]].to(latents.dtype)
        mean = self.key_mean[0, group * group_dim : (group + 1) * group_dim].to(latents.dtype)
        return (latents @ B.mT + mean).unflatten(-1, (self.heads_per_group, self.head_dim)).transpose(1, 2)

    def paired_key_groups(self, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """``key_B`` transposed (rank of the group, group_dim) and mean (group_dim) of every group, for keys whose RoPE
        pairs lie next to each other; see [`paired`]."""
        by_head = (self.heads_per_group, self.head_dim)
        matrices = paired(self.key_B.to(dtype).unflatten(0, by_head), 1).flatten(0, 1).mT.split(self.key_ranks)
        means = paired(self.key_mean.to(dtype).view(-1, *by_head)).flatten(1)
        return list(zip(matrices, means))

    def decode_keys(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (batch, tokens, key_rank) -> keys before RoPE (batch, num_key_value_heads, tokens, head_dim)."""
        parts = latents.split(self.key_ranks, dim=-1)
        return torch.cat([self.decode_key_group(part, g) for g, part in enumerate(parts)], dim=1)

    def decode_values(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (batch, tokens, value_rank) -> values (batch, num_key_value_heads, tokens, head_dim)."""
        values = latents @ self.value_B.to(latents.dtype).mT + self.value_mean.to(latents.dtype)
        return values.unflatten(-1, (self.num_key_value_heads, self.head_dim)).transpose(1, 2)


def project_keys(keys: torch.Tensor, key_A: torch.Tensor, key_ranks: Sequence[int]) -> torch.Tensor:
    """Deviations of keys (batch, num_key_value_heads, tokens, head_dim) times ``key_A`` of their groups -> (batch,
    tokens, key_rank)."""
    groups = keys.transpose(1, 2).unflatten(2, (len(key_ranks), -1)).flatten(3)
    parts = [groups[:, :, g] @ A.mT for g, A in enumerate(key_A.to(keys.dtype).split(key_ranks))]
    return torch.cat(parts, dim=-1)


@dataclass
class Fingerprint:
    """By which a cache knows the factors that filled it, and finds out that they were trained since.

    Attributes:
        values: (n,) float64, norms of the factors and the spectrum of the keys.
        spectrum: the adapter's own, and how often its factors were written to; while these are the same, so are the
            values.
    """

    values: torch.Tensor
    spectrum: torch.Tensor
    writes: tuple[int, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, factors: LayerFactors) -> Fingerprint:
        parts = _written_by_training(factors)
        norms = torch.stack([torch.linalg.vector_norm(t.detach(), dtype=torch.float64) for t in parts])
        values = torch.cat([norms, factors.key_spectrum.detach()[0].to(norms)])
        return cls(values, factors.key_spectrum, _writes(parts))

    def is_of(self, factors: LayerFactors) -> bool:
        """Whether these are the factors, or a copy of them."""
        if self.spectrum is factors.key_spectrum and self.writes == _writes(_written_by_training(factors)):
            return True
        other = Fingerprint.of(factors)
        mine = self.values.to(other.values.device)
        if mine.shape != other.values.shape or not torch.allclose(mine, other.values, rtol=1e-9, atol=0):
            return False  # sums of another device may differ in the last bits
        self.spectrum, self.writes = other.spectrum, other.writes
        return True


def _written_by_training(factors: LayerFactors) -> tuple[torch.Tensor, ...]:
    return factors.key_A, factors.key_B, factors.value_A, factors.value_B, factors.key_mean, factors.value_mean


def _writes(tensors: tuple[torch.Tensor, ...]) -> tuple[int, ...]:
    return tuple(0 if t.is_inference() else t._version for t in tensors)


class Factor(nn.Module):
    """One matrix, handed out by calling the module.

    Going through the call lets whatever hooks leaf modules (accelerate's CPU and disk offload, ZeRO-3) bring the
    weight in first.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))

    def forward(self) -> torch.Tensor:
        return self.weight

    def read(self) -> torch.Tensor:
        """By a call only where somebody hooks in, which takes some microseconds for every matrix and step."""
        hooked = self._forward_pre_hooks or self._forward_hooks or "forward" in self.__dict__
        return self() if hooked else self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


def factor_shapes(key_ranks: Sequence[int], value_rank: int, kv_dim: int) -> dict[str, tuple[int, int]]:
    """The matrices of a layer, as [`CSKVFactors`] names them."""
    key_rank, group_dim = sum(key_ranks), kv_dim // len(key_ranks)
    return {
        "cskv_key_A": (key_rank, group_dim),
        "cskv_key_B": (group_dim, key_rank),
        "cskv_value_A": (value_rank, kv_dim),
        "cskv_value_B": (kv_dim, value_rank),
        "cskv_key_mean": (1, kv_dim),
        "cskv_value_mean": (1, kv_dim),
        "cskv_key_spectrum": (1, key_rank),
        "cskv_value_spectrum": (1, value_rank),
    }


class CSKVFactors(nn.Module, BaseTunerLayer):
    """The sidecar ``self_attn.cskv``: the factors of every CSKV adapter of one attention layer.

    Keys on disk: ``….self_attn.cskv.cskv_key_A.weight`` (key_rank, group_dim), ``cskv_key_B`` (group_dim, key_rank),
    ``cskv_value_A`` (value_rank, kv_dim), ``cskv_value_B`` (kv_dim, value_rank), the means ``cskv_key_mean`` and
    ``cskv_value_mean`` (1, kv_dim), and the spectra ``cskv_key_spectrum`` (1, key_rank) and ``cskv_value_spectrum``
    (1, value_rank), which order the channels when an adapter is cut to a smaller rank.
    """

    adapter_layer_names = (
        "cskv_key_A",
        "cskv_key_B",
        "cskv_value_A",
        "cskv_value_B",
        "cskv_key_mean",
        "cskv_value_mean",
        "cskv_key_spectrum",
        "cskv_value_spectrum",
    )
    other_param_names = ("key_ranks", "formats")
    SPECTRA = ("cskv_key_spectrum", "cskv_value_spectrum")  # in float32: they span more than float16 does
    TRAINED = ("cskv_key_A", "cskv_key_B", "cskv_value_A", "cskv_value_B")

    def __init__(self, layer_idx: int, num_key_value_heads: int, head_dim: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.placement: tuple[torch.device, torch.dtype] | None = None  # of the projections, set by the tuner
        self.shard: HeadShard | None = None  # of a tensor-parallel model, set by the tuner
        self.key_ranks: dict[str, tuple[int, ...]] = {}
        self.formats: dict[str, tuple[LatentFormat, LatentFormat]] = {}  # of keys and values
        self.configs: dict[str, CSKVConfig] = {}
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self._active_adapter = []

    def update_layer(self, adapter_name: str, config: CSKVConfig, key_ranks: Sequence[int], value_rank: int) -> None:
        """Add (or replace) an adapter's factors, uninitialised: loading or [`install`] fills them."""
        self.configs[adapter_name] = config
        self.key_ranks[adapter_name] = tuple(key_ranks)
        if config.is_fitted:
            self.formats[adapter_name] = config.formats(self.layer_idx)
        for name, shape in factor_shapes(key_ranks, value_rank, self.num_key_value_heads * self.head_dim).items():
            getattr(self, name)[adapter_name] = Factor(*shape)
        for (
            name
        ) in self.adapter_layer_names:  # defined values until a fit or a file replaces them; never used to generate
            nn.init.zeros_(getattr(self, name)[adapter_name].weight)
        self.requires_grad_(False)

    def default_key_ranks(self, config: CSKVConfig, key_rank: int) -> tuple[int, ...]:
        return even_ranks(key_rank, num_key_groups(config.key_layout, self.num_key_value_heads))

    @torch.no_grad()
    def install(self, adapter_name: str, keys: Factors, values: Factors, device: Any, dtype: torch.dtype) -> None:
        """Put fitted factors in place of the adapter's own, on `device` and in `dtype`."""
        self.update_layer(adapter_name, self.configs[adapter_name], keys.ranks, values.ranks[0])
        for name, tensor in (
            ("cskv_key_A", keys.A),
            ("cskv_key_B", keys.B),
            ("cskv_value_A", values.A),
            ("cskv_value_B", values.B),
            ("cskv_key_mean", keys.mean[None]),
            ("cskv_value_mean", values.mean[None]),
            ("cskv_key_spectrum", keys.spectrum[None]),
            ("cskv_value_spectrum", values.spectrum[None]),
        ):
            kind = torch.float32 if name in self.SPECTRA else dtype
            weight = tensor.to(device=device, dtype=kind).contiguous().clone()
            getattr(self, name)[adapter_name].weight = nn.Parameter(weight, requires_grad=False)

    @property
    def adapter_in_use(self) -> str | None:
        """The active adapter that this layer holds, or None if there is none or adapters are disabled."""
        if self.disable_adapters:
            return None
        return next((name for name in self.active_adapters if name in self.key_ranks), None)

    def check_filled(self, adapter_name: str) -> None:
        """Refuse factors that no fit and no file has filled.

        Raises:
            RuntimeError: if the adapter's spectra and matrices are all zero, as they are made; the spectra of constant
                keys are, too.
        """
        if not self.cskv_key_spectrum[adapter_name]().any() and not self.cskv_key_A[adapter_name]().any():
            raise RuntimeError(
                f"The factors of the CSKV adapter '{adapter_name}' in layer {self.layer_idx} were never filled: its "
                "file was not read into this layer. Load it with `cskv_hf.load(model, adapter)`, or fit it again."
            )

    def forward(self, adapter_name: str | None = None) -> LayerFactors:
        """The factors of an adapter (the one in use by default) as tensors; of a tensor-parallel model, those of the
        heads here."""
        name = adapter_name or self.adapter_in_use
        whole = LayerFactors(
            key_A=self.cskv_key_A[name].read(),
            key_B=self.cskv_key_B[name].read(),
            value_A=self.cskv_value_A[name].read(),
            value_B=self.cskv_value_B[name].read(),
            key_mean=self.cskv_key_mean[name].read(),
            value_mean=self.cskv_value_mean[name].read(),
            key_spectrum=self.cskv_key_spectrum[name].read(),
            key_ranks=self.key_ranks[name],
            key_format=self.formats[name][0],
            value_format=self.formats[name][1],
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
        )
        return whole if self.shard is None else self.shard.factors(whole)

    # What PEFT's defaults would do wrong for a layer that wraps nothing.

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate the adapters among `adapter_names` that this layer owns; names of other tuners leave it as it
        is."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        owned = [name for name in names if name in self.key_ranks]
        if names and not owned:
            return
        super().set_adapter(owned, inference_mode=inference_mode)
        self._freeze_all_but_factors()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_all_but_factors()

    def _freeze_all_but_factors(self) -> None:
        for name in set(self.adapter_layer_names) - set(self.TRAINED):
            getattr(self, name).requires_grad_(False)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """There is no base layer: go where the projections are, in the model's dtype."""
        if self.placement is None:
            return
        for name in self.adapter_layer_names:
            factor = getattr(self, name)[adapter_name]
            if factor.weight.device.type != "meta":
                dtype = factor.weight.dtype if name in self.SPECTRA else self.placement[1]
                factor.to(device=device or self.placement[0], dtype=dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        self.configs.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Leave the factors where they are when PEFT merges what it can, a LoRA on the model say.

        Raises:
            ValueError: if an adapter of CSKV is named.
        """
        if any(name in self.key_ranks for name in adapter_names or ()):
            raise ValueError(
                "CSKV factors compress the cache and cannot be merged into the weights; use `unload()` to remove them."
            )

    def unmerge(self) -> None:
        return None

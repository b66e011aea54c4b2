"""The module that owns the factors of a layer inside a model, one set per adapter: ``self_attn.cskv``.

A PEFT layer that sits beside the projections and wraps none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import CSKVConfig, num_key_groups
from .decompose import Factors, even_ranks
from .factors import LayerFactors
from .latents import LatentFormat
from .sharding import HeadShard


class Factor(nn.Module):
    """One matrix, handed out by calling the module.

    Going through the call lets whatever hooks leaf modules (accelerate's CPU and disk offload, ZeRO-3) bring the
    weight in first.

    Attributes:
        seen_filled: for [`CSKVFactors.check_filled`].
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=dtype))
        self.seen_filled = False

    def forward(self) -> torch.Tensor:
        return self.weight

    def read(self) -> torch.Tensor:
        """By a call only where somebody hooks in, which takes some microseconds for every matrix and step."""
        hooked = self._forward_pre_hooks or self._forward_hooks or "forward" in self.__dict__
        return self() if hooked else self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


class Energies(Factor):
    """One row of energies, in float32 whatever the model is cast to: float16 spans too little."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(rows, columns, torch.float32)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Energies:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


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
        "cskv_value_rounding": (1, value_rank),
    }


class CSKVFactors(nn.Module, BaseTunerLayer):
    """The sidecar ``self_attn.cskv``: the factors of every CSKV adapter of one attention layer.

    Keys on disk: ``….self_attn.cskv.cskv_key_A.weight`` (key_rank, group_dim), ``cskv_key_B`` (group_dim, key_rank),
    ``cskv_value_A`` (value_rank, kv_dim), ``cskv_value_B`` (kv_dim, value_rank), the means ``cskv_key_mean`` and
    ``cskv_value_mean`` (1, kv_dim), and what a cut to a smaller budget goes by, the spectra ``cskv_key_spectrum`` (1,
    key_rank) and ``cskv_value_spectrum`` (1, value_rank), and ``cskv_value_rounding`` (1, value_rank); see
    [`Factors`].
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
        "cskv_value_rounding",
    )
    other_param_names = ("key_ranks", "formats")
    ENERGIES = ("cskv_key_spectrum", "cskv_value_spectrum", "cskv_value_rounding")
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
            getattr(self, name)[adapter_name] = (Energies if name in self.ENERGIES else Factor)(*shape)
        # defined values until a fit or a file replaces them; never used to generate
        for name in self.adapter_layer_names:
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
            ("cskv_value_rounding", values.rounding[None]),
        ):
            kind = torch.float32 if name in self.ENERGIES else dtype
            weight = tensor.to(device=device, dtype=kind).contiguous().clone()
            getattr(self, name)[adapter_name].weight = nn.Parameter(weight, requires_grad=False)

    @property
    def adapter_in_use(self) -> str | None:
        """The active adapter that this layer holds, or None if there is none or adapters are disabled."""
        if self.disable_adapters:
            return None
        return next((name for name in self.active_adapters if name in self.key_ranks), None)

    def check_filled(self, adapter_name: str) -> None:
        """Refuse factors that no fit and no file has filled. Once they are, nobody looks again: on a GPU every look
        would wait for all that is under way.

        Raises:
            RuntimeError: if the adapter's spectra and matrices are all zero, as they are made; the spectra of constant
                keys are, too.
        """
        spectrum = self.cskv_key_spectrum[adapter_name]
        if spectrum.seen_filled:
            return
        spectrum.seen_filled = bool(spectrum().any()) or bool(self.cskv_key_A[adapter_name]().any())
        if not spectrum.seen_filled:
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
                factor.to(device=device or self.placement[0], dtype=self.placement[1])

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

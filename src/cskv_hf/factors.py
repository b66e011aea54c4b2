"""The factors of one attention layer at work, as plain tensors: keys and values into latents, and back again.

Used by the cache and the attention; the module that owns them is in sidecar.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .latents import LatentFormat
from .rope import paired


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
        return self.project_keys(keys if dtype is None else keys.to(dtype))

    def encode_values(self, value_states: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """(batch, num_key_value_heads, tokens, head_dim) -> latents (batch, tokens, value_rank); dtypes as in
        [`encode_keys`]."""
        values = value_states - self._by_head(self.value_mean, value_states.dtype)
        return self.project_values(values if dtype is None else values.to(dtype))

    def project_keys(self, keys: torch.Tensor) -> torch.Tensor:
        """[`encode_keys`] of deviations from the mean, in their dtype."""
        return project_keys(keys, self.key_A, self.key_ranks)

    def project_values(self, values: torch.Tensor) -> torch.Tensor:
        """[`encode_values`] of deviations from the mean, in their dtype."""
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
    """Identifies the factors that filled a cache, so that others, and the same trained since, are noticed.

    Attributes:
        values: (n,) float64, norms of the factors and the spectrum of the keys.
        spectrum: the adapter's own, and how often its factors were written to; while these are the same, so are the
            values.
    """

    values: torch.Tensor
    spectrum: torch.Tensor
    writes: tuple[tuple[torch.dtype, int], ...]

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


def _writes(tensors: tuple[torch.Tensor, ...]) -> tuple[tuple[torch.dtype, int], ...]:
    """Dtypes too: a model that is cast keeps its tensors and counts no write."""
    return tuple((t.dtype, 0 if t.is_inference() else t._version) for t in tensors)

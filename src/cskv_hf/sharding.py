"""Which KV heads a process of a tensor-parallel model holds, and its part of a layer's factors.

Keys and values are encoded where their heads are, as far as they go: what a process has of a latent is a sum over its
own heads, and the processes add theirs up, once per block of tokens that leaves the window. Afterwards every process
has what its own heads attend to, and nothing more is sent: all value latents, which are joint over the heads, and of
the key latents those of its heads' groups.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from .factors import LayerFactors, project_keys
from .latents import LatentFormat, PlainFormat

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class KeyCut:
    """What a process keeps of a layer's key latents.

    Packed latents are cut between groups of channels that share a range, so that every code stays as it is in one
    process: a few channels of other heads come along, which nothing here uses.

    Attributes:
        groups: first and last (exclusive) of the key groups that its heads belong to.
        channels: first and last (exclusive) of their channels.
        rows: first and last (exclusive) of its heads within a key group.
        stored: the channels kept.
        ranks: how many of them belong to each of its own groups of heads.
        format: how they are stored.
    """

    groups: tuple[int, int]
    channels: tuple[int, int]
    rows: tuple[int, int]
    stored: tuple[int, ...]
    ranks: tuple[int, ...]
    format: LatentFormat

    @property
    def used(self) -> list[bool]:
        """Of each channel kept, whether it is of a head here."""
        return [self.channels[0] <= c < self.channels[1] for c in self.stored]


@functools.cache
def cut_keys(format: LatentFormat, key_ranks: tuple[int, ...], first: int, count: int, total: int) -> KeyCut:
    """What the process of KV heads `first` to ``first + count`` of `total` keeps of latents in this format.

    Its heads are whole key groups, or within one; see [`HeadShard.check_groups`].
    """
    size = total // len(key_ranks)
    groups = first // size, -(-(first + count) // size)
    starts = [0, *accumulate(key_ranks)]
    channels = start, stop = starts[groups[0]], starts[groups[1]]
    stored = _whole_ranges(format, range(start, stop) or range(1))  # a layer of no channels could not be stored
    ranks = list(key_ranks[slice(*groups)])
    ranks[0] += sum(c < start for c in stored)
    ranks[-1] += sum(c >= stop for c in stored)
    rows = (0, size) if count % size == 0 else (first % size, first % size + count)
    return KeyCut(groups, channels, rows, stored, tuple(ranks), _cut_format(format, stored))


def _whole_ranges(format: LatentFormat, channels: range) -> tuple[int, ...]:
    """The channels, and those that share a range with one of them."""
    if isinstance(format, PlainFormat):
        return tuple(channels)
    size, kept = format.layout.group_channels, []
    for tier in format.layout.tiers:
        for i in range(0, len(tier.channels), size):
            group = tier.channels[i : i + size]
            kept.extend(group if any(c in channels for c in group) else ())
    return tuple(sorted(kept))


def _cut_format(format: LatentFormat, stored: tuple[int, ...]) -> LatentFormat:
    if isinstance(format, PlainFormat):
        return dataclasses.replace(format, rank=len(stored))
    bits = tuple(format.layout.bits[c] for c in stored)
    return dataclasses.replace(format, layout=dataclasses.replace(format.layout, bits=bits))


@functools.cache
def _columns(cut: KeyCut, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The channels kept, as an index, and which are used; None if all."""
    used = None if all(cut.used) else torch.tensor(cut.used, device=device)
    return torch.tensor(cut.stored, device=device), used


@dataclass(frozen=True)
class ShardedFactors(LayerFactors):
    """A process's part of a layer's factors: of its own KV heads, and of the latents that it stores.

    Encoding is collective: every process of the mesh does it at the same time.

    Attributes:
        whole: the layer's.
        shard: which heads these are.
        cut: which key latents.
    """

    whole: LayerFactors
    shard: HeadShard
    cut: KeyCut

    @property
    def heads(self) -> tuple[int, int, int]:
        return self.shard.first, self.shard.count, self.shard.total

    def project_keys(self, keys: torch.Tensor) -> torch.Tensor:
        whole, (first, last), (start, stop) = self.whole, self.cut.groups, self.cut.channels
        before = self.shard.first - first * whole.heads_per_group
        after = (last - first) * whole.heads_per_group - self.shard.count - before
        groups = nn.functional.pad(keys, (0, 0, 0, 0, before, after))  # heads elsewhere add nothing
        latents = keys.new_zeros(keys.shape[0], keys.shape[2], whole.key_format.rank)
        latents[..., start:stop] = project_keys(groups, whole.key_A[start:stop], whole.key_ranks[first:last])
        return self.shard.sum(latents).index_select(-1, _columns(self.cut, keys.device)[0])

    def project_values(self, values: torch.Tensor) -> torch.Tensor:
        return self.shard.sum(super().project_values(values))


@dataclass(frozen=True)
class HeadShard:
    """The KV heads of a layer that a process holds.

    Attributes:
        first, count: the first one, and how many.
        total: of the layer.
        mesh: the processes that share them, one-dimensional.
    """

    first: int
    count: int
    total: int
    mesh: Any

    def factors(self, whole: LayerFactors) -> ShardedFactors:
        """This process's part of a layer's factors: views, but for key latents in few bits."""
        cut = cut_keys(whole.key_format, whole.key_ranks, self.first, self.count, self.total)
        first_row, last_row = (head * whole.head_dim for head in cut.rows)
        key_B = whole.key_B[first_row:last_row]
        index, used = _columns(cut, key_B.device)
        if used is None:
            key_B = key_B[:, slice(*cut.channels)]
        else:
            key_B = key_B.index_select(1, index) * used
        columns = slice(self.first * whole.head_dim, (self.first + self.count) * whole.head_dim)
        return ShardedFactors(
            key_A=whole.key_A,
            key_B=key_B,
            value_A=whole.value_A[:, columns],
            value_B=whole.value_B[columns],
            key_mean=whole.key_mean[:, columns],
            value_mean=whole.value_mean[:, columns],
            key_spectrum=whole.key_spectrum,
            key_ranks=cut.ranks,
            key_format=cut.format,
            value_format=whole.value_format,
            num_key_value_heads=self.count,
            head_dim=whole.head_dim,
            whole=whole,
            shard=self,
            cut=cut,
        )

    def check_groups(self, num_groups: int) -> None:
        """Refuse key groups that begin or end among the heads of a process.

        Raises:
            ValueError: as described.
        """
        size = self.total // num_groups
        if self.count % size and size % self.count:
            raise ValueError(
                f"This adapter's `key_layout` joins {size} KV heads, and tensor parallelism leaves {self.count} to a "
                "process: one must divide the other. Fit with `key_layout='head'`, or use another number of processes."
            )

    def sum(self, latents: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place; carries no gradient."""
        latents = latents.detach().contiguous()
        torch.distributed.all_reduce(latents, group=self.mesh.get_group())
        return latents


def head_shard(model: nn.Module, attention_name: str, num_key_value_heads: int) -> HeadShard | None:
    """Which KV heads of an attention layer this process holds; None if all, as without tensor parallelism.

    Args:
        model: a transformers model, loaded with `tp_plan` or not.
        attention_name: of the layer within `model`, as ``model.layers.0.self_attn``.
        num_key_value_heads: of the layer in all.

    Raises:
        ValueError: if the heads cannot be divided, or the plan divides some of queries, keys and values only.
    """
    size = getattr(model, "_tp_size", None) or 1
    if size == 1:
        return None
    plan, wildcard = model.tp_plan or {}, ".".join("*" if p.isdigit() else p for p in attention_name.split("."))
    styles = {p: plan.get(f"{attention_name}.{p}", plan.get(f"{wildcard}.{p}")) for p in PROJECTIONS}
    divided = [style == "colwise" for style in styles.values()]
    if not any(divided):
        return None
    if not all(divided):
        raise ValueError(
            f"CSKV needs `tp_plan` to divide the heads of queries, keys and values alike ('colwise'), or none of "
            f"them; for {attention_name} it says {styles}."
        )
    if num_key_value_heads % size:
        raise ValueError(
            f"Tensor parallelism cannot divide the {num_key_value_heads} KV heads of this model over {size} "
            f"processes. Use a number of processes that divides {num_key_value_heads}, or load the model with "
            "`device_map` instead of `tp_plan`."
        )
    mesh = model._device_mesh["tp"] if model._device_mesh.ndim > 1 else model._device_mesh
    count = num_key_value_heads // size
    return HeadShard(mesh.get_local_rank() * count, count, num_key_value_heads, mesh)

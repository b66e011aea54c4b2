"""Attention over a compressed past by kernels: on a GPU in Triton, on a CPU in C++ once the user has compiled it. The
torch code in attention.py is their oracle and their fallback."""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING, Literal

import torch
from packaging.version import Version
from transformers.utils import logging

from ..latents import PackedFormat

if TYPE_CHECKING:
    from ..factors import LayerFactors

logger = logging.get_logger(__name__)

HAS_TRITON = importlib.util.find_spec("triton") is not None
OLDEST_TRITON = (3, 6)  # that they are known to compile with
HEAD_DIMS = (32, 64, 128, 256)
CPU_QUERIES = 8  # of a row; more are quicker as torch's own matrix products
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def choose(query: torch.Tensor, *others: torch.Tensor) -> Literal["gpu", "cpu"] | None:
    """The kernels that take this query, or None: if there are none, if somebody asks for gradients of it or of the
    `others` that go into attention, or, on a CPU, if a compiler traces it. Where a GPU has to do without them, one
    warning says why."""
    compiling = torch.compiler.is_compiling()
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, *others)):
        return None
    if query.device.type == "cpu":
        served = query.shape[2] <= CPU_QUERIES and query.dtype in DTYPES
        return "cpu" if served and not compiling and _on_cpu() else None
    if not query.is_cuda:
        return None
    problem = why_not(query)
    if problem and not compiling:
        logger.warning_once(
            f"Attention over a compressed cache runs without CSKV's Triton kernels, and slower: {problem}."
        )
    return None if problem else "gpu"


def _on_cpu() -> bool:
    from .cpu import load

    return load()


@functools.cache
def _triton_version() -> tuple[int, ...]:
    import triton  # whose distribution has other names, too

    return Version(triton.__version__).release[:2]


def why_not(query: torch.Tensor) -> str | None:
    """Why the kernels cannot serve `query`, or None if they can."""
    if not HAS_TRITON:
        return "Triton is not installed (`pip install cskv-hf[kernels]`)"
    if _triton_version() < OLDEST_TRITON:
        found, oldest = (".".join(map(str, version)) for version in (_triton_version(), OLDEST_TRITON))
        return f"they need Triton {oldest} or newer, this is {found}"
    if query.shape[-1] not in HEAD_DIMS:
        return f"they need a head_dim of {', '.join(map(str, HEAD_DIMS))}, this model has {query.shape[-1]}"
    if query.dtype not in DTYPES:
        return f"they compute in 16 or 32 bits, this model in {query.dtype}"
    return None


def prepare(factors: LayerFactors, device: torch.device, dtype: torch.dtype) -> None:
    """Make what the kernels of a GPU keep of a layer, before a CUDA graph is recorded, which would take it for its
    own."""
    if device.type == "cuda" and HAS_TRITON:
        from .gpu import prepare_tables

        prepare_tables(factors, device, dtype)


@functools.cache
def chunks_of(
    format, ranks: tuple[int, ...], size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The channels of latents in pieces that a kernel loads in one go: neighbours, of one group and one tier.

    Args:
        ranks: channels per group.
        size: channels of a piece, at most.

    Returns:
        int32 (pieces, 8) of first channel, channels, bits (16: plain), byte of the tier in a block, channels of the
        tier, first channel within the tier, range of the tier in a block, groups of the tier; int32 (groups + 1,) of
        where each group's pieces start; and the number of pieces.
    """
    if isinstance(format, PackedFormat):
        runs = _runs_of_tiers(format.layout)
    else:
        runs = [(0, format.rank, 16, 0, 0, 0, 0, 0)]
    pieces, starts, begin = [], [0], 0
    for rank in ranks:
        end = begin + rank
        for first, count, bits, byte, width, inside, range_first, groups in runs:
            low, high = max(first, begin), min(first + count, end)
            for at in range(low, high, size):
                offset = inside + at - first
                pieces.append((at, min(size, high - at), bits, byte, width, offset, range_first, groups))
        starts.append(len(pieces))
        begin = end
    table = torch.tensor(pieces, dtype=torch.int32, device=device).view(-1, 8)
    return table, torch.tensor(starts, dtype=torch.int32, device=device), len(pieces)


def _runs_of_tiers(layout) -> list[tuple[int, ...]]:
    """Per tier and run of consecutive channels, what [`chunks_of`] tells about a piece."""
    runs, byte, first_range = [], 0, 0
    for tier in layout.tiers:
        width = len(tier.channels)
        starts = [i for i, c in enumerate(tier.channels) if i == 0 or c != tier.channels[i - 1] + 1]
        for start, stop in zip(starts, [*starts[1:], width]):
            runs.append(
                (tier.channels[start], stop - start, tier.bits, byte, width, start, first_range, tier.num_groups)
            )
        byte += width * layout.block_size * tier.bits // 8
        first_range += tier.num_groups * (layout.block_size // layout.group_tokens)
    return runs

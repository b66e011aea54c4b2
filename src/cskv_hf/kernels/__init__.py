"""Attention over a compressed past, and encoding and packing it, by kernels: on a GPU in Triton, on a CPU in C++ once
the user has compiled it. The torch code in attention.py, cache_layer.py and quantize.py is their oracle and fallback.

This file chooses. On a GPU ``gpu.py`` launches attention, with what ``gpu_plans.py`` decides and ``gpu_kept.py`` keeps
of a layer, and arguments as ``gpu_arguments.py`` makes them: kernels in ``triton_kernels.py``, which read latents by
``triton_latents.py`` in pieces of channels (``pieces.py``), told by ``tiles.py`` what is seen; on Hopper GPUs scores
and sums of values are those of ``hopper.py``. ``triton_center.py`` (of a prompt), ``triton_encode.py`` (of a step) and
``triton_quantize.py`` make latents. On a CPU ``cpu.py`` compiles and calls ``cpp/``.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from packaging.version import Version
from transformers.utils import logging

if TYPE_CHECKING:
    from ..factors import LayerFactors
    from ..quantize import PackedLayout

logger = logging.get_logger(__name__)

HAS_TRITON = importlib.util.find_spec("triton") is not None
OLDEST_TRITON = (3, 6)  # that they are known to compile with
HEAD_DIMS = (32, 64, 128, 256)
CPU_QUERIES = 32  # of a row; more are as quick as torch's own matrix products
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def choose(query: torch.Tensor, *others: torch.Tensor) -> Literal["gpu", "cpu"] | None:
    """The kernels that take this query, or None: if there are none, if gradients are required of it or of the
    `others` that go into attention, or, on a CPU, if a compiler traces it. Where a GPU has to do without them, one
    warning says why."""
    compiling = torch.compiler.is_compiling()
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, *others)):
        return None
    if query.device.type == "cpu":
        served = query.shape[2] <= CPU_QUERIES and all(t.dtype in DTYPES for t in (query, *others))
        return "cpu" if served and not compiling and _on_cpu() else None
    if not query.is_cuda:
        return None
    problem = why_not(query)
    if problem and not compiling:
        logger.warning_once(
            f"Attention over a compressed cache runs without CSKV's Triton kernels, and slower: {problem}."
        )
    return None if problem else "gpu"


def quantizer(latents: torch.Tensor, layout: PackedLayout) -> Callable | None:
    """The kernels' own `quantize` for these latents, or None: if there are no kernels, if gradients are required,
    or, on a CPU, if a compiler traces it, which makes short work of torch's operations itself."""
    if latents.dtype != torch.float32 or (torch.is_grad_enabled() and latents.requires_grad):
        return None
    if latents.device.type == "cpu":
        return _quantizer_on_cpu() if not torch.compiler.is_compiling() and _on_cpu() else None
    if latents.is_cuda and HAS_TRITON and not _triton_is_old():
        return _quantizer_on_gpu(layout)
    return None


def encoder(key_states: torch.Tensor, value_states: torch.Tensor, factors: LayerFactors) -> Callable | None:
    """What encodes the block that is due of a decoding step of fixed shape on a GPU, see triton_encode.py; or None: if
    there are no kernels for such keys or latents, or if gradients are required."""
    if not _can_encode(key_states, value_states, factors):
        return None
    from .triton_encode import encode_due, serves_factors

    return encode_due if serves_factors(factors) else None


def centering(key_states: torch.Tensor, value_states: torch.Tensor, factors: LayerFactors) -> Callable | None:
    """What prepares many tokens on a GPU for the products that encode them, see triton_center.py; or None: if there
    are no kernels for such states, if a compiler traces it, which makes short work of torch's operations itself, or if
    gradients are required."""
    if torch.compiler.is_compiling() or not _can_encode(key_states, value_states, factors):
        return None
    from .triton_center import center

    return center


def _can_encode(key_states: torch.Tensor, value_states: torch.Tensor, factors: LayerFactors) -> bool:
    of_layer = factors.key_A, factors.value_A, factors.key_mean, factors.value_mean
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (key_states, value_states, *of_layer))
    return key_states.is_cuda and not wanted and why_not(key_states) is None


def _quantizer_on_cpu() -> Callable:
    from .cpu import quantize

    return quantize


def _quantizer_on_gpu(layout: PackedLayout) -> Callable | None:
    from .triton_quantize import quantize, quantize_as_operation, serves

    if not serves(layout):
        return None
    return quantize_as_operation if torch.compiler.is_compiling() else quantize


def _on_cpu() -> bool:
    from .cpu import load

    return load()


@torch.compiler.assume_constant_result  # a compiler of PyTorch 2.11 cannot compare versions
def _triton_is_old() -> bool:
    return _triton_version() < OLDEST_TRITON


@functools.cache
def _triton_version() -> tuple[int, ...]:
    import triton  # whose distribution has other names, too

    return Version(triton.__version__).release[:2]


def why_not(query: torch.Tensor) -> str | None:
    """Why the kernels cannot serve `query`, or None if they can."""
    if not HAS_TRITON:
        return "Triton is not installed (`pip install 'cskv-hf[kernels]'`)"
    if _triton_is_old():
        found, oldest = (".".join(map(str, version)) for version in (_triton_version(), OLDEST_TRITON))
        return f"they need Triton {oldest} or newer, this is {found}"
    if query.shape[-1] not in HEAD_DIMS:
        return f"they need a head_dim of {', '.join(map(str, HEAD_DIMS))}, this model has {query.shape[-1]}"
    if query.dtype not in DTYPES:
        return f"they compute in 16 or 32 bits, this model in {query.dtype}"
    return None


def prepare(factors: LayerFactors, key_states: torch.Tensor) -> None:
    """Make what the kernels of a GPU keep of a layer, before a CUDA graph is recorded, which would take it for its
    own; nothing where they do not serve `key_states`."""
    device, dtype = key_states.device, key_states.dtype
    if device.type == "cuda" and why_not(key_states) is None:
        from . import gpu, triton_encode

        gpu.prepare(factors, device, dtype)
        triton_encode.prepare_tables(factors, device)

"""What a device can do, in a few numbers measured on it in about a second; cost.py predicts from them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .attention import CPU_TILE
from .factors import compute_dtype
from .kernels import cpu
from .model_shape import ModelShape

SHORT, LONG = 1024, 8192  # tokens at which a device's full caches are measured, of 8 KV heads x 128


@dataclass(frozen=True)
class Device:
    """A device in a few numbers, all per second except the last.

    Attributes:
        kind: "cpu" or "cuda".
        dtype: of the model; 16-bit floats on a CPU are computed in float32.
        matmul: floating-point operations of a matrix product of a tile's size, a multiply-add being two.
        elements: float32 elements of a tile passed over once.
        read: bytes of a large tensor that are read.
        copied: bytes read and written when DynamicCache grows by `torch.cat`, at `SHORT` and at `LONG` tokens.
        attended: bytes that SDPA goes through for one query, each query head counted, at the same lengths.
        operation: seconds of an operation on next to nothing.
        kernels: whether attention runs in kernels of ours: on a GPU, and on a CPU where they are compiled.
    """

    kind: str
    dtype: torch.dtype
    matmul: float
    elements: float
    read: float
    copied: tuple[float, float]
    attended: tuple[float, float]
    operation: float
    kernels: bool


@torch.no_grad()
def measure_device(
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    clock: Callable[[], float] = time.perf_counter,
    rounds: int = 5,
) -> Device:
    """Measure a device, with torch's current number of threads; medians, about a second.

    Args:
        device: of type cpu or cuda.
        dtype: of the model; default float32 on a CPU, bfloat16 on a GPU.
        clock: seconds; on a CPU with one thread `time.thread_time` leaves out what others do meanwhile.

    Raises:
        ValueError: for another device, or one that is not there.
    """
    place = _place(device)
    dtype = dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)

    def median(run: Callable[[], object], rounds: int = rounds) -> float:
        times = []
        for _turn in range(rounds + 1):  # the first is not timed
            _synchronize(place)
            started = clock()
            run()
            _synchronize(place)
            times.append(clock() - started)
        return statistics.median(times[1:])

    many = 4096 if place.type == "cuda" else 1024  # rows: enough to fill a GPU
    probe = torch.randn(many, many, device=place, dtype=dtype)
    left = probe.to(compute_dtype(probe))[:, : many // 4].contiguous()
    product = left @ left.mT  # into memory that is there; and more often, since it is short
    matmul = 2 * many * many * left.shape[1] / median(lambda: torch.mm(left, left.mT, out=product), 5 * rounds)
    if place.type == "cuda":  # elements are worked on in registers there: a multiply-add of the cores without tensors
        wide = left.float()
        elements = many * many * left.shape[1] / median(lambda: wide @ wide.mT)
    else:
        pairs = torch.randn(CPU_TILE // 128, 64, 2, device=place)
        turn = torch.polar(torch.ones_like(pairs[..., 0]), pairs[..., 0])
        states = torch.view_as_complex(pairs)
        elements = CPU_TILE / median(lambda: states.mul_(turn), 5 * rounds)
    large = torch.ones(2**24 if place.type == "cpu" else 2**28, device=place)
    read = large.nbytes / median(large.sum)
    small = torch.ones(64, device=place)
    operation = median(lambda: [small.mul_(1.0) for _ in range(500)]) / 500
    # a process that has freed a larger tensor, as after a prompt, keeps the memory of smaller ones for the next
    del large
    torch.empty(30 * 2**20, dtype=torch.uint8, device=place)
    copied, attended = zip(*(_full_rates(place, dtype, length, median) for length in (SHORT, LONG)))
    kernels = place.type == "cuda" or cpu.load()
    return Device(place.type, dtype, matmul, elements, read, copied, attended, operation, kernels)


def _full_rates(place: torch.device, dtype: torch.dtype, length: int, median: Callable) -> tuple[float, float]:
    """Bytes a second of DynamicCache's copy and of SDPA, of 8 KV heads x 128 and 32 query heads.

    The copy is what a step with it takes longer than SDPA alone: new keys and values may lie closer to the processor
    than old ones. Two layers take turns, so that memory is let go and taken again as in a model.
    """
    query = torch.randn(1, 32, 1, 128, device=place, dtype=dtype)
    new = torch.randn(1, 8, 1, 128, device=place, dtype=dtype)
    layers = [[torch.randn(1, 8, length, 128, device=place, dtype=dtype) for _ in range(2)] for _ in range(2)]

    def attend() -> None:
        for keys, values in layers:
            F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    def grow() -> None:
        for held in layers:
            held[:] = [torch.cat([states, new], dim=2) for states in held]
        attend()

    copied, attended = (2 * n for n in full_bytes(ModelShape("", 1, 8, 128), 32, length, 1, dtype.itemsize))
    ready = median(attend)
    return copied / max(median(grow) - ready, 0.1 * ready), attended / ready


def _place(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"`device` must be 'cpu' or 'cuda', got '{device}'.") from error
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"`device` must be 'cpu' or 'cuda', got '{device}'.")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"`device`='{device}': torch finds no CUDA device here; use 'cpu', or run it on the GPU.")
    return place


def _synchronize(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)


def full_bytes(
    shape: ModelShape, num_attention_heads: int, context: int, batch: int, itemsize: int
) -> tuple[int, int]:
    """Bytes that the `torch.cat` of DynamicCache reads and writes, and those SDPA goes through, for all
    query heads."""
    held = 2 * batch * context * shape.head_dim * itemsize
    return 2 * held * shape.num_key_value_heads, held * num_attention_heads


def between(rates: tuple[float, float], size: float) -> float:
    """A rate between those at `SHORT` and at `LONG` tokens of 128 channels, on a line over logarithms: caches
    give way to memory."""
    share = math.log(size / (SHORT * 128)) / math.log(LONG / SHORT) if size > 0 else 0.0
    return rates[0] * (rates[1] / rates[0]) ** min(1.0, max(0.0, share))

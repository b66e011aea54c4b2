"""Small numbers for launches. Triton's own `cdiv` and `next_power_of_2` are made for kernels, and slow on the host."""

from __future__ import annotations

import torch


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest that is not below `n`."""
    return 1 << (n - 1).bit_length()


def row_stride(tensor: torch.Tensor | None) -> int:
    """From row to row of the batch; 0 where all rows are alike, or there is nothing."""
    return 0 if tensor is None or len(tensor) == 1 else tensor.stride(0)

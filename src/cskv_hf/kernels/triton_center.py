"""Keys and values as they are projected, on a GPU: turned back, their mean taken off, the heads of a token side by
side; in one pass what torch's operations do in a dozen, bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .sizes import cdiv, row_stride

TOKENS = 32  # of a program


def center(
    states: torch.Tensor, mean: torch.Tensor, back: Sequence[torch.Tensor] | None, dtype: torch.dtype
) -> torch.Tensor:
    """Deviations from the mean, computed in float32.

    Args:
        states: (batch, num_key_value_heads, tokens, head_dim), keys after RoPE or values.
        mean: (1, kv_dim), of keys before RoPE or of values.
        back: cos and sin that turn keys back, (batch or 1, tokens, head_dim / 2) float32; None for values.
        dtype: to round them to.

    Returns:
        The shape of `states`; the heads of a token are neighbours in memory.
    """
    batch, heads, tokens, head_dim = states.shape
    states = states if states.stride(3) == 1 else states.contiguous()
    out = states.new_empty(batch, tokens, heads, head_dim, dtype=dtype)
    cos, sin = (states, states) if back is None else (t.contiguous() for t in back)  # never read, or read
    with torch.cuda.device(states.device) if states.is_cuda else contextlib.nullcontext():  # where Triton launches
        center_kernel[cdiv(tokens, TOKENS), heads, batch](
            states, mean, cos, sin, out, tokens, *states.stride()[:3], row_stride(None if back is None else cos),
            TURNED=back is not None, HEADS=heads, HEAD_DIM=head_dim, TOKENS=TOKENS, enable_fp_fusion=False,
        )  # fmt: skip
    return out.transpose(1, 2)


@triton.jit(do_not_specialize=("num_tokens",))
def center_kernel(
    states, mean, cos, sin, out, num_tokens, stride_batch, stride_head, stride_token, turn_stride,
    TURNED: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Some tokens of one head.

    Args:
        stride_batch, stride_head, stride_token: of `states`.
        turn_stride: from the cos and sin of a row to the next; 0 if all rows share them.
        TURNED: whether `states` are keys after RoPE.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token, pair = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, HALF)
    there = (token < num_tokens)[:, None]
    at = states + batch * stride_batch + head * stride_head + token[:, None] * stride_token + pair[None, :]
    low = tl.load(at, mask=there, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=there, other=0.0).to(tl.float32)
    if TURNED:
        turn_at = batch * turn_stride + token[:, None] * HALF + pair[None, :]
        cos_back = tl.load(cos + turn_at, mask=there, other=0.0)
        sin_back = tl.load(sin + turn_at, mask=there, other=0.0)
        low, high = low * cos_back - high * sin_back, high * cos_back + low * sin_back
    mean_at = mean + head * HEAD_DIM + pair
    low -= tl.load(mean_at).to(tl.float32)[None, :]
    high -= tl.load(mean_at + HALF).to(tl.float32)[None, :]
    out_at = out + ((batch * num_tokens + token)[:, None] * HEADS + head) * HEAD_DIM + pair[None, :]
    tl.store(out_at, low.to(out.dtype.element_ty), mask=there)
    tl.store(out_at + HALF, high.to(out.dtype.element_ty), mask=there)

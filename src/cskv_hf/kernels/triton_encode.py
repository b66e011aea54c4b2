"""Encoding the block of each row that is due, on a GPU: `encode` of cache_layer.py for a decoding step of fixed shape.

No host may ask whether a block is due, so torch's operations encode one at every step, due or not, some twenty short
ones per layer. These kernels read on the device where each row's block goes, and end at once where none is due, as in
31 of 32 steps. Latents that are to be packed are written as numbers first, for the kernels of triton_quantize.py.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..factors import LayerFactors
from ..latents import Latents, PackedFormat
from .gpu_arguments import description, format_of
from .sizes import power_of_2
from .triton_quantize import quantize_into, serves, tables_of

CHANNELS = 16  # of a program
FEWEST_TOKENS = 16  # of a product


def serves_factors(factors: LayerFactors) -> bool:
    """Whether latents of such a layer are made here: of all its heads, and packed, if at all, as the kernels can."""
    formats = factors.key_format, factors.value_format
    has_all_heads = factors.num_key_value_heads == factors.heads[2]
    return has_all_heads and all(serves(f.layout) for f in formats if isinstance(f, PackedFormat))


def prepare_tables(factors: LayerFactors, device: torch.device) -> None:
    """What the kernels keep of a layer."""
    for format, ranks in (
        (factors.key_format, factors.key_ranks),
        (factors.value_format, (factors.value_format.rank,)),
    ):
        channel_tiles(tuple(ranks), device)
        if isinstance(format, PackedFormat):
            tables_of(format.layout, device)


def encode_due(
    key_states: torch.Tensor,
    value_states: torch.Tensor,
    places: torch.Tensor,
    back: Sequence[torch.Tensor],
    target: torch.Tensor,
    factors: LayerFactors,
    key_latents: Latents,
    value_latents: Latents,
) -> None:
    """Encode and store the block of every row that has one due.

    Args:
        key_states, value_states: (batch, num_key_value_heads, places, head_dim), keys after RoPE.
        places: (batch, block_size) int64, where the tokens of the block are.
        back: cos and sin that turn their keys back, (batch or 1, block_size, head_dim / 2) float32.
        target: (batch,) int64, the block that is written, counted over the blocks of all rows; -1 where none is due.
        factors: of the layer.
        key_latents, value_latents: in one segment, written to.
    """
    encode = gpu_encode if torch.compiler.is_compiling() else _encode
    cos, sin = (t.expand(len(places), -1, -1).contiguous() for t in back)
    encode(
        *_stored(key_latents), key_states, places, cos, sin, target, factors.key_A, factors.key_mean,
        factors.key_ranks, *description(key_latents.format),
    )  # fmt: skip
    encode(
        *_stored(value_latents), value_states, places, None, None, target, factors.value_A, factors.value_mean,
        (value_latents.format.rank,), *description(value_latents.format),
    )  # fmt: skip


def _encode(
    data: torch.Tensor, ranges: torch.Tensor | None, states: torch.Tensor, places: torch.Tensor,
    cos: torch.Tensor | None, sin: torch.Tensor | None, target: torch.Tensor, A: torch.Tensor, mean: torch.Tensor,
    ranks: Sequence[int], bits: Sequence[int], rank: int, sizes: Sequence[int],
) -> None:  # fmt: skip
    """One side of [`encode_due`] as an operation, into which a compiler does not look."""
    batch, heads, num_places, head_dim = states.shape
    tokens, format = places.shape[1], format_of(tuple(bits), rank, *sizes)
    out = torch.empty(batch, tokens, rank, dtype=torch.float32, device=states.device) if bits else data
    turn = (states, states) if cos is None else (cos, sin)  # never read, or read
    tiles = channel_tiles(tuple(ranks), states.device)
    with torch.cuda.device(states.device) if states.is_cuda else contextlib.nullcontext():  # where Triton launches
        encode_kernel[batch, len(tiles)](
            states, places, *turn, target, A.to(states.dtype).contiguous(), mean, tiles, out, rank, num_places,
            TURNED=cos is not None, PACKED=bool(bits), HEADS=heads, GROUP_HEADS=heads // len(ranks),
            HEAD_DIM=head_dim, BLOCK=tokens, TOKENS=max(FEWEST_TOKENS, power_of_2(tokens)), CHANNELS=CHANNELS,
            num_stages=1,
        )  # fmt: skip
    if bits:
        quantize_into(data, ranges, out, format.layout, target)


gpu_encode = torch.library.custom_op("cskv_hf::gpu_encode", _encode, mutates_args=("data", "ranges"))


@gpu_encode.register_fake
def _(*_):
    return None


@functools.cache
def channel_tiles(ranks: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int32 (tiles, 4): the group, the first channel and how many, of at most `CHANNELS` of one group."""
    rows, start = [], 0
    for group, rank in enumerate(ranks):
        firsts = range(start, start + rank, CHANNELS)
        rows += [(group, first, min(CHANNELS, start + rank - first), 0) for first in firsts]
        start += rank
    return torch.tensor(rows, dtype=torch.int32, device=device)


@triton.jit(do_not_specialize=("rank", "num_places"))
def encode_kernel(
    states, places, cos, sin, target, A, mean, tiles, out, rank, num_places, TURNED: tl.constexpr,
    PACKED: tl.constexpr, HEADS: tl.constexpr, GROUP_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Latents of some channels of one row's block: (batch, BLOCK, rank) float32 if they are to be `PACKED`, else where
    they stay.

    Args:
        TURNED: whether states are keys after RoPE, to be turned back by `cos` and `sin`.
        HEADS, GROUP_HEADS: KV heads in all, and of the group that a latent is of.
        TOKENS: `BLOCK` or what a product needs.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    DTYPE: tl.constexpr = states.dtype.element_ty
    batch, tile = tl.program_id(0).to(tl.int64), tiles + 4 * tl.program_id(1)
    to = tl.load(target + batch)
    if to < 0:
        return
    group, first, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    token, pair, channel = tl.arange(0, TOKENS), tl.arange(0, HALF), tl.arange(0, CHANNELS)
    there = token < BLOCK
    place = tl.load(places + batch * BLOCK + token, mask=there, other=0)
    turn_at = (batch * BLOCK + token)[:, None] * HALF + pair[None, :]
    if TURNED:
        cos_back = tl.load(cos + turn_at, mask=there[:, None], other=0.0)
        sin_back = tl.load(sin + turn_at, mask=there[:, None], other=0.0)
    channel_at = (first + channel)[None, :] * (GROUP_HEADS * HEAD_DIM) + pair[:, None]
    of_tile = (channel < count)[None, :]
    sums = tl.zeros([TOKENS, CHANNELS], dtype=tl.float32)
    for i in range(GROUP_HEADS):
        head = group * GROUP_HEADS + i
        state_at = states + ((batch * HEADS + head) * num_places + place)[:, None] * HEAD_DIM + pair[None, :]
        low, high = tl.load(state_at).to(tl.float32), tl.load(state_at + HALF).to(tl.float32)
        if TURNED:
            low, high = low * cos_back - high * sin_back, high * cos_back + low * sin_back
        mean_at = mean + head * HEAD_DIM + pair
        low -= tl.load(mean_at).to(tl.float32)[None, :]
        high -= tl.load(mean_at + HALF).to(tl.float32)[None, :]
        A_at = A + channel_at + i * HEAD_DIM
        A_low, A_high = tl.load(A_at, mask=of_tile, other=0.0), tl.load(A_at + HALF, mask=of_tile, other=0.0)
        sums = tl.dot(low.to(DTYPE), A_low, sums, input_precision="ieee")
        sums = tl.dot(high.to(DTYPE), A_high, sums, input_precision="ieee")
    row = batch if PACKED else to
    out_at = out + (row * BLOCK + token)[:, None] * rank + (first + channel)[None, :]
    tl.store(out_at, sums.to(out.dtype.element_ty), mask=there[:, None] & of_tile)


def _stored(latents: Latents) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes and ranges; plain latents and nothing."""
    data, *ranges = latents.held
    return data, ranges[0] if ranges else None

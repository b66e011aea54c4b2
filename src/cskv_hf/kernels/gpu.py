"""Two Triton kernels: scores of a query against keys rebuilt in registers, and value latents summed by the weights.

Neither rebuilt keys nor unpacked latents ever reach memory. There are two kernels because their work is divided
differently: a key is rebuilt per KV head, from that head's latents alone, while value latents are joint over the heads
and one kernel per head would unpack them once for each. Between them the scores are written, 4 bytes per query head
and old token. Softmax needs no running maximum: the maximum is known before values are touched.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..cache_layer import CompressedKV
from ..factors import LayerFactors
from ..latents import LatentFormat, Latents, PackedFormat, PlainFormat
from ..quantize import PackedLayout
from . import chunks_of

KEY_TILE, KEY_CHUNK = 64, 16  # tokens and channels at a time; 16 is the least that tensor cores take
VALUE_TILE, VALUE_CHUNK = 32, 64  # tokens of one block, so that a channel has one range
ROWS = 16  # queries of a KV head, and query heads, at a time
KEY_WARPS, VALUE_WARPS = 8, 4  # as few as leave no registers to spill (tests/test_gpu_kernels.py)
PROGRAMS = 1024  # of the value kernel, at least, if there are tokens enough


@triton.jit
def _codes(data, row_0, token_in_block, channels, bits, width, live, BLOCK: tl.constexpr):
    """Codes (tokens, channels) of a tier: binary digits of `bits` are the widths of its planes, wide ones first."""
    code = tl.zeros([row_0.shape[0], channels.shape[0]], dtype=tl.int32)
    if bits == 8:
        at = row_0[:, None] + token_in_block[:, None] * width + channels[None, :]
        code = tl.load(data + at, mask=live, other=0).to(tl.int32)
    else:
        if bits & 4 != 0:
            rows = BLOCK // 2
            at = row_0[:, None] + (token_in_block % rows)[:, None] * width + channels[None, :]
            byte = tl.load(data + at, mask=live, other=0).to(tl.int32)
            code += (byte >> (4 * (token_in_block // rows))[:, None]) & 15
        start, below = (bits & 4) * BLOCK // 8, bits & 4
        if bits & 2 != 0:
            rows = BLOCK // 4
            at = row_0[:, None] + (start + token_in_block % rows)[:, None] * width + channels[None, :]
            byte = tl.load(data + at, mask=live, other=0).to(tl.int32)
            code += ((byte >> (2 * (token_in_block // rows))[:, None]) & 3) << below
        start, below = (bits & 6) * BLOCK // 8, bits & 6
        if bits & 1 != 0:
            rows = BLOCK // 8
            at = row_0[:, None] + (start + token_in_block % rows)[:, None] * width + channels[None, :]
            byte = tl.load(data + at, mask=live, other=0).to(tl.int32)
            code += ((byte >> (token_in_block // rows)[:, None]) & 1) << below
    return code


@triton.jit
def _latents(
    data, ranges, piece, batch, token, num_tokens, rank, block_bytes, block_ranges,
    CHUNK: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr, GROUP_TOKENS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr, ONE_RANGE: tl.constexpr,
):  # fmt: skip
    """(tokens, CHUNK) float32 latents of a piece (see `chunks_of`); finite, and nothing else, beyond its channels and
    beyond the past."""
    first, count = tl.load(piece), tl.load(piece + 1)
    column = tl.arange(0, CHUNK)
    live = (token < num_tokens)[:, None] & (column < count)[None, :]
    if not PACKED:
        at = token[:, None] * rank + (first + column)[None, :]  # offsets within a row fit 32 bits
        return tl.load(data + batch * num_tokens * rank + at, mask=live, other=0).to(tl.float32)
    bits, byte, width = tl.load(piece + 2), tl.load(piece + 3), tl.load(piece + 4)
    inside, first_range, groups = tl.load(piece + 5), tl.load(piece + 6), tl.load(piece + 7)
    before = batch * (num_tokens // BLOCK)  # blocks of the rows before
    block, in_block, channels = token // BLOCK, token % BLOCK, inside + column
    code = _codes(
        data + before * block_bytes, block * block_bytes + byte, in_block, channels, bits, width, live, BLOCK
    )
    if ONE_RANGE:  # of all these tokens
        of_token = tl.min(block, axis=0) * block_ranges + first_range
        at = ranges + before * block_ranges * 2 + (of_token + channels // GROUP_CHANNELS) * 2
        minimum = tl.load(at, mask=column < count, other=0).to(tl.float32)[None, :]
        step = tl.load(at + 1, mask=column < count, other=0).to(tl.float32)[None, :]
    else:
        of_token = block * block_ranges + first_range + in_block // GROUP_TOKENS * groups
        at = ranges + before * block_ranges * 2 + (of_token[:, None] + (channels // GROUP_CHANNELS)[None, :]) * 2
        minimum = tl.load(at, mask=live, other=0).to(tl.float32)
        step = tl.load(at + 1, mask=live, other=0).to(tl.float32)
    return minimum + step * code.to(tl.float32)


@triton.jit
def _score_kernel(
    query, data, ranges, pieces, first_piece, key_B, mean, turn, tile_turn, scores,
    rows, num_tokens, rank, block_bytes, block_ranges, turn_stride,
    IN_TILES: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    CHUNK: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr, GROUP_TOKENS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr, ONE_RANGE: tl.constexpr,
):  # fmt: skip
    """Scores of all rows of one KV head against one tile of old tokens."""
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    live = token < num_tokens
    pair = tl.arange(0, HALF)
    group = head // HEADS_PER_GROUP
    row_of_B = head % HEADS_PER_GROUP * HEAD_DIM + pair  # of the first half of this head within its group
    first = tl.zeros([TILE, HALF], dtype=tl.float32) + tl.load(mean + head * HEAD_DIM + pair).to(tl.float32)
    second = tl.zeros([TILE, HALF], dtype=tl.float32) + tl.load(mean + head * HEAD_DIM + HALF + pair).to(tl.float32)
    for index in range(tl.load(first_piece + group), tl.load(first_piece + group + 1)):
        piece = pieces + index * 8
        latents = _latents(
            data, ranges, piece, batch, token, num_tokens, rank, block_bytes, block_ranges,
            CHUNK, PACKED, BLOCK, GROUP_TOKENS, GROUP_CHANNELS, ONE_RANGE,
        )  # fmt: skip
        column = tl.arange(0, CHUNK)
        B_at = (tl.load(piece) + column)[:, None] * (HEADS_PER_GROUP * HEAD_DIM) + row_of_B[None, :]
        of_piece = (column < tl.load(piece + 1))[:, None]
        B_first = tl.load(key_B + B_at, mask=of_piece, other=0)
        B_second = tl.load(key_B + B_at + HALF, mask=of_piece, other=0)
        latents = latents.to(B_first.dtype)
        first = tl.dot(latents, B_first, first, input_precision="ieee")
        second = tl.dot(latents, B_second, second, input_precision="ieee")
    turn_at = turn + batch * turn_stride + token[:, None] * (2 * HALF) + 2 * pair[None, :]
    if IN_TILES:
        turn_at = turn + tl.arange(0, TILE)[:, None] * (2 * HALF) + 2 * pair[None, :]
    c, s = tl.load(turn_at, mask=live[:, None], other=0), tl.load(turn_at + 1, mask=live[:, None], other=0)
    turned_first = tl.trans((first * c - second * s).to(query.dtype.element_ty))
    turned_second = tl.trans((second * c + first * s).to(query.dtype.element_ty))
    base = (batch * tl.num_programs(1) + head) * rows
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        there = (row < rows)[:, None]
        at = query + (base + row)[:, None] * HEAD_DIM + pair[None, :]
        q_first, q_second = tl.load(at, mask=there, other=0), tl.load(at + HALF, mask=there, other=0)
        if IN_TILES:  # turn the few queries back to where the tile starts, not all its keys on
            back = tile_turn + tl.program_id(0) * (2 * HALF) + 2 * pair
            back_c, back_s = tl.load(back)[None, :], tl.load(back + 1)[None, :]
            wide_first, wide_second = q_first.to(tl.float32), q_second.to(tl.float32)
            q_first = (wide_first * back_c + wide_second * back_s).to(q_first.dtype)
            q_second = (wide_second * back_c - wide_first * back_s).to(q_second.dtype)
        score = tl.dot(q_first, turned_first, input_precision="ieee")
        score = tl.dot(q_second, turned_second, score, input_precision="ieee")
        tl.store(scores + (base + row)[:, None] * num_tokens + token[None, :], score, mask=there & live[None, :])


@triton.jit
def _value_kernel(
    scores, maximum, data, ranges, pieces, summed, weight,
    rows, num_tokens, rank, block_bytes, block_ranges, tokens_per_split, row_tiles,
    ROWS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
    GROUP_TOKENS: tl.constexpr, GROUP_CHANNELS: tl.constexpr, ONE_RANGE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One piece of the channels of ``exp(scores - maximum) @ latents``, over one split of the old tokens."""
    index, split = tl.program_id(0), tl.program_id(1)
    batch = (tl.program_id(2) // row_tiles).to(tl.int64)
    row = tl.program_id(2) % row_tiles * ROWS + tl.arange(0, ROWS)
    there = row < rows
    piece = pieces + index * 8
    highest = tl.load(maximum + batch * rows + row, mask=there, other=0)
    total = tl.zeros([ROWS, CHUNK], dtype=tl.float32)
    weights = tl.zeros([ROWS], dtype=tl.float32)
    end = tl.minimum((split + 1) * tokens_per_split, num_tokens)
    for start in range(split * tokens_per_split, end, TILE):
        token = start + tl.arange(0, TILE)
        score_at = scores + (batch * rows + row)[:, None] * num_tokens + token[None, :]
        score = tl.load(score_at, mask=there[:, None] & (token < end)[None, :], other=float("-inf"))
        exponential = tl.exp(score - highest[:, None])
        weights += tl.sum(exponential, axis=1)
        latents = _latents(
            data, ranges, piece, batch, token, num_tokens, rank, block_bytes, block_ranges,
            CHUNK, PACKED, BLOCK, GROUP_TOKENS, GROUP_CHANNELS, ONE_RANGE,
        )  # fmt: skip
        total = tl.dot(exponential.to(DTYPE), latents.to(DTYPE), total, input_precision="ieee")
    target = (split * (tl.num_programs(2) // row_tiles) + batch) * rows + row
    column = tl.arange(0, CHUNK)
    summed_at = summed + target[:, None] * rank + (tl.load(piece) + column)[None, :]
    tl.store(summed_at, total, mask=there[:, None] & (column < tl.load(piece + 1))[None, :])
    if index == 0:
        tl.store(weight + target, weights, mask=there)


def old_scores(query: torch.Tensor, kv: CompressedKV) -> torch.Tensor:
    """Scores against the compressed past.

    Args:
        query: (batch, num_key_value_heads, rows, head_dim), scaled, after RoPE: the queries of each KV head.

    Returns:
        (batch, num_key_value_heads, rows, num_old) float32.
    """
    factors, latents, step = kv.factors, kv.key_latents, kv.step
    # float32 keeps the model's own cos and sin; to 16 bits both ways are the same
    in_tiles = None if query.dtype == torch.float32 else step.old_turn_in_tiles(query.device, KEY_TILE)
    starts, turn = in_tiles or (None, step.old_turn(query.device, kv.exact_keys.dtype))
    turns = [torch.view_as_real(t) if t.is_complex() else t for t in (turn, turn if starts is None else starts)]
    launch = gpu_scores if torch.compiler.is_compiling() else _launch_scores
    return launch(
        query, *_stored(latents), *_description(latents), factors.key_ranks, factors.key_B, factors.key_mean, *turns,
        in_tiles is not None,
    )  # fmt: skip


def sum_values(
    scores: torch.Tensor, maximum: torch.Tensor, kv: CompressedKV, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """``exp(scores - maximum)`` times the value latents, and its sum.

    Args:
        scores: (batch, rows, num_old) float32; -inf where masked.
        maximum: (batch, rows) float32, finite.
        dtype: of the products; sums are float32.

    Returns:
        (batch, rows, value_rank) and (batch, rows), float32.
    """
    launch = gpu_values if torch.compiler.is_compiling() else _launch_values
    return launch(scores, maximum, *_stored(kv.value_latents), *_description(kv.value_latents), dtype)


# A compiler does not look into the two that follow, and calls them as operations. So latents are described by tensors
# and numbers: bits of every channel (none of plain ones), their number, and the tokens of a block, and tokens and
# channels of a range.


def _launch_scores(
    query: torch.Tensor, data: torch.Tensor, ranges: torch.Tensor, bits: Sequence[int], rank: int,
    sizes: Sequence[int], key_ranks: Sequence[int], key_B: torch.Tensor, mean: torch.Tensor, turn: torch.Tensor,
    tile_turn: torch.Tensor, in_tiles: bool,
) -> torch.Tensor:  # fmt: skip
    batch, heads, rows, head_dim = query.shape
    num_tokens = data.shape[1] * sizes[0]
    scores = query.new_empty(batch, heads, rows, num_tokens, dtype=torch.float32)
    format = _format(tuple(bits), rank, *sizes)
    pieces, first_piece, _ = chunks_of(format, tuple(key_ranks), KEY_CHUNK, query.device)
    _score_kernel[triton.cdiv(num_tokens, KEY_TILE), heads, batch](
        query.contiguous(), data.contiguous(), ranges.contiguous(), pieces, first_piece,
        key_B.to(query.dtype).mT.contiguous(), mean, turn, tile_turn, scores, rows, num_tokens, rank,
        *_block_sizes(format), turn.stride(0) if turn.ndim == 4 and len(turn) > 1 else 0, IN_TILES=in_tiles,
        HEADS_PER_GROUP=heads // len(key_ranks), HEAD_DIM=head_dim, ROWS=ROWS, TILE=KEY_TILE, CHUNK=KEY_CHUNK,
        num_warps=KEY_WARPS, **_constants(format, KEY_TILE),
    )  # fmt: skip
    return scores


def _launch_values(
    scores: torch.Tensor, maximum: torch.Tensor, data: torch.Tensor, ranges: torch.Tensor, bits: Sequence[int],
    rank: int, sizes: Sequence[int], dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    batch, rows, num_tokens = scores.shape
    format = _format(tuple(bits), rank, *sizes)
    pieces, _, num_pieces = chunks_of(format, (rank,), VALUE_CHUNK, scores.device)
    row_tiles = triton.cdiv(rows, ROWS)
    tiles = triton.cdiv(num_tokens, VALUE_TILE)
    splits = min(tiles, triton.cdiv(PROGRAMS, num_pieces * batch * row_tiles))
    per_split = triton.cdiv(tiles, splits) * VALUE_TILE
    splits = triton.cdiv(num_tokens, per_split)
    summed = scores.new_empty(splits, batch, rows, rank)
    weight = scores.new_empty(splits, batch, rows)
    _value_kernel[num_pieces, splits, batch * row_tiles](
        scores.contiguous(), maximum.contiguous(), data.contiguous(), ranges.contiguous(), pieces, summed, weight,
        rows, num_tokens, rank, *_block_sizes(format), per_split, row_tiles, ROWS=ROWS, TILE=VALUE_TILE,
        CHUNK=VALUE_CHUNK, DTYPE=TRITON_DTYPES[dtype], num_warps=VALUE_WARPS, **_constants(format, VALUE_TILE),
    )  # fmt: skip
    return summed.sum(0), weight.sum(0)


def prepare_tables(factors: LayerFactors, device: torch.device) -> None:
    """Both tables of `chunks_of` that the kernels read of a layer."""
    chunks_of(factors.key_format, factors.key_ranks, KEY_CHUNK, device)
    chunks_of(factors.value_format, (factors.value_format.rank,), VALUE_CHUNK, device)


gpu_scores = torch.library.custom_op("cskv_hf::gpu_scores", _launch_scores, mutates_args=())
gpu_values = torch.library.custom_op("cskv_hf::gpu_values", _launch_values, mutates_args=())


@gpu_scores.register_fake
def _(query, data, ranges, bits, rank, sizes, *_):
    return query.new_empty(*query.shape[:3], data.shape[1] * sizes[0], dtype=torch.float32)


@gpu_values.register_fake
def _(scores, maximum, data, ranges, bits, rank, sizes, dtype):
    return scores.new_empty(*scores.shape[:2], rank), scores.new_empty(scores.shape[:2])


TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def _stored(latents: Latents) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and ranges; plain latents stand for both."""
    tensors = latents.tensors
    return tensors[0], tensors[-1]


def _description(latents: Latents) -> tuple[tuple[int, ...], int, tuple[int, int, int]]:
    """What [`_format`] turns back into the format of the latents."""
    format = latents.format
    if not isinstance(format, PackedFormat):
        return (), format.rank, (format.block_size, 1, 1)
    layout = format.layout
    return layout.bits, layout.rank, (layout.block_size, layout.group_tokens, layout.group_channels)


@functools.cache
def _format(bits: tuple[int, ...], rank: int, block_size: int, group_tokens: int, group_channels: int) -> LatentFormat:
    if not bits:
        return PlainFormat(rank, block_size)
    return PackedFormat(PackedLayout(bits, block_size, group_tokens, group_channels))


def _block_sizes(format: LatentFormat) -> tuple[int, int]:
    """Bytes of codes and number of ranges of a block."""
    if not isinstance(format, PackedFormat):
        return 0, 0
    return format.layout.code_bytes, format.layout.num_ranges


def _constants(format: LatentFormat, tile: int) -> dict[str, int | bool]:
    """What a kernel is compiled for: how latents are stored."""
    if not isinstance(format, PackedFormat):
        return dict(PACKED=False, BLOCK=format.block_size, GROUP_TOKENS=1, GROUP_CHANNELS=1, ONE_RANGE=False)
    layout = format.layout
    return dict(
        PACKED=True,
        BLOCK=layout.block_size,
        GROUP_TOKENS=layout.group_tokens,
        GROUP_CHANNELS=layout.group_channels,
        ONE_RANGE=tile == layout.block_size == layout.group_tokens,
    )

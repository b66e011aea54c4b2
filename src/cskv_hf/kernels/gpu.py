"""Attention over a compressed past on a GPU: how the kernels of triton_kernels.py work together.

Scores, sums, merge, finish: per KV head, keys are rebuilt in registers, tile by tile of old tokens, and give the
exponentials of the scores relative to the tile's maximum; then the value latents are summed by these, piece by piece
of their channels and split over the past; the splits are merged; ``value_B`` is applied once; and attention to the
exact tokens joins their mean. Neither rebuilt keys nor unpacked latents ever reach memory. Scores and sums are two
kernels because their work is divided differently: a key is rebuilt from its own head's latents alone, while value
latents are joint over the heads and one kernel per head would unpack them once for each.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import torch
import triton
from torch.utils.weak import WeakTensorKeyDictionary

from ..cache_layer import CompressedKV
from ..factors import LayerFactors
from ..latents import LatentFormat, Latents, PackedFormat, PlainFormat
from ..quantize import PackedLayout, rows_together
from .triton_kernels import finish_kernel, merge_kernel, score_kernel, value_kernel

TILE = 64  # tokens at a time
VALUE_CHUNK = 64  # channels at a time
KEY_PROGRAMS, VALUE_PROGRAMS = 2048, 1024  # at least, if there are tokens enough
FEW_TILES = 8  # of a program, which then has more to prepare than to do
MAX_SPLITS = 128
WARPS = 4
ONE = 0x3F800000  # the bits of 1.0 in float32


def attend(
    query: torch.Tensor,
    kv: CompressedKV,
    scaling: float,
    exact_mask: torch.Tensor | None,
    old_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of the queries of each KV head.

    Args:
        query: (batch, num_key_value_heads, rows, head_dim) after RoPE; the rows of a query head lie together.
        scaling, exact_mask, old_mask: as in `compressed_attention`.

    Returns:
        (batch, num_key_value_heads, rows, head_dim) in the dtype of `query`.
    """
    factors, step = kv.factors, kv.step
    # float32 keeps the model's own cos and sin; in 16 bits a product of two turns is as near to the true one
    in_tiles = None if query.dtype == torch.float32 else step.old_turn_in_tiles(query.device, TILE)
    turn = step.old_cos_sin(query.device, kv.exact_keys.dtype) if in_tiles is None else in_tiles[1]
    starts = turn if in_tiles is None else in_tiles[0]
    launch = gpu_attend if torch.compiler.is_compiling() else _attend
    return launch(
        query, kv.exact_keys, kv.exact_values, exact_mask, old_mask, scaling,
        *_stored(kv.key_latents), *_description(kv.key_latents), factors.key_ranks, factors.key_B, factors.key_mean,
        *turn, *starts, in_tiles is not None,
        *_stored(kv.value_latents), *_description(kv.value_latents), factors.value_B, factors.value_mean,
    )  # fmt: skip


# A compiler does not look into the following, and calls it as an operation. So latents are described by tensors and
# numbers: bits of every channel (none of plain ones), their number, and the tokens of a block, and tokens and channels
# of a range.


def _attend(
    query: torch.Tensor, exact_keys: torch.Tensor, exact_values: torch.Tensor, exact_mask: torch.Tensor | None,
    old_mask: torch.Tensor | None, scaling: float,
    key_data: torch.Tensor, key_ranges: torch.Tensor, key_bits: Sequence[int], key_rank: int, key_sizes: Sequence[int],
    key_ranks: Sequence[int], key_B: torch.Tensor, key_mean: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    tile_cos: torch.Tensor, tile_sin: torch.Tensor, in_tiles: bool,
    value_data: torch.Tensor, value_ranges: torch.Tensor, value_bits: Sequence[int], value_rank: int,
    value_sizes: Sequence[int], value_B: torch.Tensor, value_mean: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():  # where Triton launches
        return _launch(
            query, exact_keys, exact_values, exact_mask, old_mask, scaling, key_data, key_ranges, key_bits, key_rank,
            key_sizes, key_ranks, key_B, key_mean, cos, sin, tile_cos, tile_sin, in_tiles, value_data, value_ranges,
            value_bits, value_rank, value_sizes, value_B, value_mean,
        )  # fmt: skip


def _launch(
    query, exact_keys, exact_values, exact_mask, old_mask, scaling, key_data, key_ranges, key_bits, key_rank,
    key_sizes, key_ranks, key_B, key_mean, cos, sin, tile_cos, tile_sin, in_tiles, value_data, value_ranges,
    value_bits, value_rank, value_sizes, value_B, value_mean,
):  # fmt: skip
    batch, heads, rows, head_dim = query.shape
    query, num_tokens = query.contiguous(), key_data.shape[1] * key_sizes[0]
    exact_mask, old_mask = (m if m is None or m.stride(3) == 1 else m.contiguous() for m in (exact_mask, old_mask))
    format = _format(tuple(key_bits), key_rank, *key_sizes)
    value_format = _format(tuple(value_bits), value_rank, *value_sizes)
    words = _in_words(format, value_format)
    all_rows, num_tiles = heads * rows, triton.cdiv(num_tokens, TILE)
    new = functools.partial(torch.empty, device=query.device)
    weights = new(batch, all_rows, num_tiles, TILE, dtype=query.dtype)
    maxima = new(batch, all_rows, num_tiles, dtype=torch.float32)

    of_channel = head_dim * query.element_size()
    chunk, most, prefetch = key_plan(max(key_ranks) + 1, of_channel, shared_memory(query.device))
    channels, pieces, first_piece = key_pieces(format, tuple(key_ranks), chunk, query.device)
    tiles_each = tiles_of_program(num_tiles, heads * batch, KEY_PROGRAMS)
    score_kernel[triton.cdiv(num_tiles, tiles_each), heads, batch](
        query, _codes(key_data, words), _as_pairs(key_ranges), channels, pieces, first_piece,
        with_mean(key_B, key_mean, tuple(key_ranks), query.dtype), cos, sin, tile_cos, tile_sin,
        *_mask_start(old_mask, query), weights, maxima, scaling, rows, _num_queries(old_mask), num_tokens,
        key_rank, channels.shape[1], *_block_sizes(format), num_tiles, tiles_each,
        cos.stride(0) if cos.ndim == 3 and len(cos) > 1 else 0, *_mask_strides(old_mask), ONE,
        IN_TILES=in_tiles, MASK=_mask_kind(old_mask), HEADS_PER_GROUP=heads // len(key_ranks), HEAD_DIM=head_dim,
        ROWS=8 if rows <= 8 else 16, PIECES=most, PREFETCH=prefetch, TILE=TILE, CHUNK=chunk, num_warps=WARPS,
        num_stages=1, **_constants(format, words),
    )  # fmt: skip

    merged, old_maxima, old_sums = _sum_values(
        weights, maxima, value_data, value_ranges, value_format, heads, num_tokens, words
    )
    old = torch.bmm(merged, value_B.to(query.dtype).view(heads, head_dim, -1).mT)
    out, row_tile = torch.empty_like(query), 16
    finish_kernel[triton.cdiv(rows, row_tile), heads, batch](
        query, exact_keys.contiguous(), exact_values.contiguous(), *_mask_start(exact_mask, query), old, value_mean,
        old_maxima, old_sums, out, scaling, rows, _num_queries(exact_mask), batch, exact_keys.shape[2],
        *_mask_strides(exact_mask), MASK=_mask_kind(exact_mask), HEAD_DIM=head_dim, ROWS=row_tile,
        TILE=32 if head_dim * query.element_size() <= 512 else 16, num_warps=WARPS, num_stages=1,
    )  # fmt: skip
    return out


def key_plan(channels: int, bytes_of_channel: int, room: int) -> tuple[int, int, bool]:
    """How to take up to so many channels of a head: how many at a time, how many such pieces to hold ready (0: none),
    and whether to read ahead. What was quickest on an H200 in bfloat16 with heads of 128.

    Args:
        bytes_of_channel: of a head's row of ``key_B``.
        room: bytes that a program's shared memory has, for the rows that are held and a few tiles.
    """
    chunk = 16 if channels <= 16 or 32 < channels <= 48 else 32 if channels <= 32 else 64
    chunk = min(chunk, max(16, 2**14 // bytes_of_channel))
    pieces = triton.cdiv(channels, chunk)
    held = channels <= 256 and pieces * chunk * bytes_of_channel <= room - max(2**15, 200 * bytes_of_channel)
    return chunk, pieces if held else 0, held and channels <= 64 and bytes_of_channel <= 256


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have; in Triton's interpreter those of an A100."""
    if device.type != "cuda":
        return 163 * 1024
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 64 * 1024)  # or AMD's


def tiles_of_program(num_tiles: int, beside: int, programs: int) -> int:
    """Tiles that each program takes, where `beside` programs work on the same tiles: so many that there are `programs`
    in all, or a quarter of them if that would be few."""
    for wanted in (programs, programs // 4):
        splits = min(num_tiles, max(1, triton.cdiv(wanted, beside)))
        if num_tiles >= FEW_TILES * splits:
            break
    return triton.cdiv(num_tiles, splits)


def _sum_values(weights, maxima, data, ranges, format, heads, num_tokens, words):
    """The mean of latents for each KV head, (heads, batch * rows, rank), and the maximum and the sum of exponentials
    that it is weighted by, (heads, batch, rows) float32."""
    batch, all_rows, num_tiles, _ = weights.shape
    channels, pieces, _ = value_pieces(format, VALUE_CHUNK, weights.device)
    num_pieces = len(pieces)
    value_rows = 16 if all_rows <= 16 else 32
    row_tiles = triton.cdiv(all_rows, value_rows)
    tiles_each = tiles_of_program(num_tiles, num_pieces * batch * row_tiles, VALUE_PROGRAMS)
    tiles_each = max(tiles_each, triton.cdiv(num_tiles, MAX_SPLITS))
    splits = triton.cdiv(num_tiles, tiles_each)
    summed = maxima.new_empty(splits, batch, all_rows, format.rank + 1)
    split_maxima = maxima.new_empty(splits, batch, all_rows)
    value_kernel[num_pieces, splits, batch * row_tiles](
        weights, maxima, _codes(data, words), _as_pairs(ranges), channels, pieces, summed, split_maxima, all_rows,
        num_tokens, format.rank, channels.shape[1], *_block_sizes(format), num_tiles, tiles_each,
        row_tiles, ONE, ROWS=value_rows, TILE=TILE, CHUNK=VALUE_CHUNK, num_warps=WARPS, num_stages=1,
        **_constants(format, words),
    )  # fmt: skip
    merged = weights.new_empty(heads, batch * all_rows // heads, format.rank)
    old_maxima, old_sums = maxima.new_empty(2, heads, batch, all_rows // heads)
    merge_kernel[triton.cdiv(format.rank, 64), all_rows, batch](
        summed, split_maxima, merged, old_maxima, old_sums, splits, batch, all_rows, format.rank,
        all_rows // heads, SPLITS=triton.next_power_of_2(splits), CHUNK=64,
    )  # fmt: skip
    return merged, old_maxima, old_sums


gpu_attend = torch.library.custom_op("cskv_hf::gpu_attend", _attend, mutates_args=())


@gpu_attend.register_fake
def _(query, *_):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def prepare_tables(factors: LayerFactors, device: torch.device, dtype: torch.dtype) -> None:
    """What the kernels keep of a layer's format."""
    channels, of_channel = max(factors.key_ranks) + 1, factors.head_dim * dtype.itemsize
    chunk, _, _ = key_plan(channels, of_channel, shared_memory(device))
    key_pieces(factors.key_format, factors.key_ranks, chunk, device)
    value_pieces(factors.value_format, VALUE_CHUNK, device)


Table = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@functools.cache
def key_pieces(format: LatentFormat, ranks: tuple[int, ...], chunk: int, device: torch.device) -> Table:
    """[`described`] for keys: the channels of every group and one that is always one, for the mean."""
    channels, groups, start = describe(format), [], 0
    for rank in ranks:
        groups.append([*channels[start : start + rank], ALWAYS_ONE])
        start += rank
    return described(groups, chunk, device)


@functools.cache
def value_pieces(format: LatentFormat, chunk: int, device: torch.device) -> Table:
    """[`described`] for values, which are one group, and one channel that is always one, for the sum of weights."""
    return described([[*describe(format), ALWAYS_ONE]], chunk, device)


def described(groups: Sequence[Sequence[tuple[int, ...]]], chunk: int, device: torch.device) -> Table:
    """Tables of channels and of pieces of at most `chunk` of them, for the kernels.

    Returns:
        int32 (16, channels) of [`describe`]; int32 (pieces, 3) of first channel, channels, and the planes that any of
        them has; and int32 (groups + 1,) of where each group's pieces start.
    """
    channels, pieces, starts = [], [], [0]
    for group in groups:
        for at in range(0, len(group), chunk):
            part = group[at : at + chunk]
            planes = functools.reduce(int.__or__, (bits for _, _, bits, *_ in part))
            pieces.append((len(channels) + at, len(part), planes))
        channels += group
        starts.append(len(pieces))
    table, pieces, first = (torch.tensor(t, dtype=torch.int32).to(device) for t in (channels, pieces, starts))
    return table.mT.contiguous(), pieces, first


PLANES = (8, 4, 2, 1)  # bits of a code in one plane
ALWAYS_ONE = (0, 0, 0, -1, *(0,) * 12)


def describe(format: LatentFormat) -> list[tuple[int, ...]]:
    """Where each channel lies: first word in a block, words to the next row of them, bits, and its first range in a
    block; then of each kind of plane the first word, words to the next row, and what a code of all ones and one more
    is worth, 0 if there is no such plane. Bytes instead of words if rows do not make any. Of plain latents: the
    channel."""
    if not isinstance(format, PackedFormat):
        return [(channel, *(0,) * 15) for channel in range(format.rank)]
    layout, found, of_range, of_tier = format.layout, {}, 0, 0
    rows = layout.block_size // 8 // rows_together(layout.block_size)  # of a plane of one bit
    for tier in layout.tiers:
        width = len(tier.channels)
        for i, channel in enumerate(tier.channels):
            planes, start, below = [], of_tier + i, 0
            for bits in PLANES:
                has = tier.bits & bits > 0
                planes += (start, width, 1 << below + bits) if has else (of_tier + i, 0, 0)
                start, below = start + has * bits * width * rows, below + has * bits
            found[channel] = (of_tier + i, width, tier.bits, of_range + i // layout.group_channels, *planes)
        of_tier += width * rows * tier.bits
        of_range += tier.num_groups * (layout.block_size // layout.group_tokens)
    return [found[channel] for channel in range(layout.rank)]


_with_mean: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def with_mean(key_B: torch.Tensor, key_mean: torch.Tensor, ranks: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """``key_B`` transposed, and under the channels of every group its mean: (key_rank + groups, group_dim) in `dtype`.

    Kept for as long as the factors live and nothing writes to them (but for writes to their `.data`, which nobody can
    see). Made anew where that cannot be known, and within a CUDA graph, which would keep the factors of its recording.
    """
    pair = key_B, key_mean
    recording = key_B.is_cuda and torch.cuda.is_current_stream_capturing()
    if recording or any(t.is_inference() for t in pair):
        return _transposed(*pair, ranks, dtype)
    state = dtype, *(number for t in pair for number in (t.data_ptr(), t._version))
    kept = _with_mean.get(key_B)
    if kept is None or kept[0] != state:
        kept = _with_mean[key_B] = state, _transposed(*pair, ranks, dtype)
    return kept[1]


def _transposed(
    key_B: torch.Tensor, key_mean: torch.Tensor, ranks: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    means = key_mean.detach().view(len(ranks), 1, -1)
    groups = key_B.detach().mT.split(ranks)
    return torch.cat([part for group, mean in zip(groups, means) for part in (group, mean)]).to(dtype)


def _as_pairs(ranges: torch.Tensor) -> torch.Tensor:
    """Minimum and step, 16 bits each, as one number; plain latents have none."""
    return ranges.contiguous().view(torch.int32) if ranges.dtype == torch.float16 and ranges.shape[-1] == 2 else ranges


def _mask_start(mask: torch.Tensor | None, like: torch.Tensor) -> tuple[torch.Tensor]:
    if mask is None:
        return (like,)  # never read
    return (mask.view(torch.uint8) if mask.dtype == torch.bool else mask,)


def _mask_kind(mask: torch.Tensor | None) -> int:
    return 0 if mask is None else 1 if mask.dtype == torch.bool else 2


def _num_queries(mask: torch.Tensor | None) -> int:
    return 1 if mask is None else mask.shape[2]


def _mask_strides(mask: torch.Tensor | None) -> tuple[int, int]:
    """From row to row of the batch, and from query to query."""
    if mask is None:
        return 0, 0
    return tuple(mask.stride(d) if mask.shape[d] > 1 else 0 for d in (0, 2))


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


def _in_words(*formats: LatentFormat) -> bool:
    """Whether all these latents can be read word by word: one range for every channel of a block."""
    layouts = [format.layout for format in formats if isinstance(format, PackedFormat)]
    return len(layouts) == len(formats) and all(
        layout.block_size in (32, 64) and layout.group_tokens == layout.block_size for layout in layouts
    )


def _codes(data: torch.Tensor, words: bool) -> torch.Tensor:
    return data.contiguous().view(torch.int32) if words else data.contiguous()


def _constants(format: LatentFormat, words: bool) -> dict[str, int | bool]:
    """What a kernel is compiled for: how latents are stored."""
    if not isinstance(format, PackedFormat):
        groups = dict(GROUPS=1, GROUP_TOKENS=1)
    else:
        groups = dict(GROUPS=format.layout.group_channels, GROUP_TOKENS=format.layout.group_tokens)
    return dict(BLOCK=format.block_size, PACKED=isinstance(format, PackedFormat), WORDS=words, **groups)

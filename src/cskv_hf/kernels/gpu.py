"""Attention over a compressed past on a GPU: how the kernels of triton_kernels.py work together.

Scores, sums, merge, finish: per KV head, keys are rebuilt in registers, tile by tile of old tokens, and give the
exponentials of the scores relative to the maximum of a part of the tile; then the value latents are summed by these,
piece by piece of their channels and split over the past; the splits are merged; ``value_B`` is applied once; and
attention to the exact tokens joins their mean. Neither rebuilt keys nor unpacked latents ever reach memory. Scores
and sums are two kernels because their work is divided differently: a key is rebuilt from its own head's latents alone,
while value latents are joint over the heads and one kernel per head would unpack them once for each. Where not all
tokens are seen, or known to follow one another, scores run twice, see tiles.py.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence

import torch
import triton
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from ..cache_layer import CompressedKV
from ..factors import LayerFactors
from ..latents import LatentFormat, Latents, PackedFormat, PlainFormat
from ..quantize import PackedLayout
from ..step import once
from .pieces import Pieces, cut
from .sizes import cdiv, power_of_2, row_stride
from .tiles import FIRST, FROM_POSITIONS, IN_TILES, ONLY, SECOND, TABLES, TILE, tokens_seen
from .triton_kernels import finish_kernel, merge_kernel, score_kernel, value_kernel
from .triton_latents import PLANES, THOUSANDS

try:  # Gluon is still an experiment of Triton's
    from . import hopper
except (ImportError, AttributeError):
    hopper = None

INTERPRETED = not isinstance(score_kernel, triton.JITFunction)

PART = 16  # tokens whose exponentials are relative to one maximum: those of a warp, see `score_kernel`
ON_HOPPER = -1  # a way to turn keys that is not the Triton kernel's
KEY_CHUNK = VALUE_CHUNK = 64  # channels at a time, at most
MOST_HELD, MOST_AHEAD = 8, 32  # pieces that are held; registers of a thread for what is read ahead
KEY_PROGRAMS, VALUE_PROGRAMS = 2048, 512  # at least, if there are tokens enough
FEW_TILES = 8  # of a program, which then has more to prepare than to do
MAX_SPLITS = 128
WARPS = 4
FUSED = dict(enable_fp_fusion=True)  # product and sum in one instruction; Triton 3.10 wants to be asked for it


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
    factors, key_format = kv.factors, _description(kv.key_latents)
    launch = gpu_attend if torch.compiler.is_compiling() else _attend
    return launch(
        query, kv.exact_keys.to(query.dtype), kv.exact_values.to(query.dtype), exact_mask, old_mask, scaling,
        *_stored(kv.key_latents), *key_format, factors.key_ranks, factors.key_B, factors.key_mean,
        *_turns(query, kv, old_mask, key_format),
        *_stored(kv.value_latents), *_description(kv.value_latents), factors.value_B, factors.value_mean,
    )  # fmt: skip


def _turns(query: torch.Tensor, kv: CompressedKV, old_mask: torch.Tensor | None, key_format: tuple) -> tuple:
    """What turns the keys, and what is seen of them, as `_attend` takes it."""
    step, all_alike = kv.step, old_mask is None or old_mask.shape[2] == 1
    in_tiles = on_hopper = None
    if query.dtype != torch.float32:  # which keeps the model's own cos and sin; in 16 bits a product is as near
        work = _working_dtype(query.dtype, kv.key_latents.format, kv.value_latents.format)
        on_hopper = work == torch.float16 and all_alike and bool(key_format[0])
        on_hopper = on_hopper and served_on_hopper(*key_format, kv.factors.key_ranks, *query.shape[2:], query.device)
        how = (hopper.TILE, work, hopper.STARTS) if on_hopper else (TILE, work)
        in_tiles = step.old_turn_in_tiles(query.device, *how)
    if in_tiles is None:
        return TABLES, *step.old_cos_sin(query.device, kv.exact_keys.dtype), *[None] * 4, 1.0, None, None
    positions, *rope = in_tiles[2:]
    if not all_alike and positions is not None:
        return FROM_POSITIONS, *[None] * 4, positions, *rope, None, None
    seen = None
    if all_alike and (positions is not None or old_mask is not None):

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            return tokens_seen(old_mask, positions, kv.key_latents.num_tokens, how[0])

        seen = once(step.memo, f"seen of {how}", make, old_mask, positions)
    where = ON_HOPPER if on_hopper else IN_TILES
    if positions is None and seen:  # for the second run
        positions, _ = step.old_rope(query.device)
    return where, *in_tiles.within, *in_tiles.starts, positions, *rope, *(seen or (None, None))


# A compiler does not look into the following, and calls it as an operation. So latents are described by tensors and
# numbers: bits of every channel (none of plain ones), their number, and the tokens of a block, and tokens and channels
# of a range.


def _attend(
    query: torch.Tensor, exact_keys: torch.Tensor, exact_values: torch.Tensor, exact_mask: torch.Tensor | None,
    old_mask: torch.Tensor | None, scaling: float,
    key_data: torch.Tensor, key_ranges: torch.Tensor, key_bits: Sequence[int], key_rank: int, key_sizes: Sequence[int],
    key_ranks: Sequence[int], key_B: torch.Tensor, key_mean: torch.Tensor,
    turns: int, cos: torch.Tensor | None, sin: torch.Tensor | None, start_cos: torch.Tensor | None,
    start_sin: torch.Tensor | None, positions: torch.Tensor | None, inv_freq: torch.Tensor | None,
    attention_scaling: float, seen: torch.Tensor | None, last: torch.Tensor | None,
    value_data: torch.Tensor, value_ranges: torch.Tensor, value_bits: Sequence[int], value_rank: int,
    value_sizes: Sequence[int], value_B: torch.Tensor, value_mean: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():  # where Triton launches
        return _launch(
            query, exact_keys, exact_values, exact_mask, old_mask, scaling, key_data, key_ranges, key_bits, key_rank,
            key_sizes, key_ranks, key_B, key_mean,
            turns, cos, sin, start_cos, start_sin, positions, inv_freq, attention_scaling, seen, last,
            value_data, value_ranges, value_bits, value_rank, value_sizes, value_B, value_mean,
        )  # fmt: skip


def _launch(
    query, exact_keys, exact_values, exact_mask, old_mask, scaling, key_data, key_ranges, key_bits, key_rank,
    key_sizes, key_ranks, key_B, key_mean,
    turns, cos, sin, start_cos, start_sin, positions, inv_freq, attention_scaling, seen, last,
    value_data, value_ranges, value_bits, value_rank, value_sizes, value_B, value_mean,
):  # fmt: skip
    batch, heads, rows, head_dim = query.shape
    query, num_blocks = query.contiguous(), key_data.shape[1]
    exact_mask, old_mask = (m if m is None or m.stride(3) == 1 else m.contiguous() for m in (exact_mask, old_mask))
    format = _format(tuple(key_bits), key_rank, *key_sizes)
    value_format = _format(tuple(value_bits), value_rank, *value_sizes)
    work, words = _working_dtype(query.dtype, format, value_format), _in_words(format, value_format)
    all_rows, num_tiles = heads * rows, cdiv(num_blocks * format.block_size, TILE)
    new = functools.partial(torch.empty, device=query.device)
    part = TILE if turns == ON_HOPPER else PART  # of a tile, that a maximum is of
    weights = new(batch, all_rows, num_tiles, TILE, dtype=work)
    maxima = new(batch, all_rows, num_tiles, TILE // part, dtype=torch.float32)
    base_2 = scaling / math.log(2)
    rope = cos, sin, start_cos, start_sin, positions, inv_freq, attention_scaling
    launch = functools.partial(
        _launch_scores, query, key_data, key_ranges, format, key_ranks, key_B, key_mean, rope, base_2, words, weights,
        maxima, seen, last
    )  # fmt: skip
    if turns == ON_HOPPER:
        hopper.launch(
            query, key_data, key_ranges, format.layout, tuple(key_ranks),
            functools.partial(with_mean, key_B, key_mean), rope[:4], base_2, seen, last, weights, maxima,
        )  # fmt: skip
    else:
        launch(turns, *((ONLY, old_mask) if seen is None else (FIRST, None)))
    if seen is not None:
        launch(FROM_POSITIONS, SECOND, old_mask)
    merged, old_maxima, old_sums = _sum_values(
        weights, maxima, value_data, value_ranges, value_format, heads, words, last, query.dtype
    )
    out, row_tile, wide = torch.empty_like(query), 16, head_dim * query.element_size()
    finish_kernel[cdiv(rows, row_tile), heads, batch](
        query, exact_keys.contiguous(), exact_values.contiguous(), *_mask_start(exact_mask, query), merged,
        transposed(value_B, query.dtype), value_mean, old_maxima, old_sums, out, base_2, rows,
        _num_queries(exact_mask), batch, exact_keys.shape[2], value_rank, *_mask_strides(exact_mask),
        MASK=_mask_kind(exact_mask), HEAD_DIM=head_dim, ROWS=row_tile, TILE=64 if wide <= 256 else 2**14 // wide,
        CHUNK=64 if wide <= 256 else 2**14 // wide, num_warps=2 * WARPS, num_stages=1, **FUSED,
    )  # fmt: skip
    return out


def _launch_scores(
    query, data, ranges, format, key_ranks, key_B, key_mean, rope, base_2, words, weights, maxima, seen, last, turns,
    run, old_mask,
):  # fmt: skip
    batch, heads, rows, head_dim = query.shape
    num_blocks, num_tiles, work, form = data.shape[1], weights.shape[2], weights.dtype, _form(format, words)
    cos, sin, start_cos, start_sin, positions, inv_freq, attention_scaling = rope
    by_row = {TABLES: cos, IN_TILES: start_cos, FROM_POSITIONS: positions}[turns]
    rope = (query if t is None else t for t in (cos, sin, start_cos, start_sin, positions, inv_freq))  # never read
    as_measured = words and turns == IN_TILES and work == torch.float16 and head_dim <= 128 and rows <= 8
    as_measured = as_measured and old_mask is None
    pieces, held, ahead = key_pieces(format, tuple(key_ranks), head_dim * work.itemsize, words, query.device)
    tiles_each = tiles_of_program(num_tiles, heads * batch, KEY_PROGRAMS)
    score_kernel[cdiv(num_tiles, tiles_each), heads, batch](
        query, _codes(data, words), _as_pairs(ranges), pieces.table, with_mean(key_B, key_mean, pieces.order, work),
        *rope, *_mask_start(old_mask, query), *_told(seen, last, query), weights, maxima, base_2, attention_scaling,
        rows, _num_queries(old_mask), num_blocks, format.rank, *_block_sizes(format), num_tiles, tiles_each,
        row_stride(by_row), *_mask_strides(old_mask), row_stride(seen), THOUSANDS,
        TURNS=turns, RUN=run, MASK=_mask_kind(old_mask), HEADS_PER_GROUP=heads // len(key_ranks),
        HEAD_DIM=head_dim, ROWS=8 if rows <= 8 else 16, ALL_ROWS=rows <= 8, SIZES=pieces.sizes, LEAST=pieces.least,
        HELD=held, AHEAD=ahead, TILE=TILE, PART=TILE // maxima.shape[3], FORM=form,
        num_warps=WARPS, num_stages=1, **FUSED,
        **(few_registers(pieces, form[PLANES.value], query.device) if as_measured else {}),
    )  # fmt: skip


def _working_dtype(dtype: torch.dtype, *formats: LatentFormat) -> torch.dtype:
    """The dtype of latents, rebuilt keys and weights in the kernels. Packed latents come from ranges in
    float16, and float16 has three more bits than bfloat16 for what it holds."""
    packed = all(isinstance(format, PackedFormat) for format in formats)
    return torch.float16 if packed and dtype != torch.float32 else dtype


@torch.compiler.assume_constant_result
def served_on_hopper(
    bits: tuple[int, ...], rank: int, sizes: tuple[int, ...], key_ranks: tuple[int, ...], rows: int, head_dim: int,
    device: torch.device,
) -> bool:  # fmt: skip
    """Whether the kernel of hopper.py scores `rows` of queries of a KV head against such packed keys."""
    if hopper is None or not is_hopper(device):
        return False
    layout = _format(bits, rank, *sizes).layout
    return hopper.serves(layout, key_ranks, rows, head_dim) and hopper.compiles_here()


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
        splits = min(num_tiles, max(1, cdiv(wanted, beside)))
        if num_tiles >= FEW_TILES * splits:
            break
    return cdiv(num_tiles, splits)


def _sum_values(weights, maxima, data, ranges, format, heads, words, last, dtype):
    """The mean of latents for each KV head, (heads, batch * rows, rank) in `dtype`, and the maximum and the sum of
    exponentials that it is weighted by, (heads, batch, rows) float32."""
    batch, all_rows, num_tiles, _ = weights.shape
    pieces = value_pieces(format, weights.device)
    num_pieces = len(pieces.sizes)
    value_rows = 16 if all_rows <= 16 else 32
    row_tiles = cdiv(all_rows, value_rows)
    tiles_each = tiles_of_program(num_tiles, num_pieces * batch * row_tiles, VALUE_PROGRAMS)
    tiles_each = max(tiles_each, cdiv(num_tiles, MAX_SPLITS))
    splits = cdiv(num_tiles, tiles_each)
    summed = maxima.new_empty(splits, batch, all_rows, format.rank + 1)
    split_maxima = maxima.new_empty(splits, batch, all_rows)
    value_kernel[num_pieces, splits, batch * row_tiles](
        weights, maxima, _codes(data, words), _as_pairs(ranges), pieces.table, pieces.order,
        weights if last is None else last, summed, split_maxima, all_rows, data.shape[1], format.rank,
        *_block_sizes(format), num_tiles, tiles_each, row_tiles, row_stride(last), THOUSANDS,
        TOLD=last is not None, ROWS=value_rows, PART=TILE // maxima.shape[3], TILE=TILE, CHUNK=VALUE_CHUNK,
        FORM=_form(format, words), num_warps=WARPS, num_stages=1, **FUSED,
    )  # fmt: skip
    merged = weights.new_empty(heads, batch * all_rows // heads, format.rank, dtype=dtype)
    old_maxima, old_sums = maxima.new_empty(2, heads, batch, all_rows // heads)
    merge_kernel[cdiv(format.rank, 64), all_rows, batch](
        summed, split_maxima, merged, old_maxima, old_sums, splits, batch, all_rows, format.rank,
        all_rows // heads, SPLITS=power_of_2(splits), CHUNK=64, **FUSED,
    )  # fmt: skip
    return merged, old_maxima, old_sums


gpu_attend = torch.library.custom_op("cskv_hf::gpu_attend", _attend, mutates_args=())


@gpu_attend.register_fake
def _(query, *_):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def prepare_tables(factors: LayerFactors, device: torch.device, dtype: torch.dtype) -> None:
    """What the kernels keep of a layer."""
    work = _working_dtype(dtype, factors.key_format, factors.value_format)
    words = _in_words(factors.key_format, factors.value_format)
    pieces, *_ = key_pieces(factors.key_format, factors.key_ranks, factors.head_dim * work.itemsize, words, device)
    value_pieces(factors.value_format, device)
    with_mean(factors.key_B, factors.key_mean, pieces.order, work)
    transposed(factors.value_B, dtype)


@functools.cache
def key_pieces(
    format: LatentFormat, ranks: tuple[int, ...], bytes_of_channel: int, words: bool, device: torch.device
) -> tuple[Pieces, bool, bool]:
    """The channels of every group in pieces; whether a program can hold what rebuilds keys from all of them in shared
    memory; and, in registers, what it reads ahead.

    Args:
        bytes_of_channel: of a head's row of `key_B`.
        words: whether latents are read in words.
    """
    largest = min(KEY_CHUNK, max(16, 2**14 // bytes_of_channel))
    pieces, room = cut(format, ranks, 16, largest), shared_memory(device) - max(2**15, 200 * bytes_of_channel)
    held = len(pieces.sizes) <= MOST_HELD and sum(pieces.sizes) * bytes_of_channel <= room
    if not held:
        pieces = cut(format, ranks, largest, largest)
    if not held or pieces.least < len(pieces.sizes) - 1:  # at most two ways for the compiler to go
        pieces = pieces._replace(least=len(pieces.sizes))
    read_ahead, kinds = sum(pieces.sizes) * TILE // (32 * WARPS), _form(format, words)[PLANES.value]
    if words:  # eight tokens of a channel are a word of each plane, two of the one of 8 bits, and a range
        read_ahead = read_ahead // 8 * (kinds.bit_count() + kinds // 8 + 1)
    return pieces.to(device), held, held and read_ahead <= MOST_AHEAD


def few_registers(pieces: Pieces, kinds: int, device: torch.device) -> dict[str, int]:
    """How to compile so that more programs of a multiprocessor run at a time, where that was measured to be quicker:
    on an H100 four with planes of 4 bits alone and few channels, three with others.

    Args:
        kinds: of planes, as in the form.
    """
    if sum(pieces.sizes) > (48 if kinds == 4 else 96) or not is_hopper(device):
        return {}
    return dict(maxnreg=128 if kinds == 4 else 168)


@functools.cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def value_pieces(format: LatentFormat, device: torch.device) -> Pieces:
    """The channels of values, which are one group, in pieces."""
    return cut(format, (format.rank,), VALUE_CHUNK, VALUE_CHUNK).to(device)


_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def with_mean(key_B: torch.Tensor, key_mean: torch.Tensor, order: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``key_B`` transposed, (channels, group_dim) in `dtype`, as the pieces take its channels, the means of the groups
    among them. Kept, see [`_keep`]."""

    def make() -> torch.Tensor:
        means = key_mean.detach().view(-1, key_B.shape[0])
        return torch.cat([key_B.detach().mT, means]).to(dtype).index_select(0, order)

    return _keep(make, order, dtype, key_B, key_mean)


def transposed(value_B: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``value_B`` transposed, (rank, kv_dim) in `dtype`, so that neighbours in memory are read together. Kept."""
    return _keep(lambda: value_B.detach().mT.to(dtype, copy=True).contiguous(), None, dtype, value_B)


def _keep(
    make: Callable[[], torch.Tensor], order: torch.Tensor | None, dtype: torch.dtype, *factors: torch.Tensor
) -> torch.Tensor:
    """What is made of factors, for as long as the first of them lives, or what it is a view of.

    Made anew when somebody has written to them or put others in their place, but for writes to their `.data`, which
    nobody can see, and in the same place, where a CUDA graph that was recorded before reads it. Made every time of
    factors that count no writes.
    """
    first = factors[0]
    if any(t.is_inference() for t in factors):
        return make()
    kept = _kept.setdefault(first if first._base is None else first._base, {})
    key = dtype, id(order), first.device, first.shape, first.stride(), first.storage_offset()
    state = tuple(number for t in factors for number in (t.data_ptr(), t._version))
    found = kept.get(key)
    if found is not None and found[0] == state and not any(memory.expired() for memory in found[3]):
        return found[1]
    with torch.inference_mode(False), torch.no_grad():
        made = make()
        if first.is_cuda and torch.cuda.is_current_stream_capturing():
            return made  # by every replay
        if found is not None:
            made = found[1].copy_(made)
    for other in [k for k in kept if k[2] != first.device]:  # the factors have moved
        del kept[other]
    memory = [StorageWeakRef(t.untyped_storage()) for t in factors]  # others may come to lie at the same address
    kept[key] = state, made, order, memory  # the order must live, for its id to be its own
    return made


def _as_pairs(ranges: torch.Tensor) -> torch.Tensor:
    """Minimum and step, 16 bits each, as one number; plain latents have none."""
    return ranges.contiguous().view(torch.int32) if ranges.dtype == torch.float16 and ranges.shape[-1] == 2 else ranges


def _told(seen: torch.Tensor | None, last: torch.Tensor | None, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (like, like) if seen is None else (seen, last)


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
    """Whether all these latents can be read word by word: a channel has one range in a block."""
    layouts = [format.layout for format in formats if isinstance(format, PackedFormat)]
    return len(layouts) == len(formats) and all(
        layout.block_size in (32, 64) and layout.group_tokens == layout.block_size for layout in layouts
    )


def _codes(data: torch.Tensor, words: bool) -> torch.Tensor:
    return data.contiguous().view(torch.int32) if words else data.contiguous()


def _form(format: LatentFormat, words: bool) -> tuple[int, ...]:
    """How latents are stored, as the kernels are compiled for it, see triton_latents.py."""
    if not isinstance(format, PackedFormat):
        return False, words, 0, format.block_size, 1, 1, False
    layout = format.layout
    kinds = functools.reduce(int.__or__, layout.bits)
    kinds = kinds if kinds == 4 else 7 if kinds < 8 else 15  # for few ways of compiling
    nvidia = kinds == 4 and torch.version.hip is None and not INTERPRETED  # of no use with several planes
    return True, words, kinds, layout.block_size, layout.group_channels, layout.group_tokens, nvidia

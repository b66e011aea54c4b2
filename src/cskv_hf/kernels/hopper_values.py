"""Sums of packed value latents on NVIDIA's Hopper GPUs: what `value_kernel` of triton_kernels.py writes, by a kernel
that says which thread holds what.

In that kernel latents reach the product through shared memory, which limits it on such a GPU. Here a thread reads its
own share of the product from memory, see hopper_latents.py, and only the weights, which all channels share, are laid
into shared memory.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from .hopper_latents import ONE, both_halves, in_words, plane_rows, value_latents_of

TILE = gl.constexpr(64)  # tokens
CHUNK = gl.constexpr(64)  # channels of a product
NOTHING = gl.constexpr(-1e30)  # the maximum of no scores

# Numbers that change while a model generates, or that layers differ in: no kernel is compiled for each.
CHANGING = ["num_blocks", "num_tiles", "tiles_each", "row_tiles", "num_seen_stride", "rank", "block_words"]
CHANGING += ["block_ranges", "thousands"]


@gluon.jit(do_not_specialize=CHANGING)
def hopper_value_kernel(
    weights, maxima, words, ranges, pieces, order, programs, num_seen, summed, split_maxima,
    rows, num_blocks, rank, block_words, block_ranges, num_tiles, tiles_each, row_tiles, num_seen_stride, thousands,
    TOLD: gl.constexpr, ROWS: gl.constexpr, PARTS: gl.constexpr, KINDS: gl.constexpr, GROUP_CHANNELS: gl.constexpr,
):  # fmt: skip
    """Some pieces of the channels of the weighted sum of latents, over one split of the old tokens, relative to the
    split's maximum. The last channel is always one, and its sum that of the weights.

    Args:
        weights: int32 (batch, rows, num_tiles, 32), two of those of `hopper_score_kernel` or `score_kernel` each.
        maxima: (batch, rows, num_tiles, `PARTS`), of theirs.
        words, ranges: int32 (batch, num_blocks, ...), in blocks of 32 tokens.
        pieces, order: of pieces.py.
        programs: int32 (programs of a split, 2), what each sums: a kind, and its first piece.
        num_seen: see tiles.py; `TOLD` if there is one.
        summed: (splits, batch, rows, rank + 1) float32; split_maxima: (splits, batch, rows) float32.
        ROWS: of a program, a power of two from 8 on.
        KINDS: of what a program sums, (bits of the codes, pieces) each.
    """
    index, split = gl.program_id(0), gl.program_id(1)
    batch, num_batch = (gl.program_id(2) // row_tiles).to(gl.int64), gl.num_programs(2) // row_tiles
    row_0 = gl.program_id(2) % row_tiles * ROWS
    words, ranges = words + batch * num_blocks * block_words, ranges + batch * num_blocks * block_ranges
    stored = words, ranges, num_blocks, block_words, block_ranges
    first, end = split * tiles_each, gl.minimum((split + 1) * tiles_each, num_tiles)
    if TOLD:
        end = gl.minimum(end, gl.load(num_seen + batch * num_seen_stride))
    weights += batch * rows * num_tiles * (TILE // 2)
    maxima += batch * rows * num_tiles * PARTS
    target = (split * num_batch + batch) * rows
    out = summed + target * (rank + 1), order, rank
    highest = _highest(maxima, rows, row_0, first, end, num_tiles, ROWS, PARTS)
    if index == 0:
        row = row_0 + gl.arange(0, ROWS, highest.type.layout)
        gl.store(split_maxima + target + row, highest, mask=row < rows)
    kind, first_piece = gl.load(programs + 2 * index), gl.load(programs + 2 * index + 1)
    for i in gl.static_range(len(KINDS)):
        if kind == i:
            _sum(
                weights, maxima, highest, stored, pieces + 8 * first_piece, out, rows, row_0, (first, end, num_tiles),
                thousands, ROWS, PARTS, KINDS, i, GROUP_CHANNELS,
            )  # fmt: skip


@gluon.jit
def _highest(maxima, rows, row_0, first, end, num_tiles, ROWS: gl.constexpr, PARTS: gl.constexpr):
    """(ROWS,) the maximum of each row over the tiles of a split; rows that are not there are like the last."""
    FOUND: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    row = gl.minimum(row_0 + gl.arange(0, ROWS, gl.SliceLayout(1, FOUND)), rows - 1)
    found = gl.full([ROWS, 32], NOTHING, gl.float32, FOUND)
    for part_0 in range(first * PARTS, end * PARTS, 32):
        part = part_0 + gl.arange(0, 32, gl.SliceLayout(0, FOUND))
        at = (row * num_tiles * PARTS)[:, None] + part[None, :]
        found = gl.maximum(found, gl.load(maxima + at, mask=(part < end * PARTS)[None, :], other=NOTHING))
    return gl.max(found, axis=1)


@gluon.jit
def _sum(
    weights, maxima, highest, stored, pieces, out, rows, row_0, tiles, thousands,
    ROWS: gl.constexpr, PARTS: gl.constexpr, KINDS: gl.constexpr, KIND: gl.constexpr, GROUP_CHANNELS: gl.constexpr,
):  # fmt: skip
    """The sums of pieces of a kind."""
    BITS: gl.constexpr = KINDS[KIND][0]
    CHUNKS: gl.constexpr = KINDS[KIND][1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    WEIGHT: gl.constexpr = gl.BlockedLayout([1, 1, 4], [4, 8, 1], [4, 1, 1], [2, 1, 0])
    WORD: gl.constexpr = _word_layout()
    first, end, num_tiles = tiles
    staged = gl.allocate_shared_memory(
        gl.float16, [ROWS, TILE], gl.NVMMASharedLayout.get_default_for([ROWS, TILE], gl.float16)
    )
    row = gl.minimum(row_0 + gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, WEIGHT))), rows - 1)
    eight = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, WEIGHT)))
    pair = gl.arange(0, 8, gl.SliceLayout(1, gl.SliceLayout(0, WEIGHT)))[:, None] * 4
    pair += gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(0, WEIGHT)))[None, :]
    weights += (row * num_tiles * (TILE // 2))[:, None, None] + pair[None, :, :]
    maxima += (row * num_tiles * PARTS)[:, None] + (eight * PARTS // 8)[None, :]
    highest = gl.convert_layout(highest, gl.SliceLayout(1, gl.SliceLayout(2, WEIGHT)))
    own, totals, ahead = (), (), ()
    for i in gl.static_range(CHUNKS):
        own = own + (_piece(pieces + 8 * i),)
        totals = totals + (gl.zeros([CHUNK, ROWS], gl.float32, SUMS),)
        ahead = ahead + (_fetch(stored, own[i], first, BITS, GROUP_CHANNELS),)
    weights_ahead, maxima_ahead = gl.load(weights + first * (TILE // 2)), gl.load(maxima + first * PARTS)
    q = (gl.arange(0, 8, gl.SliceLayout(1, WORD)) % 4)[:, None]
    channel = gl.arange(0, CHUNK, gl.SliceLayout(0, WORD))[None, :]
    for tile in range(first, end):
        following = gl.minimum(tile + 1, num_tiles - 1)
        scale = gl.exp2(maxima_ahead - highest[:, None]).to(gl.float16)
        scaled = _products(weights_ahead, scale.to(gl.uint16, bitcast=True).to(gl.int32)[:, :, None])
        weights_ahead, maxima_ahead = gl.load(weights + following * (TILE // 2)), gl.load(maxima + following * PARTS)
        # block, eight of it, half of it, bit 0 of the byte, half of the word: as latents come
        scaled = gl.permute(gl.reshape(both_halves(scaled), (ROWS, 2, 4, 4, 2)), (0, 1, 3, 2, 4))
        staged.store(gl.reshape(scaled, (ROWS, TILE)))
        fence_async_shared()
        now, sums, ahead_of = ahead, (), ()
        for i in gl.static_range(CHUNKS):
            planes, pairs = now[i]
            pairs = gl.where(channel == own[i][2], ONE, pairs)
            latents = value_latents_of(in_words(planes, q, BITS), pairs, thousands, SUMS)
            ahead_of = ahead_of + (_fetch(stored, own[i], following, BITS, GROUP_CHANNELS),)  # in the same registers
            sums = sums + (warpgroup_mma(latents, staged.permute((1, 0)), totals[i]),)
        totals, ahead = sums, ahead_of
    sums_at, order, rank = out
    channel = gl.arange(0, CHUNK, gl.SliceLayout(1, SUMS))
    row = row_0 + gl.arange(0, ROWS, gl.SliceLayout(0, SUMS))
    for i in gl.static_range(CHUNKS):
        start, count = gl.load(pieces + 8 * i), gl.load(pieces + 8 * i + 1)
        has = channel < count
        at = (row * (rank + 1))[None, :] + gl.load(order + start + channel, mask=has, other=0)[:, None]
        gl.store(sums_at + at, totals[i], mask=has[:, None] & (row < rows)[None, :])


@gluon.jit
def _fetch(stored, piece, tile, BITS: gl.constexpr, GROUP_CHANNELS: gl.constexpr):
    """Words of every bit plane of a tile and a piece (8 eights of tokens, channels), and their ranges. In place of
    what is not there something else is read."""
    WORD: gl.constexpr = _word_layout()
    words, ranges, num_blocks, block_words, block_ranges = stored
    last, index, _, word, width, first_range = piece
    second = 2 * tile + 1 < num_blocks
    words, ranges = words + 2 * tile * block_words, ranges + 2 * tile * block_ranges
    eight = gl.arange(0, 8, gl.SliceLayout(1, WORD))
    channel = gl.minimum(gl.arange(0, CHUNK, gl.SliceLayout(0, WORD)), last)
    rows, planes = plane_rows(eight, width, BITS), ()
    for i in gl.static_range(len(rows)):
        row = eight // 4 * gl.where(second, block_words, 0) + rows[i]
        planes = planes + (gl.load(words + (row[:, None] + (word + channel)[None, :])),)
    block = eight // 4 * gl.where(second, block_ranges, 0)
    of_range = first_range + (index + channel) // GROUP_CHANNELS
    return planes, gl.load(ranges + (block[:, None] + of_range[None, :]))


@gluon.constexpr_function
def _word_layout():
    """What a thread holds of (8 eights of tokens, 64 channels): lanes 0 and 1 stand for neighbours in a row of a
    product, lanes 2 to 4 and the warp for rows, of which a thread has two that are eight apart."""
    lanes = [[1, 0], [2, 0], [0, 1], [0, 2], [0, 4]]
    return gl.DistributedLinearLayout([[4, 0], [0, 8]], lanes, [[0, 16], [0, 32]], [], [8, CHUNK])


@gluon.jit
def _products(pairs, factor):
    """Two float16 by one, in the low half of `factor`."""
    return gl.inline_asm_elementwise(
        """{
            .reg .b32 both;
            prmt.b32 both, $2, $2, 0x1010;
            mul.rn.f16x2 $0, $1, both;
        }""",
        "=r,r,r",
        [pairs, factor],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _piece(at):
    """Of a piece of pieces.py the place of its last channel, its index in its tier, the place of the constant (or -1),
    the word of its first channel, the channels of its tier and their first range."""
    count, word, width = gl.load(at + 1), gl.load(at + 3), gl.load(at + 4)
    first_range, index, constant = gl.load(at + 5), gl.load(at + 6), gl.load(at + 7)
    channels = count - constant
    return gl.maximum(channels - 1, 0), index, gl.where(constant != 0, channels, -1), word, width, first_range

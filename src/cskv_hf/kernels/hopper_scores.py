"""Scores against keys in 4 bits on NVIDIA's Hopper GPUs: what `score_kernel` of triton_kernels.py writes, by a kernel
that says where every number lies.

In that kernel, latents go through shared memory, which bounds it. Here a thread reads the very words that hold its own
share of the product that rebuilds keys: a thread's share of 16 channels and 64 tokens are two tokens of four channels;
a word has eight tokens of a channel. So 256 tokens are read at once, and taken in four parts: of all words the first
byte, the second, and so on. Which token stands where is then a matter of naming: of a part, tokens are four apart, and
the next part is one token on, so that turns of queries are all that differs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
)

TOKENS = gl.constexpr(256)  # of a tile
PARTS = gl.constexpr(4)  # of a tile, one byte of all words each
COLUMNS = gl.constexpr(8)  # of a product with queries, at least
NOTHING = gl.constexpr(-1e30)  # the maximum of no scores


@gluon.constexpr_function
def _word_layout(size, together=1):
    """(32 eights of tokens, channels or groups of them): as a product wants them from registers, four neighbours a
    thread."""
    bases = [[0, (1 << i) // together] for i in range(size.bit_length() - 1)]
    registers = [base for base in bases[:2] + bases[4:] if base[1]]
    lanes = [*bases[2:4], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[8, 0], [16, 0]], [], [32, size // together])


@gluon.constexpr_function
def _way(ways, index):
    return ways[index]


@gluon.constexpr_function
def _room(ways, index):
    """The channels that one of the ways takes."""
    return sum(ways[index]) if index >= 0 else 0


@gluon.constexpr_function
def _out_layout(rows):
    """(rows, 64 tokens of a warp by warp, tokens): as scores come out of a product."""
    bits = rows.bit_length() - 1
    # column bits 0, 1, 2 are a register and lanes 0 and 1; the last `bits` of them are the row
    of_column = [[0, 0, 0]] * (3 - bits) + [[1 << i, 0, 0] for i in range(bits)]
    registers = [[0, 0, 1], [0, 0, 2], [0, 0, 4]] + ([of_column[0]] if bits == 3 else [])
    lanes = [of_column[1], of_column[2], [0, 0, 8], [0, 0, 16], [0, 0, 32]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 1, 0], [0, 2, 0]], [], [rows, 4, 64])


@gluon.constexpr_function
def _turn_layout(half):
    """(64, half of head_dim): as each half of rebuilt keys comes out of a product."""
    registers = [[0, 1], [8, 0]] + [[0, 1 << i] for i in range(3, half.bit_length() - 1)]
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, half])


@gluon.jit(do_not_specialize=("num_blocks", "num_tiles", "tiles_each", "block_bytes", "block_ranges", "thousands"))
def hopper_score_kernel(
    query, data, ranges, pieces, key_B, cos, sin, tile_cos, tile_sin, weights, maxima,
    scaling, rows, num_blocks, block_bytes, block_ranges, num_tiles, tiles_each, thousands,
    HEADS_PER_GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, ROWS: gl.constexpr, WAYS: gl.constexpr,
    GROUP_CHANNELS: gl.constexpr, ALIGNED: gl.constexpr, AT_ONCE: gl.constexpr,
    AHEAD: gl.constexpr,
):  # fmt: skip
    """Exponentials (to base 2) of the scores of one KV head, relative to the maximum of 64 tokens, and that maximum.

    Args:
        pieces: int32 (groups, 4): first channel of a group in `key_B`, its channels with the constant, where its first
            word and its first range are in a block... (see `prepare`).
        weights, maxima: as of `score_kernel` with one part for a tile of 64 tokens.
    """
    split, head, batch = gl.program_id(0), gl.program_id(1), gl.program_id(2).to(gl.int64)
    heads = gl.num_programs(1)
    group, head_in_group = head // HEADS_PER_GROUP, head % HEADS_PER_GROUP
    pieces += group * 4
    piece = gl.load(pieces), gl.load(pieces + 1), gl.load(pieces + 2), gl.load(pieces + 3)
    data += batch * num_blocks * (block_bytes // 4)
    if ALIGNED:
        data = gl.multiple_of(data, 16)
    ranges += batch * num_blocks * block_ranges
    base = (batch * heads + head) * rows
    query += base * HEAD_DIM
    key_B += head_in_group * HEAD_DIM
    weights += base * num_tiles * 64
    maxima += base * num_tiles
    num_large = (num_tiles + 3) // 4
    tiles = split * tiles_each, gl.minimum((split + 1) * tiles_each, num_large), num_tiles, num_blocks
    sizes = block_bytes // 4, block_ranges, thousands
    turns = cos, sin, tile_cos, tile_sin
    out = weights, maxima
    for i in gl.static_range(len(WAYS)):
        if len(WAYS) == 1 or (piece[1] > _room(WAYS, i - 1)) & (piece[1] <= _room(WAYS, i)):
            _tiles(
                tiles, data, ranges, piece, key_B, turns, query, rows, scaling, out, sizes,
                HEADS_PER_GROUP * HEAD_DIM, HEAD_DIM, ROWS, WAYS, i, GROUP_CHANNELS, ALIGNED, AT_ONCE, AHEAD,
            )  # fmt: skip


@gluon.jit
def _tiles(
    tiles, data, ranges, piece, key_B, turns, query, rows, scaling, out, sizes,
    GROUP_DIM: gl.constexpr, HEAD_DIM: gl.constexpr, ROWS: gl.constexpr, WAYS: gl.constexpr, WAY: gl.constexpr,
    GROUP_CHANNELS: gl.constexpr, ALIGNED: gl.constexpr, AT_ONCE: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    HALF: gl.constexpr = HEAD_DIM // 2
    SIZES: gl.constexpr = _way(WAYS, WAY)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    TURN: gl.constexpr = _turn_layout(HALF)
    QUERY: gl.constexpr = gl.BlockedLayout([PARTS, 1, HALF // 16], [1, 2, 16], [1, 4, 1], [2, 1, 0])
    first_tile, end_tile, num_tiles, num_blocks = tiles
    cos, sin, tile_cos, tile_sin = turns
    # what rebuilds keys, for good
    factors = ()
    for i in gl.static_range(len(SIZES)):
        factors = factors + (_factor(key_B, piece, _start(SIZES, i), SIZES[i], GROUP_DIM, HEAD_DIM),)
    turned_queries = gl.allocate_shared_memory(
        gl.float16, [2, PARTS * COLUMNS, HEAD_DIM], gl.NVMMASharedLayout.get_default_for([COLUMNS, HEAD_DIM], gl.float16)
    )
    # cos and sin of the places of a part, from its first token on
    row = gl.arange(0, 64, gl.SliceLayout(1, TURN))
    eight, half = row // 16 * 8 + row % 8, row // 8 % 2
    place = eight // 4 * 32 + half * 16 + eight % 4 * 4
    at = place[:, None] * HALF + gl.arange(0, HALF, gl.SliceLayout(0, TURN))[None, :]
    c, s = gl.load(cos + at), gl.load(sin + at)
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, gl.SliceLayout(2, QUERY)))
    pair = gl.arange(0, HALF, gl.SliceLayout(0, gl.SliceLayout(1, QUERY)))
    part_of = gl.arange(0, PARTS, gl.SliceLayout(1, gl.SliceLayout(1, QUERY)))
    pair_of = gl.arange(0, HALF, gl.SliceLayout(0, gl.SliceLayout(1, QUERY)))
    of_row = gl.minimum(column // (COLUMNS // ROWS), rows - 1)
    at = (of_row * HEAD_DIM)[None, :, None] + pair[None, None, :]
    first = (gl.load(query + at).to(gl.float32) * scaling).to(gl.float16)
    second = (gl.load(query + HALF + at).to(gl.float32) * scaling).to(gl.float16)
    fetched = ()
    if AHEAD:
        fetched = _fetch_all(data, ranges, piece, first_tile, num_blocks, sizes, SIZES, GROUP_CHANNELS, ALIGNED)
    for tile in range(first_tile, end_tile):
        now = fetched
        if AHEAD:
            fetched = _fetch_all(data, ranges, piece, tile + 1, num_blocks, sizes, SIZES, GROUP_CHANNELS, ALIGNED)
        elif AT_ONCE == 1:
            now = _fetch_all(data, ranges, piece, tile, num_blocks, sizes, SIZES, GROUP_CHANNELS, ALIGNED)
        # queries as each part wants them, in one of two places, since slow warps may still read the other
        back = (tile * PARTS + part_of)[:, None] * HALF + pair_of[None, :]
        back_c, back_s = gl.load(tile_cos + back)[:, None, :], gl.load(tile_sin + back)[:, None, :]
        turned = gl.join(first * back_c + second * back_s, second * back_c - first * back_s)
        turned = gl.reshape(gl.permute(turned, (0, 1, 3, 2)), (PARTS * COLUMNS, HEAD_DIM))
        turned_queries.index(tile % 2).store(turned)
        fence_async_shared()
        gl.thread_barrier()
        scores = ()
        if AT_ONCE == 1:
            for part in gl.static_range(PARTS):
                latents = ()
                for i in gl.static_range(len(SIZES)):
                    latents = latents + (_latents(now[i], piece, _start(SIZES, i), part, sizes, SUMS),)
                keys = gl.zeros([64, HEAD_DIM], gl.float16, SUMS)
                for i in gl.static_range(len(SIZES)):
                    keys = warpgroup_mma(latents[i], factors[i], keys, use_acc=i > 0)
                queries = turned_queries.index(tile % 2).slice(part * COLUMNS, COLUMNS)
                scores = scores + (_scores(keys, c, s, queries, ROWS),)
        else:
            keys = gl.zeros([64, HEAD_DIM], gl.float16, SUMS)
            keys = keys, keys, keys, keys
            following = _fetch(data, ranges, piece, tile, 0, SIZES[0], num_blocks, sizes, GROUP_CHANNELS, ALIGNED)
            for i in gl.static_range(len(SIZES)):
                words = following
                if i + 1 < len(SIZES):
                    following = _fetch(
                        data, ranges, piece, tile, _start(SIZES, i + 1), SIZES[i + 1], num_blocks, sizes, GROUP_CHANNELS,
                        ALIGNED,
                    )  # fmt: skip
                summed = ()
                for part in gl.static_range(PARTS):
                    latents = _latents(words, piece, _start(SIZES, i), part, sizes, SUMS)
                    summed = summed + (warpgroup_mma(latents, factors[i], keys[part], use_acc=i > 0),)
                keys = summed
            for part in gl.static_range(PARTS):
                queries = turned_queries.index(tile % 2).slice(part * COLUMNS, COLUMNS)
                scores = scores + (_scores(keys[part], c, s, queries, ROWS),)
        _exponentials(scores, tile, num_tiles, num_blocks, rows, out, ROWS)


@gluon.constexpr_function
def _start(sizes, index):
    """The first channel of a part of the channels."""
    return sum(sizes[:index])


@gluon.jit
def _fetch_all(
    data, ranges, piece, tile, num_blocks, sizes, SIZES: gl.constexpr, GROUP_CHANNELS: gl.constexpr,
    ALIGNED: gl.constexpr,
):  # fmt: skip
    fetched = ()
    for i in gl.static_range(len(SIZES)):
        fetched = fetched + (
            _fetch(data, ranges, piece, tile, _start(SIZES, i), SIZES[i], num_blocks, sizes, GROUP_CHANNELS, ALIGNED),
        )
    return fetched


@gluon.jit
def _factor(
    key_B, piece, START: gl.constexpr, SIZE: gl.constexpr, GROUP_DIM: gl.constexpr, HEAD_DIM: gl.constexpr
):  # fmt: skip
    """(SIZE, HEAD_DIM) of what rebuilds a head's keys, in shared memory, channels in the order of [`_latents`]."""
    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    column = gl.arange(0, SIZE, gl.SliceLayout(1, LOADED))
    channel = START + column // 16 * 16 + column // 2 % 4 * 4 + column // 8 % 2 * 2 + column % 2
    at = (piece[0] + channel)[:, None] * GROUP_DIM + gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LOADED))[None, :]
    factor = gl.load(key_B + at, mask=(channel < piece[1])[:, None], other=0)
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIZE, HEAD_DIM], gl.float16)
    return gl.allocate_shared_memory(gl.float16, [SIZE, HEAD_DIM], SHARED, factor)


@gluon.jit
def _fetch(
    data, ranges, piece, tile, START: gl.constexpr, SIZE: gl.constexpr, num_blocks, sizes,
    GROUP_CHANNELS: gl.constexpr, ALIGNED: gl.constexpr,
):  # fmt: skip
    """Words and ranges (32 eights of tokens, SIZE channels) of a tile."""
    WORD: gl.constexpr = _word_layout(SIZE)
    block_words, block_ranges, _ = sizes
    eight = gl.arange(0, 32, gl.SliceLayout(1, WORD))
    block = gl.minimum(tile * (TOKENS // 32) + eight // 4, num_blocks - 1)
    stored = piece[1] - 1  # the last is the constant
    channel = START + gl.arange(0, SIZE, gl.SliceLayout(0, WORD))
    if ALIGNED:  # by fours
        channel = gl.minimum(channel // 4, (stored - 1) // 4) * 4 + channel % 4
    else:
        channel = gl.minimum(channel, stored - 1)
    # `word`: the first row's; rows of a tier are `width` apart
    word, width = piece[2], block_words // 4
    at = (block * block_words + eight % 4 * width)[:, None] + (word + channel)[None, :]
    if ALIGNED:
        words = gl.load(data + gl.max_contiguous(gl.multiple_of(at, [1, 4]), [1, 4]))
        FOURS: gl.constexpr = _word_layout(SIZE, 4)
        eight = gl.arange(0, 32, gl.SliceLayout(1, FOURS))
        block = gl.minimum(tile * (TOKENS // 32) + eight // 4, num_blocks - 1)
        channel = START + gl.arange(0, SIZE // 4, gl.SliceLayout(0, FOURS)) * 4
        channel = gl.minimum(channel, stored - 1)
    else:
        words = gl.load(data + at)
    at = (block * block_ranges)[:, None] + ((word + channel) // GROUP_CHANNELS + piece[3])[None, :]
    return words, gl.load(ranges + at)


@gluon.jit
def _latents(fetched, piece, START: gl.constexpr, part: gl.constexpr, sizes, SUMS: gl.constexpr):
    """(64 tokens, channels) of one part, as a product wants them from registers."""
    words, pair = fetched
    SIZE: gl.constexpr = words.shape[1]
    first, second = gl.split(gl.reshape(words, (32, SIZE // 2, 2)))
    if pair.shape[1] < SIZE:  # of four channels
        channel = START + gl.arange(0, SIZE // 4, gl.SliceLayout(0, pair.type.layout)) * 4
        pair = gl.where((channel == piece[1] - 1)[None, :], 0x3C00, pair)
        minimum, step = _two_halves(pair, pair, 0x5410), _two_halves(pair, pair, 0x7632)
        minimum = gl.convert_layout(gl.reshape(gl.join(minimum, minimum), (32, SIZE // 2)), first.type.layout, True)
        step = gl.convert_layout(gl.reshape(gl.join(step, step), (32, SIZE // 2)), first.type.layout, True)
    else:
        channel = START + gl.arange(0, SIZE, gl.SliceLayout(0, words.type.layout))
        pair = gl.where((channel == piece[1] - 1)[None, :], 0x3C00, pair)  # the constant: a minimum of 1, a step of 0
        minimum, step = gl.split(gl.reshape(pair, (32, SIZE // 2, 2)))
        minimum, step = _two_halves(minimum, step, 0x5410), _two_halves(minimum, step, 0x7632)
    both = _two_halves(first, second, 0x5410 if part < 2 else 0x7632)
    early = _two_values(both >> (8 * (part % 2)), step, minimum, sizes[2])
    late = _two_values(both >> (8 * (part % 2) + 4), step, minimum, sizes[2])
    x = gl.join(early, late)
    low = (x & 0xFFFF).to(gl.uint16).to(gl.float16, bitcast=True)
    high = (x >> 16).to(gl.uint16).to(gl.float16, bitcast=True)
    # warp, eight, sixteen, bits 3, 2, 1 of the channel, half, bit 0
    x = gl.reshape(gl.join(low, high), (4, 8, SIZE // 16, 2, 2, 2, 2, 2))
    x = gl.reshape(gl.permute(x, (0, 6, 1, 2, 5, 3, 4, 7)), (64, SIZE))
    return gl.convert_layout(x, gl.DotOperandLayout(0, SUMS, 2), assert_trivial=True)


@gluon.jit
def _two_halves(a, b, which: gl.constexpr):
    """The low, or the high halves of two words in one."""
    if which == 0x5410:
        return gl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        return gl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1
        )


@gluon.jit
def _two_values(codes, step, minimum, thousands):
    """Two latents of the codes in the last bits of both halves."""
    return gl.inline_asm_elementwise(
        """{
            .reg .b32 code, minus;
            mov.b32 minus, 0xE400E400;  // -1024, twice
            lop3.b32 code, $1, 0x000F000F, $4, 0xEA;
            add.f16x2 code, code, minus;
            fma.rn.f16x2 $0, code, $2, $3;
        }""",
        "=r,r,r,r,r",
        [codes, step, minimum, thousands],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _turned(x, y, c, s, MINUS: gl.constexpr):
    """x c - y s, or x c + y s, of pairs: as single numbers, ptxas takes sums of a product for read too early."""
    return gl.inline_asm_elementwise(
        """{
            .reg .b32 other;
            mul.f16x2 other, $2, $4;
            """ + ("neg.f16x2 other, other;" if MINUS else "") + """
            fma.rn.f16x2 $0, $1, $3, other;
        }""",
        "=r,r,r,r,r",
        [x, y, c, s],
        dtype=gl.float16,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _scores(keys, c, s, queries, ROWS: gl.constexpr):
    """(64, ROWS) scores of a part, of rebuilt keys and queries (columns, head_dim) in shared memory."""
    HEAD_DIM: gl.constexpr = keys.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    TURN: gl.constexpr = c.type.layout
    first, second = gl.split(gl.permute(gl.reshape(keys, (64, 2, HEAD_DIM // 2)), (0, 2, 1)))
    first, second = gl.convert_layout(first, TURN, True), gl.convert_layout(second, TURN, True)
    turned = gl.permute(gl.join(_turned(first, second, c, s, True), _turned(second, first, c, s, False)), (0, 2, 1))
    turned = gl.convert_layout(gl.reshape(turned, (64, HEAD_DIM)), gl.DotOperandLayout(0, SCORES, 2), True)
    scores = gl.zeros([64, COLUMNS], gl.float32, SCORES)
    scores = warpgroup_mma(turned, queries.permute((1, 0)), scores, use_acc=False)
    if ROWS < COLUMNS:  # each came several times
        scores = gl.max(gl.reshape(scores, (64, ROWS, COLUMNS // ROWS)), axis=2)
    return scores


@gluon.jit
def _exponentials(scores, tile, num_tiles, num_blocks, rows, out, ROWS: gl.constexpr):
    weights, maxima = out
    OUT: gl.constexpr = _out_layout(ROWS)
    # rows of a part: warp, half, eight; then rows of queries, and the two bits of a part
    x = gl.join(gl.join(scores[0], scores[1]), gl.join(scores[2], scores[3]))
    x = gl.permute(gl.reshape(x, (4, 2, 8, ROWS, 2, 2)), (3, 0, 2, 1, 4, 5))
    x = gl.convert_layout(gl.reshape(x, (ROWS, 4, 64)), OUT, True)
    of_tile = tile * 4 + gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, OUT)))[None, :]
    token = gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, OUT)))
    token = gl.expand_dims(gl.expand_dims(token, 0), 1)
    if (tile + 1) * (TOKENS // 32) > num_blocks:  # the last
        x = gl.where(gl.expand_dims(of_tile, 2) * 2 + token // 32 < num_blocks, x, NOTHING)
    maximum = gl.max(x, axis=2)
    x = gl.exp2(x - gl.expand_dims(maximum, 2)).to(gl.float16)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, OUT)))[:, None]
    there = (row < rows) & (of_tile < num_tiles)
    at = row * num_tiles + of_tile
    gl.store(maxima + at, maximum, mask=there)
    gl.store(weights + (gl.expand_dims(at * 64, 2) + token), x, mask=gl.expand_dims(there, 2) & (token >= 0))

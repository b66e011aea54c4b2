"""The Triton kernels of attention over a compressed past; gpu.py says how they work together, and launches them.

They take a *tile* of tokens and a *piece* of a group's channels at a time. Where blocks are packed in words and have
one range per channel, a tile is read word by word, and its tokens are ordered as they come out: eight tokens of one
channel lie in the same places of a word of every plane, whether it has 4, 2 or 1 bits. Weights are stored in that
order too, and nothing else needs to know it.

Three things decided the shape, by the machine code and by measurements on an H200: no instruction per code that could
be one per word; what a tile needs from memory is asked for while the tile before is worked on; and registers are what
is short, so that cos and sin share one.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING = tl.constexpr(-1e30)  # the maximum of no scores; finite, so that differences of two are


@triton.jit
def _token_in_tile(column, BLOCK: tl.constexpr, WORDS: tl.constexpr):
    """Which token of its tile a column of latents is."""
    if WORDS:
        eight = column // 8
        return eight // (BLOCK // 8) * BLOCK + (column % 2) * (BLOCK // 2) + eight % (BLOCK // 8) * 4 + column // 2 % 4
    else:
        return column


@triton.jit
def _field(channels, num_channels, start, count, CHUNK: tl.constexpr, FIELD: tl.constexpr):
    """One number of each channel of a piece, see `describe` in gpu.py; 0 beyond the piece."""
    channel = tl.arange(0, CHUNK)
    return tl.load(channels + FIELD * num_channels + start + channel, mask=channel < count, other=0)


@triton.jit
def _plane(channels, num_channels, start, count, q, BLOCK: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr):
    """Where in a block the words of one kind of plane lie, (eights, channels), and what a code of all ones and one
    more is worth in steps: 0 of channels without such a plane, which read whatever is there."""
    FIELD: tl.constexpr = 4 if BITS == 8 else 7 if BITS == 4 else 10 if BITS == 2 else 13
    first = _field(channels, num_channels, start, count, CHUNK, FIELD)
    width = _field(channels, num_channels, start, count, CHUNK, FIELD + 1)
    worth = _field(channels, num_channels, start, count, CHUNK, FIELD + 2)
    words: tl.constexpr = BLOCK * BITS // 32
    return first[None, :] + (q % words)[:, None] * width[None, :], worth.to(tl.float32)[None, :]


@triton.jit
def _piece(
    pieces, index, end, channels, num_channels,
    BLOCK: tl.constexpr, WORDS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """All that is known of a piece: its first channel, channels and planes, the range of each channel (-1 of the one
    that is always one), and where the words lie, if they are read as such. Nothing is in pieces from `end` on."""
    at = pieces + 3 * tl.minimum(index, end - 1)
    start, count, planes = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    count, planes = tl.where(index < end, count, 0), tl.where(index < end, planes, 0)
    of_range = _field(channels, num_channels, start, count, CHUNK, 3)[None, :]
    if WORDS:
        q = tl.arange(0, TILE // 8) % (BLOCK // 8)
        half = BLOCK // 8 * _field(channels, num_channels, start, count, CHUNK, 5)[None, :]
        of_8 = _plane(channels, num_channels, start, count, q, BLOCK, CHUNK, 8)
        of_4 = _plane(channels, num_channels, start, count, q, BLOCK, CHUNK, 4)
        of_2 = _plane(channels, num_channels, start, count, q, BLOCK, CHUNK, 2)
        of_1 = _plane(channels, num_channels, start, count, q, BLOCK, CHUNK, 1)
        return start, count, planes, of_range, (half, of_8, of_4, of_2, of_1)
    else:
        return start, count, planes, of_range, 0


@triton.jit
def _of_row(
    data, ranges, batch, num_tokens, rank, block_bytes, block_ranges,
    BLOCK: tl.constexpr, PACKED: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Where the codes and the ranges of a row of the batch begin."""
    if PACKED:
        blocks = batch * (num_tokens // BLOCK)
        return data + blocks * (block_bytes // 4 if WORDS else block_bytes), ranges + blocks * block_ranges
    else:
        return data + batch * num_tokens * rank, ranges


@triton.jit
def _fetch(
    data, ranges, piece, channels, num_channels, tile, num_tokens, rank, block_bytes, block_ranges,
    BLOCK: tl.constexpr, GROUPS: tl.constexpr, GROUP_TOKENS: tl.constexpr, PACKED: tl.constexpr,
    WORDS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What is to be read of a tile and a piece, which [`_latents`] makes latents of. Tokens that are not there are
    read from the last block or token."""
    start, count, planes, of_range, where = piece
    if WORDS:
        half, of_8, of_4, of_2, of_1 = where
        eight = tl.arange(0, TILE // 8)
        block = tl.minimum(tile * (TILE // BLOCK) + eight // (BLOCK // 8), num_tokens // BLOCK - 1)[:, None]
        words = data + block * (block_bytes // 4)
        pair = tl.load(ranges + block * block_ranges + tl.maximum(of_range, 0))
        word_4 = tl.load(words + of_4[0], mask=of_4[0] * 0 + (planes & 4) != 0, other=0)
        word_2 = tl.load(words + of_2[0], mask=of_2[0] * 0 + (planes & 2) != 0, other=0)
        word_1 = tl.load(words + of_1[0], mask=of_1[0] * 0 + (planes & 1) != 0, other=0)
        low_8 = tl.load(words + of_8[0], mask=of_8[0] * 0 + (planes & 8) != 0, other=0)
        high_8 = tl.load(words + (of_8[0] + half), mask=of_8[0] * 0 + (planes & 8) != 0, other=0)
        return pair, low_8, high_8, word_4, word_2, word_1
    else:
        token = tl.minimum(tile * TILE + tl.arange(0, TILE), num_tokens - 1)
        first = _field(channels, num_channels, start, count, CHUNK, 0)[None, :]
        if PACKED:
            width = _field(channels, num_channels, start, count, CHUNK, 1)[None, :]
            bits = _field(channels, num_channels, start, count, CHUNK, 2)[None, :]
            block, in_block = token // BLOCK, token % BLOCK
            code = _codes(data, (block.to(tl.int64) * block_bytes)[:, None], in_block, first, width, bits, BLOCK)
            # ranges of a tier lie time by time, and `width` is the number of its channels
            groups, time = (width + GROUPS - 1) // GROUPS, (in_block // GROUP_TOKENS)[:, None]
            pair = tl.load(ranges + (block * block_ranges)[:, None] + tl.maximum(of_range, 0) + time * groups)
            minimum, step = _minimum_and_step(pair, of_range)
            return minimum + step * code.to(tl.float32)
        else:
            there = (of_range >= 0) & (tl.arange(0, CHUNK) < count)[None, :]
            return tl.load(data + token.to(tl.int64)[:, None] * rank + first, mask=there, other=0)


@triton.jit
def _latents(
    fetched, piece, one,
    BLOCK: tl.constexpr, WORDS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """(CHUNK, TILE) latents of what [`_fetch`] gave, columns in the order of [`_token_in_tile`].

    Args:
        one: the bits of 1.0; as a constant of the code they would cost an instruction for each code.
    """
    _, _, planes, of_range, where = piece
    if WORDS:
        pair, low_8, high_8, word_4, word_2, word_1 = fetched
        _, of_8, of_4, of_2, of_1 = where
        q = (tl.arange(0, TILE // 8) % (BLOCK // 8))[:, None]
        minimum, step = _minimum_and_step(pair, of_range)
        start = minimum - step * (of_8[1] + of_4[1] + of_2[1] + of_1[1])  # a code of zero is 1, see `_code`
        eight = start, start, start, start, start, start, start, start
        if planes & 8 != 0:
            eight = _with_plane(eight, low_8, high_8, step * of_8[1], one, HIGH=0, BITS=8)
        if planes & 4 != 0:
            eight = _with_plane(eight, word_4, word_4, step * of_4[1], one, HIGH=4, BITS=4)
        if planes & 2 != 0:
            word = word_2 >> (2 * (q // (BLOCK // 16)))
            eight = _with_plane(eight, word, word, step * of_2[1], one, HIGH=4, BITS=2)
        if planes & 1 != 0:
            word = word_1 >> (q // (BLOCK // 32))
            eight = _with_plane(eight, word, word, step * of_1[1], one, HIGH=4, BITS=1)
        a, b, c, d, e, f, g, h = eight
        first = tl.join(tl.join(a.to(DTYPE), b.to(DTYPE)), tl.join(c.to(DTYPE), d.to(DTYPE)))
        second = tl.join(tl.join(e.to(DTYPE), f.to(DTYPE)), tl.join(g.to(DTYPE), h.to(DTYPE)))
        both = tl.join(first, second)  # (eight, channel, half, byte % 2, byte / 2)
        return tl.reshape(tl.permute(both, (1, 0, 4, 3, 2)), (CHUNK, TILE))
    else:
        return tl.trans(tl.where(of_range < 0, 1.0, fetched).to(DTYPE))


@triton.jit
def _minimum_and_step(pair, of_range):
    """Of each channel, float32; of the channel that is always one, 1 and anything."""
    minimum = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    step = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where(of_range < 0, 1.0, minimum), step


@triton.jit
def _with_plane(latents, low_word, high_word, scale, one, HIGH: tl.constexpr, BITS: tl.constexpr):
    """Adds a plane to the latents of eight tokens: of bytes 0 to 3, in each of the low half of the block and the high
    one."""
    a, b, c, d, e, f, g, h = latents
    a += scale * _code(low_word, one, 0, BITS)
    b += scale * _code(high_word, one, HIGH, BITS)
    c += scale * _code(low_word, one, 8, BITS)
    d += scale * _code(high_word, one, 8 + HIGH, BITS)
    e += scale * _code(low_word, one, 16, BITS)
    f += scale * _code(high_word, one, 16 + HIGH, BITS)
    g += scale * _code(low_word, one, 24, BITS)
    h += scale * _code(high_word, one, 24 + HIGH, BITS)
    return a, b, c, d, e, f, g, h


@triton.jit
def _code(word, one, PLACE: tl.constexpr, BITS: tl.constexpr):
    """1 + code / 2**BITS, of the code at some place of a word: its bits become a float's, beside those of `one`."""
    up: tl.constexpr = 23 - BITS
    moved = word >> (PLACE - up) if up <= PLACE else word << (up - PLACE)
    return ((moved & (((1 << BITS) - 1) << up)) | one).to(tl.float32, bitcast=True)


@triton.jit
def _codes(data, row_0, token, first, width, bits, BLOCK: tl.constexpr):
    """Codes (tokens, channels), one by one: binary digits of `bits` are the widths of a channel's planes, wide ones
    first.

    Args:
        data: bytes.
        row_0: (tokens, 1), first byte of the block.
        token: in the block.
        first: (1, channels), first word of a channel, or byte if rows do not make words; `width` to the next.
    """
    UNIT: tl.constexpr = 32 if BLOCK % 32 == 0 else 8
    code = _byte(data, row_0, token, first, width, bits == 8, BLOCK)
    rows: tl.constexpr = BLOCK // 2
    pair = _byte(data, row_0, token % rows, first, width, bits & 4 != 0, BLOCK)
    code += (pair >> (4 * (token // rows))[:, None]) & 15
    rows_2: tl.constexpr = BLOCK // 4
    first_2 = first + (bits & 4) * (BLOCK // UNIT) * width
    four = _byte(data, row_0, token % rows_2, first_2, width, bits & 2 != 0, BLOCK)
    code += ((four >> (2 * (token // rows_2))[:, None]) & 3) << (bits & 4)
    rows_1: tl.constexpr = BLOCK // 8
    first_1 = first + (bits & 6) * (BLOCK // UNIT) * width
    eight = _byte(data, row_0, token % rows_1, first_1, width, bits & 1 != 0, BLOCK)
    return code + (((eight >> (token // rows_1)[:, None]) & 1) << (bits & 6))


@triton.jit
def _byte(data, row_0, row, first, width, has, BLOCK: tl.constexpr):
    """Bytes (tokens, channels) of rows of a plane."""
    TOGETHER: tl.constexpr = 4 if BLOCK % 32 == 0 else 1
    at = row_0 + TOGETHER * (first + (row // TOGETHER)[:, None] * width) + (row % TOGETHER)[:, None]
    return tl.load(data + at, mask=has, other=0).to(tl.int32)


@triton.jit
def _factor(
    key_B, piece, head_in_group, GROUP_DIM: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """What rebuilds both halves of a head's keys from a piece of the channels: (CHUNK, HEAD_DIM / 2) each."""
    start, count, _, _, _ = piece
    channel = tl.arange(0, CHUNK)
    column = head_in_group * HEAD_DIM + tl.arange(0, HEAD_DIM // 2)
    at = key_B + (start + channel)[:, None] * GROUP_DIM + column[None, :]
    there = (channel < count)[:, None]
    return tl.load(at, mask=there, other=0), tl.load(at + HEAD_DIM // 2, mask=there, other=0)


@triton.jit
def _rebuilt(halves, latents, factor):
    """Adds what latents (CHUNK, TILE) of a piece give to both halves of a head's keys, (TILE, HEAD_DIM / 2) each."""
    first, second = halves
    first = tl.dot(tl.trans(latents), factor[0], first, input_precision="ieee")
    second = tl.dot(tl.trans(latents), factor[1], second, input_precision="ieee")
    return first, second


@triton.jit
def _one_register(c, s, DTYPE: tl.constexpr):
    """cos and sin as one number, 16 bits each."""
    lower = c.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.int32)
    return s.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.int32) << 16 | lower


@triton.jit
def _two_numbers(pair, DTYPE: tl.constexpr):
    """Undo [`_one_register`], to float32, whose upper bits are a bfloat16."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
    else:
        upper = (pair >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
        return (pair & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32), upper.to(tl.float32)


# Numbers that change while a model generates; a kernel compiled for each kind of them would interrupt it.
CHANGING = ["num_queries", "num_tiles", "tiles_each", "turn_stride", "mask_batch", "mask_query"]


@triton.jit(do_not_specialize=CHANGING)
def score_kernel(
    query, data, ranges, channels, pieces, first_piece, key_B, cos, sin, tile_cos, tile_sin, mask,
    weights, maxima,
    scaling, rows, num_queries, num_tokens, rank, num_channels, block_bytes, block_ranges, num_tiles, tiles_each,
    turn_stride, mask_batch, mask_query, one,
    IN_TILES: tl.constexpr, MASK: tl.constexpr, HEADS_PER_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr, PIECES: tl.constexpr, PREFETCH: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, GROUPS: tl.constexpr, GROUP_TOKENS: tl.constexpr, PACKED: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Exponentials of the scores of one KV head against some tiles of old tokens, relative to the maximum of each
    tile, and that maximum.

    With up to `PIECES` of a head's channels, what rebuilds keys from them is held ready; with `PREFETCH`, so is what
    the next tile needs. With 0 pieces they are taken one by one, as many as there are.
    """
    split, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    HALF: tl.constexpr = HEAD_DIM // 2
    DTYPE: tl.constexpr = query.dtype.element_ty
    GROUP_DIM: tl.constexpr = HEADS_PER_GROUP * HEAD_DIM
    pair, in_tile = tl.arange(0, HALF), _token_in_tile(tl.arange(0, TILE), BLOCK, WORDS)
    data, ranges = _of_row(data, ranges, batch, num_tokens, rank, block_bytes, block_ranges, BLOCK, PACKED, WORDS)
    base = (batch * tl.num_programs(1) + head) * rows
    query += base * HEAD_DIM
    group, head_in_group = head // HEADS_PER_GROUP, head % HEADS_PER_GROUP
    begin, end = tl.load(first_piece + group), tl.load(first_piece + group + 1)
    if IN_TILES:  # the same of all tiles
        turn_at = in_tile[:, None] * HALF + pair[None, :]
        turn = _one_register(tl.load(cos + turn_at), tl.load(sin + turn_at), DTYPE)
    known, factors, ahead = (), (), ()
    for i in tl.static_range(PIECES):
        known = known + (_piece(pieces, begin + i, end, channels, num_channels, BLOCK, WORDS, TILE, CHUNK),)
        factors = factors + (_factor(key_B, known[i], head_in_group, GROUP_DIM, HEAD_DIM, CHUNK),)
        if PREFETCH:
            fetched = _fetch(
                data, ranges, known[i], channels, num_channels, split * tiles_each, num_tokens, rank, block_bytes,
                block_ranges, BLOCK, GROUPS, GROUP_TOKENS, PACKED, WORDS, TILE, CHUNK,
            )  # fmt: skip
            ahead = ahead + (fetched,)
    for tile in range(split * tiles_each, tl.minimum((split + 1) * tiles_each, num_tiles)):
        token = tile * TILE + in_tile
        live = token < num_tokens
        now, ahead = ahead, ()
        if PREFETCH:
            for i in tl.static_range(PIECES):
                fetched = _fetch(
                    data, ranges, known[i], channels, num_channels, tl.minimum(tile + 1, num_tiles - 1), num_tokens,
                    rank, block_bytes, block_ranges, BLOCK, GROUPS, GROUP_TOKENS, PACKED, WORDS, TILE, CHUNK,
                )  # fmt: skip
                ahead = ahead + (fetched,)
        if IN_TILES:
            back = tl.load(tile_cos + tile * HALF + pair), tl.load(tile_sin + tile * HALF + pair)
            c, s = _two_numbers(turn, DTYPE)
        else:
            back = 0, 0
            turn_at = batch * turn_stride + token[:, None] * HALF + pair[None, :]
            c = tl.load(cos + turn_at, mask=live[:, None], other=0)
            s = tl.load(sin + turn_at, mask=live[:, None], other=0)
        halves = tl.zeros([TILE, HALF], dtype=tl.float32), tl.zeros([TILE, HALF], dtype=tl.float32)
        for i in tl.static_range(PIECES):
            if PREFETCH:
                latents = _latents(now[i], known[i], one, BLOCK, WORDS, TILE, CHUNK, DTYPE)
            else:
                fetched = _fetch(
                    data, ranges, known[i], channels, num_channels, tile, num_tokens, rank, block_bytes, block_ranges,
                    BLOCK, GROUPS, GROUP_TOKENS, PACKED, WORDS, TILE, CHUNK,
                )  # fmt: skip
                latents = _latents(fetched, known[i], one, BLOCK, WORDS, TILE, CHUNK, DTYPE)
            if i == 0:  # noqa: SIM114 (decided while compiling; pieces that not every head has are a branch)
                halves = _rebuilt(halves, latents, factors[i])
            elif begin + i < end:
                halves = _rebuilt(halves, latents, factors[i])
        if PIECES == 0:
            for index in range(begin, end):
                piece = _piece(pieces, index, end, channels, num_channels, BLOCK, WORDS, TILE, CHUNK)
                of_piece = _fetch(
                    data, ranges, piece, channels, num_channels, tile, num_tokens, rank, block_bytes, block_ranges,
                    BLOCK, GROUPS, GROUP_TOKENS, PACKED, WORDS, TILE, CHUNK,
                )  # fmt: skip
                latents_of_piece = _latents(of_piece, piece, one, BLOCK, WORDS, TILE, CHUNK, DTYPE)
                factor = _factor(key_B, piece, head_in_group, GROUP_DIM, HEAD_DIM, CHUNK)
                halves = _rebuilt(halves, latents_of_piece, factor)
        first, second = halves
        turned = (first * c - second * s).to(DTYPE), (second * c + first * s).to(DTYPE)
        for row_0 in range(0, rows, ROWS):
            row = row_0 + tl.arange(0, ROWS)
            scores = _scores(turned, query, row, rows, scaling, back, IN_TILES, HEAD_DIM)
            there = live[:, None] & (row < rows)[None, :]
            of_query = batch * mask_batch + (row % num_queries)[None, :] * mask_query
            scores = _masked(scores, mask, of_query, token[:, None], there, MASK)
            maximum = tl.maximum(tl.max(scores, axis=0), NOTHING)
            exponentials = tl.exp(scores - maximum[None, :])
            of_tile = (base + row) * num_tiles + tile
            tl.store(maxima + of_tile, maximum, mask=row < rows)
            at = of_tile[None, :] * TILE + tl.arange(0, TILE)[:, None]
            tl.store(weights + at, exponentials.to(weights.dtype.element_ty), mask=(row < rows)[None, :])


@triton.jit
def _scores(turned, query, row, rows, scaling, back, IN_TILES: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(TILE, rows) scores of some queries against both halves of turned keys."""
    DTYPE: tl.constexpr = turned[0].dtype
    at = query + row[None, :] * HEAD_DIM + tl.arange(0, HEAD_DIM // 2)[:, None]
    there = (row < rows)[None, :]
    first = tl.load(at, mask=there, other=0).to(tl.float32) * scaling
    second = tl.load(at + HEAD_DIM // 2, mask=there, other=0).to(tl.float32) * scaling
    if IN_TILES:  # turn the few queries back to where the tile starts, not all its keys on
        straight, c, s = first, back[0][:, None], back[1][:, None]
        first = straight * c + second * s
        second = second * c - straight * s
    scores = tl.dot(turned[0], first.to(DTYPE), input_precision="ieee")
    return tl.dot(turned[1], second.to(DTYPE), scores, input_precision="ieee")


@triton.jit
def _masked(scores, mask, of_query, column, there, MASK: tl.constexpr):
    """Scores under a mask: none (0), of bytes that say what is seen (1), or of floats to be added (2)."""
    if MASK != 0:
        seen = tl.load(mask + of_query + column, mask=there, other=0)
        if MASK == 1:
            scores = tl.where(seen != 0, scores, float("-inf"))
        else:
            scores += seen.to(tl.float32)
    return tl.where(there, scores, float("-inf"))


@triton.jit(do_not_specialize=["num_tiles", "tiles_each"])
def value_kernel(
    weights, maxima, data, ranges, channels, pieces, summed, split_maxima,
    rows, num_tokens, rank, num_channels, block_bytes, block_ranges, num_tiles, tiles_each, row_tiles, one,
    ROWS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    GROUP_TOKENS: tl.constexpr, PACKED: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One piece of the channels of the weighted sum of latents, over one split of the old tokens, relative to the
    split's maximum. The last channel is always one, and its sum that of the weights."""
    index, split = tl.program_id(0), tl.program_id(1)
    batch, num_batch = (tl.program_id(2) // row_tiles).to(tl.int64), tl.num_programs(2) // row_tiles
    row = tl.program_id(2) % row_tiles * ROWS + tl.arange(0, ROWS)
    there = row < rows
    DTYPE: tl.constexpr = weights.dtype.element_ty
    data, ranges = _of_row(data, ranges, batch, num_tokens, rank, block_bytes, block_ranges, BLOCK, PACKED, WORDS)
    piece = _piece(pieces, index, index + 1, channels, num_channels, BLOCK, WORDS, TILE, CHUNK)
    of_row = (batch * rows + row) * num_tiles
    begin, end = split * tiles_each, tl.minimum((split + 1) * tiles_each, num_tiles)
    highest = tl.zeros([ROWS], dtype=tl.float32) + NOTHING
    for tile in range(begin, end, 16):
        tiles = tile + tl.arange(0, 16)
        inside = there[:, None] & (tiles < end)[None, :]
        found = tl.load(maxima + of_row[:, None] + tiles[None, :], mask=inside, other=NOTHING)
        highest = tl.maximum(highest, tl.max(found, axis=1))
    of_tile = weights + of_row[:, None] * TILE + tl.arange(0, TILE)[None, :]
    ahead = _fetch(
        data, ranges, piece, channels, num_channels, begin, num_tokens, rank, block_bytes, block_ranges, BLOCK, GROUPS,
        GROUP_TOKENS, PACKED, WORDS, TILE, CHUNK,
    )  # fmt: skip
    weights_ahead = tl.load(of_tile + begin * TILE, mask=there[:, None], other=0)
    total = tl.zeros([CHUNK, ROWS], dtype=tl.float32)
    for tile in range(begin, end):
        now, weights_now, next_tile = ahead, weights_ahead, tl.minimum(tile + 1, num_tiles - 1)
        ahead = _fetch(
            data, ranges, piece, channels, num_channels, next_tile, num_tokens, rank, block_bytes, block_ranges, BLOCK,
            GROUPS, GROUP_TOKENS, PACKED, WORDS, TILE, CHUNK,
        )  # fmt: skip
        weights_ahead = tl.load(of_tile + next_tile * TILE, mask=there[:, None], other=0)
        latents = _latents(now, piece, one, BLOCK, WORDS, TILE, CHUNK, DTYPE)
        scale = tl.exp(tl.load(maxima + of_row + tile, mask=there, other=NOTHING) - highest)
        total += tl.dot(latents, tl.trans(weights_now), input_precision="ieee") * scale[None, :]
    target = (split * num_batch + batch) * rows + row
    start, count, _, _, _ = piece
    channel = tl.arange(0, CHUNK)
    at = summed + target[None, :] * num_channels + (start + channel)[:, None]
    tl.store(at, total, mask=there[None, :] & (channel < count)[:, None])
    if index == 0:
        tl.store(split_maxima + target, highest, mask=there)


@triton.jit(do_not_specialize=["num_splits"])
def merge_kernel(
    summed, split_maxima, merged, maxima, sums,
    num_splits, num_batch, rows, rank, rows_of_head,
    SPLITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The sums of all splits as one, of one row, by KV head: their mean (heads, batch, rows of a head, rank), which 16
    bits hold however many tokens there are, and the sums of the weights, which lie behind the channels."""
    row, batch = tl.program_id(1), tl.program_id(2)
    split, column = tl.arange(0, SPLITS), tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    target = (split * num_batch + batch).to(tl.int64) * rows + row
    there = split < num_splits
    highest = tl.load(split_maxima + target, mask=there, other=NOTHING)
    maximum = tl.max(highest, axis=0)
    scale = tl.where(there, tl.exp(highest - maximum), 0.0)
    of_split = summed + target * (rank + 1)
    parts = tl.load(of_split[:, None] + column[None, :], mask=there[:, None] & (column < rank)[None, :], other=0)
    weight = tl.sum(scale * tl.load(of_split + rank, mask=there, other=0), axis=0)
    mean = tl.sum(parts * scale[:, None], axis=0) / tl.maximum(weight, 1e-37)
    of_row = (row // rows_of_head * num_batch + batch) * rows_of_head + row % rows_of_head
    merged_at = merged + of_row.to(tl.int64) * rank + column
    tl.store(merged_at, mean.to(merged.dtype.element_ty), mask=column < rank)
    if tl.program_id(0) == 0:
        tl.store(maxima + of_row, maximum)
        tl.store(sums + of_row, weight)


@triton.jit(do_not_specialize=["num_queries", "num_exact", "mask_batch", "mask_query"])
def finish_kernel(
    query, exact_keys, exact_values, mask, old, value_mean, maxima, sums, out,
    scaling, rows, num_queries, num_batch, num_exact, mask_batch, mask_query,
    MASK: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Attention to the exact tokens of one KV head, joined with the mean over the old ones, some rows at a time."""
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, dim = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    there = row < rows
    DTYPE: tl.constexpr = query.dtype.element_ty
    of_head = (batch * tl.num_programs(1) + head).to(tl.int64)
    at = of_head * rows * HEAD_DIM + row[:, None] * HEAD_DIM + dim[None, :]
    q = (tl.load(query + at, mask=there[:, None], other=0).to(tl.float32) * scaling).to(DTYPE)
    of_old = (head * num_batch + batch) * rows + row
    maximum = tl.load(maxima + of_old, mask=there, other=NOTHING)
    weight = tl.load(sums + of_old, mask=there, other=0)
    old_at = old + of_old.to(tl.int64)[:, None] * HEAD_DIM + dim[None, :]
    mean = tl.load(value_mean + head * HEAD_DIM + dim).to(tl.float32)[None, :]
    total = weight[:, None] * (tl.load(old_at, mask=there[:, None], other=0).to(tl.float32) + mean)
    of_query = batch * mask_batch + (row % num_queries)[:, None] * mask_query
    for first in range(0, num_exact, TILE):
        token = first + tl.arange(0, TILE)
        live = token < num_exact
        token_at = (of_head * num_exact + token) * HEAD_DIM
        keys = tl.load(exact_keys + token_at[None, :] + dim[:, None], mask=live[None, :], other=0)
        scores = tl.dot(q, keys, input_precision="ieee")
        scores = _masked(scores, mask, of_query, token[None, :], there[:, None] & live[None, :], MASK)
        higher = tl.maximum(maximum, tl.max(scores, axis=1))
        exponentials, decay = tl.exp(scores - higher[:, None]), tl.exp(maximum - higher)
        values = tl.load(exact_values + token_at[:, None] + dim[None, :], mask=live[:, None], other=0)
        total = tl.dot(exponentials.to(DTYPE), values, total * decay[:, None], input_precision="ieee")
        weight = weight * decay + tl.sum(exponentials, axis=1)
        maximum = higher
    total = total / tl.maximum(weight, 1e-37)[:, None]
    tl.store(out + at, total.to(DTYPE), mask=there[:, None])

"""The Triton kernels of attention over a compressed past; gpu.py says how they work together, and launches them.

Three things decided the shape, by the machine code and by measurements on an H100: arithmetic on two 16-bit floats at
a time, where latents are float16 with keys that are summed up in float16, too; what a tile needs from memory is asked
for while the tile before is worked on; and nothing that makes the warps of a program wait for each other unless it
must.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import tiles
from .triton_latents import fetch, latents_of, of_row, piece_at, token_in_tile

LOG2_E = tl.constexpr(1.4426950408889634)  # exponentials are to base 2
NOTHING = tl.constexpr(-1e30)  # the maximum of no scores; finite, so that differences of two are
IN_TILES, FROM_POSITIONS = tl.constexpr(tiles.IN_TILES), tl.constexpr(tiles.FROM_POSITIONS)
ONLY, FIRST, SECOND = tl.constexpr(tiles.ONLY), tl.constexpr(tiles.FIRST), tl.constexpr(tiles.SECOND)

# Numbers that change while a model generates; a kernel compiled for each kind of them would interrupt it.
CHANGING = ["num_queries", "num_blocks", "num_tiles", "tiles_each"]
CHANGING += ["turn_stride", "mask_batch", "mask_query", "seen_stride"]
# Numbers that layers differ in, and that nothing is gained of by knowing more.
OF_LAYER = ["block_bytes", "block_ranges", "thousands"]


@triton.jit(do_not_specialize=CHANGING + OF_LAYER)
def score_kernel(
    query, data, ranges, pieces, key_B, cos, sin, start_cos, start_sin, positions, inv_freq, mask, seen, num_seen,
    weights, maxima,
    scaling, attention_scaling, rows, num_queries, num_blocks, rank, block_bytes, block_ranges, num_tiles, tiles_each,
    turn_stride, mask_batch, mask_query, seen_stride, thousands,
    TURNS: tl.constexpr, RUN: tl.constexpr, MASK: tl.constexpr, HEADS_PER_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr, ALL_ROWS: tl.constexpr, SIZES: tl.constexpr, LEAST: tl.constexpr, HELD: tl.constexpr,
    AHEAD: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Exponentials (to base 2) of the scores of one KV head against some tiles of old tokens, relative to the maximum
    of each part of a tile, and that maximum.

    Args:
        TURNS, RUN: of tiles.py.
        seen, num_seen: see there; of the first and the second run. The second takes all tiles of a program that has
            any that the first could not.
        SIZES: of a head's pieces.
        LEAST: pieces that the head of the fewest needs; heads of fewer than there are take a way of their own.
        HELD: whether what rebuilds keys from all pieces is held ready; else pieces are taken one by one.
        AHEAD: whether all that the next tile needs is read while a tile is worked on, not only the next piece; with
            `HELD` only.
        ALL_ROWS: whether there are at most `ROWS`, whose queries are then held for all tiles.
    """
    split, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group, head_in_group = head // HEADS_PER_GROUP, head % HEADS_PER_GROUP
    row = of_row(data, ranges, batch, num_blocks, rank, block_bytes, block_ranges, FORM)
    base = (batch * tl.num_programs(1) + head) * rows
    first, end = split * tiles_each, tl.minimum((split + 1) * tiles_each, num_tiles)
    if RUN != ONLY:
        seen += batch * seen_stride
        end = tl.minimum(end, tl.load(num_seen + tl.where(seen_stride > 0, batch, 0)))
    if RUN == SECOND:
        end = tl.where(_any_left(seen, first, end), end, first)
    tiles = first, end, num_tiles
    at = batch * turn_stride
    if TURNS == IN_TILES:
        turns = cos, sin, start_cos + at, start_sin + at
    elif TURNS == FROM_POSITIONS:
        turns = positions + at, inv_freq, attention_scaling, 0
    else:
        turns = cos + at, sin + at, 0, 0
    queries = query + base * HEAD_DIM, rows, scaling
    masked = mask, batch * mask_batch, mask_query, num_queries, seen
    out = weights + base * num_tiles * TILE, maxima + base * num_tiles * (TILE // PART)
    NUM: tl.constexpr = len(SIZES)
    pieces += group * NUM * 8
    key_B += head_in_group * HEAD_DIM
    for n in tl.static_range(LEAST, NUM + 1):
        if (RUN == ONLY or first < end) and (LEAST == NUM or _pieces_needed(pieces, LEAST, NUM) == n):
            _score_tiles(
                tiles, row, pieces, key_B, turns, queries, masked, out, thousands, TURNS, RUN, MASK,
                HEADS_PER_GROUP * HEAD_DIM, HEAD_DIM, ROWS, ALL_ROWS, SIZES, n, HELD, AHEAD, TILE, PART, FORM,
            )  # fmt: skip


@triton.jit
def _any_left(seen, first, end):
    """Whether there is a tile that a first run could not do."""
    found = tl.zeros([32], dtype=tl.int32)
    for tile_0 in range(first, end, 32):
        tile = tile_0 + tl.arange(0, 32)
        found = tl.minimum(found, tl.load(seen + tile, mask=tile < end, other=0))
    return tl.min(found, axis=0) < 0


@triton.jit
def _pieces_needed(pieces, LEAST: tl.constexpr, NUM: tl.constexpr):
    """How many pieces of a head there are before nothing but empty ones."""
    needed = LEAST
    for i in tl.static_range(LEAST, NUM):
        needed = tl.where(tl.load(pieces + 8 * i + 1) > 0, i + 1, needed)
    return needed


@triton.jit
def _score_tiles(
    tiles, row, pieces, key_B, turns, queries, masked, out, thousands, TURNS: tl.constexpr, RUN: tl.constexpr,
    MASK: tl.constexpr, GROUP_DIM: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, ALL_ROWS: tl.constexpr,
    SIZES: tl.constexpr, NUM: tl.constexpr, HELD: tl.constexpr, AHEAD: tl.constexpr, TILE: tl.constexpr,
    PART: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """[`score_kernel`] with a number of pieces that the compiler knows."""
    HALF: tl.constexpr = HEAD_DIM // 2
    DTYPE: tl.constexpr = out[0].dtype.element_ty
    SUMS: tl.constexpr = tl.float16 if DTYPE == tl.float16 else tl.float32  # noqa: SIM300
    query, rows, scaling = queries
    first_tile, end_tile, num_tiles = tiles
    num_tokens = row[2]
    pair, in_tile = tl.arange(0, HALF), token_in_tile(tl.arange(0, TILE), FORM)
    if TURNS == IN_TILES:  # the same of all tiles
        turn_at = in_tile[:, None] * HALF + pair[None, :]
        c, s = _as_summed(tl.load(turns[0] + turn_at).to(DTYPE)), _as_summed(tl.load(turns[1] + turn_at).to(DTYPE))
    elif TURNS == FROM_POSITIONS:
        inv_freq = tl.load(turns[1] + pair)
    if ALL_ROWS:
        straight = _queries(query, tl.arange(0, ROWS), rows, scaling, HEAD_DIM, DTYPE)
    known, factors, ahead = (), (), ()
    if HELD:
        for i in tl.static_range(NUM):
            known = known + (piece_at(pieces, i),)
            factors = factors + (_factor(key_B, known[i], GROUP_DIM, HEAD_DIM, SIZES[i]),)
            if AHEAD:
                ahead = ahead + (fetch(row, known[i], first_tile, FORM, TILE, SIZES[i]),)
        if not AHEAD:
            following = fetch(row, known[0], first_tile, FORM, TILE, SIZES[0])
    back_ahead = 0, 0
    if TURNS == IN_TILES:
        turns_at = first_tile * HALF + pair
        back_ahead = tl.load(turns[2] + turns_at), tl.load(turns[3] + turns_at)
    for tile in range(first_tile, end_tile):
        token = tile * TILE + in_tile
        now, ahead, back = ahead, (), back_ahead
        if AHEAD:
            for i in tl.static_range(NUM):
                ahead = ahead + (fetch(row, known[i], tl.minimum(tile + 1, num_tiles - 1), FORM, TILE, SIZES[i]),)
        if TURNS == IN_TILES:
            turns_at = tl.minimum(tile + 1, num_tiles - 1) * HALF + pair
            back_ahead = tl.load(turns[2] + turns_at), tl.load(turns[3] + turns_at)
        elif TURNS == FROM_POSITIONS:
            position = tl.load(turns[0] + token, mask=token < num_tokens, other=0).to(tl.float32)
            angle = position[:, None] * inv_freq[None, :]
            c, s = (tl.cos(angle) * turns[2]).to(DTYPE), (tl.sin(angle) * turns[2]).to(DTYPE)
        else:
            live, turn_at = token < num_tokens, token[:, None].to(tl.int64) * HALF + pair[None, :]
            c = tl.load(turns[0] + turn_at, mask=live[:, None], other=0).to(DTYPE)
            s = tl.load(turns[1] + turn_at, mask=live[:, None], other=0).to(DTYPE)
        keys = tl.zeros([TILE, HEAD_DIM], dtype=SUMS)
        if HELD:
            for i in tl.static_range(NUM):
                if AHEAD:
                    piece, fetched = known[i], now[i]
                else:  # what is known of many pieces is read again, or their addresses would fill the registers
                    piece, fetched, then = piece_at(pieces, i), following, piece_at(pieces, (i + 1) % NUM)
                    of_tile = tl.minimum(tile + (i + 1) // NUM, num_tiles - 1)
                    following = fetch(row, then, of_tile, FORM, TILE, SIZES[(i + 1) % NUM])
                keys = _rebuilt(keys, latents_of(fetched, piece, thousands, FORM, TILE, SIZES[i], DTYPE), factors[i])
        else:
            for index in range(0, NUM):
                piece = piece_at(pieces, index)
                fetched = fetch(row, piece, tile, FORM, TILE, SIZES[0])
                latents = latents_of(fetched, piece, thousands, FORM, TILE, SIZES[0], DTYPE)
                keys = _rebuilt(keys, latents, _factor(key_B, piece, GROUP_DIM, HEAD_DIM, SIZES[0]))
        first, second = tl.split(tl.permute(tl.reshape(keys.to(DTYPE), (TILE, 2, HALF)), (0, 2, 1)))
        turned = first * c - second * s, second * c + first * s
        if ALL_ROWS:
            scores = _scores(turned, straight, back, TURNS)
            some = tl.arange(0, ROWS)
            _exponentials(scores, some, rows, tile, num_tiles, token, num_tokens, masked, out, RUN, MASK, PART)
        else:
            for row_0 in range(0, rows, ROWS):
                some = row_0 + tl.arange(0, ROWS)
                scores = _scores(turned, _queries(query, some, rows, scaling, HEAD_DIM, DTYPE), back, TURNS)
                _exponentials(scores, some, rows, tile, num_tiles, token, num_tokens, masked, out, RUN, MASK, PART)


@triton.jit
def _factor(key_B, piece, GROUP_DIM: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr):
    """What rebuilds a head's keys from a piece of the channels: (CHUNK, HEAD_DIM)."""
    channel = tl.arange(0, CHUNK)
    at = key_B + (piece[0] + channel)[:, None] * GROUP_DIM + tl.arange(0, HEAD_DIM)[None, :]
    return tl.load(at, mask=(channel < piece[1])[:, None], other=0)


@triton.jit
def _rebuilt(keys, latents, factor):
    """Adds what latents (CHUNK, TILE) of a piece give to a head's keys, (TILE, HEAD_DIM)."""
    return tl.dot(tl.trans(latents), factor, keys, input_precision="ieee", out_dtype=keys.dtype)


@triton.jit
def _as_summed(x):
    """The same, where a product of matrices would lie: pairs of columns in one register."""
    row = tl.arange(0, x.shape[0])
    return tl.dot((row[:, None] == row[None, :]).to(x.dtype), x).to(x.dtype)


@triton.jit
def _exponentials(
    scores, row, rows, tile, num_tiles, token, num_tokens, masked, out, RUN: tl.constexpr, MASK: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """Writes what [`score_kernel`] makes of scores (TILE, rows) of a tile."""
    weights, maxima = out
    mask, mask_start, mask_query, num_queries, seen = masked
    TILE: tl.constexpr = scores.shape[0]
    if RUN == FIRST:
        scores = tl.where((token - tile * TILE < tl.load(seen + tile))[:, None], scores, float("-inf"))
    elif MASK != 0:
        of_query = mask_start + (row % num_queries)[None, :] * mask_query
        scores = _masked(scores, mask, of_query, token[:, None], (token < num_tokens)[:, None], MASK)
    elif (tile + 1) * TILE > num_tokens:  # the last
        scores = tl.where((token < num_tokens)[:, None], scores, NOTHING)
    ROWS: tl.constexpr = scores.shape[1]
    PARTS: tl.constexpr = TILE // PART
    scores = tl.reshape(scores, (PARTS, PART, ROWS))
    maximum = tl.max(scores, axis=1)
    if RUN == FIRST or MASK != 0:
        maximum = tl.maximum(maximum, NOTHING)
    exponentials = tl.exp2(scores - maximum[:, None, :]).to(weights.dtype.element_ty)
    of_tile = (row * num_tiles + tile)[None, :]
    at = of_tile * PARTS + tl.arange(0, PARTS)[:, None]
    tl.store(maxima + at, maximum, mask=(row < rows)[None, :])
    at = of_tile * TILE + tl.arange(0, TILE)[:, None]
    tl.store(weights + at, tl.reshape(exponentials, (TILE, ROWS)), mask=(row < rows)[None, :])


@triton.jit
def _queries(query, row, rows, scaling, HEAD_DIM: tl.constexpr, DTYPE: tl.constexpr):
    """Both halves of some queries, scaled, (HEAD_DIM / 2, rows) each."""
    at = query + row[None, :] * HEAD_DIM + tl.arange(0, HEAD_DIM // 2)[:, None]
    there = (row < rows)[None, :]
    first = tl.load(at, mask=there, other=0).to(tl.float32) * scaling
    second = tl.load(at + HEAD_DIM // 2, mask=there, other=0).to(tl.float32) * scaling
    return first.to(DTYPE), second.to(DTYPE)


@triton.jit
def _scores(turned, queries, back, TURNS: tl.constexpr):
    """(TILE, rows) scores of some queries against turned keys."""
    first, second = queries
    if TURNS == IN_TILES:  # turn the few queries back to where the tile starts, not all its keys on
        straight, c, s = first, back[0].to(first.dtype)[:, None], back[1].to(first.dtype)[:, None]
        first = straight * c + second * s
        second = second * c - straight * s
    scores = tl.dot(turned[0], first, input_precision="ieee")
    return tl.dot(turned[1], second, scores, input_precision="ieee")


@triton.jit
def _masked(scores, mask, of_query, column, there, MASK: tl.constexpr):
    """Scores under a mask: none (0), of bytes that say what is seen (1), or of floats to be added (2)."""
    if MASK != 0:
        seen = tl.load(mask + of_query + column, mask=there, other=0)
        if MASK == 1:
            scores = tl.where(seen != 0, scores, float("-inf"))
        else:
            scores += tl.maximum(seen.to(tl.float32), NOTHING) * LOG2_E
    return tl.where(there, scores, float("-inf"))


@triton.jit(do_not_specialize=["num_blocks", "num_tiles", "tiles_each", "num_seen_stride", *OF_LAYER])
def value_kernel(
    weights, maxima, data, ranges, pieces, order, num_seen, summed, split_maxima,
    rows, num_blocks, rank, block_bytes, block_ranges, num_tiles, tiles_each, row_tiles, num_seen_stride, thousands,
    TOLD: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    FORM: tl.constexpr,
):  # fmt: skip
    """One piece of the channels of the weighted sum of latents, over one split of the old tokens, relative to the
    split's maximum. The last channel is always one, and its sum that of the weights.

    Args:
        num_seen: see tiles.py; `TOLD` if there is one.
    """
    index, split = tl.program_id(0), tl.program_id(1)
    batch, num_batch = (tl.program_id(2) // row_tiles).to(tl.int64), tl.num_programs(2) // row_tiles
    row = tl.program_id(2) % row_tiles * ROWS + tl.arange(0, ROWS)
    there = row < rows
    DTYPE: tl.constexpr = weights.dtype.element_ty
    PARTS: tl.constexpr = TILE // PART
    stored = of_row(data, ranges, batch, num_blocks, rank, block_bytes, block_ranges, FORM)
    piece = piece_at(pieces, index)
    weights += (batch * rows + row)[:, None] * num_tiles * TILE
    maxima += (batch * rows + row)[:, None] * num_tiles * PARTS
    begin, end = split * tiles_each, tl.minimum((split + 1) * tiles_each, num_tiles)
    if TOLD:
        end = tl.minimum(end, tl.load(num_seen + batch * num_seen_stride))
    found = tl.zeros([ROWS, 32], dtype=tl.float32) + NOTHING
    for part_0 in range(begin * PARTS, end * PARTS, 32):
        part = part_0 + tl.arange(0, 32)
        inside = there[:, None] & (part < end * PARTS)[None, :]
        found = tl.maximum(found, tl.load(maxima + part[None, :], mask=inside, other=NOTHING))
    highest = tl.max(found, axis=1)
    weights, maxima = weights + tl.arange(0, TILE)[None, :], maxima + tl.arange(0, PARTS)[None, :]
    ahead = fetch(stored, piece, begin, FORM, TILE, CHUNK)
    weights_ahead = tl.load(weights + begin * TILE, mask=there[:, None], other=0)
    maxima_ahead = tl.load(maxima + begin * PARTS, mask=there[:, None], other=NOTHING)
    total = tl.zeros([CHUNK, ROWS], dtype=tl.float32)
    for tile in range(begin, end):
        now, weights_now, maxima_now = ahead, weights_ahead, maxima_ahead
        next_tile = tl.minimum(tile + 1, num_tiles - 1)
        ahead = fetch(stored, piece, next_tile, FORM, TILE, CHUNK)
        weights_ahead = tl.load(weights + next_tile * TILE, mask=there[:, None], other=0)
        maxima_ahead = tl.load(maxima + next_tile * PARTS, mask=there[:, None], other=NOTHING)
        latents = latents_of(now, piece, thousands, FORM, TILE, CHUNK, DTYPE)
        scale = tl.exp2(maxima_now - highest[:, None]).to(DTYPE)
        scaled = tl.reshape(weights_now, (ROWS, PARTS, PART)) * scale[:, :, None]
        total = tl.dot(latents, tl.trans(tl.reshape(scaled, (ROWS, TILE))), total, input_precision="ieee")
    target = (split * num_batch + batch) * rows + row
    channel = tl.arange(0, CHUNK)
    has = channel < piece[1]
    at = target[None, :] * (rank + 1) + tl.load(order + piece[0] + channel, mask=has, other=0)[:, None]
    tl.store(summed + at, total, mask=there[None, :] & has[:, None])
    if index == 0:
        tl.store(split_maxima + target, highest, mask=there)


@triton.jit(do_not_specialize=["num_splits"])
def merge_kernel(
    summed, split_maxima, merged, maxima, sums,
    num_splits, num_batch, rows, rank, rows_of_head,
    SPLITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The sums of all splits as one, of one row, by KV head: their mean (heads, batch, rows of a head, rank), which 16
    bits hold however many tokens there are, and the sums of the weights, which lie after the channels."""
    row, batch = tl.program_id(1), tl.program_id(2)
    split, column = tl.arange(0, SPLITS), tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    target = (split * num_batch + batch).to(tl.int64) * rows + row
    there = split < num_splits
    highest = tl.load(split_maxima + target, mask=there, other=NOTHING)
    maximum = tl.max(highest, axis=0)
    scale = tl.where(there, tl.exp2(highest - maximum), 0.0)
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
    query, exact_keys, exact_values, mask, merged, value_B, value_mean, maxima, sums, out,
    scaling, rows, num_queries, num_batch, num_exact, rank, mask_batch, mask_query,
    MASK: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`value_B` for the mean over the old tokens, and attention to the exact tokens of one KV head joined with it,
    some rows at a time.

    Args:
        value_B: transposed, (rank, heads * HEAD_DIM).
    """
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
    mean = tl.load(value_mean + head * HEAD_DIM + dim).to(tl.float32)[None, :]
    total = tl.zeros([ROWS, HEAD_DIM], dtype=tl.float32) + mean
    for start in range(0, rank, CHUNK):
        channel = start + tl.arange(0, CHUNK)
        has = channel < rank
        latents_at = merged + of_old.to(tl.int64)[:, None] * rank + channel[None, :]
        latents = tl.load(latents_at, mask=there[:, None] & has[None, :], other=0)
        factor_at = value_B + channel[:, None] * (tl.num_programs(1) * HEAD_DIM) + (head * HEAD_DIM + dim)[None, :]
        factor = tl.load(factor_at, mask=has[:, None], other=0)
        total = tl.dot(latents, factor, total, input_precision="ieee")
    total *= weight[:, None]
    of_query = batch * mask_batch + (row % num_queries)[:, None] * mask_query
    for first in range(0, num_exact, TILE):
        token = first + tl.arange(0, TILE)
        live = token < num_exact
        token_at = (of_head * num_exact + token) * HEAD_DIM
        keys = tl.load(exact_keys + token_at[None, :] + dim[:, None], mask=live[None, :], other=0)
        scores = tl.dot(q, keys, input_precision="ieee")
        scores = _masked(scores, mask, of_query, token[None, :], there[:, None] & live[None, :], MASK)
        higher = tl.maximum(maximum, tl.max(scores, axis=1))
        exponentials, decay = tl.exp2(scores - higher[:, None]), tl.exp2(maximum - higher)
        values = tl.load(exact_values + token_at[:, None] + dim[None, :], mask=live[:, None], other=0)
        total = tl.dot(exponentials.to(DTYPE), values, total * decay[:, None], input_precision="ieee")
        weight = weight * decay + tl.sum(exponentials, axis=1)
        maximum = higher
    total = total / tl.maximum(weight, 1e-37)[:, None]
    tl.store(out + at, total.to(DTYPE), mask=there[:, None])

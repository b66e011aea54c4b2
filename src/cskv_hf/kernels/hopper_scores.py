"""Scores against packed keys on NVIDIA's Hopper GPUs: what `score_kernel` of triton_kernels.py writes, by a kernel
that says which thread holds what.

In that kernel latents reach the product that rebuilds keys through shared memory, which limits it on such a GPU. Here
a thread reads its own share of the product from memory, see hopper_latents.py: a tile of 256 tokens comes in four
parts, of tokens that are four apart, and of a part to the next only the turn of the queries changes.

Gluon, Triton's language for this, has no interpreter; tests/gluon_on_numpy.py runs these functions without layouts.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_latents import PARTS, TOKENS, fetch, key_words, latents_of, share_at

COLUMNS = gl.constexpr(8)  # of queries that a product takes, at least
NOTHING = gl.constexpr(-1e30)  # the score of a token that is not there

# Numbers that change while a model generates, or that layers differ in: no kernel is compiled for each.
# A stride of turns is 0 or a multiple of 16, which the compiler may know.
CHANGING = ["num_blocks", "num_tiles", "tiles_each", "seen_stride", "block_words", "block_ranges", "thousands"]


@gluon.jit(do_not_specialize=CHANGING)
def hopper_score_kernel(
    query, words, ranges, groups, key_B, cos, sin, start_cos, start_sin, seen, num_seen, weights, maxima,
    scaling, rows, num_blocks, block_words, block_ranges, num_tiles, tiles_each, turn_stride, seen_stride, thousands,
    TOLD: gl.constexpr, HEADS_PER_GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, ROWS: gl.constexpr, TIERS: gl.constexpr,
    WAYS: gl.constexpr, GROUP_CHANNELS: gl.constexpr, FOURS: gl.constexpr, TOGETHER: gl.constexpr,
    STAGED: gl.constexpr,
):  # fmt: skip
    """Exponentials (to base 2) of the scores of one KV head against some tiles of old tokens, relative to the maximum
    of 64 tokens, and that maximum.

    Args:
        query: (batch, heads, rows, HEAD_DIM).
        words: int32, codes in blocks of 32 tokens, as `pack` of quantize.py leaves them.
        ranges: int32 (batch, num_blocks, block_ranges), minimum and step of `GROUP_CHANNELS` channels of a block.
        groups: int32 (groups, TIERS, 8), a `Share` of hopper.py each.
        key_B: (channels, HEADS_PER_GROUP * HEAD_DIM).
        cos, sin: (TOKENS, HEAD_DIM / 2), what turns a token from the first of its tile.
        start_cos, start_sin: (batch or 1, tiles * PARTS, HEAD_DIM / 2), what turns the first `PARTS` tokens of every
            tile.
        seen, num_seen: see tiles.py; `TOLD` if there are any.
        weights: (batch, heads * rows, num_tiles, 64) float16, tokens in the order of `token_in_tile`.
        maxima: (batch, heads * rows, num_tiles) float32.
        num_tiles: of 64 tokens; `tiles_each`: of 256, that a program takes.
        ROWS: the power of two that holds `rows`, at most `COLUMNS`.
        WAYS: products that rebuild keys, a (tier, first place, channels, bits) each; several ways if some groups have
            fewer channels in the only tier.
        FOURS: whether four channels are read at once: where ranges do, and rows of words, begin at multiples of four.
        TOGETHER: whether the parts of a tile are rebuilt side by side, so that each word is read once for all, and not
            one by one with all words in registers; for many channels.
        STAGED: tiles that queries are turned for at once.
    """
    split, head, batch = gl.program_id(0), gl.program_id(1), gl.program_id(2).to(gl.int64)
    words += batch * num_blocks * block_words
    shares = ()
    for tier in gl.static_range(TIERS):
        shares = shares + (share_at(groups + (head // HEADS_PER_GROUP * TIERS + tier) * 8, FOURS),)
    stored = words, ranges + batch * num_blocks * block_ranges, num_blocks, block_words, block_ranges
    row_0 = (batch * gl.num_programs(1) + head) * rows
    queries = query + row_0 * HEAD_DIM, rows, scaling
    key_B += head % HEADS_PER_GROUP * HEAD_DIM
    turns = cos, sin, start_cos + batch * turn_stride, start_sin + batch * turn_stride
    out = weights + row_0 * num_tiles * 64, maxima + row_0 * num_tiles, seen + batch * seen_stride
    first, end = split * tiles_each, gl.minimum((split + 1) * tiles_each, (num_tiles + 3) // 4)
    if TOLD:
        end = gl.minimum(end, (gl.load(num_seen + gl.where(seen_stride > 0, batch, 0)) + 3) // 4)
    tiles = first, end, num_tiles
    for way in gl.static_range(len(WAYS)):
        here = first < end
        if len(WAYS) > 1:
            here = here & (shares[0][3] >= _room(WAYS, way - 1)) & (shares[0][3] < _room(WAYS, way))
        if here:
            _tiles(
                tiles, stored, shares, key_B, turns, queries, out, thousands, TOLD,
                HEADS_PER_GROUP * HEAD_DIM, HEAD_DIM, ROWS, WAYS, way, GROUP_CHANNELS, FOURS, TOGETHER, STAGED,
            )  # fmt: skip


@gluon.jit
def _tiles(
    tiles, stored, shares, key_B, turns, queries, out, thousands, TOLD: gl.constexpr,
    GROUP_DIM: gl.constexpr, HEAD_DIM: gl.constexpr, ROWS: gl.constexpr, WAYS: gl.constexpr, WAY: gl.constexpr,
    GROUP_CHANNELS: gl.constexpr, FOURS: gl.constexpr, TOGETHER: gl.constexpr, STAGED: gl.constexpr,
):  # fmt: skip
    """[`hopper_score_kernel`] with products that the compiler knows."""
    HALF: gl.constexpr = HEAD_DIM // 2
    NUM: gl.constexpr = _number(WAYS, WAY)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    TURN: gl.constexpr = _turn_layout(HALF)
    first_tile, end_tile, num_tiles = tiles
    factors = ()
    for i in gl.static_range(NUM):
        factors = factors + (_factor(key_B, shares, _product(WAYS, WAY, i), GROUP_DIM, HEAD_DIM),)
    c, s = _places(turns[0], turns[1], HALF, TURN)
    if TOGETHER:  # in shared memory; sums of all parts fill the registers
        kept = gl.allocate_shared_memory(
            gl.float16, [128, HALF], gl.NVMMASharedLayout.get_default_for([128, HALF], gl.float16)
        )
        kept.store(_by_thread(c, s))
    straight = _queries(queries, ROWS, HEAD_DIM)
    SIDE: gl.constexpr = _side_by_side(ROWS)
    turned = gl.allocate_shared_memory(
        gl.float16, [STAGED, PARTS // SIDE * COLUMNS, HEAD_DIM],
        gl.NVMMASharedLayout.get_default_for([COLUMNS, HEAD_DIM], gl.float16),
    )  # fmt: skip
    ahead = ()
    for i in gl.static_range(0 if TOGETHER else NUM):
        ahead = ahead + (fetch(stored, shares, first_tile, _product(WAYS, WAY, i), GROUP_CHANNELS, FOURS),)
    for tile in range(first_tile, end_tile):
        if (tile - first_tile) % STAGED == 0:  # the compiler has warps wait for one another, before and after
            for i in gl.static_range(STAGED):
                at = gl.minimum(tile + i, (num_tiles + 3) // 4 - 1)
                turned.index(i).store(_turned_back(straight, turns[2], turns[3], at, SIDE, HEAD_DIM))
            fence_async_shared()
        of_tile = turned.index((tile - first_tile) % STAGED)
        scores = ()
        if TOGETHER:
            nothing = gl.zeros([64, HEAD_DIM], gl.float16, SUMS)
            keys, before = (nothing, nothing, nothing, nothing), ()
            following = fetch(stored, shares, tile, _product(WAYS, WAY, 0), GROUP_CHANNELS, FOURS)
            for i in gl.static_range(NUM):
                fetched = key_words(following, shares, _product(WAYS, WAY, i))
                if i + 1 < NUM:
                    following = fetch(stored, shares, tile, _product(WAYS, WAY, i + 1), GROUP_CHANNELS, FOURS)
                latents, sums = (), ()
                for part in gl.static_range(PARTS):
                    latents = latents + (latents_of(fetched, part, thousands, SUMS),)
                if i > 0:  # until here the products before read their registers
                    warpgroup_mma_wait(0, deps=before)
                for part in gl.static_range(PARTS):
                    # one that is not waited for must feed the next, or ptxas lines all products up
                    sums = sums + (
                        warpgroup_mma(latents[part], factors[i], keys[part], use_acc=i > 0, is_async=i + 1 < NUM),
                    )
                keys, before = sums, latents
            c, s = _from_threads(kept, TURN)
            for part in gl.static_range(PARTS):
                scores = scores + (_scores(keys[part], c, s, of_tile, part, ROWS),)
        else:
            fetched = ()
            for i in gl.static_range(NUM):
                fetched = fetched + (key_words(ahead[i], shares, _product(WAYS, WAY, i)),)
            for part in gl.static_range(PARTS):
                latents = ()
                for i in gl.static_range(NUM):
                    latents = latents + (latents_of(fetched[i], part, thousands, SUMS),)
                if part == PARTS - 1:  # whose words are not needed any more
                    ahead = ()
                    for i in gl.static_range(NUM):
                        ahead = ahead + (
                            fetch(stored, shares, tile + 1, _product(WAYS, WAY, i), GROUP_CHANNELS, FOURS),
                        )
                sums = gl.zeros([64, HEAD_DIM], gl.float16, SUMS)
                for i in gl.static_range(NUM):
                    sums = warpgroup_mma(latents[i], factors[i], sums, use_acc=i > 0)
                scores = scores + (_scores(sums, c, s, of_tile, part, ROWS),)
        _exponentials(scores, tile, num_tiles, stored[2], queries[1], out, TOLD, ROWS)


# What a thread holds. Lanes 0 and 1 (the bits of its number in the warp) stand for neighbours in a row of a product,
# lanes 2 to 4 and the warp for rows; a register is two numbers of 16 bits.


@gluon.constexpr_function
def _turn_layout(half):
    """(64 tokens, half of head_dim): as each half of rebuilt keys comes out of a product."""
    registers = [[0, 1], [8, 0]] + [[0, 1 << i] for i in range(3, half.bit_length() - 1)]
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, half])


@gluon.constexpr_function
def _query_layout(head_dim):
    """(parts, columns, half of head_dim)"""
    return gl.BlockedLayout([1, 1, head_dim // 32], [1, 2, 16], [1, 4, 1], [2, 1, 0])


@gluon.constexpr_function
def _thread_layout(numbers):
    """(threads, numbers of each)"""
    registers, lanes = [[0, 1 << i] for i in range(numbers.bit_length() - 1)], [[1 << i, 0] for i in range(5)]
    return gl.DistributedLinearLayout(registers, lanes, [[32, 0], [64, 0]], [], [128, numbers])


@gluon.constexpr_function
def _out_layout(rows):
    """(rows of queries, 4 times 64 tokens, 64): as scores come out of a product, whose column bits 0, 1 and 2 are a
    register and lanes 0 and 1; the last of these bits are the row, the others see the same several times."""
    bits = rows.bit_length() - 1
    of_column = [[0, 0, 0]] * (3 - bits) + [[1 << i, 0, 0] for i in range(bits)]
    registers = [[0, 0, 1], [0, 0, 2], [0, 0, 4]] + ([of_column[0]] if bits == 3 else [])
    lanes = [of_column[1], of_column[2], [0, 0, 8], [0, 0, 16], [0, 0, 32]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 1, 0], [0, 2, 0]], [], [rows, 4, 64])


@gluon.constexpr_function
def _side_by_side(rows):
    """Parts whose queries take columns of one product: a column in two is all that a part needs, if rows are few."""
    return 2 if rows < 8 else 1


@gluon.constexpr_function
def _number(ways, way):
    return len(ways[way])


@gluon.constexpr_function
def _product(ways, way, index):
    return ways[way][index]


@gluon.constexpr_function
def _room(ways, way):
    """The channels that one of the ways takes."""
    return sum(channels for _, _, channels, _ in ways[way]) if way >= 0 else 0


@gluon.jit
def _factor(key_B, shares, PRODUCT: gl.constexpr, GROUP_DIM: gl.constexpr, HEAD_DIM: gl.constexpr):
    """(channels, HEAD_DIM) of what rebuilds a head's keys, in shared memory, as [`latents_of`] orders channels."""
    START: gl.constexpr = PRODUCT[1]
    SIZE: gl.constexpr = PRODUCT[2]
    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIZE, HEAD_DIM], gl.float16)
    first_row, channels, _, constant, lead, _, _, _ = shares[PRODUCT[0]]
    column = gl.arange(0, SIZE, gl.SliceLayout(1, LOADED))
    place = START + column // 16 * 16 + column // 2 % 4 * 4 + column // 8 % 2 * 2 + column % 2
    own = (place >= lead) & (place < lead + channels)
    row = first_row + gl.where(own, place - lead, channels)
    at = row[:, None] * GROUP_DIM + gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LOADED))[None, :]
    factor = gl.load(key_B + at, mask=(own | (place == constant))[:, None], other=0)
    return gl.allocate_shared_memory(gl.float16, [SIZE, HEAD_DIM], SHARED, factor)


@gluon.jit
def _places(cos, sin, HALF: gl.constexpr, TURN: gl.constexpr):
    """cos and sin (64, HALF) of the places of the first part, as [`latents_of`] orders tokens."""
    row = gl.arange(0, 64, gl.SliceLayout(1, TURN))
    eight, half = row // 16 * 8 + row % 8, row // 8 % 2
    place = eight // 4 * 32 + half * 16 + eight % 4 * 4
    at = place[:, None] * HALF + gl.arange(0, HALF, gl.SliceLayout(0, TURN))[None, :]
    return gl.load(cos + at), gl.load(sin + at)


@gluon.jit
def _by_thread(c, s):
    """cos and sin (64, HALF) of [`_places`] as (threads, numbers of each)."""
    HALF: gl.constexpr = c.shape[1]
    # warp, half of the block, eight, sixteens, lanes, bit 0, cos or sin
    x = gl.reshape(gl.join(c, s), (4, 2, 8, HALF // 8, 4, 2, 2))
    x = gl.reshape(gl.permute(x, (0, 2, 4, 6, 1, 3, 5)), (128, HALF))
    return gl.convert_layout(x, _thread_layout(HALF), True)


@gluon.jit
def _from_threads(kept, TURN: gl.constexpr):
    """What [`_by_thread`] was given."""
    HALF: gl.constexpr = kept.shape[1]
    x = gl.reshape(kept.load(_thread_layout(HALF)), (4, 8, 4, 2, 2, HALF // 8, 2))
    c, s = gl.split(gl.reshape(gl.permute(x, (0, 4, 1, 5, 2, 6, 3)), (64, HALF, 2)))
    return gl.convert_layout(c, TURN, True), gl.convert_layout(s, TURN, True)


@gluon.jit
def _queries(queries, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Both halves of the queries, scaled, (1, COLUMNS, HEAD_DIM / 2) each: few rows come several times, side by side,
    and those that are not there are like the last."""
    QUERY: gl.constexpr = _query_layout(HEAD_DIM)
    query, rows, scaling = queries
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, gl.SliceLayout(2, QUERY)))
    pair = gl.arange(0, HEAD_DIM // 2, gl.SliceLayout(0, gl.SliceLayout(1, QUERY)))
    row = gl.minimum(column // (COLUMNS // ROWS), rows - 1)
    at = (row * HEAD_DIM)[None, :, None] + pair[None, None, :]
    first = (gl.load(query + at).to(gl.float32) * scaling).to(gl.float16)
    second = (gl.load(query + HEAD_DIM // 2 + at).to(gl.float32) * scaling).to(gl.float16)
    return first, second


@gluon.jit
def _turned_back(straight, start_cos, start_sin, tile, SIDE: gl.constexpr, HEAD_DIM: gl.constexpr):
    """(PARTS / SIDE * COLUMNS, HEAD_DIM): queries as the keys of each part want them, which are turned by their places
    only: it is queries, who are few, that are turned to where the part begins. `SIDE` parts take turns in columns."""
    QUERY: gl.constexpr = _query_layout(HEAD_DIM)
    first, second = straight
    several = gl.arange(0, PARTS // SIDE, gl.SliceLayout(1, gl.SliceLayout(2, QUERY))) * SIDE
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, gl.SliceLayout(2, QUERY)))
    pair = gl.arange(0, HEAD_DIM // 2, gl.SliceLayout(0, gl.SliceLayout(1, QUERY)))
    part = tile * PARTS + several[:, None] + (column % SIDE)[None, :]
    at = part[:, :, None] * (HEAD_DIM // 2) + pair[None, None, :]
    c, s = gl.load(start_cos + at), gl.load(start_sin + at)
    x = gl.join(first * c + second * s, second * c - first * s)
    return gl.reshape(gl.permute(x, (0, 1, 3, 2)), (PARTS // SIDE * COLUMNS, HEAD_DIM))


@gluon.jit
def _scores(keys, c, s, turned, part: gl.constexpr, ROWS: gl.constexpr):
    """(64, ROWS) scores of a part: of rebuilt keys, and queries as [`_turned_back`] orders them, in shared memory."""
    HEAD_DIM: gl.constexpr = keys.shape[1]
    SIDE: gl.constexpr = _side_by_side(ROWS)
    queries = turned.slice(part // SIDE * COLUMNS, COLUMNS)
    TURN: gl.constexpr = c.type.layout
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    first, second = gl.split(gl.permute(gl.reshape(keys, (64, 2, HEAD_DIM // 2)), (0, 2, 1)))
    first, second = gl.convert_layout(first, TURN, True), gl.convert_layout(second, TURN, True)
    x = gl.permute(gl.join(_turned(first, c, second, s, True), _turned(second, c, first, s, False)), (0, 2, 1))
    x = gl.convert_layout(gl.reshape(x, (64, HEAD_DIM)), gl.DotOperandLayout(0, SCORES, 2), True)
    scores = gl.zeros([64, COLUMNS], gl.float32, SCORES)
    scores = warpgroup_mma(x, queries.permute((1, 0)), scores, use_acc=False)
    if ROWS * SIDE < COLUMNS:  # each came several times
        scores = gl.max(gl.reshape(scores, (64, ROWS, COLUMNS // SIDE // ROWS, SIDE)), axis=2)
    if SIDE > 1:
        scores = gl.split(gl.reshape(scores, (64, ROWS, SIDE)))[part % SIDE]
    return scores


@gluon.jit
def _turned(x, c, y, s, MINUS: gl.constexpr):
    """x c - y s, or x c + y s. Two numbers at a time: from single ones, ptxas believes that the sums of a product are
    read before it is done."""
    return gl.inline_asm_elementwise(
        """{
            .reg .b32 other;
            mul.f16x2 other, $3, $4;
            """
        + ("neg.f16x2 other, other;" if MINUS else "")
        + """
            fma.rn.f16x2 $0, $1, $2, other;
        }""",
        "=r,r,r,r,r",
        [x, c, y, s],
        dtype=gl.float16,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _exponentials(scores, tile, num_tiles, num_blocks, rows, out, TOLD: gl.constexpr, ROWS: gl.constexpr):
    """Writes what [`hopper_score_kernel`] makes of the scores (64, ROWS) of all parts of a tile."""
    OUT: gl.constexpr = _out_layout(ROWS)
    weights, maxima, seen = out
    # warp, half of the block, eight; rows; the two bits of a part
    x = gl.reshape(gl.join(gl.join(scores[0], scores[1]), gl.join(scores[2], scores[3])), (4, 2, 8, ROWS, 2, 2))
    x = gl.convert_layout(gl.reshape(gl.permute(x, (3, 0, 2, 1, 4, 5)), (ROWS, 4, 64)), OUT, True)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, OUT)))[:, None]
    of_64 = tile * 4 + gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, OUT)))[None, :]
    place = gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, OUT)))[None, None, :]
    if TOLD:
        count = gl.load(seen + of_64, mask=of_64 < num_tiles, other=0)
        x = gl.where(place < count[:, :, None], x, float("-inf"))
    elif (tile + 1) * (TOKENS // 32) > num_blocks:  # the last
        x = gl.where(of_64[:, :, None] * 2 + place // 32 < num_blocks, x, NOTHING)
    maximum = gl.max(x, axis=2)
    if TOLD:
        maximum = gl.maximum(maximum, NOTHING)
    x = gl.exp2(x - maximum[:, :, None]).to(gl.float16)
    there, at = (row < rows) & (of_64 < num_tiles), row * num_tiles + of_64
    gl.store(maxima + at, maximum, mask=there)
    gl.store(weights + ((at * 64)[:, :, None] + place), x, mask=there[:, :, None] & (place >= 0))

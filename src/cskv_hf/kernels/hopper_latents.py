"""How the kernels for Hopper GPUs read latents: each thread the very words that hold its own share of a product.

A word of 4-bit codes holds eight tokens of a channel; codes of other widths become such words first.

Keys stand in a product token by token (hopper_scores.py): of 64 tokens and 16 channels a thread has two tokens of four
channels. So 256 tokens are read at once and taken in four parts, the first bytes of all words, the second, and so on.
Which token stands where is a matter of naming: within a part places are four apart, and the next part is one token on,
so only the turn of the queries changes.

Values stand channel by channel (hopper_values.py): of 16 channels and 16 tokens a thread has four tokens of two
channels, two neighbours each, which are the halves of a word. So 64 tokens are two words of a channel, in four
products.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

TOKENS = gl.constexpr(256)  # of a tile
PARTS = gl.constexpr(4)  # of a tile, one byte of all its words each
ONE = gl.constexpr(0x3C00)  # a range of minimum 1 and step 0


@gluon.jit
def share_at(at, FOURS: gl.constexpr):
    """What there is to know of a group's channels in a tier: where they begin in `key_B`, their number, the first of
    them that is read, the places of the constant (or -1) and of their own first among those that are read, the first
    word of the tier, its channels, and its first range."""
    first_row, channels, first, has_constant = gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3)
    word, width, first_range = gl.load(at + 4), gl.load(at + 5), gl.load(at + 6)
    lead, constant = first * 0, channels
    if FOURS:
        lead = first % 4
        constant = (lead + channels + 3) // 4 * 4
    constant = gl.where(has_constant != 0, constant, -1)
    return first_row, channels, first - lead, constant, lead, word, width, first_range


@gluon.jit
def fetch(stored, shares, tile, PRODUCT: gl.constexpr, GROUP_CHANNELS: gl.constexpr, FOURS: gl.constexpr):
    """Words of every bit plane of a product's channels (32 eights of tokens, channels), and their ranges, (32,
    channels / 4) if read by fours. In place of blocks and channels that are not there others are read."""
    START: gl.constexpr = PRODUCT[1]
    SIZE: gl.constexpr = PRODUCT[2]
    BITS: gl.constexpr = PRODUCT[3]
    WORD: gl.constexpr = _word_layout(SIZE)
    PER_RANGE: gl.constexpr = 4 if FOURS else 1  # channels that a range is read for
    RANGE: gl.constexpr = _word_layout(SIZE, PER_RANGE)
    words, ranges, num_blocks, block_words, block_ranges = stored
    _, channels, first, _, lead, tier_word, width, first_range = shares[PRODUCT[0]]
    last = gl.maximum(lead + channels - 1, 0)
    # pointers move to the tile's first block, so that offsets from it are the same for every tile
    block_0 = gl.minimum(tile * (TOKENS // 32), num_blocks - 1)
    words, ranges, left = words + block_0 * block_words, ranges + block_0 * block_ranges, num_blocks - block_0
    if FOURS:  # or four words would be read one by one
        words = gl.multiple_of(words, 16)
    eight = gl.arange(0, 32, gl.SliceLayout(1, WORD))
    block = gl.where(eight // 4 < left, eight // 4, 0)
    place = START + gl.arange(0, SIZE, gl.SliceLayout(0, WORD))
    if FOURS:  # of which some may be another head's
        place = gl.minimum(place // 4, last // 4) * 4 + place % 4
    else:
        place = gl.minimum(place, last)
    at = (block * block_words)[:, None] + (tier_word + first + place)[None, :]
    rows, planes = plane_rows(eight, width, BITS), ()
    for i in gl.static_range(len(rows)):
        planes = planes + (_plane(words, at, rows[i][:, None], FOURS),)
    eight = gl.arange(0, 32, gl.SliceLayout(1, RANGE))
    block = gl.where(eight // 4 < left, eight // 4, 0)
    place = START + gl.arange(0, SIZE // PER_RANGE, gl.SliceLayout(0, RANGE)) * PER_RANGE
    of_range = first_range + (first + gl.minimum(place, last)) // GROUP_CHANNELS
    return planes, gl.load(ranges + ((block * block_ranges)[:, None] + of_range[None, :]))


@gluon.jit
def plane_rows(eight, width, BITS: gl.constexpr):
    """For every bit plane, where in a block the words of eights of tokens are, of a tier of so many channels."""
    rows = ()
    if BITS == 8:
        rows = (eight % 4 * width, (eight % 4 + 4) * width)
    if BITS & 4:
        rows = rows + (eight % 4 * width,)
    if BITS & 2:
        rows = rows + (((BITS & 4) + eight % 2) * width,)
    if BITS & 1:
        rows = rows + ((BITS & 6) * width + eight * 0,)
    return rows


@gluon.jit
def _plane(words, at, row, FOURS: gl.constexpr):
    """Words of a bit plane."""
    at = at + row
    if FOURS:
        at = gl.max_contiguous(gl.multiple_of(at, [1, 4]), [1, 4])
    return gl.load(words + at)


@gluon.constexpr_function
def _word_layout(size, each=1):
    """What a thread holds of (32 eights of tokens, every `each`-th channel), four neighbours: lanes 0 and 1 (the bits
    of its number in the warp) stand for neighbours in a row of a product, lanes 2 to 4 and the warp for rows."""
    bases = [[0, (1 << i) // each] for i in range(size.bit_length() - 1)]
    registers = [base for base in bases[:2] + bases[4:] if base[1]]
    lanes = [*bases[2:4], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[8, 0], [16, 0]], [], [32, size // each])


@gluon.jit
def key_words(fetched, shares, PRODUCT: gl.constexpr):
    """What [`fetch`] gave, as words of 4-bit codes, and ranges, in which the constant has its own. Nothing before this
    may look at what is fetched: it would wait for it."""
    planes, pair = fetched
    START: gl.constexpr = PRODUCT[1]
    PER_RANGE: gl.constexpr = planes[0].shape[1] // pair.shape[1]
    place = START + gl.arange(0, pair.shape[1], gl.SliceLayout(0, pair.type.layout)) * PER_RANGE
    pair = gl.where((place == shares[PRODUCT[0]][3])[None, :], ONE, pair)
    q = (gl.arange(0, 32, gl.SliceLayout(1, planes[0].type.layout)) % 4)[:, None]
    return in_words(planes, q, PRODUCT[3]), pair


@gluon.jit
def in_words(planes, q, BITS: gl.constexpr):
    """Words of all bit planes as such of 4-bit codes: the last 4 bits of all codes, and the others, if there are.

    Args:
        q: which eight of its block a word is of.
    """
    if BITS == 8:
        low, high = planes[0], planes[1]
        codes = (low & 0x0F0F0F0F) | (high & 0x0F0F0F0F) << 4, (low >> 4 & 0x0F0F0F0F) | (high & -0x0F0F0F10)
    else:
        codes = ()
        if BITS & 4:
            codes = (planes[0],)
        if BITS & 3:
            if BITS & 2:
                rest = planes[BITS // 4] >> 2 * (q // 2) & 0x33333333
                if BITS & 1:
                    rest = rest | (planes[BITS // 4 + 1] >> q & 0x11111111) << 2
            else:
                rest = planes[BITS // 4] >> q & 0x11111111
            codes = codes + (rest,)
    return codes


@gluon.jit
def latents_of(fetched, part: gl.constexpr, thousands, SUMS: gl.constexpr):
    """(64 tokens, channels) of one part of [`key_words`], as a product wants them from registers."""
    codes, pair = fetched
    SIZE: gl.constexpr = codes[0].shape[1]
    first, second = gl.split(gl.reshape(codes[0], (32, SIZE // 2, 2)))
    if pair.shape[1] < SIZE:  # of four channels
        minimum, step = _low_halves(pair, pair), _high_halves(pair, pair)
        minimum = gl.reshape(gl.join(minimum, minimum), (32, SIZE // 2))
        step = gl.reshape(gl.join(step, step), (32, SIZE // 2))
        minimum = gl.convert_layout(minimum, first.type.layout, True)
        step = gl.convert_layout(step, first.type.layout, True)
    else:
        minimum, step = gl.split(gl.reshape(pair, (32, SIZE // 2, 2)))
        minimum, step = _low_halves(minimum, step), _high_halves(minimum, step)
    early, late = _of_part(first, second, part)
    if len(codes) == 1:
        early = _two_values(early, step, minimum, thousands)
        late = _two_values(late, step, minimum, thousands)
    else:
        first, second = gl.split(gl.reshape(codes[1], (32, SIZE // 2, 2)))
        more_early, more_late = _of_part(first, second, part)
        early = _two_wide_values(early, more_early, step, minimum, thousands)
        late = _two_wide_values(late, more_late, step, minimum, thousands)
    # warp, eight, sixteen, bits 3, 2, 1 of the channel, half of the block, bit 0
    x = gl.reshape(both_halves(gl.join(early, late)), (4, 8, SIZE // 16, 2, 2, 2, 2, 2))
    x = gl.reshape(gl.permute(x, (0, 6, 1, 2, 5, 3, 4, 7)), (64, SIZE))
    return gl.convert_layout(x, gl.DotOperandLayout(0, SUMS, 2), True)


@gluon.jit
def value_latents_of(codes, pair, thousands, SUMS: gl.constexpr):
    """(channels, 64 tokens) of [`in_words`], as a product wants them from registers.

    Args:
        codes, pair: (8 eights of tokens, channels).
    """
    SIZE: gl.constexpr = pair.shape[1]
    minimum, step = _low_halves(pair, pair), _high_halves(pair, pair)
    quarters = ()
    for i in gl.static_range(4):  # half of the block, and bit 0 of the byte; bit 1 is that of the half of the word
        quarter = codes[0] >> (i // 2 * 4 + i % 2 * 8)
        if len(codes) == 1:
            quarter = _two_values(quarter, step, minimum, thousands)
        else:
            more = codes[1] >> (i // 2 * 4 + i % 2 * 8)
            quarter = _two_wide_values(quarter, more, step, minimum, thousands)
        quarters = quarters + (quarter,)
    x = gl.join(gl.join(quarters[0], quarters[1]), gl.join(quarters[2], quarters[3]))
    # block, eight of it, channel, bit 0 of the byte, half of the block, half of the word
    x = gl.reshape(both_halves(x), (2, 4, SIZE, 2, 2, 2))
    x = gl.reshape(gl.permute(x, (2, 0, 4, 3, 1, 5)), (SIZE, 64))
    return gl.convert_layout(x, gl.DotOperandLayout(0, SUMS, 2), True)


@gluon.jit
def both_halves(x):
    """(..., 2) float16 of words."""
    low = (x & 0xFFFF).to(gl.uint16).to(gl.float16, bitcast=True)
    high = (x >> 16).to(gl.uint16).to(gl.float16, bitcast=True)
    return gl.join(low, high)


@gluon.jit
def _of_part(first, second, part: gl.constexpr):
    """Of words of two channels one byte: in the last 4 bits of both halves, the codes of a token, and those of the
    token half a block on."""
    if part < 2:
        both = _low_halves(first, second)
    else:
        both = _high_halves(first, second)
    return both >> (8 * (part % 2)), both >> (8 * (part % 2) + 4)


@gluon.jit
def _low_halves(a, b):
    """The low 16 bits of both words in one."""
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _high_halves(a, b):
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _two_values(codes, step, minimum, thousands):
    """Two latents of the codes in the last 4 bits of both halves: 1024 in float16 with a code in its last bits is 1024
    more than the code.

    Args:
        thousands: 1024 in float16, twice; as a constant it would cost an instruction.
    """
    return gl.inline_asm_elementwise(
        """{
            .reg .b32 code, minus;
            mov.b32 minus, 0xE400E400;  // -1024, twice
            lop3.b32 code, $1, 0x000F000F, $4, 0xEA;  // and, then or
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
def _two_wide_values(codes, more, step, minimum, thousands):
    """[`_two_values`] of codes that have more bits."""
    return gl.inline_asm_elementwise(
        """{
            .reg .b32 code, minus, more;
            mov.b32 minus, 0xE400E400;
            lop3.b32 code, $1, 0x000F000F, $4, 0xEA;
            and.b32 more, $5, 0x000F000F;
            mad.lo.u32 code, more, 16, code;
            add.f16x2 code, code, minus;
            fma.rn.f16x2 $0, code, $2, $3;
        }""",
        "=r,r,r,r,r,r",
        [codes, step, minimum, thousands, more],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )

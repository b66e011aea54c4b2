"""How the Triton kernels read latents: a tile of tokens and a piece of the channels at a time, see pieces.py.

Where blocks are packed in words and a channel has one range in a block, a tile is read word by word, and its tokens
are ordered as they come out: eight tokens of one channel lie in the same places of a word of every plane, whether it
has 4, 2 or 1 bits. Weights are stored in that order too, and nothing else needs to know it.

Two codes are worked on at once: they become the last bits of the two 16-bit floats of one register. `FORM` is a tuple
of constants that says how latents are stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Places in FORM: whether packed; whether read in words; the planes that there are, as a sum of their bits; tokens of a
# block; channels and tokens of a range; whether there are instructions of NVIDIA for two numbers at a time.
PACKED, WORDS, PLANES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
BLOCK_SIZE, GROUP_CHANNELS, GROUP_TOKENS = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
NVIDIA = tl.constexpr(6)
THOUSANDS = 0x64006400  # 1024 in float16, twice: a code in the last bits adds itself


@triton.jit
def token_in_tile(column, FORM: tl.constexpr):
    """Which token of its tile a column of latents is."""
    BLOCK: tl.constexpr = FORM[BLOCK_SIZE]
    if FORM[WORDS]:
        eight, half, byte = column // 8, column // 4 % 2, column // 2 % 2 + column % 2 * 2
        return eight // (BLOCK // 8) * BLOCK + half * (BLOCK // 2) + eight % (BLOCK // 8) * 4 + byte
    else:
        return column


@triton.jit
def of_row(data, ranges, batch, num_blocks, rank, block_bytes, block_ranges, FORM: tl.constexpr):
    """Where the codes and the ranges of a row of the batch begin, and all that is the same for its pieces."""
    num_tokens = num_blocks * FORM[BLOCK_SIZE]
    if FORM[PACKED]:
        blocks = batch * num_blocks
        data += blocks * (block_bytes // 4 if FORM[WORDS] else block_bytes)
        return data, ranges + blocks * block_ranges, num_tokens, rank, block_bytes, block_ranges
    else:
        return data + batch * num_tokens * rank, ranges, num_tokens, rank, block_bytes, block_ranges


@triton.jit
def piece_at(pieces, index):
    """A row of the table of pieces."""
    at = pieces + 8 * index
    start, count, bits, word = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    return start, count, bits, word, tl.load(at + 4), tl.load(at + 5), tl.load(at + 6), tl.load(at + 7)


@triton.jit
def fetch(row, piece, tile, FORM: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr):
    """What is to be read of a tile and a piece, which [`latents_of`] makes latents of. Tokens and channels that are
    not there are read from the last ones."""
    data, ranges, num_tokens, rank, block_bytes, block_ranges = row
    _, count, bits, word, width, first_range, index, constant = piece
    KINDS: tl.constexpr = FORM[PLANES]
    BLOCK: tl.constexpr = FORM[BLOCK_SIZE]
    channel = tl.minimum(tl.arange(0, CHUNK), tl.maximum(count - constant - 1, 0))[None, :]
    of_range = first_range + (index + channel) // FORM[GROUP_CHANNELS]
    if FORM[WORDS]:
        eight = tl.arange(0, TILE // 8)
        q = (eight % (BLOCK // 8))[:, None]
        block = tl.minimum(tile * (TILE // BLOCK) + eight // (BLOCK // 8), num_tokens // BLOCK - 1)[:, None]
        # offsets of 32 bits: they take half the registers of pointers
        pair = tl.load(ranges + (block * block_ranges + of_range))
        words, channel = block * (block_bytes // 4), word + channel
        nothing = q * 0 + channel * 0
        low_8, high_8, word_4, word_2, word_1 = nothing, nothing, nothing, nothing, nothing
        if KINDS & 8:
            has = nothing + (bits & 8) != 0
            low_8 = tl.load(data + (words + (channel + q * width)), mask=has, other=0)
            high_8 = tl.load(data + (words + (channel + (q + BLOCK // 8) * width)), mask=has, other=0)
        if KINDS & 4:
            at = channel + ((bits & 8) * (BLOCK // 32) + q) * width
            word_4 = tl.load(data + (words + at), mask=nothing + (bits & 4) != 0, other=0)
        if KINDS & 2:
            at = channel + ((bits & 12) * (BLOCK // 32) + q % (BLOCK // 16)) * width
            word_2 = tl.load(data + (words + at), mask=nothing + (bits & 2) != 0, other=0)
        if KINDS & 1:
            at = channel + ((bits & 14) * (BLOCK // 32) + q % (BLOCK // 32)) * width
            word_1 = tl.load(data + (words + at), mask=nothing + (bits & 1) != 0, other=0)
        return pair, low_8, high_8, word_4, word_2, word_1
    else:
        token = tl.minimum(tile * TILE + tl.arange(0, TILE), num_tokens - 1)
        if FORM[PACKED]:
            block, in_block = token // BLOCK, token % BLOCK
            row_0 = (block.to(tl.int64) * block_bytes)[:, None]
            code = _codes(data, row_0, in_block, word + channel, width, bits, BLOCK)
            # ranges of a tier lie time by time
            groups = (width + FORM[GROUP_CHANNELS] - 1) // FORM[GROUP_CHANNELS]
            time = (in_block // FORM[GROUP_TOKENS])[:, None]
            minimum, step = _halves(tl.load(ranges + (block * block_ranges)[:, None] + of_range + time * groups))
            return minimum.to(tl.float32) + step.to(tl.float32) * code.to(tl.float32)
        else:
            return tl.load(data + token.to(tl.int64)[:, None] * rank + word + channel)


@triton.jit
def latents_of(
    fetched, piece, thousands, FORM: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """(CHUNK, TILE) latents of what [`fetch`] gave, columns in the order of [`token_in_tile`]. Channels beyond the
    piece hold numbers that mean nothing.

    Args:
        thousands: `THOUSANDS`; as a constant of the code it would cost an instruction for each pair of codes.
    """
    _, count, bits, _, _, _, _, constant = piece
    KINDS: tl.constexpr = FORM[PLANES]
    BLOCK: tl.constexpr = FORM[BLOCK_SIZE]
    one = (tl.arange(0, CHUNK) == tl.where(constant != 0, count - 1, -1))[None, :]
    if FORM[WORDS]:
        pair, low_8, high_8, word_4, word_2, word_1 = fetched
        pair = tl.where(one, 0x3C00, pair)  # a minimum of 1 and a step of 0
        q = (tl.arange(0, TILE // 8) % (BLOCK // 8))[:, None]
        codes = tl.zeros([TILE // 8, CHUNK, 2, 2], dtype=tl.int32) + thousands
        if KINDS == 4:
            codes = _with_plane(codes, word_4, word_4, 15, 4)
        else:  # each kind of plane that this piece has
            if KINDS & 8:  # noqa: SIM102 (decided while compiling)
                if bits & 8 != 0:
                    codes = _with_plane(codes, low_8, high_8, 255, 0)
            if bits & 4 != 0:
                codes = _with_plane(codes, word_4, word_4, 15 << (bits & 8), 4)
            if bits & 2 != 0:
                turned = _turned_left(word_2, (bits & 12) - 2 * (q // (BLOCK // 16)))
                codes = _with_plane(codes, turned, turned, 3 << (bits & 12), 4)
            if bits & 1 != 0:
                turned = _turned_left(word_1, (bits & 14) - q // (BLOCK // 32))
                codes = _with_plane(codes, turned, turned, 1 << (bits & 14), 4)
        if FORM[NVIDIA] and DTYPE == tl.float16:  # noqa: SIM300
            step, minimum = pair >> 16 & 0xFFFF | pair & -65536, pair << 16 | pair & 0xFFFF
            first, second = _halves(_two_values(codes, _four_times(step), _four_times(minimum)))
            eight = tl.join(first, second)
        else:
            minimum, step = _halves(_four_times(pair))
            minimum, step = tl.join(minimum, minimum).to(DTYPE), tl.join(step, step).to(DTYPE)
            first, second = _halves(codes)
            eight = (tl.join(first, second) - tl.full([1], 1024, tl.float16)).to(DTYPE) * step + minimum
        return tl.reshape(tl.permute(eight, (1, 0, 2, 3, 4)), (CHUNK, TILE))
    else:
        return tl.trans(tl.where(one, 1.0, fetched).to(DTYPE))


@triton.jit
def _with_plane(codes, low_word, high_word, mask, HIGH: tl.constexpr):
    """Adds the bits of a plane to codes of eight tokens, two in a number: (..., half of the block, byte % 2)."""
    low = tl.join(low_word, _turned_left(high_word, 32 - HIGH))
    return codes | tl.join(low, _turned_left(low, 24)) & (mask * 0x10001)


@triton.jit
def _turned_left(word, bits):
    """Words with their bits turned in a circle."""
    word = word.to(tl.uint32, bitcast=True)
    return (word << (bits & 31) | word >> (-bits & 31)).to(tl.int32, bitcast=True)


@triton.jit
def _halves(pair):
    """Both 16-bit halves of words as float16."""
    low = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return low, (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _four_times(x):
    """(..., 2, 2) of the same."""
    two = tl.join(x, x)
    return tl.join(two, two)


@triton.jit
def _two_values(codes, step, minimum):
    """Two latents of two codes, on an NVIDIA GPU, whose compiler would move halves of registers about."""
    return tl.inline_asm_elementwise(
        """{
            .reg .b32 code, minus;
            mov.b32 minus, 0xE400E400;  // -1024, twice
            add.f16x2 code, $1, minus;
            fma.rn.f16x2 $0, code, $2, $3;
        }""",
        "=r,r,r,r",
        [codes, step, minimum],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _codes(data, row_0, token, first, width, bits, BLOCK: tl.constexpr):
    """Codes (tokens, channels), one by one: binary digits of `bits` are the widths of the planes, wide ones first.

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
    return tl.load(data + at, mask=at * 0 + has != 0, other=0).to(tl.int32)

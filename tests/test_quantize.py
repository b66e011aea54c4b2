"""Packing: exact, and quantisation error within half a step, for every number of bits and shape of groups."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import quantised_by_definition

from cskv_hf.quantize import (
    PackedLayout,
    _to_half_grid,
    bit_runs,
    channel_bits,
    dequantize,
    pack,
    quantize,
    unpack,
)


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_and_unpack_are_inverse_and_small(bits):
    for tokens in (40, 64):  # five rows of a plane of one bit, which do not make words, and eight
        codes = torch.randint(0, 2**bits, (3, tokens, 5), dtype=torch.uint8)
        packed = pack(codes, bits)
        assert packed.dtype == torch.uint8 and packed.shape == (3, tokens * bits // 8 * 5)
        assert torch.equal(unpack(packed, bits, tokens), codes)


def test_where_a_code_lies():
    """Number by number from the definition: planes one behind the other, wide ones first; of a plane, four rows of a
    channel together."""
    tokens, channels, bits = 64, 3, 7
    codes = torch.randint(0, 2**bits, (tokens, channels), dtype=torch.uint8)
    packed, start, below = pack(codes, bits), 0, 0
    for width in (4, 2, 1):
        rows = tokens * width // 8
        for token in range(tokens):
            row, place = token % rows, token // rows
            for channel in range(channels):
                byte = int(packed[start + (row // 4 * channels + channel) * 4 + row % 4])
                assert byte >> place * width & 2**width - 1 == int(codes[token, channel]) >> below & 2**width - 1
        start, below = start + rows * channels, below + width


@pytest.mark.parametrize("group", [(32, 1), (32, 4), (1, 3), (8, 2), (16, 100)])
def test_equals_the_definition(group):
    layout = PackedLayout((8, 4, 4, 3, 2, 4, 5, 2, 2, 7), 32, *group)
    latents = torch.randn(2, 64, 10, dtype=torch.float64) * torch.logspace(0, -2, 10) + torch.linspace(-3, 9, 10)
    codes, ranges = quantize(latents, layout)
    assert codes.shape == (2, 2, layout.code_bytes) and codes.dtype == torch.uint8
    assert ranges.shape == (2, 2, layout.num_ranges, 2) and ranges.dtype == torch.float16
    assert layout.bytes_per_token * 64 * 2 == codes.nbytes + ranges.nbytes
    torch.testing.assert_close(
        dequantize(codes, ranges, layout, torch.float64), quantised_by_definition(latents, layout), atol=1e-12, rtol=0
    )


@given(
    bits=st.lists(st.integers(1, 8), min_size=1, max_size=12),
    tokens=st.sampled_from([0, 16, 48]),
    group_tokens=st.sampled_from([1, 4, 16]),
    group_channels=st.integers(1, 5),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    offset=st.sampled_from([0.0, -7.0, 500.0]),
)
@settings(max_examples=60, deadline=None)
def test_error_is_at_most_half_a_step(bits, tokens, group_tokens, group_channels, scale, offset):
    """Wherever the values lie: the minimum is a float. The step is the group's range over the levels, and the two
    16-bit floats are rounded outwards by at most one of their own steps (2^-10 of their size)."""
    layout = PackedLayout(tuple(bits), 16, group_tokens, group_channels)
    latents = torch.randn(2, tokens, len(bits), dtype=torch.float64) * scale + offset
    restored = dequantize(*quantize(latents, layout), layout, torch.float64)
    assert restored.shape == latents.shape
    if tokens == 0:
        return
    for b in set(bits):
        channels = [i for i, x in enumerate(bits) if x == b]
        spread = latents[..., channels].amax() - latents[..., channels].amin()
        slack = 2**-9 * (abs(offset) + 8 * scale) + 1e-7
        step = (spread + slack) / (2**b - 1) * (1 + 2**-9)
        assert (restored - latents)[..., channels].abs().max() <= step / 2 + slack / (2**b - 1) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranges_are_rounded_outwards(dtype):
    """To the neighbouring float16 as torch knows it, over all its sizes: subnormal ones, powers of two and what lies
    just beside them, the largest."""
    torch.manual_seed(0)
    halves = torch.arange(0, 2**15 - 2**10, 7, dtype=torch.int16).view(torch.float16).to(dtype)  # finite, from 0
    values = torch.cat(
        [halves, halves * 1.0002, halves * 0.9999, torch.randn(2000, dtype=dtype), halves.new_full((1,), 1e-9)]
    )
    values = torch.cat([values, -values]).clamp(-65504, 65504)
    for up, beyond in ((True, torch.inf), (False, -torch.inf)):
        nearest = values.to(torch.float16)
        inside = nearest.to(dtype) < values if up else nearest.to(dtype) > values
        expected = torch.where(inside, torch.nextafter(nearest, nearest.new_tensor(beyond)), nearest)
        assert torch.equal(_to_half_grid(values, up), expected.to(dtype))


def test_what_a_clamped_zero_point_does():
    """The paper's code stores an integer zero point clamped to [0, 15]: latents that lie far from zero on one side
    are clipped to nonsense, at a spread of one. A float minimum does not care where they lie."""
    torch.manual_seed(0)
    for mean, clamped_at_least, ours_at_most in ((0.0, 0.0, 0.1), (5.0, 0.2, 0.02), (10.0, 0.5, 0.02)):
        latents = torch.randn(1, 32, 64, dtype=torch.float64) + mean
        low, high = latents.amin(1, keepdim=True), latents.amax(1, keepdim=True)
        scale = (high - low) / 15
        zero = (-low / scale).round().clamp(0, 15)
        clamped = ((latents / scale + zero).round().clamp(0, 15) - zero) * scale
        layout = PackedLayout((4,) * 64)
        ours = dequantize(*quantize(latents, layout), layout, torch.float64)
        error = [float((x - latents).norm() / latents.norm()) for x in (clamped, ours)]
        assert error[0] >= clamped_at_least and error[1] <= ours_at_most, (mean, error)


def test_extreme_values_stay_finite():
    layout = PackedLayout((4, 8), 8, 8)
    latents = torch.tensor([1e6, -1e6, 0.0, 1e-30] * 4, dtype=torch.float32).view(1, 8, 2)
    assert torch.isfinite(dequantize(*quantize(latents, layout), layout, torch.float32)).all()
    constant = torch.full((1, 8, 2), 3.0)
    assert torch.equal(dequantize(*quantize(constant, layout), layout, torch.float32), constant)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"bits": (9,)}, "1 to 8, got 9"),
        ({"bits": (4,), "block_size": 12}, "multiple of 8 for packed latents, got 12"),
        ({"bits": (4,), "group_tokens": 5}, "divisor of block_size=32, got 5"),
        ({"bits": (4,), "group_channels": 0}, "at least 1, got 0"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        PackedLayout(**settings)


def test_runs_of_bits_and_back():
    bits, ranks = (8, 8, 4, 2, 8, 4, 4), (4, 3)
    runs = bit_runs(bits, ranks)
    assert runs == [[[8, 2], [4, 1], [2, 1]], [[8, 1], [4, 2]]]
    assert channel_bits(runs) == bits

"""A layer with random factors and a compressed past of random latents, for tests of kernels without a model."""

import torch

from cskv_hf import CSKVConfig
from cskv_hf.attention import attend_in_torch
from cskv_hf.factors import LayerFactors
from cskv_hf.handover import CompressedKV
from cskv_hf.latents import Latents
from cskv_hf.quantize import PackedLayout, quantize
from cskv_hf.rope import RotaryFrequencies
from cskv_hf.step import Step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # unless told otherwise


def layer(
    layout, key_bits, value_bits, heads, head_dim, dtype, group=None, device=DEVICE, block_size=32, value_group=None
):
    """Random factors of a layer; bits per channel of each key group and of the values, or how many plain channels."""
    torch.manual_seed(0)
    plain = isinstance(value_bits, int)
    key_ranks = tuple(k if plain else len(k) for k in key_bits)
    value_rank = value_bits if plain else len(value_bits)
    config = CSKVConfig(
        key_rank=sum(key_ranks),
        value_rank=value_rank,
        bits=16 if plain else 4,  # that the channels' own replace
        key_layout=layout,
        key_group=group,
        value_group=value_group,
        block_size=block_size,
    )
    flat = () if plain else tuple(b for bits in key_bits for b in bits)
    kv_dim, key_rank = heads * head_dim, sum(key_ranks)

    def matrix(*shape):
        return (torch.randn(shape) / shape[-1] ** 0.5).to(device, dtype)

    return LayerFactors(
        key_A=matrix(key_rank, kv_dim // len(key_ranks)),
        key_B=matrix(kv_dim // len(key_ranks), key_rank),
        value_A=matrix(value_rank, kv_dim),
        value_B=matrix(kv_dim, value_rank),
        key_mean=matrix(1, kv_dim) * 3,
        value_mean=matrix(1, kv_dim) * 3,
        key_spectrum=torch.ones(1, key_rank),
        key_ranks=key_ranks,
        key_format=config.format_of("key", flat, key_rank),
        value_format=config.format_of("value", () if plain else value_bits, value_rank),
        num_key_value_heads=heads,
        head_dim=head_dim,
    )


def past(factors, batch, num_old, dtype, positions=None, num_new=1):
    """A compressed past of random latents behind 7 exact tokens, where the factors are."""
    torch.manual_seed(1)
    device = factors.key_A.device

    def states(*shape):
        return torch.randn(shape).to(device, dtype)

    exact = (batch, factors.num_key_value_heads, 7, factors.head_dim)
    if positions is None:
        positions = (100 + torch.arange(num_old))[None].expand(batch, -1)
    frequencies = RotaryFrequencies(10000.0 ** -torch.linspace(0, 1, factors.head_dim // 2, device=device), 1.1)
    step = Step(num_old + 7 - num_new, num_new, 0, num_old, 7, None, positions.to(device), frequencies)
    latents = [
        Latents.of(f, states(batch, num_old, f.rank).float() * 2 + 1, dtype)
        for f in (factors.key_format, factors.value_format)
    ]
    return CompressedKV(states(*exact), states(*exact), *latents, factors, step, step.turns(frequencies))


CASES = {
    "plain, head": ("head", (5, 19), 21, 2, 32),
    "plain, joint": ("joint", (33,), 40, 2, 64),
    "packed, head": ("head", ((8, 8, 6, 4, 4, 4, 3, 2), (8, 4, 4, 3, 3, 3, 2)), (8, 6, 4, 4, 4, 3, 2, 2), 2, 32),
    "packed, joint": ("joint", ((8,) * 3 + (5,) * 2 + (4,) * 20 + (1,) * 5,), (7, 7, 4, 4, 2), 2, 32),
    "packed, groups": ("group:2", ((4,) * 18, (6, 4, 2)), (4,) * 130, 4, 32),
    "bits that do not fall": ("head", ((2, 4, 2, 8), (4, 2, 4)), (2, 8, 2), 2, 32),
    "one KV head": ("head", ((4, 4, 3),), (4, 2), 1, 128),
}


def widened(kv):
    """The same past with everything that is not packed in float32."""
    tensors = {
        name: value.float() if isinstance(value, torch.Tensor) else value for name, value in vars(kv.factors).items()
    }
    latents = [
        Latents(x.format, tuple(t.float() if len(x.tensors) == 1 else t for t in x.tensors))
        for x in (kv.key_latents, kv.value_latents)
    ]
    exact = kv.exact_keys.float(), kv.exact_values.float()
    return CompressedKV(*exact, *latents, LayerFactors(**tensors), kv.step, kv.turns)


def error_against_torch(attend, query, kv, *masks):
    """Of one way to attend, relative to the torch path in float32."""
    scaling = query.shape[-1] ** -0.5
    ours, oracle = attend(query, kv, scaling, *masks), attend_in_torch(query.float(), widened(kv), scaling, *masks)
    assert ours.dtype == query.dtype and torch.isfinite(ours).all()
    return float((ours.float() - oracle).norm() / oracle.norm())


def check_quantizer(quantize_by_kernels, block_size, times, group_channels, device="cpu"):
    """The same bytes as the torch code, whatever the values and however tiers and groups of ranges divide: `times`
    ranges in a block, if that divides it."""
    bits = (8, 7, 6, 5, 4, 3, 2, 1) * 5 + (4,) * 33 + (2, 8, 2)
    tokens = block_size // times if block_size % times == 0 else block_size
    layout = PackedLayout(bits, block_size, tokens, group_channels)
    torch.manual_seed(0)
    latents = torch.randn(2, 3 * block_size, len(bits)) * torch.logspace(-9, 6, len(bits)) + torch.randn(len(bits))
    latents[0, :, 3] = 0.1
    latents[1, :block_size] *= 1e-7  # steps and minima that float16 has only as denormal numbers, or not at all
    latents[1, block_size : 2 * block_size] = 3.5
    latents[0, 1, 5] = torch.nan
    codes, ranges = (t.cpu() for t in quantize_by_kernels(latents.to(device), layout))
    expected_codes, expected_ranges = quantize(latents, layout)
    assert expected_ranges.isnan().any()  # is not hidden
    torch.testing.assert_close(ranges, expected_ranges, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(codes[:, 1:], expected_codes[:, 1:])  # all blocks but the one with NaN
    assert torch.equal(codes[1], expected_codes[1])


def as_added(mask, dtype):
    """A mask of what is seen, as one to be added to scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

"""Allocation: within the budget, nothing left over, and no better choice on the same levels."""

import itertools
import re

import pytest
import torch

from cskv_hf.allocate import PACKED_LEVELS, Side, allocate, allocate_average, quantisation_loss
from cskv_hf.config import CSKVConfig
from cskv_hf.model_shape import ModelShape
from cskv_hf.plan import LayerSpectra, check_budget, plan, store_plan
from cskv_hf.quantize import PackedLayout, dequantize, quantize


def predicted_loss(sides, bits):
    """What [`allocate`] minimises, in the units of the energies."""
    total = 0.0
    for side, groups in zip(sides, bits):
        for energies, noises, channels in zip(side.energies, side.rounding or side.energies, groups):
            for energy, noise, b in zip(energies.tolist(), noises.tolist(), channels):
                share = quantisation_loss(b, side.group_tokens * side.group_channels)
                total += noise * share if b else energy
    return total


def spectra(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for groups, channels, scale in shapes:
        energies = torch.rand(groups, channels, generator=generator, dtype=torch.float64) ** 6 * scale
        sides.append(Side(tuple(energies.sort(descending=True)[0])))
    return sides


SIDES = spectra((2, 16, 1.0), (1, 32, 30.0), (2, 16, 0.01), (1, 32, 0.2))


def spent(sides, bits):
    total = 0.0
    for side, groups in zip(sides, bits):
        flat = list(itertools.chain(*groups))
        total += side.bytes_per_token({n: flat.count(n) for n in set(flat)})
    return total


@pytest.mark.parametrize("levels", [(0, 16), (0, 4), (0, *PACKED_LEVELS)])
@pytest.mark.parametrize("budget", [20.0, 40.0, 90.0])
def test_within_the_budget_and_hardly_below(levels, budget):
    bits = allocate(SIDES, budget, levels)
    everything = [[[max(levels)] * len(e) for e in side.energies] for side in SIDES]
    assert min(budget, spent(SIDES, everything)) - 2.2 <= spent(SIDES, bits) <= budget


def test_bytes_are_those_of_the_packed_layout():
    for group in ((32, 1), (1, 5), (16, 3)):
        side = Side((torch.ones(11),), *group)
        bits = (8, 8, 4, 4, 4, 4, 3, 3, 2, 2, 2)
        layout = PackedLayout(bits, 32, *group)
        assert side.bytes_per_token({b: bits.count(b) for b in set(bits)}) == layout.bytes_per_token


RISING = torch.tensor([0.02, 0.03, 0.04])  # noise need not fall as energies do
DEAR_LATER, DEAR_FIRST = (torch.tensor([0.1, 9.0, 0.2]), RISING), (torch.tensor([15.0, 0.05, 0.05]), RISING)


@pytest.mark.parametrize("rounding", [None, DEAR_LATER, DEAR_FIRST])
@pytest.mark.parametrize("budget", [1.0, 1.5, 2.0, 2.5, 3.0])
def test_no_choice_of_the_same_cost_loses_less(rounding, budget):
    """A minimum of loss + price * rate for one price is optimal among all allocations of at most its own cost
    (Everett 1963): against every one of the 3^6 others that keep the first channels of each group."""
    energies = (torch.tensor([5.0, 1.0, 0.3]), torch.tensor([2.0, 0.5, 0.01]))
    side, levels = Side(energies, rounding=rounding), (0, 2, 4)
    chosen = allocate([side], budget, levels)
    cost, loss = spent([side], chosen), predicted_loss([side], chosen)
    for other in itertools.product(levels, repeat=6):
        candidate = [[list(other[:3]), list(other[3:])]]
        nested = all(a or not b for group in candidate[0] for a, b in itertools.pairwise(group))
        if other[0] and nested and spent([side], candidate) <= cost:
            assert predicted_loss([side], candidate) >= loss - 1e-12
    if rounding is DEAR_LATER and budget >= 2.5:
        assert chosen[0][0][1] > 0  # kept, though it is dear, for what comes after


def test_channels_of_more_energy_get_at_least_as_many_bits():
    bits = allocate(SIDES, 60.0, (0, *PACKED_LEVELS))
    flat = [
        (float(e), b)
        for side, groups in zip(SIDES, bits)
        for es, bs in zip(side.energies, groups)
        for e, b in zip(es, bs)
    ]
    flat.sort(reverse=True)
    firsts = {max(float(es[0]) for es in side.energies) for side in SIDES}  # kept whatever they carry
    ordered = [b for e, b in flat if e not in firsts]
    assert ordered == sorted(ordered, reverse=True)


def test_every_block_keeps_its_first_channel():
    """A layer without keys or values has nothing to store; a KV head without keys is as good as the budget says."""
    sides = spectra((4, 8, 1.0), (1, 8, 1e-9))
    sides[0] = Side((*sides[0].energies[:3], sides[0].energies[3] * 1e-9))
    bits = allocate(sides, 8.0, (0, 4))
    assert bits[1][0][0] == 4 and not any(bits[1][0][1:])
    assert any(bits[0][0]) and not any(bits[0][3])


def test_a_smaller_budget_keeps_a_subset():
    """Nested: what is kept at a small budget is kept at a larger one, with no fewer bits, so adapters can be cut."""
    large, small = allocate(SIDES, 80.0, (0, *PACKED_LEVELS)), allocate(SIDES, 30.0, (0, *PACKED_LEVELS))
    assert all(a >= b for x, y in zip(large, small) for g, h in zip(x, y) for a, b in zip(g, h))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_average_bits(bits):
    chosen = allocate_average(SIDES, 50.0, bits)
    kept = [b for groups in chosen for group in groups for b in group if b]
    assert 48.0 <= spent(SIDES, chosen) <= 50.0
    assert abs(sum(kept) / len(kept) - bits) < 0.35
    assert predicted_loss(SIDES, chosen) <= predicted_loss(SIDES, allocate(SIDES, 50.0, (0, bits))) + 1e-12


@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_channels_in_multiples(multiple):
    """Every number of bits a whole multiple of times in every key group and in the values, and within the budget."""
    shape = ModelShape("llama", 2, 2, 32)
    config = CSKVConfig(compression=0.7, rank_multiple=multiple)
    config.sensitivity = [[1.0, 3.0], [2.0, 1.0]]
    spectra = [LayerSpectra([torch.logspace(0, -k, 32) for k in (3, 5)], *[torch.logspace(0, -4, 64)] * 2)] * 2
    plans = plan(config, shape, spectra)
    for layer in plans:
        sides = [*torch.tensor(layer.key_bits).split(layer.key_ranks), torch.tensor(layer.value_bits)]
        counts = [n for bits in sides for n in bits.unique(return_counts=True)[1].tolist()]
        assert all(n % multiple == 0 for n in counts), counts
    store_plan(config, plans)
    config.model_shape = vars(shape)
    cost = sum(f.bytes_per_token(torch.bfloat16) for i in range(2) for f in config.formats(i))
    assert 0.8 * config.byte_budget(shape) <= cost <= config.byte_budget(shape)


def test_budget_too_small():
    with pytest.raises(
        ValueError, match=r"budget of 2\.0 bytes per token does not hold one channel of keys and of values"
    ):
        allocate(SIDES, 2.0, (0, 16))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_energies_that_are_no_numbers_are_refused(wrong):
    """They would leave every layer with the one channel it must keep."""
    with pytest.raises(ValueError, match=r"`sides`\[1\] has NaN or infinite energies.*Fit again"):
        allocate([SIDES[0], Side((torch.tensor([1.0, wrong]),))], 20.0, (0, 4))


def test_channels_of_the_same_energy_move_together():
    """Alike layers get the same; what does not suffice for all of them stays unspent."""
    sides = [Side((torch.tensor([8.0, 4.0, 2.0]),)) for _ in range(4)]
    bits = allocate(sides, 6 * 1.125, (0, 8))
    assert bits == [[[8, 0, 0]]] * 4 and spent(sides, bits) == 4 * 1.125


@pytest.mark.parametrize("bits, least", [(None, 2), (2, 2), (4, 4), (16, 16)])
def test_the_largest_compression_is_named_before_anything_is_known(bits, least):
    """A layer takes one channel of keys and one of values at least, whatever the spectra are; the compression that the
    message names is one at which that fits, and one thousandth more does not."""
    shape = ModelShape("llama", 3, 4, 8)
    with pytest.raises(ValueError, match=f"one channel of each at {least} bits takes") as refused:
        check_budget(CSKVConfig(compression=0.999, bits=bits), shape)
    largest = float(re.search(r"Use at most (0\.\d+)", str(refused.value))[1])
    spectra = [LayerSpectra([torch.logspace(0, -3, 8)] * 4, *[torch.logspace(0, -3, 32)] * 2)] * 3
    config = CSKVConfig(compression=largest, bits=bits, sensitivity=[[1.0, 1.0]] * 3)
    assert all(sum(layer.key_ranks) >= 1 and layer.value_rank >= 1 for layer in plan(config, shape, spectra))
    with pytest.raises(ValueError, match=f"Use at most {largest:.3f}"):
        check_budget(CSKVConfig(compression=largest + 0.001, bits=bits), shape)


def test_a_group_without_channels_stays_without():
    """Uniform ranks, of an adapter that gave a head nothing: no group gets more than it has, at any rank there is."""
    shape, held = ModelShape("llama", 1, 4, 8), (3, 0, 4, 1)
    keys, values = [torch.logspace(g, g - 3, n) for g, n in enumerate(held)], torch.logspace(0, -3, 8)
    spectra = [LayerSpectra(keys, values, values)]
    for rank in range(1, 9):
        (layer,) = plan(CSKVConfig(key_rank=rank, value_rank=8), shape, spectra)
        assert sum(layer.key_ranks) == rank and all(r <= n for r, n in zip(layer.key_ranks, held))
        assert rank < 3 or all(r > 0 for r, n in zip(layer.key_ranks, held) if n)
    assert layer.key_ranks == held


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("group", [(32, 1), (32, 4), (1, 32)])
def test_predicted_loss_is_what_normal_values_lose(bits, group):
    torch.manual_seed(0)
    latents = torch.randn(4, 320, 32, dtype=torch.float64)
    layout = PackedLayout((bits,) * 32, 32, *group)
    measured = (dequantize(*quantize(latents, layout), layout, torch.float64) - latents).square().mean()
    assert float(measured) == pytest.approx(quantisation_loss(bits, group[0] * group[1]), rel=0.12)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_plan_names_the_layer_whose_worth_is_no_number(wrong):
    """As from a config that was edited by hand, or an adapter whose factors are broken."""
    shape, config = ModelShape("llama", 2, 2, 32), CSKVConfig(compression=0.7)
    spectra = [LayerSpectra([torch.ones(32), torch.ones(32)], torch.ones(64), torch.ones(64)) for _ in range(2)]
    config.sensitivity = [[1.0, 3.0], [2.0, wrong]]
    with pytest.raises(ValueError, match="or the `sensitivity` of layer 1 are NaN or infinite"):
        plan(config, shape, spectra)
    config.sensitivity = [[1.0, 3.0]] * 2
    for energies in (spectra[0].keys[1], spectra[0].value_rounding):
        energies[3] = wrong
        with pytest.raises(ValueError, match="of layer 0 are NaN or infinite"):
            plan(config, shape, spectra)
        energies[3] = 1.0

"""Probing: what each layer's keys and values are worth, against whole forwards of a model that is cut by hand."""

import functools
import json
import logging

import pytest
import torch
from conftest import FAMILIES, calibration_data, make_model

from cskv_hf.calibration import collect_statistics
from cskv_hf.config import CSKVConfig
from cskv_hf.families import attention_layers
from cskv_hf.fitting import layer_bases
from cskv_hf.reads import states_read
from cskv_hf.sensitivity import measure_sensitivity, probe_cut, probe_samples

SINKS, RECENT = 2, 5
FORBIDDEN = torch.tensor([0, 7])  # tokens


def bases_of(model):
    statistics = collect_statistics(model, calibration_data(model), progress=False)
    layers = attention_layers(model)
    heads = model.config.num_key_value_heads
    return [layer_bases(layer, statistics, i, CSKVConfig(), heads) for i, layer in enumerate(layers)]


@torch.no_grad()
def by_whole_forwards(model, bases, samples):
    """The definition: cut the old tokens of one side of one layer, run the model, divergence per token over energy
    lost."""
    rates = []
    for attention, sides in zip(attention_layers(model), bases):
        for side, factors in enumerate(sides):
            projection, lost = probe_cut(factors)
            total = 0.0
            for ids in samples:
                full = model(ids[None]).logits[0].float().log_softmax(-1)
                with states_read(attention, functools.partial(attention_cut, side, projection, factors.mean)):
                    other = model(ids[None]).logits[0].float().log_softmax(-1)
                total += float((full.exp() * (full - other)).sum())
            rates.append(total / sum(map(len, samples)) / lost)
    return rates


def attention_cut(side, projection, mean, states, output):
    """The whole attention of a row, each query and KV head for itself, with old keys (side 0) or values projected."""
    exact = [states.key_states, states.value_states]
    flat = (exact[side].transpose(0, 1).flatten(1) - mean).unflatten(1, projection.shape[:2])
    cut = (projection @ flat[..., None])[..., 0].flatten(1) + mean
    cut = cut.unflatten(1, exact[side].shape[::2]).transpose(0, 1)
    sides = [[cut, exact[1]], [exact[0], cut]][side]
    attended = torch.zeros_like(states.by_kv_head(states.query_states))
    for q in range(states.length):
        old = torch.arange(states.length) <= q - RECENT
        old[:SINKS] = False
        for head, heads in enumerate(attended):
            keys, values = (torch.where(old[:, None], c[head], e[head]) for c, e in zip(sides, exact))
            mixed = states.key_states.clone()
            mixed[head] = keys
            weights = states.scores(torch.tensor([q]), mixed)[head, :, 0].softmax(-1)
            heads[:, q] = weights @ values
    return attended.flatten(0, 1).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma", "granite", "qwen3_moe"])
def test_equal_to_whole_forwards(family):
    """A cut leaves everything before its layer as it was, so starting there changes nothing; and nothing stays
    behind on the model."""
    model = make_model(family, num_hidden_layers=3)
    bases = bases_of(model)
    generator = torch.Generator().manual_seed(5)
    samples = [torch.randint(2, 80, (40,), generator=generator) for _ in range(2)]  # dynamic RoPE remembers lengths
    before = model(samples[0][None]).logits
    measured = measure_sensitivity(model, bases, samples, SINKS, RECENT, progress=False)
    expected = by_whole_forwards(model, bases, samples)
    assert [rate for sides in measured for rate in sides] == pytest.approx(expected, rel=1e-4)
    assert torch.equal(model(samples[0][None]).logits, before)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_probe_computes_only_what_follows():
    """Layers before the one that is cut do not run: L + 2 (L + (L - 1) + ... + 1) runs of a layer per sample."""
    model = make_model(num_hidden_layers=4)
    bases, runs = bases_of(model), [0]
    for attention in attention_layers(model):
        attention.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    measure_sensitivity(model, bases, [torch.arange(2, 40)], progress=False)
    assert runs == [4 + 2 * (4 + 3 + 2 + 1)]


def test_an_interrupted_measurement_goes_on(tmp_path, monkeypatch, caplog):
    """From the layer after the last that was measured, to the same; of other bases or weights it begins again."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model, file = make_model(num_hidden_layers=4), tmp_path / "probing.json"
    bases, samples = bases_of(model), [torch.randint(2, 80, (24,), generator=torch.Generator().manual_seed(5))]
    expected = measure_sensitivity(model, bases, samples, progress=False)
    measure = functools.partial(measure_sensitivity, model, bases, samples, progress=False, state_file=file)
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("cskv_hf.sensitivity.probe_cut", interrupted_after(5, probe_cut))  # in the third layer
        measure()
    assert json.loads(file.read_text())["sensitivity"] == expected[:2]
    forwards.clear()
    assert measure() == expected
    assert len(forwards) == 1 + 2 * 2  # whole, and both sides of the other layers
    forwards.clear()
    assert measure() == expected and not forwards
    anew = measure(made_of={"init": "mse"})
    assert anew == expected and len(forwards) == 1 + 2 * 4
    assert "is of `init` None there, 'mse' here" in caplog.text
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert measure(made_of={"init": "mse"}) != expected and "is of other weights" in caplog.text
    file.write_text(file.read_text()[:-9])
    with pytest.raises(ValueError, match=r"truncated, corrupt or no file .*Delete it"):
        measure()
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"truncated, corrupt or no file .*Delete it"):
        measure()


def interrupted_after(calls, function):
    left = [calls]

    def counted(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return function(*args)

    return counted


def test_deep_models_are_probed_on_fewer_tokens():
    """The work grows with the square of the layers, so 16 read a half: a part of each long sample, whole short ones
    until there are enough; never less than a half."""
    long, short = [torch.arange(512)] * 2, [torch.arange(20)] * 52
    for layers, tokens in ((1, 1024), (8, 1024), (12, 682), (16, 512), (80, 512)):
        assert [len(ids) for ids in probe_samples(long, layers)] == [tokens // 2] * 2
    read = probe_samples(short, 32)
    assert [len(ids) for ids in read] == [20] * 26 and sum(map(len, read)) == 0.5 * sum(map(len, short))
    assert [len(ids) for ids in probe_samples([torch.arange(3)], 32)] == [2]
    assert torch.equal(probe_samples([torch.arange(512)], 32)[0], torch.arange(256))


def test_a_forbidden_token_counts_for_nothing():
    """A head may write -inf for a token: probability 0 adds nothing, as it does where the float underflows to 0."""
    measured = []
    for low in (-torch.inf, -1e4):
        model = make_model()
        bases = bases_of(model)
        model.lm_head.register_forward_hook(lambda module, args, output, low=low: output.index_fill(2, FORBIDDEN, low))
        measured.append(measure_sensitivity(model, bases, [torch.arange(2, 40)], progress=False))
    assert measured[0] == measured[1] and min(min(rates) for rates in measured[0]) > 1e-6


@pytest.mark.parametrize(
    "whole, message",
    [(0, "logits of calibration sample 0 are NaN"), (1, "sample 1"), (2, "logits with cut keys of layer 0 are NaN")],
)
def test_logits_that_are_no_numbers_are_refused(whole, message):
    """A divergence of NaN would price the layer, and with it all others, at nothing."""
    model, forwards = make_model(), [0]
    bases = bases_of(model)

    def overflow(module, args, output):
        forwards[0] += 1
        return output if forwards[0] <= whole else output * torch.nan

    model.lm_head.register_forward_hook(overflow)
    with pytest.raises(ValueError, match=f"{message}.*bfloat16 or float32.*`allocation`='uniform'"):
        measure_sensitivity(model, bases, [torch.arange(2, 40), torch.arange(40, 60)], progress=False)


def test_the_model_is_whole_again_after_an_error():
    model = make_model(num_hidden_layers=3)
    bases = bases_of(model)
    bases[2] = (None, None)
    with pytest.raises(AttributeError):
        measure_sensitivity(model, bases, [torch.arange(2, 40)], progress=False)
    assert not any("forward" in module.__dict__ for module in model.modules())

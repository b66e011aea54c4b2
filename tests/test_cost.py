"""The cost model: what it counts against a count of the real attention, what must hold of its predictions, the CLI."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import lossy, make_model, prompt
from test_cli import cskv
from torch.utils.flop_counter import FlopCounterMode

from cskv_hf import CSKVCache, CSKVConfig, ModelShape
from cskv_hf.attention import compressed_attention
from cskv_hf.cost import (
    compressed_flops,
    compressed_work,
    default_layouts,
    full_seconds,
    kept_layers,
    quicker_from,
    recommend,
    seconds,
)
from cskv_hf.rates import Device, between, full_bytes, measure_device

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def baddbmm_flops(sum_shape, left, right, out_shape=None, **kwargs):
    return 2 * left[0] * left[1] * left[2] * right[2]


IN_PLACE = {torch.ops.aten.baddbmm_: baddbmm_flops}  # which torch's counter leaves out
LLAMA, HEADS = ModelShape("llama", 2, 8, 128), 32
CPU = Device("cpu", torch.float32, 9e10, 9e9, 1.7e10, (1.2e10, 1e10), (2.3e10, 8e9), 2.5e-6, False)
GPU = Device("cuda", torch.bfloat16, 5e14, 2e13, 2.5e12, (1e12, 2e12), (4e12, 8e12), 5e-6, True)


def ranks(key_rank=256, value_rank=256, key_layout="head", **settings):
    return CSKVConfig(key_rank=key_rank, value_rank=value_rank, key_layout=key_layout, **settings)


def work(config, shape=LLAMA, heads=HEADS, context=8192, batch=1, device=CPU):
    return compressed_work(kept_layers(config, shape)[0], config, shape, heads, context, batch, device)


def test_flops_by_hand():
    """One KV head of 2 channels, 3 query heads, rank 1 and 2; 8 old tokens and 4 exact ones."""
    shape, config = ModelShape("llama", 1, 1, 2), ranks(1, 2, window=3, sinks=1, block_size=4)
    rebuilt, scores, summed = 8 * 2 * 1 * 2, 8 * 2 * 3 * 2, 8 * 2 * 3 * 2
    exact, decoded = 4 * 2 * 2 * 3 * 2, 2 * 3 * 2 * 2
    counted = work(config, shape, heads=3, context=12)
    assert counted.flops == rebuilt + scores + summed + exact + decoded
    assert counted.bytes == 8 * (1 + 2) * 4
    assert full_bytes(shape, 3, 12, 1, 4) == (2 * 2 * 12 * 2 * 4, 3 * 2 * 12 * 2 * 4)


@pytest.mark.parametrize("key_layout", ["head", "group:2", "joint"])
@pytest.mark.parametrize("bits", [16, 4])
def test_flops_and_bytes_are_those_of_the_attention(key_layout, bits, monkeypatch):
    """FLOPs as torch counts them in the real attention, bytes as the cache holds them; both are sums of sizes, so they
    are equal."""
    settings = dict(block_size=8, window=8) if bits == 4 else {}
    model = lossy(make_model(dtype=torch.float32), key_layout=key_layout, bits=bits, **settings)
    config, shape = model.peft_config["default"], ModelShape.from_model_config(model.config)
    seen = []

    def spy(query, kv, *rest):
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            out = compressed_attention(query, kv, *rest)
        held = sum(t.nbytes for latents in (kv.key_latents, kv.value_latents) for t in latents.held)
        exact = kv.exact_keys.shape[2]
        seen.append((counter.get_total_flops(), held, kv.key_latents.num_tokens, exact, kv.value_latents.format))
        return out

    monkeypatch.setattr("cskv_hf.attention_function._untraced_attention", spy)
    cache = CSKVCache()
    model(prompt(2, 60), past_key_values=cache)
    model(prompt(2, 1), past_key_values=cache)
    layers = kept_layers(config, shape)
    assert len(seen) == len(layers) == 2
    for kept, (flops, held, num_old, num_exact, value_format) in zip(layers, seen):
        assert flops == compressed_flops(kept, shape, model.config.num_attention_heads, num_old, num_exact, 2)
        formats = kept.key_format, kept.value_format
        assert held == 2 * num_old * sum(f.bytes_per_token(torch.float32) for f in formats)
        assert kept.value_format == value_format


@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
def test_more_is_never_quicker(device):
    """Time grows with the rank, the context, the batch; every term of it does."""

    def time(key_rank=256, context=8192, batch=1, layout="head"):
        return seconds(work(ranks(key_rank, 256, layout), context=context, batch=batch, device=device), device)

    for layout in ("head", "joint"):
        for name, values in (("key_rank", [8, 64, 256, 800]), ("batch", [1, 2, 8, 32])):
            times = [time(**{name: value, "layout": layout}) for value in values]
            assert times == sorted(times) and times[0] < times[-1]
        times = [time(context=256 * n, layout=layout) for n in range(1, 80)]
        assert times == sorted(times)
    full = [full_seconds(LLAMA, HEADS, 256 * n, 1, device) for n in range(1, 80)]
    assert full == sorted(full)


def test_layouts_coincide_for_one_kv_head():
    """One head is one group whatever it is called."""
    shape, config = ModelShape("llama", 2, 1, 128), ranks(60, 60)
    found = recommend(config, shape, 8, CPU, key_layouts=["head", "group:1", "joint"])
    assert len({p.seconds for p in found.predictions}) == 1 == len({p.quicker_from for p in found.predictions})


@pytest.mark.parametrize("config", [ranks(), CSKVConfig(compression=0.8, bits=4), CSKVConfig(compression=0.95)])
@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
def test_joint_is_never_quicker_than_head_at_the_same_ranks(config, device):
    """It rebuilds each key from all channels. (Where operations cost more than the work, larger groups are fewer
    operations: so operations are free here.)"""
    free = dataclasses.replace(device, operation=0.0)
    for context in (256, 65536):
        found = recommend(config, LLAMA, HEADS, free, context)
        times = {p.key_layout: p.seconds for p in found.predictions}
        assert list(times) == ["head", "group:2", "group:4", "joint"]
        assert list(times.values()) == sorted(times.values())
        assert times[found.quickest] == min(times.values())


def test_layouts_have_the_same_channels():
    """Another layout spreads the sum of ranks, and the bits of its channels, over other groups."""
    config = CSKVConfig(compression=0.8, bits=4)
    layouts = [kept_layers(config, LLAMA, layout)[0] for layout in default_layouts("head", 8)]
    assert len({sum(k.key_ranks) for k in layouts}) == 1 and [len(k.key_ranks) for k in layouts] == [8, 4, 2, 1]
    assert len({k.key_format.bytes_per_token(torch.float32) for k in layouts}) == 1
    assert default_layouts("group:16", 32) == ["head", "group:2", "group:4", "group:16", "joint"]


def test_quicker_from_is_where_the_lines_cross():
    assert 1000 < quicker_from(lambda n: 1000.0 + n, lambda n: 2.0 * n) <= 1000 + 1000 // 64 + 1
    assert quicker_from(lambda n: 2.0 * n, lambda n: n) is None
    assert between((4.0, 1.0), 1024 * 128) == 4.0 and between((4.0, 1.0), 1e9) == 1.0
    assert 1.0 < between((4.0, 1.0), 2048 * 128) < 4.0


@pytest.mark.parametrize(
    "device, heads, context, message",
    [
        (CPU, 12, 64, "must be a multiple of the model's 8 KV heads, got 12"),
        (CPU, 32, 0, "`context` must be at least 1, got 0"),
        (dataclasses.replace(GPU, dtype=torch.float64), 32, 64, "On a GPU only attention in the Triton kernels"),
    ],
)
def test_refuses(device, heads, context, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        recommend(ranks(), LLAMA, heads, device, context)


def test_kernels_of_a_cpu_are_predicted_quicker():
    """The same products with fewer passes and operations; packed latents gain most."""
    with_kernels, spared = dataclasses.replace(CPU, kernels=True), []
    for config in (ranks(bits=16), ranks(bits=4)):
        alone, quick = (work(config, device=device) for device in (CPU, with_kernels))
        assert quick.flops == alone.flops and quick.bytes == alone.bytes and quick.operations < alone.operations
        spared.append(alone.elements - quick.elements)
    assert 0 < spared[0] < spared[1]


def test_measured_device_is_a_device(monkeypatch):
    monkeypatch.setattr("cskv_hf.rates.SHORT", 64)
    monkeypatch.setattr("cskv_hf.rates.LONG", 128)
    device = measure_device("cpu", rounds=1)
    numbers = [device.matmul, device.elements, device.read, *device.copied, *device.attended, device.operation]
    assert device.kind == "cpu" and all(n > 0 for n in numbers)
    for name in ("tpu", "meta"):
        with pytest.raises(ValueError, match="`device` must be 'cpu' or 'cuda'"):
            measure_device(name)


def test_inspect_predicts(tmp_path, monkeypatch):
    monkeypatch.setattr("cskv_hf.cost.measure_device", lambda device: CPU)
    model = make_model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    model.name_or_path = model.config._name_or_path = str(tmp_path / "model")
    lossy(model).save_pretrained(tmp_path / "out")
    code, text, raw = cskv("inspect", tmp_path / "out", "--device", "cpu", "--context", 4096)
    assert code == 0 and "predicted, not measured" in text and "4,096 tokens" in text, text
    assert max(map(len, raw.split("\n"))) <= 80 and "quickest: '" in text
    assert cskv("inspect", tmp_path / "out", "--device", "cpu", "--context", 4096, "--query-heads", 8)[1] == text
    code, text, _ = cskv("inspect", tmp_path / "out", "--device", "cpu", "--query-heads", 7)
    assert code == 2 and "must be a multiple of the model's 4 KV heads, got 7" in text
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    code, text, _ = cskv("inspect", tmp_path / "out", "--device", "cpu")
    assert code == 2 and "give their number with `--query-heads`" in text, text
    assert cskv("inspect", tmp_path / "out", "--device", "cpu", "--query-heads", 8)[0] == 0


@pytest.mark.parametrize("which", ["", "-torch"])
def test_what_was_measured_confirms_the_order(which):
    """Of the results that docs/speed.md quotes, at 8,192 tokens, in every process: compressed caches are in the order
    they were measured in, where they were a fifth apart in all processes; and each is on its side of DynamicCache,
    where it was clearly on one in all of them and in those of decode.py."""
    runs = [run["rows"] for run in json.loads((RESULTS / f"cost{which}.json").read_text())["runs"]]
    decode = json.loads((RESULTS / f"decode{which}.json").read_text())["runs"]
    runs, decode = ([{r["cache"]: r for r in run if r["length"] == 8192} for run in both] for both in (runs, decode))
    names = [name for name in runs[0] if "%" in name]
    sides = orders = 0
    for one in names:
        ratios = [run[one]["measured_of_dynamic"] for run in runs]
        ratios += [run[one]["seconds"] / run["DynamicCache"]["seconds"] for run in decode]
        if max(ratios) < 0.8 or min(ratios) > 1.2:
            sides += 1
            assert {run[one]["predicted_of_dynamic"] < 1 for run in runs} == {max(ratios) < 1}, one
        for other in names:
            if all(run[one]["measured"] < 0.8 * run[other]["measured"] for run in runs):
                orders += 1
                assert all(run[one]["predicted"] < run[other]["predicted"] for run in runs), (one, other)
    assert sides >= 2 and orders >= 8

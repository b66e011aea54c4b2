"""Layers on two devices: accelerate's hooks move what the model passes on, the cache keeps each layer where it runs.

Where there are no two GPUs, two_devices.py stands in: tensors that refuse to meet those of the other device.
"""

import contextlib
import copy

import pytest
import torch
from accelerate import dispatch_model
from conftest import lossy, make_model, prompt
from two_devices import FIRST, SECOND, TwoDevices

from cskv_hf import CSKVCache

GREEDY = dict(max_new_tokens=12, do_sample=False)
CASES = [("llama", dict(compression=0.75, bits=4, block_size=8)), ("llama-dynamic", {}), ("qwen2-mixed", {})]
REAL = torch.cuda.device_count() > 1
DEVICES = (torch.device("cuda", 0), torch.device("cuda", 1)) if REAL else (FIRST, SECOND)
pytestmark = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="one GPU is neither two devices nor none")
MODES = {
    "greedy": {},
    "beams": dict(num_beams=3),
    "several sequences": dict(num_beams=2, num_return_sequences=2),
    "left padding": dict(padding=13),
    "left padding, beams": dict(padding=13, num_beams=3),
    "rebuilt": dict(materialize=True),
}


def devices():
    """Makes `DEVICES` usable."""
    return contextlib.nullcontext() if REAL else TwoDevices()


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[0])
def models(request):
    """A model on the CPU, and the same with its layers on two devices."""
    family, settings = request.param
    alone = lossy(make_model(family, attn_implementation="eager"), **settings)
    split = copy.deepcopy(alone)
    base = split.base_model.model
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    device_map = {name: DEVICES[i] for name, i in (places | {"model.rotary_emb": 0}).items()}
    with devices(), torch.no_grad():
        dispatch_model(base, device_map, main_device=DEVICES[0], skip_keys=base._skip_keys_device_placement)
    return alone, split


def run(model, device, cache, padding=0, materialize=False, **settings):
    ids, mask = prompt(2, 60), torch.ones(2, 60, dtype=torch.long)
    ids[1, :padding], mask[1, :padding] = 0, 0
    torch.manual_seed(3)
    return model.generate(
        input_ids=ids.to(device), attention_mask=mask.to(device), past_key_values=cache, **GREEDY | settings
    ).cpu()


def places_of(cache):
    return [{t.device for tensors in layer.tensors().values() for t in tensors} for layer in cache.layers]


@pytest.mark.parametrize("mode", MODES)
def test_generation_over_two_devices(models, mode, documented):
    documented("living-with-others", "layers on two devices", "with CSKV active")
    alone, split = models
    settings = dict(MODES[mode])
    caches = [CSKVCache(materialize=settings.pop("materialize", False)) for _ in range(2)]
    expected = run(alone, "cpu", caches[0], **settings)
    with devices():
        assert torch.equal(run(split, DEVICES[0], caches[1], **settings), expected)
    assert places_of(caches[1]) == [{device} for device in DEVICES]
    assert caches[1].tokens.positions.device == DEVICES[0] and caches[1].tokens.num_old > 0


@torch.no_grad()
def test_a_loaded_cache_follows_the_layers(models, tmp_path):
    """And so do copies, crops and turns: from a file on the CPU, to where each layer runs."""
    alone, split = models
    ids, more = prompt(2, 60), prompt(2, 20, seed=9)
    cache = CSKVCache()
    alone(ids, past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    logits = alone(more, past_key_values=cache).logits
    loaded = CSKVCache.load(tmp_path / "cache.safetensors")
    with devices():
        for cache in (copy.deepcopy(loaded), loaded):
            found = split(more.to(DEVICES[0]), past_key_values=cache).logits
            torch.testing.assert_close(found.cpu(), logits, atol=1e-9, rtol=1e-9)
            assert places_of(cache) == [{device} for device in DEVICES]
        cache.crop(-20)
        found = split(more.to(DEVICES[0]), past_key_values=cache).logits
        assert bool(torch.isfinite(found).all()) and cache.get_seq_length() == 80

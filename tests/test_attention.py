"""The attention function and the patch: tiles, masks, memory, and an undo that leaves no trace."""

import pytest
import torch
from conftest import lossless, lossy, make_model, prompt
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import cskv_hf.attention as attention
from cskv_hf import CSKVCache, attach, detach
from cskv_hf.rope import RotaryFrequencies, paired, rotate, rotate_paired
from cskv_hf.turns import OldTurns


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("layout", ["head", "joint"])
@torch.no_grad()
def test_decode_never_holds_a_layers_keys_or_values(layout, monkeypatch):
    """The largest tensor of a decoding step is smaller than one layer's rebuilt keys, which `materialize` does
    make."""
    model = lossy(make_model(dtype=torch.float32, vocab_size=89), key_layout=layout)
    monkeypatch.setattr(attention, "CPU_TILE", 64 * 32)  # tiles of 64 tokens at most
    length, kv_dim = 900, 32
    largest = {}
    for materialize in (False, True):
        cache = CSKVCache(materialize=materialize)
        model(prompt(1, length), past_key_values=cache, use_cache=True)
        with LargestTensor() as mode:
            model(prompt(1, 1), past_key_values=cache, use_cache=True)
        largest[materialize] = mode.elements
    assert largest[True] >= length * kv_dim
    assert largest[False] < length * kv_dim / 2


@pytest.mark.parametrize("tile", [1, 33 * 8, 10**6])
@pytest.mark.parametrize("chunk", [1, 7, 128])
@torch.no_grad()
def test_tiles_and_chunks_do_not_matter(tile, chunk, monkeypatch):
    model, ids = lossy(make_model()), prompt(2, 120)
    results = []
    for settings in ((2**18, 128), (tile, chunk)):
        monkeypatch.setattr(attention, "CPU_TILE", settings[0])
        monkeypatch.setattr(attention, "QUERY_CHUNK", settings[1])
        cache = CSKVCache()
        model(ids[:, :100], past_key_values=cache, use_cache=True)
        results.append(model(ids[:, 100:], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(*results, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.06), (torch.float16, 0.01), (torch.float32, 1e-4)])
@torch.no_grad()
def test_low_precision(dtype, tolerance):
    """Relative to the float64 logits; the tolerance is a few roundings (2^-8, 2^-11, 2^-24) through two layers."""
    reference = lossy(make_model(initializer_range=0.1))
    ids = prompt(2, 80)
    outputs = []
    for target in (torch.float64, dtype):
        model, cache = reference.to(target), CSKVCache()
        model(ids[:, :70], past_key_values=cache, use_cache=True)
        outputs.append(model(ids[:, 70:71], past_key_values=cache, use_cache=True).logits.double())
        assert cache.layers[0].key_latents.tensors[0].dtype == target
    assert float((outputs[0] - outputs[1]).norm() / outputs[0].norm()) < tolerance


@torch.no_grad()
def test_four_dimensional_masks_of_the_user():
    """A custom 4-D mask over slots hides the same tokens from a compressed past as from a full one."""
    model, ids = lossless(make_model()), prompt(2, 60)
    outputs = []
    for cache in (CSKVCache(), DynamicCache()):
        model(ids[:, :50], past_key_values=cache, use_cache=True)
        mask = torch.ones(2, 1, 10, 60, dtype=torch.bool).tril(50)
        mask[:, :, :, 10:20] = False
        mask[0, :, :, 2] = False
        outputs.append(model(ids[:, 50:], attention_mask=mask, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(*outputs, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_attention_implementation_changed_afterwards():
    """The cache then hands out plain tensors, so that any implementation works."""
    model, ids = lossy(make_model()), prompt(2, 60)
    outputs = []
    for implementation in (None, "sdpa"):
        if implementation:
            model.get_base_model().set_attn_implementation(implementation)
        cache = CSKVCache()
        model(ids[:, :50], past_key_values=cache, use_cache=True)
        outputs.append(model(ids[:, 50:], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(*outputs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_turning_pairs_is_rotating_halves(dtype):
    """A key times cos + i sin, its pairs side by side, is the key rotated, rearranged; the past's turn is the
    product of its tiles' and of the steps within one."""
    states = torch.randn(2, 3, 40, 16).to(dtype)
    turns = OldTurns(7 + torch.arange(40).expand(2, -1), RotaryFrequencies(torch.rand(8), 1.3), uniform=True)
    cos, sin = (t[:, None].to(torch.promote_types(dtype, torch.float32)) for t in turns.cos_sin("cpu", dtype))
    expected = paired(rotate(states.to(cos.dtype), cos, sin))
    turned = rotate_paired(paired(states), turns.turn("cpu", dtype)[:, None])
    assert turned.dtype == dtype
    tolerance = torch.finfo(dtype).eps * 8
    torch.testing.assert_close(turned.to(expected.dtype), expected, atol=tolerance, rtol=tolerance)
    in_tiles = turns.in_tiles("cpu", 16, torch.float32)
    (starts,), within = torch.complex(*in_tiles.starts), torch.complex(*in_tiles.within)
    product = (starts[:, None] * within).flatten(0, 1)[:40]
    unrounded = OldTurns(turns.positions, turns.frequencies._replace(rounded=False), uniform=True)  # as OLMo's
    assert {t.dtype for t in unrounded.in_tiles("cpu", 16, torch.float16)[0]} == {torch.float16}  # as a kernel asks
    torch.testing.assert_close(product, turns.turn("cpu", torch.float32)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_detach_is_bit_exact(family):
    model, ids = make_model(family), prompt(2, 40)
    before = {
        "class": type(model),
        "implementation": model.config._attn_implementation,
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        "keys": set(model.state_dict()),
    }
    logits, tokens = model(ids).logits, model.generate(ids, max_new_tokens=8, do_sample=False)
    adapted = lossy(model)
    assert model.config._attn_implementation != before["implementation"] and type(model) is not before["class"]
    detach(model)
    attach(model)
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    assert hooks == 4  # attaching twice adds nothing
    restored = adapted.unload()
    assert restored is model
    assert type(model) is before["class"]
    assert model.config._attn_implementation == before["implementation"]
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == before["hooks"]
    assert set(model.state_dict()) == before["keys"]
    model(ids[:, :4])  # a dynamic RoPE remembers the longest text it saw until it sees a short one
    assert torch.equal(model(ids).logits, logits)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), tokens)

"""Families whose layers are not Llama's but whose attention is: what is theirs alone, RoPE that differs by layer or is
not there, norms, experts and sliding windows. The rest of the tests is about the others."""

import copy

import pytest
import torch
from conftest import FAMILIES, OTHERS, lossless, lossy, make_model, prompt
from test_cache import feed
from transformers import DynamicCache

import cskv_hf
from cskv_hf import CSKVCache, CSKVStaticCache, turns
from cskv_hf.calibration import collect_statistics
from cskv_hf.families import NOT_TURNED, SUPPORTED, attention_layers, decoder_of, frequencies_of, rope_kind
from cskv_hf.fitting import weight_moments
from cskv_hf.rope import cos_sin

TURNS = [70, 1, 1, 28] + [1] * 12  # a prompt, tokens, a second turn, tokens
PACKED = dict(bits=None, allocation=None, block_size=8)


def test_all_are_tested():
    assert set(SUPPORTED) == set(OTHERS) | {"llama", "mistral", "qwen2", "qwen3"}


@pytest.mark.parametrize("family", OTHERS)
@torch.no_grad()
def test_lossless_factors_change_nothing(family):
    """Old keys are turned back and turned again by what turned them, in every layer: with `B A = 1` the model says
    what it says over the full cache, to rounding."""
    base, ids = make_model(family), prompt(2, sum(TURNS))
    full, text = base(ids).logits, base.generate(ids[:, :90], max_new_tokens=20, do_sample=False)
    model = lossless(base)
    for cache in (CSKVCache(), CSKVCache(materialize=True), CSKVStaticCache(sum(TURNS))):
        torch.testing.assert_close(feed(model, ids, cache, TURNS), full, atol=1e-9, rtol=1e-9)
        if isinstance(cache, CSKVCache):
            assert cache.tokens.num_old > 50
    assert torch.equal(model.generate(ids[:, :90], max_new_tokens=20, do_sample=False, cache=CSKVCache), text)


@pytest.mark.parametrize("family", OTHERS)
@torch.no_grad()
def test_an_adapter_of_each(family, tmp_path):
    """Fitted with measured layers and packed latents, saved, loaded onto another copy of the model: the same tokens;
    the cache of fixed size agrees with the growing one, and detaching leaves the model as it was."""
    base, ids = make_model(family), prompt(2, sum(TURNS))
    untouched, full = copy.deepcopy(base), base(ids).logits
    model = lossy(base, 0.5, **PACKED)
    expected = feed(model, ids, CSKVCache(), TURNS)
    assert not torch.allclose(expected, full, atol=1e-6)
    torch.testing.assert_close(feed(model, ids, CSKVStaticCache(130), TURNS), expected, atol=1e-9, rtol=1e-9)
    model.save_pretrained(tmp_path)
    loaded = cskv_hf.load(untouched, tmp_path)
    cache = CSKVCache()
    torch.testing.assert_close(feed(loaded, ids, cache, TURNS), expected, atol=1e-9, rtol=1e-9)
    cache.save(tmp_path / "cache.safetensors")
    again, more = CSKVCache.load(tmp_path / "cache.safetensors"), torch.cat([ids, prompt(2, 20, seed=7)], dim=1)
    torch.testing.assert_close(*(feed(loaded, more, held, [8] + [1] * 12) for held in (again, cache)))
    assert torch.equal(model.unload()(ids).logits, full)


class Kept(DynamicCache):
    """Every layer's keys, after RoPE, and values, as they came, whatever window it slides over."""

    def __init__(self):
        super().__init__()
        self.kept = {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.kept[layer_idx] = key_states, value_states
        return key_states, value_states


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
@torch.no_grad()
def test_what_is_calibrated_is_what_is_cached(family):
    """The statistics' keys before RoPE, turned as the layer turns them, are the keys that a cache is given: so the
    factors are fitted to what they will encode."""
    model, ids = make_model(family), prompt(1, 30)
    statistics, cache, given = collect_statistics(model, [ids], recall=False, progress=False), Kept(), []
    hooks = [
        attention.register_forward_pre_hook(
            lambda module, args, kwargs: given.append(kwargs["position_embeddings"]), with_kwargs=True
        )
        for attention in attention_layers(model)
    ]
    model(ids, past_key_values=cache)
    for hook in hooks:
        hook.remove()
    for layer_idx, (keys, values) in cache.kept.items():
        cos, sin = (t[:, None].double() for t in given[layer_idx])
        if family == "smollm3" and layer_idx == 1:
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        half = keys.shape[-1] // 2
        turned_back = keys * cos - torch.cat([-keys[..., half:], keys[..., :half]], -1) * sin
        turned_back /= cos**2 + sin**2
        for moment, states in ((statistics.key_moment, turned_back), (statistics.value_moment, values)):
            by_token = states[0].transpose(0, 1).flatten(1)
            torch.testing.assert_close(moment[layer_idx], by_token.mT @ by_token)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", OTHERS)
@torch.no_grad()
def test_cos_and_sin_are_the_models_own(family, dtype):
    """Bit by bit, in every layer that turns its keys."""
    model, positions = make_model(family, dtype), torch.arange(0, 900, 7)[None]
    decoder, states = decoder_of(model), torch.zeros(1, dtype=dtype)
    for attention in attention_layers(model):
        kind = rope_kind(decoder, attention)
        if kind != NOT_TURNED:
            given = decoder.rotary_emb(states, positions, *([kind] if kind else []))
            for ours, theirs in zip(cos_sin(positions, frequencies_of(decoder.rotary_emb, kind), dtype), given):
                assert torch.equal(torch.cat([ours, ours], dim=-1), theirs)


@pytest.mark.parametrize("family", ["gemma3_text", "olmo2"])
def test_the_gain_of_a_norm_of_keys_is_a_part_of_their_weight(family):
    """For `svd` and `asvd`: Gemma's gain is one more than its weight, OLMo's norm is over all heads at once."""
    model = make_model(family)
    attention = attention_layers(model)[1]
    gain = attention.k_norm.weight.detach() + (family == "gemma3_text")
    heads = model.config.num_key_value_heads if family == "gemma3_text" else 1
    weight = attention.k_proj.weight.detach() * gain.repeat(heads)[:, None]
    moment, _ = weight_moments(attention, model.config.hidden_size)
    torch.testing.assert_close(moment, weight @ weight.mT, rtol=1e-4, atol=1e-4)  # the norm's eps is in the gain


def test_frequencies_that_change_and_differ_by_layer_are_refused():
    rope = {**OTHERS["gemma3_text"]["rope_parameters"]["full_attention"], "rope_type": "dynamic", "factor": 2.0}
    parameters = {**OTHERS["gemma3_text"]["rope_parameters"], "full_attention": rope}
    with pytest.raises(ValueError, match="'dynamic' where layers differ in their RoPE; supported are default"):
        decoder_of(make_model("gemma3_text", rope_parameters=parameters))


def test_attention_that_is_not_causal_is_refused():
    model = make_model("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(ValueError, match="Gemma3Attention is not causal"):
        decoder_of(model)


@torch.no_grad()
def test_turns_are_made_once_for_layers_that_turn_alike(monkeypatch):
    """Four layers, two ways to turn: cos and sin are computed twice, not four times."""
    types = ["sliding_attention", "full_attention"] * 2
    model = lossy(make_model("gemma3_text", num_hidden_layers=4, layer_types=types, sliding_window=200))
    cache, ids = CSKVCache(), prompt(1, 60)
    feed(model, ids[:, :59], cache, [59])
    made = []
    monkeypatch.setattr(turns, "cos_sin", lambda *args: made.append(args[1].kind) or cos_sin(*args))
    model(ids[:, 59:], past_key_values=cache)
    assert sorted(made) == ["full_attention", "sliding_attention"]

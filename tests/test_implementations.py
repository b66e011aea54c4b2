"""Attention implementations for the exact parts: eager, sdpa, flex, and the masks of flash attention, alike."""

import pytest
import torch
from conftest import lossless, make_model, prompt
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cskv_hf import CSKVCache

MASK = torch.ones(3, 40, dtype=torch.long)
MASK[0, :7] = 0
MASK[2, :25] = 0
IDS = prompt(3, 40) * MASK


def by_definition(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """What a flash attention kernel computes, from the mask that transformers makes for one: (batch, slots) of real
    tokens or None, the last query at the last slot."""
    assert attention_mask is None or attention_mask.ndim == 2
    shared = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(shared, dim=1) for t in (key, value))
    slots = torch.arange(key.shape[2])
    queries = slots[-query.shape[2] :, None]
    visible = (slots <= queries)[None, None]
    if sliding_window is not None:
        visible = visible & (slots > queries - sliding_window)
    if attention_mask is not None:
        visible = visible & attention_mask.bool()[:, None, None]
    scores = (query @ key.mT * scaling).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1).nan_to_num() @ value).transpose(1, 2), None


@pytest.fixture
def implementation(request, monkeypatch):
    """Its name; a flash kernel is stood in for by the definition, its masks are transformers' own."""
    if request.param == "flash_attention_2":
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, request.param, by_definition)
    if request.param == "flex_attention":
        pytest.importorskip("torch.nn.attention.flex_attention")
        monkeypatch.setattr(torch, "compile", lambda function, **settings: function)  # the same, unfused
    return request.param


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention", "flash_attention_2"], indirect=True)
@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "qwen2-mixed"])
@pytest.mark.parametrize("padded", [True, False])
def test_tokens_are_those_of_dynamic_cache(family, implementation, padded):
    """With lossless factors, whatever reads the exact parts: two turns, the second of several tokens over a
    compressed past, padded on the left or not."""
    plain = make_model(family)
    model = make_model(family)
    model.config._attn_implementation = implementation
    model = lossless(model)
    ids, mask = (IDS, MASK) if padded else (prompt(2, 40), torch.ones(2, 40, dtype=torch.long))
    settings = dict(max_new_tokens=12, do_sample=False)
    caches = CSKVCache(), DynamicCache(config=plain.config)
    expected = actual = None
    for turn in range(2):
        actual = model.generate(ids, attention_mask=mask, past_key_values=caches[0], **settings)
        expected = plain.generate(ids, attention_mask=mask, past_key_values=caches[1], **settings)
        assert torch.equal(actual, expected)
        ids = torch.cat([actual, prompt(len(ids), 6, seed=turn + 3)], dim=1)
        mask = torch.cat([mask, torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=torch.long)], dim=1)
    assert caches[0].tokens.num_old > 0

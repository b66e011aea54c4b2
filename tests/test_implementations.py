"""Attention implementations for the exact parts: eager, sdpa, flex and flash attention give the same tokens."""

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from conftest import lossless, make_model, prompt
from transformers import DynamicCache, StaticCache
from transformers.integrations.flex_attention import WrappedFlexAttention

from cskv_hf import CSKVCache, detach

MASK = torch.ones(3, 40, dtype=torch.long)
MASK[0, :7] = 0
MASK[2, :25] = 0
IDS = prompt(3, 40) * MASK
GREEDY = dict(max_new_tokens=12, do_sample=False)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
    """What the kernel of that name computes, by the definition: (batch, tokens, heads, head_dim), the last query at
    the last key."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    keys = torch.arange(k.shape[1])
    queries = keys[-q.shape[1] :, None]
    visible = keys <= queries if causal else torch.ones(1, 1, dtype=torch.bool)
    if window_size[0] >= 0:
        visible = visible & (keys >= queries - window_size[0])
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1)):  # fmt: skip
    """The same of sequences end to end, (tokens, heads, head_dim)."""
    rows = []
    for i in range(len(cu_seqlens_q) - 1):
        of_q, of_kv = (slice(int(c[i]), int(c[i + 1])) for c in (cu_seqlens_q, cu_seqlens_k))
        row = flash_attn_func(q[None, of_q], k[None, of_kv], v[None, of_kv], 0.0, softmax_scale, causal, window_size)
        rows.append(row[0])
    return torch.cat(rows)


def load_kernel(implementation, *args, **kwargs):
    """In the place of transformers' loader, which knows flash attention by its name only."""
    assert implementation == "flash_attention_2"
    functions = flash_attn_func, flash_attn_varlen_func
    return *functions, None, flash_utils._pad_input, flash_utils._unpad_input


@pytest.fixture
def implementation(request, monkeypatch):
    """Its name. Where there is no kernel, the definition stands in for it; all around it is transformers' own."""
    if request.param == "flash_attention_2":
        monkeypatch.setattr(flash_utils, "_lazy_imports", load_kernel)
        monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    if request.param == "flex_attention":
        monkeypatch.setattr(WrappedFlexAttention, "_instance", None)
        monkeypatch.setattr(WrappedFlexAttention, "_is_flex_compiled", False)
        monkeypatch.setattr(torch, "compile", lambda function, **settings: function)  # the same, unfused
    return request.param


def dtype_of(implementation):
    """transformers' eager attention takes its softmax in float32, where the float64 mask of a padding row is NaN."""
    return torch.float32 if implementation == "eager" else torch.float64


def model_with(implementation, family):
    """Lossless factors on a model that was loaded with an attention implementation."""
    model = make_model(family, dtype=dtype_of(implementation))
    model.config._attn_implementation = implementation
    return lossless(model)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention", "flash_attention_2"], indirect=True)
@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "qwen2-mixed"])
@pytest.mark.parametrize("padded", [True, False])
def test_tokens_are_those_of_dynamic_cache(family, implementation, padded):
    """Two turns, the second of several tokens over a compressed past, padded on the left or not."""
    model, plain = model_with(implementation, family), make_model(family, dtype=dtype_of(implementation))
    ids, mask = (IDS, MASK) if padded else (prompt(2, 40), torch.ones(2, 40, dtype=torch.long))
    cache, dynamic = CSKVCache(), DynamicCache(config=plain.config)
    for turn in range(2):
        actual = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
        assert torch.equal(actual, plain.generate(ids, attention_mask=mask, past_key_values=dynamic, **GREEDY))
        ids = torch.cat([actual, prompt(len(ids), 6, seed=turn + 3)], dim=1)
        mask = torch.cat([mask, torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=torch.long)], dim=1)
    assert cache.tokens.num_old > 0


@pytest.mark.parametrize("implementation", ["flash_attention_2"], indirect=True)
def test_other_caches_under_flash_attention(implementation):
    """transformers asks whether flash attention is used, by the implementation's name, before it drops a mask of ones;
    a static cache needs one to know its empty places. And undoing the patch gives the name back."""
    model, plain, ids = model_with(implementation, "llama"), make_model(), prompt(2, 40)
    expected = plain.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    for cache in (DynamicCache(), StaticCache(plain.config, max_cache_len=80)):
        actual = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **GREEDY)
        assert torch.equal(actual, expected)
    detach(model.get_base_model())
    assert model.config._attn_implementation == implementation

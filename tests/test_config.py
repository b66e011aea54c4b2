"""CSKVConfig: what it refuses, what survives JSON, and bytes that agree with the tensors."""

import pytest
import torch
from conftest import lossy, make_model, prompt
from peft import PeftConfig
from transformers import LlamaConfig

from cskv_hf import CSKVCache, CSKVConfig, ModelShape
from cskv_hf.latents import Latents

SHAPE = ModelShape("llama", 32, 8, 128)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank_multiple": 0}, "`rank_multiple` must be an integer of at least 1, in channels, got 0"),
        ({"rank_multiple": 8, "key_rank": 4, "value_rank": 4}, "`rank_multiple`=8 needs `allocation`='auto'"),
        ({"compression": 1.0}, r"`compression` is the fraction .* in \[0, 1\), got 1.0"),
        ({"compression": -0.1}, "got -0.1"),
        ({"compression": 0.5, "key_rank": 8, "value_rank": 8}, "exclude each other"),
        ({"key_rank": 8}, "must be given together"),
        ({"key_rank": 0, "value_rank": 8}, "at least 1, got 0"),
        ({"key_layout": "heads"}, "'head', 'joint' or 'group:N'"),
        ({"key_layout": "group:0"}, "got 'group:0'"),
        ({"window": 0}, "`window` must be an integer of at least 1"),
        ({"sinks": -1}, "`sinks` must be an integer of at least 0"),
        ({"window": 2.5}, "got 2.5"),
        ({"init": "pca"}, "`init` must be one of 'attention'"),
        ({"bits": 5}, "`bits` must be one of 2, 3, 4, 8, 16, or None, got 5"),
        ({"allocation": "even"}, "`allocation` must be 'auto' or 'uniform', got 'even'"),
        ({"allocation": "auto", "init": "svd"}, "energies to go by"),
        ({"allocation": "auto", "key_rank": 8, "value_rank": 8}, "needs a `compression` to spend"),
        ({"allocation": "auto", "key_rank_per_layer": {0: 3}}, "drop `key_rank_per_layer`"),
        ({"block_size": 12, "bits": 4}, "multiple of 8 for packed latents, got 12"),
        ({"key_group": [5, 1], "bits": 4}, r"`key_group` must be \[tokens, channels\].*divisor of block_size=32"),
        ({"value_group": [32], "bits": 4}, r"`value_group` must be"),
        ({"key_group": [32, 4], "bits": 16}, r"`key_group`=\[32, 4\] is of packed latents, .* 16 bits; drop it"),
        ({"value_group": [32, 4], "compression": 0.3}, "`value_group`=.* give `bits`"),
        ({"key_group": [], "bits": 4}, r"`key_group` must be \[tokens, channels\].*got \[\]"),
        ({"key_rank_per_layer": {0: 3.7}}, "integers of at least 1, got 3.7"),
        (
            {"key_rank_per_layer": {"first": 3}},
            "`key_rank_per_layer` must have indices of layers as keys, got 'first'",
        ),
        ({"key_rank": True, "value_rank": 8}, "integers of at least 1, got True"),
        ({"asvd_alpha": 2}, "`asvd_alpha`"),
        ({"format_version": 99}, "pip install -U cskv-hf"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        CSKVConfig(**settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"key_rank": 1025, "value_rank": 8}, "key rank 1025 of layer 0 is above the model's kv_dim=1024"),
        ({"compression": 0.9999}, "one channel of each at 4 bits takes .* Use at most 0.999"),
        ({"value_rank_per_layer": {32: 4}}, "names layer 32; the model has layers 0 to 31"),
    ],
)
def test_refuses_for_a_model(settings, message):
    with pytest.raises(ValueError, match=message):
        CSKVConfig(**settings).layer_ranks(SHAPE)


def test_json_round_trip(tmp_path):
    config = CSKVConfig(compression=0.7, key_layout="group:2", window=16, key_rank_per_layer={0: 3}, init="mse")
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, CSKVConfig)
    assert loaded == config


@pytest.mark.parametrize("compression", [0.5, 0.8, 0.9, 0.95])
def test_an_old_token_costs_at_most_what_was_promised(compression):
    """The position is paid from the budget too, so the promise holds with everything counted."""
    config = CSKVConfig(compression=compression, bits=16, allocation="uniform")
    ranks = config.layer_ranks(SHAPE)
    spent = sum(key + value for key, value in ranks) * 2 + 4
    assert spent <= (1 - compression) * SHAPE.num_hidden_layers * 2 * SHAPE.kv_dim * 2
    assert spent > (1 - compression - 0.003) * SHAPE.num_hidden_layers * 2 * SHAPE.kv_dim * 2  # and little is wasted


def test_overrides_per_layer():
    config = CSKVConfig(key_rank=10, value_rank=20, key_rank_per_layer={1: 5})
    assert config.layer_ranks(ModelShape("llama", 3, 2, 16)) == [(10, 20), (5, 20), (10, 20)]


@pytest.mark.parametrize("bits", [16, None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [10, 11, 60, 200])
@torch.no_grad()
def test_formula_equals_the_bytes_of_the_tensors(dtype, length, bits):
    model = lossy(make_model(dtype=torch.float32), bits=bits, allocation=None, block_size=8).to(dtype)
    config, cache = model.peft_config["default"], CSKVCache()
    model(prompt(3, length), past_key_values=cache, use_cache=True)
    assert cache.nbytes == config.cache_nbytes(model.config, length, batch_size=3, dtype=dtype)


@pytest.mark.parametrize("bits, allocation", [(None, None), (4, None), (4, "uniform"), (3, None), (2, "uniform")])
@pytest.mark.parametrize("compression", [0.8, 0.9, 0.95])
@torch.no_grad()
def test_a_packed_token_costs_what_was_promised(compression, bits, allocation):
    """Codes, ranges and position together, in bytes of a 16-bit cache; measured on the tensors of a longer and a
    shorter cache."""
    model = make_model(dtype=torch.float32, num_hidden_layers=4, head_dim=32)
    model = lossy(model, compression, bits=bits, allocation=allocation, block_size=32)
    sizes = []
    for length in (256, 512):
        cache = CSKVCache()
        model(prompt(1, length), past_key_values=cache, use_cache=True, logits_to_keep=1)
        sizes.append(cache.nbytes)
    per_token, full = (sizes[1] - sizes[0]) / 256, 4 * 2 * 4 * 32 * 2
    assert per_token <= (1 - compression) * full
    directions = model.config.hidden_size  # that values have; with all of them kept, few bits cannot use it up
    everything_kept = min(model.peft_config["default"].value_ranks) >= directions
    assert everything_kept or per_token > (1 - compression) * full * 0.9
    assert per_token == model.peft_config["default"].bytes_per_token(model.config)


@torch.no_grad()
def test_32k_tokens_of_an_8b_shape_at_95_percent():
    """At most 5.3 % of DynamicCache's bytes with sinks, window, positions and frequencies counted. The formula is the
    one that the tests above hold to the tensors; the cache itself is filled without a model of that size."""
    shape = dict(num_hidden_layers=32, num_key_value_heads=8, head_dim=128)
    config = CSKVConfig(compression=0.95, bits=4, allocation="uniform")
    rank = config.layer_ranks(ModelShape("llama", 32, 8, 128))[0][0]
    config.model_shape = {"model_type": "llama", **shape}
    config.key_ranks, config.value_ranks = [[rank]] * 32, [rank] * 32
    config.key_bits, config.value_bits = [[[[4, rank]]]] * 32, [[[4, rank]]] * 32
    model_config = LlamaConfig(hidden_size=4096, num_attention_heads=32, **shape)
    full = 32768 * 32 * 2 * 8 * 128 * 2
    held = config.cache_nbytes(model_config, 32768)
    assert held / full <= 0.053
    layer = 32 * held_by(config, layer_idx=0, tokens=32768)
    assert held == layer + 32768 * 4 + 4 * 64


def held_by(config, layer_idx, tokens):
    """Bytes of one layer's tensors after a prompt, stored for real."""
    old = config.num_old_tokens(tokens)
    exact = torch.zeros(2, 8, tokens - old, 128, dtype=torch.bfloat16)
    stored = [
        tensor
        for format in config.formats(layer_idx)
        for tensor in Latents.of(format, torch.zeros(1, old, format.rank), torch.bfloat16).tensors
    ]
    return exact.nbytes + sum(tensor.nbytes for tensor in stored)


@torch.no_grad()
def test_80_percent_at_4096_tokens():
    """Sinks, window, positions and frequencies included, the cache is below 0.23 of DynamicCache's bytes, and a
    token below 0.20."""
    model = make_model(dtype=torch.float32, num_hidden_layers=4, head_dim=32, max_position_embeddings=4096)
    model = lossy(model, 0.8, window=32, sinks=4, block_size=32)
    full = 4 * 2 * 4 * 32 * 4  # bytes per token: layers, K and V, heads, head_dim, float32
    sizes = {}
    for length in (2048, 4096):
        cache = CSKVCache()
        model(prompt(1, length), past_key_values=cache, use_cache=True, logits_to_keep=1)
        sizes[length] = cache.nbytes
    assert sizes[4096] / (4096 * full) <= 0.23
    assert (sizes[4096] - sizes[2048]) / (2048 * full) <= 0.20

"""Logits of compressed generation equal the slow reference, for every family, layout and mode of the cache."""

import pytest
import torch
from conftest import lossy, make_model, prompt
from reference import Reference

from cskv_hf import CSKVCache

TURNS = [28, 1, 1, 1, 11] + [1] * 8  # prompt, decoding, a second prompt over a compressed past, decoding


def run(model, ids, turns, cache, attention_mask=None):
    """Logits (batch, tokens, vocab) of feeding `ids` in pieces; with a mask, positions count real tokens as in
    generate()."""
    outputs, start = [], 0
    for length in turns:
        kwargs = {}
        if attention_mask is not None:
            mask = attention_mask[:, : start + length]
            kwargs = {
                "attention_mask": mask,
                "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)[:, start : start + length],
            }
        outputs.append(model(ids[:, start : start + length], past_key_values=cache, use_cache=True, **kwargs).logits)
        start += length
    return torch.cat(outputs, dim=1)


def reference_logits(reference, ids):
    return torch.cat([reference.forward(piece) for piece in ids[0].split(TURNS)])


@pytest.mark.parametrize("materialize", [False, True], ids=["tiled", "materialize"])
@torch.no_grad()
def test_every_family(family, materialize):
    model = lossy(make_model(family))
    ids = prompt(1, sum(TURNS))
    reference = Reference(model.get_base_model(), "default", 8, 3, 4)
    expected = reference_logits(reference, ids)
    cache = CSKVCache(materialize=materialize)
    actual = run(model, ids, TURNS, cache)
    assert cache.tokens.num_old == reference.num_old > 20  # else this would show nothing
    torch.testing.assert_close(actual[0], expected, atol=1e-9, rtol=1e-9)


ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24,
    },
}  # fmt: skip


@pytest.mark.parametrize("scaling", ROPES.values(), ids=ROPES)
@torch.no_grad()
def test_every_rope_scaling(scaling):
    """yarn, dynamic and longrope are among the families above."""
    model = lossy(make_model(rope_parameters=scaling))
    ids = prompt(1, sum(TURNS))
    expected = reference_logits(Reference(model.get_base_model(), "default", 8, 3, 4), ids)
    torch.testing.assert_close(run(model, ids, TURNS, CSKVCache())[0], expected, atol=1e-9, rtol=1e-9)


PACKED = {
    "uniform 4": dict(bits=4, allocation="uniform"),
    "average 4": dict(bits=4),
    "free": dict(),
    "free, shared ranges": dict(key_group=[4, 3], value_group=[1, 16]),
    "joint keys, 2 bits": dict(bits=2, key_layout="joint"),
}


@pytest.mark.parametrize("materialize", [False, True], ids=["tiled", "materialize"])
@pytest.mark.parametrize("settings", PACKED.values(), ids=PACKED)
@torch.no_grad()
def test_packed_latents(settings, materialize):
    """Quantised block by block when tokens leave the window, and by the definition of the quantiser."""
    model = lossy(make_model(), **{**dict(compression=0.7, bits=None, allocation=None, block_size=8), **settings})
    ids = prompt(1, sum(TURNS))
    reference = Reference(model.get_base_model(), "default", 8, 3, 8)
    expected = reference_logits(reference, ids)
    cache = CSKVCache(materialize=materialize)
    actual = run(model, ids, TURNS, cache)
    assert cache.tokens.num_old == reference.num_old > 20
    assert cache.layers[0].key_latents.tensors[0].dtype == torch.uint8
    torch.testing.assert_close(actual[0], expected, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_heads_without_any_key_channel():
    """At a tiny budget the allocation leaves whole KV heads without keys; their old keys are the mean."""
    model = lossy(make_model(), 0.93, bits=16, allocation=None)
    assert min(min(ranks) for ranks in model.peft_config["default"].key_ranks) == 0
    ids = prompt(1, sum(TURNS))
    expected = reference_logits(Reference(model.get_base_model(), "default", 8, 3, 4), ids)
    torch.testing.assert_close(run(model, ids, TURNS, CSKVCache())[0], expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("layout", ["head", "joint", "group:2"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_every_layout(layout, implementation):
    model = lossy(make_model(attn_implementation=implementation), key_layout=layout)
    ids = prompt(1, sum(TURNS))
    reference = Reference(model.get_base_model(), "default", 8, 3, 4)
    expected = reference_logits(reference, ids)
    tolerance = 1e-4 if implementation == "eager" else 1e-9  # transformers' eager softmax runs in float32
    torch.testing.assert_close(run(model, ids, TURNS, CSKVCache())[0], expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("materialize", [False, True], ids=["tiled", "materialize"])
@torch.no_grad()
def test_left_padded_batch_equals_each_row_alone(family, materialize, packed):
    """Each row follows its own count of real tokens, so padding changes neither what is compressed nor when."""
    model = lossy(make_model(family), **(dict(bits=None, allocation=None, block_size=8) if packed else {}))
    padding = [0, 1, 6, 26]
    ids, mask = prompt(len(padding), sum(TURNS)), torch.ones(len(padding), sum(TURNS), dtype=torch.long)
    for row, pad in enumerate(padding):
        ids[row, :pad], mask[row, :pad] = 0, 0
    batched = run(model, ids, TURNS, CSKVCache(materialize=materialize), mask)
    for row, pad in enumerate(padding):
        if family in ("mistral-sliding", "qwen2-mixed") and pad:
            continue  # transformers counts the sliding window in slots, padding included
        if family in ("llama-dynamic", "llama-longrope") and pad:
            continue  # a batch has the frequencies of its longest row
        alone = run(model, ids[row : row + 1, pad:], [TURNS[0] - pad] + TURNS[1:], CSKVCache(materialize=materialize))
        torch.testing.assert_close(batched[row, pad:], alone[0], atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_padding_between_turns():
    """A batched conversation: the second turn's prompts are padded too, so padding lies in the middle of the rows."""
    model = lossy(make_model())
    turns, total = [30, 1, 1, 12, 1, 1, 1], 47
    ids, mask = prompt(3, total), torch.ones(3, total, dtype=torch.long)
    mask[1, :9] = 0
    mask[0, 32:37] = 0
    mask[2, 32:34] = 0
    batched = run(model, ids, turns, CSKVCache(), mask)
    for row in range(3):
        real = mask[row].bool()
        lengths, start = [], 0
        for length in turns:
            lengths.append(int(real[start : start + length].sum()))
            start += length
        alone = run(model, ids[row, real][None], lengths, CSKVCache())
        torch.testing.assert_close(batched[row, real], alone[0], atol=1e-9, rtol=1e-9)


def test_no_nan_for_rows_that_are_all_padding():
    model = lossy(make_model())
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1] = 0
    logits = run(model, prompt(2, 32), [30, 1, 1], CSKVCache(), torch.cat([mask, torch.ones(2, 2)], dim=1).long())
    assert torch.isfinite(logits).all()

"""Layers with a sliding window drop latents that no query can see any more: the same results, in bounded memory.

Why equal: the model's mask hides from a query at slot q every slot up to ``q - sliding_window``, and a column that is
masked adds nothing to softmax. Tiles of columns are cut elsewhere, so sums differ in rounding.
"""

import json

import pytest
import torch
from conftest import lossless, lossy, make_model, prompt
from safetensors import safe_open
from test_cache import feed
from test_modes import MODES, PACKED_4
from transformers import DynamicCache

from cskv_hf import CSKVCache, tokens

SLIDING = {"mistral-sliding": [0, 1], "qwen2-mixed": [1], "gemma3_text": [0]}  # layers that slide
WINDOW = 16


@pytest.fixture(params=list(SLIDING), scope="module")
def models(request):
    """Lossless and packed factors, and the layers that slide."""
    make = lambda: make_model(request.param, sliding_window=WINDOW)  # noqa: E731
    return lossless(make()), lossy(make(), **PACKED_4), SLIDING[request.param]


@pytest.fixture
def little_rollback(monkeypatch):
    """So that short sequences drop much."""
    monkeypatch.setattr(tokens, "ROLLBACK_TOKENS", 6)


@pytest.fixture
def keep_all(monkeypatch):
    """A function, after which no layer drops anything."""
    return lambda: monkeypatch.setattr(tokens.TokenTable, "unseen_blocks", lambda *_: 0)


def dropped(cache):
    """Tokens, by layer."""
    return [layer.dropped_blocks * cache.tokens.block_size for layer in cache.layers]


@pytest.mark.parametrize("mode", list(MODES))
def test_every_mode_as_without_dropping(models, mode, little_rollback, keep_all):
    _, packed, sliding = models
    made = []

    def compressed(**settings):
        made.append(CSKVCache(**settings))
        return made[-1]

    found = [MODES[mode](packed, compressed, prompt(2, 50))]
    drops = [dropped(cache) for cache in made if cache.layers]
    found.append(MODES[mode](packed, lambda: compressed(materialize=True), prompt(2, 50)))
    if mode != "assisted, early exit" or any(map(sum, drops)):  # an older transformers crops if one was rejected only
        assert any(min(counts[i] for i in sliding) >= 8 for counts in drops)
    assert not any(count for counts in drops for i, count in enumerate(counts) if i not in sliding)
    keep_all()
    made.clear()
    found.append(MODES[mode](packed, compressed, prompt(2, 50)))
    assert not any(sum(dropped(cache)) for cache in made)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("materialize", [False, True])
def test_equals_dynamic_cache(models, materialize, padded):
    """Lossless factors, with the margin as it is: the logits of the model over all keys and values."""
    model, _, sliding = models
    ids, mask, turns = prompt(2, 200), torch.ones(2, 200, dtype=torch.long), [140, 1, 1, 9] + [1] * 20
    if padded:
        mask[0, :23] = 0
    cache = CSKVCache(materialize=materialize)
    expected = feed(model, ids, DynamicCache(), turns, mask)
    actual = feed(model, ids, cache, turns, mask)
    rows = mask[:, : actual.shape[1]].bool()
    torch.testing.assert_close(actual[rows], expected[rows], atol=1e-9, rtol=1e-9)
    assert min(dropped(cache)[i] for i in sliding) > 48


@pytest.mark.parametrize("padded", [False, True])
def test_rows_and_copies(models, padded, little_rollback, keep_all, tmp_path):
    """Reorder, repeat, select, save and load after latents were dropped, against a cache that kept them."""
    _, model, sliding = models
    ids, mask = prompt(3, 160), torch.ones(3, 160, dtype=torch.long)
    if padded:
        mask[0, :9] = 0
        mask[2, :2] = 0
        mask[1, 100:103] = 0  # between turns
    found = []
    for keep in (False, True):
        if keep:
            keep_all()
        cache = CSKVCache()
        logits = [feed(model, ids, cache, [60] + [1] * 30, mask)]
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        rows = mask[[2, 0, 0]]
        logits.append(feed(model, ids, cache, [13] + [1] * 9, rows))
        cache.crop(-5)
        cache.save(tmp_path / "cache")
        with safe_open(tmp_path / "cache", "pt") as file:
            assert json.loads(file.metadata()["cskv_cache"])["version"] == 5
        cache = CSKVCache.load(tmp_path / "cache")
        logits.append(feed(model, ids, cache, [1] * 14, rows))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([5, 0]))
        logits.append(feed(model, ids[:2], cache, [1] * 14, rows[[2, 0]]))
        assert keep == (sum(dropped(cache)) == 0)
        found.append(logits)
        if not keep:
            assert min(dropped(cache)[i] for i in sliding) > 32
    for one, other in zip(*found):
        real = one.isfinite().all(-1)
        torch.testing.assert_close(one[real], other[real], atol=1e-9, rtol=1e-9)


def test_memory_is_bounded(models):
    """However long the text: what a sliding layer holds is what its window, the margin and one block leave."""
    _, model, sliding = models
    ids, cache, sizes, block = prompt(1, 700), CSKVCache(), [], 8
    feed(model, ids, cache, [200])
    for _ in range(10):
        feed(model, ids, cache, [1, 1, 30, 9, 1, 8])
        sizes.append(
            [sum(t.nbytes for name in layer.LATENTS for t in layer.tensors()[name]) for layer in cache.layers]
        )
        for i in sliding:
            held = cache.layers[i].key_latents.num_tokens
            assert WINDOW + 64 - 8 <= held < WINDOW + 64 - 8 + 2 * block
            assert held + dropped(cache)[i] == cache.tokens.num_old
    for i in range(2):
        growth = sizes[-1][i] / sizes[0][i]
        assert growth < 1.2 if i in sliding else growth > 2
    assert f"{held:>8} of these in {len(sliding)} layers" in cache.report()
    full = DynamicCache(config=model.config)
    feed(model, ids, full, [cache.get_seq_length()])
    share = cache.nbytes / sum(t.nbytes for layer in full.layers for t in (layer.keys, layer.values))
    assert f"{100 * share:.1f} % of a full cache" in cache.report()
    assert max(map(len, cache.report().split("\n"))) <= 80


@pytest.mark.parametrize("length", [60, 100, 180, 181, 188, 333])
@torch.no_grad()
def test_formula_equals_the_bytes_of_the_tensors(models, length):
    """In one piece and in several: when a block is dropped depends on what is held, not on how it came."""
    _, model, _ = models
    config, ids = model.peft_config["default"], prompt(2, length)
    caches = [CSKVCache(), CSKVCache()]
    feed(model, ids, caches[0], [length])
    feed(model, ids, caches[1], [40] + [3] * ((length - 40) // 3) + [1] * ((length - 40) % 3))
    expected = config.cache_nbytes(model.config, length, batch_size=2, dtype=torch.float64)
    assert caches[0].nbytes == caches[1].nbytes == expected
    assert (sum(dropped(caches[0])) > 0) == (length > 60)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("removed", [1, 7, 30, 64])
def test_crop_within_the_margin(models, removed, padded):
    """64 tokens can be taken back at any time; the cache goes on like one that never saw them."""
    model, _, sliding = models
    ids, mask = prompt(2, 260), torch.ones(2, 260, dtype=torch.long)
    if padded:
        mask[0, :13] = 0
    cache, dynamic = CSKVCache(), DynamicCache()
    feed(model, ids, cache, [120, 30, 1, 20, 9], mask)
    before = dropped(cache)
    cache.crop(-removed)
    assert dropped(cache) == before and min(before[i] for i in sliding) > 60
    feed(model, ids, dynamic, [180 - removed], mask)
    again = [1, 1, 9, 30] + [1] * 12
    actual, expected = feed(model, ids, cache, again, mask), feed(model, ids, dynamic, again, mask)
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


def test_crop_beyond_what_is_held(models):
    """Refused before anything changes, naming how many tokens must stay; that many may."""
    model, _, sliding = models
    ids, cache, dynamic = prompt(1, 260), CSKVCache(), DynamicCache()
    feed(model, ids, cache, [180])
    least = 3 + dropped(cache)[sliding[0]] - 1 + WINDOW  # the last slot that is gone, and a window behind it
    with pytest.raises(ValueError, match=f"of 180 tokens to {least - 1}: .* window of 16 .* {least} tokens or more"):
        cache.crop(least - 1 - 180)
    assert cache.get_seq_length() == 180 and 180 - least >= 64
    cache.crop(least - 180)
    feed(model, ids, dynamic, [least])
    again = [1, 1, 5] + [1] * 20
    torch.testing.assert_close(feed(model, ids, cache, again), feed(model, ids, dynamic, again), atol=1e-9, rtol=1e-9)
    cache.crop(2)  # into the sinks: no latent is needed
    assert dropped(cache) == [0, 0]
    dynamic.crop(2 - dynamic.get_seq_length())
    torch.testing.assert_close(
        feed(model, ids, cache, [100, 1, 1]), feed(model, ids, dynamic, [100, 1, 1]), atol=1e-9, rtol=1e-9
    )


@torch.no_grad()
def test_a_cache_from_a_file_knows_the_window(tmp_path):
    """Also where it is the first that a model sees: what it has dropped is not to be needed again."""
    model, ids = lossy(make_model("mistral", sliding_window=16), block_size=4), prompt(1, 200)
    cache = CSKVCache()
    model(ids[:, :190], past_key_values=cache)
    cache.save(tmp_path / "cache")
    again, loaded = lossy(make_model("mistral", sliding_window=16), block_size=4), CSKVCache.load(tmp_path / "cache")
    again(ids[:, 190:], past_key_values=loaded)
    assert loaded.layers[0].dropped_blocks and loaded.layers[0].sliding_window == 16
    with pytest.raises(ValueError, match="have dropped what lies beyond it"):
        loaded.crop(-150)


def test_recording_waits_for_crop(models):
    """While speculations are verified nothing is dropped until `crop` says what was rejected, be it nothing."""
    model, _, sliding = models
    ids, cache = prompt(1, 400), CSKVCache()
    cache.activate_past_recording()
    feed(model, ids, cache, [200, 1, 90, 1, 8])
    assert dropped(cache) == [0, 0]
    cache.crop(0)
    assert min(dropped(cache)[i] for i in sliding) > 100 and cache.get_seq_length() == 300
    cache.crop(-64)
    expected = feed(model, ids, DynamicCache(), [236, 1, 1])[:, 236:]
    torch.testing.assert_close(feed(model, ids, cache, [1, 1]), expected, atol=1e-9, rtol=1e-9)


def test_recording_ends_with_its_call(little_rollback):
    """A turn with prompt lookup, then ordinary ones: layers that slide drop what they would have dropped."""
    model = lossy(make_model("mistral-sliding", sliding_window=WINDOW), block_size=4)
    caches, held = (CSKVCache(), CSKVCache()), []
    for cache, first in zip(caches, ({}, dict(prompt_lookup_num_tokens=3))):
        ids = prompt(1, 100)
        for settings in (first, {}):
            ids = model.generate(ids, past_key_values=cache, max_new_tokens=60, do_sample=False, **settings)
        held.append(cache.tokens.num_old - dropped(cache)[0])
    assert caches[1].slack == 0 and held[1] <= held[0] + 8 < 100


def test_masks_of_the_users_own(models):
    """A 4-D mask may show anything, so nothing is dropped under one, and one is refused where something was."""
    model, _, _ = models
    ids = prompt(1, 240)
    mask = torch.ones(240, 240, dtype=torch.bool).tril()[None, None]  # wider than the window
    logits = []
    for cache in (CSKVCache(), DynamicCache()):
        with torch.no_grad():
            for part in (slice(0, 200), slice(200, 201), slice(201, 240)):
                seen = mask[:, :, part, : part.stop]
                logits.append(model(ids[:, part], attention_mask=seen, past_key_values=cache, use_cache=True).logits)
        if isinstance(cache, CSKVCache):
            assert dropped(cache) == [0, 0]
    for one, other in zip(logits[:3], logits[3:]):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)
    cache = CSKVCache()
    feed(model, ids, cache, [200])
    with pytest.raises(ValueError, match=r"`attention_mask` is a mask of single queries.*has dropped that"):
        model(ids[:, 200:201], attention_mask=mask[:, :, 200:201, :201], past_key_values=cache, use_cache=True)

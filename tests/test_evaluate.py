"""The measurements themselves: line records and their scoring, intervals, perplexity through a cache, bytes."""

import math
import random

import pytest
import torch
from conftest import lossless, lossy, make_model, prompt
from transformers import DynamicCache

from cskv_hf import CSKVCache
from cskv_hf.evaluate.baselines import WindowOnlyCache
from cskv_hf.evaluate.divergence import compare_with_full_cache
from cskv_hf.evaluate.lines import Accuracy, is_correct, line_record
from cskv_hf.evaluate.memory import cache_nbytes
from cskv_hf.evaluate.perplexity import Perplexity, compressed_perplexity


def test_records():
    record = line_record(100, 5, random.Random(0))
    assert record.text.count("\n") == 100
    assert len({key.split("-")[1] for key, _ in record.lines}) == 100
    for i in range(5):
        key, value = record.lines[record.asked[i]]
        assert record.question(i) == f"what is the content in line {key}?\n"
        assert record.answer(i) == f"line {key}: REGISTER_CONTENT is <{value}>\n" and record.answer(i) in record.text
        assert is_correct(record.answer(i), record.value(i))
    assert line_record(100, 5, random.Random(0)) == record
    for arguments, message in (((901, 1), "between 1 and 900, got 901"), ((5, 6), "between 1 and num_lines=5, got 6")):
        with pytest.raises(ValueError, match=message):
            line_record(*arguments, random.Random(0))


@pytest.mark.parametrize(
    "answer, right",
    [
        ("line 12-345: REGISTER_CONTENT is <54321>", True),
        ("<54321>\nline 99-999: REGISTER_CONTENT is <11111>", True),
        ("line 12-345: REGISTER_CONTENT is <54322>", False),
        ("line 54321-345", False),
        ("I do not know", False),
        ("", False),
    ],
)
def test_scoring(answer, right):
    assert is_correct(answer, "54321") is right


def test_wilson_interval_against_a_hand_computed_case():
    # p = 0.9, n = 100: centre 0.8852, half-width 0.0594 (Wilson score, z = 1.96)
    assert Accuracy(90, 100).margin == pytest.approx(0.0594, abs=2e-4)
    assert Accuracy(100, 100).margin > 0


def test_perplexity_through_a_full_cache_is_the_ordinary_one():
    model, ids = make_model(), prompt(3, 100)
    with torch.no_grad():
        logits = model(ids).logits[:, 63:-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 64:].flatten())
    for stride in (1, 7, 32, 100):
        actual = compressed_perplexity(model, ids, DynamicCache, stride=stride)
        assert actual.value == pytest.approx(math.exp(expected), rel=1e-5)
        assert actual.num_tokens == 3 * 36
    with pytest.raises(ValueError, match="Rows of 50 tokens leave nothing to score after `skip`=64"):
        compressed_perplexity(model, ids[:, :50], DynamicCache)


@pytest.mark.parametrize("skip", [0, 1])
def test_the_first_token_is_predicted_by_nothing(skip):
    """Nothing skipped is 49 predictions of 50 tokens, in a mean of 49."""
    model, ids = make_model(), prompt(3, 50)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    expected = math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
    alone, compared = (
        measure(model, ids, DynamicCache, skip=skip) for measure in (compressed_perplexity, compare_with_full_cache)
    )
    assert compared.agreement == 1.0
    for actual in (alone, compared.full, compared.compressed):
        assert actual.value == pytest.approx(expected, rel=1e-5) and actual.num_tokens == 3 * 49


def test_perplexity_with_lossless_factors_equals_the_full_cache():
    model, ids = lossless(make_model()), prompt(2, 100)
    full, ours = (compressed_perplexity(model, ids, cache) for cache in (DynamicCache, CSKVCache))
    assert ours.value == pytest.approx(full.value, rel=1e-6)


def test_ratio_interval_is_paired():
    """Rows differ wildly and the ratio does not: the interval is narrow, and contains it."""
    reference = Perplexity(torch.linspace(1, 5, 50, dtype=torch.float64), 50)
    generator = torch.Generator().manual_seed(0)
    noise = 0.01 * torch.randn(50, generator=generator, dtype=torch.float64)
    low, high = Perplexity(reference.losses + 0.1 + noise, 50).ratio_interval(reference)
    assert low < math.exp(0.1) < high and high - low < 0.01


@torch.no_grad()
def test_window_only_sees_sinks_and_window_and_nothing_else():
    """Changing what lies between changes neither the logits nor the cache; changing a sink or a recent token does."""
    model = make_model(num_hidden_layers=1)
    ids = prompt(1, 101)

    def logits(ids):
        cache = WindowOnlyCache()
        model(ids[:, :100], past_key_values=cache, use_cache=True)
        assert cache.layers[0].keys.shape[2] == 100 - 64
        return model(ids[:, 100:], past_key_values=cache, use_cache=True).logits

    expected = logits(ids)
    for position, seen in ((1, True), (30, False), (67, False), (68, True), (99, True)):
        changed = ids.clone()
        changed[0, position] = 2 + (ids[0, position] - 1) % 80
        assert torch.equal(logits(changed), expected) is not seen, position


def test_bytes_of_caches():
    model = make_model(dtype=torch.float32)
    assert cache_nbytes(model, DynamicCache, prompt(2, 50)) == 2 * 50 * 2 * 2 * 32 * 4


def test_a_token_that_is_forbidden():
    """A logit of -inf on both sides is no difference: 0 log 0 is 0."""
    ids, forbidden = prompt(2, 90), torch.tensor([3])
    ids[ids == 3] = 4
    for make, least, most in ((lossless, 0.0, 1e-9), (lossy, 1e-6, 100.0)):
        model = make_model()
        model.lm_head.register_forward_hook(lambda module, args, output: output.index_fill(-1, forbidden, -torch.inf))
        assert least <= compare_with_full_cache(make(model), ids, CSKVCache).kl < most


def test_comparison_with_the_full_cache():
    """Against itself nothing differs; lossless nothing but rounding; and perplexities are those of the other way."""
    model, ids = lossy(make_model()), prompt(5, 90)
    same = compare_with_full_cache(model, ids, DynamicCache, stride=7, skip=20, batch_size=2)
    assert (same.kl, same.agreement, same.ratio) == (0.0, 1.0, 1.0)
    compressed = compare_with_full_cache(model, ids, CSKVCache, stride=7, skip=20, batch_size=2)
    assert compressed.kl > 1e-4 and compressed.agreement < 1.0
    expected = compressed_perplexity(model, ids, CSKVCache, stride=7, skip=20)
    torch.testing.assert_close(compressed.compressed.losses, expected.losses)
    torch.testing.assert_close(compressed.full.losses, compressed_perplexity(model, ids, DynamicCache, skip=20).losses)
    with pytest.raises(ValueError, match="leave nothing to score"):
        compare_with_full_cache(model, ids, CSKVCache, skip=90)

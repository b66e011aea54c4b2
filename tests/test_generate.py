"""generate(): every way to hand over the cache, what is refused, batches and turns. Its modes are in test_modes.py."""

import copy
import pickle

import pytest
import torch
from conftest import lossless, lossy, make_model, prompt
from peft import PeftModelForCausalLM
from transformers import DynamicCache

from cskv_hf import CSKVCache, attach, detach
from cskv_hf.generation import CACHE_ARGUMENT

GREEDY = dict(max_new_tokens=24, do_sample=False)


@pytest.fixture(scope="module")
def full_rank():
    return lossless(make_model())


def test_every_way_to_pass_the_cache(full_rank):
    ids = prompt(2, 40)
    mask = torch.ones_like(ids)
    expected = full_rank.generate(ids, attention_mask=mask, cache=DynamicCache, **GREEDY)
    instance = CSKVCache()
    ways = {
        "class": {"cache": CSKVCache},
        "instance": {"cache": instance},
        "factory": {"cache": lambda: CSKVCache(window=16)},
        "past_key_values": {"past_key_values": CSKVCache()},
        "past_key_values class": {"past_key_values": CSKVCache},
        "default": {},
        "materialize": {"cache": CSKVCache(materialize=True)},
    }
    for name, way in ways.items():
        assert torch.equal(full_rank.generate(ids, attention_mask=mask, **way, **GREEDY), expected), name
    assert instance.tokens.num_old > 0


def test_the_default_cache_is_compressed(full_rank):
    output = full_rank.generate(prompt(1, 40), return_dict_in_generate=True, **GREEDY)
    assert isinstance(output.past_key_values, CSKVCache)
    assert output.past_key_values.tokens.num_old > 0


def test_other_caches_keep_working(full_rank):
    ids = prompt(1, 40)
    expected = full_rank.generate(ids, cache=DynamicCache, **GREEDY)
    for way in ({"past_key_values": DynamicCache()}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(full_rank.generate(ids, **way, **GREEDY), expected), way


def test_refuses_what_is_no_cache(full_rank):
    with pytest.raises(ValueError, match="mean the same"):
        full_rank.generate(prompt(1, 4), cache=CSKVCache, past_key_values=CSKVCache(), **GREEDY)
    with pytest.raises(TypeError, match="`cache` must be a cache class such as `CSKVCache`"):
        full_rank.generate(prompt(1, 4), cache="cskv", **GREEDY)


def test_padded_batch_generates_what_each_row_does_alone():
    model, ids = lossy(make_model()), prompt(3, 40)
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 5, 22)):
        ids[row, :pad], mask[row, :pad] = 0, 0
    together = model.generate(ids, attention_mask=mask, **GREEDY)
    for row, pad in enumerate((0, 5, 22)):
        alone = model.generate(ids[row : row + 1, pad:], **GREEDY)
        assert torch.equal(together[row, 40:], alone[0, 40 - pad :])


def test_conversation_with_one_cache():
    """Turn after turn on one cache equals, lossless, a full cache; and the history is not computed again."""
    model, cache, dynamic = lossless(make_model()), CSKVCache(), DynamicCache()
    history = history_full = prompt(1, 30)
    for turn in range(3):
        history = model.generate(history, cache=cache, **GREEDY)
        history_full = model.generate(history_full, cache=dynamic, **GREEDY)
        assert torch.equal(history, history_full)
        assert cache.get_seq_length() == history.shape[1] - 1
        history = history_full = torch.cat([history, prompt(1, 9, seed=turn)], dim=1)


def test_prompt_cached_once_and_copied():
    model, shared = lossy(make_model()), prompt(1, 50)
    cache = CSKVCache()
    with torch.no_grad():
        model(shared, past_key_values=cache, use_cache=True)
    for seed in (5, 6):
        ids = torch.cat([shared, prompt(1, 6, seed)], dim=1)
        first = model.generate(ids, cache=copy.deepcopy(cache), **GREEDY)
        again = model.generate(ids, cache=copy.deepcopy(cache), **GREEDY)
        assert torch.equal(first, again)
    assert cache.get_seq_length() == 50


def test_detach_and_attach_see_through_peft():
    """A `PeftModel`, as `fit` returns it, and the model inside: both lose our `generate`, and both get it back."""
    model, ids = lossy(make_model()), prompt(1, 50)
    inside, expected = model.get_base_model(), make_model().generate(ids, **GREEDY)
    compressed = model.generate(ids, **GREEDY)
    assert not torch.equal(compressed, expected)
    for given in (model, inside):
        detach(given)
        assert type(inside) is type(make_model()) and type(model) is PeftModelForCausalLM
        for one in (model, inside):
            output = one.generate(ids, return_dict_in_generate=True, **GREEDY)
            assert isinstance(output.past_key_values, DynamicCache) and torch.equal(output.sequences, expected)
        attach(given)
        assert type(model) is PeftModelForCausalLM
        for one in (model, inside):
            assert torch.equal(one.generate(ids, **GREEDY), compressed)
            assert torch.equal(one.generate(ids, cache=CSKVCache, **GREEDY), compressed)


@torch.no_grad()
def test_arguments_by_position():
    """What the decoder is given by position counts as by name: the cache, and the mask of the padding in it."""
    model = lossy(make_model()).get_base_model()
    ids, mask, later = prompt(2, 40), torch.ones(2, 46, dtype=torch.long), prompt(2, 6, seed=9)
    mask[0, :17] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = []
    for by_name in (True, False):
        cache = CSKVCache()
        for tokens, start, end in ((ids, 0, 40), (later, 40, 46)):
            given = tokens, mask[:, :end], positions[:, start:end], cache
            names = ("input_ids", "attention_mask", "position_ids", CACHE_ARGUMENT)
            output = model.model(**dict(zip(names, given))) if by_name else model.model(*given)
        assert cache.tokens.num_old > 0
        hidden.append(output.last_hidden_state)
    assert torch.equal(*hidden)


def test_copies_of_the_model_generate_the_same():
    model, ids = lossy(make_model()), prompt(1, 50)
    expected = model.generate(ids, **GREEDY)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.generate(ids, **GREEDY), expected)
        with torch.no_grad():  # the copy has hooks and factors of its own
            for sidecar in (m for m in twin.modules() if type(m).__name__ == "CSKVFactors"):
                sidecar.cskv_key_A["default"].weight.zero_()
        assert not torch.equal(twin.generate(ids, **GREEDY), expected)
    assert torch.equal(model.generate(ids, **GREEDY), expected)


def test_unfitted_adapter_is_refused():
    from peft import get_peft_model

    from cskv_hf import CSKVConfig

    model = get_peft_model(make_model(), CSKVConfig(compression=0.5))
    with pytest.raises(RuntimeError, match=r"adapter 'default' has no factors yet.*cskv_hf\.fit"):
        model.generate(prompt(1, 10), cache=CSKVCache, **GREEDY)

"""What transformers' own generation, cache and model tests check of a cache, under their names, written for CSKVCache.

Factors are lossless and almost nothing stays exact, so prompts of 7 to 20 tokens are compressed and the expected
result is `DynamicCache`'s on a model that CSKV never touched. Of upstream's names are left out: those of other caches
(quantized, hybrid formats), of decoding that lives on the Hub (dola, contrastive search),
`test_past_key_values_format` (a layer here has latents, not keys), flash attention (test_implementations.py holds its
masks), compiled generation (test_static_cache.py), tensor parallelism and offloaded weights (test_tensor_parallel.py,
test_together.py).
"""

import copy
import io

import pytest
import torch
from conftest import calibration_data, make_model, prompt
from transformers import DynamicCache, GenerationMixin, StaticCache

import cskv_hf
from cskv_hf import CSKVCache, CSKVConfig, CSKVStaticCache

NEW = 8
GREEDY = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
FAMILIES = ("llama", "qwen3")


def compressed(model):
    kv_dim = model.config.num_key_value_heads * model.config.head_dim
    config = CSKVConfig(key_rank=kv_dim, value_rank=kv_dim, window=4, sinks=1, block_size=2)
    return cskv_hf.fit(model, calibration_data(model), config, progress=False)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """A model with lossless factors, and the same one as CSKV never touched it."""
    return compressed(make_model(request.param)), make_model(request.param)


def generate(model, cache, ids=None, mask=None, **settings):
    torch.manual_seed(0)
    ids = prompt(2, 13) if ids is None else ids
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **{**GREEDY, **settings})


def equal(pair, **settings):
    """Both caches give the same tokens; returns the compressed one."""
    cache = CSKVCache()
    actual, expected = generate(pair[0], cache, **settings), generate(pair[1], DynamicCache(), **settings)
    assert torch.equal(actual, expected)
    assert cache.tokens.num_old > 0
    return cache


def equal_outputs(pair, **settings):
    """Both give the same of everything that generate returns, and a cache that holds all tokens but the last."""
    settings |= dict(return_dict_in_generate=True, output_scores=True, output_logits=True, output_hidden_states=True)
    cache = CSKVCache()
    actual, expected = generate(pair[0], cache, **settings), generate(pair[1], DynamicCache(), **settings)
    assert type(actual) is type(expected) and actual.keys() == expected.keys()
    assert torch.equal(actual.sequences, expected.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(actual[name]), torch.stack(expected[name]), atol=1e-5, rtol=1e-5)
    hidden = "hidden_states" if "hidden_states" in actual else "decoder_hidden_states"
    assert [t.shape for step in actual[hidden] for t in step] == [t.shape for step in expected[hidden] for t in step]
    assert actual.past_key_values is cache
    check_past_key_values_for_generate(cache, expected.past_key_values)
    return actual


@torch.no_grad()
def continued(model, cache, ids, more, seed=0):
    """Logits of `more`, read over a cache that holds `ids`."""
    torch.manual_seed(seed)
    model(ids, past_key_values=cache, use_cache=True)
    return model(more, past_key_values=cache, use_cache=True).logits


def check_past_key_values_for_generate(cache, dynamic):
    assert len(cache.layers) == len(dynamic.layers) == 2
    for layer_idx in range(2):
        assert cache.get_seq_length(layer_idx) == dynamic.get_seq_length(layer_idx)
        layer, full = cache.layers[layer_idx], dynamic.layers[layer_idx]
        assert layer.keys.shape[:2] + layer.keys.shape[3:] == full.keys.shape[:2] + full.keys.shape[3:]
        assert layer.keys.shape == layer.values.shape and layer.sink_keys.shape == layer.sink_values.shape
        exact = layer.sink_keys.shape[2] + layer.keys.shape[2]
        assert exact + cache.tokens.num_old == full.keys.shape[2]


class TestGeneration:
    """tests/generation/test_utils.py, GenerationTesterMixin."""

    def test_inherits_generation_mixin(self, pair):
        assert isinstance(pair[0].get_base_model(), GenerationMixin) and pair[0].get_base_model().can_generate()

    def test_greedy_generate(self, pair):
        equal(pair)

    def test_greedy_generate_dict_outputs(self, pair):
        equal_outputs(pair)

    def test_greedy_generate_dict_outputs_use_cache(self, pair):
        """Whether a cache is used changes nothing; use_cache=False needs no factors."""
        with_cache = equal_outputs(pair, use_cache=True).sequences
        ids = prompt(2, 13)
        without = pair[0].generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **GREEDY)
        assert torch.equal(with_cache, without)

    def test_sample_generate(self, pair):
        equal(pair, do_sample=True, num_return_sequences=2)

    def test_sample_generate_dict_output(self, pair):
        equal_outputs(pair, do_sample=True)

    def test_beam_search_generate(self, pair):
        """Long enough for tokens in which beams differ to be compressed."""
        equal(pair, num_beams=3, max_new_tokens=20)

    def test_beam_search_generate_dict_output(self, pair):
        equal_outputs(pair, num_beams=2, num_return_sequences=2)

    def test_beam_search_generate_dict_outputs_use_cache(self, pair):
        equal_outputs(pair, num_beams=2, use_cache=True)

    def test_beam_sample_generate(self, pair):
        equal(pair, num_beams=2, do_sample=True)

    def test_beam_sample_generate_dict_output(self, pair):
        equal_outputs(pair, num_beams=2, do_sample=True)

    def test_generate_without_input_ids(self, pair):
        """From the beginning-of-sequence token alone, into the compressed cache that is the default."""
        settings = dict(max_new_tokens=20, min_new_tokens=20, do_sample=False)
        output = pair[0].generate(return_dict_in_generate=True, **settings)
        assert output.past_key_values.tokens.num_old > 0
        assert torch.equal(output.sequences, pair[1].generate(**settings))

    @pytest.mark.parametrize("assistant", ["random", "same"])
    @pytest.mark.parametrize("proposals", [1, 5])
    def test_assisted_decoding_matches_greedy_search(self, pair, assistant, proposals):
        """What is proposed and rejected leaves nothing in the cache; what the same model proposes, on a compressed
        cache of its own, is never rejected. The prompt is long enough for tokens to be compressed behind the 64 that
        are kept exact meanwhile."""
        ids, cache, forwards = prompt(1, 90), CSKVCache(), []
        helper = copy.deepcopy(pair[0]) if assistant == "same" else make_model(num_hidden_layers=1, seed=5)
        helper.generation_config.num_assistant_tokens = proposals
        helper.generation_config.num_assistant_tokens_schedule = "constant"
        helper.generation_config.assistant_confidence_threshold = 0.0  # propose so many, however unsure
        counting = pair[0].get_base_model().register_forward_hook(lambda *_: forwards.append(1))
        actual = generate(pair[0], cache, ids, assistant_model=helper)
        counting.remove()
        assert torch.equal(actual, generate(pair[1], DynamicCache(), ids))
        assert cache.tokens.num_old > 0
        if assistant == "same":
            assert len(forwards) == -(-NEW // (proposals + 1))

    def test_assisted_generation_early_exit(self, pair):
        """The model's own first layer proposes, on the same cache."""
        ids = prompt(1, 90)
        greedy = generate(pair[1], DynamicCache(), ids)
        assert torch.equal(generate(pair[0], CSKVCache(), ids, assistant_early_exit=1), greedy)

    def test_assisted_decoding_sample(self, pair):
        """Sampling accepts proposals by chance, so its tokens are known only where one has all the probability."""
        ids, helper = prompt(1, 90), make_model(num_hidden_layers=1, seed=5)
        sampled = dict(assistant_model=helper, do_sample=True)
        output = generate(pair[0], CSKVCache(), ids, **sampled)
        assert output.shape == (1, 90 + NEW) and torch.equal(output[:, :90], ids)
        greedy = generate(pair[1], DynamicCache(), ids)
        assert torch.equal(generate(pair[0], CSKVCache(), ids, top_k=1, **sampled), greedy)

    def test_prompt_lookup_decoding_matches_greedy_search(self, pair):
        ids, cache = torch.cat([prompt(1, 30)] * 3, dim=1), CSKVCache()
        greedy = generate(pair[1], DynamicCache(), ids)
        assert torch.equal(generate(pair[0], cache, ids, prompt_lookup_num_tokens=3), greedy)
        assert cache.tokens.num_old > 0

    def test_prompt_lookup_decoding_stops_at_eos(self, pair):
        """The end of a sequence among the tokens looked up ends it there, although more were proposed."""
        ids = torch.cat([prompt(1, 30)] * 3, dim=1)
        greedy = generate(pair[1], DynamicCache(), ids)
        end = int(greedy[0, 90 + NEW // 2])
        settings = dict(eos_token_id=end, min_new_tokens=0)
        output = generate(pair[0], CSKVCache(), ids, prompt_lookup_num_tokens=3, **settings)
        assert output[0, -1] == end and (output[0, 90:] == end).sum() == 1
        assert torch.equal(output[0], greedy[0, : output.shape[1]])

    def test_left_padding_compatibility(self, pair):
        """A padded row gets the logits that it gets alone, in the prompt and after decoding."""
        ids, pad = prompt(1, 20), torch.zeros(1, 9, dtype=torch.long)
        padded = torch.cat([pad, ids], dim=1)
        mask = torch.cat([pad, torch.ones_like(ids)], dim=1)
        settings = dict(return_dict_in_generate=True, output_logits=True)
        alone = generate(pair[0], CSKVCache(), ids, **settings)
        together = generate(pair[0], CSKVCache(), padded, mask, **settings)
        assert torch.equal(together.sequences[:, 9:], alone.sequences)
        torch.testing.assert_close(torch.stack(together.logits), torch.stack(alone.logits), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("num_beams", [1, 2])
    def test_generate_from_inputs_embeds(self, pair, num_beams):
        """Embeddings in place of tokens give the tokens that follow; other embeddings give others."""
        ids = prompt(2, 13)
        embeds = pair[0].get_input_embeddings()(ids)
        settings = dict(attention_mask=torch.ones_like(ids), num_beams=num_beams, **GREEDY)
        from_ids = pair[1].generate(ids, past_key_values=DynamicCache(), **settings)
        from_embeds = pair[0].generate(inputs_embeds=embeds, past_key_values=CSKVCache(), **settings)
        assert torch.equal(from_embeds, from_ids[:, 13:])
        others = pair[0].generate(inputs_embeds=embeds.flip(1), past_key_values=CSKVCache(), **settings)
        assert not torch.equal(others, from_embeds)

    def test_generate_continue_from_past_key_values(self, pair):
        """Generating 3 and then 5 more on the cache that came back is generating 8, and so is what it holds."""
        first = generate(pair[0], CSKVCache(), max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
        second = generate(pair[0], first.past_key_values, first.sequences, max_new_tokens=5, min_new_tokens=5)
        cache = CSKVCache()
        assert torch.equal(second, generate(pair[0], cache))
        one, other = first.past_key_values, cache
        assert one.get_seq_length() == other.get_seq_length() and one.tokens.num_old == other.tokens.num_old
        for layer, twin in zip(one.layers, other.layers):
            torch.testing.assert_close(layer.keys, twin.keys)
            torch.testing.assert_close(layer.values, twin.values)

    def test_generate_continue_from_inputs_embeds(self, pair):
        """A turn of embeddings and then one of tokens, on one cache."""
        ids, cache = prompt(2, 13), CSKVCache()
        embeds = pair[0].get_input_embeddings()(ids)
        first = pair[0].generate(
            inputs_embeds=embeds, attention_mask=torch.ones_like(ids), past_key_values=cache, **GREEDY
        )
        history = torch.cat([ids, first, prompt(2, 5, seed=4)], dim=1)
        assert torch.equal(generate(pair[0], cache, history), generate(pair[1], DynamicCache(), history))

    def test_generate_with_static_cache(self, pair):
        """The model's own static cache stays exact while an adapter is there; ours of fixed size gives the same."""
        ids, static = prompt(2, 13), StaticCache(pair[1].config, max_cache_len=13 + NEW)
        expected = generate(pair[1], DynamicCache(), ids)
        assert torch.equal(generate(pair[0], static, ids), expected)
        assert static.get_seq_length() == 13 + NEW - 1 and static.layers[1].keys.shape[2] == 13 + NEW
        assert torch.equal(generate(pair[0], CSKVStaticCache(13 + NEW), ids), expected)

    def test_eager_matches_sdpa_generate(self, pair):
        eager = compressed(make_model(pair[1].config.model_type, attn_implementation="eager"))
        assert eager.config._attn_implementation != pair[0].config._attn_implementation
        settings = dict(return_dict_in_generate=True, output_logits=True)
        one, other = (generate(model, CSKVCache(), **settings) for model in (eager, pair[0]))
        assert torch.equal(one.sequences, other.sequences)
        torch.testing.assert_close(torch.stack(one.logits), torch.stack(other.logits), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("method", [{}, {"do_sample": True}, {"num_beams": 2}], ids=["greedy", "sample", "beam"])
    def test_generate_methods_with_logits_to_keep(self, pair, method):
        """All logits of the prompt, or, as generate() asks for by itself, the last only."""
        all_logits = generate(pair[0], CSKVCache(), logits_to_keep=0, **method)
        assert torch.equal(all_logits, generate(pair[0], CSKVCache(), **method))
        assert torch.equal(all_logits, generate(pair[1], DynamicCache(), **method))


class TestCaches:
    """tests/utils/test_cache_utils.py."""

    def test_cache_copy(self, pair):
        """A prompt read once, copied for every question; the copies are independent."""
        shared, cache = prompt(1, 20), CSKVCache()
        with torch.no_grad():
            pair[0](shared, past_key_values=cache, use_cache=True)
        for seed in (3, 4):
            ids = torch.cat([shared, prompt(1, 4, seed)], dim=1)
            actual = generate(pair[0], copy.deepcopy(cache), ids)
            assert torch.equal(actual, generate(pair[1], DynamicCache(), ids))
        assert cache.get_seq_length() == 20

    def test_cache_batched(self, pair):
        """A padded batch of prompts of different length, whose padding takes no place: sinks are real tokens."""
        ids, mask = prompt(3, 18), torch.ones(3, 18, dtype=torch.long)
        mask[1, :5] = mask[2, :11] = 0
        cache = equal(pair, ids=ids * mask, mask=mask)
        assert cache.tokens.slots["sinks"].tolist() == [[0], [5], [11]]

    def test_cache_beam_search(self, pair):
        equal(pair, num_beams=4, num_return_sequences=4, max_new_tokens=20)

    def test_cache_extra_left_padding(self, pair):
        """More padding than any row needs changes no token."""
        ids = prompt(2, 13)
        expected = generate(pair[0], CSKVCache(), ids)
        extra = torch.zeros(2, 30, dtype=torch.long)
        padded, mask = torch.cat([extra, ids], dim=1), torch.cat([extra, torch.ones_like(ids)], dim=1)
        assert torch.equal(generate(pair[0], CSKVCache(), padded, mask)[:, 30:], expected)

    def test_static_cache_greedy_decoding_pad_left(self, pair):
        ids, mask, cache = prompt(2, 18), torch.ones(2, 18, dtype=torch.long), CSKVStaticCache(18 + NEW)
        mask[1, :7] = 0
        actual = generate(pair[0], cache, ids * mask, mask)
        assert torch.equal(actual, generate(pair[1], DynamicCache(), ids * mask, mask))
        assert cache.tokens.counts.flatten().tolist() == [18 + NEW - 1, 11 + NEW - 1]

    def test_reorder_cache_retrocompatibility(self, pair):
        """Rows in another order continue as if they had been read in it."""
        ids, more, order, cache = prompt(3, 20), prompt(3, 1, 4), torch.tensor([2, 0, 0]), CSKVCache()
        with torch.no_grad():
            pair[0](ids, past_key_values=cache, use_cache=True)
            cache.reorder_cache(order)
            logits = pair[0](more[order], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(logits, continued(pair[1], DynamicCache(), ids[order], more[order]))

    def test_cache_reset(self, pair):
        """Emptied in place, layers and positions, it serves another batch as a new one does."""
        ids, mask, cache = prompt(3, 20, seed=8), torch.ones(3, 20, dtype=torch.long), CSKVCache()
        mask[:, :9] = 0
        generate(pair[0], cache, ids * mask, mask)
        cache.reset()
        assert [cache.get_seq_length(layer_idx) for layer_idx in range(2)] == [0, 0] and cache.nbytes == 0
        assert torch.equal(generate(pair[0], cache), generate(pair[1], DynamicCache()))


class TestModels:
    """tests/test_modeling_common.py, ModelTesterMixin: what a cache and an adapter could break."""

    def test_determinism(self, pair):
        """Nothing is drawn: two runs from different seeds are the same bit by bit."""
        first, second = (continued(pair[0], CSKVCache(), prompt(2, 20), prompt(2, 3, 4), seed=seed) for seed in (0, 1))
        assert torch.equal(first, second)

    def test_batching_equivalence(self, pair):
        """Each row of a batch gets the logits that it gets alone."""
        ids, more = prompt(3, 17), prompt(3, 3, 4)
        together = continued(pair[0], CSKVCache(), ids, more)
        for row in range(3):
            alone = continued(pair[0], CSKVCache(), ids[row : row + 1], more[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)

    def test_attention_outputs(self, documented):
        """Eager attention gives weights of every slot, as over a full cache, by rebuilding the keys of the step."""
        documented(
            "compatibility-refusals", "`output_attentions=True`", "with a CSKVCache", "yes, with eager attention"
        )
        plain, weights = make_model(attn_implementation="eager"), []
        for model, cache in (
            (compressed(make_model(attn_implementation="eager")), CSKVCache()),
            (plain, DynamicCache()),
        ):
            continued(model, cache, prompt(2, 15), prompt(2, 5, 4))
            history = torch.cat([prompt(2, 15), prompt(2, 5, 4), prompt(2, 3, 5)], dim=1)
            output = generate(model, cache, history, output_attentions=True, return_dict_in_generate=True)
            weights.append([layer for step in output.attentions for layer in step])
        assert len(weights[0]) == NEW * 2 and weights[0][0].shape == (2, 8, 3, 23)
        for one, other in zip(*weights):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("name", ["eager", "sdpa"])
    def test_can_set_attention_dynamically(self, name):
        """Afterwards keys and values are rebuilt for the implementation chosen: slower, and the same logits."""
        model, plain = compressed(make_model()), make_model()
        for each in (model, plain):
            each.set_attn_implementation(name)
        assert model.config._attn_implementation == model.get_base_model().config._attn_implementation == name
        actual = continued(model, CSKVCache(), prompt(2, 20), prompt(2, 5, 4))
        expected = continued(plain, DynamicCache(), prompt(2, 20), prompt(2, 5, 4))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)

    def test_eager_matches_sdpa_inference(self, pair):
        eager = compressed(make_model(pair[1].config.model_type, attn_implementation="eager"))
        logits = [continued(m, CSKVCache(), prompt(2, 20), prompt(2, 5, 4)) for m in (eager, pair[0])]
        torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)

    def test_torch_save_load(self):
        """A whole model with its adapter through `torch.save`."""
        model, file = compressed(make_model()), io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert torch.equal(generate(loaded, CSKVCache()), generate(model, CSKVCache()))

    def test_training_gradient_checkpointing(self):
        """Without a cache the adapter is not in the way: the same gradients as on the model alone."""
        gradients = []
        for model in (compressed(make_model()), make_model()):
            base = getattr(model, "get_base_model", lambda model=model: model)()
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.train()
            base.model.embed_tokens.weight.requires_grad_(True)
            base(prompt(2, 20), labels=prompt(2, 20), use_cache=False).loss.backward()
            gradients.append(base.model.embed_tokens.weight.grad)
        torch.testing.assert_close(*gradients)

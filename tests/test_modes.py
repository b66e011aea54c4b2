"""Every mode of generate(), for every family, with plain and with packed latents: docs/compatibility.md.

Plain latents are lossless here (full rank), so the tokens must be those of `DynamicCache`. Packed ones lose something,
so tokens must be those of the same cache read by the other attention path (all keys rebuilt, the model's own
attention), which shares no attention code with the default one; both are held to a slow reference elsewhere.

transformers' own generation and cache tests have their counterparts by name in test_upstream_behaviours.py.
"""

import copy
import tempfile

import pytest
import torch
from conftest import lossless, lossy, make_model, prompt
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList, TextStreamer

from cskv_hf import CSKVCache

NEW = dict(max_new_tokens=24)
GREEDY = dict(do_sample=False, **NEW)
PACKED_4 = dict(compression=0.75, bits=4, allocation=None, block_size=8)
FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "mistral-sliding": "Mistral, sliding window",
    "qwen2": "Qwen2",
    "qwen2-mixed": "Qwen2, sliding and full layers",
    "qwen3": "Qwen3",
    "gemma3_text": "Gemma 3",
}


def tokens(model, make_cache, ids, **settings):
    torch.manual_seed(0)
    mask = settings.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, past_key_values=make_cache(), **{**GREEDY, **settings})


def assistant(compressed):
    """A smaller model of the same vocabulary."""
    model = make_model(num_hidden_layers=1, seed=5)
    return lossless(model) if compressed else model


LONG = prompt(1, 130)  # an assisted cache keeps 64 exact tokens more, to take rejected ones back exactly


def assisted(**settings):
    return lambda model, make_cache, ids: tokens(model, make_cache, LONG, **settings)


def left_padding(**settings):
    def run(model, make_cache, ids):
        mask = torch.ones_like(ids)
        mask[1, :19] = 0
        return tokens(model, make_cache, ids * mask, attention_mask=mask, **settings)

    return run


def turns(model, make_cache, ids):
    """Three turns on one cache."""
    cache, history = make_cache(), ids
    for turn in range(3):
        history = torch.cat([history, prompt(len(ids), 7, seed=turn)], dim=1)
        history = tokens(model, lambda: cache, history, max_new_tokens=8)
    return history


def continued(copied):
    """A prompt put into a cache once, which `copied` copies, and two continuations of it."""

    def run(model, make_cache, ids):
        cache, answers = make_cache(), []
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)
        for seed in range(2):
            asked = torch.cat([ids, prompt(len(ids), 5, seed)], dim=1)
            answers.append(tokens(model, lambda: copied(cache), asked))
        assert cache.get_seq_length() == ids.shape[1]
        return torch.cat(answers)

    return run


def through_a_file(cache):
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(cache, DynamicCache):
            return copy.deepcopy(cache)
        cache.save(f"{folder}/cache.safetensors")
        return CSKVCache.load(f"{folder}/cache.safetensors")


def inputs_embeds(model, make_cache, ids):
    embeds = model.get_input_embeddings()(ids)
    return model.generate(
        inputs_embeds=embeds, attention_mask=torch.ones_like(ids), past_key_values=make_cache(), **GREEDY
    )


def scores(model, make_cache, ids):
    output = tokens(model, make_cache, ids, return_dict_in_generate=True, output_scores=True, output_logits=True)
    return torch.stack(output.scores).float().round(decimals=3)  # of another summation order


def bare_loop(model, make_cache, ids):
    cache, found, current = make_cache(), [], ids
    with torch.no_grad():
        for _ in range(24):
            logits = model(current, past_key_values=cache, use_cache=True).logits[:, -1:]
            current = logits.argmax(-1)
            found.append(current)
    return torch.cat(found, dim=1)


class StopAt(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, 50:] % 5 == 0).any(1)


def only_even(batch, sent):
    return list(range(2, 88, 2))


class Decode:
    def decode(self, ids, **_):
        return " ".join(map(str, torch.as_tensor(ids).tolist()))


class Collect(TextStreamer):
    text = ""

    def on_finalized_text(self, text, stream_end=False):
        self.text += text


def streaming(model, make_cache, ids):
    streamer = Collect(Decode(), skip_prompt=True)
    output = tokens(model, make_cache, ids[:1], streamer=streamer)
    assert streamer.text.split() == [str(t) for t in output[0, ids.shape[1] :].tolist()]
    return output


MODES = {
    "greedy": tokens,
    "sampling, several sequences": lambda m, c, i: tokens(m, c, i, do_sample=True, num_return_sequences=3),
    "beam search": lambda m, c, i: tokens(m, c, i, num_beams=3, num_return_sequences=2),
    "beam sampling": lambda m, c, i: tokens(m, c, i, num_beams=2, do_sample=True),
    "prompt lookup": lambda m, c, i: tokens(m, c, torch.cat([i[:1]] * 3, 1), prompt_lookup_num_tokens=4),
    "assisted, CSKV the target": assisted(assistant_model=assistant(False)),
    "assisted, CSKV both": assisted(assistant_model=assistant(True)),
    "assisted, early exit": assisted(assistant_early_exit=1),
    "chunked prefill": lambda m, c, i: tokens(m, c, i, prefill_chunk_size=16),
    "left padding": left_padding(),
    "left padding, beams": left_padding(num_beams=2),
    "left padding, sampling": left_padding(do_sample=True, num_return_sequences=2),
    "several turns, one cache": turns,
    "prompt cached, `copy.deepcopy`": continued(copy.deepcopy),
    "prompt cached in a file, `cache.save`": continued(through_a_file),
    "`inputs_embeds`": inputs_embeds,
    "scores and logits": scores,
    "stopping criteria": lambda m, c, i: tokens(m, c, i, stopping_criteria=StoppingCriteriaList([StopAt()])),
    "constrained (`prefix_allowed_tokens_fn`)": lambda m, c, i: tokens(m, c, i, prefix_allowed_tokens_fn=only_even),
    "logits processors": lambda m, c, i: tokens(m, c, i, repetition_penalty=1.3, no_repeat_ngram_size=2),
    "streaming": streaming,
    "bare `model(...)` loop": bare_loop,
}


@torch.no_grad()
def test_speculation_over_lossy_latents_differs_less_than_compression():
    """Why at all: rejected tokens may have pushed others out of the window a little earlier. How much: less than the
    compression itself changes, on the same text, teacher forced; nothing with lossless factors."""
    ids, start = prompt(4, 260, seed=3), 100
    for model, lossy_factors in ((lossless(make_model()), False), (lossy(make_model(), **PACKED_4), True)):
        straight, speculative = CSKVCache(), CSKVCache()
        for cache in (straight, speculative):
            cache.activate_past_recording()
        full, one, two = [], [], []
        dynamic = DynamicCache()
        for cache, found in ((dynamic, full), (straight, one)):
            model(ids[:, :start], past_key_values=cache, use_cache=True)
            for i in range(start, ids.shape[1] - 5):
                logits = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
                found.append(logits.log_softmax(-1))
        model(ids[:, :start], past_key_values=speculative, use_cache=True)
        for i in range(start, ids.shape[1] - 5):  # five proposed, four rejected
            logits = model(ids[:, i : i + 5], past_key_values=speculative, use_cache=True).logits
            speculative.crop(-4)
            two.append(logits[:, :1].log_softmax(-1))
        full, one, two = (torch.cat(x, 1) for x in (full, one, two))
        assert speculative.tokens.num_old > 100
        between, lost = ((a.exp() * (a - b)).sum(-1).mean() for a, b in ((one, two), (full, one)))
        if lossy_factors:
            assert 0 < between < 0.5 * lost
        else:
            assert between < 1e-12 and lost < 1e-12


REFUSED = {
    "`cache_implementation` beside a cache": (
        lambda m, i: m.generate(i, cache=CSKVCache, cache_implementation="static", **GREEDY),
        r"Passing both `cache_implementation`.*Please use only one",
    ),
    "an unknown `cache_implementation`": (
        lambda m, i: m.generate(i, cache_implementation="cskv", **GREEDY),
        r"Invalid `cache_implementation` \(cskv\). Choose one of",
    ),
    "continuous batching (`generate_batch`)": (
        lambda m, i: m.generate_batch([i[0].tolist()]),
        r"paged cache of its own.*Use `generate\(\)` on a padded batch",
    ),
    "prefix tuning": (
        lambda m, i: get_peft_model(
            m.get_base_model(), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        ).generate(input_ids=i, **GREEDY),
        r"Prefix tuning hands generate\(\) a full cache.*use prompt tuning or a LoRA",
    ),
    "a cache of another batch size": (
        lambda m, i: continue_with(m, i, i[:1]),
        r"holds a batch of 2 and got a batch of 1.*batch_select_indices",
    ),
    "a cache of another adapter": (
        lambda m, i: continue_with(m, i, i, lossy(make_model(seed=9), key_rank=32, value_rank=32, compression=None)),
        r"filled by another adapter|filled with latents of rank",
    ),
}


def continue_with(model, ids, more, other=None):
    cache = CSKVCache()
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        (other or model)(more[:, :1], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused(name, documented):
    documented("compatibility-refusals", name, "with a CSKVCache", "refused, with the way out")
    call, message = REFUSED[name]
    model = lossless(make_model())
    with pytest.raises(ValueError, match=message):
        call(model, prompt(2, 50))


def test_prompt_tuning(documented):
    documented("compatibility-refusals", "prompt tuning", "with a CSKVCache")
    model, ids = lossless(make_model()), prompt(2, 50)
    tuned = get_peft_model(
        model.get_base_model(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    ).eval()
    outputs = [
        tuned.generate(input_ids=ids, attention_mask=torch.ones_like(ids), cache=cache, **GREEDY)
        for cache in (CSKVCache, DynamicCache)
    ]
    assert torch.equal(*outputs)


@pytest.fixture(scope="module", params=FAMILIES)
def models(request):
    return request.param, lossless(make_model(request.param)), lossy(make_model(request.param), **PACKED_4)


@pytest.mark.parametrize("mode", list(MODES))
def test_mode(models, mode, documented):
    family, full_rank, packed = models
    made = []

    def compressed(**settings):
        made.append(CSKVCache(**settings))
        return made[-1]

    ids = prompt(2, 50)
    documented("compatibility", mode, FAMILIES[family])
    assert torch.equal(MODES[mode](full_rank, compressed, ids), MODES[mode](full_rank, DynamicCache, ids))
    assert max(cache.tokens.num_old for cache in made) > 16
    first = MODES[mode](packed, compressed, ids)
    assert torch.equal(MODES[mode](packed, lambda: compressed(materialize=True), ids), first)

"""fit and its statistics: every kind of data, streaming equal to one go, resume, offload, and bad data refused
before any harm."""

import dataclasses
import json

import pytest
import torch
from conftest import calibration_data, make_model, prompt
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding

import cskv_hf
from cskv_hf import CSKVCache, CSKVConfig, KVStatistics, collect_statistics
from cskv_hf.demo import MODEL_PATH
from cskv_hf.fit_report import format_report
from cskv_hf.samples import samples
from cskv_hf.statistics import TENSORS
from cskv_hf.texts import calibration_samples


def assert_same(a, b, tolerance=1e-10):
    for name in TENSORS:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=tolerance, rtol=tolerance)
    assert a.num_tokens == b.num_tokens


class WordTokenizer:
    def __call__(self, text, truncation=False, max_length=None):
        return {"input_ids": [2 + hash(w) % 80 for w in text.split()][:max_length]}


def test_moments_are_those_of_the_definition(family):
    """Against the attention module's own projections, norms included, on the inputs it really got."""
    model, ids = make_model(family), prompt(3, 20)
    statistics = collect_statistics(model, [ids], recall=False, progress=False)
    seen = []
    hook = model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(ids)
    hook.remove()
    attn, x = model.model.layers[1].self_attn, seen[0].flatten(0, 1)
    heads, kv_heads, head_dim = model.config.num_attention_heads, model.config.num_key_value_heads, attn.head_dim
    k, q = attn.k_proj(x).view(-1, kv_heads, head_dim), attn.q_proj(x).view(-1, heads, head_dim)
    if family == "qwen3":
        k, q = attn.k_norm(k), attn.q_norm(q)
    k, v = k.flatten(1), attn.v_proj(x)
    torch.testing.assert_close(statistics.key_moment[1], k.mT @ k)
    torch.testing.assert_close(statistics.value_moment[1], v.mT @ v)
    torch.testing.assert_close(statistics.key_sum[1], k.sum(0))
    torch.testing.assert_close(statistics.value_sum[1], v.sum(0))
    for g in range(kv_heads):
        of_group = q[:, g * heads // kv_heads : (g + 1) * heads // kv_heads].flatten(0, 1)
        torch.testing.assert_close(statistics.query_moment[1, g], of_group.mT @ of_group)
    torch.testing.assert_close(statistics.input_scale[1], x.abs().sum(0))


def test_every_kind_of_data():
    model, rows = make_model(), [prompt(1, 12, seed)[0] for seed in range(4)]
    expected = collect_statistics(model, rows, progress=False)
    kinds = {
        "batched": [torch.stack(rows[:2]), torch.stack(rows[2:])],
        "lists": [row.tolist() for row in rows],
        "dicts": [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows],
        "generator": (row for row in rows),
        "Dataset": Dataset.from_dict({"input_ids": [row.tolist() for row in rows]}),
    }
    for name, data in kinds.items():
        assert_same(collect_statistics(model, data, progress=False), expected, 1e-9), name


def test_strings_with_a_tokenizer():
    model, text = make_model(), "to shrink a cache one keeps what attention reads"
    tokenizer = WordTokenizer()
    ids = tokenizer(text)["input_ids"]
    expected = collect_statistics(model, [ids[:5], ids[5:]], progress=False)  # in pieces
    for data in ([text], [{"text": text}], Dataset.from_dict({"text": [text]})):
        assert_same(collect_statistics(model, data, tokenizer=tokenizer, max_length=5, progress=False), expected)
    with pytest.raises(ValueError, match="`data` holds strings; pass `tokenizer=`"):
        collect_statistics(model, [text], progress=False)
    with pytest.raises(TypeError, match="got an element of type int"):
        collect_statistics(model, [3], progress=False)
    turns = [{"role": "user", "content": text}]
    with pytest.raises(TypeError, match=r"samples with 'messages'; .*apply_chat_template"):
        collect_statistics(model, [{"messages": turns}], tokenizer=tokenizer, progress=False)
    with pytest.raises(TypeError, match="got an element of type list"):
        collect_statistics(model, [turns], tokenizer=tokenizer, progress=False)


class BeginningTokenizer(WordTokenizer):
    bos_token_id = 1

    def __call__(self, text):
        return {"input_ids": [1, *super().__call__(text)["input_ids"]]}


@pytest.mark.parametrize("length", [2, 3, 7, 100])
def test_every_piece_begins_as_a_text_does(length, tmp_path):
    """No piece is longer than asked, each begins with BOS, once, and nothing else was added or lost; a tokenizer that
    begins with nothing only cuts."""
    path, texts = tmp_path / "texts.jsonl", ["to shrink a cache", "one keeps what attention reads of it"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for tokenizer in (BeginningTokenizer(), WordTokenizer()):
        ids = [i for text in texts for i in tokenizer(text)["input_ids"]]
        cut = calibration_samples(path, tokenizer, length)
        of_strings = [piece[0] for text in texts for piece, _ in samples([text], tokenizer, length)]
        for pieces in (cut, of_strings):
            words = [int(i) for piece in pieces for i in piece if i != 1]
            assert words == [i for i in ids if i != 1] and max(map(len, pieces)) <= length
            if isinstance(tokenizer, BeginningTokenizer):
                assert all(piece[0] == 1 != piece[1] for piece in pieces if len(piece) > 1)
            else:
                assert [len(piece) for piece in cut[:-1]] == [length] * (len(cut) - 1)


def test_statistics_of_other_weights(caplog):
    """Of the same sizes: there may be a reason, so that it is said and not refused."""
    statistics = collect_statistics(make_model(), calibration_data(None), progress=False)
    for seed, warned in ((0, False), (1, True)):
        caplog.clear()
        cskv_hf.fit(make_model(seed=seed), statistics, CSKVConfig(key_rank=8, value_rank=8), progress=False)
        assert ("collected on other weights" in caplog.text) == warned
    with pytest.raises(TypeError, match="`config` must be a `CSKVConfig`, got one of type float"):
        cskv_hf.fit(make_model(), statistics, 0.8)


@pytest.mark.parametrize("recall", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side, recall):
    """On either side, beside rows of other lengths, and one of nothing else."""
    model, rows = make_model(), [prompt(1, 12)[0], prompt(1, 19, 3)[0]]
    expected = collect_statistics(model, rows, recall=recall, progress=False)
    padded, mask = torch.zeros(3, 19, dtype=torch.long), torch.zeros(3, 19, dtype=torch.long)
    for number, ids in zip((0, 2), rows):
        place = slice(19 - len(ids), 19) if side == "left" else slice(0, len(ids))
        padded[number, place], mask[number, place] = ids, 1
    batch = [{"input_ids": padded, "attention_mask": mask}]
    exactly = recall or side == "right"  # else positions are others, whose cos and sin are rounded to float32
    assert_same(collect_statistics(model, batch, recall=recall, progress=False), expected, 1e-9 if exactly else 1e-4)


def test_max_tokens_and_counting():
    statistics = collect_statistics(make_model(), [prompt(1, 10)] * 9, max_tokens=25, progress=False)
    assert (statistics.num_tokens, statistics.num_samples) == (33, 3)  # whole samples, with what is read again
    statistics = collect_statistics(make_model(), [prompt(1, 10)] * 9, max_tokens=25, recall=False, progress=False)
    assert (statistics.num_tokens, statistics.num_samples) == (30, 3)


def test_recall_reads_a_part_again(tmp_path):
    """The same as if the samples had been written so, padded or not; one that would not fit into the context is read
    in pieces of one length, and whole where RoPE stretches with it."""
    model, rows = make_model(), [prompt(1, length, length)[0] for length in (20, 15, 2, 30)]
    written = [torch.cat([row, row[3 * (len(row) // 7) : 4 * (len(row) // 7)]]) for row in rows]
    assert [len(ids) for ids in written] == [22, 17, 2, 34]
    expected = collect_statistics(model, written, recall=False, progress=False)
    found = collect_statistics(model, rows, state_file=tmp_path / "state.safetensors", progress=False)
    assert found.samples_digest == expected.samples_digest
    assert_same(found, expected)
    mask = torch.arange(30) >= torch.tensor([[10], [15], [28], [0]])
    padded = torch.zeros(4, 30, dtype=torch.long)
    for row, ids in enumerate(rows):
        padded[row, mask[row]] = ids
    batch = {"input_ids": padded, "attention_mask": mask.long()}
    assert_same(collect_statistics(model, [batch], progress=False), expected, 1e-9)
    with pytest.raises(ValueError, match="with `recall`=True; this is with False"):
        collect_statistics(model, rows, recall=False, state_file=tmp_path / "state.safetensors", progress=False)
    short = make_model(max_position_embeddings=24)
    pieces = [*written[:3], torch.cat([rows[3][:15], rows[3][6:8]]), torch.cat([rows[3][15:], rows[3][21:23]])]
    expected = collect_statistics(short, pieces, recall=False, progress=False)
    found = collect_statistics(short, rows, progress=False)
    torch.testing.assert_close(found.key_moment, expected.key_moment)
    torch.testing.assert_close(found.read_squares, expected.read_squares)
    model = make_model("llama-dynamic", max_position_embeddings=24)
    expected = collect_statistics(model, written, recall=False, progress=False)
    assert_same(collect_statistics(model, rows, progress=False), expected)


def test_a_fit_says_whether_it_was_with_recall():
    rows, settings = [prompt(1, 70)[0]], CSKVConfig(key_rank=4, value_rank=4)
    for recall, said in ((True, "fitted on 80 tokens with recall;"), (False, "fitted on 70 tokens;")):
        model = cskv_hf.fit(make_model(), rows, settings, recall=recall, progress=False)
        report = model.peft_config["default"].fit_report
        assert (report["recall"], report["num_tokens"]) == (recall, 80 if recall else 70)
        assert said in format_report(model.peft_config["default"])


def test_what_layers_are_worth_is_measured_with_recall():
    """Of every sample the start, with a part of itself again within the length of a probe."""
    row = prompt(1, 600)[0]
    kept = collect_statistics(make_model(), [row], progress=False).probes()
    assert [ids.tolist() for ids in kept] == [torch.cat([row[:224], row[96:128]]).tolist()]
    kept = collect_statistics(make_model(), [row], recall=False, progress=False).probes()
    assert [ids.tolist() for ids in kept] == [row[:256].tolist()]
    kept = collect_statistics(make_model(), [row[:200]] * 6, progress=False).probes()
    assert [len(ids) for ids in kept] == [228] * 4 + [112]
    assert kept[4].tolist() == torch.cat([row[:98], row[42:56]]).tolist()


def test_interrupted_pass_resumes_to_the_same(tmp_path, monkeypatch):
    """The state is saved between samples; a second start skips what was seen."""
    model, rows, state = make_model(), [prompt(1, 12, seed) for seed in range(6)], tmp_path / "state.safetensors"
    monkeypatch.setattr("cskv_hf.calibration.SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr("cskv_hf.calibration.MOST_TIME_SAVING", float("inf"))

    def interrupted():
        yield from rows[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_statistics(model, interrupted(), state_file=state, progress=False)
    assert KVStatistics.load(state).num_samples == 4
    forwards = []
    hook = model.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    resumed = collect_statistics(model, rows, state_file=state, progress=False)
    hook.remove()
    assert len(forwards) == 2
    assert_same(resumed, collect_statistics(model, rows, progress=False))


def test_state_of_another_model_or_data_or_damaged(tmp_path):
    state = tmp_path / "state.safetensors"
    collect_statistics(make_model(), [prompt(1, 12)], state_file=state, source="book A", progress=False)
    with pytest.raises(ValueError, match=r"holds statistics of another model"):
        collect_statistics(make_model(num_hidden_layers=1), [prompt(1, 12)], state_file=state, progress=False)
    with pytest.raises(ValueError, match="of the same sizes, but of other weights"):
        collect_statistics(make_model(seed=1), [prompt(1, 12)], state_file=state, source="book A", progress=False)
    with pytest.raises(ValueError, match=r"of other data \('book A'\); this is 'book B'"):
        collect_statistics(make_model(), [prompt(1, 12)], state_file=state, source="book B", progress=False)
    for other in ([prompt(1, 12, 1)], [prompt(1, 11)], []):
        with pytest.raises(ValueError, match="its 1 samples are not the first of `data`"):
            collect_statistics(make_model(), other, state_file=state, source="book A", progress=False)
    whole = state.read_bytes()
    state.write_bytes(whole[:-50])
    with pytest.raises(ValueError, match=r"truncated or corrupt .*Delete it to start the statistics over"):
        collect_statistics(make_model(), [prompt(1, 12)], state_file=state, source="book A", progress=False)
    state.write_bytes(whole)
    with safe_open(state, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in TENSORS if not name.startswith("read_")}
        save_file(tensors, state, metadata=file.metadata())
    with pytest.raises(ValueError, match=r"has no read_head_key_moment, read_key_moment, .*an older version wrote it"):
        collect_statistics(make_model(), [prompt(1, 12)], state_file=state, source="book A", progress=False)


def test_strings_that_are_cut_otherwise_are_other_data(tmp_path):
    """Pieces are counted, so a pass that goes on with pieces of another size would read text twice, or not at all."""
    model, state = make_model(vocab_size=2048), tmp_path / "state.safetensors"
    how = dict(tokenizer=AutoTokenizer.from_pretrained(MODEL_PATH), state_file=state, progress=False)
    text = ["words of one text " * 20, "words of another " * 20]
    first = collect_statistics(model, text, max_length=16, max_tokens=16, **how)  # and 2 again
    with pytest.raises(ValueError, match="or were tokenised or cut otherwise"):
        collect_statistics(model, text, max_length=8, **how)
    assert collect_statistics(model, text, max_length=16, **how).num_tokens > first.num_tokens == 18


def test_hooks_are_gone_if_the_pass_does_not_begin(monkeypatch):
    model = make_model()
    monkeypatch.setattr("cskv_hf.calibration.tqdm", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        collect_statistics(model, [prompt(1, 12)], progress=False)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "data", [[], [torch.zeros(0, dtype=torch.long)], iter(())], ids=["list", "empty rows", "spent"]
)
def test_empty_data(data):
    model = make_model()
    with pytest.raises(ValueError, match="`data` is empty: no calibration token was seen"):
        cskv_hf.fit(model, data, progress=False)
    assert not hasattr(model.model.layers[0].self_attn, "cskv")


def test_nan(tmp_path):
    model, state = make_model(), tmp_path / "state.safetensors"
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    wrong = r"sample 1 leads to NaN or infinite values in layer 0 \(attention inputs, queries, keys, values\)"
    with pytest.raises(ValueError, match=wrong):
        cskv_hf.fit(model, [torch.full((1, 8), 5), torch.full((1, 8), 7)], state_file=state, progress=False)
    assert not hasattr(model.model.layers[0].self_attn, "cskv") and not state.exists()


def test_nan_behind_the_keys_and_values():
    """Queries alone are infinite, or only what comes after the last layer's keys and values is no number."""
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3] = torch.inf
    with pytest.raises(ValueError, match=r"sample 0 leads to NaN or infinite values in layer 1 \(queries\)"):
        cskv_hf.fit(model, calibration_data(model), progress=False)
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3] = torch.nan
    with pytest.raises(ValueError, match="logits of calibration sample 0 are NaN or infinite"):
        cskv_hf.fit(model, calibration_data(model), progress=False)
    assert not hasattr(model.model.layers[0].self_attn, "cskv")


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda ids: "a text", TypeError, "got a single str; put it in a list"),
        (lambda ids: {"input_ids": ids}, TypeError, "got a single dict"),
        (lambda ids: BatchEncoding({"input_ids": ids}), TypeError, "got a single BatchEncoding"),
        (lambda ids: ids[0], ValueError, r"got a tensor of shape \(12,\), each token of which would be a sample"),
    ],
    ids=["str", "dict", "BatchEncoding", "tensor"],
)
def test_a_single_sample_is_no_data(make, error, message):
    """Its characters, keys or tokens would be calibrated on."""
    model, forwards = make_model(), []
    model.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(error, match=message):
        cskv_hf.fit(model, make(prompt(1, 12)), tokenizer=WordTokenizer(), progress=False)
    assert not forwards
    statistics = collect_statistics(model, prompt(2, 12), recall=False, progress=False)
    assert statistics.num_tokens == 24  # a batch is one of rows


def test_a_budget_too_small_is_refused_before_data_is_read():
    model = make_model()
    with pytest.raises(ValueError, match=r"`compression`=0.99 leaves .*Use at most 0.9\d\d\.$"):
        cskv_hf.fit(model, (_ for _ in [] if pytest.fail("data was read")), CSKVConfig(compression=0.99))
    model = cskv_hf.fit(model, calibration_data(model), CSKVConfig(compression=0.8), progress=False)
    with pytest.raises(ValueError, match=r"`compression`=0.99 leaves .*Use at most 0.9\d\d\.$"):
        cskv_hf.shrink(model, 0.99)


@pytest.fixture
def warnings_of_ours(caplog):
    import logging

    logging.getLogger("transformers").propagate = True
    yield caplog
    logging.getLogger("transformers").propagate = False


def test_little_data_is_warned_about(warnings_of_ours):
    collect_statistics(make_model(), [prompt(1, 12)], recall=False, progress=False)
    assert "Only 12 calibration tokens for kv_dim=32" in warnings_of_ours.text


def test_data_of_few_directions_are_warned_about(warnings_of_ours):
    """Enough tokens, of 12 words only: the first layer's values have 11 directions about their mean, and a rank within
    them is as good as any. What the weights leave unused is no fault of the data."""
    model, generator = make_model(), torch.Generator().manual_seed(0)
    data = [torch.randint(2, 14, (4, 100), generator=generator) for _ in range(3)]
    cskv_hf.fit(make_model(), data, CSKVConfig(key_rank=4, value_rank=11), progress=False)
    assert "say nothing" not in warnings_of_ours.text
    cskv_hf.fit(make_model(), data, CSKVConfig(key_rank=4, value_rank=16), progress=False)
    assert "say nothing about 5 of the 40 channels kept" in warnings_of_ours.text
    warnings_of_ours.clear()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[8:] = 0.0
    cskv_hf.fit(model, data, CSKVConfig(key_rank=4, value_rank=16), progress=False)
    assert "say nothing" not in warnings_of_ours.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_directions_without_data_do_no_harm(dtype):
    """A model fitted on few words and read with all of them: everything kept is lossless, also in float16, and packed
    in 4 bits the channels without data do not ruin those beside them."""
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(2, 18, (4, 100), generator=generator) for _ in range(3)]
    for bits, tolerance in ((16, 0.01), (4, 0.3)):
        model = make_model(dtype=dtype, initializer_range=0.1)
        expected = model(prompt(1, 60, 7)).logits[:, -20:]
        config = CSKVConfig(key_rank=32, value_rank=32, window=8, sinks=3, block_size=8, bits=bits)
        model = cskv_hf.fit(model, data, config, progress=False)
        cache = CSKVCache()
        model(prompt(1, 60, 7)[:, :40], past_key_values=cache, use_cache=True)
        got = model(prompt(1, 60, 7)[:, 40:], past_key_values=cache, use_cache=True).logits
        assert (got - expected).float().abs().mean() < tolerance * expected.float().abs().mean()


@pytest.mark.parametrize("name", ["q_proj", "o_proj", "k_proj"])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("config", [CSKVConfig(key_rank=32, value_rank=32), CSKVConfig(compression=0.6)])
def test_heads_that_do_nothing(name, heads, config):
    """Of a pruned model: no query reads them, nothing reads what they put out, or their keys are all the same."""
    model = make_model(dtype=torch.float32)
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        if name == "o_proj":
            attention.o_proj.weight[:, : 16 * heads] = 0.0
        else:
            getattr(attention, name).weight[: (8 if name == "k_proj" else 16) * heads] = 0.0
    expected = model(prompt(1, 60, 7)).logits[:, -20:]
    config = dataclasses.replace(config, window=8, sinks=3, block_size=8)
    model = cskv_hf.fit(model, calibration_data(model), config, progress=False)
    for tensor in model.base_model.model.model.layers[1].self_attn.cskv.state_dict().values():
        assert torch.isfinite(tensor).all() and tensor.abs().max() < 1e4
    cache = CSKVCache()
    model(prompt(1, 60, 7)[:, :40], past_key_values=cache, use_cache=True)
    got = model(prompt(1, 60, 7)[:, 40:], past_key_values=cache, use_cache=True).logits
    assert (got - expected).abs().mean() < (1e-3 if config.compression is None else 0.5) * expected.abs().mean()


def test_cutting_leaves_heads_without_keys_as_they_are():
    """A head that the budget gave nothing has no channel to give: ranks of the same sum change nothing, and no smaller
    ones hand a head the channels of another."""
    model = make_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight[16:32] *= 1e-4  # the second head's
    model = cskv_hf.fit(model, calibration_data(model), CSKVConfig(compression=0.78), progress=False)
    config, layers = model.peft_config["default"], model.base_model.model.model.layers
    held, before = config.key_ranks, [layer.self_attn.cskv.cskv_key_A["default"].weight for layer in layers]
    assert [0 in ranks for ranks in held] == [True, True] and len({sum(ranks) for ranks in held}) == 1
    cskv_hf.shrink(model, key_rank=sum(held[0]), value_rank=2)
    assert config.key_ranks == held
    for layer, weight in zip(layers, before):
        assert torch.equal(layer.self_attn.cskv.cskv_key_A["default"].weight, weight)
    cskv_hf.shrink(model, key_rank=4, value_rank=2)
    for ranks, most in zip(config.key_ranks, held):
        assert sum(ranks) == 4 and all(r <= n for r, n in zip(ranks, most))


@pytest.mark.parametrize("init", ["svd", "asvd"])
def test_weights_alone_see_the_gain_of_a_key_norm(init):
    """Qwen3's keys are multiplied by it, channel by channel, so the basis of W alone keeps the wrong ones: the error
    is within a few times the optimum of the data."""
    model = make_model("qwen3")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_norm.weight.copy_(torch.logspace(1, -1, 8)[torch.randperm(8)])
    statistics = collect_statistics(model, calibration_data(model), progress=False)
    for layout in ("head", "joint"):
        errors = {}
        for name in (init, "mse"):
            config = CSKVConfig(key_rank=16, value_rank=16, init=name, center=False, key_layout=layout)
            fitted = cskv_hf.fit(model, statistics, config, progress=False)
            errors[name] = [layer["key_error"] for layer in fitted.peft_config["default"].fit_report["layers"]]
            model = fitted.unload()
        assert all(a < 3 * b for a, b in zip(errors[init], errors["mse"])), errors


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("init", ["attention", "mse", "asvd", "svd", "random"])
@pytest.mark.parametrize("layout", ["head", "joint", "group:2"])
def test_every_initialisation_in_every_layout(init, layout, family):
    model = make_model(family)
    kv_dim = model.config.num_key_value_heads * 8
    config = CSKVConfig(compression=0.5, init=init, key_layout=layout, bits=16, allocation="uniform")
    model = cskv_hf.fit(model, calibration_data(model), config, progress=False)
    config = model.peft_config["default"]
    groups = {"head": model.config.num_key_value_heads, "joint": 1, "group:2": model.config.num_key_value_heads // 2}[
        layout
    ]
    assert all(len(ranks) == groups and sum(ranks) <= kv_dim / 2 for ranks in config.key_ranks)
    assert max(map(len, format_report(config).split("\n"))) <= 80
    output = model.generate(prompt(1, 80), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert output.past_key_values.tokens.num_old > 0


def test_optimum_beats_the_baselines_on_the_calibration_data():
    model = make_model()
    statistics = collect_statistics(model, calibration_data(model), progress=False)
    errors = {}
    for init in ("mse", "asvd", "svd", "random", "attention"):
        config = CSKVConfig(compression=0.6, init=init, bits=16, allocation="uniform")
        model = cskv_hf.fit(make_model(), statistics, config, progress=False)
        layers = model.peft_config["default"].fit_report["layers"]
        errors[init] = sum(layer["key_error"] + layer["value_error"] for layer in layers)
    assert min(errors, key=errors.get) == "mse", errors


def test_centred_by_default():
    """The adapter holds the means of what old tokens are read as, and loses less by them."""
    data, errors = calibration_data(make_model()), {}
    for center in (None, False):
        config = CSKVConfig(compression=0.8, bits=16, allocation="uniform", center=center)
        model = cskv_hf.fit(make_model(), data, config, progress=False)
        layers = model.peft_config["default"].fit_report["layers"]
        errors[center] = sum(layer["key_attention_error"] + layer["value_attention_error"] for layer in layers)
        factors = model.base_model.model.model.layers[1].self_attn.cskv()
        if center is None:
            statistics = collect_statistics(make_model(), data, progress=False)
            torch.testing.assert_close(factors.key_mean[0], statistics.read_key_moments(1, by_head=True).first)
            torch.testing.assert_close(factors.value_mean[0], statistics.read_value_moments(1).first)
        else:
            assert not factors.key_mean.any() and not factors.value_mean.any()
    assert errors[None] < errors[False]
    for init in ("mse", "asvd", "svd", "random"):
        assert not CSKVConfig(init=init).centers
    for side, total, second in (
        ("key", statistics.key_sum, statistics.key_moment),
        ("value", statistics.value_sum, statistics.value_moment),
    ):
        mean = total[1] / statistics.num_tokens
        share = float(mean.square().sum() / (second[1].diagonal().sum() / statistics.num_tokens))
        assert layers[1][f"{side}_mean_share"] == pytest.approx(share) and 0 < share < 1
    model = cskv_hf.fit(make_model(), data, CSKVConfig(compression=0.8, init="asvd"), progress=False)
    assert not model.base_model.model.model.layers[0].self_attn.cskv().key_mean.any()


def test_fitting_again_replaces_the_adapter():
    model = make_model()
    data = calibration_data(model)
    model = cskv_hf.fit(model, data, CSKVConfig(compression=0.8), progress=False)
    model = cskv_hf.fit(model, data, CSKVConfig(compression=0.2), progress=False)
    assert model.peft_config["default"].compression == 0.2
    model(prompt(1, 80), past_key_values=CSKVCache(), use_cache=True)


def test_disk_offload_equals_memory(tmp_path):
    """accelerate keeps the weights on disk and the projections have none of their own: the fit sees the same
    numbers."""
    make_model(dtype=torch.float32, num_hidden_layers=3).save_pretrained(tmp_path / "base")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=device_map, offload_folder=tmp_path / "offload"
    ).eval()
    assert offloaded.model.layers[1].self_attn.k_proj.weight.device.type == "meta"
    data, ids = calibration_data(whole), prompt(1, 60)
    tokens = []
    for model in (whole, offloaded):
        config = CSKVConfig(compression=0.5, window=8, sinks=3, block_size=8)
        model = cskv_hf.fit(model, data, config, progress=False)
        tokens.append(model.generate(ids, max_new_tokens=12, do_sample=False))
    assert torch.equal(*tokens)

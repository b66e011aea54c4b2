"""The adapter as PEFT and transformers see it: added, saved, loaded, switched, cut, stacked with LoRA, refused."""

import json

import pytest
import torch
from conftest import calibration_data, lossless, lossy, make_model, prompt
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel

import cskv_hf
from cskv_hf import CSKVCache, CSKVConfig

GREEDY = dict(max_new_tokens=16, do_sample=False)


@pytest.fixture
def saved(tmp_path):
    """A base model and its adapter on disk, and what the pair generates."""
    base = make_model(dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = lossy(base)
    tokens = model.generate(prompt(1, 50), **GREEDY)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, tokens


def test_files(saved):
    folder, _ = saved
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "CSKV" and config["base_model_name_or_path"] == str(folder / "base")
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as file:
        keys = list(file.keys())
        assert len(keys) == 2 * 8
        prefix = "base_model.model.model.layers.0.self_attn.cskv."
        assert file.get_slice(prefix + "cskv_key_A.weight").get_shape() == [sum(config["key_ranks"][0]), 8]
        assert file.get_slice(prefix + "cskv_value_B.weight").get_shape() == [32, config["value_ranks"][0]]


def test_loads_everywhere(saved):
    folder, tokens = saved
    ids, adapter = prompt(1, 50), str(folder / "adapter")

    def base():
        return AutoModelForCausalLM.from_pretrained(folder / "base").eval()

    def load_adapter(model):
        model.load_adapter(adapter)
        return model

    loaders = {
        "load": lambda: cskv_hf.load(base(), adapter),
        "PeftModel": lambda: PeftModel.from_pretrained(base(), adapter),
        "PeftModel, other name": lambda: PeftModel.from_pretrained(base(), adapter, adapter_name="memory"),
        "PeftModel, low memory": lambda: PeftModel.from_pretrained(base(), adapter, low_cpu_mem_usage=True),
        "AutoPeftModel": lambda: AutoPeftModelForCausalLM.from_pretrained(adapter),
        "AutoModel": lambda: AutoModelForCausalLM.from_pretrained(adapter),
        "load_adapter": lambda: load_adapter(base()),
    }
    for name, loader in loaders.items():
        model = loader()
        output = model.generate(ids, return_dict_in_generate=True, **GREEDY)
        assert isinstance(output.past_key_values, CSKVCache), name
        assert torch.equal(output.sequences, tokens), name
        assert not any(p.requires_grad for n, p in model.named_parameters() if "cskv_" in n), name


def test_bfloat16_base_gets_bfloat16_factors(saved):
    folder, _ = saved
    model = AutoModelForCausalLM.from_pretrained(folder / "adapter", dtype=torch.bfloat16)
    factors = {n: p.dtype for n, p in model.named_parameters() if "cskv_" in n}
    assert {dtype for n, dtype in factors.items() if "spectrum" not in n} == {torch.bfloat16}
    assert {dtype for n, dtype in factors.items() if "spectrum" in n} == {torch.float32}


def test_get_peft_model_trains_only_the_factors():
    model = get_peft_model(make_model(), CSKVConfig(compression=0.5))
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 4 and all(n.split(".")[-3][-2:] in ("_A", "_B") for n in trainable)


def test_several_adapters_switched_and_deleted():
    model = lossy(make_model(), 0.5)
    data, ids = calibration_data(model), prompt(1, 50)
    expected = {"default": model.generate(ids, **GREEDY)}
    settings = CSKVConfig(compression=0.8, window=8, sinks=3, block_size=8, key_layout="joint")
    model = cskv_hf.fit(model, data, settings, adapter_name="strong", progress=False)
    expected["strong"] = model.generate(ids, **GREEDY)
    for name in ("default", "strong", "default"):
        model.set_adapter(name)
        assert torch.equal(model.generate(ids, **GREEDY), expected[name])
    with model.disable_adapter():
        output = model.generate(ids, return_dict_in_generate=True, **GREEDY)
        assert isinstance(output.past_key_values, DynamicCache)
        with pytest.raises(RuntimeError, match="no CSKV factors in use"):
            model.generate(ids, cache=CSKVCache, **GREEDY)
    model.delete_adapter("default")
    model.set_adapter("strong")
    assert torch.equal(model.generate(ids, **GREEDY), expected["strong"])


@pytest.mark.parametrize("storage", [{}, dict(bits=None, allocation=None, block_size=8)], ids=["plain", "packed"])
@pytest.mark.parametrize("layout", ["head", "joint"])
def test_cutting_a_fit_equals_fitting_smaller(layout, storage, tmp_path):
    """Nested ranks, in memory and at load time."""
    ids = prompt(1, 60)
    large, small = (lossy(make_model(), c, key_layout=layout, **storage) for c in (0.5, 0.75))
    large.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = small(ids[:, 40:], past_key_values=prefilled(small, ids), use_cache=True).logits
        loaded = cskv_hf.load(make_model(), tmp_path, compression=0.75)
        actual = loaded(ids[:, 40:], past_key_values=prefilled(loaded, ids), use_cache=True).logits
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)
    loaded.save_pretrained(tmp_path / "small")
    again = cskv_hf.load(make_model(), tmp_path / "small")
    for field in ("key_ranks", "value_ranks", "key_bits", "value_bits"):
        assert getattr(again.peft_config["default"], field) == getattr(small.peft_config["default"], field)
    with pytest.raises(ValueError, match="loads at its own or a smaller rank"):
        cskv_hf.shrink(again, 0.1)
    cskv_hf.shrink(again, key_rank=2, value_rank=2)
    again.save_pretrained(tmp_path / "ranks")
    assert cskv_hf.load(make_model(), tmp_path / "ranks").peft_config["default"].value_ranks == [2, 2]


@torch.no_grad()
def prefilled(model, ids):
    cache = CSKVCache()
    model(ids[:, :40], past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("lora_first", [True, False])
def test_stacks_with_lora(lora_first, tmp_path):
    """LoRA never lands on the factors, and merging it leaves them where they are."""
    lossless(make_model()).save_pretrained(tmp_path)
    base = make_model()
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    if lora_first:
        base.add_adapter(lora, adapter_name="style")
        base.load_adapter(str(tmp_path), adapter_name="memory")
    else:
        base.load_adapter(str(tmp_path), adapter_name="memory")
        base.add_adapter(lora, adapter_name="style")
    base.set_adapter(["style", "memory"])
    assert not any("cskv_" in n and "lora" in n for n, _ in base.named_parameters())
    ids = prompt(1, 40)
    assert torch.equal(base.generate(ids, cache=CSKVCache, **GREEDY), base.generate(ids, cache=DynamicCache, **GREEDY))


def test_merging_is_refused():
    model = lossy(make_model())
    with pytest.raises(ValueError, match="cannot be merged into the weights"):
        model.merge_and_unload()


def test_unsupported_architecture():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50))
    message = "does not support models of type 'gpt2'.*supported are llama, mistral, qwen2, qwen3"
    with pytest.raises(ValueError, match=message):
        cskv_hf.fit(model, [torch.ones(1, 8)])
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, CSKVConfig())


def test_unknown_rope_is_refused():
    model = make_model()
    model.model.rotary_emb.rope_type = "spiral"
    with pytest.raises(ValueError, match="RoPE scaling of type 'spiral'; supported are default, linear"):
        cskv_hf.fit(model, [torch.ones(1, 8)])


def test_adapter_of_another_model(saved):
    folder, _ = saved
    other = make_model(num_hidden_layers=3, head_dim=16)
    message = r"fitted to another model \(num_hidden_layers: adapter 2, model 3, head_dim: adapter 8, model 16\)"
    for loader in (cskv_hf.load, PeftModel.from_pretrained):
        with pytest.raises(ValueError, match=message):
            loader(other, folder / "adapter")
    assert not hasattr(other.model.layers[0].self_attn, "cskv")


def test_damaged_files(saved):
    folder, _ = saved
    weights, config = folder / "adapter" / "adapter_model.safetensors", folder / "adapter" / "adapter_config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(
        ValueError, match=r"adapter_model\.safetensors' is truncated or corrupt .*download the adapter again"
    ):
        cskv_hf.load(make_model(), folder / "adapter")
    weights.unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is missing"):
        cskv_hf.load(make_model(), folder / "adapter")
    weights.write_bytes(whole)
    config.write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        cskv_hf.load(make_model(), folder / "adapter")
    config.write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="is a LORA adapter, not a CSKV one"):
        cskv_hf.load(make_model(), folder / "adapter")


def test_ranks_above_kv_dim():
    with pytest.raises(
        ValueError, match=r"value rank 33 of layer 0 is above the model's kv_dim=32 \(4 KV heads x 8\)"
    ):
        cskv_hf.fit(make_model(), [torch.ones(1, 8)], CSKVConfig(key_rank=8, value_rank=33))

"""The adapter as PEFT and transformers see it: added, saved, loaded, switched, cut, stacked with LoRA, refused."""

import copy
import json

import pytest
import torch
from conftest import calibration_data, lossless, lossy, make_model, prompt
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel

import cskv_hf
from cskv_hf import CSKVCache, CSKVConfig
from cskv_hf.adapter_files import check_adapter_files, save_adapter
from cskv_hf.fit_report import format_report
from cskv_hf.tuner import sidecars

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
        prefix = "base_model.model.model.layers.0.self_attn.cskv."
        assert {key.removeprefix(prefix) for key in keys if key.startswith(prefix)} == {
            f"cskv_{name}.weight"
            for name in (
                "key_A", "key_B", "value_A", "value_B", "key_mean", "value_mean",
                "key_spectrum", "value_spectrum", "value_rounding",
            )
        }  # fmt: skip
        assert len(keys) == 2 * 9
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
    wide = {n for n in factors if "spectrum" in n or "rounding" in n}
    assert {dtype for n, dtype in factors.items() if n not in wide} == {torch.bfloat16}
    assert {factors[n] for n in wide} == {torch.float32}


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
@pytest.mark.parametrize("layout", ["head", "group:2", "joint"])
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


def test_an_adapter_that_does_not_say_what_rounding_costs_is_not_cut(tmp_path):
    """Of an older version: refused by name, and where PEFT or transformers load it, by the cut."""
    lossy(make_model(), 0.5, bits=None, allocation=None, block_size=8).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(file, "pt") as weights:
        kept = {name: weights.get_tensor(name) for name in weights.keys() if "rounding" not in name}  # noqa: SIM118
    save_file(kept, file)
    with pytest.raises(ValueError, match=r"has no `cskv_value_rounding`: an older version wrote it\. Fit the adapter"):
        cskv_hf.load(make_model(), tmp_path)
    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    with pytest.raises(ValueError, match=r"has no `cskv_value_rounding`.*Fit the adapter again to cut it"):
        cskv_hf.shrink(loaded, 0.8)


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


def test_a_fit_copies_its_config(tmp_path):
    """One config for two fits: it stays as it was given, and either adapter can be saved and loaded."""
    config = CSKVConfig(compression=0.85, window=8, sinks=3, block_size=8)
    before = config.to_dict()
    model = cskv_hf.fit(make_model(), calibration_data(make_model()), config, progress=False)
    model = cskv_hf.fit(model, [prompt(2, 60) % 10 + 2], config, adapter_name="other", progress=False)
    assert config.to_dict() == before and not config.is_fitted
    assert model.peft_config["default"].key_ranks != model.peft_config["other"].key_ranks
    for name in ("default", "other"):
        model.set_adapter(name)
        tokens = model.generate(prompt(1, 60), **GREEDY)
        save_adapter(model, tmp_path / name, name)
        loaded = cskv_hf.load(make_model(), tmp_path / name)
        assert torch.equal(loaded.generate(prompt(1, 60), **GREEDY), tokens)
    again = cskv_hf.fit(make_model(), calibration_data(make_model()), model.peft_config["other"], progress=False)
    assert again.peft_config["default"].key_ranks == model.peft_config["default"].key_ranks


def test_fitting_again_makes_the_adapter_the_active_one():
    """For PEFT as for the layers, in a `PeftModel` and inside a transformers model, whose LoRA stays active."""
    data, settings = calibration_data(make_model()), CSKVConfig(compression=0.6, block_size=8)
    model = cskv_hf.fit(make_model(), data, settings, adapter_name="a", progress=False)
    model = cskv_hf.fit(model, data, settings, adapter_name="b", progress=False)
    assert model.active_adapter == "b"
    model = cskv_hf.fit(model, data, CSKVConfig(compression=0.7, block_size=8), adapter_name="a", progress=False)
    assert model.active_adapter == "a" and model.base_model.active_adapters == ["a"]
    assert model.active_peft_config.compression == 0.7 and sidecars(model)[1].adapter_in_use == "a"
    assert not any(p.requires_grad for p in model.parameters())

    base = make_model()
    base.add_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), adapter_name="style")
    for name in ("a", "b"):
        cskv_hf.fit(base, data, settings, adapter_name=name, progress=False)
    base.set_adapter(["style", "b"])
    cskv_hf.fit(base, data, settings, adapter_name="a", progress=False)
    assert sidecars(base)[1].adapter_in_use == "a"
    assert "style" in base.model.layers[0].self_attn.q_proj.active_adapters


def test_a_fit_sees_a_lora_without_its_dropout():
    """Weights are asked for with the LoRA applied; in training mode they are those of inference."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = LoraConfig(r=4, lora_dropout=0.5, target_modules=targets, init_lora_weights=False)
    for init in ("attention", "asvd"):
        factors = []
        for training in (False, True):
            model = make_model()
            torch.manual_seed(0)
            model.add_adapter(lora, adapter_name="style")
            model.train(training)
            config = CSKVConfig(key_rank=12, value_rank=12, init=init)
            cskv_hf.fit(model, calibration_data(model), config, adapter_name="memory", progress=False)
            factors.append(sidecars(model)[1]("memory"))
            assert model.training == training
        for name in ("key_A", "value_A", "value_B", "key_spectrum"):
            assert torch.equal(*(getattr(f, name) for f in factors)), (init, name)


def test_a_cut_adapter_states_what_it_is_now():
    """The report reads ranks and bytes off the config, and errors only of layers that were not cut."""
    model = lossy(make_model(), 0.6, bits=None, allocation=None, block_size=8)
    config = model.peft_config["default"]
    config.fit_report["evaluation"] = {"kl": 0.1}
    report, before = format_report(config), copy.deepcopy(config.fit_report)
    assert "energy lost" in report and " - " not in report
    cskv_hf.shrink(model, 0.6)  # which cuts nothing
    assert config.fit_report == before and format_report(config) == report
    ranks = list(zip(config.key_ranks, config.value_ranks))
    cskv_hf.shrink(model, 0.85)
    assert "evaluation" not in config.fit_report and before["evaluation"] == {"kl": 0.1}
    for layer, old, kept, had in zip(
        config.fit_report["layers"], before["layers"], zip(config.key_ranks, config.value_ranks), ranks
    ):
        assert kept != had and set(layer) == {"layer_idx", "key_mean_share", "value_mean_share"}
        assert layer == {name: old[name] for name in layer}
    lines = format_report(config).split("\n")
    for i in range(2):
        keys, values = lines[5 + i].split()[1:3]
        assert (int(keys), int(values)) == (sum(config.key_ranks[i]), config.value_ranks[i])
        assert lines[5 + i].split()[-4:] == ["-"] * 4
    assert f"an old token takes {config.bytes_per_token(model.config):,.1f} of 256 bytes" in format_report(config)
    assert "- was not measured: the adapter was cut or trained after the fit" in lines
    assert max(map(len, lines)) <= 80


def test_merging_is_refused():
    model = lossy(make_model())
    with pytest.raises(ValueError, match="cannot be merged into the weights"):
        model.merge_and_unload()


def test_unsupported_architecture():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50))
    message = "does not support models of type 'gpt2'.*supported are gemma, .*llama, .*starcoder2"
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


def test_a_base_is_in_one_peft_model(saved):
    """A second adapter that is loaded or fitted onto the same base would change the first model under its user."""
    folder, _ = saved
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    first = cskv_hf.load(base, folder / "adapter")
    before = first(prompt(1, 50), past_key_values=CSKVCache()).logits
    again = (
        lambda: cskv_hf.load(base, folder / "adapter", compression=0.8),
        lambda: cskv_hf.load(base, folder / "adapter", adapter_name="second"),
        lambda: cskv_hf.fit(base, calibration_data(base), CSKVConfig(compression=0.8), progress=False),
    )
    for call in again:
        with pytest.raises(ValueError, match=r"inside a PeftModel that has the CSKV adapter 'default'.*unload"):
            call()
    assert torch.equal(first(prompt(1, 50), past_key_values=CSKVCache()).logits, before)
    first.unload()
    assert cskv_hf.load(base, folder / "adapter", compression=0.8).peft_config["default"].compression == 0.8
    with pytest.raises(TypeError, match="`model` must be the model that the adapter is put on, got one of type str"):
        cskv_hf.load("base", folder / "adapter")


def test_a_fit_leaves_a_lora_of_the_model_in_use():
    """With adapters inside a transformers model; what was fitted is what is served."""
    model = make_model()
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), adapter_name="style")
    expected = model(prompt(1, 20)).logits
    fitted = cskv_hf.fit(model, calibration_data(model), CSKVConfig(key_rank=8, value_rank=8), adapter_name="mem")
    assert torch.equal(fitted(prompt(1, 20)).logits, expected) and fitted.active_adapters() == ["style", "mem"]
    fitted = cskv_hf.fit(model, calibration_data(model), CSKVConfig(key_rank=4, value_rank=4), adapter_name="less")
    assert torch.equal(fitted(prompt(1, 20)).logits, expected) and fitted.active_adapters() == ["style", "less"]


@pytest.mark.parametrize("modules", [["up_proj"], ["q_proj"]], ids=["after", "before"])
def test_a_lora_is_saved_under_its_name_wherever_its_layers_are(modules, tmp_path):
    """transformers asks the first layer of an adapter what is active, and that may be one of ours. Saving ours changes
    neither what is active nor what is trained."""
    model = make_model()
    model.add_adapter(LoraConfig(r=2, target_modules=modules, init_lora_weights=False), adapter_name="style")
    model = cskv_hf.fit(model, calibration_data(model), CSKVConfig(compression=0.6), adapter_name="memory")
    assert model.active_adapters() == ["style", "memory"]
    model.requires_grad_(False)
    model = cskv_hf.fit(model, calibration_data(model), CSKVConfig(compression=0.7), adapter_name="less")
    save_adapter(model, tmp_path / "less")
    assert model.active_adapters() == ["style", "less"] and not any(p.requires_grad for p in model.parameters())
    check_adapter_files(tmp_path / "less")
    model.set_adapter("style")
    model.save_pretrained(tmp_path / "style")
    assert json.loads((tmp_path / "style" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert sidecars(model)[0].adapter_in_use == "less"  # a name of another method leaves it as it is


def test_casting_a_model_leaves_energies_exact():
    """Those of small factors are below what float16 holds."""
    model = lossy(make_model(dtype=torch.float32), bits=4, allocation=None, block_size=8)
    sidecar = sidecars(model)[0]
    sidecar.cskv_value_rounding["default"].weight.data.mul_(1e-9)
    before = {name: getattr(sidecar, name)["default"].weight.clone() for name in sidecar.adapter_layer_names}
    model.half()
    for name, weight in before.items():
        expected = weight if name in sidecar.ENERGIES else weight.half()
        assert torch.equal(getattr(sidecar, name)["default"].weight, expected)


def test_cutting_to_ranks_keeps_groups_of_ranges():
    settings = dict(compression=0.6, bits=None, allocation=None, block_size=8, key_group=[8, 2], value_group=[8, 1])
    model = lossy(make_model(), **settings)
    cskv_hf.shrink(model, key_rank=4, value_rank=3)
    config = model.peft_config["default"]
    assert config.key_bits is not None and config.key_group == [8, 2] and config.storage_bits is None
    keys, values = sidecars(model)[0].formats["default"]
    assert (keys.layout.group_channels, values.layout.group_channels, values.rank) == (2, 1, 3)


def test_disabled_adapters_are_named():
    model = make_model()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="style")
    model = cskv_hf.fit(model, calibration_data(model), CSKVConfig(compression=0.6), adapter_name="memory")
    model.disable_adapters()
    with pytest.raises(ValueError, match=r"No CSKV adapter of this model \(memory\) is in use: adapters are disabled"):
        cskv_hf.shrink(model, 0.8)


def test_adapters_that_lie_deeper_or_contradict_themselves(saved):
    folder, _ = saved
    (folder / "named").mkdir()
    (folder / "adapter").rename(folder / "named" / "memory")
    with pytest.raises(ValueError, match=r"adapters by their names, 'memory': give .*subfolder='memory'"):
        cskv_hf.load(make_model(), folder / "named")
    file = folder / "named" / "memory" / "adapter_config.json"
    settings = json.loads(file.read_text())
    changes = {
        "compression": (0.99, "`compression`=0.99, but its ranks and bits keep"),
        "value_ranks": (settings["value_ranks"][:1], "contradicts itself"),
        "model_shape": ({}, "contradicts itself"),
    }
    for name, (value, message) in changes.items():
        file.write_text(json.dumps(settings | {name: value}))
        with pytest.raises(ValueError, match=message):
            cskv_hf.load(make_model(), folder / "named" / "memory")

"""CSKV beside what else people do to a model: LoRA, quantised and offloaded bases, compilation, checkpointing, copies,
threads, several models. Compression changes what a cache holds and nothing else.
"""

import copy
import json
import threading

import pytest
import torch
from conftest import calibration_data, lossless, lossy, make_model, prompt
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, Trainer, TrainingArguments

import cskv_hf
from cskv_hf import CSKVCache, CSKVConfig, CSKVStaticCache
from cskv_hf.adapter_files import save_adapter
from cskv_hf.tokens import TokenTable
from cskv_hf.train import CSKVTrainer, training_arguments, training_rows

GREEDY = dict(max_new_tokens=16, do_sample=False)
PACKED = dict(compression=0.75, bits=None, allocation=None, block_size=8)
TABLE = "living-with-others"


def generated(model, length=60, **kwargs):
    """Tokens, of a generation that really compressed."""
    output = model.generate(prompt(1, length), return_dict_in_generate=True, **GREEDY, **kwargs)
    assert isinstance(output.past_key_values, CSKVCache) and output.past_key_values.tokens.num_old > 0
    return output.sequences


@pytest.fixture
def saved(tmp_path):
    """A base model and a packed adapter on disk."""
    make_model(dtype=torch.float32, hidden_size=64, num_hidden_layers=3).save_pretrained(tmp_path / "base")
    model = lossy(AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval(), **PACKED)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, generated(model)


def lora_rows(count=8):
    return [{"input_ids": ids, "labels": ids} for ids in prompt(count, 40, 5)]


def train_lora(model, folder, **settings):
    arguments = TrainingArguments(
        folder, num_train_epochs=1, learning_rate=0.01, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, per_device_train_batch_size=4, **settings,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=lora_rows()).train()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
def test_lora_trained_with_cskv_active(saved, checkpointing, documented):
    """Only LoRA moves, as without CSKV: training attends to exact keys and never touches the cache."""
    documented(TABLE, "LoRA training" + ", gradient checkpointing" * checkpointing, "with CSKV active")
    trained = {}
    for name, source in (("with", saved[0] / "adapter"), ("without", saved[0] / "base")):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(source)
        factors = {n: p.clone() for n, p in model.named_parameters() if "cskv_" in n}
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
        train_lora(model, str(saved[0] / "run"), gradient_checkpointing=checkpointing)
        named = dict(model.named_parameters())
        trained[name] = [p.detach().clone() for n, p in named.items() if "lora_" in n]
        for n, before in factors.items():
            assert torch.equal(named[f"base_model.model.{n}"], before)
        if name == "with":
            generated(model.eval())
    assert len(trained["with"]) == len(trained["without"]) and any(p.abs().max() > 0 for p in trained["with"])
    for one, other in zip(trained["with"], trained["without"]):
        assert torch.equal(one, other)


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_lora_before_cskv(merged, tmp_path, documented):
    """The recipe: fit on the model as it will run, LoRA applied. The fit sees what LoRA makes of the projections."""
    documented(TABLE, f"LoRA first ({'merged' if merged else 'unmerged'}), CSKV fitted on it", "with CSKV active")
    base = make_model(dtype=torch.float32)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    if merged:
        base = get_peft_model(base, lora).merge_and_unload()
    else:
        base.add_adapter(lora, adapter_name="style")
    data = calibration_data(base)
    settings = CSKVConfig(window=8, sinks=3, block_size=8, compression=0.75)
    if merged:
        model = cskv_hf.fit(base, data, settings, progress=False)
    else:
        model = cskv_hf.fit(base, data, settings, adapter_name="memory", progress=False)
        assert model is base
        base.set_adapter(["style", "memory"])
    tokens = generated(model)
    if not merged:
        whole = get_peft_model(make_model(dtype=torch.float32), lora, adapter_name="style")
        state = {n: p for n, p in base.named_parameters() if "lora_" in n}
        whole.load_state_dict({f"base_model.model.{n}": p for n, p in state.items()}, strict=False)
        expected = cskv_hf.fit(whole.merge_and_unload(), data, settings, progress=False)
        assert torch.equal(generated(expected), tokens)


def test_lora_merged_after_cskv(saved, documented):
    """Merging a LoRA on top of a model with CSKV leaves the factors in place and the output as it was."""
    documented(TABLE, "LoRA second, then merged", "with CSKV active")
    model = AutoModelForCausalLM.from_pretrained(saved[0] / "adapter")
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    stacked = get_peft_model(model, lora)
    before = stacked(prompt(1, 30)).logits
    tokens = generated(stacked)
    merged = stacked.merge_and_unload()
    torch.testing.assert_close(merged(prompt(1, 30)).logits, before, atol=1e-4, rtol=1e-4)
    assert torch.equal(generated(merged), tokens) and hasattr(merged.model.layers[0].self_attn, "cskv")


def test_merge_adapter_merges_the_lora_and_leaves_the_factors(saved):
    """PEFT merges whatever can be, and comes by the factors; only who names CSKV's adapter is refused."""
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(saved[0] / "adapter"), lora, adapter_name="style")
    before, tokens = model(prompt(1, 30)).logits, generated(model)
    model.merge_adapter()
    assert all(module.merged for module in model.modules() if isinstance(module, LoraLayer))
    torch.testing.assert_close(model(prompt(1, 30)).logits, before, atol=1e-4, rtol=1e-4)
    assert torch.equal(generated(model), tokens)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="cannot be merged into the weights"):
        model.merge_adapter(["default"])
    alone = cskv_hf.load(AutoModelForCausalLM.from_pretrained(saved[0] / "base"), saved[0] / "adapter")
    for merge in (alone.merge_adapter, alone.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged into the weights"):
            merge()


@pytest.mark.parametrize("then", ["save", "load", "fit", "delete", "stack", "copy"])
def test_after_a_lora_was_merged(saved, then):
    """PEFT forgets all adapters with the LoRA; those of CSKV can still be saved, added to, removed and stacked on."""
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(saved[0] / "adapter")
    model = get_peft_model(model, lora, adapter_name="style").merge_and_unload()
    tokens, folder = generated(model), saved[0] / "again"
    if then == "save":
        for save in (model.save_pretrained, lambda folder: save_adapter(model, folder)):
            save(folder)
            config, weights = (folder / name for name in ("adapter_config.json", "adapter_model.safetensors"))
            assert json.loads(config.read_text())["peft_type"] == "CSKV"
            assert load_file(weights).keys() == load_file(saved[0] / "adapter" / weights.name).keys()
    elif then == "load":
        model.load_adapter(str(saved[0] / "adapter"), adapter_name="other")
        model.set_adapter("other")
        assert torch.equal(generated(model), tokens)
    elif then == "fit":
        settings = CSKVConfig(window=8, sinks=3, block_size=8, compression=0.75)
        assert cskv_hf.fit(model, calibration_data(model), settings, adapter_name="new", progress=False) is model
        assert model.active_adapters() == ["new"]
        generated(model)
    elif then == "delete":
        model.delete_adapter("default")
        output = model.generate(prompt(1, 60), return_dict_in_generate=True, **GREEDY)
        assert isinstance(output.past_key_values, DynamicCache)
    elif then == "stack":
        stacked = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"), adapter_name="second")
        assert set(stacked.peft_config) == {"default", "second"} and torch.equal(generated(stacked), tokens)
    else:
        twin = copy.deepcopy(model)
        assert list(twin.peft_config) == ["default"] and torch.equal(generated(twin), tokens)


def test_two_adapters_of_one_name(saved):
    """PEFT has one entry for both, so that neither of ours is taken for the other's; refused before any work."""
    lora = LoraConfig(r=2, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(saved[0] / "adapter"), lora)
    for call in (lambda: save_adapter(model, saved[0] / "mixed"), lambda: cskv_hf.push_to_hub(model, "ada/mixed")):
        with pytest.raises(
            ValueError, match=r"'default' cannot be saved: .* Add that one under another `adapter_name`"
        ):
            call()
    assert not (saved[0] / "mixed").exists()
    base = AutoModelForCausalLM.from_pretrained(saved[0] / "base")
    base.add_adapter(lora, adapter_name="style")

    def data():
        pytest.fail("calibrated")
        yield

    with pytest.raises(ValueError, match="`adapter_name`='style' is the name of a LORA adapter of this model"):
        cskv_hf.fit(base, data(), adapter_name="style", progress=False)
    with pytest.raises(ValueError, match="`adapter_name`='style' is the name of a LORA adapter of this model"):
        cskv_hf.load(base, saved[0] / "adapter", adapter_name="style")
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(saved[0] / "base"), lora)
    for call in (lambda: cskv_hf.fit(wrapped, data(), adapter_name="memory", progress=False),
                 lambda: cskv_hf.load(wrapped, saved[0] / "adapter", adapter_name="memory")):  # fmt: skip
        with pytest.raises(ValueError, match=r"holds LORA adapters and PEFT cannot mix methods"):
            call()
    assert not hasattr(base.model.layers[0].self_attn, "cskv")


def test_two_tuners_in_one_peft_model_are_refused(documented):
    documented(TABLE, "LoRA and CSKV in one `PeftModel`", "with CSKV active", "refused by PEFT; see the LoRA recipe")
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"PEFT cannot mix methods.*merge_and_unload.*load_adapter"):
        cskv_hf.fit(model, calibration_data(model), progress=False)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_base(saved, bits, documented):
    """A base without dense weights: load, fit, train; factors are in the model's dtype, not in the weights'."""
    documented(TABLE, f"bitsandbytes, {bits} bits", "with CSKV active")
    quantisation = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(saved[0] / "adapter", quantization_config=quantisation)
    attention = model.model.layers[0].self_attn
    assert attention.k_proj.weight.dtype == (torch.uint8 if bits == 4 else torch.int8)
    assert attention.cskv().key_A.dtype == model.dtype
    generated(model)
    base = AutoModelForCausalLM.from_pretrained(saved[0] / "base", quantization_config=quantisation)
    model = lossy(base, **PACKED)
    generated(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    arguments = training_arguments(
        saved[0] / "run", use_cpu=True, disable_tqdm=True, save_strategy="no", learning_rate=1e-3
    )
    CSKVTrainer(model, arguments, training_rows(list(prompt(4, 48, 3)), length=48)).train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(n.split(".")[-3][-2:] in ("_A", "_B") for n in changed)
    generated(model)


class RowwiseInt8(nn.Module):
    """A linear layer that has no dense weight: int8 codes and a scale per row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale.to(x.dtype), self.bias)


@pytest.mark.parametrize("init", ["attention", "asvd"])
def test_a_base_without_any_weight_attribute(init, documented):
    """Whatever quantises linears: factors come from what they compute, so they equal those of the dense twin."""
    documented(TABLE, "other quantised linears", "with CSKV active")
    settings = dict(init=init, compression=0.5)
    quantised, dense = make_model(), make_model()
    for model, replace in ((quantised, True), (dense, False)):
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) and name.endswith("_proj"):
                    code = RowwiseInt8(child)
                    if replace:
                        setattr(module, name, code)
                    else:
                        child.weight.data = code.codes.double() * code.scale
    tokens = [generated(lossy(model, **settings)) for model in (quantised, dense)]
    assert torch.equal(*tokens)


def test_adapter_onto_an_offloaded_base(saved, tmp_path, documented):
    """CPU and disk: the projections have no weights of their own when the adapter arrives."""
    documented(
        TABLE, "`device_map`, CPU and disk offload", "with CSKV active", "yes; onto a loaded base by `cskv_hf.load`"
    )
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
    offload = dict(device_map=device_map, offload_folder=tmp_path / "offload")
    base = AutoModelForCausalLM.from_pretrained(saved[0] / "base", **offload)
    assert base.model.layers[1].self_attn.k_proj.weight.device.type == "meta"
    assert torch.equal(generated(cskv_hf.load(base, saved[0] / "adapter")), saved[1])
    model = AutoModelForCausalLM.from_pretrained(saved[0] / "adapter", **offload)
    assert torch.equal(generated(model), saved[1])


def test_torch_compile(saved, documented):
    """A compiled forward gives the same tokens (graph breaks at the cache; a compiled step is another matter)."""
    answer = "yes; with graph breaks, but for a `CSKVStaticCache`"
    documented(TABLE, "`torch.compile(model)`", "with CSKV active", answer)
    model = AutoModelForCausalLM.from_pretrained(saved[0] / "adapter")
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(generated(model), saved[1])


@torch.no_grad()
def test_nothing_waits_for_the_device(saved):
    """From the second cache on, no layer asks a tensor for a number, which on a GPU would wait for all that is under
    way."""
    model, asked = AutoModelForCausalLM.from_pretrained(saved[0] / "adapter"), []

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            asked.extend([function] if function is torch.ops.aten._local_scalar_dense.default else [])
            return function(*args, **(kwargs or {}))

    ids, counts = prompt(1, 40), []
    for _ in range(2):
        cache = CSKVCache()
        with Asked():
            model(ids, past_key_values=cache)
            for token in ids[:, :6].split(1, dim=1):  # with a block of 4 in between
                model(token, past_key_values=cache)
        counts.append(len(asked))
        asked.clear()
    assert counts == [3, 0], "of the first cache, one for each layer"


def test_factors_that_were_never_read(saved):
    """An empty layer is an error at the first token, never a wrong answer."""
    model = AutoModelForCausalLM.from_pretrained(saved[0] / "adapter")
    sidecar = model.model.layers[1].self_attn.cskv
    sidecar.update_layer("default", sidecar.configs["default"], sidecar.key_ranks["default"], 4)
    with pytest.raises(RuntimeError, match=r"'default' in layer 1 were never filled.*cskv_hf\.load"):
        generated(model)


def test_saving_the_full_model(saved, tmp_path, documented):
    """After `unload` the model saves as it was loaded; with adapters inside, transformers saves the adapter."""
    documented(TABLE, "`save_pretrained` of the full model", "with CSKV active", "after `unload()`")
    model = cskv_hf.load(AutoModelForCausalLM.from_pretrained(saved[0] / "base"), saved[0] / "adapter")
    generated(model)
    plain = model.unload()
    plain.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (saved[0] / "base" / name).read_bytes()
    inside = AutoModelForCausalLM.from_pretrained(saved[0] / "adapter")
    inside.save_pretrained(tmp_path / "inside")
    assert not (tmp_path / "inside" / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(saved[0] / "base")
    assert torch.equal(generated(cskv_hf.load(base, tmp_path / "inside")), saved[1])


def test_two_models_with_their_own_adapters(documented):
    """Patches are per instance: two models side by side, and a third that nobody touched."""
    documented(TABLE, "two models with different adapters", "with CSKV active")
    alone = [
        generated(lossy(make_model(family), compression)) for family, compression in (("llama", 0.6), ("qwen3", 0.5))
    ]
    plain, ids = make_model(), prompt(1, 60)
    expected = plain.generate(ids, **GREEDY)
    one, two = lossy(make_model("llama"), 0.6), lossy(make_model("qwen3"), 0.5)
    for _ in range(2):
        assert torch.equal(generated(one), alone[0]) and torch.equal(generated(two), alone[1])
        output = plain.generate(ids, return_dict_in_generate=True, **GREEDY)
        assert isinstance(output.past_key_values, DynamicCache) and torch.equal(output.sequences, expected)


def test_threads_on_one_model(documented):
    """All state of a generation is in its cache: eight threads at once give what each gives alone."""
    documented(TABLE, "threads generating on one model", "with CSKV active")
    model = lossy(make_model(dtype=torch.float32), **PACKED)
    prompts = [prompt(2, 50 + 3 * i, seed=i) for i in range(8)]
    expected = [model.generate(ids, **GREEDY) for ids in prompts]
    found = [None] * len(prompts)

    def work(i):
        for _ in range(3):
            found[i] = model.generate(prompts[i], **GREEDY)
            if not torch.equal(found[i], expected[i]):
                return

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected):
        assert torch.equal(one, other)


def test_copy_and_pickle(documented):
    """What test_generate.py shows of copies, for a PeftModel with its `push_to_hub`."""
    import pickle

    documented(TABLE, "`copy.deepcopy`, pickle", "with CSKV active")
    model = lossless(make_model())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin, PeftModel) and twin.push_to_hub.args[0] is twin
        assert torch.equal(generated(twin), generated(model))


@torch.no_grad()
def test_a_first_forward_that_was_refused_leaves_no_trace():
    """Neither the settings of its adapter nor its batch; what a speculation asked for meanwhile holds."""
    model = lossy(make_model())
    other = CSKVConfig(compression=0.6, bits=4, allocation="uniform", window=16, sinks=0, block_size=8)
    model = cskv_hf.fit(model, calibration_data(model), other, adapter_name="other", progress=False)
    ids = prompt(2, 60)
    for make in (CSKVCache, lambda: CSKVStaticCache(64)):
        caches = make(), make()
        model.set_adapter("default")
        with pytest.raises(ValueError, match=r"covers 59 tokens|and got 70 more"):
            if isinstance(caches[0], CSKVStaticCache):
                model(prompt(1, 70), past_key_values=caches[0])
            else:
                model(ids, attention_mask=torch.ones(2, 59, dtype=torch.long), past_key_values=caches[0])
        model.set_adapter("other")
        first, second = ([model(part, past_key_values=c).logits for part in ids.split([50, 10], 1)] for c in caches)
        assert all(torch.equal(a, b) for a, b in zip(first, second))
    cache = CSKVCache()
    with pytest.raises(ValueError, match="covers 59 tokens"):
        model(ids, attention_mask=torch.ones(2, 59, dtype=torch.long), past_key_values=cache)
    with pytest.raises(ValueError, match="is empty"):
        cache.save("nowhere")
    cache.batch_repeat_interleave(2)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="covers 3 tokens"):
        model(ids[:, :5], attention_mask=torch.ones(2, 3, dtype=torch.long), past_key_values=cache)
    cache.activate_past_recording()
    model(ids[:, :5], past_key_values=cache)
    assert cache.slack == cache.tokens.slack > 0


class Stopped(RuntimeError):
    """Out of memory, say."""


@torch.no_grad()
def test_what_stops_half_way_is_undone_or_refused(monkeypatch):
    """In the bookkeeping before any layer, in a crop, in a move of rows: never a wrong step afterwards."""
    model, ids = lossy(make_model()), prompt(2, 60)
    mask = torch.ones_like(ids)
    mask[0, 50:52] = 0

    def stops(*_):
        raise Stopped

    expected, cache = CSKVCache(), CSKVCache()
    for each in (expected, cache):
        model(ids[:, :50], past_key_values=each)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(TokenTable, "_become_ragged", stops)
        model(ids[:, 50:52], attention_mask=mask[:, :52], past_key_values=cache)
    for first in range(50, 60, 2):
        part = slice(first, first + 2)
        given = dict(attention_mask=mask[:, : first + 2])
        ours, theirs = (model(ids[:, part], past_key_values=c, **given).logits for c in (cache, expected))
        assert torch.equal(ours, theirs)
    moves = {
        "crop_columns": lambda: cache.crop(-2),
        "select_rows": lambda: cache.reorder_cache(torch.tensor([1, 0])),
    }
    for name, move in moves.items():
        cache = CSKVCache()
        model(ids, past_key_values=cache)
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(cache.layers[1], name, stops)
            move()
        with pytest.raises(RuntimeError, match="interrupted between two layers"):
            model(ids[:, :1], past_key_values=cache)
        cache.reset()
        model(ids, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [1, 4, 8])
def test_a_mask_for_each_head(kv_heads):
    """Query heads that share a KV head have masks of their own, as with DynamicCache."""
    model = lossless(make_model(num_attention_heads=8, num_key_value_heads=kv_heads, head_dim=8))
    ids, outputs = prompt(2, 43), []
    torch.manual_seed(0)
    seen = torch.ones(43, 43, dtype=torch.bool).tril()[40:].expand(2, 8, 3, 43) & (torch.rand(2, 8, 3, 43) < 0.8)
    seen[..., 0] = True
    for cache in (DynamicCache(), CSKVCache()):
        model(ids[:, :40], past_key_values=cache)
        outputs.append(model(ids[:, 40:], attention_mask=seen, past_key_values=cache).logits)
    torch.testing.assert_close(*outputs, atol=1e-9, rtol=1e-9)


def test_others_are_left_as_they_were(tmp_path):
    """By a load that is refused, by `unload`, by a change of dtype that a cache has to see."""
    lossy(make_model(dtype=torch.float32), compression=0.7).save_pretrained(tmp_path)
    model = make_model(dtype=torch.float32)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model.add_adapter(lora, adapter_name="style")
    cskv_hf.load(model, tmp_path, adapter_name="memory").unload()
    assert list(model.peft_config) == ["style"] and model.active_adapters() == ["style"]
    model = cskv_hf.load(make_model(dtype=torch.float32), tmp_path, adapter_name="x")
    cskv_hf.load(model, tmp_path, adapter_name="y")
    cskv_hf.load(model, tmp_path, adapter_name="z")
    model.set_adapter("y")
    with pytest.raises(ValueError, match="cannot be cut to"):
        cskv_hf.load(model, tmp_path, adapter_name="w", compression=0.5)
    assert model.active_adapter == "y" and list(model.peft_config) == ["x", "y", "z"]
    cache = CSKVCache()
    model(prompt(1, 40), past_key_values=cache)
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="A cache belongs to one model and adapter"):
        model(prompt(1, 1), past_key_values=cache)


def test_training_leaves_what_else_is_trained(tmp_path):
    model = make_model(dtype=torch.float32)
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    model.add_adapter(lora, adapter_name="style")
    model = lossy(model, bits=4, block_size=8)
    before = {name for name, p in model.named_parameters() if p.requires_grad and "lora" in name}
    arguments = training_arguments(tmp_path, max_steps=1, save_strategy="no", disable_tqdm=True, use_cpu=True)
    CSKVTrainer(model, arguments, training_rows(calibration_data(model), length=64)).train()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before and before

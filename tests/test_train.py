"""Fine-tuning: the loss is what the cache loses, only factors move, and a run can be interrupted, resumed, shared."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import calibration_data, lossy, make_model, prompt
from peft import LoraConfig

import cskv_hf
from cskv_hf import CSKVCache, CSKVConfig
from cskv_hf.adapter_files import check_adapter_files
from cskv_hf.card import card_text
from cskv_hf.fit_report import format_report
from cskv_hf.latents import PackedFormat
from cskv_hf.quantize import PackedLayout
from cskv_hf.reads import change_of_reads, states_read
from cskv_hf.reconstruction import (
    ReconstructionLoss,
    keys_and_values,
    rebuilt_behind,
    reconstruct,
    straight_through,
)
from cskv_hf.train import CSKVTrainer, training_arguments, training_rows
from cskv_hf.tuner import sidecars

PACKED = dict(bits=4, allocation=None, block_size=8)


def rows(count=24, length=48, seed=3):
    return training_rows(list(prompt(count, length, seed)), length=length)


def factors_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".cskv." in n}


def trainer(model, folder, data=None, **settings):
    objective = settings.pop("objective", "mse")
    defaults = dict(disable_tqdm=True, use_cpu=True, save_strategy="no")
    return CSKVTrainer(model, training_arguments(folder, **(defaults | settings)), data or rows(), objective=objective)


@pytest.mark.parametrize("settings", [{}, PACKED], ids=["plain", "packed"])
def test_the_loss_reads_what_the_cache_holds(settings):
    """Keys and values of the loss, whole blocks of them, are those that attention would read from a cache."""
    model = lossy(make_model(), 0.6, sinks=0, **settings)
    ids, cache = prompt(2, 40), CSKVCache()
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    old = cache.tokens.num_old
    for sidecar, layer, (keys, values) in zip(sidecars(model), cache.layers, keys_and_values(model, ids)):
        factors = sidecar()
        rebuilt_keys, rebuilt_values = reconstruct(factors, keys, values)
        latents = [x.read(0, x.num_blocks, torch.float64) for x in (layer.key_latents, layer.value_latents)]
        torch.testing.assert_close(rebuilt_keys[:, :, :old], factors.decode_keys(latents[0]))
        torch.testing.assert_close(rebuilt_values[:, :, :old], factors.decode_values(latents[1]))


def test_straight_through():
    """Forward: exactly what comes back from storage. Backward: the identity."""
    format = PackedFormat(PackedLayout((4, 2, 3), 8, 8))
    latents = torch.randn(2, 19, 3, requires_grad=True)
    out, whole = straight_through(latents, format), latents.detach()[:, :16]
    torch.testing.assert_close(out, format.read(format.store(whole, torch.float32), torch.float32))
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    assert torch.equal(latents.grad[:, :16], weight)


def test_closed_form_is_the_optimum_of_the_loss(tmp_path):
    """Training unquantised `mse` factors on their own calibration data gains nothing beyond 0.1 %."""
    model = make_model(dtype=torch.float32)
    data = rows(16, 64)
    config = CSKVConfig(compression=0.6, init="mse", bits=16, allocation="uniform", key_layout="joint")
    model = cskv_hf.fit(model, data, config, progress=False)
    loss = ReconstructionLoss(model, "default", "mse")

    def total():
        with torch.no_grad():
            return sum(float(loss(row["input_ids"][None])[0]) for row in data)

    before, factors = total(), factors_of(model)
    trainer(model, tmp_path, data, num_train_epochs=15, learning_rate=1e-4).train()
    assert before * 0.999 <= total() <= before * 1.05
    assert any(not torch.equal(p, factors[n]) for n, p in factors_of(model).items())  # it did move


@pytest.mark.parametrize("init", ["asvd", "svd", "random"])
def test_training_repairs_the_paper_initialisations(init, tmp_path):
    """...and does not pass the closed form, on the data of both."""
    data = rows(16, 64)
    losses = {}
    for name in (init, "mse"):
        config = CSKVConfig(compression=0.6, init=name, bits=16, allocation="uniform", key_layout="joint")
        model = cskv_hf.fit(make_model(dtype=torch.float32), data, config, progress=False)
        loss = ReconstructionLoss(model, "default", "mse")
        if name == init:
            losses["before"] = sum(float(loss(r["input_ids"][None])[0]) for r in data)
            trainer(model, tmp_path, data, num_train_epochs=20, learning_rate=3e-3).train()
        losses[name] = sum(float(loss(r["input_ids"][None])[0]) for r in data)
    assert losses["mse"] * 0.999 < losses[init] < losses["before"]
    assert losses[init] - losses["mse"] < 0.35 * (losses["before"] - losses["mse"])


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("objective", ["mse", "attention"])
def test_quantisation_aware_training_lowers_the_quantised_loss(bits, objective, tmp_path):
    model = lossy(make_model(dtype=torch.float32), 0.8, bits=bits, allocation=None, block_size=8)
    data, ids = rows(16, 64), prompt(1, 60)
    run = trainer(model, tmp_path, data, objective=objective, num_train_epochs=6, learning_rate=1e-3)
    losses = []
    for _ in range(2):
        with torch.no_grad():
            losses.append(sum(float(run.loss_function(r["input_ids"][None])[0]) for r in data))
        if len(losses) == 1:
            run.train()
    assert losses[1] < (1.0 if bits == 4 else 0.99) * losses[0]
    model.save_pretrained(tmp_path / "adapter")
    again = cskv_hf.load(make_model(dtype=torch.float32), tmp_path / "adapter")
    greedy = dict(max_new_tokens=12, do_sample=False)
    assert torch.equal(again.generate(ids, **greedy), model.generate(ids, **greedy))


def test_only_factors_change_and_the_model_is_as_before(tmp_path):
    model = lossy(make_model(dtype=torch.float32))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    forward = model.forward
    trainer(model, tmp_path, num_train_epochs=1).train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(n.split(".")[-3][-2:] in ("_A", "_B") for n in changed)
    assert model.forward == forward and not any(p.requires_grad for p in model.parameters())
    half = lossy(make_model(dtype=torch.float32)).to(torch.bfloat16)
    dtypes = {n: p.dtype for n, p in half.named_parameters()}
    trainer(half, tmp_path, num_train_epochs=1).train()
    assert {n: p.dtype for n, p in half.named_parameters()} == dtypes


def test_logs_every_layer(tmp_path):
    run = trainer(lossy(make_model(dtype=torch.float32)), tmp_path, logging_steps=6)
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logs) == 4
    for name in ("key_error", "value_error", "layers/0/key_error", "layers/1/value_error"):
        assert 0 < logs[0][name] < 1


def test_gradient_accumulation_equals_a_larger_batch(tmp_path):
    results = []
    for batch, steps in ((4, 1), (1, 4)):
        model = lossy(make_model(dtype=torch.float32), **PACKED)
        settings = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=steps, learning_rate=1e-3)
        trainer(model, tmp_path, optim="sgd", **settings).train()
        results.append(factors_of(model))
    for name, factor in results[0].items():
        torch.testing.assert_close(results[1][name], factor, atol=1e-6, rtol=1e-5)


def test_interrupted_training_resumes_to_the_same(tmp_path):
    """Killed after 12 of 24 steps; the second start continues from the checkpoint and ends where one run ends."""
    settings = dict(save_strategy="steps", save_steps=6, learning_rate=1e-3, logging_steps=6)
    straight = lossy(make_model(dtype=torch.float32), **PACKED)
    trainer(straight, tmp_path / "straight", **settings).train()
    interrupted = lossy(make_model(dtype=torch.float32), **PACKED)
    run = trainer(interrupted, tmp_path / "resumed", **settings)
    original = run.compute_loss

    def dies(*args, **kwargs):
        if run.state.global_step == 14:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    run.compute_loss = dies
    with pytest.raises(KeyboardInterrupt):
        run.train()
    resumed = lossy(make_model(dtype=torch.float32), **PACKED)
    run = trainer(resumed, tmp_path / "resumed", **settings)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 24
    for name, factor in factors_of(straight).items():
        torch.testing.assert_close(factors_of(resumed)[name], factor, atol=1e-6, rtol=1e-5)
    for changed, objective, named in (
        (dict(bits=3), "mse", "bits, key_bits, value_bits"),
        (dict(center=False), "mse", "center"),
        (dict(key_group=(8, 2), value_group=(8, 2)), "mse", "key_group, value_group"),
        ({}, "attention", "objective"),
    ):
        other = lossy(make_model(dtype=torch.float32), **PACKED | changed)
        run = trainer(other, tmp_path / "resumed", objective=objective, **settings)
        with pytest.raises(ValueError, match=rf"belongs to an adapter with other settings \(.*{named}.*\)"):
            run.train(resume_from_checkpoint=True)


def test_an_adapter_of_any_name_beside_a_lora(tmp_path):
    """Inside a transformers model: a checkpoint is the adapter in training alone, and a run goes on from the last that
    is whole. The one that a process was killed in has no state yet."""

    def ready():
        model = make_model(dtype=torch.float32)
        lora = LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
        model.add_adapter(lora, adapter_name="style")  # whose layers come after the factors
        config = CSKVConfig(compression=0.6, sinks=3, **PACKED)
        return cskv_hf.fit(model, calibration_data(model), config, adapter_name="memory", progress=False)

    settings = dict(save_strategy="steps", save_steps=8, save_total_limit=4, learning_rate=1e-3)
    best = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=8, per_device_eval_batch_size=1)
    model, arguments = ready(), dict(disable_tqdm=True, use_cpu=True, greater_is_better=True)  # the worst is the first
    run = training_arguments(tmp_path / "best", **settings | best | arguments | {"learning_rate": 3e-2})
    run = CSKVTrainer(model, run, rows(), objective="mse", eval_dataset=rows(4, seed=9))
    run.train()
    losses = {e["step"]: e["eval_loss"] for e in run.state.log_history if "eval_loss" in e}
    assert max(losses, key=losses.get) != 24 and run.evaluate()["eval_loss"] == pytest.approx(max(losses.values()))

    straight, resumed = ready(), ready()
    trainer(straight, tmp_path, **settings).train()
    assert straight.active_adapters() == ["style", "memory"]
    last = tmp_path / "checkpoint-24"
    loaded = cskv_hf.load(make_model(dtype=torch.float32), last)
    for name, factor in factors_of(loaded).items():
        name = name.removeprefix("base_model.model.").replace(".default.", ".memory.")
        assert torch.equal(factor, factors_of(straight)[name])
    (last / "trainer_state.json").unlink()
    run = trainer(resumed, tmp_path, **settings)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 24 and (last / "trainer_state.json").is_file()
    for name, factor in factors_of(straight).items():
        torch.testing.assert_close(factors_of(resumed)[name], factor, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match=r"no checkpoint in '.*nothing' to resume from"):
        trainer(resumed, tmp_path / "nothing", **settings).train(resume_from_checkpoint=True)


def test_several_gpus_without_a_launcher(tmp_path, caplog):
    """One is used: `Trainer` would put copies of the model into threads."""
    arguments = training_arguments(tmp_path, use_cpu=True)
    assert arguments.n_gpu <= 1
    arguments._n_gpu = 2
    run = CSKVTrainer(lossy(make_model(dtype=torch.float32)), arguments, rows())
    assert run.args.n_gpu == 1 and "Training on one of 2 GPUs" in caplog.text


DISTRIBUTED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from conftest import lossy, make_model
from test_train import PACKED, factors_of, trainer
model = lossy(make_model(dtype=torch.float32), **PACKED)
saving = dict(save_strategy="steps", save_steps=3)
run = trainer(model, sys.argv[2], per_device_train_batch_size=2, optim="sgd", learning_rate=1e-3, **saving)
run.train()
if run.args.process_index == 0:
    torch.save(factors_of(model), sys.argv[2] + "/factors.pt")
"""


def test_two_processes_equal_one(tmp_path):
    """Data parallel over gloo: two processes with batches of 2 take the steps of one with batches of 4.

    By torch's launcher, which `accelerate launch` hands over to on GPUs; on a CPU that needs MPI for two processes.
    """
    script, here = tmp_path / "run.py", os.path.dirname(__file__)
    script.write_text(DISTRIBUTED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29611"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*launch, str(script), here, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    together = torch.load(tmp_path / "factors.pt")
    check_adapter_files(tmp_path / "checkpoint-6")
    model = lossy(make_model(dtype=torch.float32), **PACKED)
    start, moved = factors_of(model), 0.0
    trainer(model, tmp_path / "alone", per_device_train_batch_size=4, optim="sgd", learning_rate=1e-3).train()
    for name, factor in factors_of(model).items():
        torch.testing.assert_close(together[name], factor, atol=1e-6, rtol=1e-4)
        moved = max(moved, float((factor - start[name]).abs().max()))
    assert moved > 1e-5


@pytest.mark.parametrize("objective", ["mse", "attention"])
def test_mixed_precision(objective, tmp_path):
    """The base runs in bfloat16; factors, loss and quantiser stay in float32, so training still helps."""
    model = lossy(make_model(dtype=torch.float32), 0.8, bits=2, allocation=None, block_size=8)
    data = rows(16, 64)
    run = trainer(model, tmp_path, data, objective=objective, bf16=True, num_train_epochs=6, learning_rate=1e-3)
    loss, losses, trained = run.loss_function, [], set()
    compute_loss = run.compute_loss

    def recording(*args, **kwargs):
        trained.update(p.dtype for p in model.parameters() if p.requires_grad)
        found, errors = compute_loss(*args, return_outputs=True, **kwargs)
        trained.update((found.dtype, errors["errors"].dtype))
        return (found, errors) if kwargs.get("return_outputs") else found

    run.compute_loss = recording
    for step in range(2):
        with torch.no_grad():
            losses.append(sum(float(loss(r["input_ids"][None])[0]) for r in data))
        if step == 0:
            run.train()
    assert losses[1] < 0.99 * losses[0] and trained == {torch.float32}


def test_mixed_precision_every_time(tmp_path):
    """accelerate wraps a model's forward once, and ours is there only while a trainer needs it."""
    model, seen = lossy(make_model(dtype=torch.float32)), []
    attention = model.get_base_model().model.layers[0].self_attn
    handle = attention.v_proj.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    forward, before = model.forward, vars(model).copy()
    for _ in range(2):
        run = trainer(model, tmp_path, bf16=True, max_steps=2)
        evaluate = functools.partial(run.evaluate, rows(2))
        for work in (evaluate, evaluate, run.train, evaluate, run.train):
            work()
            assert seen and set(seen) == {torch.bfloat16} and model.forward == forward
            assert vars(model).keys() == before.keys()
            seen.clear()
    handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trainer_trains_again(dtype, tmp_path):
    """From a checkpoint to where the first run ended, and on from there; frozen in between."""
    model = lossy(make_model(dtype=dtype), init="asvd")
    settings = dict(save_strategy="steps", save_steps=6, save_total_limit=4, learning_rate=1e-2)
    run = trainer(model, tmp_path, **settings)
    assert not any(p.requires_grad for p in model.parameters())
    run.train()
    first = factors_of(model)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    for name, factor in factors_of(model).items():
        torch.testing.assert_close(factor, first[name], atol=1e-6, rtol=1e-5)
    run.train()
    assert run.state.global_step == 24 and not any(p.requires_grad for p in model.parameters())
    assert any(not torch.equal(factor, first[name]) for name, factor in factors_of(model).items())


def test_evaluation(tmp_path):
    """`evaluate` returns the loss, on its own and while training, whose logs are as they are without it; the "best"
    checkpoint (here the worst, which is not the last) is loaded at the end."""
    held_out, logs = rows(6, seed=9), []
    for evaluates in (False, True):
        model = lossy(make_model(dtype=torch.float32), init="mse")
        settings = dict(max_steps=8, logging_steps=3, learning_rate=1e-2, save_strategy="no")
        if evaluates:
            settings |= dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)
            settings |= dict(load_best_model_at_end=True, greater_is_better=True, save_total_limit=8)
            settings |= dict(per_device_eval_batch_size=1)
        arguments = training_arguments(tmp_path, disable_tqdm=True, use_cpu=True, **settings)
        run = CSKVTrainer(model, arguments, rows(), objective="mse", eval_dataset=held_out)
        if evaluates:
            start = run.evaluate()
        run.train()
        logs.append([entry for entry in run.state.log_history if "loss" in entry])
    names = ("loss", "key_error", "value_error", "layers/1/key_error")
    assert [[entry[n] for n in names] for entry in logs[0]] == [[entry[n] for n in names] for entry in logs[1]]
    evaluations = {e["step"]: e for e in run.state.log_history if "eval_loss" in e}
    assert list(evaluations) == [2, 4, 6, 8] and not any("key_error" in e for e in evaluations.values())
    found, best = [e["eval_loss"] for e in evaluations.values()], run.evaluate()
    assert best["eval_loss"] == pytest.approx(max(found)) and max(found) > found[-1] > start["eval_loss"]
    with torch.no_grad():
        expected = [run.loss_function(row["input_ids"][None]) for row in held_out]
    assert best["eval_loss"] == pytest.approx(sum(float(loss) for loss, _ in expected) / 6)
    errors = sum(errors for _, errors in expected) / 6
    assert best["eval_key_error"] == pytest.approx(float(errors[:, 0].mean()))
    assert best["eval_layers/1/value_error"] == pytest.approx(float(errors[1, 1]))


@pytest.mark.parametrize("settings", [{}, PACKED], ids=["plain", "packed"])
def test_the_attention_objective_sees_what_generation_does(settings):
    """In the first layer, whose input no cache changes: what the attention of a decode step puts out over a compressed
    past, less what it does over the full one, is the change that the loss is made of."""
    model = lossy(make_model(), 0.6, sinks=2, **settings)
    ids, cache, read, outputs = prompt(1, 61), CSKVCache(), [], []
    attention, sidecar = model.base_model.model.model.layers[0].self_attn, sidecars(model)[0]
    with torch.no_grad():
        with states_read(attention, lambda states, output: read.append((states, output[-1]))), model.disable_adapter():
            model(ids, use_cache=False)
        model(ids[:, :60], past_key_values=cache, use_cache=True)
        hook = attention.o_proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0][0, -1]))
        model(ids[:, 60:], past_key_values=cache, use_cache=True)
        hook.remove()
        ((states, full),), (compressed,) = read, outputs
        rebuilt = zip(("key_states", "value_states"), rebuilt_behind(states, sidecar(), 2))
        recent, asked = 61 - 2 - cache.tokens.num_old, torch.tensor([60])
        (change,) = change_of_reads(states, 2, recent, queries=asked, **dict(rebuilt))
    assert cache.tokens.num_old > 0 and change.norm() > 0.01 * full.norm()
    torch.testing.assert_close(change, compressed - full, rtol=1e-4, atol=1e-6)


def test_the_objectives_are_two():
    """Of the same factors they find different shares lost."""
    model = lossy(make_model(dtype=torch.float32), init="asvd")
    ids = prompt(1, 64)
    with torch.no_grad():
        found = [ReconstructionLoss(model, "default", name)(ids) for name in ("mse", "attention")]
    assert not any(loss.requires_grad for loss, _ in found)  # an evaluation keeps no graph
    shares = [share for _, share in found]
    assert all((share > 0).all() and (share < 1).all() for share in shares)
    assert not torch.allclose(shares[0], shares[1], rtol=0.1)


def test_the_base_runs_without_dropout(tmp_path):
    """In training mode, with dropout in the attention and in a LoRA, the targets are those of inference; and every
    module is left in its mode."""
    base = make_model(dtype=torch.float32, attention_dropout=0.3)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = LoraConfig(r=4, lora_dropout=0.5, target_modules=targets, init_lora_weights=False)
    base.add_adapter(lora, adapter_name="style")
    model = lossy(base)
    model.set_adapter(["style", "default"])
    expected = keys_and_values(model, prompt(1, 40))
    model.train()
    model.model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    for got, exact in zip(keys_and_values(model, prompt(1, 40)), expected):
        assert torch.equal(got[0], exact[0]) and torch.equal(got[1], exact[1])
    assert [module.training for module in model.modules()] == modes


def test_what_was_measured_before_training_is_dropped(tmp_path):
    """Of the adapter and of its checkpoints; not if there was no step."""
    model = lossy(make_model(dtype=torch.float32))
    config = model.peft_config["default"]
    config.fit_report["evaluation"] = {"kl": 0.1}
    run = trainer(model, tmp_path, save_strategy="steps", save_steps=4, max_steps=4)
    run.evaluate(rows(2))
    assert "evaluation" in config.fit_report and "key_error" in config.fit_report["layers"][0]
    run.train()
    report = config.fit_report
    saved = json.loads((tmp_path / "checkpoint-4" / "adapter_config.json").read_text())["fit_report"]
    assert report == saved and report["trained"] == "mse" and "evaluation" not in report
    assert report["num_tokens"] == 1368 and all("key_error" not in layer for layer in report["layers"])
    text = format_report(config)
    assert "fine-tuned after the fit, objective 'mse'" in text and "- was not measured" in text
    assert max(map(len, text.split("\n"))) <= 80
    card = card_text(config, "ada/base", "ada/adapter")
    assert "Fine-tuned after the fit" in card and "No evaluation was recorded." in card and "Energy lost" not in card


@pytest.mark.parametrize("objective", ["mse", "attention"])
def test_padding_does_not_count(objective):
    model = lossy(make_model())
    loss, ids = ReconstructionLoss(model, "default", objective), prompt(1, 30)
    padded = torch.cat([ids, torch.zeros(1, 9, dtype=torch.long)], dim=1)
    mask = (torch.arange(39) < 30).long()[None]
    torch.testing.assert_close(loss(padded, mask), loss(ids), atol=1e-6, rtol=1e-6)


def test_refuses(tmp_path):
    from peft import get_peft_model

    model = lossy(make_model(dtype=torch.float32))
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        CSKVTrainer(model, training_arguments(tmp_path), [])
    with pytest.raises(ValueError, match="`data` is empty: there is nothing to train on"):
        training_rows([])
    with pytest.raises(ValueError, match="`objective` must be one of 'mse', 'attention', got 'kl'"):
        trainer(model, tmp_path, objective="kl")
    with pytest.raises(ValueError, match=r"no factors yet.*cskv_hf\.fit"):
        trainer(get_peft_model(make_model(), CSKVConfig()), tmp_path)
    arguments = training_arguments(tmp_path)
    arguments.fsdp = ["full_shard"]
    with pytest.raises(ValueError, match=r"does not run under FSDP or DeepSpeed.*accelerate launch"):
        CSKVTrainer(model, arguments, rows())
    with pytest.raises(ValueError, match="hold no block of 8; train on longer ones"):
        packed = lossy(make_model(dtype=torch.float32), **PACKED)
        ReconstructionLoss(packed, "default", "mse")(prompt(1, 5))
    with pytest.raises(ValueError, match=r"No row .* old tokens in whole blocks \(5 tokens, .*train on longer ones"):
        ReconstructionLoss(packed, "default", "attention")(prompt(2, 5))
    with pytest.raises(ValueError, match="no real token among the 16 first of a row"):
        ReconstructionLoss(packed, "default", "mse")(prompt(2, 21), (torch.arange(21) >= 16).long().expand(2, -1))
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="is not a checkpoint of a CSKV adapter"):
        trainer(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_rows_are_packed():
    data = training_rows(
        [torch.arange(5), {"input_ids": torch.arange(7), "attention_mask": torch.tensor([0] + [1] * 6)}], length=4
    )
    assert [row["input_ids"].tolist() for row in data] == [[0, 1, 2, 3], [4, 1, 2, 3]]
    assert len(training_rows(calibration_data(make_model()), length=50, max_tokens=200)) == 4

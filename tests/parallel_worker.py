"""One of the processes of test_tensor_parallel.py: ``parallel_worker.py FOLDER``, with RANK and WORLD_SIZE set.

Loads base models and adapters from the folder as tensor-parallel models and writes what they generate, what they hold
and what they refuse to ``rank_N.pt``. `results` is also what the test does in one process.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments

import cskv_hf
from cskv_hf import CSKVCache, CSKVConfig
from cskv_hf.train import CSKVTrainer

SHORT, LONG = 8, 80
LONG_CASES = ("head, packed", "joint, plain")
MLP = {"gate": "colwise", "up": "colwise", "down": "rowwise"}
LOADERS = {
    "cskv_hf.load": lambda base, adapter, **how: cskv_hf.load(load(base, **how), adapter),
    "PeftModel": lambda base, adapter, **how: PeftModel.from_pretrained(load(base, **how), adapter),
    "load_adapter": lambda base, adapter, **how: with_adapter(load(base, **how), adapter),
    "AutoModel": lambda base, adapter, **how: load(adapter, **how),
}


def load(folder, **how):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **how).eval()


def with_adapter(model, adapter):
    model.load_adapter(str(adapter))
    return model


@torch.no_grad()
def results(model, new=SHORT):
    """Tokens and logits of several ways to fill a cache, and what the last cache holds."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, 90, (2, 60), generator=generator)
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :13], mask[1, :13] = 0, 0
    found = {}
    settings = dict(do_sample=False, output_logits=True, return_dict_in_generate=True)
    for name, length, inputs in (
        ("plain", new, dict(input_ids=ids)),
        ("padded", SHORT, dict(input_ids=padded, attention_mask=mask)),
    ):
        output = model.generate(**inputs, past_key_values=CSKVCache(), max_new_tokens=length, **settings)
        found[f"{name} tokens"], found[f"{name} logits"] = output.sequences, torch.stack(output.logits)
        held = output.past_key_values
        found[f"{name} next turn"] = model(ids, past_key_values=held, attention_mask=grown(inputs, held)).logits
    found["beams"] = model.generate(ids, past_key_values=CSKVCache(), max_new_tokens=6, num_beams=3, do_sample=False)
    found["prefix"] = model(ids, past_key_values=(held := CSKVCache())).logits
    names = held.layers[0].tensors()
    sizes = {n: [sum(t.numel() * t.itemsize for t in layer.tensors()[n]) for layer in held.layers] for n in names}
    latents = (layer.key_latents for layer in held.layers)
    found["held"] = sizes, [keys.read(0, keys.num_blocks, torch.float64) for keys in latents]
    return found


def grown(inputs, cache):
    """The mask of what a cache holds and as many tokens again as `inputs` has."""
    ids = inputs["input_ids"]
    mask = torch.ones(len(ids), cache.get_seq_length() + ids.shape[1], dtype=torch.long)
    mask[:, : ids.shape[1]] = inputs.get("attention_mask", 1)
    return mask


def message(function, *args, **kwargs):
    """What a refusal says."""
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def refusals(folder, model, cache):
    """By name: what is not for a tensor-parallel model."""
    data, arguments = [torch.ones(1, 40, dtype=torch.long)], TrainingArguments(str(folder / "run"), report_to="none")
    three, own = (
        load(folder / "three heads", tp_plan="auto"),
        {"model.layers.*.self_attn.k_proj": "colwise_gather_output"},
    )
    mixed = load(folder / "base", tp_plan={**three.tp_plan, **own})
    ids, caches = torch.ones(1, 30, dtype=torch.long), [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(caches, cache)
    other = dict(input_ids=ids, past_key_values=caches[torch.distributed.get_rank() - 1])
    return {
        "another's cache": message(model, **other),
        "fit": message(cskv_hf.fit, load(folder / "base", tp_plan="auto"), data),
        "statistics": message(cskv_hf.collect_statistics, model, data),
        "train": message(CSKVTrainer, model, arguments, [{"input_ids": data[0][0]}]),
        "save": message(cache.save, folder / "cache.safetensors"),
        "three heads": message(get_peft_model, three, CSKVConfig()),
        "left as it was": str(hasattr(three.model.layers[0].self_attn, "cskv")),
        "mixed plan": message(get_peft_model, mixed, CSKVConfig()),
    }


def main(folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    parallel, found = dict(tp_plan="auto"), {}
    for base in ("base", "qwen2", "qwen3"):
        for adapter in sorted((folder / f"{base} adapters").iterdir()):
            model = cskv_hf.load(load(folder / base, **parallel), adapter)
            found[base, adapter.name] = results(model, LONG if adapter.name in LONG_CASES else SHORT)
    adapter = folder / "base adapters" / "head, packed"
    for name, loader in LOADERS.items():
        found[name] = results(loader(folder / "base", adapter, **parallel))
    model = cskv_hf.load(load(folder / "base", **parallel), adapter, compression=0.85)
    found["cut"] = results(model)
    whole = {f"model.layers.*.self_attn.{p}_proj": "replicated_with_grad_allreduce" for p in "qkvo"}
    whole |= {f"model.layers.*.mlp.{name}_proj": style for name, style in MLP.items()}
    found["heads not divided"] = results(cskv_hf.load(load(folder / "base", tp_plan=whole), adapter))
    model(torch.ones(1, 60, dtype=torch.long), past_key_values=(cache := CSKVCache()))
    found["refusals"] = refusals(folder, model, cache)
    torch.save(found, folder / f"rank_{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

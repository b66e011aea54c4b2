"""Time per token of a whole `generate`, CSKV against DynamicCache: python benchmarks/generate.py [ADAPTER ...]

Without arguments the bundled model, fitted on the spot; otherwise adapters (directories or ids) of one model, which is
loaded once for each. The prompt is random tokens; it is read before the clock starts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from common import leave_out_kernels, machine, median_seconds
from peft import PeftConfig
from transformers import AutoModelForCausalLM, DynamicCache

import cskv_hf
from cskv_hf import CSKVCache, CSKVConfig
from cskv_hf.demo import run as demo

TOKENS = 16
SETTINGS = {
    "80% 16 bit": dict(compression=0.8, bits=16),
    "80% packed": dict(compression=0.8),
    "95% packed": dict(compression=0.95),
}


def models(adapters: list[str], device: str):
    """(name, model) of every contestant; the first stands for the full cache."""
    if not adapters:
        base, tokenizer = demo.load_bundled()
        data = demo.calibration_data(tokenizer)
        yield "DynamicCache", base
        for name, settings in SETTINGS.items():
            yield name, cskv_hf.fit(demo.load_bundled()[0], data, CSKVConfig(**settings), progress=False)
        return
    name = PeftConfig.from_pretrained(adapters[0]).base_model_name_or_path
    yield "DynamicCache", AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device).eval()
    for adapter in adapters:
        yield adapter, AutoModelForCausalLM.from_pretrained(adapter, dtype="auto").to(device).eval()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("adapters", nargs="*")
    parser.add_argument("--length", type=int, default=3968, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--torch", action="store_true", help="without the kernels compiled for this CPU")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON; adds a run to a file that is there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.torch:
        leave_out_kernels()
    torch.manual_seed(0)
    contestants = {}
    for name, model in models(args.adapters, args.device):
        cache = CSKVCache() if contestants else DynamicCache()
        prompt = torch.randint(3, model.config.vocab_size, (1, args.length), device=args.device)
        model(prompt, past_key_values=cache, logits_to_keep=1)

        def go_on(model=model, cache=cache, prompt=prompt):
            held = cache.get_seq_length()
            ids = torch.cat([prompt, prompt[:, : held + 1 - prompt.shape[1]]], dim=1)
            settings = dict(max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
            model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **settings)

        contestants[name] = go_on
    seconds = {name: t / TOKENS for name, t in median_seconds(contestants, args.rounds).items()}
    print(f"{args.length} tokens\n{'cache':<24}{'ms per token':>14}{'x Dynamic':>11}")
    for name, t in seconds.items():
        print(f"{name[-24:]:<24}{1000 * t:>14.2f}{t / seconds['DynamicCache']:>11.2f}")
    if args.out:
        about = {"machine": machine(args.threads), "length": args.length, "adapters": args.adapters}
        earlier = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
        args.out.write_text(json.dumps(about | {"runs": [*earlier, seconds]}, indent=1))


if __name__ == "__main__":
    main()

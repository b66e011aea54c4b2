"""Time per token of a whole `generate`, CSKV against DynamicCache: python benchmarks/generate.py [ADAPTER ...]

Without arguments the bundled model, fitted on the spot; otherwise adapters (directories or ids) of one model, which is
loaded once for each. The prompt is random tokens; it is read before the clock starts. What is timed are windows of 32
tokens: in each of them every layer encodes and appends one block, wherever the window begins.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from common import BLOCK, earlier_runs, leave_out_kernels, machine, median_seconds, save
from peft import PeftConfig
from torch import nn
from transformers import AutoModelForCausalLM, Cache, DynamicCache

import cskv_hf
from cskv_hf import CSKVCache, CSKVConfig
from cskv_hf.demo import run as demo

TOKENS = BLOCK  # timed at once
SETTINGS = {
    "80% 16 bit": dict(compression=0.8, bits=16),
    "80% packed": dict(compression=0.8),
    "95% packed": dict(compression=0.95),
}


def models(adapters: list[str], device: str) -> Iterator[tuple[str, nn.Module]]:
    """(name, model) of every contestant; the first stands for the full cache."""
    if not adapters:
        base, tokenizer = demo.load_bundled()
        yield "DynamicCache", base.to(device)
        data = demo.calibration_data(tokenizer)
        for name, settings in SETTINGS.items():
            model = demo.load_bundled()[0].to(device)
            yield name, cskv_hf.fit(model, data, CSKVConfig(**settings), progress=False)
        return
    name = PeftConfig.from_pretrained(adapters[0]).base_model_name_or_path
    yield "DynamicCache", AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device).eval()
    for adapter in adapters:
        yield adapter, AutoModelForCausalLM.from_pretrained(adapter, dtype="auto").to(device).eval()


@torch.no_grad()
def turns_of(model: nn.Module, cache: Cache, prompt: torch.Tensor) -> Callable[[], None]:
    """Reads the prompt into the cache; returns what generates `TOKENS` tokens from there."""
    model(prompt, past_key_values=cache, logits_to_keep=1)

    def go_on() -> None:
        held = cache.get_seq_length()
        ids = prompt.repeat(1, held // prompt.shape[1] + 1)[:, : held + 1]  # all but the last are in the cache
        settings = dict(max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **settings)

    return go_on


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
    named = models(args.adapters, args.device)
    first = next(named)
    about = {
        "machine": machine(args.threads),
        "device": args.device,
        "dtype": str(first[1].dtype),
        "length": args.length,
        "tokens": TOKENS,
        "adapters": args.adapters,
    }
    earlier = earlier_runs(args.out, about)
    contestants = {}
    for name, model in itertools.chain([first], named):
        prompt = torch.randint(3, model.config.vocab_size, (1, args.length), device=args.device)
        contestants[name] = turns_of(model, CSKVCache() if contestants else DynamicCache(), prompt)
    seconds = {name: t / TOKENS for name, t in median_seconds(contestants, args.rounds).items()}
    print(f"{args.length} tokens\n{'cache':<24}{'ms per token':>14}{'x Dynamic':>11}")
    for name, t in seconds.items():
        print(f"{name[-24:]:<24}{1000 * t:>14.2f}{t / seconds['DynamicCache']:>11.2f}")
    save(args.out, about | {"runs": [*earlier, seconds]})


if __name__ == "__main__":
    main()

"""What compressing costs while a prompt is read: python benchmarks/prefill.py [--device cuda --layers 4]

One decoder layer of Llama-3.1-8B's sizes with random weights, or several, fitted as any model is, reads a prompt into
a DynamicCache and into a CSKVCache, in turns. Attention to the prompt is the same in both; a CSKVCache encodes all but
the window besides. On a GPU the profiler says how long kernels ran: with one layer much of the time is Python's, which
with several passes while kernels run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import kernel_seconds, machine, medians_by_turn, save
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from cskv_hf import CSKVCache, CSKVConfig, fit

SIZES = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, head_dim=128)


def make_model(config: LlamaConfig, device: str) -> LlamaForCausalLM:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    config = LlamaConfig(
        **SIZES, num_hidden_layers=args.layers, vocab_size=512, max_position_embeddings=131072, dtype=dtype
    )
    base = make_model(config, args.device)
    prompt = torch.randint(0, 512, (1, args.length), device=args.device)
    data = list(torch.randint(0, 512, (2, 1024)))
    contestants = {"DynamicCache": lambda: base(prompt, past_key_values=DynamicCache(), logits_to_keep=1)}
    for name, settings in {
        "80% head 16 bit": dict(compression=0.8, bits=16, allocation="uniform"),
        "80% head packed": dict(compression=0.8),
        "95% head packed": dict(compression=0.95),
    }.items():
        model = fit(make_model(config, args.device), data, CSKVConfig(**settings))
        model.get_base_model().load_state_dict(base.state_dict(), strict=False)
        contestants[name] = lambda model=model: model(prompt, past_key_values=CSKVCache(), logits_to_keep=1)
    about = {"machine": machine(args.threads), "length": args.length, "layers": args.layers, "dtype": str(dtype)}
    for turns, seconds in enumerate(medians_by_turn(contestants, args.rounds), 1):
        save(args.out, about | {"rounds": turns, "seconds": seconds})
    kernels = {}
    if torch.device(args.device).type == "cuda":
        kernels = {name: kernel_seconds(run) for name, run in contestants.items()}
        save(args.out, about | {"rounds": turns, "seconds": seconds, "kernels": kernels})
    print(f"{args.length} tokens x {args.layers} layers\n{'cache':<20}{'ms':>10}{'x Dynamic':>11}{'% busy':>8}")
    for name, t in seconds.items():
        busy = f"{100 * sum(kernels[name].values()) / t:.0f}" if kernels else ""
        print(f"{name:<20}{1000 * t:>10.1f}{t / seconds['DynamicCache']:>11.3f}{busy:>8}")


if __name__ == "__main__":
    main()

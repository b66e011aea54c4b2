"""A whole decode step of a model, compiled and not: python benchmarks/step.py [--device cuda]

A Llama of 8B's layers, fewer of them, with random weights, fitted to random tokens; the first context is random too.
Of compiled caches (`mode="reduce-overhead"`: CUDA graphs on a GPU) it shows what the graph saves, and on a GPU how
much of a step its kernels are busy: a step that waits for launches is busy for a part of it only. Compiling takes
minutes; `--backend cudagraphs` records the same operations as they are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from common import machine, median_seconds, synchronize
from torch.profiler import ProfilerActivity, profile
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import cskv_hf
from cskv_hf import CSKVCache, CSKVConfig, CSKVStaticCache

STEPS = 8  # timed at once


def make_model(layers: int, tiny: bool, device: str) -> LlamaForCausalLM:
    """A Llama with random weights."""
    sizes = dict(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, head_dim=128
    )
    if tiny:
        sizes = {name: max(2, size // 16) if name != "head_dim" else 32 for name, size in sizes.items()}
    config = LlamaConfig(vocab_size=4096, num_hidden_layers=layers, max_position_embeddings=131072, **sizes)
    config.rope_parameters["rope_theta"] = 500000.0
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return LlamaForCausalLM(config).to(device, dtype).eval()


def steps_of(model, cache: Cache, prompt: torch.Tensor, backend: str | None) -> Callable[[], None]:
    """Reads the prompt into the cache; returns what takes `STEPS` steps from there, compiled if there is a backend."""
    model(prompt, past_key_values=cache, logits_to_keep=1)
    forward = model.forward
    if backend is not None:
        how = {"mode": "reduce-overhead"} if backend == "inductor" else {"backend": backend}
        forward = torch.compile(forward, fullgraph=True, **how)
    position = torch.full((len(prompt), 1), prompt.shape[1], device=prompt.device)

    def run() -> None:
        token = prompt[:, :1]
        for _ in range(STEPS):
            torch.compiler.cudagraph_mark_step_begin()  # what the step before gave is no longer needed
            token = forward(token, past_key_values=cache, position_ids=position).logits[:, -1:].argmax(-1)
            position.add_(1)

    return run


def busy_seconds(run: Callable[[], None]) -> float | None:
    """Seconds that the kernels of a step take on a GPU; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        synchronize()
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6 / STEPS


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=8192, help="tokens of the context")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compression", type=float, nargs="+", default=[0.8, 0.95], help="with the default packing")
    parser.add_argument("--backend", default="inductor", choices=["inductor", "cudagraphs"], help="of torch.compile")
    parser.add_argument("--tiny", action="store_true", help="a sixteenth of the sizes, to see that it runs")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    full = make_model(args.layers, args.tiny, args.device)
    prompt = torch.randint(3, 4096, (args.batch, args.length), device=args.device)
    room = args.length + 4 * STEPS * (args.rounds + 2)
    contestants = {
        "DynamicCache": steps_of(full, DynamicCache(), prompt, None),
        "StaticCache, compiled": steps_of(full, StaticCache(full.config, max_cache_len=room), prompt, args.backend),
    }
    for compression in args.compression:
        model = make_model(args.layers, args.tiny, args.device)
        model = cskv_hf.fit(model, [prompt[0, :1024]], CSKVConfig(compression=compression), progress=False)
        name = f"{compression:.0%} packed"
        contestants[name] = steps_of(model, CSKVCache(), prompt, None)
        contestants[f"{name}, compiled"] = steps_of(model, CSKVStaticCache(room), prompt, args.backend)
    seconds = {name: t / STEPS for name, t in median_seconds(contestants, args.rounds).items()}
    busy = {name: busy_seconds(run) for name, run in contestants.items()}
    print(f"{args.layers} layers, {args.length} tokens x {args.batch}")
    print(f"{'cache':<26}{'ms a step':>11}{'x Dynamic':>11}{'% busy':>8}")
    for name, t in seconds.items():
        share = "" if busy[name] is None else f"{100 * busy[name] / t:.0f}"
        print(f"{name:<26}{1000 * t:>11.2f}{t / seconds['DynamicCache']:>11.2f}{share:>8}")
    if args.out:
        about = {"machine": machine(args.threads), "settings": {k: v for k, v in vars(args).items() if k != "out"}}
        args.out.write_text(json.dumps(about | {"seconds": seconds, "busy": busy}, indent=1))


if __name__ == "__main__":
    main()

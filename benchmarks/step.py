"""A whole decode step of a model, compiled and not: python benchmarks/step.py [--device cuda]

A Llama of 8B's layers, fewer of them by default, with random weights, fitted to random tokens; the first context is
random too. All models share their weights. On a GPU a growing cache of keys and values is timed with PyTorch's flash
attention as well: cuDNN's, which PyTorch may prefer, plans anew for every length.
What is timed are windows of 32 tokens: in each of them every layer of a growing CSKV cache encodes and appends one
block, wherever the window begins. Caches of fixed size are compiled as well (`mode="reduce-overhead"`: CUDA graphs on
a GPU), which takes minutes; `--backend recorded` makes a CUDA graph of the same operations as they are. On a GPU the
profiler says how much of such a window its kernels are busy: a step that waits for launches is busy for a part of it.
How much logits of a step with a cache of fixed size differ from those with a growing one is printed first.

The whole of Llama-3.1-8B, on a GPU: ``--backend recorded --layers 32 --vocabulary 128256 --length 32768 --bits 4``;
with `--bits` all layers are alike, so that kernels are compiled once and not for many layers.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from common import BLOCK, kernel_seconds, machine, medians_by_turn, save
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import cskv_hf
from cskv_hf import CSKVCache, CSKVConfig, CSKVStaticCache

STEPS = BLOCK  # timed at once
WARM_UP = 3  # steps before one is recorded
BACKENDS = {"inductor": "compiled", "recorded": "recorded"}


def make_model(layers: int, vocabulary: int, tiny: bool, device: str) -> LlamaForCausalLM:
    """A Llama with random weights."""
    sizes = dict(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, head_dim=128
    )
    if tiny:
        sizes = {name: max(2, size // 16) if name != "head_dim" else 32 for name, size in sizes.items()}
    sizes |= dict(vocab_size=vocabulary, num_hidden_layers=layers, max_position_embeddings=131072)
    config = LlamaConfig(dtype=torch.float32 if device == "cpu" else torch.bfloat16, **sizes)
    config.rope_parameters["rope_theta"] = 500000.0
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config).eval()


def with_same_weights(model: LlamaForCausalLM) -> LlamaForCausalLM:
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def steps_of(model, cache: Cache, prompt: torch.Tensor, backend: str | None = None) -> Callable[[], None]:
    """Reads the prompt into the cache; returns what takes `STEPS` steps from there.

    Args:
        backend: of `BACKENDS`, for a cache of fixed size; None takes the steps as they are.
    """
    model(prompt, past_key_values=cache, logits_to_keep=1)
    token = prompt[:, 0].clone()[:, None]  # compact, or a compiler would compile for these strides and for others
    position = torch.full_like(token, prompt.shape[1])
    if backend == "inductor":
        step = compiled_step(model, cache, token, position)
    else:
        step = step_in_place(model.forward, cache, token, position)
    if backend == "recorded":
        step = Recorded(step, cache)

    def run() -> None:
        for _ in range(STEPS):
            step()

    return run


def step_in_place(forward: Callable, cache: Cache, token: torch.Tensor, position: torch.Tensor) -> Callable[[], None]:
    """A greedy step that puts the next token and its position where it found them, both (batch, 1)."""

    def step() -> None:
        logits = forward(token, past_key_values=cache, position_ids=position).logits
        token.copy_(logits[:, -1:].argmax(-1))
        position.add_(1)

    return step


def compiled_step(model, cache: Cache, token: torch.Tensor, position: torch.Tensor) -> Callable[[], None]:
    compiled = torch.compile(model.forward, fullgraph=True, mode="reduce-overhead")
    step_without_mark = step_in_place(compiled, cache, token, position)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()  # what the step before gave is no longer needed
        step_without_mark()

    return step


def difference(model, prompt: torch.Tensor) -> float:
    """Of a step's logits with a cache of fixed size from those with a growing one, relative; a part of the allocated
    tokens is not there yet."""
    logits = []
    for cache in (CSKVCache(), CSKVStaticCache(2 * prompt.shape[1])):
        model(prompt[:, :-1], past_key_values=cache, logits_to_keep=1)
        logits.append(model(prompt[:, -1:], past_key_values=cache).logits.float())
    return float((logits[1] - logits[0]).norm() / logits[0].norm())


def with_flash(run: Callable[[], None]) -> Callable[[], None]:
    def run_with_flash() -> None:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            run()

    return run_with_flash


class Recorded:
    """A step with a cache of fixed size as a CUDA graph that is replayed.

    Torch's own backend `cudagraphs` would copy weights and cache in at every replay, since it takes no input to stay
    where it is. Here everything does, and lives as long as the step, which is kept.

    Args:
        step: of `step_in_place`; runs a few times before it is recorded, so that kernels are compiled and what they
            keep is made.

    Raises:
        RuntimeError: if the step cannot be recorded, or a replay does not put a token into the cache.
    """

    def __init__(self, step: Callable[[], None], cache: Cache) -> None:
        self.step = step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                step()
            here = cache.layers[0].device
            torch._assert_async(torch.ones((), device=here))  # what a recording does instead of reading lengths
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            step()
        held = int(cache.get_seq_length())
        self.graph.replay()
        if int(cache.get_seq_length()) != held + 1:
            raise RuntimeError(f"A replay of the recorded step put no token into the {type(cache).__name__}.")

    def __call__(self) -> None:
        self.graph.replay()


def refuse_skipped_graphs() -> None:
    """Compiled steps without CUDA graphs are not what is to be measured.

    Raises:
        RuntimeError: if Inductor has left any out.
    """
    skipped = counters["inductor"]["cudagraph_skips"]
    if skipped:
        raise RuntimeError(
            f"Inductor left out {skipped} CUDA graphs, so that these steps are launched from Python; with "
            "TORCH_LOGS=cudagraphs it says why."
        )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=8192, help="tokens of the context")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens there are")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compression", type=float, nargs="+", default=[0.8, 0.95])
    parser.add_argument("--bits", type=int, help="of every channel, in layers that are alike; or the default packing")
    parser.add_argument(
        "--backend", default="inductor", choices=BACKENDS, help="of torch.compile, or a CUDA graph without it"
    )
    parser.add_argument("--tiny", action="store_true", help="a sixteenth of the sizes, to see that it runs")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    on_gpu = torch.device(args.device).type == "cuda"
    if args.backend == "recorded" and not (on_gpu and torch.cuda.is_available()):
        parser.error(
            "`--backend recorded` makes CUDA graphs. Give `--device cuda`, where there is a GPU, or `inductor`."
        )
    torch.set_num_threads(args.threads)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    about = {"machine": machine(args.threads), "settings": settings, "tokens": STEPS}
    full = make_model(args.layers, args.vocabulary, args.tiny, args.device)
    prompt = torch.randint(3, args.vocabulary, (args.batch, args.length), device=args.device)
    room = args.length + STEPS * (2 * (args.rounds + 1) + 2)  # for the turns, the profiler, and what is not timed
    how = BACKENDS[args.backend]
    contestants = {
        "DynamicCache": steps_of(full, DynamicCache(), prompt),
        **({"DynamicCache, flash": with_flash(steps_of(full, DynamicCache(), prompt))} if on_gpu else {}),
        f"StaticCache, {how}": steps_of(full, StaticCache(full.config, max_cache_len=room), prompt, args.backend),
    }
    differences = {}
    for compression in args.compression:
        config = CSKVConfig(compression=compression)
        if args.bits is not None:
            config = CSKVConfig(compression=compression, bits=args.bits, allocation="uniform")
        model = cskv_hf.fit(with_same_weights(full), [prompt[0, :1024]], config, progress=False)
        name = f"{compression:.0%} {'packed' if args.bits is None else f'{args.bits} bit'}"
        differences[name] = difference(model, prompt[:, :1024])
        contestants[name] = steps_of(model, CSKVCache(), prompt)
        contestants[f"{name}, {how}"] = steps_of(model, CSKVStaticCache(room), prompt, args.backend)
    busy, kernels = {}, {}
    for turns, medians in enumerate(medians_by_turn(contestants, args.rounds), 1):
        if on_gpu and args.backend == "inductor":
            refuse_skipped_graphs()
        seconds = {name: t / STEPS for name, t in medians.items()}
        about |= {"differences": differences, "seconds": seconds}
        save(args.out, about | {"rounds": turns, "busy": busy})
    for name, run in contestants.items():
        busy[name] = None
        if on_gpu:
            kernels[name] = {kernel: t / STEPS for kernel, t in kernel_seconds(run).items()}
            busy[name] = sum(kernels[name].values())
        save(args.out, about | {"rounds": args.rounds, "busy": busy, "kernels": kernels})
    print(f"{args.layers} layers, {args.length} tokens x {args.batch}")
    for name, of_logits in differences.items():
        print(f"{name}: logits with a cache of fixed size differ by {of_logits:.1e}")
    print(f"{'cache':<26}{'ms a step':>11}{'x Dynamic':>11}{'% busy':>8}")
    for name, t in seconds.items():
        share = "" if busy[name] is None else f"{100 * busy[name] / t:.0f}"
        print(f"{name:<26}{1000 * t:>11.2f}{t / seconds['DynamicCache']:>11.2f}{share:>8}")


if __name__ == "__main__":
    main()

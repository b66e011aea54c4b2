"""What attention over a compressed past takes on a GPU, kernel by kernel: python benchmarks/gpu_kernels.py --out FILE

A layer of Llama-3.1-8B's sizes in bfloat16, one new token, without what the cache does to take it: attention to
everything the cache holds, as a CUDA graph that is replayed many times in a row, so that neither Python nor launches
count; beside it SDPA on keys and values that are simply there. A graph has several layers with caches of their own,
as in a model, where their tensors would otherwise stay in the GPU's second-level cache from one replay to the next.
The profiler says what each kernel takes. The error is that of the first row against the torch code in float64. The
roofline is the longer of what a large copy would take to move the cache's bytes, and a large matrix product to do the
kernels' products, which rebuild and score keys and sum value latents.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (
    FilledCache,
    RandomStates,
    Setting,
    Sizes,
    copy_bandwidth,
    kernel_seconds,
    machine,
    median_seconds,
    plan_summary,
    save,
)

from cskv_hf import CSKVConfig
from cskv_hf.attention import attend_in_torch, compressed_attention
from cskv_hf.factors import LayerFactors
from cskv_hf.handover import CompressedKV
from cskv_hf.latents import Latents

SETTINGS = (
    Setting(0.95, "head", 4),
    Setting(0.95, "head"),
    Setting(0.95, "head", multiple=4),
    Setting(0.8, "head", 16),
    Setting(0.8, "head"),
    Setting(0.8, "head", multiple=4),
    Setting(0.8, "joint", 16),
    Setting(0.95, "joint", 4),
    Setting(0.95, "joint"),
    Setting(0.95, "joint", multiple=4),
)
KERNELS = {  # a field of the JSON, and what the names of its kernels begin with
    "score_kernel": ("score_kernel", "hopper_score_kernel"),  # one or the other
    "value_kernel": ("value_kernel", "hopper_value_kernel"),
    "merge_kernel": ("merge_kernel",),
    "finish_kernel": ("finish_kernel",),
}
REPLAYS = 20  # timed at once
MOST_LAYERS = 32  # of a graph


def layers_together(nbytes: float, cache_size: int) -> int:
    """Layers of `nbytes` each that make four times the second-level cache, so that no layer finds its own there."""
    return min(MOST_LAYERS, math.ceil(4 * cache_size / nbytes))


def graph_seconds(run: Callable[[], object], rounds: int) -> float:
    """Median seconds of a replay, of many that follow one another."""
    for _ in range(3):  # compiles and makes what is kept, before anything is recorded
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(rounds + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()  # while it runs, the first of those that are timed is launched
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000 / REPLAYS)
    return statistics.median(times[1:])


def of_ours(seen: dict[str, float]) -> dict[str, float]:
    """Seconds of each of `KERNELS`, of all that the profiler saw.

    Raises:
        SystemExit: if it did not see all of them, and something else was measured.
    """
    ours = {
        field: [seconds for name, seconds in seen.items() if name.startswith(prefixes)]
        for field, prefixes in KERNELS.items()
    }
    missing = [field for field, found in ours.items() if not found]
    if missing:
        sys.exit(f"{', '.join(missing)} did not run, so this is not the time of our kernels. What did: {[*seen]}")
    return {field: sum(found) for field, found in ours.items()}


def matrix_rate(device: str) -> float:
    """Multiplications and additions per second of a large matrix product in bfloat16: what a GPU gives at best."""
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    out, times = torch.empty_like(a), 10  # so that launching does not count

    def products() -> None:
        for _ in range(times):
            torch.mm(a, b, out=out)

    return 2 * 8192**3 * times / median_seconds({"products": products}, 5)["products"]


def operations(config: CSKVConfig, sizes: Sizes) -> int:
    """Multiplications and additions per old token and row of the batch: rebuilding, scoring, and summing latents."""
    groups, heads = len(config.key_ranks[0]), sizes.num_attention_heads
    rebuilt = sum(config.key_ranks[0]) * sizes.kv_dim // groups
    return 2 * (rebuilt + heads * (sizes.head_dim + config.value_ranks[0]))


def first_row(kv: CompressedKV) -> CompressedKV:
    """The first row of the batch, everything that is not packed in float64."""

    def wide(value: object) -> object:
        return value.double() if isinstance(value, torch.Tensor) else value

    latents = [
        Latents(held.format, tuple(t[:1].double() if len(held.tensors) == 1 else t[:1] for t in held.tensors))
        for held in (kv.key_latents, kv.value_latents)
    ]
    factors = LayerFactors(**{name: wide(value) for name, value in vars(kv.factors).items()})
    exact = kv.exact_keys[:1].double(), kv.exact_values[:1].double()
    return CompressedKV(*exact, *latents, factors, kv.step, kv.turns)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=32768, help="tokens of the context")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    if args.device == "cpu" or not torch.cuda.is_available():
        parser.error("This times kernels of a GPU, and there is none; on a CPU use benchmarks/decode.py.")
    torch.manual_seed(0)
    sizes, rows = Sizes(), []
    bandwidth, rate = copy_bandwidth(args.device), matrix_rate(args.device)
    plans = {setting.name: plan_summary(setting, sizes) for setting in SETTINGS}
    about = {"machine": machine(torch.get_num_threads()), "sizes": vars(sizes), "dtype": "torch.bfloat16"}
    about |= {"copy_bandwidth": bandwidth, "matrix_rate": rate, "plans": plans}
    cache_size = torch.cuda.get_device_properties(args.device).L2_cache_size
    for batch in args.batch:
        states, tokens = RandomStates(sizes, batch, args.device, torch.bfloat16), batch * args.length
        query, held = states.query(), 2 * tokens * sizes.kv_dim * torch.bfloat16.itemsize
        layers = layers_together(held, cache_size)
        ready = [(states(args.length), states(args.length)) for _ in range(layers)]

        def run_full(query: torch.Tensor = query, ready: list = ready) -> None:
            for keys, values in ready:
                F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

        full = graph_seconds(run_full, args.rounds) / layers
        of_row = {"length": args.length, "batch": batch}
        rows.append({"cache": "SDPA, ready cache", "seconds": full, "bytes": held, "layers": layers} | of_row)
        del ready, run_full
        print(f"{args.length} tokens x {batch}")
        print(f"{'cache':<20}{'ms':>8}{'x SDPA':>8}{'scores':>8}{'values':>8}{'% roof':>8}{'error':>9}")
        print(f"{'SDPA, ready cache':<20}{1000 * full:>8.3f}{1:>8.2f}", flush=True)
        for setting in SETTINGS:
            layers = layers_together(tokens * plans[setting.name]["bytes_per_token"], cache_size)
            filled = FilledCache(setting, sizes, layers, args.length, states)
            kvs = list(filled.step(states))

            def run(query: torch.Tensor = query, kvs: list[CompressedKV] = kvs) -> list[torch.Tensor]:
                return [compressed_attention(query, kv, sizes.head_dim**-0.5) for kv in kvs]

            got = run()[0]  # compiles, before the profiler looks
            expected = attend_in_torch(query[:1].double(), first_row(kvs[0]), sizes.head_dim**-0.5, None, None)
            error = float((got[:1] - expected).norm() / expected.norm())
            seen = {name: t / layers for name, t in kernel_seconds(run).items()}
            by_kernel, seconds = of_ours(seen), graph_seconds(run, args.rounds) / layers
            size = filled.cache.layers[0].nbytes
            done = tokens * operations(filled.config, sizes)
            row = {"cache": setting.name, "seconds": seconds, "kernels": by_kernel, "bytes": size, "operations": done}
            rows.append(row | {"error": error, "layers": layers, "seen": seen} | of_row)
            save(args.out, about | {"rows": rows})
            roof = max(size / bandwidth, done / rate) / seconds
            scores, summed = (1000 * by_kernel[name] for name in ("score_kernel", "value_kernel"))
            print(
                f"{setting.name:<20}{1000 * seconds:>8.3f}{seconds / full:>8.2f}{scores:>8.3f}{summed:>8.3f}"
                f"{100 * roof:>8.0f}{error:>9.4f}",
                flush=True,
            )
            del filled, kvs, run


if __name__ == "__main__":
    main()

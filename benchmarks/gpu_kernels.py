"""What attention over a compressed past takes on a GPU, kernel by kernel: python benchmarks/gpu_kernels.py --out FILE

One layer of Llama-3.1-8B's sizes in bfloat16, one new token, without what the cache does to take it: attention to
everything the cache holds, as a CUDA graph that is replayed, so that neither Python nor launches count; beside it SDPA
on keys and values that are simply there. The profiler says what each kernel takes. The error is that of the first row
against the torch code in float64. The roofline is the longer of what a large copy would take to move the cache's
bytes, and a large matrix product to do the kernels' products, which rebuild and score keys and sum value latents.
"""

from __future__ import annotations

import argparse
import json
import statistics
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
    machine,
    median_seconds,
    plan_summary,
)
from torch.profiler import ProfilerActivity, profile

from cskv_hf import CSKVConfig
from cskv_hf.attention import _attend, compressed_attention
from cskv_hf.cache_layer import CompressedKV
from cskv_hf.factors import LayerFactors
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
KERNELS = ("score_kernel", "value_kernel", "merge_kernel", "finish_kernel")


def graph_seconds(run: Callable[[], object], rounds: int) -> float:
    """Median seconds of a replay."""
    for _ in range(3):  # compiles and makes what is kept, before anything is recorded
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(rounds + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times[1:])


def kernel_seconds(run: Callable[[], object]) -> dict[str, float]:
    """Seconds of each of ours."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = profiler.key_averages()
    return {name: sum(e.self_device_time_total for e in events if name in e.key) / 1e6 for name in KERNELS}


def matrix_rate(device: str) -> float:
    """Multiplications and additions per second of a large matrix product in bfloat16: what a GPU gives at best."""
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    return 2 * 8192**3 / median_seconds({"product": lambda: a @ b}, 5)["product"]


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
    return CompressedKV(kv.exact_keys[:1].double(), kv.exact_values[:1].double(), *latents, factors, kv.step)


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
    for batch in args.batch:
        states = RandomStates(sizes, batch, args.device, torch.bfloat16)
        query, keys, values = states.query(), states(args.length), states(args.length)
        about = {"length": args.length, "batch": batch}
        full = graph_seconds(
            lambda q=query, k=keys, v=values: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), args.rounds
        )
        rows.append({"cache": "SDPA, ready cache", "seconds": full, "bytes": 2 * keys.nbytes} | about)
        del keys, values
        print(f"{args.length} tokens x {batch}")
        print(f"{'cache':<20}{'ms':>8}{'x SDPA':>8}{'scores':>8}{'values':>8}{'% roof':>8}{'error':>9}")
        print(f"{'SDPA, ready cache':<20}{1000 * full:>8.3f}{1:>8.2f}", flush=True)
        for setting in SETTINGS:
            filled = FilledCache(setting, sizes, 1, args.length, states)
            (kv,) = filled.step(states)

            def run(query: torch.Tensor = query, kv: CompressedKV = kv) -> torch.Tensor:
                return compressed_attention(query, kv, sizes.head_dim**-0.5)

            seconds, by_kernel = graph_seconds(run, args.rounds), kernel_seconds(run)
            expected = _attend(query[:1].double(), first_row(kv), sizes.head_dim**-0.5, None, None)
            error = float((run()[:1] - expected).norm() / expected.norm())
            size = filled.cache.layers[0].nbytes
            done = batch * args.length * operations(filled.config, sizes)
            row = {"cache": setting.name, "seconds": seconds, "kernels": by_kernel, "bytes": size, "operations": done}
            rows.append(row | {"error": error} | about)
            roof = max(size / bandwidth, done / rate) / seconds
            scores, summed = (1000 * by_kernel[name] for name in KERNELS[:2])
            print(
                f"{setting.name:<20}{1000 * seconds:>8.3f}{seconds / full:>8.2f}{scores:>8.3f}{summed:>8.3f}"
                f"{100 * roof:>8.0f}{error:>9.4f}",
                flush=True,
            )
            del filled, kv
    if args.out:
        about = {"machine": machine(torch.get_num_threads()), "sizes": vars(sizes), "dtype": "torch.bfloat16"}
        rates = {"copy_bandwidth": bandwidth, "matrix_rate": rate}
        plans = {setting.name: plan_summary(setting, sizes) for setting in SETTINGS}
        args.out.write_text(json.dumps(about | rates | {"plans": plans, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

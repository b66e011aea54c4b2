"""Time of one decode step of one attention layer, CSKV against full caches: python benchmarks/decode.py

A step of a layer is what its attention does between the projections: put one token's keys and values into the cache
and attend to everything in it. Several layers with caches of their own take turns, as in a model, so that no layer
finds its cache in the processor's, and what a model does once per step (positions, cos and sin) is paid once per step.
Compared are DynamicCache through transformers' own attention function, and SDPA on keys and values that are simply
there, which no cache that grows can beat. On a GPU (`--device cuda`) in bfloat16, with the share of the bandwidth that
a large copy reaches in the same run. Processes differ by more than the turns within one: run it several times.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import FilledCache, RandomStates, Setting, Sizes, copy_bandwidth, machine, median_seconds, plan_summary
from torch import nn
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cskv_hf.attention import compressed_attention

SETTINGS = (
    Setting(0.8, "head", 16),
    Setting(0.8, "joint", 16),
    Setting(0.8, "head"),
    Setting(0.95, "head"),
    Setting(0.95, "joint"),
)


def full_caches(sizes: Sizes, layers: int, states: RandomStates, length: int) -> dict[str, tuple[Callable, int]]:
    """Steps of the full caches, and the bytes of one layer that each has to read."""
    module = nn.Module().eval()
    module.num_key_value_groups = sizes.num_attention_heads // sizes.num_key_value_heads
    module.is_causal = True
    query, scaling = states.query(), sizes.head_dim**-0.5
    dynamic = DynamicCache()
    ready = [(states(length), states(length)) for _ in range(layers)]
    for layer_idx, (keys, values) in enumerate(ready):
        dynamic.update(keys, values, layer_idx)

    def dynamic_step() -> None:
        for layer_idx in range(layers):
            keys, values = dynamic.update(states(1), states(1), layer_idx)
            sdpa_attention_forward(module, query, keys, values, None, scaling=scaling)

    def ready_step() -> None:
        for keys, values in ready:
            F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    size = 2 * ready[0][0].nbytes
    return {"DynamicCache": (dynamic_step, size), "SDPA, ready cache": (ready_step, size)}


def compressed_cache(
    setting: Setting, sizes: Sizes, layers: int, states: RandomStates, length: int
) -> tuple[Callable, int]:
    query, scaling = states.query(), sizes.head_dim**-0.5
    filled = FilledCache(setting, sizes, layers, length, states)

    def step() -> None:
        for kv in filled.step(states):
            compressed_attention(query, kv, scaling)

    return step, filled.cache.layers[0].nbytes


@torch.no_grad()
def measure(
    sizes: Sizes, settings, layers: int, states: RandomStates, length: int, rounds: int, clock=time.perf_counter
) -> list[dict]:
    """One row per way of caching: seconds per layer and step, and the bytes that a layer reads."""
    contestants = full_caches(sizes, layers, states, length)
    for setting in settings:
        contestants[setting.name] = compressed_cache(setting, sizes, layers, states, length)
    seconds = median_seconds({name: step for name, (step, _) in contestants.items()}, rounds, clock)
    return [
        {"cache": name, "length": length, "batch": states.batch, "seconds": seconds[name] / layers, "bytes": size}
        for name, (_, size) in contestants.items()
    ]


def print_table(rows: list[dict], bandwidth: float) -> None:
    by_name = {row["cache"]: row for row in rows}
    dynamic, ready = (by_name[name]["seconds"] for name in ("DynamicCache", "SDPA, ready cache"))
    print(f"\n{rows[0]['length']} tokens x {rows[0]['batch']} rows")
    print(f"{'cache':<22}{'ms':>9}{'x Dynamic':>11}{'x ready':>9}{'MB':>9}{'% bandwidth':>13}")
    for row in rows:
        share = 100 * row["bytes"] / bandwidth / row["seconds"]
        print(
            f"{row['cache']:<22}{1000 * row['seconds']:>9.2f}{row['seconds'] / dynamic:>11.2f}"
            f"{row['seconds'] / ready:>9.2f}{row['bytes'] / 1e6:>9.1f}{share:>13.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192, 16384])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON; adds a run to a file that is there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    sizes, dtype = Sizes(), torch.float32 if args.device == "cpu" else torch.bfloat16
    bandwidth = copy_bandwidth(args.device)
    rows = []
    for length in args.lengths:
        for batch in args.batch:
            states = RandomStates(sizes, batch, args.device, dtype)
            rows += measure(sizes, SETTINGS, args.layers, states, length, args.rounds)
            print_table(rows[-2 - len(SETTINGS) :], bandwidth)
    if args.out:
        about = {
            "machine": machine(args.threads),
            "sizes": vars(sizes),
            "dtype": str(dtype),
            "layers": args.layers,
            "copy_bandwidth": bandwidth,
            "plans": {setting.name: plan_summary(setting, sizes) for setting in SETTINGS},
        }
        earlier = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
        args.out.write_text(json.dumps(about | {"runs": [*earlier, rows]}, indent=1))


if __name__ == "__main__":
    main()

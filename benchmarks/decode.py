"""Time of one decode step of one attention layer, CSKV against full caches: python benchmarks/decode.py

A step of a layer is what its attention does between the projections: put one token's keys and values into the cache
and attend to everything in it. Several layers with caches of their own take turns, as in a model, so that no layer
finds its cache in the processor's, and what a model does once per step (positions, cos and sin) is paid once per step.
Compared are, in turns, transformers' DynamicCache, StaticCache and QuantizedCache (4 bits, quanto and hqq where they
are installed) through transformers' own attention function, and SDPA on keys and values that are simply there. A
QuantizedCache quantises everything anew every 128 steps, and a CSKVCache encodes and appends a block every 32: a
median of single steps leaves both out (benchmarks/generate.py and step.py time the latter). On a GPU (`--device cuda`)
in bfloat16. Bytes are those of the cache as it is stored, and what they would take to read is given as a share of the
bandwidth that a large copy reaches in the same run. Processes differ by more than the turns within one: run it several
times.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (
    LEAST_LENGTH,
    FilledCache,
    RandomStates,
    Setting,
    Sizes,
    copy_bandwidth,
    earlier_runs,
    leave_out_kernels,
    machine,
    median_seconds,
    plan_summary,
    save,
)
from torch import nn
from transformers import AutoConfig, Cache, DynamicCache, LlamaConfig, QuantizedCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask

from cskv_hf import ModelShape
from cskv_hf.attention import compressed_attention
from cskv_hf.attention_function import column_masks
from cskv_hf.evaluate.memory import held_nbytes

SETTINGS = (
    Setting(0.8, "head", 16),
    Setting(0.8, "joint", 16),
    Setting(0.8, "head"),
    Setting(0.95, "head"),
    Setting(0.95, "joint"),
)
PACKED = "SDPA, queries packed"  # of a KV head, as queries of one head, whose keys are then read once
PRUNED = "20% of the tokens"  # in a DynamicCache: what is left of a prompt that a press of kvpress pruned by 80 %
OTHERS = ("StaticCache", PRUNED, "quanto 4 bit", "hqq 4 bit")


def attention_module(sizes: Sizes) -> nn.Module:
    """What transformers' attention function looks at in a model's attention."""
    module = nn.Module().eval()
    module.num_key_value_groups = sizes.num_attention_heads // sizes.num_key_value_heads
    module.is_causal = True
    return module


def model_config(sizes: Sizes, layers: int) -> LlamaConfig:
    return LlamaConfig(**vars(sizes), num_hidden_layers=layers, attn_implementation="sdpa")


def dynamic_cache(sizes: Sizes, layers: int, states: RandomStates, length: int, new: int = 1) -> tuple[Callable, int]:
    cache = DynamicCache()
    step = update_step(cache, sizes, layers, states, length, new)
    return step, 2 * cache.layers[0].keys.nbytes


def update_step(cache: Cache, sizes: Sizes, layers: int, states: RandomStates, length: int, new: int) -> Callable:
    """Fills a cache of transformers with `length` tokens; returns a step of all layers and `new` tokens."""
    module, query, scaling = attention_module(sizes), states.query(new), sizes.head_dim**-0.5
    for layer_idx in range(layers):
        cache.update(states(length), states(length), layer_idx)
    config, embedded = model_config(sizes, layers), torch.empty(states.batch, new, 1, device=states.device)

    def step() -> None:
        # one query needs no mask unless the cache is longer than what it holds
        mask = create_causal_mask(config, embedded, None, cache) if cache.is_compileable or new > 1 else None
        for layer_idx in range(layers):
            keys, values = cache.update(states(new), states(new), layer_idx)
            sdpa_attention_forward(module, query, keys, values, mask, scaling=scaling)

    return step


def full_caches(
    sizes: Sizes, layers: int, states: RandomStates, length: int, new: int = 1
) -> dict[str, tuple[Callable, int]]:
    """Steps of the full caches, and the bytes of one layer that each has to read."""
    query = states.query(new)
    ready = [(states(length), states(length)) for _ in range(layers)]

    def ready_step() -> None:
        for keys, values in ready:
            F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    def packed_step() -> None:
        together = query.view(states.batch, sizes.num_key_value_heads, -1, sizes.head_dim)
        for keys, values in ready:
            F.scaled_dot_product_attention(together, keys, values)

    held = 2 * ready[0][0].nbytes
    steps = {
        "DynamicCache": dynamic_cache(sizes, layers, states, length, new),
        "SDPA, ready cache": (ready_step, held),
    }
    if new == 1:  # more would need a mask
        steps[PACKED] = packed_step, held
    return steps


def other_cache(
    name: str, sizes: Sizes, layers: int, states: RandomStates, length: int, new: int, steps: int
) -> tuple[Callable, int]:
    """A step of one of `OTHERS` and the bytes of one layer.

    Args:
        steps: that a StaticCache has room for.
    """
    config = model_config(sizes, layers)
    if name == "StaticCache":
        cache = StaticCache(config, max_cache_len=length + steps * new)
    elif name == PRUNED:
        cache, length = DynamicCache(), length // 5
    else:
        cache = QuantizedCache(name.split()[0], config, nbits=4)
    step = update_step(cache, sizes, layers, states, length, new)
    return step, held_nbytes(cache) // layers


def installed_others() -> list[str]:
    """Those of `OTHERS` whose library is there; says which are left out."""
    found = []
    for name in OTHERS:
        try:
            other_cache(name, Sizes(), 1, RandomStates(Sizes(), 1, "cpu", torch.float32), 64, 1, 1)
            found.append(name)
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return found


def compressed_cache(
    setting: Setting, sizes: Sizes, layers: int, states: RandomStates, length: int, new: int = 1
) -> tuple[Callable, int]:
    query, scaling = states.query(new), sizes.head_dim**-0.5
    filled = FilledCache(setting, sizes, layers, length, states)

    def step() -> None:
        for kv in filled.step(states, new):
            compressed_attention(query, kv, scaling, *column_masks(None, kv.step, None, query.device))

    return step, filled.cache.layers[0].nbytes


@torch.no_grad()
def measure(
    sizes: Sizes,
    settings: Iterable[Setting],
    layers: int,
    states: RandomStates,
    length: int,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    others: Iterable[str] = (),
    new: int = 1,
) -> list[dict]:
    """One row per way of caching: seconds per layer and step, and the bytes that a layer reads.

    Args:
        others: caches of transformers beside DynamicCache, of `OTHERS`.
        new: tokens of a step.
    """
    contestants = full_caches(sizes, layers, states, length, new)
    for name in others:
        contestants[name] = other_cache(name, sizes, layers, states, length, new, 2 * (rounds + 1))
    for setting in settings:
        contestants[setting.name] = compressed_cache(setting, sizes, layers, states, length, new)
    seconds = median_seconds({name: step for name, (step, _) in contestants.items()}, rounds, clock)
    return [
        {"cache": name, "length": length, "batch": states.batch, "seconds": seconds[name] / layers, "bytes": size}
        for name, (_, size) in contestants.items()
    ]


def print_table(rows: list[dict], bandwidth: float, new: int = 1) -> None:
    """Milliseconds and tokens per second of one layer, and the times relative to the full caches."""
    by_name = {row["cache"]: row for row in rows}
    dynamic, ready = (by_name[name]["seconds"] for name in ("DynamicCache", "SDPA, ready cache"))
    print(f"\n{rows[0]['length']} tokens x {rows[0]['batch']} rows")
    print(f"{'cache':<22}{'ms':>8}{'tokens/s':>10}{'x Dynamic':>10}{'x ready':>8}{'MB':>9}{'% bandwidth':>12}")
    for row in rows:
        share = 100 * row["bytes"] / bandwidth / row["seconds"]
        print(
            f"{row['cache']:<22}{1000 * row['seconds']:>8.2f}{row['batch'] * new / row['seconds']:>10.0f}"
            f"{row['seconds'] / dynamic:>10.2f}{row['seconds'] / ready:>8.2f}{row['bytes'] / 1e6:>9.1f}{share:>12.0f}"
        )


def sizes_of(model: str) -> Sizes:
    """Of the layers of a model, by its id or directory; only its config is read."""
    config = AutoConfig.from_pretrained(model).get_text_config()
    shape = ModelShape.from_model_config(config)
    return Sizes(config.hidden_size, config.num_attention_heads, shape.num_key_value_heads, shape.head_dim)


def refuse_short(parser: argparse.ArgumentParser, lengths: list[int]) -> None:
    """Ends with a message if a CSKVCache would compress nothing."""
    if min(lengths) < LEAST_LENGTH:
        parser.error(
            f"`--lengths` {min(lengths)}: a CSKVCache compresses nothing of fewer than {LEAST_LENGTH} tokens (sinks, "
            "window and a block), so there is nothing to measure. Give longer ones."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="take the sizes of this model's layers; default: those of Llama-3.1-8B")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192, 16384])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--new", type=int, default=1, help="tokens of a step, as when a speculation is verified")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--torch", action="store_true", help="without the kernels compiled for this CPU")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON; adds a run to a file that is there")
    args = parser.parse_args()
    refuse_short(parser, args.lengths)
    torch.set_num_threads(args.threads)
    if args.torch:
        leave_out_kernels()
    torch.manual_seed(0)
    sizes = sizes_of(args.model) if args.model else Sizes()
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    about = {
        "machine": machine(args.threads),
        "device": args.device,
        "sizes": vars(sizes),
        "dtype": str(dtype),
        "layers": args.layers,
        "lengths": args.lengths,
        "batch": args.batch,
        "new": args.new,
        "plans": {setting.name: plan_summary(setting, sizes) for setting in SETTINGS},
    }
    earlier = earlier_runs(args.out, about)
    bandwidth, others = copy_bandwidth(args.device), installed_others()
    rows = []
    for length in args.lengths:
        for batch in args.batch:
            states = RandomStates(sizes, batch, args.device, dtype)
            try:
                run = (sizes, SETTINGS, args.layers, states, length, args.rounds)
                measured = measure(*run, others=others, new=args.new)
            except torch.OutOfMemoryError:
                print(f"\n{length} tokens x {batch} rows do not fit into the GPU's memory")
                continue
            print_table(measured, bandwidth, args.new)
            rows += measured
            save(args.out, about | {"copy_bandwidth": bandwidth, "runs": [*earlier, rows]})


if __name__ == "__main__":
    main()

"""How long a fit computes per layer of an 8B-shaped model, the pass over the data aside: python benchmarks/fit.py

One attention layer of Llama-3.1-8B's sizes (hidden 4096, 32 query heads, 8 KV heads x 128) with random weights and
moments, through the functions that `fit` calls: error weights, factors of keys and values, and the layer's report; and
the allocation of bits to all channels of 32 such layers at 95 %. The pass over the data is one forward of the model;
probing the sensitivity is two forwards per layer over 1,024 tokens, and is not part of this either.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from cskv_hf import CSKVConfig, KVStatistics, ModelShape
from cskv_hf.config import num_key_groups
from cskv_hf.fitting import layer_bases, layer_report
from cskv_hf.plan import plan

SIZES = dict(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128, num_hidden_layers=1)
TOKENS = 8192


def moment(size: int) -> torch.Tensor:
    x = torch.randn(TOKENS, size) * torch.logspace(0, -3, size)
    return (x.mT @ x).double()


def statistics_of_one_layer(shape: ModelShape, hidden_size: int) -> KVStatistics:
    statistics = KVStatistics.empty(shape, hidden_size)
    statistics.num_tokens = TOKENS
    statistics.key_moment[0], statistics.value_moment[0] = moment(shape.kv_dim), moment(shape.kv_dim)
    statistics.query_moment[0] = torch.stack([moment(shape.head_dim) for _ in range(shape.num_key_value_heads)])
    return statistics


def fit_layer(attention: LlamaAttention, statistics: KVStatistics, key_layout: str) -> float:
    """Seconds for one layer."""
    shape = ModelShape(**statistics.model_shape)
    config = CSKVConfig(compression=0.8, key_layout=key_layout, bits=16, allocation="uniform")
    ((key_rank, value_rank),) = config.layer_ranks(shape)
    started = time.perf_counter()
    keys, values = layer_bases(attention, statistics, 0, config, num_key_groups(key_layout, shape.num_key_value_heads))
    groups = len(keys.ranks)
    keys, values = keys.cut([key_rank // groups] * groups), values.cut([value_rank])
    config.key_ranks, config.value_ranks = [list(keys.ranks)], list(values.ranks)
    layer_report(attention, statistics, 0, config, keys, values)
    return time.perf_counter() - started


def allocate_model(key_layout: str) -> float:
    """Seconds to plan a model of 32 layers; the same plan twice."""
    shape = ModelShape("llama", 32, SIZES["num_key_value_heads"], SIZES["head_dim"])
    groups = num_key_groups(key_layout, shape.num_key_value_heads)
    config = CSKVConfig(compression=0.95, key_layout=key_layout)
    config.sensitivity = torch.rand(32, 2).tolist()

    def spectrum(channels: int) -> torch.Tensor:
        return torch.rand(channels).double().pow(6).sort(descending=True)[0]

    spectra = [([spectrum(shape.kv_dim // groups) for _ in range(groups)], spectrum(shape.kv_dim)) for _ in range(32)]
    started = time.perf_counter()
    planned = plan(config, shape, spectra)
    seconds = time.perf_counter() - started
    assert plan(config, shape, spectra) == planned
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model_config = LlamaConfig(**SIZES)
    attention = LlamaAttention(model_config, layer_idx=0)
    statistics = statistics_of_one_layer(ModelShape.from_model_config(model_config), model_config.hidden_size)
    results = {}
    print(f"{'key layout':<12}{'median s':>10}{'max s':>8}   one layer, K and V, {args.threads} threads")
    for layout in ("head", "group:2", "joint"):
        times = sorted(fit_layer(attention, statistics, layout) for _ in range(args.repeats))
        results[layout] = times
        print(f"{layout:<12}{times[len(times) // 2]:>10.2f}{times[-1]:>8.2f}")
    allocation = {layout: allocate_model(layout) for layout in results}
    for layout, seconds in allocation.items():
        print(f"{layout:<12}{seconds:>10.2f}           allocation, 32 layers")
    if args.out:
        machine = {"cpu": platform.machine(), "threads": args.threads, "torch": torch.__version__}
        args.out.write_text(json.dumps({"machine": machine, "seconds": results, "allocation": allocation}, indent=1))


if __name__ == "__main__":
    main()

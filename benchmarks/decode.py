"""Time of one decode step of one attention layer, CSKV against full caches: python benchmarks/decode.py

A step of a layer is what its attention does between the projections: put one token's keys and values into the cache
and attend to everything in it. Several layers with caches of their own take turns, as in a model, so that no layer
finds its cache in the processor's, and what a model does once per step (positions, cos and sin) is paid once per step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import FilledCache, Setting, Sizes, median_seconds
from torch import nn
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cskv_hf.attention import compressed_attention

SETTINGS = (
    Setting(0.8, "head", 16),
    Setting(0.8, "joint", 16),
    Setting(0.8, "head"),
    Setting(0.8, "joint"),
    Setting(0.95, "head"),
    Setting(0.95, "joint"),
)


def full_contestants(sizes: Sizes, layers: int, states: Callable) -> dict[str, Callable]:
    """DynamicCache through transformers' own attention function, and SDPA on keys and values that are simply there."""
    module = nn.Module().eval()
    module.num_key_value_groups = sizes.num_attention_heads // sizes.num_key_value_heads
    module.is_causal = True
    query, scaling = states.query(), sizes.head_dim**-0.5
    dynamic = DynamicCache()
    ready = [(states(states.length), states(states.length)) for _ in range(layers)]
    for layer_idx, (keys, values) in enumerate(ready):
        dynamic.update(keys, values, layer_idx)

    def dynamic_step():
        for layer_idx in range(layers):
            keys, values = dynamic.update(states(1), states(1), layer_idx)
            sdpa_attention_forward(module, query, keys, values, None, scaling=scaling)

    def ready_step():
        for keys, values in ready:
            F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    return {"DynamicCache": dynamic_step, "SDPA, ready cache": ready_step}


class RandomStates:
    def __init__(self, sizes: Sizes, batch: int, length: int, device: str, dtype: torch.dtype) -> None:
        self.sizes, self.batch, self.length, self.device, self.dtype = sizes, batch, length, device, dtype

    def __call__(self, tokens: int, heads: int | None = None) -> torch.Tensor:
        shape = self.batch, heads or self.sizes.num_key_value_heads, tokens, self.sizes.head_dim
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def query(self, tokens: int = 1) -> torch.Tensor:
        return self(tokens, self.sizes.num_attention_heads)


@torch.no_grad()
def layer_times(sizes: Sizes, settings, layers: int, states: RandomStates, rounds: int) -> dict[str, float]:
    """Seconds per layer and step."""
    query, scaling = states.query(), sizes.head_dim**-0.5
    contestants = full_contestants(sizes, layers, states)
    for setting in settings:
        filled = FilledCache(setting, sizes, layers, states.length, states)

        def step(filled=filled):
            for kv in filled.step(states):
                compressed_attention(query, kv, scaling)

        contestants[setting.name] = step
    return {name: t / layers for name, t in median_seconds(contestants, rounds).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    states = RandomStates(Sizes(), args.batch, args.length, "cpu", torch.float32)
    times = layer_times(Sizes(), SETTINGS, args.layers, states, args.rounds)
    for name, t in times.items():
        print(
            f"{name:<24}{1000 * t:>10.2f} ms {t / times['DynamicCache']:>8.2f}  {t / times['SDPA, ready cache']:.2f}"
        )


if __name__ == "__main__":
    main()

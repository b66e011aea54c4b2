"""What a layer with a sliding window holds, by the length of the text: python benchmarks/sliding.py

A small Qwen2 with random weights whose second layer slides; bytes are counted on the tensors. Its first layer, of the
same ranks, is what the second would hold if nothing were dropped.
"""

from __future__ import annotations

import argparse

import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

import cskv_hf

SIZES = dict(
    vocab_size=256, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, head_dim=32, use_sliding_window=True, max_window_layers=1,
)  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--window", type=int, default=1024, help="the sliding window, in tokens")
    parser.add_argument("--compression", type=float, default=0.8)
    parser.add_argument("--windows", type=float, nargs="+", default=[0.25, 0.5, 1, 2, 5, 6, 12])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    longest = int(max(arguments.windows) * arguments.window)
    config = Qwen2Config(**SIZES, sliding_window=arguments.window, max_position_embeddings=longest)
    model = Qwen2ForCausalLM(config).eval()
    text = torch.randint(0, SIZES["vocab_size"], (1, longest))
    settings = cskv_hf.CSKVConfig(compression=arguments.compression, allocation="uniform")
    model = cskv_hf.fit(model, [text[:, :512]], settings, progress=False)
    caches = {"exact": DynamicCache(config=config), "CSKV": cskv_hf.CSKVCache()}
    full = 2 * 2 * SIZES["num_key_value_heads"] * SIZES["head_dim"]  # bytes of a token, in 16 bits
    print(f"sliding window {arguments.window}, compression {arguments.compression}; bytes as of a 16-bit model\n")
    print(f"{'tokens':>8} {'exact, all':>12} {'exact, window':>14} {'CSKV, all':>12} {'CSKV, dropping':>15}")
    read = 0
    for length in sorted(int(n * arguments.window) for n in arguments.windows):
        while read < length:
            part = slice(read, min(read + 512, length))
            for cache in caches.values():
                model(text[:, part], past_key_values=cache, use_cache=True, logits_to_keep=1)
            read = part.stop
        window = bytes_of((caches["exact"].layers[1].keys, caches["exact"].layers[1].values))
        held = [bytes_of(t for x in layer.tensors().values() for t in x) for layer in caches["CSKV"].layers]
        print(f"{length:>8,} {length * full:>12,} {window:>14,} {held[0]:>12,} {held[1]:>15,}")


def bytes_of(tensors) -> int:
    """As a 16-bit model holds them."""
    return sum(t.numel() * (2 if t.dtype == torch.float32 else t.itemsize) for t in tensors)


if __name__ == "__main__":
    main()

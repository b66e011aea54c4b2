"""A long life, run by hand: python tests/soak.py (some minutes; not collected by pytest)

20,000 tokens generated in one cache, then 500 short conversations over a pool of caches that are reset and used again:
no byte beyond the formula, no NaN, and the logits at checkpoints those of a cache made from the same tokens afresh.
"""

import argparse
import time

import torch
from conftest import lossy, make_model, prompt

from cskv_hf import CSKVCache

SETTINGS = dict(compression=0.75, bits=None, allocation=None, block_size=8)


def expected_bytes(model, tokens, held):
    """The formula, for a cache whose window holds what it holds."""
    config = model.peft_config["default"]
    shape = model.config
    exact = (held.num_sinks + held.num_recent) * shape.num_hidden_layers * 2 * shape.num_key_value_heads
    latent = held.num_old * (config.bytes_per_token(shape) - 4)
    return exact * shape.head_dim * 4 + round(latent) + tokens * 4 + 4 * shape.head_dim // 2


@torch.no_grad()
def long_generation(model, total):
    cache, ids, fed = CSKVCache(), prompt(1, 40), [prompt(1, 40)]
    started = time.perf_counter()
    for step in range(total):
        logits = model(ids, past_key_values=cache, use_cache=True).logits[:, -1]
        assert torch.isfinite(logits).all(), step
        ids = torch.multinomial(logits.softmax(-1), 1, generator=GENERATOR)
        fed.append(ids)
        tokens = 40 + step
        if step in (total // 100, total // 10, total - 1):
            assert cache.nbytes == expected_bytes(model, tokens, cache.tokens), step
            fresh, history = CSKVCache(), torch.cat(fed[:-1], 1)
            model(history[:, :40], past_key_values=fresh, use_cache=True)
            for i in range(40, tokens):  # one by one, as they came
                again = model(history[:, i : i + 1], past_key_values=fresh, use_cache=True).logits[:, -1]
            torch.testing.assert_close(again, logits, atol=1e-4, rtol=1e-4)
            print(f"{tokens:>7} tokens  {cache.nbytes:>10,} bytes, as the formula; logits as afresh", flush=True)
    print(f"{total} tokens in {time.perf_counter() - started:.0f} s, checkpoints included")


@torch.no_grad()
def conversations(model, count):
    """Each of three turns of a random length; a used cache gives what a new one gives."""
    pool = [CSKVCache() for _ in range(8)]
    for i in range(count):
        used, new = pool[i % 8], CSKVCache()
        used.reset()
        assert used.nbytes == 0
        history = prompt(1, 20 + i % 37, seed=i)
        for turn in range(3):
            outputs = [
                model.generate(history, past_key_values=cache, max_new_tokens=6, do_sample=False)
                for cache in (used, new)
            ]
            assert torch.equal(*outputs), (i, turn)
            history = torch.cat([outputs[0], prompt(1, 5 + turn, seed=i)], 1)
        assert used.nbytes == new.nbytes
    print(f"{count} conversations over 8 caches: tokens and bytes those of new ones")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--conversations", type=int, default=500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    GENERATOR = torch.Generator().manual_seed(0)
    MODEL = lossy(make_model(dtype=torch.float32, max_position_embeddings=40_000), **SETTINGS)
    long_generation(MODEL, arguments.tokens)
    conversations(MODEL, arguments.conversations)

"""How long the linear algebra of a fit takes for one layer of an 8B-shaped model: python benchmarks/fit.py

Hidden size 4096, 32 query heads, 8 KV heads x 128. The statistics pass is one forward over the data and is not part
of this.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from cskv_hf.decompose import key_weight, normalized, optimal_factors, value_weight

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 4096, 32, 8, 128
KV_DIM = KV_HEADS * HEAD_DIM


def moment(size: int, tokens: int = 8192) -> torch.Tensor:
    x = torch.randn(tokens, size) * torch.logspace(0, -3, size)
    return (x.mT @ x).double() / tokens


def fit_layer(layout_groups: int, compression: float) -> float:
    torch.manual_seed(0)
    keys, values = moment(KV_DIM), moment(KV_DIM)
    queries = torch.stack([moment(HEAD_DIM) for _ in range(KV_HEADS)])
    output = torch.randn(HIDDEN, HEADS * HEAD_DIM)
    rank = int((1 - compression) * KV_DIM)
    start = time.perf_counter()
    normalized(optimal_factors(keys, rank, layout_groups, key_weight(queries)), keys)
    normalized(optimal_factors(values, rank, 1, value_weight(output, KV_HEADS, HEAD_DIM)), values)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    print(f"{'key layout':<12}{'median s':>10}{'max s':>8}   one layer, K and V, {args.threads} threads")
    for name, groups in (("head", KV_HEADS), ("group:2", KV_HEADS // 2), ("joint", 1)):
        times = sorted(fit_layer(groups, 0.8) for _ in range(args.repeats))
        results[name] = times
        print(f"{name:<12}{times[len(times) // 2]:>10.2f}{times[-1]:>8.2f}")
    if args.out:
        machine = {
            "cpu": platform.processor() or platform.machine(),
            "threads": args.threads,
            "torch": torch.__version__,
        }
        args.out.write_text(json.dumps({"machine": machine, "seconds": results}, indent=1))


if __name__ == "__main__":
    main()

"""Longest context and largest batch that fit into memory, CSKV against DynamicCache: python benchmarks/capacity.py

Layers of Llama-3.1-8B's sizes in bfloat16 and nothing else: a model's weights and activations are not counted. Every
try fills a cache and measures the peak of decoding from it as benchmarks/memory.py does; a formula only says which
tries are hopeless. On a GPU a try also fails if memory ends while the cache is filled. On a CPU every try is a process
of its own, and the budget has to be there: it is only what the peak is compared with. A CPU takes minutes per try and
GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import Sizes, machine, plan_summary, save
from decode import SETTINGS
from memory import measure_here

NAMES = ("DynamicCache", *(setting.name for setting in SETTINGS))
UNIT = 256  # tokens: after a prompt of whole blocks a block leaves the window within the steps that are measured


def largest(fits: Callable[[int], bool], bound: int, tolerance: float = 0.05) -> int:
    """The largest number up to `bound` that fits, or one that is less by at most `tolerance` of it; 0 if none does.

    Doubles from an eighth of the bound, as tries beyond what fits cost most, and then bisects.

    Args:
        fits: whether a number fits; has to hold for every smaller number if it holds for one.
        bound: nothing beyond it is tried.
    """
    low, high = 0, bound + 1
    number = max(1, bound // 8)
    while low < bound:
        if not fits(number):
            high = number
            break
        low, number = number, min(2 * number, bound)
    while high - low > max(1, tolerance * low):
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def bytes_per_token(name: str, sizes: Sizes) -> float:
    """Of one layer, sinks and window left out: what a cache takes at least."""
    if name == "DynamicCache":
        return 2 * sizes.kv_dim * torch.bfloat16.itemsize
    return plan_summary(next(s for s in SETTINGS if s.name == name), sizes)["bytes_per_token"]


def peak_bytes(name: str, layers: int, length: int, batch: int, device: str) -> int | None:
    """Measured in a new process, or on a GPU, whose allocator counts, here; None if the GPU's memory ended."""
    if device != "cpu":
        return peak_here(name, layers, length, batch, device)
    command = [sys.executable, __file__, "--only", name, "--layers", str(layers), "--device", device]
    command += ["--length", str(length), "--batch", str(batch)]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def peak_here(name: str, layers: int, length: int, batch: int, device: str) -> int | None:
    try:
        return measure_here(name, layers, length, device, batch)[1]
    except torch.OutOfMemoryError:
        return None


def capacity(name: str, layers: int, length: int, budget: float, device: str) -> dict:
    """A row of the table, with all tries: (tokens, batch, peak)."""
    tries = []
    bound = int(budget / layers / bytes_per_token(name, Sizes()))  # tokens of all rows of a batch

    def fits(tokens: int, batch: int) -> bool:
        tries.append((tokens, batch, peak_bytes(name, layers, tokens, batch, device)))
        return tries[-1][2] is not None and tries[-1][2] <= budget

    context = UNIT * largest(lambda units: fits(UNIT * units, 1), bound // UNIT)
    batch = largest(lambda rows: fits(length, rows), bound // length)
    return {"cache": name, "context": context, "batch": batch, "tries": tries}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=4096, help="tokens of every row in the search for the batch")
    names = ", ".join(f'"{name}"'.replace("%", "%%") for name in NAMES)
    parser.add_argument(
        "--caches",
        nargs="+",
        default=NAMES,
        choices=NAMES,
        metavar="CACHE",
        help=f"of {names}; compared with the first",
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", type=float, help="GB for the cache; default: 90 %% of a GPU's free memory, else 4")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # the cache this process measures
    parser.add_argument("--batch", type=int, default=1, help=argparse.SUPPRESS)  # with --only
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.only:
        print(json.dumps(peak_here(args.only, args.layers, args.length, args.batch, args.device)))
        return
    budget = 1e9 * (args.budget or 4)
    if args.budget is None and args.device != "cpu":
        budget = 0.9 * torch.cuda.mem_get_info(args.device)[0]
    print(f"{budget / 1e9:.2f} GB, {args.layers} layers")
    print(f"{'cache':<22}{'context':>10}{'x Dynamic':>11}{f'rows of {args.length}':>16}{'x Dynamic':>11}")
    about = {"machine": machine(2), "layers": args.layers, "dtype": "bfloat16", "budget": budget}
    rows = []
    for name in args.caches:
        rows.append(capacity(name, args.layers, args.length, budget, args.device))
        context, batch = (rows[-1][key] / (rows[0][key] or float("nan")) for key in ("context", "batch"))
        print(f"{name:<22}{rows[-1]['context']:>10}{context:>11.1f}{rows[-1]['batch']:>16}{batch:>11.1f}", flush=True)
        save(args.out, about | {"length": args.length, "rows": rows})


if __name__ == "__main__":
    main()

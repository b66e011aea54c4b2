"""Peak memory of decoding beyond the weights, CSKV against DynamicCache: python benchmarks/memory.py

Each cache is filled and decoded from in a process of its own: layers of 8B sizes in bfloat16, `update` and attention
as in a model, nothing else in the process. The peak is the operating system's (`VmHWM`, reset once the cache is
filled) less what the process held before there was a cache; on a GPU, the allocator's.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import decode
import torch
from common import FilledCache, RandomStates, Setting, Sizes, machine, save

from cskv_hf.attention import compressed_attention

SETTINGS = (
    Setting(0.8, "head", 16),
    Setting(0.8, "head"),
    Setting(0.95, "head"),
    Setting(0.95, "joint"),
)
STEPS = 8  # after a prompt of whole blocks, a block leaves the window within the first four


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def settle() -> None:
    """Give freed memory back and begin a new peak."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def measure_here(name: str, layers: int, length: int, device: str, batch: int = 1) -> tuple[int, int]:
    """Bytes that a filled cache holds, and the peak of decoding from it; the cache by its name in decode.py."""
    sizes, states = Sizes(), RandomStates(Sizes(), batch, device, torch.bfloat16)
    query, on_gpu = states.query(), device != "cpu"
    single = RandomStates(sizes, 1, device, torch.bfloat16)
    warm = FilledCache(Setting(0.8), sizes, 1, 4096, single)  # libraries keep buffers from their first use on
    compressed_attention(single.query(), next(warm.step(single)), 0.1)
    del warm
    if on_gpu:
        before = torch.cuda.memory_allocated()
    else:
        settle()
        before = resident("VmRSS")
    step, held = step_of(name, sizes, layers, states, length, query)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        settle()
    for _ in range(STEPS):
        step()
    return held, (torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")) - before


def step_of(
    name: str, sizes: Sizes, layers: int, states: RandomStates, length: int, query: torch.Tensor
) -> tuple[Callable, int]:
    if name == "DynamicCache":
        step, held = decode.dynamic_cache(sizes, layers, states, length)
        return step, held * layers
    setting = next(setting for setting in decode.SETTINGS if setting.name == name)
    filled = FilledCache(setting, sizes, layers, length, states)

    def step() -> None:
        for kv in filled.step(states):
            compressed_attention(query, kv, 0.1)

    return step, filled.cache.nbytes


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # the cache this process measures
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.only:
        print(json.dumps(measure_here(args.only, args.layers, args.length, args.device)))
        return
    about = {"machine": machine(2), "length": args.length, "layers": args.layers, "dtype": "bfloat16"}
    rows = []
    print(f"{args.length} tokens, {args.layers} layers")
    print(f"{'cache':<22}{'cache MB':>10}{'peak MB':>10}{'% of Dynamic':>14}")
    for name in ("DynamicCache", *(setting.name for setting in SETTINGS)):
        command = [sys.executable, __file__, "--only", name, "--layers", str(args.layers)]
        command += ["--length", str(args.length), "--device", args.device]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        held, peak = json.loads(out.splitlines()[-1])
        rows.append({"cache": name, "held": held, "peak": peak})
        print(f"{name:<22}{held / 1e6:>10.1f}{peak / 1e6:>10.1f}{100 * peak / rows[0]['peak']:>14.1f}", flush=True)
        save(args.out, about | {"rows": rows})


if __name__ == "__main__":
    main()

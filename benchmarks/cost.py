"""Predictions of `cskv_hf.cost` against measured steps of one attention layer: python benchmarks/cost.py

The device is measured and the steps are run side by side in one process, as benchmarks/decode.py runs them, so that
both meet the machine in the same state. With one thread the clock counts the processor's time of that thread, which
leaves out what else runs on a busy machine. `--against FILE` compares the device as it is measured now with the rows
of an earlier decode.py instead. Printed are seconds predicted over seconds measured. Processes differ: run it several
times.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import torch
from common import RandomStates, Setting, Sizes, earlier_runs, leave_out_kernels, machine, planned, save
from decode import OTHERS, PACKED, SETTINGS, measure, refuse_short

from cskv_hf import ModelShape
from cskv_hf.cost import compressed_work, full_seconds, kept_layers, seconds
from cskv_hf.rates import Device, measure_device

FULL = {"DynamicCache": False, "SDPA, ready cache": True}


def predicted(name: str, length: int, batch: int, sizes: Sizes, layers: int, device: Device) -> float:
    """Seconds of a step of one of `layers` alike layers, for a cache by its name in decode.py."""
    shape = ModelShape("llama", layers, sizes.num_key_value_heads, sizes.head_dim)
    if name in FULL:
        return full_seconds(shape, sizes.num_attention_heads, length, batch, device, ready=FULL[name])
    setting: Setting = next(s for s in SETTINGS if s.name == name)
    config = planned(setting, sizes, layers)
    kept = kept_layers(config, shape)[0]
    return seconds(compressed_work(kept, config, shape, sizes.num_attention_heads, length, batch, device), device)


def compare(runs: list[list[dict]], sizes: Sizes, layers: int, device: Device) -> list[dict]:
    """A row per cache and length: the median measured, predicted, and both relative to DynamicCache."""
    measured: dict[tuple[str, int, int], list[float]] = {}
    for row in (row for run in runs for row in run if row["cache"] not in (*OTHERS, PACKED)):
        measured.setdefault((row["cache"], row["length"], row["batch"]), []).append(row["seconds"])
    middle = {key: statistics.median(times) for key, times in measured.items()}
    rows = []
    for (name, length, batch), time_measured in middle.items():
        dynamic = predicted("DynamicCache", length, batch, sizes, layers, device)
        time_predicted = predicted(name, length, batch, sizes, layers, device)
        rows.append(
            {
                "cache": name,
                "length": length,
                "batch": batch,
                "measured": time_measured,
                "predicted": time_predicted,
                "measured_of_dynamic": time_measured / middle["DynamicCache", length, batch],
                "predicted_of_dynamic": time_predicted / dynamic,
            }
        )
    return rows


def print_table(rows: list[dict]) -> None:
    print(f"{'cache':<20}{'tokens':>8}{'measured':>10}{'predicted':>11}{'ratio':>7}{'x Dynamic':>11}{'predicted':>11}")
    for row in rows:
        print(
            f"{row['cache']:<20}{row['length']:>8}{1000 * row['measured']:>10.2f}{1000 * row['predicted']:>11.2f}"
            f"{row['predicted'] / row['measured']:>7.2f}{row['measured_of_dynamic']:>11.2f}"
            f"{row['predicted_of_dynamic']:>11.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--against", type=Path, help="JSON of decode.py to compare with, in place of fresh steps")
    parser.add_argument("--torch", action="store_true", help="without the kernels compiled for this CPU")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON; adds a run to a file that is there")
    args = parser.parse_args()
    refuse_short(parser, args.lengths)
    torch.set_num_threads(args.threads)
    if args.torch:
        leave_out_kernels()
    torch.manual_seed(0)
    clock = time.thread_time if args.device == "cpu" and args.threads == 1 else time.perf_counter
    sizes, layers, lengths, runs = Sizes(), args.layers, args.lengths, [[]]
    if args.against:
        against = json.loads(args.against.read_text(encoding="utf-8"))
        sizes, layers, runs = Sizes(**against["sizes"]), against["layers"], against["runs"]
        lengths = sorted({row["length"] for run in runs for row in run})
    about = {
        "machine": machine(args.threads),
        "device": args.device,
        "clock": clock.__name__,
        "against": args.against and args.against.name,
        "sizes": vars(sizes),
        "layers": layers,
        "lengths": lengths,
    }
    earlier = earlier_runs(args.out, about)
    device = measure_device(args.device, clock=clock)
    if not args.against:
        for length in args.lengths:
            states = RandomStates(sizes, 1, args.device, device.dtype)
            runs[0] += measure(sizes, SETTINGS, layers, states, length, args.rounds, clock)
    rows = compare(runs, sizes, layers, device)
    print(device)
    print_table(rows)
    run = {"device": dataclasses.asdict(device) | {"dtype": str(device.dtype)}, "rows": rows}
    save(args.out, about | {"runs": [*earlier, run]})


if __name__ == "__main__":
    main()

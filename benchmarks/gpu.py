"""Everything that is to be measured on a GPU, in one go: python benchmarks/gpu.py OUT [--minutes 12]

Every benchmark of speed and memory, each in a process of its own, which prints its table and leaves its JSON in the
folder OUT, and the tests of the kernels on the GPU that is there, which compile for minutes: only those of what the
next benchmark uses come early. One that fails does not stop the others, and none is begun once the minutes are over.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "kernels": "benchmarks/gpu_kernels.py --out {out}",
    "tests of Hopper": "-m pytest tests/test_hopper_kernel.py",
    "tests of packing": "-m pytest tests/test_gpu_kernels.py -k quantises",
    "step-recorded": "benchmarks/step.py --backend cudagraphs --layers 2 --compression 0.95 --out {out}",
    "prefill": "benchmarks/prefill.py --length 8192 --out {out}",
    "memory": "benchmarks/memory.py --out {out}",
    "decode": "benchmarks/decode.py --lengths 32768 --batch 1 16 --out {out}",
    "step": "benchmarks/step.py --layers 2 --compression 0.95 --out {out}",
    "tests": "-m pytest tests/test_gpu_kernels.py",
    "decode-short": "benchmarks/decode.py --lengths 1024 8192 --batch 1 --out {out}",
    "cost": "benchmarks/cost.py --lengths 8192 32768 --out {out}",
    "capacity": "benchmarks/capacity.py --out {out}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for the JSON")
    parser.add_argument("--minutes", type=float, default=12, help="after which nothing new is begun")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}  # of this checkout, installed or not
    started, failed = time.monotonic(), []
    for name, command in COMMANDS.items():
        if time.monotonic() - started > 60 * args.minutes:
            print(f"not begun: {name}")
            continue
        words = [word.format(out=args.out.resolve() / f"{name}-gpu.json") for word in command.split()]
        device = ["--device", args.device] if not name.startswith("tests") else []
        print(f"\n== {name}", flush=True)
        if subprocess.run([sys.executable, *words, *device], cwd=ROOT, env=environment).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

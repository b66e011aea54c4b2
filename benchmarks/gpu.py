"""Everything that is to be measured on a GPU, in one go: python benchmarks/gpu.py OUT [--minutes 12]

Every benchmark of speed and memory, each in a process of its own, which prints its table and leaves its JSON in the
folder OUT; first the tests of the kernels on the GPU that is there. What compiles longest comes last.
One that fails does not stop the others. What is not finished once the minutes are over is ended, which counts as
failed, as does what was not begun; what a benchmark had measured until then is in its JSON.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECORDED = "benchmarks/step.py --backend recorded --out {out}"
COMMANDS = {
    "tests": "-m pytest -n 8 --dist load tests/test_gpu_kernels.py tests/test_hopper_kernel.py -k 'not not_here'",
    "kernels": "benchmarks/gpu_kernels.py --out {out}",
    "step-8b": RECORDED + " --layers 32 --vocabulary 128256 --length 32768 --compression 0.95 --bits 4 --rounds 2",
    "step-rows": RECORDED + " --layers 4 --length 32768 --batch 8 --compression 0.95 --bits 4 --rounds 2",
    "step-recorded": RECORDED + " --layers 2 --rounds 3",
    "prefill": "benchmarks/prefill.py --layers 4 --length 8192 --out {out}",
    "memory": "benchmarks/memory.py --out {out}",
    "decode": "benchmarks/decode.py --lengths 32768 --batch 1 16 --out {out}",
    "decode-short": "benchmarks/decode.py --lengths 1024 8192 --batch 1 --out {out}",
    "cost": "benchmarks/cost.py --lengths 8192 32768 --out {out}",
    "capacity": "benchmarks/capacity.py --layers 4 --budget 0.5 --caches DynamicCache '80% head packed'"
    " '95% head packed' --out {out}",
    "step": "benchmarks/step.py --layers 2 --compression 0.95 --bits 4 --rounds 3 --out {out}",
}


def problem_of(command: list[str], seconds: float) -> str | None:
    """Runs a command of this checkout, for so many seconds at most; returns what went wrong, or None."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}  # installed or not
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(seconds)
        return f"exit code {code}" if code else None
    except subprocess.TimeoutExpired:
        return "ended when time was up"
    finally:
        if process.returncode is None:  # with the processes that it has started
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for the JSON")
    parser.add_argument("--minutes", type=float, default=12, help="for everything")
    parser.add_argument("--device", default="cuda")
    names = ", ".join(f'"{name}"' if " " in name else name for name in COMMANDS)
    parser.add_argument(
        "--only", nargs="+", choices=COMMANDS, default=list(COMMANDS), metavar="NAME", help=f"some of {names}"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + 60 * args.minutes, []
    for name in args.only:
        left, problem = end - time.monotonic(), "not begun, time was up"
        if left > 0:
            words = [word.format(out=args.out.resolve() / f"{name}-gpu.json") for word in shlex.split(COMMANDS[name])]
            device = ["--device", args.device] if not name.startswith("tests") else []
            print(f"\n== {name}", flush=True)
            problem = problem_of([sys.executable, *words, *device], left)
        if problem:
            failed.append(f"{name} ({problem})")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

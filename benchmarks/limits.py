"""Where compression stops working, and how fast: python benchmarks/limits.py [MODEL TEXT] [--out FILE.json]

Four tables on one model, measured as in quality.py: more and fewer exact tokens, keys against values, quantisers, and
calibration data. By default on the bundled model and its text.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
import transformers
from quality import PLAIN, Bench

from cskv_hf import collect_statistics

TABLES = ("exact", "sides", "quantiser", "calibration")


def exact(bench: Bench) -> None:
    bench.header("More and fewer exact tokens")
    for window, sinks in ((32, 4), (64, 4), (96, 4), (32, 0), (32, 16)):
        bench.run("exact", f"window {window}, sinks {sinks}", compression=0.95, window=window, sinks=sinks)


def sides(bench: Bench) -> None:
    """The same bytes, most of them for keys or for values."""
    bench.header("Keys against values: ranks of the same sum, 16 bits, the same in every layer")
    total = round(0.4 * bench.shape.kv_dim)
    for share in (0.25, 0.5, 0.75):
        ranks = dict(key_rank=round(share * total), value_rank=total - round(share * total))
        bench.run("sides", f"{100 * share:.0f} % for keys", bits=16, **ranks)


def quantiser(bench: Bench) -> None:
    """Half of the channels at 4 bits, without training: the paper's quantiser and ours in its layout."""
    bench.header("4 bits after the fit, half of the channels, the same in every layer")
    half, value_group = bench.shape.kv_dim // 2, [1, bench.shape.kv_dim]
    settings = dict(key_rank=half, value_rank=half, center=False)
    for init in ("asvd", "attention"):
        bench.run("quantiser", f"{init}, 16 bits", init=init, bits=16, **settings)
        for name, clamped in (("its quantiser", True), ("our quantiser", False)):
            groups = dict(bits=4, key_group=[32, 1], value_group=value_group)
            bench.run("quantiser", f"{init}, {name}", clamped=clamped, init=init, **groups, **settings)


def calibration(bench: Bench) -> None:
    """Fewer tokens, and tokens drawn at random from the vocabulary."""
    bench.header("Calibration data")
    rows, length = len(bench.calibration), len(bench.calibration[0])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(bench.model.config.vocab_size, (rows, length), generator=generator)
    for name, data in (
        (f"{rows * length} tokens", bench.calibration),
        (f"{rows * length // 8} tokens", bench.calibration[: rows // 8]),
        (f"{rows * length // 64} tokens", bench.calibration[: rows // 64]),
        (f"{rows * length} random tokens", list(noise)),
    ):
        bench.fitting.statistics = collect_statistics(bench.model, data, progress=False)
        for compression in (0.8, 0.95):
            bench.run("calibration", f"{100 * compression:.0f} %, {name}", compression=compression)
    bench.run("calibration", "80 %, svd, no data at all", compression=0.8, init="svd", **PLAIN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="bundled", help="directory or id, or 'bundled'")
    parser.add_argument("text", nargs="?", default="bundled", help="file, or 'bundled'")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--length", type=int, default=320, help="tokens per row")
    parser.add_argument("--rows", type=int, default=64, help="rows to evaluate on")
    parser.add_argument("--calibration-rows", type=int, default=128)
    parser.add_argument("--records", type=int, default=30, help="of line retrieval, 8 questions each (bundled model)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tables", default=",".join(TABLES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    bench = Bench(args)
    for table in (exact, sides, quantiser, calibration):
        if table.__name__ in args.tables.split(","):
            table(bench)
    if args.out:
        machine = {"cpu": platform.machine(), "threads": args.threads, "torch": torch.__version__}
        machine |= {"transformers": transformers.__version__, "python": platform.python_version()}
        settings = {k: str(v) for k, v in vars(args).items() if k not in ("out", "model", "text")}
        settings |= {"model": Path(args.model).name, "text": Path(args.text).name}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine, "settings": settings, "rows": bench.results}, indent=1))


if __name__ == "__main__":
    main()

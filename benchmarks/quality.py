"""What a smaller cache costs in quality: python benchmarks/quality.py MODEL TEXT [--out FILE.json]

For the full cache, the paper's recipe and ours, at 50 to 95 % removed: bytes per old token (counted on the tensors),
perplexity with a compressed past, and KL divergence and next-token agreement against the full cache. A second table
shows what each step of ours gains, a third compares the key layouts, a fourth what quantisation alone costs, a fifth
other ways to spend the same bytes, and two more, if named by ``--tables``, ours alone (``ratios``) and how many tokens
the allocation's probe needs (``probes``).

MODEL is a directory or id, TEXT a file of documents separated by ``<|endoftext|>`` or blank lines, or JSON lines;
``bundled bundled`` runs the bundled model on the text of the demo, with line retrieval on top. Calibration, training
and evaluation use different documents.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import cskv_hf
from cskv_hf import CSKVCache, CSKVConfig, ModelShape, collect_statistics
from cskv_hf.demo import run as demo
from cskv_hf.evaluate.baselines import ClampedFormat, clamp_formats
from cskv_hf.evaluate.divergence import compare_with_full_cache
from cskv_hf.evaluate.lines import line_retrieval
from cskv_hf.evaluate.memory import cache_nbytes
from cskv_hf.evaluate.methods import Calibration, train_in_place
from cskv_hf.files import replace_file
from cskv_hf.latents import PlainFormat
from cskv_hf.quantize import RANGE_BYTES
from cskv_hf.recall import longest_sample, recalled
from cskv_hf.texts import documents
from cskv_hf.tuner import sidecars

PLAIN = dict(bits=16, allocation="uniform")
PAPER_4 = dict(bits=4, allocation="uniform", init="asvd", key_group=[32, 1])  # keys per channel; values below


class Bench:
    """One model with its data; `run` measures one way of compressing.

    Args:
        recall: in the calibration; the paper's ways to start go without in any case.
    """

    def __init__(self, args: argparse.Namespace, recall: bool = True) -> None:
        self.bundled = args.model == "bundled"
        self.records = []
        if self.bundled:
            self.model, self.tokenizer = demo.load_bundled()
            self.text = demo.evaluation_text(self.tokenizer)
            self.calibration = demo.calibration_data(self.tokenizer)
            self.records = demo.evaluation_records(args.records)
        else:
            self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(args.model)
            rows = self._rows(Path(args.text), args.length, args.rows + args.calibration_rows)
            self.text, self.calibration = torch.stack(rows[: args.rows]), rows[args.rows :]
        self.args = args
        self.shape = ModelShape.from_model_config(self.model.config)
        statistics = collect_statistics(self.model, self.calibration, recall=recall, progress=False)
        self.fitting = Calibration(statistics, self.calibration)
        self.full_bytes = 2 * self.shape.num_hidden_layers * 2 * self.shape.kv_dim
        self.results: list[dict] = []

    def _rows(self, path: Path, length: int, count: int) -> list[torch.Tensor]:
        """The first `length` tokens of the documents that are long enough."""
        texts = list(documents(path))
        if len(texts) == 1:
            separator = "<|endoftext|>" if "<|endoftext|>" in texts[0] else "\n\n"
            texts = texts[0].split(separator)
        for together in (1, 12):  # paragraphs of one long document may be too short, then several make a row
            rows = []
            for first in range(0, len(texts), together):
                ids = self.tokenizer("\n\n".join(texts[first : first + together]).strip())["input_ids"]
                if len(ids) >= length:
                    rows.append(torch.tensor(ids[:length]))
                if len(rows) == count:
                    return rows
        raise SystemExit(f"'{path}' has {len(rows)} documents of {length} tokens, {count} are needed.")

    def run(
        self, table: str, name: str, *, train: bool = False, clamped: bool = False, plain: bool = False, **settings
    ):
        """Fit, perhaps train, measure, print.

        Args:
            clamped: store latents with the paper's quantiser.
            plain: store the latents of a packed adapter unquantised.
        """
        started = time.perf_counter()
        config = CSKVConfig(**settings)
        try:
            model = cskv_hf.fit(self.model, self.fitting.for_init(config.init, self.model), config, progress=False)
        except ValueError as error:
            print(f"{name:<38} not possible: {error}", flush=True)
            return
        if clamped:
            clamp_formats(model)
        if plain:
            for sidecar in sidecars(model):
                formats = sidecar.formats["default"]
                sidecar.formats["default"] = tuple(PlainFormat(f.rank, f.block_size) for f in formats)
        if train:
            objective = "mse" if config.init == "asvd" else "attention"
            train_in_place(model, self.fitting, objective)
        self.measure(table, name, model, CSKVCache, config, started)
        self.model = model.unload()

    def probe_on(self, tokens: int, length: int, first: int) -> None:
        """The sensitivity is measured on so many tokens, pieces of at most `length`, from the row `first` on."""
        statistics = self.fitting.statistics
        statistics.probe_ids = statistics.probe_lengths = torch.zeros(0, dtype=torch.long)
        for row in self.calibration[first:]:
            statistics.add_probe(recalled(row[: longest_sample(min(length, tokens - len(statistics.probe_ids)))]))

    def measure(self, table, name, model, make_cache, config, started) -> None:
        result = compare_with_full_cache(model, self.text, make_cache)
        low, high = result.compressed.ratio_interval(result.full)
        short, long = (
            cache_nbytes(model, make_cache, self.text[:1, :length], torch.bfloat16) for length in (128, 256)
        )
        if isinstance(next(iter(sidecars(model))).formats["default"][0], ClampedFormat) if config else False:
            per_token = (
                sum(f.bytes_per_token(torch.bfloat16) for s in sidecars(model) for f in s.formats["default"]) + 4
            )
        else:
            per_token = (long - short) / 128
        row = {
            "table": table,
            "name": name,
            "bytes_per_token": per_token,
            "share": per_token / self.full_bytes,
            "perplexity": result.compressed.value,
            "ratio": result.ratio,
            "ratio_low": low,
            "ratio_high": high,
            "kl": result.kl,
            "agreement": result.agreement,
            "seconds": time.perf_counter() - started,
        }
        if self.records:
            accuracy = line_retrieval(model, self.tokenizer, self.records, make_cache)
            row |= {"accuracy": accuracy.value, "margin": accuracy.margin}
        self.results.append(row)
        self.save()
        margin = "       " if low is None else f"±{(high - low) / 2:.4f}"  # of few rows none is known
        retrieval = f"  {row['accuracy']:.3f} ±{row['margin']:.3f}" if self.records else ""
        print(
            f"{name:<38}{per_token:>8.1f}{100 * row['share']:>7.2f} %{row['ratio']:>9.4f} {margin}"
            f"{row['kl']:>9.5f}{100 * row['agreement']:>8.2f} %{retrieval}",
            flush=True,
        )

    def save(self) -> None:
        """All rows so far, so that a run that was stopped leaves them."""
        args = self.args
        if args.out is None:
            return
        machine = {"cpu": platform.machine(), "threads": args.threads, "torch": torch.__version__}
        machine |= {"transformers": transformers.__version__, "python": platform.python_version()}
        settings = {k: str(v) for k, v in vars(args).items() if k not in ("out", "model", "text")}
        settings |= {"model": Path(args.model).name, "text": Path(args.text).name}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(args.out, json.dumps({"machine": machine, "settings": settings, "rows": self.results}, indent=1))

    def header(self, title: str) -> None:
        retrieval = "   retrieval" if self.records else ""
        print(f"\n{title}")
        print(f"{'':<38}{'bytes':>8}{'kept':>9}{'perplexity':>10}{'':>8}{'KL':>9}{'same token':>10}{retrieval}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="directory or id, or 'bundled'")
    parser.add_argument("text", help="file, or 'bundled'")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--length", type=int, default=320, help="tokens per row")
    parser.add_argument("--rows", type=int, default=64, help="rows to evaluate on")
    parser.add_argument("--calibration-rows", type=int, default=128)
    parser.add_argument("--no-recall", dest="recall", action="store_false", help="read no row twice to calibrate")
    parser.add_argument("--records", type=int, default=30, help="of line retrieval, 8 questions each (bundled model)")
    parser.add_argument("--epochs", type=float, default=8.0, help="of training, on the calibration rows")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of training; the paper's 5e-5 is for 7B")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tables", default="methods,steps,layouts,quantisation,storage")
    parser.add_argument(
        "--compressions",
        type=float,
        nargs="+",
        default=[0.8, 0.9, 0.95],
        help="of ratios, steps, layouts and quantisation",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    bench = Bench(args, args.recall)
    bench.fitting.epochs, bench.fitting.learning_rate = args.epochs, args.learning_rate
    print(
        f"{args.model}: {bench.shape.num_hidden_layers} layers, kv_dim {bench.shape.kv_dim}; evaluated on "
        f"{bench.text.numel():,} tokens, calibrated on {bench.fitting.statistics.num_tokens:,}"
    )
    for side, share in zip(("keys", "values"), bench.fitting.statistics.mean_shares()):
        print(
            f"share of the mean in the mean square of {side}, by layer: {' '.join(f'{s:.2f}' for s in share.tolist())}"
        )
    tables = args.tables.split(",")
    value_group = [1, bench.shape.kv_dim]  # one range per token, the paper's layout
    if "methods" in tables:
        bench.header("Methods (training: epochs over the calibration rows; perplexity is relative to the full cache)")
        bench.measure("methods", "full cache", bench.model, DynamicCache, None, time.perf_counter())
        for compression in (0.5, 0.8, 0.9):
            label = f"{100 * compression:.0f} %"
            bench.run("methods", f"{label} paper: asvd", compression=compression, init="asvd", **PLAIN)
            bench.run(
                "methods", f"{label} paper: asvd + training", train=True, compression=compression, init="asvd", **PLAIN
            )
            bench.run("methods", f"{label} ours, no training", compression=compression)
            bench.run("methods", f"{label} ours + training", train=True, compression=compression)
        paper = PAPER_4 | dict(compression=0.95, value_group=value_group)
        for quantiser, clamped in (("its quantiser", True), ("our quantiser", False)):
            bench.run("methods", f"95 % paper: asvd, {quantiser}, PTQ", clamped=clamped, **paper)
            bench.run("methods", f"95 % paper: asvd, {quantiser}, QAT", clamped=clamped, train=True, **paper)
        bench.run("methods", "95 % ours, no training", compression=0.95)
        bench.run("methods", "95 % ours + QAT", train=True, compression=0.95)
    if "ratios" in tables:
        bench.header("Ours at several compressions, no training")
        bench.measure("ratios", "full cache", bench.model, DynamicCache, None, time.perf_counter())
        for compression in args.compressions:
            bench.run("ratios", f"{100 * compression:.0f} % ours", compression=compression)
    if "steps" in tables:
        for compression in args.compressions:
            bench.header(f"What each step gains, {100 * compression:.0f} % removed")
            for name, settings in (
                ("asvd, uniform, 16 bits", dict(init="asvd", **PLAIN)),
                ("mse", dict(init="mse", center=False, **PLAIN)),
                ("attention", dict(center=False, **PLAIN)),
                ("about the mean", dict(**PLAIN)),
                ("ranks by one budget, 16 bits", dict(bits=16)),
                ("4 bits, uniform", dict(bits=4, allocation="uniform", key_group=[32, 1], value_group=value_group)),
                (
                    "4 bits, values per channel as well",
                    dict(bits=4, allocation="uniform", key_group=[32, 1], value_group=[32, 1]),
                ),
                ("4 bits on average, by one budget", dict(bits=4, key_group=[32, 1], value_group=[32, 1])),
                ("each channel its bits", dict(key_group=[32, 1], value_group=[32, 1])),
                ("ranges shared by 4 channels", dict()),
                ("ranges shared by 16 channels", dict(key_group=[32, 16], value_group=[32, 16])),
                ("the same 4, not about the mean", dict(center=False)),
            ):
                bench.run(f"steps {compression}", name, compression=compression, **settings)
    if "layouts" in tables:
        bench.header("Keys per head and jointly over the heads of a layer, no training")
        for compression in args.compressions:
            for bits, label in ((16, "ranks by one budget, 16 bits"), (None, "each channel its bits")):
                for layout in ("head", "joint"):
                    bench.run(
                        "layouts",
                        f"{100 * compression:.0f} % {label}: {layout}",
                        compression=compression,
                        bits=bits,
                        key_layout=layout,
                    )
    if "quantisation" in tables:
        bench.header("What quantisation costs: the same factors, packed and not")
        for compression in args.compressions:
            label = f"{100 * compression:.0f} %"
            for name, settings in (("4 bits on average", dict(bits=4)), ("each channel its bits", dict())):
                bench.run("quantisation", f"{label} {name}", compression=compression, **settings)
                bench.run(
                    "quantisation", f"{label} {name}, unquantised", plain=True, compression=compression, **settings
                )
    if "storage" in tables:
        bench.header("Other ways to spend the same bytes")
        for compression in (0.8, 0.95):
            label = f"{100 * compression:.0f} %"
            for multiple in (1, 4, 8, 16):
                settings = dict(compression=compression, rank_multiple=multiple)
                bench.run("storage", f"{label} channels in multiples of {multiple}", **settings)
            for tokens in (32, 64, 128):  # the same block, so that as many tokens are exact
                settings = dict(block_size=128, key_group=[tokens, 4], value_group=[tokens, 4])
                bench.run(
                    "storage", f"{label} blocks of 128, ranges of {tokens} tokens", compression=compression, **settings
                )
            config = CSKVConfig(compression=compression)
            fitted = cskv_hf.fit(bench.model, bench.fitting.statistics, config, progress=False)
            config = fitted.peft_config["default"]
            bench.model = fitted.unload()
            formats = [f for layer in range(bench.shape.num_hidden_layers) for f in config.formats(layer)]
            saved = sum(RANGE_BYTES / 2 * f.layout.num_ranges / f.layout.block_size for f in formats)
            more = compression - saved / bench.full_bytes  # as if ranges of 8 bits were free of loss
            bench.run("storage", f"{label} and the bytes 8-bit ranges would save", compression=more)
    if "probes" in tables:
        bench.header("The allocation's probe on fewer tokens, three samples of each")
        for compression in (0.8, 0.95):
            for tokens, length in ((1024, 256), (512, 256), (256, 256), (512, 128)):
                for first in (0, 20, 60):
                    bench.probe_on(tokens, length, first)
                    name = f"{100 * compression:.0f} % {tokens} tokens, pieces of {length}, {first}"
                    bench.run("probes", name, compression=compression)


if __name__ == "__main__":
    main()

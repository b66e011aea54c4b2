"""Needles by depth and length with the bundled model: python benchmarks/needle.py FOLDER [--out FILE.json]

One record line hidden in Python's language reference, which the model has not read, and one line among others of its
kind; with the full cache, with 80 and 95 % removed, and, for comparison, with sinks and window alone. Answers are kept
in FOLDER, and the same command goes on from them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from common import machine
from transformers import DynamicCache

import cskv_hf
from cskv_hf import CSKVCache, CSKVConfig
from cskv_hf.demo import run as demo
from cskv_hf.demo.corpus import reference_topics
from cskv_hf.evaluate.answers import answer_cases
from cskv_hf.evaluate.baselines import WindowOnlyCache
from cskv_hf.evaluate.cases import Case, summarize
from cskv_hf.evaluate.needle import LINE_NEEDLE, LINE_TOKENS, line_haystack, needle_cases

LENGTHS = (256, 512, 1024, 2048)
LINES = (25, 50, 100, 200)
COMPRESSIONS = (0.8, 0.95)


def haystacks(tokenizer, per_cell: int) -> dict[str, list[Case]]:
    """All prompts of one number of lines have the same length and fill whole batches: the window cache knows no
    padding."""
    text = "".join(reference_topics(held_out=True))
    whole_line = replace(LINE_NEEDLE, answer_prefix="", max_new_tokens=LINE_TOKENS)
    return {
        "prose": needle_cases(tokenizer, text, LENGTHS, needles_per_cell=per_cell, template=LINE_NEEDLE),
        "prose, no prefix": needle_cases(tokenizer, text, LENGTHS, needles_per_cell=per_cell, template=whole_line),
        "lines": line_haystack(LINES, needles_per_cell=per_cell),
    }


def contestants(model, tokenizer) -> Iterator[tuple]:
    """(name, model, make_cache, haystacks to answer) of every cache."""
    yield "full cache", model, DynamicCache, ("prose", "prose, no prefix", "lines")
    yield "window", model, WindowOnlyCache, ("lines",)
    statistics = cskv_hf.collect_statistics(model, demo.calibration_data(tokenizer))
    for compression in COMPRESSIONS:
        name = f"{compression:.0%} removed"
        config = CSKVConfig(compression=compression)
        model = cskv_hf.fit(model, statistics, config, adapter_name=name[:2], progress=False)
        yield name, model, CSKVCache, ("prose", "lines")


def table(scores: list[dict]) -> str:
    """Shares of right answers, sizes down and depths across."""
    sizes = list(dict.fromkeys(score["group"].split(", depth ")[0] for score in scores))
    depths = list(dict.fromkeys(score["group"].split(", depth ")[1] for score in scores))
    values = {score["group"]: score["value"] for score in scores}
    rows = ["depth".ljust(14) + "".join(f"{depth:>8}" for depth in depths)]
    for size in sizes:
        rows.append(size.ljust(14) + "".join(f"{values[f'{size}, depth {depth}']:>8.2f}" for depth in depths))
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--per-cell", type=int, default=24, help="cases per size and depth")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = demo.load_bundled()
    cases, results = haystacks(tokenizer, args.per_cell), []
    for name, fitted, make_cache, kinds in contestants(model, tokenizer):
        for kind in kinds:
            path = args.folder / f"{name}, {kind}.jsonl".replace(" ", "-").replace("%", "").replace(",", "")
            settings = {"cache": name, "haystack": kind, "per_cell": args.per_cell}
            answers = answer_cases(
                fitted, tokenizer, cases[kind], make_cache,
                batch_size=args.per_cell, path=path, settings=settings, description=f"{name}, {kind}",
            )  # fmt: skip
            scores = [asdict(score) for score in summarize(answers)]
            results.append({"cache": name, "haystack": kind, "scores": scores})
            mean = sum(answer.score for answer in answers) / len(answers)
            print(f"\n{kind}, {name}: {mean:.3f} of {len(answers)}\n{table(scores)}", flush=True)
    if args.out:
        about = {"machine": machine(args.threads), "per_cell": args.per_cell}
        args.out.write_text(json.dumps(about | {"results": results}, indent=1))


if __name__ == "__main__":
    main()

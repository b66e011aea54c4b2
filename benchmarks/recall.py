"""What recall in the calibration is worth: python benchmarks/recall.py MODEL TEXT HELD_OUT --out FILE.json

An adapter fitted with recall (the default) and one without, at several compressions, and with --epochs the former once
more after training, which reads no row twice: KL divergence to the full cache on held-out text, and of RULER's needles
hidden in that text the likelihood of the value's tokens, their KL divergence to the full cache, and how often all of
them are the most likely ones. The prompt is prefilled and the value read in one forward over the compressed past; its
first token comes out of the prefill and is not counted.

TEXT is plain text or JSON lines, HELD_OUT plain text.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from common import machine, save
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import cskv_hf
from cskv_hf import CSKVCache, CSKVConfig, collect_statistics
from cskv_hf.evaluate.answers import encode_prompt
from cskv_hf.evaluate.divergence import compare_with_full_cache
from cskv_hf.evaluate.methods import Calibration, train_in_place
from cskv_hf.evaluate.needle import needle_cases
from cskv_hf.sensitivity import kl_divergence
from cskv_hf.texts import full_rows

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def needles(tokenizer, path: Path, lengths: list[int], per_cell: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(prompt, value) as input_ids (1, length)."""
    cases = needle_cases(tokenizer, path, lengths, DEPTHS, per_cell, progress=False)
    values = [tokenizer(f" {case.references[0]}", add_special_tokens=False)["input_ids"] for case in cases]
    return [(torch.tensor([encode_prompt(tokenizer, c)]), torch.tensor([v])) for c, v in zip(cases, values)]


@torch.no_grad()
def log_probabilities(model: nn.Module, cases: list, make_cache: Callable) -> list[torch.Tensor]:
    """Of the value's tokens after its first, (tokens - 1, vocabulary) each."""
    found = []
    for prompt, value in cases:
        cache = make_cache()
        model(input_ids=prompt, past_key_values=cache, logits_to_keep=1)
        logits = model(input_ids=value, past_key_values=cache).logits[0, :-1]
        found.append(logits.float().log_softmax(-1))
    return found


def of_needles(cases: list, full: list[torch.Tensor], found: list[torch.Tensor]) -> dict[str, float]:
    """Means over the cases."""
    wanted = [value[0, 1:] for _, value in cases]
    count = len(cases)
    return {
        "log_likelihood": sum(float(f.gather(1, w[:, None]).mean()) for f, w in zip(found, wanted)) / count,
        "needle_kl": sum(float(kl_divergence(a, b).mean()) for a, b in zip(full, found)) / count,
        "right": sum(int((f.argmax(-1) == w).all()) for f, w in zip(found, wanted)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="directory or id")
    parser.add_argument("text", type=Path, help="to calibrate on")
    parser.add_argument("held_out", type=Path, help="to measure on, and to hide needles in")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sample, and of a row to measure on")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rows", type=int, default=4, help="of held-out text")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024], help="of prompts with a needle")
    parser.add_argument("--per-cell", type=int, default=6, help="needles of each length and depth")
    parser.add_argument("--compressions", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    parser.add_argument("--epochs", type=float, default=0.0, help="of training, over the samples")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of training")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    samples = full_rows(args.text, tokenizer, args.length)[: args.samples]
    text = torch.stack(full_rows(args.held_out, tokenizer, args.length)[: args.rows])
    cases = needles(tokenizer, args.held_out, args.lengths, args.per_cell)
    full = log_probabilities(model, cases, lambda: DynamicCache(config=model.config))
    rows = [{"cache": "full", "kl": 0.0, **of_needles(cases, full, full)}]
    about = {"machine": machine(args.threads), "model": Path(args.model).name, "tokens": len(samples) * args.length}
    about |= {"needles": len(cases), "lengths": args.lengths, "text_tokens": text.numel()}
    print(f"{'':<24}{'KL':>9}{'needles: KL':>13}{'log-likelihood':>16}{'right':>7} of {len(cases)}")
    print(f"{'full cache':<24}{'':>22}{rows[0]['log_likelihood']:>16.3f}{rows[0]['right']:>7}", flush=True)

    def measure(fitted: nn.Module, row: dict, name: str) -> None:
        row["kl"] = compare_with_full_cache(fitted, text, CSKVCache).kl
        row |= of_needles(cases, full, log_probabilities(fitted, cases, CSKVCache))
        rows.append(row)
        save(args.out, about | {"rows": rows})
        numbers = f"{row['kl']:>9.5f}{row['needle_kl']:>13.4f}{row['log_likelihood']:>16.3f}{row['right']:>7}"
        print(f"{100 * row['compression']:.0f} % removed, {name:<11}{numbers}", flush=True)

    for recall in (False, True):
        statistics = collect_statistics(model, samples, recall=recall, progress=False)
        for compression in args.compressions:
            fitted = cskv_hf.fit(model, statistics, CSKVConfig(compression=compression), progress=False)
            row = {"recall": recall, "compression": compression}
            measure(fitted, row, "recall" if recall else "as written")
            if recall and args.epochs > 0:
                training = {"epochs": args.epochs, "learning_rate": args.learning_rate}
                train_in_place(fitted, Calibration(statistics, samples, **training), "attention")
                measure(fitted, row | training, "trained")
            model = fitted.unload()


if __name__ == "__main__":
    main()

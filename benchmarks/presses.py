"""Eviction of tokens as a baseline: the presses of NVIDIA's kvpress on the questions that `cskv eval bundled` asks.

kvpress needs an older transformers than cskv-hf, so there are several commands. The first, in the environment of
cskv-hf, writes questions and texts; the second, there too, answers them with CSKV; the third, in an environment of its
own (``pip install torch==2.13.0 kvpress==0.5.5``), with presses:

    python benchmarks/presses.py cases cases.json
    python benchmarks/presses.py ours cases.json --out kvpress-ours.json
    python benchmarks/presses.py run cases.json --out kvpress-bundled.json

As in kvpress' own pipeline a record is prefilled under the press, which then drops tokens from the cache; every
question is answered greedily from a copy of what is left, at the positions that follow the whole record. A question is
read token by token, which is exactly causal also where layers keep different numbers of tokens.

A press keeps as many tokens of a record as CSKV's bytes for the same record and compression can pay for. The file of
results is one that `cskv report` reads beside those of `cskv eval`.

How long a token takes over what presses leave of a prompt needs no cases:

    python benchmarks/presses.py speed --out kvpress-speed.json
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

BUNDLED = Path(__file__).parent.parent / "src" / "cskv_hf" / "demo" / "model"
COMPRESSIONS = (0.5, 0.8, 0.95)
RECORDS = 30  # of each length, with 8 questions each
ROWS = 10  # of text
CONTEXT = 1024  # tokens at which the bytes of a whole cache are counted
MAX_NEW_TOKENS = 24  # one line of a record
PRESSES = {
    "SnapKV": "SnapKVPress",
    "ExpectedAttention": "ExpectedAttentionPress",
    "Knorm": "KnormPress",
    "StreamingLLM": "StreamingLLMPress",
    "TOVA": "TOVAPress",
    "PyramidKV": "PyramidKVPress",
}
SPEED_PRESSES, SPEED_COMPRESSIONS = ("SnapKV", "ExpectedAttention"), (0.8, 0.95)
SPEED_TOKENS = 16  # timed at once
THINK = "ThinK"  # zeroes channels of the keys and keeps the tensors as they are: "resulting in no memory gain"
THINK_SHARE = 0.5  # of the channels of the keys
SEES_QUESTION = ("SnapKV",)  # scores tokens by what the end of the context attends to: better with the question there

# (tokens of the context, tokens of these that are the question's) -> what a model is called in; it may bring a cache
MakePress = Callable[[int, int], Any]


def write_cases(path: Path, count: int) -> None:
    """Records with questions, rows of text, and how many tokens CSKV's bytes pay for; needs cskv_hf."""
    from cskv_hf import CSKVConfig
    from cskv_hf.demo.run import evaluation_records, evaluation_text, load_bundled
    from cskv_hf.evaluate import bundled
    from cskv_hf.evaluate.lines import line_retrieval
    from cskv_hf.evaluate.methods import equal_bytes_window

    model, tokenizer = load_bundled()
    text = evaluation_text(tokenizer, CONTEXT)[:ROWS]
    records, full = [], {}
    for num_lines in tqdm(bundled.NUM_LINES, desc="Answering with the full cache", unit="length"):
        drawn, group = evaluation_records(count, 8, num_lines), f"{num_lines} lines"
        full[group] = line_retrieval(model, tokenizer, drawn, DynamicCache).correct
        records += [
            {
                "group": group, "text": r.text, "tokens": len(tokenizer(r.text)["input_ids"]),
                "questions": [r.question(i) for i in range(len(r.asked))],
                "values": [r.value(i) for i in range(len(r.asked))],
            }
            for r in drawn
        ]  # fmt: skip
    lengths = sorted({record["tokens"] for record in records} | {CONTEXT, CONTEXT // 2})
    sinks = CSKVConfig().sinks
    kept = {str(c): {str(n): min(n, sinks + equal_bytes_window(n, 1 - c)) for n in lengths} for c in COMPRESSIONS}
    cases = {"version": 1, "full_correct": full, "records": records, "text": text.tolist(), "kept": kept}
    replace_file(path, json.dumps(cases))
    print(f"Saved {path}: {len(records)} records, right with the full cache {full}.")


def run(args: argparse.Namespace) -> None:
    """Measure every press, and write what is known after each; an interrupted run goes on from the file."""
    cases = read_cases(args.cases)
    settings = settings_of(args, "bundled" if args.model == BUNDLED else args.model.name)
    rows = earlier_rows(args.out, settings)
    model, tokenizer = load(args.model)
    records, text = first_of_each(cases["records"], args.records), torch.tensor(cases["text"])
    about = {"version": 1, "environment": environment("kvpress"), "model": describe(model, settings["model"])}
    methods = list(contestants(cases["kept"]))
    bar = tqdm(methods, desc="Measuring", unit="method")
    full = second_halves(model, text, None)
    for labels, make_press, question_known in bar:
        bar.set_postfix_str(labels["label"])
        if any(row["label"] == labels["label"] for row in rows):
            continue
        started = time.perf_counter()
        if make_press is None:  # the full cache answers everything, to be compared with the other environment
            right = answer_records(model, tokenizer, cases["records"], None, False)
            check_against({group: sum(answers) for group, answers in right.items()}, cases["full_correct"])
        else:
            right = answer_records(model, tokenizer, records, make_press, question_known)
        measured = of_records(right)
        if not question_known:
            measured += text_measurements(second_halves(model, text, make_press), full, text)
        sizes, seconds = cache_sizes(model, text, make_press, labels), round(time.perf_counter() - started, 2)
        rows += [{"table": "methods", **labels, **m, **sizes, "seconds": seconds} for m in measured]
        replace_file(args.out, json.dumps({**about, "settings": settings, "rows": rows}, indent=1))
    print(table(rows))


def run_ours(args: argparse.Namespace) -> None:
    """The same of CSKV with its defaults; needs cskv_hf. What leaves the window while a question or a second half is
    read is compressed as well."""
    from cskv_hf import CSKVConfig, collect_statistics, fit
    from cskv_hf.demo.run import calibration_data, load_bundled
    from cskv_hf.evaluate.memory import held_nbytes

    cases = read_cases(args.cases)
    records, text = first_of_each(cases["records"], args.records), torch.tensor(cases["text"])
    model, tokenizer = load_bundled()
    settings = settings_of(args, "bundled")
    rows, full = earlier_rows(args.out, settings), second_halves(model, text, None)
    about = {"version": 1, "environment": environment("cskv-hf"), "model": describe(model, "bundled")}
    statistics = collect_statistics(model, calibration_data(tokenizer))
    for compression in tqdm(COMPRESSIONS, desc="Measuring", unit="compression"):
        labels = labels_of("ours", compression) | {"kind": "cskv"}
        if any(row["label"] == labels["label"] for row in rows):
            continue
        fitted = fit(model, statistics, CSKVConfig(compression=compression), progress=False)
        own, started = fitted.get_base_model(), time.perf_counter()
        measured = of_records(answer_records(own, tokenizer, records, own_cache, False))
        measured += text_measurements(second_halves(own, text, own_cache), full, text)
        cache = prefill(own, text[:1, :CONTEXT], own_cache)
        whole = 2 * 2 * sum(layer.keys.shape[1] * layer.keys.shape[3] for layer in cache.layers)
        held, seconds = held_nbytes(cache, torch.bfloat16), round(time.perf_counter() - started, 2)
        of_token = fitted.peft_config["default"].bytes_per_token(model.config)
        sizes = {
            "bytes_per_token": of_token, "share": of_token / whole, "context_tokens": CONTEXT,
            "cache_bytes": held, "cache_share": held / (whole * CONTEXT),
        }  # fmt: skip
        rows += [{"table": "methods", **labels, **m, **sizes, "seconds": seconds} for m in measured]
        replace_file(args.out, json.dumps({**about, "settings": settings, "rows": rows}, indent=1))
        model = fitted.unload()
    print(table(rows))


def own_cache(length: int, asked: int = 0):
    """In the place of a press."""
    from cskv_hf import CSKVCache

    return lambda model: contextlib.nullcontext(CSKVCache())


def contestants(kept: dict[str, dict[str, int]]) -> Iterator[tuple[dict[str, Any], MakePress | None, bool]]:
    """(labels, press for a context, whether it sees the question) of every method; the full cache has no press."""
    import kvpress

    def evicting(name: str, compression: str) -> MakePress:
        def make(length: int, asked: int = 0):
            tokens = kept[compression][str(length - asked)] + asked  # CSKV's window holds the question
            return getattr(kvpress, PRESSES[name])(compression_ratio=ratio_that_keeps(tokens, length))

        return make

    def zeroing(length: int, asked: int = 0):
        return kvpress.ThinKPress(key_channel_compression_ratio=THINK_SHARE)

    yield labels_of("full cache", None, "full cache"), None, False
    for compression in COMPRESSIONS:
        for name in PRESSES:
            yield labels_of(name, compression), evicting(name, str(compression)), False
    for compression in COMPRESSIONS:
        for name in SEES_QUESTION:
            yield labels_of(f"{name}, question known", compression), evicting(name, str(compression)), True
    label = f"{THINK}, {100 * THINK_SHARE:g} % of the key channels"
    yield labels_of(label, None, label), zeroing, False


@torch.no_grad()
def speed(args: argparse.Namespace) -> None:
    """Seconds of a token that follows a long prompt of random ones, over the full cache and over what presses leave
    of it, in turns: as benchmarks/generate.py, but forward by forward, for the positions that presses need."""
    import kvpress

    torch.manual_seed(0)
    model, _ = load(args.model)
    about = {"environment": environment("kvpress"), "length": args.length, "model": describe(model, args.model.name)}
    earlier = earlier_runs(args.out, about)
    prompt, positions = torch.randint(3, model.config.vocab_size, (1, args.length)), {}
    names = [("full cache", None)] + [(name, c) for c in SPEED_COMPRESSIONS for name in SPEED_PRESSES]
    caches, times = {}, {}
    for name, compression in names:
        label = labels_of(name, compression, name if compression is None else None)["label"]

        def make(length: int, asked: int = 0, name: str = name, compression: float | None = compression):
            return getattr(kvpress, PRESSES[name])(compression_ratio=compression)

        caches[label] = prefill(model, prompt, None if compression is None else make)
        positions[label], times[label] = args.length, []
    for turn in range(args.rounds + 1):
        for label, cache in caches.items():
            started = time.perf_counter()
            for _ in range(SPEED_TOKENS):
                step(model, cache, prompt[:, 0], positions[label])
                positions[label] += 1
            if turn > 0:  # the first warms up
                times[label].append((time.perf_counter() - started) / SPEED_TOKENS)
    seconds = {label: statistics.median(t) for label, t in times.items()}
    print(f"{args.length} tokens\n{'cache':<28}{'held':>8}{'ms per token':>14}{'x full':>9}")
    for label, t in seconds.items():
        held = caches[label].layers[0].keys.shape[2] - (args.rounds + 1) * SPEED_TOKENS
        print(f"{label:<28}{held:>8}{1000 * t:>14.2f}{t / seconds['full cache']:>9.2f}")
    if args.out:
        replace_file(args.out, json.dumps({**about, "runs": [*earlier, seconds]}, indent=1))


def ratio_that_keeps(tokens: int, length: int) -> float:
    """The `compression_ratio` at which ``int(length * (1 - ratio))``, and the same rounded, is `tokens`."""
    return 1 - min(1.0, (tokens + 0.25) / length)


def labels_of(method: str, compression: float | None, label: str | None = None) -> dict[str, Any]:
    return {
        "method": method, "label": label or f"{100 * compression:g} % {method}", "window": None, "key_share": None,
        "compression": compression, "kind": "full" if method == "full cache" else "kvpress",
    }  # fmt: skip


@torch.no_grad()
def answer_records(
    model, tokenizer, records: Sequence[dict], make_press: MakePress | None, question_known: bool
) -> dict[str, list[bool]]:
    """Whether each answer is right, per group of records.

    Args:
        question_known: whether the press sees the question, all but its last token, before it drops tokens; every
            question then has a cache of its own.
    """
    right: dict[str, list[bool]] = {}
    for record in tqdm(records, desc="Records", leave=False):
        context = tokenizer(record["text"], return_tensors="pt")["input_ids"]
        if context.shape[1] != record["tokens"]:
            raise ValueError(
                f"A record has {context.shape[1]} tokens here and {record['tokens']} in the file of cases: the "
                "tokenizers differ. Give the model that the cases were written for."
            )
        questions = [tokenizer(question)["input_ids"] for question in record["questions"]]
        answers: list[str] = [""] * len(questions)
        shared = None if question_known else prefill(model, context, make_press)
        for alike in by_length(questions) if question_known else [list(range(len(questions)))]:
            rows = [questions[i] for i in alike]
            if question_known:
                begun = torch.tensor(rows)[:, :-1]
                read = torch.cat([context.expand(len(rows), -1), begun], dim=1)
                cache, rows = prefill(model, read, make_press, asked=begun.shape[1]), [row[-1:] for row in rows]
            else:
                read, cache = context, copy.deepcopy(shared)
                cache.batch_repeat_interleave(len(rows))
            for i, answer in zip(alike, continue_greedily(model, tokenizer, cache, rows, read.shape[1])):
                answers[i] = answer
        right.setdefault(record["group"], []).extend(
            is_correct(answers[i], value) for i, value in enumerate(record["values"])
        )
    return right


def prefill(model, input_ids: torch.Tensor, make_press: MakePress | None, asked: int = 0) -> DynamicCache:
    """The cache after `input_ids` (batch, length), no padding, with what the press leaves of it.

    Args:
        asked: tokens at the end that belong to the question.
    """
    press = contextlib.nullcontext() if make_press is None else make_press(input_ids.shape[1], asked)(model)
    with press as own:
        cache = DynamicCache() if own is None else own
        model.model(input_ids=input_ids, past_key_values=cache)
    return cache


def continue_greedily(
    model, tokenizer, cache: DynamicCache, questions: Sequence[Sequence[int]], start: int
) -> list[str]:
    """The first line of the answer to each question, one to a row of the cache.

    Rows take one token per step, so all are at the same position, and a shorter question's answer begins earlier.

    Args:
        start: position of the questions' first token, whatever the cache holds.
    """
    texts, answers = [list(question) for question in questions], [""] * len(questions)
    last = max(len(question) for question in questions) + MAX_NEW_TOKENS - 1
    for i in range(last):
        logits = step(model, cache, torch.tensor([text[i] for text in texts]), start + i)
        for row, token in enumerate(logits.argmax(-1).tolist()):
            if len(texts[row]) == i + 1:
                texts[row].append(token)
        answers = [tokenizer.decode(text[len(q) : len(q) + MAX_NEW_TOKENS]) for text, q in zip(texts, questions)]
        if all("\n" in answer or tokenizer.eos_token in answer for answer in answers):
            break
    return [answer.split(tokenizer.eos_token)[0].split("\n")[0] for answer in answers]


def step(model, cache: DynamicCache, tokens: torch.Tensor, position: int) -> torch.Tensor:
    """Logits (batch, vocab) after one token of each row."""
    positions = torch.full((len(tokens), 1), position)
    return model(input_ids=tokens[:, None], past_key_values=cache, position_ids=positions).logits[:, -1]


@torch.no_grad()
def second_halves(model, rows: torch.Tensor, make_press: MakePress | None) -> torch.Tensor:
    """Log-probabilities (rows, scored, vocab) of the second half of `rows` (rows, length), after the first one was
    prefilled under the press; what is scored itself stays in the cache."""
    half = rows.shape[1] // 2
    cache = prefill(model, rows[:, :half], make_press)
    logits = [step(model, cache, rows[:, i], i) for i in range(half, rows.shape[1] - 1)]
    return torch.stack(logits, dim=1).log_softmax(-1)


@torch.no_grad()
def cache_sizes(model, text: torch.Tensor, make_press: MakePress | None, labels: dict[str, Any]) -> dict[str, Any]:
    """Bytes of a context of [`CONTEXT`] tokens in a 16-bit model, counted on the tensors that are left."""
    layers = prefill(model, text[:1, :CONTEXT], make_press).layers
    held = sum(2 * t.numel() for layer in layers for t in (layer.keys, layer.values))
    full = 2 * 2 * sum(layer.keys.shape[1] * layer.keys.shape[3] for layer in layers)
    share = 1.0 if labels["compression"] is None else 1 - labels["compression"]
    return {
        "bytes_per_token": share * full, "share": share, "context_tokens": CONTEXT, "cache_bytes": held,
        "cache_share": held / (full * CONTEXT),
    }  # fmt: skip


def load(path: Path):
    """The model (float32) and its tokenizer.

    Raises:
        ValueError: with a transformers that would read another RoPE base out of the config.
    """
    if int(version("transformers").split(".")[0]) < 5:
        raise ValueError(
            f"transformers {version('transformers')} does not read `rope_parameters` of the model's config. Install "
            "one that kvpress allows from 5.0 on: pip install 'transformers>=5.0,<5.3'."
        )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path)


def settings_of(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """What numbers of one file were measured with."""
    cases = hashlib.sha256(args.cases.read_bytes()).hexdigest()[:12]
    return {"model": model, "records": args.records, "cases": cases, "bytes": "CSKV's of the same context"}


def environment(package: str) -> dict[str, str]:
    cpu = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        if os.path.exists("/proc/cpuinfo")
        else None
    )
    versions = {name: version(name) for name in ("torch", "transformers", package)}
    return {
        **versions, "python": platform.python_version(), "machine": platform.machine(), "device": "CPU",
        "cpu": cpu[1] if cpu else platform.processor(), "threads": str(torch.get_num_threads()),
    }  # fmt: skip


def describe(model, name: str) -> dict[str, Any]:
    config = model.config
    return {
        "name": name, "layers": config.num_hidden_layers, "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim, "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


def check_against(here: dict[str, int], there: dict[str, int]) -> None:
    """Right answers over the full cache must be those of the environment that wrote the cases.

    Raises:
        ValueError: if they are not; then nothing else is worth comparing.
    """
    if here != there:
        raise ValueError(
            f"Right answers over the full cache: {here} here, {there} where the cases were written. The model is not "
            "the same to this transformers; use the model and a version that agree."
        )


def earlier_rows(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that an interrupted run left.

    Raises:
        ValueError: if they were measured under other settings.
    """
    if not path.exists():
        return []
    held = json.loads(path.read_text(encoding="utf-8"))
    if held.get("settings") != settings:
        raise ValueError(
            f"`--out` '{path}' was measured under other settings ({held.get('settings')}) than these ({settings}). "
            "Give another file, or remove it to start over."
        )
    return held["rows"]


def earlier_runs(path: Path | None, about: dict[str, Any]) -> list[dict[str, float]]:
    """The runs of [`speed`] that a file holds; as in benchmarks/common.py, which cannot be imported beside kvpress.

    Raises:
        ValueError: if what goes with them is not the same.
    """
    if path is None or not path.exists():
        return []
    held = json.loads(path.read_text(encoding="utf-8"))
    runs = held.pop("runs", None)
    if runs is None or held != about:
        raise ValueError(
            f"`--out` '{path}' holds other numbers ({held}) than these ({about}). Give another file, or remove it."
        )
    return runs


def read_cases(path: Path) -> dict[str, Any]:
    """What [`write_cases`] wrote.

    Raises:
        ValueError: if the file is missing or another one.
    """
    try:
        cases = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"The file of cases '{path}' cannot be read: {error}. Write it with `cases`.") from error
    if cases.get("version") != 1 or not cases.get("records"):
        way = f"write it with `python benchmarks/presses.py cases {path}`"
        raise ValueError(f"'{path}' is not a file of cases; {way}.")
    return cases


def first_of_each(records: Sequence[dict], count: int) -> list[dict]:
    groups: dict[str, list[dict]] = {}
    for record in records:
        groups.setdefault(record["group"], []).append(record)
    return [record for group in groups.values() for record in group[:count]]


def by_length(questions: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of questions with the same number of tokens: a press knows no padding."""
    groups: dict[int, list[int]] = {}
    for i, question in enumerate(questions):
        groups.setdefault(len(question), []).append(i)
    return list(groups.values())


def is_correct(generated: str, value: str) -> bool:
    """The rule of ``cskv_hf.evaluate.lines.is_correct``, which cannot be imported beside kvpress."""
    numbers = re.findall(r"\d+", generated.strip().split("\n")[0])
    return bool(numbers) and numbers[-1] == value


def share_of_right(group: str, right: Sequence[bool]) -> dict[str, Any]:
    low, high = wilson_interval(sum(right), len(right))
    return measurement("lines", group, "accuracy", sum(right) / len(right), low, high, len(right))


def of_records(right: dict[str, list[bool]]) -> list[dict[str, Any]]:
    """Of every group of records, and of all."""
    all_of_them = [answer for answers in right.values() for answer in answers]
    return [share_of_right(group, answers) for group, answers in {**right, "all": all_of_them}.items()]


def text_measurements(predicted: torch.Tensor, full: torch.Tensor, rows: torch.Tensor) -> list[dict[str, Any]]:
    """Perplexity, its ratio to the full cache's, KL divergence from it in nats per token, and how often both predict
    the same token; intervals are paired bootstraps over rows.

    Args:
        predicted, full: log-probabilities as [`second_halves`] gives them.
    """
    count, length = rows.shape
    group, total = f"second halves of {count} rows of {length:,} tokens", count * predicted.shape[1]
    targets = rows[:, -predicted.shape[1] :, None]
    losses, full_losses = (-p.gather(-1, targets)[..., 0].double().mean(1) for p in (predicted, full))
    kl = (full.exp() * (full - predicted)).sum(-1).double().mean(1)
    same = (full.argmax(-1) == predicted.argmax(-1)).double().mean(1)
    ratio = tuple(math.exp(x) for x in bootstrap(losses - full_losses))
    return [
        measurement("text", group, "perplexity", math.exp(float(losses.mean())), None, None, total),
        measurement("text", group, "perplexity_ratio", *ratio, total),
        measurement("text", group, "kl", *bootstrap(kl), total),
        measurement("text", group, "agreement", *bootstrap(same), total),
    ]


def bootstrap(values: torch.Tensor) -> tuple[float, float, float]:
    """A mean over rows and its 95 % interval by the percentile bootstrap."""
    picks = torch.randint(len(values), (2000, len(values)), generator=torch.Generator().manual_seed(0))
    means = values[picks].mean(1)
    return float(values.mean()), float(means.quantile(0.025)), float(means.quantile(0.975))


def measurement(benchmark: str, group: str, metric: str, value: float, low, high, total: int) -> dict[str, Any]:
    return {
        "benchmark": benchmark, "group": group, "metric": metric, "value": value, "low": low, "high": high,
        "total": total, "skipped": 0, "details": {},
    }  # fmt: skip


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """As in ``cskv_hf.evaluate.intervals``."""
    z, share = 1.959964, correct / total
    scale = 1 / (1 + z * z / total)
    centre = scale * (share + z * z / (2 * total))
    margin = scale * z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, centre - margin), min(1.0, centre + margin)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line per method: share of the whole cache, accuracy per group, what [`text_measurements`] gives."""
    lines = []
    for label in dict.fromkeys(row["label"] for row in rows):
        own = [row for row in rows if row["label"] == label]
        values = [f"{r['value']:.3f}" for r in own]
        lines.append(f"{label:<34}{100 * own[0]['cache_share']:>6.1f} %  {'  '.join(values)}")
    return "\n".join(lines)


def replace_file(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    cases = commands.add_parser("cases", help="write questions and texts; in the environment of cskv-hf")
    cases.add_argument("cases", type=Path, metavar="FILE.json")
    answer = commands.add_parser("run", help="answer them; in an environment with kvpress")
    answer.add_argument("cases", type=Path, metavar="FILE.json")
    answer.add_argument("--model", type=Path, default=BUNDLED, help="directory; the bundled model by default")
    answer.add_argument("--out", type=Path, required=True, help="write the numbers as JSON")
    ours = commands.add_parser("ours", help="answer them with CSKV; in the environment of cskv-hf")
    ours.add_argument("cases", type=Path, metavar="FILE.json")
    ours.add_argument("--out", type=Path, required=True, help="write the numbers as JSON")
    clock = commands.add_parser("speed", help="time tokens over what presses leave; in an environment with kvpress")
    clock.add_argument("--model", type=Path, default=BUNDLED, help="directory; the bundled model by default")
    clock.add_argument("--length", type=int, default=3968, help="tokens of the prompt")
    clock.add_argument("--rounds", type=int, default=7)
    clock.add_argument("--out", type=Path, help="write the numbers as JSON; adds a run to a file that is there")
    for command in (cases, answer, ours):
        command.add_argument("--records", type=int, default=RECORDS, help="of each length, with 8 questions each")
    for command in (cases, answer, ours, clock):
        command.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.command == "cases":
        write_cases(args.cases, args.records)
    else:
        {"run": run, "ours": run_ours, "speed": speed}[args.command](args)


if __name__ == "__main__":
    main()

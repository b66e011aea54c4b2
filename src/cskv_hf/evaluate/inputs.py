"""What `cskv eval` is given, as objects: a model, benchmarks by short names, calibration data; or the bundled ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapter_files import ADAPTER
from ..calibration import collect_statistics
from ..demo import MODEL_PATH
from ..files import full_rows, replace_file
from ..generation import has_active_adapter
from ..hub import local_adapter
from ..model_shape import ModelShape
from ..tuner import adapter_config
from . import longbench, longeval, lveval
from .answers import context_length, encode_prompt
from .benchmarks import Benchmark, CaseBenchmark, RecordBenchmark, TextBenchmark, long_generations
from .cases import Case, sample
from .fingerprint import file_fingerprint, fingerprint
from .format import text_tables
from .methods import Calibration
from .needle import line_haystack, needle_cases
from .suite import Suite
from .tables import TABLES, adapter_table

BUNDLED = "bundled"
BUNDLED_LINES = (25, 50, 75, 100)  # lines of a record; 100 are about 900 tokens
BUNDLED_ROWS, BUNDLED_LENGTH = 20, 512  # of held-out text
BUNDLED_LEARNING_RATE, PAPER_LEARNING_RATE = 1e-3, 5e-5
MOST_ROWS = 64  # of a text, unless `limit` says otherwise
BUNDLED_RECORDS = 30  # of each length, with 8 questions each: an interval of about 0.03 over all
BUNDLED_ONLY = {table: ("lines", "text") for table in TABLES if table != "methods"}
GENERATION_PROMPT, GENERATION_TOKENS = 64, 448
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
KINDS = ("text", "generations", "lines", "topics", "needle", "longbench", "lveval")
PUBLISHED = ("longbench", "lveval")
FORMS = (
    "text:FILE", "generations:FILE", "lines:COUNT or lines:FILE", "topics:FILE", "needle:FILE", "longbench:FILE or "
    "longbench:DATASET", "lveval:FILE or lveval:DATASET"
)  # fmt: skip


def evaluate(
    name: str,
    out: Path,
    specs: Sequence[str],
    *,
    tables: Sequence[str] | None = None,
    data: Path | None = None,
    limit: int | None = None,
    length: int = 2048,
    cut: int | None = None,
    batch_size: int = 8,
    max_tokens: int = 65536,
    epochs: float = 2.0,
    learning_rate: float | None = None,
    context: int | None = None,
    lm_eval_tasks: Sequence[str] = (),
    device_map: str | None = None,
    dtype: str = "auto",
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """What `cskv eval` does; the arguments are its options. Writes ``results.json`` in `out`, and says the tables.

    Returns:
        The rows of ``results.json``.

    Raises:
        ValueError: for an unknown table or benchmark, missing files or data, or a folder of another run.
        ImportError: if the harness is asked for and not installed.
    """
    unknown = sorted(set(tables or ()) - set(TABLES))
    if unknown:
        raise ValueError(f"`--tables` '{unknown[0]}' is none that is known; use {', '.join(TABLES)}.")
    if name != BUNDLED and not specs and not lm_eval_tasks:
        raise ValueError(f"There is nothing to measure on: give `--benchmark`, one of {', '.join(FORMS)}.")
    if data is not None and not data.is_file():
        raise ValueError(f"`--data` '{data}' does not exist.")
    specs = list(dict.fromkeys(specs))
    for spec in specs:
        check_benchmark(spec)
        source = Path(spec.partition(":")[2])
        if data is not None and source.exists() and data.samefile(source):
            raise ValueError(f"`--benchmark` '{spec}' is the text of `--data`; measure on another than is fitted on.")
    if lm_eval_tasks:
        from .lm_eval import check_tasks, format_results, run_lm_eval

        check_tasks(lm_eval_tasks)
    if learning_rate is None:
        learning_rate = BUNDLED_LEARNING_RATE if name == BUNDLED else PAPER_LEARNING_RATE
    model, tokenizer = load_model(name, dtype, device_map)
    fitted = has_active_adapter(model)
    if fitted and tables:
        raise ValueError(f"`--tables` fits adapters to a model; '{name}' is an adapter. Give its base model.")
    if not fitted and name != BUNDLED and data is None and specs:
        raise ValueError("Without an adapter, some are fitted first, which needs calibration text: give `--data`.")
    files = {spec: path for spec in specs if (path := Path(spec.partition(":")[2])).is_file()}
    files |= {} if data is None else {"data": data}
    files |= {"adapter": local_adapter(name) / ADAPTER[1]} if fitted else {}
    settings = {
        "model": name, "fingerprint": fingerprint(model, 0), "benchmarks": specs, "limit": limit, "length": length,
        "cut": cut, "batch_size": batch_size, "context": context, "data": None if data is None else data.name,
        "files": {spec: file_fingerprint(path) for spec, path in files.items()},
        "max_tokens": max_tokens, "epochs": epochs, "learning_rate": learning_rate,
        "chat_template": bool(getattr(tokenizer, "chat_template", None)),
    }  # fmt: skip
    suite = Suite(model, tokenizer, [], out, settings)  # refuses a folder of another run before anything is done
    if name == BUNDLED and not specs:
        suite.benchmarks, only = bundled_benchmarks(model, tokenizer, limit or BUNDLED_RECORDS), BUNDLED_ONLY
    else:
        options = {"limit": limit, "length": length, "cut": cut, "batch_size": batch_size, "context": context}
        suite.benchmarks, only = [parse_benchmark(spec, model, tokenizer, **options) for spec in specs], {}

    def calibration() -> Calibration:
        if data is None:
            return bundled_calibration(model, tokenizer, epochs, learning_rate)
        return file_calibration(model, tokenizer, data, length, max_tokens, epochs, learning_rate)

    suite.make_calibration = calibration
    shape = ModelShape.from_model_config(model.config)
    if fitted:
        wanted = {"adapter": adapter_table(adapter_config(model), shape)}
    else:
        chosen = tables or (list(TABLES) if name == BUNDLED else ["methods"])
        wanted = {table: TABLES[table](shape) for table in chosen}
    rows = []
    if suite.benchmarks:
        rows = suite.run(wanted, only, say)
        say("\n" + text_tables(rows))
        say(f"\nSaved {out / 'results.json'}.")
    if lm_eval_tasks:
        options = {"tokenizer": tokenizer, "limit": limit, "batch_size": batch_size, "use_cache": out / "lm-eval"}
        out.mkdir(parents=True, exist_ok=True)
        caches = ["full", "cskv"] if fitted else ["full"]
        runs = [run_lm_eval(model, lm_eval_tasks, cache=cache, **options) for cache in caches]
        replace_file(out / "lm-eval.json", json.dumps(runs, indent=1))
        say("\n" + format_results(*runs))
    return rows


def load_model(name: str, dtype: str = "auto", device_map: str | None = None) -> tuple[nn.Module, Any]:
    """A model and its tokenizer: ``bundled`` (in float32 on the CPU by default), a base model, or an adapter (which
    loads its base)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name == BUNDLED:
        name, dtype = str(MODEL_PATH), "float32" if dtype == "auto" else dtype
    elif device_map is None and torch.cuda.is_available():
        device_map = "cuda"
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device_map).eval()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):  # an adapter that was saved without one
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    return model, tokenizer


def bundled_benchmarks(model: nn.Module, tokenizer: Any, num_records: int) -> list[Benchmark]:
    """Line retrieval at four lengths, held-out text, the model's own generations, and lines by depth and length.

    Args:
        num_records: of each length, with 8 questions each.
    """
    from ..demo.run import evaluation_records, evaluation_text

    text = evaluation_text(tokenizer, BUNDLED_LENGTH)
    records = {f"{n} lines": evaluation_records(num_records, 8, n) for n in BUNDLED_LINES}
    generations = long_generations(
        model, text[BUNDLED_ROWS:, :GENERATION_PROMPT].contiguous(), GENERATION_TOKENS, seed=0
    )
    needles = line_haystack(BUNDLED_LINES, DEPTHS, needles_per_cell=max(1, num_records // 4), seed=1)
    return [
        RecordBenchmark("lines", records, length=1024),
        TextBenchmark("text", text[:BUNDLED_ROWS]),
        TextBenchmark("generations", generations, skip=GENERATION_PROMPT),
        CaseBenchmark("needle", needles, length=1024, metric="accuracy", batch_size=32),
    ]


def bundled_calibration(model: nn.Module, tokenizer: Any, epochs: float, learning_rate: float) -> Calibration:
    from ..demo.run import calibration_data

    rows = calibration_data(tokenizer)
    return Calibration(collect_statistics(model, rows), rows, epochs, learning_rate)


def file_calibration(
    model: nn.Module, tokenizer: Any, path: Path, length: int, max_tokens: int, epochs: float, learning_rate: float
) -> Calibration:
    """Calibration on the first `max_tokens` of a text file, in rows of `length` tokens.

    Raises:
        ValueError: see [`full_rows`].
    """
    rows = full_rows(path, tokenizer, length)[: max(1, max_tokens // length)]
    return Calibration(collect_statistics(model, rows), rows, epochs, learning_rate)


def check_benchmark(spec: str) -> None:
    """Refuse a short form that is none, or a file that is missing, before a model is loaded.

    Raises:
        ValueError: as described.
    """
    kind, _, source = spec.partition(":")
    if kind not in KINDS or not source:
        raise ValueError(f"`--benchmark` '{spec}' is none that is known; use {', '.join(FORMS)}.")
    named = kind == "lines" and source.isdecimal()
    named = named or (kind in PUBLISHED and not source.endswith((".jsonl", ".json")) and "/" not in source)
    if not named and not Path(source).is_file():
        raise ValueError(f"The file '{source}' of `--benchmark` '{spec}' does not exist.")


def parse_benchmark(
    spec: str,
    model: nn.Module,
    tokenizer: Any,
    *,
    limit: int | None,
    length: int,
    cut: int | None,
    batch_size: int,
    context: int | None,
) -> Benchmark:
    """A benchmark from its short form, one of [`FORMS`].

    Args:
        limit: cases of a group, or rows of text, at most.
        length: tokens of a row of text, and of the longest haystack.
        cut: tokens beyond which LongBench and LV-Eval prompts lose their middle; None cuts nothing.
        batch_size: prompts at a time.
        context: tokens that the model can take; what its config says by default.

    Raises:
        ValueError: for an unknown form, and for files that are missing or of another format.
    """
    check_benchmark(spec)
    kind, _, source = spec.partition(":")
    if kind == "text":
        return TextBenchmark(spec, _rows(source, tokenizer, length, limit or MOST_ROWS))
    if kind == "generations":
        prompts = _rows(source, tokenizer, GENERATION_PROMPT, limit or 16)
        rows = long_generations(model, prompts, length - GENERATION_PROMPT)
        return TextBenchmark(spec, rows, skip=GENERATION_PROMPT)
    if kind == "lines":
        cases = _line_cases(source, limit)
    elif kind == "topics":
        cases = sample(longeval.load_topics(source), limit)
    elif kind == "needle":
        lengths = [length // 8, length // 4, length // 2, length]
        cases = needle_cases(tokenizer, Path(source), lengths, DEPTHS, needles_per_cell=limit or 10)
    else:
        load = {"longbench": longbench.cases, "lveval": lveval.cases}[kind]
        cases = sample(load(source if Path(source).is_file() else spec, tokenizer, cut), limit)
    limit_tokens = context_length(model) if context is None else context
    sizes = sorted(len(encode_prompt(tokenizer, case)) for case in cases)
    fitting = [size for size in sizes if size < limit_tokens] or [min(sizes[0], limit_tokens)]
    metric = "score" if kind in PUBLISHED else "accuracy"
    return CaseBenchmark(spec, cases, fitting[len(fitting) // 2], metric, batch_size, context)


def _rows(source: str, tokenizer: Any, length: int, limit: int | None) -> torch.Tensor:
    return torch.stack(full_rows(Path(source), tokenizer, length)[:limit])


def _line_cases(source: str, limit: int | None) -> list[Case]:
    if source.isdecimal():
        return longeval.line_cases(longeval.line_entries(int(source), limit or 50))
    return sample(longeval.load_lines(source), limit)

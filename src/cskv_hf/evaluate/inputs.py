"""What `cskv eval` is given, as objects: a model, benchmarks by short names, calibration data; or the bundled ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import ModelShape
from ..files import calibration_samples, full_rows, replace_file
from ..generation import has_active_adapter
from ..statistics import collect_statistics
from ..tuner import adapter_config
from .benchmarks import Benchmark, CaseBenchmark, RecordBenchmark, TextBenchmark, long_generations
from .cases import Case, sample
from .format import text_tables
from .methods import Calibration
from .suite import Suite
from .tables import TABLES, adapter_table

BUNDLED = "bundled"
BUNDLED_LINES = (25, 50, 75, 100)  # lines of a record; 100 are about 900 tokens
BUNDLED_ROWS = 10  # of 1,024 tokens of text
BUNDLED_RECORDS = 30  # of each length, with 8 questions each: an interval of about 0.03 over all
BUNDLED_ONLY = {table: ("lines", "text") for table in TABLES if table != "methods"}
GENERATION_PROMPT, GENERATION_TOKENS = 64, 448
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
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
    batch_size: int = 8,
    max_tokens: int = 65536,
    epochs: float = 2.0,
    learning_rate: float = 1e-3,
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
    model, tokenizer = load_model(name, dtype, device_map)
    fitted = has_active_adapter(model)
    if fitted and tables:
        raise ValueError(f"`--tables` fits adapters to a model; '{name}' is an adapter. Give its base model.")
    if not fitted and name != BUNDLED and data is None and specs:
        raise ValueError(
            "Without an adapter the tables are fitted first, which needs calibration text: give `--data`."
        )
    settings = {
        "model": name, "benchmarks": list(specs), "limit": limit, "length": length,
        "data": None if data is None else data.name, "max_tokens": max_tokens, "epochs": epochs,
        "learning_rate": learning_rate,
    }  # fmt: skip
    if name == BUNDLED and not specs:
        benchmarks, only = bundled_benchmarks(model, tokenizer, limit or BUNDLED_RECORDS), BUNDLED_ONLY
    else:
        options = {"limit": limit, "length": length, "batch_size": batch_size}
        benchmarks, only = [parse_benchmark(spec, model, tokenizer, **options) for spec in specs], {}

    def calibration() -> Calibration:
        if data is None:
            return bundled_calibration(model, tokenizer, epochs, learning_rate)
        return file_calibration(model, tokenizer, data, length, max_tokens, epochs, learning_rate)

    if fitted:
        wanted = {"adapter": adapter_table(adapter_config(model).compression)}
    else:
        shape = ModelShape.from_model_config(model.config)
        chosen = tables or (list(TABLES) if name == BUNDLED else ["methods"])
        wanted = {table: TABLES[table](shape) for table in chosen}
    rows = []
    if benchmarks:
        rows = Suite(model, tokenizer, benchmarks, out, settings, calibration).run(wanted, only, say)
        say("\n" + text_tables(rows))
        say(f"\nSaved {out / 'results.json'}.")
    if lm_eval_tasks:
        from .lm_eval import format_results, run_lm_eval

        options = {"tokenizer": tokenizer, "limit": limit, "batch_size": batch_size}
        caches = ["full", "cskv"] if fitted else ["full"]
        runs = [run_lm_eval(model, lm_eval_tasks, cache=cache, **options) for cache in caches]
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / "lm-eval.json", json.dumps(runs, indent=1))
        say("\n" + format_results(*runs))
    return rows


def load_model(name: str, dtype: str = "auto", device_map: str | None = None) -> tuple[nn.Module, Any]:
    """A model and its tokenizer: ``bundled``, a base model, or an adapter (which loads its base)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name == BUNDLED:
        from ..demo.run import load_bundled

        return load_bundled()
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
    from .needle import line_haystack

    text = evaluation_text(tokenizer)
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
        ValueError: see [`calibration_samples`].
    """
    rows = [row for row in calibration_samples(path, tokenizer, length) if len(row) > 1]
    rows = rows[: max(1, max_tokens // length)]
    return Calibration(collect_statistics(model, rows), rows, epochs, learning_rate)


def parse_benchmark(
    spec: str, model: nn.Module, tokenizer: Any, *, limit: int | None, length: int, batch_size: int
) -> Benchmark:
    """A benchmark from its short form, one of [`FORMS`].

    Args:
        limit: cases of a group, or rows of text, at most.
        length: tokens of a row of text, and of the longest haystack.
        batch_size: prompts at a time.

    Raises:
        ValueError: for an unknown form, and for files that are missing or of another format.
    """
    kind, _, source = spec.partition(":")
    makers: dict[str, Callable[[], Benchmark]] = {
        "text": lambda: TextBenchmark(spec, _rows(source, tokenizer, length, limit)),
        "generations": lambda: _generations(spec, source, model, tokenizer, length, limit),
        "lines": lambda: _cases(spec, _line_cases(source, limit), "accuracy", tokenizer, batch_size),
        "topics": lambda: _cases(spec, _topic_cases(source, limit), "accuracy", tokenizer, batch_size),
        "needle": lambda: _cases(
            spec, _needle_cases(source, tokenizer, length, limit), "accuracy", tokenizer, batch_size
        ),
        "longbench": lambda: _cases(
            spec, _longbench_cases(spec, source, model, tokenizer, limit), "score", tokenizer, batch_size
        ),
        "lveval": lambda: _cases(spec, _lveval_cases(spec, source, limit), "score", tokenizer, batch_size),
    }
    if kind not in makers or not source:
        raise ValueError(f"`--benchmark` '{spec}' is none that is known; use {', '.join(FORMS)}.")
    return makers[kind]()


def _rows(source: str, tokenizer: Any, length: int, limit: int | None) -> torch.Tensor:
    return torch.stack(full_rows(Path(source), tokenizer, length)[:limit])


def _generations(spec: str, source: str, model, tokenizer, length: int, limit: int | None) -> Benchmark:
    prompts = _rows(source, tokenizer, GENERATION_PROMPT, limit or 16)
    rows = long_generations(model, prompts, length - GENERATION_PROMPT)
    return TextBenchmark(spec, rows, skip=GENERATION_PROMPT)


def _line_cases(source: str, limit: int | None) -> list[Case]:
    from .longeval import line_cases, line_entries, load_lines

    if source.isdecimal():
        return line_cases(line_entries(int(source), limit or 50))
    return sample(load_lines(source), limit)


def _topic_cases(source: str, limit: int | None) -> list[Case]:
    from .longeval import load_topics

    return sample(load_topics(source), limit)


def _needle_cases(source: str, tokenizer: Any, length: int, limit: int | None) -> list[Case]:
    from .needle import needle_cases

    lengths = [length // 8, length // 4, length // 2, length]
    return needle_cases(tokenizer, Path(source), lengths, DEPTHS, needles_per_cell=limit or 10)


def _longbench_cases(spec: str, source: str, model, tokenizer: Any, limit: int | None) -> list[Case]:
    from .longbench import cases

    return sample(cases(source if Path(source).is_file() else spec), limit)


def _lveval_cases(spec: str, source: str, limit: int | None) -> list[Case]:
    from .lveval import cases

    return sample(cases(source if Path(source).is_file() else spec), limit)


def _cases(spec: str, cases: Sequence[Case], metric: str, tokenizer: Any, batch_size: int) -> Benchmark:
    """Named as it was asked for; its length is that of the median prompt."""
    lengths = sorted(len(tokenizer(case.prompt)["input_ids"]) for case in cases)
    return CaseBenchmark(spec, cases, lengths[len(lengths) // 2], metric, batch_size)

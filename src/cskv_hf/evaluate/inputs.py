"""What `cskv eval` is given, as objects: a model, benchmarks by short names, calibration data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..calibration import collect_statistics
from ..demo import BUNDLED, MODEL_PATH
from ..families import context_length
from ..texts import full_rows
from . import longbench, longeval, lveval
from .answers import encode_prompt
from .benchmarks import Benchmark, CaseBenchmark, TextBenchmark, long_generations
from .cases import Case, sample
from .methods import Calibration
from .needle import needle_cases

MOST_ROWS = 64  # of a text, unless `rows` or `limit` says otherwise
GENERATION_PROMPT = 64  # tokens
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
KINDS = ("text", "generations", "lines", "topics", "needle", "longbench", "lveval")
PUBLISHED = ("longbench", "lveval")
FORMS = (
    "text:FILE", "generations:FILE", "lines:COUNT or lines:FILE", "topics:FILE", "needle:FILE", "longbench:FILE or "
    "longbench:DATASET", "lveval:FILE or lveval:DATASET"
)  # fmt: skip


def load_model(name: str, dtype: str = "auto", device_map: str | None = None) -> tuple[nn.Module, Any]:
    """A model and its tokenizer: ``bundled`` (in float32 on the CPU by default), a base model, or an adapter (which
    loads its base)."""
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
        raise ValueError(f"`--benchmark` '{spec}' is not known; use {', '.join(FORMS)}.")
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
    rows: int | None,
    length: int,
    cut: int | None,
    batch_size: int,
    context: int | None,
) -> Benchmark:
    """A benchmark from its short form, one of [`FORMS`].

    Args:
        limit: cases of a group, at most.
        rows: rows of a text, at most; `limit` by default, or 64.
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
        return TextBenchmark(spec, _rows(source, tokenizer, length, rows or limit or MOST_ROWS))
    if kind == "generations":
        prompts = _rows(source, tokenizer, GENERATION_PROMPT, rows or limit or 16)
        rows = long_generations(model, prompts, length - GENERATION_PROMPT)
        return TextBenchmark(spec, rows, skip=GENERATION_PROMPT)
    if kind == "lines":
        cases = _line_cases(source, limit)
    elif kind == "topics":
        cases = sample(longeval.load_topics(source), limit)
    elif kind == "needle":
        lengths = [length // 8, length // 4, length // 2, length]
        try:
            cases = needle_cases(tokenizer, Path(source), lengths, DEPTHS, needles_per_cell=limit or 10)
        except ValueError as error:
            raise ValueError(
                f"Haystacks of an eighth of `length`={length} tokens up to all of it cannot be made: {error}"
            ) from error
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

"""What a cache is measured on: text, records of lines, and cases answered by generation; each gives measurements with
intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

from ..generation import CACHE_ARGUMENT
from .answers import answer_cases, own_generation_config
from .cases import Answer, Case, summarize
from .divergence import compare_with_full_cache
from .intervals import wilson_interval
from .lines import LineRecord, line_retrieval

ALL = "all"  # the group of all groups


@dataclass(frozen=True)
class Measurement:
    """One number of a benchmark.

    Attributes:
        group: a column of the benchmark: "100 lines", "4-8k".
        metric: what the number is.
        value, low, high: the number and its 95 % interval; None where nothing could be measured.
        total, skipped: questions or tokens that it is of, and questions too long for the model.
        details: what all questions of the group have in common, as JSON values; of questions that `--cut` may cut,
            ``cases_cut``, how many of `total` it did.
    """

    group: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    total: int
    skipped: int = 0
    details: dict[str, Any] = field(default_factory=dict)


class Benchmark(Protocol):
    """Something to measure caches on.

    Attributes:
        name: of the benchmark, unique within a run.
        length: tokens of its context, about; what bytes are counted at.
        window_length: tokens of the context that decide how long a window of equal bytes is, where the first forward
            is not the whole prompt; else None.
    """

    name: str
    length: int
    window_length: int | None

    def run(
        self, model: nn.Module, tokenizer: Any, make_cache: Callable[[], Cache], path: Path, settings: dict[str, Any]
    ) -> list[Measurement]:
        """Measure a cache; `path` is where answers may be kept, so that an interrupted run goes on."""
        ...


@dataclass(frozen=True)
class TextBenchmark:
    """Next-token predictions over a compressed past against those over the full cache; see divergence.py.

    Attributes:
        input_ids: (rows, length), no padding.
        skip: tokens at the start of each row that are not scored.
    """

    name: str
    input_ids: torch.Tensor
    skip: int = 64

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]

    window_length = length

    def run(self, model, tokenizer, make_cache, path, settings) -> list[Measurement]:
        result = compare_with_full_cache(model, self.input_ids, make_cache, skip=self.skip)
        intervals, tokens = result.intervals(), result.full.num_tokens
        group = f"{self.input_ids.shape[0]} rows of {self.length:,} tokens"
        return [
            Measurement(group, "perplexity", result.compressed.value, None, None, tokens),
            Measurement(group, "perplexity_ratio", result.ratio, *intervals["ratio"], tokens),
            Measurement(group, "kl", result.kl, *intervals["kl"], tokens),
            Measurement(group, "agreement", result.agreement, *intervals["agreement"], tokens),
        ]


@dataclass(frozen=True)
class RecordBenchmark:
    """Line retrieval in the bundled model's own format, several questions to a record; see lines.py.

    Attributes:
        records: per group ("25 lines"), records of like length.
    """

    name: str
    records: dict[str, Sequence[LineRecord]]
    length: int
    window_length: None = None

    def run(self, model, tokenizer, make_cache, path, settings) -> list[Measurement]:
        measured, right, asked = [], 0, 0
        for group, records in self.records.items():
            accuracy = line_retrieval(model, tokenizer, records, make_cache)
            right, asked = right + accuracy.correct, asked + accuracy.total
            interval = wilson_interval(accuracy.correct, accuracy.total)
            measured.append(Measurement(group, "accuracy", accuracy.value, *interval, accuracy.total))
        if len(measured) > 1:
            measured.append(Measurement(ALL, "accuracy", right / asked, *wilson_interval(right, asked), asked))
        return measured


@dataclass(frozen=True)
class CaseBenchmark:
    """Prompts answered greedily and scored by the cases' own metric; see cases.py.

    Attributes:
        metric: what the score is called.
        batch_size: prompts at a time.
        context: tokens of prompt and answer that the model can take; what its config says by default.
    """

    name: str
    cases: Sequence[Case]
    length: int
    metric: str = "score"
    batch_size: int = 8
    context: int | None = None
    window_length: None = None

    def run(self, model, tokenizer, make_cache, path, settings) -> list[Measurement]:
        answers = answer_cases(
            model, tokenizer, self.cases, make_cache,
            batch_size=self.batch_size, path=path, settings=settings, context=self.context, description=self.name,
        )  # fmt: skip
        scores = summarize(answers)
        if len(scores) > 1:
            scores += summarize([replace(answer, group=ALL) for answer in answers])
        measured = []
        for s in scores:
            mine = [(c, a) for c, a in zip(self.cases, answers) if s.group in (c.group, ALL)]
            details = shared_details(*zip(*mine))
            measured.append(Measurement(s.group, self.metric, s.value, s.low, s.high, s.total, s.skipped, details))
        return measured


def shared_details(cases: Sequence[Case], answers: Sequence[Answer]) -> dict[str, Any]:
    """Details that are equal in all cases; in the place of ``tokens_cut`` how many of those answered were cut."""
    first, *others = [dict(case.details) for case in cases]
    shared = {k: v for k, v in first.items() if all(k in other and other[k] == v for other in others)}
    shared.pop("tokens_cut", None)
    if any("tokens_cut" in case.details for case in cases):
        answered = [case for case, answer in zip(cases, answers) if answer.score is not None]
        shared["cases_cut"] = sum(case.details.get("tokens_cut", 0) > 0 for case in answered)
    return shared


@torch.no_grad()
def long_generations(
    model: nn.Module, prompts: torch.Tensor, new_tokens: int, batch_size: int = 8, seed: int | None = None
) -> torch.Tensor:
    """The model's own continuations over the full cache, to compare caches on: (rows, prompt + new_tokens).

    Greedy, or sampled where `seed` is given; never ended early, so that all rows are as long.

    Args:
        prompts: (rows, length), no padding.
    """
    rows = []
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size].to(model.device)
        if seed is not None:
            torch.manual_seed(seed + first)
        with own_generation_config(model):
            rows.append(
                model.generate(
                    input_ids=batch, attention_mask=torch.ones_like(batch), **{CACHE_ARGUMENT: DynamicCache()},
                    max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=seed is not None,
                    top_k=0 if seed is not None else None, pad_token_id=model.generation_config.pad_token_id or 0,
                )
            )  # fmt: skip
    return torch.cat(rows).cpu()

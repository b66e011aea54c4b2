"""A benchmark as data: cases with a prompt, what a right answer holds, and how an answer is scored."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .intervals import mean_interval, wilson_interval


@dataclass(frozen=True)
class Case:
    """One question of a benchmark, answered by generation.

    Attributes:
        id: unique within its benchmark and group.
        group: what is averaged together, a column of the result: "200 lines", "0-4k".
        prompt: all that the model reads, without a chat template.
        references: right answers; a score is the best over them.
        metric: ``metric(answer, case)``, a score between 0 and 1.
        max_new_tokens: that an answer may have.
        chat: whether `prompt` is put into the tokenizer's chat template, if it has one; few-shot prompts are not.
        answer_prefix: how the answer begins; the model continues from there, after the template.
        stop: text after which the answer is over, or None.
        details: what else the metric or the reader wants to know (keywords, depth, length); JSON values.
    """

    id: str
    group: str
    prompt: str
    references: tuple[str, ...]
    metric: Callable[[str, Case], float]
    max_new_tokens: int
    chat: bool = True
    answer_prefix: str = ""
    stop: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a model made of a case.

    Attributes:
        id, group: of the case.
        text: generated; None where the case was skipped, because the model's context is too short for it.
        score: between 0 and 1; None where skipped.
        prompt_tokens: of the prompt.
    """

    id: str
    group: str
    text: str | None
    score: float | None
    prompt_tokens: int


@dataclass(frozen=True)
class Score:
    """The mean over a group of cases, with its 95 % interval.

    Attributes:
        group: of the cases.
        value, low, high: mean score and interval; None if every case was skipped.
        total, skipped: cases scored, and cases too long for the model.
    """

    group: str
    value: float | None
    low: float | None
    high: float | None
    total: int
    skipped: int


def summarize(answers: Sequence[Answer]) -> list[Score]:
    """One score per group, in the order in which the groups appear.

    The interval is Wilson's where every score is 0 or 1, else a bootstrap over cases.
    """
    scores = []
    for group in dict.fromkeys(answer.group for answer in answers):
        values = [a.score for a in answers if a.group == group and a.score is not None]
        skipped = sum(a.group == group and a.score is None for a in answers)
        if not values:
            scores.append(Score(group, None, None, None, 0, skipped))
            continue
        mean = sum(values) / len(values)
        if set(values) <= {0.0, 1.0}:
            low, high = wilson_interval(round(sum(values)), len(values))
        else:
            low, high = mean_interval(values)
        scores.append(Score(group, mean, low, high, len(values), skipped))
    return scores


def sample(cases: Sequence[Case], limit: int | None, seed: int = 0) -> list[Case]:
    """At most `limit` cases of each group, drawn once and for all by `seed`, in their order."""
    if limit is None:
        return list(cases)
    kept = set()
    for group in dict.fromkeys(case.group for case in cases):
        members = [i for i, case in enumerate(cases) if case.group == group]
        kept.update(random.Random(seed).sample(members, min(limit, len(members))))
    return [case for i, case in enumerate(cases) if i in kept]

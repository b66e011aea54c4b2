"""LongEval-style line retrieval: random records of numbered lines, one question each, and their scoring.

A record is a list of ``line 23-571: REGISTER_CONTENT is <41235>`` and the question asks for the content of one line.
Nothing but attention over the whole record can answer it, which makes it the sharpest test of a compressed cache
(LongChat, Li et al. 2023; the CSKV paper's LongEval).
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..generation import CACHE_ARGUMENT
from .answers import own_generation_config
from .intervals import wilson_interval

QUESTION = "what is the content in line {key}?\n"
LINE = "line {key}: REGISTER_CONTENT is <{value}>\n"
MAX_LINES = 900  # "10-100" to "99-999", no second number twice in a record


@dataclass(frozen=True)
class LineRecord:
    """One record and the questions asked about it.

    Attributes:
        lines: (key, value) pairs in the order of the record, for instance ``("23-571", "41235")``.
        asked: indices into `lines`.
    """

    lines: tuple[tuple[str, str], ...]
    asked: tuple[int, ...]

    @property
    def text(self) -> str:
        return "".join(LINE.format(key=key, value=value) for key, value in self.lines)

    def question(self, i: int) -> str:
        return QUESTION.format(key=self.lines[self.asked[i]][0])

    def answer(self, i: int) -> str:
        """The line that a perfect model writes after `question(i)`."""
        key, value = self.lines[self.asked[i]]
        return LINE.format(key=key, value=value)

    def value(self, i: int) -> str:
        return self.lines[self.asked[i]][1]


def line_record(num_lines: int, num_questions: int, rng: random.Random) -> LineRecord:
    """Draw a record of `num_lines` distinct keys with five-digit values and `num_questions` distinct lines to ask for.

    Raises:
        ValueError: if there are not that many keys, or more questions than lines.
    """
    if not 1 <= num_lines <= MAX_LINES:
        raise ValueError(f"`num_lines` must be between 1 and {MAX_LINES}, got {num_lines}.")
    if not 1 <= num_questions <= num_lines:
        raise ValueError(f"`num_questions` must be between 1 and num_lines={num_lines}, got {num_questions}.")
    keys = [f"{rng.randint(10, 99)}-{second}" for second in rng.sample(range(100, 1000), num_lines)]
    lines = tuple((key, str(rng.randint(10000, 99999))) for key in keys)
    return LineRecord(lines, tuple(rng.sample(range(num_lines), num_questions)))


def is_correct(generated: str, value: str) -> bool:
    """LongEval's rule: the last number of the model's answer (its first line, here) is the expected one."""
    numbers = re.findall(r"\d+", generated.strip().split("\n")[0])
    return bool(numbers) and numbers[-1] == value


@dataclass(frozen=True)
class Accuracy:
    """Whole answers right, of independent yes/no trials."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        return self.correct / self.total

    @property
    def margin(self) -> float:
        """Half the width of the 95 % Wilson interval, which is never clipped but for rounding."""
        low, high = wilson_interval(self.correct, self.total)
        return (high - low) / 2


@torch.no_grad()
def line_retrieval(
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[LineRecord],
    make_cache: Callable[[], Cache],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 24,
) -> Accuracy:
    """Ask every question of every record, greedily, with the record read through the cache to measure.

    A record is prefilled once per batch; each question then continues from a copy of that cache, so that question
    and answer both read the compressed record. A cache that cannot be copied reads the record anew for every question.

    Args:
        records: all with the same number of lines and questions.
        make_cache: ``CSKVCache`` or ``DynamicCache``.
        max_new_tokens: must be enough for one line of the record.
    """
    correct = total = 0
    for start in range(0, len(records), batch_size):
        batch = records[start : start + batch_size]
        prefix = tokenizer([r.text for r in batch], return_tensors="pt", padding=True, padding_side="left").to(
            model.device
        )

        def read(prefix=prefix) -> Cache:
            cache = make_cache()
            model(**prefix, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1)
            return cache

        cache = read()
        for i in range(len(batch[0].asked)):
            question = tokenizer(
                [r.question(i) for r in batch], return_tensors="pt", padding=True, padding_side="left"
            )
            with own_generation_config(model):
                output = model.generate(
                    input_ids=torch.cat([prefix["input_ids"], question["input_ids"].to(model.device)], dim=1),
                    attention_mask=torch.cat(
                        [prefix["attention_mask"], question["attention_mask"].to(model.device)], dim=1
                    ),
                    **{CACHE_ARGUMENT: _copy(cache) or read()},
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    tokenizer=tokenizer,
                    stop_strings="\n",
                    pad_token_id=tokenizer.pad_token_id,
                )
            answers = tokenizer.batch_decode(
                output[:, prefix["input_ids"].shape[1] + question["input_ids"].shape[1] :]
            )
            correct += sum(is_correct(answer, record.value(i)) for answer, record in zip(answers, batch))
            total += len(batch)
    return Accuracy(correct, total)


def _copy(cache: Cache) -> Cache | None:
    try:
        return copy.deepcopy(cache)
    except RuntimeError:  # quantised tensors of some libraries refuse
        return None

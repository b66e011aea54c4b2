"""LongEval-style line retrieval: random records of numbered lines, one question each, and their scoring.

A record is a list of ``line 23-57: REGISTER_CONTENT is <41235>`` and the question asks for the content of one line. Nothing
but attention over the whole record can answer it, which makes it the sharpest test of a compressed cache (LongChat, Li et al.
2023; the CSKV paper's LongEval). Knows nothing about caches.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

QUESTION = "what is the content in line {key}?\n"
LINE = "line {key}: REGISTER_CONTENT is <{value}>\n"
NUM_KEYS = 90 * 90  # "10-10" to "99-99"


@dataclass(frozen=True)
class LineRecord:
    """One record and the questions asked about it.

    Attributes:
        lines: (key, value) pairs in the order of the record, for instance ``("23-57", "41235")``.
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
    if not 1 <= num_lines <= NUM_KEYS:
        raise ValueError(f"`num_lines` must be between 1 and {NUM_KEYS}, got {num_lines}.")
    if not 1 <= num_questions <= num_lines:
        raise ValueError(f"`num_questions` must be between 1 and num_lines={num_lines}, got {num_questions}.")
    keys = [f"{10 + k // 90}-{10 + k % 90}" for k in rng.sample(range(NUM_KEYS), num_lines)]
    lines = tuple((key, str(rng.randint(10000, 99999))) for key in keys)
    return LineRecord(lines, tuple(rng.sample(range(num_lines), num_questions)))


def is_correct(generated: str, value: str) -> bool:
    """LongEval's rule: the last number of the model's answer (its first line, here) is the expected one."""
    numbers = re.findall(r"\d+", generated.strip().split("\n")[0])
    return bool(numbers) and numbers[-1] == value

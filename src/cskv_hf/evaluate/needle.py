"""A needle in a haystack: one sentence hidden at a depth of a text of a length, and asked for after it.

`needle_cases` hides it in prose, with RULER's words (Hsieh et al. 2024) or yours; `line_haystack` hides a line among
lines of its own kind (evaluate/lines.py).
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .answers import encode_prompt
from .cases import Case
from .lines import LINE, QUESTION, line_record
from .words import ADJECTIVES, NOUNS

SENTENCE_END = r"[.!?]['\")\]]*\s+|\n+"
LINE_END = r"\n+"


def _magic_number(rng: random.Random) -> tuple[str, str]:
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}", str(rng.randint(1_000_000, 9_999_999))


def _line(rng: random.Random) -> tuple[str, str]:
    return f"{rng.randint(10, 99)}-{rng.randint(100, 999)}", str(rng.randint(10_000, 99_999))


@dataclass(frozen=True)
class NeedleTemplate:
    """The words of a needle test; ``{key}`` and ``{value}`` are filled in.

    Attributes:
        needle: what is hidden, with the space or line break after it.
        question: asked after the haystack.
        intro: read before it.
        answer_prefix: how the answer begins, after the chat template, for the model to continue. The first token of
            an answer comes out of the prefill, with exact keys and values: where that is part of the value, a
            compressed cache is spared it.
        draw: makes a key and a value.
        cut: regular expression of what ends a sentence of the haystack; the needle stands between two sentences.
        stop, max_new_tokens, chat: of the cases (`Case`).
    """

    needle: str
    question: str
    intro: str = ""
    answer_prefix: str = ""
    draw: Callable[[random.Random], tuple[str, str]] = _magic_number
    cut: str = SENTENCE_END
    stop: str | None = None
    max_new_tokens: int = 128
    chat: bool = True


RULER = NeedleTemplate(
    intro=(
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n"
    ),
    needle="One of the special magic numbers for {key} is: {value}. ",
    question="\nWhat is the special magic number for {key} mentioned in the provided text?",
    answer_prefix=" The special magic number for {key} mentioned in the provided text is",
)
LINE_NEEDLE = NeedleTemplate(
    needle=LINE,
    question=QUESTION,
    answer_prefix=LINE.split("{value}")[0],
    draw=_line,
    cut=LINE_END,
    stop="\n",
    max_new_tokens=8,
    chat=False,
)
LINE_TOKENS = 24  # of an answer that is a whole line


def needle_cases(
    tokenizer: Any,
    haystack: str | Path,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    needles_per_cell: int = 10,
    seed: int = 0,
    template: NeedleTemplate = RULER,
    progress: bool = True,
) -> list[Case]:
    """Cases for every length and depth, each with a haystack, key and value of its own.

    A haystack is as many whole sentences of the text as fit, from a random one on; after the last sentence of the
    text follows the first. Every case of a length and depth has the group "1,024 tokens, depth 50 %", and its details
    hold the asked ``length`` and ``depth``.

    Args:
        haystack: a text, or the path of one as a ``Path``.
        lengths: tokens of prompt (chat template included) and answer together, at most, as RULER counts them.
        depths: between 0 and 1, of the haystack's tokens that stand before the needle.
        needles_per_cell: cases per length and depth, each with one needle.
        template: `RULER`, `LINE_NEEDLE` or another.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a depth is not between 0 and 1, `needles_per_cell` is not positive, the text is shorter than a
            haystack, a length has no room for question and answer, or the text is the path of a file.
    """
    if any(not 0 <= depth <= 1 for depth in depths):
        raise ValueError(f"`depths` must be between 0 and 1, got {list(depths)}.")
    _at_least_one("needles_per_cell", needles_per_cell)
    if isinstance(haystack, str) and len(haystack) < 1000 and Path(haystack).is_file():
        raise ValueError(f"`haystack`='{haystack}' is a string, so a text, and names a file; give it as a `Path`.")
    text = haystack.read_text(encoding="utf-8") if isinstance(haystack, Path) else haystack
    text = text.strip() + "\n"
    sentences = _split(text, template.cut)
    sizes = [len(ids) for ids in tokenizer(sentences, add_special_tokens=False)["input_ids"]]
    cells = [(length, depth, i) for length in lengths for depth in depths for i in range(needles_per_cell)]
    cases = []
    for length, depth, i in tqdm(cells, desc="Hiding needles", unit="case", disable=not progress):
        rng = random.Random(f"needle {length} {float(depth)} {i} {seed}")
        key, value = _draw_unseen(template.draw, rng, text)
        start = rng.randrange(len(sentences))
        turned, turned_sizes = sentences[start:] + sentences[:start], sizes[start:] + sizes[:start]
        case = Case(
            id=str(i),
            group=_group(f"{length:,} tokens", depth),
            prompt="",
            references=(value,),
            metric=contained_references,
            max_new_tokens=template.max_new_tokens,
            chat=template.chat,
            stop=template.stop,
            details={"length": length, "depth": depth, "key": key},
        )
        cases.append(_fill(case, tokenizer, template, turned, list(accumulate(turned_sizes, initial=0))))
    return cases


def line_haystack(
    num_lines: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    needles_per_cell: int = 10,
    seed: int = 0,
) -> list[Case]:
    """Line retrieval by depth: records of lines (`line_record`), of which the one at `depth` is asked for.

    The group is "100 lines, depth 50 %"; details hold ``num_lines``, ``depth`` and ``position``, counted from 0.

    Args:
        num_lines: of the records, one size after the other.
        depths: between 0, the first line, and 1, the last.

    Raises:
        ValueError: if a depth is not between 0 and 1, `needles_per_cell` is not positive, or there are not that many
            lines.
    """
    if any(not 0 <= depth <= 1 for depth in depths):
        raise ValueError(f"`depths` must be between 0 and 1, got {list(depths)}.")
    _at_least_one("needles_per_cell", needles_per_cell)
    cases = []
    for lines in num_lines:
        for depth in depths:
            for i in range(needles_per_cell):
                record = line_record(lines, 1, random.Random(f"line haystack {lines} {float(depth)} {i} {seed}"))
                position = round(depth * (lines - 1))
                record = replace(record, asked=(position,))
                cases.append(
                    Case(
                        id=str(i),
                        group=_group(f"{lines:,} lines", depth),
                        prompt=record.text + record.question(0),
                        references=(record.value(0),),
                        metric=contained_references,
                        max_new_tokens=LINE_TOKENS,
                        chat=False,
                        stop="\n",
                        details={"num_lines": lines, "depth": depth, "position": position},
                    )
                )
    return cases


def contained_references(answer: str, case: Case) -> float:
    """RULER's score: the share of references that the answer contains, whatever their case."""
    return sum(reference.lower() in answer.lower() for reference in case.references) / len(case.references)


def _fill(case: Case, tokenizer: Any, template: NeedleTemplate, sentences: list[str], before: list[int]) -> Case:
    """The case with the longest prompt that leaves room for the answer; `before` are tokens in front of a sentence.

    Tokens of a whole are not the sum of those of its sentences, so the sum is where the search for it starts.
    """
    length, depth = case.details["length"], case.details["depth"]
    names = {"key": case.details["key"], "value": case.references[0]}
    needle, intro = template.needle.format(**names), template.intro.format(**names)
    end = template.question.format(**names)
    case = replace(case, answer_prefix=template.answer_prefix.format(**names))

    def filled(count: int) -> Case:
        wanted = depth * before[count]
        place = min(bisect_left(before, wanted), count)
        if place and wanted - before[place - 1] < before[place] - wanted:
            place -= 1
        prompt = "".join([intro, *sentences[:place], needle, *sentences[place:count], end])
        return replace(case, prompt=prompt)

    def room(case: Case) -> int:
        return length - case.max_new_tokens - len(encode_prompt(tokenizer, case))

    bare = room(filled(0))
    if bare < 0:
        raise ValueError(
            f"`lengths` holds {length}, but needle, question and an answer of {case.max_new_tokens} tokens already "
            f"take {length - bare}."
        )
    count = min(bisect_left(before, bare), len(sentences))
    while room(filled(count)) < 0:
        count -= 1
    while count < len(sentences) and room(filled(count + 1)) >= 0:
        count += 1
    if count == len(sentences):
        raise ValueError(
            f"`haystack` has about {before[-1]} tokens, too few for the length {length} in `lengths`. Give more text."
        )
    return filled(count)


def _split(text: str, cut: str) -> list[str]:
    """The text in sentences, each with what ends it, which together are the text."""
    ends = [match.end() for match in re.finditer(cut, text)]
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)]) if start < end]


def _draw_unseen(
    draw: Callable[[random.Random], tuple[str, str]], rng: random.Random, text: str, tries: int = 1000
) -> tuple[str, str]:
    """A key and a value that do not occur in the text by themselves."""
    for _ in range(tries):
        key, value = draw(rng)
        if key not in text and value not in text:
            return key, value
    raise ValueError(f"`haystack` holds every key or value that {tries} draws of the template made, the last {key!r}.")


def _group(size: str, depth: float) -> str:
    return f"{size}, depth {100 * depth:g} %"


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")

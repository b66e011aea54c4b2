"""LongEval: which number is in a line of a long record, and which topic came first (LongChat, Li et al. 2023).

An entry is what one line of a published test-case file holds. `load_lines` and `load_topics` read such files;
`line_entries` and `topic_entries` make new ones in the same form, at any size; `line_cases` and `topic_cases` turn
entries into cases.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cases import Case
from .lines import LINE
from .words import ADJECTIVES, NOUNS

MAX_KEYS = len(ADJECTIVES) * len(NOUNS)
MAX_VALUE = 50_000
LINES_TOKENS, TOPICS_TOKENS = 100, 50  # of an answer, as the published evaluation allows

LINES_INTRO = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
    "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
    "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
)
# The published files end with the space.
LINES_QUESTION = "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {key}? I need the number. "
TOPICS_INTRO = (
    "Below is a record of our previous conversation on {count} different topics. You are the ASSISTANT, and I am the "
    "USER. At the beginning of each topic, the USER will say 'I would like to discuss the topic of <TOPIC>'. Memorize "
    "each <TOPIC>. At the end of the record, I will ask you to retrieve the first topic. Now the record start. "
)
TOPIC_START = "USER: I would like to discuss the topic of "
TOPICS_QUESTION = (
    " Now the record ends. What is the first topic we discussed? Only give me the topic name. Do not summarize "
    "yourself."
)

LINES_FIELDS = {"random_idx": list, "expected_number": int, "num_lines": int, "correct_line": str, "prompt": str}
TOPICS_FIELDS = {"test_id": int, "topics": list, "prompt": str}


def load_lines(path: str | Path) -> list[Case]:
    """Cases of a published file of lines, ``200_lines.jsonl``; their group is "200 lines".

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming line and field, if the file is not of this form or contradicts itself.
    """
    entries = _read_entries(Path(path), LINES_FIELDS)
    for number, entry in enumerate(entries, 1):
        if entry["correct_line"] not in entry["prompt"]:
            raise ValueError(f"Line {number} of '{path}': `correct_line` does not occur in `prompt`.")
        if not entry["correct_line"].endswith(f"<{entry['expected_number']}>\n"):
            raise ValueError(f"Line {number} of '{path}': `expected_number` is not the number on `correct_line`.")
    return line_cases(entries)


def load_topics(path: str | Path) -> list[Case]:
    """Cases of a published file of topics, ``5_topics.jsonl``; their group is "5 topics".

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming line and field, if the file is not of this form.
    """
    return topic_cases(_read_entries(Path(path), TOPICS_FIELDS))


def line_entries(num_lines: int, count: int = 50, seed: int = 0) -> list[dict[str, Any]]:
    """Test cases of records of `num_lines` lines, in the published form, their ids from words of our own.

    The published ids are an adjective and a noun from the package wonderwords; the numbers 1 to 50,000 are theirs.

    Raises:
        ValueError: if there are not that many ids, or `count` is not positive.
    """
    if not 1 <= num_lines <= MAX_KEYS:
        raise ValueError(f"`num_lines` must be between 1 and {MAX_KEYS}, got {num_lines}.")
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}.")
    rng = random.Random(f"lines {num_lines} {seed}")
    entries = []
    for _ in range(count):
        picks = rng.sample(range(MAX_KEYS), num_lines)
        keys = [f"{ADJECTIVES[pick // len(NOUNS)]}-{NOUNS[pick % len(NOUNS)]}" for pick in picks]
        values = [rng.randint(1, MAX_VALUE) for _ in keys]
        lines = [LINE.format(key=key, value=value) for key, value in zip(keys, values)]
        asked = rng.randrange(num_lines)
        entries.append(
            {
                "random_idx": [keys[asked], asked],
                "expected_number": values[asked],
                "num_lines": num_lines,
                "correct_line": lines[asked],
                "prompt": LINES_INTRO + "".join(lines) + LINES_QUESTION.format(key=keys[asked]),
            }
        )
    return entries


def topic_entries(path: str | Path, num_topics: int, count: int = 50, seed: int = 0) -> list[dict[str, Any]]:
    """Test cases of `num_topics` topics, in the published form, out of the conversations in a published file.

    Args:
        path: a file of topics, whose prompts are cut into one conversation per topic; the published one of 5 topics
            holds 30.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as `load_topics`; if a prompt does not fall into one conversation per topic; if `num_topics` is not
            between 1 and the number of conversations, or `count` is not positive.
    """
    conversations: dict[str, str] = {}
    for number, entry in enumerate(_read_entries(Path(path), TOPICS_FIELDS), 1):
        starts = [match.start() for match in re.finditer(re.escape(TOPIC_START), entry["prompt"])]
        end = entry["prompt"].find(TOPICS_QUESTION)
        if end < 0 or len(starts) != len(entry["topics"]):
            raise ValueError(
                f"Line {number} of '{path}': `prompt` must have '{TOPIC_START}' once for each of "
                f"{len(entry['topics'])} topics and '{TOPICS_QUESTION.strip()}' behind them; it has the former "
                f"{len(starts)} times."
            )
        for topic, start, stop in zip(entry["topics"], starts, [*starts[1:], end]):
            conversations.setdefault(topic, entry["prompt"][start:stop])
    if not 1 <= num_topics <= len(conversations):
        raise ValueError(
            f"`num_topics` must be between 1 and the {len(conversations)} topics of '{path}', got {num_topics}."
        )
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}.")
    rng = random.Random(f"topics {num_topics} {seed}")
    entries = []
    for test_id in range(count):
        topics = rng.sample(sorted(conversations), num_topics)
        body = "".join(conversations[topic] for topic in topics)
        prompt = TOPICS_INTRO.format(count=num_topics) + body + TOPICS_QUESTION
        entries.append({"test_id": test_id, "prompt": prompt, "topics": topics})
    return entries


def line_cases(entries: Sequence[dict[str, Any]]) -> list[Case]:
    """One case per entry; its id is the entry's place, its details the position of the line asked for."""
    return [
        Case(
            id=str(i),
            group=f"{entry['num_lines']} lines",
            prompt=entry["prompt"],
            references=(str(entry["expected_number"]),),
            metric=last_number,
            max_new_tokens=LINES_TOKENS,
            details={"key": entry["random_idx"][0], "position": entry["random_idx"][1]},
        )
        for i, entry in enumerate(entries)
    ]


def topic_cases(entries: Sequence[dict[str, Any]]) -> list[Case]:
    """One case per entry; its details hold all topics, the first of which is asked for."""
    return [
        Case(
            id=str(entry["test_id"]),
            group=f"{len(entry['topics'])} topics",
            prompt=entry["prompt"],
            references=(entry["topics"][0],),
            metric=first_topic,
            max_new_tokens=TOPICS_TOKENS,
            details={"topics": entry["topics"]},
        )
        for entry in entries
    ]


def last_number(answer: str, case: Case) -> float:
    """LongEval's rule for lines: the last number of the whole answer equals the expected one."""
    numbers = re.findall(r"\d+", answer)
    return float(bool(numbers) and int(numbers[-1]) == int(case.references[0]))


def first_topic(answer: str, case: Case) -> float:
    """A normalised match of the first topic, not LongEval's own scoring, which lets a model judge.

    Without case, punctuation and articles, the answer must hold the first topic as whole words, and no other topic of
    the case before it. A paraphrase, which a judge would accept, counts as wrong.
    """
    words = f" {_normalise(answer)} "
    found = [(words.find(f" {_normalise(topic)} "), topic) for topic in case.details["topics"]]
    found = [(place, -len(topic), topic) for place, topic in found if place >= 0]
    return float(bool(found) and min(found)[2] == case.references[0])


def _normalise(text: str) -> str:
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _read_entries(path: Path, fields: dict[str, type]) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of LongEval test cases '{path}'.")
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number} of '{path}' is not JSON: {error}.") from error
        for name, kind in fields.items():
            value = entry.get(name) if isinstance(entry, dict) else None
            if not isinstance(value, kind) or value == []:
                raise ValueError(
                    f"Line {number} of '{path}': the field `{name}` must be a non-empty {kind.__name__}, "
                    f"got {json.dumps(value)[:80]}."
                )
        entries.append(entry)
    return entries

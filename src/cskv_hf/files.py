"""Files in and out for the command line: calibration text, and files and directories replaced only when complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


def documents(path: Path) -> Iterator[str]:
    """The documents of a text file (one) or of a JSON-lines file (one per line, field ``text``).

    Raises:
        ValueError: if the file is missing, empty, or a line is no JSON object with a ``text``.
    """
    if not path.is_file():
        raise ValueError(f"The text file '{path}' does not exist.")
    if path.suffix not in (".jsonl", ".json"):
        text = path.read_text(encoding="utf-8", errors="replace")
        if not text.strip():
            raise ValueError(f"The text file '{path}' is empty.")
        yield text
        return
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                text = json.loads(line)["text"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"Line {number} of '{path}' is no JSON object with a 'text' field.") from error
            yield text


def calibration_samples(path: Path, tokenizer: Any, length: int) -> list[torch.Tensor]:
    """The file as samples of `length` tokens, documents one after the other; the last, shorter one included.

    Raises:
        ValueError: see [`documents`].
    """
    ids = [i for document in documents(path) for i in tokenizer(document)["input_ids"]]
    return [torch.tensor(ids[start : start + length]) for start in range(0, len(ids), length)]


def full_rows(path: Path, tokenizer: Any, length: int) -> list[torch.Tensor]:
    """The samples of [`calibration_samples`] that have all of their `length` tokens.

    Raises:
        ValueError: if there is none, or see [`documents`].
    """
    rows = [row for row in calibration_samples(path, tokenizer, length) if len(row) == length]
    if not rows:
        raise ValueError(f"'{path}' holds less than {length} tokens, too few to measure on.")
    return rows


def replace_directory(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a new directory beside `path`, then put it in the place of `path`, which is kept until then."""
    new, old = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    write(new)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)


def replace_file(path: Path, text: str) -> None:
    """Write a text file beside `path`, then put it in the place of `path`, which is kept until then."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)

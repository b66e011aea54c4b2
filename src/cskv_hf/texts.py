"""Calibration text out of files: documents, and rows of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .samples import cut

JSON_LINES = (".jsonl", ".ndjson", ".json")


def documents(path: Path) -> Iterator[str]:
    """The documents of a text file (one) or of a JSON-lines file (one per line that is not blank, field ``text``),
    which ends in .jsonl, .ndjson or .json.

    Raises:
        ValueError: if the file is missing, empty or not UTF-8 text, or a line is not a JSON object with a ``text``
            that is a string.
    """
    if not path.is_file():
        raise ValueError(f"The text file '{path}' does not exist.")
    if path.suffix.lower() not in JSON_LINES:
        text = _text_of(path)
        if not text.strip():
            raise ValueError(f"The text file '{path}' is empty.")
        yield text
        return
    empty = True
    for number, line in enumerate(_text_of(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ValueError(f"Line {number} of '{path}' is not a JSON object with a 'text' field that is a string.")
        empty = empty and not text.strip()
        yield text
    if empty:
        raise ValueError(f"The text file '{path}' is empty.")


def _text_of(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not UTF-8 text ({error}). Unpack or convert it first.") from error
    if "\0" in text:
        raise ValueError(f"'{path}' is not text: it holds null characters. Unpack or convert it first.")
    return text


def calibration_samples(path: Path, tokenizer: Any, length: int) -> list[torch.Tensor]:
    """The file as samples of `length` tokens, documents one after the other; the last, shorter one included. See
    [`cut`].

    Raises:
        ValueError: see [`documents`].
    """
    ids = [i for document in documents(path) for i in tokenizer(document)["input_ids"]]
    return cut(torch.tensor(ids), length, tokenizer)


def full_rows(path: Path, tokenizer: Any, length: int) -> list[torch.Tensor]:
    """The samples of [`calibration_samples`] that have all of their `length` tokens.

    Raises:
        ValueError: if there is none, or see [`documents`].
    """
    rows = [row for row in calibration_samples(path, tokenizer, length) if len(row) == length]
    if not rows:
        raise ValueError(f"'{path}' holds less than {length} tokens, too few to measure on.")
    return rows

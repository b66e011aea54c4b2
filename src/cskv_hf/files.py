"""Files in and out for the command line: calibration text, and files and directories replaced only when complete."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


def documents(path: Path) -> Iterator[str]:
    """The documents of a text file (one) or of a JSON-lines file (one per line that is not blank, field ``text``).

    Raises:
        ValueError: if the file is missing, empty, or a line is no JSON object with a ``text`` that is a string.
    """
    if not path.is_file():
        raise ValueError(f"The text file '{path}' does not exist.")
    if path.suffix not in (".jsonl", ".json"):
        text = path.read_text(encoding="utf-8", errors="replace")
        if not text.strip():
            raise ValueError(f"The text file '{path}' is empty.")
        yield text
        return
    empty = True
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (json.JSONDecodeError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise ValueError(f"Line {number} of '{path}' is no JSON object with a 'text' field that is a string.")
            empty = empty and not text.strip()
            yield text
    if empty:
        raise ValueError(f"The text file '{path}' is empty.")


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


def check_out(out: Path) -> None:
    """Refuse a place for an adapter where something else lies, before any work is done.

    Raises:
        ValueError: if `out` is a file, has no name of its own, or is a directory that holds no CSKV adapter.
    """
    if out.name in ("", ".."):
        raise ValueError(f"`out`='{out}' has no name of its own. Name a new directory, such as 'my-adapter'.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"`out`='{out}' is a file. Name a new directory, or that of a CSKV adapter to replace.")
    if out.is_dir() and any(out.iterdir()) and not _is_adapter(out):
        raise ValueError(
            f"`out`='{out}' holds something that is no CSKV adapter and would be lost. Name a new or an empty "
            "directory, or that of a CSKV adapter to replace."
        )


def _is_adapter(folder: Path) -> bool:
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and settings.get("peft_type") == "CSKV"


def replace_directory(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a new directory beside `path`, then put it in the place of `path`, an adapter, which is kept
    until then.

    Raises:
        ValueError: see [`check_out`].
    """
    check_out(path)
    path = path.resolve()  # of a link, what it points to
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    new, old = work / "new", work / "old"
    try:
        write(new)
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work, ignore_errors=True)


def replace_file(path: Path, text: str) -> None:
    """Write a text file beside `path`, then put it in the place of `path`, which is kept until then."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)

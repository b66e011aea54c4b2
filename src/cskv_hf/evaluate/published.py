"""Files of published benchmarks: JSON lines read and checked, from a disk or the Hub; prompts cut in the middle."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

Fields = Mapping[str, tuple[str, Callable[[Any], bool]]]  # name -> what it must be, in words and as a test


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(is_text, value))


FIELDS: Fields = {  # that all of LongBench's kin have
    "input": ("a text", is_text),
    "context": ("a text", is_text),
    "answers": ("a list of one text or more", is_texts),
    "length": ("a whole number", lambda value: type(value) is int),
    "dataset": ("a text", is_text),
}


def read_records(path: str | os.PathLike, fields: Fields = FIELDS) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and record of every line of a file; empty lines are passed over.

    Raises:
        ValueError: if the file is missing, not text or without a record, or a line is not a JSON object with `fields`.
    """
    if not Path(path).is_file():
        raise ValueError(f"The file '{path}' does not exist.")
    with open(path, encoding="utf-8") as file:
        yield from _records(file, str(path), fields)


def read_published(
    name: str, repo_id: str, archive: str, folder: str | os.PathLike | None, fields: Fields = FIELDS
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of ``NAME.jsonl``: in `folder` or a folder ``data`` in it, else in a zip file of a Hub dataset.

    Raises:
        ValueError: as for [`read_records`], or if the file is not in `folder` and cannot be downloaded.
    """
    file_name = f"{name}.jsonl"
    for place in () if folder is None else (Path(folder), Path(folder) / "data"):
        if (place / file_name).is_file():
            yield from read_records(place / file_name, fields)
            return
    downloaded = _dataset_file(repo_id, archive)
    with zipfile.ZipFile(downloaded) as files:
        member = next((m for m in files.namelist() if PurePosixPath(m).name == file_name), None)
        if member is None:
            raise ValueError(f"'{archive}' of the Hub dataset '{repo_id}' holds no '{file_name}'.")
        with files.open(member) as file:
            yield from _records(io.TextIOWrapper(file, encoding="utf-8"), f"{archive}/{member}", fields)


def cut_middle(prompt: str, tokenizer: Any, max_length: int | None) -> tuple[str, int]:
    """The prompt with at most `max_length` tokens, and how many were cut; uncut where `max_length` is None.

    As LongBench does it: the first and the last ``max_length // 2`` tokens, decoded apart, without special tokens, and
    joined. Encoded again, the two may meet in another number of tokens; a chat template's come on top.
    """
    if max_length is None:
        return prompt, 0
    ids = tokenizer(prompt)["input_ids"]
    if len(ids) <= max_length:
        return prompt, 0
    half = max_length // 2
    parts = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
    return "".join(parts), len(ids) - 2 * half


def check_max_length(max_length: int | None, tokenizer: Any) -> None:
    """Refuse what [`cut_middle`] cannot do.

    Raises:
        ValueError: if `max_length` is below 2, or given without a tokenizer.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"`max_length` must be at least 2 tokens, got {max_length}.")
    if max_length is not None and tokenizer is None:
        raise ValueError(f"`max_length`={max_length} is in tokens and needs the `tokenizer` of the model.")


def _records(lines: Iterable[str], source: str, fields: Fields) -> Iterator[tuple[int, dict[str, Any]]]:
    number = records = 0
    try:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _checked(line, f"Line {number} of '{source}'", fields)
                records += 1
    except UnicodeDecodeError as error:
        raise ValueError(f"'{source}' is not UTF-8 text after line {number} ({error}).") from error
    if not records:
        raise ValueError(f"'{source}' holds no record.")


def _checked(line: str, place: str, fields: Fields) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error}).") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place} is not a JSON object but {str(record)[:60]!r}.")
    for name, (wanted, holds) in fields.items():
        if name not in record:
            raise ValueError(f"{place} has no field '{name}'; it has {', '.join(record) or 'none'}.")
        if not holds(record[name]):
            raise ValueError(f"{place}: field '{name}' must be {wanted}, got {str(record[name])[:60]!r}.")
    return record


def _dataset_file(repo_id: str, filename: str) -> Path:
    """A file of a Hub dataset, downloaded unless it is already on this machine.

    Raises:
        ValueError: if it cannot be downloaded, with the reason and the way around.
    """
    try:
        return Path(hf_hub_download(repo_id, filename, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"'{filename}' of the Hub dataset '{repo_id}' cannot be downloaded "
            f"({str(error).strip().splitlines()[0]}). Download it where there is a network, unpack it, and give the "
            "path of its .jsonl file."
        ) from error

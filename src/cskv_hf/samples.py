"""Data to calibrate and train on, of any accepted kind, as input_ids and attention masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch


def samples(
    data: Iterable[Any], tokenizer: Any, max_length: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Calibration data of any accepted kind as (input_ids, attention_mask or None), both (batch, length).

    Raises:
        TypeError: for a kind that is not accepted, and at once for a single string or mapping, whose elements would
            be taken for samples.
        ValueError: for strings without a tokenizer, and at once for a tensor of one dimension.
    """
    if isinstance(data, (str, Mapping)):
        raise TypeError(
            f"`data` must be an iterable of samples, got a single {type(data).__name__}; put it in a list, or give "
            "one of its parts."
        )
    if isinstance(data, torch.Tensor) and data.dim() < 2:
        raise ValueError(
            f"`data` must be an iterable of samples, got a tensor of shape {tuple(data.shape)}, each token of which "
            "would be a sample; put it in a list, or give one of shape (batch, length)."
        )
    return _samples(data, tokenizer, max_length)


def _samples(
    data: Iterable[Any], tokenizer: Any, max_length: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    for sample in data:
        if isinstance(sample, dict) and "input_ids" not in sample and isinstance(sample.get("text"), str):
            sample = sample["text"]
        if isinstance(sample, str):
            if tokenizer is None:
                raise ValueError("`data` holds strings; pass `tokenizer=` as well, or give `input_ids` tensors.")
            ids = torch.tensor(tokenizer(sample)["input_ids"], dtype=torch.long)
            for piece in cut(ids, max_length, tokenizer):
                yield piece[None], None
            continue
        mask = None
        if hasattr(sample, "keys"):
            if "input_ids" not in sample:
                raise TypeError(
                    f"`data` holds samples with {', '.join(map(repr, sample))}; give them 'input_ids', or 'text' and "
                    "pass `tokenizer=`. Of a chat make a string first: `tokenizer.apply_chat_template(messages, "
                    "tokenize=False)`."
                )
            mask, sample = sample.get("attention_mask"), sample["input_ids"]
            mask = None if mask is None else torch.atleast_2d(torch.as_tensor(mask))
        is_numbers = isinstance(sample, torch.Tensor) or (
            isinstance(sample, (list, tuple)) and not any(isinstance(item, (str, Mapping)) for item in sample)
        )
        if not is_numbers:
            raise TypeError(
                "`data` must be an iterable of input_ids tensors, of dicts with 'input_ids' (and 'attention_mask') "
                f"or 'text', or of strings with `tokenizer=`; got an element of type {type(sample).__name__}."
            )
        input_ids = torch.atleast_2d(torch.as_tensor(sample, dtype=torch.long))
        yield input_ids, mask


def cut(ids: torch.Tensor, length: int, tokenizer: Any) -> list[torch.Tensor]:
    """Tokens (n,) in pieces of `length`, the last one perhaps shorter. Each begins with the token that the tokenizer
    began the text with (BOS), if it did, unless it has but one: some models (Gemma) are lost without, and all are used
    with it."""
    begin = getattr(tokenizer, "bos_token_id", None)
    if begin is None or length < 2 or len(ids) == 0 or int(ids[0]) != begin:
        return list(ids.split(length)) if len(ids) else []
    pieces, start, first = [], 0, ids.new_tensor([begin])
    while start < len(ids):
        added = first[: int(ids[start] != begin)]
        piece = torch.cat([added, ids[start : start + length - len(added)]])
        start += len(piece) - len(added)
        pieces.append(piece)
    return pieces

"""Answering cases greedily through a cache, in batches, with progress; an interrupted run goes on where it was.

Answers are appended to a file of JSON lines as they come. A batch is made of the same cases however often a run was
interrupted, so that it ends with the same answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig
from transformers.cache_utils import Cache

from ..families import context_length
from ..files import replace_file
from ..generation import CACHE_ARGUMENT
from ..runs import differences
from .cases import Answer, Case


@torch.no_grad()
def answer_cases(
    model: nn.Module,
    tokenizer: Any,
    cases: Sequence[Case],
    make_cache: Callable[[], Cache],
    *,
    batch_size: int = 8,
    path: Path | None = None,
    settings: dict[str, Any] | None = None,
    context: int | None = None,
    description: str = "Answering",
    progress: bool = True,
) -> list[Answer]:
    """Greedy answers to every case, in the order of `cases`.

    The whole prompt is prefilled, with exact keys and values as CSKV does it, and the answer reads what the cache
    kept of them. A case whose prompt and answer exceed the model's context is skipped and said so in its answer.

    Args:
        make_cache: ``CSKVCache``, ``DynamicCache`` or another function that makes a cache.
        batch_size: prompts at a time, padded on the left, of like length.
        path: JSON lines to write to and, if they are there, to go on from.
        context: tokens of prompt and answer that the model can take; what its config says by default.
        settings: what the answers depend on (model, adapter, cache); the first line of the file, compared when going
            on.

    Raises:
        ValueError: if `path` holds answers under other settings or is not such a file, or if two cases share an id.
    """
    keys = [(case.group, case.id) for case in cases]
    if len(set(keys)) < len(keys):
        raise ValueError(f"Two cases share the id {next(k for k in keys if keys.count(k) > 1)[1]!r}.")
    header = {"settings": settings or {}, "batch_size": batch_size, "cases": len(cases)}
    done = {} if path is None else _read_answers(path, header)
    limit = context_length(model) if context is None else context
    prompts = [encode_prompt(tokenizer, case) for case in cases]
    order = sorted(range(len(cases)), key=lambda i: len(prompts[i]))  # of like length: little padding
    sizes = [len(prompt) + case.max_new_tokens for prompt, case in zip(prompts, cases)]
    fits = [i for i in order if sizes[i] <= limit]
    answers = {
        keys[i]: Answer(cases[i].id, cases[i].group, None, None, len(prompts[i])) for i in order if sizes[i] > limit
    }
    batches = [fits[start : start + batch_size] for start in range(0, len(fits), batch_size)]
    with tqdm(total=len(fits), desc=description, unit="case", leave=False, disable=not progress) as bar:
        for batch in batches:
            if all(keys[i] in done for i in batch):
                answers |= {keys[i]: done[keys[i]] for i in batch}
            else:
                texts = generate_answers(
                    model, tokenizer, [prompts[i] for i in batch], [cases[i] for i in batch], make_cache
                )
                for i, text in zip(batch, texts):
                    score = float(cases[i].metric(text, cases[i]))
                    answers[keys[i]] = Answer(cases[i].id, cases[i].group, text, score, len(prompts[i]))
                if path is not None:
                    _append(path, header, [answers[keys[i]] for i in batch])
            bar.update(len(batch))
    return [answers[key] for key in keys]


@contextmanager
def own_generation_config(model: nn.Module) -> Iterator[None]:
    """Within it `generate` knows nothing of the model's own defaults (penalties, sampling, a cache) but its tokens."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    held = {id(m): (m, m.generation_config) for m in (model, base)}
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    try:
        for one, config in held.values():
            one.generation_config = GenerationConfig(**{name: getattr(config, name) for name in tokens})
        yield
    finally:
        for one, config in held.values():
            one.generation_config = config


def generate_answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    cases: Sequence[Case],
    make_cache: Callable[[], Cache],
) -> list[str]:
    """One batch: token ids of the prompts in, the texts generated out, cut after each case's stop.

    Caches that know no padding (`pads` is False) get prompts of different length one by one.
    """
    cache = make_cache()
    if len({len(prompt) for prompt in prompts}) > 1 and not getattr(cache, "pads", True):
        one_by_one = [generate_answers(model, tokenizer, [p], [c], make_cache) for p, c in zip(prompts, cases)]
        return [text for texts in one_by_one for text in texts]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    stops = sorted({case.stop for case in cases if case.stop is not None})
    stopping = {"stop_strings": stops, "tokenizer": tokenizer} if stops and len({c.stop for c in cases}) == 1 else {}
    with own_generation_config(model):
        output = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            **{CACHE_ARGUMENT: cache},
            max_new_tokens=max(case.max_new_tokens for case in cases),
            do_sample=False,
            pad_token_id=pad,
            **stopping,
        )
    texts = []
    for row, case in zip(output[:, longest:], cases):
        text = tokenizer.decode(row[: case.max_new_tokens], skip_special_tokens=True)
        texts.append(text if case.stop is None else text.split(case.stop)[0])
    return texts


def encode_prompt(tokenizer: Any, case: Case) -> list[int]:
    """Token ids of a case's prompt, in the tokenizer's chat template where there is one and the case is for it."""
    if case.chat and getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": case.prompt}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
        if case.answer_prefix:
            ids = [*ids, *tokenizer(case.answer_prefix, add_special_tokens=False)["input_ids"]]
        return list(ids)
    return list(tokenizer(case.prompt + case.answer_prefix)["input_ids"])


def _read_answers(path: Path, header: dict[str, Any]) -> dict[tuple[str, str], Answer]:
    """The answers of a file that an interrupted run left; a last line that was cut short is dropped."""
    if not path.exists() or path.stat().st_size == 0:
        return {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if not lines[-1].endswith("\n"):
        lines.pop()
        replace_file(path, "".join(lines))
    if not lines:
        return {}
    answers = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if number > 1:
                answers[entry["group"], entry["id"]] = Answer(**entry)
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(f"Line {number} of '{path}' is not an answer; remove the file to start over.") from error
        if number == 1 and entry != (wanted := json.loads(json.dumps(header))):
            raise ValueError(
                f"'{path}' holds answers under other settings than these: {differences(entry, wanted)}. Give another "
                "folder, or remove the file to start over."
            )
    return answers


def _append(path: Path, header: dict[str, Any], answers: Sequence[Answer]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    with open(path, "a", encoding="utf-8") as file:
        if new:
            file.write(json.dumps(header) + "\n")
        for answer in answers:
            file.write(json.dumps(asdict(answer)) + "\n")

"""Log-likelihoods of given continuations with a compressed past, in batches: what multiple choice is scored by.

As for perplexity (see perplexity.py) the text goes through the cache in steps of `stride` tokens. Rows are padded on
the right: no token looks at what comes after it and a cache compresses after a step, so that nothing of a row depends
on the padding or on the rows beside it, whatever the cache knows about padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..generation import CACHE_ARGUMENT


@dataclass(frozen=True)
class Row:
    """Tokens to be read, and which of what follows them is scored.

    Attributes:
        tokens: token ids, at least one.
        first: index of the first token whose successor is scored.
        finals: token ids that may follow the last one; each is scored.
    """

    tokens: tuple[int, ...]
    first: int
    finals: tuple[int, ...]


@dataclass(frozen=True)
class RowScores:
    """Scores of a [`Row`], in nats.

    Attributes:
        log_probs: (len(tokens) - 1 - first,) float64, of the tokens after `first`.
        is_greedy: of the same shape, whether each is the most likely one.
        finals: log-probability of each of the row's finals.
        most_likely: token id after the last token.
    """

    log_probs: torch.Tensor
    is_greedy: torch.Tensor
    finals: dict[int, float]
    most_likely: int

    def of(self, continuation: Sequence[int]) -> tuple[float, bool]:
        """Log-likelihood of the row's last tokens and a final, and whether greedy decoding would have written them."""
        count, final = len(continuation) - 1, continuation[-1]
        start = len(self.log_probs) - count
        total = float(self.log_probs[start:].sum()) + self.finals[final]
        return total, bool(self.is_greedy[start:].all()) and self.most_likely == final


@torch.no_grad()
def score_rows(
    model: nn.Module,
    rows: Sequence[Row],
    make_cache: Callable[[], Cache],
    *,
    stride: int = 32,
    dtype: torch.dtype | None = None,
) -> list[RowScores]:
    """Read one batch of rows through a cache and score what follows.

    Logits are held for one step only and only where something is scored.

    Args:
        model: a causal language model.
        make_cache: makes the cache to measure, ``CSKVCache``, ``DynamicCache`` or another.
        stride: tokens per forward; the tokens of one forward see each other exactly.
        dtype: of the log-softmax; by default the model's, but at least float32.
    """
    longest = max(len(row.tokens) for row in rows)
    input_ids = torch.tensor([row.tokens + (0,) * (longest - len(row.tokens)) for row in rows], device=model.device)
    first = min(row.first for row in rows)
    log_probs = torch.zeros(len(rows), longest, dtype=torch.float64)
    is_greedy = torch.zeros(len(rows), longest, dtype=torch.bool)
    last: dict[int, tuple[dict[int, float], int]] = {}
    cache = make_cache()
    for start in range(0, longest, stride):
        end = min(start + stride, longest)
        kept = min(end - first, end - start)  # last tokens of the step that are scored
        output = model(
            input_ids=input_ids[:, start:end], **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=max(kept, 1)
        )
        if kept <= 0:
            continue
        kind = dtype or torch.promote_types(output.logits.dtype, torch.float32)
        scores = output.logits.log_softmax(-1, dtype=kind)
        best, offset = scores.argmax(-1), end - kept
        targets = input_ids[:, offset + 1 : end + 1]
        inner = slice(offset, offset + targets.shape[1])
        likelihood = scores[:, : targets.shape[1]].gather(-1, targets[..., None])[..., 0]
        log_probs[:, inner] = likelihood.double().cpu()
        is_greedy[:, inner] = (best[:, : targets.shape[1]] == targets).cpu()
        for index, row in enumerate(rows):
            place = len(row.tokens) - 1 - offset
            if 0 <= place < kept:
                finals = scores[index, place, list(row.finals)].double().tolist()
                last[index] = dict(zip(row.finals, finals)), int(best[index, place])
    scored = [slice(row.first, len(row.tokens) - 1) for row in rows]
    return [RowScores(log_probs[i, part], is_greedy[i, part], *last[i]) for i, part in enumerate(scored)]


def batches(rows: Sequence[Row], batch_size: int, *, same_length: bool = False) -> Iterator[list[int]]:
    """Indices of rows of like length, longest first, so that memory runs out at once or not at all.

    Args:
        same_length: never pad; for models that turn all keys by the length of the longest row (dynamic RoPE scaling).
    """
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens)):
        other = same_length and batch and len(rows[batch[0]].tokens) != len(rows[index].tokens)
        if other or len(batch) == batch_size:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def collect_rows(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int) -> tuple[list[Row], list[int]]:
    """The rows that (context, continuation) pairs of token ids need, and for each pair the index of its row.

    Pairs that differ in the last token only, as one-token choices do, share a row.

    Args:
        max_length: tokens that a model reads at most; longer pairs lose their first tokens.

    Raises:
        ValueError: if a context or continuation is empty, or a continuation longer than `max_length`.
    """
    firsts: dict[tuple[int, ...], int] = {}
    finals: dict[tuple[int, ...], dict[int, None]] = {}
    keys = []
    for number, (context, continuation) in enumerate(pairs):
        if not context or not 0 < len(continuation) <= max_length:
            raise ValueError(
                f"Request {number} has a context of {len(context)} and a continuation of {len(continuation)} tokens; "
                f"needed are at least 1 of each, and a continuation of at most {max_length} (`max_length`)."
            )
        tokens = (*context, *continuation)[-(max_length + 1) :]
        key = tokens[:-1]
        first = len(key) - len(continuation)
        firsts[key] = min(first, firsts.get(key, first))
        finals.setdefault(key, {})[tokens[-1]] = None
        keys.append(key)
    index = {key: i for i, key in enumerate(firsts)}
    return [Row(key, firsts[key], tuple(finals[key])) for key in firsts], [index[key] for key in keys]

"""Perplexity with a compressed past: every past token outside window and sinks is read from the cache that is being
measured.

An ordinary perplexity is one forward over the text, a prefill, which attends to exact keys and never touches what a
cache compresses. Here the text goes through the cache in steps of `stride` tokens, as in generation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..generation import CACHE_ARGUMENT
from .intervals import mean_interval


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood, with the parts it is made of.

    Attributes:
        losses: (rows,) mean negative log-likelihood of each row, in nats per token.
        num_tokens: tokens predicted.
    """

    losses: torch.Tensor
    num_tokens: int

    @property
    def value(self) -> float:
        return math.exp(float(self.losses.mean()))

    def ratio_interval(
        self, reference: Perplexity, samples: int = 2000, seed: int = 0
    ) -> tuple[float, float] | tuple[None, None]:
        """95 % interval of ``self.value / reference.value`` by a paired bootstrap over rows; see [`mean_interval`]."""
        low, high = mean_interval(self.losses - reference.losses, samples, seed)
        return (None, None) if low is None else (math.exp(low), math.exp(high))


@torch.no_grad()
def compressed_perplexity(
    model: nn.Module, input_ids: torch.Tensor, make_cache: Callable[[], Cache], *, stride: int = 32, skip: int = 64
) -> Perplexity:
    """Perplexity of `input_ids` read through a cache.

    Args:
        model: a causal language model.
        input_ids: (rows, length), no padding.
        make_cache: makes the cache to measure, ``CSKVCache`` or ``DynamicCache``.
        stride: tokens per forward; the tokens of one forward see each other exactly.
        skip: first tokens of each row that are not scored, since nothing of their past is compressed yet.

    Raises:
        ValueError: if the rows are not longer than `skip`.
    """
    rows, length = input_ids.shape
    if length <= skip + 1:
        raise ValueError(f"Rows of {length} tokens leave nothing to score after `skip`={skip}.")
    cache, loss = make_cache(), torch.zeros(rows, dtype=torch.float64)
    for start in range(0, length - 1, stride):
        piece = input_ids[:, start : min(start + stride, length - 1)].to(model.device)
        logits = model(input_ids=piece, **{CACHE_ARGUMENT: cache}, use_cache=True).logits.float()
        targets = input_ids[:, start + 1 : start + 1 + piece.shape[1]].to(model.device)
        likelihood = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        scored = torch.arange(start + 1, start + 1 + piece.shape[1], device=piece.device) >= skip
        loss -= (likelihood * scored).sum(1).double().cpu()
    count = length - max(skip, 1)  # the first token is predicted by nothing
    return Perplexity(loss / count, rows * count)

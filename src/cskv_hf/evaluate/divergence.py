"""How far next-token predictions over a compressed past are from those over the full cache: perplexity, KL, agreement.

Both caches read the same text side by side, in steps of `stride` tokens; see perplexity.py for why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

from ..cache import CSKVCache
from ..generation import CACHE_ARGUMENT
from ..sensitivity import kl_divergence
from .intervals import mean_interval
from .perplexity import Perplexity


@dataclass(frozen=True)
class Comparison:
    """What a cache changes.

    Attributes:
        full, compressed: perplexity over the full cache and over the one measured.
        kl_by_row: (rows,) KL(full || compressed) of the next-token distribution, in nats per token.
        agreement_by_row: (rows,) share of tokens at which both predict the same.
    """

    full: Perplexity
    compressed: Perplexity
    kl_by_row: torch.Tensor
    agreement_by_row: torch.Tensor

    @property
    def kl(self) -> float:
        return float(self.kl_by_row.mean())

    @property
    def agreement(self) -> float:
        return float(self.agreement_by_row.mean())

    @property
    def ratio(self) -> float:
        return self.compressed.value / self.full.value

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % intervals of ``ratio`` (paired), ``kl`` and ``agreement``, by a bootstrap over rows."""
        return {
            "ratio": self.compressed.ratio_interval(self.full),
            "kl": mean_interval(self.kl_by_row),
            "agreement": mean_interval(self.agreement_by_row),
        }


@torch.no_grad()
def compare_with_full_cache(
    model: nn.Module,
    input_ids: torch.Tensor,
    make_cache: Callable[[], Cache],
    *,
    stride: int = 32,
    skip: int = 64,
    batch_size: int = 16,
) -> Comparison:
    """Compare a cache with the full one on `input_ids` (rows, length), no padding.

    Args:
        stride, skip: as in [`compressed_perplexity`].
        batch_size: rows at a time.

    Raises:
        ValueError: if the rows are not longer than `skip`.
    """
    rows, length = input_ids.shape
    if length <= skip + 1:
        raise ValueError(f"Rows of {length} tokens leave nothing to score after `skip`={skip}.")
    losses = torch.zeros(2, rows, dtype=torch.float64)
    divergence, same = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    for first in range(0, rows, batch_size):
        batch = input_ids[first : first + batch_size].to(model.device)
        caches, here = (DynamicCache(config=model.config), make_cache()), slice(first, first + len(batch))
        for start in range(0, length - 1, stride):
            piece = batch[:, start : min(start + stride, length - 1)]
            scored = slice(max(0, skip - start - 1), None)
            full, other = (
                model(input_ids=piece, **{CACHE_ARGUMENT: cache}, use_cache=True)
                .logits[:, scored]
                .float()
                .log_softmax(-1)
                for cache in caches
            )
            targets = batch[:, start + 1 : start + 1 + piece.shape[1]][:, scored, None]
            for side, likelihood in enumerate((full, other)):
                losses[side, here] -= likelihood.gather(-1, targets)[..., 0].sum(1).double().cpu()
            divergence[here] += kl_divergence(full, other).sum(1).double().cpu()
            same[here] += (full.argmax(-1) == other.argmax(-1)).sum(1).double().cpu()
    count = length - max(skip, 1)  # the first token is predicted by nothing
    full, compressed = (Perplexity(loss / count, rows * count) for loss in losses)
    return Comparison(full, compressed, divergence / count, same / count)


def evaluation_record(model: nn.Module, input_ids: torch.Tensor, source: str) -> dict[str, Any]:
    """[`compare_with_full_cache`] of a model's CSKV adapter, as ``fit_report["evaluation"]`` holds it.

    Args:
        input_ids: (rows, length), text that was not calibrated on.
        source: what it is, for the model card.
    """
    result = compare_with_full_cache(model, input_ids, CSKVCache)
    low, high = result.compressed.ratio_interval(result.full)
    return {
        "source": source,
        "tokens": result.full.num_tokens,
        "perplexity_full": result.full.value,
        "perplexity": result.compressed.value,
        "ratio": result.ratio,
        "ratio_low": low,
        "ratio_high": high,
        "kl": result.kl,
        "agreement": result.agreement,
    }

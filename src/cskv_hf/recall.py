"""A part of each calibration sample once more at its end: what a model reads to find something again.

Prose seldom asks back, so that statistics of it say little of the heads that retrieve, and an adapter may lose answers
while its perplexity is fine. Text that comes again makes those heads read what came before. A layer whose sliding
window is shorter than four sevenths of a sample does not see the first reading any more.
"""

from __future__ import annotations

import torch


def recalled(ids: torch.Tensor) -> torch.Tensor:
    """A sample (length,) and then a seventh of it, from its middle: (length + length // 7,)."""
    again = len(ids) // 7
    return torch.cat([ids, ids[3 * again : 4 * again]])


def longest_sample(most: int) -> int:
    """Tokens of which [`recalled`] makes no more than `most`."""
    return 7 * most // 8


def pieces(ids: torch.Tensor, longest: int) -> tuple[torch.Tensor, ...]:
    """A sample in as few pieces of at most `longest` tokens as there can be, of about one length."""
    return ids.tensor_split(max(1, -(-len(ids) // longest)))


def together(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows of tokens as one batch: input_ids (rows, length), padded on the right, and their attention mask, None where
    all are of one length."""
    if len({len(ids) for ids in rows}) == 1:
        return torch.stack(rows), None
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad([torch.ones_like(ids) for ids in rows], batch_first=True)

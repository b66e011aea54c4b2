"""A part of each calibration sample once more at its end: what a model reads to find something again.

Prose seldom asks back, so that statistics of it say little of the heads that retrieve, and an adapter may lose answers
while its perplexity is fine. Text that comes again makes those heads read what came before.
"""

from __future__ import annotations

import torch


def recalled(ids: torch.Tensor, most: int) -> torch.Tensor:
    """A sample (length,) and then its middle third: (4/3 length,), or `most` tokens of a sample that has been cut to
    its first 3/4 `most`."""
    ids = ids[: 3 * most // 4]
    third = len(ids) // 3
    return torch.cat([ids, ids[third : 2 * third]])


def together(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows of tokens as one batch: input_ids (rows, length), padded on the right, and their attention mask, None where
    all are of one length."""
    if len({len(ids) for ids in rows}) == 1:
        return torch.stack(rows), None
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad([torch.ones_like(ids) for ids in rows], batch_first=True)

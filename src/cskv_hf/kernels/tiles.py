"""How many old tokens of every tile of 64 are seen: what the score kernels of a GPU read in place of a mask.

They turn keys by their places in a tile and queries by where the tile begins, and hide what lies after the tokens
that are seen. Tiles that are not like that, as of positions with gaps or of a mask with holes, are left to a second
run of `score_kernel` that computes every turn and reads the mask. Which ones are is known on the device only, so that
no host waits for it and a CUDA graph holds for whatever comes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..step import HIDDEN
from .sizes import cdiv

TABLES, IN_TILES, FROM_POSITIONS = 0, 1, 2  # what turns keys: cos and sin of every token, products, or computed
ONLY, FIRST, SECOND = 0, 1, 2  # runs of `score_kernel`
TILE, BLOCK = 64, 32  # tokens of a tile, and of what is seen of it or not
OTHERWISE = -1  # a tile for the second run


class Seen(NamedTuple):
    """What is seen of old tokens.

    Attributes:
        counts: (batch or 1, tiles) int32, tokens of each tile: 0, 32 or 64 from its first on, or `OTHERWISE`.
        num_tiles: (batch or 1,) int32, how many tiles there are up to the last of which any are.
    """

    counts: torch.Tensor
    num_tiles: torch.Tensor


def tokens_seen(old_mask: torch.Tensor | None, positions: torch.Tensor | None, num_old: int, span: int) -> Seen:
    """How many tokens of each tile are seen.

    Args:
        old_mask: (batch or 1, 1, 1, num_old), bool or float to be added; None sees all.
        positions: (batch or 1, num_old) of every token; None if they follow one another.
        span: tokens whose turns are taken from the first of them, a multiple of `TILE`.
    """
    some = positions if old_mask is None else old_mask
    seen = plain = torch.ones(1, num_old, dtype=torch.bool, device=some.device)
    if old_mask is not None and old_mask.dtype == torch.bool:
        seen = old_mask[:, 0, 0]
    elif old_mask is not None:
        seen = old_mask[:, 0, 0] == 0
        plain = seen | (old_mask[:, 0, 0] < HIDDEN)
    if positions is not None:
        firsts = positions[:, ::span].repeat_interleave(span, dim=1)[:, :num_old]
        places = torch.arange(num_old, device=some.device) % span
        plain = plain & ((positions - firsts == places) | ~seen)
    rows, num_tiles = max(len(seen), len(plain)), cdiv(num_old, TILE)
    missing = num_tiles * TILE - num_old
    by_block = rows, num_tiles, TILE // BLOCK, BLOCK
    seen = F.pad(seen.expand(rows, -1), (0, missing), value=False).view(by_block)
    plain = F.pad(plain.expand(rows, -1), (0, missing), value=True).view(by_block).flatten(2).all(-1)
    whole, some = seen.all(-1), seen.any(-1)
    first, second = whole.unbind(-1)
    plain = plain & (whole == some).all(-1) & (first | ~second)
    count = torch.where(plain, BLOCK * whole.sum(-1), OTHERWISE).int()
    order = torch.arange(1, num_tiles + 1, device=seen.device, dtype=torch.int32)
    return Seen(count, torch.where(count != 0, order, 0).amax(-1))

"""Attention over a compressed past, in torch or by the kernels.

Keys of the past are rebuilt in tiles and thrown away; values never are: the attention weights aggregate latents, and
``value_B`` is applied once at the end (``P (c_v B_vᵀ + μ) = (P c_v) B_vᵀ + (P 1) μ``). Exact and compressed parts
meet in one softmax, online but on a GPU, so that neither the scores of a long prompt nor a layer's rebuilt keys or
values exist at any time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import kernels
from .factors import LayerFactors, compute_dtype, without_autocast
from .handover import CompressedKV
from .kernels import cpu
from .rope import paired, rotate_paired

CPU_TILE, GPU_TILE = 2**20, 2**24  # elements of a tile of keys or latents: about a CPU's caches; enough for a GPU
QUERY_CHUNK = 128  # queries at a time, which bounds the scores of a long prompt over a long past
GPU_SCORES = 2**26  # elements of scores that the kernels write at a time, at most, if more than one query is left
GPU_ROWS = 2**20  # rows of queries of a batch at a time: a grid has 65,535 places at most for each 32 of them


def compressed_attention(
    query: torch.Tensor,
    kv: CompressedKV,
    scaling: float,
    exact_mask: torch.Tensor | None = None,
    old_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of `query` over sinks, latents and window.

    Args:
        query: (batch, num_attention_heads, num_queries, head_dim), after RoPE.
        kv: what the cache holds; see [`CompressedKV`].
        scaling: of the scores.
        exact_mask, old_mask: (batch or 1, 1, num_queries or 1, columns), bool (True = attend) or float to be added;
            None attends to all.

    Returns:
        (batch, num_attention_heads, num_queries, head_dim) in the dtype of `query`; zeros where everything is masked
        by False or -inf.

    Raises:
        ValueError: for a mask of another number of queries.
    """
    for mask in (exact_mask, old_mask):
        if mask is not None and mask.shape[2] not in (1, query.shape[2]):
            raise ValueError(
                f"`attention_mask` is for {mask.shape[2]} queries, and there are {query.shape[2]}. Give it a row for "
                "each of them, or one for all."
            )
    with without_autocast(query.device):
        return _compressed_attention(query, kv, scaling, exact_mask, old_mask)


def _compressed_attention(query, kv: CompressedKV, scaling: float, exact_mask, old_mask) -> torch.Tensor:
    factors = kv.factors.key_B, kv.factors.value_B, kv.factors.key_mean, kv.factors.value_mean
    old = kv.key_latents.num_tokens > 0
    served = kernels.choose(query, kv.exact_keys, kv.exact_values, *factors) if old else None
    if served and any(mask is not None and mask.shape[1] != 1 for mask in (exact_mask, old_mask)):
        served = None  # a mask for each head
    attend = {"gpu": attend_on_gpu, "cpu": attend_on_cpu, None: attend_in_torch}[served]
    chunk = QUERY_CHUNK
    if served == "gpu":  # all scores of a chunk are written
        rows = query.shape[0] * query.shape[1]  # of one query each
        chunk = max(1, min(chunk, GPU_SCORES // (rows * kv.key_latents.num_tokens), GPU_ROWS // rows))
    if query.shape[2] <= chunk:
        return attend(query, kv, scaling, exact_mask, old_mask)
    chunks = []
    for start in range(0, query.shape[2], chunk):
        rows = slice(start, start + chunk)
        masks = (m if m is None or m.shape[2] == 1 else m[:, :, rows] for m in (exact_mask, old_mask))
        chunks.append(attend(query[:, :, rows], kv, scaling, *masks))
    return torch.cat(chunks, dim=2)


def attend_in_torch(query, kv: CompressedKV, scaling: float, exact_mask, old_mask) -> torch.Tensor:
    factors, dtype, batch = kv.factors, compute_dtype(query), len(query)
    wide = torch.promote_types(dtype, torch.float32)  # 16 bits do not hold the sums of a long past
    q, shared = _rows_by_kv_head(query.to(dtype) * scaling, factors.num_key_value_heads)
    scores = _masked((q @ kv.exact_keys.to(dtype).mT).to(wide), exact_mask, shared)
    softmax = OnlineSoftmax(scores)
    exact = (softmax.weights.to(dtype) @ kv.exact_values.to(dtype)).to(wide)
    exact_sum = softmax.sum
    latent = exact.new_zeros(batch, q.shape[1] * q.shape[2], kv.value_latents.format.rank)

    q, groups = paired(q), factors.paired_key_groups(dtype)
    turn = kv.turns.turn(query.device, kv.exact_keys.dtype)
    for blocks, columns in _tiles(kv, batch, query.device):
        latents = kv.key_latents.read(*blocks, dtype)
        scores = _old_scores(q, groups, latents, turn[:, columns, None]).to(wide)
        scores = _masked(scores, None if old_mask is None else old_mask[..., columns], shared)
        decay = softmax.add(scores)
        exact.mul_(decay)
        exact_sum = exact_sum * decay
        latent.mul_(decay.view(batch, -1, 1))
        weights, values = softmax.weights.to(dtype).flatten(1, 2), kv.value_latents.read(*blocks, dtype)
        if wide == dtype:
            latent.baddbmm_(weights, values)
        else:
            latent.add_(weights @ values)

    old = _decode_summed_values(latent, softmax.sum - exact_sum, factors)
    return ((exact + old) / softmax.total).view(query.shape).to(query.dtype)


def attend_on_gpu(query, kv: CompressedKV, scaling: float, exact_mask, old_mask) -> torch.Tensor:
    from .kernels.gpu import attend

    q, _ = _rows_by_kv_head(query, kv.factors.num_key_value_heads)
    return attend(q, kv, scaling, exact_mask, old_mask).view(query.shape)


def attend_on_cpu(query, kv: CompressedKV, scaling: float, exact_mask, old_mask) -> torch.Tensor:
    q, _ = _rows_by_kv_head(query, kv.factors.num_key_value_heads)
    return cpu.attend(q, kv, scaling, exact_mask, old_mask).view(query.shape).to(query.dtype)


def _rows_by_kv_head(query: torch.Tensor, kv_heads: int) -> tuple[torch.Tensor, int]:
    """(batch, kv_heads, shared * num_queries, head_dim), and how many query heads share a KV head.

    Those that do are consecutive, as in transformers' `repeat_kv`, and become rows of one matmul.
    """
    batch, num_heads, num_queries, head_dim = query.shape
    shared = num_heads // kv_heads
    return query.reshape(batch, kv_heads, shared * num_queries, head_dim), shared


def _decode_summed_values(latent: torch.Tensor, weight: torch.Tensor, factors: LayerFactors) -> torch.Tensor:
    """Value latents summed by attention weights (batch, kv_heads * rows, value_rank), of `weight` in all (batch,
    kv_heads, rows, 1), to values (batch, kv_heads, rows, head_dim): ``value_B`` has the rows of all KV heads, and each
    gets those of its own."""
    by_head = factors.num_key_value_heads, factors.head_dim
    up = factors.value_B.to(latent.dtype).view(*by_head, -1)
    mean = factors.value_mean.to(latent.dtype).view(by_head[0], 1, by_head[1])
    return latent.view(len(latent), by_head[0], -1, latent.shape[-1]) @ up.mT + weight * mean


def _tiles(kv: CompressedKV, batch: int, device: torch.device) -> Iterator[tuple[tuple[int, int], slice]]:
    """The compressed past in tiles: the first and the last block (exclusive), and their columns."""
    latents, factors = kv.key_latents, kv.factors
    block_size = latents.format.block_size
    widest = max(factors.heads_per_group * factors.head_dim, latents.format.rank, kv.value_latents.format.rank)
    by_hand = device.type == "cpu" and not torch.compiler.is_compiling()  # every tile makes a graph larger
    elements = CPU_TILE if by_hand else GPU_TILE
    blocks = max(1, elements // (batch * widest * block_size))
    for first, last in latents.spans(blocks):
        yield (first, last), slice(first * block_size, last * block_size)


def _old_scores(q, groups, latents: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Scores (batch, kv_heads, rows of q, columns) against keys rebuilt for one tile, one group of KV heads at a
    time."""
    ranks, heads = [len(B) for B, _ in groups], q.shape[1] // len(groups)
    parts = []
    for q_group, part, (B, mean) in zip(q.split(heads, dim=1), latents.split(ranks, dim=-1), groups):
        keys = torch.baddbmm(mean, part, B.expand(len(part), -1, -1)).unflatten(-1, (heads, -1))
        parts.append(q_group @ rotate_paired(keys, turn).permute(0, 2, 3, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class OnlineSoftmax:
    """Softmax over columns that arrive in parts (Milakov and Gimelshein 2018): running maximum and sum of
    exponentials.

    Attributes:
        weights: exponentials of the part added last, relative to the running maximum.
        total: their sum so far, (..., rows, 1); never zero.
    """

    def __init__(self, scores: torch.Tensor) -> None:
        self.maximum = self.finite_max(scores)
        self.weights = (scores - self.maximum).exp_()
        self.sum = self.weights.sum(-1, keepdim=True)

    @staticmethod
    def finite_max(scores: torch.Tensor) -> torch.Tensor:
        if scores.shape[-1] == 0:
            return scores.new_full((*scores.shape[:-1], 1), torch.finfo(scores.dtype).min / 2)
        least = torch.finfo(scores.dtype).min / 2  # of a row that is masked: no inf - inf
        return scores.amax(-1, keepdim=True).clamp_min(least)

    def add(self, scores: torch.Tensor) -> torch.Tensor:
        """Add a part; returns by how much what was accumulated so far has to be scaled, (..., rows, 1)."""
        maximum = torch.maximum(self.maximum, self.finite_max(scores))
        decay = (self.maximum - maximum).exp_()
        self.maximum, self.weights = maximum, (scores - maximum).exp_()
        self.sum = self.sum * decay + self.weights.sum(-1, keepdim=True)
        return decay

    @property
    def total(self) -> torch.Tensor:
        return self.sum.clamp_min(torch.finfo(self.sum.dtype).tiny)


def _masked(scores: torch.Tensor, mask: torch.Tensor | None, shared: int) -> torch.Tensor:
    """Apply a mask (batch or 1, 1 or heads, num_queries or 1, columns) in place to scores (batch, kv_heads, shared *
    num_queries, columns)."""
    if mask is None:
        return scores
    by_head = scores.unflatten(2, (shared, -1))
    mask = mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (-1, shared))
    if mask.dtype == torch.bool:
        return by_head.masked_fill_(~mask, -torch.inf).flatten(2, 3)
    return by_head.add_(mask.to(scores.dtype)).flatten(2, 3)

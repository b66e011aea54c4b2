"""What queries read of a layer's old tokens: its attention once more, in plain torch, for statistics and probes.

A cache rebuilds the tokens between the sinks and the window, and an error there reaches the output as far as queries
attend to it. Most tokens are hardly read, and some by everyone, so that a mean over all tokens says little of what the
output loses. Values are read as sums, ``a = Σ p v`` over the old tokens, of which the factors lose ``a - B A a``: the
moments of `a` are what matters of values, those of `k` weighted by `p` what matters of keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from .families import is_turned, watch
from .model_shape import sliding_window
from .rope import rotate, widened

SINKS, RECENT = 4, 48  # tokens that statistics count as kept exactly: of the defaults, a window holding 32 to 63
EVERY = 32  # queries of which one is asked
CHUNK = 64  # queries at a time, which bounds memory
STATES = ("queries", "keys", "values")
DRAWS = 16  # tokens that a query is turned to, per head


class RowStates(NamedTuple):
    """What a layer computes the attention of one row from; tokens are real ones, in their order.

    Attributes:
        row: which of the batch it is.
        query_states: (num_attention_heads, length, head_dim), before RoPE, in float32 or wider, as all others.
        key_states, value_states: (num_key_value_heads, length, head_dim), keys before RoPE.
        cos, sin: (length, head_dim / 2).
        scaling: of the scores.
        sliding_window: tokens that a query sees, its own included, or None.
    """

    row: int
    query_states: torch.Tensor
    key_states: torch.Tensor
    value_states: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    scaling: float
    sliding_window: int | None

    @property
    def length(self) -> int:
        return self.key_states.shape[1]

    def by_kv_head(self, states: torch.Tensor) -> torch.Tensor:
        """(num_attention_heads, ...) -> (num_key_value_heads, query heads of each, ...)."""
        return states.unflatten(0, (len(self.key_states), -1))

    def distances(self, queries: torch.Tensor) -> torch.Tensor:
        """From each query back to each token, (len(queries), length)."""
        return queries[:, None] - torch.arange(self.length, device=queries.device)

    def old(self, queries: torch.Tensor, sinks: int, recent: int) -> torch.Tensor:
        """Which tokens a cache has compressed when these queries come, (len(queries), length) bool."""
        distances = self.distances(queries)
        return (distances >= recent) & (queries[:, None] - distances >= sinks)

    def scores(self, queries: torch.Tensor, key_states: torch.Tensor) -> torch.Tensor:
        """Of queries at these places, with keys before RoPE (num_key_value_heads, length, head_dim); -inf where they
        do not see them; (num_key_value_heads, query heads of each, len(queries), length)."""
        asked = rotate(self.query_states[:, queries], self.cos[queries], self.sin[queries])
        keys = rotate(key_states, self.cos, self.sin)
        scores = self.by_kv_head(asked) @ keys[:, None].mT * self.scaling
        distances = self.distances(queries)
        hidden = distances < 0
        if self.sliding_window is not None:
            hidden |= distances >= self.sliding_window
        return scores.masked_fill(hidden, -torch.inf)


def exact_tokens(length: int, sinks: int = SINKS, recent: int = RECENT) -> tuple[int, int]:
    """Of a sample of that length, how many first and most recent tokens count as kept exactly: no more of a short one
    than leaves it some that do not."""
    return min(sinks, length // 16), max(1, min(recent, length // 4))


@contextmanager
def states_read(
    attention: nn.Module,
    use: Callable[[RowStates, torch.Tensor], torch.Tensor | None],
    keep: Callable[[], torch.Tensor | None] = lambda: None,
) -> Iterator[None]:
    """Within it `use` gets the states of every row of every forward of a layer, and what `o_proj` reads of it,
    (length, num_attention_heads * head_dim); what it returns, if not None, `o_proj` reads instead.

    Args:
        keep: gives the real tokens of a forward, (batch, length) bool, or None if all are.

    Raises:
        ValueError: at the second forward or afterwards, if the layer never calls its `o_proj`.
    """
    held: dict[str, Any] = {}
    runs = reads = 0
    window = sliding_window(attention.config, attention.layer_idx)

    def check() -> None:
        if runs and not reads:
            raise ValueError(
                f"Layer {attention.layer_idx} ({type(attention).__name__}) does not call its `o_proj`, so that "
                "nothing is known of what its queries read. Fit the model without fused or patched attention."
            )

    def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal runs
        check()
        runs += 1
        held["cos"], held["sin"] = (t.chunk(2, dim=-1)[0] for t in kwargs["position_embeddings"])
        if not is_turned(attention):
            held["cos"], held["sin"] = torch.ones_like(held["cos"]), torch.zeros_like(held["sin"])

    def read(module: nn.Module, args: tuple) -> tuple | None:
        nonlocal reads
        reads += 1
        output, real, replaced = args[0], keep(), False
        inputs = {name: t.to(output.device) for name, t in held.items()}
        held.clear()  # of all layers they would take a multiple of the hidden states
        for row in range(len(output)):
            tokens = slice(None) if real is None else real[row].to(output.device)
            heads = (inputs[name][row][tokens].transpose(0, 1) for name in STATES)
            turn = (inputs[name].expand(len(output), -1, -1)[row][tokens] for name in ("cos", "sin"))
            states = RowStates(row, *widened((*heads, *turn)), attention.scaling, window)
            instead = use(states, output[row][tokens])
            if instead is not None:
                output = output if replaced else output.clone()
                output[row, tokens], replaced = instead.to(output.dtype), True
        return (output, *args[1:]) if replaced else None

    handles = [
        *(watch(attention, name, functools.partial(held.__setitem__, name)) for name in STATES),
        attention.register_forward_pre_hook(begin, with_kwargs=True),
        attention.o_proj.register_forward_pre_hook(read),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    check()


class ReadMoments(NamedTuple):
    """Sums over queries that read old tokens; float64.

    Attributes:
        keys: (kv_dim + 1, kv_dim + 1), of ``p (k, 1) (k, 1)ᵀ``, keys before RoPE, p of every head.
        head_keys: (num_key_value_heads, head_dim + 1, head_dim + 1), the same of each KV head's own keys and p.
        values: (kv_dim + 1, kv_dim + 1), of ``(a, s) (a, s)ᵀ``, with ``a = Σ p v`` and ``s = Σ p`` over old tokens.
        queries: (num_key_value_heads, head_dim, head_dim), of ``p q qᵀ``, the query as the key before RoPE meets it:
            turned back by the key's position.
        squares: (), of ``p²`` over the pairs.
    """

    keys: torch.Tensor
    head_keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    squares: torch.Tensor


def sampled_queries(length: int, generator: torch.Generator) -> torch.Tensor:
    """Places of the queries to ask in a row, one of `EVERY` tokens, of those that old tokens come before."""
    start = sum(exact_tokens(length))
    count = min(-(-length // EVERY), max(0, length - start))
    return start + torch.randperm(max(0, length - start), generator=generator)[:count].sort()[0]


def read_moments(states: RowStates, queries: torch.Tensor, generator: torch.Generator) -> ReadMoments:
    """What these queries read of the old tokens of their row.

    Exact but for `queries`. There every one is turned to `DRAWS` tokens, drawn by how much it attends to
    them: to all would take head_dim² operations for every pair.

    Args:
        queries: (n,) places in the row.
        generator: of the CPU.
    """
    heads, length, head_dim = states.key_states.shape
    of_tokens = [_float64(t.transpose(0, 1).flatten(1)) for t in (states.key_states, states.value_states)]
    keys, values = (torch.cat([t, t.new_ones(length, 1)], dim=1) for t in of_tokens)
    by_head = torch.cat([_float64(states.key_states), keys.new_ones(heads, length, 1)], dim=2)
    values_read, turned_queries, squares = (
        keys.new_zeros(shape) for shape in (2 * values.shape[1:], (heads, head_dim, head_dim), ())
    )
    received = keys.new_zeros(heads, length)
    for part in queries.to(states.key_states.device).split(CHUNK):
        weights = states.scores(part, states.key_states).softmax(-1) * states.old(part, *exact_tokens(length))
        wide = _float64(weights)
        read = wide.flatten(0, 2) @ values
        values_read += read.mT @ read
        squares += wide.square().sum()
        received += wide.sum((1, 2))
        mass, turned = _turned_to_keys(states, part, weights, generator)
        turned = _float64(mass.sqrt() * turned).flatten(1, -2)
        turned_queries += turned.mT @ turned
    keys_read = (received.sum(0)[:, None] * keys).mT @ keys
    by_head_read = (received[..., None] * by_head).mT @ by_head
    return ReadMoments(keys_read, by_head_read, values_read, turned_queries, squares)


def _turned_to_keys(
    states: RowStates, queries: torch.Tensor, weights: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries turned back by the positions of tokens that are drawn by `weights`: what each draw stands for, (..., 1),
    and (num_key_value_heads, query heads of each, n, draws, head_dim)."""
    reached = weights.cumsum(-1)
    mass = reached[..., -1:]
    uniform = 1 - torch.rand(*weights.shape[:-1], DRAWS, generator=generator)  # in (0, 1]
    drawn = torch.searchsorted(reached, uniform.to(reached) * mass).clamp_max(states.length - 1)
    asked = rotate(states.query_states[:, queries], states.cos[queries], states.sin[queries])
    turned = rotate(states.by_kv_head(asked)[..., None, :], states.cos[drawn], -states.sin[drawn])
    return (mass / DRAWS)[..., None].expand(*drawn.shape, 1), turned


def _float64(states: torch.Tensor) -> torch.Tensor:
    return (states.cpu() if states.device.type == "mps" else states).double()  # which has none


def change_of_reads(
    states: RowStates,
    sinks: int,
    recent: int,
    key_states: torch.Tensor | None = None,
    value_states: torch.Tensor | None = None,
    queries: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a layer's attention puts out with other old tokens, less what it does: (queries, num_attention_heads *
    head_dim), float32 or wider. Zero where no token is old.

    Args:
        sinks, recent: first and most recent tokens that stay.
        key_states, value_states: (num_key_value_heads, length, head_dim), keys before RoPE, instead of its own.
        queries: (n,) their places in the row; all by default.
    """
    changes = []
    if queries is None:
        queries = torch.arange(states.length, device=states.key_states.device)
    for part in queries.split(CHUNK):
        old = states.old(part, sinks, recent)
        scores = states.scores(part, states.key_states)
        weights = scores.softmax(-1)
        change = torch.zeros_like(states.by_kv_head(states.query_states[:, part]))
        others = weights
        if key_states is not None:
            others = torch.where(old, states.scores(part, key_states), scores).softmax(-1)
            change = change + (others - weights) @ states.value_states[:, None]
        if value_states is not None:
            change = change + (others * old) @ (value_states - states.value_states)[:, None]
        changes.append(change.flatten(0, 1).transpose(0, 1).flatten(1))
    return torch.cat(changes)

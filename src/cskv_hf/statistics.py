"""Moments of a model's keys, values, queries and attention inputs: all that the closed-form fit needs to know of the
data.

calibration.py accumulates them, in float64: keys lie so far from zero that a covariance is a small difference of large
numbers. They can be saved and continued, and one set of them serves every compression, layout and initialisation.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from .decompose import diagonal_blocks
from .files import replacing
from .model_shape import ModelShape

logger = logging.get_logger(__name__)

READS = (  # in the order of `ReadMoments`
    "read_key_moment",
    "read_head_key_moment",
    "read_value_moment",
    "read_query_moment",
    "read_squares",
)
TENSORS = (
    "key_moment",
    "value_moment",
    "key_sum",
    "value_sum",
    "query_moment",
    *READS,
    "input_scale",
    "probe_ids",
    "probe_lengths",
)
PROBE_TOKENS, PROBE_LENGTH = 1024, 256  # kept to measure the model's sensitivity on
UNREAD_SHARE = 0.02  # of what an error is weighed by: all tokens alike, for those that nobody read in the sample


class Moments(NamedTuple):
    """Of a layer's keys before RoPE, or its values: E[x xᵀ] (kv_dim, kv_dim) and E[x] (kv_dim,), float64."""

    second: torch.Tensor
    first: torch.Tensor


@dataclass
class KVStatistics:
    """Sums over calibration tokens, per layer, float64 on the CPU.

    Attributes:
        key_moment: (layers, kv_dim, kv_dim) sum of k kᵀ, keys before RoPE, after bias and key norm.
        value_moment: (layers, kv_dim, kv_dim) sum of v vᵀ.
        key_sum, value_sum: (layers, kv_dim) sums of k and v.
        query_moment: (layers, num_key_value_heads, head_dim, head_dim) sum of q qᵀ before RoPE, over the query heads
            of a KV head.
        read_key_moment: (layers, kv_dim + 1, kv_dim + 1) sum of p (k, 1) (k, 1)ᵀ over pairs of a sampled query and an
            old token that it attends to by p; see reads.py.
        read_head_key_moment: (layers, num_key_value_heads, head_dim + 1, head_dim + 1) the same of every KV head by
            itself, its keys weighted by its own query heads alone.
        read_value_moment: (layers, kv_dim + 1, kv_dim + 1) sum of (a, s) (a, s)ᵀ over sampled queries, of what each
            reads of old tokens, a = Σ p v and s = Σ p.
        read_query_moment: (layers, num_key_value_heads, head_dim, head_dim) sum of p q qᵀ over the pairs, the query
            turned to where the key before RoPE meets it.
        read_squares: (layers,) sum of p² over the pairs.
        input_scale: (layers, hidden_size) sum of |x| at the input of the projections (ASVD).
        probe_ids, probe_lengths: input_ids of a few samples, end to end, and their lengths; see sensitivity.py.
        num_tokens: tokens summed over, those read again included, padding not.
        num_samples: samples consumed, where a continued pass takes up.
        model_shape: the sizes of the model.
        source: what the data was, in the caller's words; a continued pass must name the same.
        weights: of the model, see [`weight_hashes`]; a continued pass must have the same.
        samples_digest: hash of the samples consumed; a continued pass must begin with the same.
        recall: whether a part of each sample was read again; a continued pass must do the same.
    """

    key_moment: torch.Tensor
    value_moment: torch.Tensor
    key_sum: torch.Tensor
    value_sum: torch.Tensor
    query_moment: torch.Tensor
    read_key_moment: torch.Tensor
    read_head_key_moment: torch.Tensor
    read_value_moment: torch.Tensor
    read_query_moment: torch.Tensor
    read_squares: torch.Tensor
    input_scale: torch.Tensor
    probe_ids: torch.Tensor
    probe_lengths: torch.Tensor
    num_tokens: int
    num_samples: int
    model_shape: dict[str, Any]
    source: str = ""
    weights: dict[str, str | None] | None = None
    samples_digest: str = ""
    recall: bool = False

    @classmethod
    def empty(cls, shape: ModelShape, hidden_size: int, source: str = "") -> KVStatistics:
        layers, kv_dim = shape.num_hidden_layers, shape.kv_dim
        heads, head_dim = shape.num_key_value_heads, shape.head_dim
        by_head = (layers, heads, head_dim, head_dim)
        return cls(
            torch.zeros(layers, kv_dim, kv_dim, dtype=torch.float64),
            torch.zeros(layers, kv_dim, kv_dim, dtype=torch.float64),
            torch.zeros(layers, kv_dim, dtype=torch.float64),
            torch.zeros(layers, kv_dim, dtype=torch.float64),
            torch.zeros(by_head, dtype=torch.float64),
            torch.zeros(layers, kv_dim + 1, kv_dim + 1, dtype=torch.float64),
            torch.zeros(layers, heads, head_dim + 1, head_dim + 1, dtype=torch.float64),
            torch.zeros(layers, kv_dim + 1, kv_dim + 1, dtype=torch.float64),
            torch.zeros(by_head, dtype=torch.float64),
            torch.zeros(layers, dtype=torch.float64),
            torch.zeros(layers, hidden_size, dtype=torch.float64),
            torch.zeros(0, dtype=torch.long),
            torch.zeros(0, dtype=torch.long),
            0,
            0,
            vars(shape).copy(),
            source,
        )

    def key_moments(self, layer_idx: int) -> Moments:
        """Of keys, all tokens alike."""
        return Moments(self.key_moment[layer_idx] / self.num_tokens, self.key_sum[layer_idx] / self.num_tokens)

    def value_moments(self, layer_idx: int) -> Moments:
        """Of values, all tokens alike."""
        return Moments(self.value_moment[layer_idx] / self.num_tokens, self.value_sum[layer_idx] / self.num_tokens)

    def read_key_moments(self, layer_idx: int, by_head: bool) -> Moments:
        """Of keys, old tokens weighted by how much queries attend to them; `by_head`: those of the same KV head, and
        zeros in place of what is between heads, so that only the blocks of single heads may be used."""
        alike = self.key_moments(layer_idx)
        if not by_head:
            return _mostly(self.read_key_moment[layer_idx], alike)
        read = self.read_head_key_moment[layer_idx]
        of_heads = zip(diagonal_blocks(alike.second, len(read)), alike.first.view(len(read), -1))
        seconds, firsts = zip(*(_mostly(own, Moments(*all_)) for own, all_ in zip(read, of_heads)))
        return Moments(torch.block_diag(*seconds), torch.cat(firsts))

    def read_value_moments(self, layer_idx: int) -> Moments:
        """Of what queries read of old values, each read in proportion to the square of its share in the attention."""
        return _mostly(self.read_value_moment[layer_idx], self.value_moments(layer_idx))

    def read_concentration(self, layer_idx: int) -> float:
        """E[Σ p²] / E[(Σ p)²]: what reads leave of the energy of an error that every token has of its own, 1 where a
        query reads a single one; weighed as in [`read_value_moments`]."""
        weight = float(self.read_value_moment[layer_idx, -1, -1])
        own = float(self.read_squares[layer_idx]) / weight if weight > 0 else 1.0
        return (1 - UNREAD_SHARE) * own + UNREAD_SHARE

    def mean_shares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Share of the mean square that is the mean's, of the keys (before RoPE) and of the values, (layers,) each."""
        sides = (self.key_sum, self.key_moment), (self.value_sum, self.value_moment)
        tiny = torch.finfo(torch.float64).tiny
        return tuple(
            first.square().sum(1) / (self.num_tokens * second.diagonal(dim1=1, dim2=2).sum(1)).clamp_min(tiny)
            for first, second in sides
        )

    def room_of_probe(self) -> int:
        """Tokens that the next probe may have."""
        return min(PROBE_LENGTH, PROBE_TOKENS - len(self.probe_ids))

    def add_probe(self, ids: torch.Tensor) -> None:
        """Keep a sample (length,) to measure on, within [`room_of_probe`]; of one token nothing can be measured."""
        if len(ids) > 1:
            self.probe_ids = torch.cat([self.probe_ids, ids.cpu()])
            self.probe_lengths = torch.cat([self.probe_lengths, torch.tensor([len(ids)])])

    def probes(self) -> list[torch.Tensor]:
        """The samples kept, (length,) each."""
        return list(self.probe_ids.split(self.probe_lengths.tolist()))

    def fingerprint(self) -> str:
        """Short hash of the first moments and of the diagonals of the second."""
        digest = hashlib.sha256(str(self.num_tokens).encode())
        reads = (getattr(self, name) for name in READS if name != "read_squares")
        seconds = (self.key_moment, self.value_moment, self.query_moment, *reads)
        for tensor in (self.key_sum, self.value_sum, *(t.diagonal(dim1=-2, dim2=-1) for t in seconds)):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    def save(self, path: str | os.PathLike) -> None:
        """Write to a safetensors file; an existing one is replaced only once the new one is complete."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        names = ("num_tokens", "num_samples", "model_shape", "source", "weights", "samples_digest", "recall")
        numbers = {name: getattr(self, name) for name in names}
        tensors = {name: getattr(self, name) for name in TENSORS}
        with replacing(path) as new:
            save_file(tensors, new, metadata={"cskv_statistics": json.dumps(numbers)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> KVStatistics:
        """Read what [`save`] wrote.

        Raises:
            ValueError: if the file is truncated, corrupt or something else.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = (file.metadata() or {}).get("cskv_statistics")
                if metadata is None:
                    raise ValueError(
                        f"'{path}' is not a file of CSKV statistics. Delete it to start the statistics over."
                    )
                if missing := sorted(set(TENSORS) - set(file.keys())):
                    raise ValueError(
                        f"'{path}' has no {', '.join(missing)}: an older version wrote it. Delete it to start the "
                        "statistics over."
                    )
                return cls(**{name: file.get_tensor(name) for name in TENSORS}, **json.loads(metadata))
        except SafetensorError as error:
            raise ValueError(
                f"'{path}' is truncated or corrupt ({error}). Delete it to start the statistics over."
            ) from error


def _mostly(read: torch.Tensor, alike: Moments) -> Moments:
    """Moments of sums (n + 1, n + 1) whose last entry is the weight, with a little of those of all tokens;
    the latter alone where nothing was read."""
    if read[-1, -1] <= 0:
        return alike
    read, share = read / read[-1, -1], UNREAD_SHARE
    return Moments(*((1 - share) * r + share * a for r, a in zip((read[:-1, :-1], read[:-1, -1]), alike)))

"""Moments of a model's keys, values, queries and attention inputs: all that the closed-form fit needs to know of the
data.

calibration.py accumulates them, in float64. They can be saved and continued, and one set of them serves every
compression, layout and initialisation.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from .files import replacing
from .model_shape import ModelShape

logger = logging.get_logger(__name__)

TENSORS = (
    "key_moment",
    "value_moment",
    "key_sum",
    "value_sum",
    "query_moment",
    "input_scale",
    "probe_ids",
    "probe_lengths",
)
PROBE_TOKENS, PROBE_LENGTH = 1024, 512  # kept to measure the model's sensitivity on


@dataclass
class KVStatistics:
    """Sums over calibration tokens, per layer, float64 on the CPU.

    Attributes:
        key_moment: (layers, kv_dim, kv_dim) sum of k kᵀ, keys before RoPE, after bias and key norm.
        value_moment: (layers, kv_dim, kv_dim) sum of v vᵀ.
        key_sum, value_sum: (layers, kv_dim) sums of k and v.
        query_moment: (layers, num_key_value_heads, head_dim, head_dim) sum of q qᵀ before RoPE, over the query heads
            of a KV head.
        input_scale: (layers, hidden_size) sum of |x| at the input of the projections (ASVD).
        probe_ids, probe_lengths: input_ids of a few samples, end to end, and their lengths; see sensitivity.py.
        num_tokens: tokens summed over; padding is not counted.
        num_samples: samples consumed, where a continued pass takes up.
        model_shape: the sizes of the model.
        source: what the data was, in the caller's words; a continued pass must name the same.
        weights: of the model, see [`weight_hashes`]; a continued pass must have the same.
        samples_digest: hash of the samples consumed; a continued pass must begin with the same.
    """

    key_moment: torch.Tensor
    value_moment: torch.Tensor
    key_sum: torch.Tensor
    value_sum: torch.Tensor
    query_moment: torch.Tensor
    input_scale: torch.Tensor
    probe_ids: torch.Tensor
    probe_lengths: torch.Tensor
    num_tokens: int
    num_samples: int
    model_shape: dict[str, Any]
    source: str = ""
    weights: dict[str, str | None] | None = None
    samples_digest: str = ""

    @classmethod
    def empty(cls, shape: ModelShape, hidden_size: int, source: str = "") -> KVStatistics:
        layers, kv_dim = shape.num_hidden_layers, shape.kv_dim
        return cls(
            torch.zeros(layers, kv_dim, kv_dim, dtype=torch.float64),
            torch.zeros(layers, kv_dim, kv_dim, dtype=torch.float64),
            torch.zeros(layers, kv_dim, dtype=torch.float64),
            torch.zeros(layers, kv_dim, dtype=torch.float64),
            torch.zeros(layers, shape.num_key_value_heads, shape.head_dim, shape.head_dim, dtype=torch.float64),
            torch.zeros(layers, hidden_size, dtype=torch.float64),
            torch.zeros(0, dtype=torch.long),
            torch.zeros(0, dtype=torch.long),
            0,
            0,
            vars(shape).copy(),
            source,
        )

    def mean_shares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Share of the mean square that is the mean's, of the keys (before RoPE) and of the values, (layers,) each."""
        sides = (self.key_sum, self.key_moment), (self.value_sum, self.value_moment)
        tiny = torch.finfo(torch.float64).tiny
        return tuple(
            first.square().sum(1) / (self.num_tokens * second.diagonal(dim1=1, dim2=2).sum(1)).clamp_min(tiny)
            for first, second in sides
        )

    def add_probe(self, ids: torch.Tensor) -> None:
        """Keep the start of a sample (length,), as long as there is room."""
        ids = ids[: min(PROBE_LENGTH, PROBE_TOKENS - len(self.probe_ids))]
        if len(ids) > 1:
            self.probe_ids = torch.cat([self.probe_ids, ids.cpu()])
            self.probe_lengths = torch.cat([self.probe_lengths, torch.tensor([len(ids)])])

    def probes(self) -> list[torch.Tensor]:
        """The samples kept, (length,) each."""
        return list(self.probe_ids.split(self.probe_lengths.tolist()))

    def fingerprint(self) -> str:
        """Short hash of the first moments and of the diagonals of the second."""
        digest = hashlib.sha256(str(self.num_tokens).encode())
        seconds = (self.key_moment, self.value_moment, self.query_moment)
        for tensor in (self.key_sum, self.value_sum, *(t.diagonal(dim1=-2, dim2=-1) for t in seconds)):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    def save(self, path: str | os.PathLike) -> None:
        """Write to a safetensors file; an existing one is replaced only once the new one is complete."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        names = ("num_tokens", "num_samples", "model_shape", "source", "weights", "samples_digest")
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
                return cls(**{name: file.get_tensor(name) for name in TENSORS}, **json.loads(metadata))
        except SafetensorError as error:
            raise ValueError(
                f"'{path}' is truncated or corrupt ({error}). Delete it to start the statistics over."
            ) from error

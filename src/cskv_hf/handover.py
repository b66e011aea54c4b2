"""What is handed over in a forward: by the hooks of the model to a cache, and by the cache to attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .factors import LayerFactors, compute_dtype
from .latents import Latents
from .rope import RotaryFrequencies, rotate
from .step import Step
from .turns import OldTurns

MISSING_FACTORS = (
    "This CSKVCache got keys and values from a model that has no CSKV factors in use. Load an adapter first "
    "(`cskv_hf.load(model, adapter)`, or `AutoModelForCausalLM.from_pretrained(adapter)` after `import cskv_hf`), or "
    "make one with `model = cskv_hf.fit(model, data)`; if the model has one, enable it (`set_adapter`, "
    "`enable_adapters`). To generate without compression use `transformers.DynamicCache()`."
)


@dataclass
class CompressedKV:
    """What `update` hands to the attention function in place of keys and values: references to tensors, nothing
    rebuilt.

    Attributes:
        exact_keys, exact_values: (batch, num_key_value_heads, num_sinks + num_recent, head_dim); keys after RoPE.
        key_latents, value_latents: of ``num_old`` tokens.
        factors: of this layer.
        step: which slots the columns are.
        turns: what has turned the latents' keys.
    """

    exact_keys: torch.Tensor
    exact_values: torch.Tensor
    key_latents: Latents
    value_latents: Latents
    factors: LayerFactors
    step: Step
    turns: OldTurns

    def materialize(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys (after RoPE) and values, (batch, num_key_value_heads, num_slots, head_dim), column = slot.

        The slow way, for attention implementations that know nothing of latents: it rebuilds the whole layer.
        """
        dtype = compute_dtype(self.exact_keys)
        cos, sin = (t[:, None].to(dtype) for t in self.turns.cos_sin(self.exact_keys.device, self.exact_keys.dtype))
        key_latents, value_latents = (x.read(0, x.num_blocks, dtype) for x in (self.key_latents, self.value_latents))
        old_keys = rotate(self.factors.decode_keys(key_latents), cos, sin)
        old_values = self.factors.decode_values(value_latents)
        slots = torch.cat([self.step.exact_slots(), self.step.old_slots()], dim=1).to(self.exact_keys.device)
        return (
            self._by_slot(torch.cat([self.exact_keys, old_keys.to(self.exact_keys.dtype)], dim=2), slots),
            self._by_slot(torch.cat([self.exact_values, old_values.to(self.exact_values.dtype)], dim=2), slots),
        )

    def _by_slot(self, states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        batch, heads, _, head_dim = states.shape
        frame = states.new_zeros(batch, heads, self.step.num_slots + 1, head_dim)  # the last takes empty columns
        target = slots.masked_fill(slots < 0, self.step.num_slots).expand(batch, -1)
        frame.scatter_(2, target[:, None, :, None].expand(-1, heads, -1, head_dim), states)
        return frame[:, :, :-1]


class ForwardInputs(NamedTuple):
    """What the pre-hook of an attention layer says of the forward to [`CSKVCache.stage`].

    Attributes:
        positions: (batch or 1, num_new).
        batch_size: rows of the batch.
        frequencies: the rotary frequencies that the new keys of this layer were turned by.
        materialize: whether keys and values are to be rebuilt, for an attention that is not CSKV's.
        sliding_window: of this layer, in tokens; None if it attends to all.
    """

    positions: torch.Tensor
    batch_size: int
    frequencies: RotaryFrequencies
    materialize: bool = False
    sliding_window: int | None = None


@dataclass
class Staged:
    """What the pre-hook of an attention layer hands over for the `update` that follows; `unseen_blocks` may be dropped
    after it."""

    step: Step
    factors: LayerFactors
    frequencies: RotaryFrequencies
    materialize: bool
    unseen_blocks: int = 0

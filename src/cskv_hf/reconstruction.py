"""What CSKV factors lose of a layer's keys and values, as a loss to train them by (paper section 2.2).

Per layer, with keys `k` before RoPE and values `v` of the frozen base, ``MSE(k, B_k Q(A_k k)) + MSE(v, B_v Q(A_v
v))``. `Q` is the adapter's own storage: nothing for plain latents, and for packed ones the quantiser of inference with
a straight-through gradient (quantisation-aware training). The base runs without autograd, so it may be quantised, and
every layer's graph is a few matmuls; and without dropout, so that `k` and `v` are what a cache gets. Without
quantisation there is nothing to gain for factors fitted with ``init="mse"``: they are the optimum of this loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .decompose import sqrt_and_inverse
from .factors import LayerFactors
from .families import attention_layers, decoder_of, in_eval_mode, key_source
from .fitting import error_weights
from .latents import LatentFormat, PlainFormat
from .statistics import KVStatistics
from .tuner import sidecars


class ReconstructionLoss:
    """The loss of a batch, standing in for the model's forward.

    Called with `input_ids` and `attention_mask` (batch, length); returns the loss, summed over layers and averaged
    over tokens, and the share of energy lost (layers, 2), keys and values.

    With packed latents, blocks are counted from the first column of the batch, and tokens after the last whole one
    are left out. A cache counts a row's real tokens, from the sinks on. So a padded row is an approximation: its
    blocks are shifted if the padding is on the left, and where padding and tokens meet in one, its ranges cover
    both. [`training_rows`] makes rows without padding.

    Raises:
        ValueError: for rows without a whole block, and for a batch in which no real token is in one.
    """

    def __init__(self, model: nn.Module, adapter_name: str, statistics: KVStatistics | None) -> None:
        self.model, self.adapter_name = model, adapter_name
        self.roots: list[tuple[torch.Tensor, torch.Tensor]] | None = None  # M^½ of keys and values, per layer
        if statistics is not None:
            self.roots = [
                tuple(sqrt_and_inverse(M / M.diagonal().mean())[0].float() for M in error_weights(a, statistics, i))
                for i, a in enumerate(attention_layers(model))
            ]

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        states = keys_and_values(self.model, input_ids, attention_mask)
        loss, errors = torch.zeros((), device=input_ids.device), []
        for layer_idx, (sidecar, (keys, values)) in enumerate(zip(sidecars(self.model), states)):
            factors = sidecar(self.adapter_name)
            with torch.autocast(keys.device.type, enabled=False):
                rebuilt = reconstruct(factors, keys.float(), values.float())
                for side, (exact, approximate) in enumerate(zip((keys.float(), values.float()), rebuilt)):
                    wrong, energy = self._energies(exact, approximate, attention_mask, layer_idx, side)
                    loss = loss + wrong.to(loss.device)
                    errors.append((wrong / energy.clamp_min(1e-20)).detach().to(loss.device))
        return loss, torch.stack(errors).view(-1, 2)

    def _energies(self, exact, approximate, attention_mask, layer_idx, side):
        """Mean square of the error and of the exact states, over the tokens that whole blocks cover."""
        exact = exact[:, :, : approximate.shape[2]].transpose(1, 2).flatten(2)
        error = exact - approximate.transpose(1, 2).flatten(2)
        if self.roots is not None:
            root = self.roots[layer_idx][side].to(error.device)
            error, exact = error @ root, exact @ root
        if attention_mask is not None:
            real = attention_mask[:, : exact.shape[1]].bool().to(exact.device)
            error, exact = error[real], exact[real]
            if len(error) == 0:
                raise ValueError(
                    f"The batch has no real token among the {real.shape[1]} first of a row, which whole blocks cover; "
                    "train on longer rows, or pad on the right."
                )
        return error.square().mean(), exact.square().mean()


@torch.no_grad()
def keys_and_values(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every layer's keys before RoPE and values, (batch, num_key_value_heads, length, head_dim), without autograd or
    dropout."""
    decoder, states, handles = decoder_of(model), [], []
    for attention in attention_layers(model):
        held: dict[str, torch.Tensor] = {}
        states.append(held)
        for name, module in (("keys", key_source(attention)), ("values", attention.v_proj)):
            handles.append(module.register_forward_hook(_keep(held, name, attention.head_dim)))
    try:
        with in_eval_mode(decoder):
            decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [(held["keys"], held["values"]) for held in states]


def _keep(held: dict[str, torch.Tensor], name: str, head_dim: int):
    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        held[name] = output.detach().flatten(2).unflatten(2, (-1, head_dim)).transpose(1, 2)

    return hook


def reconstruct(
    factors: LayerFactors, key_states: torch.Tensor, value_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (before RoPE) and values as they come back from the cache, with a gradient to the factors.

    Args:
        key_states, value_states: (batch, num_key_value_heads, tokens, head_dim).

    Returns:
        The same shapes; with packed latents only the tokens of whole blocks.
    """
    key_latents = straight_through(factors.encode_keys(key_states), factors.key_format)
    value_latents = straight_through(factors.encode_values(value_states), factors.value_format)
    return factors.decode_keys(key_latents), factors.decode_values(value_latents)


def straight_through(latents: torch.Tensor, format: LatentFormat) -> torch.Tensor:
    """Latents (batch, tokens, rank) as they come back from storage, with the gradient of the identity (Bengio et al.
    2013): training quantises as inference does.

    Plain latents are returned as they are, packed ones without the tokens after the last whole block.

    Raises:
        ValueError: if there is no whole block.
    """
    if isinstance(format, PlainFormat):
        return latents
    whole = latents.shape[1] // format.block_size * format.block_size
    if whole == 0:
        raise ValueError(
            f"Rows of {latents.shape[1]} tokens hold no block of {format.block_size}; train on longer ones."
        )
    latents = latents[:, :whole]
    values = latents.detach()
    return latents + (format.read(format.store(values, values.dtype), values.dtype) - values)

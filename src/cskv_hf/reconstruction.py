"""What CSKV factors lose of a layer, as a loss to train them by.

Per layer, with keys `k` before RoPE and values `v` of the frozen base, and `Q` the adapter's own storage:

- ``"mse"`` (paper section 2.2) is ``MSE(k, B_k Q(A_k k)) + MSE(v, B_v Q(A_v v))``, over all tokens alike. Without
  quantisation there is nothing to gain for factors fitted with ``init="mse"``: they are the optimum of this loss.
- ``"attention"`` is what the layer's attention puts out with rebuilt keys, and with rebuilt values, in place of the
  old tokens' own, less what it does with those, as a share of the latter's energy.

`Q` is nothing for plain latents, and for packed ones the quantiser of inference with a straight-through gradient
(quantisation-aware training). The base runs without autograd, so it may be quantised, and without dropout, so that `k`
and `v` are what a cache gets.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .factors import LayerFactors, without_autocast
from .families import (
    asked_weight,
    attention_layers,
    decoder_of,
    in_eval_mode,
    input_dtype,
    is_dense,
    watch,
)
from .latents import LatentFormat, PlainFormat
from .reads import RowStates, change_of_reads, exact_tokens, states_read
from .tuner import adapter_config, sidecars

OBJECTIVES = ("mse", "attention")
ASKED = 8  # queries of which "attention" asks one


class ReconstructionLoss:
    """The loss of a batch, standing in for the model's forward.

    Called with `input_ids` and `attention_mask` (batch, length); returns the loss, summed over layers and averaged
    over tokens, and the share of energy lost (layers, 2), with keys and with values.

    With packed latents and ``"mse"``, blocks are counted from the first column of the batch, and tokens after the last
    whole one are left out. A cache counts a row's real tokens, from the sinks on, as ``"attention"`` does. So a padded
    row is an approximation there: its blocks are shifted if the padding is on the left, and where padding and tokens
    meet in one, its ranges cover both. [`training_rows`] makes rows without padding.

    Raises:
        ValueError: for rows without a whole block, and for a batch in which no real token is in one, or none is old.
    """

    def __init__(self, model: nn.Module, adapter_name: str, objective: str) -> None:
        self.model, self.adapter_name, self.objective = model, adapter_name, objective

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        of_sides = self._of_states if self.objective == "mse" else self._of_reads
        loss, errors = torch.zeros((), device=input_ids.device), []
        for lost, energy in of_sides(input_ids, attention_mask):
            share = lost / energy.clamp_min(1e-20)
            loss = loss + (lost if self.objective == "mse" else share).to(loss.device)
            errors.append(share.detach().to(loss.device))
        return loss, torch.stack(errors).view(-1, 2)

    def _of_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None):
        """Mean squares of the error and of the exact states, of every layer's keys and values, over the tokens that
        whole blocks cover."""
        for sidecar, states in zip(sidecars(self.model), keys_and_values(self.model, input_ids, attention_mask)):
            factors = sidecar(self.adapter_name)
            with without_autocast(states[0].device):
                states = tuple(exact.float() for exact in states)
                for exact, approximate in zip(states, reconstruct(factors, *states)):
                    exact = exact[:, :, : approximate.shape[2]].transpose(1, 2).flatten(2)
                    error = exact - approximate.transpose(1, 2).flatten(2)
                    if attention_mask is not None:
                        real = attention_mask[:, : exact.shape[1]].bool().to(exact.device)
                        error, exact = error[real], exact[real]
                        if len(error) == 0:
                            raise ValueError(
                                f"The batch has no real token among the {real.shape[1]} first of a row, which whole "
                                "blocks cover; train on longer rows, or pad on the right."
                            )
                    yield error.square().mean(), exact.square().mean()

    def _of_reads(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None):
        """Mean squares of what each layer's attention puts out otherwise, with old keys and with old values rebuilt,
        and of what it puts out, for some queries."""
        decoder, layers = decoder_of(self.model), attention_layers(self.model)
        config = adapter_config(self.model, self.adapter_name)
        keep = None if attention_mask is None else attention_mask.bool()
        noted: list[list[torch.Tensor]] = [[] for _ in layers]  # (3, queries, num_attention_heads * head_dim) of rows
        trains = torch.is_grad_enabled()

        def note(layer_idx: int, factors: LayerFactors):
            def use(states: RowStates, output: torch.Tensor) -> None:
                exact = exact_tokens(states.length, config.sinks, config.mean_window)
                queries = torch.arange(sum(exact), states.length, ASKED, device=output.device)
                block_size = 1 if isinstance(factors.key_format, PlainFormat) else factors.key_format.block_size
                if len(queries) == 0 or states.length < exact[0] + block_size:
                    return
                with torch.set_grad_enabled(trains), without_autocast(output.device):
                    others = zip(("key_states", "value_states"), rebuilt_behind(states, factors, exact[0]))
                    changes = [change_of_reads(states, *exact, queries=queries, **{name: t}) for name, t in others]
                    noted[layer_idx].append(torch.stack([output[queries].to(changes[0].dtype), *changes]))

            return use

        with ExitStack() as hooks:
            for layer_idx, (attention, sidecar) in enumerate(zip(layers, sidecars(self.model))):
                use = note(layer_idx, sidecar(self.adapter_name))
                hooks.enter_context(states_read(attention, use, lambda: keep))
            with torch.no_grad(), in_eval_mode(decoder):
                decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        if not noted[0]:
            raise ValueError(
                f"No row of the batch is long enough to have old tokens in whole blocks ({input_ids.shape[1]} tokens, "
                "padding included); train on longer ones."
            )
        for attention, rows in zip(layers, noted):
            with without_autocast(rows[0].device):
                inputs = torch.cat(rows, dim=1).float()
                put_out, *changes = inputs @ _output_weight(attention.o_proj, inputs).mT
                energies = [state.square().mean() for state in (*changes, put_out)]
            yield from ((energy, energies[-1]) for energy in energies[:-1])


def _output_weight(linear: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The matrix of `o_proj`, in the dtype and on the device of `inputs`. Not by calling it on them: quantised layers
    have ways that pass no gradient."""
    if is_dense(linear):
        return linear.weight.detach().to(inputs)
    return asked_weight(linear, inputs.shape[-1], inputs.device, input_dtype(linear)).to(inputs)


def rebuilt_behind(states: RowStates, factors: LayerFactors, sinks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A row's keys before RoPE and values, (num_key_value_heads, length, head_dim), all from the sinks on that fill
    whole blocks as they come back from the cache."""
    exact = states.key_states, states.value_states
    rebuilt = reconstruct(factors, *(t[None, :, sinks:] for t in exact))
    return tuple(
        torch.cat([own[:, :sinks], new[0], own[:, sinks + new.shape[2] :]], dim=1) for own, new in zip(exact, rebuilt)
    )


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
        for name in ("keys", "values"):
            handles.append(watch(attention, name, functools.partial(held.__setitem__, name)))
    try:
        with in_eval_mode(decoder):
            decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [tuple(held[name].transpose(1, 2) for name in ("keys", "values")) for held in states]


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

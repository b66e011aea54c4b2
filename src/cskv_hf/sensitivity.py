"""How much a model's output cares for the energy lost in each layer's keys and values, measured.

The spectra of a fit say how much of a layer's attention a channel carries, but not what the layer's attention is
worth, and energies of keys (errors of scores) and of values (errors of outputs) are in different units. So each side
of each layer is cut alone, on a few calibration tokens and where a cache would: in tokens that are neither sinks nor
in the window of the query that reads them. The divergence of the next-token distribution is divided by the energy that
the cut lost, and the quotient is the exchange rate that makes all channels of the model comparable.

A cut changes nothing before its layer, so a probe starts there, from the hidden states of the uncut model: half the
work of whole forwards, and the same numbers. What is left grows with the square of the number of layers, so deep
models are probed on fewer tokens, which costs little (benchmarks/quality.py --tables probes).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from .decompose import Factors
from .families import decoder_of, in_eval_mode, input_device
from .files import replace_file
from .reads import RECENT, SINKS, RowStates, change_of_reads, exact_tokens, states_read
from .runs import differences
from .weights import same_weights, weight_hashes

logger = logging.get_logger(__name__)

LOST_SHARE = 0.1  # of a side's energy, taken away by a probe; 0.02 to 0.4 measured, 0.05 to 0.2 make little difference
ALL_TOKENS = 8  # layers: a probe of so many reads all tokens of the samples, one of twice as many half of them
LEAST_SHARE = 1 / 2  # of the tokens, however deep the model
LEAST_LENGTH = 256  # tokens of a piece; what far tokens are worth does not show in shorter ones
LEAST = 1e-12  # of a divergence, so that a layer nobody reads still gets a price


def probe_cut(factors: Factors) -> tuple[torch.Tensor, float]:
    """What a probe projects by, about the factors' mean, (groups, group_dim, group_dim), and the energy it loses.

    Args:
        factors: full rank.
    """
    order = factors.spectrum.double().argsort(descending=True, stable=True)
    tail = factors.spectrum.double()[order].flip(0).cumsum(0).flip(0)  # energy of this channel and all after
    kept = max(1, int((tail > LOST_SHARE * tail[0]).sum()))
    kept = min(kept, len(order) - 1)
    keep = torch.zeros(len(order), dtype=torch.float64)
    keep[order[:kept]] = 1.0
    maps, start = [], 0
    for rank in factors.ranks:
        channels = slice(start, start + rank)
        maps.append(factors.B[:, channels].double() * keep[channels] @ factors.A[channels].double())
        start += rank
    return torch.stack(maps), float(tail[kept])


def probe_samples(samples: Sequence[torch.Tensor], num_layers: int) -> list[torch.Tensor]:
    """The tokens that a probe of a model of so many layers reads: beginnings of `samples`, (length,) each."""
    share = min(1.0, max(LEAST_SHARE, ALL_TOKENS / num_layers))
    left, read = max(2, round(share * sum(map(len, samples)))), []
    for ids in samples:
        ids = ids[: min(left, max(LEAST_LENGTH, round(share * len(ids))))]
        if len(ids) > 1:
            read.append(ids)
            left -= len(ids)
    return read


def project(states: torch.Tensor, maps: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Keys before RoPE or values (num_key_value_heads, length, head_dim) after a [`probe_cut`] about a mean
    (kv_dim,)."""
    maps, mean = maps.to(states), mean.to(states)
    groups = (states.transpose(0, 1).flatten(1) - mean).unflatten(1, maps.shape[:2])
    projected = torch.einsum("lgi,gji->lgj", groups, maps).flatten(1) + mean
    return projected.unflatten(1, (len(states), -1)).transpose(0, 1)


def _old_tokens_cut(
    attention: nn.Module, side: str, factors: Factors, projection: torch.Tensor, exact: tuple[int, int]
) -> AbstractContextManager:
    """Within it a layer's queries read old tokens whose keys or values are projected."""
    name = {"keys": "key_states", "values": "value_states"}[side]

    def use(states: RowStates, output: torch.Tensor) -> torch.Tensor:
        cut = {name: project(getattr(states, name), projection, factors.mean)}
        change = change_of_reads(states, *exact_tokens(states.length, *exact), **cut)
        return output.to(change.dtype) + change

    return states_read(attention, use)


@contextmanager
def _inputs_kept(layers: nn.ModuleList) -> Iterator[list[list[torch.Tensor]]]:
    """Collects, per layer, the hidden states that it reads in every forward, (batch, length, hidden_size), on the
    CPU."""
    inputs: list[list[torch.Tensor]] = [[] for _ in layers]

    def keep(index: int):
        return lambda layer, args: inputs[index].append(args[0].cpu())

    handles = [layer.register_forward_pre_hook(keep(index)) for index, layer in enumerate(layers)]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _starting_at(layers: nn.ModuleList, index: int, hidden_states: torch.Tensor) -> Iterator[None]:
    """Within it a forward of the model starts at layer `index`, which reads `hidden_states`; those before it hand on
    what they get."""
    before = list(layers[:index])
    forwards = [layer.__dict__.get("forward") for layer in before]  # of offloaded layers
    handle = layers[index].register_forward_pre_hook(lambda layer, args: (hidden_states.to(args[0].device), *args[1:]))
    for layer in before:
        layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    try:
        yield
    finally:
        handle.remove()
        for layer, forward in zip(before, forwards):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def kl_divergence(full: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(full || other) of log-probabilities (..., vocab), for each token; 0 log 0 is 0, as of a forbidden token."""
    probability = full.exp()
    return torch.where(probability > 0, probability * (full - other), 0.0).sum(-1)


def _check_finite(finite: bool, what: str) -> None:
    if not finite:
        raise ValueError(
            f"The model's logits {what} are NaN or infinite, so that `allocation`='auto' cannot measure what its "
            "layers are worth. Load the model in bfloat16 or float32 rather than float16, check its weights, or use "
            "`allocation`='uniform'."
        )


def _hash(of: str) -> str:
    return hashlib.sha256(of.encode()).hexdigest()[:12]


def _measured_before(
    state_file: str | os.PathLike, weights: dict[str, str | None], what: dict[str, Any]
) -> list[list[float]]:
    """What a run left that was interrupted, of the first layers; nothing if it measured something else.

    Raises:
        ValueError: for a file that is damaged or something else.
    """
    if not Path(state_file).exists():
        return []
    try:
        held = json.loads(Path(state_file).read_text(encoding="utf-8"))
        others = "other weights" if not same_weights(held["weights"], weights) else differences(held["what"], what)
        sensitivity = [[float(rate) for rate in sides] for sides in held["sensitivity"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"'{state_file}' is truncated, corrupt or no file of what layers are worth ({error!r}). Delete it to "
            "measure that again."
        ) from error
    if others:
        logger.warning(f"What layers are worth is measured anew: what is in '{state_file}' is of {others}.")
        return []
    return sensitivity


@torch.no_grad()
def measure_sensitivity(
    model: nn.Module,
    bases: Sequence[tuple[Factors, Factors]],
    samples: Sequence[torch.Tensor],
    sinks: int = SINKS,
    recent: int = RECENT,
    progress: bool = True,
    state_file: str | os.PathLike | None = None,
    made_of: Mapping[str, Any] | None = None,
) -> list[list[float]]:
    """Divergence of the model's output per unit of energy lost, for the keys and values of every layer.

    Args:
        bases: per layer, the full-rank factors of keys and values.
        samples: (length,) input_ids to measure on; a deep model reads less of them, see [`probe_samples`].
        sinks, recent: first and most recent tokens that a cache keeps exactly; fewer of a short sample, see
            [`exact_tokens`].
        state_file: JSON where what was measured is saved after every layer; if it exists, and is of the same weights
            (by [`weight_hashes`]), model config, samples and `made_of`, the next layer is measured.
        made_of: what `bases` are made of, by name. They themselves differ in their last bits from run to run.

    Raises:
        ValueError: if there is no sample of two tokens or more, the model puts out NaN or infinite values, or
            `state_file` is damaged.

    Returns:
        Per layer ``[keys, values]``, in nats per token and unit of the spectra.
    """
    if not samples:
        raise ValueError(
            "`allocation`='auto' measures the model on calibration samples of at least 2 tokens, and there is none; "
            "give longer ones, or use `allocation`='uniform'."
        )
    device = input_device(model)
    layers = decoder_of(model).layers
    samples = probe_samples(samples, len(layers))
    batches, sensitivity = [ids[None].to(device) for ids in samples], []
    if state_file is not None:
        weights, read = weight_hashes(model), [ids.tolist() for ids in samples]
        of_model, of_samples = _hash(model.config.to_json_string()), _hash(str(read))
        what = {"model config": of_model, "samples": of_samples, "lost share": LOST_SHARE}
        what |= {"sinks": sinks, "recent tokens": recent, **(made_of or {})}
        sensitivity = _measured_before(state_file, weights, what)
    done = len(sensitivity)
    if done == len(layers):
        return sensitivity

    def log_probabilities(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)

    tokens = sum(ids.shape[1] for ids in batches)
    with in_eval_mode(model):
        with _inputs_kept(layers) as inputs:
            reference = [log_probabilities(ids) for ids in batches]
        for number, full in enumerate(reference):
            _check_finite(not full.isnan().any(), f"of calibration sample {number}")  # -inf forbids a token
        bar = dict(initial=done, total=len(layers), desc="Probing", unit="layer", disable=not progress)
        for index in tqdm(range(done, len(layers)), **bar):
            rates = []
            for name, factors in zip(("keys", "values"), bases[index]):
                projection, lost = probe_cut(factors)
                with _old_tokens_cut(layers[index].self_attn, name, factors, projection, (sinks, recent)):
                    divergence = 0.0
                    for full, ids, hidden_states in zip(reference, batches, inputs[index]):
                        with _starting_at(layers, index, hidden_states):
                            divergence += float(kl_divergence(full, log_probabilities(ids)).sum())
                _check_finite(math.isfinite(divergence), f"with cut {name} of layer {index}")
                rates.append(max(divergence / tokens, LEAST) / max(lost, LEAST))
            sensitivity.append(rates)
            if state_file is not None:
                held = {"weights": weights, "what": what, "sensitivity": sensitivity}
                replace_file(Path(state_file), json.dumps(held))
    return sensitivity

"""attach and detach: what makes one model instance fill and read a CSKVCache, and how to take it off again.

The model's own code stays as it is. Attaching adds forward pre-hooks (on the decoder, to see the padding mask; on
each attention layer, to stage positions and factors), selects our attention function on top of the user's, and gives
the instance a `generate` that knows caches of ours. Classes and modules of others are not touched. A compiler
(`torch.compile`) leaves our part out, which changes with every token, unless the cache is a CSKVStaticCache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .attention_function import PREFIX, register
from .cache import CSKVCache
from .families import NOT_TURNED, attention_layers, decoder_of, frequencies_of, rope_kind
from .generation import cache_given, give_generate, take_generate
from .handover import ForwardInputs
from .model_shape import sliding_window
from .rope import cos_sin
from .sidecar import CSKVFactors
from .static_cache import CSKVStaticCache

logger = logging.get_logger(__name__)


class DecoderHook:
    """A hook of the decoder, which takes part of its arguments by position.

    Args:
        names: of the positional arguments of the decoder's forward, in their order.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def arguments(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.names, args)), **kwargs}


class BeginForward(DecoderHook):
    """Pre-hook of the decoder: tells the cache which of the tokens to come are padding."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = self.arguments(args, kwargs)
        cache = cache_given(given)
        if isinstance(cache, CSKVStaticCache):
            cache.begin_forward(given.get("attention_mask"))
        elif isinstance(cache, CSKVCache):
            _untraced(cache.begin_forward, given.get("attention_mask"))


class FinishForward(DecoderHook):
    """Hook after the decoder: tells the cache that every layer has the new tokens."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        cache = cache_given(self.arguments(args, kwargs))
        if isinstance(cache, CSKVStaticCache):
            cache.finish_forward()
        elif isinstance(cache, CSKVCache):
            _untraced(cache.finish_forward)


class StageFactors:
    """Pre-hook of an attention layer: hands the cache what its `update` needs. A plain object, so that a model can
    be copied."""

    def __init__(self, rotary: nn.Module, kind: str, sliding_window: int | None, checks_rotary: bool) -> None:
        self.rotary, self.kind, self.sliding_window = rotary, kind, sliding_window
        self.checks_rotary = checks_rotary

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        cache = cache_given(kwargs)
        if isinstance(cache, CSKVStaticCache):
            self._stage(cache, module, args, kwargs)
        elif isinstance(cache, CSKVCache):
            _untraced(self._stage, cache, module, args, kwargs)

    def _stage(
        self, cache: CSKVCache | CSKVStaticCache, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        sidecar: CSKVFactors = module.cskv
        adapter = sidecar.adapter_in_use
        if adapter is None:
            return  # `update` explains
        config = sidecar.configs[adapter]
        if not config.is_fitted:
            raise RuntimeError(
                f"The CSKV adapter '{adapter}' has no factors yet. Fill it with `cskv_hf.fit(model, data)`, or load "
                f"a fitted one."
            )
        hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        positions = kwargs["position_ids"]
        frequencies = frequencies_of(self.rotary, self.kind)
        if len(cache.layers) <= module.layer_idx:  # once per cache
            _untraced(sidecar.check_filled, adapter)
            if self.checks_rotary:
                _untraced(self._check_rotary, positions, kwargs["position_embeddings"])
        fused = module.config._attn_implementation.startswith(PREFIX)
        if not fused and isinstance(cache, CSKVCache):
            logger.warning_once(
                f"The attention implementation was changed to '{module.config._attn_implementation}' after CSKV was "
                "attached, so keys and values are rebuilt in every step, which is slow. Change it before the adapter "
                "is loaded instead."
            )
        inputs = ForwardInputs(positions, len(hidden_states), frequencies, not fused, self.sliding_window)
        cache.stage(module.layer_idx, sidecar(), config, inputs)

    def _check_rotary(self, positions: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> None:
        """The cache rebuilds cos and sin from positions; make sure once that they are the model's."""
        given = torch.stack([t[:1, -1:] for t in position_embeddings])
        expected = torch.stack(
            cos_sin(positions[:1, -1:].to(given.device), frequencies_of(self.rotary, self.kind), given.dtype)
        )
        half = expected.shape[-1]
        if given.shape[-1] != 2 * half or not torch.allclose(
            given, torch.cat([expected, expected], dim=-1), atol=1e-2
        ):
            raise RuntimeError(
                "This model's rotary embedding is not the half-rotation of its `inv_freq`; CSKV cannot rebuild its "
                "keys."
            )


@torch.compiler.disable
def _untraced(function: Callable, *args: Any) -> None:
    """Leave a compiler out: of what a growing cache does, which changes with every token, and of what is done once."""
    function(*args)


def attach(model: nn.Module) -> None:
    """Make a causal language model that holds CSKV sidecars (``self_attn.cskv``), itself or inside a `PeftModel`, work
    with [`CSKVCache`]; idempotent.

    Called by the tuner whenever an adapter is added or loaded; nobody else needs to.

    Raises:
        ValueError: if the model is not of a supported family.
    """
    decoder, model = decoder_of(model), unwrapped(model)
    detach(model)
    checked = {NOT_TURNED}  # nothing to check; of each other kind the first layer is checked
    for attention in attention_layers(model):
        if hasattr(attention, "cskv"):
            window = sliding_window(attention.config, attention.layer_idx)
            kind = rope_kind(decoder, attention)
            stage = StageFactors(decoder.rotary_emb, kind, window, checks_rotary=kind not in checked)
            attention.register_forward_pre_hook(stage, with_kwargs=True)
            checked.add(kind)
    names = positional_arguments(decoder)
    decoder.register_forward_pre_hook(BeginForward(names), with_kwargs=True)
    decoder.register_forward_hook(FinishForward(names), with_kwargs=True)
    _set_attention(model, register(model.config._attn_implementation))
    give_generate(model)


def detach(model: nn.Module) -> None:
    """Undo [`attach`]: hooks, attention function and `generate` are as before. The sidecars stay (`unload` removes
    them)."""
    model = unwrapped(model)
    for module in (decoder_of(model), *attention_layers(model)):
        for hooks, with_kwargs in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key, hook in list(hooks.items()):
                if isinstance(hook, (BeginForward, StageFactors, FinishForward)):
                    del hooks[key]
                    with_kwargs.pop(key, None)
    _set_attention(model, model.config._attn_implementation.removeprefix(PREFIX))
    take_generate(model)


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside whatever PEFT has wrapped around it, or `model` itself."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)


def positional_arguments(module: nn.Module) -> tuple[str, ...]:
    """What arguments of a module's forward mean that are given by position."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def _set_attention(model: nn.Module, name: str) -> None:
    """Not by `set_attn_implementation`: it takes every name with "flash" in it for a kernel that it has to load."""
    model.config._attn_implementation = name

"""Which models CSKV serves, and where their parts are. Read-only: looks at a model, leaves it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .model_shape import CHANGING_ROPE_TYPES, ROPE_TYPES, ModelShape
from .rope import RotaryFrequencies

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
REQUIRED = ("q_proj", "k_proj", "v_proj", "o_proj", "layer_idx", "head_dim", "scaling")


def decoder_of(model: nn.Module) -> nn.Module:
    """The module that holds the decoder layers and the rotary embedding of a (PEFT-wrapped) causal language model.

    Raises:
        ValueError: if the model is not of a supported family; the message names it and lists those that are.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if model_type not in SUPPORTED:
        raise ValueError(
            f"CSKV does not support models of type '{model_type}' ({type(model).__name__}); supported are "
            f"{', '.join(SUPPORTED)}."
        )
    if getattr(getattr(model.config, "distributed_config", None), "pp_size", None) not in (None, 1):
        raise ValueError(
            "CSKV does not support pipeline parallelism (`pp_size`): a process has only some of the layers. Load the "
            "model with `device_map` or `tp_plan` instead."
        )
    for module in model.modules():
        if hasattr(module, "layers") and hasattr(module, "rotary_emb"):
            break
    else:
        raise ValueError(
            f"{type(model).__name__} has no decoder with `layers` and `rotary_emb`; CSKV cannot find its attention."
        )
    for attention in (layer.self_attn for layer in module.layers):
        missing = [name for name in REQUIRED if not hasattr(attention, name)]
        if missing:
            raise ValueError(
                f"{type(attention).__name__} has no {', '.join(missing)}; CSKV does not know how to compress its "
                f"cache."
            )
    rope_type = getattr(module.rotary_emb, "rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise ValueError(
            f"CSKV does not support RoPE scaling of type '{rope_type}'; supported are {', '.join(ROPE_TYPES)}."
        )
    return module


def refuse_tensor_parallelism(model: nn.Module, what: str) -> None:
    """For what looks at all heads of a layer at once.

    Raises:
        ValueError: if the model is loaded with `tp_plan`; the message says what to do.
    """
    if getattr(model, "_tp_size", None) not in (None, 1):
        raise ValueError(
            f"{what} does not run on a tensor-parallel model (`tp_plan`), whose processes see some of the heads each. "
            "Load the model in one process, with `device_map` if it is large, fit and save the adapter there, and "
            "load it onto the tensor-parallel model with `cskv_hf.load`."
        )


def context_length(model: nn.Module) -> int:
    """Tokens that the model's config says it was made for; unlimited where it does not say."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**62)


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The self-attention modules in the order of the layers."""
    return [layer.self_attn for layer in decoder_of(model).layers]


def key_source(attention: nn.Module) -> nn.Module:
    """The module whose output is the keys before RoPE: k_proj, or the key norm after it."""
    return getattr(attention, "k_norm", attention.k_proj)


def query_source(attention: nn.Module) -> nn.Module:
    """The module whose output is the queries before RoPE."""
    return getattr(attention, "q_norm", attention.q_proj)


def shape_of(model: Any) -> ModelShape:
    return ModelShape.from_model_config(model.config)


def frequencies_of(rotary: nn.Module) -> RotaryFrequencies:
    """What the model's rotary embedding turns keys by now."""
    change = getattr(rotary, "rope_type", "default") in CHANGING_ROPE_TYPES
    return RotaryFrequencies(rotary.inv_freq, float(rotary.attention_scaling), change)


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go: to the embedding, or, if that lies on disk, to where the model is run."""
    device = model.get_input_embeddings().weight.device
    return torch.device(getattr(model, "device", device)) if device.type == "meta" else device


@contextlib.contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Afterwards every part is in the mode it was in, training or not."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextlib.contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Without dropout, its own or a LoRA's; see [`modes_kept`]."""
    with modes_kept(module):
        module.eval()
        yield


def is_dense(linear: nn.Module) -> bool:
    """Whether a layer multiplies by its own ``weight``, and that is in memory: none that is quantised, offloaded, or
    under a LoRA."""
    return type(linear) is nn.Linear and not linear._forward_hooks and not hasattr(linear, "_hf_hook")


def input_dtype(linear: nn.Module) -> torch.dtype:
    """Of inputs that a linear layer accepts, whatever hooks or adapters it has: its weight's, unless that is
    quantised."""
    weight = getattr(linear, "weight", None)
    return weight.dtype if weight is not None and weight.dtype.is_floating_point else torch.float32


@torch.no_grad()
def dense_weight(linear: nn.Module, in_features: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The (out_features, in_features) matrix a linear layer multiplies by.

    Read off where it is there to be read; otherwise (quantised, offloaded, under a LoRA) found by asking the layer.
    """
    if is_dense(linear):
        return linear.weight.detach().double().cpu()  # of a float64 model on the CPU, these are the parameter itself
    return asked_weight(linear, in_features, device, dtype).double().cpu()


@torch.no_grad()
def asked_weight(linear: nn.Module, in_features: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[`dense_weight`] found by asking, where the layer answers, in float32 or wider."""
    with in_eval_mode(linear):
        rows = [linear(torch.zeros(1, in_features, device=device, dtype=dtype))]
        identity = torch.eye(in_features, device=device, dtype=dtype)
        rows.extend(linear(chunk) for chunk in identity.split(1024))
    response = torch.cat(rows).to(torch.promote_types(dtype, torch.float32))
    return (response[1:] - response[:1]).mT.contiguous()

"""Which models CSKV serves, and where their parts are. Read-only: looks at a model, leaves it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .model_shape import CHANGING_ROPE_TYPES, ROPE_TYPES, ModelShape
from .rope import RotaryFrequencies

SUPPORTED = (
    "gemma",
    "gemma3_text",
    "granite",
    "llama",
    "ministral",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "starcoder2",
)
SOURCES = {"queries": ("q_norm", "q_proj"), "keys": ("k_norm", "k_proj"), "values": ("v_proj",)}  # the first there is
NORMS_BY_HEAD = ("gemma3_text",)  # norms of queries and keys put out (batch, heads, length, head_dim)
UNROUNDED = ("olmo2", "olmo3")  # cos and sin are float32, whatever the dtype
NOT_TURNED = "none"  # the kind of layers without RoPE
REQUIRED = ("q_proj", "k_proj", "v_proj", "o_proj", "layer_idx", "head_dim", "scaling")


def decoder_of(model: nn.Module) -> nn.Module:
    """The module that holds the decoder layers and the rotary embedding of a (PEFT-wrapped) causal language model.

    Raises:
        ValueError: if the model is not of a supported family, or has another attention or RoPE than it; the message
            says what it has.
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
    for layer in module.layers:
        _check_attention(layer.self_attn)
    _check_rope(module)
    return module


def _check_attention(attention: nn.Module) -> None:
    missing = [name for name in REQUIRED if not hasattr(attention, name)]
    if missing:
        raise ValueError(
            f"{type(attention).__name__} has no {', '.join(missing)}; CSKV does not know how to compress its cache."
        )
    if not getattr(attention, "is_causal", True):
        raise ValueError(
            f"{type(attention).__name__} is not causal (`use_bidirectional_attention`), and CSKV compresses the "
            "cache of causal attention only."
        )


def _check_rope(decoder: nn.Module) -> None:
    differ = any(rope_kind(decoder, layer.self_attn) for layer in decoder.layers)
    served = [name for name in ROPE_TYPES if not (differ and name in CHANGING_ROPE_TYPES)]
    for rope_type in rope_types(decoder.rotary_emb):
        if rope_type not in served:
            where = " where layers differ in their RoPE" if rope_type in ROPE_TYPES else ""
            raise ValueError(
                f"CSKV does not support RoPE scaling of type '{rope_type}'{where}; supported are {', '.join(served)}."
            )


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


def watch(attention: nn.Module, what: str, use: Callable[[torch.Tensor], None]) -> RemovableHandle:
    """Call `use` in every forward of an attention layer with its "queries" or "keys" before RoPE, or its "values",
    (batch, length, heads, head_dim), detached; until the handle is removed."""
    source = next(getattr(attention, name) for name in SOURCES[what] if hasattr(attention, name))
    by_head = attention.config.model_type in NORMS_BY_HEAD

    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        states = output.detach()
        states = states.transpose(1, 2) if by_head and states.ndim == 4 else states
        use(states.flatten(2).unflatten(2, (-1, attention.head_dim)))

    return source.register_forward_hook(hook)


def shape_of(model: Any) -> ModelShape:
    return ModelShape.from_model_config(model.config)


def rope_types(rotary: nn.Module) -> tuple[str, ...]:
    """Of RoPE scaling, those of a model's rotary embedding: one, or one for each kind of layers."""
    held = getattr(rotary, "rope_type", "default")
    return tuple(held.values()) if isinstance(held, dict) else (held,)


def is_turned(attention: nn.Module) -> bool:
    """Whether the layer turns its keys at all."""
    return bool(getattr(attention, "use_rope", True))


def rope_kind(decoder: nn.Module, attention: nn.Module) -> str:
    """Names the layers of a model that turn keys alike; "" where the model does not tell layers apart."""
    if not is_turned(attention):
        return NOT_TURNED
    by_type = isinstance(getattr(decoder.rotary_emb, "rope_type", None), dict)
    return attention.config.layer_types[attention.layer_idx] if by_type else ""


def frequencies_of(rotary: nn.Module, kind: str = "") -> RotaryFrequencies:
    """What the model's rotary embedding turns keys of layers of a [`rope_kind`] by now."""
    if kind == NOT_TURNED:
        return RotaryFrequencies(torch.zeros_like(rotary.inv_freq), 1.0, kind=kind)
    prefix, rounded = f"{kind}_" * bool(kind), rotary.config.model_type not in UNROUNDED
    inv_freq, scaling = (getattr(rotary, prefix + name) for name in ("inv_freq", "attention_scaling"))
    change = not kind and getattr(rotary, "rope_type", "default") in CHANGING_ROPE_TYPES
    return RotaryFrequencies(inv_freq, float(scaling), change, kind, rounded)


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

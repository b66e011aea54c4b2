"""CSKV as a PEFT method: registration, and injection of the sidecars.

Private API relied on (checked with peft 0.20.0 and 0.21.2): `BaseTuner.inject_adapter` and the methods overridden
below, those of `BaseTunerLayer` in sidecar.py, and, in _peft_type.py, the members of the `PeftType` enum.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method
from torch import nn
from transformers.utils import logging

from .config import CSKVConfig, num_key_groups
from .families import attention_layers, decoder_of, shape_of
from .model_shape import ModelShape
from .patch import attach, detach
from .sharding import head_shard
from .sidecar import CSKVFactors

logger = logging.get_logger(__name__)

TARGET = "self_attn"


class CSKVModel(BaseTuner):
    """The tuner: puts a [`CSKVFactors`] beside the projections of every attention layer and wraps none of them.

    Wrapping k_proj and v_proj would hide them from LoRA, and a later merge would drop the factors or, worse, merge
    them.
    """

    prefix = "cskv_"
    tuner_layer_cls = CSKVFactors
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Check that the adapter fits the model, add its factors, and attach; every way of adding or loading one
        comes through here."""
        config: CSKVConfig = self.peft_config[adapter_name]
        decoder_of(model)  # refuses families that are not supported
        shape = shape_of(model)
        config.check_model(shape)
        _warn_of_another_base(config, model)
        if not config.is_fitted:
            config.layer_ranks(shape)  # refuses ranks that do not fit
        self._check_shards(model, config, shape)
        config.target_modules = [TARGET]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        attach(model)

    def _check_shards(self, model: nn.Module, config: CSKVConfig, shape: ModelShape) -> None:
        """Refuse what tensor parallelism cannot divide, before anything of the model is changed."""
        num_groups = num_key_groups(config.key_layout, shape.num_key_value_heads)
        for name, _ in model.named_modules():
            if self._check_target_module_exists(config, name):
                shard = head_shard(model, name, shape.num_key_value_heads)
                if shard is not None:
                    shard.check_groups(num_groups)

    def _prepare_adapter_config(self, peft_config: CSKVConfig, model_config: dict) -> CSKVConfig:
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: CSKVConfig, key: str) -> bool:
        return key.rpartition(".")[2] == TARGET

    def _create_and_replace(
        self,
        peft_config: CSKVConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        layer_idx, shape = target.layer_idx, ModelShape.from_model_config(target.config)
        if not hasattr(target, "cskv"):
            target.cskv = CSKVFactors(layer_idx, shape.num_key_value_heads, shape.head_dim)
        sidecar: CSKVFactors = target.cskv
        if peft_config.is_fitted:
            key_ranks, value_rank = peft_config.key_ranks[layer_idx], peft_config.value_ranks[layer_idx]
        else:
            key_rank, value_rank = peft_config.layer_ranks(shape)[layer_idx]
            key_ranks = sidecar.default_key_ranks(peft_config, key_rank)
        sidecar.update_layer(adapter_name, peft_config, key_ranks, value_rank)
        sidecar.placement = placement(target, self.model)
        sidecar.shard = head_shard(self.model, current_key, shape.num_key_value_heads)
        offloaded = getattr(getattr(target.k_proj, "_hf_hook", None), "offload", False)
        if offloaded and hasattr(self.model, "hf_device_map"):
            # else transformers takes the factors for offloaded, like the layer, and leaves them unread in the file
            self.model.hf_device_map[f"{current_key}.cskv"] = str(sidecar.placement[0])
        sidecar._move_adapter_to_device_of_base_layer(adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep the model's dtype for inference; PEFT's float32 is for training."""
        if not self.peft_config[adapter_name].inference_mode:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "CSKV factors compress the cache and cannot be merged into the weights; use `unload()` to remove them."
        )

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        detach(self.model)
        for attention in attention_layers(self.model):
            if hasattr(attention, "cskv"):
                del attention.cskv
        for name in [name for name in getattr(self.model, "hf_device_map", {}) if name.endswith(".cskv")]:
            del self.model.hf_device_map[name]
        if hasattr(self.model, "peft_config"):
            others = {n: c for n, c in self.model.peft_config.items() if not isinstance(c, CSKVConfig)}
            del self.model.peft_config
            if others:  # of adapters inside the model
                self.model.peft_config = others
        return self.model


def placement(attention: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the factors of a layer belong: the device its projections run on and the model's dtype (a 4-bit base has
    no float weight)."""
    hook = getattr(attention.k_proj, "_hf_hook", None) or getattr(attention, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is None:
        device = next((p.device for p in attention.k_proj.parameters()), torch.device("cpu"))
    if isinstance(device, int):
        device = torch.device("cuda", device)
    dtype = getattr(model, "dtype", None)
    return torch.device(device), dtype if isinstance(dtype, torch.dtype) else torch.float32


def _warn_of_another_base(config: CSKVConfig, model: nn.Module) -> None:
    """An adapter may serve another model of the same sizes, a fine-tuned one say, but was not measured there."""
    fitted, given = config.base_model_name_or_path, getattr(model.config, "_name_or_path", None)
    if fitted and given and fitted.rstrip("/").rpartition("/")[2] != given.rstrip("/").rpartition("/")[2]:
        logger.warning(
            f"This CSKV adapter was fitted to '{fitted}', the model is '{given}'. Sizes agree, so it loads; what was "
            "measured for it does not hold here. Fit an adapter to this model with `cskv_hf.fit`."
        )


def register() -> None:
    """Make PEFT know CSKV; idempotent."""
    if PeftType.CSKV not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name="cskv", config_cls=CSKVConfig, model_cls=CSKVModel, prefix=CSKVModel.prefix)


def add_adapter(model: nn.Module, config: CSKVConfig, adapter_name: str) -> nn.Module:
    """Add an (empty) CSKV adapter to a plain transformers model, a `PeftModel` of CSKV adapters, or a model with
    adapters inside.

    Raises:
        ValueError: as [`check_can_add`].
    """
    check_can_add(model, adapter_name)
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
        model.set_adapter(adapter_name)
        return model
    if getattr(model, "_hf_peft_config_loaded", False):
        active = _active_others(model)
        with _trained_kept(model):
            model.add_adapter(config, adapter_name=adapter_name)
            model.set_adapter([*active, adapter_name])
        return model
    return get_peft_model(model, config, adapter_name=adapter_name)


def check_can_add(model: nn.Module, adapter_name: str) -> None:
    """Refuse, before any work is done, a model that cannot get a CSKV adapter of that name.

    Raises:
        ValueError: for a `PeftModel` of another method, which PEFT cannot mix with ours, for a name that an adapter of
            another method has, and for a model that is inside a `PeftModel` with CSKV adapters.
    """
    configs = getattr(model, "peft_config", {})
    inside = not isinstance(model, PeftModel) and not getattr(model, "_hf_peft_config_loaded", False)
    if inside and any(hasattr(attention, "cskv") for attention in attention_layers(model)):
        names = ", ".join(f"'{name}'" for name in configs)
        raise ValueError(
            f"This model is inside a PeftModel that has the CSKV adapter {names}, and would change under it. Pass "
            "that PeftModel with another `adapter_name`, call `unload()` on it first, or load the model once more."
        )
    if isinstance(model, PeftModel):
        others = {str(c.peft_type.value) for c in configs.values()} - {"CSKV"}
        if others:
            raise ValueError(
                f"This PeftModel holds {', '.join(sorted(others))} adapters and PEFT cannot mix methods in one "
                "PeftModel. Merge them first (`model.merge_and_unload()`), or load both on the transformers model "
                "with `model.load_adapter`."
            )
    if adapter_name in configs and not isinstance(configs[adapter_name], CSKVConfig):
        raise ValueError(
            f"`adapter_name`='{adapter_name}' is the name of a {configs[adapter_name].peft_type.value} adapter of "
            "this model. Give the CSKV adapter another one."
        )


def sidecars(model: nn.Module) -> list[CSKVFactors]:
    """The sidecars of a model in the order of the layers.

    Raises:
        ValueError: if it has none.
    """
    found = [a.cskv for a in attention_layers(model) if hasattr(a, "cskv")]
    if not found:
        raise ValueError(
            "This model has no CSKV adapter; make one with `cskv_hf.fit`, or load one with `cskv_hf.load`."
        )
    return found


def adapter_config(model: nn.Module, adapter_name: str | None = None) -> CSKVConfig:
    """The config of a CSKV adapter of the model, by default of the one in use.

    Raises:
        ValueError: if there is none, or none of that name.
    """
    sidecar, name = sidecars(model)[0], adapter_name or adapter_in_use(model)
    if name not in sidecar.configs:
        raise ValueError(f"This model has no CSKV adapter '{name}'; it has {', '.join(sidecar.configs) or 'none'}.")
    return sidecar.configs[name]


def adapter_in_use(model: nn.Module) -> str:
    """The name of the model's active CSKV adapter.

    Raises:
        ValueError: if there is none, or adapters are disabled.
    """
    sidecar = sidecars(model)[0]
    if sidecar.adapter_in_use is None:
        held = ", ".join(sidecar.configs) or "none"
        why = "adapters are disabled" if sidecar.disable_adapters else "none is active"
        raise ValueError(f"No CSKV adapter of this model ({held}) is in use: {why}. Enable one, or name it.")
    return sidecar.adapter_in_use


def use_adapter(model: nn.Module, adapter_name: str) -> None:
    """Make a CSKV adapter the one in use, for PEFT too, and freeze it; adapters of other methods stay as they are."""
    if isinstance(model, PeftModel):
        model.set_adapter(adapter_name, inference_mode=True)
    elif getattr(model, "_hf_peft_config_loaded", False):
        with _trained_kept(model):
            model.set_adapter([*_active_others(model), adapter_name])
    for sidecar in sidecars(model):
        sidecar.set_adapter(adapter_name, inference_mode=True)


def _active_others(model: nn.Module) -> list[str]:
    """Active adapters of other methods inside a transformers model."""
    return [name for name in model.active_adapters() if not isinstance(model.peft_config[name], CSKVConfig)]


@contextlib.contextmanager
def _trained_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards what the model had is trained, or not, as before; activating an adapter changes that."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    yield
    for parameter, is_trained in trained:
        parameter.requires_grad_(is_trained)

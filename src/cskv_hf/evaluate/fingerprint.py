"""What results depend on: model and adapter as a short hash, versions of packages."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from ..config import CSKVConfig
from ..sidecar import CSKVFactors


def fingerprint(model: nn.Module, max_length: int, *more: Any) -> str:
    """Short hash of what responses depend on: name, dtype, adapter, all factors, a sample of every weight, and `more`,
    JSON values."""
    config = active_config(model)
    settings = {} if config is None else {k: v for k, v in config.to_dict().items() if k != "fit_report"}
    facts = [model.config.name_or_path, str(model.dtype), max_length, settings, *more]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=_jsonable).encode())
    for name, tensor in model.state_dict().items():
        if tensor.device.type != "meta":
            sample = tensor.detach().flatten()
            sample = sample if ".cskv." in name else sample[:16]
            digest.update(name.encode() + sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def active_config(model: nn.Module) -> CSKVConfig | None:
    """Of the CSKV adapter that the model uses; None if it uses none."""
    for module in model.modules():
        if isinstance(module, CSKVFactors) and module.adapter_in_use is not None:
            return module.configs[module.adapter_in_use]
    return None


def versions() -> dict[str, str]:
    """Of the packages whose code makes the numbers."""
    return {name: version(name.replace("_", "-")) for name in ("torch", "transformers", "peft", "cskv_hf")}


def _jsonable(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)

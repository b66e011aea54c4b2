"""The files of a CSKV adapter in a directory: saved whatever else a model holds, with a card, and checked before they
are used."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from .card import REPO_ID, model_card
from .config import CSKVConfig
from .model_shape import ModelShape
from .sidecar import CSKVFactors, Factor, factor_shapes
from .tuner import adapter_in_use

ADAPTER = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
WEIGHT = re.compile(r"\.layers\.(\d+)\.self_attn\.cskv\.(\w+)\.weight$")


def save_adapter(model: nn.Module, folder: str | os.PathLike, adapter_name: str | None = None) -> None:
    """Save one CSKV adapter to a directory, whatever else the model holds: a `PeftModel`, or a transformers model
    with adapters inside.

    Nothing of the model changes, neither what is active nor what is trained.

    Raises:
        ValueError: if an adapter of another method has the same name.
    """
    name = adapter_name or adapter_in_use(model)
    if not isinstance(model.peft_config.get(name), CSKVConfig):
        raise ValueError(
            f"The CSKV adapter '{name}' cannot be saved: an adapter of another method was given its name, by which "
            "PEFT saves. Add that one under another `adapter_name`."
        )
    # not by PEFT, which has a folder for every name, nor by transformers, which saves the only active adapter
    Path(folder).mkdir(parents=True, exist_ok=True)
    weights = {key: factor().detach().contiguous() for key, factor in _factors(model, name).items()}
    save_file(weights, Path(folder) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config = copy.copy(model.peft_config[name])
    config.inference_mode = True
    config.save_pretrained(str(folder))


@torch.no_grad()
def restore_adapter(model: nn.Module, folder: str | os.PathLike, adapter_name: str) -> None:
    """Read what [`save_adapter`] wrote into the factors that the model has, in their own dtype."""
    weights = load_file(Path(folder) / SAFETENSORS_WEIGHTS_NAME)
    for key, factor in _factors(model, adapter_name).items():
        factor.weight.copy_(weights[key])


def _factors(model: nn.Module, adapter_name: str) -> dict[str, Factor]:
    """Of an adapter, by the names that PEFT gives them in files."""
    inner = model.base_model.model if isinstance(model, PeftModel) else model
    return {
        f"base_model.model.{path}.{name}.weight": getattr(module, name)[adapter_name]
        for path, module in inner.named_modules()
        if isinstance(module, CSKVFactors)
        for name in module.adapter_layer_names
    }


def write_adapter(folder: Path, model: PeftModel, tokenizer: Any, name: str) -> None:
    """Fill a new directory with the one adapter of a model, a model card, and the tokenizer.

    Args:
        name: by which the card says to load it.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (config,) = model.peft_config.values()
    base = str(config.base_model_name_or_path)
    on_hub = REPO_ID.fullmatch(base) is not None and not os.path.exists(base)
    model_card(config, base, name, base_on_hub=on_hub).save(folder / "README.md")


def check_adapter_files(folder: Path) -> None:
    """Refuse an adapter directory that cannot be loaded, saying which file is at fault and what to do.

    Raises:
        ValueError: as described.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no directory '{folder}'.")
    config_file, weights_file = (folder / name for name in ADAPTER)
    for file in (config_file, weights_file):
        if not file.is_file():
            inside = sorted(there.parent.name for there in folder.glob(f"*/{CONFIG_NAME}"))
            way = (
                f"It holds adapters by their names, {', '.join(map(repr, inside))}: give '{folder / inside[0]}', or "
                f"`subfolder='{inside[0]}'`."
                if inside
                else "Save it again with `save_pretrained`."
            )
            raise ValueError(f"'{folder}' is not a complete CSKV adapter: {file.name} is missing. {way}")
    try:
        settings = json.loads(config_file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"'{config_file}' is not valid JSON ({error}). Save or download the adapter again."
        ) from error
    peft_type = settings.get("peft_type") if isinstance(settings, dict) else None
    if peft_type is None:
        raise ValueError(f"'{config_file}' names no `peft_type`, so '{folder}' is not an adapter.")
    if peft_type != "CSKV":
        raise ValueError(f"'{folder}' is a {peft_type} adapter, not a CSKV one.")
    try:
        config = CSKVConfig.from_pretrained(str(folder))
        if config.is_fitted and config.model_shape is not None:
            _check_budget(config_file, config)
    except (TypeError, IndexError, KeyError, AttributeError) as error:
        raise ValueError(
            f"'{config_file}' contradicts itself ({error}). Save or download the adapter again."
        ) from error
    try:
        with safe_open(weights_file, "pt") as weights:
            shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"'{weights_file}' is truncated or corrupt ({error}). Save or download the adapter again."
        ) from error
    if config.is_fitted and config.model_shape is not None:
        found = {(int(at[1]), at[2]): shape for name, shape in shapes.items() if (at := WEIGHT.search(name))}
        _check_shapes(weights_file, found, config)


def _check_budget(file: Path, config: CSKVConfig) -> None:
    shape = ModelShape(**config.model_shape)
    kept = config.bytes_per_token(shape) / shape.full_bytes_per_token
    by_hand = config.key_rank_per_layer or config.value_rank_per_layer
    if config.compression is not None and not by_hand and kept > 1 - config.compression + 0.005:
        raise ValueError(
            f"'{file}' says `compression`={config.compression}, but its ranks and bits keep {100 * kept:.1f} % of the "
            "bytes. Download or fit the adapter again, or cut it with `cskv_hf.load(model, adapter, compression=...)`."
        )


def _check_shapes(file: Path, found: dict[tuple[int, str], tuple], config: CSKVConfig) -> None:
    kv_dim, names = ModelShape(**config.model_shape).kv_dim, {name for _, name in found}
    if "cskv_value_spectrum" in names and "cskv_value_rounding" not in names:
        raise ValueError(f"'{file}' has no `cskv_value_rounding`: an older version wrote it. Fit the adapter again.")
    for layer_idx, ranks in enumerate(zip(config.key_ranks, config.value_ranks)):
        for name, shape in factor_shapes(*ranks, kv_dim).items():
            given = found.get((layer_idx, name))
            if given != shape:
                raise ValueError(
                    f"'{file}' does not belong to the {CONFIG_NAME} beside it: `{name}` of layer {layer_idx} is "
                    f"{'missing' if given is None else given} in the file, {shape} by the config. Save or download "
                    "the adapter again."
                )

"""fit: calibration data in, a model with a fitted CSKV adapter out. Closed form, no training."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from .calibration import collect_statistics
from .config import CSKVConfig, num_key_groups
from .decompose import (
    Factors,
    driven_channels,
    falling,
    key_weight,
    latent_energy,
    noise_energy,
    normalized,
    optimal_factors,
    random_factors,
    relative_error,
    unreached_channels,
    value_weight,
    weight_moment,
)
from .families import (
    attention_layers,
    decoder_of,
    dense_weight,
    input_dtype,
    refuse_tensor_parallelism,
    shape_of,
)
from .fit_report import LayerReport, mean_bits
from .model_shape import ModelShape
from .plan import LayerSpectra, check_budget, plan, store_plan
from .pushing import give_push
from .reads import SINKS
from .sensitivity import measure_sensitivity
from .statistics import UNREAD_SHARE, KVStatistics
from .tuner import adapter_config, add_adapter, check_can_add, placement, sidecars, use_adapter
from .weights import same_weights, weight_hashes

logger = logging.get_logger(__name__)

FITTED = ("key_ranks", "value_ranks", "key_bits", "value_bits", "sensitivity", "model_shape", "fit_report")


def fit(
    model: nn.Module,
    data: Iterable[Any] | KVStatistics,
    config: CSKVConfig | None = None,
    *,
    tokenizer: Any = None,
    adapter_name: str = "default",
    max_length: int = 2048,
    max_tokens: int | None = None,
    recall: bool = True,
    state_file: str | os.PathLike | None = None,
    source: str = "",
    progress: bool = True,
) -> nn.Module:
    """Fit a CSKV adapter in closed form: one pass over calibration data, then linear algebra per layer.

    Args:
        model: a causal language model of a supported family, on any devices; a `PeftModel` of CSKV adapters gets one
            more.
        data: calibration data as [`collect_statistics`] takes it, or statistics collected before. Some 50,000 tokens
            of the kind the model will read are plenty. Do not use the text you evaluate on.
        config: [`CSKVConfig`]; the default removes 80 %. It is copied: what is fitted is written into the model's.
        tokenizer, max_length, max_tokens, recall, source, progress: see [`collect_statistics`].
        state_file: see there; what layers are worth is saved after every layer, too, in [`probing_file`].
        adapter_name: of the new adapter, which becomes the active one. An adapter of that name is fitted again.

    Returns:
        The model with the adapter, a `PeftModel` (save it with `save_pretrained`), or `model` itself if it has
        adapters inside. ``model.peft_config[adapter_name].fit_report`` says what was kept, and [`format_report`]
        prints it.

    Raises:
        TypeError: for a `config` of another kind.
        ValueError: for an unsupported model, a rank that does not fit, empty data, NaN; before anything of the model
            is changed.
    """
    if config is not None and not isinstance(config, CSKVConfig):
        raise TypeError(f"`config` must be a `CSKVConfig`, got one of type {type(config).__name__}.")
    config = CSKVConfig() if config is None else copy.deepcopy(config)
    for name in FITTED:  # by an earlier fit
        setattr(config, name, None)
    decoder = decoder_of(model)
    refuse_tensor_parallelism(model, "`fit`")
    check_can_add(model, adapter_name)
    shape = shape_of(model)
    check_budget(config, shape)  # before any data is read
    num_groups = num_key_groups(config.key_layout, shape.num_key_value_heads)
    statistics = data
    if not isinstance(data, KVStatistics):
        statistics = collect_statistics(
            model,
            data,
            tokenizer=tokenizer,
            max_length=max_length,
            max_tokens=max_tokens,
            recall=recall,
            state_file=state_file,
            source=source,
            progress=progress,
        )
    if statistics.model_shape != vars(shape):
        raise ValueError(f"The statistics are of another model ({statistics.model_shape}); this one is {vars(shape)}.")
    if statistics is data and statistics.weights and not same_weights(statistics.weights, weight_hashes(decoder)):
        logger.warning(
            "The statistics were collected on other weights than this model's, of the same sizes. Unless that is the "
            "same model in another dtype or storage, collect them anew."
        )

    layers = attention_layers(model)
    bar = tqdm(layers, desc="Factoring", unit="layer", disable=not progress)
    bases = [layer_bases(a, statistics, i, config, num_groups) for i, a in enumerate(bar)]
    if config.allocates:
        probing = None if state_file is None else probing_file(state_file)
        made_of = {name: getattr(config, name) for name in ("init", "key_layout", "asvd_alpha", "centers")}
        made_of["statistics"] = statistics.fingerprint()
        exact = config.sinks, config.mean_window
        config.sensitivity = measure_sensitivity(model, bases, statistics.probes(), *exact, progress, probing, made_of)
    spectra = [LayerSpectra(keys.spectra(), values.spectrum, values.rounding) for keys, values in bases]
    kept = plan(config, shape, spectra)
    fitted = [(keys.cut(k.key_ranks), values.cut((k.value_rank,))) for (keys, values), k in zip(bases, kept)]

    _warn_of_unreached(layers, statistics, fitted)
    config.center = config.centers  # whatever a later version's default
    store_plan(config, kept)
    config.model_shape = vars(shape).copy()
    config.task_type = config.task_type or "CAUSAL_LM"
    config.inference_mode = True
    reports = [layer_report(a, statistics, i, config, *factors) for i, (a, factors) in enumerate(zip(layers, fitted))]
    config.fit_report = {
        "num_tokens": statistics.num_tokens,
        "recall": statistics.recall,
        "source": statistics.source,
        "layers": [asdict(r) for r in reports],
    }
    if not _has_adapter(model, adapter_name):
        model = add_adapter(model, config, adapter_name)
    _replace_config(model, adapter_name, config)
    for sidecar, attention, (keys, values) in zip(sidecars(model), attention_layers(model), fitted):
        sidecar.install(adapter_name, keys, values, *placement(attention, model))
    use_adapter(model, adapter_name)
    return give_push(model) if isinstance(model, PeftModel) else model


def probing_file(state_file: str | os.PathLike) -> Path:
    """Beside a `state_file` of statistics, where [`fit`] saves what layers are worth."""
    return Path(state_file).with_suffix(".probing.json")


def _warn_of_unreached(
    layers: list[nn.Module], statistics: KVStatistics, fitted: list[tuple[Factors, Factors]]
) -> None:
    """Of channels that the data say nothing about, but for those that the model's weights leave unused themselves."""
    found, kept = 0, 0
    for layer_idx, (attention, factors) in enumerate(zip(layers, fitted)):
        sides = statistics.key_moments(layer_idx), statistics.value_moments(layer_idx)
        unreached = [unreached_channels(f, *moments) for f, moments in zip(factors, sides)]
        if any(u.any() for u in unreached):
            weights = weight_moments(attention, statistics.input_scale.shape[1])
            found += sum(int((u & driven_channels(f, w)).sum()) for u, f, w in zip(unreached, factors, weights))
        kept += sum(map(len, unreached))
    if found:
        logger.warning(
            f"The calibration data say nothing about {found} of the {kept} channels kept: they do not reach that many "
            "directions. Use more, and more varied data, or the factors will fit noise."
        )


def _has_adapter(model: nn.Module, adapter_name: str) -> bool:
    try:
        adapter_config(model, adapter_name)
    except ValueError:
        return False
    return True


def _replace_config(model: nn.Module, adapter_name: str, config: CSKVConfig) -> None:
    config.target_modules = adapter_config(model, adapter_name).target_modules
    config.base_model_name_or_path = (
        config.base_model_name_or_path or getattr(model.config, "_name_or_path", None) or None
    )
    model.peft_config[adapter_name] = config
    for sidecar in sidecars(model):
        sidecar.configs[adapter_name] = config


def layer_bases(
    attention: nn.Module, statistics: KVStatistics, layer_idx: int, config: CSKVConfig, num_groups: int
) -> tuple[Factors, Factors]:
    """The full-rank factors of one layer's keys and values, of which a fit keeps the first channels."""
    shape = ModelShape(**statistics.model_shape)
    of_keys, of_values = statistics.key_moments(layer_idx), statistics.value_moments(layer_idx)
    by_reads = config.init == "attention" and config.sinks >= SINKS  # reads leave the sinks out
    if config.init == "random":
        keys = random_factors(shape.kv_dim, shape.kv_dim, num_groups, seed=2 * layer_idx)
        values = random_factors(shape.kv_dim, shape.kv_dim, seed=2 * layer_idx + 1)
    elif config.init in ("svd", "asvd"):
        scale = None
        if config.init == "asvd":
            scale = (statistics.input_scale[layer_idx] / statistics.num_tokens).clamp_min(1e-6) ** config.asvd_alpha
        moments = weight_moments(attention, statistics.input_scale.shape[1], scale)
        keys = optimal_factors(moments[0], shape.kv_dim, num_groups)
        values = optimal_factors(moments[1], shape.kv_dim)
    else:
        key_M = value_M = None
        minimised = of_keys, of_values
        if config.init == "attention":
            key_M, value_M = error_weights(attention, statistics, layer_idx)
        if by_reads:
            keys_read = statistics.read_key_moments(layer_idx, by_head=num_groups == shape.num_key_value_heads)
            minimised = keys_read, statistics.read_value_moments(layer_idx)
        (key_moment, key_mean), (value_moment, value_mean) = minimised
        if not config.centers:
            key_mean = value_mean = None
        keys = optimal_factors(key_moment, shape.kv_dim, num_groups, key_M, key_mean)
        values = optimal_factors(value_moment, shape.kv_dim, 1, value_M, value_mean)
    keys, values = normalized(keys, *of_keys), normalized(values, *of_values)
    if by_reads:
        noise = noise_energy(values, value_M) * latent_energy(values, *of_values)  # as large as the channel: 1, or 0
        values = dataclasses.replace(values, rounding=falling(statistics.read_concentration(layer_idx) * noise))
    return keys, values


def weight_moments(
    attention: nn.Module, hidden_size: int, input_scale: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """[`weight_moment`] of a layer's keys and values; the gain of a norm of keys is a part of their weight."""
    place = _probing_place(attention)
    keys, values = (dense_weight(linear, hidden_size, *place) for linear in (attention.k_proj, attention.v_proj))
    if hasattr(attention, "k_norm"):
        with torch.no_grad():  # asked for: an offloaded one has no weight to read
            width = attention.k_norm.weight.shape[-1]  # of a head (Qwen3, Gemma 3), or of all (OLMo 2)
            gain = attention.k_norm(torch.ones(width, device=place[0], dtype=place[1])).double().cpu()
        keys = keys * gain.repeat(len(keys) // len(gain))[:, None]
    return [weight_moment(weight, input_scale) for weight in (keys, values)]


def error_weights(attention: nn.Module, statistics: KVStatistics, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
    """M of a layer's keys and values for the ``attention`` objective, (kv_dim, kv_dim) each."""
    shape = ModelShape(**statistics.model_shape)
    num_heads = attention.num_key_value_groups * shape.num_key_value_heads
    output_weight = dense_weight(attention.o_proj, num_heads * shape.head_dim, *_probing_place(attention))
    of_keys = key_weight(statistics.query_moment[layer_idx] / statistics.num_tokens)
    mass = float(statistics.read_key_moment[layer_idx, -1, -1]) / num_heads
    if mass > 0:
        read = torch.block_diag(*statistics.read_query_moment[layer_idx] / mass)
        of_keys = (1 - UNREAD_SHARE) * read + UNREAD_SHARE * of_keys
    return of_keys, value_weight(output_weight, shape.num_key_value_heads, shape.head_dim)


def _probing_place(attention: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of inputs that the projections of a layer accept."""
    return placement(attention, attention)[0], input_dtype(attention.q_proj)


def layer_report(
    attention: nn.Module,
    statistics: KVStatistics,
    layer_idx: int,
    config: CSKVConfig,
    keys: Factors,
    values: Factors,
) -> LayerReport:
    """How well the factors of one layer do on the calibration data, before any quantisation."""
    of_keys, of_values = statistics.key_moments(layer_idx), statistics.value_moments(layer_idx)
    per_head = len(keys.ranks) == statistics.model_shape["num_key_value_heads"]
    read_keys = statistics.read_key_moments(layer_idx, by_head=per_head)
    read_values = statistics.read_value_moments(layer_idx)
    key_M, value_M = error_weights(attention, statistics, layer_idx)
    key_format, value_format = config.formats(layer_idx)
    key_shares, value_shares = statistics.mean_shares()
    return LayerReport(
        layer_idx=layer_idx,
        key_ranks=keys.ranks,
        value_rank=values.ranks[0],
        key_bits=mean_bits(key_format),
        value_bits=mean_bits(value_format),
        key_error=relative_error(keys, of_keys.second, mean=of_keys.first),
        value_error=relative_error(values, of_values.second, mean=of_values.first),
        key_attention_error=relative_error(keys, read_keys.second, key_M, read_keys.first),
        value_attention_error=relative_error(values, read_values.second, value_M, read_values.first),
        key_mean_share=float(key_shares[layer_idx]),
        value_mean_share=float(value_shares[layer_idx]),
        bytes_per_token=sum(f.bytes_per_token(torch.bfloat16) for f in (key_format, value_format)),
    )

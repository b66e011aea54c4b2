"""Ways of holding a KV cache that are measured side by side: the full one, this project's, the paper's recipe, a
window alone, and transformers' own quantised cache."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, QuantizedCache
from transformers.cache_utils import Cache
from transformers.trainer_callback import PrinterCallback

from ..cache import CSKVCache
from ..calibration import collect_statistics
from ..config import POSITION_BYTES, CSKVConfig
from ..families import modes_kept
from ..fitting import fit
from ..model_shape import ModelShape
from ..statistics import KVStatistics
from ..train import CSKVTrainer, training_arguments
from ..tuner import sidecars
from .baselines import WindowOnlyCache, clamp_formats

PAPER_INITS = ("asvd", "svd", "random", "mse")  # what the paper proposes or compares with
KINDS = ("cskv", "full", "window", "quantized")


@dataclass(frozen=True)
class Method:
    """One way of holding a cache.

    Attributes:
        name: as tables call it, unique within one.
        recipe: what it is, whatever the ratio: "ours", "asvd + training".
        removed: the ratio that a table puts it under; `compression` unless it is the paper's nominal one.
        kind: ``"cskv"`` (an adapter), ``"full"`` (DynamicCache), ``"window"`` (sinks and as many recent tokens as
            the bytes of an adapter allow, StreamingLLM-style), ``"quantized"`` (transformers' QuantizedCache, quanto).
        compression: of the bytes of an old token that is asked for; None where the kind has none.
        settings: of [`CSKVConfig`], for an adapter to be fitted; None for the adapter that the model has.
        train: whether the factors are fine-tuned after the fit, quantisation-aware where they are packed.
        clamped: whether latents are stored with the quantiser of the paper's published code.
        cache: further arguments of the cache: ``window`` of a CSKVCache, ``nbits`` of a QuantizedCache, and of
            [`equal_bytes_window`].
        key_share: of the channels kept, those of keys; where a table is about that.
    """

    name: str
    recipe: str = ""
    removed: float | None = None
    kind: str = "cskv"
    compression: float | None = None
    settings: dict[str, Any] | None = None
    train: bool = False
    clamped: bool = False
    cache: dict[str, Any] = field(default_factory=dict)
    key_share: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got '{self.kind}'.")

    @property
    def factors(self) -> dict[str, Any]:
        """What the adapter depends on: methods alike in it share one fit and one training."""
        return {"settings": self.settings, "train": self.train, "clamped": self.clamped}

    @property
    def identity(self) -> dict[str, Any]:
        """What its measurements depend on, as JSON values; not what it is called."""
        names = ("name", "recipe", "removed", "key_share")
        return {key: value for key, value in asdict(self).items() if key not in names}

    @property
    def labels(self) -> dict[str, Any]:
        """What a row of results says about it."""
        settings = self.settings or {}
        window = self.cache.get("window", settings.get("window", 32)) if settings else None
        return {
            "method": self.recipe or self.name, "label": self.name, "window": window, "key_share": self.key_share,
            "compression": self.compression if self.removed is None else self.removed,
        }  # fmt: skip


@dataclass
class Calibration:
    """What adapters are fitted and trained with.

    Attributes:
        statistics: of the model, over `rows`.
        rows: token ids, one tensor a row; not of the text that is evaluated.
        epochs, learning_rate: of the training, over `rows`.
    """

    statistics: KVStatistics
    rows: Sequence[torch.Tensor]
    epochs: float = 1.0
    learning_rate: float = 1e-3
    _as_written: KVStatistics | None = field(default=None, init=False, repr=False)

    def for_init(self, init: str, model: nn.Module) -> KVStatistics:
        """The statistics to fit by; those of the paper's ways to start are of the rows as they are, without recall.

        Args:
            model: the rows'.
        """
        if init not in PAPER_INITS:
            return self.statistics
        if self._as_written is None:
            self._as_written = collect_statistics(model, self.rows, recall=False)
        return self._as_written


def prepare(model: nn.Module, method: Method, calibration: Calibration | None) -> nn.Module:
    """The model with the method's adapter fitted (and trained), as the only one; unload it afterwards.

    Raises:
        ValueError: without calibration, or if the settings are not possible on this model.
    """
    if calibration is None:
        raise ValueError(f"'{method.name}' is fitted first, which needs calibration data; give it with `--data`.")
    config = CSKVConfig(**method.settings)
    fitted = fit(model, calibration.for_init(config.init, model), config, progress=False)
    try:
        if method.clamped:
            clamp_formats(fitted)
        if method.train:
            objective = "mse" if method.settings.get("init") in ("asvd", "svd", "random") else "attention"
            train_in_place(fitted, calibration, objective)
    except BaseException:
        fitted.unload()
        raise
    return fitted


def train_in_place(model: nn.Module, calibration: Calibration, objective: str) -> None:
    """A short training on the calibration rows, quantisation-aware for packed latents; leaves no files, and every
    module in the mode and on the device it was in."""
    device = model.device
    with modes_kept(model), tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            folder, num_train_epochs=calibration.epochs, learning_rate=calibration.learning_rate,
            lr_scheduler_type="linear", disable_tqdm=True, save_strategy="no", logging_strategy="no",
            use_cpu=device.type == "cpu",
        )  # fmt: skip
        rows = [{"input_ids": row} for row in calibration.rows]
        trainer = CSKVTrainer(model, arguments, rows, objective=objective)
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        finally:
            if model.device != device:  # the Trainer trains on the first GPU
                model.to(device)


def cache_maker(method: Method, model: nn.Module, length: int | None) -> Callable[[], Cache]:
    """A function that makes the method's cache for the prepared model.

    Args:
        length: tokens of the context that is measured: a window alone gets the bytes that an adapter of the same
            `compression` needs for that many. None: those of the prompt, whatever its length.
    """
    if method.kind == "full":
        return lambda: DynamicCache(config=model.config)  # which knows of sliding windows
    if method.kind == "quantized":
        return lambda: QuantizedCache("quanto", model.config, **method.cache)
    if method.kind == "window":
        window, sinks = functools.partial(equal_bytes_window, **method.cache), method.cache.get("sinks", 4)
        return lambda: WindowOnlyCache(window if length is None else window(length), sinks, block_size=1)
    return lambda: CSKVCache(**method.cache)


def equal_bytes_window(length: int, share: float, window: int = 32, sinks: int = 4, block_size: int = 32) -> int:
    """Recent tokens that a window with sinks may keep, at the bytes that CSKV holds after `length` tokens.

    Args:
        share: of an old token's bytes that CSKV keeps.
        window, sinks, block_size: of CSKV, whose exact tokens are as many exact tokens here.
    """
    old = max(0, (length - sinks - window) // block_size) * block_size
    return max(1, length - sinks - old + int(share * old))


def bytes_of_old_token(model: nn.Module, method: Method) -> float | None:
    """Bytes of one more old token in a 16-bit model, all layers; None where a cache has no such number."""
    shape = ModelShape.from_model_config(model.config)
    full = shape.full_bytes_per_token
    if method.kind == "full":
        return full
    if method.kind == "window":
        return 0.0
    if method.kind != "cskv":
        return None
    held = [sidecar.formats[sidecar.adapter_in_use] for sidecar in sidecars(model)]
    return sum(f.bytes_per_token(torch.bfloat16) for formats in held for f in formats) + POSITION_BYTES

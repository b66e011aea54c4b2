"""`generate` for one model instance: understands ``cache=`` and defaults to a CSKVCache while a CSKV adapter is
active.

The instance gets a subclass of its own class, under the same name, so that isinstance checks, pipelines and saved
configs see no difference, and copying and pickling keep working.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache

from .cache import CSKVCache
from .config import CSKVConfig
from .sidecar import CSKVFactors
from .static_cache import CSKVStaticCache

# what transformers calls the cache of a forward: "cache" from 5.24 on, where the old name is still understood
CACHE_ARGUMENT = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)


def cache_given(kwargs: dict[str, Any]) -> Any:
    """The cache among the arguments of a forward, under either name."""
    given = kwargs.get("cache")
    return kwargs.get("past_key_values") if given is None else given


class CSKVGenerationMixin:
    """Put in front of a model's own class by [`give_generate`]."""

    def generate(self, *args: Any, cache: Any = None, **kwargs: Any) -> Any:
        """`GenerationMixin.generate`, with one more argument.

        Args:
            cache: A cache class (a fresh one is made for this call), a cache instance, or a function without
                arguments that returns one; another way to pass `past_key_values`. Without either, a model with an
                active CSKV adapter uses a new [`CSKVCache`].

        Raises:
            ValueError: if both `cache` and `past_key_values` are given.
            TypeError: if `cache` is none of the above.
        """
        if cache is not None and kwargs.get("past_key_values") is not None:
            raise ValueError("`cache` and `past_key_values` mean the same; give one of them.")
        _refuse_prefix_tuning(self)
        chosen = cache if cache is not None else kwargs.pop("past_key_values", None)
        if chosen is not None:
            kwargs[CACHE_ARGUMENT] = _as_cache(chosen)
        return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict,
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if (
            model_kwargs.get(CACHE_ARGUMENT) is None
            and generation_config.use_cache is not False
            and generation_config.cache_implementation is None
            and has_active_adapter(self)
        ):
            model_kwargs[CACHE_ARGUMENT] = CSKVCache()
            if getattr(generation_config, "is_assistant", False):
                model_kwargs[CACHE_ARGUMENT].activate_past_recording()
        if isinstance(model_kwargs.get(CACHE_ARGUMENT), CSKVCache) and not getattr(
            generation_config, "is_assistant", False
        ):
            model_kwargs[CACHE_ARGUMENT].stop_past_recording()  # of an earlier call; an assisted one starts it anew
        if isinstance(model_kwargs.get(CACHE_ARGUMENT), CSKVStaticCache):
            _check_space(model_kwargs[CACHE_ARGUMENT], max_cache_length)
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args, **kwargs
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused while a CSKV adapter is active: paged caches hold full keys and values of their own.

        Raises:
            ValueError: as described.
        """
        if has_active_adapter(self):
            raise ValueError(
                "Continuous batching keeps full keys and values in a paged cache of its own, which CSKV cannot "
                "compress. Use `generate()` on a padded batch, or take the adapter off (`disable_adapters()`, "
                "`cskv_hf.detach(model)`) for a full paged cache."
            )
        return super().init_continuous_batching(*args, **kwargs)

    def active_adapters(self) -> list[str]:
        """As transformers', which asks the first layer of an adapter that it meets: one of CSKV says of its own alone,
        so that others are asked first."""
        first = super().active_adapters()
        others = (m for m in self.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, CSKVFactors))
        other = next(others, None)
        return first if other is None else list(other.active_adapters)

    @functools.cached_property
    def peft_config(self) -> dict[str, CSKVConfig]:
        """Of the adapters inside. PEFT sets this attribute, and deletes it when it has merged a LoRA into a model that
        keeps its CSKV adapters; then it is made anew."""
        configs = next((module.configs for module in self.modules() if isinstance(module, CSKVFactors)), {})
        if not configs:
            raise AttributeError(f"'{type(self).__name__}' object has no attribute 'peft_config'")
        return dict(configs)

    def __reduce_ex__(self, protocol: int) -> tuple:
        reduced = object.__reduce_ex__(self, protocol)
        return (_new_with_generate, (original_class(type(self)),), *reduced[2:])


def _refuse_prefix_tuning(model: nn.Module) -> None:
    """PEFT's prefix tuning, wrapped around the model, makes a full cache of its prefix and hands it over."""
    owner = getattr(model.prepare_inputs_for_generation, "__self__", None)
    config = getattr(owner, "active_peft_config", None)
    if getattr(config, "peft_type", None) == PeftType.PREFIX_TUNING and has_active_adapter(model):
        raise ValueError(
            "Prefix tuning hands generate() a full cache with its prefix in it, which CSKV cannot take over. Take one "
            "of them off (`unload()` for CSKV), or use prompt tuning or a LoRA instead."
        )


def _check_space(cache: CSKVStaticCache, needed: int) -> None:
    """`needed`: tokens of the longest text, without its last, which is never put into a cache."""
    if needed > cache.max_cache_len:
        raise ValueError(
            f"This call may need room for {needed} tokens, the prompt included, and the CSKVStaticCache has "
            f"`max_cache_len`={cache.max_cache_len}. Make it larger, or lower `max_new_tokens` or `max_length`."
        )


def _as_cache(cache: Any) -> Cache:
    if inspect.isclass(cache) or (callable(cache) and not isinstance(cache, Cache)):
        cache = cache()
    if not isinstance(cache, Cache):
        raise TypeError(
            f"`cache` must be a cache class such as `CSKVCache`, an instance of one, or a function that makes one; "
            f"got {'one of type ' + type(cache).__name__ if not isinstance(cache, str) else repr(cache)}."
        )
    return cache


def has_active_adapter(model: nn.Module) -> bool:
    """Whether a fitted CSKV adapter is active and enabled on the model."""
    for module in model.modules():
        if isinstance(module, CSKVFactors):
            name = module.adapter_in_use
            return name is not None and module.configs[name].is_fitted
    return False


def original_class(cls: type) -> type:
    """The class of a model before [`give_generate`]."""
    return cls.__bases__[1] if CSKVGenerationMixin in cls.__bases__ else cls


def with_generate(cls: type) -> type:
    return type(
        cls.__name__, (CSKVGenerationMixin, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    )


def _new_with_generate(cls: type) -> nn.Module:
    derived = with_generate(cls)
    return derived.__new__(derived)


def give_generate(model: nn.Module) -> None:
    """Let the instance's `generate` know caches of ours."""
    if not isinstance(model, CSKVGenerationMixin) and hasattr(model, "generate"):
        model.__class__ = with_generate(type(model))


def take_generate(model: nn.Module) -> None:
    """Undo [`give_generate`]."""
    if isinstance(model, CSKVGenerationMixin):
        model.__class__ = original_class(type(model))

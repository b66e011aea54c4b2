"""The sizes of a model, read off its config: numbers that a cache depends on, and nothing of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SLIDING_BY_TYPE = ("gemma3_text", "ministral", "olmo3", "qwen2", "qwen2_moe", "qwen3", "smollm3")  # `layer_types`
SLIDING_EVERYWHERE = ("mistral", "mixtral", "qwen3_moe", "starcoder2")  # if the config has a `sliding_window`
PLAIN_BITS, PLAIN_BYTES = 16, 2  # of an uncompressed value
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
CHANGING_ROPE_TYPES = ("dynamic", "longrope")  # other frequencies beyond a length


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that a CSKV adapter depends on."""

    model_type: str
    num_hidden_layers: int
    num_key_value_heads: int
    head_dim: int

    @classmethod
    def from_model_config(cls, model_config: Any) -> ModelShape:
        """Read the sizes off a transformers config (or the config of a model's text part)."""
        config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.model_type, config.num_hidden_layers, config.num_key_value_heads, head_dim)

    @property
    def kv_dim(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def full_bytes_per_token(self) -> int:
        """Of keys and values of all layers in 16 bits, of which budgets are shares."""
        return self.num_hidden_layers * 2 * self.kv_dim * PLAIN_BYTES


def tokens_in_full_cache(num_tokens: int, sliding_window: int | None) -> int:
    """How many of so many tokens a layer of a `DynamicCache` holds."""
    return num_tokens if sliding_window is None else min(num_tokens, sliding_window - 1)


def sliding_window(model_config: Any, layer_idx: int) -> int | None:
    """The sliding window of a layer of a model, in tokens, the query's own included; None if it attends to all, or for
    a [`ModelShape`], which does not say."""
    if isinstance(model_config, ModelShape):
        return None
    config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    by_type = config.model_type in SLIDING_BY_TYPE and config.layer_types[layer_idx] == "sliding_attention"
    return config.sliding_window if by_type or config.model_type in SLIDING_EVERYWHERE else None

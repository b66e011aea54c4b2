"""cskv-hf: shrink the KV cache of Hugging Face language models (CSKV, arXiv 2409.10593).

Importing this package registers the PEFT method "CSKV" and the attention functions "cskv_*"; it changes no model.
"""

from . import _versions  # noqa: F401  (first: refuses versions that lack what the rest imports)
from .cache import CSKVCache
from .calibration import collect_statistics
from .config import CSKVConfig
from .cutting import shrink
from .fitting import fit
from .loading import load
from .model_shape import ModelShape
from .patch import attach, detach
from .pushing import push_to_hub
from .static_cache import CSKVStaticCache
from .statistics import KVStatistics
from .tuner import CSKVModel, register

__version__ = "0.1.0"

__all__ = [
    "CSKVCache",
    "CSKVConfig",
    "CSKVModel",
    "CSKVStaticCache",
    "KVStatistics",
    "ModelShape",
    "attach",
    "collect_statistics",
    "detach",
    "fit",
    "load",
    "push_to_hub",
    "shrink",
]

register()

"""Tiny models of every supported family, float64, and adapters fitted to them; a Hub on localhost, which everything
that would go to the real one goes to."""

import atexit
import os
import shutil
import tempfile

from local_hub import LocalHub

OWNER, STRANGER = "hf_owner", "hf_stranger"  # tokens
HUB = LocalHub({OWNER: "ada", STRANGER: "eve"}).start()
HF_HOME = tempfile.mkdtemp(prefix="cskv-hf-home-")
EXTENSIONS = tempfile.mkdtemp(prefix="cskv-hf-extensions-")  # without whatever kernels the user has compiled
for folder in (HF_HOME, EXTENSIONS):
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_"))]:
    del os.environ[name]
os.environ |= {
    "HF_ENDPOINT": HUB.url,
    "HF_TOKEN": OWNER,
    "HF_HOME": HF_HOME,
    "TORCH_EXTENSIONS_DIR": EXTENSIONS,
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "no_proxy": "127.0.0.1",
}

PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))  # of pytest -n
THREADS = max(1, min(2, len(os.sched_getaffinity(0)) // PROCESSES))
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # of processes that tests start, too

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; read when triton is imported

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import cskv_hf
from cskv_hf import CSKVConfig

pytest_plugins = ["doc_tables", "report_pages"]

torch.set_num_threads(THREADS)

SIZES = dict(
    vocab_size=89,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    max_position_embeddings=1024,
    initializer_range=0.3,  # sharp attention, so that a wrong key shows
    pad_token_id=0,
    eos_token_id=None,
    bos_token_id=1,
)
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama-mha": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 8}),
    "llama-yarn": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
            }
        },
    ),
    "llama-dynamic": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
            "max_position_embeddings": 36,  # crossed by every test, step after step
        },
    ),
    "llama-longrope": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 36,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.0, 2.0, 3.0, 4.0],
            },
        },
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "mistral-sliding": (MistralForCausalLM, MistralConfig, {"sliding_window": 40}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2-mixed": (  # the second layer slides
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
}


ONE_SLIDES = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 40}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
EXPERTS = dict(num_experts_per_tok=2, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32)
OTHERS = {  # by what transformers calls them; their layers are not the oracle's, their attention is Llama's
    "gemma": {},
    "gemma3_text": {  # layers differ in their RoPE; 1 KV head, as in the smallest
        **ONE_SLIDES,
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": {**ROPE, "rope_theta": 1e6}},
        "query_pre_attn_scalar": 8,
        "num_key_value_heads": 1,
    },
    "granite": {"attention_multiplier": 0.5, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "ministral": ONE_SLIDES,
    "mixtral": {"sliding_window": 40, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {},
    "olmo3": {
        **ONE_SLIDES,
        "rope_parameters": {
            "sliding_attention": ROPE,
            "full_attention": {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        },
    },
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0]},  # the second layer turns nothing
    "starcoder2": {"sliding_window": 40},
}


def make_model(family="llama", dtype=torch.float64, seed=0, attn_implementation=None, **overrides):
    torch.manual_seed(seed)
    if family in OTHERS:
        config = AutoConfig.for_model(family, **{**SIZES, **OTHERS[family], **overrides})
        config._experts_implementation, model_class = "eager", AutoModelForCausalLM.from_config  # which take float64
    else:
        model_class, config_class, settings = FAMILIES[family]
        config = config_class(**{**SIZES, **settings, **overrides})
    if attn_implementation:
        config._attn_implementation = attn_implementation
    model = model_class(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # as a trained model's: not all zero, not all one
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.generation_config.pad_token_id = 0
    return model


def calibration_data(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, SIZES["vocab_size"], (4, 100), generator=generator) for _ in range(3)]


def prompt(batch, length, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, SIZES["vocab_size"], (batch, length), generator=generator)


def lossless(model):
    """Full-rank factors, with a small window so that compression really happens."""
    kv_dim = model.config.num_key_value_heads * model.config.head_dim
    config = CSKVConfig(key_rank=kv_dim, value_rank=kv_dim, window=8, sinks=3, block_size=4)
    return cskv_hf.fit(model, calibration_data(model), config, progress=False)


def lossy(model, compression=0.6, **settings):
    """Factors that lose something, plain and of the same rank everywhere unless `settings` say otherwise."""
    plain = dict(compression=compression, window=8, sinks=3, block_size=4, bits=16, allocation="uniform")
    config = CSKVConfig(**{**plain, **settings})
    return cskv_hf.fit(model, calibration_data(model), config, progress=False)


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return request.param


@pytest.fixture
def uninitialised_is_nan():
    """So that nothing can be read that was not written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)

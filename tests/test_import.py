"""Importing the package is light and changes nothing of others."""

import subprocess
import sys

CODE = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.utils import GenerationMixin
import peft  # which imports bitsandbytes where it is installed, and that Triton
loaded = set(sys.modules)
before = (GenerationMixin.generate, LlamaForCausalLM.__mro__, LlamaForCausalLM.forward)
import cskv_hf
assert before == (GenerationMixin.generate, LlamaForCausalLM.__mro__, LlamaForCausalLM.forward)
heavy = {"datasets", "matplotlib", "triton", "lm_eval", "pandas"} & (set(sys.modules) - loaded)
assert not heavy, heavy
config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
model = LlamaForCausalLM(config)
assert type(model) is LlamaForCausalLM and model.config._attn_implementation == "sdpa"
assert not any(m._forward_pre_hooks for m in model.modules())
import importlib
importlib.reload(cskv_hf)
print("fine")
"""


def test_import():
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert result.stdout.strip() == "fine", result.stderr

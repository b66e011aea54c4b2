"""What every example needs: a model from the command line (by default the bundled one), and a fitted adapter."""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

import cskv_hf
from cskv_hf.demo import MODEL_PATH
from cskv_hf.demo.corpus import reference_topics


def arguments(description: str) -> argparse.ArgumentParser:
    logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", nargs="?", default=str(MODEL_PATH), help="model id or directory; the bundled Llama")
    parser.add_argument("--compression", type=float, default=0.8, help="fraction of the KV bytes removed")
    return parser


def load_model(model: str):
    """The model, on the GPU if there is one, and its tokenizer."""
    dtype = "auto" if torch.cuda.is_available() else torch.float32
    device_map = "auto" if torch.cuda.is_available() else "cpu"
    return (
        AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map=device_map).eval(),
        AutoTokenizer.from_pretrained(model),
    )


def calibration_texts() -> list[str]:
    """Text to calibrate on: pages of Python's language reference. Use text like what your model will read."""
    return list(reference_topics(held_out=False))


def passage(characters: int = 2000) -> str:
    """The beginning of a long page, for a model to go on with."""
    return next(text for text in calibration_texts() if len(text) > 3 * characters)[:characters]


def fit(model, tokenizer, compression: float, **kwargs):
    """The model with an adapter fitted to it, some seconds for the bundled one."""
    return cskv_hf.fit(
        model, calibration_texts(), cskv_hf.CSKVConfig(compression=compression), tokenizer=tokenizer,
        max_length=512, max_tokens=32768, **kwargs,
    )  # fmt: skip

"""An adapter's model card: how to use it, what it keeps, what was measured. Nothing that was not. Pure functions of a
config."""

from __future__ import annotations

import re
from collections.abc import Sequence

from huggingface_hub import ModelCard, ModelCardData

from .config import CSKVConfig
from .fit_report import layer_errors, ratio_text
from .latents import PlainFormat
from .model_shape import ModelShape

REPO_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
USE = """```python
import cskv_hf  # registers the adapter type; without it PEFT does not know "CSKV"
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{base_model}")
model = AutoModelForCausalLM.from_pretrained("{repo_id}", device_map="auto")
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```"""

CITATION = """```bibtex
@article{wang2024cskv,
  title={{CSKV}: Training-Efficient Channel Shrinking for {KV} Cache in Long-Context Scenarios},
  author={Wang, Luning and Li, Shiyao and Ning, Xuefei and Yuan, Zhihang and Yan, Shengen and Dai, Guohao and
    Wang, Yu},
  journal={arXiv preprint arXiv:2409.10593},
  year={2024}
}
```"""


def model_card(
    config: CSKVConfig,
    base_model: str,
    name: str,
    license: str | None = None,
    tags: Sequence[str] = (),
    base_on_hub: bool = True,
) -> ModelCard:
    """The card of a fitted adapter.

    Args:
        base_model: Hub id, or a directory.
        name: Hub id or directory of the adapter, to load it by.
        license, tags: of the metadata.
        base_on_hub: whether `base_model` is an id; the metadata leave a directory out.
    """
    tags = ["cskv", "kv-cache-compression", *tags]
    known = {}
    if base_on_hub:
        tags.append(f"base_model:adapter:{base_model}")
        known = {"base_model": base_model, "base_model_relation": "adapter"}
    data = ModelCardData(
        library_name="peft", pipeline_tag="text-generation", license=license, tags=sorted(set(tags)), **known
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{card_text(config, base_model, name, base_on_hub)}")


def card_text(config: CSKVConfig, base_model: str, repo_id: str, base_on_hub: bool = True) -> str:
    """The card below its metadata."""
    shape = ModelShape(**config.model_shape)
    kept = config.bytes_per_token(shape)
    full = shape.full_bytes_per_token
    name = repo_id.rpartition("/")[2]
    base = f"[{base_model}](https://huggingface.co/{base_model})" if base_on_hub else f"`{base_model}`"
    sections = [
        f"# {name}",
        f"A [CSKV](https://arxiv.org/abs/2409.10593) adapter for {base}: "
        f"`generate()` keeps **{100 * kept / full:.1f} %** of the KV cache bytes of every token outside the last "
        f"{config.window} and the first {config.sinks}.",
        "## Use",
        "```bash\npip install cskv-hf\n```",
        USE.format(base_model=base_model, repo_id=repo_id),
        "## What it keeps",
        _settings(config, shape, kept, full),
        "## Measured",
        _measured(config),
        "## Citation",
        CITATION,
    ]
    return "\n\n".join(sections) + "\n"


def _settings(config: CSKVConfig, shape: ModelShape, kept: float, full: int) -> str:
    key_ranks = [sum(ranks) for ranks in config.key_ranks]
    rows = [
        ("bytes of an old token", f"{kept:,.1f} of {full:,} (16-bit cache, position and ranges counted)"),
        ("channels kept, keys", _spread(key_ranks, shape.kv_dim)),
        ("channels kept, values", _spread(config.value_ranks, shape.kv_dim)),
        ("bits of a channel", _bits(config, shape)),
        ("window, sinks", f"{config.window} and {config.sinks} tokens, exact"),
        ("key layout", config.key_layout),
        ("initialisation", config.init + (", about the mean" if config.centers else "")),
    ]
    return _table(rows)


def _spread(ranks: list[int], kv_dim: int) -> str:
    return f"{min(ranks)} to {max(ranks)} of {kv_dim} per layer, {sum(ranks) / len(ranks):.1f} on average"


def _bits(config: CSKVConfig, shape: ModelShape) -> str:
    codes: list[int] = []
    for layer_idx in range(shape.num_hidden_layers):
        for format in config.formats(layer_idx):
            if isinstance(format, PlainFormat):
                return "16, unpacked"
            codes += format.layout.bits
    return f"{sum(codes) / len(codes):.2f} on average ({min(codes)} to {max(codes)}), packed"


def _measured(config: CSKVConfig) -> str:
    report = config.fit_report or {}
    lines = []
    if "num_tokens" in report:
        source = f" ({report['source']})" if report.get("source") else ""
        again = ", an eighth of which are second readings" if report.get("recall") else ""
        lines.append(f"Fitted on {report['num_tokens']:,} tokens{source}{again}.")
    if "trained" in report:
        lines.append(f"Fine-tuned after the fit, objective '{report['trained']}'.")
    layers = [layer_errors(config, i) for i in range(len(config.key_ranks))]
    if all(layers):
        worst = [max(layer[name] for layer in layers) for name in ("key_attention_error", "value_attention_error")]
        lines.append(
            f"Energy lost to the ranks, of what attention reads in the calibration data, in the worst layer: "
            f"{100 * worst[0]:.2f} % of the keys, {100 * worst[1]:.2f} % of the values."
        )
    elif report.get("layers"):
        lines.append("What its ranks lose was not measured after it was cut or trained.")
    evaluation = report.get("evaluation")
    if evaluation is None:
        lines.append("No evaluation was recorded.")
        return " ".join(lines)
    rows = [
        ("perplexity, full cache", f"{evaluation['perplexity_full']:.4f}"),
        ("perplexity, this adapter", f"{evaluation['perplexity']:.4f}"),
        ("ratio", ratio_text(evaluation)),
        ("KL divergence, nats per token", f"{evaluation['kl']:.5f}"),
        ("same next token", f"{100 * evaluation['agreement']:.2f} %"),
    ]
    lines.append(f"Evaluated with a compressed past on {evaluation['tokens']:,} tokens ({evaluation['source']}):")
    return " ".join(lines) + "\n\n" + _table(rows)


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["|  |  |", "|---|---|"] + [f"| {name} | {value} |" for name, value in rows])

"""What `cskv demo` does: fit the bundled model, generate with full and compressed cache, and measure every
initialisation."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import Cache

from ..cache import CSKVCache
from ..calibration import collect_statistics
from ..config import CSKVConfig
from ..evaluate.baselines import WindowOnlyCache
from ..evaluate.lines import LineRecord, line_record, line_retrieval
from ..evaluate.memory import cache_nbytes
from ..evaluate.methods import Calibration, train_in_place
from ..evaluate.perplexity import Perplexity, compressed_perplexity
from ..fitting import fit
from . import MODEL_PATH
from .corpus import reference_topics
from .present import NUM_LINES, Row, check_plots, format_table, save_results

TEXT_LENGTH = 1024
COMPRESSIONS = (0.5, 0.8)
INITS = ("random", "svd", "asvd", "mse", "attention")
TRAIN_EPOCHS, TRAIN_LR = 1, 1e-4


def load_bundled() -> tuple[nn.Module, Any]:
    """The bundled model (float32) and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(MODEL_PATH)


def evaluation_text(tokenizer: Any, length: int = TEXT_LENGTH) -> torch.Tensor:
    """(rows, length) of Python's language reference that the model was neither trained nor calibrated on."""
    ids = [
        i
        for topic in reference_topics(held_out=True)
        for i in [*tokenizer(topic)["input_ids"], tokenizer.eos_token_id]
    ]
    rows = len(ids) // length
    return torch.tensor(ids[: rows * length]).view(rows, length)


def evaluation_records(count: int, questions: int = 8, num_lines: int = NUM_LINES) -> list[LineRecord]:
    rng = random.Random(10_000)
    return [line_record(num_lines, questions, rng) for _ in range(count)]


def calibration_data(
    tokenizer: Any, tokens: int = 65536, length: int = 1024, num_lines: int = NUM_LINES
) -> list[torch.Tensor]:
    """Half training text, half line records with answers, drawn from other seeds than the evaluation's."""
    text = [i for topic in reference_topics(held_out=False) for i in tokenizer(topic)["input_ids"]]
    rng, rows = random.Random(20_000), []
    for _ in range(0, tokens // 2, length):
        offset = rng.randrange(len(text) - length)
        rows.append(torch.tensor(text[offset : offset + length]))
        record = line_record(num_lines, 8, rng)
        answers = "".join(record.question(i) + record.answer(i) for i in range(8))
        rows.append(torch.tensor(tokenizer(record.text + answers)["input_ids"][-length:]))
    return rows


def measure(
    name: str,
    compression: float,
    model: nn.Module,
    tokenizer: Any,
    make_cache: Callable[[], Cache],
    text: torch.Tensor,
    records: list[LineRecord],
    full: Perplexity | None,
) -> tuple[Row, Perplexity]:
    """One row of the table; `full` is the perplexity to compare with (None for the full cache itself)."""
    perplexity = compressed_perplexity(model, text, make_cache)
    accuracy = line_retrieval(model, tokenizer, records, make_cache)
    low, high = perplexity.ratio_interval(full or perplexity)
    short, long = (cache_nbytes(model, make_cache, text[:1, :length], torch.bfloat16) for length in (512, 1024))
    row = Row(
        name=name,
        compression=compression,
        bytes_per_token=(long - short) / 512,
        cache_bytes=long,
        perplexity=perplexity.value,
        ratio=perplexity.value / (full or perplexity).value,
        ratio_low=low,
        ratio_high=high,
        accuracy=accuracy.value,
        margin=accuracy.margin,
    )
    return row, perplexity


@torch.no_grad()
def side_by_side(model: nn.Module, tokenizer: Any, record: LineRecord, caches: dict[str, Callable[[], Cache]]) -> str:
    """The same prompt answered with each cache."""
    prompt = tokenizer(record.text + record.question(0), return_tensors="pt")
    lines = [
        f"> {NUM_LINES} lines, then: {record.question(0).strip()}",
        f"  expected         {record.answer(0).strip()}",
    ]
    for name, make_cache in caches.items():
        output = model.generate(
            **prompt, cache=make_cache(), max_new_tokens=24, do_sample=False, stop_strings="\n", tokenizer=tokenizer
        )
        lines.append(f"  {name:<16} {tokenizer.decode(output[0, prompt['input_ids'].shape[1] :]).strip()}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Way:
    """One way of compressing that the demo measures.

    Attributes:
        name: in the table.
        config: of the fit.
        train: whether the factors are fine-tuned afterwards.
    """

    name: str
    config: CSKVConfig
    train: bool = False


def ways() -> list[Way]:
    """The initialisations at equal ranks and 16 bits; ranks by one budget; ranks and bits by one budget, packed."""
    plain = [
        Way(init, CSKVConfig(compression=compression, init=init, bits=16, allocation="uniform"))
        for compression in COMPRESSIONS
        for init in INITS
    ]
    ours = [
        Way("allocated", CSKVConfig(compression=0.8, bits=16)),
        Way("packed", CSKVConfig(compression=0.8)),
        Way("packed", CSKVConfig(compression=0.95)),
        Way("packed+QAT", CSKVConfig(compression=0.95), train=True),
    ]
    return [*plain, *ours]


def run_demo(out: Path, num_records: int = 30, say: Callable[[str], None] = print) -> list[Row]:
    """Fit, generate, measure, print; saves ``demo.json`` and ``demo.png`` in `out`.

    Args:
        num_records: of 100 lines and 8 questions each; 30 make an interval of about ±0.03.
        say: receives the text.

    Raises:
        ImportError: without matplotlib.
        ValueError: if `out` is a file.
    """
    check_plots()
    if out.exists() and not out.is_dir():
        raise ValueError(f"`out`='{out}' is a file. Name a directory for demo.json and demo.png.")
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_bundled()
    text, records = evaluation_text(tokenizer), evaluation_records(num_records)
    say(
        f"Bundled Llama: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
        f"{model.config.num_hidden_layers} layers, {model.config.num_key_value_heads} KV heads x "
        f"{model.config.head_dim}.\n"
        f"Measured on {text.numel():,} tokens of Python's language reference it has not seen,\n"
        f"and on {8 * num_records} questions about records of {NUM_LINES} lines.\n"
    )
    data = calibration_data(tokenizer)
    calibration = Calibration(collect_statistics(model, data), data, TRAIN_EPOCHS, TRAIN_LR)
    todo = ways()
    with tqdm(total=2 + len(todo), desc="Measuring", unit="cache") as bar:
        row, full = measure("full cache", 0.0, model, tokenizer, DynamicCache, text, records, None)
        rows = [row]
        bar.update()
        rows.append(measure("window", 1.0, model, tokenizer, WindowOnlyCache, text, records, full)[0])
        bar.update()
        for i, way in enumerate(todo):
            statistics = calibration.for_init(way.config.init, model)
            model = fit(model, statistics, way.config, adapter_name=f"way{i}", progress=False)
            if way.train:
                train_in_place(model, calibration, "attention")
            compression = way.config.compression
            rows.append(measure(way.name, compression, model, tokenizer, CSKVCache, text, records, full)[0])
            bar.update()
    say(side_by_side(model, tokenizer, records[0], {"full cache": DynamicCache, "95 % removed": CSKVCache}))
    say("\n" + format_table(rows))
    save_results(out, rows)
    say(f"\nSaved {out / 'demo.json'} and {out / 'demo.png'}.")
    return rows

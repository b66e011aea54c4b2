"""What the bundled model is measured on and fitted to, unless `cskv eval` is told otherwise."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..calibration import collect_statistics
from .benchmarks import Benchmark, CaseBenchmark, RecordBenchmark, TextBenchmark, long_generations
from .inputs import DEPTHS, GENERATION_PROMPT
from .methods import Calibration
from .needle import line_haystack
from .tables import TABLES

NUM_LINES = (25, 50, 75, 100)  # of a record; 100 are about 900 tokens
RECORDS = 30  # of each length, with 8 questions each: an interval of about 0.03 over all
ROWS, LENGTH = 20, 512  # of held-out text
GENERATION_TOKENS = 448
LEARNING_RATE = 1e-3
ONLY = {table: ("lines", "text") for table in TABLES if table != "methods"}  # benchmarks of a table


def benchmarks(model: nn.Module, tokenizer: Any, num_records: int) -> list[Benchmark]:
    """Line retrieval at four lengths, held-out text, the model's own generations, and lines by depth and length.

    Args:
        num_records: of each length, with 8 questions each.
    """
    from ..demo.run import evaluation_records, evaluation_text  # which measures with this package

    text = evaluation_text(tokenizer, LENGTH)
    records = {f"{n} lines": evaluation_records(num_records, 8, n) for n in NUM_LINES}
    generations = long_generations(model, text[ROWS:, :GENERATION_PROMPT].contiguous(), GENERATION_TOKENS, seed=0)
    needles = line_haystack(NUM_LINES, DEPTHS, needles_per_cell=max(1, num_records // 4), seed=1)
    return [
        RecordBenchmark("lines", records, length=1024),
        TextBenchmark("text", text[:ROWS]),
        TextBenchmark("generations", generations, skip=GENERATION_PROMPT),
        CaseBenchmark("needle", needles, length=1024, metric="accuracy", batch_size=32),
    ]


def calibration(model: nn.Module, tokenizer: Any, epochs: float, learning_rate: float) -> Calibration:
    from ..demo.run import calibration_data

    rows = calibration_data(tokenizer)
    return Calibration(collect_statistics(model, rows), rows, epochs, learning_rate)

"""What `cskv eval` does: everything is checked, then measured, and saved on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..adapter_files import ADAPTER
from ..demo import BUNDLED
from ..files import check_folder, replace_file
from ..generation import has_active_adapter
from ..loading import local_adapter
from ..model_shape import ModelShape
from ..runs import file_fingerprint
from ..tuner import adapter_config
from . import bundled
from .fingerprint import fingerprint
from .format import text_tables
from .inputs import FORMS, check_benchmark, file_calibration, load_model, parse_benchmark
from .methods import Calibration
from .suite import Suite
from .tables import TABLES, adapter_table

PAPER_LEARNING_RATE = 5e-5


def evaluate(
    name: str,
    out: Path,
    specs: Sequence[str],
    *,
    tables: Sequence[str] | None = None,
    data: Path | None = None,
    limit: int | None = None,
    rows: int | None = None,
    length: int = 2048,
    cut: int | None = None,
    batch_size: int = 8,
    max_tokens: int = 65536,
    epochs: float = 2.0,
    learning_rate: float | None = None,
    context: int | None = None,
    lm_eval_tasks: Sequence[str] = (),
    device_map: str | None = None,
    dtype: str = "auto",
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """What `cskv eval` does; the arguments are its options. Writes ``results.json`` in `out`, and says the tables.

    Returns:
        The rows of ``results.json``.

    Raises:
        ValueError: for an unknown table or benchmark, missing files or data, or a folder of another run.
        ImportError: if the harness is asked for and not installed.
    """
    unknown = sorted(set(tables or ()) - set(TABLES))
    if unknown:
        raise ValueError(f"`--tables` '{unknown[0]}' is not known; use {', '.join(TABLES)}.")
    if name != BUNDLED and not specs and not lm_eval_tasks:
        raise ValueError(f"There is nothing to measure on: give `--benchmark`, one of {', '.join(FORMS)}.")
    if data is not None and not data.is_file():
        raise ValueError(f"`--data` '{data}' does not exist.")
    check_folder(out)
    specs = list(dict.fromkeys(specs))
    for spec in specs:
        check_benchmark(spec)
        source = Path(spec.partition(":")[2])
        if data is not None and source.exists() and data.samefile(source):
            raise ValueError(f"`--benchmark` '{spec}' is the text of `--data`; measure on another than is fitted on.")
    if lm_eval_tasks:
        from .lm_eval import check_tasks, format_results, run_lm_eval

        check_tasks(lm_eval_tasks)
    if learning_rate is None:
        learning_rate = bundled.LEARNING_RATE if name == BUNDLED else PAPER_LEARNING_RATE
    model, tokenizer = load_model(name, dtype, device_map)
    fitted = has_active_adapter(model)
    if fitted and tables:
        raise ValueError(f"`--tables` fits adapters to a model; '{name}' is an adapter. Give its base model.")
    if not fitted and name != BUNDLED and data is None and specs:
        raise ValueError("Without an adapter, some are fitted first, which needs calibration text: give `--data`.")
    files = {spec: path for spec in specs if (path := Path(spec.partition(":")[2])).is_file()}
    files |= {} if data is None else {"data": data}
    files |= {"adapter": local_adapter(name) / ADAPTER[1]} if fitted else {}
    settings = {
        "model": name, "fingerprint": fingerprint(model, 0), "benchmarks": specs, "limit": limit, "rows": rows,
        "length": length, "cut": cut, "batch_size": batch_size, "context": context,
        "data": None if data is None else data.name,
        "files": {spec: file_fingerprint(path) for spec, path in files.items()},
        "max_tokens": max_tokens, "epochs": epochs, "learning_rate": learning_rate, "device_map": device_map,
        "dtype": dtype, "chat_template": bool(getattr(tokenizer, "chat_template", None)),
    }  # fmt: skip
    suite = Suite(model, tokenizer, [], out, settings)  # refuses a folder of another run before anything is done
    if name == BUNDLED and not specs:
        suite.benchmarks, only = bundled.benchmarks(model, tokenizer, limit or bundled.RECORDS), bundled.ONLY
    else:
        options = {"limit": limit, "rows": rows, "length": length, "cut": cut}
        options |= {"batch_size": batch_size, "context": context}
        suite.benchmarks, only = [parse_benchmark(spec, model, tokenizer, **options) for spec in specs], {}

    def calibration() -> Calibration:
        if data is None:
            return bundled.calibration(model, tokenizer, epochs, learning_rate)
        return file_calibration(model, tokenizer, data, length, max_tokens, epochs, learning_rate)

    suite.make_calibration = calibration
    shape = ModelShape.from_model_config(model.config)
    if fitted:
        wanted = {"adapter": adapter_table(adapter_config(model), shape)}
    else:
        chosen = tables or (list(TABLES) if name == BUNDLED else ["methods"])
        wanted = {table: TABLES[table](shape) for table in chosen}
    measured = []
    if suite.benchmarks:
        measured = suite.run(wanted, only, say)
        say("\n" + text_tables(measured))
        say(f"\nSaved {out / 'results.json'}.")
    if lm_eval_tasks:
        options = {"tokenizer": tokenizer, "limit": limit, "batch_size": batch_size, "use_cache": out / "lm-eval"}
        out.mkdir(parents=True, exist_ok=True)
        caches = ["full", "cskv"] if fitted else ["full"]
        runs = [run_lm_eval(model, lm_eval_tasks, cache=cache, **options) for cache in caches]
        replace_file(out / "lm-eval.json", json.dumps(runs, indent=1))
        say("\n" + format_results(*runs))
    return measured

"""Measuring a list of methods on a list of benchmarks: one file of results, which an interrupted run goes on from."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..config import POSITION_BYTES, CSKVConfig
from ..demo import BUNDLED
from ..files import check_folder, replace_file
from ..model_shape import ModelShape
from ..runs import differences
from .benchmarks import Benchmark, Measurement
from .fingerprint import versions
from .memory import cache_nbytes
from .methods import Calibration, Method, bytes_of_old_token, cache_maker, prepare

VERSION = 1


class Suite:
    """One model, the benchmarks it is measured on, and the results so far.

    Args:
        model: without an adapter, or with one, which then is what ``Method.settings=None`` stands for.
        out: folder of ``results.json`` and of answers.
        settings: what the results depend on besides the methods: model, data, sizes; an interrupted run goes on only
            under the same, and with the same versions of the packages.
        calibration: makes what adapters are fitted with; called once, when first needed.

    Raises:
        ValueError: if `out` holds results under other settings or of other versions, or a file that is none, or
            cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        benchmarks: Sequence[Benchmark],
        out: Path,
        settings: dict[str, Any],
        calibration: Callable[[], Calibration] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.benchmarks, self.out = model, tokenizer, benchmarks, out
        self.settings = json.loads(json.dumps({**settings, "versions": versions()}))
        self.make_calibration, self._calibration = calibration, None
        self.path = out / "results.json"
        self.rows: list[dict[str, Any]] = self._earlier_rows()
        self.left_out: dict[str, str] = {}

    def run(
        self,
        tables: dict[str, list[Method]],
        only: dict[str, Sequence[str]] | None = None,
        say: Callable[[str], None] = print,
    ) -> list[dict[str, Any]]:
        """Measure every method of every table; a method that several tables share is measured once.

        Methods that are not possible on this model, or whose package is missing, are left out, which is said and
        saved (``left_out``).

        Args:
            tables: lists of methods by name.
            only: the benchmarks of a table, by their names; all of them where a table is not named.

        Returns:
            The rows of ``results.json``.
        """
        only = only or {}
        todo: dict[str, tuple[Method, list[Benchmark]]] = {}
        for name, table in tables.items():
            wanted = [b for b in self.benchmarks if b.name in only.get(name, [b.name])]
            for method in table:
                held = todo.setdefault(_key(method.identity), (method, []))[1]
                held += [b for b in wanted if all(b is not h for h in held) and not self._measured(method, b)]
        by_factors: dict[str, list[tuple[Method, list[Benchmark]]]] = {}
        for method, benchmarks in todo.values():
            factors = {"kind": method.kind} if method.settings is None else method.factors
            if benchmarks:
                by_factors.setdefault(_key(factors), []).append((method, benchmarks))
        with tqdm(total=len(todo), desc="Measuring", unit="method") as bar:
            bar.update(len(todo) - sum(map(len, by_factors.values())))
            for alike in by_factors.values():
                self._measure_alike(alike, bar, say)
        self._write(tables, only)
        return self.table_rows(tables, only)

    def table_rows(
        self, tables: dict[str, list[Method]], only: dict[str, Sequence[str]] | None = None
    ) -> list[dict[str, Any]]:
        """The measurements, per table and in its order; `only` as in [`run`]."""
        only = only or {}
        by_key: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            by_key.setdefault(row["key"], []).append(row)
        return [
            {"table": name, **method.labels, **{k: v for k, v in row.items() if k not in ("key", "compression")}}
            for name, table in tables.items()
            for method in table
            for row in by_key.get(_key(method.identity), [])
            if row["benchmark"] in only.get(name, [row["benchmark"]])
        ]  # fmt: skip

    def _measure_alike(self, alike: list[tuple[Method, list[Benchmark]]], bar: tqdm, say) -> None:
        """Methods that share their factors, which are fitted and trained once."""
        fitted, first, started = self.model, alike[0][0], time.perf_counter()
        calibration = self.calibration if first.settings is not None else None
        try:
            if first.settings is not None:
                fitted = prepare(self.model, first, calibration)
        except ValueError as error:
            for method, _ in alike:
                self._leave_out(method, f"not possible on this model: {error}", say)
            bar.update(len(alike))
            return
        try:
            for method, benchmarks in alike:
                for benchmark in benchmarks:
                    self._measure(fitted, method, benchmark, started, say)
                    started = time.perf_counter()
                bar.update()
        finally:
            if fitted is not self.model:
                self.model = fitted.unload()

    def _measure(self, model: nn.Module, method: Method, benchmark: Benchmark, started: float, say) -> None:
        make_cache, key = cache_maker(method, model, benchmark.window_length), _key(method.identity)
        try:
            make_cache()
        except (ImportError, ValueError) as error:  # a backend that is not installed, a model that it does not serve
            self._leave_out(method, str(error), say)
            return
        settings = {**self.settings, "method": method.identity, "benchmark": benchmark.name}
        answers = self.out / "answers" / f"{_slug(benchmark.name)}-{_digest(key)}.jsonl"
        try:
            sizes = _sizes(model, method, make_cache, benchmark)
            measured = benchmark.run(model, self.tokenizer, make_cache, answers, settings)
        except (OSError, RuntimeError) as error:
            if method.kind != "quantized":
                raise
            self._leave_out(method, str(error), say)  # its backend compiles itself when used
            return
        seconds = time.perf_counter() - started
        self.rows += [_row(key, method, benchmark, m, sizes, seconds) for m in measured]
        self._write()

    def _leave_out(self, method: Method, reason: str, say: Callable[[str], None]) -> None:
        self.left_out[method.name] = " ".join(reason.split())
        say(f"{method.name}: left out: {self.left_out[method.name]}")

    @property
    def calibration(self) -> Calibration | None:
        if self._calibration is None and self.make_calibration is not None:
            self._calibration = self.make_calibration()
        return self._calibration

    def _measured(self, method: Method, benchmark: Benchmark) -> bool:
        key = _key(method.identity)
        return any(row["key"] == key and row["benchmark"] == benchmark.name for row in self.rows)

    def _earlier_rows(self) -> list[dict[str, Any]]:
        check_folder(self.out)
        files = [path for path in (self.out / "measured.json", self.path) if path.exists()]
        if not files:
            return []
        try:
            held = json.loads(files[0].read_text(encoding="utf-8"))
            settings, rows = held["settings"], held["rows"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"'{files[0]}' is not a file of measurements; remove it to start over.") from error
        if settings != self.settings:
            raise ValueError(
                f"'{files[0]}' was measured under other settings than these: {differences(settings, self.settings)}. "
                "Give another folder, or remove this one to start over."
            )
        return [] if files[0] == self.path else rows  # results.json alone does not hold what it was measured by

    def _write(
        self, tables: dict[str, list[Method]] | None = None, only: dict[str, Sequence[str]] | None = None
    ) -> None:
        """``measured.json``, what is known so far; with tables ``results.json`` too."""
        self.out.mkdir(parents=True, exist_ok=True)
        replace_file(self.out / "measured.json", json.dumps({"settings": self.settings, "rows": self.rows}, indent=1))
        if tables is not None:
            content = {
                "version": VERSION,
                "environment": environment(self.model),
                "model": describe(self.model, self.settings.get("model", "")),
                "settings": self.settings,
                "left_out": self.left_out,
                "rows": self.table_rows(tables, only),
            }
            replace_file(self.path, json.dumps(content, indent=1))


def _row(
    key: str, method: Method, benchmark: Benchmark, measured: Measurement, sizes: dict[str, Any], seconds: float
) -> dict[str, Any]:
    return {
        "key": key,
        "kind": method.kind,
        "compression": method.compression,
        "benchmark": benchmark.name,
        **asdict(measured),
        **sizes,
        "seconds": round(seconds, 2),
    }


def _sizes(model: nn.Module, method: Method, make_cache: Callable, benchmark: Benchmark) -> dict[str, Any]:
    """Bytes of an old token and of a whole context, in a 16-bit model, counted on tensors."""
    shape = ModelShape.from_model_config(model.config)
    full = shape.full_bytes_per_token
    ids = torch.ones(1, benchmark.length, dtype=torch.long, device=model.device)
    held = cache_nbytes(model, make_cache, ids, torch.bfloat16)
    per_token = bytes_of_old_token(model, method)
    if method.clamped:  # which stores its latents unpacked; these are the bytes it stands for
        old = CSKVConfig(**method.settings).num_old_tokens(benchmark.length)
        held = round((benchmark.length - old) * (full + POSITION_BYTES) + old * per_token)
    return {
        "bytes_per_token": per_token,
        "share": None if per_token is None else per_token / full,
        "context_tokens": benchmark.length,
        "cache_bytes": held,
        "cache_share": held / (full * benchmark.length),
    }


def environment(model: nn.Module) -> dict[str, str]:
    """Versions and machine, as results carry them."""
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
    return {
        **versions(), "python": platform.python_version(), "machine": platform.machine(), "device": device,
        "dtype": str(model.dtype).removeprefix("torch."), "threads": str(torch.get_num_threads()),
    }  # fmt: skip


def describe(model: nn.Module, name: str) -> dict[str, Any]:
    """Whose numbers these are: `name` as it was given, an adapter's or a model's, and the base model it has."""
    shape = ModelShape.from_model_config(model.config)
    return {
        "name": name,
        "base_model": name if name == BUNDLED else model.config.name_or_path,
        "model_type": shape.model_type,
        "layers": shape.num_hidden_layers,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "parameters": sum(p.numel() for n, p in model.named_parameters() if "cskv" not in n),
    }


def _key(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text)

"""What a report is made of: an adapter's files and the results of `cskv eval`, as one JSON object. Nothing else enters
the page."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .. import __version__
from ..adapter_files import ADAPTER, check_adapter_files
from ..card import REPO_ID
from ..config import POSITION_BYTES, CSKVConfig
from ..demo import BUNDLED, MODEL_PATH
from ..fit_report import ERRORS, layer_errors, mean_bits
from ..latents import LatentFormat
from ..model_shape import PLAIN_BITS, ModelShape
from ..runs import file_fingerprint
from .rows import ANOTHER, THIS, has_size_of

VERSION = 1  # of report.json, and of the results files it reads
CONTEXTS = (1024, 8192, 32768, 131072)
TEXTS = ("table", "method", "benchmark", "metric")  # that every row has
NUMBERS = (
    "compression", "window", "key_share", "bytes_per_token", "share", "cache_bytes", "value", "low", "high", "total",
    "skipped", "seconds", "cache_share", "context_tokens",
)  # fmt: skip
SPECTRUM = re.compile(r"layers\.(\d+)\.self_attn\.cskv\.cskv_(key|value)_spectrum\.weight$")


def report_data(adapter_dir: str | os.PathLike, results_paths: Sequence[str | os.PathLike] = ()) -> dict[str, Any]:
    """Read everything that a report shows.

    Args:
        adapter_dir: directory of a fitted adapter.
        results_paths: files that `cskv eval` wrote. Where two hold the same measurement, the later file's is kept.

    Returns:
        An object of JSON values without NaN: ``version``, ``adapter``, ``results`` (environment, model and settings
        of each file; ``name`` and ``base``, what was measured and its base model; ``same_model`` and ``same_adapter``,
        whether they are the adapter's base model and the adapter, None where the files do not say), ``rows`` (of all
        files), ``cskv_hf``.

    Raises:
        ValueError: if a file is missing, broken, of another format or about another model; it names the file.
    """
    folder = Path(adapter_dir)
    if not folder.is_dir():
        raise ValueError(f"`adapter_dir` must be the directory of an adapter, '{adapter_dir}' is none.")
    check_adapter_files(folder)
    config = CSKVConfig.from_pretrained(str(folder))
    if not config.is_fitted or config.model_shape is None:
        raise ValueError(
            f"The adapter in '{adapter_dir}' has no factors yet, there is nothing to report. Fit it first."
        )
    adapter, weights = adapter_data(config, folder), file_fingerprint(folder / ADAPTER[1])
    base = config.base_model_name_or_path or ""
    files = [read_results(Path(path), ModelShape(**config.model_shape), base) for path in results_paths]
    files = [_of_adapter(file, adapter, weights) for file in files]
    rows = {key: row for file in files for key, row in _identified(file["rows"])}
    results = [{k: value for k, value in file.items() if k != "rows"} for file in files]
    return _without_nan(
        {
            "version": VERSION,
            "cskv_hf": __version__,
            "adapter": adapter,
            "results": results,
            "rows": list(rows.values()),
        }
    )


def report_command(adapter_dir: str | os.PathLike, results_paths: Sequence[str | os.PathLike], out: Path) -> str:
    """The command that makes this report."""
    return shlex.join(["cskv", "report", str(adapter_dir), *map(str, results_paths), "--out", str(out)])


def adapter_data(config: CSKVConfig, folder: Path) -> dict[str, Any]:
    """What the adapter's own files say."""
    shape, report = ModelShape(**config.model_shape), config.fit_report or {}
    layers = range(shape.num_hidden_layers)
    base = config.base_model_name_or_path or ""
    return {
        "name": folder.resolve().name,
        "base_model": public_name(base),
        "model": vars(shape) | {"kv_dim": shape.kv_dim},
        "compression": config.compression,
        "init": config.init,
        "centers": config.centers,
        "allocates": config.allocates,
        "key_layout": config.key_layout,
        "window": config.window,
        "sinks": config.sinks,
        "block_size": config.block_size,
        "key_group": None if config.storage_bits == PLAIN_BITS else config.group_of("key"),
        "value_group": None if config.storage_bits == PLAIN_BITS else config.group_of("value"),
        "calibration_tokens": report.get("num_tokens"),
        "calibration_source": report.get("source") or None,
        "bytes_per_token": config.bytes_per_token(shape),
        "position_bytes": POSITION_BYTES,
        "full_bytes_per_token": shape.full_bytes_per_token,
        "constant_bytes": config.cache_nbytes(shape, 0),
        "memory": memory_data(config, shape, CONTEXTS),
        "curve": memory_data(config, shape, curve_lengths(config, CONTEXTS[-1])),
        "layers": [layer_data(config, i) for i in layers],
        "spectra": spectra_data(config, folder / ADAPTER[1]),
        "evaluation": report.get("evaluation"),
    }


def memory_data(config: CSKVConfig, shape: ModelShape, lengths: Sequence[int]) -> list[dict[str, float]]:
    """Bytes of one sequence's cache in a 16-bit model; `before_bytes` one token earlier, when the window may have held
    a block more."""
    full = shape.full_bytes_per_token
    return [
        {
            "tokens": tokens,
            "full_bytes": tokens * full,
            "cache_bytes": config.cache_nbytes(shape, tokens),
            "before_bytes": config.cache_nbytes(shape, tokens - 1),
        }
        for tokens in lengths
    ]


def curve_lengths(config: CSKVConfig, longest: int) -> list[int]:
    """Lengths for a curve from 16 tokens on, 16 to an octave; beyond the window each is moved back to where a block
    has just left it."""
    exact = config.sinks + config.window
    peak = exact + config.block_size - 1  # the most that is ever exact
    lengths = {peak, longest - (longest - exact) % config.block_size if longest > peak else longest}
    power = 4.0
    while 2**power <= longest:
        tokens = round(2**power)
        lengths.add(tokens - (tokens - exact) % config.block_size if tokens > peak else tokens)
        power += 1 / 16
    return sorted(length for length in lengths if length <= longest)


def layer_data(config: CSKVConfig, layer_idx: int) -> dict[str, Any]:
    """One layer: ranks, bits and bytes as they are stored; errors as the fit measured them, if it was cut to the same
    ranks."""
    keys, values = config.formats(layer_idx)
    data: dict[str, Any] = {"layer_idx": layer_idx, "key_ranks": list(config.key_ranks[layer_idx])}
    for side, format in (("key", keys), ("value", values)):
        data |= {
            f"{side}_rank": format.rank,
            f"{side}_bits": mean_bits(format) if format.rank else 0.0,
            f"{side}_channels": channels_by_bits(format),
            f"{side}_bytes": format.bytes_per_token(torch.bfloat16),
        }
    errors = layer_errors(config, layer_idx) or {}
    data |= {name: errors.get(name) for name in ERRORS}
    reports = {layer["layer_idx"]: layer for layer in (config.fit_report or {}).get("layers", [])}
    fitted = reports.get(layer_idx, {})
    data |= {name: fitted.get(name) for name in ("key_mean_share", "value_mean_share")}
    prices = config.sensitivity[layer_idx] if config.sensitivity else [None, None]
    return data | {"key_sensitivity": prices[0], "value_sensitivity": prices[1]}


def channels_by_bits(format: LatentFormat) -> list[list[int]]:
    """[bits, channels], most bits first."""
    counts = Counter(format.channel_bits)
    return [[bits, counts[bits]] for bits in sorted(counts, reverse=True)]


def spectra_data(config: CSKVConfig, weights_file: Path) -> list[dict[str, Any]] | None:
    """Per layer the energies of the channels kept: of keys per group, of values; None if the file has none."""
    found: dict[tuple[int, str], list[float]] = {}
    with safe_open(weights_file, "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 (no iterator)
            if match := SPECTRUM.search(name):
                found[int(match[1]), match[2]] = weights.get_tensor(name).flatten().tolist()
    layers = []
    for layer_idx, (key_ranks, value_rank) in enumerate(zip(config.key_ranks, config.value_ranks)):
        keys, values = found.get((layer_idx, "key")), found.get((layer_idx, "value"))
        if keys is None or values is None or len(keys) != sum(key_ranks) or len(values) != value_rank:
            return None
        starts = [sum(key_ranks[:g]) for g in range(len(key_ranks) + 1)]
        groups = [_short(keys[a:b]) for a, b in pairwise(starts)]
        layers.append({"layer_idx": layer_idx, "keys": groups, "values": _short(values)})
    return layers


def read_results(path: Path, shape: ModelShape, base_model: str = "") -> dict[str, Any]:
    """A results file of `cskv eval`, every row with all of its fields.

    Args:
        shape, base_model: of the adapter; the name as it was recorded, empty where it was not.

    Raises:
        ValueError: naming the file, what is wrong and what is expected.
    """
    expected = 'an object {"version": 1, "environment", "model", "settings", "rows": […]} as `cskv eval` writes it'
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"The results file '{path}' cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise ValueError(f"The results file '{path}' is not valid JSON ({error}); expected {expected}.") from error
    if not isinstance(data, dict) or not isinstance(data.get("rows"), list):
        raise ValueError(f"The results file '{path}' has no list of `rows`; expected {expected}.")
    if data.get("version") != VERSION:
        raise ValueError(
            f"The results file '{path}' has `version`={data.get('version')!r}, this cskv-hf reads {VERSION}. Measure "
            "again with `cskv eval`, or upgrade with `pip install -U cskv-hf`."
        )
    for name in ("environment", "model", "settings"):
        if not isinstance(data.get(name, {}), dict):
            raise ValueError(f"`{name}` of the results file '{path}' is not an object; expected {expected}.")
    model = data.get("model", {})
    mine = {
        "model_type": shape.model_type,
        "layers": shape.num_hidden_layers,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
    }
    differing = [
        f"{name}: adapter {mine[name]}, file {model[name]}"
        for name in mine
        if model.get(name, mine[name]) != mine[name]
    ]
    if differing:
        raise ValueError(
            f"The results file '{path}' is about another model than the adapter ({', '.join(differing)}). Give "
            "results of the adapter's model."
        )
    rows = [_row(path, number, row) for number, row in enumerate(data["rows"], 1)]
    tables = list(dict.fromkeys(row["table"] for row in rows))
    measured = str(model.get("base_model") or ("" if "adapter" in tables else model.get("name")) or "")
    same = same_model(base_model, measured)
    if same is False:
        raise ValueError(
            f"The results file '{path}' is about another model than the adapter (adapter '{base_model}', file "
            f"'{measured}'). Give results of the adapter's model."
        )
    name = public_name(str(model.get("name") or "")) or "a model without a name"
    names = {"name": name, "base": public_name(measured) or name, "same_model": same}
    return {"file": path.name, "rows": rows, "tables": tables, **names} | {
        k: data.get(k, {}) for k in ("environment", "model", "settings")
    }


def same_model(one: str, other: str) -> bool | None:
    """Whether two names are of one model. None where they do not tell: a folder may hold any, and a Hub id of another
    user's with the same name a copy."""
    if not one or not other:
        return None
    if _known(one) == _known(other):
        return True
    ids = [REPO_ID.fullmatch(name) and "/" in name and not os.path.isdir(name) for name in (one, other)]
    return False if all(ids) and Path(one).name.lower() != Path(other).name.lower() else None


def public_name(name: str) -> str:
    """A model's name without the folders of this machine."""
    name = _known(name)
    return Path(name).name if os.path.isabs(name) or os.path.isdir(name) else name


def _known(name: str) -> str:
    """The bundled model's short name for its folder, wherever that was installed."""
    name = name.rstrip("/")
    return BUNDLED if Path(name).parts[-3:] == MODEL_PATH.parts[-3:] else name


def _of_adapter(file: dict[str, Any], adapter: dict[str, Any], weights: str) -> dict[str, Any]:
    """A results file with rows of "this adapter" that are of another under that name; `weights` is the fingerprint of
    the adapter's file."""
    recorded = file["settings"].get("files")
    recorded = recorded.get("adapter") if isinstance(recorded, dict) else None
    other = {"method": ANOTHER, "name": f"{ANOTHER}, {file['name']}"}
    mine = [row["method"].lower() == THIS for row in file["rows"]]
    same = [recorded in (None, weights) and has_size_of(adapter, row) for row in file["rows"]]
    rows = [row | other if m and not s else row for row, m, s in zip(file["rows"], mine, same)]
    every = all(s for m, s in zip(mine, same) if m)
    unknown = every and (recorded is None or not any(mine))
    return file | {"rows": rows, "same_adapter": None if unknown else every}


def _row(path: Path, number: int, row: Any) -> dict[str, Any]:
    """A row checked, with all fields."""
    if not isinstance(row, dict):
        raise ValueError(f"Row {number} of the results file '{path}' is not an object.")
    for name in TEXTS:
        if not isinstance(row.get(name), str):
            raise ValueError(
                f"`{name}` of row {number} of the results file '{path}' must be a text, got {row.get(name)!r}."
            )
    for name in NUMBERS:
        value = row.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(
                f"`{name}` of row {number} of the results file '{path}' must be a number or null, got {value!r}."
            )
    details = row.get("details") or {}
    if not isinstance(details, dict):
        raise ValueError(f"`details` of row {number} of the results file '{path}' must be an object, got {details!r}.")
    texts = {name: row[name] for name in TEXTS} | {"group": str(row.get("group") or "")}
    texts |= {"name": str(row.get("label") or row["method"]), "removed": row.get("compression")}
    return texts | {name: row.get(name) for name in NUMBERS} | {"details": details}


def _identified(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
    """Every row with what was measured, without what came out; rows of one file that say the same stay apart."""
    names = (
        "table",
        "method",
        "name",
        "compression",
        "window",
        "key_share",
        "benchmark",
        "group",
        "metric",
    )
    seen: Counter[str] = Counter()
    for row in rows:
        what = json.dumps([row[name] for name in names], sort_keys=True)
        seen[what] += 1
        yield (what, seen[what]), row


def _without_nan(value: Any) -> Any:
    """The same with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return value


def _short(values: Sequence[float]) -> list[float]:
    """To the five digits a picture needs."""
    return [float(f"{v:.5g}") for v in values]

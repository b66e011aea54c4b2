"""Tasks of lm-evaluation-harness, answered and scored through a compressed cache, as plain results; importing this
registers the harness's model ``cskv`` (lm_eval_model.py)."""

from __future__ import annotations

import difflib
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .fingerprint import fingerprint, versions
from .lm_eval_model import CSKVLM  # says what to install

# isort: split
import lm_eval
from lm_eval.tasks import TaskManager

RULER = Path(lm_eval.__file__).parent / "tasks" / "ruler"  # whose tasks make their texts themselves
RULER_NEEDS = ("wonderwords", "nltk", "scipy")
NO_SUCH_LENGTH = -1  # RULER's value of a length that no text has


def run_lm_eval(
    model: str | os.PathLike | nn.Module,
    tasks: str | Sequence[str],
    *,
    cache: str = "cskv",
    stride: int = 32,
    batch_size: int = 8,
    include_path: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    use_cache: str | os.PathLike | None = None,
    metadata: dict[str, Any] | None = None,
    bootstrap_iters: int = 100000,
    **model_args: Any,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness through a cache: ``lm_eval.simple_evaluate`` on a [`CSKVLM`].

    Args:
        model: adapter or base model, a directory, a Hub id, or loaded.
        tasks: names as ``lm_eval ls tasks`` lists them, groups, patterns like ``"arc_*"``, or YAML files; a string
            may hold several, separated by commas.
        cache, stride, batch_size: as in [`CSKVLM`].
        include_path: folders with tasks of your own.
        limit: cases of each task at most; below 1 a share of them.
        num_fewshot: examples in the prompt; by default the task's own.
        apply_chat_template: put prompts into the tokenizer's chat template.
        use_cache: start of the name of a file for responses, to go on from when a run was interrupted. The harness
            looks responses up by their request alone, so what else they depend on, versions among it, goes into the
            name.
        metadata: for tasks that ask for it, ``{"max_seq_lengths": [4096]}`` for RULER. ``tokenizer`` is the model's
            unless given.
        bootstrap_iters: for the standard error of metrics that have no formula for it.
        model_args: further arguments of [`CSKVLM`]: `peft`, `tokenizer`, `dtype`, `device`, `max_length`.

    Returns:
        ``{"model", "cache", "stride", "batch_size", "limit", "lm_eval", "results"}``, JSON values; `results` are
        dictionaries of ``task``, ``version``, ``metric``, ``filter``, ``value``, ``stderr`` (None where there is
        none), ``higher_is_better`` and ``n`` (cases). RULER's metrics are lengths, and ``n`` the cases of that length.
        Under a launcher with several processes an empty dictionary on all but the first.

    Raises:
        ValueError: if a task is unknown, or an argument is not possible; before the model is loaded where it can be.
        ImportError: if RULER is asked for without its packages, before the model is loaded.
    """
    name = os.fspath(model) if not isinstance(model, nn.Module) else model.config.name_or_path
    with tempfile.TemporaryDirectory() as tokenizer:
        given = {"pretrained": name, "tokenizer": tokenizer, **(metadata or {})}
        manager = TaskManager(include_path=include_path, metadata=given)
        names = task_names(manager, tasks)
        lm = CSKVLM(model, cache=cache, stride=stride, batch_size=batch_size, **model_args)
        lm.tokenizer.save_pretrained(tokenizer)  # tasks load it by name, and an adapter may have none of its own
        if use_cache is not None:
            versioned = fingerprint(lm.model, lm.max_length, versions(), lm_eval.__version__)
            use_cache = f"{os.fspath(use_cache)}-{cache}-{stride}-{versioned}"
        raw = lm_eval.simple_evaluate(
            lm,
            tasks=names,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            use_cache=use_cache,
            limit=limit,
            bootstrap_iters=bootstrap_iters,
            log_samples=any(is_ruler(manager, task) for task in names),  # which say of what length each case is
            apply_chat_template=apply_chat_template,
            task_manager=manager,
        )
    if raw is None:
        return {}
    settings = {"model": name, "cache": cache, "stride": stride, "batch_size": batch_size, "limit": limit}
    return {**settings, "lm_eval": raw["lm_eval_version"], "results": plain_results(raw)}


def format_results(*runs: dict[str, Any]) -> str:
    """What [`run_lm_eval`] returned, of one or several caches, as one table of at most 80 columns."""
    lines = [f"{'task':<27}  {'metric':<17}  {'cache':<6}  {'value':>8} {'stderr':>8}  {'n':>5}"]
    entries = [(run["cache"], entry) for run in runs for entry in run["results"]]
    order = list(dict.fromkeys((e["task"], e["metric"], e["filter"]) for _, e in entries))
    entries.sort(key=lambda item: order.index((item[1]["task"], item[1]["metric"], item[1]["filter"])))
    for cache, entry in entries:
        metric = entry["metric"] if entry["filter"] == "none" else f"{entry['metric']}/{entry['filter']}"
        stderr = "" if entry["stderr"] is None else f"±{entry['stderr']:.4f}"
        lines.append(
            f"{_shorten(entry['task'], 27):<27}  {_shorten(metric, 17):<17}  {cache:<6}  {entry['value']:>8.6g}"
            f" {stderr:>8}  {entry['n']:>5}"
        )
    return "\n".join(lines)


def check_tasks(tasks: str | Sequence[str]) -> None:
    """Refuse what cannot be run, before a model is loaded; see [`task_names`]."""
    task_names(TaskManager(), tasks)


def is_ruler(manager: TaskManager, task: str) -> bool:
    """Whether a task, group or tag is RULER's, or has some of it."""
    entry = manager.task_index.get(task)
    if entry is not None and entry.yaml_path is None:  # a tag, whose `tags` are its tasks
        return any(is_ruler(manager, name) for name in entry.tags if name != task)
    return (Path(task) if entry is None else entry.yaml_path).resolve().parent == RULER.resolve()


def task_names(manager: TaskManager, tasks: str | Sequence[str]) -> list[str]:
    """Names and YAML files of the tasks asked for, patterns filled in.

    Raises:
        ValueError: if there is none, or one is unknown; names those that are spelled alike.
        ImportError: if one is RULER's, and packages that it makes its texts with are missing.
    """
    asked = [task.strip() for task in (tasks.split(",") if isinstance(tasks, str) else tasks)]
    names: list[str] = []
    for task in filter(None, asked):
        found = [task] if Path(task).is_file() else manager.match_tasks([task])
        if not found:
            alike = difflib.get_close_matches(task, manager.all_tasks, n=3)
            raise ValueError(
                f"lm-evaluation-harness knows no task '{task}'"
                + (f"; did you mean {', '.join(alike)}? " if alike else ". ")
                + "`lm_eval ls tasks` lists all; tasks of your own are files, or in a folder that `run_lm_eval` is "
                "given by `include_path`."
            )
        names += [name for name in found if name not in names]
    if not names:
        raise ValueError(f"`tasks` names no task, got {tasks!r}.")
    missing = [package for package in RULER_NEEDS if importlib.util.find_spec(package) is None]
    ruler = next((name for name in names if is_ruler(manager, name)), None)
    if missing and ruler is not None:
        raise ImportError(
            f"The task '{ruler}' of lm-evaluation-harness makes its texts with packages that are not installed "
            f'({", ".join(missing)}): `pip install "lm_eval[ruler]"`.'
        )
    return names


def plain_results(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The harness's results, one dictionary per task, metric and filter; groups after the tasks. Without the lengths
    that RULER has no text of."""
    results = []
    for task, metrics in (raw["results"] | raw.get("groups", {})).items():
        cases = raw.get("n-samples", {}).get(task, {}).get("effective", metrics.get("sample_len"))
        for key, value in metrics.items():
            metric, separator, filter_name = key.partition(",")
            if not separator or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            if metric.isdecimal() and value == NO_SUCH_LENGTH:
                continue
            stderr = metrics.get(f"{metric}_stderr,{filter_name}")
            results.append(
                {
                    "task": task,
                    "version": raw.get("versions", {}).get(task),
                    "metric": metric,
                    "filter": filter_name,
                    "value": float(value),
                    "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
                    "higher_is_better": raw.get("higher_is_better", {}).get(task, {}).get(metric),
                    "n": cases_of_length(raw, task, metric, filter_name)
                    or metrics.get("sample_count", {}).get(key, cases),
                }
            )
    return results


def cases_of_length(raw: dict[str, Any], task: str, metric: str, filter_name: str) -> int:
    """Cases of one length of RULER, of a task or of all tasks of a group; 0 where it is none or not known."""
    tasks, samples = raw.get("group_subtasks", {}).get(task) or [task], raw.get("samples", {})
    return sum(
        metric.isdecimal() and case["filter"] == filter_name and case.get(metric, NO_SUCH_LENGTH) != NO_SUCH_LENGTH
        for name in tasks
        for case in samples.get(name, [])
    )


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width // 2] + "…" + text[len(text) - (width - width // 2 - 1) :]

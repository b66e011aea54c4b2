"""The last section of the page: where its numbers come from, and the commands that make them again."""

from __future__ import annotations

import shlex
from typing import Any

from .formats import MISSING
from .markup import join, tag
from .sections import Section, all_rows
from .tables import Head, Line, table

OPTIONS = (  # of `cskv eval`, as its settings call them
    "limit", "rows", "length", "cut", "context", "batch_size", "data", "max_tokens", "epochs", "learning_rate",
    "device_map", "dtype",
)  # fmt: skip


def environment_section(data: dict[str, Any]) -> Section:
    """Where numbers come from, and the commands that make them again."""
    parts = []
    for result in data["results"]:
        parts.append(tag("h3", result["file"]))
        lines = [
            Line([name, key, _words(value)])
            for name in ("model", "environment", "settings")
            for key, value in result[name].items()
        ]
        heads = [Head("", text=True), Head("name", text=True), Head("value", text=True)]
        parts.append(table(f"Environment and settings of {result['file']}", heads, lines))
    if not data["results"]:
        parts.append(tag("p", "No results file was given: all of this page is from the adapter's own files."))
    commands = [*(eval_command(result) for result in data["results"]), data["command"]]
    parts += [tag("h3", "To make this page again"), tag("pre", "\n".join(commands))]
    if data["rows"]:
        parts.append(all_rows(data["rows"]))
    return Section("environment", "Environment and commands", join(parts))


def eval_command(result: dict[str, Any]) -> str:
    """The command that measured a results file: as it says, or put together from its settings."""
    settings = result["settings"]
    if settings.get("command"):
        return str(settings["command"])
    words = ["cskv", "eval", str(settings.get("model") or result["model"].get("name") or "MODEL")]
    for benchmark in settings.get("benchmarks") or []:
        words += ["--benchmark", str(benchmark)]
    tables = [name for name in result["tables"] if name != "adapter"]
    if tables:
        words += ["--tables", ",".join(tables)]
    for name in OPTIONS:
        if settings.get(name) is not None:
            words += [f"--{name.replace('_', '-')}", str(settings[name])]
    return shlex.join([*words, "--out", "FOLDER"])


def _words(value: object) -> str:
    if isinstance(value, (dict, list)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return ", ".join(f"{k}: {_words(v)}" if isinstance(value, dict) else _words(v) for k, v in pairs)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: MISSING}[value]
    return f"{value:,}" if isinstance(value, int) else str(value)

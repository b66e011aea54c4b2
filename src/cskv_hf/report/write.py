"""write_report: files in, a page and its JSON out."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ..files import replace_file
from .data import report_command, report_data
from .page import page


def write_report(
    adapter_dir: str | os.PathLike, results_paths: Sequence[str | os.PathLike], out: str | os.PathLike
) -> Path:
    """Write the report of an adapter: one self-contained HTML page, and the JSON behind it beside it.

    Args:
        adapter_dir: directory of a fitted adapter.
        results_paths: results files of `cskv eval`, of the adapter's model. May be empty: sections without data say
            what to run.
        out: the page, a file ending in ``.html``; the JSON gets the same name ending in ``.json``. A directory gets
            ``report.html`` and ``report.json``.

    Returns:
        The path of the page. Both files are replaced only when they are complete.

    Raises:
        ValueError: for an adapter or a results file that cannot be read, is broken or belongs to another model, and if
            the report would overwrite a results file; nothing is written then.
    """
    out = Path(out)
    if out.is_dir() or not out.suffix:
        out = out / "report.html"
    if out.suffix != ".html":
        raise ValueError(f"`out` must be a file ending in .html or a directory, got '{out}'.")
    beside = out.with_suffix(".json")
    for path in results_paths:
        if Path(path).resolve() == beside.resolve():
            raise ValueError(
                f"The report's JSON would overwrite the results file '{path}'; give another `out` than '{out}'."
            )
    data = report_data(adapter_dir, results_paths)
    data["command"] = report_command(adapter_dir, results_paths, out)
    text = page(data)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(beside, json.dumps(data, indent=1, allow_nan=False) + "\n")
    replace_file(out, text)
    return out

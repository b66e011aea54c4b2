"""Whether an interrupted run may be resumed: what it was started with, and what differs now."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from .files import replace_file

RUN = "cskv_run.json"  # beside checkpoints: what their run was started with


def check_same_run(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on from checkpoints in `folder` of a run that was started with other settings.

    Raises:
        ValueError: naming what differs.
    """
    file = folder / RUN
    if file.is_file() and any(folder.glob("checkpoint-*")):
        before = json.loads(file.read_text(encoding="utf-8"))
        if before != settings:
            raise ValueError(
                f"'{folder}' holds checkpoints of a run that was interrupted, with other settings than these: "
                f"{differences(before, settings)}. Go on with the same, delete the folder, or name another `out`."
            )


def remember_run(folder: Path, settings: dict[str, Any]) -> None:
    """For [`check_same_run`] of a run that goes on with this one."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / RUN, json.dumps(settings))


def forget_run(folder: Path) -> None:
    """Take away what [`remember_run`] wrote, and the folder, unless something else is in it."""
    (folder / RUN).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def differences(held: Any, now: dict[str, Any]) -> str:
    """What differs between settings read from a file and those of this run, by name, in words."""
    there, here = _flat(held), _flat(now)
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return "; ".join(f"`{name}` {there.get(name)!r} there, {here.get(name)!r} here" for name in names)


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of nested objects."""
    if not isinstance(settings, dict):
        return {prefix.removesuffix("."): settings}
    return {k: v for name, value in settings.items() for k, v in _flat(value, f"{prefix}{name}.").items()}


def file_fingerprint(path: Path) -> str:
    """Short hash of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]

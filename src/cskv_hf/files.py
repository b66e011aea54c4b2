"""Files and directories that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def check_out(out: Path) -> None:
    """Refuse a place for an adapter where something else lies, before any work is done.

    Raises:
        ValueError: if `out` is a file, has no name of its own, is a directory that holds no CSKV adapter, or lies
            where nothing can be written.
    """
    if out.name in ("", ".."):
        raise ValueError(f"`out`='{out}' has no name of its own. Name a new directory, such as 'my-adapter'.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"`out`='{out}' is a file. Name a new directory, or that of a CSKV adapter to replace.")
    if out.is_dir() and any(out.iterdir()) and not _is_adapter(out):
        raise ValueError(
            f"`out`='{out}' holds something that is not a CSKV adapter and would be lost. Name a new or an empty "
            "directory, or that of a CSKV adapter to replace."
        )
    _check_writable(out, next(folder for folder in out.absolute().parents if folder.is_dir()))


def check_folder(out: Path) -> None:
    """Refuse a folder for files that is a file, or where nothing can be written, before any work is done.

    Raises:
        ValueError: as described.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"`out`='{out}' is a file. Name a folder.")
    _check_writable(out, next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir()))


def _check_writable(out: Path, there: Path) -> None:
    try:
        os.rmdir(tempfile.mkdtemp(dir=there))
    except OSError as error:
        raise ValueError(f"`out`='{out}' cannot be written ({error.strerror}). Name a directory elsewhere.") from error


def _is_adapter(folder: Path) -> bool:
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and settings.get("peft_type") == "CSKV"


def replace_directory(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a new directory beside `path`, then put it in the place of `path`, an adapter, which is kept
    until then. What else lies in `path` is in the new directory, too.

    Raises:
        ValueError: see [`check_out`].
    """
    check_out(path)
    path = path.resolve()  # of a link, what it points to
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    new, old = work / "new", work / "old"
    try:
        write(new)
        if path.exists():
            _link_others(path, new)
            os.replace(path, old)
        os.replace(new, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work, ignore_errors=True)


def _link_others(there: Path, new: Path) -> None:
    """Files and directories of one directory that another has none of the same name of, by links where links can be
    made."""
    for entry in there.iterdir():
        target = new / entry.name
        if entry.is_symlink() or not (target.exists() or entry.is_dir()):
            _link(entry, target)
        elif not target.exists():
            shutil.copytree(entry, target, symlinks=True, copy_function=_link)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # across devices, or a file system without links
        shutil.copy2(source, target, follow_symlinks=False)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path` to write a file to, which is put in the place of `path` once it is complete; a failure
    leaves nothing."""
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield new
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def replace_file(path: Path, text: str) -> None:
    """Write a text file, see [`replacing`]."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")

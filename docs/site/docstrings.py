"""A griffe extension: our docstrings as mkdocstrings expects them.

[`name`] becomes a link to a name of the API pages, or plain code where it is not public, and `a, b: text` under Args
one entry for each.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

DOCS = Path(__file__).resolve().parents[1]
SOURCE = DOCS.parent / "src"
REFERENCE = re.compile(r"\[(`([\w.]+)`)\](?![\[(])")
TOGETHER = re.compile(r"^( +)(\w+(?:, \w+)+):(.*\n?(?:\1 +.*\n?|\n(?=\1 ))*)", re.M)


def documented() -> list[str]:
    """The names on the API pages: those listed, and the public ones of the modules of a listed package."""
    names = re.findall(r"^::: ([\w.]+)", "\n".join(p.read_text(encoding="utf-8") for p in DOCS.glob("api*.md")), re.M)
    for package in [name for name in names if (SOURCE / name.replace(".", "/")).is_dir()]:
        for file in sorted((SOURCE / package.replace(".", "/")).glob("*.py")):
            public = re.findall(r"^(?:def|class) ([A-Za-z]\w*)", file.read_text(encoding="utf-8"), re.M)
            names += [f"{package}.{file.stem}.{name}" for name in public]
    return names


DOCUMENTED = documented()


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        text = TOGETHER.sub(apart, obj.docstring.value)
        obj.docstring.value = REFERENCE.sub(lambda match: link(match, obj), text)


def apart(match: re.Match) -> str:
    indent, names, text = match.groups()
    return "".join(f"{indent}{name}:{text.rstrip()}\n" for name in names.split(", "))


def link(match: re.Match, obj: griffe.Object) -> str:
    code, name = match.groups()
    first, _, rest = name.partition(".")
    for target in DOCUMENTED:
        if target.rpartition(".")[2] == first:
            return f"[{code}][{target}{'.' + rest if rest else ''}]"
    owner = obj.parent
    if owner is not None and owner.is_class and name in owner.members and not name.startswith("_"):
        for target in DOCUMENTED:
            if target.rpartition(".")[2] == owner.name:
                return f"[{code}][{target}.{name}]"
    return code

"""English text that every CPython carries: the language reference of ``pydoc`` and the standard library's docstrings.

The bundled model is trained, calibrated and evaluated on it, so that the demo needs no download. A document belongs
to the held-out part if the hash of its name says so, which stays true across Python versions even where the text
itself changes.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from pathlib import Path

SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "__pycache__",
    "pydoc_data",
}


def _is_held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 8 == 0


def reference_topics(held_out: bool) -> list[str]:
    """The sections of the language reference that ``help("topics")`` shows, sorted by name; one eighth is held out."""
    from pydoc_data.topics import topics

    return [topics[name].strip() + "\n" for name in sorted(topics) if _is_held_out(name) == held_out]


def library_docstrings(min_chars: int = 200) -> list[str]:
    """Docstrings of the standard library, one document per module, read from the sources without importing them."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # a few files of the library are broken or non-UTF-8 on purpose
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, nodes)]
        text = "\n\n".join(doc for doc in found if doc)
        if len(text) >= min_chars:
            documents.append(text + "\n")
    return documents

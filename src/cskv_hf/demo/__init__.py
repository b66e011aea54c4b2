"""The bundled model and what `cskv demo` runs on it."""

from __future__ import annotations

from pathlib import Path

MODEL_PATH = Path(__file__).parent / "model"
BUNDLED = "bundled"  # what `cskv eval` and reports call it, wherever it is installed

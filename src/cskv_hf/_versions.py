"""The oldest transformers and PEFT that cskv-hf runs with, checked when it is imported."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

OLDEST = {"transformers": "5.14", "peft": "0.20", "huggingface_hub": "1.0"}


def check_versions() -> None:
    """Refuse versions that are too old, which pip allows to happen when packages are pinned elsewhere.

    Raises:
        ImportError: naming the package, both versions, and the command that helps.
    """
    for package, oldest in OLDEST.items():
        installed = version(package)
        if Version(installed) < Version(oldest):
            raise ImportError(
                f"cskv-hf needs {package} {oldest} or newer, found {installed}. Upgrade it with "
                f"`pip install -U '{package}>={oldest}'`."
            )


check_versions()

"""The report: one self-contained HTML page about an adapter, from its files and from what was measured of it."""

from .write import write_report

__all__ = ["write_report"]

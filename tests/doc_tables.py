"""Tables in docs/ that the tests write: what was tested, and how it went.

A test calls the fixture `documented(table, row, column)`; its cell becomes "yes" if the test passes, or the words that
it gave for a refusal it has seen. ``pytest --write-docs`` writes the tables of the tests that ran to the pages of
docs/ that have a place for them, between two comments; without it, a cell that differs from the file fails the run.
"""

from __future__ import annotations

from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
CELLS = pytest.StashKey()


def begin(table: str) -> str:
    return f"<!-- table: {table}, written by `pytest --write-docs` -->"


END = "<!-- end of table -->"


def pytest_addoption(parser):
    parser.addoption("--write-docs", action="store_true", help="write the tables of the tests to docs/")


def pytest_configure(config):
    config.stash[CELLS] = Cells()
    if not hasattr(config, "workerinput"):  # a process of pytest-xdist hands its reports to the one that started it
        config.pluginmanager.register(config.stash[CELLS])


@pytest.fixture
def documented(request):
    """A function that claims a cell of a table for the running test."""

    def claim(table: str, row: str, column: str, text: str = "yes") -> None:
        request.node.user_properties.append(("documented", (table, row, column, text)))

    return claim


class Cells:
    """Collects the cells from the reports of all tests, whichever process ran them."""

    def __init__(self) -> None:
        self.tables = {}  # table -> row -> column -> text

    def pytest_runtest_logreport(self, report):
        if report.when != "call":
            return
        for table, row, column, text in (claim for name, claim in report.user_properties if name == "documented"):
            cells = self.tables.setdefault(table, {}).setdefault(row, {})
            if not report.passed:
                cells[column] = "FAILED"
            elif cells.get(column) != "FAILED":
                cells[column] = text


def read_table(text: str, table: str) -> tuple[list[str], dict[str, dict[str, str]]]:
    """The columns and cells of a table in a Markdown file."""
    lines = text.split(begin(table), 1)[1].split(END, 1)[0].strip().splitlines()
    if not lines:
        return [], {}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    columns = rows[0][1:]
    return columns, {row[0]: dict(zip(columns, row[1:])) for row in rows[2:]}


def format_table(columns: list[str], cells: dict[str, dict[str, str]]) -> str:
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {row} | " + " | ".join(values.get(column, "") for column in columns) + " |"
        for row, values in cells.items()
    ]
    return "\n".join(lines)


def pytest_sessionfinish(session, exitstatus):
    for table, cells in session.config.stash[CELLS].tables.items():
        path = next(page for page in DOCS.glob("*.md") if begin(table) in page.read_text(encoding="utf-8"))
        text = path.read_text(encoding="utf-8")
        columns, held = read_table(text, table)
        if not session.config.getoption("--write-docs"):
            stale = [
                f"{row} / {column}"
                for row, values in cells.items()
                for column, value in values.items()
                if held.get(row, {}).get(column) != value
            ]
            if stale:
                print(f"\ndocs/{path.name} is not what the tests saw ({'; '.join(stale)}): run `pytest --write-docs`.")
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
            continue
        columns += [c for values in cells.values() for c in values if c not in columns]
        columns = list(dict.fromkeys(columns))
        merged = held | {row: held.get(row, {}) | values for row, values in cells.items()}
        before, rest = text.split(begin(table), 1)
        after = rest.split(END, 1)[1]
        path.write_text(f"{before}{begin(table)}\n{format_table(columns, merged)}\n{END}{after}", encoding="utf-8")

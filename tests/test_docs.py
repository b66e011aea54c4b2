"""The documentation against the code: links lead somewhere, quoted messages exist, public names are as written."""

import json
import re
from pathlib import Path
from statistics import median

import pytest

import cskv_hf

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCE = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
UPSTREAM = ("KeyError: 'CSKV'", "'CSKV' is not a valid PeftType", "RepositoryNotFoundError", "Revision Not Found")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_messages_of_troubleshooting_are_those_of_the_code():
    """Every quoted message, piece by piece between placeholders, is in the source as the user sees it."""
    joined = re.sub(r'"\s*\n\s*f?"', "", SOURCE)  # adjacent string literals
    rows = re.findall(r"^\| (.*?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.M)[2:]
    quotes = [quote for row in rows for quote in re.findall(r"`` (.*?) ``|`([^`]+)`", row)]
    quotes = [one or other for one, other in quotes]
    checked = 0
    for quote in quotes:
        if quote in UPSTREAM:
            continue
        for piece in re.split(r"…|'[^']*'|\bN\b|[\d.]{2,}", quote):
            piece = piece.strip(" '()/,")
            if len(piece) > 8:
                assert piece in joined, piece
                checked += 1
    assert checked > 20


def test_numbers_of_the_readme_are_those_of_the_results():
    """The table of three models, row by row."""
    columns = []
    for model in ("bundled", "stories260K", "babyllama-tok105"):
        results = json.loads((ROOT / "benchmarks" / "results" / f"quality-{model}.json").read_text())["rows"]
        columns.append({row["name"]: row["ratio"] for row in results if row["table"] == "methods"})
    names = ["80 % paper: asvd + training", "80 % ours, no training", "90 % paper: asvd + training"]
    names += ["90 % ours, no training", "95 % paper: asvd, its quantiser, QAT", "95 % ours, no training"]
    table = re.findall(r"^\| \d+ % removed.*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert len(table) == len(names)
    for line, name in zip(table, names):
        assert [cell.strip() for cell in line.split("|")[2:-1]] == [f"{column[name]:.4f}" for column in columns]


def test_numbers_of_the_speed_page_are_those_of_the_results():
    """Medians over the runs of decode.py, and every row of memory.py."""
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    decode, memory = (
        json.loads((ROOT / "benchmarks" / "results" / f"{n}.json").read_text()) for n in ("decode", "memory")
    )
    ratios = {}
    for run in decode["runs"]:
        dynamic = {row["length"]: row["seconds"] for row in run if row["cache"] == "DynamicCache"}
        for row in run:
            ratios.setdefault(row["cache"], {}).setdefault(row["length"], []).append(
                row["seconds"] / dynamic[row["length"]]
            )
    for name, by_length in ratios.items():
        if name != "DynamicCache":
            cells = [f"{median(r):.2f} ({min(r):.2f}–{max(r):.2f})" for r in by_length.values()]
            assert f"| {name} | {' | '.join(cells)} |" in page
    for row in memory["rows"]:
        share = 100 * row["peak"] / memory["rows"][0]["peak"]
        assert f"| {row['cache']} | {row['held'] / 1e6:,.1f} | {row['peak'] / 1e6:,.1f} | {share:.1f} % |" in page


def test_needle_numbers_are_those_of_the_results():
    """Every row of both tables, and the means over all cases."""
    page = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "benchmarks" / "results" / "needle.json").read_text())["results"]
    rows, caches = {}, {}
    for result in results:
        scores = result["scores"]
        share = sum(s["value"] * s["total"] for s in scores) / sum(s["total"] for s in scores)
        assert f" {share:.3f} (" in page
        caches.setdefault(result["haystack"].split(",")[0], []).append(result["cache"])
        if result["cache"] != "window":
            late = result["haystack"] == "prose, no prefix"  # the last number of a cell
            for score in scores:
                size, depth = score["group"].split(", depth ")
                rows.setdefault(size, {}).setdefault(depth, []).append((late, f"{score['value']:.2f}"))
    for size, cells in rows.items():
        texts = [" / ".join(value for _, value in sorted(cell, key=lambda c: c[0])) for cell in cells.values()]
        assert f"| {size} | {' | '.join(texts)} |" in page
    assert caches["lines"] == ["full cache", "window", "80% removed", "95% removed"] and len(rows) == 8


def test_python_in_the_docs_compiles_and_names_what_exists():
    for page in PAGES:
        for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            compile(code, str(page), "exec")
            for name in re.findall(r"cskv_hf\.([A-Za-z_]+)", code):
                assert hasattr(cskv_hf, name) or (ROOT / "src" / "cskv_hf" / name).exists(), f"{page.name}: {name}"

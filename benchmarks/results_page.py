"""The tables of docs/results.md out of what `cskv eval` wrote: python benchmarks/results_page.py

To measure anew: ``cskv eval bundled --out FOLDER``, then copy ``FOLDER/results.json`` to
``benchmarks/results/paper-bundled.json`` and run this.
"""

from __future__ import annotations

import json
from pathlib import Path

from cskv_hf.evaluate.format import find, markdown_table

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "paper-bundled.json", ROOT / "docs" / "results.md"
TEXT, ROWS = ("text", "20 rows of 512 tokens", "perplexity_ratio", "perplexity"), "22 rows of 512 tokens"
LINES = [("lines", f"{n} lines", "accuracy", f"{n} lines") for n in (25, 50, 75, 100)]
OWN = [("generations", ROWS, "kl", "KL, own text"), ("generations", ROWS, "agreement", "same token")]
ALL_LINES = ("lines", "all", "accuracy", "line retrieval")
COLUMNS = {
    "methods": [*LINES, TEXT, *OWN],
    "initialisation": [ALL_LINES, TEXT],
    "window": [ALL_LINES, TEXT],
    "budget": [ALL_LINES, TEXT],
    "quantisation": [ALL_LINES, TEXT],
}  # fmt: skip


def page_with_tables(page: str, rows: list[dict]) -> str:
    """The page with the table between each pair of comments written anew."""
    for table, columns in COLUMNS.items():
        begin, end = (
            f"<!-- table: {table}, written by `python benchmarks/results_page.py` -->",
            "<!-- end of table -->",
        )
        before, found, rest = page.partition(begin)
        if not found:
            raise SystemExit(f"{PAGE} has no place for the table '{table}'.")
        for benchmark, group, metric, _ in columns:
            if find([row for row in rows if row["table"] == table], group, metric, benchmark) is None:
                raise SystemExit(
                    f"The results have no '{metric}' of '{benchmark}', '{group}', in the table '{table}'."
                )
        page = f"{before}{begin}\n{markdown_table(rows, table, columns)}\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(page_with_tables(PAGE.read_text(encoding="utf-8"), results["rows"]), encoding="utf-8")

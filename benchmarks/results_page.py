"""The tables of docs/results.md out of what `cskv eval` wrote: python benchmarks/results_page.py

To measure anew: ``cskv eval bundled --out FOLDER``, then copy ``FOLDER/results.json`` to
``benchmarks/results/paper-bundled.json`` and run this. The page names the commands behind ``smollm2-135m.json`` and
``gemma3-270m.json``.
"""

from __future__ import annotations

import json
from pathlib import Path

from cskv_hf.evaluate.format import find, markdown_table

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "results.md", ROOT / "benchmarks" / "results"
BUNDLED, SMOLLM2, GEMMA3 = "paper-bundled.json", "smollm2-135m.json", "gemma3-270m.json"
TEXT, ROWS = ("text", "20 rows of 512 tokens", "perplexity_ratio", "perplexity"), "22 rows of 512 tokens"
LINES = [("lines", f"{n} lines", "accuracy", f"{n} lines") for n in (25, 50, 75, 100)]
OWN = [("generations", ROWS, "kl", "KL, own text"), ("generations", ROWS, "agreement", "same token")]
ALL_LINES = ("lines", "all", "accuracy", "line retrieval")
NOVELS = ("text:data/held-out.txt", "4 rows of 2,048 tokens")
FOUND = [("needle:data/held-out.txt", "all", "accuracy", "needles found")]
OF_NOVELS = [
    (*NOVELS, metric, head)
    for metric, head in (("perplexity_ratio", "perplexity"), ("kl", "KL"), ("agreement", "same token"))
]
TABLES = {  # by their names on the page: the file, the table in it, and its columns
    "smollm2": (SMOLLM2, "methods", [*FOUND, *OF_NOVELS]),
    "gemma3": (GEMMA3, "methods", [*FOUND, *OF_NOVELS]),
    "methods": (BUNDLED, "methods", [*LINES, TEXT, *OWN]),
    "initialisation": (BUNDLED, "initialisation", [ALL_LINES, TEXT]),
    "window": (BUNDLED, "window", [ALL_LINES, TEXT]),
    "budget": (BUNDLED, "budget", [ALL_LINES, TEXT]),
    "quantisation": (BUNDLED, "quantisation", [ALL_LINES, TEXT]),
}  # fmt: skip


def page_with_tables(page: str) -> str:
    """The page with the table between each pair of comments written anew."""
    for name, (file, table, columns) in TABLES.items():
        rows = json.loads((RESULTS / file).read_text(encoding="utf-8"))["rows"]
        begin, end = (
            f"<!-- table: {name}, written by `python benchmarks/results_page.py` -->",
            "<!-- end of table -->",
        )
        before, found, rest = page.partition(begin)
        if not found:
            raise SystemExit(f"{PAGE} has no place for the table '{name}'.")
        for benchmark, group, metric, _ in columns:
            if find([row for row in rows if row["table"] == table], group, metric, benchmark) is None:
                raise SystemExit(f"'{file}' has no '{metric}' of '{benchmark}', '{group}', in the table '{table}'.")
        page = f"{before}{begin}\n{markdown_table(rows, table, columns)}\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(page_with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

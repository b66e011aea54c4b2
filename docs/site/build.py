"""Build the documentation site, strictly: python docs/site/build.py

Copies the pages of docs/, the README, the changelog and every file that they link to into build/docs, with links that
fit there, and has zensical make build/site of it. Fails on a warning, on a page that is not in the nav, on a link or
anchor that leads nowhere, and on anything that a browser would fetch from elsewhere.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[2]
STAGE, SITE = ROOT / "build" / "docs", ROOT / "build" / "site"
RENAMED = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "LICENSE": "LICENSE.txt"}
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")


class Page(HTMLParser):
    """The ids, links and fetched resources of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.fetched.append(values["href"])
        elif tag != "meta" and values.get("src"):
            self.fetched.append(values["src"])


def main() -> None:
    for folder in (STAGE, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    stage()
    problems = nav_problems() + run_zensical()
    problems = problems or site_problems()
    if problems:
        raise SystemExit("\n".join(["The site has problems:", *dict.fromkeys(problems)]))
    print(f"built {SITE.relative_to(ROOT)}: {len(list(SITE.rglob('*.html')))} pages, all links lead somewhere")


def stage() -> None:
    """Fill build/docs, from the pages outwards along their links."""
    waiting = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
    waiting += [ROOT / "docs" / "site" / "site.css"]
    done = set()
    while waiting:
        source = waiting.pop()
        if source in done:
            continue
        done.add(source)
        target = STAGE / place(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            target.write_text(listing(source), encoding="utf-8")
            waiting += [file for file in source.iterdir() if file.is_file()]
        elif source.suffix == ".md":
            text, linked = relink(source)
            target.write_text(text, encoding="utf-8")
            waiting += linked
        else:
            shutil.copyfile(source, target)


def place(source: Path) -> str:
    """Where a file of the repository lies in build/docs; a folder is its listing."""
    path = source.relative_to(ROOT).as_posix()
    path = RENAMED.get(path, path).removeprefix("docs/")
    return f"{path}/index.md" if source.is_dir() else path


def relink(page: Path) -> tuple[str, list[Path]]:
    """The text of a page with its links turned to where things lie in build/docs, and what they lead to."""
    linked = []

    def turn(match: re.Match) -> str:
        if urlsplit(match[1]).scheme:
            return match[1]
        target = (page.parent / match[1]).resolve()
        if not target.exists():
            raise SystemExit(f"{page.relative_to(ROOT)} links to '{match[1]}', which is not there.")
        linked.append(target)
        return Path(os.path.relpath(STAGE / place(target), (STAGE / place(page)).parent)).as_posix()

    pieces = re.split(r"(^```.*?^```)", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return "".join(piece if piece.startswith("```") else LINK.sub(turn, piece) for piece in pieces), linked


def listing(folder: Path) -> str:
    """A page for a folder that is linked to: Python files as they are, others as links."""
    parts = [f"# {folder.relative_to(ROOT).as_posix()}"]
    for file in sorted(file for file in folder.iterdir() if file.is_file()):
        if file.suffix == ".py":
            parts.append(f"## {file.name}\n\n```python\n{file.read_text(encoding='utf-8')}```")
        else:
            parts.append(f"- [{file.name}]({file.name})")
    return "\n\n".join(parts) + "\n"


def nav_problems() -> list[str]:
    listed = re.findall(r'^[^#\n]*"([\w./-]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8"), re.M)
    missing = {file.name for file in STAGE.glob("*.md")} - set(listed)
    return [f"{name} is not in the nav of zensical.toml" for name in sorted(missing)] + [
        f"the nav of zensical.toml has {name}, which is not there" for name in listed if not (STAGE / name).exists()
    ]


def run_zensical() -> list[str]:
    """Build; what was said beyond that all is well."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = [line for line in result.stdout.splitlines() if line.strip()]
    said = [line for line in said if not line.startswith(("Build started", "Build finished", "No issues found"))]
    return said + ([f"zensical ended with {result.returncode}"] if result.returncode else [])


def site_problems() -> list[str]:
    pages = {file: Page(file) for file in SITE.rglob("*.html") if file.name != "404.html"}
    problems = []
    for file, page in pages.items():
        name = file.relative_to(SITE).as_posix()
        for link in page.links + page.fetched:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.fetched:
                    problems.append(f"{name} fetches {link}")
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                problems.append(f"{name} links to {link}, which is not there")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                problems.append(f"{name} links to {link}, which has no such anchor")
        problems += [f"{name} has an unresolved reference {m}" for m in re.findall(r"\]\[[\w.]*\]", file.read_text())]
    for sheet in SITE.rglob("*.css"):
        fetched = re.findall(r"(?:url\(|@import\s*)[\"']?(https?:[^)\"']+)", sheet.read_text(encoding="utf-8"))
        problems += [f"{sheet.relative_to(SITE).as_posix()} fetches {url}" for url in fetched]
    return problems


if __name__ == "__main__":
    main()

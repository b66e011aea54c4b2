"""The checks of the site's builder: what it must refuse is refused, what leaves docs/ is turned to where it lies.

The site itself is built by `.ci/run`; these need none of its packages, but for the two extensions.
"""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

SITE = Path(__file__).parent.parent / "docs" / "site"


def load(name):
    spec = importlib.util.spec_from_file_location(f"site_{name}", SITE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = load("build")


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SITE", tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.html").write_text('<h1 id="there">x</h1>')
    return tmp_path


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ('<a href="other/">x</a><a href="other/#there">x</a><a href="https://a.b">x</a>', None),
        ('<a href="gone/">x</a>', "links to gone/, which is not there"),
        ('<a href="other/#gone">x</a>', "which has no such anchor"),
        ('<a href="#gone">x</a>', "which has no such anchor"),
        ('<script src="https://cdn.example/x.js"></script>', "fetches https://cdn.example/x.js"),
        ('<link rel="stylesheet" href="//fonts.example/css">', "fetches //fonts.example/css"),
        ('<img src="gone.png">', "links to gone.png, which is not there"),
        ("see [fit][cskv_hf.gone]", "has an unresolved reference"),
    ],
)
def test_a_bad_page_is_refused(body, complaint, site):
    (site / "index.html").write_text(body)
    problems = build.site_problems()
    assert problems == [] if complaint is None else len(problems) == 1 and complaint in problems[0]


def test_a_sheet_that_fetches_is_refused(site):
    (site / "x.css").write_text("@font-face { src: url(https://fonts.example/a.woff2) }")
    assert build.site_problems() == ["x.css fetches https://fonts.example/a.woff2"]


def test_links_are_turned_to_where_things_lie(tmp_path, monkeypatch):
    """Out of docs/, to the README, to a folder; code stays as it is, and a dead link stops the build."""
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "STAGE", tmp_path / "build" / "docs")
    (tmp_path / "docs").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "README.md").write_text("[a](docs/page.md#x) [b](runs)")
    (tmp_path / "docs" / "page.md").write_text("[a](../README.md) [b](https://a.b/c)\n```python\nx[0](gone)\n```\n")
    text, linked = build.relink(tmp_path / "README.md")
    assert text == "[a](page.md#x) [b](runs/index.md)"
    assert linked == [tmp_path / "docs" / "page.md", tmp_path / "runs"]
    text, linked = build.relink(tmp_path / "docs" / "page.md")
    assert text == "[a](index.md) [b](https://a.b/c)\n```python\nx[0](gone)\n```\n" and len(linked) == 1
    (tmp_path / "docs" / "page.md").write_text("[a](gone.md)")
    with pytest.raises(SystemExit, match=r"docs/page.md links to 'gone.md'"):
        build.relink(tmp_path / "docs" / "page.md")


def test_formulas_become_mathml():
    markdown = pytest.importorskip("markdown")
    pytest.importorskip("latex2mathml")
    pytest.importorskip("pymdownx")
    extensions = ["pymdownx.arithmatex", load("mathml").MathML()]
    settings = {"pymdownx.arithmatex": {"generic": True}}
    html = markdown.markdown(
        "a $x_1 < 2$ b\n\n$$\n\\frac{a}{b}\n$$\n", extensions=extensions, extension_configs=settings
    )
    assert len(re.findall(r"<math[^>]*>", html)) == 2 and "<mfrac>" in html and "$" not in html
    assert 'display="inline"' in html and 'display="block"' in html


def test_docstrings_are_taken_apart():
    pytest.importorskip("griffe")
    docstrings = load("docstrings")
    text = "    a, b: one\n        two.\n    c: three, four: five\n"
    assert docstrings.TOGETHER.sub(docstrings.apart, text) == (
        "    a: one\n        two.\n    b: one\n        two.\n    c: three, four: five\n"
    )

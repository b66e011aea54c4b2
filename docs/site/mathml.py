"""A Markdown extension: what arithmatex found between dollars becomes MathML, which browsers draw without a script."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.postprocessors import Postprocessor

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)


class ToMathML(Postprocessor):
    def run(self, text: str) -> str:
        def formula(match: re.Match) -> str:
            kind, _, tex = match.groups()
            display = "block" if kind == "div" else "inline"
            return f'<{kind} class="formula">{convert(html.unescape(tex), display=display)}</{kind}>'

        return FORMULA.sub(formula, text)


class MathML(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.postprocessors.register(ToMathML(md), "mathml", 0)  # the last one, when stashed formulas are back


def makeExtension(**settings) -> MathML:
    return MathML(**settings)

"""How LongBench scores an answer: pure functions ``metric(answer, case)``, each the best over the case's references.

The definitions are those of LongBench's ``metrics.py`` (Bai et al. 2023, github.com/THUDM/LongBench) with the packages
that it names, odd corners included, so that scores can be laid beside published ones. Scores lie between 0 and 1;
LongBench shows them times 100.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cases import Case

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")
PARAGRAPH = re.compile(r"(?:Paragraph |段落)(\d+)")  # what a reference of the retrieval tasks looks like
NO_CODE = ("`", "#", "//")  # a line with one of these is passed over


def qa_f1(answer: str, case: Case) -> float:
    """F1 of the words of answer and reference, in any order; see [`words`]."""
    return _best(lambda reference: token_f1(words(answer), words(reference)), case)


def rouge_l(answer: str, case: Case) -> float:
    """ROUGE-L of a summary; see [`summary_f`]."""
    return _best(lambda reference: summary_f(answer, reference), case)


def classification(answer: str, case: Case) -> float:
    """1 / n if the right class is among the n of ``case.details["all_classes"]`` that occur in the answer, else 0.

    A class that is a part of the right one's name ("person" in "Title of a person") does not count, except, as
    published, straight after another such class.
    """
    named = [name for name in case.details["all_classes"] if name in answer]
    return _best(lambda reference: _share_of_class(named, reference), case)


def retrieval(answer: str, case: Case) -> float:
    """Share of the answer's numbers that are the paragraph's of the reference ("Paragraph 7", "段落7").

    Raises:
        ValueError: if a reference names no paragraph.
    """
    return _best(lambda reference: number_share(answer, paragraph(reference)), case)


def count(answer: str, case: Case) -> float:
    """Share of the answer's numbers that are the reference."""
    return _best(lambda reference: number_share(answer, reference), case)


def code_similarity(answer: str, case: Case) -> float:
    """Similarity of the first line of code and the reference; see [`code_line`] and [`edit_similarity`]."""
    return _best(lambda reference: edit_similarity(code_line(answer), reference), case)


def on_first_line(metric: Callable[[str, Case], float], answer: str, case: Case) -> float:
    """`metric` of the answer's first line, for few-shot prompts that a model goes on with."""
    return metric(first_line(answer), case)


def _best(score: Callable[[str], float], case: Case) -> float:
    return max(score(reference) for reference in case.references)


def first_line(text: str) -> str:
    """The first line that is not empty."""
    return text.lstrip("\n").split("\n")[0]


def words(text: str) -> list[str]:
    """Words in lower case, without ASCII punctuation and without the articles a, an, the."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def token_f1(tokens: Sequence[str], reference: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of `tokens` as a bag; 0 where nothing is shared."""
    shared = (Counter(tokens) & Counter(reference)).total()
    return 2 * shared / (len(tokens) + len(reference)) if shared else 0.0


def summary_f(answer: str, reference: str) -> float:
    """F1 of the "rouge-l" of the package ``rouge`` 1.0.1, which LongBench calls; not the ROUGE-L of a single sequence.

    Texts are cut at every full stop, into words at white space. The longest common subsequence of each sentence of
    the reference with each of the answer is found, and the distinct words in any of them are counted against the
    distinct words of the answer (precision) and of the reference (recall). A piece of white space, such as what
    follows the last full stop, holds one word, the empty one.

    Two differences to the package: equal texts score 1 where its denominator has 1e-8 more, and a sentence that is too
    long for its recursion (about 1,000 words with the other's), which LongBench scores 0, is scored.
    """
    ours, theirs = sentences(answer), sentences(reference)
    found = {word for one in theirs for other in ours for word in common_subsequence(one, other)}
    distinct = len({w for sentence in ours for w in sentence}) + len({w for sentence in theirs for w in sentence})
    return 2 * len(found) / distinct if found else 0.0


def sentences(text: str) -> list[list[str]]:
    """The words of every sentence, as the package ``rouge`` cuts them."""
    return [piece.split() or [""] for piece in text.split(".") if piece]


def common_subsequence(x: Sequence[str], y: Sequence[str]) -> list[str]:
    """A longest common subsequence; of several, the one that the package ``rouge`` finds.

    Two rows of the table are held, each entry the subsequence so far as a bit per position of `x`: len(x) * len(y)
    steps and bits.
    """
    row = [0] * (len(y) + 1)
    for i, word in enumerate(x):
        above, row = row, [0]
        for j, other in enumerate(y):
            if word == other:
                row.append(above[j] | 1 << i)
            else:
                row.append(above[j + 1] if above[j + 1].bit_count() > row[j].bit_count() else row[j])
    return [word for i, word in enumerate(x) if row[-1] >> i & 1]


def paragraph(reference: str) -> str:
    """The number in "Paragraph 7" or "段落7".

    Raises:
        ValueError: if there is none.
    """
    match = PARAGRAPH.search(reference)
    if match is None:
        raise ValueError(f"A reference must name a paragraph like 'Paragraph 7' or '段落7', got {reference!r}.")
    return match[1]


def number_share(answer: str, number: str) -> float:
    """Share of the numbers in the answer that are `number`, digit by digit; 0 without a number."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def code_line(text: str) -> str:
    """The first line without a backtick, ``#`` or ``//``: neither a fence nor a comment. Empty if there is none."""
    lines = text.lstrip("\n").split("\n")
    return next((line for line in lines if not any(mark in line for mark in NO_CODE)), "")


def edit_similarity(text: str, reference: str) -> float:
    """``fuzzywuzzy.fuzz.ratio`` / 100: the ratio of ``difflib.SequenceMatcher``, rounded to whole percents.

    That is what ``fuzzywuzzy`` computes with LongBench's requirements. Where ``python-Levenshtein`` happens to be
    installed, it takes that package's ratio instead (twice the longest common subsequence over both lengths), which is
    the same or higher; so is ``rapidfuzz``'s.
    """
    if text == reference:
        return 1.0
    if not text or not reference:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, text, reference).ratio()) / 100


def _share_of_class(named: Sequence[str], reference: str) -> float:
    kept, at = list(named), 0
    while at < len(kept):
        if kept[at] in reference and kept[at] != reference:
            del kept[at]  # and passes over the next one, as published
        at += 1
    return 1 / len(kept) if reference in kept else 0.0

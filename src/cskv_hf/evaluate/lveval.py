"""LV-Eval (Yuan et al. 2024, arXiv 2402.05136) as cases: English questions over contexts of 16k to 256k words.

Prompts, ``max_new_tokens``, the score and its list of words are those of ``config.py`` and ``metrics.py`` of
github.com/infinigence/LVEval (MIT license). Three things to know, where its code and its description part:

- Only the first of a record's answers is compared with.
- The words that carry nothing are left out of the recall of keywords, not of the F1 after it.
- factrecall_en is scored by plain F1, without keywords.

The published code knows the length of a file by its name, ``DATASET_16k.jsonl``. Whether the ``dataset`` field holds
the name with or without the length was not established, since no published file was at hand: both are read.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from . import metrics
from .cases import Case
from .published import FIELDS, check_max_length, cut_middle, is_text, read_published, read_records

PREFIX = "lveval:"
REPO = "Infinigence/LVEval"  # one zip file per dataset
LEVELS = ("16k", "32k", "64k", "128k", "256k")
LEVEL = re.compile(rf"(.+)_({'|'.join(LEVELS)})")
REFUSED = ("multifieldqa_zh_mixup", "factrecall_zh", "cmrc_mixup", "lic_mixup", "dureader_mixup")
MIN_RECALL = 0.2  # of the keywords; an answer with less scores 0
EMPTY_WORDS = (
    "and to of in her was with for it from is that his he by she they or at because be on are their what as had "
    "were about being this who but have has when which does"
)
IGNORED = frozenset(EMPTY_WORDS.split())
ONE_PASSAGE = (
    "Please answer the following question based on the given passages. Questions and answers are only relevant to "
    "one passage. Only give me the answer and do not output any other explanation and evidence.\n\nArticle: "
    "{context}\n\nPlease answer the following question based on the above passages. Questions and answers are only "
    "relevant to one passage. Only give me the answer and do not output any other explanation and evidence.\n\n"
    "Question: {input}\nAnswer:"
)
SOME_PASSAGES = (
    "Answer the question based on the given passages. Questions and answers are only relevant to some passages. Only "
    "give me the answer and do not output any other explanation and evidence.\n\nArticle: {context}\n\nPlease answer "
    "the following question based on the above passages. Questions and answers are only relevant to some passages. "
    "Only give me the answer and do not output any other explanation and evidence.\n\nQuestion: {input}\nAnswer:"
)
ARTICLE = (
    "Please answer the following questions based on the given article.\n\nArticle: {context}\n\nPlease answer the "
    "following questions based on the above article.\n\nQuestion: {input}\nAnswer:"
)
PROMPTS = {
    "hotpotwikiqa_mixup": SOME_PASSAGES,
    "loogle_SD_mixup": ONE_PASSAGE,
    "loogle_CR_mixup": ONE_PASSAGE,
    "loogle_MIR_mixup": ONE_PASSAGE,
    "multifieldqa_en_mixup": ONE_PASSAGE,
    "factrecall_en": ARTICLE,
}


def cases(
    source: str | os.PathLike,
    tokenizer: Any = None,
    max_length: int | None = None,
    *,
    folder: str | os.PathLike | None = None,
) -> list[Case]:
    """The cases of one dataset at one length, in the order of its file; groups are the lengths, "16k" to "256k".

    Args:
        source: a published file of JSON lines, or a name: ``lveval:factrecall_en_16k``.
        tokenizer: of the model; needed with `max_length`.
        max_length: tokens to which prompts are cut, by taking out their middle (see [`cut_middle`]). By default
            nothing is cut.
        folder: where a name is looked for (``factrecall_en_16k.jsonl``) before the Hub is.

    Returns:
        Cases with `details`: ``dataset``, ``length`` (in words), ``keywords`` (None without) and ``tokens_cut``. The
        published records have no ids: a case's is its dataset and the number of its line.

    Raises:
        ValueError: if the file is missing, cannot be downloaded or has another format, if the dataset is unknown or
            its score needs jieba, or for a wrong `max_length`.
    """
    check_max_length(max_length, tokenizer)
    if str(source).startswith(PREFIX):
        name = str(source).removeprefix(PREFIX)
        dataset, level = dataset_and_level(name)
        if level is None:
            raise ValueError(f"'{source}' lacks the length: {', '.join(f'{source}_{level}' for level in LEVELS)}.")
        records = read_published(name, REPO, f"{dataset}.zip", folder, FIELDS)
    else:
        match = LEVEL.fullmatch(Path(source).stem)
        level = match and match[2]
        records = read_records(source, FIELDS)
    found = []
    for number, record in records:
        try:
            found.append(_case(record, number, level, tokenizer, max_length))
        except ValueError as error:
            raise ValueError(f"Line {number} of '{source}': {error}") from error
    return found


def keyword_f1(answer: str, case: Case) -> float:
    """F1 of words as [`metrics.qa_f1`]; 0 where fewer than a fifth of ``case.details["keywords"]`` are in the answer.

    Words of `IGNORED` are never found but count among the keywords. Keywords that are articles and punctuation alone,
    by whose number the published code would divide, are as none.
    """
    keywords = metrics.words(case.details["keywords"] or "")
    found = Counter(metrics.words(answer)) & Counter(keywords)
    recalled = sum(times for word, times in found.items() if word not in IGNORED)
    if keywords and recalled / len(keywords) < MIN_RECALL:
        return 0.0
    return metrics.qa_f1(answer, case)


def dataset_and_level(name: str) -> tuple[str, str | None]:
    """``("factrecall_en", "16k")`` of ``factrecall_en_16k``; None without a length.

    Raises:
        ValueError: if there is no such dataset, or its score cannot be computed.
    """
    match = LEVEL.fullmatch(name)
    dataset, level = (match[1], match[2]) if match else (name, None)
    if dataset in REFUSED:
        raise ValueError(
            f"LV-Eval scores '{dataset}' on words that jieba finds in Chinese text. cskv-hf does not use jieba, and "
            f"scores on characters could not be compared with published ones. Use one of {', '.join(PROMPTS)}."
        )
    if dataset not in PROMPTS:
        raise ValueError(
            f"LV-Eval has no dataset '{name}'. Known are {', '.join(PROMPTS)}, each with one of the lengths "
            f"{', '.join(LEVELS)} behind it (factrecall_en_16k)."
        )
    return dataset, level


def _case(record: dict[str, Any], number: int, level: str | None, tokenizer: Any, max_length: int | None) -> Case:
    dataset, own_level = dataset_and_level(record["dataset"])
    keywords = record.get("answer_keywords")
    if not (keywords is None or is_text(keywords)):
        raise ValueError(f"field 'answer_keywords' must be a text or null, got {str(keywords)[:60]!r}.")
    if level is None and own_level is None:
        raise ValueError(
            f"neither the file's name nor field 'dataset' ({dataset!r}) says which length this is. Name the file as "
            f"it was published, {dataset}_16k.jsonl."
        )
    prompt, cut = cut_middle(PROMPTS[dataset].format(**record), tokenizer, max_length)
    return Case(
        id=f"{dataset}-{number}",
        group=level or own_level,
        prompt=prompt,
        references=(record["answers"][0],),
        metric=metrics.qa_f1 if dataset == "factrecall_en" else keyword_f1,
        max_new_tokens=16 if dataset == "factrecall_en" else 64,
        details={"dataset": dataset, "length": record["length"], "keywords": keywords, "tokens_cut": cut},
    )

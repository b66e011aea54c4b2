"""LongBench and LongBench-E (Bai et al. 2023, arXiv 2308.14508) as cases: prompts, lengths of answers and scores.

Prompts, misspellings included, and ``max_new_tokens`` are those of ``config/dataset2prompt.json`` and
``dataset2maxlen.json`` of github.com/THUDM/LongBench (MIT license), which define the benchmark. So do its rules: no
chat template for few-shot and code tasks, the first line of the answer for few-shot tasks, prompts cut in the middle.

One rule cannot be a case's: on samsum the published code ends generation at a new line, but not at the first token.
Here the answer goes on to its last token and its first line is scored, which differs where a model begins with an
empty line.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from . import metrics
from .cases import Case
from .published import FIELDS, check_max_length, cut_middle, is_text, is_texts, read_published, read_records

PREFIX = "longbench:"
REPO, ARCHIVE = "THUDM/LongBench", "data.zip"  # the repository's own loader is a script, which `datasets` 4 refuses
FEW_SHOT = ("trec", "triviaqa", "samsum", "lsht")  # the model goes on with more examples: the first line counts
PLAIN = (*FEW_SHOT, "lcc", "repobench-p")  # no chat template
REFUSED = ("multifieldqa_zh", "dureader", "vcsum")
EVEN = ("qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum")
EVEN += ("passage_count", "passage_retrieval_en", "lcc", "repobench-p")  # what LongBench-E has
WITH_ID = {**FIELDS, "_id": ("a text", is_text)}
BUCKETS = ((4000, "0-4k"), (8000, "4-8k"))  # below this many words; "8k+" from there


class Task(NamedTuple):
    """A dataset of the benchmark: how long an answer may be, how it is scored, what is asked."""

    max_new_tokens: int
    metric: Callable[[str, Case], float]
    prompt: str


PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\nAnswer the question based on the given passages. Only give me "
    "the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:"
)
TASKS = {
    "narrativeqa": Task(
        128,
        metrics.qa_f1,
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nStory: "
        "{context}\n\nNow, answer the question based on the story asconcisely as you can, using a single phrase if "
        "possible. Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
    ),
    "qasper": Task(
        128,
        metrics.qa_f1,
        "You are given a scientific article and a question. Answer the question as concisely as you can, using a "
        "single phrase or sentence if possible. If the question cannot be answered based on the information in the "
        'article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". '
        "Do not provide any explanation.\n\nArticle: {context}\n\n Answer the question based on the above article as "
        "concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered "
        'based on the information in the article, write "unanswerable". If the question is a yes/no question, answer '
        '"yes", "no", or "unanswerable". Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:',
    ),
    "multifieldqa_en": Task(
        64,
        metrics.qa_f1,
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
        "above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
    ),
    "hotpotqa": Task(32, metrics.qa_f1, PASSAGES),
    "2wikimqa": Task(32, metrics.qa_f1, PASSAGES),
    "musique": Task(32, metrics.qa_f1, PASSAGES),
    "gov_report": Task(
        512,
        metrics.rouge_l,
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n"
        "{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
    ),
    "qmsum": Task(
        512,
        metrics.rouge_l,
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in "
        "one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting "
        "transcript in one or more sentences.\n\nQuery: {input}\nAnswer:",
    ),
    "multi_news": Task(
        512,
        metrics.rouge_l,
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\nNow, "
        "write a one-page summary of all the news.\n\nSummary:",
    ),
    "trec": Task(
        64,
        metrics.classification,
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
    ),
    "triviaqa": Task(
        32,
        metrics.qa_f1,
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n{context}\n\n{input}",
    ),
    "samsum": Task(
        128,
        metrics.rouge_l,
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
    ),
    "lsht": Task(
        64,
        metrics.classification,
        "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}",
    ),
    "passage_count": Task(
        32,
        metrics.count,
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully "
        "read these paragraphs and determine how many unique paragraphs there are after removing duplicates. In "
        "other words, how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final "
        "count of unique paragraphs after removing duplicates. The output format should only contain the number, "
        "such as 1, 2, 3, and so on.\n\nThe final answer is: ",
    ),
    "passage_retrieval_en": Task(
        32,
        metrics.retrieval,
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the "
        "abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of "
        'the paragraph that the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", '
        "etc.\n\nThe answer is: ",
    ),
    "passage_retrieval_zh": Task(
        32,
        metrics.retrieval,
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n下面是一个摘要\n\n"
        '{input}\n\n请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n答案是：',
    ),
    "lcc": Task(
        64,
        metrics.code_similarity,
        "Please complete the code given below. \n{context}Next line of code:\n",
    ),
    "repobench-p": Task(
        64,
        metrics.code_similarity,
        "Please complete the code given below. \n{context}{input}Next line of code:\n",
    ),
}


def cases(
    source: str | os.PathLike,
    tokenizer: Any = None,
    max_length: int | None = None,
    *,
    by_length: bool | None = None,
    folder: str | os.PathLike | None = None,
) -> list[Case]:
    """The cases of one dataset, in the order of its file.

    Args:
        source: a published file of JSON lines, or a name: ``longbench:hotpotqa``, ``longbench:hotpotqa_e`` of
            LongBench-E.
        tokenizer: of the model; needed with `max_length`.
        max_length: tokens to which prompts are cut, by taking out their middle (see [`cut_middle`]). By default
            nothing is cut, and a case too long for a model is skipped by [`answer_cases`].
        by_length: groups are the lengths of LongBench-E, "0-4k", "4-8k", "8k+", instead of the dataset's name. By
            default for files and names that end in ``_e``.
        folder: where a name is looked for (``hotpotqa.jsonl``, ``data/hotpotqa.jsonl``) before the Hub is.

    Returns:
        Cases with `details`: ``dataset``, ``length`` (of the whole text as the file has it: words, or characters of
        Chinese), ``tokens_cut``, and ``all_classes`` where the metric wants it. An id that a file has twice gets its
        line number as well.

    Raises:
        ValueError: if the file is missing, cannot be downloaded or has another format, if the dataset is unknown or
            its score needs jieba, or for a wrong `max_length`.
    """
    check_max_length(max_length, tokenizer)
    if str(source).startswith(PREFIX):
        name = str(source).removeprefix(PREFIX)
        task_of(name)
        records = read_published(name, REPO, ARCHIVE, folder, WITH_ID)
    else:
        name = Path(source).stem
        records = read_records(source, WITH_ID)
    by_length = name.endswith("_e") if by_length is None else by_length
    found, seen = [], set()
    for number, record in records:
        try:
            case = _case(record, tokenizer, max_length, by_length, f"{record['_id']}#{number}", seen)
        except ValueError as error:
            raise ValueError(f"Line {number} of '{source}': {error}") from error
        seen.add(case.id)
        found.append(case)
    return found


def task_of(name: str) -> tuple[str, Task]:
    """The dataset of a name with or without LongBench-E's ``_e``, and what is done with it.

    Raises:
        ValueError: if there is no such dataset, or its score cannot be computed.
    """
    dataset = name.removesuffix("_e")
    if dataset in REFUSED:
        raise ValueError(
            f"LongBench scores '{dataset}' on words that jieba finds in Chinese text. cskv-hf does not use jieba, and "
            "scores on characters could not be compared with published ones. Use one of the other datasets: "
            f"{', '.join(TASKS)}."
        )
    if dataset not in TASKS or (name != dataset and dataset not in EVEN):
        raise ValueError(
            f"LongBench has no dataset '{name}'. Known are {', '.join(TASKS)}, and of LongBench-E "
            f"{', '.join(f'{name}_e' for name in EVEN)}."
        )
    return dataset, TASKS[dataset]


def length_bucket(length: int) -> str:
    """The group of LongBench-E: "0-4k" below 4,000 words, "4-8k" below 8,000, "8k+"."""
    return next((name for end, name in BUCKETS if length < end), "8k+")


def _case(
    record: dict[str, Any], tokenizer: Any, max_length: int | None, by_length: bool, second_id: str, seen: set[str]
) -> Case:
    dataset, task = task_of(record["dataset"])
    details: dict[str, Any] = {"dataset": dataset, "length": record["length"]}
    if task.metric is metrics.classification:
        details["all_classes"] = record.get("all_classes")
        if not is_texts(details["all_classes"]):
            raise ValueError(f"field 'all_classes' must list the classes, got {details['all_classes']!r}.")
    if task.metric is metrics.retrieval:
        for answer in record["answers"]:
            metrics.paragraph(answer)
    prompt, cut = cut_middle(task.prompt.format(**record), tokenizer, max_length)
    return Case(
        id=second_id if record["_id"] in seen else record["_id"],
        group=length_bucket(record["length"]) if by_length else dataset,
        prompt=prompt,
        references=tuple(record["answers"]),
        metric=functools.partial(metrics.on_first_line, task.metric) if dataset in FEW_SHOT else task.metric,
        max_new_tokens=task.max_new_tokens,
        chat=dataset not in PLAIN,
        details=details | {"tokens_cut": cut},
    )

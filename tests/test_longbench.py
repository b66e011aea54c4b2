"""LongBench and LV-Eval: scores against hand-computed cases, files read and refused, prompts and their cuts."""

import functools
import hashlib
import io
import itertools
import json
import zipfile
from types import SimpleNamespace

import pytest
from conftest import HUB
from hypothesis import given
from hypothesis import strategies as st
from local_hub import Repo, git_oid
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cskv_hf.evaluate import longbench, lveval, metrics
from cskv_hf.evaluate.published import cut_middle

CLASSES = ["Title", "Title of a person", "Date", "person"]
SHORT = st.lists(st.sampled_from("abc"), max_size=7)


def score(metric, answer, *references, **details):
    return metric(answer, SimpleNamespace(references=references, details=details))


@pytest.mark.parametrize(
    "metric, answer, references, expected",
    [
        (metrics.qa_f1, "The Eiffel-Tower!", ["an eiffeltower"], 1),
        (metrics.qa_f1, "in Paris, France", ["Paris"], 2 * 1 / (3 + 1)),
        (metrics.qa_f1, "new new york", ["york new"], 2 * 2 / (3 + 2)),  # a bag: in any order, each once
        (metrics.qa_f1, "paris", ["london", "in paris", "rome"], 2 * 1 / (1 + 2)),
        (metrics.qa_f1, "", ["paris"], 0),
        (metrics.qa_f1, "...", ["paris"], 0),
        (metrics.qa_f1, "the", ["a"], 0),  # articles only: nothing is shared
        (metrics.rouge_l, "the cat sat on the mat", ["the cat sat on the mat"], 1),
        (metrics.rouge_l, "the cat sat on the mat", ["the cat lay on the mat"], 2 * 4 / (5 + 5)),  # distinct words
        (metrics.rouge_l, "b a", ["a b"], 2 * 1 / (2 + 2)),
        (metrics.rouge_l, "a b. c d", ["c d. a b"], 1),  # by sentence: 1/2 if it were one sequence
        (metrics.rouge_l, "a a a", ["a"], 1),
        (metrics.rouge_l, "x. ", ["x."], 2 * 1 / (2 + 1)),  # an empty word behind the full stop
        (metrics.rouge_l, "a, b", ["a b"], 2 * 1 / (2 + 2)),  # punctuation and case count
        (metrics.rouge_l, "a b", ["c", "a c", "A b"], 1 / 2),
        (metrics.rouge_l, "", ["a"], 0),
        (metrics.rouge_l, "...", ["a"], 0),
        (metrics.retrieval, "Paragraph 7", ["Paragraph 7"], 1),
        (metrics.retrieval, "7, 8 or 17", ["Paragraph 7"], 1 / 3),
        (metrics.retrieval, "段落7", ["段落7"], 1),
        (metrics.retrieval, "7", ["Paragraph 3", "Paragraph 7"], 1),
        (metrics.retrieval, "", ["Paragraph 7"], 0),
        (metrics.count, "12", ["12"], 1),
        (metrics.count, "12 of 24.", ["12"], 1 / 2),
        (metrics.count, "012", ["12"], 0),
        (metrics.count, "twelve", ["12"], 0),
        (metrics.count, "", ["12"], 0),
        (metrics.count, "12", ["11", "12"], 1),
        (metrics.code_similarity, "return x", ["return x"], 1),
        (metrics.code_similarity, "\n```python\n# one\nreturn x\nreturn y", ["return x"], 1),
        (metrics.code_similarity, "abcd\n", ["abxd"], 2 * 3 / (4 + 4)),
        (metrics.code_similarity, "ab", ["abcdefg"], 0.44),  # 4 / 9 in whole percents
        (metrics.code_similarity, "ab", ["zz", "ab", "abc"], 1),
        (metrics.code_similarity, "# only a comment", ["return x"], 0),
        (metrics.code_similarity, "", ["return x"], 0),
    ],
)
def test_hand_computed(metric, answer, references, expected):
    assert score(metric, answer, *references) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "classes, answer, references, expected",
    [
        (CLASSES, "Type: Date", ["Date"], 1),
        (CLASSES, "Date or Title?", ["Date"], 1 / 2),
        (CLASSES, "Title of a person", ["Title"], 1 / 3),
        (["Date", "Title", "Title of a person"], "Title of a person", ["Title of a person"], 1),
        (
            ["Title", "person", "Title of a person"],
            "Title of a person",
            ["Title of a person"],
            1 / 2,
        ),  # "person" stays
        (CLASSES, "Title", ["Title of a person"], 0),
        (CLASSES, "date.", ["Date"], 0),
        (CLASSES, "", ["Date"], 0),
        (CLASSES, "Date", ["Title", "Date"], 1),
    ],
)
def test_classification(classes, answer, references, expected):
    """By hand; the published loop removes from the list it walks through and so passes over what follows."""
    assert score(metrics.classification, answer, *references, all_classes=classes) == pytest.approx(expected)


def test_edit_similarity_is_that_of_difflib():
    """Which takes the longest block first and so finds less than the longest common subsequence."""
    x, y = "baacba", "bcaaba"
    assert len(metrics.common_subsequence(x, y)) == 5  # a ratio of 2 * 5 / 12 where python-Levenshtein is installed
    assert metrics.edit_similarity(x, y) == 0.33  # 2 * 2 / 12


def test_first_line():
    assert metrics.first_line("\n\nDate\nQuestion: who") == "Date"
    assert metrics.first_line("") == ""
    first = functools.partial(metrics.on_first_line, metrics.qa_f1)
    assert score(first, "\nparis\nQuestion: rome", "paris") == 1


def test_a_reference_without_its_paragraph_is_an_error():
    with pytest.raises(ValueError, match="must name a paragraph like 'Paragraph 7' or '段落7', got 'seven'"):
        score(metrics.retrieval, "7", "seven")


def is_subsequence(x, y):
    rest = iter(y)
    return all(item in rest for item in x)


@given(SHORT, SHORT)
def test_common_subsequence_against_every_subsequence(x, y):
    found = metrics.common_subsequence(x, y)
    assert is_subsequence(found, x) and is_subsequence(found, y)
    longest = next(n for n in range(len(x), -1, -1) if any(is_subsequence(c, y) for c in itertools.combinations(x, n)))
    assert len(found) == longest


@given(SHORT, SHORT)
def test_common_subsequence_is_the_one_of_the_recursive_definition(x, y):
    """Of several longest ones the words differ, and with them the score: the last words decide, then `y` is cut."""

    def recursive(x, y):
        if not x or not y:
            return []
        if x[-1] == y[-1]:
            return recursive(x[:-1], y[:-1]) + [x[-1]]
        shorter_x, shorter_y = recursive(x[:-1], y), recursive(x, y[:-1])
        return shorter_x if len(shorter_x) > len(shorter_y) else shorter_y

    assert metrics.common_subsequence(x, y) == recursive(x, y)


@given(st.text("ab. ,\n"), st.text("ab. ,\n"))
def test_scores_lie_between_0_and_1_and_equal_texts_score_1(x, y):
    for metric in (metrics.token_f1, metrics.summary_f, metrics.edit_similarity):
        assert 0 <= metric(x, y) <= 1
        assert metric(x, x) == 1 or not x.strip(".")


RECORD = {
    "input": "Who?",
    "context": "A {text} with braces.",
    "answers": ["Ada", "Ada Lovelace"],
    "length": 5000,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "a1",
}


def write(path, *records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return path


def test_longbench_cases(tmp_path):
    path = write(tmp_path / "hotpotqa.jsonl", RECORD, "", RECORD | {"_id": "b2"}, RECORD)
    first, second, third = longbench.cases(path)
    assert (first.id, second.id, third.id) == ("a1", "b2", "a1#4")  # an id that comes twice stays apart
    assert first.group == "hotpotqa" and first.max_new_tokens == 32 and first.chat and first.stop is None
    assert first.prompt.startswith("Answer the question based on the given passages.")
    assert "A {text} with braces." in first.prompt and first.prompt.endswith("Question: Who?\nAnswer:")
    assert first.details == {"dataset": "hotpotqa", "length": 5000, "tokens_cut": 0}
    assert first.metric("ada lovelace.", first) == 1  # the best of both
    assert [case.group for case in longbench.cases(path, by_length=True)] == ["4-8k"] * 3


def test_longbench_rules(tmp_path):
    """Which tasks are plain, which are scored on their first line, and that every prompt holds its context once."""
    references = {"passage_retrieval_en": "Paragraph 3", "passage_retrieval_zh": "段落3", "passage_count": "3"}
    for name in longbench.TASKS:
        answer = references.get(name, "Date")
        record = RECORD | {"dataset": name, "answers": [answer], "all_classes": CLASSES, "context": "CONTEXT"}
        (case,) = longbench.cases(write(tmp_path / f"{name}.jsonl", record))
        assert case.prompt.count("CONTEXT") == 1 and "{" not in case.prompt
        assert case.chat is (name not in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"))
        assert case.metric(answer, case) == 1
        few_shot = name in ("trec", "triviaqa", "samsum", "lsht")
        if few_shot or name == "qasper":
            assert (case.metric(f"\n{answer}\nTitle 5", case) == 1) is few_shot
        assert ("all_classes" in case.details) is (name in ("trec", "lsht"))


@pytest.mark.parametrize(
    "length, group", [(0, "0-4k"), (3999, "0-4k"), (4000, "4-8k"), (7999, "4-8k"), (8000, "8k+"), (10**6, "8k+")]
)
def test_buckets_of_longbench_e(tmp_path, length, group):
    assert longbench.length_bucket(length) == group
    for name in ("hotpotqa", "hotpotqa_e"):  # however the field names it
        path = write(tmp_path / "hotpotqa_e.jsonl", RECORD | {"length": length, "dataset": name})
        assert longbench.cases(path)[0].group == group
        assert longbench.cases(path, by_length=False)[0].group == "hotpotqa"


def test_prompts_and_lengths_are_the_published_ones():
    """Digests of the published ``{dataset: [prompt, max_new_tokens]}`` and of the list of words; see the modules."""

    def digest(value):
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

    assert digest({k: [t.prompt, t.max_new_tokens] for k, t in longbench.TASKS.items()}) == "13f5c97d2485049d"
    lengths = {name: 16 if name == "factrecall_en" else 64 for name in lveval.PROMPTS}
    assert digest({k: [p, lengths[k]] for k, p in lveval.PROMPTS.items()}) == "f025206f9611c1fa"
    assert digest(sorted(lveval.IGNORED)) == "b5ae950b453e6cdf"


def without(name):
    return {key: value for key, value in RECORD.items() if key != name}


@pytest.mark.parametrize(
    "lines, message",
    [
        ([RECORD, "{"], "Line 2 of '.*' is not JSON"),
        ([RECORD, "[1]"], r"Line 2 of '.*' is not a JSON object but '\[1\]'"),
        ([without("answers")], "Line 1 of '.*' has no field 'answers'; it has input, context"),
        ([without("_id")], "Line 1 of '.*' has no field '_id'"),
        ([RECORD | {"answers": "Ada"}], "field 'answers' must be a list of one text or more, got 'Ada'"),
        ([RECORD | {"answers": []}], "field 'answers' must be a list of one text or more"),
        ([RECORD | {"length": "5000"}], "field 'length' must be a whole number, got '5000'"),
        ([RECORD | {"context": None}], "field 'context' must be a text, got 'None'"),
        (
            [RECORD, RECORD | {"dataset": "squad"}],
            "Line 2 of '.*': LongBench has no dataset 'squad'. Known are narrat",
        ),
        ([RECORD | {"dataset": "musique_e"}], "LongBench has no dataset 'musique_e'"),
        ([RECORD | {"dataset": "vcsum"}], "Line 1 of '.*': LongBench scores 'vcsum' on words that jieba finds"),
        ([RECORD | {"dataset": "trec"}], "field 'all_classes' must list the classes, got None"),
        ([RECORD | {"dataset": "passage_retrieval_en"}], "Line 1 of '.*': A reference must name a paragraph"),
        ([""], "holds no record"),
    ],
)
def test_files_of_another_format(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        longbench.cases(write(tmp_path / "x.jsonl", *lines))


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"The file '.*nowhere\.jsonl' does not exist"):
        longbench.cases(tmp_path / "nowhere.jsonl")
    (tmp_path / "x.jsonl").write_bytes(json.dumps(RECORD).encode() + b"\n\xff\xfe\n")
    with pytest.raises(ValueError, match="is not UTF-8 text after line 0"):
        longbench.cases(tmp_path / "x.jsonl")


@pytest.fixture(scope="module")
def tokenizer():
    """One token per word, and one at the start."""
    vocabulary = {"<s>": 0, "?": 1} | {f"w{i}": i + 2 for i in range(50)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")


def test_cut_keeps_head_and_tail(tokenizer):
    """Of 21 tokens, the first of them special."""
    words = [f"w{i}" for i in range(20)]
    prompt = " ".join(words)
    assert cut_middle(prompt, tokenizer, None) == cut_middle(prompt, tokenizer, 21) == (prompt, 0)
    for max_length in (20, 8, 7, 2):
        half = max_length // 2
        expected = " ".join(words[: half - 1]) + " ".join(words[20 - half :])  # joined without a space, as published
        assert cut_middle(prompt, tokenizer, max_length) == (expected, 21 - 2 * half)


def test_cuts_are_recorded(tmp_path, tokenizer):
    context = " ".join(f"w{i % 50}" for i in range(200))
    record = RECORD | {"dataset": "trec", "all_classes": CLASSES, "context": context, "input": "w1 w2"}
    path = write(tmp_path / "trec.jsonl", record, record | {"context": "w1", "_id": "b2"})
    tokens = len(tokenizer(longbench.cases(path)[0].prompt)["input_ids"])
    long, short = longbench.cases(path, tokenizer, 100)
    assert long.details["tokens_cut"] == tokens - 100 and short.details["tokens_cut"] == 0
    assert long.prompt.endswith("w48 w49 w1 w2") and short.prompt.endswith("w1\nw1 w2")
    for arguments, message in (((None, 100), "needs the `tokenizer`"), ((tokenizer, 1), "at least 2 tokens, got 1")):
        with pytest.raises(ValueError, match=message):
            longbench.cases(path, *arguments)
        with pytest.raises(ValueError, match=message):
            lveval.cases(path, *arguments)


def on_hub(repo_id, archive, **members):
    """A public dataset with one zip file on the Hub of the tests."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        for name, record in members.items():
            zipped.writestr(f"data/{name}.jsonl", json.dumps(record) + "\n")
    repo = HUB.repos.setdefault(repo_id, Repo(private=False))
    HUB.blobs[git_oid(file.getvalue())] = file.getvalue()
    repo.commit("main", {archive: git_oid(file.getvalue())}, "data")


def test_names_are_looked_for_in_the_folder_then_on_the_hub(tmp_path):
    with pytest.raises(ValueError, match=r"'data.zip' of the Hub dataset 'THUDM/LongBench' cannot be downloaded \("):
        longbench.cases("longbench:hotpotqa")
    on_hub("THUDM/LongBench", "data.zip", hotpotqa=RECORD, hotpotqa_e=RECORD | {"length": 1, "_id": "e"})
    (case,) = longbench.cases("longbench:hotpotqa", folder=tmp_path)
    assert (case.id, case.group) == ("a1", "hotpotqa")
    (case,) = longbench.cases("longbench:hotpotqa_e")
    assert (case.id, case.group) == ("e", "0-4k")
    with pytest.raises(ValueError, match=r"'data.zip' of the Hub dataset 'THUDM/LongBench' holds no 'trec.jsonl'"):
        longbench.cases("longbench:trec")
    asked = len(HUB.requests)
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "hotpotqa.jsonl", RECORD | {"_id": "here"})
    assert longbench.cases("longbench:hotpotqa", folder=tmp_path)[0].id == "here"
    for name, message in (("squad", "LongBench has no dataset 'squad'"), ("dureader", "jieba")):
        with pytest.raises(ValueError, match=message):
            longbench.cases(f"longbench:{name}")
    assert len(HUB.requests) == asked


LV = {
    "input": "When?",
    "context": "Text.",
    "answers": ["in the year 1905", "never read"],
    "length": 16000,
    "dataset": "loogle_SD_mixup",
    "language": "en",
    "answer_keywords": "1905",
    "confusing_facts": None,
}


def test_lveval_cases(tmp_path):
    (case,) = lveval.cases(write(tmp_path / "loogle_SD_mixup_32k.jsonl", LV))
    assert (case.id, case.group, case.max_new_tokens, case.chat) == ("loogle_SD_mixup-1", "32k", 64, True)
    assert case.references == ("in the year 1905",)  # the first alone, as published
    assert case.prompt.endswith("Question: When?\nAnswer:") and "Article: Text.\n" in case.prompt
    assert case.details == {"dataset": "loogle_SD_mixup", "length": 16000, "keywords": "1905", "tokens_cut": 0}
    assert case.metric("In the year 1905.", case) == 1
    assert case.metric("in the year", case) == 0
    fact = {k: v for k, v in LV.items() if k != "answer_keywords"} | {"dataset": "factrecall_en_64k"}
    (case,) = lveval.cases(write(tmp_path / "x.jsonl", fact))  # the length of the field, where the file says none
    assert (case.id, case.group, case.max_new_tokens) == ("factrecall_en-1", "64k", 16)
    assert case.metric("in the year", case) == pytest.approx(2 * 2 / (2 + 3))
    on_hub("Infinigence/LVEval", "loogle_SD_mixup.zip", loogle_SD_mixup_16k=LV)
    assert lveval.cases("lveval:loogle_SD_mixup_16k")[0].group == "16k"


@pytest.mark.parametrize(
    "answer, keywords, expected",
    [
        ("for the music", "services to music", 2 * 2 / (2 + 4)),  # 1 of 3 keywords, then F1 with "for" in it
        ("to services", "to be or not is", 0),  # 0 of 5: "to" counts among the keywords and is never found
        ("services", "services b c d e", 2 * 1 / (1 + 4)),  # 1 of 5 is enough
        ("services", "services b c d e f", 0),
        ("services", None, 2 * 1 / (1 + 4)),
        ("services", "the", 2 * 1 / (1 + 4)),  # no keyword is left
        ("", "music", 0),
    ],
)
def test_keyword_f1(answer, keywords, expected):
    assert score(lveval.keyword_f1, answer, "for services to music", keywords=keywords) == pytest.approx(expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dataset": "cmrc_mixup"}, "Line 1 of '.*': LV-Eval scores 'cmrc_mixup' on words that jieba finds"),
        ({"dataset": "hotpotqa"}, "LV-Eval has no dataset 'hotpotqa'. Known are hotpotwikiqa_mixup, loogle_SD_mixup"),
        ({"answer_keywords": ["1905"]}, "field 'answer_keywords' must be a text or null, got"),
        ({}, "neither the file's name nor field 'dataset' .'loogle_SD_mixup'. says which length this is"),
        ({"answers": None}, "Line 1 of '.*': field 'answers' must be a list of one text or more"),
    ],
)
def test_lveval_errors(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        lveval.cases(write(tmp_path / "x.jsonl", LV | change))


def test_lveval_names():
    with pytest.raises(ValueError, match="lacks the length: lveval:factrecall_en_16k, lveval:factrecall_en_32k"):
        lveval.cases("lveval:factrecall_en")
    with pytest.raises(ValueError, match="LV-Eval has no dataset 'factrecall_en_8k'"):
        lveval.cases("lveval:factrecall_en_8k")

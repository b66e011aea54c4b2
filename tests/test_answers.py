"""Answering cases: batches equal single prompts, interrupted runs go on to the same answers, long cases are skipped;
and scores with their intervals.

The model is random, so answers mean nothing; they differ from case to case, and a wrong token would show.
"""

import json
from dataclasses import replace

import pytest
import torch
from conftest import lossy, make_model
from transformers import AutoTokenizer, DynamicCache

from cskv_hf import CSKVCache
from cskv_hf.demo import MODEL_PATH
from cskv_hf.evaluate.answers import answer_cases
from cskv_hf.evaluate.cases import Answer, Case, Score, sample, summarize

TEXT = "the value of an object is what its class says and nothing else can change that in any way"
WORDS = TEXT.split()


def share_of_vowels(answer, case):
    return sum(letter in "aeiou" for letter in answer.lower()) / max(1, len(answer))


def case(number, group="short", words=20, **settings):
    """Prompts of different words and lengths."""
    prompt = " ".join(WORDS[(number * (i + 1) + i) % len(WORDS)] for i in range(words + number))
    return Case(str(number), group, prompt, ("",), share_of_vowels, **{"max_new_tokens": 12} | settings)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_PATH)


@pytest.fixture(scope="module")
def model():
    return lossy(make_model(vocab_size=2048))


CASES = [case(3), case(1), case(4, "long", 60), case(0, max_new_tokens=5), case(2), case(5, "long", 70), case(6)]


class Interrupted(Exception):
    pass


class Caches:
    """Makes caches, counts them, and fails after `allowed`."""

    def __init__(self, cache_class=CSKVCache, allowed=100):
        self.cache_class, self.allowed, self.made = cache_class, allowed, 0

    def __call__(self):
        if self.made == self.allowed:
            raise Interrupted
        self.made += 1
        return self.cache_class()


def answers_of(model, tokenizer, cases=CASES, make_cache=CSKVCache, **settings):
    return answer_cases(model, tokenizer, cases, make_cache, **{"batch_size": 2, "progress": False} | settings)


@pytest.mark.parametrize("cache_class", [CSKVCache, DynamicCache])
@torch.no_grad()
def test_a_batch_answers_as_single_prompts_do(model, tokenizer, cache_class):
    """In float64 padding changes no greedy token; each answer is that of `generate` on the prompt alone."""
    answers = answers_of(model, tokenizer, make_cache=cache_class, batch_size=3)
    assert [(a.id, a.group) for a in answers] == [(c.id, c.group) for c in CASES]
    for answer, one in zip(answers, CASES):
        ids = tokenizer(one.prompt, return_tensors="pt")["input_ids"]
        output = model.generate(
            ids, past_key_values=cache_class(), max_new_tokens=one.max_new_tokens, do_sample=False, pad_token_id=0
        )
        text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer.text == text and answer.prompt_tokens == ids.shape[1]
        assert answer.score == share_of_vowels(text, one)
    assert len({answer.text for answer in answers}) > 1


def test_stop(model, tokenizer):
    for one, answer in zip(CASES, answers_of(model, tokenizer)):
        stop = answer.text[len(answer.text) // 2]
        (stopped,) = answers_of(model, tokenizer, [replace(one, stop=stop)])
        assert stopped.text == answer.text.split(stop)[0]


def test_an_interrupted_run_goes_on(model, tokenizer, tmp_path):
    """The answers and even the file are those of a run in one go, and no batch is answered twice."""
    whole = answers_of(model, tokenizer, path=tmp_path / "whole.jsonl")
    path, caches = tmp_path / "folder" / "parts.jsonl", Caches(allowed=1)
    with pytest.raises(Interrupted):
        answers_of(model, tokenizer, make_cache=caches, path=path)
    assert len(path.read_text().splitlines()) == 1 + 2
    rest = Caches()
    assert answers_of(model, tokenizer, make_cache=rest, path=path) == whole
    assert caches.made + rest.made == 4
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert answers_of(model, tokenizer, make_cache=Caches(allowed=0), path=path) == whole


@pytest.mark.parametrize("cut", [3, 150, 0.5, 0.9, -1])
def test_a_last_line_that_was_cut_short(model, tokenizer, tmp_path, cut):
    """Wherever writing stopped, in the header, in a line or right before its end, the run goes on."""
    path = tmp_path / "answers.jsonl"
    whole = answers_of(model, tokenizer, path=path)
    content = path.read_bytes()
    path.write_bytes(content[: int(cut * len(content)) if isinstance(cut, float) else cut])
    assert answers_of(model, tokenizer, path=path) == whole
    assert answers_of(model, tokenizer, make_cache=Caches(allowed=0), path=path) == whole


def test_answers_under_other_settings_are_refused(model, tokenizer, tmp_path):
    path = tmp_path / "answers.jsonl"
    answers_of(model, tokenizer, path=path, settings={"adapter": "a", "bits": (2, 3)})
    content = path.read_bytes()
    same = dict(make_cache=Caches(allowed=0), path=path)
    answers_of(model, tokenizer, settings={"adapter": "a", "bits": [2, 3]}, **same)
    for others in (
        {"settings": {"adapter": "b", "bits": [2, 3]}},
        {"settings": {"adapter": "a", "bits": [2, 3]}, "batch_size": 3},
        {"settings": {"adapter": "a", "bits": [2, 3]}, "cases": CASES[:3]},
    ):
        with pytest.raises(ValueError, match=r"answers\.jsonl' holds answers under other settings") as error:
            answers_of(model, tokenizer, **same | others)
        assert ("`settings.adapter` 'a' there, 'b' here" in str(error.value)) == (len(others) == 1)
    assert path.read_bytes() == content
    lines = content.decode().splitlines(keepends=True)
    path.write_text(lines[0] + '{"id": 3}\n' + "".join(lines[2:]))
    with pytest.raises(ValueError, match=r"Line 2 of '.*answers\.jsonl' is not an answer; remove the file"):
        answers_of(model, tokenizer, settings={"adapter": "a", "bits": [2, 3]}, **same)


def test_long_cases_are_skipped(model, tokenizer, tmp_path):
    """Prompt and answer must fit into the model's context: one token less and the case is answered."""
    limit, size = model.config.max_position_embeddings, len(tokenizer(CASES[0].prompt)["input_ids"])
    cases = [replace(case(7), max_new_tokens=2000), CASES[1], replace(CASES[0], max_new_tokens=limit - size + 1)]
    for _ in range(2):
        answers = answers_of(model, tokenizer, cases, path=tmp_path / "answers.jsonl")
        assert [answer.text is None for answer in answers] == [True, False, True]
        assert answers[2] == Answer("3", "short", None, None, size)
        assert [(s.group, s.total, s.skipped) for s in summarize(answers)] == [("short", 1, 2)]
    assert len(json.loads((tmp_path / "answers.jsonl").read_text().splitlines()[1])["text"]) > 0
    fits = replace(CASES[0], max_new_tokens=limit - size, stop=answers_of(model, tokenizer, [CASES[0]])[0].text[:1])
    assert answers_of(model, tokenizer, [fits])[0].text == ""


def test_ids_are_unique(model, tokenizer):
    with pytest.raises(ValueError, match="Two cases share the id '1'"):
        answers_of(model, tokenizer, [case(1), case(2), case(1)])
    answers_of(model, tokenizer, [case(1), case(1, "other")])  # ids count within a group


def answers(group, *scores):
    return [Answer(str(i), group, None if s is None else "", s, 5) for i, s in enumerate(scores)]


def test_summarize():
    """Wilson's interval by hand: 8 of 10 gives 0.490 to 0.943, 10 of 10 gives 0.722 to 1."""
    scores = summarize(
        answers("b", *8 * [1.0], 0.0, 0.0)
        + answers("a", *10 * [1.0], None)
        + answers("shares", 0.0, 0.25, 0.5, 0.75, 1.0)
        + answers("equal", 0.5, 0.5)
        + answers("none", None, None)
    )
    assert [score.group for score in scores] == ["b", "a", "shares", "equal", "none"]
    b, a, shares, equal, none = scores
    assert (b.value, b.total, b.skipped) == (0.8, 10, 0)
    assert (b.low, b.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert (a.value, a.total, a.skipped) == (1.0, 10, 1)
    assert a.high == pytest.approx(1.0) and a.low == pytest.approx(0.7225, abs=1e-4)
    # 5 values with a standard deviation of 0.354 over sqrt(5) = 0.158: near 0.5 ± 1.96 * 0.158, in steps of 0.05
    assert shares.value == 0.5 and abs(shares.low - 0.19) < 0.07 and abs(shares.high - 0.81) < 0.07
    assert (equal.value, equal.low, equal.high) == (0.5, None, None)  # too few for an interval
    assert none == Score("none", None, None, None, 0, 2)


def test_sample():
    cases = [case(i, group) for i in range(10) for group in ("x", "y")]
    kept = sample(cases, 3)
    assert kept == sample(cases, 3) != sample(cases, 3, seed=1)
    assert [c for c in cases if c in kept] == kept
    assert [sum(c.group == group for c in kept) for group in ("x", "y")] == [3, 3]
    assert sample(cases, None) == cases == sample(cases, 10)

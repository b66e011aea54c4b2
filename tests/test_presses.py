"""The script that measures kvpress: its own copies of our rules, and its loop over a cache that lost tokens. The
presses themselves need another environment, which the tests do not have."""

import contextlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from conftest import make_model, prompt
from transformers import DynamicCache

import cskv_hf
from cskv_hf.demo.run import evaluation_records, load_bundled
from cskv_hf.evaluate import intervals, lines
from cskv_hf.evaluate.format import text_tables
from cskv_hf.generation import cache_given
from cskv_hf.model_shape import ModelShape
from cskv_hf.report.data import read_results

SPEC = importlib.util.spec_from_file_location("presses", Path(__file__).parent.parent / "benchmarks" / "presses.py")
presses = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(presses)


class Holes:
    """A press that drops the tokens of `holes`, as kvpress does it: in a hook, after the layer's attention."""

    def __init__(self, holes: range) -> None:
        self.holes = holes

    @contextlib.contextmanager
    def __call__(self, model):
        hooks = [x.self_attn.register_forward_hook(self._drop, with_kwargs=True) for x in model.model.layers]
        yield
        for hook in hooks:
            hook.remove()

    def _drop(self, module, args, kwargs, output):
        layer = cache_given(kwargs).layers[module.layer_idx]
        kept = [i for i in range(layer.keys.shape[2]) if i not in self.holes]
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]


def test_rules_are_those_of_the_package():
    """Answers are scored, and intervals computed, as `cskv eval` does it."""
    for total in (1, 7, 240):
        for correct in {0, 1, total // 2, total}:
            assert presses.wilson_interval(correct, total) == intervals.wilson_interval(correct, total)
    for answer in (
        "line 23-571: REGISTER_CONTENT is <41235>",
        "41235",
        "41235, no 12345",
        "",
        "none",
        "\n41235",
        "<412",
    ):
        assert presses.is_correct(answer, "41235") == lines.is_correct(answer, "41235")


def test_ratio_keeps_the_tokens_that_are_wanted():
    """Whichever way a press rounds."""
    for length in (1, 64, 225, 901, 1024):
        for tokens in range(1, length + 1):
            kept = length * (1 - presses.ratio_that_keeps(tokens, length))
            assert int(kept) == tokens == min(round(kept), length)


def test_step_over_dropped_tokens_is_attention_with_these_masked():
    """What follows stays at its positions: the reference masks the dropped tokens, for what came after the prefill
    only, in one forward over everything."""
    model, ids, holes = make_model(), prompt(2, 40), range(7, 19)
    half = 30
    cache = presses.prefill(model, ids[:, :half], lambda length, asked: Holes(holes))
    assert {layer.keys.shape[2] for layer in cache.layers} == {half - len(holes)}
    with torch.no_grad():
        stepped = torch.stack([presses.step(model, cache, ids[:, i], i) for i in range(half, 40)], dim=1)
        visible = torch.ones(40, 40).tril().bool()
        visible[half:, list(holes)] = False
        mask = torch.zeros(2, 1, 40, 40, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
        wanted = model(input_ids=ids, attention_mask=mask).logits[:, half:]
    torch.testing.assert_close(stepped, wanted, rtol=1e-9, atol=1e-9)


def test_bytes_are_those_of_the_tokens_left(monkeypatch):
    monkeypatch.setattr(presses, "CONTEXT", 40)
    model, labels = make_model(), presses.labels_of("Holes", 0.25)
    sizes = presses.cache_sizes(model, prompt(2, 40), lambda length, asked: Holes(range(5, 15)), labels)
    full = (
        2
        * 2
        * sum(layer.keys.shape[1] * layer.keys.shape[3] for layer in presses.prefill(model, prompt(1, 4), None).layers)
    )
    assert sizes["cache_bytes"] == 30 * full and sizes["cache_share"] == 0.75
    assert sizes["bytes_per_token"] == 0.75 * full


def test_answers_of_unlike_questions_are_those_of_generate():
    """Questions of several lengths share a batch without padding, and each is answered as alone."""
    model, tokenizer = load_bundled()
    record = evaluation_records(1, 8, 25)[0]
    context = tokenizer(record.text, return_tensors="pt")["input_ids"]
    questions = [tokenizer(text)["input_ids"] for text in (record.question(0), "line 2", record.question(1), "\n")]
    cache = presses.prefill(model, context, None)
    cache.batch_repeat_interleave(len(questions))
    answers = presses.continue_greedily(model, tokenizer, cache, questions, context.shape[1])
    for question, answer in zip(questions, answers):
        alone = model.generate(
            torch.cat([context, torch.tensor([question])], dim=1), past_key_values=DynamicCache(), do_sample=False,
            max_new_tokens=presses.MAX_NEW_TOKENS, stop_strings="\n", tokenizer=tokenizer,
        )[0, context.shape[1] + len(question) :]  # fmt: skip
        assert tokenizer.decode(alone).split("\n")[0] == answer
    assert len({len(question) for question in questions}) > 2


def test_full_cache_has_as_many_right_as_the_package(tmp_path, monkeypatch):
    """Through the file of cases: the two commands agree about the full cache."""
    monkeypatch.setattr("cskv_hf.evaluate.bundled.NUM_LINES", (25,))
    presses.write_cases(tmp_path / "cases.json", 2)
    cases = presses.read_cases(tmp_path / "cases.json")
    model, tokenizer = presses.load(presses.BUNDLED)
    right = presses.answer_records(model, tokenizer, cases["records"], None, False)
    known = presses.answer_records(model, tokenizer, cases["records"], None, True)
    assert right == known and {group: sum(r) for group, r in right.items()} == cases["full_correct"]
    presses.check_against({"25 lines": sum(right["25 lines"])}, cases["full_correct"])
    with pytest.raises(ValueError, match="not the same"):
        presses.check_against({"25 lines": 0}, cases["full_correct"])


def test_cskv_in_the_place_of_a_press(tmp_path, monkeypatch):
    """Factors of full rank lose nothing: answers and second halves are the full cache's, number by number."""
    monkeypatch.setattr("cskv_hf.evaluate.bundled.NUM_LINES", (25,))
    presses.write_cases(tmp_path / "cases.json", 1)
    cases = presses.read_cases(tmp_path / "cases.json")
    model, tokenizer = presses.load(presses.BUNDLED)
    text = torch.tensor(cases["text"])[:1, :192]
    right = presses.answer_records(model, tokenizer, cases["records"], None, False)
    full = presses.second_halves(model, text, None)
    config = cskv_hf.CSKVConfig(key_rank=128, value_rank=128)
    own = cskv_hf.fit(model, [text], config, progress=False).get_base_model()
    assert isinstance(presses.prefill(own, text, presses.own_cache), cskv_hf.CSKVCache)
    assert presses.answer_records(own, tokenizer, cases["records"], presses.own_cache, False) == right
    torch.testing.assert_close(presses.second_halves(own, text, presses.own_cache), full, atol=1e-3, rtol=1e-3)


def test_what_is_not_a_file_of_cases_or_of_these_results_is_refused(tmp_path):
    path = tmp_path / "other.json"
    with pytest.raises(ValueError, match="cannot be read"):
        presses.read_cases(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a file of cases"):
        presses.read_cases(path)
    path.write_text('{"settings": {"records": 2}, "rows": []}')
    assert presses.earlier_rows(path, {"records": 2}) == [] == presses.earlier_rows(tmp_path / "new", {})
    with pytest.raises(ValueError, match="other settings"):
        presses.earlier_rows(path, {"records": 3})


def test_a_report_and_a_terminal_read_the_results():
    path = Path(presses.__file__).parent / "results" / "kvpress-bundled.json"
    shape = ModelShape.from_model_config(load_bundled()[0].config)
    rows = read_results(path, shape)["rows"]
    assert {row["table"] for row in rows} == {"methods"} and len({row["method"] for row in rows}) == 9
    assert "80 % SnapKV" in text_tables(json.loads(path.read_text(encoding="utf-8"))["rows"])

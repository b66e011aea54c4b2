"""lm-evaluation-harness through a compressed cache, on tasks and models that the tests write; nothing downloaded."""

import functools
import json
import random
import subprocess
import sys

import pytest
import torch
from conftest import lossless, lossy, make_model
from reference import Reference
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import cskv_hf
import cskv_hf.evaluate.lm_eval as runs
from cskv_hf import CSKVCache
from cskv_hf.evaluate.fingerprint import fingerprint
from cskv_hf.evaluate.lm_eval import format_results, plain_results, run_lm_eval
from cskv_hf.evaluate.lm_eval_model import CSKVLM

CASES = 6
CHOICE = """
task: tiny_choice
output_type: multiple_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1.0}}
"""
GENERATE = """
task: tiny_write
output_type: generate_until
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{until: ["w80"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
metadata: {{version: 1.0}}
"""
ROLLING = """
task: tiny_text
output_type: loglikelihood_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}]
metadata: {{version: 1.0}}
"""

RULER = """
task: tiny_ruler
dataset_path: ""
dataset_name: ""
output_type: generate_until
test_split: test
custom_dataset: !function tiny_ruler.texts
process_results: !function tiny_ruler.process_results
doc_to_text: "{{input}}"
doc_to_target: "{{outputs}}"
generation_kwargs: {until: [], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: "4096", aggregation: !function tiny_ruler.aggregate, higher_is_better: true}
  - {metric: "32", aggregation: !function tiny_ruler.aggregate, higher_is_better: true}
tag: [tiny_long]
metadata: {version: 1.0}
"""
RULERS = """
group: tiny_rulers
task: [tiny_ruler]
aggregate_metric_list: [{metric: "4096", weight_by_size: false}, {metric: "32", weight_by_size: false}]
metadata: {version: 1}
"""
RULER_CODE = """
import datasets
from transformers import AutoTokenizer

def texts(max_seq_lengths, pretrained=None, tokenizer=None, **kwargs):
    words = AutoTokenizer.from_pretrained(tokenizer or pretrained)
    docs = [
        {"input": words.decode([5 + i] * (length - 4)), "outputs": ["w7"], "max_length": length}
        for i, length in enumerate(max_seq_lengths)
    ]
    return {"test": datasets.Dataset.from_list(docs)}

def process_results(doc, results):
    return {"4096": -1.0, str(doc["max_length"]): float("w7" in results[0])}

def aggregate(values):
    found = [v for v in values if v != -1]
    return sum(found) / len(found) if found else -1
"""


def words(rng, count):
    return " ".join(f"w{rng.randrange(3, 89)}" for _ in range(count))


@pytest.fixture
def own_tasks_only(monkeypatch):
    """The harness reads 13,000 files of its own tasks anew for every run, which takes seconds."""
    monkeypatch.setattr(runs, "TaskManager", functools.partial(runs.TaskManager, include_defaults=False))


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 89)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three tasks of `CASES` cases; prompts of 25 to 40 words, most of which a window of 8 has left."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(0)
    data = folder / "data.jsonl"
    cases = [
        {
            "question": words(rng, rng.randint(25, 40)),
            "choices": [words(rng, rng.randint(1, 12)) for _ in range(4)],
            "gold": rng.randrange(4),
            "answer": words(rng, 3),
        }
        for _ in range(CASES)
    ]
    data.write_text("".join(json.dumps(case) + "\n" for case in cases))
    for name, text in (("choice", CHOICE), ("write", GENERATE), ("text", ROLLING)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return folder


def requests(folder, kind="choice"):
    cases = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    if kind == "text":
        return [Instance("loglikelihood_rolling", {}, (case["question"],), 0) for case in cases]
    if kind == "write":
        until = {"until": ["w80"], "max_gen_toks": 8, "do_sample": False}
        return [Instance("generate_until", {}, (case["question"], dict(until)), 0) for case in cases]
    return [
        Instance("loglikelihood", {}, (case["question"], f" {choice}"), i)
        for case in cases
        for i, choice in enumerate(case["choices"])
    ]


def close(actual, expected, tolerance=1e-8):
    """Equal to rounding: sums of up to 40 log-probabilities in float64."""
    for ours, theirs in zip(actual, expected, strict=True):
        if isinstance(theirs, tuple):
            assert ours == (pytest.approx(theirs[0], abs=tolerance), theirs[1])
        else:
            assert ours == pytest.approx(theirs, abs=tolerance)


def differ(actual, other):
    first = [[v[0] if isinstance(v, tuple) else v for v in values] for values in (actual, other)]
    return all(abs(a - b) > 1e-4 for a, b in zip(*first, strict=True))


@pytest.mark.parametrize("cache", ["full", "cskv"])
def test_lossless_equals_the_harness(cache, tokenizer, folder):
    """With nothing lost, our steps of 8 tokens and the harness's one forward are the same sums; so are the texts."""
    model = lossless(make_model())
    theirs = HFLM(model, tokenizer=tokenizer, batch_size=3, max_length=35)  # shorter than some requests
    ours = CSKVLM(model, tokenizer=tokenizer, batch_size=4, max_length=35, cache=cache, stride=8)
    close(ours.loglikelihood(requests(folder)), theirs.loglikelihood(requests(folder)))
    texts = requests(folder, "text")
    close(ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts))
    written = requests(folder, "write")
    assert ours.generate_until(written) == theirs.generate_until(written)


def test_full_cache_ignores_the_adapter(tokenizer, folder):
    model = lossy(make_model())
    ours = CSKVLM(model, tokenizer=tokenizer, batch_size=4, cache="full", stride=8)
    theirs = HFLM(model.unload(), tokenizer=tokenizer, batch_size=4)
    expected = theirs.loglikelihood(requests(folder))
    close(CSKVLM(theirs.model, tokenizer=tokenizer, cache="full").loglikelihood(requests(folder)), expected)
    ours._model = lossy(theirs.model)
    close(ours.loglikelihood(requests(folder)), expected)


def test_float32_model(tokenizer, folder):
    """Scores of float32 models agree to 1e-3 nats: sums of 12 terms of about 5, each exact to 1e-5 or so."""
    model = lossless(make_model(dtype=torch.float32))
    ours = CSKVLM(model, tokenizer=tokenizer, batch_size=4, stride=8)
    expected = HFLM(model, tokenizer=tokenizer, batch_size=4).loglikelihood(requests(folder))
    assert [v for v, _ in ours.loglikelihood(requests(folder))] == pytest.approx([v for v, _ in expected], abs=1e-3)


def test_lossy_equals_the_definition(tokenizer, folder):
    """The harness's own scores are those of exact keys; ours are those of the slow reference, token by token."""
    model, asked = lossy(make_model()), requests(folder)[:2]
    ours = CSKVLM(model, tokenizer=tokenizer, batch_size=3, stride=1).loglikelihood(asked)
    expected = []
    for request in asked:
        context, continuation = (torch.tensor(tokenizer.encode(text)) for text in request.args)
        reference = Reference(model.get_base_model(), "default", 8, 3, 4)
        logits = torch.cat([reference.forward(t) for t in torch.cat([context, continuation])[:-1].split(1)])
        scores = logits[-len(continuation) :].log_softmax(-1)
        value = float(scores.gather(1, continuation[:, None]).sum())
        expected.append((value, bool((scores.argmax(-1) == continuation).all())))
    close(ours, expected)
    harness = HFLM(model, tokenizer=tokenizer, batch_size=3)
    assert differ(ours, harness.loglikelihood(asked))
    texts = requests(folder, "text")
    rolling = CSKVLM(model, tokenizer=tokenizer, batch_size=4, stride=1).loglikelihood_rolling(texts)
    assert differ(rolling, harness.loglikelihood_rolling(texts))
    reference = Reference(model.get_base_model(), "default", 8, 3, 4)
    tokens = torch.tensor([1, *tokenizer.encode(texts[0].args[0])])
    logits = torch.cat([reference.forward(t) for t in tokens[:-1].split(1)])
    assert rolling[0] == pytest.approx(float(logits.log_softmax(-1).gather(1, tokens[1:, None]).sum()), abs=1e-8)


def test_generation_reads_the_cache_that_is_asked_for(tokenizer, folder):
    """A padded batch writes what each prompt alone makes generate() write with that cache."""
    model, asked = lossy(make_model(), compression=0.8), requests(folder, "write")
    model.get_base_model().generation_config.eos_token_id = 2  # else the harness stops at it only in batches of one
    written = {}
    for cache in ("cskv", "full", "window"):
        lm = CSKVLM(model, tokenizer=tokenizer, batch_size=4, cache=cache)
        written[cache] = lm.generate_until(asked)
        for request, text in zip(asked, written[cache]):
            ids = tokenizer(request.args[0], return_tensors="pt", return_token_type_ids=False)["input_ids"]
            output = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, cache=lm.make_cache)
            expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            assert text == expected.split("w80")[0]
    assert len({tuple(texts) for texts in written.values()}) == 3
    assert CSKVLM(model, tokenizer=tokenizer).generate_until(asked) == written["cskv"]


def test_changing_rope_is_not_padded(tokenizer, folder):
    """Dynamic RoPE turns all rows by the longest one's length; rows of other lengths are kept apart."""
    model = lossy(make_model("llama-dynamic"))
    settings = dict(tokenizer=tokenizer, stride=8, max_length=100)
    alone, together = (CSKVLM(model, batch_size=n, **settings).loglikelihood(requests(folder)) for n in (1, 8))
    close(together, alone)


def test_run(tokenizer, folder, tmp_path, request):
    """A whole run from a saved adapter; values are those of the requests, scored by hand."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make_model(dtype=torch.float32).save_pretrained(base)
    tokenizer.save_pretrained(base)
    from transformers import AutoModelForCausalLM

    model = lossy(AutoModelForCausalLM.from_pretrained(base))
    model.save_pretrained(adapter)
    tasks = "tiny_choice,tiny_write,tiny_text"
    settings = dict(include_path=folder, batch_size=4, stride=8, device="cpu", bootstrap_iters=100)
    ours = run_lm_eval(adapter, tasks, **settings)
    json.dumps(ours)
    assert (ours["cache"], ours["stride"], ours["lm_eval"]) == ("cskv", 8, lm_eval.__version__)
    assert [(r["task"], r["metric"], r["n"]) for r in ours["results"]] == [
        ("tiny_choice", "acc", CASES),
        ("tiny_choice", "acc_norm", CASES),
        ("tiny_write", "exact_match", CASES),
        ("tiny_text", "word_perplexity", CASES),
    ]
    scores = [v for v, _ in CSKVLM(model, tokenizer=tokenizer, stride=8).loglikelihood(requests(folder))]
    cases = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    right = [max(range(4), key=lambda i: scores[4 * n + i]) == case["gold"] for n, case in enumerate(cases)]
    assert ours["results"][0]["value"] == pytest.approx(sum(right) / CASES)
    texts = sum(CSKVLM(model, tokenizer=tokenizer, stride=8).loglikelihood_rolling(requests(folder, "text")))
    count = sum(len(case["question"].split()) for case in cases)
    expected = float(torch.tensor(-texts / count, dtype=torch.float64).exp())
    assert ours["results"][3]["value"] == pytest.approx(expected, rel=1e-5)

    request.getfixturevalue("own_tasks_only")
    by_peft = run_lm_eval(base, tasks.split(","), peft=adapter, **settings)
    assert by_peft["results"] == ours["results"]
    full = run_lm_eval(base, "tiny_t*", cache="full", **settings)
    window = run_lm_eval(model, ["tiny_text"], cache="window", tokenizer=tokenizer, **settings)
    perplexities = [run["results"][-1]["value"] for run in (full, ours, window)]
    assert len({round(p, 3) for p in perplexities}) == 3
    table = format_results(full, ours, window)
    assert max(map(len, table.splitlines())) <= 80
    assert [line.split()[2] for line in table.splitlines() if "tiny_text" in line] == ["full", "cskv", "window"]
    limited = run_lm_eval(adapter, "tiny_choice", limit=2, **settings)
    assert [r["n"] for r in limited["results"]] == [2, 2] and limited["limit"] == 2


def test_adapter_with_its_own_tokenizer_from_the_hub(tokenizer, folder, tmp_path):
    """`pretrained` may be a Hub id of an adapter and have a revision of its own, which the base model has not."""
    make_model(dtype=torch.float32).save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    model = lossy(AutoModelForCausalLM.from_pretrained(tmp_path))
    model.get_base_model().push_to_hub("ada/lm-eval-base")
    adapter = "ada/lm-eval-adapter"
    cskv_hf.push_to_hub(model, adapter, base_model="ada/lm-eval-base", revision="strong", license="mit")
    tokenizer.push_to_hub(adapter, revision="strong")
    lm = CSKVLM(adapter, revision="strong", stride=8, batch_size=4, device="cpu")
    assert lm.tokenizer.get_vocab() == tokenizer.get_vocab()
    expected = CSKVLM(model, tokenizer=tokenizer, stride=8, batch_size=4).loglikelihood(requests(folder))
    close(lm.loglikelihood(requests(folder)), expected, tolerance=1e-4)


def test_an_interrupted_run_goes_on(tokenizer, folder, tmp_path, monkeypatch, own_tasks_only):
    """Responses that a run had before it stopped are not asked for again, and the results are the same."""
    from cskv_hf.evaluate import lm_eval_model

    model, calls = lossy(make_model()), []

    def counted(model, rows, *args, **kwargs):
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        calls.append(len(rows))
        return score_rows(model, rows, *args, **kwargs)

    score_rows = lm_eval_model.score_rows
    monkeypatch.setattr(lm_eval_model, "score_rows", counted)
    settings = dict(include_path=folder, batch_size=4, stride=8, tokenizer=tokenizer, bootstrap_iters=100)
    tasks = ["tiny_choice", "tiny_text"]
    stop_at = None
    expected = run_lm_eval(model, tasks, **settings)["results"]
    whole = len(calls)
    for stop in (3, whole - 1):  # in the first task, then in the second
        calls, stop_at = [], stop
        with pytest.raises(KeyboardInterrupt):
            run_lm_eval(model, tasks, use_cache=tmp_path / f"responses{stop}", **settings)
        calls, stop_at = [], None
        assert run_lm_eval(model, tasks, use_cache=tmp_path / f"responses{stop}", **settings)["results"] == expected
        assert 0 < len(calls) <= whole - stop
        calls = []
        assert run_lm_eval(model, tasks, use_cache=tmp_path / f"responses{stop}", **settings)["results"] == expected
        assert calls == []
    other = run_lm_eval(model, tasks, use_cache=tmp_path / "responses3", cache="full", **settings)["results"]
    assert calls and other[-1]["value"] != expected[-1]["value"]  # its responses are not taken for the other's


def test_fingerprint():
    """The same for the same model, another for other weights, factors, window or length."""
    model = lossy(make_model())
    first = fingerprint(model, 100)
    assert fingerprint(lossy(make_model()), 100) == first != fingerprint(model, 99)
    changed = [lossy(make_model(seed=1)), lossy(make_model(), window=9), lossy(make_model(), init="svd")]
    assert len({first, *(fingerprint(m, 100) for m in changed), fingerprint(make_model(), 100)}) == 5


def test_errors_come_first(tokenizer, folder, tmp_path, own_tasks_only):
    model, plain = lossy(make_model()), make_model()
    for tasks, message in (
        ("tiny_choise", "knows no task 'tiny_choise'; did you mean tiny_choice.* `include_path`"),
        ([], "`tasks` names no task"),
    ):
        with pytest.raises(ValueError, match=message):
            run_lm_eval(model, tasks, include_path=folder, tokenizer=tokenizer)
    for arguments, message in (
        ({"cache": "dynamic"}, "`cache` must be one of cskv, full, window, got 'dynamic'"),
        ({"stride": 0}, "`stride` must be a whole number of at least 1, got 0"),
        ({"batch_size": "auto"}, "`batch_size` must be a whole number of at least 1, got 'auto'"),
        ({"peft": "x"}, "`peft`='x' is for a base model by name"),
    ):
        with pytest.raises(ValueError, match=message):
            CSKVLM(model, tokenizer=tokenizer, **arguments)
    with pytest.raises(ValueError, match="has no CSKV adapter in use"):
        CSKVLM(plain, tokenizer=tokenizer)
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is not a CSKV adapter. Give an adapter, or one by `peft=`"):
        CSKVLM(tmp_path)


@pytest.fixture
def ruler(tmp_path, monkeypatch):
    """A task like RULER's: it makes its texts by the tokenizer it is told of, and says -1 of lengths without text."""
    folder = tmp_path / "ruler"
    folder.mkdir()
    for name, text in (("tiny_ruler.yaml", RULER), ("tiny_rulers.yaml", RULERS), ("tiny_ruler.py", RULER_CODE)):
        (folder / name).write_text(text)
    monkeypatch.setattr(runs, "RULER", folder)
    monkeypatch.setattr(runs, "RULER_NEEDS", ())
    return folder


def test_ruler(tokenizer, ruler, tmp_path, own_tasks_only):
    """Through an adapter without a tokenizer of its own; lengths with their own number of cases, and no -1."""
    make_model(dtype=torch.float32).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    lossy(AutoModelForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    settings = dict(include_path=ruler, device="cpu", bootstrap_iters=0)
    for asked in ("tiny_ruler", "tiny_rulers", "tiny_long"):
        run = run_lm_eval(tmp_path / "adapter", asked, metadata={"max_seq_lengths": [32, 48, 32, 32]}, **settings)
        found = [(r["task"], r["metric"], r["n"]) for r in run["results"]]
        of_group = [("tiny_rulers", "32", 3)] if asked == "tiny_rulers" else []
        assert found == [("tiny_ruler", "32", 3), ("tiny_ruler", "48", 1), *of_group]
        assert all(0 <= r["value"] <= 1 for r in run["results"])


def test_ruler_without_its_packages(ruler, monkeypatch, own_tasks_only):
    """Said before a model is loaded, here one that is not there."""
    monkeypatch.setattr(runs, "RULER_NEEDS", ("no_such_package", "json"))
    for asked in ("tiny_ruler", "tiny_rulers", "tiny_long", str(ruler / "tiny_ruler.yaml")):
        with pytest.raises(ImportError, match=r"\(no_such_package\): `pip install \"lm_eval\[ruler\]\"`"):
            run_lm_eval("nowhere", asked, include_path=ruler)


def test_rulers_own_tasks_are_known(monkeypatch):
    monkeypatch.setattr(runs, "RULER_NEEDS", ("no_such_package",))
    monkeypatch.setattr(runs, "TaskManager", functools.cache(runs.TaskManager))  # 13,000 files, once
    for asked in ("ruler", "niah_single_1"):
        with pytest.raises(ImportError, match="no_such_package"):
            runs.check_tasks(asked)
    runs.check_tasks("hellaswag")


def test_responses_of_other_versions_are_not_gone_on_from(tokenizer, folder, tmp_path, monkeypatch, own_tasks_only):
    settings = dict(include_path=folder, tokenizer=tokenizer, use_cache=tmp_path / "responses", bootstrap_iters=0)
    for number, version in enumerate(("1", "1", "2")):
        monkeypatch.setattr(runs, "versions", lambda version=version: {"torch": version})
        run_lm_eval(lossy(make_model()), "tiny_choice", limit=1, **settings)
        assert len(list(tmp_path.iterdir())) == (1, 1, 2)[number]


def test_results_of_groups_and_missing_errors():
    raw = {
        "results": {"a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": "N/A", "sample_len": 4}},
        "groups": {"g": {"alias": "g", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_count": {"acc,none": 8}}},
        "n-samples": {"a": {"original": 9, "effective": 4}},
        "versions": {"a": 1.0},
        "higher_is_better": {"a": {"acc": True}},
    }
    assert [(r["task"], r["stderr"], r["n"], r["version"]) for r in plain_results(raw)] == [
        ("a", None, 4, 1.0),
        ("g", 0.1, 8, None),
    ]
    long = {"cache": "window", "results": [{**plain_results(raw)[0], "task": "t" * 50, "filter": "strict-match-x"}]}
    long["results"][0] |= {"value": 123456.789, "stderr": 12.3456, "n": 14042}
    assert max(map(len, format_results(long).splitlines())) <= 80


def test_the_harness_command_knows_the_model(folder, monkeypatch, own_tasks_only):
    """`lm_eval` has no plugins; imported first, ours is there for its command."""
    from lm_eval.__main__ import cli_evaluate

    arguments = ["run", "--model", "cskv", "--tasks", "tiny_choice", "--include_path", str(folder)]
    arguments += ["--model_args", "pretrained=nowhere,stride=0"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    with pytest.raises(ValueError, match="`stride` must be a whole number of at least 1, got 0"):
        cli_evaluate()


def test_without_the_harness():
    """Importing the package does not ask for it, and asking for it without says how to get it."""
    code = (
        "import sys; sys.modules['lm_eval'] = None; import cskv_hf, cskv_hf.cli, cskv_hf.evaluate.loglikelihood\n"
        "try:\n    import cskv_hf.evaluate.lm_eval\n"
        "except ImportError as error:\n    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "`pip install 'cskv-hf[eval]'`" in result.stdout, result.stderr


def test_default_cache_is_compressed(tokenizer):
    assert type(CSKVLM(lossy(make_model()), tokenizer=tokenizer).make_cache()) is CSKVCache

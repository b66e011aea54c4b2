"""Measuring methods side by side: each once, at equal bytes, and to the same end however often it was interrupted."""

import contextlib
import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import calibration_data, lossy, make_model, prompt
from torch import nn
from transformers import AutoTokenizer

from cskv_hf import CSKVCache, CSKVConfig, collect_statistics
from cskv_hf.demo import MODEL_PATH
from cskv_hf.evaluate import inputs, methods, tables
from cskv_hf.evaluate.benchmarks import ALL, CaseBenchmark, Measurement, TextBenchmark, long_generations
from cskv_hf.evaluate.cases import Case
from cskv_hf.evaluate.format import markdown_table, text_tables
from cskv_hf.evaluate.memory import cache_nbytes
from cskv_hf.evaluate.methods import Calibration, Method, cache_maker, train_in_place
from cskv_hf.evaluate.run import evaluate
from cskv_hf.evaluate.suite import Suite
from cskv_hf.evaluate.tables import FULL, TABLES, adapter_table, ours, paper
from cskv_hf.model_shape import ModelShape

SMALL = {"window": 8, "sinks": 3, "block_size": 4}
PLAIN = Method("plain", compression=0.5, settings={"compression": 0.5, "bits": 16, "allocation": "uniform", **SMALL})
TRAINED = dataclasses.replace(PLAIN, name="trained", train=True)
WIDER = dataclasses.replace(PLAIN, name="wider", cache={"window": 16})


def calibration(model):
    rows = [row for batch in calibration_data(model) for row in batch]
    return Calibration(collect_statistics(model, rows, progress=False), rows[:2])


def test_the_papers_ways_to_start_are_fitted_to_rows_as_they_are():
    """Once, when first asked for."""
    model = make_model(num_hidden_layers=1)
    data = calibration(model)
    assert data.for_init("attention", model) is data.statistics and data.statistics.recall
    plain = data.for_init("asvd", model)
    assert not plain.recall and plain.num_tokens == sum(map(len, data.rows))
    assert all(data.for_init(init, model) is plain for init in ("svd", "random", "mse"))


def suite(out, model=None, settings=None):
    model = model or make_model(num_hidden_layers=2)
    text = [TextBenchmark("text", prompt(3, 80), skip=20), TextBenchmark("more", prompt(2, 80, seed=4), skip=20)]
    return Suite(model, None, text, out, settings or {"model": "tiny"}, lambda: calibration(model))


def test_every_method_once_and_the_model_left_as_it_was(tmp_path, monkeypatch):
    import cskv_hf.evaluate.suite as module

    prepared, real = [], module.prepare
    monkeypatch.setattr(module, "prepare", lambda *args: prepared.append(args[1].name) or real(*args))
    measure = suite(tmp_path)
    before = {name: tensor.clone() for name, tensor in measure.model.state_dict().items()}
    tables = {"one": [FULL, PLAIN, TRAINED], "two": [FULL, PLAIN, WIDER]}
    rows = measure.run(tables)
    assert prepared == ["plain", "trained"]  # "wider" has the factors of "plain"
    assert [(r["table"], r["label"]) for r in rows[::8]] == [
        (name, method.name) for name, table in tables.items() for method in table
    ]
    assert rows == json.loads((tmp_path / "results.json").read_text())["rows"]
    value = {(r["table"], r["method"]): r["value"] for r in rows if r["metric"] == "kl" and r["benchmark"] == "text"}
    assert value["one", "full cache"] == 0 < value["two", "wider"] < value["one", "plain"]
    assert value["one", "plain"] == value["two", "plain"] != value["one", "trained"]
    assert not any(module.training for module in measure.model.modules())
    after = measure.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path, monkeypatch):
    tables = {"one": [FULL, PLAIN, TRAINED]}

    def without_seconds(rows):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    whole = without_seconds(suite(tmp_path / "whole").run(tables))
    real, runs = TextBenchmark.run, []

    def interrupted(self, *args):
        if len(runs) == 3:
            raise KeyboardInterrupt
        runs.append(self.name)
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(TextBenchmark, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            suite(tmp_path / "part").run(tables)
    monkeypatch.setattr(TextBenchmark, "run", lambda self, *args: runs.append(self.name) or real(self, *args))
    assert without_seconds(suite(tmp_path / "part").run(tables)) == whole
    assert len(runs) == 6  # three methods on two texts, none twice
    with pytest.raises(ValueError, match="measured under other settings"):
        suite(tmp_path / "part", settings={"model": "other"})
    (tmp_path / "part" / "measured.json").write_text("{")
    with pytest.raises(ValueError, match="is not a file of measurements; remove it"):
        suite(tmp_path / "part")


@pytest.mark.parametrize("package", ["torch", "transformers", "peft", "cskv_hf"])
def test_other_versions_do_not_go_on(tmp_path, monkeypatch, package):
    """Half of a file of one version and half of another would be neither's numbers."""
    import cskv_hf.evaluate.suite as module

    suite(tmp_path).run({"one": [FULL]})
    suite(tmp_path)
    others = {**module.versions(), package: "99.0"}
    monkeypatch.setattr(module, "versions", lambda: others)
    with pytest.raises(
        ValueError, match=rf"under other settings than these: `versions.{package}` '.*' there, '99.0' here"
    ):
        suite(tmp_path)


def test_files_of_the_same_name_are_told_apart(tmp_path, monkeypatch):
    """Each text, the text to fit on and the adapter by what is in them; a change in any is not gone on from."""
    model, tokenizer = lossy(make_model(vocab_size=2048)), AutoTokenizer.from_pretrained(MODEL_PATH)
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    texts = [tmp_path / name / "t.txt" for name in ("a", "b")]
    for i, text in enumerate(texts):
        text.parent.mkdir()
        text.write_text(f"what is said in {i} " * 200)
    monkeypatch.setattr("cskv_hf.evaluate.run.load_model", lambda *args: (model, tokenizer))

    def run():
        specs = [f"text:{text}" for text in texts]
        return evaluate(str(adapter), tmp_path / "out", specs, length=128, limit=1, say=lambda text: None)

    rows = run()
    assert run() == rows
    files = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["files"]
    assert list(files) == [*(f"text:{text}" for text in texts), "adapter"] and len(set(files.values())) == 3
    texts[0].write_text("something else " * 200)
    with pytest.raises(ValueError, match=r"under other settings than these: `files\.text:.*/a/t\.txt` '"):
        run()


def test_a_folder_that_cannot_hold_results(tmp_path, monkeypatch):
    """Refused before the model is loaded; and results of other settings are not written over, whole or in part."""
    monkeypatch.setattr("cskv_hf.evaluate.run.load_model", lambda *args: 1 / 0)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"is a file\. Name a folder"):
        evaluate("bundled", tmp_path / "file", [])
    with pytest.raises(ValueError, match="'/proc/results' cannot be written"):
        evaluate("bundled", Path("/proc/results"), [])
    suite(tmp_path / "out").run({"one": [FULL]})
    (tmp_path / "out" / "measured.json").unlink()
    with pytest.raises(ValueError, match=r"results\.json' was measured under other settings than these: `model`"):
        suite(tmp_path / "out", settings={"model": "other"})
    assert suite(tmp_path / "out").rows == []


def test_the_bundled_model_as_it_is_asked_for():
    assert inputs.load_model("bundled")[0].dtype == torch.float32
    model, tokenizer = inputs.load_model("bundled", "bfloat16", "meta")
    assert (model.dtype, model.device.type, len(tokenizer)) == (torch.bfloat16, "meta", 2048)


@pytest.mark.parametrize("place", ["cpu", "cuda:1"])
@pytest.mark.parametrize("error", [None, ValueError])
def test_training_leaves_the_model_where_it_was(monkeypatch, place, error):
    """The Trainer moves a model to the first GPU: one on the CPU is trained there, another is moved back."""

    class Model(nn.Module):
        device = torch.device(place)

        def to(self, device):
            self.device = device

    class Trainer:
        def __init__(self, model, arguments, rows, **kwargs):
            self.model, self.arguments = model, arguments

        def remove_callback(self, callback):
            pass

        def train(self):
            assert self.arguments.use_cpu == (place == "cpu")
            self.model.device = torch.device("cpu" if self.arguments.use_cpu else "cuda:0")
            self.model.train()
            if error:
                raise error

    model = Model().eval()
    monkeypatch.setattr(methods, "CSKVTrainer", Trainer)
    with pytest.raises(error) if error else contextlib.nullcontext():
        train_in_place(model, Calibration(None, []), "mse")
    assert model.device == torch.device(place) and not model.training


def test_what_is_not_possible_is_said_and_left_out(tmp_path):
    said = []
    impossible = Method("too small", compression=0.999, settings={"compression": 0.999, **SMALL})
    rows = suite(tmp_path).run({"one": [impossible, FULL]}, say=said.append)
    assert {row["method"] for row in rows} == {"full cache"}
    assert "too small: left out: not possible on this model: " in said[0]
    assert list(json.loads((tmp_path / "results.json").read_text())["left_out"]) == ["too small"]


def test_an_error_in_training_leaves_no_adapter(tmp_path, monkeypatch):
    import cskv_hf.evaluate.methods as module

    def fail(*args):
        raise ValueError("no training today")

    monkeypatch.setattr(module, "train_in_place", fail)
    measure, said = suite(tmp_path), []
    rows = measure.run({"one": [TRAINED, PLAIN]}, say=said.append)
    assert {row["label"] for row in rows} == {"plain"} and "no training today" in said[0]
    assert not any("cskv" in name for name, _ in measure.model.named_modules())


def test_an_error_in_calibration_ends_the_run(tmp_path):
    measure = suite(tmp_path)

    def fail():
        raise ValueError("no such file")

    measure.make_calibration = fail
    with pytest.raises(ValueError, match="no such file"):
        measure.run({"one": [PLAIN]})


def test_an_adapter_of_its_own(tmp_path):
    model = lossy(make_model())
    shape = ModelShape.from_model_config(model.config)
    rows = suite(tmp_path, model).run({"adapter": adapter_table(model.peft_config["default"], shape)})
    assert [row["method"] for row in rows[::8]] == ["full cache", "window + sinks", "this adapter"]
    assert rows[-1]["bytes_per_token"] == model.peft_config["default"].bytes_per_token(shape)


@pytest.mark.parametrize("exact", [{}, {"window": 64, "sinks": 7, "block_size": 16}], ids=["default", "other"])
@pytest.mark.parametrize("length", [150, 200, 777])
@pytest.mark.parametrize("compression", [0.5, 0.8])
def test_a_window_gets_the_bytes_of_the_compressed_cache(length, compression, exact):
    """At every length of the prompt, to within a token."""
    model = lossy(make_model(), compression, **{"window": 32, "sinks": 4, "block_size": 32, **exact})
    method = tables.adapter_table(model.peft_config["default"], ModelShape.from_model_config(model.config))[1]
    alone, compressed = (
        cache_nbytes(model, cache, prompt(1, length), torch.bfloat16)
        for cache in (cache_maker(method, model, None), CSKVCache)
    )
    token = 2 * 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * model.config.head_dim
    assert abs(alone - compressed) <= 1.1 * token + 4 * length, (alone, compressed)  # positions of exact tokens too


@pytest.mark.parametrize("shape", [ModelShape("llama", 4, 2, 64), ModelShape("mistral", 32, 8, 128)])
def test_the_tables_are_valid_and_hold_no_method_twice(shape):
    for name, table in TABLES.items():
        methods = table(shape)
        assert len({m.name for m in methods}) == len(methods), name
        assert len({json.dumps(m.identity, sort_keys=True) for m in methods}) == len(methods), name
        for method in methods:
            if method.settings:
                CSKVConfig(**method.settings)
    assert paper(0.8).settings["init"] == "asvd" and paper(0.8).train and not ours(0.8).train


def test_quantised_budgets_are_those_of_the_paper_packed_at_the_same_rank():
    """Ours beside the paper's 4 bits costs no more bytes than the paper's layout at that rank."""
    shape = ModelShape("llama", 4, 2, 64)
    table = TABLES["quantisation"](shape)
    for method, packed in ((m, p) for p, m in itertools.pairwise(table) if m.name.endswith("ours")):
        config = CSKVConfig(**packed.settings)
        config.key_ranks, config.value_ranks = [[config.key_rank]] * 4, [config.value_rank] * 4
        config.key_bits = [[[[4, config.key_rank]]]] * 4
        config.value_bits = [[[4, config.value_rank]]] * 4
        cost = 4 + sum(f.bytes_per_token(torch.bfloat16) for i in range(4) for f in config.formats(i))
        budget = (1 - method.compression) * 4 * 2 * shape.kv_dim * 2
        assert 0.97 * cost < budget < 1.03 * cost


class Words:
    """A tokenizer."""

    pad_token_id = eos_token_id = 0
    chat_template = None

    def __call__(self, text):
        return {"input_ids": [2 + ord(c) % 80 for c in text]}

    def decode(self, ids, **kwargs):
        return " ".join(map(str, ids.tolist()))


def test_cases_are_averaged_over_all_groups(tmp_path):
    cases = [
        Case(str(i), f"{i % 3} groups", "x" * (5 + i), ("1",), lambda answer, case: float(case.id in "02"), 3)
        for i in range(6)
    ]
    cases.append(Case("long", "0 groups", "y" * 5000, ("1",), lambda answer, case: 1.0, 3))
    model = make_model(max_position_embeddings=512)
    benchmark = CaseBenchmark("cases", cases, 20, "accuracy", batch_size=2)
    measured = benchmark.run(model, Words(), FULL_CACHE, tmp_path / "answers.jsonl", {})
    assert [(m.group, m.value, m.total, m.skipped) for m in measured] == [
        ("0 groups", 0.5, 2, 1),
        ("1 groups", 0.0, 2, 0),
        ("2 groups", 0.5, 2, 0),
        (ALL, pytest.approx(2 / 6), 6, 1),
    ]


def test_details_are_those_of_all_cases_of_a_group(tmp_path):
    """Not of one of them; of those cut the number, without cases that were skipped."""
    details = [
        {"dataset": "d", "length": 7 + i // 2, "keywords": [str(i)], "tokens_cut": cut}
        for i, cut in enumerate((5, 0, 9, 3, 4, 0))
    ]
    cases = [
        Case(str(i), f"group {i // 2}", "x" * (5 if i != 4 else 5000), ("1",), lambda answer, case: 1.0, 3, details=d)
        for i, d in enumerate(details)
    ]
    cases.append(Case("other", "plain", "x", ("1",), lambda answer, case: 1.0, 3, details={"depth": 0.5}))
    benchmark = CaseBenchmark("cases", cases, 20, "accuracy", batch_size=2)
    measured = benchmark.run(make_model(max_position_embeddings=512), Words(), FULL_CACHE, tmp_path / "a.jsonl", {})
    assert [m.details for m in measured] == [
        {"dataset": "d", "length": 7, "cases_cut": 1},
        {"dataset": "d", "length": 8, "cases_cut": 2},
        {"dataset": "d", "length": 9, "cases_cut": 0},
        {"depth": 0.5},
        {"cases_cut": 3},
    ]
    rows = [
        {"table": "t", "label": "m", "benchmark": "cases", "cache_share": 1.0, **dataclasses.asdict(m)}
        for m in measured
    ]
    assert text_tables(rows).split("\n")[-1] == "cut in the middle by --cut: 3"


def FULL_CACHE():
    from transformers import DynamicCache

    return DynamicCache()


def test_long_generations_are_the_models_own():
    model = make_model()
    rows = long_generations(model, prompt(3, 10), 20, batch_size=2)
    assert rows.shape == (3, 30) and torch.equal(rows[:, :10], prompt(3, 10))
    alone = model.generate(prompt(3, 10)[2:], max_new_tokens=20, do_sample=False)
    assert torch.equal(rows[2:], alone)
    sampled = long_generations(model, prompt(3, 10), 20, batch_size=2, seed=1)
    assert not torch.equal(sampled, rows)
    assert torch.equal(sampled, long_generations(model, prompt(3, 10), 20, batch_size=2, seed=1))


def test_tables_for_people(tmp_path):
    def row(method, group, metric, value, benchmark="lines", margin=0.01):
        measured = Measurement(group, metric, value, value - margin, value + margin, 100)
        return {"table": "methods", "method": method, "label": method, "benchmark": benchmark, "cache_share": 0.25,
                "bytes_per_token": 1234.0, **dataclasses.asdict(measured)}  # fmt: skip

    rows = [row("a method", f"{n} lines", "accuracy", 0.5 + n / 100) for n in (10, 20)]
    rows += [row("a method", "5 rows", metric, 1.25, "text") for metric in ("perplexity_ratio", "kl", "agreement")]
    rows += [row("m" * 60, "10 lines", "accuracy", 0.125)]
    text = text_tables(rows)
    assert max(map(len, text.split("\n"))) <= 80
    assert next(line.split()[-2:] for line in text.split("\n") if line.startswith("a method")) == ["0.600", "0.700"]
    assert "1.2500" in text and [line.split()[-1] for line in text.split("\n") if "mmm" in line] == ["-"]
    markdown = markdown_table(rows, "methods", [("lines", "10 lines", "accuracy", "10 lines")])
    assert "| a method | 1,234 | 25.0 % | 0.600 (0.590–0.610) |" in markdown

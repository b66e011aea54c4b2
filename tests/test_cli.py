"""The command line, run as a user would: a text file in, an adapter directory out, and nothing half-written."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HUB, make_model
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from cskv_hf import CSKVConfig
from cskv_hf.cli import app
from cskv_hf.files import replace_directory
from cskv_hf.fit_report import format_evaluation, format_report
from cskv_hf.texts import documents
from cskv_hf.train import training_rows


@pytest.fixture
def folder(tmp_path):
    make_model(dtype=torch.float32).save_pretrained(tmp_path / "model")
    vocab = {f"w{i}": i for i in range(88)} | {"[UNK]": 88}
    words = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 88}" for i in range(600)))
    return tmp_path


def cskv(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80", "TERM": "dumb"})
    return result.exit_code, re.sub(r"[\s│╭╮╰╯─]+", " ", result.output), result.output


def test_demo_without_matplotlib_is_refused_before_it_measures(monkeypatch, tmp_path):
    import cskv_hf.demo.run as demo

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(demo, "load_bundled", lambda: pytest.fail("measured"))
    code, text, _ = cskv("demo", "--out", tmp_path / "out")
    assert code == 2 and "pip install 'cskv-hf[plot]'" in text and not (tmp_path / "out").exists()


def test_demo_into_a_file_is_refused_before_it_measures(monkeypatch, tmp_path):
    import cskv_hf.demo.run as demo

    (tmp_path / "out").write_text("mine")
    monkeypatch.setattr(demo, "load_bundled", lambda: pytest.fail("measured"))
    code, text, _ = cskv("demo", "--out", tmp_path / "out")
    assert code == 2 and "is a file. Name a directory" in text and (tmp_path / "out").read_text() == "mine"


def test_fit_inspect_load(folder):
    code, text, _ = cskv(
        "fit", folder / "model", "--data", folder / "text.txt", "--out", folder / "out", "--length", 100
    )
    assert code == 0, text
    assert "fitted on 684 tokens with recall" in text and re.search(r"at 16 bits: (19\.\d|20\.0) %", text)
    assert sorted(p.name for p in folder.iterdir()) == ["model", "out", "text.txt"]  # no state, no temporary left
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    assert model.peft_config["default"].compression == 0.8
    code, text, raw = cskv("inspect", folder / "out")
    assert code == 0 and "init attention, keys head" in text
    assert max(map(len, raw.split("\n"))) <= 80


def test_train_and_plot(folder):
    """Fit, train from the shell, inspect with a picture; an interrupted training continues."""
    text, adapter = folder / "text.txt", folder / "adapter"
    code, output, _ = cskv("fit", folder / "model", "--data", text, "--out", adapter, "--length", 100, "--bits", 4)
    assert code == 0, output
    arguments = ["train", adapter, "--data", text, "--out", folder / "trained", "--length", 64]
    arguments += ["--learning-rate", 0.001]
    code, output, _ = cskv(*arguments)
    assert code == 0 and "9 steps on 576 tokens" in output, output
    assert sorted(p.name for p in folder.iterdir()) == ["adapter", "model", "text.txt", "trained"]
    before, after = (load_file(folder / name / "adapter_model.safetensors") for name in ("adapter", "trained"))
    assert all(
        (not torch.equal(after[name], before[name])) == (name.split(".")[-2][-2:] in ("_A", "_B")) for name in before
    )
    code, output, raw = cskv("inspect", folder / "trained", "--plot", folder / "plot.png")
    assert code == 0 and "bits each" in output and max(map(len, raw.split("\nsaved")[0].split("\n"))) <= 80
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    (folder / "empty.txt").write_text(" ")
    code, output, _ = cskv("train", adapter, "--data", folder / "empty.txt", "--out", folder / "nothing")
    assert code == 2 and "is empty" in output
    code, output, _ = cskv(*arguments[:-2], "--objective", "kl")
    assert code == 2 and "`--objective` must be one of" in output
    code, output, _ = cskv(*arguments, "--epochs", 0)
    assert code == 2 and "`--epochs` must be above 0" in output


def test_probing_goes_on(folder, monkeypatch):
    """A fit that is interrupted while it measures what layers are worth leaves what it has, and takes it away."""
    from cskv_hf import sensitivity

    arguments = ["fit", folder / "model", "--data", folder / "text.txt", "--out", folder / "probed", "--length", 100]
    probe_cut, probed = sensitivity.probe_cut, []

    def probe(factors):
        probed.append(factors)
        if len(probed) == 3:  # the second layer
            raise KeyboardInterrupt
        return probe_cut(factors)

    monkeypatch.setattr(sensitivity, "probe_cut", probe)
    assert cskv(*arguments)[0] == 130
    left = {path.name for path in folder.glob("probed*")}
    assert left == {"probed.statistics.safetensors", "probed.statistics.probing.json"}
    code, output, _ = cskv(*arguments)
    layers = AutoModelForCausalLM.from_pretrained(folder / "model").config.num_hidden_layers
    assert code == 0 and len(probed) == 3 + 2 * (layers - 1), output
    assert {path.name for path in folder.glob("probed*")} == {"probed"}
    shutil.rmtree(folder / "probed")


def test_training_goes_on_with_the_same_only(folder):
    """Checkpoints of a run that was interrupted, with other data or another rate, are not gone on from."""
    text, adapter, out = folder / "text.txt", folder / "adapter", folder / "again"
    code, output, _ = cskv("fit", folder / "model", "--data", text, "--out", adapter, "--length", 100)
    assert code == 0, output
    arguments = ["train", adapter, "--data", text, "--out", out, "--length", 64]
    checkpoint = folder / "again.checkpoints" / "checkpoint-3"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cskv_hf.train.CSKVTrainer.train", lambda *_, **__: checkpoint.mkdir() or exit(9))
        assert cskv(*arguments)[0] == 9
    shutil.copytree(folder / "model", folder / "other")
    changes = {
        "`--learning-rate` 5e-05 there, 0.001 here": ["--learning-rate", 1e-3],
        "`--length` 64 there, 32 here; `--epochs` 1.0 there, 2.0 here": ["--epochs", 2, "--length", 32],
        "`--dtype` 'auto' there, 'float64' here": ["--dtype", "float64"],
        "settings than these: `--model` '": ["--model", folder / "other"],
    }
    for names, more in changes.items():
        code, output, _ = cskv(*arguments, *more)
        assert code == 2 and names in output, output
    checkpoint.rmdir()
    code, output, _ = cskv(*arguments, "--epochs", 2)
    assert code == 0 and "18 steps" in output and not checkpoint.parent.exists(), output


def test_what_else_lies_beside_an_adapter_stays(folder):
    text, out = folder / "text.txt", folder / "adapter"
    arguments = ["fit", folder / "model", "--data", text, "--out", out, "--length", 100]
    assert cskv(*arguments)[0] == 0
    (out / "notes" / "deep").mkdir(parents=True)
    (out / "notes" / "deep" / "mine.md").write_text("mine")
    (out / "link").symlink_to("notes")
    before = (out / "adapter_model.safetensors").read_bytes()
    assert cskv(*arguments, "--compression", 0.9)[0] == 0
    assert (out / "adapter_model.safetensors").read_bytes() != before
    card = ModelCard.load(out / "README.md")
    assert f'from_pretrained("{out}"' in card.text and f"adapter for `{folder / 'model'}`" in card.text
    assert "bytes of an old token" in card.text and card.data.base_model is None  # a directory of this machine
    assert (out / "link" / "deep" / "mine.md").read_text() == "mine" and (out / "link").is_symlink()
    shutil.rmtree(out)


def test_what_is_no_text(folder):
    for name, content, message in (
        ("text.gz", gzip.compress(b"some text"), "is not UTF-8 text"),
        ("text.bin", b"a\0b", "holds null characters"),
        ("text.NDJSON", b'{"content": "x"}', "Line 1 of"),
    ):
        (folder / name).write_bytes(content)
        code, output, _ = cskv("fit", folder / "model", "--data", folder / name, "--out", folder / "none")
        assert code == 2 and message in output, output


def test_where_nothing_can_be_written(folder):
    arguments = "fit", folder / "model", "--data", folder / "text.txt"
    code, output, _ = cskv(*arguments, "--out", "/proc/adapter")
    assert code == 2 and "`--out`='/proc/adapter' cannot be written" in output, output
    code, output, _ = cskv(*arguments, "--out", folder / "out", "--device-map", "cuda")
    assert torch.cuda.is_available() or (code == 2 and "needs a GPU" in output), output


def test_eval_report_chat(folder):
    """An adapter is measured and reported on, then talked to; a base model is fitted to first."""
    text, adapter, out = folder / "text.txt", folder / "adapter", folder / "results"
    code, output, _ = cskv("fit", folder / "model", "--data", text, "--out", adapter, "--length", 100)
    assert code == 0, output
    arguments = ["eval", adapter, "--out", out, "--length", 128, "--limit", 2]
    arguments += ["--benchmark", f"text:{text}", "--benchmark", "lines:3"]
    code, output, raw = cskv(*arguments)
    assert code == 0 and "this adapter" in output and re.search(r"80(\.\d)? % window \+ sinks", output), output
    wide = [
        line
        for line in raw.split("\n")
        if len(line.split("\r")[-1]) > 80 and "/s]" not in line and str(folder) not in line
    ]
    assert not wide, wide
    results = json.loads((out / "results.json").read_text())
    rows = {(row["method"], row["metric"]): row for row in results["rows"]}
    assert rows["full cache", "kl"]["value"] == 0 < rows["this adapter", "kl"]["value"]
    assert rows["this adapter", "accuracy"]["total"] == 2 and len(list((out / "answers").iterdir())) == 3
    assert cskv(*arguments)[0] == 0 and json.loads((out / "results.json").read_text()) == results
    code, output, _ = cskv(*arguments[:-4], "--benchmark", "lines:4")
    assert code == 2 and "was measured under other settings" in output

    code, output, _ = cskv("report", adapter, out / "results.json", "--out", folder / "report.html")
    assert code == 0 and "report.html" in output, output
    assert "this adapter" in (folder / "report.html").read_text()

    result = CliRunner().invoke(
        app, ["chat", str(adapter), "--max-new-tokens", "5"], input="w1 w2 w3\n/cache\n/new\nw4\n\nw5\n"
    )
    assert result.exit_code == 0 and result.output.count("% of a full cache]") == 2, result.output
    assert "sinks, exact" in result.output

    other = folder / "other.txt"
    other.write_text(" ".join(f"w{i * i * i % 88}" for i in range(600)))
    arguments = ["eval", folder / "model", "--out", folder / "base", "--data", other, "--length", 128, "--limit", 2]
    code, output, _ = cskv(*arguments, "--benchmark", f"text:{text}", "--max-tokens", 256, "--epochs", 1)
    assert code == 0 and "80 % asvd + training" in output and "95 % ours" in output, output


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "There is nothing to measure on: give `--benchmark`"),
        (
            ("--benchmark", "sums:3", "--data", "text.txt"),
            "`--benchmark` 'sums:3' is not known; use text:FILE",
        ),
        (
            ("--benchmark", "text:none.txt", "--data", "text.txt"),
            "The file 'none.txt' of `--benchmark` 'text:none.txt' does not exist.",
        ),
        (("--benchmark", "lines:none.jsonl", "--data", "text.txt"), "none.jsonl"),
        (("--benchmark", "lines:3"), "needs calibration text: give `--data`"),
        (("--benchmark", "lines:3", "--data", "none.txt"), "`--data` 'none.txt' does not exist."),
        (("--benchmark", "text:text.txt", "--data", "text.txt"), "is the text of `--data`"),
        (("--benchmark", "longbench:none.jsonl", "--data", "text.txt"), "does not exist"),
        (("--benchmark", "lines:3", "--tables", "sums", "--data", "text.txt"), "`--tables` 'sums' is not known"),
    ],
)
def test_eval_refuses(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    code, output, _ = cskv("eval", "model", "--out", "results", *arguments)
    assert code == 2 and message in output, output
    assert not (folder / "results").exists()


def test_evaluate_push_inspect(folder, documented):
    """Fit with a measurement, push, and look at what is on the Hub; nothing of this machine's paths goes there."""
    documented("ways-out", "`cskv push`, then `cskv inspect` of the Hub id", "result")
    (folder / "held_out.txt").write_text(" ".join(f"w{i * i * i % 88}" for i in range(1200)))
    arguments = ["fit", folder / "model", "--data", folder / "text.txt", "--out", folder / "out", "--length", 100]
    code, text, raw = cskv(*arguments, "--evaluate", folder / "held_out.txt")
    assert code == 0 and "on 896 tokens of held_out.txt: perplexity x" in text
    assert max(map(len, raw.split("\nsaved")[0].split("\n")[-3:])) <= 80
    code, text, _ = cskv("push", folder / "out", "ada/from-the-shell")
    assert code == 2 and "Name it with `--base-model='user/model'`" in text
    push = ["push", folder / "out", "ada/from-the-shell", "--base-model", "ada/words", "--tag", "words", "--private"]
    code, text, _ = cskv(*push, "--license", "mit")
    assert code == 0 and "/ada/from-the-shell/commit/" in text.replace(" ", "")
    assert HUB.repos["ada/from-the-shell"].private
    assert "tokenizer.json" in HUB.paths("ada/from-the-shell")  # lay beside the adapter
    everything = b"".join(HUB.file("ada/from-the-shell", path) for path in HUB.paths("ada/from-the-shell"))
    assert str(folder).encode() not in everything
    code, text, raw = cskv("inspect", "ada/from-the-shell")
    assert code == 0 and "fitted on 684 tokens" in text and "of held_out.txt: perplexity x" in text
    assert max(map(len, raw.split("\n"))) <= 80
    code, text, _ = cskv("inspect", "ada/from-the-shell", "--revision", "nowhere")
    assert code == 2 and "Revision Not Found" in text
    code, text, _ = cskv(*arguments, "--evaluate", folder / "missing.txt")
    assert code == 2 and "does not exist" in text


def test_push_without_a_network(folder, monkeypatch):
    code, text, _ = cskv(
        "fit", folder / "model", "--data", folder / "text.txt", "--out", folder / "out", "--length", 100
    )
    assert code == 0, text
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    code, text, _ = cskv("push", folder / "out", "ada/nowhere", "--base-model", "ada/words")
    assert code == 2 and "The Hub at http://127.0.0.1:9 cannot be reached" in text, text


def test_json_lines(folder):
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": "w1 w2 w3 w4"}) + "\n" for _ in range(50)))
    code, text, _ = cskv("fit", folder / "model", "--data", folder / "data.jsonl", "--out", folder / "out")
    assert code == 0 and "fitted on 228 tokens" in text
    code, text, _ = cskv(
        "fit", folder / "model", "--data", folder / "data.jsonl", "--out", folder / "out", "--no-recall"
    )
    assert code == 0 and "fitted on 200 tokens;" in text
    (folder / "data.jsonl").write_text('{"text": "w1"}\n{"txt": "w1"}\n')
    code, text, _ = cskv("fit", folder / "model", "--data", folder / "data.jsonl", "--out", folder / "out")
    assert code == 2 and "Line 2 of" in text and "not a JSON object with a 'text' field" in text
    for content, expected in (
        ('{"text": "w1"}\n\n{"text": "w2"}\n \n', ["w1", "w2"]),
        (
            '{"text": "w1"}\n{"text": null}\n',
            "Line 2 of '.*' is not a JSON object with a 'text' field",
        ),
        ('{"text": 3}\n', "Line 1 of"),
        ("", "is empty"),
        ('\n{"text": " "}\n', "is empty"),
    ):
        (folder / "data.jsonl").write_text(content)
        if isinstance(expected, list):
            assert list(documents(folder / "data.jsonl")) == expected
            continue
        with pytest.raises(ValueError, match=expected):
            list(documents(folder / "data.jsonl"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--compression", 1.5], "`--compression` is the fraction of KV bytes"),
        (["--key-layout", "group:3"], "must divide the model's 4 KV heads"),
        (["--data", "missing.txt"], "does not exist"),
    ],
)
def test_bad_arguments(folder, arguments, message):
    code, text, _ = cskv("fit", folder / "model", "--data", folder / "text.txt", "--out", folder / "out", *arguments)
    assert code == 2 and message in text
    assert not (folder / "out").exists()


@pytest.mark.parametrize("command", ["fit", "train"])
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--length", 0], "Invalid value for '--length'"),
        (["--max-tokens", 0], "Invalid value for '--max-tokens'"),
        (["--dtype", "float7"], "must be one of auto, bfloat16, float16, float32, float64, got 'float7'"),
        (["--out", "a-file"], "`--out`='a-file' is a file."),
        (["--out", "."], "`--out`='.' has no name of its own"),
        (["--out", "model/.."], "has no name of its own"),
        (["--out", "thesis"], "`--out`='thesis' holds something that is not a CSKV adapter and would be lost"),
        (["--out", "lora"], "`--out`='lora' holds something that is not a CSKV adapter and would be lost"),
    ],
)
def test_refused_before_the_model_is_loaded(folder, monkeypatch, command, arguments, message):
    """And nothing that lies there is touched."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    for name in ("thesis/chapter.tex", "lora/adapter_config.json"):
        Path(name).parent.mkdir()
        Path(name).write_text('{"peft_type": "LORA"}')
    Path("a-file").write_text("mine")
    before = {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}
    code, text, _ = cskv(command, "model", "--data", "text.txt", "--out", "out", *arguments)
    assert code == 2 and message in text, text
    assert {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")} == before


def test_rows_of_no_tokens_are_refused():
    for settings in (dict(length=0), dict(length=4, max_tokens=0)):
        with pytest.raises(ValueError, match=r"`(length|max_tokens)` must be at least 1, got 0"):
            training_rows([torch.arange(8)], **settings)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["inspect", "./nope"], "'./nope' is neither a directory nor a Hub id"),
        (["inspect", "no/pe"], "There is no directory 'no/pe' here, and it is not on the Hub, or private."),
        (["inspect", "text.txt"], "'text.txt' is not a directory"),
        (["train", "no/pe", "--data", "text.txt", "--out", "out"], "There is no directory 'no/pe' here"),
        (["report", "no/pe"], "There is no directory 'no/pe' here"),
        (["push", "no/pe", "ada/nope"], "There is no directory 'no/pe'."),
    ],
)
def test_mistyped_paths(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    code, text, _ = cskv(*arguments)
    assert code == 2 and message in text, text


def test_reports_are_no_wider_than_a_terminal():
    """Of a large model, with the longest numbers that a column can hold, and a long name of the evaluation's text."""
    config = CSKVConfig(key_layout="group:4", key_rank=8192, value_rank=8192, bits=16)
    config.model_shape = dict(model_type="llama", num_hidden_layers=80, num_key_value_heads=64, head_dim=128)
    config.key_ranks, config.value_ranks = [[512] * 16] * 80, [8192] * 80
    names = ("key_error", "value_error", "key_attention_error", "value_attention_error")
    layer = dict(key_ranks=[512] * 16, value_rank=8192, key_bits=16.0, value_bits=16.0, bytes_per_token=32768.0)
    layers = [layer | dict.fromkeys(names, 1.0) | {"layer_idx": i} for i in range(80)]
    config.fit_report = dict(num_tokens=10**9, layers=layers)
    evaluation = dict(tokens=10**7, source="the validation part of wikitext-103-raw-v1, which is long.txt")
    evaluation |= dict(ratio=1.0123, ratio_low=None, ratio_high=None, kl=0.01234, agreement=1.0)
    text = format_report(config) + "\n" + format_evaluation(evaluation)
    assert max(map(len, text.split("\n"))) <= 80


def test_killed_fit_resumes_and_the_old_adapter_survives(folder):
    """A real process, killed in the middle of the calibration; the same command then continues and replaces the
    adapter."""
    command = [sys.executable, "-c", KILLED, folder / "model", folder / "text.txt", folder / "out"]
    code, text, _ = cskv(
        "fit", folder / "model", "--data", folder / "text.txt", "--out", folder / "out", "--length", 100
    )
    assert code == 0, text
    before = {p.name: p.read_bytes() for p in (folder / "out").iterdir()}
    killed = subprocess.run(
        [str(c) for c in command], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, timeout=300
    )
    assert killed.returncode == 9
    assert {p.name: p.read_bytes() for p in (folder / "out").iterdir()} == before
    assert (folder / "out.statistics.safetensors").exists()
    code, text, _ = cskv(
        "fit",
        folder / "model",
        "--data",
        folder / "text.txt",
        "--out",
        folder / "out",
        "--length",
        100,
        "--compression",
        0.5,
    )
    assert code == 0 and "fitted on 684 tokens" in text, text
    assert json.loads((folder / "out" / "adapter_config.json").read_text())["compression"] == 0.5


KILLED = """
import os, sys
import cskv_hf.calibration as calibration
from cskv_hf.cli import app
calibration.SAVE_EVERY_SECONDS, calibration.MOST_TIME_SAVING = 0.0, float('inf')
save = calibration.KVStatistics.save
def save_and_die(self, path):
    save(self, path)
    if self.num_samples == 3:
        os._exit(9)
calibration.KVStatistics.save = save_and_die
model, data, out = sys.argv[1:]
app(["fit", model, "--data", data, "--out", out, "--length", "100"])
"""


def write_adapter(folder, text):
    folder.mkdir()
    (folder / "a").write_text(text)
    (folder / "adapter_config.json").write_text('{"peft_type": "CSKV"}')


def test_replace_directory_keeps_the_old_one_until_the_new_is_complete(tmp_path, monkeypatch):
    """And what lies beside it, whatever its name."""
    target, beside = tmp_path / "out", ["out.new", "out.old"]
    for name in beside:
        (tmp_path / name).mkdir()
    replace_directory(target, lambda folder: write_adapter(folder, "old"))

    def fails(folder):
        write_adapter(folder, "half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        replace_directory(target, fails)
    assert (target / "a").read_text() == "old"
    replace, moves = os.replace, []

    def interrupted(source, destination):
        moves.append(destination)
        if len(moves) == 2:  # the new one to its place
            raise KeyboardInterrupt
        replace(source, destination)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupted)
        replace_directory(target, lambda folder: write_adapter(folder, "new"))
    assert (target / "a").read_text() == "old"
    replace_directory(target, lambda folder: write_adapter(folder, "new"))
    assert (target / "a").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", *beside]

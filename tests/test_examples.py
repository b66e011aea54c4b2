"""Every example runs as it stands, on the bundled model and without arguments, and shows what it promises."""

import os
import random
import re
import runpy
import sys
from pathlib import Path

import pytest
from conftest import HUB
from huggingface_hub import ModelCard

from cskv_hf.evaluate.lines import line_record

EXAMPLES = Path(__file__).parent.parent / "examples"
REPORT = r"old, latents +\d+ tokens.*total +[\d,]+ bytes, ([\d.]+) % of a full cache"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    def runs(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return runs


def test_every_example_is_tested():
    tested = set(re.findall(r"run\(\"(\w+\.py)\"", Path(__file__).read_text()))
    assert tested == {path.name for path in EXAMPLES.glob("*.py")} - {"common.py"}


def test_generate(run):
    output = run("generate.py")
    full, compressed = re.search(r"--- full cache\n(.*)\n--- compressed\n(.*)\nCSKVCache:", output, re.S).groups()
    assert full.strip() and compressed.split()[:5] == full.split()[:5]
    assert float(re.search(REPORT, output, re.S)[1]) < 25


def test_pipeline(run):
    assert len(re.findall(r"^\.\.\. .*\n    '.+'$", run("pipeline.py"), re.M)) == 2


def test_chat(run):
    output = run("chat.py", "--max-new-tokens", "20")
    tokens = [int(n) for n in re.findall(r"\[(\d+) tokens in [\d,]+ bytes", output)]
    assert len(tokens) == 3 and tokens == sorted(tokens)


def test_fit_and_push(run, tmp_path):
    output = run("fit_and_push.py", "--push", "ada/example-cskv", "--base-model", "ada/bundled")
    assert "an old token takes" in output and "perplexity x" in output
    assert sorted(os.listdir(tmp_path / "my-cskv-adapter")) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    card = ModelCard(HUB.file("ada/example-cskv", "README.md").decode())
    ratio = re.search(r"perplexity x (\d\.\d{4})", output)[1]
    assert card.data.base_model == "ada/bundled" and f"| ratio | {ratio} (" in card.text


def test_stack_with_lora(run):
    output = run("stack_with_lora.py", "--steps", "4")
    assert "train_loss" in output and float(re.search(REPORT, output, re.S)[1]) < 25


def test_long_document(run):
    """The compressed document still holds the lines: at least four of five answers are right, as the card says."""
    output = run("long_document.py")
    record = line_record(100, 5, random.Random(0))
    right = sum(f"{record.question(i)}  {record.answer(i)}" in output for i in range(5))
    assert right >= 4 and float(re.search(REPORT, output, re.S)[1]) < 25

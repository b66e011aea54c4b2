"""The model that travels with the package, and the claims of the results in small."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import cskv_hf
from cskv_hf import CSKVCache, CSKVConfig, collect_statistics
from cskv_hf.demo import MODEL_PATH, corpus
from cskv_hf.demo import run as demo
from cskv_hf.demo.present import Row, format_table, save_results
from cskv_hf.evaluate.baselines import WindowOnlyCache
from cskv_hf.evaluate.lines import line_retrieval
from cskv_hf.evaluate.perplexity import compressed_perplexity


@pytest.fixture(scope="module")
def bundled():
    model, tokenizer = demo.load_bundled()
    return model, tokenizer, collect_statistics(model, demo.calibration_data(tokenizer, tokens=16384), progress=False)


def test_it_is_small_and_float32(bundled):
    model, tokenizer, _ = bundled
    assert sum(p.stat().st_size for p in MODEL_PATH.iterdir()) < 10 * 2**20
    assert model.dtype == torch.float32 and model.config.head_dim >= 32
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    text = "line 12-345: REGISTER_CONTENT is <54321>\nclass A:\n    pass\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_held_out_text_is_held_out():
    training, evaluation = corpus.reference_topics(held_out=False), corpus.reference_topics(held_out=True)
    assert evaluation and not set(training) & set(evaluation)
    assert len(corpus.library_docstrings()) > 100


def test_retrieval_tells_caches_apart(bundled):
    """40 questions: the full cache and ours at 80 % answer them, window and sinks alone or random factors cannot."""
    model, tokenizer, statistics = bundled
    records = demo.evaluation_records(5)
    full = line_retrieval(model, tokenizer, records, DynamicCache).value
    assert full >= 0.9
    assert line_retrieval(model, tokenizer, records, WindowOnlyCache).value <= 0.1
    ours = cskv_hf.fit(model, statistics, CSKVConfig(compression=0.8), progress=False)
    assert line_retrieval(ours, tokenizer, records, CSKVCache).value >= full - 0.1
    ours = cskv_hf.fit(ours, statistics, CSKVConfig(compression=0.8, init="random", bits=16), progress=False)
    assert line_retrieval(ours, tokenizer, records, CSKVCache).value <= 0.2
    assert ours.unload() is model


def test_attention_loses_less_perplexity_than_asvd(bundled):
    model, tokenizer, statistics = bundled
    text = demo.evaluation_text(tokenizer)[:8]
    values = {}
    for init in ("attention", "asvd"):
        fitted = cskv_hf.fit(
            model, statistics, CSKVConfig(compression=0.8, init=init, bits=16, allocation="uniform"), progress=False
        )
        values[init] = compressed_perplexity(fitted, text, CSKVCache).value
        model = fitted.unload()
    assert values["attention"] < values["asvd"]


def test_adapter_of_the_bundled_model_loads_in_a_pipeline(bundled, tmp_path):
    from transformers import pipeline

    _, tokenizer, statistics = bundled
    base = AutoModelForCausalLM.from_pretrained(MODEL_PATH)
    fitted = cskv_hf.fit(base, statistics, CSKVConfig(compression=0.5), progress=False)
    fitted.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    record = demo.evaluation_records(1)[0]
    generator = pipeline("text-generation", model=str(tmp_path))
    output = generator(record.text + record.question(0), max_new_tokens=16, do_sample=False, return_full_text=False)
    inputs = tokenizer(record.text + record.question(0), return_tensors="pt")
    tokens = fitted.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert output[0]["generated_text"] == tokenizer.decode(tokens, skip_special_tokens=True)


def test_table_and_files(tmp_path):
    rows = [Row("full cache", 0.0, 1000.0, 10_000, 20.0, 1.0, 1.0, 1.0, 0.98, 0.01)]
    rows.append(Row("window", 1.0, 0.0, 500, 40.0, 2.0, 1.9, 2.1, 0.0, 0.01))
    rows += [Row(init, 0.8, 199.0, 2_100, 22.0, 1.1, 1.05, 1.15, 0.5, 0.03) for init in demo.INITS]
    table = format_table(rows)
    assert max(map(len, table.split("\n"))) <= 80
    assert table.count("80 %") == len(demo.INITS) and "21.0 %" in table
    save_results(tmp_path, rows)
    assert len(json.loads((tmp_path / "demo.json").read_text())["rows"]) == 7
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")

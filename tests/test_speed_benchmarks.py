"""The benchmarks of speed and capacity at sizes that say nothing: every cache is there and counted, the search finds
what fits, and a picture is the same each time. No times are checked."""

import json
import sys
from pathlib import Path

import pytest
import torch

from cskv_hf import ModelShape
from cskv_hf.attention import compressed_attention
from cskv_hf.cost import compressed_work, kept_layers, seconds
from cskv_hf.rates import Device

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MODULES = ("capacity", "common", "decode", "gpu_kernels", "memory", "plot")


@pytest.fixture(scope="module")
def scripts():
    """The benchmarks' modules, which import each other by plain names that no other test should find."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {name: __import__(name) for name in MODULES}
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def sizes(scripts):
    return scripts["common"].Sizes(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32)


@pytest.fixture(scope="module")
def measured(scripts, sizes):
    decode = scripts["decode"]
    states = scripts["common"].RandomStates(sizes, 2, "cpu", torch.float32)
    return decode.measure(sizes, decode.SETTINGS, 2, states, 128, 1, others=decode.installed_others())


def test_every_cache_is_measured_and_its_bytes_counted(scripts, sizes, measured):
    decode = scripts["decode"]
    held = {row["cache"]: row["bytes"] for row in measured}
    known = ["DynamicCache", "SDPA, ready cache", decode.PACKED, *decode.OTHERS, *(s.name for s in decode.SETTINGS)]
    assert [name for name in known if name in held] == list(held)
    assert {"StaticCache", *(s.name for s in decode.SETTINGS)} <= set(held)
    full = 2 * 2 * 128 * sizes.kv_dim * 4  # keys and values, rows, tokens, float32
    assert held["DynamicCache"] == held["SDPA, ready cache"] == held[decode.PACKED] == full
    assert full < held["StaticCache"] < 1.1 * full
    for name in ("quanto 4 bit", "hqq 4 bit"):
        if name in held:
            assert full / 8 < held[name] < full / 4, name
    assert all(row["seconds"] > 0 and row["batch"] == 2 and row["length"] == 128 for row in measured)


def test_a_static_cache_attends_to_what_it_holds(scripts, sizes, monkeypatch):
    """Its zeros behind the last token are masked: else it would attend to more tokens than the others."""
    decode, seen = scripts["decode"], []
    monkeypatch.setattr(decode, "sdpa_attention_forward", lambda m, q, k, v, mask, scaling: seen.append((k, mask)))
    states = scripts["common"].RandomStates(sizes, 1, "cpu", torch.float32)
    step, _ = decode.other_cache("StaticCache", sizes, 1, states, 64, 1, 4)
    for held in (65, 66):
        step()
        keys, mask = seen[-1]
        assert mask[0, 0, 0].tolist() == keys[0, 0].any(-1).tolist() == [i < held for i in range(68)]


def test_sizes_are_read_from_a_config(scripts, sizes, tmp_path):
    scripts["decode"].model_config(sizes, 3).save_pretrained(tmp_path)
    assert scripts["decode"].sizes_of(str(tmp_path)) == sizes


def test_a_library_that_is_missing_leaves_its_cache_out(scripts, monkeypatch, capsys):
    monkeypatch.setattr("transformers.cache_utils.is_hqq_available", lambda: False)
    assert "hqq 4 bit" not in scripts["decode"].installed_others()
    assert "hqq 4 bit is left out: You need to install" in capsys.readouterr().out


@pytest.mark.parametrize("bound", [0, 1, 2, 7, 8, 100, 12345])
def test_the_search_finds_the_largest_that_fits(scripts, bound):
    for limit in {0, 1, 2, bound // 9, bound // 3, bound // 2, bound - 1, bound, bound + 5}:
        tried = []

        def fits(number, limit=limit, tried=tried):
            tried.append(number)
            return number <= limit

        found, best = scripts["capacity"].largest(fits, bound), max(0, min(limit, bound))
        assert 0.95 * best <= found <= best
        if best <= 20:
            assert found == best
        assert all(1 <= number <= bound for number in tried) and len(tried) == len(set(tried)) <= 14


def test_what_a_row_of_capacity_says_was_tried_and_fitted(scripts, monkeypatch):
    """With a peak that is a fifth above the formula's, and memory that ends at twice the budget."""
    capacity, common = scripts["capacity"], scripts["common"]

    def peak(name, layers, length, batch, device):
        return int(1.2 * layers * length * batch * capacity.bytes_per_token(name, common.Sizes()))

    monkeypatch.setattr(capacity, "peak_bytes", peak)
    row = capacity.capacity("DynamicCache", 2, 1024, 1e8, "cpu")
    best = 1e8 / 1.2 / 2 / 4096
    assert 0.9 * best < row["context"] <= best and row["context"] % 256 == 0
    assert row["batch"] == int(best / 1024)
    assert (row["context"], 1, peak("DynamicCache", 2, row["context"], 1, "cpu")) in row["tries"]


def test_the_same_numbers_give_the_same_picture(scripts, sizes, measured, tmp_path):
    about = {"machine": scripts["common"].machine(1), "layers": 2, "length": 128}
    names = ("DynamicCache", "80% head packed")
    files = {
        "decode": about | {"dtype": "torch.float32", "runs": [measured, measured]},
        "memory": about | {"dtype": "bfloat16", "rows": [{"cache": n, "held": 9, "peak": 10} for n in names]},
        "capacity": about
        | {"dtype": "bfloat16", "budget": 1e9, "rows": [{"cache": n, "context": 256, "batch": 3} for n in names]},
    }
    for name, data in files.items():
        source = tmp_path / f"{name}.json"
        source.write_text(json.dumps(data))
        pictures = [tmp_path / f"{name}-{i}.svg" for i in range(2)]
        for path in pictures:
            scripts["plot"].main([str(source), "--out", str(path)])
        first, second = (path.read_bytes() for path in pictures)
        assert first == second and b"<dc:date>" not in first and len(first) > 5000


def test_predictions_of_a_gpu(scripts):
    """Of every setting that was timed on one, by the rates of that machine; the speed page has the range."""
    common, ratios = scripts["common"], []
    results = json.loads((BENCHMARKS / "results" / "gpu-kernels.json").read_text(encoding="utf-8"))
    rates = dict(matmul=results["matrix_rate"], elements=2.5e13, read=results["copy_bandwidth"], operation=0.0)
    device = Device("cuda", torch.bfloat16, copied=(1e12, 1e12), attended=(1e12, 1e12), kernels=True, **rates)
    sizes = common.Sizes()
    shape = ModelShape("llama", 1, sizes.num_key_value_heads, sizes.head_dim)
    known = {setting.name: setting for setting in scripts["gpu_kernels"].SETTINGS}
    for row in results["rows"]:
        if row["batch"] == 1 or row["cache"] not in known:
            continue
        setting = known.pop(row["cache"])
        config = common.planned(setting, sizes)
        (kept,) = kept_layers(config, shape, setting.key_layout)
        step = compressed_work(kept, config, shape, sizes.num_attention_heads, row["length"], row["batch"], device)
        ratios.append(seconds(step, device) / row["seconds"])
    assert not known
    page = (BENCHMARKS.parent / "docs" / "speed.md").read_text(encoding="utf-8")
    assert f"they give {min(ratios):.2f} to {max(ratios):.2f} of the time" in page


def test_the_first_row_in_float64(scripts, sizes):
    """What the kernels' error is measured against, is the same attention."""
    common, gpu_kernels = scripts["common"], scripts["gpu_kernels"]
    states = common.RandomStates(sizes, 3, "cpu", torch.float32)
    for setting in (common.Setting(0.8, "head", 16), common.Setting(0.8, "head")):
        (kv,) = common.FilledCache(setting, sizes, 1, 128, states).step(states)
        query = states.query()
        expected = compressed_attention(query.double()[:1], gpu_kernels.first_row(kv), 0.2)
        assert expected.dtype == torch.float64
        torch.testing.assert_close(compressed_attention(query, kv, 0.2)[:1].double(), expected, atol=1e-5, rtol=1e-5)

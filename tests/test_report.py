"""The report: what is in the files is on the page, as text and nothing else; what is not there is said; charts put
values where they belong. Rows here are made up: they test how measurements are shown, not what they are."""

import inspect
import json
import math
import re
from itertools import pairwise

import pytest
from conftest import lossy, make_model
from report_pages import MODEL, Parsed, all_tables, results, row
from safetensors import safe_open

import cskv_hf
import cskv_hf.demo
import cskv_hf.report.write
from cskv_hf import CSKVConfig, ModelShape
from cskv_hf.cli import evaluate_model
from cskv_hf.report import write_report
from cskv_hf.report.data import same_model
from cskv_hf.report.formats import count, interval, measured
from cskv_hf.report.page import STYLE, page
from cskv_hf.report.provenance import OPTIONS, eval_command
from cskv_hf.report.rows import place_of
from cskv_hf.report.sections import KNOWN_TABLES


@pytest.fixture(scope="module")
def full(adapters, tmp_path_factory):
    """The page of everything, its parsed form, its JSON."""
    folder = tmp_path_factory.mktemp("full")
    path = results(folder / "results.json", all_tables())
    out = write_report(adapters / "packed", [path], folder / "page.html")
    text = out.read_text(encoding="utf-8")
    return text, Parsed(text), json.loads((folder / "page.json").read_text())


def test_page_is_well_formed_and_loads_nothing(full):
    text, parsed, _ = full
    assert text.startswith('<!doctype html>\n<html lang="en">')
    names = {name for name, _ in parsed.elements}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for name, attributes in parsed.elements:
        assert not {"src", "srcset", "data", "background", "action"} & set(attributes), (name, attributes)
        assert not any(key.startswith("on") for key in attributes), attributes
    assert all(link.startswith("#") for link in parsed.links)
    assert "url(" not in text and "@import" not in text and "//" not in STYLE.read_text()
    assert len(parsed.ids) == len(set(parsed.ids)) and {link[1:] for link in parsed.links} <= set(parsed.ids)


def test_headings_are_in_order_and_pictures_are_named(full):
    text, parsed, _ = full
    levels = [int(name[1]) for name, _ in parsed.elements if re.fullmatch(r"h[1-6]", name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    pictures = [attributes for name, attributes in parsed.elements if name == "svg"]
    assert len(pictures) > 10 and all(a["role"] == "img" and a["aria-label"] for a in pictures)
    assert text.count("<svg") == len(re.findall(r"<svg[^>]*><title>[^<]+</title>", text))
    captions = len(re.findall(r"<table><caption>[^<]+</caption>", text))
    assert captions == text.count("<table") == text.count('class="scroll"')


def test_every_value_is_on_the_page(full):
    """Each number of each row, as text that can be read without pointing at anything."""
    _, parsed, _ = full
    titles = re.sub(r"<title>.*?</title>", "", full[0])
    seen = Parsed(titles).text
    for one in all_tables():
        words = [measured(one["metric"], one["value"]), interval(one["metric"], one["low"], one["high"])]
        words += [count(one["cache_bytes"]), count(one["total"]), one["method"], one["group"], "12.3"]
        for word in words:
            assert word.replace("\u00a0", " ") in seen, (word, one)
    assert "9.8.7" in parsed.text and "abacus" in parsed.text and "31,415" in parsed.text
    assert "cskv eval tiny --tables all" in parsed.text and "cskv report" in parsed.text
    for value in ("1.0204", "1.0101 to 1.0303", "0.01234", "93.8 %", "12.50", "12.25", "4,321"):
        assert value in parsed.text, value


def test_numbers_of_the_adapter(adapters, full):
    """Bytes, memory and ranks are those of the config; the printed formula gives the same bytes."""
    _, parsed, data = full
    config = CSKVConfig.from_pretrained(str(adapters / "packed"))
    shape = ModelShape(**config.model_shape)
    adapter = data["adapter"]
    assert (
        adapter["bytes_per_token"] == config.bytes_per_token(shape)
        and adapter["full_bytes_per_token"] == 2 * 2 * 32 * 2
    )
    for point in adapter["memory"] + adapter["curve"]:
        assert point["cache_bytes"] == config.cache_nbytes(shape, point["tokens"])
        assert point["full_bytes"] == 256 * point["tokens"]
    latent, exact, position, constant = (
        float(n.replace(",", ""))
        for n in re.search(
            r"cache\(n\) = ([\d.,]+) · old\(n\) \+ ([\d.,]+) · \(n − old\(n\)\) \+ (\d+) n \+ (\d+)", parsed.text
        ).groups()
    )
    kept, block, again = map(
        int, re.search(r"old\(n\) = max\(0, ⌊\(n − (\d+)\) / (\d+)⌋ · (\d+)\)", parsed.text).groups()
    )
    assert block == again
    for n in (1, 18, 19, 20, 777, 4096):
        old = max(0, (n - kept) // block * block)
        assert round(latent * old) + exact * (n - old) + position * n + constant == config.cache_nbytes(shape, n)
    with safe_open(adapters / "packed" / "adapter_model.safetensors", "pt") as weights:
        spectra = {name: weights.get_tensor(name)[0] for name in weights.keys() if "spectrum" in name}  # noqa: SIM118
    for layer in adapter["layers"]:
        i = layer["layer_idx"]
        assert layer["key_ranks"] == config.key_ranks[i] and layer["value_rank"] == config.value_ranks[i]
        assert sum(channels for _, channels in layer["key_channels"]) == layer["key_rank"] == sum(config.key_ranks[i])
        assert layer["key_bytes"] + layer["value_bytes"] == config.fit_report["layers"][i]["bytes_per_token"]
        assert layer["key_error"] == config.fit_report["layers"][i]["key_error"]
        keys = next(tensor for name, tensor in spectra.items() if f"layers.{i}." in name and "key" in name)
        stored = [v for group in adapter["spectra"][i]["keys"] for v in group]
        assert stored == pytest.approx(keys.tolist(), rel=1e-4)
        assert [len(group) for group in adapter["spectra"][i]["keys"]] == config.key_ranks[i]


def test_sections_without_data_say_what_to_run(adapters, tmp_path):
    parsed = Parsed(write_report(adapters / "plain", [], tmp_path).read_text(encoding="utf-8"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]
    for table in KNOWN_TABLES:
        command = f"cskv eval MODEL --tables {table} --benchmark text:FILE --data FILE --out FOLDER"
        assert table in ("adapter", "needle") or command in parsed.text, table
    assert "cskv eval plain --benchmark text:FILE --out FOLDER" in parsed.text
    assert "cskv eval plain --benchmark needle:FILE --out FOLDER" in parsed.text
    assert "Not measured:" in parsed.text and "16 bits" in parsed.text


@pytest.mark.parametrize("table", KNOWN_TABLES)
def test_one_table_alone(adapters, tmp_path, table):
    """Every section stands without the others, and the summary says which of them there is."""
    rows = [one for one in all_tables() if one["table"] == table]
    out = write_report(adapters / "plain", [results(tmp_path / "r.json", rows)], tmp_path / "page.html")
    parsed = Parsed(out.read_text(encoding="utf-8"))
    commands = {name: f"--tables {name} " for name in KNOWN_TABLES if name not in ("adapter", "needle")}
    commands["needle"] = "--benchmark needle:FILE"
    absent = {name for name, command in commands.items() if command in parsed.text.split("To make this page")[0]}
    assert absent == set(commands) - {"methods" if table == "adapter" else table}


def test_text_from_files_stays_text(adapters, tmp_path):
    evil = "</title></style><script>alert('x')</script><img src=x onerror=\"y\"> & \x00\ud800 'quoted'"
    rows = [one | {"method": evil, "group": evil, "details": one["details"] | {evil: evil}} for one in all_tables()]
    rows += [row(evil, evil, benchmark=evil, metric=evil), row(evil, "ours" + evil)]
    changes = dict(environment={evil: evil}, settings={"command": evil, evil: [evil, {evil: None}]})
    path = results(tmp_path / "<b>&.json", rows, model=MODEL | {"name": evil}, **changes)
    folder = tmp_path / "<i>adapter&"
    folder.mkdir()
    for file in (adapters / "packed").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    config["fit_report"]["source"] = config["fit_report"]["evaluation"]["source"] = evil
    config["base_model_name_or_path"] = evil
    (folder / "adapter_config.json").write_text(json.dumps(config))
    text = write_report(folder, [path], tmp_path / "page.html").read_text(encoding="utf-8")
    parsed = Parsed(text)
    names = {name for name, _ in parsed.elements}
    assert not names & {"script", "img", "b"} and ("i", {}) not in parsed.elements
    assert not any(key.startswith("on") for _, attributes in parsed.elements for key in attributes)
    assert "alert('x')" in parsed.text and "\x00" not in text and "<i>adapter&" in parsed.text


def test_missing_values(adapters, tmp_path):
    """NaN, infinity and null are dashes on the page, null in the JSON, and nowhere in a chart."""
    nothing = dict(low=None, high=None, share=None, bytes_per_token=None, cache_bytes=None, seconds=None, total=None)
    rows = [one | nothing for one in all_tables()]
    for i, one in enumerate(rows):
        one["value"] = (None, math.nan, math.inf, one["value"])[i % 4]
        one["compression"] = one["compression"] if i % 3 else math.nan
    path = results(tmp_path / "r.json", rows)
    out = write_report(adapters / "packed", [path], tmp_path / "page.html")
    text = out.read_text(encoding="utf-8")
    Parsed(text)
    assert not re.search(r"\b(nan|inf|None|NaN|Infinity)\b", text.split("<body>")[1])

    def refuse(name):
        raise AssertionError(name)

    data = json.loads((tmp_path / "page.json").read_text(), parse_constant=refuse)
    assert len(data["rows"]) == len(rows) and any(one["value"] is None for one in data["rows"])
    skipped = [row(value=None, low=None, high=None, total=0, skipped=77)]
    again = write_report(adapters / "packed", [results(tmp_path / "s.json", skipped)], tmp_path / "page.html")
    assert "77 skipped" in Parsed(again.read_text(encoding="utf-8")).text


@pytest.mark.parametrize("name", ["cut", "ranks", "plain"])
def test_other_adapters(adapters, tmp_path, name):
    """Cut after the fit (its errors are of other ranks), given ranks, nothing packed."""
    path = results(tmp_path / "r.json", all_tables())
    text = write_report(adapters / name, [path], tmp_path / "page.html").read_text(encoding="utf-8")
    layers = json.loads((tmp_path / "page.json").read_text())["adapter"]["layers"]
    assert all((layer["key_error"] is None) == (name == "cut") for layer in layers)
    assert ("were cut since" in Parsed(text).text) == (name == "cut")


def test_adapter_without_report(adapters, tmp_path):
    """What is not there is said."""
    for file in (adapters / "packed").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"fit_report": None, "sensitivity": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    data = json.loads(write_report(tmp_path, [], tmp_path / "page.html").with_suffix(".json").read_text())
    data["adapter"]["spectra"] = None
    text = Parsed(page(data)).text
    assert "did not record them" in text and "holds no spectra" in text and "cskv fit" in text
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is missing"):
        write_report(tmp_path, [], tmp_path / "page.html")
    with pytest.raises(ValueError, match="`adapter_dir` must be the directory of an adapter"):
        write_report(tmp_path / "nowhere", [], tmp_path / "page.html")


@pytest.mark.parametrize("family", ["mistral-sliding", "qwen2-mixed", "qwen3"])
def test_families_whose_layers_may_slide(family, tmp_path):
    """The adapter's files do not say which do: bytes are those of layers that attend to all, and the page says so."""
    fitted = lossy(make_model(family), compression=0.5)
    fitted.save_pretrained(tmp_path)
    out = write_report(tmp_path, [], tmp_path / "page.html")
    config, data = fitted.peft_config["default"], json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    full = fitted.get_base_model().config
    full.sliding_window, full.layer_types = None, ["full_attention"] * full.num_hidden_layers
    for point in data["adapter"]["memory"]:
        assert point["cache_bytes"] == config.cache_nbytes(full, point["tokens"])
    assert "with a sliding window holds less" in Parsed(out.read_text(encoding="utf-8")).text


def test_the_same_model_under_two_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "large").mkdir(parents=True)
    bundled = "/somewhere/else/cskv_hf/demo/model"
    assert same_model("bundled", bundled) and same_model(bundled, str(cskv_hf.demo.MODEL_PATH))
    assert same_model("a/b", "a/b/") and same_model("a/b", "a/c") is False
    for other in ("c/b", "c/B", "/x/c", "./c", "c", "", "models/large", "x/y/c"):
        assert same_model("a/b", other) is None, other


def test_the_command_has_every_option():
    """As given, all at once and none; every one of them is one of `cskv eval`."""
    settings, options = {"model": "tiny", "benchmarks": ["longbench:x.jsonl"]}, ""
    result = {"settings": settings, "model": {}, "tables": ["adapter"]}
    assert eval_command(result) == "cskv eval tiny --benchmark longbench:x.jsonl --out FOLDER"
    parameters = inspect.signature(evaluate_model).parameters
    for number, name in enumerate(OPTIONS, start=7):
        settings[name], options = number, f"{options} --{name.replace('_', '-')} {number}"
        assert name in parameters
    assert eval_command(result) == f"cskv eval tiny --benchmark longbench:x.jsonl{options} --out FOLDER"


def test_rows_as_the_suite_writes_them(adapters, tmp_path):
    """Labels beside methods, a window alone of equal bytes, a cache without bytes per token, needles among lines."""
    more = {"kind": "cskv", "context_tokens": 1024, "cache_share": 0.2512}
    rows = [row(method="ours", label=f"{100 * c:g} % ours", compression=c, share=1 - c) | more for c in (0.5, 0.8)]
    rows.append(row(method="window + sinks", compression=0.8, share=0.0, bytes_per_token=0.0, value=0.25) | more)
    rows.append(row(method="quantised, 4 bits", compression=None, share=None, bytes_per_token=None, value=0.5) | more)
    place = {"num_lines": 50, "depth": 0.25, "position": 13}
    rows.append(row(method="ours", benchmark="needle", group="50 lines, depth 25 %", value=0.625, details=place))
    settings = {"model": "tiny", "benchmarks": ["lines:50"], "epochs": 2.0}
    path = results(tmp_path / "results.json", rows, settings=settings)
    text = write_report(adapters / "packed", [path], tmp_path / "page.html").read_text(encoding="utf-8")
    parsed = Parsed(text)
    assert "cskv eval tiny --benchmark lines:50 --tables methods --epochs 2.0 --out FOLDER" in parsed.text
    assert "25.1 % of 1,024 tokens" in parsed.text and "80 % ours" in parsed.text
    assert "text, lines" in parsed.text and "62.5" in parsed.text
    data = json.loads((tmp_path / "page.json").read_text())["rows"]
    places = [place_of(one, 256) for one in data[:4]]
    assert places == pytest.approx([0.5, 0.2, 0.2, 0.2512])

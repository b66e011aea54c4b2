"""The report: what is in the files is on the page, as text and nothing else; what is not there is said; charts put
values where they belong. Rows here are made up: they test how measurements are shown, not what they are."""

import inspect
import json
import math
import random
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import lossy, make_model
from safetensors import safe_open

import cskv_hf
import cskv_hf.demo
import cskv_hf.report.write
from cskv_hf import CSKVConfig, ModelShape
from cskv_hf.cli import evaluate_model
from cskv_hf.evaluate import fingerprint
from cskv_hf.report import write_report
from cskv_hf.report.charts import (
    HEAT_TEXT,
    Axis,
    Cell,
    Column,
    Point,
    Reference,
    Series,
    heat_map,
    heat_opacity,
    line_chart,
    marker,
    stacked_bars,
    whole_ticks,
)
from cskv_hf.report.data import report_data, same_model
from cskv_hf.report.formats import Style, benchmark_name, count, interval, measured, significant, size, style_of
from cskv_hf.report.markup import Safe, escape, tag
from cskv_hf.report.page import OPTIONS, STYLE, eval_command, page
from cskv_hf.report.rows import place_of
from cskv_hf.report.scales import Scale, linear_ticks, log_ticks, power_ticks, spread
from cskv_hf.report.sections import KNOWN_TABLES

MODEL = {"name": "tiny", "layers": 2, "num_key_value_heads": 4, "head_dim": 8, "parameters": 31415}
VOID = {"meta", "br"}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Directories of adapters: packed, plain, of given ranks, cut after the fit."""
    folder, model = tmp_path_factory.mktemp("adapters"), make_model()
    evaluation = {"source": "held_out.txt", "tokens": 4321, "perplexity_full": 12.25, "perplexity": 12.5}
    evaluation |= {"ratio": 1.0204, "ratio_low": 1.0101, "ratio_high": 1.0303, "kl": 0.01234, "agreement": 0.9375}
    ways = {
        "packed": dict(compression=0.8, bits=None, allocation=None, block_size=8),
        "plain": dict(compression=0.5),
        "ranks": dict(compression=None, key_rank=8, value_rank=12, key_layout="joint", init="svd"),
    }
    for name, settings in ways.items():
        fitted = lossy(model, **settings)
        fitted.peft_config["default"].fit_report["evaluation"] = evaluation if name == "packed" else None
        fitted.save_pretrained(folder / name)
        if name == "packed":
            cskv_hf.tuner.shrink(fitted, 0.9)
            fitted.save_pretrained(folder / "cut")
        model = fitted.unload()
    return folder


def row(table="methods", method="ours", **fields):
    """A row as `cskv eval` writes it, with numbers that are found nowhere else on the page."""
    base = {"table": table, "method": method, "compression": 0.8, "window": None, "key_share": None}
    base |= {"bytes_per_token": 404.0, "share": 0.19727, "cache_bytes": 519296, "benchmark": "lines"}
    base |= {"group": "100 lines", "metric": "accuracy", "value": 0.7654, "low": 0.7123, "high": 0.8111}
    base |= {"total": 240, "skipped": 3, "seconds": 12.3, "details": {}}
    return base | fields


def all_tables():
    """Rows for every section of the page."""
    text = dict(benchmark="text", group="", metric="perplexity_ratio")
    rows = [row(method="full cache", compression=None, share=1.0, bytes_per_token=512.0, value=0.9501)]
    rows.append(row(method="window + sinks", compression=None, share=0.0, bytes_per_token=0.0, value=0.0321))
    for i, method in enumerate(("ours", "ours + QAT", "asvd", "asvd + training", "quantized cache", "brand new")):
        for compression in (0.8, 0.95):
            fields = dict(compression=compression, share=1.003 - compression, bytes_per_token=512 * (1 - compression))
            rows.append(row(method=method, value=0.61 + 0.0111 * i - 0.05 * compression, **fields))
            rows.append(row(method=method, **fields, **text | dict(value=1.01 + i / 70, low=1.003, high=1.2)))
            kl = dict(value=10.0 ** (i - 5), low=None, high=None, metric="kl")
            rows.append(row(method=method, **fields, **text | kl))
            rows.append(row(method=method, **fields, **text | kl | dict(metric="perplexity", value=23.4567 + i)))
    rows += [row("initialisation", m, value=0.41 + i / 90) for i, m in enumerate(("random", "svd", "mse"))]
    rows += [
        row("window", window=w, compression=c, value=0.5 + w / 1000 - c / 10) for w in (8, 32, 128) for c in (0.8, 0.9)
    ]
    rows += [row("budget", key_share=k, value=0.6 - (k - 0.4) ** 2) for k in (0.2, 0.4, 0.6)]
    rows += [
        row("quantisation", f"ours, {way}", compression=c, value=0.55 + c / 30 + len(way) / 100)
        for way in ("none", "PTQ", "QAT 4")
        for c in (0.8, 0.95)
    ]
    rows += [
        row(
            "needle",
            "ours",
            benchmark="needle",
            group=f"depth {d}, {n}",
            value=d / 3 + n / 9999,
            details={"depth": d, "length": n},
        )
        for d in (0.0, 0.5, 1.0)
        for n in (512, 1024, 2048)
    ]
    rows.append(row("needle", "asvd", benchmark="needle", group="all", value=0.4321))
    rows += [row("adapter", m, value=v) for m, v in (("full cache", 0.9876), ("this adapter", 0.8765))]
    rows.append(
        row("speed", "ours", benchmark="decode", metric="seconds per token", value=0.012345, low=None, high=None)
    )
    return rows


def results(path, rows, **changes):
    data = {"version": 1, "environment": {"torch": "9.8.7", "machine": "abacus"}, "model": MODEL}
    data |= {"settings": {"command": "cskv eval tiny --tables all", "records": 30}, "rows": rows}
    path.write_text(json.dumps(data | changes))
    return path


class Parsed(HTMLParser):
    """A strict reader: every element that opens closes, in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.words, self.ids, self.links = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"left open: {self.open}"
        self.text = " ".join(self.words).replace("\u00a0", " ")

    def handle_starttag(self, name, attributes):
        assert len(dict(attributes)) == len(attributes), f"an attribute twice: {name} {attributes}"
        self.elements.append((name, dict(attributes)))
        self.ids += [value for key, value in attributes if key == "id"]
        self.links += [value for key, value in attributes if key == "href"]
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open and self.open.pop() == name, f"{name} closes what is not open"

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


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
    per_token = config.bytes_per_token(ModelShape(**config.model_shape))
    for point in data["adapter"]["memory"]:
        assert point["cache_bytes"] >= per_token * config.num_old_tokens(point["tokens"])
    assert "with a sliding window holds less" in Parsed(out.read_text(encoding="utf-8")).text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "no list of `rows`"),
        ('{"version": 2, "rows": []}', "`version`=2, this cskv-hf reads 1"),
        ('{"rows": []}', "`version`=None"),
        ('{"version": 1, "rows": [], "settings": 3}', "`settings`"),
        ('{"version": 1, "rows": [3]}', "Row 1"),
        ('{"version": 1, "rows": [{"table": "methods"}]}', "`method` of row 1"),
        (json.dumps({"version": 1, "rows": [row(), row(value="0.5")]}), "`value` of row 2"),
        (json.dumps({"version": 1, "rows": [row(total=True)]}), "`total` of row 1"),
        (json.dumps({"version": 1, "rows": [row(details=[1])]}), "`details` of row 1"),
        (
            json.dumps({"version": 1, "rows": [], "model": MODEL | {"layers": 32}}),
            "another model .*layers: adapter 2, file 32",
        ),
        (
            json.dumps({"version": 1, "rows": [], "model": MODEL | {"model_type": "mistral"}}),
            "another model .*model_type: adapter llama, file mistral",
        ),
    ],
)
def test_results_that_are_refused(adapters, tmp_path, text, message):
    """The error names the file and what is wrong; nothing is written."""
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        write_report(adapters / "packed", [path], tmp_path / "page.html")
    assert str(path) in str(error.value) and [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_later_file_replaces_the_same_measurement(adapters, tmp_path):
    """Within a file nothing is dropped, even rows that cannot be told apart."""
    first = results(tmp_path / "a.json", [row(value=0.1), row(value=0.2), row("window", window=8, value=0.3)])
    second = results(tmp_path / "b.json", [row(value=0.4)])
    rows = report_data(adapters / "packed", [first, second])["rows"]
    assert sorted(one["value"] for one in rows) == [0.2, 0.3, 0.4]


def test_the_same_question_is_the_same_whatever_its_details(adapters, tmp_path):
    """A later run with other details replaces the earlier; how many questions were cut is said beside their number."""
    first = results(tmp_path / "a.json", [row(value=0.1, details={"tokens_cut": 17})])
    second = results(tmp_path / "b.json", [row(value=0.4, details={"cases_cut": 1234})])
    data = report_data(adapters / "packed", [first, second])
    assert [one["value"] for one in data["rows"]] == [0.4]
    text = write_report(adapters / "packed", [of_this_adapter(adapters, second)], tmp_path / "page.html").read_text()
    assert "1,234 cut" in at_a_glance(text) and "; 1,234 cut</title>" in text


def at_a_glance(text):
    """The words of the first table of numbers."""
    return Parsed("<table>" + re.search(r"<caption>Quality at a glance.*?</table>", text, re.S)[0]).text


def of_this_adapter(adapters, path, **settings):
    """The results file with all its rows made those of the adapter "packed"."""
    config = CSKVConfig.from_pretrained(str(adapters / "packed"))
    numbers = {
        "compression": config.compression,
        "bytes_per_token": config.bytes_per_token(ModelShape(**config.model_shape)),
    }
    data = json.loads(path.read_text())
    rows = [one | numbers | {"table": "adapter", "method": "this adapter"} for one in data["rows"]]
    path.write_text(json.dumps(data | {"rows": rows, "settings": data["settings"] | settings}))
    return path


def test_numbers_of_another_adapter_are_not_shown_as_this_ones(adapters, tmp_path):
    """What is shown at a glance has the bytes and the compression of the adapter, and its file where that is known."""

    def shown(path):
        text = write_report(adapters / "packed", [path], tmp_path / "page.html").read_text(encoding="utf-8")
        data, text = json.loads((tmp_path / "page.json").read_text()), Parsed(text).text
        summary = text.split("Cache size against context")[0].rpartition("An old token takes")[2]
        return summary, [one["method"] for one in data["rows"]], data["results"][0]["same_adapter"]

    path = tmp_path / "r.json"
    mine = of_this_adapter(adapters, results(path, [row(value=0.4321, low=None, high=None)]))
    summary, methods, same = shown(mine)
    assert "43.2 %" in summary and methods == ["this adapter"] and same is None
    assert "r.json was measured on tiny, an adapter of the same size, and does not say whether" in summary
    held = fingerprint.file_fingerprint(adapters / "packed" / "adapter_model.safetensors")
    summary, methods, same = shown(of_this_adapter(adapters, path, files={"adapter": held}))
    assert "43.2 %" in summary and methods == ["this adapter"] and same is True and "of the same size" not in summary
    for changes in (
        {"files": {"adapter": "another"}},
        {"bytes_per_token": 100.0},
        {"compression": 0.95},
        {"bytes_per_token": None},
    ):
        files = {"files": changes.pop("files")} if "files" in changes else {"files": {}}
        data = json.loads(of_this_adapter(adapters, path, **files).read_text())
        path.write_text(json.dumps(data | {"rows": [one | changes for one in data["rows"]]}))
        summary, methods, same = shown(path)
        assert "43.2 %" not in summary and methods == ["another adapter"] and same is False, changes
        assert "r.json was measured on another adapter, tiny, and is shown as that." in summary
        assert "No quality of this adapter was measured" not in summary  # what the fit recorded


def test_ours_with_other_settings_is_another_adapter(adapters, tmp_path):
    """At a glance are those with the adapter's bytes, compression and window; the others are marked."""
    config = CSKVConfig.from_pretrained(str(adapters / "packed"))
    same = {"bytes_per_token": config.bytes_per_token(ModelShape(**config.model_shape)), "window": config.window}
    others = [{"bytes_per_token": 404.0}, {"compression": 0.5}, {"window": 77}, {}]
    for i, other in enumerate(others):
        rows = [row(value=0.4321, low=None, high=None, **{"compression": 0.8} | same | other)]
        out = write_report(adapters / "packed", [results(tmp_path / "r.json", rows)], tmp_path / "page.html")
        text = out.read_text(encoding="utf-8")
        glance = at_a_glance(text)
        marked = '<th scope="row" class="words">ours<small>another adapter</small></th>' in text
        assert ("43.2 %" in glance) == ("fitted with its settings" in glance) == (not marked) == (other == {}), i


def with_base(adapters, folder, base):
    """A copy of an adapter that was fitted to `base`."""
    folder.mkdir(exist_ok=True)
    for file in (adapters / "plain").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_results_of_another_model_are_refused(adapters, tmp_path):
    """By the name of the base model; where names cannot tell, the page says whose numbers these are."""
    adapter = with_base(adapters, tmp_path / "mine", "ada/llama-small")
    for model, table, refused in (
        ({"name": "ada/llama-small"}, "methods", False),
        ({"name": "ada/llama-large"}, "methods", True),
        ({"name": "results/of-it", "base_model": "ada/llama-large"}, "adapter", True),
        ({"name": "results/of-it", "base_model": "ada/llama-small"}, "adapter", False),
        ({"name": "results/of-it"}, "adapter", None),  # an adapter of which model?
        ({"name": "/models/llama-large"}, "methods", None),
        ({"name": "bob/llama-small"}, "methods", None),
        ({}, "methods", None),
    ):
        numbers = {name: value for name, value in MODEL.items() if name != "name"}
        path = results(tmp_path / "r.json", [row(table)], model=numbers | model)
        if refused:
            with pytest.raises(
                ValueError, match=r"r\.json' is about another model .*ada/llama-small.*ada/llama-large"
            ):
                report_data(adapter, [path])
            continue
        text = Parsed(write_report(adapter, [path], tmp_path / "page.html").read_text(encoding="utf-8")).text
        named = model.get("name", "").rpartition("/models/")[2] or "a model without a name"
        doubt = f"r.json was measured on {named}, the adapter was fitted to ada/llama-small: the same sizes, but"
        assert (doubt in text) == (refused is None), model
        assert "A compressed KV cache for ada/llama-small" in text


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


def test_written_whole_or_not_at_all(adapters, tmp_path, monkeypatch):
    path = results(tmp_path / "results.json", all_tables())
    out = write_report(adapters / "packed", [path], tmp_path / "page.html")
    before = out.read_bytes(), out.with_suffix(".json").read_bytes()
    assert write_report(adapters / "packed", [path], out) == out
    assert before == (out.read_bytes(), out.with_suffix(".json").read_bytes())  # the same files, the same page
    data = json.loads(before[1])
    assert page(data).encode() == before[0]  # report.json is all there is behind it
    monkeypatch.setattr(cskv_hf.report.write, "page", lambda data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(adapters / "packed", [], out)
    assert before == (out.read_bytes(), out.with_suffix(".json").read_bytes())
    with pytest.raises(ValueError, match="would overwrite the results file"):
        write_report(adapters / "packed", [path], tmp_path / "results.html")
    with pytest.raises(ValueError, match=r"`out` must be a file ending in \.html"):
        write_report(adapters / "packed", [path], tmp_path / "page.pdf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "page.json", "results.json"]


def test_scales():
    linear, log = Scale(0, 10, 100, 200), Scale(1, 1000, 0, 300, log=True)
    assert [linear(v) for v in (0, 5, 10, -3, 99)] == [100, 150, 200, 100, 200]
    assert [log(v) for v in (1, 10, 100, 1000)] == pytest.approx([0, 100, 200, 300])
    assert Scale(1, 0.01, 0, 100, log=True)(0.1) == pytest.approx(50)  # from right to left
    for scale in (linear, log, Scale(-5, 5, 200, 0), Scale(0.5, 0.05, 0, 100, log=True)):
        values = [scale.low + (scale.high - scale.low) * i / 50 for i in range(51)]
        places = [scale(v) for v in values]
        assert places == sorted(places, reverse=scale.stop < scale.start)
    for ends in ((1, 1, False), (0, 1, True), (-1, 1, True)):
        with pytest.raises(ValueError, match="two different ends"):
            Scale(*ends[:2], 0, 1, log=ends[2])


def test_ticks():
    assert linear_ticks(0, 1, 6) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert linear_ticks(0.93, 1.46, 6) == [1.0, 1.1, 1.2, 1.3, 1.4]
    assert linear_ticks(-3, 12, 5) == [0, 5, 10]
    assert log_ticks(0.04, 0.6, 6) == [0.05, 0.1, 0.2, 0.5]
    assert log_ticks(1, 1e6, 4) == [1e0, 1e2, 1e4, 1e6]
    assert log_ticks(3e-5, 0.5, 5) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    assert log_ticks(2.7, 3.3, 4) == [2.8, 3.0, 3.2]  # no 1, 2 or 5 lies there
    assert power_ticks(6, 300, 7) == [8, 16, 32, 64, 128, 256]
    assert power_ticks(16, 131072, 6) == [2**5, 2**8, 2**11, 2**14, 2**17][-5:]
    assert whole_ticks(0, 31, 12) == list(range(0, 32, 4)) and whole_ticks(0, 79, 12) == list(range(0, 80, 8))
    rng = random.Random(0)
    for _ in range(200):
        low = rng.uniform(-9, 9) * 10 ** rng.randint(-6, 6)
        high, most = low + abs(low) * rng.uniform(0.01, 30) + 1e-9, rng.randint(2, 9)
        ticks = linear_ticks(low, high, most)
        assert len(ticks) <= most and all(low - 1e-9 * abs(low) <= t <= high + 1e-9 * abs(high) for t in ticks)
        if low > 0:
            assert all(low * 0.999 <= t <= high * 1.001 for t in log_ticks(low, high, most))


def test_labels_are_spread():
    """As little as possible: exact in hand cases, never closer than the gap, in the same order."""
    assert spread([10, 50, 90], 14, 0, 100) == [10, 50, 90]
    assert spread([50, 50], 14, 0, 100) == [43, 57]
    assert spread([1, 1, 80], 10, 0, 100) == [0, 10, 80]
    assert spread([99, 98], 10, 0, 100) == [100, 90]
    rng = random.Random(1)
    for _ in range(100):
        places = [rng.uniform(0, 300) for _ in range(rng.randint(1, 12))]
        moved = spread(places, 14, 0, 300)
        order = sorted(range(len(places)), key=lambda i: places[i])
        assert all(moved[b] - moved[a] >= 14 - 1e-9 for a, b in pairwise(order))
        assert all(-1e-9 <= place <= 300 + 1e-9 for place in moved)


def test_line_chart_puts_points_where_they_belong():
    """With labels off the frame is known: left by the widest tick, 14 at the right, 30 above, 40 below."""
    x, y = Axis("x", 0, 10, ticks=(0, 5, 10)), Axis("y", 0, 1, ticks=(0, 1))
    left = 12 + 0.57 * 11
    points = (Point(10, 1, 0.5, 1), Point(0, 0), Point(5, 0.5, title="half way"))
    reference = Reference("base", Style("full"), 0.25, 0.2, 0.3)
    chart = line_chart(
        "T", x, y, [Series("s", Style("ours"), points)], references=[reference], labels=False, width=200, height=170
    )
    middle = (left + 186) / 2
    assert f'd="M{left:.1f} 130L{middle:.1f} 80L186 30" class="line"' in chart  # in the order of x
    assert 'd="M186 80V30M183 30h6M183 80h6" class="whisker"' in chart
    assert chart.count('class="whisker"') == 1 and "<title>half way</title>" in chart
    assert f'd="M{left:.1f} 105H186" class="reference"' in chart
    assert 'y="100" ' in chart and 'height="10" class="band"' in chart
    named = line_chart("T", x, y, [Series("a<b", Style("ours"), points), Series("c", Style("asvd"), points)])
    assert ">a&lt;b<title>" in named and "a<b" not in named
    labels = [float(v) for v in re.findall(r'y="([\d.]+)" class="label"', named)]
    assert abs(labels[0] - labels[1]) >= 14


def test_bars_and_maps():
    columns = [Column(0, (("bits-4", 3, "three"), ("bits-2", 1, "one"))), Column(1, ())]
    chart = stacked_bars("T", "layer", Axis("n", 0, 4, ticks=(0, 4)), columns)
    boxes = re.findall(r'<rect x="[\d.]+" y="([\d.]+)" width="30" height="([\d.]+)" class="bar (bits-\d)">', chart)
    assert boxes == [("80", "150", "bits-4"), ("30", "50", "bits-2")]  # one on the other, 200 pixels are 4 channels
    cells = {(0, 0): Cell(1.0, "100", "all"), (1, 1): Cell(0.0, "0", "none"), (0, 1): Cell(None, "–", "skipped")}
    chart = heat_map("T", "tokens", "depth", ["512", "1,024"], ["0 %", "100 %"], cells)
    assert chart.count('class="heat"') == 2 and chart.count('class="nothing"') == 2
    assert re.findall(r'fill-opacity="([\d.]+)"', chart) == ["1.00", "0.04"]
    assert 'class="heat-text high" text-anchor="middle">100<' in chart and ">not measured<" in chart
    for kind in ("circle", "square", "triangle", "diamond"):
        assert marker(kind, 10, 20).startswith("M") and marker(kind, 10, 20).endswith("Z")


def test_numbers_as_text():
    assert [size(n) for n in (0, 999, 1000, 519296, 2097152, 134217728, 99.97e9)] == [
        s.replace(" ", "\u00a0") for s in ("0 B", "999 B", "1.00 kB", "519 kB", "2.10 MB", "134 MB", "100 GB")
    ]
    assert size(1e6, zeros=False) == "1\u00a0MB"
    assert measured("accuracy", 0.95) == "95.0\u00a0%" and measured("perplexity_ratio", 1.00274) == "1.0027"
    assert measured("kl", 0.00110) == "0.001100" and measured("kl", 6.874e-6) == "6.874e-6"
    assert benchmark_name("text:/some/where/book.txt") == "Text, book.txt" and benchmark_name("mine:x") == "mine:x"
    assert measured("unheard of", 1234567.0) == "1.235e6" and measured("kl", math.nan) == "–" and count(None) == "–"
    assert [significant(v, 2) for v in (0, 0.099999, 12.0, 1.5, -0.25)] == ["0", "0.1", "12", "1.5", "-0.25"]
    assert interval("accuracy", 0.915, 0.971) == "91.5 to 97.1" and interval("kl", None, 1) == ""


def test_styles():
    """Ours stands out, a trained variant has the colour of what was trained and a hollow marker."""
    assert style_of("ours").strong and not style_of("asvd").strong
    assert style_of("asvd + training").colour == style_of("asvd").colour and style_of("asvd + training").open
    assert style_of("ours + QAT").colour == "ours" and style_of("window + sinks").colour == "window"
    css = STYLE.read_text()
    for name in ("ours", "full", "window", "quantized", "asvd", "svd", "mse", "attention", "random", "other-1"):
        assert f".c-{name} " in css and css.count(f"--{name}: ") == 2, name  # light and dark


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read():
    """WCAG AA, 4.5 to 1, for every colour that text has, light and dark, on every field of a heat map too."""
    schemes = re.findall(r":root \{(.*?)\}", STYLE.read_text(), re.S)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", scheme))
        graphic = {"page", "rule", "soft", "faint"}
        for name in set(colours) - graphic:
            if not name.startswith(("heat", "bits")):
                assert contrast(colours[name], colours["page"]) >= 4.5, name
        for name in ("muted", "ours", "ink"):
            assert contrast(colours[name], colours["soft"]) >= 4.5, name
        for share in [i / 100 for i in range(101)]:
            mixed = "#"
            for i in (1, 3, 5):
                above, below = int(colours["heat"][i : i + 2], 16), int(colours["page"][i : i + 2], 16)
                mixed += f"{round(above * heat_opacity(share) + below * (1 - heat_opacity(share))):02x}"
            text = colours["heat-high" if share > HEAT_TEXT else "heat-low"]
            assert contrast(mixed, text) >= 4.5, share


def test_markup():
    assert tag("p", "a<b", None, [tag("b", "&"), False], class_='x"y', hidden=True, open=None) == (
        '<p class="x&quot;y" hidden>a&lt;b<b>&amp;</b></p>'
    )
    assert tag("rect", x=1.25, y=-0.01, fill_opacity="0.5") == '<rect x="1.2" y="0" fill-opacity="0.5"></rect>'
    assert isinstance(escape("<"), Safe) and escape(escape("<")) == "&lt;" and tag("br") == "<br>"


def test_style_sheet_is_packaged():
    assert STYLE.is_file() and STYLE.parent == Path(cskv_hf.report.write.__file__).parent

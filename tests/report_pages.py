"""Made-up results for the tests of reports: adapters, rows as `cskv eval` writes them, a page taken apart."""

import json
from html.parser import HTMLParser

import pytest
from conftest import lossy, make_model

import cskv_hf
import cskv_hf.demo
import cskv_hf.report.write

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
            cskv_hf.shrink(fitted, 0.9)
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

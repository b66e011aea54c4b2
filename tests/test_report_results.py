"""Which results a report takes for those of its adapter and its model, and which it refuses."""

import json
import re

import pytest
from report_pages import MODEL, Parsed, results, row

from cskv_hf import CSKVConfig, ModelShape
from cskv_hf.report import write_report
from cskv_hf.report.data import report_data
from cskv_hf.runs import file_fingerprint


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
    held = file_fingerprint(adapters / "packed" / "adapter_model.safetensors")
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

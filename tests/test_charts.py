"""What a report is drawn and written with: values are put where they belong, text stays text and can be read."""

import json
import math
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest
from report_pages import all_tables, results

import cskv_hf
import cskv_hf.demo
import cskv_hf.report.write
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
from cskv_hf.report.formats import Style, benchmark_name, count, interval, measured, significant, size, style_of
from cskv_hf.report.markup import Safe, escape, tag
from cskv_hf.report.page import STYLE, page
from cskv_hf.report.scales import Scale, linear_ticks, log_ticks, power_ticks, spread


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

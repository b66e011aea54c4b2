"""The documentation against the code: links lead somewhere, quoted messages exist, public names are as written."""

import ast
import html
import json
import pkgutil
import re
import runpy
from pathlib import Path
from statistics import mean, median

import pytest
import typer.cli
from doc_tables import END, begin
from typer.testing import CliRunner

import cskv_hf

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCE = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
RESULTS = ROOT / "benchmarks" / "results"
MODELS = {"bundled": "bundled", "stories260K": "stories260K", "babyllama": "babyllama-tok105"}
UPSTREAM = ("KeyError: 'CSKV'", "'CSKV' is not a valid PeftType", "RepositoryNotFoundError", "Revision Not Found")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_every_page_is_in_the_nav_of_the_site():
    """And nothing else: a page is where a reader of the site finds it, by its line in zensical.toml."""
    lines = re.findall(r'^[^#\n]*"([\w./-]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8"), re.M)
    pages = [page.name for page in (ROOT / "docs").glob("*.md")]
    made = ["index.md", "changelog.md", "examples/index.md"]  # of README.md, CHANGELOG.md, and a listing
    assert sorted(lines) == sorted([*pages, *made])


def test_public_names_are_in_the_reference():
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("api*.md"))
    documented = re.findall(r"^::: ([\w.]+)$", pages, re.M)
    assert {f"cskv_hf.{name}" for name in cskv_hf.__all__} <= set(documented)
    for name in documented:
        pkgutil.resolve_name(name)


def test_command_line_reference_is_what_typer_says(request):
    page = ROOT / "docs" / "cli.md"
    result = CliRunner().invoke(typer.cli.app, ["cskv_hf.cli", "utils", "docs", "--name", "cskv"])
    assert result.exit_code == 0, result.output
    text = html.unescape(re.sub(r"^#", "##", result.output[result.output.index("# `cskv`") :], flags=re.M)).strip()
    before, rest = page.read_text(encoding="utf-8").split(begin("cli"), 1)
    wanted = f"{before}{begin('cli')}\n\n{text}\n\n{END}{rest.split(END, 1)[1]}"
    if request.config.getoption("--write-docs"):
        page.write_text(wanted, encoding="utf-8")
    assert page.read_text(encoding="utf-8") == wanted, "docs/cli.md is stale: run `pytest --write-docs`."


def rows_of(table):
    """{model: {row: numbers}} of a table of quality.py, for the models it was run on."""
    held = {}
    for model, file in MODELS.items():
        rows = json.loads((RESULTS / f"quality-{file}.json").read_text())["rows"]
        held[model] = {row["name"]: row for row in rows if row["table"] == table}
    return held


def test_tables_of_choosing_are_the_results(documented):
    """Cells from the JSON; the fixture compares them with the page, or writes them."""
    for model, rows in rows_of("methods").items():
        for removed in ("50 %", "80 %", "90 %", "95 %"):
            row = rows[f"{removed} ours, no training"]
            cell = f"{row['ratio']:.4f} ({row['ratio_low']:.4f}–{row['ratio_high']:.4f})"
            documented("choosing-compression", removed, model, cell)
            if "accuracy" in row:
                answers = f"{row['accuracy']:.3f} ±{row['margin']:.3f}"
                documented("choosing-compression", removed, "bundled, lines retrieved", answers)
    for model, rows in rows_of("layouts").items():
        for removed in ("80 %", "90 %", "95 %"):
            for layout in ("head", "joint"):
                row = rows[f"{removed} each channel its bits: {layout}"]
                documented("choosing-layout", f"{removed}, `{layout}`", model, f"{row['kl']:.5f}")
    steps = {
        "`bits=16`, the same rank everywhere": "about the mean",
        "`bits=16`": "ranks by one budget, 16 bits",
        '`bits=4, allocation="uniform"`': "4 bits, values per channel as well",
        "`bits=4`": "4 bits on average, by one budget",
        "default, a range per channel": "each channel its bits",
        "default": "ranges shared by 4 channels",
        "default, ranges of 16 channels": "ranges shared by 16 channels",
        "default, `center=False`": "the same 4, not about the mean",
    }
    for compression in (0.8, 0.95):
        for model, rows in rows_of(f"steps {compression}").items():
            for label, name in steps.items():
                documented("choosing-bits", label, f"{model}, {100 * compression:.0f} %", f"{rows[name]['kl']:.5f}")
    limits = json.loads((RESULTS / "limits-bundled.json").read_text())["rows"]
    for table, page_table in (("exact", "choosing-exact"), ("calibration", "choosing-calibration")):
        for row in (row for row in limits if row["table"] == table):
            documented(page_table, row["name"], "KL", f"{row['kl']:.5f}")
            documented(page_table, row["name"], "perplexity, times the full cache's", f"{row['ratio']:.4f}")
            documented(page_table, row["name"], "lines retrieved", f"{row['accuracy']:.3f} ±{row['margin']:.3f}")


def test_table_of_storage_is_the_results(documented):
    for model, rows in rows_of("storage").items():
        for name, row in rows.items():
            documented("concepts-storage", name.replace(" %", " %,", 1), model, f"{row['kl']:.5f}")


def test_table_of_recall_is_the_results(documented):
    results = json.loads((RESULTS / "recall-smollm2-135m.json").read_text(encoding="utf-8"))
    assert results["needles"] == 30 and results["lengths"] == [1024] and results["text_tokens"] == 4096
    numbers = {}
    for row in results["rows"]:
        name = "full cache"
        if row.get("cache") != "full":
            name = f"{100 * row['compression']:.0f} % removed, {'with' if row['recall'] else 'without'} recall"
            name += ", trained" if "epochs" in row else ""
        numbers[name] = row["kl"], row["needle_kl"], row["right"]
        documented("choosing-recall", name, "KL, text", f"{row['kl']:.4f}")
        documented("choosing-recall", name, "KL, needles", f"{row['needle_kl']:.4f}")
        documented("choosing-recall", name, "numbers whole", f"{row['right']}")
    ways = ("without recall", "with recall", "with recall, trained")
    without, fitted, trained = (numbers[f"95 % removed, {way}"] for way in ways)
    limits = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
    assert f"takes the KL of text from {fitted[0]:.4f} to {trained[0]:.4f} and that of needles" in limits
    assert f"from {fitted[1]:.3f} to {trained[1]:.3f} ({without[1]:.3f} without recall)" in limits
    assert fitted[2] == trained[2] and f"with {trained[2]} of 30 numbers whole before and after" in limits


def test_table_of_probes_is_the_results(documented):
    """And what the text says of the worst."""
    half, quarter, lowest, highest = 1.0, 1.0, [], []  # the largest KL at 95 %, over that of all tokens
    for model, file in MODELS.items():
        results = json.loads((RESULTS / f"probes-{file}.json").read_text(encoding="utf-8"))["rows"]
        for removed in ("80 %", "95 %"):
            means = {}
            for probe in ("1024 tokens, pieces of 256", "512 tokens, pieces of 256", "256 tokens, pieces of 256",
                          "512 tokens, pieces of 128"):  # fmt: skip
                kl = [row["kl"] for row in results if row["name"].startswith(f"{removed} {probe},")]
                assert len(kl) == 3
                means[probe] = mean(kl)
                cell = f"{means[probe]:.5f} ({min(kl):.5f}–{max(kl):.5f})"
                documented("concepts-probes", probe.replace("1024", "1,024"), f"{model}, {removed}", cell)
                if removed == "95 %" and probe.startswith("256"):
                    lowest.append(min(kl) / means["1024 tokens, pieces of 256"])
                    highest.append(max(kl) / means["1024 tokens, pieces of 256"])
        half = max(half, means["512 tokens, pieces of 256"] / means["1024 tokens, pieces of 256"])
        quarter = max(quarter, means["256 tokens, pieces of 256"] / means["1024 tokens, pieces of 256"])
    page = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    half, quarter = 100 * (half - 1), 100 * (quarter - 1)
    assert f"cost up to {half:.0f} % of the KL at 95 %, a quarter up to {quarter:.0f} %" in page
    assert f"between {min(lowest):.2f} and {max(highest):.2f} times" in page


def test_table_of_the_rope_layout_is_the_results(documented):
    """And the times in the sentence below it, of both processes."""
    for file, where in (("rope-wired", "in two heads"), ("rope-spread", "in all heads")):
        for row in json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))["accuracy"]:
            name = "full cache" if row["share"] == 1 else f"{100 * row['share']:g} %"
            for layout in ("joint", "head", "rope", "still") if row["share"] == 1 else (row["layout"],):
                documented("design-rope", f"{where}, {name}", layout, f"{row['accuracy']:.3f}")
    ratios = {}
    for number in (1, 2):
        speed = json.loads((RESULTS / f"rope-speed-{number}.json").read_text(encoding="utf-8"))["speed"]
        seconds = {row["cache"]: row["seconds"] for row in speed}
        for name in ("80% rope 16 bit", "80% head 16 bit", "80% joint 16 bit"):
            ratios.setdefault(name, []).append(f"{seconds[name] / seconds['DynamicCache']:.2f}")
    rope, head, joint = (" and ".join(both) for both in ratios.values())
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    assert f"rope {rope}, per head {head}, joint {joint}" in page
    usual = json.loads((RESULTS / "rope-babyllama-tok105.json").read_text(encoding="utf-8"))["accuracy"]
    kl = {row["layout"]: f"{row['kl']:.4f}" for row in usual if row["share"] == 0.2}
    sentence = f"{kl['joint']} joint, {kl['head']} per head, {kl['rope']} rope and {kl['still']} still"
    assert f"the KL at 20 % is {sentence}" in page


def test_tables_of_limits_are_the_results(documented):
    rows = json.loads((RESULTS / "limits-bundled.json").read_text())["rows"]
    rows += json.loads((RESULTS / "quality-bundled.json").read_text())["rows"]
    for table, page_table in (("sides", "limits-sides"), ("quantiser", "limits-quantiser")):
        for row in (row for row in rows if row["table"] == table):
            documented(page_table, row["name"], "KL", f"{row['kl']:.5f}")
            documented(page_table, row["name"], "perplexity, times the full cache's", f"{row['ratio']:.4f}")
            documented(page_table, row["name"], "lines retrieved", f"{row['accuracy']:.3f} ±{row['margin']:.3f}")


def test_table_of_kvpress_is_the_results(documented):
    """A row per method; and what its text says of the perplexity."""
    ours, held = of_results("kvpress-ours"), of_results("kvpress-bundled")
    assert ours["settings"] == held["settings"]
    rows = sorted([*held["rows"], *ours["rows"]], key=lambda row: row["method"] not in ("full cache", "ours"))
    for row in rows:
        documented("kvpress", row["label"], "whole cache", f"{100 * row['cache_share']:.1f} %")
        if row["metric"] == "accuracy":
            column = "line retrieval" if row["group"] == "all" else row["group"]
            text = f"{row['value']:.3f} ±{(row['high'] - row['low']) / 2:.3f}"
            documented("kvpress", row["label"], column, text)
    for row in (row for row in rows if row["metric"] == "kl"):
        documented("kvpress", row["label"], "KL, second halves", f"{row['value']:.3f}")
    evicting = [row["value"] for row in held["rows"] if row["metric"] == "perplexity_ratio" and row["compression"]]
    page = (ROOT / "docs" / "kvpress.md").read_text(encoding="utf-8")
    assert f"to {min(evicting):.2f} to {max(evicting):.2f} of the full cache's" in page


def test_numbers_in_sentences_are_the_results():
    """Those of limits.md and faq.md that no table carries, where they stand."""
    limits = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
    faq = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    exact = {
        row["name"]: row["kl"]
        for row in json.loads((RESULTS / "limits-bundled.json").read_text())["rows"]
        if row["table"] == "exact"
    }
    without, default, wide = (exact[n] for n in ("window 32, sinks 0", "window 32, sinks 4", "window 96, sinks 4"))
    assert f"is {without:.5f} instead of {default:.5f}" in faq and f"it is {wide:.5f}" in faq
    rows, stories = rows_of("methods")["bundled"], rows_of("methods")["stories260K"]
    for model, place in (("bundled", "the bundled model"), ("stories260K",) * 2, ("babyllama",) * 2):
        found = rows_of("methods")[model]
        plain, trained = found["95 % ours, no training"]["kl"], found["95 % ours + QAT"]["kl"]
        assert f"from {plain:.4f} to {trained:.4f} on {place}" in limits
    asvd = rows["80 % paper: asvd"]["ratio"], rows["80 % paper: asvd + training"]["ratio"]
    assert f"from {asvd[0]:.3f} to {asvd[1]:.3f} at 80 %" in limits
    few = stories["95 % ours, no training"]
    assert f"{few['ratio']:.3f} times the perplexity at 95 %, and a KL of {few['kl']:.3f}" in limits
    ours = [rows[f"{removed} ours, no training"]["accuracy"] for removed in ("90 %", "95 %")]
    assert f"{ours[0]:.3f} come back at 90 %, {ours[1]:.3f} at 95 %" in limits
    more = json.loads((RESULTS / "quality-babyllama-512-rows.json").read_text(encoding="utf-8"))["rows"]
    more = {row["name"]: row for row in more}
    paper, ours, few = (
        more[n] for n in ("80 % paper: asvd + training", "80 % ours, no training", "95 % ours, no training")
    )
    margin = (paper["ratio_high"] - paper["ratio_low"]) / 2
    assert f"{paper['ratio']:.4f} ±{margin:.4f} of the full cache's" in limits
    assert f"ours at {ours['ratio']:.4f} at 80 % and {few['ratio']:.4f} at 95 %" in limits
    assert f"is {paper['kl']:.4f}, {ours['kl']:.4f} and {few['kl']:.4f}:" in limits
    few = rows_of("methods")["babyllama"]
    times = [few[p]["kl"] / few[o]["kl"] for p, o in [("80 % paper: asvd + training", "80 % ours, no training")]]
    times.append(paper["kl"] / ours["kl"])
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert f"is {times[0]:.0f} times smaller on 64 rows and {times[1]:.0f} times on 512" in results
    kl = [rows[f"95 % paper: asvd, {q} quantiser, {t}"]["kl"] for t in ("PTQ", "QAT") for q in ("its", "our")]
    clamped = "(KL {:.3f} against {:.3f}) and the worse with it ({:.3f} against {:.3f};".format(*kl)
    assert clamped in limits
    half = more["50 % ours, no training"]["kl"], more["50 % ours + training"]["kl"]
    assert f"at 50 %, from {half[0]:.6f} to {half[1]:.6f}." in limits
    much = [rows[f"80 % ours{name}"]["kl"] for name in (", no training", " + training")]
    assert f"at 80 %, the KL goes from {much[0]:.4f} to {much[1]:.4f}," in limits
    steps = rows_of("steps 0.9")["bundled"]
    uniform = [steps[name]["accuracy"] for name in ("asvd, uniform, 16 bits", "mse", "attention", "about the mean")]
    assert f"window alone does: {min(uniform):.3f} to {max(uniform):.3f} (" in limits
    for line in re.findall(r"(0\.\d\d) times `DynamicCache`|at 80 % (1\.\d\d) times|at 95 % (0\.\d\d) times", faq):
        assert f"| {''.join(line)} (" in (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")


def test_messages_of_troubleshooting_are_those_of_the_code():
    """Every quoted message, piece by piece between placeholders, is in the source as the user sees it."""
    joined = re.sub(r'"\s*\n\s*f?"', "", SOURCE)  # adjacent string literals
    rows = re.findall(r"^\| (.*?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.M)[2:]
    quotes = [quote for row in rows for quote in re.findall(r"`` (.*?) ``|`([^`]+)`", row)]
    quotes = [one or other for one, other in quotes]
    checked = 0
    for quote in quotes:
        if quote in UPSTREAM:
            continue
        for piece in re.split(r"…|'[^']*'|\bN\b|[\d.]{2,}", quote):
            piece = piece.strip(" '()/,")
            if len(piece) > 8:
                assert piece in joined, piece
                checked += 1
    assert checked > 20


def test_the_table_of_three_models_is_the_results():
    """Row by row."""
    columns = []
    for model in ("bundled", "stories260K", "babyllama-tok105"):
        results = json.loads((ROOT / "benchmarks" / "results" / f"quality-{model}.json").read_text())["rows"]
        columns.append({row["name"]: row["ratio"] for row in results if row["table"] == "methods"})
    names = ["80 % paper: asvd + training", "80 % ours, no training", "90 % paper: asvd + training"]
    names += ["90 % ours, no training", "95 % paper: asvd, its quantiser, QAT", "95 % paper: asvd, our quantiser, QAT"]
    names += ["95 % ours, no training"]
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| \d+ % removed.*$", page, re.M)
    assert len(table) == len(names)
    for line, name in zip(table, names):
        assert [cell.strip() for cell in line.split("|")[2:-1]] == [f"{column[name]:.4f}" for column in columns]


def of_results(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def spread_of(ratios):
    """Median and range over processes."""
    return f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def test_tables_of_the_speed_page_are_the_results(documented):
    """Medians and ranges over the runs of each benchmark."""
    for table, file in (("speed-decode", "decode"), ("speed-torch", "decode-torch")):
        ratios = {}
        for run in of_results(file)["runs"]:
            dynamic = {row["length"]: row["seconds"] for row in run if row["cache"] == "DynamicCache"}
            for row in run:
                of_dynamic = row["seconds"] / dynamic[row["length"]]
                ratios.setdefault((row["cache"], row["length"]), []).append(of_dynamic)
        for (name, length), r in ratios.items():
            documented(table, name, f"{length:,} tokens", "1" if name == "DynamicCache" else spread_of(r))
    for file, column in (("decode-8-new", "kernels"), ("decode-8-new-torch", "torch")):
        (run,) = of_results(file)["runs"]
        dynamic = next(row["seconds"] for row in run if row["cache"] == "DynamicCache")
        for row in run:
            documented("speed-new", row["cache"], column, f"{row['seconds'] / dynamic:.2f}")
    for file, column in (("generate", "kernels"), ("generate-torch", "torch")):
        runs = of_results(file)["runs"]
        for name in runs[0]:
            cell = spread_of([run[name] / run["DynamicCache"] for run in runs])
            documented("speed-generate", name, column, "1" if name == "DynamicCache" else cell)
    runs = of_results("kvpress-speed")["runs"]
    for name in runs[0]:
        cell = spread_of([run[name] / run["full cache"] for run in runs])
        documented("speed-kvpress", name, "a token", "1" if name == "full cache" else cell)
    for file, what in (("cost", ""), ("cost-torch", ", torch")):
        ratios = {}
        for row in (row for run in of_results(file)["runs"] for row in run["rows"]):
            ratios.setdefault((row["cache"], row["length"]), []).append(row["predicted"] / row["measured"])
        for (name, length), r in ratios.items():
            documented("speed-cost", name, f"{length:,} tokens{what}", spread_of(r))
    gpu = of_results("gpu-kernels")
    full = {row["batch"]: row["seconds"] for row in gpu["rows"] if row["cache"] == "SDPA, ready cache"}
    for row in gpu["rows"]:
        name, by_kernel, rows = row["cache"], row.get("kernels", {}), row["batch"]
        documented("speed-gpu", name, f"{rows} rows, ms" if rows > 1 else "1 row, ms", f"{1000 * row['seconds']:.3f}")
        ratio = f"{row['seconds'] / full[rows]:.2f}"
        documented("speed-gpu", name, f"{rows} rows, x SDPA" if rows > 1 else "1 row, x SDPA", ratio)
        if rows == 1:
            continue
        for column, kernel in (("scores, ms", "score_kernel"), ("values, ms", "value_kernel")):
            documented("speed-gpu", name, column, f"{1000 * by_kernel[kernel]:.3f}" if by_kernel else "")
        of_bytes, of_products = row["bytes"] / gpu["copy_bandwidth"], row.get("operations", 0) / gpu["matrix_rate"]
        roof = f"{100 * max(of_bytes, of_products) / row['seconds']:.0f} %" if by_kernel else ""
        documented("speed-gpu", name, "roofline", roof)
        size = gpu["plans"][name]["bytes_per_token"] if by_kernel else 4 * 8 * 128
        documented("speed-gpu", name, "bytes", f"{size:.0f}")
    later = of_results("gpu-kernels-h200")["rows"]
    full = {row["batch"]: row["seconds"] for row in later if row["cache"] == "SDPA, ready cache"}
    for row in later:
        rows = f"{row['batch']} rows" if row["batch"] > 1 else "1 row"
        documented("speed-gpu-h200", row["cache"], f"{rows}, ms", f"{1000 * row['seconds']:.3f}")
        ratio = f"{row['seconds'] / full[row['batch']]:.2f}"
        documented("speed-gpu-h200", row["cache"], f"{rows}, x SDPA", ratio)
    for file, what in (("step-8b-gpu", "8B, 1 row"), ("step-rows-gpu", "4 layers, 8 rows")):
        step = of_results(file)
        flash = step["seconds"]["DynamicCache, flash"]
        for name, seconds in step["seconds"].items():
            documented("speed-gpu-whole", name, f"{what}, ms", f"{1000 * seconds:.2f}")
            documented("speed-gpu-whole", name, f"{what}, x flash", f"{seconds / flash:.2f}")
            if file == "step-rows-gpu":
                busy = f"{100 * step['busy'][name] / seconds:.0f} %"
                documented("speed-gpu-whole", name, f"{what}, GPU busy", busy)
    (steps,) = of_results("decode-gpu")["runs"]
    ready = {row["batch"]: row["seconds"] for row in steps if row["cache"] == "SDPA, ready cache"}
    for row in steps:
        rows = f"{row['batch']} rows" if row["batch"] > 1 else "1 row"
        documented("speed-gpu-step", row["cache"], f"{rows}, ms", f"{1000 * row['seconds']:.2f}")
        documented("speed-gpu-step", row["cache"], f"{rows}, x SDPA", f"{row['seconds'] / ready[row['batch']]:.2f}")
    rows = of_results("capacity-gpu")["rows"]
    for row in rows:
        for key, column in (("context", "tokens of one row"), ("batch", "rows of 4,096 tokens")):
            documented("speed-capacity", row["cache"], column, f"{row[key]:,}")
            documented("speed-capacity", row["cache"], f"{column}, x DynamicCache", f"{row[key] / rows[0][key]:.1f}")
    rows = of_results("memory")["rows"]
    for row in rows:
        documented("speed-memory", row["cache"], "cache, MB", f"{row['held'] / 1e6:,.1f}")
        documented("speed-memory", row["cache"], "peak, MB", f"{row['peak'] / 1e6:,.1f}")
        share = f"{100 * row['peak'] / rows[0]['peak']:.1f} %"
        documented("speed-memory", row["cache"], "of DynamicCache's peak", share)


def test_numbers_in_sentences_of_speed_are_the_results():
    """On the page itself, and where others quote it."""
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    probe = of_results("fit")["probe"]
    assert probe["tokens"] == 512 and f"would take {probe['of_32_layers'] / 60:.0f} minutes for 32 layers" in page
    assert f"{probe['layers']} layers were measured" in page
    seconds = of_results("prefill")["seconds"]
    ratios = [f"{name} {seconds[name] / seconds['DynamicCache']:.2f}" for name in seconds if name != "DynamicCache"]
    assert ", ".join(ratios) in page
    rows = of_results("gpu-kernels")["rows"]
    step, rows_step = of_results("step-8b-gpu"), of_results("step-rows-gpu")
    alone, busy = 1000 * step["busy"]["DynamicCache"], rows_step["busy"]
    full_ms = f"kernels alone take {alone:.1f} ms of the step of one row and {1000 * busy['DynamicCache']:.1f} ms"
    ours_ms = [f"{1000 * run['busy']['95% 4 bit, recorded']:.1f}" for run in (step, rows_step)]
    assert f"{full_ms} of that of 8 rows; ours in a graph take {' and '.join(ours_ms)} ms" in page
    of_encoding = ("encode_kernel", "quantize_kernel", "pack_kernel")
    encoding = 1000 * sum(rows_step["kernels"]["95% 4 bit, recorded"][kernel] for kernel in of_encoding)
    more = 1000 * (busy["95% 4 bit, recorded"] - busy["95% 4 bit"])
    assert f"{encoding:.2f} ms of the recorded step of 8 rows, whose kernels take {more:.1f} ms more than" in page
    (apart,), (apart_rows,) = (run["differences"].values() for run in (step, rows_step))
    assert f"by {apart_rows:.3f} of their norm with four layers and by {apart:.3f} with 32" in page
    ms = {name: 1000 * t for name, t in step["seconds"].items()}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"in a CUDA graph: {ms['95% 4 bit, recorded']:.1f} ms on an H200 at an 8B's sizes" in readme
    assert f"(95 %, 4 bits), {ms['StaticCache, recorded']:.1f} ms with `StaticCache`" in readme
    flash = f"{ms['DynamicCache, flash']:.1f} ms with `DynamicCache` and flash attention, whose kernels alone"
    assert f"{flash} take {alone:.1f} ms" in readme
    of_flash = [
        run["seconds"]["95% 4 bit, recorded"] / run["seconds"]["DynamicCache, flash"] for run in (rows_step, step)
    ]
    limits = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
    assert f"with `CSKVStaticCache`, {of_flash[0]:.2f} to {of_flash[1]:.2f} of that" in limits
    recorded = of_results("step-recorded-gpu")
    shares = {name: recorded["busy"][name] / t for name, t in recorded["seconds"].items()}
    assert all(share > 0.9 if "recorded" in name else share < 0.15 for name, share in shares.items())
    errors = [row["error"] for row in rows if "error" in row]
    assert f"in float64, is {min(errors):.4f} to {max(errors):.4f}." in page
    by_name = {row["cache"]: row["seconds"] for row in rows if row["batch"] == 16}
    full, ours = by_name["SDPA, ready cache"], by_name["95% head 4 bit"]
    assert min(by_name.values()) == ours and f"is {full / ours:.1f} times as fast as SDPA" in page
    (joint,) = (row for row in rows if row["cache"] == "95% joint 4 bit" and row["batch"] == 16)
    roof = 100 * joint["operations"] / of_results("gpu-kernels")["matrix_rate"] / joint["seconds"]
    assert f"take {joint['seconds'] / full:.2f} of SDPA's time, at {roof:.0f} % of the roofline" in page
    for other in ("README.md", "docs/faq.md", "docs/limits.md"):
        text = (ROOT / other).read_text(encoding="utf-8")
        assert f"{full / ours:.1f} times as fast as SDPA" in text, other
    default, fours = full / by_name["95% head packed"], by_name["80% head packed x4"] / full
    assert f"is {default:.1f} times as fast as SDPA; at 80 % it takes {fours:.2f} of SDPA's time with" in page
    of_one_row = {row["cache"]: row["seconds"] for row in rows if row["batch"] == 1}
    one_row = of_one_row["SDPA, ready cache"] / of_one_row["95% head 4 bit"]
    assert f"on an H100 (32k tokens x 16 rows; {one_row:.1f} times with one row)" in readme
    choosing = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    of_full = f"{ours / full:.2f} of SDPA's time on an H100; "
    of_full += f"with the default bits and `rank_multiple=4`, {1 / default:.2f} ("
    assert of_full in choosing
    assert f"only `rank_multiple=4` is faster than SDPA, {fours:.2f}." in choosing
    pairs = [("80%", "16 bit"), ("95%", "4 bit"), ("95%", "packed")]
    joint_by_head = [by_name[f"{share} joint {bits}"] / by_name[f"{share} head {bits}"] for share, bits in pairs]
    assert f"and {min(joint_by_head):.1f} to {max(joint_by_head):.1f} times on an H100" in choosing
    memory = of_results("memory-gpu")["rows"]
    shares = [f"{100 * row['peak'] / memory[0]['peak']:.1f} % ({row['cache']})" for row in memory[1:]]
    assert f"{', '.join(shares)} of `DynamicCache`'s" in page
    prefill = of_results("prefill-gpu")
    seconds, alone = prefill["seconds"], {name: sum(t.values()) for name, t in prefill["kernels"].items()}
    ratios = [f"{name} {seconds[name] / seconds['DynamicCache']:.2f}" for name in seconds if name != "DynamicCache"]
    first, second, third = (f"{alone[name] / alone['DynamicCache']:.2f}" for name in list(seconds)[1:])
    assert ", ".join(ratios) in page and f"the kernels alone take {first}, {second} and {third} times as long" in page
    later = of_results("gpu-kernels-h200")
    errors = [row["error"] for row in later["rows"] if "error" in row]
    assert f"The error is {min(errors):.4f} to {max(errors):.4f} there as well" in page
    by_name = {row["cache"]: row for row in later["rows"] if row["batch"] == 16}
    on_h200 = by_name["SDPA, ready cache"]["seconds"] / by_name["95% head 4 bit"]["seconds"]
    assert f"and {on_h200:.1f} times on an H200, by earlier kernels (no gain with one row)" in readme
    one_row = {row["cache"]: row["seconds"] for row in later["rows"] if row["batch"] == 1}
    assert min(one_row.values()) == one_row["SDPA, ready cache"]
    by_dynamic = [seconds[name] / seconds["DynamicCache"] for name in list(seconds)[1:]]
    assert f"took {min(by_dynamic):.2f} to {max(by_dynamic):.2f} times as long" in limits
    shares = [
        100 * by_name[name]["operations"] / later["matrix_rate"] / by_name[name]["seconds"]
        for name in ("95% joint 4 bit", "95% head 4 bit")
    ]
    of_roof = f"joint keys of 4 bits are at {shares[0]:.0f} % of the roofline and keys per head at {shares[1]:.0f} %"
    assert of_roof in page
    joint = [
        row
        for run in of_results("cost")["runs"]
        for row in run["rows"]
        if row["cache"] == "95% joint packed" and row["length"] == 8192
    ]
    measured, predicted = ([row[f"{what}_of_dynamic"] for row in joint] for what in ("measured", "predicted"))
    both = f"measured at {min(measured):.2f} to {max(measured):.2f} of `DynamicCache` and predicted at"
    assert f"{both} {min(predicted):.2f} to {max(predicted):.2f}" in page
    quoted = {}
    for file in ("decode", "decode-torch"):
        for run in of_results(file)["runs"]:
            by_name = {row["cache"]: row["seconds"] for row in run if row["length"] == 8192}
            for name in ("80% head 16 bit", "80% head packed", "95% head packed"):
                quoted.setdefault((file, name), []).append(by_name[name] / by_name["DynamicCache"])
    kernels, alone = (
        [f"{median(r):.2f}" for key, r in quoted.items() if key[0] == f] for f in ("decode", "decode-torch")
    )
    faq = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    packed = f"with packed ones {kernels[1]} times at 80 % and {kernels[2]} times at 95 %"
    assert f"takes {kernels[0]} times `DynamicCache`'s time, {packed}" in faq
    assert f"{alone[0]}, {alone[1]} and {alone[2]} without" in faq


def test_needle_numbers_are_those_of_the_results():
    """Every row of the table, and the means over all cases."""
    page = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "benchmarks" / "results" / "needle.json").read_text())["results"]
    results = [result for result in results if result["haystack"].startswith("lines")]
    rows, caches = {}, {}
    for result in results:
        scores = result["scores"]
        share = sum(s["value"] * s["total"] for s in scores) / sum(s["total"] for s in scores)
        assert f" {share:.3f} (" in page
        caches.setdefault(result["haystack"].split(",")[0], []).append(result["cache"])
        if result["cache"] != "window":
            for score in scores:
                size, depth = score["group"].split(", depth ")
                rows.setdefault(size, {}).setdefault(depth, []).append(f"{score['value']:.2f}")
    for size, cells in rows.items():
        assert f"| {size} | {' | '.join(' / '.join(cell) for cell in cells.values())} |" in page
    assert caches["lines"] == ["full cache", "window", "80% removed", "95% removed"] and len(rows) == 4


def test_python_in_the_docs_compiles_and_names_what_exists():
    for page in PAGES:
        for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            compile(code, str(page), "exec")
            for name in re.findall(r"cskv_hf\.([A-Za-z_]+)", code):
                assert hasattr(cskv_hf, name) or (ROOT / "src" / "cskv_hf" / name).exists(), f"{page.name}: {name}"


def test_the_results_page_holds_the_tables_of_the_results():
    """Written by ``python benchmarks/results_page.py`` from what ``cskv eval bundled`` saved."""
    script = runpy.run_path(str(ROOT / "benchmarks" / "results_page.py"))
    page = script["PAGE"].read_text(encoding="utf-8")
    assert page == script["page_with_tables"](page)
    of_quality = 1  # by test_numbers_of_smollm2_are_the_results
    assert page.count("\n| full cache |") == len(script["TABLES"]) + of_quality and "| - | - |" not in page


def test_numbers_of_smollm2_are_the_results(documented):
    """The table of compressions; and what README and page say in sentences."""
    for row in of_results("quality-smollm2-135m")["rows"]:
        name = row["name"] if row["table"] == "ratios" else f"80 % {row['name']}"
        documented("smollm2-ratios", name, "bytes per old token", f"{row['bytes_per_token']:,.0f}")
        documented("smollm2-ratios", name, "perplexity", f"{row['ratio']:.4f}")
        documented("smollm2-ratios", name, "KL", f"{row['kl']:.4f}")
        documented("smollm2-ratios", name, "same token", f"{row['agreement']:.3f}")
    uniform = {row["name"]: f"{row['ratio']:.2f}" for row in of_results("quality-smollm2-135m")["rows"]}
    limits = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
    concepts = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    assert {uniform[name] for name in ("attention", "about the mean")} == {"1.02"} and "[at 1.02]" in concepts
    rows, found, ratio, kl, share = of_results("smollm2-135m")["rows"], {}, {}, {}, {}
    for row in rows:
        if row["metric"] == "accuracy" and row["group"] == "all":
            found[row["label"]] = round(row["value"] * row["total"])
        elif row["metric"] == "perplexity_ratio":
            ratio[row["label"]], share[row["label"]] = row["value"], 100 * row["cache_share"]
        elif row["metric"] == "kl":
            kl[row["label"]] = row["value"]
    ours, full, other, window = "80 % ours", "full cache", "quantised, 4 bits (quanto)", "{} % window + sinks"
    readme, page = (ROOT / name for name in ("README.md", "docs/results.md"))
    readme, page = readme.read_text(encoding="utf-8"), page.read_text(encoding="utf-8")
    of_readme = {"full cache": full, "transformers' `QuantizedCache`, 4 bits": other}
    of_readme |= {f"cskv-hf, {removed} % removed": f"{removed} % ours" for removed in (80, 90, 95)}
    of_readme |= {"first and last tokens only, the bytes of 95 %": window.format(95)}
    for name, label in of_readme.items():
        assert f"| {name} | {share[label]:.1f} % | {found[label]} | {ratio[label]:.3f} |" in readme
    assert f"at {ratio[ours]:.3f} times its perp" in page
    assert f"finds {found['95 % ours']} of 60 needles at 95 % (the full cache {found[full]})" in limits
    assert f"where its perplexity is {ratio['95 % ours']:.3f} times" in limits
    assert f"ours finds {found[ours]} of 60 needles, the full cache {found[full]}" in page
    assert f"with a KL of {kl[other]:.3f} against {kl[ours]:.3f}, in {share[other]:.1f} % of the bytes" in page
    few = [f"{found[name]} at {ratio[name]:.3f}" for name in ("90 % ours", "95 % ours")]
    assert f"At 90 % ours finds {few[0]} times the perplexity, at 95 % {few[1]}" in page
    found_by, at = ([of[window.format(removed)] for removed in (90, 95)] for of in (found, ratio))
    assert f"finds {found_by[0]} and {found_by[1]}, at {at[0]:.3f} and {at[1]:.3f}" in page
    assert f"of 80 %, {ratio[window.format(80)]:.3f} and {found[window.format(80)]} needles" in page
    trained = "80 % asvd + training"
    assert f"trained, finds {found[trained]} at 80 %, at {ratio[trained]:.3f} times the perplexity" in page


def test_numbers_of_gemma3_are_the_results():
    """What README and pages say in sentences."""
    found, ratio, share, kl = {}, {}, {}, {}
    for row in of_results("gemma3-270m")["rows"]:
        if row["metric"] == "accuracy" and row["group"] == "all":
            found[row["label"]], total = round(row["value"] * row["total"]), row["total"]
        elif row["metric"] == "perplexity_ratio":
            ratio[row["label"]], share[row["label"]] = f"{row['value']:.3f}", row["cache_share"]
        elif row["metric"] == "kl":
            kl[row["label"]] = row["value"]
    ours = [f"{removed} % ours" for removed in (80, 90, 95)]
    at, most = [ratio[name] for name in ours], found["95 % ours"]
    assert total == 40 == found["full cache"] == found[ours[0]] == found[ours[1]]
    readme, results, limits = (
        (ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/results.md", "docs/limits.md")
    )
    assert f"all of 40 needles are found at 80 and 90 % removed and {most} at 95 %, at {at[0]}, {at[1]} and" in readme
    assert f"and {at[2]} times the perplexity" in readme
    parts = [share[name] / share["full cache"] for name in ours]
    assert f"Ours takes {parts[0]:.2f} of the full cache at 80 %, {parts[2]:.2f} at 95 %." in results
    of_smollm2 = {r["label"]: r["value"] for r in of_results("smollm2-135m")["rows"] if r["metric"] == "kl"}
    more = [f"{kl[name] / of_smollm2[name]:.1f}" for name in ours]
    assert f"The KL is {more[0]}, {more[1]} and {more[2]} times SmolLM2's." in results
    assert f"at {at[0]} and {at[1]} times its perplexity; {most} of 40 at 95 %, at {at[2]}." in results
    assert f"finds {most} of 40 needles at 95 %, at {at[2]} times the perplexity; at 90 % all, at {at[1]} (" in limits


def test_the_layout_in_design_is_the_order_of_imports():
    """Every file of the package is in the list, and imports those above it; the exceptions are those named there."""
    source, page = ROOT / "src" / "cskv_hf", (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    layout = page.partition("## Layout")[2].partition("A file imports")[0]
    lines = re.findall(r"^    ((?:[a-z_]+(?:\.py|/)(?:, )?)+)", layout, re.M)
    units = [unit.strip("/").removesuffix(".py") for line in lines for unit in line.split(", ")]
    there = [p.stem for p in source.glob("[!_]*.py")] + [p.parent.name for p in source.glob("*/__init__.py")]
    assert sorted(units) == sorted(there)
    below = set()
    for path in source.rglob("*.py"):
        parts = path.relative_to(source).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == len(parts) and parts[0] in units:
                named = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
                below |= {(parts[0], n) for n in named if n in units and units.index(n) > units.index(parts[0])}
    assert below == {("latents", "kernels"), ("cache", "cache_file"), ("demo", "evaluate")}

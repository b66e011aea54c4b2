"""The benchmarks of speed and capacity at sizes that say nothing: every cache is there and counted, a window that is
timed has what it should, the search finds what fits, numbers of different settings do not get into one file, and a
picture is the same each time. No times are checked."""

import contextlib
import copy
import json
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import StaticCache

import cskv_hf
from cskv_hf import CSKVCache, CSKVConfig, CSKVStaticCache, ModelShape, static_tokens
from cskv_hf.attention import compressed_attention
from cskv_hf.cost import compressed_work, kept_layers, seconds
from cskv_hf.latents import Latents
from cskv_hf.rates import Device

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MODULES = ("capacity", "common", "cost", "decode", "generate", "gpu", "gpu_kernels", "memory", "plot", "prefill")
MODULES += ("presses", "step")


@pytest.fixture(scope="module")
def scripts():
    """The benchmarks' modules, which import each other by plain names that no other test should find, nor they those
    of others: the examples have a `common` too."""
    others = {name: sys.modules.pop(name, None) for name in MODULES}
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {name: __import__(name) for name in MODULES}
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name, module in others.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


@pytest.fixture(scope="module")
def sizes(scripts):
    return scripts["common"].Sizes(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32)


@pytest.fixture(scope="module")
def measured(scripts, sizes):
    decode = scripts["decode"]
    states = scripts["common"].RandomStates(sizes, 2, "cpu", torch.float32)
    return decode.measure(sizes, decode.SETTINGS, 2, states, 128, 1, others=decode.installed_others())


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(3, 4096, (1, 90), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def plain(scripts):
    return scripts["step"].make_model(1, 4096, True, "cpu")


@pytest.fixture(scope="module")
def fitted(scripts, prompt):
    model = scripts["step"].make_model(1, 4096, True, "cpu")
    with torch.no_grad():
        return cskv_hf.fit(model, [prompt[0]], CSKVConfig(compression=0.8), progress=False)


def run_main(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    module.main()


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


@pytest.mark.parametrize("name", ["step", "generate"])
@torch.no_grad()
def test_every_window_that_is_timed_has_one_block(scripts, fitted, prompt, name):
    """A block of a layer leaves the window every 32 tokens, so windows of as many hold one, wherever they begin."""
    cache = CSKVCache()
    run = getattr(scripts[name], {"step": "steps_of", "generate": "turns_of"}[name])(fitted, cache, prompt[:, :-5])
    for number in (2, 3):
        run()
        assert cache.tokens.num_old == 32 * number
    assert cache.get_seq_length() == 85 + 64


@pytest.mark.parametrize("compressed", [False, True])
@torch.no_grad()
def test_a_step_is_compiled_once(scripts, plain, fitted, prompt, compressed, monkeypatch):
    """The first token is laid out as all others, or the first step would be compiled for itself."""
    step, graphs, compile = scripts["step"], [], torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(step, "STEPS", 3)
    monkeypatch.setattr(step.torch, "compile", lambda f, **_: compile(f, fullgraph=True, backend=keep_in(graphs)))
    model, cache = (fitted, CSKVStaticCache(100)) if compressed else (plain, StaticCache(plain.config, 100))
    run = step.steps_of(model, cache, prompt, "inductor")
    for _ in range(2):
        run()
    assert len(graphs) == 1 and int(cache.get_seq_length()) == 96


def keep_in(graphs):
    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    return backend


class OnlyOnMeta(TorchDispatchMode):
    """No operation may touch a tensor elsewhere; reading one of the device's is an error of its own."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        assert all(t.is_meta for t in tensors), f"{function} is not on the device alone"
        return out


@pytest.mark.parametrize("compressed", [False, True])
@torch.no_grad()
def test_a_step_that_is_recorded_needs_no_host(scripts, plain, fitted, prompt, compressed, monkeypatch):
    """Nothing is read from the device that has no memory, nor copied to it, as a CUDA graph could not hold it."""
    model = copy.deepcopy(fitted if compressed else plain)
    cache = CSKVStaticCache(100) if compressed else StaticCache(model.config, 100)
    model(prompt, past_key_values=cache)
    model.to("meta")
    for held in (*([cache.tokens] if compressed else []), *cache.layers):
        for name, value in vars(held).items():
            if isinstance(value, torch.Tensor | torch.device):
                setattr(held, name, value.to("meta") if isinstance(value, torch.Tensor) else torch.device("meta"))
            elif isinstance(value, Latents):
                value.segments = tuple(tuple(t.to("meta") for t in segment) for segment in value.segments)
    monkeypatch.setattr(static_tokens, "may_read", lambda: False)  # as while a graph is recorded
    monkeypatch.setattr(CSKVStaticCache, "_check_same", lambda *_: None)  # the factors have moved
    token, position = prompt[:, :1].to("meta"), torch.full((1, 1), prompt.shape[1], device="meta")
    step = scripts["step"].step_in_place(model.forward, cache, token, position)
    with OnlyOnMeta():
        step()


@pytest.mark.parametrize("works", [True, False])
@torch.no_grad()
def test_a_recording_that_puts_no_token_into_the_cache_is_refused(scripts, fitted, prompt, works, monkeypatch):
    """With a graph that takes the step again when it is replayed, as a CUDA graph does, or nothing."""
    step, cache = scripts["step"], CSKVStaticCache(100)
    fitted(prompt, past_key_values=cache)
    once = step.step_in_place(fitted.forward, cache, prompt[:, :1].clone(), torch.full((1, 1), prompt.shape[1]))
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    graph = types.SimpleNamespace(replay=once if works else lambda: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: stream)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    with contextlib.nullcontext() if works else pytest.raises(RuntimeError, match="no token into the CSKVStaticCache"):
        step.Recorded(once, cache)()


def test_cuda_graphs_need_a_gpu(scripts, monkeypatch, capsys):
    for arguments in (("--backend", "recorded"), ("--backend", "cudagraphs")):
        with pytest.raises(SystemExit):
            run_main(scripts["step"], monkeypatch, *arguments)
    out = capsys.readouterr().err
    assert (
        "`--backend recorded` makes CUDA graphs. Give `--device cuda`" in out and "invalid choice: 'cudagraphs'" in out
    )


def test_compiled_steps_without_cuda_graphs_are_refused(scripts, monkeypatch):
    step = scripts["step"]
    monkeypatch.setitem(step.counters["inductor"], "cudagraph_skips", 0)
    step.refuse_skipped_graphs()
    monkeypatch.setitem(step.counters["inductor"], "cudagraph_skips", 2)
    with pytest.raises(RuntimeError, match="left out 2 CUDA graphs"):
        step.refuse_skipped_graphs()


def test_medians_after_every_turn(scripts):
    clock, ran = iter(range(100)), []
    medians = scripts["common"].medians_by_turn({"a": lambda: ran.append(1)}, 3, lambda: next(clock))
    assert list(medians) == [{"a": 1}] * 3
    assert len(ran) == 2 * (3 + 1)


def test_kernels_are_known_by_how_their_names_begin(scripts):
    """Keys are scored by one of two; a name that ends the same is another kernel."""
    of_ours = scripts["gpu_kernels"].of_ours
    others = {"value_kernel": 2.0, "merge_kernel": 0.5, "finish_kernel_0d1d": 0.25, "void gemm_score_kernel": 9.0}
    ours = {"value_kernel": 2.0, "merge_kernel": 0.5, "finish_kernel": 0.25}
    assert of_ours({"hopper_score_kernel": 1.0, **others}) == {"score_kernel": 1.0, **ours}
    assert of_ours({"score_kernel": 3.0, **others}) == {"score_kernel": 3.0, **ours}
    on_hopper = {"hopper_value_kernel" if name == "value_kernel" else name: t for name, t in others.items()}
    assert of_ours({"score_kernel": 3.0, **on_hopper}) == {"score_kernel": 3.0, **ours}
    with pytest.raises(SystemExit, match=r"score_kernel did not run.*gemm_score_kernel"):
        of_ours(others)


def test_layers_of_a_graph_do_not_fit_into_the_second_level_cache(scripts):
    layers_together = scripts["gpu_kernels"].layers_together
    assert [layers_together(size, 50) for size in (1, 7, 50, 199, 200, 1000)] == [32, 29, 4, 2, 1, 1]


def test_runs_of_other_settings_do_not_get_into_a_file(scripts, tmp_path):
    common, path = scripts["common"], tmp_path / "new" / "runs.json"
    about = {"machine": {"gpu": "none", "torch": "2"}, "dtype": "torch.float32", "lengths": (1, 2), "against": None}
    assert common.earlier_runs(None, about) == common.earlier_runs(path, about) == []
    common.save(None, about)
    common.save(path, about | {"copy_bandwidth": 1.0, "runs": [1]})
    assert common.earlier_runs(path, about) == common.earlier_runs(path, about | {"copy_bandwidth": 2.0}) == [1]
    other = about | {"machine": {"gpu": "H100", "torch": "2"}, "new": 8}
    with pytest.raises(SystemExit, match=r"machine\.gpu was 'none' and is 'H100'; new was None and is 8\. Give"):
        common.earlier_runs(path, other)
    common.save(path, about)
    with pytest.raises(SystemExit, match=r"holds other numbers than these\. Give"):
        common.earlier_runs(path, about)
    assert [file.name for file in path.parent.iterdir()] == ["runs.json"]

    presses = scripts["presses"]
    assert presses.earlier_runs(None, about) == presses.earlier_runs(tmp_path / "none.json", about) == []
    path.write_text(json.dumps({"length": 8, "runs": [{"full cache": 1.0}]}))
    assert presses.earlier_runs(path, {"length": 8}) == [{"full cache": 1.0}]
    with pytest.raises(ValueError, match="holds other numbers"):
        presses.earlier_runs(path, {"length": 9})


def test_a_file_of_other_runs_is_refused_before_anything_is_measured(scripts, sizes, tmp_path, monkeypatch):
    decode, cost, generate, path = scripts["decode"], scripts["cost"], scripts["generate"], tmp_path / "runs.json"
    path.write_text(json.dumps({"runs": [], "dtype": "torch.bfloat16"}))

    def measured(*_, **__):
        raise AssertionError("measured")

    for module, name in ((decode, "copy_bandwidth"), (cost, "measure_device"), (generate, "turns_of")):
        monkeypatch.setattr(module, name, measured)
        with pytest.raises(SystemExit, match="holds other numbers than these"):
            run_main(module, monkeypatch, "--threads", torch.get_num_threads(), "--out", path)


def test_runs_are_added(scripts, sizes, tmp_path, monkeypatch):
    decode, path = scripts["decode"], tmp_path / "runs.json"
    monkeypatch.setattr(decode, "Sizes", lambda *_: sizes)
    monkeypatch.setattr(decode, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(decode, "SETTINGS", decode.SETTINGS[3:4])
    monkeypatch.setattr(decode, "OTHERS", ())
    arguments = "--layers", 1, "--rounds", 1, "--threads", torch.get_num_threads(), "--out", path
    for _ in range(2):
        run_main(decode, monkeypatch, "--lengths", 68, 96, *arguments)
    held = json.loads(path.read_text())
    assert [[row["length"] for row in run if row["cache"] == "95% head packed"] for run in held["runs"]] == [
        [68, 96]
    ] * 2
    with pytest.raises(SystemExit, match=r"lengths was \[68, 96\] and is \[128\]"):
        run_main(decode, monkeypatch, "--lengths", 128, *arguments)
    assert json.loads(path.read_text()) == held


@pytest.mark.parametrize("name", ["decode", "cost"])
def test_lengths_at_which_nothing_is_compressed_are_refused(scripts, name, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(scripts[name], monkeypatch, "--lengths", 1024, 67)
    assert "`--lengths` 67: a CSKVCache compresses nothing of fewer than 68 tokens" in capsys.readouterr().err


def test_what_was_measured_before_an_interruption_is_in_the_file(scripts, tmp_path, monkeypatch):
    capacity, memory, path = scripts["capacity"], scripts["memory"], tmp_path / "rows.json"

    def measured(name, *_):
        if name != "DynamicCache":
            raise KeyboardInterrupt
        return {"cache": name, "context": 1, "batch": 1, "tries": []}

    def process(command, **_):
        measured(command[command.index("--only") + 1])
        return types.SimpleNamespace(stdout="[3, 4]")

    monkeypatch.setattr(capacity, "capacity", measured)
    monkeypatch.setattr(memory.subprocess, "run", process)
    for module in (capacity, memory):
        with pytest.raises(KeyboardInterrupt):
            run_main(module, monkeypatch, "--out", path)
        assert [row["cache"] for row in json.loads(path.read_text())["rows"]] == ["DynamicCache"]
        path.unlink()


def test_models_are_where_they_are_timed(scripts, monkeypatch):
    generate, fitted = scripts["generate"], []
    monkeypatch.setattr(generate.demo, "calibration_data", lambda tokenizer: [])
    monkeypatch.setattr(generate.cskv_hf, "fit", lambda model, *_, **__: fitted.append(model.device.type) or model)
    models = dict(generate.models([], "meta"))
    assert list(models) == ["DynamicCache", *generate.SETTINGS] and fitted == ["meta"] * len(generate.SETTINGS)
    assert all(parameter.is_meta for model in models.values() for parameter in model.parameters())


def test_machine(scripts):
    about = scripts["common"].machine(3)
    assert about["threads"] == 3 and set(about) >= {"cpu", "gpu", "kernels", "torch", "transformers", "python"}
    if not torch.cuda.is_available():
        assert not about["triton_kernels"] and not about["hopper_kernels"]
    assert about["triton"] == (__import__("triton").__version__ if scripts["common"].kernels.HAS_TRITON else "none")


def test_what_is_not_finished_on_a_gpu_has_failed(scripts, tmp_path, monkeypatch, capfd):
    gpu = scripts["gpu"]
    writes = f'-c \'open("{tmp_path}/{{}}", "w")\''
    commands = {
        "tests a": writes.format("a"),
        "tests b": "-c 'raise SystemExit(5)'",
        "tests c": "-c 'import time; time.sleep(600)'",
        "tests d": writes.format("d"),
    }
    monkeypatch.setattr(gpu, "COMMANDS", commands)
    now = iter([0.0, 0.0, 1.0, 57.0, 61.0])  # at the beginning, and before each
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(now))
    with pytest.raises(SystemExit) as end:
        run_main(gpu, monkeypatch, tmp_path / "out", "--minutes", 1)
    problems = "tests b (exit code 5), tests c (ended when time was up), tests d (not begun, time was up)"
    assert end.value.code == f"failed: {problems}"
    assert (tmp_path / "a").exists() and not (tmp_path / "d").exists() and "== tests c" in capfd.readouterr().out


def test_commands_for_a_gpu_are_understood(scripts, monkeypatch, capsys):
    """Every option is one of its script's, and every choice among those that it allows."""
    for name, command in scripts["gpu"].COMMANDS.items():
        script, *words = shlex.split(command)
        if script == "-m":
            files = [word for word in words if word.endswith(".py")]
            assert words[0] == "pytest" and files and all((BENCHMARKS.parent / file).exists() for file in files)
            continue
        with pytest.raises(SystemExit) as end:
            run_main(scripts[Path(script).stem], monkeypatch, *words, "--device", "cuda", "--help")
        out = capsys.readouterr().out
        assert end.value.code == 0, name
        assert all(word in out for word in words if word.startswith("--")), name

"""The C++ kernels, compiled here, against the torch path, number by number."""

import functools
import platform
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import lossy, make_model, prompt
from random_past import CASES, check_quantizer, error_against_torch, layer, past
from typer.testing import CliRunner

import cskv_hf.attention as attention
from cskv_hf import CSKVCache, CSKVStaticCache, kernels
from cskv_hf.cli import app
from cskv_hf.kernels import cpu
from cskv_hf.turns import OldTurns

TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module", autouse=True)
def compiled():
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    path = cpu.build()
    assert cpu.load()
    yield path
    path.unlink()
    cpu.load.cache_clear()


relative_error = functools.partial(error_against_torch, attention.attend_on_cpu)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_torch_path(case, dtype):
    """Every way of storing, rows of the batch, one query of each head: in float32 to rounding; in 16 bits to the
    rounding of the result, since all is computed in float32."""
    factors = layer(*CASES[case], dtype, device="cpu")
    kv = past(factors, 2, 160, dtype)
    query = torch.randn(2, 2 * factors.num_key_value_heads, 1, factors.head_dim).to(dtype)
    assert relative_error(query, kv, None, None) < TOLERANCE[dtype]


@pytest.mark.parametrize("head_dim", [4, 8, 36, 80, 96])
def test_any_head_dim(head_dim):
    """Heads that fill no vector, or no panel of key_B, to the end."""
    factors = layer("head", (5, 3, 4), 7, 3, head_dim, torch.float32, device="cpu")
    query = torch.randn(1, 15, 3, head_dim)  # five query heads to a KV head
    assert relative_error(query, past(factors, 1, 64, torch.float32, num_new=3), None, None) < 2e-6


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("block_size", [8, 24, 64])
def test_every_number_of_bits(bits, block_size):
    """Every combination of bit planes, in blocks of any length."""
    factors = layer("head", ((bits,) * 9, (bits,) * 4), (bits,) * 37, 2, 32, torch.float32, None, "cpu", block_size)
    kv = past(factors, 2, 3 * block_size, torch.float32)
    assert relative_error(torch.randn(2, 4, 1, 32), kv, None, None) < 2e-6


def test_positions_of_each_row_and_token():
    factors = layer(*CASES["packed, head"], torch.float32, device="cpu")
    positions = torch.stack([torch.arange(64) * 3, torch.arange(64) + 40])
    kv = past(factors, 2, 64, torch.float32, positions)
    assert relative_error(torch.randn(2, 4, 1, 32), kv, None, None) < 2e-6


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", ["shared", "of each token", "of each row and token"])
def test_turns_keys_as_the_model_did(case, dtype):
    """cos and sin of far positions, scaled and rounded to the model's dtype, are those of the rotary module: to the
    rounding of float32, not of the dtype."""
    factors = layer(*CASES["plain, joint"], dtype, device="cpu")
    kv, query = past(factors, 2, 96, dtype), torch.randn(2, 4, 1, 64)
    positions = torch.stack([torch.arange(96) * 997, 131_000 + torch.arange(96)]).int()
    frequencies = kv.turns.frequencies
    shape = {"shared": (1,), "of each token": (96, 1), "of each row and token": (2, 96, 1)}[case]
    inv_freq = frequencies.inv_freq * torch.linspace(0.5, 1.0, 2 * 96)[: torch.Size(shape).numel()].view(shape)
    frequencies = frequencies._replace(inv_freq=inv_freq, attention_scaling=0.9)
    kv.turns = OldTurns(positions, frequencies, uniform=True)
    both = attention.attend_on_cpu, attention.attend_in_torch
    ours, oracle = (attend(query, kv, 0.1, None, None) for attend in both)
    assert float((ours - oracle).norm() / oracle.norm()) < 2e-6


@pytest.mark.parametrize("block_size", [8, 24, 32, 64])
@pytest.mark.parametrize("group", [(1, 1), (8, 1), (4, 3), (2, 100)], ids=str)
def test_quantises_bit_for_bit(block_size, group):
    check_quantizer(cpu.quantize, block_size, *group)


def test_many_queries_masks_and_groups_of_ranges():
    """Masks of each kind and of only some columns, ranges that several channels and only some tokens share."""
    factors = layer(*CASES["packed, joint"], torch.float32, group=[8, 3], device="cpu")
    num_new, num_old = 6, 96
    kv = past(factors, 2, num_old, torch.float32, num_new=num_new)
    query = torch.randn(2, 2 * 4, num_new, 32)
    exact_mask = torch.ones(1, 1, num_new, 7, dtype=torch.bool).tril(1)
    old_mask = torch.rand(2, 1, num_new, num_old) > 0.3
    added = torch.zeros(old_mask.shape).masked_fill(~old_mask, torch.finfo(torch.float32).min)
    for masks in ((exact_mask, old_mask), (exact_mask, added), (exact_mask, None), (None, old_mask), (None, added)):
        assert relative_error(query, kv, *masks) < 2e-6
    old_mask[1], exact_mask = False, exact_mask & False  # row 1 sees nothing at all, and gets zeros
    added = torch.where(old_mask, 0.0, torch.finfo(torch.float32).min)
    for mask in (old_mask, added):
        assert not attention.attend_on_cpu(query, kv, 0.1, exact_mask, mask)[1].any()
    query[0, 0, 0, 0] = torch.nan  # is not hidden by a mask
    assert attention.attend_on_cpu(query, kv, 0.1, exact_mask, old_mask)[0, 0, 0].isnan().all()


def test_segments_and_threads():
    """Latents in several pieces of memory, and however many threads share the work."""
    factors = layer(*CASES["packed, head"], torch.float32, device="cpu")
    kv, query = past(factors, 2, 320, torch.float32), torch.randn(2, 4, 1, 32)
    for latents in (kv.key_latents, kv.value_latents):
        (whole,) = latents.segments
        latents.segments = tuple(tuple(t[:, part] for t in whole) for part in (slice(0, 3), slice(3, 4), slice(4, 10)))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert relative_error(query, kv, None, None) < 2e-6
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "settings", [{}, dict(bits=None, allocation=None, compression=0.6, block_size=8)], ids=["plain", "packed"]
)
@torch.no_grad()
def test_a_model_generates_the_same(settings, monkeypatch):
    """Through the whole of generate, with a padded row and a second turn; the kernels are found by themselves."""
    model = lossy(make_model(dtype=torch.float32), **settings)
    ids = prompt(2, 64)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    outputs, calls, attend = [], [], cpu.attend
    monkeypatch.setattr(cpu, "attend", lambda *args: calls.append(1) or attend(*args))
    for available in (False, True):
        monkeypatch.setattr(kernels, "_on_cpu", lambda available=available: available and cpu.load())
        cache = CSKVCache()
        model(ids[:, :58], attention_mask=mask[:, :58], past_key_values=cache, use_cache=True)
        logits = [model(ids[:, 58:], attention_mask=mask, past_key_values=cache, use_cache=True).logits]
        out = model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, output_logits=True,
                             return_dict_in_generate=True)  # fmt: skip
        outputs.append([out.sequences, *logits, *out.logits])
        assert bool(calls) == available
    torch.testing.assert_close(*outputs, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_a_cache_of_fixed_size(monkeypatch):
    """Several tokens and one, over latents that are not all there yet."""
    model = lossy(make_model(dtype=torch.float32), bits=None, allocation=None, block_size=8)
    ids, outputs = prompt(2, 64), []
    for available in (False, True):
        monkeypatch.setattr(kernels, "_on_cpu", lambda available=available: available)
        cache = CSKVStaticCache(90)
        parts = [model(part, past_key_values=cache).logits for part in ids.split([58, 5, 1], dim=1)]
        outputs.append(torch.cat(parts[1:], dim=1))
    torch.testing.assert_close(*outputs, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("cache", [dict(offloading=True), {}], ids=["offloaded", "sliding"])
@torch.no_grad()
def test_latents_that_lie_elsewhere_or_are_gone(cache, monkeypatch):
    """Offloaded ones, and layers that have dropped what their sliding window no longer shows."""
    sliding = {} if cache else dict(family="mistral", sliding_window=24)
    model = lossy(make_model(dtype=torch.float32, **sliding), bits=None, allocation=None, block_size=8)
    ids, outputs, calls, attend = prompt(2, 160), [], [], cpu.attend
    monkeypatch.setattr(cpu, "attend", lambda *args: calls.append(1) or attend(*args))
    for available in (False, True):
        monkeypatch.setattr(kernels, "_on_cpu", lambda available=available: available)
        past = CSKVCache(**cache)
        parts = [model(part, past_key_values=past).logits for part in ids.split([150, 5, 5], dim=1)]
        outputs.append(torch.cat(parts[1:], dim=1))
    assert calls and any(layer.dropped_blocks for layer in past.layers) == (not cache)
    torch.testing.assert_close(*outputs, atol=2e-4, rtol=2e-4)


def test_sizes_that_do_not_go_together():
    """As of a cache from a file that was tampered with: an error, not somebody else's memory."""
    factors = layer(*CASES["packed, head"], torch.float32, device="cpu")
    query, seen = torch.randn(2, 4, 1, 32), torch.ones(2, 1, 1, 64, dtype=torch.bool)

    def codes_and_ranges(change):
        return lambda kv: setattr(kv.key_latents, "segments", tuple(change(*pair) for pair in kv.key_latents.segments))

    for spoil in (
        lambda kv: setattr(kv.turns, "positions", kv.turns.positions[:, :32]),
        lambda kv: setattr(kv, "value_latents", kv.value_latents.take(slice(0, 1))),
        lambda kv: setattr(kv, "exact_values", kv.exact_values[:, :, :-1]),
        lambda kv: setattr(kv, "exact_keys", kv.exact_keys[:, :1]),
        codes_and_ranges(lambda codes, ranges: (codes[..., :-8], ranges)),
        codes_and_ranges(lambda codes, ranges: (codes, ranges[..., 0])),
        codes_and_ranges(lambda codes, ranges: (codes, ranges[..., :1])),
        codes_and_ranges(lambda codes, ranges: (codes[:1], ranges[:1])),
        codes_and_ranges(lambda codes, ranges: (codes.double(), ranges)),
    ):
        kv = past(factors, 2, 64, torch.float32)
        spoil(kv)
        with pytest.raises(RuntimeError, match=r"tokens where there should be|other sizes|of sizes|do not read"):
            attention.attend_on_cpu(query, kv, 0.1, None, None)
    kv = past(factors, 2, 64, torch.float32)
    for mask in (seen[..., :-1], seen.expand(2, 2, 1, 64), seen.repeat(2, 1, 1, 1), seen.repeat(1, 1, 3, 1)):
        with pytest.raises(RuntimeError, match="A mask of sizes"):
            attention.attend_on_cpu(query, kv, 0.1, None, mask)
    with pytest.raises(ValueError, match="for 2 queries, and there are 1"):
        attention.compressed_attention(query, kv, 0.1, None, seen.repeat(1, 1, 2, 1))
    layout = kv.key_latents.format.layout
    with pytest.raises(RuntimeError, match="Latents of 3 channels"):
        cpu.quantize(torch.randn(1, 32, 3), layout)
    with pytest.raises(ValueError, match="cannot be packed"):
        kv.key_latents.format.store(torch.randn(1, 32, 3), torch.float32)


def test_nan_in_latents_is_not_hidden():
    """Nor infinity; as the torch path has it."""
    factors = layer(*CASES["packed, joint"], torch.float32, device="cpu")
    query = torch.randn(2, 4, 1, 32)
    for value in (torch.nan, torch.inf):
        kv = past(factors, 2, 64, torch.float32)
        kv.value_latents.segments[0][1][1, 0, 0, 0] = value
        attend = attention.attend_on_cpu, attention.attend_in_torch
        ours, oracle = (finite(query, kv, 0.1, None, None).isfinite() for finite in attend)
        assert torch.equal(ours, oracle) and ours[0].all() and not ours[1].all()


def test_groups_without_channels_and_no_exact_tokens():
    """A KV head of which nothing is kept, alone in one block with more threads than blocks."""
    for case in (("head", (0, 5), 7, 2, 32), ("head", ((), (4, 3)), (2, 2), 2, 32), ("head", ((4,), ()), (8,), 2, 32)):
        factors = layer(*case, torch.float32, device="cpu")
        kv = past(factors, 3, 32, torch.float32)
        kv.exact_keys, kv.exact_values = kv.exact_keys[:, :, :0], kv.exact_values[:, :, :0]
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(4)
            assert relative_error(torch.randn(3, 4, 1, 32), kv, None, None) < 2e-6
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("block_size", [1, 5, 20, 24, 96])
def test_blocks_that_fill_no_vector(block_size):
    """Plain blocks of any length, packed ones of whole bytes; channels enough for squares that overlap."""
    cases = [("head", (19, 40), 50, 2, 32)]
    if block_size % 8 == 0:
        cases.append(("head", ((4,) * 19, (6,) * 20 + (3,) * 20), (5,) * 40, 2, 32))
    for case in cases:
        factors = layer(*case, torch.float32, None, "cpu", block_size)
        kv = past(factors, 2, 3 * block_size, torch.float32)
        assert relative_error(torch.randn(2, 4, 1, 32), kv, None, None) < 2e-6


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of another processor")
def test_an_older_processor():
    """Vectors of eight numbers, and none that multiplies and adds at once; in a process of its own."""
    code = "import pytest; from cskv_hf.kernels import cpu; "
    code += "cpu.FLAGS = [f for f in cpu.FLAGS if 'march' not in f] + ['-march=x86-64']; "
    chosen = "turns_keys or every_number_of_bits or head_dim or quantises"
    code += f"raise SystemExit(pytest.main(['-q', '-p', 'no:cacheprovider', '-k', '{chosen}', {__file__!r}]))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stdout


def test_what_is_left_to_torch():
    """Long prompts, float64 in any part, gradients."""
    query = torch.empty(1, 2, 1, 32)
    assert kernels.choose(query, query) == "cpu"
    assert kernels.choose(query, query.double()) is None
    assert kernels.choose(query.expand(1, 2, kernels.CPU_QUERIES + 1, 32), query) is None
    assert kernels.choose(query.double(), query) is None
    trained = torch.nn.Parameter(query)
    assert kernels.choose(query, query, trained) is None
    with torch.no_grad():
        assert kernels.choose(query, trained) == "cpu"


def test_denormals_are_not_flushed():
    """Loading must not change the arithmetic of the process."""
    assert cpu.load() and float(torch.tensor(1e-40) * 0.5) > 0


def test_a_file_that_cannot_be_loaded(monkeypatch, tmp_path):
    """In a fresh process: a warning, and the torch code."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = cpu.library_path()
    path.parent.mkdir()
    path.write_bytes(b"of another machine " * 100)
    code = "from cskv_hf.kernels import cpu; print('loaded', cpu.load())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout == "loaded False\n" and "cskv kernels --build" in out.stderr, out.stderr


def test_what_others_may_have_put_there_is_not_loaded(compiled, monkeypatch, tmp_path):
    """A library is code: one in a folder, or a file, that others may write to is left alone, with a warning."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = cpu.library_path()
    path.parent.mkdir()
    shutil.copy(compiled, path)
    code = """
import os, sys
from cskv_hf.kernels import cpu
for of_file, of_folder in ((0o777, 0o755), (0o755, 0o777), (0o755, 0o755)):
    os.chmod(sys.argv[1], of_file)
    os.chmod(os.path.dirname(sys.argv[1]), of_folder)
    cpu.load.cache_clear()
    cpu.logger.warning_once.cache_clear()
    print(cpu.load())
"""
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert out.stdout.split() == ["False", "False", "True"] and out.stderr.count("others may write") == 2, out.stderr


def test_systems_without_cpuinfo(monkeypatch, tmp_path):
    """macOS and Windows have neither the file nor the kernels: attention is torch's, and nothing fails."""
    monkeypatch.setattr(cpu.Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    assert cpu._cpuinfo() == ""
    monkeypatch.setattr(cpu.platform, "system", lambda: "Darwin")
    cpu.load.cache_clear()
    try:
        assert not cpu.load()
    finally:
        cpu.load.cache_clear()


def test_kernels_of_another_version_are_named(monkeypatch, tmp_path):
    """After an upgrade nothing is slower without a word."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = cpu.library_path()
    path.parent.mkdir()
    path.with_stem("0123456789abcdef").write_bytes(b"")
    code = "from cskv_hf.kernels import cpu; print('loaded', cpu.load())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout == "loaded False\n" and "compiled for another torch, processor or version" in out.stderr


def test_a_compiler_that_makes_nothing_useful(compiled, monkeypatch, tmp_path):
    """Its file does not take the place of one that works, in a process that has loaded that one either."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path, compiler = cpu.library_path(), tmp_path / "compiler"
    path.parent.mkdir()
    shutil.copy(compiled, path)
    compiler.write_text('#!/bin/sh\nfor last; do :; done\necho nothing > "$last"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(RuntimeError, match="made cannot be loaded"):
        cpu.build()
    assert path.read_bytes() == compiled.read_bytes() and list(path.parent.iterdir()) == [path]


def test_command(compiled, monkeypatch, tmp_path):
    """Says what is there, and why it could not be compiled."""
    run = CliRunner().invoke
    assert "compiled" in run(app, ["kernels"]).output
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    cpu.load.cache_clear()
    assert "cskv kernels --build" in run(app, ["kernels"]).output
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "CXX" in run(app, ["kernels", "--build"]).output.replace("\n", " ")
    monkeypatch.setenv("CXX", "c++ --no-such-option")
    failed = run(app, ["kernels", "--build"])
    assert failed.exit_code == 2 and "no-such-option" in failed.output
    assert not list((tmp_path / "cskv_hf").iterdir())  # nothing half made
    cpu.load.cache_clear()

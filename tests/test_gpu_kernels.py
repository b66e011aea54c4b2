"""The Triton kernels against the torch path, number by number: in Triton's interpreter on a CPU, as compiled on a
GPU."""

import functools
import os
import subprocess
import sys

import pytest
import torch
from conftest import lossy, make_model, prompt
from random_past import CASES, DEVICE, error_against_torch, layer, past

import cskv_hf.attention as attention
from cskv_hf import CSKVCache, CSKVStaticCache, kernels

pytest.importorskip("triton")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
COMPILED_ONLY = pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter multiplies bfloat16 as integers")


relative_error = functools.partial(error_against_torch, attention._attend_on_gpu)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=COMPILED_ONLY)], ids=str
)
@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_torch_path(case, dtype):
    """One query of each head, in float32 to rounding; in 16 bits to a few of their roundings (2^-11, 2^-8)."""
    factors = layer(*CASES[case], dtype)
    kv = past(factors, 2, 160, dtype)
    query = torch.randn(2, 2 * factors.num_key_value_heads, 1, factors.head_dim).to(DEVICE, dtype)
    assert relative_error(query, kv, None, None) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_positions_of_each_row_and_token(dtype):
    """Positions with gaps, other ones in each row: no tile can be turned as a whole."""
    factors = layer(*CASES["packed, head"], dtype)
    positions = torch.stack([torch.arange(64) * 3, torch.arange(64) + 40])
    kv = past(factors, 2, 64, dtype, positions)
    assert kv.step.old_turn_in_tiles(torch.device(DEVICE), 64) is None
    query = torch.randn(2, 4, 1, 32).to(DEVICE, dtype)
    assert relative_error(query, kv, None, None) < TOLERANCE[dtype]


def test_many_queries_masks_and_groups_of_ranges():
    """More rows than a tile, causal masks, ranges that several channels and only some tokens of a block share."""
    factors = layer(*CASES["packed, joint"], torch.float32, group=[8, 3])
    num_new, num_old = 6, 96
    kv = past(factors, 2, num_old, torch.float32, num_new=num_new)
    query = torch.randn(2, 2 * 4, num_new, 32).to(DEVICE)
    exact_mask = torch.ones(1, 1, num_new, 7, dtype=torch.bool, device=DEVICE).tril(1)
    old_mask = torch.rand(2, 1, num_new, num_old, device=DEVICE) > 0.3
    assert relative_error(query, kv, exact_mask, old_mask) < 2e-6
    old_mask[1] = False  # nothing old is seen
    added = torch.zeros(old_mask.shape, device=DEVICE).masked_fill(~old_mask, torch.finfo(torch.float32).min)
    assert relative_error(query, kv, exact_mask, added) < 2e-6
    exact_mask = exact_mask & False  # row 1 sees nothing at all, and gets zeros
    assert not attention._attend_on_gpu(query, kv, 0.1, exact_mask, old_mask)[1].any()


def test_the_sum_is_split_over_the_past(monkeypatch):
    """However many programs share the tokens."""
    import cskv_hf.kernels.gpu as triton_attention

    factors = layer(*CASES["packed, head"], torch.float32)
    kv, query = past(factors, 1, 320, torch.float32), torch.randn(1, 4, 1, 32).to(DEVICE)
    for programs in (1, 3, 10**6):
        monkeypatch.setattr(triton_attention, "PROGRAMS", programs)
        assert relative_error(query, kv, None, None) < 2e-6


@pytest.mark.parametrize(
    "settings", [{}, dict(bits=None, allocation=None, compression=0.6, block_size=8)], ids=["plain", "packed"]
)
@torch.no_grad()
def test_a_model_generates_the_same(settings, monkeypatch):
    """Through the whole of generate, with a padded row, and a second turn of several tokens over the compressed
    past."""
    sizes = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    model = lossy(make_model(dtype=torch.float32, **sizes), **settings).to(DEVICE)
    ids = prompt(2, 64).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    outputs, calls = [], []
    for served in (None, "gpu"):
        monkeypatch.setattr(kernels, "choose", lambda *_, served=served: calls.append(served) or served)
        cache = CSKVCache()
        model(ids[:, :58], attention_mask=mask[:, :58], past_key_values=cache, use_cache=True)
        logits = [model(ids[:, 58:], attention_mask=mask, past_key_values=cache, use_cache=True).logits]
        out = model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, output_logits=True,
                             return_dict_in_generate=True)  # fmt: skip
        outputs.append([out.sequences, *logits, *out.logits])
    assert calls.count("gpu") == calls.count(None) >= 4
    torch.testing.assert_close(*outputs, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_a_cache_of_fixed_size(monkeypatch):
    """Several tokens and one, over latents that are not all there yet."""
    sizes = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_hidden_layers=1)
    model = lossy(make_model(dtype=torch.float32, **sizes), bits=None, allocation=None, block_size=8).to(DEVICE)
    ids, outputs, calls = prompt(2, 64).to(DEVICE), [], []
    for served in (None, "gpu"):
        monkeypatch.setattr(kernels, "choose", lambda *_, served=served: calls.append(served) or served)
        cache = CSKVStaticCache(90)
        parts = [model(part, past_key_values=cache).logits for part in ids.split([58, 5, 1], dim=1)]
        outputs.append(torch.cat(parts[1:], dim=1))
    assert calls.count("gpu") == calls.count(None) == 2
    torch.testing.assert_close(*outputs, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_in_a_compiled_step(monkeypatch):
    """A compiler calls the kernels as operations: one graph for all steps, which gives what the kernels give."""
    sizes = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_hidden_layers=1)
    model = lossy(make_model(dtype=torch.float32, **sizes), bits=None, allocation=None, block_size=8).to(DEVICE)
    monkeypatch.setattr(kernels, "choose", lambda *_: "gpu")
    ids, outputs, graphs = prompt(2, 64).to(DEVICE), [], []
    compiled = torch.compile(model.forward, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    for step in (model.forward, compiled):
        cache = CSKVStaticCache(90)
        model(ids[:, :58], past_key_values=cache)
        outputs.append(torch.cat([step(token, past_key_values=cache).logits for token in ids[:, 58:].split(1, dim=1)]))
    torch.testing.assert_close(*outputs, atol=2e-5, rtol=2e-5)
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes]
    assert {f"cskv_hf.{name}.default" for name in ("gpu_scores", "gpu_values")} <= set(called)


COMPILE = """
import sys
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
import cskv_hf.kernels.gpu as kernels

floats = ("turn", "tile_turn", "scores", "maximum", "summed", "weight")
for packed in (True, False):
    stored, ranges = ("*u8", "*fp16") if packed else ("*bf16", "*bf16")
    types = dict(
        data=stored, ranges=ranges, query="*bf16", key_B="*bf16", mean="*bf16", pieces="*i32", first_piece="*i32"
    )
    how = dict(PACKED=packed, BLOCK=32, GROUP_TOKENS=32, GROUP_CHANNELS=4, ROWS=kernels.ROWS)
    for function, tile, warps, constants in (
        (kernels._score_kernel, kernels.KEY_TILE, kernels.KEY_WARPS,
         dict(IN_TILES=True, HEADS_PER_GROUP=1, HEAD_DIM=128, CHUNK=kernels.KEY_CHUNK)),
        (kernels._value_kernel, kernels.VALUE_TILE, kernels.VALUE_WARPS,
         dict(DTYPE=tl.bfloat16, CHUNK=kernels.VALUE_CHUNK)),
    ):
        constants |= how | dict(TILE=tile, ONE_RANGE=packed and tile == 32)
        names = function.arg_names
        signature = {
            n: "constexpr" if n in constants else types.get(n, "*fp32" if n in floats else "i32") for n in names
        }
        source = ASTSource(function, signature, {(names.index(n),): v for n, v in constants.items()})
        for capability in (80, 90):  # A100, H100
            compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=dict(num_warps=warps))
            ptx = compiled.asm["ptx"]
            print(function.__name__, packed, capability, "mma" in ptx, ".local" in ptx)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler runs on Linux")
def test_compiles_for_gpus_that_are_not_here():
    """What the interpreter forgives, the compiler does not: onto tensor cores, and without arrays in local memory."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    compiled = [line.split() for line in out.stdout.splitlines()]
    assert len(compiled) == 8 and all(line[-2:] == ["True", "False"] for line in compiled), out.stdout


def test_pieces_of_channels():
    """Every channel is in one piece, of its group and tier, and pieces are as long as they may be."""
    for case in CASES.values():
        factors = layer(*case, torch.float32)
        table, starts, count = kernels.chunks_of(factors.key_format, factors.key_ranks, 16, torch.device("cpu"))
        assert len(table) == count == starts[-1]
        channels = [c for first, n, *_ in table.tolist() for c in range(first, first + n)]
        assert sorted(channels) == list(range(sum(factors.key_ranks)))
        assert table[:, 1].max() <= 16
        for group, rank in enumerate(factors.key_ranks):
            pieces = table[starts[group] : starts[group + 1]]
            assert int(pieces[:, 1].sum()) == rank


def test_what_the_kernels_do_not_serve(monkeypatch):
    query = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16)
    assert kernels.why_not(query) is None
    assert "head_dim of 32, 64, 128, 256, this model has 80" in kernels.why_not(query.new_empty(1, 1, 1, 80))
    assert "torch.float64" in kernels.why_not(query.double())
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    assert "pip install cskv-hf[kernels]" in kernels.why_not(query)
    assert kernels.choose(query, query) is None  # on a CPU, where nothing was compiled

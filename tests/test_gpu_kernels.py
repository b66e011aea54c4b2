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
from cskv_hf.latents import PackedFormat
from cskv_hf.quantize import PackedLayout, dequantize, quantize

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
    import cskv_hf.kernels.gpu as gpu

    factors = layer(*CASES["packed, head"], torch.float32)
    kv, query = past(factors, 1, 320, torch.float32), torch.randn(1, 4, 1, 32).to(DEVICE)
    for programs in (1, 3, 10**6):
        monkeypatch.setattr(gpu, "KEY_PROGRAMS", programs)
        monkeypatch.setattr(gpu, "VALUE_PROGRAMS", programs)
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
    assert "cskv_hf.gpu_attend.default" in called


COMPILE = """
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
import cskv_hf.kernels.gpu as gpu
import cskv_hf.kernels.triton_kernels as kernels

BF16 = ("query", "key_B", "weights", "mask", "merged", "exact_keys", "exact_values", "old", "value_mean", "out")
FP32 = ("cos", "sin", "tile_cos", "tile_sin", "maxima", "sums", "summed", "split_maxima")
KINDS = dict.fromkeys(BF16, "*bf16") | dict.fromkeys(FP32, "*fp32") | {"scaling": "fp32"}
KINDS |= dict.fromkeys(("channels", "pieces", "first_piece"), "*i32")


def compile_for_all(function, constants, **kinds):
    names = function.arg_names
    kinds = KINDS | kinds
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
    source = ASTSource(function, signature, {(names.index(n),): v for n, v in constants.items()})
    for capability in (80, 90):  # A100, H100
        options = dict(num_warps=gpu.WARPS, num_stages=1)
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
        tensor_cores = "mma" in ptx or kinds["query"] == "*fp32" or function is kernels.merge_kernel
        in_registers = ".local" not in ptx or constants.get("HEAD_DIM") == 256
        print(function.__name__, capability, shared, tensor_cores, in_registers, shared <= ROOM)


def compile_scores(channels, stored, kinds, itemsize=2, **how):
    how = dict(IN_TILES=True, MASK=0, HEADS_PER_GROUP=1, HEAD_DIM=128, ROWS=8) | how
    chunk, pieces, prefetch = gpu.key_plan(channels, how["HEAD_DIM"] * itemsize, ROOM)
    how |= dict(PIECES=pieces, PREFETCH=prefetch, CHUNK=chunk)
    compile_for_all(kernels.score_kernel, how | stored, **kinds)


ROOM = 99 * 1024  # of the smallest cards of these generations
WIDE = {name: "*fp32" for name in BF16}
for packed, words in ((True, True), (True, False), (False, False)):
    stored = dict(BLOCK=32, GROUPS=4, GROUP_TOKENS=32, PACKED=packed, WORDS=words, TILE=gpu.TILE)
    kinds = dict(data="*i32" if words else "*u8", ranges="*i32") if packed else dict(data="*bf16", ranges="*bf16")
    for channels in (16, 26, 40, 100, 300):
        compile_scores(channels, stored, kinds)
    compile_for_all(kernels.value_kernel, dict(ROWS=32, CHUNK=gpu.VALUE_CHUNK) | stored, **kinds)
    if words:  # other heads, masks, positions and dtypes
        compile_scores(100, stored, kinds, HEAD_DIM=64, IN_TILES=False, MASK=1, ROWS=16)
        compile_scores(40, stored, kinds, HEAD_DIM=256, MASK=2)
        compile_scores(250, stored, kinds | WIDE, 4, HEAD_DIM=256, IN_TILES=False)
        compile_for_all(kernels.value_kernel, dict(ROWS=16, CHUNK=gpu.VALUE_CHUNK) | stored, **kinds | WIDE)
compile_for_all(kernels.merge_kernel, dict(SPLITS=64, CHUNK=64))
compile_for_all(kernels.finish_kernel, dict(MASK=2, HEAD_DIM=128, ROWS=16, TILE=32))
compile_for_all(kernels.finish_kernel, dict(MASK=1, HEAD_DIM=256, ROWS=16, TILE=16), **WIDE)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler runs on Linux")
def test_compiles_for_gpus_that_are_not_here():
    """What the interpreter forgives, the compiler does not: onto tensor cores, without arrays in local memory (but for
    the widest heads), and into the shared memory of the smallest cards."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    compiled = [line.split() for line in out.stdout.splitlines()]
    assert len(compiled) == 2 * (3 * 6 + 4 + 3) and all(line[3:] == ["True"] * 3 for line in compiled), out.stdout


@pytest.mark.parametrize("ranks", [(3, 9), (20, 1), (40, 47), (60, 70), (130, 2)], ids=str)
@pytest.mark.parametrize("plain", [False, True], ids=["packed", "plain"])
def test_every_way_to_take_channels(ranks, plain):
    """Few channels at once, several pieces held ready, one by one; heads of other ranks take fewer pieces."""
    bits = tuple(tuple(1 + (3 * i) % 8 for i in range(rank)) for rank in ranks)
    factors = layer("head", ranks if plain else bits, 37 if plain else bits[0], 2, 32, torch.float32)
    kv = past(factors, 2, 160, torch.float32)
    assert relative_error(torch.randn(2, 4, 1, 32).to(DEVICE), kv, None, None) < 2e-6


@pytest.mark.parametrize("num_old", [32, 96])
def test_a_past_that_fills_no_tile(num_old):
    """As after the first block, in 16 bits, where all tiles share one table: it is that of a whole tile."""
    factors = layer(*CASES["packed, head"], torch.float16)
    kv = past(factors, 2, num_old, torch.float16)
    starts, within = kv.step.old_turn_in_tiles(torch.device(DEVICE), 64)
    assert [t.shape[0] for t in (*starts, *within)] == [(num_old + 63) // 64] * 2 + [64] * 2
    assert relative_error(torch.randn(2, 4, 1, 32).to(DEVICE, torch.float16), kv, None, None) < 4e-3


def test_a_mask_for_each_head_is_left_to_torch(monkeypatch):
    factors = layer("head", ((4,) * 9, (4,) * 9), (4,) * 9, 2, 32, torch.float32)
    kv, query = past(factors, 1, 64, torch.float32), torch.randn(1, 2, 1, 32).to(DEVICE)
    monkeypatch.setattr(kernels, "choose", lambda *_: "gpu")
    mask = torch.rand(1, 2, 1, 64, device=DEVICE) > 0.5
    assert not torch.equal(mask[:, 0], mask[:, 1])
    ours = attention.compressed_attention(query, kv, 0.2, None, mask)
    assert torch.equal(ours, attention._attend(query, kv, 0.2, None, mask))


@pytest.mark.parametrize("block_size", [8, 16, 64])
def test_other_blocks(block_size):
    """Of 64 tokens, whose rows make words as those of 32 do, and of fewer, whose rows do not."""
    factors = layer(*CASES["packed, head"], torch.float32, block_size=block_size)
    kv = past(factors, 2, 192, torch.float32)
    assert relative_error(torch.randn(2, 4, 1, 32).to(DEVICE), kv, None, None) < 2e-6


def test_many_tokens_do_not_overflow_16_bits():
    """Of float16, which the sum over a long past exceeds and its mean does not."""
    factors = layer(*CASES["plain, head"], torch.float16)
    kv = past(factors, 1, 320, torch.float16)
    kv.value_latents.segments[0][0].mul_(1000).clamp_(-4000, 4000)
    factors.value_B.mul_(1e-3)
    query = 0.01 * torch.randn(1, 4, 1, 32).to(DEVICE, torch.float16)  # attends to all of it alike
    kv.value_latents.segments[0][0].abs_()
    assert kv.value_latents.segments[0][0].float().sum((0, 1, 2)).max() > 2 * torch.finfo(torch.float16).max
    assert relative_error(query, kv, None, None) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("head_dim", kernels.HEAD_DIMS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_what_is_held_fits(head_dim, itemsize):
    """Into the shared memory of a GPU, beside a few tiles; and all channels are in the pieces."""
    import cskv_hf.kernels.gpu as gpu

    for room in (64 * 1024, 99 * 1024, 227 * 1024):
        for channels in range(1, 1100):
            chunk, pieces, ahead = gpu.key_plan(channels, head_dim * itemsize, room)
            assert chunk in (16, 32, 64) and chunk * head_dim * itemsize <= 2**14
            assert not pieces or pieces * chunk >= channels
            assert pieces * chunk * head_dim * itemsize <= room - 2**15 and (pieces or not ahead)


def test_tables_of_channels():
    """Every channel is in one piece, of its group, and so is one for the mean; a code is where `pack` has put it."""
    import cskv_hf.kernels.gpu as gpu

    for case in CASES.values():
        factors = layer(*case, torch.float32)
        table, pieces, starts = gpu.key_pieces(factors.key_format, factors.key_ranks, 16, torch.device("cpu"))
        taken = [c for first, n, _ in pieces.tolist() for c in range(first, first + n)]
        assert taken == list(range(sum(factors.key_ranks) + len(factors.key_ranks))) and pieces[:, 1].max() <= 16
        begin = 0
        for group, rank in enumerate(factors.key_ranks):
            assert int(pieces[starts[group] : starts[group + 1], 1].sum()) == rank + 1
            begin += rank + 1
            assert table[3, begin - 1] == -1 and not table[[0, 1, 2], begin - 1].any()

    layout = PackedLayout((7, 3, 8, 3, 4), 32)
    latents = torch.randn(1, 64, 5)
    codes, ranges = quantize(latents, layout)
    words = codes.view(torch.int32)
    for channel, row in enumerate(gpu.describe(PackedFormat(layout))):
        for block in range(2):
            for token in range(32):
                code = below = 0
                for bits, (first, width, worth) in zip(gpu.PLANES, zip(*[iter(row[4:])] * 3)):
                    if not worth:
                        continue
                    rows = 32 * bits // 8
                    word = int(words[0, block, first + token % rows // 4 * width]) & 0xFFFFFFFF
                    assert worth == 2 ** (below + bits)
                    code += (word >> (8 * (token % 4) + bits * (token // rows)) & 2**bits - 1) << below
                    below += bits
                minimum, step = ranges[0, block, row[3]].double()
                value = dequantize(codes, ranges, layout, torch.float64)[0, 32 * block + token, channel]
                assert abs(minimum + step * code - value) < 1e-12


def test_what_is_kept_of_factors():
    """The transposed factor is made once, and again when the factors are written to."""
    import cskv_hf.kernels.gpu as gpu

    factors = layer(*CASES["packed, head"], torch.float32)
    how = factors.key_ranks, torch.float32
    kept = gpu.with_mean(factors.key_B, factors.key_mean, *how)
    ranks, heads = factors.key_ranks, factors.key_mean.view(2, 1, -1)
    first, second = factors.key_B.mT.split(ranks)
    assert torch.equal(kept, torch.cat([first, heads[0], second, heads[1]]))
    assert gpu.with_mean(factors.key_B, factors.key_mean, *how) is kept
    for tensor in (factors.key_B, factors.key_mean):
        tensor.mul_(2)
        assert not torch.equal(gpu.with_mean(factors.key_B, factors.key_mean, *how), kept)
    assert gpu.with_mean(factors.key_B, factors.key_mean, ranks, torch.float16).dtype == torch.float16
    before = gpu.with_mean(factors.key_B, factors.key_mean, *how)
    factors.key_B.data = factors.key_B.data * 2  # another tensor, of the same version
    assert not torch.equal(gpu.with_mean(factors.key_B, factors.key_mean, *how), before)
    with torch.inference_mode():  # whose tensors count no writes
        inferred = factors.key_B.clone(), factors.key_mean.clone()
        before = gpu.with_mean(*inferred, *how)
        inferred[0].mul_(2)
        assert not torch.equal(gpu.with_mean(*inferred, *how), before)


def test_what_the_kernels_do_not_serve(monkeypatch):
    query = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16)
    assert kernels.why_not(query) is None
    assert "head_dim of 32, 64, 128, 256, this model has 80" in kernels.why_not(query.new_empty(1, 1, 1, 80))
    assert "torch.float64" in kernels.why_not(query.double())
    monkeypatch.setattr(kernels, "_triton_version", lambda: (3, 2))
    assert "Triton 3.6 or newer, this is 3.2" in kernels.why_not(query)
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    assert "pip install cskv-hf[kernels]" in kernels.why_not(query)
    assert kernels.choose(query, query) is None  # on a CPU, where nothing was compiled

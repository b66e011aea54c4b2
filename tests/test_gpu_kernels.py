"""The Triton kernels against the torch path, number by number: in Triton's interpreter on a CPU, as compiled on a
GPU."""

import functools
import itertools
import os
import subprocess
import sys

import pytest
import torch
from conftest import lossy, make_model, prompt
from random_past import CASES, DEVICE, as_added, check_quantizer, error_against_torch, layer, past
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache

import cskv_hf.attention as attention
from cskv_hf import CSKVCache, CSKVStaticCache, kernels
from cskv_hf.cache_layer import encode, turned_back
from cskv_hf.handover import Staged
from cskv_hf.kernels.pieces import Piece, cut
from cskv_hf.latents import Latents, PackedFormat, PlainFormat
from cskv_hf.quantize import PackedLayout, dequantize, quantize
from cskv_hf.step import take

pytest.importorskip("triton")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# of slow tests of what is the same in 16 bits
A_DTYPE = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.float16]
COMPILED_ONLY = pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter multiplies bfloat16 as integers")


relative_error = functools.partial(error_against_torch, attention.attend_on_gpu)


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
    """Positions with gaps, other ones in each row: not every tile can be turned as a whole."""
    factors = layer(*CASES["packed, head"], dtype)
    positions = torch.stack([torch.arange(160) * 3, torch.arange(160) + 40])
    positions[1, 100:] += 7
    kv = past(factors, 2, 160, dtype, positions)
    query = torch.randn(2, 4, 1, 32).to(DEVICE, dtype)
    assert relative_error(query, kv, None, None) < TOLERANCE[dtype]


def masks_of_old_tokens(rows=4, num_old=160):
    """bool: blocks from the first on, tokens that end within a block, holes, and nothing."""
    mask = torch.arange(num_old) < torch.tensor([[96], [num_old], [75], [0]])
    mask[1, 40:50] = False
    return mask[:rows, None, None].to(DEVICE)


@pytest.mark.parametrize("added", [False, True], ids=["bool", "added"])
@pytest.mark.parametrize("dtype", A_DTYPE, ids=str)
@pytest.mark.parametrize("case", ["plain, joint", "packed, head"])
def test_one_query_under_a_mask(case, dtype, added, uninitialised_is_nan):
    """Of each row another part is seen, and nothing is read that was not written."""
    factors, mask = layer(*CASES[case], dtype), masks_of_old_tokens()
    positions = 50 * torch.arange(4)[:, None] + torch.arange(160)
    positions[2, 64:] += 3  # between tiles
    kv = past(factors, 4, 160, dtype, positions)
    query = torch.randn(4, 2 * factors.num_key_value_heads, 1, factors.head_dim).to(DEVICE, dtype)
    mask = as_added(mask, dtype) if added else mask
    assert relative_error(query, kv, None, mask) < TOLERANCE[dtype]
    bias = torch.randn(mask.shape, device=DEVICE, dtype=dtype)  # neither seen nor not
    assert relative_error(query, kv, None, bias) < TOLERANCE[dtype]


@pytest.mark.parametrize("span", [64, 256])
def test_what_is_told_of_tiles(span):
    """By the definition, token by token: a tile is told of if its seen tokens are whole blocks from its first on,
    each at its place from the first token of its span."""
    from cskv_hf.kernels.tiles import OTHERWISE, tokens_seen

    torch.manual_seed(0)
    counts, num_old = set(), 5 * 64 + 32
    for _ in range(40):
        blocks = (torch.rand(2, 1, 1, num_old // 32) < 0.7).repeat_interleave(32, dim=-1)
        mask = blocks & (torch.rand(2, 1, 1, num_old) > 0.0005)
        positions = torch.arange(num_old) + 10 * (torch.rand(1, num_old) < 0.003).long().cumsum(1)
        added = torch.where(mask, 0.0, -1e9)
        added[0, 0, 0, 7] = -1.0
        for given in (mask, added, None):
            seen, last = tokens_seen(given, positions, num_old, span)
            for row in range(len(seen)):
                visible = mask[row, 0, 0] if given is mask else added[row, 0, 0] > -1e4
                visible = torch.ones(num_old, dtype=torch.bool) if given is None else visible
                expected = []
                for first in range(0, num_old, 64):
                    tokens = range(first, min(first + 64, num_old))
                    there = [t for t in tokens if visible[t]]
                    told = there == [*range(first, first + len(there))] and len(there) % 32 == 0
                    for t in there:
                        start = t // span * span
                        told &= bool(positions[0, t] - positions[0, start] == t - start)
                    told &= not (given is added and row == 0 and first == 0)
                    expected.append(len(there) if told else OTHERWISE)
                assert seen[row].tolist() == expected
                assert last[row] == max([i + 1 for i, count in enumerate(expected) if count != 0], default=0)
                counts |= {*expected}
    assert counts == {0, 32, 64, OTHERWISE}


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
    assert not attention.attend_on_gpu(query, kv, 0.1, exact_mask, old_mask)[1].any()


@pytest.mark.parametrize("block_size, times, group_channels", [(32, 1, 1), (64, 4, 3), (24, 8, 1), (32, 2, 100)])
def test_quantises_bit_for_bit(block_size, times, group_channels):
    from cskv_hf.kernels.triton_quantize import quantize

    check_quantizer(quantize, block_size, times, group_channels, DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("case", ["packed, groups", "plain, joint", "one KV head"])
def test_encodes_bit_for_bit(case, rows, dtype, monkeypatch):
    """The latents of many tokens, cut out of longer states, whether a kernel takes their mean off or torch."""
    from cskv_hf.kernels.triton_center import center

    factors = layer(*CASES[case], dtype)
    step, layout = past(factors, 3, 64, dtype).step, (2, 3, factors.num_key_value_heads, 101, factors.head_dim)
    states = torch.randn(layout).to(DEVICE, dtype)[..., 3:99, :]
    latents, positions = [], 1000 * torch.arange(rows, device=DEVICE)[:, None] + torch.arange(96, device=DEVICE)
    for served in (None, center):
        monkeypatch.setattr(kernels, "centering", lambda *_, served=served: served)
        step.memo.clear()
        staged = Staged(step, factors, step.old_frequencies, materialize=False)
        latents.append(encode(*states, positions, step.old_frequencies, staged))
    for torch_s, ours in zip(*latents):
        for one, other in zip(torch_s.held, ours.held):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("block_size", [32, 24, 8])
@pytest.mark.parametrize("case", CASES)
def test_encodes_what_is_due(case, block_size, dtype, uninitialised_is_nan):
    """What `encode` of the torch path stores, to rounding, where it is told to; nothing else is written."""
    from cskv_hf.kernels.triton_encode import encode_due

    factors = layer(*CASES[case], dtype, block_size=block_size)
    held = past(factors, 3, 4 * block_size, dtype)
    num_places, both = 2 * block_size + 5, (held.key_latents, held.value_latents)
    states = torch.randn(2, 3, factors.num_key_value_heads, num_places, factors.head_dim).to(DEVICE, dtype)
    places = torch.stack([torch.randperm(num_places)[:block_size] for _ in range(3)]).to(DEVICE)
    positions = 30 + torch.randint(0, 900, (3, block_size), device=DEVICE)
    turn = turned_back(held.step, positions, held.turns.frequencies, dtype, states.device)
    before = [[t.clone() for t in latents.held] for latents in both]
    target, written = torch.tensor([2, -1, 2 * 4 + 1], device=DEVICE), [2, 9]
    encode_due(*states, places, turn, target, factors, *both)

    exact = (take(s, places, 2) for s in states)
    staged = Staged(held.step, factors, held.turns.frequencies, materialize=False)
    expected = encode(*exact, positions, held.turns.frequencies, staged)
    for latents, new, tensors in zip(both, expected, before):
        found = Latents(latents.format, tuple(t.flatten(0, 1)[written, None] for t in latents.held))
        ours, theirs = (x.read(0, 1, torch.float32) for x in (found, new.select_rows(torch.tensor([0, 2]))))
        difference, rounding = (ours - theirs).abs(), 8 * torch.finfo(dtype).eps * theirs.abs().amax()
        assert (difference <= rounding + 1.01 * code_steps(new)[[0, 2]]).all()
        assert difference.mean() <= rounding  # few codes are others
        for t, was in zip(latents.held, tensors):
            rest = [block for block in range(12) if block not in written]
            assert torch.equal(t.flatten(0, 1)[rest], was.flatten(0, 1)[rest])


def code_steps(latents):
    """(batch, tokens, rank) of one block: how far neighbouring codes lie apart; 0 of plain latents."""
    if isinstance(latents.format, PlainFormat):
        return torch.zeros_like(latents.read(0, 1, torch.float32))
    (codes, ranges), layout = latents.held, latents.format.layout
    lowest, highest = (dequantize(torch.full_like(codes, c), ranges, layout, torch.float32) for c in (0, 255))
    return (highest - lowest) / torch.tensor([2**bits - 1 for bits in layout.bits], device=codes.device)


@pytest.mark.parametrize("compiling", [True, False])
def test_a_compiler_gets_packing_as_an_operation(compiling, monkeypatch):
    from cskv_hf.kernels import triton_quantize

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    chosen = triton_quantize.quantize_as_operation if compiling else triton_quantize.quantize
    assert kernels._quantizer_on_gpu(PackedLayout((4, 3), 32, 32, 4)) is chosen


def test_the_sum_is_split_over_the_past(monkeypatch):
    """However many programs share the tokens."""
    import cskv_hf.kernels.gpu as gpu

    factors = layer(*CASES["packed, head"], torch.float32)
    kv, query = past(factors, 1, 160, torch.float32), torch.randn(1, 4, 1, 32).to(DEVICE)
    for tiles_each in (1, 2):  # of 3 tiles, so that a last split is short
        monkeypatch.setattr(gpu, "tiles_of_program", lambda *_, n=tiles_each: n)
        assert relative_error(query, kv, None, None) < 2e-6


def test_tiles_of_a_program():
    """As many programs as wanted, or a quarter if each would have few tiles; never more splits than tiles."""
    from cskv_hf.kernels.gpu_plans import tiles_of_program

    assert tiles_of_program(512, 128, 2048) == 32  # 16 splits beside 128
    assert tiles_of_program(64, 8, 2048) == 1  # 64 splits, a quarter of 256
    assert tiles_of_program(5, 1, 1) == 5 and tiles_of_program(5, 10**6, 2048) == 5


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
@pytest.mark.parametrize("dtype", A_DTYPE, ids=str)
def test_a_cache_of_fixed_size(dtype, monkeypatch):
    """Several tokens and one by one, over latents that are not all there yet, in rows of unequal length: a block
    becomes due in each at another step."""
    from cskv_hf.kernels.triton_encode import encode_due

    sizes = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_hidden_layers=1)
    model = lossy(make_model(dtype=torch.float32, **sizes), bits=None, allocation=None, block_size=8)
    model = model.to(DEVICE, dtype)
    ids, outputs, calls = prompt(2, 74).to(DEVICE), [], []
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    for served in (None, "gpu"):
        monkeypatch.setattr(kernels, "choose", lambda *_, served=served: calls.append(served) or served)
        monkeypatch.setattr(kernels, "encoder", lambda *_, served=served: encode_due if served else None)
        cache, logits, end = CSKVStaticCache(90), [], 0
        for part in ids.split([58, 5] + 11 * [1], dim=1):
            end += part.shape[1]
            logits.append(model(part, attention_mask=mask[:, :end], past_key_values=cache).logits)
        outputs.append(torch.cat(logits[1:], dim=1))
    assert calls.count("gpu") == calls.count(None) == 12
    torch_s, ours = (out[mask[:, 58:].bool()].float() for out in outputs)
    assert (ours - torch_s).norm() / torch_s.norm() < (1e-5 if dtype == torch.float32 else 1e-2)


@torch.no_grad()
@pytest.mark.parametrize("dtype", A_DTYPE, ids=str)
def test_in_a_compiled_step(dtype, monkeypatch):
    """A compiler calls the kernels as operations, for attention and for packing: one graph for all steps, which gives
    what the kernels give."""
    from cskv_hf.kernels.triton_encode import encode_due
    from cskv_hf.kernels.triton_quantize import quantize_as_operation

    sizes = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_hidden_layers=1)
    model = lossy(make_model(dtype=torch.float32, **sizes), bits=None, allocation=None, block_size=8)
    model = model.to(DEVICE, dtype)
    monkeypatch.setattr(kernels, "choose", lambda *_: "gpu")
    monkeypatch.setattr(kernels, "quantizer", lambda *_: quantize_as_operation)
    monkeypatch.setattr(kernels, "encoder", lambda *_: encode_due)
    ids, outputs, graphs = prompt(2, 69).to(DEVICE), [], []  # at 67 a block is old that was packed in the graph
    compiled = torch.compile(model.forward, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    for step in (model.forward, compiled):
        cache = CSKVStaticCache(90)
        model(ids[:, :65], past_key_values=cache)
        outputs.append(torch.cat([step(token, past_key_values=cache).logits for token in ids[:, 65:].split(1, dim=1)]))
    tolerance = 2e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(*outputs, atol=tolerance, rtol=tolerance)
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes]
    assert called.count("cskv_hf.gpu_attend.default") == 1 and called.count("cskv_hf.gpu_encode.default") == 2


ON_GPU_ONLY = pytest.mark.skipif(DEVICE == "cpu", reason="There is no GPU")


def model_of_two_layers(dtype):
    """The same one whenever it is called; in 16 bits what the kernel for Hopper GPUs takes. In float32 nothing is
    packed, since a rounding that makes another code of a number is as seldom as it is large."""
    sizes = dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=64, initializer_range=0.1)
    bits = 16 if dtype == torch.float32 else 4
    model = lossy(make_model(dtype=torch.float32, **sizes), bits=bits, block_size=32)
    return model.to(dtype).to(DEVICE)


def step_by_step(model, cache, ids, mask, num_read):
    """Logits of every token after the first `num_read`, one forward for each: (batch, steps, vocabulary)."""
    positions, logits = mask.cumsum(1) - 1, []
    for start, end in [(0, num_read), *((i, i + 1) for i in range(num_read, ids.shape[1]))]:
        of_part = dict(attention_mask=mask[:, :end], position_ids=positions[:, start:end].clamp(min=0))
        logits.append(model(ids[:, start:end], past_key_values=cache, **of_part).logits[:, -1:])
    return torch.cat(logits[1:], dim=1)


@torch.no_grad()
@ON_GPU_ONLY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generate_compiles_by_itself(dtype, monkeypatch):
    """As `generate` does on a GPU with a cache of fixed size: the logits of the same tokens in float64, to rounding;
    in 16 bits, where roundings make other codes, no further from them than torch's operations are with a cache that
    grows."""
    model, ids = model_of_two_layers(dtype), prompt(2, 150).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    how = dict(attention_mask=mask, max_new_tokens=71, min_new_tokens=71, do_sample=False, pad_token_id=0)
    how |= dict(output_logits=True, return_dict_in_generate=True, past_key_values=CSKVStaticCache(300))
    out = model.generate(ids, **how)
    assert "_compiled_call" in vars(model.get_base_model())
    ours = torch.stack(out.logits[1:], dim=1)
    given = out.sequences[:, :-1], torch.cat([mask, torch.ones_like(out.sequences[:, 150:-1])], dim=1), 150
    monkeypatch.setattr(kernels, "choose", lambda *_: None)
    torch_s = step_by_step(model, CSKVCache(), *given)
    in_float64 = model_of_two_layers(dtype).double()
    exact = step_by_step(in_float64, CSKVCache(), *given)
    with in_float64.disable_adapter():
        uncompressed = step_by_step(in_float64, DynamicCache(), *given)
    errors = [(logits.double() - exact).norm(dim=(0, 2)) / exact.norm(dim=(0, 2)) for logits in (ours, torch_s)]
    assert (uncompressed - exact).norm() / exact.norm() > 0.1
    assert errors[0].max() < 1e-5 if dtype == torch.float32 else errors[0].mean() < 1.2 * errors[1].mean()


@torch.no_grad()
@ON_GPU_ONLY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_a_recorded_step(dtype):
    """A CUDA graph, replayed while two blocks become old: what the same steps give when they are launched."""
    model, ids = model_of_two_layers(dtype), prompt(2, 230).to(DEVICE)
    mask = torch.ones_like(ids)
    launched = step_by_step(model, CSKVStaticCache(300), ids, mask, 150)
    cache, token, position = CSKVStaticCache(300), ids[:, 150:151].clone(), torch.full((2, 1), 150, device=DEVICE)
    model(ids[:, :150], past_key_values=cache)
    logits, stream, graph = [], torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def step():
        return model(token, past_key_values=cache, position_ids=position).logits

    def put(index):
        token.copy_(ids[:, index : index + 1])
        position.fill_(index)

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for index in range(150, 153):
            put(index)
            logits.append(step())
        torch._assert_async(torch.ones((), device=DEVICE))
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        out = step()
    for index in range(153, 230):
        put(index)
        graph.replay()
        logits.append(out.clone())
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    recorded = torch.cat(logits, dim=1)
    assert (recorded - launched).norm() / launched.norm() < tolerance


COMPILE = """
import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
import cskv_hf.kernels.gpu as gpu
import cskv_hf.kernels.gpu_arguments as arguments
import cskv_hf.kernels.gpu_plans as plans
import cskv_hf.kernels.tiles as tiles
import cskv_hf.kernels.triton_kernels as kernels
from cskv_hf.latents import PackedFormat, PlainFormat
from cskv_hf.quantize import PackedLayout

MODEL = ("query", "mask", "merged", "exact_keys", "exact_values", "value_B", "value_mean", "out")
WORK = ("weights", "key_B", "cos", "sin", "start_cos", "start_sin")
FP32 = ("maxima", "sums", "summed", "split_maxima", "inv_freq")
KINDS = dict.fromkeys(MODEL, "*bf16") | dict.fromkeys(FP32, "*fp32")
KINDS |= dict.fromkeys(("scaling", "attention_scaling"), "fp32") | {"order": "*i64"}
KINDS |= dict.fromkeys(("pieces", "positions", "seen", "num_seen"), "*i32")


def compile_for_all(function, constants, warps=gpu.WARPS, on_hopper=None, **kinds):
    names = function.arg_names
    kinds = KINDS | kinds
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
    source = ASTSource(function, signature, {(names.index(n),): v for n, v in constants.items()})
    for capability in (80, 90):  # A100, H100
        options = dict(num_warps=warps, num_stages=1, **gpu.FUSED)
        options |= on_hopper if on_hopper and capability == 90 else {}
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
        tensor_cores = "mma" in ptx or kinds["query"] == "*fp32" or function is kernels.merge_kernel
        in_registers = ".local" not in ptx or constants.get("HEAD_DIM") == 256
        in_registers |= constants.get("TURNS") == tiles.FROM_POSITIONS  # cos and sin of large angles
        print(function.__name__, capability, shared, tensor_cores, in_registers, shared <= ROOM)


def compile_scores(bits, head_dim, stored, kinds, work=torch.float16, least=None, **how):
    how = dict(TURNS=tiles.IN_TILES, RUN=tiles.ONLY, MASK=0, HEADS_PER_GROUP=1, ROWS=8, ALL_ROWS=True, PART=16) | how
    format = PackedFormat(PackedLayout(bits, 32, 32, 4)) if isinstance(bits, tuple) else PlainFormat(bits)
    ranks = (format.rank,) if least is None else (format.rank - least, least)
    words = stored is in_words
    pieces, held, ahead = gpu.key_pieces(format, ranks, head_dim * work.itemsize, words, torch.device("cpu"))
    form = arguments.storage(format, words)
    on_hopper = gpu.few_registers(pieces, form[2], None) if words and head_dim == 128 else {}
    how |= dict(HEAD_DIM=head_dim, SIZES=pieces.sizes, LEAST=pieces.least, HELD=held, AHEAD=ahead, TILE=gpu.TILE)
    compile_for_all(kernels.score_kernel, how | stored(format), on_hopper=on_hopper, **kinds)


ROOM = 99 * 1024  # of the smallest cards of these generations
plans.shared_memory, plans.is_hopper = (lambda _: ROOM), (lambda _: True)
HALF, BF16, WIDE = (dict.fromkeys(WORK, kind) for kind in ("*fp16", "*bf16", "*fp32"))
WIDE |= dict.fromkeys(MODEL, "*fp32")
CODES = dict(data="*i32", ranges="*i32")
BYTES = dict(data="*u8", ranges="*i32")
PLAIN = dict(data="*bf16", ranges="*bf16")
in_words = lambda format: dict(FORM=arguments.storage(format, True))
as_bytes = lambda format: dict(FORM=arguments.storage(format, False))
FEW, MIXED, MANY = (4,) * 40, (4,) * 3 + (3,) * 14 + (2,) * 60, (8,) * 2 + (3,) * 75 + (2,) * 246
for bits in ((4,) * 9, FEW, MIXED, MANY):
    compile_scores(bits, 128, in_words, CODES | HALF)
compile_scores(FEW, 128, in_words, CODES | HALF, least=14)
compile_scores(MIXED, 128, as_bytes, BYTES | HALF)
for rank in (30, 100, 300):
    compile_scores(rank, 128, as_bytes, PLAIN | BF16)
compile_scores(MIXED, 64, in_words, CODES | HALF, TURNS=tiles.TABLES, MASK=1, ROWS=16, ALL_ROWS=False)  # other models
compile_scores(FEW, 256, in_words, CODES | HALF, MASK=2)
compile_scores(MANY, 256, in_words, CODES | WIDE, torch.float32, TURNS=tiles.TABLES)
compile_scores(MIXED, 128, in_words, CODES | HALF, RUN=tiles.FIRST)
for mask, part in ((0, 16), (1, 64)):
    again = dict(TURNS=tiles.FROM_POSITIONS, RUN=tiles.SECOND, MASK=mask, PART=part)
    compile_scores(MIXED, 128, in_words, CODES | HALF, **again)
how = dict(TOLD=False, ROWS=32, PART=16, CHUNK=gpu.VALUE_CHUNK, TILE=gpu.TILE)
for bits, stored, kinds in (
    (FEW, in_words, CODES | HALF), (MIXED, in_words, CODES | HALF), (MIXED, as_bytes, BYTES | HALF),
    (MIXED, in_words, CODES | WIDE),
):
    compile_for_all(kernels.value_kernel, how | stored(PackedFormat(PackedLayout(bits, 32, 32, 4))), **kinds)
compile_for_all(kernels.value_kernel, how | as_bytes(PlainFormat(100)), **PLAIN | BF16)
compile_for_all(kernels.value_kernel, how | in_words(PackedFormat(PackedLayout(FEW, 32, 32, 4))) |
                dict(PART=64, TOLD=True), **CODES | HALF)
compile_for_all(kernels.merge_kernel, dict(SPLITS=128, CHUNK=64))
compile_for_all(kernels.finish_kernel, dict(MASK=2, HEAD_DIM=128, ROWS=16, TILE=64, CHUNK=64), 8)
compile_for_all(kernels.finish_kernel, dict(MASK=1, HEAD_DIM=256, ROWS=16, TILE=16, CHUNK=16), 8, **WIDE)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler runs on Linux")
def test_compiles_for_gpus_that_are_not_here():
    """What the interpreter forgives, the compiler does not: onto tensor cores, without arrays in local memory (but for
    the widest heads), and into the shared memory of the smallest cards."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    compiled = [line.split() for line in out.stdout.splitlines()]
    assert len(compiled) == 2 * (15 + 6 + 3) and all(line[3:] == ["True"] * 3 for line in compiled), out.stdout


COMPILE_ENCODERS = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from cskv_hf.kernels.triton_center import center_kernel
from cskv_hf.kernels.triton_encode import encode_kernel
from cskv_hf.kernels.triton_quantize import pack_kernel, quantize_kernel

KINDS = {"latents": "*fp32", "ranges": "*fp16", "codes": "*u8", "target": "*i64", "places": "*i64", "tiles": "*i32"}
KINDS |= dict.fromkeys(("cos", "sin"), "*fp32") | dict.fromkeys(("groups", "order", "planes"), "*i32")

def compile_for_all(function, constants, **kinds):
    names = function.arg_names
    signature = {n: "constexpr" if n in constants else (KINDS | kinds).get(n, "i32") for n in names}
    source = ASTSource(function, signature, {(names.index(n),): v for n, v in constants.items()})
    for capability in (80, 90):
        options = dict(num_stages=1) if function is encode_kernel else dict(enable_fp_fusion=False)
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
        rounded_as_torch_does = "div.full" not in ptx and ("fma.rn.f32" not in ptx or function is encode_kernel)
        little = shared <= 64 * 1024
        print(".local" not in ptx, rounded_as_torch_does and little)  # in registers

for block, tokens, of_group, channels in ((32, 32, 4, 64), (24, 3, 1, 64), (32, 16, 128, 128)):
    sizes = dict(BLOCK=block, GROUP_TOKENS=tokens, GROUP_CHANNELS=of_group, CHANNELS=channels)
    compile_for_all(quantize_kernel, sizes | dict(TOLD=block == tokens))
for block, together, packed in ((32, 4, "*i32"), (24, 1, "*u8")):
    compile_for_all(pack_kernel, dict(BLOCK=block, TOGETHER=together, UNITS=256, TOLD=together == 4), packed=packed)
MODELS = (8, 1, 128, 32, "bf16"), (8, 8, 128, 32, "fp16"), (2, 2, 256, 8, "fp32")
for heads, of_group, head_dim, block, kind in MODELS:
    sizes = dict(HEADS=heads, GROUP_HEADS=of_group, HEAD_DIM=head_dim, BLOCK=block, TOKENS=max(16, block), CHANNELS=16)
    of_model = dict.fromkeys(("states", "A", "mean"), f"*{kind}")
    compile_for_all(encode_kernel, sizes | dict(TURNED=True, PACKED=True), out="*fp32", **of_model)
    compile_for_all(encode_kernel, sizes | dict(TURNED=False, PACKED=False), out=f"*{kind}", **of_model)
    sizes = dict(HEADS=heads, HEAD_DIM=head_dim, TOKENS=32)
    for turned in (True, False):
        compile_for_all(center_kernel, sizes | dict(TURNED=turned), out=f"*{kind}", **of_model)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler runs on Linux")
def test_encoding_and_packing_compile_for_gpus_that_are_not_here():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", COMPILE_ENCODERS], env=environment, capture_output=True, text=True)
    assert out.stdout.split() == ["True"] * 2 * 2 * (3 + 2 + 6 + 6), out.stdout + out.stderr[-2000:]


@pytest.mark.parametrize("ranks", [(3, 9), (20, 1), (40, 47), (60, 70), (130, 2)], ids=str)
@pytest.mark.parametrize("plain", [False, True], ids=["packed", "plain"])
@pytest.mark.parametrize("held", [True, False], ids=["held", "one by one"])
def test_every_way_to_take_channels(ranks, plain, held, monkeypatch):
    """Few channels at once, several pieces held ready, one by one; heads of other ranks take fewer pieces."""
    from cskv_hf.kernels import gpu, gpu_plans

    monkeypatch.setattr(gpu, "key_pieces", gpu.key_pieces.__wrapped__)
    if not held:
        monkeypatch.setattr(gpu_plans, "MOST_HELD", 0)
    bits = tuple(tuple(1 + (3 * i) % 8 for i in range(rank)) for rank in ranks)
    factors = layer("head", ranks if plain else bits, 37 if plain else bits[0], 2, 32, torch.float32)
    kv = past(factors, 1, 96, torch.float32)
    assert relative_error(torch.randn(1, 4, 1, 32).to(DEVICE), kv, None, None) < 2e-6
    _, is_held, _ = gpu.key_pieces(factors.key_format, factors.key_ranks, 128, False, torch.device(DEVICE))
    assert is_held == held


@pytest.mark.parametrize("num_old", [32, 96])
def test_a_past_that_fills_no_tile(num_old):
    """As after the first block, in 16 bits, where all tiles share one table: it is that of a whole tile."""
    factors = layer(*CASES["packed, head"], torch.float16)
    kv = past(factors, 2, num_old, torch.float16)
    starts, within, *_ = kv.turns.in_tiles(torch.device(DEVICE), 64, torch.float16)
    assert [t.shape[-2] for t in (*starts, *within)] == [(num_old + 63) // 64] * 2 + [64] * 2
    assert relative_error(torch.randn(2, 4, 1, 32).to(DEVICE, torch.float16), kv, None, None) < 4e-3


def test_a_window_of_another_dtype():
    """As after a cache of a bfloat16 model went on in float16: it is brought to the queries'."""
    factors = layer(*CASES["packed, head"], torch.float16)
    kv = past(factors, 1, 64, torch.float16)
    kv.exact_keys, kv.exact_values = kv.exact_keys.float(), kv.exact_values.float()
    assert relative_error(torch.randn(1, 4, 1, 32).to(DEVICE, torch.float16), kv, None, None) < 4e-3


@pytest.mark.parametrize("kernel", ["gpu", "cpu"])
def test_a_mask_for_each_head_is_left_to_torch(kernel, monkeypatch):
    factors = layer("head", ((4,) * 9, (4,) * 9), (4,) * 9, 2, 32, torch.float32)
    kv, query = past(factors, 1, 64, torch.float32), torch.randn(1, 2, 1, 32).to(DEVICE)
    monkeypatch.setattr(kernels, "choose", lambda *_: kernel)
    mask = torch.rand(1, 2, 1, 64, device=DEVICE) > 0.5
    assert not torch.equal(mask[:, 0], mask[:, 1])
    ours = attention.compressed_attention(query, kv, 0.2, None, mask)
    assert torch.equal(ours, attention.attend_in_torch(query, kv, 0.2, None, mask))


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
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_what_is_held_fits(head_dim, dtype, monkeypatch):
    """Into the shared memory of a GPU, beside a few tiles."""
    import cskv_hf.kernels.gpu_plans as plans

    of_channel = head_dim * dtype.itemsize
    for room in (64 * 1024, 99 * 1024, 227 * 1024):
        monkeypatch.setattr(plans, "shared_memory", lambda _, room=room: room)
        for rank in (1, 15, 16, 40, 100, 250, 400, 1000):
            for format in (PackedFormat(PackedLayout((4,) * rank)), PackedFormat(PackedLayout((3,) * rank))):
                pieces, held, ahead = plans.key_pieces.__wrapped__(
                    format, (rank,), of_channel, True, torch.device("cpu")
                )
                assert all(size in (16, 32, 64) and size * of_channel <= 2**14 for size in pieces.sizes)
                assert rank < sum(pieces.sizes) <= rank + 64 and pieces.least == len(pieces.sizes)
                assert not held or sum(pieces.sizes) * of_channel <= room - 2**15
                assert held or not ahead


LAYOUTS = {
    "one tier": (PackedFormat(PackedLayout((4,) * 50)), (33, 17)),
    "falling": (PackedFormat(PackedLayout((8, 6, 6, 3, 3, 3, 1) * 1 + (7,) * 2 + (3,) * 20)), (7, 22)),
    "mixed": (PackedFormat(PackedLayout((4, 2, 4, 2, 1, 7, 4, 8, 4, 2))), (4, 6)),
    "ranges of several channels": (PackedFormat(PackedLayout((4, 2) * 9, 64, 64, 3)), (18,)),
    "plain": (PlainFormat(70), (3, 65, 2)),
}


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("sizes", [(16, 16), (16, 64), (64, 64)], ids=str)
def test_pieces(case, sizes):
    """Every channel is in one piece of its group, and so is one for the constant; the channels of a piece are
    neighbours in one tier, where `pack` has put their codes."""
    format, ranks = LAYOUTS[case]
    pieces = cut(format, ranks, *sizes)
    assert pieces.table.shape == (len(ranks), len(pieces.sizes), len(Piece._fields))
    assert sorted(pieces.order.tolist()) == list(range(format.rank + len(ranks)))
    begin, taken, needed = 0, [], []
    for group, rank in enumerate(ranks):
        mine = [Piece(*row) for row in pieces.table[group].tolist()]
        of_group = [c for p in mine for c in pieces.order[p.start : p.start + p.count].tolist()]
        taken += of_group
        assert sorted(of_group) == [*range(begin, begin + rank), format.rank + group]
        begin += rank
        assert sum(p.constant for p in mine) == 1
        needed.append(max(i + 1 for i, p in enumerate(mine) if p.count))
        for piece, size in zip(mine, pieces.sizes):
            assert piece.count <= size and sizes[0] <= size <= sizes[1]
            channels = pieces.order[piece.start : piece.start + piece.count].tolist()
            assert (channels[-1:] == [format.rank + group]) == bool(piece.constant)
            for i, channel in enumerate(channels[: piece.count - piece.constant]):
                if isinstance(format, PlainFormat):
                    assert piece.word + i == channel
                    continue
                (tier,) = [tier for tier in format.layout.tiers if channel in tier.channels]
                assert tier.channels[piece.index + i] == channel
                assert (piece.bits, piece.width) == (tier.bits, len(tier.channels))
    assert taken == pieces.order.tolist() and pieces.least == min(needed)


def test_codes_are_where_pieces_say():
    """Bits of a code lie in planes of 8, 4, 2 and 1 of them, wide ones first and lowest; four rows make a word."""
    layout = PackedLayout((7, 3, 8, 3, 4), 32)
    codes, ranges = quantize(torch.randn(1, 64, 5), layout)
    words, values = codes.view(torch.int32), dequantize(codes, ranges, layout, torch.float64)
    pieces = cut(PackedFormat(layout), (5,), 16, 16)
    for piece in map(Piece._make, pieces.table[0].tolist()):
        for i, channel in enumerate(pieces.order[piece.start :][: piece.count - piece.constant].tolist()):
            for block, token in itertools.product(range(2), range(32)):
                code = 0
                for bits, above in ((8, 0), (4, piece.bits & 8), (2, piece.bits & 12), (1, piece.bits & 14)):
                    if piece.bits & bits:
                        row = token % (4 * bits)
                        at = piece.word + i + (above + row // 4) * piece.width
                        word = int(words[0, block, at]) & 0xFFFFFFFF
                        code += (word >> (8 * (row % 4) + bits * (token // (4 * bits))) & 2**bits - 1) << above
                minimum, step = ranges[0, block, piece.first_range + piece.index + i].double()
                assert abs(minimum + step * code - values[0, 32 * block + token, channel]) < 1e-12


def test_what_is_kept_of_factors():
    """The transposed factors are made once, and again when the factors are written to."""
    from cskv_hf.kernels import gpu
    from cskv_hf.kernels.gpu_kept import _kept, transposed, with_mean

    factors = layer(*CASES["packed, head"], torch.float32)
    pieces = cut(factors.key_format, factors.key_ranks, 16, 16)
    pieces = pieces._replace(order=pieces.order.to(DEVICE))
    how = pieces.order, torch.float32
    kept, heads = with_mean(factors.key_B, factors.key_mean, *how), factors.key_mean.view(2, -1)
    assert torch.equal(kept, torch.cat([factors.key_B.mT, heads])[pieces.order])
    assert with_mean(factors.key_B, factors.key_mean, *how) is kept
    other = pieces.order.flip(0)
    assert torch.equal(with_mean(factors.key_B, factors.key_mean, other, torch.float32), kept.flip(0))
    for tensor in (factors.key_B, factors.key_mean):  # in the same place, where a recorded graph reads it
        before = kept.clone()
        tensor.mul_(2)
        assert with_mean(factors.key_B, factors.key_mean, *how) is kept and not torch.equal(before, kept)
    assert torch.equal(kept, torch.cat([factors.key_B.mT, factors.key_mean.view(2, -1)])[pieces.order])
    assert with_mean(factors.key_B, factors.key_mean, pieces.order, torch.float16).dtype == torch.float16
    before = kept.clone()
    factors.key_B.data = factors.key_B.data * 2  # another tensor, of the same version
    assert not torch.equal(with_mean(factors.key_B, factors.key_mean, *how), before)
    for _ in range(20):  # the second may come to lie where the first was
        factors.key_B.data = factors.key_B.data * 2
        factors.key_B.data = factors.key_B.data * 2
        expected = torch.cat([factors.key_B.mT, factors.key_mean.view(2, -1)])[pieces.order]
        assert torch.equal(with_mean(factors.key_B, factors.key_mean, *how), expected)
    with torch.inference_mode():  # whose tensors count no writes
        inferred = factors.key_B.clone(), factors.key_mean.clone()
        before = with_mean(*inferred, *how)
        inferred[0].mul_(2)
        assert not torch.equal(with_mean(*inferred, *how), before)
    turned = transposed(factors.value_B, torch.float16)
    assert torch.equal(turned, factors.value_B.mT.half()) and turned.is_contiguous()
    assert transposed(factors.value_B, torch.float16) is turned
    other = layer(*CASES["packed, joint"], torch.float32)
    gpu.prepare(other, other.key_B.device, torch.float32)  # before a graph is recorded
    ((_, kept, order, _),) = _kept[other.key_B].values()
    assert with_mean(other.key_B, other.key_mean, order, torch.float32) is kept and other.value_B in _kept
    parts = [transposed(factors.value_B[rows], torch.float16) for rows in (slice(4), slice(4, 8)) * 2]
    assert parts[0] is parts[2] and parts[1] is parts[3]  # of views, as a process has them of a layer that is shared
    assert torch.equal(parts[1], factors.value_B[4:8].mT.half())


@pytest.mark.parametrize("chosen", [kernels.encoder, kernels.centering])
def test_gradients_are_left_to_torch(chosen):
    """Also where values alone have them, as with a LoRA of `v_proj`."""
    factors = layer(*CASES["packed, head"], torch.float32)
    with FakeTensorMode():
        states = [torch.empty(1, 2, 32, 32, device="cuda") for _ in range(2)]
    assert chosen(*states, factors) is not None
    for tensor in (*states, factors.value_A):
        tensor.requires_grad_()
        assert chosen(*states, factors) is None
        with torch.no_grad():
            assert chosen(*states, factors) is not None
        tensor.requires_grad_(False)


def test_what_the_kernels_do_not_serve(monkeypatch):
    query = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16)
    assert kernels.why_not(query) is None
    assert "head_dim of 32, 64, 128, 256, this model has 80" in kernels.why_not(query.new_empty(1, 1, 1, 80))
    assert "torch.float64" in kernels.why_not(query.double())
    monkeypatch.setattr(kernels, "_triton_version", lambda: (3, 2))
    assert "Triton 3.6 or newer, this is 3.2" in kernels.why_not(query)
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    assert "pip install 'cskv-hf[kernels]'" in kernels.why_not(query)
    assert kernels.choose(query, query) is None  # on a CPU, where nothing was compiled

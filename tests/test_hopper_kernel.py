"""The kernels for Hopper GPUs against the torch path: with numpy on a CPU (see gluon_on_numpy.py), as compiled on such
a GPU; and compiled for one where there is none."""

import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_past import DEVICE, as_added, error_against_torch, layer, past

import cskv_hf.attention as attention

pytest.importorskip("triton")
import cskv_hf.kernels.gpu as gpu
import cskv_hf.kernels.gpu_kept as gpu_kept
import cskv_hf.kernels.hopper as hopper

ON_HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not ON_HOPPER, reason="another GPU")
FEW = (4,) * 13, (4,) * 30
DTYPES = [torch.float16] + [torch.bfloat16] * ON_HOPPER
VALUES = {
    "one piece": (4,) * 30,
    "more pieces than a program takes": (4,) * 200 + (3,) * 130,
    "all widths": (8, 7, 7, 6, 5, 5, 4, 3, 2, 2, 1),
    "a constant alone in its piece": (4,) * 64 + (3,) * 64,
}
BITS = {  # of the channels of each group
    "heads of few and more channels, by fours": tuple((4,) * rank for rank in (13, 30, 37, 16)),
    "one by one": ((4,) * 14, (4,) * 31),
    "heads of more ranks than there are ways": tuple((4,) * rank for rank in (3, 20, 35, 52)),
    "many channels": ((4,) * 76,),
    "many channels one by one": ((4,) * 81,),
    "all widths": ((8, 7, 6, 5, 4, 3, 2, 1), (7, 7, 5, 3, 3, 1, 1)),
    "heads without some": ((6, 6, 6, 3), (3, 3, 2, 2, 2), (6, 3)),
    "many channels of some widths": ((6,) * 20 + (4,) * 33 + (3,) * 18 + (2,) * 7,),
    "of some widths, by fours": ((6,) * 4 + (2,) * 8, (6,) * 8 + (2,) * 4),
    "heads without some, by fours": ((6,) * 4 + (2,) * 8, (6,) * 8),
}


@pytest.fixture
def summed(monkeypatch):
    """Calls of the kernel of values."""
    calls, launch = [], hopper.launch_values
    monkeypatch.setattr(hopper, "launch_values", lambda *args: calls.append(args) or launch(*args))
    return calls


@pytest.fixture
def served(monkeypatch):
    """Calls of the kernel of scores. That of values takes any number of tiles, too."""
    calls, launch = [], hopper.launch
    monkeypatch.setattr(hopper, "launch", lambda *args: calls.append(args) or launch(*args))
    monkeypatch.setattr(hopper, "LEAST_TILES", 0)
    if not ON_HOPPER:
        from gluon_on_numpy import Kernel

        monkeypatch.setattr(gpu, "is_hopper", lambda _: True)
        for of in ("score", "value"):
            kernel = Kernel(Path(hopper.__file__).parent, f"hopper_{of}s", f"hopper_{of}_kernel")
            monkeypatch.setattr(hopper, f"hopper_{of}_kernel", kernel)
    return calls


def factors_of(key_bits, dtype, heads=None, head_dim=64, value_bits=(6, 4, 4, 3, 2)):
    layout, heads = "joint" if len(key_bits) == 1 else "head", heads or max(2, len(key_bits))
    return layer(layout, key_bits, value_bits, heads, head_dim, dtype, group=[32, 4])


def query_of(factors, batch, per_head, dtype, num_new=1):
    shape = batch, per_head * factors.num_key_value_heads, num_new, factors.head_dim
    return torch.randn(shape).to(DEVICE, dtype)


def relative(query, kv):
    return error_against_torch(attention.attend_on_gpu, query, kv, None, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key_bits", BITS.values(), ids=BITS)
def test_equal_to_the_torch_path(key_bits, dtype, served):
    """To a few roundings of 16 bits, with a last tile that is not full, in two rows of the batch."""
    factors = factors_of(key_bits, dtype)
    kv = past(factors, 2, 256 + 96, dtype)
    assert relative(query_of(factors, 2, 2, dtype), kv) < (4e-3 if dtype == torch.float16 else 3e-2)
    assert len(served) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value_bits", VALUES.values(), ids=VALUES)
def test_values(value_bits, dtype, served, summed, monkeypatch):
    """Latents of all widths, in two splits, of which the last has half a tile."""
    factors = factors_of(FEW, dtype, value_bits=value_bits)
    beside = math.prod(hopper.programs_of_values(factors.value_format, 2, 6, factors.value_B.device))
    monkeypatch.setattr(hopper, "VALUE_PROGRAMS", 2 * beside)
    kv = past(factors, 2, 4 * 256 + 96, dtype)
    assert relative(query_of(factors, 2, 3, dtype), kv) < (4e-3 if dtype == torch.float16 else 3e-2)
    ((weights, _, _, _, _, _, tiles_each, sums, _),) = summed
    assert (weights.shape[2], tiles_each, len(sums)) == (18, 9, 2)


@pytest.mark.parametrize("per_head, num_new", [(1, 1), (3, 1), (8, 1), (2, 3)])
def test_rows_of_queries(per_head, num_new, served, summed):
    """One query head for a KV head and several, and several tokens, where the old ones are seen by all."""
    factors = factors_of(FEW, torch.float16, head_dim=128)
    kv = past(factors, 1, 64, torch.float16, num_new=num_new)
    assert relative(query_of(factors, 1, per_head, torch.float16, num_new), kv) < 4e-3
    assert len(served) == len(summed) == 1


@pytest.mark.parametrize("rows", [5, 17, 33])
def test_rows_that_other_kernels_scored(rows, served, summed):
    """Of a maximum for 16 tokens, and more rows than a program takes."""
    factors = factors_of(((4,) * 130,), torch.float16, heads=2)
    kv = past(factors, 2, 256 + 96, torch.float16)
    assert relative(query_of(factors, 2, rows, torch.float16), kv) < 4e-3
    ((weights, maxima, *_),) = summed
    assert weights.shape[1] == 2 * rows and maxima.shape[3] == 4 and not served


@pytest.mark.parametrize("rank", [13, 76])
def test_programs_that_share_the_past(rank, served, monkeypatch):
    """Some tiles each, more of them than queries are turned for at once, and a last program that has fewer."""
    monkeypatch.setattr(hopper, "PROGRAMS", 2)
    factors = factors_of(((4,) * rank,), torch.float16, heads=1)
    kv = past(factors, 1, 10 * 256 + 32, torch.float16)
    assert relative(query_of(factors, 1, 2, torch.float16), kv) < 4e-3
    (weights,) = {args[-2].shape for args in served}
    assert weights[2] == 41  # tiles of 64: of eleven of 256, six and five


@pytest.mark.parametrize("added", [False, True], ids=["bool", "added"])
@pytest.mark.parametrize("rank", [13, 76])
def test_a_part_of_each_row(rank, added, served, summed, uninitialised_is_nan):
    """Masks and positions of each row; tiles with holes, and such that do not follow the first of 256 tokens, are
    scored again by the kernel for all GPUs."""
    num_old = 256 + 96
    mask = torch.arange(num_old) < torch.tensor([[96], [num_old], [300], [0]])
    mask[1, 40:50] = False
    positions = 50 * torch.arange(4)[:, None] + torch.arange(num_old)
    positions[2, 64:] += 3
    factors = factors_of(((4,) * rank,), torch.float16, heads=1)
    kv = past(factors, 4, num_old, torch.float16, positions)
    query, mask = query_of(factors, 4, 2, torch.float16), mask[:, None, None].to(DEVICE)
    mask = as_added(mask, torch.float16) if added else mask
    assert error_against_torch(attention.attend_on_gpu, query, kv, None, mask) < 4e-3
    assert relative(query, kv) < 4e-3
    assert len(served) == len(summed) == 2


def test_few_values(served, summed, monkeypatch):
    """A program would have little to do after all that it prepares."""
    monkeypatch.setattr(hopper, "LEAST_TILES", 6)
    monkeypatch.setattr(hopper, "VALUE_PROGRAMS", 1)
    factors = factors_of(FEW, torch.float16, value_bits=(4,) * 30)
    query = query_of(factors, 1, 2, torch.float16)
    for tiles, called in ((5, 0), (6, 1)):
        assert relative(query, past(factors, 1, 64 * tiles, torch.float16)) < 4e-3
        assert len(summed) == called


def test_what_is_kept_is_made_beforehand(served):
    """So that nothing is allocated among the tensors of a CUDA graph that stays there."""
    cached = hopper.plan, hopper.value_plan, gpu.key_pieces, gpu.value_pieces
    for function in cached:
        function.cache_clear()
    factors = factors_of(FEW, torch.float16)
    kv, mask = past(factors, 2, 160, torch.float16), torch.ones(2, 1, 1, 160, dtype=torch.bool, device=DEVICE)

    def kept():
        made = [id(t) for of_layer in gpu_kept._kept.values() for _, t, *_ in of_layer.values()]
        return made, [function.cache_info().misses for function in cached]

    gpu.prepare(factors, factors.key_B.device, torch.float16)
    before = kept()
    for old_mask in (None, mask):  # which tiles are told of
        attention.attend_on_gpu(query_of(factors, 2, 2, torch.float16), kv, 0.1, None, old_mask)
    assert len(served) == 2 and kept() == before


@pytest.mark.parametrize("key_group, value_group", [([16, 4], [32, 4]), ([32, 4], [16, 4])], ids=["keys", "values"])
def test_ranges_of_half_a_block(key_group, value_group, served, summed):
    """Of keys or of values: these are read in another order of tokens than words have, and weights lie in one."""
    factors = layer("head", FEW, (4,) * 30, 2, 64, torch.float16, group=key_group, value_group=value_group)
    assert relative(query_of(factors, 1, 2, torch.float16), past(factors, 1, 96, torch.float16)) < 4e-3
    assert not served and not summed


def test_what_it_leaves_to_others(served, summed):
    """Other blocks, float32, masks of each query, rows of more queries, many channels that cannot be read by fours:
    the kernel for all GPUs."""
    half = torch.float16
    factors = factors_of(FEW, half)
    kv = past(factors, 1, 64, half)
    two, seen = query_of(factors, 1, 2, half, 2), torch.ones(1, 1, 2, 64, dtype=torch.bool, device=DEVICE)
    seen[:, :, 0, 60:] = False
    assert error_against_torch(attention.attend_on_gpu, two, past(factors, 1, 64, half, num_new=2), None, seen) < 4e-3
    assert relative(query_of(factors, 1, 9, half), kv) < 4e-3
    small = layer("head", FEW, (4,) * 5, 2, 64, half, block_size=16)
    assert relative(query_of(small, 1, 2, half), past(small, 1, 64, half)) < 4e-3
    many = factors_of(((4,) * 129,), half)
    assert relative(query_of(many, 1, 2, half), past(many, 1, 64, half)) < 4e-3
    assert len(summed) == 3  # values are in blocks of 32
    wide = factors_of(FEW, torch.float32)
    assert relative(query_of(wide, 1, 2, torch.float32), past(wide, 1, 64, torch.float32)) < 2e-6
    assert not served and len(summed) == 3


def test_a_triton_that_nobody_has_tried(served, monkeypatch, caplog):
    """Is said once, and the kernel for all GPUs serves."""
    monkeypatch.setattr(hopper, "NEWEST_TRITON", (3, 0))
    hopper.compiles_here.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    factors = factors_of(FEW, torch.float16)
    query, kv = query_of(factors, 1, 2, torch.float16), past(factors, 1, 64, torch.float16)
    assert relative(query, kv) < 4e-3 and relative(query, kv) < 4e-3 and not served
    hopper.compiles_here.cache_clear()
    (record,) = (record for record in caplog.records if "Hopper" in record.message)
    assert "up to 3.0" in record.message


@pytest.mark.parametrize("key_bits", [*BITS.values(), ((4,) * 60,), ((4,) * 61,), ((3,), (2,), (4,) * 250)])
def test_channels_of_a_plan(key_bits):
    """Every channel of a group and its constant have a place in the products of a way, and the order they lie in."""
    layout = factors_of(key_bits, torch.float16).key_format.layout
    plan = hopper.plan(layout, tuple(map(len, key_bits)), torch.device("cpu"))
    rooms = [sum(channels for _, _, channels, _ in way) for way in plan.ways]
    assert rooms == sorted(rooms) and len(rooms) <= hopper.MOST_WAYS and rooms[-1] == plan.num_channels
    for way in plan.ways:
        for tier, start, channels, bits in way:
            assert channels in (16, 32, 64) and bits == layout.tiers[tier].bits
            assert start == sum(c for t, s, c, _ in way if t == tier and s < start)  # one behind the other
    first = 0
    for group, (bits, shares) in enumerate(zip(key_bits, plan.groups.tolist())):
        own, constants = [], 0
        for tier, share in zip(layout.tiers, (hopper.Share(*share) for share in shares)):
            there = plan.order[share.first_row :][: share.channels].tolist()
            assert there == list(tier.channels[share.index :][: share.channels])
            if share.has_constant:
                assert plan.order[share.first_row + share.channels] == layout.rank + group
            places = sum(c for t, _, c, _ in plan.ways[-1] if layout.tiers[t] == tier)
            end = share.channels + (share.index % 4 if plan.fours else 0)
            assert end <= places and not (share.has_constant and (-(-end // 4) * 4 if plan.fours else end) >= places)
            own, constants = own + there, constants + share.has_constant
        assert sorted(own) == [*range(first, first + len(bits))] and constants == 1
        first += len(bits)


@pytest.mark.parametrize("value_bits", VALUES.values(), ids=VALUES)
def test_programs_of_values(value_bits):
    """Every piece is summed once, by a program that knows its bits."""
    format = factors_of(FEW, torch.float16, value_bits=value_bits).value_format
    plan = hopper.value_plan(format, torch.device("cpu"))
    pieces = plan.pieces.table[0].tolist()
    done = []
    for kind, first in plan.programs.tolist():
        bits, count = plan.kinds[kind]
        assert count <= hopper.MOST_PIECES
        for number in range(first, first + count):
            _, of_piece, piece_bits, *_, constant = pieces[number]
            assert piece_bits == bits or of_piece == constant
            done.append(number)
    assert done == list(range(len(pieces)))


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon._runtime import GluonASTSource
import cskv_hf.kernels.hopper as hopper
from cskv_hf.kernels.tiles import Seen
from cskv_hf.latents import PackedFormat
from cskv_hf.quantize import PackedLayout

KINDS = dict.fromkeys(("query",), "*bf16") | dict.fromkeys(("words", "ranges", "groups"), "*i32")
KINDS |= dict.fromkeys(("key_B", "cos", "sin", "start_cos", "start_sin"), "*fp16")
KINDS |= dict.fromkeys(("maxima", "summed", "split_maxima"), "*fp32") | {"scaling": "fp32", "order": "*i64"}
KINDS |= dict.fromkeys(("seen", "num_seen", "pieces", "programs"), "*i32")


class Recorder:
    def __init__(self, kernel, weights):
        self.kernel, self.kinds = kernel, KINDS | {"weights": weights}

    def __getitem__(self, grid):
        return lambda *args, num_warps, enable_fp_fusion, maxnreg=None, **constants: self.compile_for_hopper(
            constants, dict(num_warps=num_warps, enable_fp_fusion=enable_fp_fusion), maxnreg)

    def compile_for_hopper(self, constants, options, maxnreg):
        names = self.kernel.arg_names
        signature = {n: "constexpr" if n in constants else self.kinds.get(n, "i32") for n in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n == "words"}
        source = GluonASTSource(self.kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
        options |= {"maxnreg": maxnreg} if maxnreg else {}
        compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        by_fours = constants.get("FOURS") in (None, "ld.global.v4.b32" in compiled.asm["ptx"])
        print("wgmma" in compiled.asm["ptx"], compiled.metadata.shared <= 227 * 1024, by_fours)


hopper.hopper_score_kernel = Recorder(hopper.hopper_score_kernel, "*fp16")
hopper.hopper_value_kernel = Recorder(hopper.hopper_value_kernel, "*i32")
MIXED = (6,) * 20 + (4,) * 30 + (3,) * 20 + (2,) * 10
CASES = (((4,) * 49, (36, 13), 4, 128), ((4,) * 45, (14, 31), 8, 64), ((4,) * 60, (60,), 1, 128),
         ((4,) * 240, (240,), 4, 128), (MIXED, (40, 40), 2, 64), ((8, 7, 5, 3, 1), (5,), 4, 128))
for i, (bits, ranks, rows, head_dim) in enumerate(CASES):
    layout = PackedLayout(bits, 32, 32, 4)
    query, weights = torch.empty(1, 2, rows, head_dim), torch.empty(1, 1, 1, 64)
    codes, ranges = torch.empty(1, 1, 4, dtype=torch.int32), torch.empty(1, 1, 1, dtype=torch.int32)
    seen = Seen(*[torch.empty(1, 1, dtype=torch.int32)] * 2) if i % 2 else None
    hopper.launch(query, codes, ranges, layout, ranks, lambda *_: None, (None,) * 4, 1.0, seen, weights, None)
for i, (bits, rows) in enumerate((((4,) * 181, 32), (MIXED, 9), ((8, 7, 5), 2))):
    format, weights = PackedFormat(PackedLayout(bits, 32, 32, 4)), torch.empty(1, rows, 1, 64, dtype=torch.float16)
    maxima = torch.empty(1, rows, 1, 4 if i else 1)
    hopper.launch_values(weights, maxima, codes, ranges, format, codes if i % 2 else None, 1, torch.empty(1, 1), None)
"""


@pytest.mark.skipif(sys.platform != "linux" or ON_HOPPER, reason="There is one, or no compiler")
def test_compiles_where_there_is_none():
    """Layouts fit each other, so that nothing moves between threads; on tensor cores of Hopper GPUs; and four words
    are read at once where that was planned."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    assert out.stdout.split() == ["True"] * 3 * 9, out.stdout

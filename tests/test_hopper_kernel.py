"""The kernel for Hopper GPUs against the torch path: with numpy on a CPU (see gluon_on_numpy.py), as compiled on such
a GPU; and compiled for one where there is none."""

import os
import subprocess
import sys

import pytest
import torch
from random_past import DEVICE, error_against_torch, layer, past

import cskv_hf.attention as attention

pytest.importorskip("triton")
import cskv_hf.kernels.gpu as gpu
import cskv_hf.kernels.hopper as hopper

ON_HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not ON_HOPPER, reason="another GPU")
DTYPES = [torch.float16] + [torch.bfloat16] * ON_HOPPER
RANKS = {
    "heads of few and more channels, by fours": (13, 30, 37, 16),
    "one by one": (14, 31),
    "heads of more ranks than there are ways": (3, 20, 35, 52),
    "many channels": (76,),
    "many channels one by one": (81,),
}


@pytest.fixture
def served(monkeypatch):
    """Calls of the kernel."""
    calls, launch = [], hopper.launch
    monkeypatch.setattr(hopper, "launch", lambda *args: calls.append(args) or launch(*args))
    if not ON_HOPPER:
        from gluon_on_numpy import Kernel

        monkeypatch.setattr(gpu, "is_hopper", lambda _: True)
        path = hopper.__file__.replace("hopper.py", "hopper_scores.py")
        monkeypatch.setattr(hopper, "hopper_score_kernel", Kernel(path, "hopper_score_kernel"))
    return calls


def factors_of(ranks, dtype, heads=None, head_dim=64, group=(32, 4)):
    key_bits = tuple((4,) * rank for rank in ranks)
    layout = "joint" if len(ranks) == 1 else "head"
    return layer(layout, key_bits, (6, 4, 4, 3, 2), heads or max(2, len(ranks)), head_dim, dtype, group=list(group))


def query_of(factors, batch, per_head, dtype, num_new=1):
    shape = batch, per_head * factors.num_key_value_heads, num_new, factors.head_dim
    return torch.randn(shape).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_equal_to_the_torch_path(ranks, dtype, served):
    """To a few roundings of 16 bits, with a last tile that is not full, in two rows of the batch."""
    factors = factors_of(ranks, dtype)
    kv = past(factors, 2, 256 + 96, dtype)
    assert relative(query_of(factors, 2, 2, dtype), kv) < (4e-3 if dtype == torch.float16 else 3e-2)
    assert len(served) == 1


relative = lambda query, kv: error_against_torch(attention._attend_on_gpu, query, kv, None, None)  # noqa: E731


@pytest.mark.parametrize("per_head, num_new", [(1, 1), (3, 1), (8, 1), (2, 3)])
def test_rows_of_queries(per_head, num_new, served):
    """One query head for a KV head and several, and several tokens, where the old ones are seen by all."""
    factors = factors_of((13, 30), torch.float16, head_dim=128)
    kv = past(factors, 1, 64, torch.float16, num_new=num_new)
    assert relative(query_of(factors, 1, per_head, torch.float16, num_new), kv) < 4e-3
    assert len(served) == 1


def test_programs_that_share_the_past(served, monkeypatch):
    """Some tiles each, more of them than queries are turned for at once, and a last program that has fewer."""
    monkeypatch.setattr(hopper, "PROGRAMS", 2)
    factors = factors_of((13,), torch.float16, heads=1)
    kv = past(factors, 1, 9 * 256 + 32, torch.float16)
    assert relative(query_of(factors, 1, 2, torch.float16), kv) < 4e-3
    (weights,) = {args[-2].shape for args in served}
    assert weights[2] == 37  # tiles of 64: of ten of 256, five for each of two programs


def test_what_it_leaves_to_others(served):
    """Other bits, float32, masks, rows of more queries, positions with gaps: the kernel for all GPUs."""
    half = torch.float16
    factors = factors_of((13, 30), half)
    query, kv = query_of(factors, 1, 2, half), past(factors, 1, 64, half)
    seen = torch.ones(1, 1, 1, 64, dtype=torch.bool, device=DEVICE)
    assert error_against_torch(attention._attend_on_gpu, query, kv, None, seen) < 4e-3
    gaps = (torch.arange(64) * 3)[None]
    assert relative(query, past(factors, 1, 64, half, gaps)) < 4e-3
    assert relative(query_of(factors, 1, 9, half), kv) < 4e-3
    mixed = layer("head", ((4,) * 9, (4, 4, 3)), (4,) * 5, 2, 64, half)
    assert relative(query_of(mixed, 1, 2, half), past(mixed, 1, 64, half)) < 4e-3
    wide = factors_of((13, 30), torch.float32)
    assert relative(query_of(wide, 1, 2, torch.float32), past(wide, 1, 64, torch.float32)) < 2e-6
    assert not served


def test_channels_of_a_plan():
    """Every head finds a way with room for its channels, where they lie, and the constant behind them."""
    for ranks in (*RANKS.values(), (60,), (61,), (1, 1, 250)):
        factors = factors_of(ranks, torch.float16)
        layout, device = factors.key_format.layout, torch.device("cpu")
        plan = hopper.plan(layout, ranks, device)
        rooms = [sum(way) for way in plan.ways]
        assert rooms == sorted(rooms) and len(rooms) <= hopper.MOST_WAYS
        assert all(size in (16, 32, 64) for way in plan.ways for size in way)
        for start, rank, first in plan.groups.tolist():
            assert plan.order[start : start + rank].tolist() == [*range(first, first + rank)]
            assert plan.order[start + rank] >= layout.rank
            assert first % 4 * plan.fours + rank < rooms[-1]


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon._runtime import GluonASTSource
import cskv_hf.kernels.hopper as hopper
from cskv_hf.quantize import PackedLayout

KINDS = dict.fromkeys(("query",), "*bf16") | dict.fromkeys(("words", "ranges", "groups"), "*i32")
KINDS |= dict.fromkeys(("key_B", "cos", "sin", "start_cos", "start_sin", "weights"), "*fp16")
KINDS |= {"maxima": "*fp32", "scaling": "fp32"}


class Recorder:
    def __getitem__(self, grid):
        return lambda *args, num_warps, maxnreg=None, **constants: compile_for_hopper(constants, num_warps, maxnreg)


def compile_for_hopper(constants, warps, maxnreg):
    names = KERNEL.arg_names
    signature = {n: "constexpr" if n in constants else KINDS.get(n, "i32") for n in names}
    source = GluonASTSource(KERNEL, signature, {(names.index(n),): v for n, v in constants.items()})
    options = dict(num_warps=warps) | ({"maxnreg": maxnreg} if maxnreg else {})
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print("wgmma" in compiled.asm["ptx"], compiled.metadata.shared <= 227 * 1024)


KERNEL, hopper.hopper_score_kernel = hopper.hopper_score_kernel, Recorder()
CASES = ((36, 13), 4, 128), ((14, 31), 8, 64), ((60,), 1, 128), ((240,), 4, 128), ((81,), 2, 64)
for ranks, rows, head_dim in CASES:
    layout = PackedLayout((4,) * sum(ranks), 32, 32, 4)
    query, weights = torch.empty(1, 2, rows, head_dim), torch.empty(1, 1, 1, 64)
    codes, ranges = torch.empty(1, 1, 4, dtype=torch.int32), torch.empty(1, 1, 1, dtype=torch.int32)
    hopper.launch(query, codes, ranges, layout, ranks, lambda *_: None, (None,) * 4, 1.0, weights, None)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler runs on Linux")
def test_compiles_where_there_is_none():
    """Layouts fit each other, so that nothing moves between threads; on tensor cores of Hopper GPUs."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    assert out.stdout.split() == ["True", "True"] * 5, out.stdout

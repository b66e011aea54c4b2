"""Runs functions written in Gluon, which has no interpreter, with numpy: their numbers and places in memory, without
layouts, which a compiler checks.

It knows what kernels/hopper_scores.py, hopper_values.py and hopper_latents.py use. Two rules of the hardware are kept:
a product that is not waited for may only feed the next one, and a product may read shared memory only once what was
written there is fenced.
"""

import importlib
import itertools
import operator
import sys
import types

import numpy as np
import torch


class Tensor:
    """Of numbers; `pending` if a product that nobody has waited for will write it."""

    type = types.SimpleNamespace(layout=None)

    def __init__(self, array, pending=False):
        self.array, self.pending = np.asarray(array), pending

    @property
    def shape(self):
        return self.array.shape

    def to(self, dtype, bitcast=False):
        return Tensor(self.array.view(dtype) if bitcast else self.array.astype(dtype))

    def __getitem__(self, key):
        return Tensor(self.array[key])

    def __bool__(self):
        return bool(self.array)

    def __index__(self):
        return int(self.array)

    def __invert__(self):
        return Tensor(~self.array)


def raw(x):
    if isinstance(x, Tensor):
        assert not x.pending, "read before the product was waited for"
        return x.array
    return x


def _operator(function, swapped):
    def apply(self, other):
        return Tensor(function(raw(other), raw(self)) if swapped else function(raw(self), raw(other)))

    return apply


for _name in ["add", "sub", "mul", "floordiv", "mod", "and_", "or_", "rshift", "lshift", "lt", "le", "gt", "ge", "eq"]:
    _plain = _name.strip("_")
    setattr(Tensor, f"__{_plain}__", _operator(getattr(operator, _name), False))
    setattr(Tensor, f"__r{_plain}__", _operator(getattr(operator, _name), True))


class Pointer:
    """To elements of a flat array."""

    def __init__(self, array, at=0):
        self.array, self.at = array, at

    def __add__(self, offset):
        return Pointer(self.array, self.at + raw(offset))


class Shared:
    """Memory that products read; `fenced` says what they see, for all views of it."""

    def __init__(self, array, fenced):
        self.array, self.fenced = array, fenced

    shape = property(lambda self: self.array.shape)

    def store(self, value):
        assert value.shape == self.array.shape
        self.array[...], self.fenced["all"] = raw(value), False

    def load(self, layout):
        return Tensor(self.array.copy())

    def index(self, i):
        return Shared(self.array[int(i)], self.fenced)

    def slice(self, start, length, dim=0):
        return Shared(self.array[start : start + length], self.fenced)

    def permute(self, order):
        return Shared(self.array.transpose(order), self.fenced)


class Machine:
    """The language, and the program that runs."""

    def __init__(self):
        self.fenced, self.program, self.grid = {"all": True}, (0, 0, 0), (1, 1, 1)

    def allocate(self, dtype, shape, layout, value=None):
        memory = Shared(np.full(shape, np.nan, dtype), self.fenced)
        if value is not None:
            memory.store(value)
        return memory

    def mma(self, a, b, acc, use_acc=True, is_async=False):
        assert b.fenced["all"], "a product reads what was not fenced"
        product = raw(a).astype(np.float32) @ b.array.astype(np.float32)
        before = acc.array.astype(np.float32) if use_acc else 0
        return Tensor((product + before).astype(acc.array.dtype), pending=is_async)

    def modules(self):
        """What `import` is to find."""

        def decorator(function=None, **_):
            return function if callable(function) else decorator

        def load(pointer, mask=True, other=0):
            at, mask = np.broadcast_arrays(pointer.at, raw(mask))
            return Tensor(np.where(mask, pointer.array[np.where(mask, at, 0)], other).astype(pointer.array.dtype))

        def store(pointer, value, mask):
            at, value, mask = np.broadcast_arrays(pointer.at, raw(value), raw(mask))
            pointer.array[at[mask]] = value[mask]

        def layout(*_, **__):
            return None

        layout.get_default_for = layout
        gl = types.ModuleType("triton.experimental.gluon.language")
        gl.__dict__.update(
            float16=np.float16, float32=np.float32, int32=np.int32, int64=np.int64, uint16=np.uint16,
            constexpr=lambda x: x, static_range=range, program_id=lambda i: Tensor(np.int64(self.program[i])),
            num_programs=lambda i: self.grid[i], load=load, store=store, allocate_shared_memory=self.allocate,
            arange=lambda start, end, layout: Tensor(np.arange(start, end, dtype=np.int32)),
            zeros=lambda shape, dtype, layout: Tensor(np.zeros(shape, dtype)),
            full=lambda shape, value, dtype, layout: Tensor(np.full(shape, value, dtype)),
            where=lambda c, x, y: Tensor(_alike(np.where(raw(c), raw(x), raw(y)), x, y)),
            minimum=lambda x, y: Tensor(np.minimum(raw(x), raw(y))),
            maximum=lambda x, y: Tensor(np.maximum(raw(x), raw(y))), exp2=lambda x: Tensor(np.exp2(raw(x))),
            max=lambda x, axis: Tensor(raw(x).max(axis)), reshape=lambda x, shape: Tensor(raw(x).reshape(shape)),
            permute=lambda x, order: Tensor(raw(x).transpose(order)),
            join=lambda x, y: Tensor(np.stack(np.broadcast_arrays(raw(x), raw(y)), -1)),
            split=lambda x: (Tensor(raw(x)[..., 0]), Tensor(raw(x)[..., 1])),
            convert_layout=lambda x, *_: x, multiple_of=lambda x, _: x, max_contiguous=lambda x, _: x,
            inline_asm_elementwise=assembly, DistributedLinearLayout=layout, NVMMADistributedLayout=layout,
            NVMMASharedLayout=layout, BlockedLayout=layout, SliceLayout=layout, DotOperandLayout=layout,
        )  # fmt: skip
        gluon = types.ModuleType("triton.experimental.gluon")
        gluon.jit, gluon.constexpr_function, gluon.language = decorator, decorator, gl
        hopper = types.ModuleType("triton.experimental.gluon.language.nvidia.hopper")
        hopper.fence_async_shared = lambda: self.fenced.update(all=True)
        hopper.warpgroup_mma, hopper.warpgroup_mma_wait = self.mma, lambda count, deps: None
        experimental = types.ModuleType("triton.experimental")
        experimental.gluon = gluon
        return {module.__name__: module for module in (experimental, gluon, gl, hopper)}


def _alike(result, *of):
    """In the dtype of the tensor among them, if there is one."""
    return result.astype(next((x.array.dtype for x in of if isinstance(x, Tensor)), result.dtype))


def assembly(code, constraints, args, dtype, is_pure, pack):
    """What the few pieces of assembly do."""
    args = [raw(x) for x in args]
    if code.startswith("prmt"):
        shift = 0 if "0x5410" in code else 16
        low, high = (x.view(np.uint32) >> shift & 0xFFFF for x in args)
        return Tensor((low | high << 16).view(np.int32))
    if "mul.rn.f16x2" in code:
        pairs, factor = args
        assert not (factor >> 16).any()
        halves = np.ascontiguousarray(pairs).view(np.float16).reshape(*pairs.shape, 2)
        product = halves * factor.astype(np.uint16).view(np.float16)[..., None]
        return Tensor(np.ascontiguousarray(product).view(np.int32)[..., 0])
    if "lop3" in code:
        codes, step, minimum, thousands, *more = args
        assert thousands == 0x64006400 and bool(more) == ("mad" in code)
        halves = [x.view(np.uint32)[..., None] >> np.uint32([0, 16]) & 0xFFFF for x in (codes, step, minimum, *more)]
        step, minimum = (half.astype(np.uint16).view(np.float16).astype(np.float32) for half in halves[1:3])
        codes = (halves[0] & 15) + 16 * (halves[3] & 15 if more else 0)
        values = (codes * step + minimum).astype(np.float16)
        return Tensor(np.ascontiguousarray(values).view(np.int32)[..., 0])
    x, c, y, s = (a.astype(np.float32) for a in args)
    other = (y * s).astype(np.float16).astype(np.float32)
    return Tensor((x * c - other if "neg.f16x2" in code else x * c + other).astype(dtype))


class Kernel:
    """A kernel of a module that is in a folder, launched as Triton's are, on torch tensors of a CPU."""

    def __init__(self, folder, module, name):
        self.machine, before = Machine(), dict(sys.modules)
        package = types.ModuleType("on_numpy")
        package.__path__ = [str(folder)]
        sys.modules.update(self.machine.modules(), on_numpy=package)
        try:
            self.function = getattr(importlib.import_module(f"on_numpy.{module}"), name)
        finally:
            for key in set(sys.modules) - set(before):
                del sys.modules[key]
            sys.modules.update(before)

    def __getitem__(self, grid):
        def launch(*args, num_warps, enable_fp_fusion, maxnreg=None, **constants):
            self.machine.grid = grid
            args = [Pointer(x.view(-1).numpy()) if isinstance(x, torch.Tensor) else x for x in args]
            for self.machine.program in itertools.product(*map(range, grid)):
                self.function(*args, **constants)

        return launch

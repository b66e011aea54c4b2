"""Two devices that are really this CPU, for machines without two: tensors that know which of them they lie on, and
refuse to meet a tensor of the other as CUDA's do.

Numbers are computed on the CPU and are real; only the place is pretended. As with torch's own fake tensors, torch
takes them for tensors on the meta device, and only who asks them in Python hears of CUDA.
"""

from __future__ import annotations

from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
CPU = torch.device("cpu")
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)


class Placed(torch.Tensor):
    """A tensor on one of the two devices, held on the CPU."""

    held: torch.Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device) -> Placed:
        placed = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device="meta",
        )  # fmt: skip
        placed.held, placed.place = held, device
        return placed

    @property
    def device(self) -> torch.device:
        return self.place

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})

    def __repr__(self) -> str:
        return f"Placed({self.held!r}, {self.device})"


def dispatch(function, args, kwargs):
    """Run an operation on the CPU, if all its tensors lie on one device; its results lie there too."""
    flat, spec = tree_flatten((args, kwargs))
    tensors = [t for t in flat if isinstance(t, torch.Tensor)]
    places = {t.device for t in tensors if isinstance(t, Placed) or t.ndim}  # a number of the CPU may meet any tensor
    if function in INDEXING:  # an index of the CPU, too
        places -= {CPU} if isinstance(args[0], Placed) else set()
    if len(places) > 1 and function not in MOVES:
        raise RuntimeError(f"{function}: expected all tensors on one device, found {sorted(map(str, places))}")
    target, first = kwargs.get("device"), [t.device for t in tensors if isinstance(t, Placed)]
    if target is not None and torch.device(target).type == "meta":  # torch's word for "where that one is"
        target = (first or [CPU])[0]
    if target is None:
        target = tensors[0].device if function in MOVES else (first or [CPU])[0]
    target = torch.device(target)
    flat = [t.held if isinstance(t, Placed) else t for t in flat]
    bare_args, bare_kwargs = tree_unflatten(flat, spec)
    if "device" in kwargs:
        bare_kwargs["device"] = CPU
    result = function(*bare_args, **bare_kwargs)
    if function._schema.is_mutable:  # in place, or into `out`
        written = kwargs.get("out", args[0] if args else None)
        if isinstance(written, torch.Tensor):
            return written
    if target.type == "cpu":
        return result
    return tree_map_only(torch.Tensor, lambda t: Placed(t, target), result)


class Constants(TorchFunctionMode):
    """`torch.tensor` and its like work out of a dispatch mode's sight; here on the CPU first."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        if function is torch.Tensor.to and len(args) > 1 and isinstance(args[1], torch.Tensor):
            return args[0].to(args[1].device, args[1].dtype)
        if function is torch.Tensor.new_tensor:
            return torch.tensor(args[1], dtype=args[0].dtype).to(args[0].device)
        return function(*args, **kwargs)


class TwoDevices(TorchDispatchMode):
    """While active, `FIRST` and `SECOND` are devices that tensors can be made on and moved to."""

    def __init__(self) -> None:
        super().__init__()
        self.constants = Constants()
        self.initialised = mock.patch("torch.cuda._lazy_init", lambda: None)

    def __enter__(self) -> TwoDevices:
        self.initialised.start()
        self.constants.__enter__()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.constants.__exit__(*error)
        self.initialised.stop()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})

"""Two devices that are really this CPU, for machines without two: tensors that know which of them they lie on, and
refuse to meet a tensor of the other as CUDA's do.

Numbers are computed on the CPU and are real; only the place is pretended. `torch.device("privateuseone", 0)` and
`("privateuseone", 1)` are the device type that torch leaves to others.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

FIRST, SECOND = torch.device("privateuseone", 0), torch.device("privateuseone", 1)
CPU = torch.device("cpu")
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)


class Placed(torch.Tensor):
    """A tensor on one of the two devices, held on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device) -> Placed:
        placed = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=device,
        )  # fmt: skip
        placed.held = held
        return placed

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
    target = kwargs.get("device")
    if target is None:
        first = [t.device for t in tensors if isinstance(t, Placed)]
        target = tensors[0].device if function in MOVES else (first or [CPU])[0]
    target = torch.device(target)
    flat = [t.held if isinstance(t, Placed) else t for t in flat]
    bare_args, bare_kwargs = tree_unflatten(flat, spec)
    if target.type != "cpu" and "device" in kwargs:
        bare_kwargs["device"] = CPU
    result = function(*bare_args, **bare_kwargs)
    if function._schema.is_mutable:  # in place, or into `out`
        written = kwargs.get("out", args[0] if args else None)
        if isinstance(written, torch.Tensor):
            return written
    if target.type == "cpu":
        return result
    return tree_map_only(torch.Tensor, lambda t: Placed(t, target), result)


class TwoDevices(TorchDispatchMode):
    """While active, `FIRST` and `SECOND` are devices that tensors can be made on and moved to."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})

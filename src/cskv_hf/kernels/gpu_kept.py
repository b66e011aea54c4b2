"""What the kernels of a GPU keep of a layer's factors: transposed copies, made once and made anew when written to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def with_mean(key_B: torch.Tensor, key_mean: torch.Tensor, order: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``key_B`` transposed, (channels, group_dim) in `dtype`, as the pieces take its channels, the means of the groups
    among them. Kept, see [`_keep`]."""

    def make() -> torch.Tensor:
        means = key_mean.detach().view(-1, key_B.shape[0])
        return torch.cat([key_B.detach().mT, means]).to(dtype).index_select(0, order)

    return _keep(make, order, dtype, key_B, key_mean)


def transposed(value_B: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``value_B`` transposed, (rank, kv_dim) in `dtype`, so that neighbours in memory are read together. Kept."""
    return _keep(lambda: value_B.detach().mT.to(dtype, copy=True).contiguous(), None, dtype, value_B)


def _keep(
    make: Callable[[], torch.Tensor], order: torch.Tensor | None, dtype: torch.dtype, *factors: torch.Tensor
) -> torch.Tensor:
    """What is made of factors, for as long as the first of them lives, or what it is a view of.

    Made anew when somebody has written to them or put others in their place, but for writes to their `.data`, which
    nobody can see, and in the same place, where a CUDA graph that was recorded before reads it. Made every time of
    factors that count no writes.
    """
    first = factors[0]
    if any(t.is_inference() for t in factors):
        return make()
    kept = _kept.setdefault(first if first._base is None else first._base, {})
    key = dtype, id(order), first.device, first.shape, first.stride(), first.storage_offset()
    state = tuple(number for t in factors for number in (t.data_ptr(), t._version))
    found = kept.get(key)
    if found is not None and found[0] == state and not any(memory.expired() for memory in found[3]):
        return found[1]
    with torch.inference_mode(False), torch.no_grad():
        made = make()
        if first.is_cuda and torch.cuda.is_current_stream_capturing():
            return made  # by every replay
        if found is not None:
            made = found[1].copy_(made)
    for other in [k for k in kept if k[2] != first.device]:  # the factors have moved
        del kept[other]
    memory = [StorageWeakRef(t.untyped_storage()) for t in factors]  # others may come to lie at the same address
    kept[key] = state, made, order, memory  # the order must live, for its id to be its own
    return made

"""What the kernels of a GPU keep of a layer, and how they divide their work; decided once for its sizes and device."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from ..factors import LayerFactors
from ..latents import LatentFormat, PackedFormat
from .gpu_arguments import in_words, storage
from .pieces import Pieces, cut
from .sizes import cdiv
from .tiles import TILE
from .triton_latents import PLANES

KEY_CHUNK = VALUE_CHUNK = 64  # channels at a time, at most
MOST_HELD, MOST_AHEAD = 8, 32  # pieces that are held; registers of a thread for what is read ahead
FEW_TILES = 8  # of a program, which then has more to prepare than to do
WARPS = 4


def prepare_tables(factors: LayerFactors, device: torch.device, dtype: torch.dtype) -> None:
    """What the kernels keep of a layer."""
    work = working_dtype(dtype, factors.key_format, factors.value_format)
    words = in_words(factors.key_format, factors.value_format)
    pieces, *_ = key_pieces(factors.key_format, factors.key_ranks, factors.head_dim * work.itemsize, words, device)
    value_pieces(factors.value_format, device)
    with_mean(factors.key_B, factors.key_mean, pieces.order, work)
    transposed(factors.value_B, dtype)


@functools.cache
def key_pieces(
    format: LatentFormat, ranks: tuple[int, ...], bytes_of_channel: int, words: bool, device: torch.device
) -> tuple[Pieces, bool, bool]:
    """The channels of every group in pieces; whether a program can hold what rebuilds keys from all of them in shared
    memory; and, in registers, what it reads ahead.

    Args:
        bytes_of_channel: of a head's row of `key_B`.
        words: whether latents are read in words.
    """
    largest = min(KEY_CHUNK, max(16, 2**14 // bytes_of_channel))
    pieces, room = cut(format, ranks, 16, largest), shared_memory(device) - max(2**15, 200 * bytes_of_channel)
    held = len(pieces.sizes) <= MOST_HELD and sum(pieces.sizes) * bytes_of_channel <= room
    if not held:
        pieces = cut(format, ranks, largest, largest)
    if not held or pieces.least < len(pieces.sizes) - 1:  # at most two ways for the compiler to go
        pieces = pieces._replace(least=len(pieces.sizes))
    read_ahead, kinds = sum(pieces.sizes) * TILE // (32 * WARPS), storage(format, words)[PLANES.value]
    if words:  # eight tokens of a channel are a word of each plane, two of the one of 8 bits, and a range
        read_ahead = read_ahead // 8 * (kinds.bit_count() + kinds // 8 + 1)
    return pieces.to(device), held, held and read_ahead <= MOST_AHEAD


@functools.cache
def value_pieces(format: LatentFormat, device: torch.device) -> Pieces:
    """The channels of values, which are one group, in pieces."""
    return cut(format, (format.rank,), VALUE_CHUNK, VALUE_CHUNK).to(device)


def working_dtype(dtype: torch.dtype, *formats: LatentFormat) -> torch.dtype:
    """The dtype of latents, rebuilt keys and weights in the kernels. Packed latents come from ranges in
    float16, and float16 has three more bits than bfloat16 for what it holds."""
    packed = all(isinstance(format, PackedFormat) for format in formats)
    return torch.float16 if packed and dtype != torch.float32 else dtype


def tiles_of_program(num_tiles: int, beside: int, programs: int) -> int:
    """Tiles that each program takes, where `beside` programs work on the same tiles: so many that there are `programs`
    in all, or a quarter of them if that would be few."""
    for wanted in (programs, programs // 4):
        splits = min(num_tiles, max(1, cdiv(wanted, beside)))
        if num_tiles >= FEW_TILES * splits:
            break
    return cdiv(num_tiles, splits)


def few_registers(pieces: Pieces, kinds: int, device: torch.device) -> dict[str, int]:
    """How to compile so that more programs of a multiprocessor run at a time, where that was measured to be quicker:
    on an H100 four with planes of 4 bits alone and few channels, three with others.

    Args:
        kinds: of planes, as in `storage`.
    """
    if sum(pieces.sizes) > (48 if kinds == 4 else 96) or not is_hopper(device):
        return {}
    return dict(maxnreg=128 if kinds == 4 else 168)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have; in Triton's interpreter those of an A100."""
    if device.type != "cuda":
        return 163 * 1024
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 64 * 1024)  # or AMD's


@functools.cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


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

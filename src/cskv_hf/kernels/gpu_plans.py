"""How the kernels of a GPU divide their work, decided once for the sizes of a layer and its device."""

from __future__ import annotations

import functools

import torch

from ..latents import LatentFormat, PackedFormat
from .gpu_arguments import storage
from .pieces import Pieces, cut
from .sizes import cdiv
from .tiles import TILE
from .triton_latents import PLANES

KEY_CHUNK = VALUE_CHUNK = 64  # channels at a time, at most
MOST_HELD, MOST_AHEAD = 8, 32  # pieces that are held; registers of a thread for what is read ahead
FEW_TILES = 8  # of a program, which then has more to prepare than to do
WARPS = 4


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
    """Tiles that each program takes, where `beside` programs work on the same tiles: as many as make `programs`
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

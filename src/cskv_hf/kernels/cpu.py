"""The kernels in cpp/: compile them for this machine, once, and call them.

They need a C++ compiler, so they are an offer: without them attention on a CPU is torch's own operations, two
to six times slower.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.utils import logging

from ..handover import CompressedKV
from ..latents import LatentFormat, Latents, PackedFormat
from ..quantize import PackedLayout

logger = logging.get_logger(__name__)

SOURCES = Path(__file__).with_name("cpp")
FLAGS = ["-O3", "-march=native", "-std=c++20", "-fPIC", "-fopenmp"]
# not -ffast-math, which would flush denormals to zero in the whole process
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]


def library_path() -> Path:
    """Where the compiled kernels of this source, torch and processor lie."""
    features = [line for line in _cpuinfo().splitlines() if line.startswith(("flags", "Features"))][:1]
    sources = [file.read_text(encoding="utf-8") for file in sorted(SOURCES.glob("*.*"))]
    key = "\n".join([*sources, torch.__version__, platform.machine(), *FLAGS, *features])
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(cache, "torch_extensions")
    return Path(folder) / "cskv_hf" / f"{name}.so"


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux, or a sandbox without it
        return ""


def build() -> Path:
    """Compile the kernels for this machine, into torch's folder of extensions (``TORCH_EXTENSIONS_DIR``); takes about
    half a minute. A complete file appears at once or not at all.

    Returns:
        The file.

    Raises:
        RuntimeError: if this is not Linux, there is no C++ compiler, or it fails, or makes what cannot be loaded; the
            message says what it printed.
    """
    from torch.utils import cpp_extension  # needs setuptools, which whoever does not compile may not have

    if platform.system() != "Linux":
        raise RuntimeError(f"The CPU kernels can be compiled on Linux only, this is {platform.system()}.")
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        raise RuntimeError(
            f"There is no C++ compiler '{compiler[0]}'. Install one (on Debian `apt install g++`), or name yours in "
            "the environment variable CXX."
        )
    path = library_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.parent.chmod(0o755)  # a file that others may write is not loaded, see `_others_may_write`
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        includes = [f"-I{include}" for include in cpp_extension.include_paths()]
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
        # no -lgomp: the OpenMP that torch has loaded is to be used, and its threads
        command = [*compiler, *FLAGS, abi, *includes, "-c", str(SOURCES / "library.cpp"), "-o", f"{made}.o"]
        libraries = [*(f"-L{folder}" for folder in cpp_extension.library_paths()), "-ltorch_cpu", "-lc10"]
        link = [*compiler, "-shared", f"{made}.o", *libraries, "-o", str(made)]
        for step in (command, link):
            result = subprocess.run(step, capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(f"The C++ compiler failed: {shlex.join(step)}\n{result.stderr[-2000:]}")
        check = "import sys, torch; torch.ops.load_library(sys.argv[1]); torch.ops.cskv_hf.attend"
        result = subprocess.run([sys.executable, "-c", check, str(made)], capture_output=True, text=True)
        if result.returncode:  # found out in another process: this one may have loaded kernels, and can do so once
            raise RuntimeError(
                f"What the C++ compiler '{shlex.join(compiler)}' made cannot be loaded; g++ is known to work.\n"
                f"{result.stderr[-2000:]}"
            )
        made.chmod(0o755)
        os.replace(made, path)
    load.cache_clear()
    return path


@functools.cache
def load() -> bool:
    """Whether the kernels are compiled for this machine; then they are loaded. A warning says if they cannot be, or
    were compiled for another torch, processor or version of this package only."""
    if platform.system() != "Linux":
        return False
    path = library_path()
    if not path.exists():
        if any(path.parent.glob("*.so")):
            logger.warning_once(
                f"CSKV's kernels for CPUs in '{path.parent}' were compiled for another torch, processor or version, "
                "so attention runs slower. Compile them again with `cskv kernels --build`."
            )
        return False
    if _others_may_write(path):
        logger.warning_once(
            f"CSKV's kernels for this CPU are not loaded, and attention runs slower: '{path}' or its folder belongs "
            "to another user, or others may write to it. Make them your own (`chown`, `chmod go-w`), or set "
            "TORCH_EXTENSIONS_DIR to a folder of yours and run `cskv kernels --build`."
        )
        return False
    if not hasattr(torch.ops.cskv_hf, "attend"):  # a process can load it only once
        try:
            torch.ops.load_library(path)
        except OSError as error:
            logger.warning_once(
                "CSKV's kernels for this CPU cannot be loaded, so attention runs slower: "
                f"{error.__cause__ or error}. Compile them again with `cskv kernels --build`."
            )
            return False
    return hasattr(torch.ops.cskv_hf, "attend")


def _others_may_write(path: Path) -> bool:
    """Whether somebody but this user and root could have put the file there, whose code would run as this user."""
    found = [file.stat() for file in (path, path.parent)]
    return any(s.st_uid not in (0, os.geteuid()) or s.st_mode & 0o022 for s in found)


def attend(
    query: torch.Tensor,
    kv: CompressedKV,
    scaling: float,
    exact_mask: torch.Tensor | None,
    old_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of the queries of each KV head.

    Args:
        query: (batch, num_key_value_heads, rows, head_dim), after RoPE; the rows of a query head lie together.
        scaling, exact_mask, old_mask: as in `compressed_attention`.

    Returns:
        (batch, num_key_value_heads, rows, head_dim) float32.
    """
    factors, keys, values = kv.factors, kv.key_latents, kv.value_latents
    key_runs, first_run = runs_of(keys.format, factors.key_ranks)
    value_runs, _ = runs_of(values.format, (values.format.rank,))
    positions, frequencies = kv.turns.rope(query.device)
    rope = positions, frequencies.inv_freq, frequencies.attention_scaling, frequencies.dtype(kv.exact_keys.dtype)
    of_keys, of_values = (factors.key_B, factors.key_mean), (factors.value_B, factors.value_mean)
    return torch.ops.cskv_hf.attend(
        query.float().contiguous(), scaling,
        kv.exact_keys.float().contiguous(), kv.exact_values.float().contiguous(), _one_mask(exact_mask, old_mask, kv),
        *_stored(keys), key_runs, first_run, *(t.float().contiguous() for t in of_keys), *rope, _sizes(keys.format),
        *_stored(values), value_runs, *(t.float().contiguous() for t in of_values), _sizes(values.format),
    )  # fmt: skip


def quantize(latents: torch.Tensor, layout: PackedLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize` of quantize.py, of (batch, tokens, rank) float32."""
    format = PackedFormat(layout)
    runs, _ = runs_of(format, (format.rank,))
    return torch.ops.cskv_hf.quantize(latents, runs, _sizes(format), layout.code_bytes, layout.num_ranges)


def _one_mask(exact_mask: torch.Tensor | None, old_mask: torch.Tensor | None, kv: CompressedKV) -> torch.Tensor | None:
    """The masks of the exact and of the compressed columns side by side; None if there are none."""
    if exact_mask is None and old_mask is None:
        return None
    columns = kv.exact_keys.shape[2], kv.key_latents.num_tokens
    masks = [
        torch.ones(1, 1, 1, n, dtype=torch.bool, device="cpu") if mask is None else mask
        for mask, n in zip((exact_mask, old_mask), columns)
    ]
    if any(mask.dtype != torch.bool for mask in masks):
        lowest = torch.finfo(torch.float32).min
        masks = [torch.where(m, 0.0, lowest).float() if m.dtype == torch.bool else m.float() for m in masks]
    shape = [max(sizes) for sizes in zip(*(mask.shape[:3] for mask in masks))]
    return torch.cat([mask.expand(*shape, -1) for mask in masks], dim=-1)


def _stored(latents: Latents) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Codes and ranges of every segment, whose blocks are compact; plain latents stand for both."""
    segments = [
        [t if t.is_contiguous() or t[:1].is_contiguous() else t.contiguous() for t in segment]
        for segment in latents.segments
    ]
    return [segment[0] for segment in segments], [segment[-1] for segment in segments]


@functools.cache
def _sizes(format: LatentFormat) -> tuple[int, int, int]:
    """The block size, and the tokens and channels that share a range."""
    if not isinstance(format, PackedFormat):
        return format.block_size, format.block_size, 1
    return format.layout.block_size, format.layout.group_tokens, format.layout.group_channels


@functools.cache
def runs_of(format: LatentFormat, ranks: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The channels of latents in runs of neighbours, of one group and one tier each, in their own order.

    Args:
        ranks: channels per group.

    Returns:
        int32 (runs, 8) of first channel, channels, bits, byte of the tier in a block, channels of the tier, first
        channel within the tier, range of the tier in a block, groups of the tier; and int32 (groups + 1,) of where
        each group's runs start.
    """
    runs, starts, begin = [], [0], 0
    for rank in ranks:
        runs += sorted(_runs_within(format, begin, begin + rank))
        starts.append(len(runs))
        begin += rank
    table = torch.tensor(runs, dtype=torch.int32, device="cpu").view(-1, 8)
    return table, torch.tensor(starts, dtype=torch.int32, device="cpu")


def _runs_within(format: LatentFormat, begin: int, end: int) -> Iterator[tuple[int, ...]]:
    """Those of the channels from `begin` to `end` (exclusive)."""
    if not isinstance(format, PackedFormat):
        yield begin, end - begin, 0, 0, 0, 0, 0, 0
        return
    for tier in format.layout.tiers:
        inside = 0
        for start, stop in tier.runs:
            low, high = max(start, begin), min(stop, end)
            if low < high:
                first = inside + low - start
                where = tier.first_byte, len(tier.channels), first, tier.first_range, tier.num_groups
                yield low, high - low, tier.bits, *where
            inside += stop - start

"""What the speed benchmarks share: one attention layer of a model's sizes with a filled cache, timing in turns, the
description of the machine that goes with every number, and the files of numbers.

The sizes are Llama-3.1-8B's unless said otherwise; weights and states are random, which changes no time. What a layer
keeps is planned by the library itself, from spectra that fall over three orders of magnitude.
"""

from __future__ import annotations

import json
import os
import platform
import reprlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cskv_hf import CSKVCache, CSKVConfig, ModelShape, kernels
from cskv_hf.config import num_key_groups
from cskv_hf.factors import LayerFactors
from cskv_hf.files import replace_file
from cskv_hf.handover import CompressedKV, ForwardInputs
from cskv_hf.kernels import cpu as cpu_kernels
from cskv_hf.plan import LayerSpectra, plan, store_plan
from cskv_hf.rope import RotaryFrequencies

BLOCK = CSKVConfig().block_size  # every so many tokens a layer encodes and appends a block
LEAST_LENGTH = CSKVConfig().sinks + CSKVConfig().window + BLOCK  # tokens from which on something is compressed
MEASURED = ("runs", "copy_bandwidth")  # in a file of runs, what differs from one to the next


@dataclass(frozen=True)
class Sizes:
    """Of one attention layer."""

    hidden_size: int = 4096
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128

    @property
    def kv_dim(self) -> int:
        return self.num_key_value_heads * self.head_dim


@dataclass(frozen=True)
class Setting:
    """One way of compressing; `bits` None lets every channel have what it is worth, 16 is the paper's storage;
    `multiple` is the config's `rank_multiple`."""

    compression: float
    key_layout: str = "head"
    bits: int | None = None
    multiple: int = 1

    @property
    def name(self) -> str:
        bits = "packed" if self.bits is None else f"{self.bits} bit"
        return f"{self.compression:.0%} {self.key_layout} {bits}" + (f" x{self.multiple}" if self.multiple > 1 else "")


def planned(setting: Setting, sizes: Sizes, num_layers: int = 1) -> CSKVConfig:
    """A config as a fit leaves it: ranks and bits of every layer."""
    config = CSKVConfig(
        compression=setting.compression,
        key_layout=setting.key_layout,
        bits=setting.bits,
        allocation="uniform" if setting.bits == 16 else None,
        rank_multiple=setting.multiple,
    )
    shape = ModelShape("llama", num_layers, sizes.num_key_value_heads, sizes.head_dim)
    groups = num_key_groups(setting.key_layout, sizes.num_key_value_heads)
    of_group = [
        torch.logspace(0, -3, sizes.kv_dim // groups).double() * 4 ** (0.5 - g / groups) for g in range(groups)
    ]
    config.sensitivity = [[1.0, 1.0]] * num_layers
    of_values = torch.logspace(0, -3, sizes.kv_dim).double()
    spectra = [LayerSpectra(of_group, of_values, of_values)] * num_layers
    store_plan(config, plan(config, shape, spectra))
    config.model_shape = vars(shape)
    return config


def random_factors(config: CSKVConfig, sizes: Sizes, device: str, dtype: torch.dtype) -> LayerFactors:
    """Factors of layer 0 with the config's ranks; scaled so that latents and rebuilt keys are about one."""
    key_ranks, value_rank = tuple(config.key_ranks[0]), config.value_ranks[0]
    key_rank, group_dim = sum(key_ranks), sizes.kv_dim // len(key_ranks)
    formats = config.formats(0)

    def matrix(rows: int, columns: int, summed: int) -> torch.Tensor:
        return (torch.randn(rows, columns) / summed**0.5).to(device, dtype)

    return LayerFactors(
        key_A=matrix(key_rank, group_dim, group_dim),
        key_B=matrix(group_dim, key_rank, max(1, key_rank // len(key_ranks))),
        value_A=matrix(value_rank, sizes.kv_dim, sizes.kv_dim),
        value_B=matrix(sizes.kv_dim, value_rank, value_rank),
        key_mean=matrix(1, sizes.kv_dim, 1),
        value_mean=matrix(1, sizes.kv_dim, 1),
        key_spectrum=torch.ones(1, key_rank, device=device),
        key_ranks=key_ranks,
        key_format=formats[0],
        value_format=formats[1],
        num_key_value_heads=sizes.num_key_value_heads,
        head_dim=sizes.head_dim,
    )


def rotary(sizes: Sizes, device: str) -> RotaryFrequencies:
    return RotaryFrequencies(1.0 / 500000 ** (torch.arange(0, sizes.head_dim, 2, device=device) / sizes.head_dim), 1.0)


def plan_summary(setting: Setting, sizes: Sizes) -> dict[str, list]:
    """Ranks and bits that [`planned`] gives a layer, and what an old token costs."""
    config = planned(setting, sizes)
    cost = sum(f.bytes_per_token(torch.bfloat16) for f in config.formats(0))
    return {
        "key_ranks": config.key_ranks[0],
        "value_rank": config.value_ranks[0],
        "key_bits": config.key_bits and config.key_bits[0],
        "value_bits": config.value_bits and config.value_bits[0],
        "bytes_per_token": cost,
    }


class RandomStates:
    """Makes random keys, values and queries of a layer's sizes."""

    def __init__(self, sizes: Sizes, batch: int, device: str, dtype: torch.dtype) -> None:
        self.sizes, self.batch, self.device, self.dtype = sizes, batch, device, dtype

    def __call__(self, tokens: int, heads: int | None = None) -> torch.Tensor:
        """(batch, num_key_value_heads, tokens, head_dim)."""
        shape = self.batch, heads or self.sizes.num_key_value_heads, tokens, self.sizes.head_dim
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def query(self, tokens: int = 1) -> torch.Tensor:
        return self(tokens, self.sizes.num_attention_heads)


class FilledCache:
    """A [`CSKVCache`] of `num_layers` alike layers that holds `length` random tokens, and takes steps."""

    def __init__(self, setting: Setting, sizes: Sizes, num_layers: int, length: int, states: RandomStates) -> None:
        self.batch = states.batch
        self.config = planned(setting, sizes)  # the same of every layer
        self.factors = random_factors(self.config, sizes, states.device, states.dtype)
        self.frequencies = rotary(sizes, states.device)
        self.cache, self.length, self.num_layers = CSKVCache(), 0, num_layers
        while self.length < length:
            count = min(max(32, 4096 // self.batch), length - self.length)  # what a chunk takes beside the cache
            list(self.step(states, count))

    @torch.no_grad()
    def step(self, states: RandomStates, count: int = 1) -> Iterator[CompressedKV]:
        """One forward of `count` tokens: layer by layer what the pre-hook and the model's attention do with the
        cache, and what the attention function then gets to see."""
        positions = torch.arange(self.length, self.length + count, device=self.factors.key_A.device)[None]
        self.length += count
        for layer_idx in range(self.num_layers):
            inputs = ForwardInputs(positions, self.batch, self.frequencies)
            self.cache.stage(layer_idx, self.factors, self.config, inputs)
            yield self.cache.update(states(count), states(count), layer_idx)[0]


def median_seconds(
    contestants: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each, see [`medians_by_turn`]."""
    *_, seconds = medians_by_turn(contestants, rounds, clock)
    return seconds


def medians_by_turn(
    contestants: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> Iterator[dict[str, float]]:
    """Median seconds of each so far, after every one of `rounds` turns, so that whatever disturbs the machine disturbs
    all of them.

    The first run of a turn is not timed: it finds the allocator and the processor's caches as another left them. Nor
    is the turn before the first, which compiles.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, run in contestants.items():
            run()
            synchronize()
            started = clock()
            run()
            synchronize()
            if turn > 0:
                times[name].append(clock() - started)
        if turn > 0:
            yield {name: statistics.median(t) for name, t in times.items()}


def kernel_seconds(run: Callable[[], object]) -> dict[str, float]:
    """Seconds of each kernel that runs on the GPU, by its name, as the profiler sees them; copies are among them.

    Raises:
        RuntimeError: if it sees none.
    """
    # as torch's profiler sets them itself where Inductor records CUDA graphs; it does not know of others
    os.environ |= {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        synchronize()
    seen = {
        event.key: event.self_device_time_total / 1e6
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    }
    if not any(seen.values()):
        raise RuntimeError("The profiler saw no kernel on the GPU; is another profiler (ncu, nsys) at work?")
    return seen


def copy_bandwidth(device: str) -> float:
    """Bytes per second that a large copy reads and writes: what memory gives at best."""
    source = torch.ones(2**26 if device == "cpu" else 2**28, device=device)
    target, times = torch.empty_like(source), 1 if device == "cpu" else 10  # so that launching does not count

    def copies() -> None:
        for _ in range(times):
            target.copy_(source)

    return 2 * source.nbytes * times / median_seconds({"copies": copies}, 5)["copies"]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def leave_out_kernels() -> None:
    """Let this process not find the kernels that are compiled for this CPU."""
    os.environ["TORCH_EXTENSIONS_DIR"] = tempfile.mkdtemp()


def machine(threads: int) -> dict[str, str | int]:
    """What the numbers were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": cpu,
        "threads": threads,
        "kernels": cpu_kernels.load(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        **served_on_gpu(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def served_on_gpu() -> dict[str, bool]:
    """Whether the GPU that is there is served by the Triton kernels, and by the one for Hopper GPUs."""
    served = torch.cuda.is_available() and kernels.why_not(torch.empty(1, 128, dtype=torch.bfloat16)) is None
    on_hopper = False
    if served:
        from cskv_hf.kernels import gpu  # needs Triton

        here = torch.device("cuda", torch.cuda.current_device())
        on_hopper = gpu.hopper is not None and gpu.is_hopper(here) and gpu.hopper.compiles_here()
    return {"triton_kernels": served, "hopper_kernels": on_hopper}


def triton_version() -> str:
    if not kernels.HAS_TRITON:
        return "none"
    import triton

    return triton.__version__


def earlier_runs(path: Path | None, about: dict) -> list:
    """The runs that a file of numbers holds, to which another one is to be added; none without a file.

    Args:
        about: everything that goes with the new run; what is `MEASURED` need not be in it.

    Raises:
        SystemExit: if what goes with the runs that are there is not the same.
    """
    if path is None or not path.exists():
        return []
    held, here = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(about))
    differences = list(_differences(held, here))
    if differences or "runs" not in held:
        what = ": " + "; ".join(differences) if differences else ""
        sys.exit(f"`--out` '{path}' holds other numbers than these{what}. Give another file, or remove it.")
    return held["runs"]


def _differences(held: dict, here: dict, within: str = "") -> Iterator[str]:
    for key in sorted({*held, *here} - {*MEASURED}):
        was, now, name = held.get(key), here.get(key), f"{within}{key}"
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now, f"{name}.")
        elif was != now:
            yield f"{name} was {reprlib.repr(was)} and is {reprlib.repr(now)}"


def save(path: Path | None, numbers: dict) -> None:
    """Write numbers as JSON, the whole file or none of it, and nothing without a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(numbers, indent=1))

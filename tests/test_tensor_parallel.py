"""Tensor parallelism (`tp_plan`): two processes with half of the KV heads each generate what one process does.

They do because nothing that is stored differs: a latent is a sum over heads, which the processes add up (equal to
rounding, in float64), and packed latents are cut between groups of channels that share a range, so that no code
changes. The processes run parallel_worker.py over gloo on this machine.
"""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import lossy, make_model
from parallel_worker import LOADERS, LONG, LONG_CASES, SHORT, load, results

import cskv_hf
from cskv_hf import CSKVConfig
from cskv_hf.latents import PackedFormat, PlainFormat
from cskv_hf.quantize import PackedLayout, dequantize, quantize
from cskv_hf.sharding import HeadShard, cut_keys

WORLD, TABLE = 2, "living-with-others"
PACKED = dict(compression=0.75, bits=None, allocation=None, block_size=8)
ADAPTERS = {
    "base": {
        "head, plain": {},
        "joint, plain": dict(key_layout="joint"),
        "head, packed": PACKED,
        "joint, packed": PACKED | dict(key_layout="joint"),
    },
    "qwen2": {"group of 2, packed": PACKED | dict(key_layout="group:2")},  # has biases
    "qwen3": {"head, ranges of the paper": PACKED | dict(bits=4, key_group=[8, 1], value_group=[1, 8])},  # norms keys
}
CASES = [(base, adapter) for base, adapters in ADAPTERS.items() for adapter in adapters]
OVERRIDES = dict(vocab_size=90)  # which transformers below 5.20 divides too


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What one process and what each of two processes found, by case."""
    folder, alone = tmp_path_factory.mktemp("parallel"), {}
    make_model(num_key_value_heads=3, num_attention_heads=6, **OVERRIDES).save_pretrained(folder / "three heads")
    for base, adapters in ADAPTERS.items():
        make_model("llama" if base == "base" else base, **OVERRIDES).save_pretrained(folder / base)
        for name, settings in adapters.items():
            lossy(load(folder / base), **settings).save_pretrained(folder / f"{base} adapters" / name)
            model = cskv_hf.load(load(folder / base), folder / f"{base} adapters" / name)
            alone[base, name] = results(model, LONG if name in LONG_CASES else SHORT)
    adapter = folder / "base adapters" / "head, packed"
    alone["short"] = results(cskv_hf.load(load(folder / "base"), adapter))
    alone["cut"] = results(cskv_hf.load(load(folder / "base"), adapter, compression=0.85))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [Path(cskv_hf.__file__).parent.parent, *sys.path]
    environment = os.environ | dict(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(WORLD), OMP_NUM_THREADS="1",
        PYTHONPATH=os.pathsep.join(map(str, paths)),
    )  # fmt: skip
    workers = []
    for rank in map(str, range(WORLD)):
        command = [sys.executable, str(Path(__file__).with_name("parallel_worker.py")), str(folder)]
        with open(folder / f"log_{rank}", "w") as log:
            ranked = environment | dict(RANK=rank, LOCAL_RANK=rank)
            workers.append(subprocess.Popen(command, env=ranked, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [worker.wait(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert codes == [0] * WORLD, "\n".join((folder / f"log_{rank}").read_text()[-4000:] for rank in range(WORLD))
    return alone, [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(WORLD)]


def assert_same(found, expected):
    for name, value in expected.items():
        if name.endswith("tokens") or name == "beams":
            assert torch.equal(found[name], value), name
        elif name != "held":
            torch.testing.assert_close(found[name], value, atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.parametrize("case", CASES, ids=": ".join)
def test_two_processes_generate_what_one_does(runs, case, documented):
    """Greedy, left-padded, beams, a second turn over the compressed past, on every process."""
    documented(TABLE, "tensor parallelism (`tp_plan`)", "with CSKV active", "yes; fit in one process")
    alone, parallel = runs
    for found in parallel:
        assert_same(found[case], alone[case])


@pytest.mark.parametrize("loader", LOADERS)
def test_every_way_to_load(runs, loader):
    alone, parallel = runs
    for found in parallel:
        assert_same(found[loader], alone["short"])


def test_cut_to_a_higher_compression(runs):
    alone, parallel = runs
    assert not torch.equal(alone["cut"]["plain logits"], alone["short"]["plain logits"])
    for found in parallel:
        assert_same(found["cut"], alone["cut"])


def test_a_plan_that_leaves_attention_whole(runs):
    """Every process then holds every head, and all of the cache."""
    alone, parallel = runs
    for found in parallel:
        assert_same(found["heads not divided"], alone["short"])
        assert found["heads not divided"]["held"][0] == alone["short"]["held"][0]


@pytest.mark.parametrize("case", CASES, ids=": ".join)
def test_what_a_process_holds(runs, case):
    """Exact tensors are divided and value latents are whole; key latents are divided where heads have their own, to a
    group of ranges, and the channels held are those of one process."""
    alone, parallel = runs
    sizes, latents = alone[case]["held"]
    for found in parallel:
        held, here = found[case]["held"]
        for name in ("keys", "values", "sink_keys", "sink_values"):
            assert [WORLD * size for size in held[name]] == sizes[name] and sum(sizes[name]) > 0
        assert held["value_latents"] == sizes["value_latents"]
        for layer in range(len(here)):
            columns = latents[layer].shape[-1]
            if "joint" in case[1]:
                torch.testing.assert_close(here[layer], latents[layer], atol=1e-9, rtol=0)
            else:
                assert here[layer].shape[-1] <= columns
                distance = (here[layer][..., None] - latents[layer][..., None, :]).abs().amax((0, 1)).amin(1)
                assert distance.max() < 1e-9
    if case[1] == "head, plain":
        total = [sum(both) for both in zip(*(found[case]["held"][0]["key_latents"] for found in parallel))]
        assert total == sizes["key_latents"]


@pytest.mark.parametrize(
    "what, words",
    {
        "another's cache": r"holds KV heads \d to \d of 4, layer 0 of this model has .* use a new one",
        "fit": r"^`fit` does not run on a tensor-parallel model .*save the adapter there.*`cskv_hf\.load`",
        "statistics": r"^`collect_statistics` does not run on a tensor-parallel model",
        "train": r"^CSKVTrainer does not run on a tensor-parallel model",
        "save": r"holds 2 of 4 KV heads.*cannot be saved",
        "three heads": r"cannot divide the 3 KV heads of this model over 2 processes.*divides 3, or .*`device_map`",
        "left as it was": "False",
        "mixed plan": r"queries, keys and values alike.*'k_proj': 'colwise_gather_output'",
    }.items(),
    ids=lambda value: value if " " not in value or len(value) < 15 else "",
)
def test_refusals(runs, what, words):
    for found in runs[1]:
        assert re.search(words, found["refusals"][what]), found["refusals"][what]


def formats():
    """Formats of 4 KV heads: plain, and packed with ranges that cross heads in several ways."""
    generator = torch.Generator().manual_seed(0)
    for ranks in ((5, 3, 7, 4), (1, 9, 0, 2), (0, 0, 6, 6), (3,) * 4, (19,), (6, 8)):
        yield ranks, PlainFormat(sum(ranks), 8)
        for group_channels in (1, 3, 4, 16):
            levels = torch.tensor([2, 3, 4, 8])[torch.randint(0, 4, (sum(ranks),), generator=generator)]
            falling = [b for part in levels.split(ranks) for b in sorted(part.tolist(), reverse=True)]
            yield ranks, PackedFormat(PackedLayout(tuple(falling), 8, 8, group_channels))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("ranks, format", formats())
def test_cutting_a_format(ranks, format, world):
    """What a process stores of packed latents is bit by bit what one process stores of these channels; every channel
    is used by the processes of its heads and by no other."""
    latents = torch.randn(2, 16, sum(ranks), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    count, size = 4 // world, 4 // len(ranks)
    for rank in range(world):
        cut = cut_keys(format, ranks, rank * count, count, 4)
        channel_heads = [range(g * size, (g + 1) * size) for g, r in enumerate(ranks) for _ in range(r)]
        mine = range(rank * count, (rank + 1) * count)
        wanted = {c for c, heads in enumerate(channel_heads) if set(heads) & set(mine)}
        assert {c for c, used in zip(cut.stored, cut.used) if used} == wanted
        assert sum(cut.ranks) == len(cut.stored) == cut.format.rank and count % len(cut.ranks) == 0
        if isinstance(format, PackedFormat):
            whole = dequantize(*quantize(latents, format.layout), format.layout, torch.float64)
            here = quantize(latents[..., list(cut.stored)], cut.format.layout)
            assert torch.equal(dequantize(*here, cut.format.layout, torch.float64), whole[..., list(cut.stored)])
            extra = len(cut.stored) - len(wanted)
            assert (
                extra
                <= 2 * len(format.layout.tiers) * (format.layout.group_channels - 1) + format.layout.group_channels
            )
        elif wanted:
            assert set(cut.stored) == wanted


def test_key_groups_that_are_cut():
    HeadShard(0, 6, 12, None).check_groups(num_groups=6)
    with pytest.raises(ValueError, match=r"`key_layout` joins 4 KV heads.*leaves 6 to a process.*'head'"):
        HeadShard(0, 6, 12, None).check_groups(num_groups=3)


def test_pipeline_parallelism_is_refused():
    model = make_model()
    model.config.distributed_config = SimpleNamespace(pp_size=2)  # as from_pretrained leaves it
    with pytest.raises(ValueError, match=r"does not support pipeline parallelism \(`pp_size`\).*`tp_plan` instead"):
        cskv_hf.fit(model, [torch.ones(1, 8)], CSKVConfig())

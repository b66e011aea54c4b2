"""Latents on the CPU: the same bits as without offloading, one layer's on the device at a time, and copies that come
ahead on a stream are not read before they are there.

No test here sees a GPU. The device is the CPU, where latents are used as they lie; where a test asks what is on the
device when, `Latents.on` is replaced by one that always copies, and streams by some that work only when waited for.
"""

import contextlib
import copy
import pickle
import weakref

import pytest
import torch
from conftest import lossless, lossy, make_model, prompt
from test_cache import feed
from transformers import DynamicCache

from cskv_hf import CSKVCache, latents, offload

PACKED = dict(compression=0.75, bits=None, allocation=None, block_size=8)


def through_a_file(cache, path):
    cache.save(path)
    return CSKVCache.load(path, offloading=cache.offloading)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("settings", [{}, PACKED], ids=["plain", "packed"])
def test_bit_for_bit_the_cache_without(settings, padded, tmp_path):
    """Where latents lie changes no operation on them: the same logits and bytes through everything that can happen."""
    model, ids, mask = lossy(make_model(), **settings), prompt(3, 140), torch.ones(3, 140, dtype=torch.long)
    if padded:
        mask[0, :9] = 0
        mask[2, :3] = 0
    found = []
    for offloading in (False, True):
        cache = CSKVCache(offloading=offloading)
        logits = [feed(model, ids, cache, [40, 1, 1, 9], mask)]
        cache.crop(-17)
        logits.append(feed(model, ids, cache, [11] + [1] * 12, mask))
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        mask_now = mask[[2, 0, 0]]
        logits.append(feed(model, ids, cache, [1] * 9, mask_now))
        for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), through_a_file(cache, tmp_path / "c")):
            assert twin.offloading == offloading and all(layer.offloading == offloading for layer in twin.layers)
            logits.append(feed(model, ids, twin, [1] * 9, mask_now))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([4, 1, 0]))
        logits.append(feed(model, ids, cache, [1] * 9, mask_now[[2, 0, 0]]))
        found.append((logits, cache.nbytes, cache.offloaded_nbytes))
        cache.reset()
        assert cache.nbytes == cache.offloaded_nbytes == 0
        logits.append(feed(model, ids, cache, [40, 1], mask))
    assert all(torch.equal(one, other) for one, other in zip(*(logits for logits, _, _ in found)))
    (_, held, none), (_, held_too, offloaded) = found
    assert held == held_too and none == 0 < offloaded < held


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}, {"prefill_chunk_size": 16}]
)
def test_generate(settings, documented):
    row = "latents on the CPU, `CSKVCache(offloading=True)`"
    documented("compatibility-refusals", row, "with a CSKVCache", "yes, with streams not tried on a GPU")
    model, ids = lossless(make_model()), prompt(1, 50)
    found = [
        model.generate(ids, cache=cache, max_new_tokens=24, do_sample=False, **settings)
        for cache in (lambda: CSKVCache(offloading=True), DynamicCache)
    ]
    assert torch.equal(*found)


def on_device(monkeypatch):
    """Make "the device" another place than the CPU's memory; returns a function: how many layers' latents are there
    now."""
    held = []

    def on(self, device):
        there = self.joined(device)
        held.append(weakref.ref(there))
        return there

    monkeypatch.setattr(latents.Latents, "on", on)
    return lambda: sum(x() is not None for x in held) / 2  # of keys and of values


def test_only_the_layer_at_work_is_on_the_device(monkeypatch):
    model, ids = lossy(make_model(num_hidden_layers=4), **PACKED), prompt(1, 90)
    expected = feed(model, ids, CSKVCache(), [60] + [1] * 20)
    count, seen = on_device(monkeypatch), []
    for layer in model.get_base_model().model.layers:  # when a layer's attention has run, nothing is left of it
        layer.self_attn.register_forward_hook(lambda *_: seen.append(count()))
    copied, joined = [], latents.Latents.joined
    monkeypatch.setattr(latents.Latents, "joined", lambda *args: copied.append(count()) or joined(*args))
    cache = CSKVCache(offloading=True)
    actual = feed(model, ids, cache, [60] + [1] * 20)
    assert torch.equal(actual, expected)
    assert max(copied) <= 0.5 and max(seen) == 0  # at most this layer's own keys when its values come
    assert len(copied) >= 2 * 4 * 21
    before = [t.data_ptr() for layer in cache.layers for t in layer.key_latents.segments[0]]
    feed(model, ids, cache, [1])
    assert [t.data_ptr() for layer in cache.layers for t in layer.key_latents.segments[0]] == before


@pytest.mark.parametrize("segment", [1, 3])
def test_moving_a_block_rewrites_no_full_segment(segment, monkeypatch):
    """A block that leaves the window joins the last few; the others stay where they are."""
    monkeypatch.setattr(latents, "SEGMENT_BLOCKS", segment)
    model, ids, cache = lossy(make_model()), prompt(1, 120), CSKVCache(offloading=True)
    feed(model, ids, cache, [50])
    held = cache.layers[0].key_latents.segments[0][0]
    feed(model, ids, cache, [1] * 60)
    segments = cache.layers[0].key_latents.segments
    assert segments[0][0] is held and len(segments) >= 1 + 60 // 4 // segment


def test_joined_is_the_same_latents_in_one_piece(monkeypatch):
    """What a device gets of segments, against `torch.cat`."""
    monkeypatch.setattr(latents, "SEGMENT_BLOCKS", 2)
    model, ids, cache = lossy(make_model(), **PACKED), prompt(2, 120), CSKVCache(offloading=True)
    feed(model, ids, cache, [50] + [1] * 60)
    held = cache.layers[1].value_latents
    assert len(held.segments) > 2 and held.on(torch.device("cpu")) is held
    (there,) = held.joined(torch.device("cpu")).segments
    assert all(torch.equal(one, other) for one, other in zip(there, held.tensors, strict=True))
    assert held.on(torch.device("meta")).device.type == "meta"


class Stream:
    """Does what it is given when someone waits for it, and not before."""

    def __init__(self):
        self.queue, self.waits = [], []

    def record_event(self):
        self.queue.append(event := object())
        return event

    def wait_stream(self, other):
        self.waits.append(other)

    def run_up_to(self, event):
        while event in self.queue:
            work = self.queue.pop(0)
            if callable(work):  # not an event
                work()


@pytest.fixture
def streams(monkeypatch):
    """CUDA's side of offload.py without CUDA: copies made on the side stream hold garbage until it is waited for."""
    side, compute, current = Stream(), Stream(), []
    compute.wait_event = side.run_up_to
    monkeypatch.setattr(offload, "side_stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: compute)
    used = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: used.append((tensor.data_ptr(), stream)))

    @contextlib.contextmanager
    def stream(it):
        current.append(it)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "stream", stream)
    count = on_device(monkeypatch)
    on = latents.Latents.on

    def late(self, device):
        there = on(self, device)
        if current:
            for target, source in zip(there.held, self.tensors):
                target.fill_(float("nan") if target.is_floating_point() else 255)
                side.queue.append(lambda target=target, source=source: target.copy_(source))
        return there

    monkeypatch.setattr(latents.Latents, "on", late)
    return side, compute, count, used


@pytest.mark.parametrize("settings", [{}, PACKED], ids=["plain", "packed"])
def test_the_next_layer_comes_ahead_and_is_waited_for(settings, streams, monkeypatch):
    """The same logits though copies arrive only when waited for; each layer is copied before its turn, after the last
    one has had its own."""
    side, compute, count, used = streams
    model, ids = lossy(make_model(num_hidden_layers=4), **settings), prompt(2, 120)
    expected = feed(model, ids, CSKVCache(), [60] + [1] * 30)
    cache, ahead, most = CSKVCache(offloading=True), [], []

    def look(*_):
        ahead.append([i for i, layer in enumerate(cache.layers) if layer.copies is not None])
        most.append(count())

    for layer in model.get_base_model().model.layers:
        layer.self_attn.register_forward_pre_hook(look)
    actual = feed(model, ids, cache, [60] + [1] * 30)
    assert torch.equal(actual, expected)
    assert ahead[4:] == [[i] for i in range(4)] * 30  # after the prompt: whose turn comes, and no other
    assert max(most[4:]) <= 1 and all(stream is compute for _, stream in used) and used
    assert side.waits and all(stream is compute for stream in side.waits)  # no memory is reused under a reader


def test_copies_on_their_way_do_not_outlive_a_change(streams):
    """After a crop, a reorder or a copy, what was copied ahead of the next step is not what is held any more."""
    model, ids = lossy(make_model()), prompt(2, 120)
    found = []
    for offloading in (False, True):
        cache = CSKVCache(offloading=offloading)
        logits = [feed(model, ids, cache, [60] + [1] * 9)]
        if offloading:
            copies = cache.layers[0].copies
            alone = copy.deepcopy(cache)
            there = sum(t.nbytes for x in copies.latents for t in x.held)
            assert cache.nbytes == alone.nbytes + there > alone.nbytes and alone.layers[0].copies is None
        cache.crop(-30)
        assert all(layer.copies is None for layer in cache.layers)
        logits.append(feed(model, ids, cache, [1] * 3))
        cache.reorder_cache(torch.tensor([1, 0]))
        assert all(layer.copies is None for layer in cache.layers)
        logits.append(feed(model, ids[[1, 0]], cache, [1] * 3))
        twin = copy.deepcopy(cache)
        logits.append(feed(model, ids[[1, 0]], twin, [1] * 3))
        found.append(torch.cat(logits, dim=1))
    assert torch.equal(*found)


@pytest.mark.parametrize("offloading", [False, True])
def test_offload_and_prefetch_by_hand(offloading, monkeypatch):
    """transformers' own calls, by layer or for the whole cache: everything goes to the CPU and comes back, by
    `prefetch` or by itself."""
    model, ids = lossy(make_model()), prompt(2, 80)
    expected = feed(model, ids, CSKVCache(), [40] + [1] * 6)
    cache, moved = CSKVCache(offloading=offloading), []
    logits = [feed(model, ids, cache, [40, 1, 1])]
    for layer_idx in range(2):
        cache.offload(layer_idx)
        cache.offload(layer_idx, only_non_sliding=False)
    move = type(cache.layers[0])._move
    monkeypatch.setattr(type(cache.layers[0]), "_move", lambda self, to: moved.append(self) or move(self, to))
    cache.prefetch(0)
    cache.prefetch(1, only_non_sliding=False)
    cache.prefetch(2)  # circles back
    assert moved == [cache.layers[0], cache.layers[1], cache.layers[0]]
    logits.append(feed(model, ids, cache, [1, 1]))
    for layer in cache.layers:
        layer.offload()
        layer.device = torch.device("meta")  # as if the model ran elsewhere: `prefetch` goes there
        layer.prefetch()
        assert layer.keys.device.type == "meta" and layer.key_latents.device.type == ("cpu" if offloading else "meta")
        break
    assert torch.equal(torch.cat(logits, dim=1), expected[:, :44])
    CSKVCache(offloading=True).prefetch(0)  # nothing to bring


def test_report_says_what_is_where():
    model, cache = lossy(make_model()), CSKVCache(offloading=True)
    feed(model, prompt(1, 60), cache, [60])
    lines = cache.report().split("\n")
    size = sum(t.nbytes for layer in cache.layers for x in (layer.key_latents, layer.value_latents) for t in x.held)
    assert cache.offloaded_nbytes == size and f"{size:,} bytes" in lines[-2] and "on the CPU" in lines[-2]
    assert f"{cache.nbytes - size:,} bytes" in lines[-1] and "on cpu" in lines[-1]
    assert max(map(len, lines)) <= 80

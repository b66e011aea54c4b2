"""CSKVCache as a cache: equal to DynamicCache where it must be, and every operation on rows and tokens."""

import copy
import pickle

import pytest
import random_past
import torch
from conftest import lossless, lossy, make_model, prompt
from safetensors.torch import save_file
from transformers import DynamicCache

from cskv_hf import CSKVCache, CSKVStaticCache, attention, kernels, latents


@torch.no_grad()
def feed(model, ids, cache, turns, mask=None):
    logits, start = [], cache.get_seq_length()
    for length in turns:
        kwargs = {}
        if mask is not None:
            seen = mask[:, : start + length]
            kwargs = {"attention_mask": seen, "position_ids": (seen.cumsum(-1) - 1).clamp_min(0)[:, -length:]}
        logits.append(model(ids[:, start : start + length], past_key_values=cache, use_cache=True, **kwargs).logits)
        start += length
    return torch.cat(logits, dim=1)


def test_lossless_factors_equal_dynamic_cache(family):
    """Full rank: encoding loses nothing, so everything that happens to tokens on the way is an identity."""
    model, ids, turns = lossless(make_model(family)), prompt(2, 60), [30, 1, 1, 9] + [1] * 12
    cache = CSKVCache()
    expected = feed(model, ids, DynamicCache(), turns)
    torch.testing.assert_close(feed(model, ids, cache, turns), expected, atol=1e-9, rtol=1e-9)
    assert cache.tokens.num_old > 20


def test_context_within_the_window_equals_dynamic_cache_bit_by_bit():
    """As long as nothing is compressed, the model's own attention runs on the same tensors."""
    model, ids = lossy(make_model(), window=40), prompt(2, 40)
    mask = torch.ones_like(ids)
    assert torch.equal(
        feed(model, ids, CSKVCache(), [20, 1, 8, 1, 1], mask), feed(model, ids, DynamicCache(), [20, 1, 8, 1, 1], mask)
    )


def test_prefill_is_exact():
    model, ids = lossy(make_model()), prompt(2, 70)
    assert torch.equal(feed(model, ids, CSKVCache(), [70]), feed(model, ids, DynamicCache(), [70]))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("removed", [1, 5, 20, 47])
def test_crop(removed, padded):
    """Lossless: after a crop, the cache goes on like one that never saw the removed tokens, down to the sinks."""
    model, ids = lossless(make_model()), prompt(2, 70)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :6] = 0
    cache = CSKVCache()
    feed(model, ids, cache, [40, 1, 1, 1, 7], mask)
    cache.crop(-removed)
    assert cache.get_seq_length() == 50 - removed
    again, dynamic = [1, 1, 5, 1], DynamicCache()
    feed(model, ids, dynamic, [50 - removed], mask)
    actual, expected = feed(model, ids, cache, again, mask), feed(model, ids, dynamic, again, mask)
    first = 0 if not padded or 50 - removed >= 6 else 3  # rows of nothing but padding have no defined output
    torch.testing.assert_close(actual[:, first:], expected[:, first:], atol=1e-9, rtol=1e-9)


def test_crop_accepts_a_length_as_old_transformers_pass_it():
    model, ids, cache = lossy(make_model()), prompt(1, 40), CSKVCache()
    feed(model, ids, cache, [40])
    cache.crop(33)
    assert cache.get_seq_length() == 33
    cache.crop(0)
    assert cache.get_seq_length() == 33
    with pytest.raises(ValueError, match="Cannot crop 34 tokens from a cache of 33"):
        cache.crop(-34)
    cache.crop(torch.tensor(-3))  # transformers 5.14 counts in tensors, which later additions must not share
    feed(model, ids, cache, [5])
    assert [layer.num_slots for layer in cache.layers] == [35, 35]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("operation", ["reorder", "select", "repeat"])
def test_rows_move_with_everything_that_belongs_to_them(operation, padded):
    """Rows of the cache after the operation continue as the same rows did before it."""
    model, ids = lossy(make_model()), prompt(3, 60)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :7] = 0
        mask[2, :2] = 0
    rows = {"reorder": [2, 0, 0], "select": [1], "repeat": [0, 0, 1, 1, 2, 2]}[operation]
    cache, straight = CSKVCache(), CSKVCache()
    feed(model, ids, cache, [40, 1, 1], mask)
    index = torch.tensor(rows)
    {
        "reorder": lambda: cache.reorder_cache(index),
        "select": lambda: cache.batch_select_indices(index),
        "repeat": lambda: cache.batch_repeat_interleave(2),
    }[operation]()
    actual = feed(model, ids[rows], cache, [1] * 9, mask[rows])
    feed(model, ids, straight, [40, 1, 1], mask)
    expected = feed(model, ids, straight, [1] * 9, mask)
    torch.testing.assert_close(actual, expected[rows], atol=1e-9, rtol=1e-9)


def latents_by_slot(cache):
    """{(row, slot): the latents of every layer, as they come out of storage}"""
    table, held = cache.tokens, {}
    batch = cache.layers[0].keys.shape[0]
    slots = table.slots["old"] if table.slots else torch.arange(table.num_sinks, table.num_sinks + table.num_old)[None]
    slots = slots.expand(batch, -1)
    read = [
        latents.read(0, latents.num_blocks, torch.float64)
        for layer in cache.layers
        for latents in (layer.key_latents, layer.value_latents)
    ]
    for row in range(batch):
        for column, slot in enumerate(slots[row].tolist()):
            if slot >= 0:
                held[row, slot] = torch.cat([tensor[row, column] for tensor in read])
    return held


@pytest.mark.parametrize("bits", [None, 16])
def test_growing_in_segments(bits, monkeypatch):
    """Blocks that come one by one join a small tensor, not the whole past: the same logits and bytes, and what is
    full stays where it is."""
    model, ids = lossy(make_model(), 0.6, bits=bits, allocation=None, block_size=8), prompt(2, 150)
    outputs, sizes = [], []
    for segment in (10**6, 1, 3):
        monkeypatch.setattr(latents, "SEGMENT_BLOCKS", segment)
        cache = CSKVCache()
        logits = [feed(model, ids, cache, [60] + [1] * 20)]
        first = cache.layers[0].key_latents.segments[0][0].data_ptr()
        logits.append(feed(model, ids, cache, [1] * 60))
        held = cache.layers[0].value_latents
        assert (len(held.segments) > 1) == (segment < 10**6)
        if segment < 10**6:
            assert cache.layers[0].key_latents.segments[0][0].data_ptr() == first
        assert sum(t.nbytes for t in held.held) == sum(t.nbytes for t in held.tensors)
        cache.crop(-30)
        cache.reorder_cache(torch.tensor([1, 0]))
        logits.append(feed(model, ids[[1, 0]], cache, [1] * 12))
        outputs.append(torch.cat(logits, dim=1))
        sizes.append(cache.nbytes)
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(outputs[2], outputs[0], atol=1e-9, rtol=1e-9)
    assert sizes[1] == sizes[0] == sizes[2]


@pytest.mark.parametrize("bits", [None, 4, 3, 2, 8, 16])
@pytest.mark.parametrize("padded", [False, True])
def test_moves_change_no_bit_of_what_is_stored(bits, padded):
    """Append, crop (also into the middle of a block), reorder, repeat, select, copy: old latents are moved as they
    are, never read and quantised again."""
    model = lossy(make_model(), 0.6, bits=bits, allocation=None, block_size=8)
    ids, mask, cache = prompt(3, 120), torch.ones(3, 120, dtype=torch.long), CSKVCache()
    if padded:
        mask[0, :9] = 0
        mask[2, :3] = 0
    feed(model, ids, cache, [60, 1, 1], mask)
    rows = [0, 1, 2]

    def check(before, rows, length):
        after = latents_by_slot(cache)
        for (row, slot), vector in after.items():
            if (rows[row], slot) in before:
                assert torch.equal(vector, before[rows[row], slot])
        survivors = {(row, slot) for row in range(len(rows)) for r, slot in before if r == rows[row] and slot < length}
        assert survivors <= set(after)

    for step in range(4):
        before = latents_by_slot(cache)
        feed(model, ids[rows], cache, [1] * 9 + [11], mask[rows])
        check(before, range(len(rows)), cache.get_seq_length())
        before, removed = latents_by_slot(cache), 13 + 4 * step
        cache.crop(-removed)
        check(before, range(len(rows)), cache.get_seq_length())
        before = latents_by_slot(cache)
        index = {0: [2, 0, 1], 1: [0, 0, 1, 1, 2, 2], 2: [5, 0, 3], 3: [0, 1, 2]}[step]
        if step == 1:
            cache.batch_repeat_interleave(2)
        else:
            cache.reorder_cache(torch.tensor(index))
        check(before, index, cache.get_seq_length())
        rows = [rows[i] for i in index]
        cache = copy.deepcopy(cache)
        check(latents_by_slot(cache), range(len(rows)), cache.get_seq_length())


@pytest.mark.parametrize("padded", [False, True])
def test_copies_are_independent(padded):
    """deepcopy (the recipe for prompt caching) and pickle; neither drags the model along."""
    model, ids = lossy(make_model()), prompt(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0 if padded else 1
    cache = CSKVCache()
    feed(model, ids, cache, [40], mask)
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    expected = feed(model, ids, cache, [1] * 12, mask)
    for twin in copies:
        assert torch.equal(feed(model, ids, twin, [1] * 12, mask), expected)
    assert len(pickle.dumps(copies[0])) < 3 * copies[0].nbytes + 20_000


def test_reset_makes_it_new():
    model, ids, cache = lossy(make_model()), prompt(2, 50), CSKVCache()
    expected = feed(model, ids, cache, [40, 1, 1])
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    assert torch.equal(feed(model, ids, cache, [40, 1, 1]), expected)


def test_rows_are_counted_from_the_end_too():
    """As in a DynamicCache, and as tensors and lists."""
    model, ids, caches = lossy(make_model()), prompt(3, 50), [CSKVCache(), CSKVCache()]
    for cache, indices in zip(caches, (torch.tensor([-1, 0]), [2, 0])):
        feed(model, ids, cache, [40])
        cache.batch_select_indices(indices)
    assert torch.equal(*(feed(model, ids[[2, 0]], cache, [5]) for cache in caches))


def test_window_and_sinks_can_be_set_per_cache():
    model, ids = lossy(make_model()), prompt(1, 60)
    cache = CSKVCache(window=20, sinks=1)
    feed(model, ids, cache, [60])
    assert (cache.tokens.num_sinks, cache.tokens.num_recent) == (1, 23)
    for settings, message in (
        ({"window": 0}, "`window` must be at least 1"),
        ({"sinks": -1}, "`sinks` must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            CSKVCache(**settings)


def test_at_least_a_window_of_exact_tokens_at_any_time():
    model, ids, cache = lossy(make_model()), prompt(1, 90), CSKVCache()
    for turns in ([30], *[[1]] * 40):
        feed(model, ids, cache, turns)
        assert 8 <= cache.tokens.num_recent < 8 + 4
        assert cache.layers[0].keys.shape[2] == cache.tokens.num_recent


def test_memory_is_let_go():
    """The window of a long prompt must not keep the storage of the prompt's keys alive."""
    model, cache = lossy(make_model(dtype=torch.float32)), CSKVCache()
    feed(model, prompt(1, 500), cache, [500])
    layer = cache.layers[0]
    for name, tensor in ((name, t) for name, tensors in layer.tensors().items() for t in tensors):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize, name


def test_report_is_readable():
    model, cache = lossy(make_model()), CSKVCache()
    assert cache.report() == "CSKVCache: empty"
    feed(model, prompt(1, 60), cache, [60])
    report = cache.report()
    assert f"{cache.nbytes:,} bytes" in report and "old, latents" in report
    assert max(map(len, report.split("\n"))) <= 80


def test_model_without_factors():
    model, cache = make_model(), CSKVCache()
    with pytest.raises(RuntimeError, match=r"no CSKV factors in use.*cskv_hf\.load.*cskv_hf\.fit"):
        model(prompt(1, 10), past_key_values=cache, use_cache=True)


def test_cache_of_another_adapter_or_batch():
    model, ids, cache = lossy(make_model(), 0.6), prompt(2, 40), CSKVCache()
    feed(model, ids, cache, [40])
    with pytest.raises(ValueError, match="holds a batch of 2 and got a batch of 3"):
        model(prompt(3, 1), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="A cache belongs to one model and adapter"):
        lossy(make_model(), 0.3)(ids[:, :1], past_key_values=cache, use_cache=True)


def test_attention_mask_of_another_length():
    model, ids, cache = lossy(make_model()), prompt(1, 40), CSKVCache()
    feed(model, ids, cache, [40])
    with pytest.raises(ValueError, match="covers 10 tokens; this CSKVCache holds 40 and gets 10, so it must cover 50"):
        model(ids[:, :10], attention_mask=torch.ones(1, 10), past_key_values=cache, use_cache=True)


def test_interrupted_forward_is_noticed():
    model, ids, cache = lossy(make_model()), prompt(1, 40), CSKVCache()
    feed(model, ids, cache, [20])
    handle = (
        model.get_base_model()
        .model.layers[1]
        .register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    )
    with pytest.raises(KeyboardInterrupt):
        model(ids[:, 20:21], past_key_values=cache, use_cache=True)
    handle.remove()
    with pytest.raises(RuntimeError, match=r"was interrupted between two layers.*cache\.reset"):
        model(ids[:, 20:21], past_key_values=cache, use_cache=True)


def stop_at(module):
    """The next call of a module is interrupted, and only that."""

    def stop(*_):
        handle.remove()
        raise KeyboardInterrupt

    handle = module.register_forward_pre_hook(stop)


@pytest.mark.parametrize("held", [0, 40])
def test_a_forward_that_stopped_before_any_layer_had_it_is_undone(held):
    """Out of memory in the first projection, say: the next forward may be another, of fewer tokens or other padding,
    and gives what it gives on a cache that saw nothing of the first."""
    model, ids, caches = lossy(make_model()), prompt(3, held + 30), (CSKVCache(), CSKVCache())
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    if held:
        for cache in caches:
            model(ids[:, :held], attention_mask=mask[:, :held], past_key_values=cache)
    stop_at(model.get_base_model().model.layers[0].self_attn.q_proj)
    with pytest.raises(KeyboardInterrupt):
        model(ids[:, held:], attention_mask=mask.flip(1)[:, -len(ids[0]) :], past_key_values=caches[0])
    assert caches[0].get_seq_length() == held
    ours, theirs = (
        model(ids[:, held : held + 21], attention_mask=mask[:, : held + 21], past_key_values=cache).logits
        for cache in caches
    )
    real = mask[:, held : held + 21].bool()
    assert torch.equal(ours[real], theirs[real]) and caches[0].nbytes == caches[1].nbytes
    stop_at(model.get_base_model().model.layers[0].self_attn.q_proj)
    with pytest.raises(KeyboardInterrupt):
        model(ids[:, -1:], past_key_values=caches[0])
    assert caches[0].report() == caches[1].report()


@pytest.mark.parametrize("held", [60, 0])
@pytest.mark.parametrize("use", ["crop", "save", "batch_repeat_interleave", "batch_select_indices", "report"])
def test_a_cache_whose_layers_differ_is_not_used(use, held, tmp_path):
    """Not cropped to where it looks whole, and not saved; also where the other layers never held anything."""
    model, ids, cache = lossy(make_model()), prompt(1, 70), CSKVCache()
    if held:
        feed(model, ids, cache, [held])
    stop_at(model.get_base_model().model.layers[1].self_attn.q_proj)
    with pytest.raises(KeyboardInterrupt):
        model(ids[:, held:], past_key_values=cache)
    arguments = {"crop": [-10], "save": [tmp_path / "cache"], "report": []}.get(use, [torch.tensor([0])])
    with pytest.raises(RuntimeError, match="was interrupted between two layers"):
        getattr(cache, use)(*arguments)
    cache.reset()
    feed(model, ids, cache, [60])


def test_what_belongs_to_a_forward_goes_with_it():
    """cos and sin of a long past are not kept, copied or pickled."""
    model, cache = lossy(make_model()), CSKVCache()
    feed(model, prompt(1, 201), cache, [200, 1])
    held = sum(len(pickle.dumps(t)) for layer in cache.layers for parts in layer.tensors().values() for t in parts)
    assert len(pickle.dumps(cache)) < 1.3 * held


def test_a_cache_is_of_the_factors_as_they_were():
    """Training changes an adapter in place, and what it held before is not decoded by what it is now."""
    model, ids, cache = lossy(make_model()), prompt(1, 70), CSKVCache()
    feed(model, ids, cache, [60])
    copied, factors = copy.deepcopy(cache), model.get_base_model().model.layers[1].self_attn.cskv
    with torch.no_grad():
        factors.cskv_value_B["default"].weight[0, 0] += 1e-3
    for held in (cache, copied):
        with pytest.raises(ValueError, match=r"before this one was trained further \(layer 1\)"):
            model(ids[:, 60:61], past_key_values=held)


def test_padding_leaves_the_prompt_to_the_models_own_attention():
    """As long as every token is there in order, whatever is padding: the same numbers as with a full cache, bit by
    bit, in the first forward and in those after it that compress nothing."""
    model, ids = lossy(make_model(), window=40), prompt(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    full, cache = DynamicCache(), CSKVCache()
    for start, stop in ((0, 30), (30, 34), (34, 35)):
        ours, theirs = (
            model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=c).logits for c in (cache, full)
        )
        assert torch.equal(ours, theirs)
    feed(model, ids, CSKVCache(), [60], mask)


@pytest.mark.parametrize("make_cache", [CSKVCache, lambda: CSKVStaticCache(80)])
@pytest.mark.parametrize("settings", [{}, dict(bits=None, allocation=None, block_size=8)], ids=["plain", "packed"])
def test_autocast(make_cache, settings):
    """Everything of the cache keeps its own dtypes; the model computes in bfloat16 around it."""
    model, ids = lossy(make_model(dtype=torch.float32), **settings), prompt(2, 66)
    logits = []
    for enabled in (False, True):
        cache = make_cache()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            parts = [model(part, past_key_values=cache).logits.float() for part in ids.split([60, 1, 5], dim=1)]
        logits.append(torch.cat(parts, dim=1))
    assert (logits[0] - logits[1]).abs().max() < 0.1 * logits[0].abs().max()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_a_long_past_in_16_bits(dtype, monkeypatch):
    """As on a GPU without the kernels: products in the model's dtype, sums in float32."""
    monkeypatch.setattr(attention, "compute_dtype", lambda tensor: tensor.dtype)
    monkeypatch.setattr(kernels, "choose", lambda *_: None)
    monkeypatch.setattr(attention, "CPU_TILE", 2**12)  # many tiles
    factors = random_past.layer("head", (40, 40), 40, 2, 80, dtype)
    kv, query = random_past.past(factors, 1, 20_000, dtype), torch.randn(1, 4, 1, 80).to(dtype) * 1e-3
    ours = attention.compressed_attention(query, kv, 0.1)
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "choose", lambda *_: None)
    theirs = attention.compressed_attention(query, kv, 0.1)
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_rows_by_a_mask():
    model, ids = lossy(make_model()), prompt(3, 70)
    caches = [CSKVCache(), CSKVCache()]
    for cache, rows in zip(caches, (torch.tensor([True, False, True]), torch.tensor([0, 2]))):
        feed(model, ids, cache, [60])
        cache.batch_select_indices(rows)
    outputs = [feed(model, ids[[0, 2]], cache, [10]) for cache in caches]
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "indices, message",
    [
        (torch.tensor([True, False]), r"is a mask of shape \(2,\), this cache has 3 rows"),
        (torch.tensor([0, 3]), "from -3 to 2 in a cache of 3 rows"),
        (torch.tensor([-4]), "from -3 to 2 in a cache of 3 rows"),
    ],
)
def test_rows_that_are_not_there(indices, message):
    model, cache = lossy(make_model()), CSKVCache()
    feed(model, prompt(3, 60), cache, [60])
    with pytest.raises(ValueError, match=message):
        cache.batch_select_indices(indices)
    assert cache.layers[0].keys.shape[0] == 3
    cache.batch_select_indices(torch.tensor([-1, 0]))
    assert cache.layers[0].keys.shape[0] == 2


@pytest.mark.parametrize("padded", [False, True])
def test_a_crop_of_the_window_leaves_the_latents_where_they_are(padded):
    """As after every verified speculation; nothing is copied that grows with the context."""
    model, ids, cache = lossy(make_model()), prompt(2, 90), CSKVCache()
    mask = torch.ones_like(ids)
    mask[0, :5] = 1 - padded
    feed(model, ids, cache, [90], mask)
    before = [t.data_ptr() for x in cache.layers for t in (*x.key_latents.held, *x.value_latents.held)]
    cache.crop(-2)
    assert before == [t.data_ptr() for x in cache.layers for t in (*x.key_latents.held, *x.value_latents.held)]


def test_a_cache_that_is_cropped_to_nothing():
    model, cache = lossy(make_model()), CSKVCache()
    feed(model, prompt(1, 60), cache, [60])
    cache.crop(-60)
    assert cache.report() == "CSKVCache: empty" and cache.get_seq_length() == 0


def test_a_cache_of_another_adapter_of_the_same_sizes():
    """Formats agree, factors do not: refused at the call. A copy, and the same adapter loaded again, are not."""
    one, other = (lossy(make_model(seed=seed), key_layout="joint") for seed in (0, 1))
    cache = CSKVCache()
    feed(one, prompt(1, 40), cache, [40])
    with pytest.raises(ValueError, match="filled by another adapter of the same sizes"):
        feed(other, prompt(1, 41), copy.deepcopy(cache), [1])
    feed(copy.deepcopy(one), prompt(1, 41), copy.deepcopy(cache), [1])


def test_files_that_hold_no_cache(tmp_path):
    model, cache, path = lossy(make_model()), CSKVCache(), tmp_path / "cache.safetensors"
    with pytest.raises(ValueError, match="is empty: there is nothing to save"):
        cache.save(path)
    feed(model, prompt(2, 60), cache, [60])
    cache.save(path)
    held = path.read_bytes()
    cache.materialize = True
    cache.save(path)
    assert CSKVCache.load(path).materialize
    cache.materialize = False
    path.write_bytes(held)
    assert not CSKVCache.load(path).materialize
    assert CSKVCache.load(path).nbytes == cache.nbytes and [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(ValueError, match=r"`device` must be one that torch knows, .*got 'gpu'"):
        CSKVCache.load(path, "gpu")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        CSKVCache.load(tmp_path)
    path.write_bytes(held[:-20])
    with pytest.raises(ValueError, match=r"is truncated or corrupt.*Save the cache again"):
        CSKVCache.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"holds no CSKVCache.*cache\.save"):
        CSKVCache.load(path)
    for about in ("{}", '{"version": 5}', '{"version": 5, "window": 8, "sinks": 3}'):
        save_file({"a": torch.zeros(1)}, path, metadata={"cskv_cache": about})
        with pytest.raises(ValueError, match=r"is corrupt \(it lacks .*Save the cache again"):
            CSKVCache.load(path)
    for version, advice in (
        (b"9", r"newer cskv-hf .*pip install -U cskv-hf"),
        (b"3", r"older cskv-hf .*save the cache"),
    ):
        path.write_bytes(held.replace(b'\\"version\\": 5', b'\\"version\\": ' + version))
        with pytest.raises(ValueError, match=advice):
            CSKVCache.load(path)


@pytest.mark.parametrize("padded", [False, True])
def test_a_saved_cache_goes_on_as_if_never_saved(padded, tmp_path):
    """Plain and packed, uniform and ragged: the logits that follow are the same bit by bit."""
    for settings in ({}, dict(bits=None, allocation=None, block_size=8)):
        model, ids = lossy(make_model(), **settings), prompt(2, 70)
        mask = torch.ones_like(ids)
        mask[0, : 7 * padded] = 0
        cache = CSKVCache()
        feed(model, ids, cache, [60], mask)
        cache.save(tmp_path / "cache")
        rest = [1, 1, 5, 1]
        again = feed(model, ids, CSKVCache.load(tmp_path / "cache"), rest, mask)
        assert torch.equal(again, feed(model, ids, cache, rest, mask))

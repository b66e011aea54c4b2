"""CSKVStaticCache: the same function as CSKVCache, in one graph for every decoding step."""

import copy
from unittest.mock import Mock

import pytest
import torch
from conftest import lossless, lossy, make_model, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cache import feed
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from transformers import CompileConfig, DynamicCache, StaticCache

from cskv_hf import CSKVCache, CSKVStaticCache, kernels
from cskv_hf.latents import Latents
from cskv_hf.quantize import PackedLayout, dequantize, quantize
from cskv_hf.rope import RotaryFrequencies
from cskv_hf.static_tokens import StaticStep, StaticTable

TURNS = [30, 1, 1, 9] + [1] * 9 + [17] + [1] * 14  # a prompt, tokens, a second turn, a third
LENGTH = sum(TURNS)
SETTINGS = {
    "plain": {},
    "packed": dict(bits=None, allocation=None, block_size=8),
    "window below a block": dict(window=3, sinks=0, block_size=16),
    "no whole number of blocks": dict(window=7, sinks=1, block_size=8, bits=None, allocation=None),
}
ONCE = dict(max_new_tokens=24, do_sample=False)


def padded(rows, length, spread=((0, 0, 7), (2, 0, 25), (1, 35, 38))):
    """A mask with padding on the left of two rows and between two turns of another."""
    mask = torch.ones(rows, length, dtype=torch.long)
    for row, start, stop in spread:
        mask[row, start:stop] = 0
    return mask


def close(actual, expected, mask=None):
    real = slice(None) if mask is None else mask[:, : actual.shape[1]].bool()
    torch.testing.assert_close(actual[real], expected[real], atol=1e-9, rtol=1e-9)


@torch.no_grad()
def decode(call, ids, cache, start, steps, mask=None):
    """Token by token as compiled decoding does it: no mask, which would grow; positions where rows differ."""
    logits = []
    for at in range(start, start + steps):
        kwargs = {} if mask is None else {"position_ids": mask[:, : at + 1].sum(1, keepdim=True) - 1}
        logits.append(call(ids[:, at : at + 1], past_key_values=cache, use_cache=True, **kwargs).logits)
    return torch.cat(logits, dim=1)


@pytest.fixture(scope="module")
def plain():
    return lossy(make_model())


@pytest.mark.parametrize("family", ["llama", "llama-yarn", "mistral", "mistral-sliding", "qwen2-mixed", "qwen3"])
def test_equals_cskv_cache(family):
    """Prompt, steps and further turns, with and without padding: the same tokens are exact, the same are latents, so
    the same numbers are summed."""
    model, ids = lossy(make_model(family)), prompt(3, LENGTH)
    for mask in (None, padded(3, LENGTH)):
        cache = CSKVStaticCache(LENGTH)
        close(feed(model, ids, cache, TURNS, mask), feed(model, ids, CSKVCache(), TURNS, mask), mask)
        assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("kind", list(SETTINGS)[1:])
def test_equals_cskv_cache_however_latents_are_stored(kind):
    model, ids, mask = lossy(make_model(), **SETTINGS[kind]), prompt(3, LENGTH), padded(3, LENGTH)
    close(feed(model, ids, CSKVStaticCache(90), TURNS, mask), feed(model, ids, CSKVCache(), TURNS, mask), mask)


def test_lossless_factors_equal_dynamic_cache():
    model, ids, mask = lossless(make_model()), prompt(3, LENGTH), padded(3, LENGTH)
    close(feed(model, ids, CSKVStaticCache(100), TURNS, mask), feed(model, ids, DynamicCache(), TURNS, mask), mask)


def test_prefill_is_exact(plain):
    ids = prompt(2, 70)
    assert torch.equal(feed(plain, ids, CSKVStaticCache(80), [70]), feed(plain, ids, DynamicCache(), [70]))


@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(0, 4), st.sampled_from([1, 2, 4, 8])),
    turns=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_every_token_is_held_once(sizes, turns, seed):
    """By brute force: each row keeps the list of its real slots; of `n`, the first after the sinks are old, in whole
    blocks, as soon as a block lies outside of the window. Each forward sees every one of them in one column, and
    encodes what becomes old."""
    window, sinks, block = sizes
    real = torch.rand(2, sum(turns), generator=torch.Generator().manual_seed(seed)) < 0.8
    table = StaticTable(sum(turns), window, sinks, block, 2, torch.device("cpu"))
    exact = torch.full((2, table.num_places), -1)  # instead of keys: slots
    blocks = torch.full((2, table.num_blocks, block), -1)
    start = 0
    for length in turns:
        new = torch.arange(start, start + length).expand(2, -1)
        step = StaticStep(table, new, RotaryFrequencies(torch.ones(1), 1.0), real[:, : start + length])
        if length == 1:
            exact.scatter_(1, step.place, new)
        columns = exact if length == 1 else torch.cat([exact, new], dim=1)
        for row in range(2):
            held = [slot for slot in range(start) if real[row, slot]]
            seen = [slot for slots in step.slots for slot in slots[row].tolist() if slot >= 0]
            own = [slot for slot in range(start, start + length) if real[row, slot] or length == 1]
            assert sorted(seen) == held + own
            old = max(0, len(held) - sinks - window) // block * block
            assert [s for s in step.slots[1][row].tolist() if s >= 0] == held[sinks : sinks + old]
            assert blocks[row].flatten()[:old].tolist() == held[sinks : sinks + old]
            of_columns = torch.where(step.slots[0][row] < 0, -1, columns[row])
            assert of_columns.tolist() == step.slots[0][row].tolist()  # the columns are what they are said to be
        if step.evicted.shape[1]:
            blocks.scatter_(
                1,
                step.blocks[..., None].expand(-1, -1, block),
                columns.gather(1, step.evicted).unflatten(1, (-1, block)),
            )
        if length > 1:
            exact = columns.gather(1, step.kept)
        step.finish()
        start += length
    for row in range(2):
        held = [slot for slot in range(start) if real[row, slot]]
        assert table.counts[row] == len(held) and table.positions[row, : len(held)].tolist() == held
        old = max(0, len(held) - sinks - window) // block * block
        assert blocks[row].flatten()[:old].tolist() == held[sinks : sinks + old]


def keep_in(graphs):
    """A compiler that runs what it is given as it is, and keeps it."""

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.mark.parametrize("family, layers, kind", [("gemma3_text", 2, "plain"), ("llama", 1, "packed")])
def test_one_graph_for_every_step(family, layers, kind):
    """Without a graph break (`fullgraph`), over many blocks, with rows that are padded; equal to the steps alone."""
    torch._dynamo.reset()
    model = lossy(make_model(family, num_hidden_layers=layers), **SETTINGS[kind])
    ids, mask = prompt(3, 130), padded(3, 130, [(0, 0, 7)])
    graphs = []
    compiled = torch.compile(model.forward, fullgraph=True, backend=keep_in(graphs))
    cache, alone = CSKVStaticCache(130), CSKVStaticCache(130)
    for each in (cache, alone):
        feed(model, ids, each, [40], mask)
    before = [t.data_ptr() for layer in cache.layers for t in layer.tensors]
    actual, expected = decode(compiled, ids, cache, 40, 90, mask), decode(model, ids, alone, 40, 90, mask)
    close(actual, expected)
    assert len(graphs) == 1 and cache.get_seq_length() == 130
    assert [t.data_ptr() for layer in cache.layers for t in layer.tensors] == before
    for mine, other in zip(cache.layers, alone.layers):  # packed codes too, bit by bit
        assert all(torch.equal(*pair) for pair in zip(mine.tensors, other.tensors) if pair[0].dtype == torch.uint8)
    nodes = list(graphs[0].graph.nodes)
    assert not any(node.target is torch.tensor for node in nodes)  # a constant would be copied to a GPU in every step
    made = [n for n in nodes if n.target in (torch.arange, torch.zeros, torch.full, torch.empty)]
    assert all("device" in node.kwargs for node in made)

    for each in (cache, alone):  # and again in the same graph, to the end and not beyond
        each.reset()
        feed(model, ids, each, [120], mask)
    close(decode(compiled, ids, cache, 120, 10, mask), decode(model, ids, alone, 120, 10, mask))
    assert len(graphs) == 1
    with pytest.raises(RuntimeError, match="CSKVStaticCache is full"):
        decode(compiled, ids, cache, 129, 1, mask)
    assert cache.get_seq_length() == 130


def test_inductor():
    """Compiled in earnest: the same logits, but for cos, sin and norms, which are float32 in any model; and the same
    codes and ranges bit by bit, although the compiler keeps 16-bit floats in 32 bits."""
    torch._dynamo.reset()
    model, ids = lossy(make_model(num_hidden_layers=1)), prompt(2, 50)
    compiled = torch.compile(model.forward, fullgraph=True)
    cache, alone = CSKVStaticCache(50), CSKVStaticCache(50)
    for each in (cache, alone):
        feed(model, ids, each, [30])
    actual, expected = decode(compiled, ids, cache, 30, 20), decode(model, ids, alone, 30, 20)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)

    def both_ways(latents):
        stored = quantize(latents, layout)
        return *stored, dequantize(*stored, layout, latents.dtype)

    torch.manual_seed(0)
    layout, latents = PackedLayout((8, 8, 3, 3, 3), 32, 16, 2), torch.randn(4, 320, 5) * 3 + 1
    *stored, restored = torch.compile(both_ways)(latents)
    assert all(torch.equal(*pair) for pair in zip(stored, quantize(latents, layout)))
    torch.testing.assert_close(restored, both_ways(latents)[-1])


def test_a_first_forward_that_is_compiled():
    """Allocating is left out of the graph, so that tensors stay where they are."""
    torch._dynamo.reset()
    model, ids, cache = lossy(make_model(num_hidden_layers=1)), prompt(2, 24), CSKVStaticCache(40)
    compiled = torch.compile(model.forward, backend="eager", dynamic=False)
    close(decode(compiled, ids, cache, 0, 24), decode(model, ids, CSKVCache(), 0, 24))


def test_a_cuda_graph_may_write_to_every_tensor(plain):
    """They are marked as lying still; one that is not keeps CUDA graphs from being recorded at all."""
    cache = CSKVStaticCache(64)
    plain(prompt(2, 50), past_key_values=cache)
    tensors = [*cache.tokens.tensors, *(t for layer in cache.layers for t in layer.tensors)]
    assert len(tensors) == 4 + 4 * len(cache.layers)
    assert all(getattr(t, "_dynamo_static_input_type", None) for t in tensors)


@pytest.mark.parametrize("kind", ["plain", "packed"])
@pytest.mark.parametrize("served", [None, "gpu"])
@torch.no_grad()
def test_a_cuda_graph_can_be_recorded(served, kind, monkeypatch):
    """PyTorch's own checks pass, on the device that has no memory: every number of a step is on it, so that nothing is
    copied from the host, and no operation is one that a CUDA graph cannot hold. With the kernels and without."""
    torch._dynamo.reset()
    model, ids, cache = lossy(make_model(), **SETTINGS[kind]), prompt(2, 41), CSKVStaticCache(64)
    model(ids[:, :40], past_key_values=cache)
    if served:
        triton_encode = pytest.importorskip("cskv_hf.kernels.triton_encode")
        monkeypatch.setattr(kernels, "encoder", lambda *_: triton_encode.encode_due)
    monkeypatch.setattr(kernels, "choose", lambda *_: served)
    model.to("meta")
    for held in (cache.tokens, *cache.layers):
        for name, value in vars(held).items():
            if isinstance(value, (torch.Tensor, torch.device)):
                setattr(held, name, value.to("meta") if isinstance(value, torch.Tensor) else torch.device("meta"))
            elif isinstance(value, Latents):
                value.segments = tuple(tuple(t.to("meta") for t in segment) for segment in value.segments)
    graphs = []
    backend = aot_autograd(fw_compiler=keep_in(graphs), keep_inference_input_mutations=True)
    compiled = torch.compile(model.forward, fullgraph=True, backend=backend)
    logits = compiled(ids[:, 40:].to("meta"), past_key_values=cache).logits
    assert logits.shape == (2, 1, model.config.vocab_size) and logits.is_meta
    (graph,) = graphs
    of = {node.meta["val"].device for node in graph.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)}
    assert of == {torch.device("meta")}
    assert get_first_incompatible_cudagraph_node(graph) is None
    reinplace_inplaceable_ops(Mock(), graph.graph)  # as Inductor does
    writing = [node for node in graph.graph.nodes if node.target is auto_functionalized_v2]
    called = [str(node.target) for node in graph.graph.nodes] + [str(node.args[0]) for node in writing]
    operations = tuple(called.count(f"cskv_hf.{name}.default") for name in ("gpu_attend", "gpu_encode"))
    assert operations == ((len(cache.layers), 2 * len(cache.layers)) if served else (0, 0))
    assert not any(node.meta["only_clone_these_tensors"] for node in writing)  # no latents are copied


def test_generate_compiles_decoding(plain):
    """As for a StaticCache: decoding steps are compiled, the prompt is not; the same graph in the next call."""
    torch._dynamo.reset()
    ids, mask, graphs = prompt(3, 40), padded(3, 40, [(0, 0, 7), (2, 0, 25)]), []
    ids[mask == 0] = 0
    config = CompileConfig(backend=keep_in(graphs), fullgraph=True, mode=None)
    config._compile_all_devices = True
    cache, expected = CSKVStaticCache(64), plain.generate(ids, attention_mask=mask, cache=CSKVCache, **ONCE)
    for _ in range(2):
        actual = plain.generate(ids, attention_mask=mask, past_key_values=cache, compile_config=config, **ONCE)
        assert torch.equal(actual, expected)
        cache.reset()
    assert len(graphs) == 1


@torch.no_grad()
def test_a_full_static_cache_compiles_whole(plain):
    """What CSKV adds to a model breaks no graph where another cache is in use."""
    torch._dynamo.reset()
    ids, logits = prompt(2, 24), []
    compiled = torch.compile(plain.forward, fullgraph=True, backend="eager")
    for call in (plain, compiled):
        cache = StaticCache(config=plain.config, max_cache_len=30)
        plain(ids[:, :20], past_key_values=cache)
        logits.append(call(ids[:, 20:21], past_key_values=cache).logits)
    close(*logits)


def test_generate(plain):
    """Without a compiler: greedy, beams, turns, chunks of a prompt."""
    ids, room = prompt(2, 40), lambda: CSKVStaticCache(120)
    for more in ({}, {"num_beams": 3}, {"prefill_chunk_size": 11}):
        expected = plain.generate(ids, cache=CSKVCache, **ONCE, **more)
        assert torch.equal(plain.generate(ids, cache=room, **ONCE, **more), expected), more
    caches = CSKVStaticCache(120), CSKVCache()
    first = [plain.generate(ids, cache=cache, **ONCE) for cache in caches]
    turns = [torch.cat([text, prompt(2, 9, seed=5)], dim=1) for text in first]
    second = [plain.generate(text, cache=cache, **ONCE) for text, cache in zip(turns, caches)]
    assert torch.equal(*second)


def test_masks_given_ready_made(plain):
    """Masks of four dimensions over `max_cache_len` slots, bool or float, tell padding as those of two do."""
    ids, mask = prompt(3, 50), padded(3, 50, [(0, 0, 7), (2, 0, 25)])
    expected = feed(plain, ids, CSKVStaticCache(60), [40] + [1] * 10, mask)
    slots = torch.arange(60)
    for kind in (torch.bool, torch.float64):
        cache, logits = CSKVStaticCache(60), []
        for start, stop in [(0, 40), *((i, i + 1) for i in range(40, 50))]:
            real = torch.nn.functional.pad(mask, (0, 10))[:, None, None].bool()
            given = (slots <= torch.arange(start, stop)[:, None]) & real
            if kind == torch.float64:
                given = torch.zeros(given.shape, dtype=kind).masked_fill(~given, torch.finfo(kind).min)
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, start:stop]
            with torch.no_grad():
                kwargs = dict(attention_mask=given, position_ids=positions, past_key_values=cache)
                logits.append(plain(ids[:, start:stop], **kwargs).logits)
        close(torch.cat(logits, dim=1), expected, mask)
        assert cache.tokens.counts.flatten().tolist() == mask.sum(1).tolist()
    cache = CSKVStaticCache(60)
    feed(plain, ids, cache, [40], mask)
    full = torch.nn.functional.pad(mask[:, :41], (0, 19))  # of two dimensions, over all slots
    with torch.no_grad():
        positions = mask[:, :41].sum(1, keepdim=True) - 1
        logits = plain(ids[:, 40:41], attention_mask=full, position_ids=positions, past_key_values=cache).logits
    close(logits, expected[:, 40:41])


@torch.no_grad()
def test_a_mask_with_a_bias(plain):
    """A float mask that adds something to tokens that are seen, and hides others by a large number of any kind."""
    ids, slots, logits = prompt(2, 41), torch.arange(64), []
    for cache, width in ((CSKVStaticCache(64), 64), (CSKVCache(), None)):
        for start, stop in ((0, 40), (40, 41)):
            seen = slots[: width or stop] <= torch.arange(start, stop)[:, None]
            bias = torch.where(seen, 0.5, -1e9).to(torch.float64)[None, None].expand(2, -1, -1, -1)
            logits.append(plain(ids[:, start:stop], attention_mask=bias, past_key_values=cache).logits)
    close(logits[1], logits[3])


def test_a_prompt_read_in_inference_mode(plain):
    """And steps outside of it."""
    ids, cache = prompt(2, 44), CSKVStaticCache(64)
    with torch.inference_mode():
        plain(ids[:, :40], past_key_values=cache)
    close(decode(plain, ids, cache, 40, 4), feed(plain, ids, CSKVCache(), [40, 1, 1, 1, 1])[:, 40:])


def test_too_many_tokens(plain):
    """Refused before anything is written: what was held goes on."""
    ids, cache, twin = prompt(2, 50), CSKVStaticCache(45), CSKVStaticCache(50)
    for each in (cache, twin):
        feed(plain, ids, each, [40])
    with pytest.raises(ValueError, match="`max_cache_len`=45, holds 40 tokens and got 6 more"):
        feed(plain, ids, cache, [6])
    assert torch.equal(feed(plain, ids, cache, [1] * 5), feed(plain, ids, twin, [1] * 5))
    with pytest.raises(ValueError, match="holds 45 tokens and got 1 more"):
        feed(plain, ids, cache, [1])
    with pytest.raises(ValueError, match=r"may need room for 63 tokens.*`max_cache_len`=62"):
        plain.generate(ids[:, :40], cache=CSKVStaticCache(62), **ONCE)
    assert plain.generate(ids[:, :40], cache=CSKVStaticCache(63), **ONCE).shape[1] == 64
    embedded = plain.get_input_embeddings()(ids[:, :40])
    with pytest.raises(ValueError, match=r"may need room for 63 tokens.*`max_cache_len`=62"):
        plain.generate(inputs_embeds=embedded, cache=CSKVStaticCache(62), **ONCE)
    assert plain.generate(inputs_embeds=embedded, cache=CSKVStaticCache(63), **ONCE).shape[1] == 24


@pytest.mark.parametrize("mask", [None, padded(3, 70, [(0, 0, 7)])])
def test_rows_move_with_everything_that_belongs_to_them(plain, mask):
    ids, rows = prompt(3, 70), [2, 0, 0]
    cache, straight = CSKVStaticCache(70), CSKVStaticCache(70)
    for each in (cache, straight):
        feed(plain, ids, each, [40, 1, 1], mask)
    cache.reorder_cache(torch.tensor(rows))
    moved = None if mask is None else mask[rows]
    actual, expected = (feed(plain, ids[rows], cache, [1] * 20, moved), feed(plain, ids, straight, [1] * 20, mask))
    close(actual, expected[rows])


def test_copies_are_independent(plain):
    ids, cache = prompt(2, 60), CSKVStaticCache(60)
    feed(plain, ids, cache, [40])
    twin = copy.deepcopy(cache)
    expected = feed(plain, ids, cache, [1] * 15)
    assert twin.get_seq_length() == 40
    assert torch.equal(feed(plain, ids, twin, [1] * 15), expected)


def test_bytes_are_those_of_the_tensors():
    """By hand, from the sizes of the class; the same before and after reset, which keeps the tensors."""
    model, ids, cache = lossy(make_model(dtype=torch.float32)), prompt(2, 60), CSKVStaticCache(100)
    assert cache.nbytes == 0
    expected = feed(model, ids, cache, [40, 1, 1])
    blocks = (100 - 1 - 3 - 8) // 4 + 1  # and of each layer: sinks, window, a block; latents
    of_rank = sum(f.rank for f in (cache.layers[0].key_latents.format, cache.layers[0].value_latents.format))
    per_layer = 2 * 2 * 4 * (3 + 8 + 4) * 8 * 4 + 2 * blocks * 4 * of_rank * 4
    assert cache.nbytes == 2 * per_layer + 8 + 2 * 8 + 2 * 2 * 100 * 4
    before, size = [t.data_ptr() for layer in cache.layers for t in layer.tensors], cache.nbytes
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == size
    assert torch.equal(feed(model, ids, cache, [40, 1, 1]), expected)
    assert [t.data_ptr() for layer in cache.layers for t in layer.tensors] == before


def test_interrupted_forward(plain):
    """A step that stopped between two layers can be repeated; of several tokens, it is noticed."""
    ids, cache, twin = prompt(1, 60), CSKVStaticCache(60), CSKVStaticCache(60)
    layer = plain.get_base_model().model.layers[1]
    for each in (cache, twin):
        feed(plain, ids, each, [30])

    def interrupted(length):
        stop = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            feed(plain, ids, cache, [length])
        stop.remove()

    interrupted(1)
    assert torch.equal(feed(plain, ids, cache, [1] * 9), feed(plain, ids, twin, [1] * 9))
    interrupted(5)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"was interrupted between two layers.*cache\.reset"):
            feed(plain, ids, cache, [1])
    cache.reset()
    feed(plain, ids, cache, [30])


def test_attention_weights_with_eager_attention():
    model, ids = lossy(make_model(attn_implementation="eager")), prompt(2, 50)
    weights = []
    for cache in (CSKVStaticCache(60), CSKVCache()):
        feed(model, ids, cache, [49])
        with torch.no_grad():
            output = model(ids[:, 49:], past_key_values=cache, output_attentions=True)
        weights.append(output.attentions[1][..., :50])
    torch.testing.assert_close(*weights, atol=1e-9, rtol=1e-9)


def test_refusals(plain):
    ids, cache = prompt(2, 30), CSKVStaticCache(60)
    for wrong, message in (
        ({"max_cache_len": 0}, "`max_cache_len` must be at least 1"),
        ({"max_cache_len": 9, "window": 0}, "`window` must be at least 1"),
        ({"max_cache_len": 9, "sinks": -1}, "`sinks` must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            CSKVStaticCache(**wrong)
    feed(plain, ids, cache, [30])
    for call in (
        lambda: cache.crop(-1),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([0])),
        lambda: plain.generate(ids[:1], cache=CSKVStaticCache(99), prompt_lookup_num_tokens=3, **ONCE),
    ):
        with pytest.raises((NotImplementedError, ValueError), match=r"CSKVCache\(\)|cache that can be cropped"):
            call()
    with pytest.raises(ValueError, match="unsupported"):
        plain.generate(ids, past_key_values=CSKVStaticCache(99), cache_implementation="static", **ONCE)
    with pytest.raises(ValueError, match="allocated for a batch of 2 and got a batch of 3"):
        plain(prompt(3, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="allocated for another adapter"):
        lossy(make_model(), 0.3)(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="covers 10 tokens; this CSKVStaticCache holds 30 and gets 1"):
        plain(ids[:, :1], attention_mask=torch.ones(2, 10), past_key_values=cache)
    with pytest.raises(RuntimeError, match="no CSKV factors in use"):
        make_model()(ids, past_key_values=CSKVStaticCache(60))
    with pytest.raises(ValueError, match="frequencies change with the length"):
        lossy(make_model("llama-dynamic"))(ids, past_key_values=CSKVStaticCache(60))
    changed = lossy(make_model())
    changed.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attention implementation was changed"):
        changed(ids, past_key_values=CSKVStaticCache(60))

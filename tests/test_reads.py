"""What queries read of old tokens, against the model's own attention, and against loops over queries and tokens."""

import weakref

import pytest
import torch
from conftest import FAMILIES, OTHERS, make_model, prompt

import cskv_hf.reads as reads
from cskv_hf import CSKVConfig, collect_statistics
from cskv_hf.config import num_key_groups
from cskv_hf.decompose import relative_error
from cskv_hf.fitting import error_weights, layer_bases, layer_report
from cskv_hf.reads import ReadMoments, change_of_reads, exact_tokens, read_moments, sampled_queries, states_read
from cskv_hf.statistics import READS

SINKS, RECENT = 3, 7


@pytest.fixture(autouse=True)
def few_exact_tokens(monkeypatch):
    monkeypatch.setattr(reads, "exact_tokens", lambda length, *_: (SINKS, RECENT))


@torch.no_grad()
def states_of(model, layer_idx, ids, keep=None):
    """Per row, the states of a layer and what its `o_proj` got."""
    seen = []
    attention = model.model.layers[layer_idx].self_attn
    with states_read(attention, lambda *read: seen.append(read), lambda: keep):
        model(ids, attention_mask=None if keep is None else keep.long())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in attention.modules())
    return seen


def weights_of(model, layer_idx, ids):
    """The model's own, of one row, (num_key_value_heads, query heads of each, length, length)."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions[layer_idx][0]
    return weights.unflatten(0, (model.config.num_key_value_heads, -1))


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_states_make_the_attention_of_the_model(family):
    """From them follows what `o_proj` reads, for every row and wherever its padding is."""
    model, ids = make_model(family), prompt(3, 40)
    keep = torch.ones(3, 40, dtype=torch.bool)
    keep[0, :9] = keep[2, 33:] = False
    for real in (None, keep):
        for row, (states, output) in enumerate(states_of(model, 1, ids, real)):
            assert states.row == row and states.length == (40 if real is None else int(real[row].sum()))
            everything = torch.arange(states.length)
            weights = states.scores(everything, states.key_states).softmax(-1)
            attended = (weights @ states.value_states[:, None]).flatten(0, 1).transpose(0, 1).flatten(1)
            torch.testing.assert_close(attended, output)


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_the_definition(family, monkeypatch):
    """Sums over queries, heads and tokens one by one, with the model's own attention weights. Those of queries, which
    are drawn, come near with many draws."""
    monkeypatch.setattr(reads, "DRAWS", 3000)
    model, ids = make_model(family), prompt(1, 24)
    ((states, _),) = states_of(model, 1, ids)
    weights = weights_of(model, 1, ids)
    queries = torch.tensor([12, 17, 23])
    measured = read_moments(states, queries, torch.Generator().manual_seed(0))
    keys, values = (t.transpose(0, 1).flatten(1) for t in (states.key_states, states.value_states))
    expected = ReadMoments(*map(torch.zeros_like, measured))
    for q in queries.tolist():
        for g in range(len(states.key_states)):
            for h, weight in enumerate(weights[g, :, q]):
                read = torch.zeros(values.shape[1] + 1, dtype=values.dtype)
                for t in range(SINKS, q - RECENT + 1):
                    key = torch.cat([keys[t], keys.new_ones(1)])
                    expected.keys.add_(weight[t] * torch.outer(key, key))
                    own = torch.cat([states.key_states[g, t], keys.new_ones(1)])
                    expected.head_keys[g] += weight[t] * torch.outer(own, own)
                    read += weight[t] * torch.cat([values[t], values.new_ones(1)])
                    expected.squares.add_(weight[t] ** 2)
                    query = as_the_key_meets_it(states, g, h, q, t)
                    expected.queries[g] += weight[t] * torch.outer(query, query)
                expected.values.add_(torch.outer(read, read))
    for name in ("keys", "head_keys", "values", "squares"):
        total, sums = getattr(measured, name), getattr(expected, name)
        rounding = 1e-6 * float(sums.abs().max())  # of the model's weights, to float32
        torch.testing.assert_close(total, sums, rtol=0, atol=rounding)
    difference = (measured.queries - expected.queries).flatten(1).norm(dim=1)
    assert (difference < 0.05 * expected.queries.flatten(1).norm(dim=1)).all()
    torch.testing.assert_close(
        measured.queries.diagonal(dim1=1, dim2=2).sum(),
        expected.queries.diagonal(dim1=1, dim2=2).sum(),
        rtol=1e-5,
        atol=0,
    )  # turning keeps lengths, whatever is drawn


def as_the_key_meets_it(states, group, head, query, token):
    """Its product with any key before RoPE at `token` is their score, found by asking for the scores of all unit
    vectors."""
    head_dim, found = states.key_states.shape[2], []
    for channel in range(head_dim):
        unit = torch.zeros_like(states.key_states)
        unit[:, token, channel] = 1
        found.append(states.scores(torch.tensor([query]), unit)[group, head, 0, token] / states.scaling)
    return torch.stack(found)


@pytest.mark.parametrize("family", ["llama", "llama-yarn", "mistral-sliding", "qwen3"])
def test_change_of_reads_is_that_of_the_definition(family):
    """Attention with other keys or values in old places, token by token; exactly nothing where they are the same, and
    where no token is old."""
    model, ids = make_model(family), prompt(1, 24)
    ((states, output),) = states_of(model, 1, ids)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(states.key_states.shape, generator=generator, dtype=states.key_states.dtype)
    keys, values = states.key_states + noise, states.value_states - noise
    everything = torch.arange(states.length)
    exact, other = (states.scores(everything, k) for k in (states.key_states, keys))
    for given in (dict(key_states=keys), dict(value_states=values), dict(key_states=keys, value_states=values)):
        expected = torch.zeros_like(states.by_kv_head(output.unflatten(1, (-1, noise.shape[2])).transpose(0, 1)))
        for q in range(states.length):
            old = [SINKS <= t <= q - RECENT for t in range(states.length)]
            scores = exact[:, :, q].clone()
            if "key_states" in given:
                scores[..., old] = other[:, :, q][..., old]
            weights = scores.softmax(-1)
            for t in range(q + 1):
                read = values if old[t] and "value_states" in given else states.value_states
                expected[:, :, q] += weights[..., t, None] * read[:, None, t]
        expected = expected.flatten(0, 1).transpose(0, 1).flatten(1)
        torch.testing.assert_close(output + change_of_reads(states, SINKS, RECENT, **given), expected)
        assert not change_of_reads(states, states.length, RECENT, **given).any()
        assert not change_of_reads(states, SINKS, states.length, **given).any()
    same = dict(key_states=states.key_states, value_states=states.value_states)
    assert not change_of_reads(states, SINKS, RECENT, **same).any()


def test_the_loss_of_the_fit_is_what_outputs_lose(monkeypatch):
    """Of values, with one head: the energy that a fit says is lost is that of the change of what `o_proj` puts out,
    summed over the queries that were asked."""
    monkeypatch.setattr("cskv_hf.statistics.UNREAD_SHARE", 0.0)
    model, ids = make_model(num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1), prompt(1, 640)
    statistics = collect_statistics(model, [ids], recall=False, progress=False)
    attention = model.model.layers[0].self_attn
    _, values = layer_bases(attention, statistics, 0, CSKVConfig(), 1)
    kept = values.cut([3])
    ((states, _),) = states_of(model, 0, ids)
    rebuilt = (states.value_states[0] - kept.mean) @ kept.A.mT @ kept.B.mT + kept.mean
    change = change_of_reads(states, SINKS, RECENT, value_states=rebuilt[None])
    queries = sampled_queries(640, torch.Generator().manual_seed(0))
    lost = (change[queries] @ attention.o_proj.weight.mT).square().sum()
    mass = statistics.read_value_moment[0, -1, -1]
    torch.testing.assert_close(lost / mass, values.spectrum[3:].sum(), rtol=1e-5, atol=0)  # M is damped


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (8, 4), (8, 1)])
def test_rounding_is_what_noise_costs(heads, kv_heads, monkeypatch):
    """Of values: noise of unit variance in one latent channel, of every token its own, changes what `o_proj` puts out
    by the channel's `rounding` on average, in the unit of the spectrum; with several heads, where the moments are of
    all query heads together, nearly so."""
    monkeypatch.setattr("cskv_hf.statistics.UNREAD_SHARE", 0.0)
    monkeypatch.setattr("cskv_hf.fitting.falling", lambda energies: energies)  # of each channel by itself
    sizes = dict(num_attention_heads=heads, num_key_value_heads=kv_heads, num_hidden_layers=1)
    model, ids = make_model(**sizes), prompt(1, 640)
    statistics = collect_statistics(model, [ids], recall=False, progress=False)
    attention = model.model.layers[0].self_attn
    _, values = layer_bases(attention, statistics, 0, CSKVConfig(), 1)
    ((states, _),) = states_of(model, 0, ids)
    queries = sampled_queries(640, torch.Generator().manual_seed(0))
    generator, turns = torch.Generator().manual_seed(1), 100
    for channel in (0, 5):
        cost = 0.0
        for _turn in range(turns):
            noise = torch.randn(640, 1, generator=generator, dtype=values.B.dtype) * values.B[:, channel]
            noise = noise.unflatten(1, (kv_heads, -1)).transpose(0, 1)
            noisy = states.value_states + noise
            change = change_of_reads(states, SINKS, RECENT, value_states=noisy, queries=queries)
            cost += float((change @ attention.o_proj.weight.detach().mT).square().sum()) / turns
        cost /= float(statistics.read_value_moment[0, -1, -1]) / heads
        assert cost == pytest.approx(float(values.rounding[channel]), rel=0.1)
    share = statistics.read_concentration(0)
    assert 1 / 640 < share < 0.5


def test_rows_without_reads_count_for_nothing():
    """A row of padding, and one of a single token, beside a real one."""
    model, ids = make_model(), prompt(3, 40)
    mask = torch.ones_like(ids)
    mask[1], mask[2, 1:] = 0, 0
    alone = collect_statistics(model, [ids[:1]], progress=False)
    batch = collect_statistics(model, [{"input_ids": ids, "attention_mask": mask}], progress=False)
    for name in READS:
        torch.testing.assert_close(getattr(batch, name), getattr(alone, name))


def test_attention_that_goes_another_way_is_refused():
    """Where `o_proj` is no longer called, nothing would be known of reads, and every layer be worth the same."""
    model = make_model(num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    forward = attention.o_proj.forward
    attention.o_proj.forward = None
    attention.forward = lambda hidden_states, **kwargs: (forward(attention.q_proj(hidden_states)), None)
    for samples in ([prompt(1, 40)], [prompt(1, 40)] * 2):
        with pytest.raises(ValueError, match=r"Layer 0 \(LlamaAttention\) does not call its `o_proj`.*without fused"):
            collect_statistics(model, samples, progress=False)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_nothing_is_held_between_forwards():
    """Queries, keys and values of all layers at once would be a multiple of what a forward takes."""
    model, held = make_model(), []
    attention = model.model.layers[0].self_attn
    with states_read(attention, lambda states, output: held.append(weakref.ref(states.value_states))), torch.no_grad():
        hook = attention.v_proj.register_forward_hook(lambda m, args, output: held.append(weakref.ref(output)))
        model(prompt(1, 40))
        hook.remove()
        assert len(held) == 2 and not any(reference() is not None for reference in held)


@pytest.mark.parametrize("layout", ["head", "group:2", "joint"])
def test_the_spectrum_of_keys_is_what_dropping_them_costs(layout):
    """On the moments that a layout is fitted to, which are those of its report: of a head alone, or of all."""
    model, ids = make_model(), prompt(4, 200)
    statistics = collect_statistics(model, [ids], progress=False)
    attention, config = model.model.layers[1].self_attn, CSKVConfig(key_layout=layout)
    num_groups = num_key_groups(layout, 4)
    keys, values = layer_bases(attention, statistics, 1, config, num_groups)
    moments = statistics.read_key_moments(1, by_head=layout == "head")
    weight, _ = error_weights(attention, statistics, 1)
    total = float((weight * moments.second).sum())
    assert (keys.spectrum >= 0).all() and float(keys.spectrum.sum()) < total  # the mean's share is left to a constant
    kept = keys.cut([3] * num_groups)
    lost = relative_error(kept, moments.second, weight, moments.first) * total
    assert lost == pytest.approx(float(keys.spectrum.sum() - kept.spectrum.sum()), rel=1e-4)
    config.key_ranks, config.value_ranks = [list(kept.ranks)] * 2, [4, 4]
    report = layer_report(attention, statistics, 1, config, kept, values.cut([4]))
    assert report.key_attention_error == pytest.approx(lost / total)


def test_without_sinks_all_tokens_count_alike():
    """Reads leave the first tokens out, which such an adapter compresses."""
    model, ids = make_model(), prompt(2, 64)
    statistics = collect_statistics(model, [ids], progress=False)
    attention = model.model.layers[0].self_attn
    for sinks, expected in ((4, statistics.read_value_moments(0)), (0, statistics.value_moments(0))):
        _, values = layer_bases(attention, statistics, 0, CSKVConfig(sinks=sinks), 4)
        torch.testing.assert_close(values.mean, expected.first)


def test_what_is_asked():
    """Of a row of n tokens, n / 32 queries that some old token comes before; the same for the same seed."""
    for length, count in ((0, 0), (10, 0), (11, 1), (32, 1), (33, 2), (2048, 64)):
        asked = sampled_queries(length, torch.Generator().manual_seed(3))
        assert len(asked) == count and torch.equal(asked, asked.unique())
        assert count == 0 or SINKS + RECENT <= int(asked.min()) <= int(asked.max()) < length
        assert torch.equal(asked, sampled_queries(length, torch.Generator().manual_seed(3)))


def test_short_samples_have_old_tokens_too():
    """At most a quarter counts as recent and a sixteenth as sinks, at least the token itself as recent."""
    assert exact_tokens(2048) == exact_tokens(192) == (4, 48)
    assert exact_tokens(64) == (4, 16) and exact_tokens(64, sinks=0, recent=4) == (0, 4)
    assert exact_tokens(8) == (0, 2) and exact_tokens(1) == (0, 1)

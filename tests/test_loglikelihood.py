"""Scores of continuations with a compressed past: equal to the definition, whatever is batched with what."""

import pytest
import torch
from conftest import lossless, lossy, make_model, prompt
from reference import Reference
from transformers import DynamicCache

from cskv_hf import CSKVCache
from cskv_hf.evaluate.baselines import WindowOnlyCache
from cskv_hf.evaluate.loglikelihood import Row, batches, collect_rows, score_rows

LENGTHS = (61, 30, 47, 61)


def pairs():
    """(context, continuation) of different lengths; the last continuation is one token."""
    texts = [prompt(1, length, seed=length + i)[0].tolist() for i, length in enumerate(LENGTHS)]
    return [(text[:-cut], text[-cut:]) for text, cut in zip(texts, (20, 3, 9, 1))]


def scores(model, pairs, make_cache, batch_size=4, **settings):
    rows, row_of = collect_rows(pairs, 1000)
    found = {}
    for batch in batches(rows, batch_size):
        found |= zip(batch, score_rows(model, [rows[i] for i in batch], make_cache, **settings))
    return [found[row].of(continuation) for row, (_, continuation) in zip(row_of, pairs)]


def from_logits(logits, continuation):
    """By definition: of logits (tokens, vocab) behind all tokens but the last of context and continuation."""
    logits, targets = logits[-len(continuation) :], torch.tensor(continuation)
    likelihood = logits.log_softmax(-1)[torch.arange(len(targets)), targets].sum()
    return float(likelihood), bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("stride", [1, 7, 16])
def test_lossy_scores_equal_the_definition(stride):
    """A padded batch against one row, one token and one head at a time, with the text given in the same steps."""
    model = lossy(make_model())
    expected = []
    for context, continuation in pairs():
        reference = Reference(model.get_base_model(), "default", 8, 3, 4)
        pieces = torch.tensor(context + continuation)[:-1].split(stride)
        expected.append(from_logits(torch.cat([reference.forward(piece) for piece in pieces]), continuation))
        assert reference.num_old > 8  # else this would show nothing
    actual = scores(model, pairs(), CSKVCache, stride=stride)
    assert [a for a, _ in actual] == pytest.approx([e for e, _ in expected], abs=1e-9)
    assert [g for _, g in actual] == [g for _, g in expected]
    full = scores(model, pairs(), DynamicCache, stride=stride)
    assert all(abs(a - f) > 1e-3 for (a, _), (f, _) in zip(actual, full))


@pytest.mark.parametrize("make_cache", [DynamicCache, CSKVCache])
def test_lossless_scores_equal_one_forward(make_cache):
    model = lossless(make_model())
    actual = scores(model, pairs(), make_cache, stride=5)
    for (context, continuation), (value, greedy) in zip(pairs(), actual):
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation])[:, :-1]).logits[0]
        assert (value, greedy) == (pytest.approx(from_logits(logits, continuation)[0], abs=1e-9), greedy)


@pytest.mark.parametrize("make_cache", [CSKVCache, lambda: WindowOnlyCache(8, 3), DynamicCache])
def test_scores_do_not_depend_on_the_batch(make_cache):
    """Padding comes after a row's last token, so a row's cache never saw it when the row is scored."""
    model = lossy(make_model(), bits=4, compression=0.7, block_size=8)
    alone, together = (scores(model, pairs(), make_cache, batch_size, stride=6) for batch_size in (1, 4))
    assert [v for v, _ in alone] == pytest.approx([v for v, _ in together], abs=1e-9)


def test_greedy_continuations_are_known():
    """What greedy decoding over the full cache writes is greedy; with another last token it is not."""
    model, context = make_model(), prompt(1, 40)
    written = model.generate(context, max_new_tokens=6, do_sample=False)[0, 40:].tolist()
    other = written[:-1] + [2 + (written[-1] - 1) % 80]
    changed = [2 + (written[0] - 1) % 80] + written[1:]
    asked = [(context[0].tolist(), c) for c in (written, other, changed, written[:1])]
    assert [g for _, g in scores(model, asked, DynamicCache, stride=8)] == [True, False, False, True]


def test_one_token_choices_share_a_row():
    context = [5, 6, 7]
    rows, row_of = collect_rows([(context, [8]), (context, [9]), (context[:2], [7, 9]), (context, [8, 9])], 100)
    assert rows == [Row((5, 6, 7), 1, (8, 9)), Row((5, 6, 7, 8), 2, (9,))] and row_of == [0, 0, 0, 1]
    actual = scores(make_model(), [(context, [8]), (context, [9]), (context[:2], [7, 9])], DynamicCache)
    alone = [
        scores(make_model(), [pair], DynamicCache)[0]
        for pair in ((context, [8]), (context, [9]), (context[:2], [7, 9]))
    ]
    assert [a for a, _ in actual] == pytest.approx([a for a, _ in alone], abs=1e-12)


def test_rows():
    (row,), _ = collect_rows([(list(range(10, 20)), [20, 21])], 5)  # left-truncated: 5 are read, a sixth is scored
    assert row == Row((16, 17, 18, 19, 20), 3, (21,))
    for context, continuation in (([], [1]), ([1], []), ([1], [1] * 6)):
        with pytest.raises(ValueError, match="Request 0 has a context of"):
            collect_rows([(context, continuation)], 5)
    rows = [Row((1,) * n, 0, (1,)) for n in (3, 5, 5, 4, 5)]
    assert list(batches(rows, 2)) == [[1, 2], [4, 3], [0]]
    assert list(batches(rows, 2, same_length=True)) == [[1, 2], [4], [3], [0]]

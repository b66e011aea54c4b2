"""Random sequences of everything that can happen to a cache, against `DynamicCache` and against the slow reference.

Lossless factors: after any sequence the logits equal those over a `DynamicCache` that lived through the same. Lossy
ones, plain and packed, also with latents on the CPU: they equal those of the other attention path on a cache that
lived through the same, and, for sequences without row operations, those of the reference written from the definition.
"""

import copy
import pickle
import tempfile

import pytest
import torch
from conftest import lossless, lossy, make_model
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from reference import Reference
from transformers import DynamicCache

from cskv_hf import CSKVCache, tokens

MODELS = {}
ROLLBACK = 8  # tokens that a crop may always take; few, so that layers with a sliding window drop much


def model_of(kind):
    """Made once: a plain lossless, a plain lossy and a packed lossy adapter on the same model, a lossless one on a
    model one of whose layers drops what is beyond its sliding window."""
    if kind not in MODELS:
        make = {
            "lossless": lambda: lossless(make_model()),
            "lossy": lambda: lossy(make_model()),
            "packed": lambda: lossy(make_model(), compression=0.75, bits=None, allocation=None, block_size=8),
            "offloaded": lambda: model_of("packed"),
            "sliding": lambda: lossless(make_model("qwen2-mixed", sliding_window=16)),
        }
        MODELS[kind] = make[kind]()
    return MODELS[kind]


class Life(RuleBasedStateMachine):
    """One cache and its twin, and the tokens they hold, row by row."""

    kind = "lossless"

    @initialize(rows=st.integers(1, 3), padding=st.integers(0, 5), seed=st.integers(0, 10**6))
    def begin(self, rows, padding, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.model = model_of(self.kind)
        self.cache, self.longest = CSKVCache(offloading=self.kind == "offloaded"), 0
        self.twin = self._new_twin()
        self.mask = torch.zeros(rows, 0, dtype=torch.long)
        self.deltas = []
        new = torch.ones(rows, 20, dtype=torch.long)
        new[0, :padding] = 0
        self._append(20, new)

    def _new_twin(self):
        return DynamicCache() if self.kind in ("lossless", "sliding") else CSKVCache(materialize=True)

    def _append(self, count, new_mask=None):
        rows = len(self.mask)
        ids = torch.randint(2, 89, (rows, count), generator=self.generator)
        new_mask = torch.ones(rows, count, dtype=torch.long) if new_mask is None else new_mask
        self.mask = torch.cat([self.mask, new_mask], dim=1)
        self.longest = max(self.longest, self.mask.shape[1])
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -count:]
        with torch.no_grad():
            logits = [
                self.model(
                    ids, attention_mask=self.mask, position_ids=positions, past_key_values=cache, use_cache=True
                ).logits
                for cache in (self.cache, self.twin)
            ]
        real = new_mask.bool()
        torch.testing.assert_close(logits[0][real], logits[1][real], atol=1e-8, rtol=1e-8)

    @rule(count=st.integers(1, 13))
    def append(self, count):
        self._append(count)

    @precondition(lambda self: self.mask.shape[1] > 8)
    @rule(count=st.integers(1, 30))
    def crop(self, count):
        count = min(count, self.mask.shape[1] - 7)  # so that some token is left in every row
        try:
            self.cache.crop(-count)
        except ValueError as refusal:
            assert "have dropped what lies beyond it" in str(refusal)
            assert self.kind == "sliding" and self.longest - (self.mask.shape[1] - count) > ROLLBACK
            return
        self.twin.crop(-count)
        self.mask = self.mask[:, :-count]

    @rule(data=st.data())
    def reorder(self, data):
        rows = len(self.mask)
        index = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows)))
        self.cache.reorder_cache(index)
        self.twin.reorder_cache(index)
        self.mask = self.mask[index]

    @precondition(lambda self: len(self.mask) <= 2)
    @rule(repeats=st.integers(2, 3))
    def repeat(self, repeats):
        self.cache.batch_repeat_interleave(repeats)
        self.twin.batch_repeat_interleave(repeats)
        self.mask = self.mask.repeat_interleave(repeats, 0)

    @precondition(lambda self: len(self.mask) >= 2)
    @rule(data=st.data())
    def select(self, data):
        kept = data.draw(st.sets(st.integers(0, len(self.mask) - 1), min_size=1))
        index = torch.tensor(sorted(kept))
        self.cache.batch_select_indices(index)
        self.twin.batch_select_indices(index)
        self.mask = self.mask[index]

    @rule(way=st.sampled_from(["deepcopy", "pickle", "file", "offload"]))
    def move(self, way):
        if way == "deepcopy":
            self.cache = copy.deepcopy(self.cache)
        elif way == "pickle":
            self.cache = pickle.loads(pickle.dumps(self.cache))
        elif way == "offload":
            for layer in self.cache.layers:
                layer.offload()
                layer.prefetch()
        else:
            with tempfile.TemporaryDirectory() as folder:
                self.cache.save(f"{folder}/cache")
                self.cache = CSKVCache.load(f"{folder}/cache", offloading=self.cache.offloading)

    @rule()
    def reset(self):
        self.cache.reset()
        self.twin, self.longest = self._new_twin(), 0
        self.mask = self.mask[:, :0]
        self._append(9)

    @invariant()
    def counts_agree(self):
        if not hasattr(self, "mask"):
            return
        assert self.cache.get_seq_length() == self.mask.shape[1] == self.twin.get_seq_length()
        assert all(layer.num_slots == self.mask.shape[1] for layer in self.cache.layers)


@pytest.mark.parametrize("kind", ["lossless", "lossy", "packed", "offloaded", "sliding"])
def test_any_life_of_a_cache(kind, monkeypatch):
    monkeypatch.setattr(tokens, "ROLLBACK_TOKENS", ROLLBACK)
    machine = type("Life_" + kind, (Life,), {"kind": kind})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25, stateful_step_count=12, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["lossy", "packed"])
def test_random_appends_against_the_reference(kind):
    """Random lengths of random turns, one row: the definition decides."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        model = model_of(kind)
        turns = torch.randint(1, 14, (9,), generator=generator).tolist()
        ids = torch.randint(2, 89, (1, sum(turns)), generator=generator)
        block = model.peft_config["default"].block_size
        reference, cache, start = Reference(model.get_base_model(), "default", 8, 3, block), CSKVCache(), 0
        for length in turns:
            piece = ids[:, start : start + length]
            with torch.no_grad():
                actual = model(piece, past_key_values=cache, use_cache=True).logits[0]
            torch.testing.assert_close(actual, reference.forward(piece[0]), atol=1e-9, rtol=1e-9)
            start += length
        assert cache.tokens.num_old == reference.num_old

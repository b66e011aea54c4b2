"""Latents that turn with their tokens: what a RoPE-commuting layout of the keys costs and saves.

    python benchmarks/rope_layout.py --train DIR           make a model with 8 KV heads that retrieves lines
    python benchmarks/rope_layout.py DIR/model lines       accuracy: line retrieval, and text it has not seen
    python benchmarks/rope_layout.py MODEL TEXT            accuracy on any text, as quality.py takes it
    python benchmarks/rope_layout.py --speed               a decode step of a layer of Llama-3.1-8B's sizes

The pair of channels that RoPE turns at frequency f is, in KV head h, one complex number z[h, f], and RoPE multiplies
it by exp(i position inv_freq[f]). A complex-linear map across the heads of one frequency commutes with that, so its
latents can be stored turned; the query takes in the map's adjoint once per step, and attention is multi-query
attention over one latent that all heads share: no key is ever rebuilt. The price is that nothing is shared between
frequencies, nor between the two channels of a pair. *still* also mixes, as real channels of the turned keys, the
frequencies that turn by less than ``--still`` radians within the context.

Keys only, unquantised, outside a window and sinks as in a CSKVCache; values are exact. Every layout has the same
number of real channels in every layer and is about the mean: of the keys before RoPE, so that a cache of turned
latents adds the query against the turned mean, which is a table of cos and sin that all layers share.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from common import RandomStates, Setting, Sizes, copy_bandwidth, machine, median_seconds, planned, rotary
from decode import compressed_cache, full_caches, print_table
from quality import Bench
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from cskv_hf import KVStatistics, ModelShape, collect_statistics
from cskv_hf.decompose import centred, key_weight, optimal_factors
from cskv_hf.demo import run as demo
from cskv_hf.demo.train_model import Recipe, Run, train
from cskv_hf.evaluate.divergence import compare_with_full_cache
from cskv_hf.evaluate.intervals import wilson_interval
from cskv_hf.evaluate.lines import LineRecord, line_retrieval
from cskv_hf.families import decoder_of
from cskv_hf.rope import RotaryFrequencies, cos_sin, rotate

# As many channels of keys as of the hidden state. With a theta of 10,000 a quarter of the frequencies is still within
# 320 tokens, the share that is within 8,192 in Llama-3.1-8B. Random weights are smaller than the bundled model's, for
# there are more of them around the wired circuit.
TRAINED = dict(
    hidden_size=256, intermediate_size=512, num_attention_heads=8, num_key_value_heads=8, head_dim=32,
    initializer_range=0.01, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)  # fmt: skip
LAYOUTS = "joint", "head", "rope", "still"
SETTINGS = Setting(0.8, "head", 16), Setting(0.8, "joint", 16)
EXACT = 36 + 16  # tokens a CSKVCache holds exactly, on average: sinks, window, and half a block


@torch.no_grad()
def spread_circuit(model: nn.Module) -> None:
    """Wire all heads of layer 1 as `wire_induction` wires the first two, each with a random rotation of its codes.

    The wired model uses two heads, which is easy on layouts with a basis per head; this one uses all of them for the
    same, in different channels, which is easy on a joint basis only.
    """
    attention, dim = model.model.layers[1].self_attn, model.config.head_dim
    heads, half = model.config.num_attention_heads, dim // 2
    slow = torch.cat([torch.arange(half - 6, half), torch.arange(dim - 6, dim)])
    q, k, v = (p.weight.view(heads, dim, -1) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    o = attention.o_proj.weight.view(-1, heads, dim)
    for head in reversed(range(heads)):
        rotation = torch.linalg.qr(torch.randn(len(slow), len(slow)))[0]
        for weight in (q, k):
            weight[head] = weight[head % 2]
            weight[head, slow] = rotation @ weight[head % 2, slow]
        v[head], o[:, head] = v[head % 2], o[:, head % 2] * 2 / heads


@dataclass(frozen=True)
class Moments:
    """What a layout is made of, in one layer, float64.

    Attributes:
        covariance: (kv_dim, kv_dim) of the keys before RoPE.
        mean: (kv_dim,).
        weight: (kv_dim,) of an error: the energy of the queries, equal on the two channels of a pair.
    """

    covariance: torch.Tensor
    mean: torch.Tensor
    weight: torch.Tensor
    num_heads: int

    @classmethod
    def of(cls, statistics: KVStatistics, layer_idx: int) -> Moments:
        tokens = statistics.num_tokens
        mean = statistics.key_sum[layer_idx] / tokens
        weight = key_weight(statistics.query_moment[layer_idx] / tokens).diagonal()
        floor = 1e-6 * weight.mean()  # as DAMPING in decompose.py
        heads = statistics.model_shape["num_key_value_heads"]
        return cls(centred(statistics.key_moment[layer_idx] / tokens, mean), mean, weight + floor, heads)

    def lost(self, residual: torch.Tensor) -> torch.Tensor:
        """Weighted energy of the error ``residual @ (k - mean)``."""
        return (self.weight[:, None] * residual * (residual @ self.covariance)).sum()


@dataclass(frozen=True)
class KeyMap:
    """What a layout gives back for a key k before RoPE, R being RoPE: ``R (before (k - mean) + mean)``, and besides
    ``after R (k - mean)``.

    Attributes:
        before, after: (kv_dim, kv_dim).
        channels: real numbers stored per token.
        lost: share of the keys' weighted energy about the mean.
    """

    before: torch.Tensor
    after: torch.Tensor
    mean: torch.Tensor
    channels: int
    lost: float

    def __call__(self, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Of turned keys (batch, heads, tokens, head_dim), cos and sin (tokens, head_dim / 2)."""

        def by_head(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(2, (keys.shape[1], -1)).transpose(1, 2)

        before, after, mean = (t.to(keys) for t in (self.before, self.after, self.mean))
        plain = rotate(keys, cos, -sin).transpose(1, 2).flatten(2) - mean
        still = rotate(by_head(plain), cos, sin).transpose(1, 2).flatten(2) @ after.mT
        return rotate(by_head(plain @ before.mT + mean), cos, sin) + by_head(still)


def grouped_map(moments: Moments, rank: int, num_groups: int) -> KeyMap:
    """The library's layouts: a real basis for all heads, or for each head with pooled ranks."""
    zero = torch.zeros_like(moments.mean)
    factors = optimal_factors(moments.covariance, rank, num_groups, torch.diag(moments.weight), zero)
    pairs = zip(factors.B.split(factors.ranks, dim=1), factors.A.split(factors.ranks))
    before = torch.block_diag(*(B @ A for B, A in pairs))
    lost = moments.lost(torch.eye(len(before)) - before) / (moments.weight @ moments.covariance.diagonal())
    return KeyMap(before, torch.zeros_like(before), moments.mean, rank, float(lost))


def complex_moments(covariance: torch.Tensor, num_heads: int) -> torch.Tensor:
    """E[z zᴴ] over the heads of every frequency, (head_dim / 2, heads, heads) complex."""
    by_pair = covariance.view(num_heads, 2, -1, num_heads, 2, covariance.shape[0] // num_heads // 2)
    same = by_pair.diagonal(dim1=2, dim2=5).permute(4, 1, 3, 0, 2)  # (frequencies, 2, 2, heads, heads)
    return torch.complex(same[:, 0, 0] + same[:, 1, 1], same[:, 1, 0] - same[:, 0, 1])


def as_real(maps: torch.Tensor) -> torch.Tensor:
    """Complex maps (head_dim / 2, heads, heads) as one real map of (kv_dim,) keys."""
    half, heads, _ = maps.shape
    real, f = torch.zeros(heads, 2, half, heads, 2, half, dtype=maps.real.dtype), torch.arange(half)
    real[:, 0, f, :, 0, f] = real[:, 1, f, :, 1, f] = maps.real
    real[:, 1, f, :, 0, f], real[:, 0, f, :, 1, f] = maps.imag, -maps.imag
    return real.view(2 * half * heads, -1)


def turned_covariance(moments: Moments, frequencies: RotaryFrequencies, context: int) -> torch.Tensor:
    """The covariance of keys after RoPE, averaged over the positions of the context."""
    positions = torch.linspace(0, context - 1, 64).round().long()
    values, vectors = torch.linalg.eigh(moments.covariance)
    rows = (vectors * values.clamp_min(0.0).sqrt()).mT.unflatten(1, (moments.num_heads, 1, -1))
    turned = rotate(rows, *cos_sin(positions, frequencies, torch.float64)).permute(2, 0, 1, 3).flatten(2)
    return (turned.mT @ turned).mean(0)


def commuting_map(
    moments: Moments, rank: int, frequencies: RotaryFrequencies, context: int, still_below: float = 0.0
) -> KeyMap:
    """Complex channels, the ranks of the frequencies pooled by energy; and real ones of all the frequencies that turn
    by less than `still_below` within the context, pooled with them by energy per number stored."""
    half = len(moments.mean) // moments.num_heads // 2
    still = frequencies.inv_freq.double() * context < still_below
    root = moments.weight.sqrt()
    complex_root = root.view(moments.num_heads, 2, half)[:, 0].mT  # (frequencies, heads)
    hermitian = complex_moments(moments.covariance, moments.num_heads)
    energies, vectors = torch.linalg.eigh(complex_root[:, :, None] * hermitian * complex_root[:, None])
    real = still.repeat(2 * moments.num_heads)  # of the channels of a key
    turned = turned_covariance(moments, frequencies, context)[real][:, real] * torch.outer(root[real], root[real])
    real_energies, real_vectors = torch.linalg.eigh(turned)

    turning = energies.masked_fill(still[:, None], -torch.inf).flatten()
    densities, left = torch.cat([turning / 2, real_energies]), rank
    kept = torch.zeros(len(densities), dtype=torch.bool)
    for channel in densities.argsort(descending=True).tolist():
        cost = 2 if channel < len(turning) else 1
        if densities[channel] > -torch.inf and cost <= left:
            kept[channel], left = True, left - cost
    chosen = kept[: energies.numel()].view_as(energies)
    maps = (vectors * chosen[:, None]) @ vectors.mH
    before = as_real(maps / complex_root[:, :, None] * complex_root[:, None])
    real_vectors = real_vectors[:, kept[energies.numel() :]]
    after = torch.zeros_like(before)
    after[real.outer(real)] = (real_vectors @ real_vectors.mT / root[real, None] * root[real]).flatten()
    lost = energies[~still][~chosen[~still]].sum() + real_energies[~kept[energies.numel() :]].sum()
    total = moments.weight @ moments.covariance.diagonal()
    return KeyMap(before, after, moments.mean, rank - left, float(lost / total))


def check_commutes(frequencies: RotaryFrequencies, heads: int, half: int) -> None:
    """In float64, that a complex map across heads and RoPE commute, and that both are what their definitions say."""
    maps = torch.randn(half, heads, heads, dtype=torch.complex128)
    keys = torch.randn(1, heads, 9, 2 * half, dtype=torch.float64)
    cos, sin = cos_sin(torch.arange(0, 900, 100), frequencies, torch.float64)

    def mapped(states: torch.Tensor) -> torch.Tensor:
        return (states.transpose(1, 2).flatten(2) @ as_real(maps).mT).unflatten(2, (heads, -1)).transpose(1, 2)

    z = torch.complex(*keys[0].chunk(2, dim=-1))
    slow = torch.stack([torch.stack([maps[f] @ z[:, t, f] for f in range(half)], -1) for t in range(9)], 1)
    slow = slow * torch.complex(cos, sin)
    first, second = mapped(rotate(keys, cos, sin)), rotate(mapped(keys), cos, sin)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)
    torch.testing.assert_close(first[0], torch.cat([slow.real, slow.imag], -1), rtol=0, atol=1e-12)


class RestoredCache(DynamicCache):
    """A full cache whose keys, once they have left the window, are what a layout gives back. It saves nothing.

    A prompt is read exactly, as with a CSKVCache. Positions are indices: no padding.
    """

    def __init__(self, maps: list[KeyMap], frequencies: RotaryFrequencies, window: int, sinks: int) -> None:
        super().__init__()
        self.maps, self.frequencies, self.window, self.done = maps, frequencies, window, [sinks] * len(maps)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        old = slice(self.done[layer_idx], self.get_seq_length(layer_idx) - self.window)
        if old.start < old.stop:
            keys = self.layers[layer_idx].keys[:, :, old]
            positions = torch.arange(old.start, old.stop, device=keys.device)
            keys.copy_(self.maps[layer_idx](keys, *cos_sin(positions, self.frequencies, keys.dtype)))
            self.done[layer_idx] = old.stop
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@dataclass(frozen=True)
class Data:
    """A model and what it is measured on.

    Attributes:
        text: (rows, length) token ids.
        records: of line retrieval; may be empty.
    """

    model: nn.Module
    tokenizer: Any
    statistics: KVStatistics
    text: torch.Tensor
    records: list[LineRecord]

    @classmethod
    def of(cls, args: argparse.Namespace) -> Data:
        if args.text != "lines":
            bench = Bench(args, recall=False)
            return cls(bench.model, bench.tokenizer, bench.fitting.statistics, bench.text[: args.rows], bench.records)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        calibration = demo.calibration_data(tokenizer, num_lines=args.lines)
        text = demo.evaluation_text(tokenizer, args.length)
        text = text[torch.randperm(len(text), generator=torch.Generator().manual_seed(0))[: args.rows]]
        records = demo.evaluation_records(args.records, num_lines=args.lines)
        if len({len(tokenizer(r.text)["input_ids"]) for r in records}) > 1:
            raise SystemExit("Records are of different lengths in tokens; RestoredCache knows no padding.")
        return cls(model, tokenizer, collect_statistics(model, calibration, recall=False), text, records)

    def measure(self, make_cache: Callable[[], DynamicCache]) -> dict[str, float]:
        result = compare_with_full_cache(self.model, self.text, make_cache)
        low, high = result.compressed.ratio_interval(result.full)
        row = {"ratio": result.ratio, "ratio_low": low, "ratio_high": high, "kl": result.kl}
        row |= {"perplexity": result.compressed.value, "agreement": result.agreement}
        if self.records:
            found = line_retrieval(self.model, self.tokenizer, self.records, make_cache)
            low, high = wilson_interval(found.correct, found.total)
            row |= {"accuracy": found.value, "accuracy_low": low, "accuracy_high": high, "questions": found.total}
        return row


def layer_maps(data: Data, layout: str, share: float, args: argparse.Namespace) -> list[KeyMap]:
    shape = ModelShape(**data.statistics.model_shape)
    frequencies, rank = frequencies_of(data.model), round(share * shape.kv_dim)
    moments = [Moments.of(data.statistics, i) for i in range(shape.num_hidden_layers)]
    if layout in ("joint", "head"):
        return [grouped_map(m, rank, 1 if layout == "joint" else m.num_heads) for m in moments]
    still = args.still if layout == "still" else 0.0
    return [commuting_map(m, rank, frequencies, args.length, still) for m in moments]


def frequencies_of(model: nn.Module) -> RotaryFrequencies:
    embedding = decoder_of(model).rotary_emb
    return RotaryFrequencies(embedding.inv_freq, embedding.attention_scaling)


def accuracy(args: argparse.Namespace) -> list[dict]:
    """One row per layout and share of the channels kept, the full cache first."""
    data = Data.of(args)
    shape, frequencies = ModelShape(**data.statistics.model_shape), frequencies_of(data.model)
    check_commutes(frequencies, shape.num_key_value_heads, shape.head_dim // 2)
    still = int((frequencies.inv_freq * args.length < args.still).sum())
    print(
        f"{args.model}: {shape.num_hidden_layers} layers, {shape.num_key_value_heads} KV heads x {shape.head_dim}, "
        f"{still} of {shape.head_dim // 2} frequencies turn by less than {args.still} within {args.length} tokens\n"
        f"{data.text.numel():,} tokens in rows of {data.text.shape[1]}, {len(data.records)} records of line retrieval"
    )
    header = f"{'kept':<7}{'layout':<8}{'channels':>9}{'energy lost':>13}{'perplexity':>12}{'':>9}{'KL':>10}"
    print(f"\n{header}   retrieval" if data.records else f"\n{header}")
    rows = []
    for share in (1.0, *args.shares):
        for layout in LAYOUTS if share < 1 else ("full",):
            maps = layer_maps(data, layout, share, args) if share < 1 else []

            def make_cache(maps=maps) -> DynamicCache:
                return RestoredCache(maps, frequencies, args.window, args.sinks) if maps else DynamicCache()

            channels = maps[0].channels if maps else shape.kv_dim
            lost = sum(m.lost for m in maps) / max(1, len(maps))
            rows.append({"share": share, "layout": layout, "channels": channels, "lost": lost})
            rows[-1] |= data.measure(make_cache)
            print_row(rows[-1])
    return rows


def print_row(row: dict[str, Any]) -> None:
    line = f"{100 * row['share']:<7g}{row['layout']:<8}{row['channels']:>9}{100 * row['lost']:>11.3f} %"
    line += f"{row['ratio']:>12.4f} ±{(row['ratio_high'] - row['ratio_low']) / 2:.4f}{row['kl']:>11.5f}"
    if "accuracy" in row:
        line += f"   {row['accuracy']:.3f} ({row['accuracy_low']:.3f} to {row['accuracy_high']:.3f})"
    print(line, flush=True)


class TurnedLatents:
    """A layer's cache in the layout: turned complex latents of keys, as (re..., im...), joint latents of values, and
    `EXACT` tokens; random, and full. `attend` is what a decode step computes."""

    def __init__(self, sizes: Sizes, ranks: tuple[int, int], states: RandomStates, length: int, means: bool) -> None:
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=states.device, dtype=states.dtype)

        self.sizes, half, count = sizes, sizes.head_dim // 2, ranks[0] // 2
        self.means = random(sizes.num_key_value_heads, sizes.head_dim) if means else None  # as (re..., im...)
        self.up = random(2, sizes.num_key_value_heads, count)  # of every complex channel, to the heads
        self.frequency = torch.arange(count, device=states.device) * half // count  # that a channel is of
        self.keys = random(states.batch, length - EXACT, 2 * count) / count**0.5
        self.values = random(states.batch, length - EXACT, ranks[1])
        self.value_up = random(sizes.num_key_value_heads, sizes.head_dim, ranks[1]) / ranks[1] ** 0.5
        self.exact_keys, self.exact_values = states(EXACT), states(EXACT)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.keys, self.values, self.exact_keys, self.exact_values))

    def absorbed(self, query: torch.Tensor, up: torch.Tensor, frequency: torch.Tensor | slice) -> torch.Tensor:
        """``conj(up) q`` of every complex channel and query head, (batch, heads, 2 * channels)."""
        re, im = (part[..., frequency] for part in query.chunk(2, dim=-1))  # (batch, KV heads, shared, channels)
        up_re, up_im = up[0][:, None], up[1][:, None]
        return torch.cat([re * up_re + im * up_im, im * up_re - re * up_im], -1).flatten(1, 2)

    def attend(self, query: torch.Tensor, turns: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attention of `query` (batch, heads, 1, head_dim) to everything; turns (tokens, head_dim), cos and sin of the
        old tokens, which all layers share."""
        by_kv_head = query.unflatten(1, (self.sizes.num_key_value_heads, -1))[..., 0, :] * scaling
        scores = self.absorbed(by_kv_head, self.up, self.frequency) @ self.keys.mT
        if self.means is not None:
            means = torch.stack(self.means.chunk(2, dim=-1))
            scores += self.absorbed(by_kv_head, means, slice(None)) @ turns.mT
        exact = (by_kv_head @ self.exact_keys.mT).flatten(1, 2)
        wide = torch.promote_types(query.dtype, torch.float32)
        weights = torch.cat([exact, scores], -1).softmax(-1, dtype=wide).to(query.dtype)
        exact, old = weights.split((EXACT, scores.shape[-1]), -1)
        values = exact.unflatten(1, by_kv_head.shape[1:3]) @ self.exact_values
        values = values + (old @ self.values).unflatten(1, by_kv_head.shape[1:3]) @ self.value_up.mT
        return values.flatten(1, 2)[:, :, None]

    def attend_slowly(self, query: torch.Tensor, turns: torch.Tensor, scaling: float) -> torch.Tensor:
        """The same from the definition: every old key and value is rebuilt."""
        heads = torch.arange(query.shape[1]) // (query.shape[1] // self.sizes.num_key_value_heads)
        half = self.sizes.head_dim // 2
        channels, up = torch.complex(*self.keys.chunk(2, dim=-1)), torch.complex(*self.up)
        old = torch.zeros(len(query), len(up), self.keys.shape[1], half, dtype=up.dtype)
        for channel, f in enumerate(self.frequency.tolist()):
            old[..., f] += up[None, :, None, channel] * channels[:, None, :, channel]
        if self.means is not None:
            old += torch.complex(*self.means.chunk(2, dim=-1))[:, None] * torch.complex(*turns.chunk(2, dim=-1))
        keys = torch.cat([self.exact_keys, torch.cat([old.real, old.imag], -1)], 2)
        values = torch.cat([self.exact_values, self.values[:, None] @ self.value_up.mT], 2)
        return (query @ keys[:, heads].mT * scaling).softmax(-1) @ values[:, heads]


def check_attention() -> None:
    """In float64, that attention with an absorbed query is attention to the rebuilt keys."""
    sizes = Sizes(64, 8, 4, 16)
    states = RandomStates(sizes, 2, "cpu", torch.float64)
    for means in (True, False):
        layer, query = TurnedLatents(sizes, (24, 12), states, EXACT + 40, means), states.query()
        turns = torch.cat(cos_sin(torch.arange(40), rotary(sizes, "cpu"), torch.float64), -1)
        arguments = query, turns, 0.25
        torch.testing.assert_close(layer.attend(*arguments), layer.attend_slowly(*arguments), rtol=0, atol=1e-12)


@torch.no_grad()
def speed(args: argparse.Namespace) -> list[dict]:
    """Seconds of a step per way of caching. The turned latents are simply there, as SDPA's ready cache is: their
    one token more per step is not in the time; in that of the library's layouts and DynamicCache it is."""
    check_attention()
    sizes, dtype = Sizes(), torch.float32 if args.device == "cpu" else torch.bfloat16
    states, scaling, rows = RandomStates(sizes, 1, args.device, dtype), sizes.head_dim**-0.5, []
    for length in args.lengths:
        contestants = full_caches(sizes, args.layers, states, length)
        for setting in SETTINGS:
            contestants[setting.name] = compressed_cache(setting, sizes, args.layers, states, length)
        config = planned(SETTINGS[1], sizes)
        ranks = config.key_ranks[0][0] // 2 * 2, config.value_ranks[0]
        positions = torch.arange(length - EXACT, device=args.device)
        turns = torch.cat(cos_sin(positions, rotary(sizes, args.device), dtype), -1)
        query = states.query()
        for name, means in (("80% rope 16 bit", True), ("80% rope, no mean", False)):
            layers = [TurnedLatents(sizes, ranks, states, length, means) for _ in range(args.layers)]

            def step(layers=layers) -> None:
                for layer in layers:
                    layer.attend(query, turns, scaling)  # noqa: B023

            contestants[name] = step, layers[0].nbytes + (turns.nbytes if means else 0)
        seconds = median_seconds({name: run for name, (run, _) in contestants.items()}, args.rounds)
        rows += [
            {"cache": n, "length": length, "batch": 1, "seconds": seconds[n] / args.layers, "bytes": size}
            for n, (_, size) in contestants.items()
        ]
        print_table(rows[-len(contestants) :], copy_bandwidth(args.device))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="directory or id, or 'bundled'")
    parser.add_argument("text", nargs="?", help="file, 'bundled', or 'lines' for a model of --train")
    parser.add_argument("--train", type=Path, metavar="DIR", help="continues what is there; the model is in DIR/model")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lines", type=int, default=24, help="of a record, in training at most")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=1000)
    training.add_argument("--tokens", type=int, default=3000, help="of retrieval per step, and of text")
    training.add_argument("--spread", action="store_true", help="start with the circuit in all heads, not in two")
    training.add_argument("--stop-after", type=float, default=float("inf"), help="seconds")
    measuring = parser.add_argument_group("accuracy")
    measuring.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25, 0.2, 0.125, 0.1, 0.075])
    measuring.add_argument("--still", type=float, default=0.5, help="radians within the context")
    measuring.add_argument("--length", type=int, default=320, help="tokens per row of text: the context")
    measuring.add_argument("--rows", type=int, default=64, help="of text")
    measuring.add_argument("--calibration-rows", type=int, default=128)
    measuring.add_argument("--records", type=int, default=30, help="of line retrieval, 8 questions each")
    measuring.add_argument("--window", type=int, default=32)
    measuring.add_argument("--sinks", type=int, default=4)
    timing = parser.add_argument_group("speed")
    timing.add_argument("--lengths", type=int, nargs="+", default=[8192])
    timing.add_argument("--layers", type=int, default=4)
    timing.add_argument("--rounds", type=int, default=15)
    timing.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    started, results = time.perf_counter(), {}
    if args.train:
        lines = dict(first_lines=min(16, args.lines), max_lines=args.lines, text_at=args.lines)
        recipe = Recipe(args.steps, args.tokens, **lines, sizes=TRAINED)
        if args.spread and not (args.train / "state.pt").exists():
            args.train.mkdir(parents=True, exist_ok=True)
            run = Run(args.train, recipe)
            spread_circuit(run.model)
            run.save()
        train(args.train, recipe, args.stop_after)
    if args.model:
        results["accuracy"] = accuracy(args)
    if args.speed:
        results["speed"] = speed(args)
    if args.out:
        used = [training] * bool(args.train) + [measuring] * bool(args.model) + [timing] * args.speed
        settings = {a.dest: str(getattr(args, a.dest)) for group in used for a in group._group_actions}
        names = {k: Path(v).name for k, v in (("model", args.model), ("text", args.text)) if v}
        about = {"machine": machine(args.threads), "settings": {"lines": args.lines} | settings | names}
        args.out.write_text(json.dumps(about | results | {"minutes": (time.perf_counter() - started) / 60}, indent=1))


if __name__ == "__main__":
    main()

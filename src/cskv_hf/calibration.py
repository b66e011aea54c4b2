"""One pass of a model over calibration data, with forward hooks on its projections that add to [`KVStatistics`]."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from tqdm.auto import tqdm
from transformers.utils import logging

from .families import (
    attention_layers,
    context_length,
    decoder_of,
    in_eval_mode,
    input_device,
    refuse_tensor_parallelism,
    shape_of,
    watch,
)
from .model_shape import ModelShape
from .reads import RowStates, read_moments, sampled_queries, states_read
from .recall import longest_sample, pieces, recalled, together
from .samples import samples
from .statistics import READS, KVStatistics
from .weights import same_weights, weight_hashes

logger = logging.get_logger(__name__)

SAVE_EVERY_SECONDS, MOST_TIME_SAVING = 10.0, 0.05  # or less often, for this share of the time


@torch.no_grad()
def collect_statistics(
    model: nn.Module,
    data: Iterable[Any],
    *,
    tokenizer: Any = None,
    max_length: int = 2048,
    max_tokens: int | None = None,
    recall: bool = True,
    state_file: str | os.PathLike | None = None,
    source: str = "",
    progress: bool = True,
) -> KVStatistics:
    """One pass of the model over calibration data, on whatever devices it lies (accelerate's offload included).

    Args:
        model: a causal language model of a supported family.
        data: an iterable of `input_ids` tensors (length) or (batch, length), of dicts with `input_ids` and perhaps
            `attention_mask`, of strings or dicts with `text` (with `tokenizer`), or a `datasets.Dataset` of these.
        tokenizer: for strings.
        max_length: strings are cut into pieces of at most this many tokens, to which `recall` adds a seventh; each
            begins as the tokenizer begins a text.
        max_tokens: stop once this many tokens were read, after a whole sample; those read again count.
        recall: read a seventh of each sample once more at its end, see recall.py; a sample too long for that in the
            model's context is cut into pieces (of tokens, rather than strings, without BOS but in the first).
        state_file: where to save the statistics on the way and at the end; if it exists, the pass continues from
            it, skipping the samples it has seen, which must be the same ones.
        source: names the data, for the message where `state_file` is of other data.
        progress: show a progress bar.

    Raises:
        ValueError: if the data is empty or a tensor of one dimension, leads to NaN or infinite values, `state_file`
            belongs to another model, or the model is tensor-parallel.
        TypeError: for data of an unknown kind, or a single string or mapping.
    """
    decoder = decoder_of(model)
    stretches = getattr(decoder.rotary_emb, "rope_type", None) == "dynamic"  # as far as a sample goes
    longest = longest_sample(2**62 if stretches else context_length(decoder))
    refuse_tensor_parallelism(model, "`collect_statistics`")
    shape, batches = shape_of(model), samples(data, tokenizer, min(max_length, longest) if recall else max_length)
    statistics = KVStatistics.empty(shape, model.config.hidden_size, source)
    statistics.weights, statistics.recall = weight_hashes(decoder), recall
    if state_file is not None and Path(state_file).exists():
        statistics = _resumed(state_file, statistics)
    num_seen, skipped, digest = statistics.num_samples, 0, ""
    collector = _Collector(model, statistics)
    device, next_save = input_device(model), time.monotonic() + SAVE_EVERY_SECONDS
    of_tokens = dict(total=max_tokens, initial=statistics.num_tokens, unit="tok", unit_scale=True, desc="Calibrating")
    with in_eval_mode(model), collector, tqdm(**of_tokens, disable=not progress) as bar:
        for index, (input_ids, mask) in enumerate(batches):
            rows = [ids if mask is None else ids[mask[row].bool()] for row, ids in enumerate(input_ids)]
            if recall and rows:
                input_ids, mask = together([recalled(piece) for ids in rows for piece in pieces(ids, longest)])
            if index < num_seen:
                digest, skipped = _digest(digest, input_ids, mask), skipped + 1
                if skipped == num_seen:
                    _check_same_samples(state_file, statistics, digest)
                continue
            if max_tokens is not None and statistics.num_tokens >= max_tokens:
                break
            statistics.samples_digest = _digest(statistics.samples_digest, input_ids, mask)
            if input_ids.numel() == 0:
                statistics.num_samples += 1
                continue
            collector.begin(input_ids, mask)
            decoder(
                input_ids=input_ids.to(device),
                attention_mask=None if mask is None else mask.to(device),
                use_cache=False,
            )
            _check_finite(statistics, index)
            for ids in rows:
                room = statistics.room_of_probe()
                statistics.add_probe(recalled(ids[: min(longest, longest_sample(room))]) if recall else ids[:room])
            new = input_ids.numel() if mask is None else int(mask.sum())
            statistics.num_tokens += new
            statistics.num_samples += 1
            bar.update(new)
            if state_file is not None and time.monotonic() > next_save:
                started = time.monotonic()
                statistics.save(state_file)
                took = time.monotonic() - started
                next_save = started + took + max(SAVE_EVERY_SECONDS, took / MOST_TIME_SAVING)
    if skipped < num_seen:
        _check_same_samples(state_file, statistics, None)
    if statistics.num_tokens == 0:
        raise ValueError(
            "`data` is empty: no calibration token was seen. An iterator can be used only once; pass a list to use "
            "it again."
        )
    if statistics.num_tokens < shape.kv_dim:
        logger.warning(
            f"Only {statistics.num_tokens} calibration tokens for kv_dim={shape.kv_dim}; use at least 10 times as "
            "many, or the factors will fit noise."
        )
    if state_file is not None:
        statistics.save(state_file)
    return statistics


def _resumed(state_file: str | os.PathLike, new: KVStatistics) -> KVStatistics:
    """Statistics of a file, to continue in place of `new` ones.

    Raises:
        ValueError: if they are of another model or of other data.
    """
    held = KVStatistics.load(state_file)
    if held.model_shape != new.model_shape:
        raise ValueError(
            f"'{state_file}' holds statistics of another model ({held.model_shape}); this one is {new.model_shape}. "
            "Delete the file or choose another."
        )
    if held.weights is None:
        raise ValueError(
            f"'{state_file}' does not say of which weights its statistics are; an older version wrote it. Delete "
            "the file to start over, or choose another."
        )
    if not same_weights(held.weights, new.weights):
        raise ValueError(
            f"'{state_file}' holds statistics of another model: of the same sizes, but of other weights. Delete "
            "the file to start over, or choose another."
        )
    if held.source != new.source:
        raise ValueError(
            f"'{state_file}' holds statistics of other data ('{held.source}'); this is '{new.source}'. "
            "Delete the file to start over, or choose another."
        )
    if held.recall != new.recall:
        raise ValueError(
            f"'{state_file}' holds statistics with `recall`={held.recall}; this is with {new.recall}. Go on with the "
            "same, delete the file to start over, or choose another."
        )
    logger.warning(f"Continuing from {held.num_samples} samples ({held.num_tokens} tokens) in '{state_file}'.")
    return held


def _digest(before: str, input_ids: torch.Tensor, mask: torch.Tensor | None) -> str:
    """Of all samples up to this one, from that of all before it."""
    digest = hashlib.sha256(before.encode())
    for part in (input_ids, mask):
        if part is not None:
            digest.update(str(tuple(part.shape)).encode() + part.cpu().long().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_same_samples(state_file: str | os.PathLike | None, held: KVStatistics, digest: str | None) -> None:
    """`digest`: of as many samples of the data as `held` has seen; None if there are fewer."""
    if digest is None or held.samples_digest not in ("", digest):  # "": of a version that did not say
        raise ValueError(
            f"'{state_file}' holds statistics of other data than this: its {held.num_samples} samples are not the "
            "first of `data`, or were tokenised or cut otherwise. Go on with the same data, tokenizer and "
            "`max_length`, delete the file to start over, or choose another."
        )


class _Collector:
    """Forward hooks on one model that add to a `KVStatistics`, until it is left; padding is left out."""

    def __init__(self, model: nn.Module, statistics: KVStatistics) -> None:
        self.statistics = statistics
        self.keep: torch.Tensor | None = None  # (batch, length) bool
        self.tokens_before: list[int] = []  # each row of the batch
        self.attentions = attention_layers(model)
        self.hooks = ExitStack()

    def begin(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Before a forward."""
        self.keep = None if mask is None else mask.bool()
        lengths = (torch.ones_like(input_ids) if mask is None else self.keep).sum(1)
        self.tokens_before = (self.statistics.num_tokens + lengths.cumsum(0) - lengths).tolist()

    def __enter__(self) -> _Collector:
        with self.hooks:  # are removed if one of them cannot be added
            self._add_hooks()
            self.hooks = self.hooks.pop_all()
        return self

    def _add_hooks(self) -> None:
        statistics = self.statistics
        heads = ModelShape(**statistics.model_shape).num_key_value_heads
        for layer_idx, attention in enumerate(self.attentions):
            keys = statistics.key_moment[layer_idx], statistics.key_sum[layer_idx]
            values = statistics.value_moment[layer_idx], statistics.value_sum[layer_idx]
            self._until_exit(watch(attention, "keys", self._add_moments(*keys)))
            self._until_exit(watch(attention, "values", self._add_moments(*values)))
            self._until_exit(watch(attention, "queries", self._add_queries(statistics.query_moment[layer_idx], heads)))
            inputs = self._add_inputs(statistics.input_scale[layer_idx])
            self._until_exit(attention.k_proj.register_forward_hook(inputs))
            self.hooks.enter_context(states_read(attention, self._add_reads(layer_idx), lambda: self.keep))

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    def _until_exit(self, handle: RemovableHandle) -> None:
        self.hooks.callback(handle.remove)

    def _rows(self, states: torch.Tensor, width: int) -> torch.Tensor:
        rows = states.detach().reshape(-1, width)
        rows = rows if self.keep is None else rows[self.keep.flatten().to(rows.device)]
        if rows.device.type == "mps":  # has no float64
            rows = rows.cpu()
        return rows.double()

    def _add_moments(self, second: torch.Tensor, first: torch.Tensor):
        def use(states: torch.Tensor) -> None:
            rows = self._rows(states, len(first))
            second.add_((rows.mT @ rows).to(second.device))
            first.add_(rows.sum(0).to(first.device))

        return use

    def _add_queries(self, total: torch.Tensor, num_key_value_heads: int):
        head_dim = total.shape[-1]

        def use(states: torch.Tensor) -> None:
            rows = self._rows(states, states.shape[2:].numel()).unflatten(-1, (num_key_value_heads, -1, head_dim))
            # (num_key_value_heads, tokens * query heads of each, head_dim)
            by_head = rows.permute(1, 0, 2, 3).flatten(1, 2)
            total.add_((by_head.mT @ by_head).to(total.device))

        return use

    def _add_reads(self, layer_idx: int):
        totals = [getattr(self.statistics, name)[layer_idx] for name in READS]

        def use(states: RowStates, output: torch.Tensor) -> None:
            # the same draws however rows are batched, and whether or not a pass is resumed
            generator = torch.Generator().manual_seed(self.tokens_before[states.row])
            queries = sampled_queries(states.length, generator)
            if len(queries) == 0:  # a row of padding, or of one token
                return
            for total, moment in zip(totals, read_moments(states, queries, generator)):
                total.add_(moment.to(total.device))

        return use

    def _add_inputs(self, total: torch.Tensor):
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            total.add_(self._rows(args[0], total.shape[-1]).abs().sum(0).to(total.device))

        return hook


def _check_finite(statistics: KVStatistics, index: int) -> None:
    moments = {
        "attention inputs": statistics.input_scale,
        "queries": statistics.query_moment.diagonal(dim1=-2, dim2=-1),
        "keys": statistics.key_moment.diagonal(dim1=-2, dim2=-1),
        "values": statistics.value_moment.diagonal(dim1=-2, dim2=-1),
    }
    wrong = torch.stack([~moment.flatten(1).isfinite().all(1) for moment in moments.values()])
    if wrong.any():
        layer = int(wrong.any(0).nonzero()[0])
        names = ", ".join(name for name, w in zip(moments, wrong[:, layer]) if w)
        raise ValueError(
            f"Calibration sample {index} leads to NaN or infinite values in layer {layer} ({names}). Check the "
            "sample, the model's weights and its dtype (bfloat16 or float32 rather than float16)."
        )

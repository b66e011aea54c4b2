"""A language model for lm-evaluation-harness whose past is read from a cache; importing this registers it as ``cskv``.

The harness's own model for transformers, `HFLM`, scores a continuation by one forward, a prefill, which attends to
exact keys and never touches what a cache compresses. [`CSKVLM`] replaces that forward (see loglikelihood.py) and
leaves prompts, tokens and metrics to the harness.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, DynamicCache
from transformers.cache_utils import Cache
from transformers.utils import cached_file, find_adapter_config_file, logging

from ..adapter_files import check_adapter_files
from ..cache import CSKVCache
from ..config import CSKVConfig
from ..generation import CACHE_ARGUMENT, has_active_adapter
from ..loading import load, local_adapter
from ..model_shape import CHANGING_ROPE_TYPES
from .baselines import WindowOnlyCache
from .fingerprint import active_config
from .loglikelihood import batches, collect_rows, score_rows

try:
    from lm_eval import utils
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    raise ImportError(
        f"Tasks of lm-evaluation-harness need packages that are not installed ({error}): "
        "`pip install 'cskv-hf[eval]'`."
    ) from error

logger = logging.get_logger(__name__)

CACHES = ("cskv", "full", "window")


@register_model("cskv")
class CSKVLM(HFLM):
    """A causal language model whose past is read from a cache, for lm-evaluation-harness.

    Context and continuation go through the cache in steps of `stride` tokens, so that every past token outside window
    and sinks is read from latents. Generation prefills the prompt and reads what the cache kept of it.

    Args:
        pretrained: a CSKV adapter (directory or Hub id; its base and tokenizer are found by it), a base model, or a
            loaded model.
        cache: ``"cskv"``, or to compare with, scored in the same steps, ``"full"`` (a DynamicCache) or ``"window"``
            (sinks and window of the adapter without its latents).
        stride: tokens per forward when scoring; they see each other exactly.
        batch_size: rows at a time; results do not depend on it.
        peft: a CSKV adapter, where `pretrained` is a base model.
        tokenizer: directory, Hub id or loaded; by default the adapter's or else the base model's.
        revision, subfolder: of what `pretrained` names.
        device: by default a GPU if there is one.
        kwargs: for `HFLM`: ``dtype``, ``max_length``, ``add_bos_token``, ``parallelize``, ``trust_remote_code``, ...

    Raises:
        ValueError: if an argument is not possible, or there is not a CSKV adapter for ``cache="cskv"``.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike | nn.Module,
        *,
        cache: str = "cskv",
        stride: int = 32,
        batch_size: int | str = 1,
        peft: str | os.PathLike | None = None,
        tokenizer: Any = None,
        revision: str = "main",
        subfolder: str = "",
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        if cache not in CACHES:
            raise ValueError(f"`cache` must be one of {', '.join(CACHES)}, got {cache!r}.")
        for name, value in (("stride", stride), ("batch_size", batch_size)):
            if not str(value).isdecimal() or int(value) < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        self.cache_kind, self.stride, self._adapter_folder = cache, int(stride), None
        if isinstance(pretrained, nn.Module):
            if peft is not None:
                raise ValueError(f"`peft`={peft!r} is for a base model by name; load it onto yours: cskv_hf.load.")
        else:
            pretrained = os.fspath(pretrained)
            source = {"revision": str(revision), "subfolder": subfolder}
            if find_adapter_config_file(pretrained, **source):
                if peft is not None:
                    raise ValueError(f"'{pretrained}' is an adapter itself; give `peft` or an adapter, not both.")
                peft, revision, subfolder = pretrained, "main", ""
            else:
                source = {}
            if peft is not None:
                peft = os.fspath(peft)
                self._adapter_folder = local_adapter(peft, **source)
                check_adapter_files(self._adapter_folder)
                if peft == pretrained:
                    pretrained = CSKVConfig.from_pretrained(str(self._adapter_folder)).base_model_name_or_path
                    tokenizer = tokenizer or own_tokenizer(peft, **source)
            elif cache == "cskv":
                raise ValueError(
                    f"'{pretrained}' is not a CSKV adapter. Give an adapter, or one by `peft=`; to measure the model "
                    "as it is, set `cache` to 'full'."
                )
        super().__init__(
            pretrained,
            peft=peft,
            tokenizer=tokenizer,
            revision=revision,
            subfolder=subfolder,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            batch_size=int(batch_size),
            **kwargs,
        )
        if self.backend != "causal":
            raise ValueError(f"CSKV serves causal language models only; this one is '{self.config.model_type}'.")
        if cache == "cskv" and not has_active_adapter(self.model):
            raise ValueError("The model has no CSKV adapter in use. Load one, or set `cache` to 'full'.")

    def _create_model(self, pretrained: str, **kwargs: Any) -> None:
        """HFLM's, but the adapter is loaded by us: checked, and without resizing the base's embeddings."""
        super()._create_model(pretrained, **{**kwargs, "peft": None})
        if self._adapter_folder is not None:
            self._model = load(self._model, self._adapter_folder)

    def make_cache(self) -> Cache:
        """A new cache of the kind that is measured."""
        if self.cache_kind == "cskv":
            return CSKVCache()
        if self.cache_kind == "full":
            return DynamicCache()
        config = active_config(self.model)
        return WindowOnlyCache() if config is None else WindowOnlyCache(config.window, config.sinks, config.block_size)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of (name, context tokens, continuation tokens), in batches of like length."""
        rows, row_of = collect_rows(
            [(context, continuation) for _, context, continuation in requests], self.max_length
        )
        cut = sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests)
        if cut:
            logger.warning(f"{cut} of {len(requests)} requests exceed {self.max_length} tokens and lose their first.")
        waiting: list[list[int]] = [[] for _ in rows]
        for request, row in enumerate(row_of):
            waiting[row].append(request)
        rope = getattr(self.config.get_text_config(), "rope_parameters", None) or {}
        answers: dict[int, tuple[float, bool]] = {}
        bar = tqdm(total=len(requests), desc="Scoring", unit="request", disable=disable_tqdm or self.rank != 0)
        with bar, torch.autocast(
            self.device.type, self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        ):  # fmt: skip
            for batch in batches(rows, self.batch_size, same_length=rope.get("rope_type") in CHANGING_ROPE_TYPES):
                scores = score_rows(
                    self.model, [rows[i] for i in batch], self.make_cache, stride=self.stride, dtype=self.softmax_dtype
                )
                for index, score in zip(batch, scores):
                    for request in waiting[index]:
                        name, _, continuation = requests[request]
                        answers[request] = score.of(continuation)
                        if name is not None:
                            self.cache_hook.add_partial("loglikelihood", name, answers[request])
                    bar.update(len(waiting[index]))
        return [answers[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of `max_length` tokens; a batch of texts at a time is finished,
        so that an interrupted run can go on."""
        totals: list[float] = []
        with tqdm(total=len(requests), desc="Reading", unit="text", disable=disable_tqdm or self.rank != 0) as bar:
            for start in range(0, len(requests), self.batch_size):
                texts = [request.args[0] for request in requests[start : start + self.batch_size]]
                windows = [
                    [(None, *utils.make_disjoint_window(w)) for w in utils.get_rolling_token_windows(
                        self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
                    )]
                    for text in texts
                ]  # fmt: skip
                answers = iter(self._loglikelihood_tokens([w for part in windows for w in part], disable_tqdm=True))
                for text, part in zip(texts, windows):
                    totals.append(sum(next(answers)[0] for _ in part))
                    self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
                bar.update(len(texts))
        return totals

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """HFLM's, with the cache that is measured; rows one by one where that cache knows no padding."""
        mask = generation_kwargs.get("attention_mask")
        if self.cache_kind != "window" or mask is None or bool(mask.all()):
            return super()._model_generate(
                context, max_length, stop, **{CACHE_ARGUMENT: self.make_cache()}, **generation_kwargs
            )
        outputs = []
        for row, real in zip(context, mask.bool()):
            kwargs = {**generation_kwargs, "attention_mask": mask.new_ones(1, int(real.sum()))}
            padding = len(row) - int(real.sum())
            tokens = self._model_generate(row[real][None], max_length - padding, stop, **kwargs)[0]
            outputs.append(torch.cat([row[:padding], tokens]))
        return nn.utils.rnn.pad_sequence(outputs, batch_first=True, padding_value=self.tokenizer.pad_token_id)


def own_tokenizer(adapter: str, **source: str) -> Any:
    """The tokenizer saved beside an adapter; None if there is none."""
    if cached_file(adapter, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False, **source) is None:
        return None
    return AutoTokenizer.from_pretrained(adapter, **source)

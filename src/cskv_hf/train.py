"""Fine-tuning of CSKV factors layer by layer, with or without quantisation, on the transformers `Trainer`.

The loss is that of reconstruction.py; what is here makes a `Trainer` of it that trains the factors and nothing else.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput
from transformers.utils import logging

from .adapter_files import restore_adapter, save_adapter
from .config import CSKVConfig
from .families import refuse_tensor_parallelism
from .fit_report import forget_measurements
from .reconstruction import OBJECTIVES, ReconstructionLoss
from .samples import samples
from .sidecar import CSKVFactors
from .tuner import adapter_config, adapter_in_use, sidecars

logger = logging.get_logger(__name__)

SAME_TO_RESUME = (
    "compression",
    "key_layout",
    "init",
    "center",
    "asvd_alpha",
    "bits",
    "block_size",
    "key_group",
    "value_group",
    "rank_multiple",
    "key_ranks",
    "value_ranks",
    "key_bits",
    "value_bits",
)
# of an instance whose forward is ours for a while, and what accelerate notes of a model that it has prepared
OF_FORWARD = ("forward", "_original_forward", "_is_accelerate_prepared")


def training_arguments(output_dir: str | Path, **overrides: Any) -> TrainingArguments:
    """The paper's recipe as `TrainingArguments`: AdamW at 5e-5, constant, one epoch, batches of 1; any of it can be
    overridden.

    Raises:
        TypeError: for an argument that `TrainingArguments` does not know.
    """
    paper = dict(
        learning_rate=5e-5,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        num_train_epochs=1,
        per_device_train_batch_size=1,
        logging_steps=20,
        save_steps=200,
        save_total_limit=2,
        report_to="none",
    )
    return TrainingArguments(output_dir=str(output_dir), **(paper | overrides))


def training_rows(
    data: Iterable[Any], tokenizer: Any = None, length: int = 1024, max_tokens: int | None = None
) -> list[dict[str, torch.Tensor]]:
    """Calibration data of any kind that [`collect_statistics`] takes, packed into rows of `length` tokens.

    The last row may be shorter, and is dropped if there are others.

    Raises:
        ValueError: if there is no token, or for a `length` or `max_tokens` below 1.
    """
    for name, value in (("length", length), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    rows, rest = [], torch.zeros(0, dtype=torch.long)
    for input_ids, mask in samples(data, tokenizer, max_length=2**30):
        for i, ids in enumerate(input_ids):
            rest = torch.cat([rest, ids if mask is None else ids[mask[i].bool()]])
        while len(rest) >= length and (max_tokens is None or length * len(rows) < max_tokens):
            rows.append({"input_ids": rest[:length]})
            rest = rest[length:]
        if max_tokens is not None and length * len(rows) >= max_tokens:
            break
    if not rows and len(rest):
        rows.append({"input_ids": rest})
    if not rows:
        raise ValueError("`data` is empty: there is nothing to train on.")
    return rows


class CSKVTrainer(Trainer):
    """Trains the factors of the CSKV adapter in use; a `Trainer` in everything else.

    Checkpoints hold the adapter alone, whatever else the model holds, `train(resume_from_checkpoint=True)` continues,
    and `accelerate launch` runs it on several GPUs (data parallel); without, a model that lies on one stays there.
    After `train` the factors are in the model's dtype again and frozen, and what the fit measured of the old ones is
    dropped from the adapter's ``fit_report``.

    With an `eval_dataset`, `evaluate` returns the loss on it as ``eval_loss``, and the shares of energy lost as
    ``eval_key_error`` and ``eval_value_error``, of all layers and of each.

    Args:
        model: with a fitted CSKV adapter in use.
        args: see [`training_arguments`] for the paper's.
        train_dataset: rows with `input_ids` (and `attention_mask`); [`training_rows`] makes them. Not the text you
            evaluate on.
        objective: ``"attention"``, what the output of a layer's attention loses, or ``"mse"``, what keys and values do
            (the paper's); see reconstruction.py.

    Raises:
        ValueError: without data, without a fitted adapter, for an unknown objective, under FSDP and DeepSpeed, which
            shard factors away from where they are used, or for a tensor-parallel model.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: Any,
        *,
        objective: str = "attention",
        **kwargs: Any,
    ) -> None:
        if objective not in OBJECTIVES:
            raise ValueError(f"`objective` must be one of {', '.join(map(repr, OBJECTIVES))}, got {objective!r}.")
        if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
            raise ValueError(
                "CSKVTrainer does not run under FSDP or DeepSpeed: their sharding takes the factors away from the "
                "loss, which then silently learns nothing. Factors are small; use data parallel (`accelerate launch "
                "--multi_gpu`), or `device_map` for a large base."
            )
        if train_dataset is None or (hasattr(train_dataset, "__len__") and len(train_dataset) == 0):
            raise ValueError("`train_dataset` is empty: there is nothing to train on.")
        refuse_tensor_parallelism(model, "CSKVTrainer")
        config = adapter_config(model)
        if not config.is_fitted:
            raise ValueError("The CSKV adapter has no factors yet. Fit it with `cskv_hf.fit` before training.")
        self.adapter_name, self.objective = adapter_in_use(model), objective
        self.loss_function = ReconstructionLoss(model, self.adapter_name, objective)
        self.errors: list[torch.Tensor] = []  # of training steps since the last log
        self.evaluated: list[torch.Tensor] | None = None  # errors of the evaluation that is running
        self._forward, self._is_measuring = self.loss_function, False
        args.remove_unused_columns = False
        args.label_names = []
        if args.n_gpu > 1:  # for which a Trainer puts copies of the model into threads, and the loss knows one model
            if len({*getattr(model, "hf_device_map", {}).values()} - {"cpu", "disk"}) < 2:
                logger.warning(
                    f"Training on one of {args.n_gpu} GPUs; start it with `accelerate launch` to use them all."
                )
            args._n_gpu = 1
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean already

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; `True` goes on from the last whole checkpoint. An interrupted run leaves that and
        the factors as they are."""
        self.errors = []
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no checkpoint in '{self.args.output_dir}' to resume from.")
        trained = [p for p in self.model.parameters() if p.requires_grad]
        dtype = _unfreeze(self.model, self.adapter_name)
        try:
            with self._loss_as_forward():
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            for parameter in trained:  # of a LoRA beside it, say
                parameter.requires_grad_(True)
            _freeze(self.model, self.adapter_name, dtype)

    @contextlib.contextmanager
    def _loss_as_forward(self) -> Iterator[None]:
        """Let the model's forward be the loss: data parallel calls it, and so synchronises gradients."""
        if self._is_measuring:
            yield
            return
        own = self.model.__dict__  # of this instance
        before = {name: own.pop(name) for name in OF_FORWARD if name in own}
        self._is_measuring, self.model.forward = True, self._forward
        try:
            yield
        finally:
            self._is_measuring = False
            self._forward = own["forward"]  # with the mixed precision that accelerate has put around it
            for name in OF_FORWARD:
                own.pop(name, None)
            own.update(before)

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, errors = model(input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask"))
        if self.evaluated is None:
            self.errors.append(errors)
            self._note_training()
        else:
            self.evaluated.append(errors)
        return (loss, {"errors": errors}) if return_outputs else loss

    def _note_training(self) -> None:
        config = adapter_config(self.model, self.adapter_name)
        report = config.fit_report or {}
        if report.get("trained") != self.objective or "evaluation" in report:
            forget_measurements(config, range(len(config.key_ranks)))
            config.fit_report = {**(config.fit_report or {}), "trained": self.objective}

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self.evaluated = []
        try:
            with self._loss_as_forward():
                output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
            if self.evaluated:
                errors = _named(self.accelerator.reduce(torch.stack(self.evaluated).mean(0), reduction="mean"))
                output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in errors.items()})
            return output
        finally:
            self.evaluated = None

    def prediction_step(
        self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """The loss; there are no labels and no logits."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the share of each layer's keys and values that is lost, averaged over the training steps since the last
        log."""
        if self.errors and ("loss" in logs or "train_runtime" in logs):  # not to what `evaluate` logs
            logs |= _named(torch.stack(self.errors).mean(0))
            self.errors = []
        super().log(logs, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        config = adapter_config(self.model, self.adapter_name)
        _check_same_adapter(Path(resume_from_checkpoint), config, self.objective)
        restore_adapter(self.model, resume_from_checkpoint, self.adapter_name)
        self._note_training()

    def _load_best_model(self) -> None:
        restore_adapter(self.model, self.state.best_model_checkpoint, self.adapter_name)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The adapter in training alone, at the root of the folder whatever its name."""
        if not self.args.should_save:  # another process does
            return
        folder = Path(output_dir or self.args.output_dir)
        save_adapter(self.model, folder, self.adapter_name)
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)


def _named(errors: torch.Tensor) -> dict[str, float]:
    """Shares of energy lost (layers, 2), as they are logged."""
    keys, values = errors.unbind(1)
    named = {"key_error": float(keys.mean()), "value_error": float(values.mean())}
    for i, (key, value) in enumerate(zip(keys.tolist(), values.tolist())):
        named |= {f"layers/{i}/key_error": key, f"layers/{i}/value_error": value}
    return named


def _unfreeze(model: nn.Module, adapter_name: str) -> torch.dtype:
    """Make the factors float32 and trainable, and nothing else; returns the dtype they had.

    The parameters stay the same objects: an optimizer made in an earlier `train` holds them.
    """
    model.requires_grad_(False)
    dtype = sidecars(model)[0].cskv_key_A[adapter_name].weight.dtype
    for sidecar in sidecars(model):
        for name in CSKVFactors.TRAINED:
            factor = getattr(sidecar, name)[adapter_name]
            factor.weight.data = factor.weight.data.float()
            factor.weight.requires_grad_(True)
    return dtype


def _freeze(model: nn.Module, adapter_name: str, dtype: torch.dtype) -> None:
    for sidecar in sidecars(model):
        for name in CSKVFactors.TRAINED:
            factor = getattr(sidecar, name)[adapter_name]
            factor.weight.grad = None  # of another dtype than the factors will have
            factor.weight.data = factor.weight.data.to(dtype)
            factor.weight.requires_grad_(False)


def _check_same_adapter(checkpoint: Path, config: CSKVConfig, objective: str) -> None:
    """Refuse to continue from a checkpoint of another adapter or objective.

    Raises:
        ValueError: naming what differs.
    """
    file = checkpoint / "adapter_config.json"
    if not file.is_file():
        raise ValueError(f"'{checkpoint}' is not a checkpoint of a CSKV adapter: it has no adapter_config.json.")
    saved = json.loads(file.read_text())
    mine = json.loads(json.dumps({name: getattr(config, name) for name in SAME_TO_RESUME}))  # tuples become lists
    different = [name for name in SAME_TO_RESUME if saved.get(name) != mine[name]]
    if (saved.get("fit_report") or {}).get("trained") != objective:
        different.append("objective")
    if different:
        raise ValueError(
            f"The checkpoint '{checkpoint}' belongs to an adapter with other settings ({', '.join(different)}). "
            "Continue with the adapter it was started from, or train from the beginning in another folder."
        )


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint in a folder that is whole, None if there is none. A Trainer's first process writes its
    state last."""
    whole = [file.parent for file in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    steps = {int(step): path for path in whole if (step := path.name.rpartition("-")[2]).isdigit()}
    return str(steps[max(steps)]) if steps else None

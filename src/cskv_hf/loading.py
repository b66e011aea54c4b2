"""Adapters from directories and the Hub onto a model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .adapter_files import ADAPTER, check_adapter_files
from .card import REPO_ID
from .cutting import shrink
from .pushing import give_push
from .tuner import check_can_add


def load(
    model: PreTrainedModel,
    adapter: str | os.PathLike,
    *,
    adapter_name: str = "default",
    compression: float | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    **kwargs: Any,
) -> PeftModel:
    """Load a CSKV adapter onto a model: `PeftModel.from_pretrained`, with the files checked first.

    Args:
        model: the base model the adapter was fitted to; a `PeftModel` of CSKV adapters gets one more.
        adapter: directory or Hub id.
        adapter_name: the name it gets; it becomes the active one.
        compression: cut the adapter to this compression, which must not be below the one it was fitted at; see
            [`shrink`].
        revision, subfolder, token: as everywhere on the Hub.
        kwargs: for `PeftModel.from_pretrained`; `cache_dir`, `local_files_only` and `force_download` go to the
            download.

    Raises:
        ValueError: if a file is missing, truncated or corrupt, is not a CSKV adapter, or belongs to another model; if
            the name is taken, or `model` is a `PeftModel` of another method.
        TypeError: if `model` is not a module.
        huggingface_hub.errors.HfHubHTTPError: if the repository or revision is not there, or not for this token.
    """
    download = {
        name: kwargs.pop(name) for name in ("cache_dir", "local_files_only", "force_download") if name in kwargs
    }
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be the model that the adapter is put on, got one of type {type(model).__name__}."
        )
    check_can_add(model, adapter_name)
    if isinstance(model, PeftModel) and adapter_name in model.peft_config:
        raise ValueError(
            f"`adapter_name`='{adapter_name}' is the name of an adapter that this PeftModel has already. Give this "
            f"one another, or take that one off with `delete_adapter('{adapter_name}')`."
        )
    active = model.active_adapter if isinstance(model, PeftModel) else None
    folder = local_adapter(adapter, revision=revision, subfolder=subfolder, token=token, **download)
    check_adapter_files(folder)
    with _dispatched_as_it_is(model):
        if isinstance(model, PeftModel):
            peft_model = model
            peft_model.load_adapter(str(folder), adapter_name, **kwargs)
            peft_model.set_adapter(adapter_name, inference_mode=not kwargs.get("is_trainable", False))
        else:
            peft_model = PeftModel.from_pretrained(model, str(folder), adapter_name=adapter_name, **kwargs)
    if compression is not None:
        try:
            shrink(peft_model, compression, adapter_name=adapter_name)
        except ValueError:
            if peft_model is model:
                model.delete_adapter(adapter_name)
                model.set_adapter(active, inference_mode=True)
            else:
                peft_model.unload()
            raise
    return give_push(peft_model)


@contextlib.contextmanager
def _dispatched_as_it_is(model: nn.Module) -> Iterator[None]:
    """Keep PEFT from taking accelerate's hooks off an offloaded model and dispatching it anew, which loses what is on
    disk. Our factors go where the projections run, so nothing needs to move."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    device_map = model.__dict__.pop("hf_device_map", None)
    try:
        yield
    finally:
        if device_map is not None:
            model.hf_device_map = device_map


def local_adapter(adapter: str | os.PathLike, *, subfolder: str | None = None, **download: Any) -> Path:
    """The directory of an adapter: itself, or the local snapshot of a Hub repository, downloaded as needed.

    Only the configuration and the safetensors file are fetched; no other format is ever read.

    Raises:
        ValueError: if the repository lacks one of them.
        huggingface_hub.errors.HfHubHTTPError: as for [`load`].
    """
    folder = Path(adapter) / (subfolder or "")
    if folder.is_dir():
        return folder
    place = f"'{adapter}'" + (f", folder '{subfolder}'" if subfolder else "")
    if Path(adapter).exists():
        raise ValueError(
            f"{place} is not a directory. Give the directory of an adapter, or a Hub id like 'user/name'."
        )
    if not REPO_ID.fullmatch(str(adapter)):
        raise ValueError(f"'{adapter}' is neither a directory nor a Hub id like 'user/name'.")
    try:
        files = [hf_hub_download(str(adapter), name, subfolder=subfolder, **download) for name in ADAPTER]
    except GatedRepoError:
        raise
    except RepositoryNotFoundError as error:
        message = f"There is no directory '{adapter}' here, and it is not on the Hub, or private. {error}"
        raise RepositoryNotFoundError(message, response=error.response) from error
    except LocalEntryNotFoundError as error:
        raise LocalEntryNotFoundError(f"There is no directory '{adapter}' here. {error}") from error
    except EntryNotFoundError as error:
        raise ValueError(
            f"{place} is not a complete CSKV adapter: it needs {' and '.join(ADAPTER)}. Files of other formats, "
            f"pickles among them, are not read. ({str(error).strip().splitlines()[-1]})"
        ) from error
    return Path(files[0]).parent

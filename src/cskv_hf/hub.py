"""Adapters from directories and the Hub, and to the Hub.

A repository is a plain PEFT adapter repository, so that whatever loads adapters loads it. PEFT's own ``push_to_hub``
uploads the same files but replaces the card by an empty one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .adapter_files import ADAPTER, check_adapter_files, save_adapter
from .card import REPO_ID, model_card
from .config import CSKVConfig
from .cutting import shrink
from .tuner import adapter_config, check_can_add, sidecars

logger = logging.get_logger(__name__)

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


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


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    adapter_name: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    commit_message: str = "Upload CSKV adapter",
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
) -> CommitInfo:
    """Upload a fitted CSKV adapter of a model, with a model card.

    Also there as ``model.push_to_hub`` on models that [`fit`] and [`load`] return.

    Args:
        model: with a fitted CSKV adapter.
        repo_id: ``user/name``; created if it does not exist.
        adapter_name: which adapter; the one in use by default.
        base_model: Hub id of the model it was fitted to; needed where the base was loaded from a directory.
        license: of the adapter, for the card; by default what the base model's card on the Hub says.
        commit_message, commit_description: of the commit.
        private: whether a new repository is private.
        token: of the Hub; by default the one that is logged in.
        revision: branch to push to, created if it does not exist.
        create_pr: open a pull request instead of pushing.
        tags: more tags for the card.

    Returns:
        The commit. Pushing the same again makes none, and returns the last.

    Raises:
        ValueError: if the adapter has no factors or shares its name with one of another method, if its base model is
            known by a local path only, or for `create_pr` with a `revision`.
        huggingface_hub.errors.HfHubHTTPError: if the Hub refuses.
        ConnectionError: if it cannot be reached.
    """
    name = adapter_name or sidecars(model)[0].adapter_in_use
    config = adapter_config(model, name)
    if not config.is_fitted:
        raise ValueError(f"The CSKV adapter '{name}' has no factors yet. Fit it with `cskv_hf.fit` before pushing it.")
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder, name)
        return push_folder(
            Path(folder),
            repo_id,
            base_model=base_model,
            license=license,
            commit_message=commit_message,
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            tags=tags,
        )


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    commit_message: str = "Upload CSKV adapter",
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
) -> CommitInfo:
    """Upload an adapter that was saved to a directory, with a tokenizer if one lies beside it; see [`push_to_hub`].

    Only files of an adapter and of a tokenizer leave the machine, and no path of it.
    """
    check_adapter_files(folder)
    config = CSKVConfig.from_pretrained(str(folder))
    if not config.is_fitted:
        raise ValueError(f"The CSKV adapter in '{folder}' has no factors yet. Fit it before pushing it.")
    if create_pr and revision not in (None, "main"):
        raise ValueError(
            f"`create_pr` opens a pull request against the main branch, not `revision`='{revision}'. Leave `revision` "
            "out, or push to the branch without `create_pr`."
        )
    known = base_model or config.base_model_name_or_path
    if known is None or not REPO_ID.fullmatch(known) or (base_model is None and os.path.exists(known)):
        raise ValueError(
            f"The adapter's base model is known as {known!r}, which is not a Hub id, so nobody else could load the "
            "adapter. Name it with `base_model='user/model'`."
        )
    api = HfApi(token=token)
    with _connection(api), tempfile.TemporaryDirectory() as staging:
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        api.create_repo(repo_id, private=private, exist_ok=True)
        card = model_card(config, known, repo_id, license or _license_of(known, api.token), tags or ())
        for name in (*ADAPTER, *TOKENIZER):
            if (folder / name).is_file():
                shutil.copy(folder / name, staging)
        _write_config(Path(staging) / CONFIG_NAME, known)
        card.save(Path(staging) / "README.md")
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=staging,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


@contextlib.contextmanager
def _connection(api: HfApi) -> Iterator[None]:
    """Say that the Hub cannot be reached, where its client has an error for every way that a connection fails.

    Raises:
        ConnectionError: as described.
    """
    try:
        yield
    except HfHubHTTPError:
        raise  # the Hub's answer
    except HTTPError as error:
        raise ConnectionError(
            f"The Hub at {api.endpoint} cannot be reached ({error}). Push again where there is a network."
        ) from error


def give_push(model: PeftModel) -> PeftModel:
    """Let ``model.push_to_hub`` of this instance write our card; returns the model."""
    model.push_to_hub = functools.partial(push_to_hub, model)
    return model


def _license_of(base_model: str, token: str | bool | None) -> str | None:
    """What the base model's card says, None if there is no card to read."""
    try:
        return ModelCard.load(base_model, token=token).data.license
    except (HfHubHTTPError, OSError, ValueError) as error:
        logger.warning(f"The licence of '{base_model}' is not known ({type(error).__name__}); pass `license=`.")
        return None


def _write_config(file: Path, base_model: str) -> None:
    """Name the base model as others know it."""
    settings = json.loads(file.read_text())
    settings["base_model_name_or_path"] = base_model
    file.write_text(json.dumps(settings, indent=2, sort_keys=True))

"""Adapters to the Hub, with a model card.

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

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import nn
from transformers.utils import logging

from .adapter_files import ADAPTER, check_adapter_files, save_adapter
from .card import REPO_ID, model_card
from .config import CSKVConfig
from .tuner import adapter_config, adapter_in_use

logger = logging.get_logger(__name__)

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


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

    Also there as ``model.push_to_hub`` on a `PeftModel` that [`fit`] or [`load`] returns; that of a transformers model
    with adapters inside is transformers' own, and writes an empty card.

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
    name = adapter_name or adapter_in_use(model)
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

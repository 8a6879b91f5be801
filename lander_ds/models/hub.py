"""Models by hub id (`google/gemma-3-270m`): found in huggingface_hub's cache, or downloaded into it."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lander_ds.common.errors import ModelError
from lander_ds.config.recipe import Recipe

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_WANTED = (
    "*.json",
    "*.jinja",
    "*.safetensors",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "*.py",
    "*.md",
    "LICENSE*",
    "NOTICE*",
)
# The same weights once more, for other programs.
_UNWANTED = ("*/*", "consolidated*")


def is_hub_id(path: str) -> bool:
    """Whether a `model.path` is an id on the hub: there is no such file or directory, and it reads `owner/name`."""
    return _HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def with_local_model(recipe: Recipe, download: bool) -> Recipe:
    """The recipe with the directory of its model in place of a hub id; one that names a directory comes back as it is.

    Args:
        recipe: the recipe.
        download: fetch what is not in the cache, unless `HF_HUB_OFFLINE` is set; False: an id that is not there stays.

    Raises:
        ModelError: the model is not in the cache and cannot be had.
    """
    model = recipe.model
    if not is_hub_id(model.path):
        return recipe
    pickles = ("pytorch_model*.bin",) if model.allow_pickle else ()
    wanted = (*_WANTED, *pickles)
    try:
        path = snapshot(model.path, wanted, "model.path", model.revision, _UNWANTED, local_only=not download)
    except LocalEntryNotFoundError:
        return recipe
    # The directory is of one commit.
    return replace(recipe, model=replace(model, path=path, revision=None))


def snapshot(
    name: str,
    wanted: Sequence[str],
    key: str,
    revision: str | None = None,
    unwanted: Sequence[str] = (),
    local_only: bool = False,
) -> str:
    """The directory of a repository of the hub in the cache.

    Args:
        name: its id.
        wanted: patterns of the files to fetch.
        key: what names it, for messages.
        revision: branch, tag or commit; None: the main branch.
        unwanted: patterns of files to leave out all the same.
        local_only: fetch nothing, as with `HF_HUB_OFFLINE`.

    Raises:
        LocalEntryNotFoundError: `local_only`, and it is not in the cache.
        ModelError: it is not in the cache and cannot be had.
    """
    try:
        path = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(wanted),
            ignore_patterns=list(unwanted),
            local_files_only=local_only,
        )
    except LocalEntryNotFoundError as error:
        if local_only:
            raise
        raise ModelError(_missing(name, revision, key, str(error).partition("\n")[0])) from None
    except GatedRepoError:
        raise ModelError(
            f"{name}: the owner wants to be asked first: accept the terms on https://huggingface.co/{name}, then log in "
            "with `hf auth login` or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(
            f"{name}: has no branch, tag or commit {revision!r}: correct model.revision"
        ) from None
    except RepositoryNotFoundError:
        reason = "the hub has none of that name that this account may see"
        raise ModelError(_missing(name, revision, key, reason)) from None
    except (HFValidationError, OSError) as error:
        raise ModelError(_missing(name, revision, key, str(error).partition("\n")[0])) from None
    logger.info("%s: %s", name, path)
    return path


def _missing(name: str, revision: str | None, key: str, reason: str) -> str:
    option = f" --revision {revision}" if revision else ""
    return (
        f"{name}: is no directory, and as a hub id it is not in the cache {constants.HF_HUB_CACHE} and cannot be "
        f"downloaded ({reason}): correct {key}, or run `hf download {name}{option}` where there is a network "
        "and copy the cache (HF_HOME says where it lies)"
    )

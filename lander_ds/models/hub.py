"""Base models by hub id (`google/gemma-3-270m`): found in huggingface_hub's cache, or downloaded into it."""

from __future__ import annotations

import logging
import re
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
from lander_ds.config.recipe import ModelConfig, Recipe

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
    try:
        path = _snapshot(model, local_only=not download)
    except LocalEntryNotFoundError as error:
        if not download:
            return recipe
        raise ModelError(_missing(model, str(error).partition("\n")[0])) from None
    except GatedRepoError:
        raise ModelError(
            f"{model.path}: the owner wants to be asked first: accept the terms on https://huggingface.co/{model.path}, "
            "then log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(
            f"{model.path}: has no branch, tag or commit {model.revision!r}: correct model.revision"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(_missing(model, "the hub has none of that name that this account may see")) from None
    except (HFValidationError, OSError) as error:
        raise ModelError(_missing(model, str(error).partition("\n")[0])) from None
    logger.info("%s: %s", model.path, path)
    # The directory is of one commit.
    return replace(recipe, model=replace(model, path=path, revision=None))


def _snapshot(model: ModelConfig, local_only: bool) -> str:
    pickles = ("pytorch_model*.bin",) if model.allow_pickle else ()
    return snapshot_download(
        model.path,
        revision=model.revision,
        allow_patterns=[*_WANTED, *pickles],
        ignore_patterns=list(_UNWANTED),
        local_files_only=local_only,
    )


def _missing(model: ModelConfig, reason: str) -> str:
    revision = f" --revision {model.revision}" if model.revision else ""
    return (
        f"{model.path}: is no directory, and as a hub id it is not in the cache {constants.HF_HUB_CACHE} and cannot be "
        f"downloaded ({reason}): correct model.path, or run `hf download {model.path}{revision}` where there is a network "
        "and copy the cache (HF_HOME says where it lies)"
    )

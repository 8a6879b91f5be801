"""What one start of a process works with, resolved once and passed on: every stage of `lander all` receives the same."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.deepspeed_json import check_deepspeed_json, resolve_deepspeed_config
from lander_ds.config.recipe import Recipe
from lander_ds.models.weights import base_fingerprint, is_base


@dataclass(frozen=True)
class Start:
    """A recipe, where it runs, and how it was started. Files are read when first asked for, and once."""

    recipe: Recipe
    run: RunDirectory
    force: bool = False
    """Do again what is up to date."""
    auto_resume: bool = False
    """Go on from the newest whole checkpoint, if there is one."""

    @cached_property
    def deepspeed(self) -> dict[str, Any]:
        """The content of the recipe's DeepSpeed JSON, which agrees with the recipe; not to be changed.

        Raises:
            ConfigError: as `check_deepspeed_json`.
        """
        return check_deepspeed_json(self.recipe)

    @cached_property
    def base_fingerprint(self) -> str:
        """Content hash of the base model.

        Raises:
            ModelError: the model cannot be read.
        """
        return base_fingerprint(self.recipe.model.path)

    def is_base(self, recorded: object) -> bool:
        """Whether an artefact's recorded fingerprint is that of the base model, see `weights.is_base`."""
        return is_base(recorded, self.base_fingerprint, self.recipe.model.path)

    def deepspeed_config(self, data_ranks: int, micro_batches: int) -> dict[str, Any]:
        """What to give to DeepSpeed (see `resolve_deepspeed_config`); a new dict at every call.

        Args:
            data_ranks: data-parallel ranks.
            micro_batches: per rank and optimizer step.
        """
        return resolve_deepspeed_config(self.recipe, data_ranks, micro_batches, self.deepspeed)

"""Models that translate: the untouched base, or the base with a checkpoint's trained tensors in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from lander_ds.checkpoint.checkpoint import Checkpoint
from lander_ds.checkpoint.choice import as_trained, chosen
from lander_ds.common.errors import ArtefactError, ModelError
from lander_ds.config.deepspeed_json import resolve_inference_config
from lander_ds.config.recipe import ModelConfig, Recipe
from lander_ds.config.schema.results import TranslateConfig
from lander_ds.distributed import accelerator, process_group
from lander_ds.distributed.engines.zero3 import Zero3
from lander_ds.distributed.start import Start
from lander_ds.inference.decoding import as_list
from lander_ds.models.family import Family
from lander_ds.models.loading import build, fill, model_positions, positions_of
from lander_ds.models.modeling_lander import LanderConfig, LanderForCausalLM
from lander_ds.models.parameter_groups import prepare_model
from lander_ds.models.routed_ffn import NONE, Routing, pair_id, routed
from lander_ds.models.shira import fold_shira
from lander_ds.models.surgery import routed_ffns
from lander_ds.models.weights import BaseWeights, read_config


class InferenceModel:
    """An HF model in evaluation mode whose routing, if it has one, is told the language pair."""

    def __init__(self, model: PreTrainedModel, checkpoint: str | None = None) -> None:
        """Wrap a model.

        Args:
            model: the model.
            checkpoint: name of the checkpoint in it, `step-N`, or of the directory; None for a base.
        """
        self.model, self.checkpoint = model, checkpoint
        self._pairs = next((ffn.pairs for _, ffn in routed_ffns(model)), ())

    @contextmanager
    def pair(self, pair: str) -> Iterator[None]:
        """Within this context, in this thread, every token belongs to `pair`; to none if the model was not trained for
        it."""
        if not self._pairs:
            yield
            return
        known = pair_id(pair if pair in self._pairs else NONE, self._pairs)
        with routed(Routing(torch.tensor(known, device=accelerator.device()))):
            yield


def open_for_inference(
    start: Start, system: Literal["base", "trained"], options: TranslateConfig | None = None
) -> InferenceModel:
    """The model of a system, on this rank's device or sharded over the ranks (`translate.weights`).

    Args:
        start: names the base, and the run directory in which the checkpoint lies.
        system: the untouched base, or the trained model.
        options: in place of the recipe's `translate`.

    Raises:
        ArtefactError: there is no checkpoint, or it belongs to another base model or other pairs.
        ModelError: the base cannot be read.
    """
    recipe, options = start.recipe, options or start.recipe.translate
    model, family = build(recipe.model, attention=None)
    model.generation_config = generation_config(Path(recipe.model.path))
    trained: Mapping[str, torch.Tensor] = {}
    name: str | None = None
    if system == "trained":
        saved = chosen(start.run.checkpoints, options.checkpoint)
        restore_shape(model, family, start, saved)
        trained, name = saved.result(), saved.path.name
        _check_pairs(model, recipe, saved)
    weights = BaseWeights(recipe.model.path, recipe.model.allow_pickle)
    if options.weights == "sharded":
        # Sharded as what is frozen.
        model.requires_grad_(False)
        engine = Zero3(resolve_inference_config(recipe, process_group.world_size()), recipe.frozen_shards)
        fill(model, family, weights, engine.placement, trained, reads=engine.reads_weights)
        model = engine.shard(model).module
    else:
        fill(model, family, weights, _to_device, trained)
        fold_shira(model)
        model.to(accelerator.device())
    model.eval()
    # With a head that requires no gradient, torch multiplies the last hidden state of a prompt by a copy of the head
    # per sentence (gigabytes) instead of by the head.
    model.requires_grad_(True)
    return InferenceModel(model, name)


def open_directory(config: ModelConfig) -> InferenceModel:
    """A model directory that stage export or `lander delta apply` wrote, dense or routed, on this rank's device.

    A routed one is opened with this package's modelling code, not with its own copy of it.

    Raises:
        ModelError: it cannot be opened.
    """
    directory, routed_export = Path(config.path), is_routed(Path(config.path))
    opener: Any = LanderForCausalLM if routed_export else AutoModelForCausalLM
    own = {} if routed_export else {"trust_remote_code": config.trust_remote_code}
    try:
        opened = opener.from_pretrained(directory, dtype=getattr(torch, config.dtype), **own)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{directory} cannot be opened ({error}): name a dense or routed export, or what lander delta apply wrote"
        ) from None
    model: PreTrainedModel = opened.model if routed_export else opened
    model.generation_config = generation_config(directory)
    model.to(accelerator.device())
    return InferenceModel(model.eval(), directory.name)


def positions_in(config: ModelConfig) -> int | None:
    """The longest sequence of a base or an export; None where it sets no limit.

    Raises:
        ModelError: config.json cannot be used.
    """
    if is_routed(Path(config.path)):
        return positions_of(LanderConfig.from_pretrained(config.path).base_config())
    return model_positions(config)


def is_routed(directory: Path) -> bool:
    """Whether a model directory is a routed export.

    Raises:
        ModelError: it is no model directory.
    """
    return bool(read_config(directory)["model_type"] == LanderConfig.model_type)


def generation_config(path: Path) -> GenerationConfig:
    """That of a model directory, with every id that its files call an end of sequence.

    Raises:
        ModelError: it cannot be read.
    """
    config = read_config(path)
    ends = as_list(config.get("eos_token_id")) + as_list(config.get("text_config", {}).get("eos_token_id"))
    own = GenerationConfig()
    if (path / GENERATION_CONFIG_NAME).exists():
        try:
            own = GenerationConfig.from_pretrained(path)
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(
                f"{path / GENERATION_CONFIG_NAME} cannot be read ({error}): repair or delete it"
            ) from None
    own.eos_token_id = list(dict.fromkeys([*as_list(own.eos_token_id), *ends])) or None
    return own


def restore_shape(model: PreTrainedModel, family: Family, start: Start, trained: Checkpoint) -> None:
    """Bring a base model (on meta) into the shape it was trained in.

    Raises:
        ArtefactError: the checkpoint belongs to another base model, or is damaged.
    """
    recipe, recorded = start.recipe, trained.state["base_fingerprint"]
    if not start.is_base(recorded):
        raise ArtefactError(
            f"{trained.path} was trained from another base model ({recorded}) than "
            f"{recipe.model.path} ({start.base_fingerprint}): correct model.path, or train again"
        )
    prepare_model(model, family, as_trained(recipe, trained.state), trained.selection())


def _check_pairs(model: PreTrainedModel, recipe: Recipe, trained: Checkpoint) -> None:
    """A routed model knows the pairs that it was trained for, and no other."""
    for _, ffn in routed_ffns(model):
        if unknown := [pair for pair in recipe.data.pairs if pair not in ffn.pairs]:
            raise ArtefactError(
                f"{trained.path} was trained for {', '.join(ffn.pairs)}, not for {', '.join(unknown)}: take it out of "
                "data.pairs, or train again"
            )


def _to_device(unit: nn.Module) -> None:
    unit.to(accelerator.device())

"""From a model directory to an HF model whose parameters are placed one decoder layer at a time.

`build` makes the model with all parameters on meta (no memory); surgery may follow; `fill` reads each unit
(embedding, layer, norm, head) from disk and hands it to `placement`, which under ZeRO-3 partitions it at once. No
rank ever holds more than its share and one unit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from lander_ds.common.errors import ArtefactError, ModelError
from lander_ds.config.recipe import ModelConfig
from lander_ds.models.attention import IMPLEMENTATION
from lander_ds.models.catalogue import family_of
from lander_ds.models.experts import unstack
from lander_ds.models.family import Family
from lander_ds.models.span import Span, units, whole
from lander_ds.models.weights import BaseWeights, read_config

Placement = Callable[[nn.Module], None]

HEAD = "lm_head.weight"
"""Name of the head's weights in every multimodal model of a known family."""

_AT_ONCE = 1 << 17
"""Values that are looked at together: few, so that freed copies leave no large holes between what is kept."""

POSITION_KEYS = ("max_position_embeddings", "n_positions", "seq_length")
"""Names under which config.json has the longest sequence that the model is made for."""

_DROPOUT = re.compile(r"(^|_)(dropout|layerdrop|pdrop|jitter_noise)$")


def hf_config(model: ModelConfig) -> tuple[Any, Family]:
    """The HF configuration of the text model, and its family.

    Dropout is switched off (of the known families OPT and Phi-3 have some), and so is jitter (Mixtral): their random
    numbers would follow the rank and the micro-batch, and with them the result.

    Raises:
        ModelError: unreadable, of an unknown family, quantised, or needing code that `trust_remote_code` does
            not allow.
    """
    raw = read_config(Path(model.path))
    if "auto_map" in raw and not model.trust_remote_code:
        raise ModelError(
            f"{model.path}/config.json wants to run Python code from the directory: read that code, "
            "then set model.trust_remote_code: true"
        )
    # Multimodal checkpoints (Gemma 3 from 4B on) hold the language model as a part.
    part = raw.get("text_config")
    text_type = part.get("model_type") if isinstance(part, dict) else None
    if "quantization_config" in raw or (isinstance(part, dict) and "quantization_config" in part):
        raise ModelError(
            f"{model.path}/config.json says the weights are quantised: neurons cannot be cut out of such "
            "matrices; use the unquantised checkpoint"
        )
    try:
        family = family_of(text_type or raw["model_type"])
    except ModelError as error:
        raise ModelError(f"{model.path}/config.json: {error}") from None
    if model.quantize is not None and family.ffn.up.startswith("mlp.experts."):
        raise ModelError(
            f"model.quantize: {model.quantize} is not supported for mixtures of experts ({raw['model_type']}): remove it"
        )
    try:
        config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # transformers answers bad values with exceptions of many kinds
        raise _unusable(model.path, error) from error
    if text_type:
        outer, config = config, config.text_config
        _tie_as_outside(config, outer, model)
    for name, value in vars(config).items():
        if _DROPOUT.search(name) and value:
            setattr(config, name, 0.0)
    return config, family


def model_positions(model: ModelConfig) -> int | None:
    """The longest sequence that the model is made for; None where its configuration sets no limit.

    Raises:
        ModelError: as `hf_config`.
    """
    return positions_of(hf_config(model)[0])


def positions_of(config: Any) -> int | None:
    """The longest sequence of an HF configuration; None where it sets no limit."""
    named = (getattr(config.get_text_config(), key, None) for key in POSITION_KEYS)
    return next((positions for positions in named if isinstance(positions, int)), None)


def build(model: ModelConfig, attention: str | None = IMPLEMENTATION) -> tuple[PreTrainedModel, Family]:
    """The HF causal language model with its parameters on meta and its buffers real.

    Args:
        model: which one.
        attention: attention implementation; None leaves the choice to transformers (for generation).

    Raises:
        ModelError: see `hf_config`; or config.json has values no model can be made of.
    """
    config, family = hf_config(model)
    arguments: dict[str, Any] = {"dtype": getattr(torch, model.dtype)}
    if attention is not None:
        arguments["attn_implementation"] = attention if family.packed_attention else "eager"

    def on_meta() -> PreTrainedModel:
        try:
            # Drawing values for tensors without memory would take most of the time.
            with init_empty_weights(include_buffers=False), no_init_weights():
                built = AutoModelForCausalLM.from_config(
                    config, trust_remote_code=model.trust_remote_code, **arguments
                )
        except Exception as error:  # sizes that do not divide, unknown activations, ...
            raise _unusable(model.path, error) from error
        assert isinstance(built, PreTrainedModel)
        built.tie_weights()
        unstack(built)
        return built

    built = on_meta()
    if _has_own_head(built, family, model):
        config.tie_word_embeddings = False
        built = on_meta()
    try:
        family.check_layers(built)
    except ModelError as error:
        raise ModelError(f"{model.path}/config.json: {error}") from None
    return built, family


def _tie_as_outside(config: Any, outer: Any, model: ModelConfig) -> None:
    """Tie the head of a multimodal model's language model as transformers does, which asks the outer configuration.

    Raises:
        ModelError: only the inner one ties the head, and there are no weights of its own.
    """
    tied = bool(getattr(outer, "tie_word_embeddings", False))
    weights = _weights(model) if config.tie_word_embeddings and not tied else None
    if weights is not None and not any(name.endswith(HEAD) for name in weights.names()):
        raise ModelError(
            f"{model.path}/config.json ties the head to the embedding in text_config and not outside, and the files "
            f"hold no {HEAD}: transformers would make up a random head; write tie_word_embeddings: true at the outer "
            "level, or copy the model directory again"
        )
    config.tie_word_embeddings = tied


def _has_own_head(built: PreTrainedModel, family: Family, model: ModelConfig) -> bool:
    """Whether the files hold another head than the embedding that config.json ties it to; transformers uses it then."""
    tied = tied_parameters(built)
    weights = _weights(model) if tied else None
    if weights is None:
        return False
    for names in tied.items():
        own, shared = (weights.stored_name(name, built.base_model_prefix, family.renamed) for name in names)
        if own is not None and shared is not None and own != shared:
            first, second = weights.read(own), weights.read(shared)
            if first.shape != second.shape or not torch.equal(first, second):
                return True
    return False


def _weights(model: ModelConfig) -> BaseWeights | None:
    """The weights beside config.json, or None: not every model is filled, and what fills it says what is wrong."""
    try:
        return BaseWeights(model.path, model.allow_pickle)
    except ModelError:
        return None


def _unusable(path: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ModelError(
        f"{path}/config.json cannot be used by transformers: {reason}; correct it or copy the directory again"
    )


def fill(
    model: PreTrainedModel,
    family: Family,
    weights: BaseWeights,
    placement: Placement,
    trained: Mapping[str, torch.Tensor] | None = None,
    span: Span | None = None,
    reads: bool = True,
) -> None:
    """Give every meta parameter its values from disk, unit by unit.

    Parameters that surgery has cut are read as slices of their base tensors; parameters that exist only in
    this project (gates, adapters) must be real already. Tied parameters stay tied.

    Args:
        model: from `build`, perhaps after surgery.
        family: its family.
        weights: the files.
        placement: called with each unit once it is real; ZeRO-3 partitions here.
        trained: values that replace the base's, by parameter name.
        span: the part to fill; the rest stays on meta. Default: the whole model.
        reads: False: leave the values to `placement`, which gets them from another rank.

    Raises:
        ModelError: a tensor is missing on disk, has another shape, or holds NaN.
        ArtefactError: a trained tensor fits no parameter.
    """
    trained = trained or {}
    _refuse_strangers(model, trained)
    source = _Source(model, family, weights)
    span = span or whole(model, family)
    # A pipeline stage that has the head but not the embedding holds its own copy of what the two share.
    originals = tied_parameters(model)
    tied = originals if span.first and span.last else {}
    for name, unit in units(model, family, span):
        for local, parameter in list(unit.named_parameters()):
            if f"{name}.{local}" in trained:
                values = trained[f"{name}.{local}"] if reads else torch.empty_like(parameter, device="cpu")
                if values.shape != parameter.shape:
                    raise ArtefactError(_misfit(f"{name}.{local} {list(values.shape)}"))
                _set(unit, local, parameter, values.to(parameter.dtype))
        waiting = [
            (_base_name(originals.get(f"{name}.{local}", f"{name}.{local}"), parameter), local, parameter)
            for local, parameter in unit.named_parameters()
            if parameter.is_meta and f"{name}.{local}" not in tied
        ]
        # By base tensor, so that one that several banks are cut from is read once.
        for wanted, local, parameter in sorted(waiting, key=lambda item: item[0]):
            values = source.values(wanted, parameter) if reads else torch.empty_like(parameter, device="cpu")
            _set(unit, local, parameter, values)
        source.forget()
        if not any(parameter.is_meta for parameter in unit.parameters()):
            placement(unit)
    for name, original in tied.items():
        _tie(model, name, original)


def _refuse_strangers(model: PreTrainedModel, trained: Mapping[str, torch.Tensor]) -> None:
    names = {name for name, _ in model.named_parameters()}
    for name in trained:
        if name not in names:
            raise ArtefactError(_misfit(name))


def _misfit(name: str) -> str:
    return (
        f"trained tensor {name} fits no parameter of this model: the checkpoint is from another model or version; "
        "train again"
    )


def tied_parameters(model: PreTrainedModel) -> dict[str, str]:
    """Parameters that are tied to another: name -> name of the one that is stored."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return {}
    keys = model._tied_weights_keys or {}
    return dict(keys) if isinstance(keys, dict) else {}


def _tie(model: PreTrainedModel, name: str, source: str) -> None:
    module, _, leaf = name.rpartition(".")
    origin, _, source_leaf = source.rpartition(".")
    setattr(model.get_submodule(module), leaf, getattr(model.get_submodule(origin), source_leaf))


def _base_name(name: str, parameter: nn.Parameter) -> str:
    """Name in the HF model of the tensor that a parameter's values come from."""
    cut = getattr(parameter, "lander_slice", None)
    return cut.tensor if cut is not None else name.replace(".base_layer.", ".")


class _Source:
    """Checked base tensors in the model's type; keeps the last one, because several banks are cut from it."""

    def __init__(self, model: PreTrainedModel, family: Family, weights: BaseWeights) -> None:
        self._weights = weights
        self._prefix = model.base_model_prefix
        self._renamed = family.renamed
        self._dtype = model.dtype
        self._last: tuple[str, torch.Tensor] | None = None

    def forget(self) -> None:
        """Let go of the last tensor."""
        self._last = None

    def values(self, name: str, parameter: nn.Parameter) -> torch.Tensor:
        """What `parameter` is to hold: the tensor `name`, or the parameter's slice of it."""
        cut = getattr(parameter, "lander_slice", None)
        whole = self._tensor(name, parameter.shape if cut is None else cut.shape)
        return whole if cut is None else cut.take(whole)

    def _tensor(self, name: str, shape: torch.Size) -> torch.Tensor:
        if self._last is not None and self._last[0] == name:
            return self._last[1]
        weights = self._weights
        stored = weights.stored_name(name, self._prefix, self._renamed)
        if stored is None:
            raise ModelError(
                f"{weights.directory} lacks the tensor {name} that config.json implies: "
                "copy the model directory again"
            )
        values = weights.read(stored)
        if values.shape != shape:
            raise ModelError(
                f"{weights.file_of(stored)}: {stored} has shape {list(values.shape)}, config.json implies "
                f"{list(shape)}: weights and config.json do not belong together"
            )
        values = values.to(self._dtype)
        if not _finite(values):
            raise ModelError(
                f"{weights.file_of(stored)}: {stored} holds NaN or infinity in {self._dtype}: the base is "
                "unusable; copy it again or choose a wider model.dtype"
            )
        self._last = (name, values)
        return values


def _finite(values: torch.Tensor) -> bool:
    """Whether every value is. A sum is finite only if every term is; in parts, because torch makes a float32 copy."""
    parts = torch.split(values.reshape(-1), _AT_ONCE)
    return all(bool(torch.isfinite(part.sum(dtype=torch.float32))) for part in parts)


def _set(unit: nn.Module, local: str, old: nn.Parameter, values: torch.Tensor) -> None:
    module, _, leaf = local.rpartition(".")
    new = nn.Parameter(values.contiguous(), requires_grad=old.requires_grad)
    if hasattr(old, "lander_slice"):
        new.lander_slice = old.lander_slice  # type: ignore[attr-defined]
    setattr(unit.get_submodule(module), leaf, new)

"""Export `routed`: banks and gates as they were trained, with a modelling file that needs only transformers."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lander_ds.common.errors import ConfigError
from lander_ds.common.files import replacing, write_json
from lander_ds.export.companions import copy_companions
from lander_ds.export.sources import kind_of
from lander_ds.export.stream import Spec
from lander_ds.export.trained import TrainedModel, is_gate
from lander_ds.export.writer import DEFAULT_SHARD_BYTES, Form, write_weights
from lander_ds.models import experts, joined, modeling_lander, routed_ffn
from lander_ds.models.surgery import OPTIONS, banks_of, routed_ffns

PREFIX = "model."
"""Of the plain model's parameters in the routed model."""


def export_routed(trained: TrainedModel, directory: Path, form: Form) -> None:
    """Write a model directory; an older one is replaced by the whole new one.

    Raises:
        ConfigError: the method has no routed form.
    """
    if trained.method != "lander":
        raise ConfigError(
            f"export.formats: routed exists for train.method lander only, this checkpoint is of method "
            f"{trained.method}: use export.formats: [dense]"
        )
    parameters = {f"{PREFIX}{name}": parameter for name, parameter in trained.parameters()}
    specs = {name: _spec(trained, name, parameter, form.dtype) for name, parameter in parameters.items()}

    def values(name: str) -> torch.Tensor:
        return trained.value(name.removeprefix(PREFIX), parameters[name], form.dtype)

    with replacing(directory) as new:
        limit = form.shard_bytes or DEFAULT_SHARD_BYTES
        write_weights(new, specs, values, limit, f"export {directory.name}")
        write_json(new / "config.json", _config(trained, form.dtype))
        for module in (modeling_lander, routed_ffn, joined, experts):
            file = Path(str(module.__file__))
            shutil.copyfile(file, new / file.name)
        copy_companions(trained.weights.directory, new)


def _spec(trained: TrainedModel, name: str, parameter: torch.nn.Parameter, dtype: torch.dtype | None) -> Spec:
    if is_gate(name):
        return Spec.like(parameter, dtype)
    cut = getattr(parameter, "lander_slice", None)
    plain = name.removeprefix(PREFIX) if cut is None else cut.tensor
    first, *_ = trained.weights.names_of(trained.stored_name(plain))
    base = trained.weights.read(first)
    return Spec.like(parameter, kind_of(base, dtype))


def _config(trained: TrainedModel, dtype: torch.dtype | None) -> dict[str, Any]:
    family, model = trained.family, trained.model
    base = model.config.to_dict()
    base.pop("_name_or_path", None)
    layers = [
        {
            "layer": routed.layer,
            "banks": [
                {
                    "kind": bank.kind,
                    "owners": [routed.pairs[owner] for owner in bank.owners],
                    "size": bank.up.shape[0],
                    **({"experts": list(bank.experts)} if bank.experts else {}),
                }
                for bank in banks_of(routed)
            ],
        }
        for _, routed in routed_ffns(model)
    ]
    first = next(routed for _, routed in routed_ffns(model))
    hidden = 0 if first.router is None else first.router.get_parameter("w1").shape[0]
    return {
        "architectures": ["LanderForCausalLM"],
        "model_type": "lander",
        "auto_map": {
            "AutoConfig": "modeling_lander.LanderConfig",
            "AutoModel": "modeling_lander.LanderModel",
            "AutoModelForCausalLM": "modeling_lander.LanderForCausalLM",
        },
        "dtype": str(dtype or model.dtype).removeprefix("torch."),
        "tie_word_embeddings": bool(getattr(model.config, "tie_word_embeddings", False)),
        "vocab_size": model.config.vocab_size,
        "bos_token_id": getattr(model.config, "bos_token_id", None),
        "eos_token_id": getattr(model.config, "eos_token_id", None),
        "pad_token_id": getattr(model.config, "pad_token_id", None),
        "base": base,
        "routing": {
            "pairs": list(first.pairs),
            "layers_path": f"{family.decoder}.{family.layers}",
            "ffn": asdict(family.ffn),
            "options": {key: first.options[key] for key in OPTIONS},
            "hidden": hidden,
            "layers": layers,
        },
    }

"""Export `routed`: banks and gates as they were trained, with a modelling file that needs only transformers."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lander_ds import console
from lander_ds.directories import replacing
from lander_ds.errors import ConfigError
from lander_ds.export.trained import TrainedModel
from lander_ds.export.writer import ShardWriter, copy_companions
from lander_ds.families.loading import tied_parameters
from lander_ds.routing import modeling_lander, routed_ffn
from lander_ds.routing.surgery import OPTIONS, banks_of, routed_ffns
from lander_ds.run import write_json


def export_routed(trained: TrainedModel, directory: Path, dtype: torch.dtype | None) -> None:
    """Write the directory.

    Args:
        trained: base and trained tensors.
        directory: where to; replaced when it exists.
        dtype: of the exported weights; None keeps the base's types.

    Raises:
        ConfigError: the method has no routed form.
    """
    if trained.checkpoint.state["method"] != "lander":
        raise ConfigError(
            f"export.formats: routed exists for train.method lander only, this checkpoint is of method "
            f"{trained.checkpoint.state['method']}: use export.formats: [dense]"
        )
    tied = tied_parameters(trained.model)
    parameters = [(name, p) for name, p in trained.model.named_parameters() if name not in tied]
    with (
        replacing(directory) as new,
        console.progress("export routed (tensors)", len(parameters)) as bar,
    ):
        writer = ShardWriter(new)
        for name, parameter in parameters:
            writer.add(f"model.{name}", _values(trained, name, parameter, dtype))
            bar.advance()
        writer.close()
        write_json(new / "config.json", _config(trained, dtype))
        for module in (modeling_lander, routed_ffn):
            source = Path(str(module.__file__))
            shutil.copyfile(source, new / source.name)
        copy_companions(trained.weights.directory, new)


def _values(
    trained: TrainedModel, name: str, parameter: torch.nn.Parameter, dtype: torch.dtype | None
) -> torch.Tensor:
    """A parameter in `dtype`; None: in the type of the base tensor it comes from (gates: that of the training)."""
    if ".router." in name:
        return trained.tensors[name].to(dtype or parameter.dtype)
    cut = trained.cuts.get(name)
    base = trained.weights.read(trained.stored_name(name if cut is None else cut.tensor))
    if name in trained.tensors:
        return trained.tensors[name].to(dtype or base.dtype)
    values = base if cut is None else base.index_select(cut.dim, cut.neurons)
    return values.to(dtype or base.dtype)


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
                    "owners": [routed.state.pairs[owner] for owner in bank.owners],
                    "size": bank.up.shape[0],
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
            "pairs": list(first.state.pairs),
            "layers_path": f"{family.decoder}.{family.layers}",
            "ffn": asdict(family.ffn),
            "options": {key: first.options[key] for key in OPTIONS},
            "hidden": hidden,
            "layers": layers,
        },
    }

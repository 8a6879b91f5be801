"""Which parameters are trained, and in which parameter group.

Groups of the method: `general` and `specific:<owners>`, one per owner set (`general:<owners>` where only some pairs
selected a layer), and `gates`. Baselines have one group:
`dense` (whole tensors), `lora` or `shira`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from lander_ds.common.errors import ConfigError
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.training import TrainConfig
from lander_ds.method.selection import Selection
from lander_ds.models.family import Family
from lander_ds.models.shira import ENTRIES, install_shira
from lander_ds.models.surgery import banks_of, install, routed_ffns

Groups = dict[str, list[nn.Parameter]]


def prepare_model(
    model: PreTrainedModel, family: Family, recipe: Recipe, selection: Selection | None
) -> None:
    """Bring a model (on meta) into the shape that the recipe's method trains.

    `lander`: surgery. `lora`: adapters on every linear layer of the decoder but experts, through PEFT. `shira`:
    trained entries in the same layers. `full`, `layers`: as is.

    Raises:
        ConfigError: an option does not fit the model.
    """
    if recipe.train.method == "lander":
        assert selection is not None
        install(model, family, selection, recipe.routing, recipe.seed)
    elif recipe.train.method == "lora":
        _add_adapters(model, recipe)
    elif recipe.train.method == "shira":
        install_shira(model, recipe.train.shira.r, recipe.seed)


def _add_adapters(model: PreTrainedModel, recipe: Recipe) -> None:
    # Here, because it takes two seconds that only LoRA needs.
    from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415

    lora = recipe.train.lora
    head = model.get_output_embeddings()
    targets = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    ]
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, bias="none"
    )
    # PEFT draws the A matrices on meta; they are drawn here, by name, so that every rank has the same.
    inject_adapter_in_model(config, model)
    for number, (name, module) in enumerate(model.named_modules()):
        if name.endswith(("lora_A.default", "lora_B.default")):
            assert isinstance(module, nn.Linear)
            weight = torch.zeros(module.weight.shape)
            if name.endswith("lora_A.default"):
                generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + number)
                bound = weight.shape[1] ** -0.5
                weight.uniform_(-bound, bound, generator=generator)
            module.weight = nn.Parameter(weight.to(model.dtype))


def mark_trained(
    model: PreTrainedModel, family: Family, train: TrainConfig, selection: Selection | None
) -> Groups:
    """Set `requires_grad` on exactly what is trained and return it by group.

    Raises:
        ConfigError: nothing is left to train.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    groups: Groups = {}
    if train.method == "lander":
        groups = _bank_groups(model, train)
    elif train.method == "lora":
        groups["lora"] = [p for name, p in model.named_parameters() if ".lora_" in name]
    elif train.method == "shira":
        groups["shira"] = [p for name, p in model.named_parameters() if name.endswith(ENTRIES)]
    elif train.method == "full":
        groups["dense"] = list(model.parameters())
    else:
        assert selection is not None
        groups["dense"] = list(_ffn_parameters(model, family, [layer.layer for layer in selection.layers]))
    for parameters in groups.values():
        for parameter in parameters:
            parameter.requires_grad_(True)
    if not any(groups.values()):
        raise ConfigError(
            "nothing is left to train: the selection has no bank of the kinds in train.banks "
            f"({', '.join(train.banks)}) and routing.gate is none; change select.banks or train.banks"
        )
    return groups


def _bank_groups(model: PreTrainedModel, train: TrainConfig) -> Groups:
    groups: Groups = {}
    gates: list[nn.Parameter] = []
    for _, routed in routed_ffns(model):
        for bank in banks_of(routed):
            if bank.kind in train.banks:
                everyone = len(bank.owners) == len(routed.pairs)
                name = bank.kind if everyone else str(bank.group)
                groups.setdefault(name, []).extend(bank.parameters())
        if routed.router is not None:
            gates.extend(routed.router.parameters())
    ordered = dict(sorted(groups.items()))
    return {**ordered, "gates": gates} if gates else ordered


def _ffn_parameters(model: PreTrainedModel, family: Family, layers: list[int]) -> Iterable[nn.Parameter]:
    """All weights of the FFN projections of `layers`, and the in-projection's bias where there is one."""
    for index in layers:
        layer = family.layers_of(model)[index]
        for path in family.ffn.projections:
            projection = layer.get_submodule(path)
            for name, parameter in projection.named_parameters():
                if name == "weight" or path != family.ffn.down:
                    yield parameter


def active_groups(names: Iterable[str], pairs_in_batch: Iterable[str]) -> set[str]:
    """Names of the groups that a global batch with these pairs may change: banks that one of its pairs owns, and
    everything that is no bank."""
    present = set(pairs_in_batch)
    active = set()
    for name in names:
        _, _, owners = name.partition(":")
        if not owners or present & set(owners.split("+")):
            active.add(name)
    return active

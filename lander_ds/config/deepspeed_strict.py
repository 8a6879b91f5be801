"""The DeepSpeed JSON against what DeepSpeed knows, on all levels, and what this trainer can honour."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lander_ds.common.errors import ConfigError
from lander_ds.config.deepspeed_schema import REFUSED, REFUSED_IN_ZERO, REFUSED_WHEN_SET, DeepSpeedJson
from lander_ds.config.document import Document, KeyPath, Problems, describe, dotted, lookup, read_text
from lander_ds.config.keys import fields_of, section_in, similar_keys
from lander_ds.config.strict import explained
from lander_ds.config.yaml_source import parse_yaml

AUTO: tuple[KeyPath, ...] = (
    ("train_batch_size",),
    ("train_micro_batch_size_per_gpu",),
    ("gradient_accumulation_steps",),
    ("gradient_clipping",),
    ("bf16", "enabled"),
    ("fp16", "enabled"),
)
"""Keys that the recipe fills when they are "auto" or absent."""

_RECIPE_KEY_OF_PARAMETER = {
    "lr": "train.lr",
    "betas": "train.betas",
    "eps": "train.eps",
    "weight_decay": "train.weight_decay",
}


def read_deepspeed_json(path: Path) -> Document:
    """The file as a document whose every key and value DeepSpeed knows and this trainer can honour.

    Raises:
        ConfigError: one message with every problem found.
    """
    text = read_text(path, "the DeepSpeed JSON (recipe key deepspeed)")
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}); "
            f"JSON has no comments, no trailing commas and double quotes only"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: a DeepSpeed JSON is an object of keys, found {describe(value)}")
    # JSON is YAML but for tabs: the YAML reader adds line numbers and refuses duplicate keys.
    document = parse_yaml(text.replace("\t", " "), str(path))
    document.value = value
    problems = Problems(document)
    for check in (_check_keys, _check_values, _check_supported):
        check(value, problems)
        problems.refuse()
    return document


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number; write a finite number")


def _check_keys(
    value: dict[str, Any], problems: Problems, model: type = DeepSpeedJson, path: KeyPath = ()
) -> None:
    """Unknown, removed and deprecated keys of one section and the sections inside it."""
    fields = fields_of(model)
    valid = [name for name, field in fields.items() if not _replacement(field)]
    for key, item in value.items():
        here = (*path, key)
        if not path and key in REFUSED:
            problems.add(here, REFUSED[key])
        elif path == ("zero_optimization",) and key in REFUSED_IN_ZERO:
            problems.add(here, f"{REFUSED_IN_ZERO[key].strip()} Remove it.")
        elif key not in fields:
            similar = similar_keys(DeepSpeedJson, here, [*valid, *(() if path else REFUSED)])
            knows = f"{dotted(path) or 'DeepSpeed'} knows {', '.join(sorted(valid))}"
            hint = f"did you mean {similar[0]}?" if similar else knows
            problems.add(here, f"DeepSpeed has no such key; {hint}")
        elif replacement := _replacement(fields[key]):
            problems.add(here, f"deprecated by DeepSpeed; write {replacement} instead")
        elif (inner := section_in(fields[key].annotation)) and isinstance(item, dict):
            _check_keys(item, problems, inner, here)


def _replacement(field: FieldInfo) -> str | None:
    """The key that DeepSpeed wants instead of a deprecated one; None for keys that are not deprecated."""
    extra: Any = field.json_schema_extra or {}
    return (extra.get("new_param") or "nothing") if extra.get("deprecated") else None


def _check_values(value: dict[str, Any], problems: Problems) -> None:
    plain = _without(value, AUTO)
    try:
        model = DeepSpeedJson(**plain)
    except ValidationError as error:
        for entry in error.errors(include_url=False):
            path, message = explained(DeepSpeedJson, entry, plain)
            if entry["type"] in ("model_type", "dict_type"):
                message = f"expected an object {{ }}, found {describe(lookup(plain, path))}"
            problems.add(path, message)
        return
    _check_exact_types(model, plain, (), problems)


def _without(value: dict[str, Any], paths: tuple[KeyPath, ...]) -> dict[str, Any]:
    """A copy of `value` without the keys among `paths` that are "auto"."""
    result = copy.deepcopy(value)
    for path in paths:
        if lookup(result, path) == "auto":
            del lookup(result, path[:-1])[path[-1]]
    return result


def _check_exact_types(model: BaseModel, value: dict[str, Any], path: KeyPath, problems: Problems) -> None:
    """Pydantic reads "3" as 3 and 1 as true; whoever else reads the JSON would not."""
    attributes = {name: name for name in type(model).model_fields}
    attributes |= {field.alias: name for name, field in type(model).model_fields.items() if field.alias}
    for key, item in value.items():
        read = getattr(model, attributes[key])
        if isinstance(read, BaseModel) and isinstance(item, dict):
            _check_exact_types(read, item, (*path, key), problems)
        elif isinstance(read, bool | int | float) and item != "auto":
            kind = "true or false" if isinstance(read, bool) else "a number"
            if isinstance(item, str) or isinstance(item, bool) != isinstance(read, bool):
                problems.add(
                    (*path, key), f"expected {kind}, found {describe(item)}; write {json.dumps(read)}"
                )


def _check_supported(value: dict[str, Any], problems: Problems) -> None:
    """What DeepSpeed accepts and this trainer cannot honour."""
    for path, reason in REFUSED_WHEN_SET.items():
        if lookup(value, path) not in (None, False, 0, "auto"):
            problems.add(path, reason)
    for name in ("offload_optimizer", "offload_param"):
        path = ("zero_optimization", name)
        if lookup(value, (*path, "device")) != "nvme":
            continue
        nvme = lookup(value, (*path, "nvme_path"))
        if nvme in (None, "auto"):
            problems.add(path, "device nvme needs nvme_path; add a directory on a local disk")
        elif not Path(nvme).is_dir():
            problems.add((*path, "nvme_path"), f"{nvme} is no directory; make it or name another")
    ratio = ("zero_optimization", "offload_optimizer", "ratio")
    if lookup(value, ratio) not in (None, 1.0, "auto"):
        problems.add(
            ratio,
            "DeepSpeed would step a part with an optimizer that does not know the active banks; write 1.0",
        )
    if value.get("managed_gradient_accumulation") is False:
        problems.add(("managed_gradient_accumulation",), "the training loop relies on true; remove it")
    if value.get("zero_allow_untested_optimizer") is False:
        problems.add(
            ("zero_allow_untested_optimizer",), "DeepSpeed would refuse lander_ds's optimizer; remove it"
        )
    if value.get("zero_force_ds_cpu_optimizer") is True:
        problems.add(
            ("zero_force_ds_cpu_optimizer",), "DeepSpeed would refuse lander_ds's optimizer; remove it"
        )
    if str(value.get("gradient_allreduce_op", "mean")).lower() == "sum":
        problems.add(("gradient_allreduce_op",), "lander_ds relies on mean; remove it")
    if value.get("gradient_predivide_factor", 1.0) != 1.0:
        problems.add(
            ("gradient_predivide_factor",), "lander_ds undoes how DeepSpeed averages gradients; remove it"
        )
    if lookup(value, ("pipeline", "use_reentrant")) is False:
        problems.add(("pipeline", "use_reentrant"), "lander_ds recomputes layers itself; remove it")
    _check_optimizer(value.get("optimizer") or {}, problems)


def _check_optimizer(block: dict[str, Any], problems: Problems) -> None:
    for name, value in (block.get("params") or {}).items():
        if value == "auto":
            continue
        key = _RECIPE_KEY_OF_PARAMETER.get(name)
        cure = f'set {key} in the recipe and write "auto" here' if key else "remove it"
        problems.add(("optimizer", "params", name), f"the recipe describes the optimizer; {cure}")
    if block.get("legacy_fusion"):
        problems.add(("optimizer", "legacy_fusion"), "the recipe describes the optimizer; remove it")

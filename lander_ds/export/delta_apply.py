"""`lander delta`: putting a delta onto its base, taking it off again, and making one from any fine-tuned model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from lander_ds.common.errors import ArtefactError, ModelError
from lander_ds.common.files import is_inside, replacing, write_text
from lander_ds.export.card import Exactness, write_card
from lander_ds.export.companions import companions, copy_companions
from lander_ds.export.delta import META, Delta, Flipped
from lander_ds.export.delta_write import write_delta
from lander_ds.export.dense import export_dense
from lander_ds.export.fold import folded, folds_of
from lander_ds.export.routed import export_routed
from lander_ds.export.stream import Header, Spec
from lander_ds.export.unrouted import Unrouted
from lander_ds.export.writer import (
    DEFAULT_SHARD_BYTES,
    Form,
    write_files,
    write_weights,
)
from lander_ds.models.files import INDEX
from lander_ds.models.weights import BaseWeights, base_fingerprint, base_name, is_base, read_config

logger = logging.getLogger(__name__)

_INCIDENTAL = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache")
"""Keys of config.json that say nothing about the model."""


@dataclass(frozen=True)
class Options:
    """What `apply` makes of a delta."""

    fold: str | None = None
    """A pair, or `mean`: its mean gates become part of the weights. None: routed where there are gates."""
    dense: bool = False
    """Leave the gates out."""
    form: Form = field(default_factory=Form)
    allow_pickle: bool = False
    """Open a pickled base."""


def apply_delta(base: Path, delta_path: Path, out: Path, options: Options, force: bool) -> None:
    """Write the model that `delta` makes of `base`: routed where it has gates, else dense.

    Raises:
        ArtefactError: the delta is damaged or belongs to another base, or `out` exists.
        ModelError: the base is damaged.
    """
    _refuse_target(out, (base, delta_path), force)
    delta = Delta.open(delta_path)
    weights = _plain(base, options.allow_pickle)
    delta.check(weights, base, back=False)
    if not is_base(delta.fingerprint, base_fingerprint(base), base):
        logger.warning(
            "%s is not the base that %s was made from, but every tensor that it touches is the same",
            base,
            delta_path,
        )
    name, exactness, write = _result(delta, weights, options)
    with replacing(out) as new:
        write(new, options.form)
        write_card(new, delta.meta["facts"], name, exactness)
    logger.info("wrote %s", out)


def _result(
    delta: Delta, weights: BaseWeights, options: Options
) -> tuple[str, Exactness, Callable[[Path, Form], None]]:
    """What a delta becomes: its form, what the card says of it, and what writes it."""
    plain, typed = partial(export_dense, Flipped(weights, delta)), Exactness.typed(options.form)
    if delta.routing() is None:
        if options.fold is not None:
            raise ArtefactError(f"{delta.path} has no gates to fold: leave out --fold")
        return "dense", typed, plain
    trained = delta.trained(weights)
    if options.fold is not None:
        [pair] = folds_of(trained, [options.fold])
        source = folded(trained, delta.meta["gate_means"], pair)
        return f"dense-{pair}", Exactness.folded(pair, None), partial(export_dense, source)
    if not trained.pairs_differ:
        return "dense", typed, plain
    if options.dense:
        return "dense", Exactness.without_gates(), plain
    return "routed", typed, partial(export_routed, trained)


def revert_delta(model: Path, delta_path: Path, out: Path, force: bool) -> None:
    """Write the base of which `apply_delta` made `model`, byte for byte.

    Raises:
        ArtefactError: the delta is damaged, `model` was not made from it, or `out` exists.
        ModelError: the model is damaged.
    """
    _refuse_target(out, (model, delta_path), force)
    delta = Delta.open(delta_path)
    base = delta.meta["base"]
    weights = BaseWeights(model)
    with replacing(out) as new:
        write_text(new / "config.json", base["config"])
        headers = _headers(delta, weights)
        names = [name for header in headers.values() for name in header.specs]
        tensors: BaseWeights | Unrouted = weights
        if read_config(model)["model_type"] == "lander":
            tensors = _unrouted(delta, weights, new, names)
        if missing := [name for name in names if name not in tensors]:
            raise ArtefactError(
                f"{model} lacks {len(missing)} tensors of the base, such as {missing[0]}: take the delta off a dense "
                "model (`lander delta apply --dense`) instead"
            )
        delta.check(tensors, model, back=True)

        def tensor_of(name: str) -> torch.Tensor:
            tensor = tensors.read(name)
            return delta.flip(name, tensor) if name in delta.changes else tensor

        if base["files"] is None:
            specs = {name: spec for header in headers.values() for name, spec in header.specs.items()}
            write_weights(new, specs, tensor_of, DEFAULT_SHARD_BYTES, "revert")
        else:
            write_files(new, headers, tensor_of, "revert")
            if base["index"] is not None:
                write_text(new / INDEX, base["index"])
        copy_companions(model, new, code=tensors is weights and "auto_map" in read_config(new))
    if base["files"] is not None and not is_base(delta.fingerprint, base_fingerprint(out), out):
        logger.warning(
            "%s: what the delta touches is the base's again, but other tensors are not: %s holds further changes",
            out,
            model,
        )
    logger.info("wrote %s", out)


def diff_models(base: Path, model: Path, out: Path, force: bool, allow_pickle: bool = False) -> None:
    """Write the delta that makes `model` of `base`: any tensors, rows and columns that differ.

    Raises:
        ArtefactError: the two are no models of one architecture and type, or `out` exists.
        ModelError: a model is damaged.
    """
    _refuse_target(out, (base, model), force)
    weights, other = _plain(base, allow_pickle), _plain(model, allow_pickle)
    _refuse_misfits(weights, other)
    _tell_other_differences(base, model)
    fingerprint = base_fingerprint(base)
    facts = {
        "base": {"name": base_name(base), "fingerprint": fingerprint},
        "method": f"difference to {base_name(model)}",
    }
    with replacing(out) as new:
        description = {"method": "diff", "routing": None, "dtype": None, "gate_means": {}, "facts": facts}
        write_delta(_Other(weights, other), {}, new, description, fingerprint)
        write_card(new, facts, "delta", Exactness.exact())
    if not Delta.open(out).changes:
        logger.warning("%s and %s have the same weights: the delta is empty", base, model)
    logger.info("wrote %s", out)


@dataclass(frozen=True)
class _Other:
    """Another model as a change of a base (a `TensorSource`)."""

    weights: BaseWeights
    other: BaseWeights

    def changed(self) -> Set[str]:
        return set(self.other.names())

    def tensor(self, stored: str, dtype: torch.dtype | None) -> torch.Tensor:
        return self.other.read(stored)


def _plain(directory: Path, allow_pickle: bool) -> BaseWeights:
    if read_config(directory)["model_type"] == "lander":
        raise ModelError(f"{directory} is a routed model: give the plain model it was made from")
    return BaseWeights(directory, allow_pickle)


def _headers(delta: Delta, weights: BaseWeights) -> Mapping[str, Header]:
    """File -> header of the base's weight files."""
    files = delta.meta["base"]["files"]
    if files is None:
        # A pickled base: the tensors in safetensors files.
        specs = {name: Spec.like(weights.read(name)) for name in weights.names()}
        return {"model.safetensors": Header.make(specs)}
    for name in files:
        if not is_inside(name) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ArtefactError(f"{delta.path / META} names the weight file {name!r}: do not use this delta")
    return {name: Header.parse(text) for name, text in files.items()}


def _unrouted(delta: Delta, weights: BaseWeights, config: Path, names: list[str]) -> Unrouted:
    routing = delta.routing()
    if routing is None:
        raise ArtefactError(
            f"{weights.directory} is routed and {delta.path} is not: they do not belong together"
        )
    if delta.meta["base"]["files"] is None:
        raise ArtefactError(
            f"{delta.path} was made from a pickled base, whose files are unknown: take it off a dense model "
            "(`lander delta apply --dense`) instead"
        )
    return Unrouted(weights, config, names, delta.selection(), routing)


def _refuse_misfits(base: BaseWeights, model: BaseWeights) -> None:
    ours, theirs = set(base.names()), set(model.names())
    if ours != theirs:
        only = sorted(ours ^ theirs)[0]
        has = base.directory if only in ours else model.directory
        raise ModelError(
            f"{base.directory} and {model.directory} are not of one architecture: {len(ours ^ theirs)} tensors are in "
            f"one of them only, such as {only} in {has}; save both with the same version of transformers"
        )
    for name in base.names():
        first, second = Spec.like(base.read(name)), Spec.like(model.read(name))
        if first != second:
            raise ModelError(
                f"{name} is {first.dtype} {list(first.shape)} in {base.directory} and {second.dtype} "
                f"{list(second.shape)} in {model.directory}: a delta needs the same shape and type; save the model in "
                "the base's type"
            )


def _tell_other_differences(base: Path, model: Path) -> None:
    """A delta holds weights alone: what else differs must not be lost silently."""
    ours, theirs = read_config(base), read_config(model)
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key) and key not in _INCIDENTAL]
    files = [
        name
        for name in sorted(companions(model))
        if not (base / name).is_file() or (base / name).read_bytes() != (model / name).read_bytes()
    ]
    if keys:
        logger.warning(
            "config.json differs in %s: a delta keeps the base's", ", ".join(map(json.dumps, keys))
        )
    if files:
        logger.warning("%s differ: a delta keeps the base's", ", ".join(files))


def _refuse_target(out: Path, sources: tuple[Path, ...], force: bool) -> None:
    target = out.absolute().resolve()
    for source in sources:
        given = source.resolve()
        if target == given or target.is_relative_to(given) or given.is_relative_to(target):
            raise ArtefactError(f"{out} and {source} overlap: choose another directory for the result")
    if not out.exists() and not out.is_symlink():
        return
    ours = out.is_dir() and (
        (out / "config.json").exists() or (out / META).exists() or not any(out.iterdir())
    )
    if not ours:
        raise ArtefactError(f"{out} exists and is no model or delta directory: choose another one")
    if not force and any(out.iterdir()):
        raise ArtefactError(f"{out} exists: choose another directory, or --force to replace it")

"""Refusals of recipes that are well typed but cannot work or cannot mean what was intended.

What cannot be meant is refused; an option that merely has no effect gets a warning. Every message names the
key and the cure. Keys that only some stages read are checked for those stages alone.
"""

from __future__ import annotations

import re

from lander_ds.config.check import Check
from lander_ds.config.data_consistency import check_data
from lander_ds.config.document import nearest
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.method import BankChoice, LayerChoice, RoutingConfig, ShieldConfig
from lander_ds.config.schema.results import SamplingConfig
from lander_ds.config.schema.training import CpoConfig, LoraConfig, ShiraConfig
from lander_ds.config.systems import shows_examples, used_systems
from lander_ds.config.topology_consistency import check_topology

_METRIC_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]*")
"""Of a neural metric: `scores.json` has figures of that name, and others that begin or end with it and an underscore."""
_FIGURES = ("bleu", "chrf", "chrfpp", "ter", "empty", "truncated", "sentences", "loss", "off")
"""Names of other figures there, and what else `train.keep_best` may say."""


def check_consistency(check: Check) -> None:
    """Record everything that can be told from the recipe alone; opens no file and loads no model."""
    check_topology(check)
    check_data(check)
    _check_select(check)
    _check_routing(check)
    _check_train(check)
    _check_translate(check)
    _check_sampling(check)
    _check_score(check)
    _check_export(check)


def _check_select(check: Check) -> None:
    _check_layers(check)
    banks, plain = check.recipe.select.banks, BankChoice()
    criterion = banks.like if banks.criterion == "random" else banks.criterion
    if criterion != "top":
        _warn_of_unread(check, "select.banks", banks, plain, ("share", "quorum"), criterion)
    else:
        _warn_of_unread(check, "select.banks", banks, plain, ("rho", "min_awareness"), criterion)
    shield = check.recipe.select.shield
    if shield.awareness is None and shield != ShieldConfig():
        check.warn("select.shield.share", "has no effect without select.shield.awareness")
    if banks.criterion != "random":
        _warn_of_unread(check, "select.banks", banks, plain, ("like",), criterion)


def _warn_of_unread(
    check: Check, key: str, section: object, plain: object, names: tuple[str, ...], criterion: str
) -> None:
    for name in names:
        if getattr(section, name) != getattr(plain, name):
            check.warn(f"{key}.{name}", f"has no effect with criterion: {criterion}")


def _check_layers(check: Check) -> None:
    layers = check.recipe.select.layers
    if layers.criterion == "list":
        if not layers.layers:
            check.refuse(
                "select.layers.layers", "criterion: list needs layers; write for example layers: [8, 9]"
            )
        elif min(layers.layers) < 0:
            check.refuse(
                "select.layers.layers", f"layers count from 0, found {min(layers.layers)}; remove it"
            )
        check.refuse_repeats("select.layers.layers", layers.layers)
    elif layers.layers:
        check.refuse(
            "select.layers.layers",
            f"only criterion: list reads it, found {layers.criterion}; set criterion: list or remove layers",
        )
    if layers.scope == "per_pair" and layers.criterion in ("list", "all", "ends", "last"):
        check.warn("select.layers.scope", f"per_pair has no effect with criterion: {layers.criterion}")
    if layers.criterion not in ("relevance", "awareness"):
        _warn_of_unread(check, "select.layers", layers, LayerChoice(), ("cost_aware",), layers.criterion)


def _check_routing(check: Check) -> None:
    routing = check.recipe.routing
    if routing.gate != "none":
        if routing.gate_eval == "hard" and routing.gate_init == "preserve":
            check.refuse(
                "routing.gate_eval",
                "hard gates with gate_init: preserve would double one side's banks and drop the other's (gates "
                "of 0 and 2); set routing.gate_init: paper, or gate_eval: soft",
            )
        return
    cure = "set routing.gate: input, or remove it"
    if routing.budget_weight > 0:
        check.refuse("routing.budget_weight", f"a budget loss needs gates, found gate: none; {cure}")
    if routing.alpha_max > 0:
        check.refuse("routing.alpha_max", f"noise needs gates, found gate: none; {cure}")
    if routing.gate_eval == "hard":
        check.refuse("routing.gate_eval", f"hard gates need gates, found gate: none; {cure}")
    if routing.gate_init != "preserve":
        check.refuse("routing.gate_init", f"there is no gate to initialise, found gate: none; {cure}")


def _check_train(check: Check) -> None:
    recipe, train = check.recipe, check.recipe.train
    if train.pack_tokens < recipe.data.max_length:
        check.refuse(
            "train.pack_tokens",
            f"{train.pack_tokens} cannot hold an example of data.max_length {recipe.data.max_length} tokens; "
            f"raise it or lower data.max_length",
        )
    elif train.objective == "cpo" and train.pack_tokens < 2 * recipe.data.max_length:
        check.warn(
            "train.pack_tokens",
            f"{train.pack_tokens} cannot hold two translations of data.max_length {recipe.data.max_length} tokens: rows "
            "with a long preference become longer, and need as much more memory",
        )
    if train.batch_tokens < recipe.data.max_length:
        check.refuse(
            "train.batch_tokens",
            f"a global batch of {train.batch_tokens} tokens cannot hold an example of data.max_length "
            f"{recipe.data.max_length} tokens; raise it or lower data.max_length",
        )
    elif train.pack_tokens * train.micro_batch > train.batch_tokens:
        check.warn(
            "train.batch_tokens",
            f"{train.batch_tokens} never fills one micro-batch of pack_tokens x micro_batch = "
            f"{train.pack_tokens * train.micro_batch} tokens",
        )
    if train.steps <= train.warmup_steps:
        check.refuse(
            "train.warmup_steps", f"{train.warmup_steps} leaves none of the {train.steps} steps; lower it"
        )
    if train.patience and not train.valid_every:
        check.refuse("train.patience", "early stopping needs validations; set train.valid_every")
    if (train.keep_every or train.keep_best == "off") and not train.keep_last:
        check.warn(
            "train.keep_last", "0 keeps every checkpoint; keep_every and keep_best: off have no effect"
        )
    if train.translated_metric is not None:
        _check_translated_metric(check, train.translated_metric)
    if train.average.last > train.steps:
        check.warn("train.average.last", f"{train.average.last} is more than the {train.steps} steps")
    if train.valid_every > train.steps:
        check.warn("train.valid_every", f"{train.valid_every} is more than the {train.steps} steps")
    if train.valid_every and check.runs("prepare", "train") and "valid" not in _splits(recipe):
        check.refuse(
            "train.valid_every", "validation needs a corpus with split: valid; add one or set it to 0"
        )
    check.refuse_repeats("train.banks", train.banks)
    check.refuse_repeats("train.trackers", train.trackers)
    _check_prefix_cache(check)
    _check_method(check)
    _check_objective(check)
    _check_learning_rates(check)


def _check_translated_metric(check: Check, metric: str) -> None:
    recipe = check.recipe
    known = ("loss", "chrf", "off", *recipe.score.neural)
    if metric not in known:
        near = nearest(metric, known)
        check.refuse(
            "train.keep_best",
            f"expected one of {', '.join(known)} or a metric of score.neural, found {metric!r}"
            + (f"; did you mean {near}?" if near else "; describe it there"),
        )
        return
    if not recipe.train.valid_every:
        check.refuse(
            "train.keep_best", f"{metric} is measured in validations; set train.valid_every, or write loss"
        )
    if recipe.pipelined:
        check.refuse(
            "train.keep_best",
            f"{metric} translates, for which topology: {recipe.topology} would need the whole model in one stage; write "
            "loss, or set topology: replicated or zero3",
        )


def _check_prefix_cache(check: Check) -> None:
    recipe = check.recipe
    if recipe.train.prefix_cache == "off":
        return
    if recipe.pipelined:
        check.refuse(
            "train.prefix_cache",
            f"topology: {recipe.topology} runs the layers below in stages of their own; write off, or set topology: "
            "replicated or zero3",
        )
    if recipe.train.method in ("full", "lora"):
        check.refuse(
            "train.prefix_cache",
            f"method: {recipe.train.method} trains every layer, there is nothing below to keep; write off",
        )


def _check_method(check: Check) -> None:
    recipe, train = check.recipe, check.recipe.train
    if train.method == "lander":
        if not train.banks:
            check.refuse("train.banks", "method: lander needs a bank to train; write [general, specific]")
        if train.banks == ("general",) and len(recipe.data.pairs) == 1:
            check.refuse(
                "train.banks",
                "with one pair every neuron is specific and general banks are empty; add specific or pairs",
            )
    else:
        if recipe.routing != RoutingConfig():
            check.warn("routing", f"has no effect with train.method: {train.method}")
        if set(train.banks) != {"general", "specific"}:
            check.warn("train.banks", f"has no effect with train.method: {train.method}")
    if recipe.model.quantize is not None and train.method not in ("lander", "lora"):
        check.refuse(
            "model.quantize",
            f"train.method: {train.method} trains parts of weights that {recipe.model.quantize} would round; write method: "
            "lander or lora, or remove it",
        )
    if train.method != "lora" and train.lora != LoraConfig():
        check.warn("train.lora", f"has no effect with train.method: {train.method}")
    if train.method != "shira" and train.shira != ShiraConfig():
        check.warn("train.shira", f"has no effect with train.method: {train.method}")


def _check_objective(check: Check) -> None:
    recipe, train = check.recipe, check.recipe.train
    if train.objective != "cpo" and train.cpo != CpoConfig():
        check.warn("train.cpo", f"has no effect with train.objective: {train.objective}")
    if train.objective == "cpo":
        for index, corpus in enumerate(recipe.data.corpora):
            if corpus.split == "train" and corpus.columns.rejected is None:
                check.refuse(
                    f"data.corpora.{index}.columns",
                    "train.objective: cpo compares every translation with a worse one; name its column, for example "
                    "{rejected: rejected}",
                )
        if train.prefix_cache != "off":
            check.refuse(
                "train.prefix_cache", "holds no worse translations, which objective: cpo needs; write off"
            )


def _check_learning_rates(check: Check) -> None:
    recipe, train = check.recipe, check.recipe.train
    used: dict[str, float]
    match train.method:
        case "lander":
            used = {bank: getattr(train.lr, bank) for bank in train.banks}
            if recipe.routing.gate != "none":
                used["gates"] = train.lr.gates
        case "lora" | "shira":
            used = {train.method: getattr(train.lr, train.method)}
        case _:
            used = {"dense": train.lr.dense}
    if used and not any(used.values()):
        names = ", ".join(f"train.lr.{name}" for name in used)
        check.refuse("train.lr", f"nothing would be trained: {names} is 0; set a learning rate above 0")
    for name, rate in used.items():
        if rate > 1:
            check.warn(f"train.lr.{name}", f"{rate:g} is far above any usual learning rate")
    if train.schedule == "constant" and train.min_lr_ratio:
        check.warn("train.min_lr_ratio", "has no effect with schedule: constant")


def _check_translate(check: Check) -> None:
    translate = check.recipe.translate
    if not check.runs("translate", "score"):
        return
    for key, systems in (
        ("translate.systems", translate.systems),
        ("evaluate.systems", check.recipe.evaluate.systems),
    ):
        if systems is not None and not systems:
            check.refuse(key, "nothing to translate with; write for example [base, trained]")
        check.refuse_repeats(key, systems or ())
    for system in filter(shows_examples, used_systems(check.recipe)):
        if translate.shots < 1:
            check.refuse(
                "translate.shots", f"the system {system} needs at least 1; raise it or remove {system}"
            )
    if translate.beams == 1 and not translate.sampling.temperature and translate.length_penalty != 1.0:
        check.warn("translate.length_penalty", "has no effect in greedy search (beams: 1)")
    if check.stages is not None and translate.split not in _splits(check.recipe) | {"detect"}:
        check.refuse(
            "translate.split", f"no corpus has split: {translate.split}; add one or choose another split"
        )


def _check_sampling(check: Check) -> None:
    translate, sampling = check.recipe.translate, check.recipe.translate.sampling
    # Stage export translates to measure what folding costs.
    if not check.runs("translate", "score", "text", "export"):
        return
    if sampling.temperature and translate.beams > 1:
        check.refuse(
            "translate.sampling.temperature",
            f"{sampling.temperature:g} draws translations, and {translate.beams} beams search for the best one; set "
            "temperature: 0, or translate.beams: 1",
        )
    if not sampling.temperature and sampling != SamplingConfig():
        check.warn("translate.sampling", "has no effect without translate.sampling.temperature")


def _check_score(check: Check) -> None:
    score = check.recipe.score
    if not check.runs("score"):
        return
    if score.baseline is not None:
        check.refuse_placeholders("score.baseline", score.baseline, ("pair", "src", "tgt"))
    for name in score.neural:
        if not _METRIC_NAME.fullmatch(name) or name.lower() in _FIGURES:
            check.refuse(
                f"score.neural.{name}",
                f"a metric's name begins with a letter and has letters, digits and -, and none of {', '.join(_FIGURES)}; "
                "rename it",
            )


def _check_export(check: Check) -> None:
    recipe, export = check.recipe, check.recipe.export
    formats, pairs_differ = (
        export.formats,
        recipe.routing.gate != "none" or recipe.routing.other_pairs == "mask",
    )
    if not check.runs("export"):
        return
    if not formats and not export.fold:
        check.refuse("export.formats", "nothing to export; write for example [routed]")
    check.refuse_repeats("export.formats", formats)
    if "routed" in formats and recipe.train.method != "lander":
        check.refuse(
            "export.formats",
            f"routed needs banks, which train.method: {recipe.train.method} does not train; write [dense]",
        )
    if "dense" in formats and recipe.train.method == "lander" and pairs_differ:
        check.warn(
            "export.formats",
            f"dense cannot hold gates (routing.gate: {recipe.routing.gate}, other_pairs: "
            f"{recipe.routing.other_pairs}), it approximates the trained model; routed is exact",
        )
    _check_fold(check, pairs_differ)
    if export.dtype != "model" and formats == ("delta",) and not export.fold:
        check.warn("export.dtype", "has no effect on a delta, which keeps the base's types")


def _check_fold(check: Check, pairs_differ: bool) -> None:
    recipe, fold = check.recipe, check.recipe.export.fold
    check.refuse_repeats("export.fold", fold)
    if fold and (recipe.train.method != "lander" or not pairs_differ):
        check.refuse(
            "export.fold",
            "there is no gate to fold: formats: [dense] is exact already; remove fold",
        )
    for pair in fold:
        if pair not in (*recipe.data.pairs, "mean"):
            check.refuse(
                "export.fold",
                f"{pair} is no pair of data.pairs ({', '.join(recipe.data.pairs)}) and not mean; correct it",
            )


def _splits(recipe: Recipe) -> set[str]:
    return {corpus.split for corpus in recipe.data.corpora}

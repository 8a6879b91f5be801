"""Checks of the files, directories and hardware that a recipe names."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from lander_ds.checkpoint.earlier_run import KEY, check_fit, earlier_checkpoint
from lander_ds.checkpoint.identity import identity_of
from lander_ds.common.errors import ArtefactError, DataError, ModelError
from lander_ds.config.check import Check
from lander_ds.config.data_consistency import translated_pairs
from lander_ds.config.schema.data import ColumnConfig
from lander_ds.config.topology_consistency import check_layers_per_stage
from lander_ds.data.sources.corpus import Corpus, resolve, resolve_replay, resolve_set
from lander_ds.distributed import accelerator
from lander_ds.evaluation.baseline import baseline_path
from lander_ds.models.files import adapter_fault
from lander_ds.models.loading import POSITION_KEYS, build, tied_parameters

STAGES_WITH_MODEL = ("prepare", "detect", "train", "translate", "text", "export")
"""Stages and commands that open the base model or its tokenizer."""

_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def check_files(check: Check) -> None:
    """Record missing and unfit files and directories."""
    _check_directories(check)
    if check.runs("prepare", "tokenizer"):
        _check_corpora(check)
    if check.runs(*STAGES_WITH_MODEL):
        _check_model(check)
    if check.recipe.score.baseline is not None and check.runs("score"):
        _check_baseline(check, check.recipe.score.baseline)
    shield = check.recipe.select.shield.awareness
    if shield is not None and check.runs("select") and not Path(shield).is_file():
        check.refuse(
            "select.shield.awareness",
            f"{shield} does not exist; run stage detect of a recipe for what is to be shielded, and name its "
            "awareness.safetensors",
        )
    if check.recipe.train.start_from is not None and check.runs("select", "train"):
        _check_start(check, check.recipe.train.start_from)
    if check.recipe.model.dtype == "float16" and check.runs("detect", "train", "translate"):
        _check_float16(check)


def _check_start(check: Check, directory: str) -> None:
    """The run that training starts from, as far as it can be told without the base and the data."""
    identity = identity_of(check.recipe, {"base": "", "data": ""})
    known = {key: value for key, value in identity.items() if not key.endswith(("_fingerprint", "_hash"))}
    try:
        check_fit(earlier_checkpoint(directory), known)
    except ArtefactError as error:
        check.refuse(KEY, str(error).removeprefix(f"{KEY}: "))


def _check_directories(check: Check) -> None:
    recipe = check.recipe
    for key, value in (("run_dir", recipe.run_dir), ("data.cache_dir", recipe.data.cache_dir)):
        if value is None:
            continue
        if not value.strip():
            check.refuse(key, "is empty; name a directory")
            continue
        # The nearest directory that exists is where a new one would be made.
        existing = Path(value)
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            check.refuse(key, f"{existing} is a file; name a directory")
        elif not os.access(existing, os.W_OK | os.X_OK):
            check.refuse(key, f"{existing} is not writable; name a directory you may write to")
    if recipe.run_dir and Path(recipe.run_dir).resolve() == Path(recipe.model.path).resolve():
        check.refuse("run_dir", "is the model's directory; name another one, so that the base stays as it is")


def _check_corpora(check: Check) -> None:
    """Missing files, and files that serve both training and evaluation."""
    recipe = check.recipe
    try:
        corpora = resolve(recipe.data)
        # The tokenizer is trained on no test set.
        if check.runs("prepare"):
            resolve_replay(recipe.data)
            corpora += [corpus for name in recipe.evaluate.sets for corpus in resolve_set(recipe, name)]
    except DataError as error:
        named = re.search(
            r"data\.(replay\.)?corpora\[\d+\]|evaluate\.(sets\.[\w+-]+|shots\[\d+\])", str(error)
        )
        check.refuse(_path_key(named[0]) if named else "data.corpora", str(error))
        return
    _refuse_same_lines_for_every_pair(check, corpora)
    training = {(c.pair, c.paths, c.columns): c for c in corpora if c.split in ("train", "detect")}
    for corpus in corpora:
        twin = training.get((corpus.pair, corpus.paths, corpus.columns))
        if corpus.split in ("valid", "test") and twin and corpus.paths[0].is_file():
            check.refuse(
                _path_key(corpus.key),
                f"{corpus.name} is both split: {twin.split} ({twin.key}) and split: {corpus.split}; "
                f"scores on training data mean nothing: use two files",
            )
            return


def _refuse_same_lines_for_every_pair(check: Check, corpora: list[Corpus]) -> None:
    seen: dict[tuple[str, tuple[Path, ...], ColumnConfig], str] = {}
    for corpus in corpora:
        if corpus.format == "tmx" or corpus.columns.src_lang or corpus.columns.tgt_lang:
            continue
        first = seen.setdefault((corpus.key, corpus.paths, corpus.columns), corpus.pair)
        if first != corpus.pair:
            check.refuse(
                _path_key(corpus.key),
                f"{first} and {corpus.pair} would read the same lines; use {{pair}}, {{src}} or {{tgt}} in "
                f"path or columns, or columns.src_lang and tgt_lang, or list the one pair it serves",
            )
            return


def _path_key(key: str) -> str:
    """`data.corpora[0]` -> `data.corpora.0.path`."""
    return f"{key.replace('[', '.').replace(']', '')}.path"


def _check_model(check: Check) -> None:
    recipe = check.recipe
    path = Path(recipe.model.path)
    config = path / "config.json"
    if not recipe.model.path:
        check.refuse("model.path", "is empty; name a Hugging Face model directory")
    elif not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        # A recipe can be looked at before its model is fetched.
        tell = check.refuse if check.stages else check.warn
        tell(
            "model.path",
            f"{path} {what}; name a directory with config.json, safetensors and a tokenizer, "
            f"or the hub id of a model",
        )
    elif not config.is_file():
        check.refuse("model.path", f"{path} has no config.json; name a Hugging Face model directory")
    else:
        if recipe.model.revision is not None:
            check.warn("model.revision", "has no effect: model.path is a directory")
        try:
            content = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            check.refuse("model.path", f"{config} is not a readable JSON file ({error}); restore the model")
            return
        text = content.get("text_config", content) if isinstance(content, dict) else None
        if not isinstance(text, dict):
            check.refuse("model.path", "config.json holds no JSON object; restore the model")
            return
        _check_positions(check, text)
        if (fault := adapter_fault(path)) is not None:
            check.refuse("model.path", f"{path} {fault}")
            return
        _check_ffn_biases(check, text)
        count = _first_number(text, _LAYER_KEYS)
        if count is not None:
            _check_layers(check, count)
            check_layers_per_stage(check, count)
        _check_tied_embeddings(check)
        _check_pickles(check, path)


def _check_pickles(check: Check, path: Path) -> None:
    """Weights that can run code on opening, before a stage works for an hour to find them."""
    if check.recipe.model.allow_pickle or any(path.glob("*.safetensors")):
        return
    if pickled := sorted(path.glob("pytorch_model*.bin")):
        check.refuse(
            "model.path",
            f"{path} holds only pickled weights ({pickled[0].name}), which can run code on opening; convert them once "
            f"with AutoModelForCausalLM.from_pretrained(...).save_pretrained(...), or set model.allow_pickle: true if "
            f"you trust where they come from",
        )


def _check_positions(check: Check, config: dict[str, Any]) -> None:
    """The longest example against the model's positions, where config.json tells them."""
    positions = _first_number(config, POSITION_KEYS)
    length = check.recipe.data.max_length
    if positions is not None and length > positions:
        check.refuse(
            "data.max_length",
            f"{length} is more than the model's {positions} positions; lower it to {positions}",
        )


def _check_ffn_biases(check: Check, config: dict[str, Any]) -> None:
    """Gated FFNs with biases cannot be cut into banks; before detection works for an hour, not in training."""
    if config.get("mlp_bias") and check.recipe.train.method == "lander":
        check.refuse(
            "model.path",
            "config.json says mlp_bias: true: a gated FFN with biases is not supported; use a base model without them, or "
            "another train.method",
        )


def _check_layers(check: Check, count: int) -> None:
    """The selection against the number of decoder layers."""
    layers = check.recipe.select.layers
    if layers.criterion == "all":
        return
    if layers.criterion == "list":
        if max(layers.layers) >= count:
            check.refuse(
                "select.layers.layers",
                f"the model has no layer {max(layers.layers)}; its layers are 0 to {count - 1}",
            )
        return
    most = count - 1 if layers.criterion == "relevance" else count
    if layers.k > most:
        check.refuse(
            "select.layers.k",
            f"criterion {layers.criterion} can choose at most {most} of the model's {count} layers, "
            f"found {layers.k}; lower it",
        )


def _first_number(config: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((config[key] for key in keys if isinstance(config.get(key), int)), None)


def _check_baseline(check: Check, pattern: str) -> None:
    served: dict[Path, str] = {}
    for pair in translated_pairs(check.recipe):
        path = baseline_path(pattern, pair)
        if not path.is_file():
            what = "is a directory" if path.is_dir() else "does not exist"
            check.refuse("score.baseline", f"{path} {what}; name a file of another system's translations")
            return
        if path in served:
            check.refuse(
                "score.baseline",
                f"{served[path]} and {pair} would read the same file; use {{pair}}, {{src}} or {{tgt}} in it",
            )
            return
        served[path] = pair


def _check_float16(check: Check) -> None:
    if accelerator.is_cpu():
        check.refuse(
            "model.dtype", "float16 needs a GPU and this machine has none; write bfloat16 or float32"
        )


def _check_tied_embeddings(check: Check) -> None:
    """Record a pipeline whose first and last stage would each train their own copy of one matrix."""
    recipe = check.recipe
    if not recipe.pipelined or recipe.train.method != "full":
        return
    try:
        # Transformers is asked because many families tie by default.
        model, _ = build(recipe.model)
    except ModelError as error:
        check.refuse("model.path", str(error))
        return
    if tied_parameters(model):
        check.refuse(
            "train.method",
            f"full trains the embedding, which is also the model's head (tied): topology: {recipe.topology} has "
            f"them in two stages; set topology: zero3 or replicated, or another method",
        )

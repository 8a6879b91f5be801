"""Neural metrics (`score.neural`): which program, which package and which model a metric is.

unbabel-comet wants older versions of transformers and NumPy than this project, so it lives in an environment of its own,
and `comet_worker.py` runs there. Everything that can be wrong about that is found out here, before anything is scored.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from lander_ds.common.errors import ConfigError, ModelError
from lander_ds.common.files import file_hash, json_hash
from lander_ds.common.hash_cache import content_hash
from lander_ds.config.schema.neural import NeuralConfig, QualityConfig
from lander_ds.models.hub import is_hub_id, snapshot
from lander_ds.models.weights import base_name

PYTHON_VARIABLE = "LANDER_COMET_PYTHON"
"""Environment variable that names the interpreter where `python` does not."""

PACKAGE = "unbabel-comet"
_PROBE = f"from importlib.metadata import version; print(version({PACKAGE!r}))"
_PROBE_SECONDS = 60

_MODEL_FILES = ("hparams.yaml", "checkpoints/*", "*.md", "LICENSE*")
_ENCODER_FILES = ("*.json", "*.model")
_ENCODER_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class NeuralMetric:
    """A metric of the recipe whose program and model are there."""

    name: str
    """Its key in `score.neural`, or `data.filters.quality`."""
    key: str
    """The whole key, for messages."""
    config: NeuralConfig
    """Its options."""
    python: str
    """The interpreter."""
    version: str
    """Of unbabel-comet there."""
    checkpoint: Path
    """The model; `hparams.yaml` lies in the directory above its own."""
    uses_references: bool
    """Whether references are part of what it reads."""

    @staticmethod
    def resolve(name: str, config: NeuralConfig) -> NeuralMetric:
        """Look for what the recipe names; a model that is named by its hub id is downloaded.

        Raises:
            ConfigError: the interpreter is missing, or has no unbabel-comet; or the metric reads references and is to
                filter.
            ModelError: the model, or the tokenizer of its encoder, is missing or cannot be had.
        """
        filters = isinstance(config, QualityConfig)
        key = f"data.filters.quality.{name}" if filters else f"score.neural.{name}"
        python = config.python or os.environ.get(PYTHON_VARIABLE) or sys.executable
        version = _version(python, f"{key}.python")
        checkpoint = _checkpoint(config.model, f"{key}.model")
        hparams = _hparams(checkpoint, f"{key}.model")
        _check_encoder(str(hparams["pretrained_model"]), _hparams_file(checkpoint))
        # Unified models say what they read; the others are of one kind or the other.
        read = hparams.get("input_segments", ("src", "mt", "ref"))
        uses_references = "ref" in read and hparams["class_identifier"] != "referenceless_regression_metric"
        if filters and uses_references:
            raise ConfigError(
                f"{key}.model: {config.model} reads references, and training data have none; name a model without, such as "
                "Unbabel/wmt22-cometkiwi-da"
            )
        return NeuralMetric(name, key, config, python, version, checkpoint, uses_references)

    @cached_property
    def identity(self) -> str:
        """Hash of everything besides the texts that scores depend on."""
        model = (content_hash(self.checkpoint), file_hash(_hparams_file(self.checkpoint)))
        return json_hash([self.version, *model, self.config.dtype])

    @property
    def signature(self) -> str:
        """What stands beside its scores, in the manner of sacreBLEU."""
        parts = {
            "nrefs": int(self.uses_references),
            "model": base_name(_hparams_file(self.checkpoint).parent),
            "sha256": content_hash(self.checkpoint)[:16],
            "dtype": self.config.dtype,
            PACKAGE: self.version,
        }
        return "|".join(f"{name}:{value}" for name, value in parts.items())

    def sample(self, src: str, mt: str, ref: str) -> dict[str, str]:
        """What the metric reads of a sentence."""
        return {"src": src, "mt": mt} | ({"ref": ref} if self.uses_references else {})


def _version(python: str, key: str) -> str:
    """The version of unbabel-comet that an interpreter has; asked without importing it, which takes seconds."""
    cure = (
        f"make an environment with `python3 -m venv comet` and `comet/bin/pip install {PACKAGE}`, and name its bin/python "
        f"in {key} or {PYTHON_VARIABLE}"
    )
    try:
        result = subprocess.run(
            [python, "-I", "-c", _PROBE], capture_output=True, text=True, check=False, timeout=_PROBE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{key}: {python} cannot be run ({error}): {cure}") from None
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or [f"it ended with code {result.returncode}"])[-1]
        raise ConfigError(f"{key}: {python} has no {PACKAGE} ({reason}): {cure}")
    return result.stdout.strip()


def _checkpoint(model: str, key: str) -> Path:
    hub_id = is_hub_id(model)
    path = Path(snapshot(model, _MODEL_FILES, key) if hub_id else model).absolute()
    if path.is_file():
        return path
    if not path.is_dir():
        raise ModelError(
            f"{key}: {model} does not exist; name a directory with hparams.yaml and checkpoints/, a checkpoint in such a "
            "directory, or a hub id such as Unbabel/wmt22-comet-da"
        )
    checkpoints = sorted((path / "checkpoints").glob("*.ckpt"))
    if len(checkpoints) != 1:
        raise ModelError(
            f"{key}: {path / 'checkpoints'} has {len(checkpoints)} checkpoints (*.ckpt); name the one that is meant"
        )
    return checkpoints[0]


def _hparams_file(checkpoint: Path) -> Path:
    return checkpoint.parents[1] / "hparams.yaml"


def _hparams(checkpoint: Path, key: str) -> Mapping[str, Any]:
    path = _hparams_file(checkpoint)
    try:
        hparams = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{key}: {checkpoint} is no COMET model, because {path} is missing; restore it"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ModelError(f"{key}: {path} cannot be read ({error}); get the model again") from None
    if not isinstance(hparams, dict) or not {"class_identifier", "pretrained_model"} <= hparams.keys():
        raise ModelError(f"{key}: {path} names no class_identifier and pretrained_model; get the model again")
    return hparams


def _check_encoder(encoder: str, hparams: Path) -> None:
    """A checkpoint has the encoder's weights, but not its tokenizer and configuration, which the library looks for."""
    if Path(encoder).is_dir():
        return
    where = f"pretrained_model in {hparams}"
    if not _ENCODER_ID.fullmatch(encoder):
        raise ModelError(f"{where} names {encoder}, which does not exist: correct it")
    snapshot(encoder, _ENCODER_FILES, where)

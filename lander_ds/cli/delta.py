"""`lander delta apply|diff|revert`."""

from __future__ import annotations

import argparse

import torch

from lander_ds.export.delta_apply import Options, apply_delta, diff_models, revert_delta
from lander_ds.export.writer import GIGABYTE, Form


def apply(arguments: argparse.Namespace) -> None:
    """Write the model that a delta makes of its base."""
    size = arguments.shard_size
    if size is not None and not size > 0:
        arguments.parser.error(f"--shard-size must be above 0, found {size}")
    form = Form(
        None if arguments.dtype is None else getattr(torch, arguments.dtype),
        None if size is None else max(1, round(size * GIGABYTE)),
    )
    options = Options(arguments.fold, arguments.dense, form, arguments.allow_pickle)
    apply_delta(arguments.first, arguments.second, arguments.out, options, arguments.force)


def diff(arguments: argparse.Namespace) -> None:
    """Write the delta that makes one model of another."""
    diff_models(arguments.first, arguments.second, arguments.out, arguments.force, arguments.allow_pickle)


def revert(arguments: argparse.Namespace) -> None:
    """Write the base that a model was made of."""
    revert_delta(arguments.first, arguments.second, arguments.out, arguments.force)

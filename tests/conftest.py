"""Shared by all tests: no network, and a small workspace with a sound recipe.

Tests import helpers from `support`, never from a `conftest`: there are several of that name.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.stage_runs import stages_2, stages_4
from support.training_runs import tiny_run, world_1, world_2, world_4
from support.workspace import Workspace

__all__ = ["stages_2", "stages_4", "tiny_run", "world_1", "world_2", "world_4"]

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"


WORLDS = frozenset(("world_1", "world_2", "world_4", "stages_2", "stages_4"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say, before xdist asks, what stays on one worker and what begins.

    Tests of a file share fixtures, and those of all files the worlds of several ranks, which take minutes to run. What
    is long begins first, so that nothing long is left at the end.
    """
    groups = {}
    for item in items:
        worlds = WORLDS.intersection(getattr(item, "fixturenames", ()))
        groups[item] = "worlds" if worlds else item.path.stem
        item.add_marker(pytest.mark.xdist_group(groups[item]))
    distributed = {groups[item] for item in items if item.get_closest_marker("distributed")}
    items.sort(key=lambda item: (groups[item] != "worlds", groups[item] not in distributed))


@pytest.fixture(autouse=True)
def log_levels() -> Iterator[None]:
    """What a test, or the command line that it runs, sets as log level ends with the test."""
    loggers = [logging.getLogger(), logging.getLogger("lander_ds")]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A fresh workspace, which is the current directory too."""
    monkeypatch.chdir(tmp_path)
    return Workspace(tmp_path)

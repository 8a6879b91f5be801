"""Shared by all tests: no network, and a small workspace with a sound recipe.

Tests import helpers from `support`, never from a `conftest`: there are several of that name.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from support.stage_runs import stages_2, stages_4
from support.training_runs import tiny_run, world_1, world_2, world_4
from support.workspace import Workspace
from xdist.scheduler import LoadFileScheduling

__all__ = ["stages_2", "stages_4", "tiny_run", "world_1", "world_2", "world_4"]

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# How long an example takes says how busy the machine is.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

USES_WORLDS = re.compile(r"\b(world|stages)_([124]\b|\{)")
"""In the text of a test file: a fixture's name, or what makes one."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--all`."""
    parser.addoption("--all", action="store_true", help="run tests marked `long` too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long ones, unless they are named; begin with what takes much time, so that none of it is left at the
    end."""
    if not config.getoption("--all") and not any("::" in argument for argument in config.args):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    distributed = {item.path for item in items if item.get_closest_marker("distributed")}
    items.sort(key=lambda item: (not _uses_worlds(item.path), item.path not in distributed))
    for item in items:
        # The first test that uses a world waits for all of its jobs, each of which has a limit of its own.
        if _uses_worlds(item.path) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(func_only=True))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    """Tests of a file share fixtures, and those of several files the worlds of several ranks, which take minutes to run:
    they stay on one worker. (xdist's own groups do nothing under pytest 9.2.)"""

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            return "worlds" if _uses_worlds(config.rootpath / file) else file

    return Scheduling(config, log)


@cache
def _uses_worlds(path: Path) -> bool:
    return USES_WORLDS.search(path.read_text(encoding="utf-8")) is not None


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

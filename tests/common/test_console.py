"""What a log file gets: one line per record, and nothing of what other libraries say although all is well."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.logging import RichHandler

from lander_ds.common import console

LONG = "a sentence that goes on " * 20 + "[and] ends here"


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Starts without any set-up and leaves logging, warnings and the environment as they were."""
    root, other = logging.getLogger(), logging.getLogger("DeepSpeed")
    handlers, level, filters = list(root.handlers), root.level, list(other.filters)
    own = logging.getLogger("lander_ds").level
    environment = dict(os.environ)
    # Other tests of the same process may have set logging up already.
    other.filters[:] = []
    os.environ.pop("TQDM_DISABLE", None)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield
    root.handlers[:], root.level, other.filters[:] = handlers, level, filters
    logging.getLogger("lander_ds").setLevel(own)
    os.environ.clear()
    os.environ.update(environment)


def test_a_file_gets_one_line_per_record(capsys: pytest.CaptureFixture[str]) -> None:
    console.setup_logging()
    logging.getLogger("lander_ds.stages.train").info(LONG)
    logging.getLogger("lander_ds.stages.train").debug("too much")
    logging.getLogger("other").info("not ours")
    logging.getLogger("other").warning("a warning of %s", "others")
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\[\d\d:\d\d:\d\d\] INFO    " + re.escape(LONG), first)
    assert second.endswith("] WARNING a warning of others")


def test_details_say_where_they_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    console.setup_logging(verbose=True)
    logging.getLogger("lander_ds.stages.train").debug("more")
    assert re.search(r"DEBUG   more \(lander_ds\.stages\.train, line \d+\)\n$", capsys.readouterr().err)


def test_other_ranks_keep_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    console.setup_logging()
    logging.getLogger("lander_ds.stages.train").info("said by rank 0")
    logging.getLogger("lander_ds.stages.train").error("said by all")
    assert capsys.readouterr().err.endswith("ERROR   said by all\n")


def test_a_terminal_gets_wrapped_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.stderr, "_force_terminal", True)
    console.setup_logging()
    (handler,) = logging.getLogger().handlers
    assert isinstance(handler, RichHandler)
    assert "TQDM_DISABLE" not in os.environ


@pytest.mark.parametrize("verbose", [False, True])
def test_harmless_noise_is_left_out_unless_details_are_wanted(verbose: bool) -> None:
    console.setup_logging(verbose)
    message = (
        "`torch.distributed.all_gather_into_tensor` is deprecated. Please use `torch.distributed.x` instead."
    )
    with warnings.catch_warnings(record=True) as shown:
        warnings.warn(message, FutureWarning, stacklevel=1)
        warnings.warn("something else is deprecated", FutureWarning, stacklevel=1)
    assert len(shown) == 1 + verbose
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    other = logging.getLogger("DeepSpeed")
    other.addHandler(handler)
    try:
        other.warning("**** You are using ZeRO with an untested optimizer, proceed with caution *****")
        other.warning("the gradient overflowed")
    finally:
        other.removeHandler(handler)
    assert heard[-1] == "the gradient overflowed"
    assert len(heard) == 1 + verbose
    assert ("TQDM_DISABLE" in os.environ) is not verbose


def test_deepspeed_still_says_what_is_left_out() -> None:
    """A reworded message would come through again: then its pattern must follow."""
    import deepspeed

    source = Path(deepspeed.__file__).parent
    sources = [source / "runtime" / "engine.py", source / "accelerator" / "real_accelerator.py"]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    assert all(part in text for part in console._HARMLESS_LINES["DeepSpeed"])

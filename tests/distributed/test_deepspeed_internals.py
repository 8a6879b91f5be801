"""A DeepSpeed in which something has moved that the engines rely on is refused before anything starts."""

from __future__ import annotations

import deepspeed
import pytest

from lander_ds.common.errors import ConfigError
from lander_ds.distributed.engines import deepspeed_internals
from lander_ds.distributed.engines.pipeline import Pipeline
from lander_ds.distributed.engines.pipeline_zero3 import PipelineZero3
from lander_ds.distributed.engines.replicated import Replicated
from lander_ds.distributed.engines.zero3 import Zero3


def test_the_installed_deepspeed_fits() -> None:
    deepspeed_internals.check_deepspeed()


def test_another_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_internals, "version", lambda _: "0.20.1")
    with pytest.raises(ConfigError, match=r"DeepSpeed 0\.20\.1 was never tested with it.*requirements\.txt"):
        deepspeed_internals.check_deepspeed()


def _own(owner: object, name: str) -> bool:
    """Whether it would be missing without this definition: some are inherited too."""
    return not any(hasattr(base, name) for base in getattr(owner, "__mro__", ())[1:])


@pytest.mark.parametrize(
    ("owner", "name"), [entry for entry in deepspeed_internals._RELIED_ON if _own(*entry)]
)
def test_a_deepspeed_in_which_something_moved_is_refused(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    monkeypatch.delattr(owner, name)
    with pytest.raises(ConfigError, match=rf"lacks \S*{name}.*requirements\.txt"):
        deepspeed_internals.check_deepspeed()


def test_an_attribute_that_moved_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    renamed = (deepspeed_internals.DeepSpeedZeroOptimizer, "masters_of_another_version")  # type: ignore[attr-defined]
    monkeypatch.setattr(deepspeed_internals, "_ATTRIBUTES", (renamed,))
    with pytest.raises(ConfigError, match=r"lacks DeepSpeedZeroOptimizer\.masters_of_another_version"):
        deepspeed_internals.check_deepspeed()


def test_a_group_of_its_own_that_parameters_have_no_more_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_internals, "_OWN_GROUP", "ds_group_of_another_version")
    with pytest.raises(ConfigError, match="lacks ds_group_of_another_version of a parameter"):
        deepspeed_internals.check_deepspeed()


def test_every_engine_is_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_internals, "version", lambda _: "0.20.1")
    for engine in (
        lambda: Zero3({}),
        lambda: Replicated({}),
        lambda: Pipeline({}, 1),
        lambda: PipelineZero3({}, 1),
    ):
        with pytest.raises(ConfigError, match=r"DeepSpeed 0\.20\.1 was never tested with it"):
            engine()


def test_the_patched_function_is_deepspeeds_own_outside_a_run() -> None:
    coordinator = deepspeed_internals.coordinator  # type: ignore[attr-defined]
    assert coordinator.assert_ints_same_as_other_ranks is deepspeed_internals._COMPARE_ALL
    assert coordinator.assert_ints_same_as_other_ranks.__module__.startswith(deepspeed.__name__)

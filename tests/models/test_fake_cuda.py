"""A training micro-batch on a CUDA device without kernels: right devices, nothing that waits, and how many kernels it takes.

What a fake device cannot show are values, memory and NCCL: tests/gpu is for a real one.
"""

from __future__ import annotations

from typing import Any

import pytest
from support.fake_cuda import compiled, counted
from support.fake_cuda_cases import EXAMPLES, FORMS, MASKED, PAIRS, Case

pytestmark = pytest.mark.fake_cuda

MORE_KERNELS = 1.3
"""How many times the kernels of one example 64 examples may take."""


@pytest.fixture(scope="module")
def figures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was counted, by case; compiled once per machine, run once per session."""
    library = compiled(request.config.cache.mkdir("fake_cuda"))
    return counted(library, tmp_path_factory.mktemp("fake_cuda") / "figures.json")


def of(figures: dict[str, Any], case: Case) -> dict[str, Any]:
    """The figures of a case that ran to its end."""
    counts: dict[str, Any] = figures[case.name]
    assert "error" not in counts, counts["error"]
    return counts


@pytest.mark.parametrize("case", [*FORMS, *MASKED], ids=lambda case: case.name)
def test_a_training_micro_batch_waits_for_nothing(figures: dict[str, Any], case: Case) -> None:
    """Forward, loss, backward, figures and statistics of every family and gate form; gradients come out on the device."""
    counts = of(figures, case)
    assert counts["synchronisations"] == {}
    assert counts["gradients"] > 0
    assert counts["wrong gradients"] == []
    # The batch, and classes of lengths, come in copies that wait for nobody; nothing else does.
    assert {copy.partition(":")[0] for copy in counts["copies"]} <= {"packing.py", "attention.py"}


@pytest.mark.parametrize("model", PAIRS)
def test_matrix_products_do_not_grow_with_the_pairs(figures: dict[str, Any], model: str) -> None:
    few, many = (of(figures, case) for case in PAIRS[model])
    assert many["products"] == few["products"]
    # What joins gradients with parameters has one kernel per bank.
    assert many["gradients"] > 4 * few["gradients"]


@pytest.mark.parametrize("model", EXAMPLES)
def test_kernels_do_not_grow_with_the_examples(figures: dict[str, Any], model: str) -> None:
    one, many = (of(figures, case) for case in EXAMPLES[model])
    assert many["kernels"] <= MORE_KERNELS * one["kernels"]


def test_a_large_vocabulary_takes_few_kernels(figures: dict[str, Any]) -> None:
    """In blocks that fit a processor's cache there would be thousands."""
    assert figures["head"] <= 500


def test_the_counter_sees_what_waits(figures: dict[str, Any]) -> None:
    """Each of these makes the host wait on a real card; what does not is not counted."""
    assert figures["waiting"] == {
        "item": 1,
        "to the host": 1,
        "from the host": 1,
        "boolean index": 1,
        "nonzero": 1,
        "index from the host": 1,
        "repeats of unknown sum": 1,
        "asynchronous copy": 0,
        "integer index": 0,
        "repeats of known sum": 0,
    }

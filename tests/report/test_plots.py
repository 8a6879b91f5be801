"""What the plots compute before they draw, and runs of unusual sizes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.sample_run import sample_awareness, write_metrics

from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.schema.method import BankChoice, SelectConfig
from lander_ds.method.select import build_selection
from lander_ds.report import plots
from lander_ds.report.figures import data_uri

MANY = tuple(f"en-x{number}" for number in range(24))


def test_jaccard_of_the_most_aware() -> None:
    first, second, third = np.zeros(100), np.zeros(100), np.zeros(100)
    first[[1, 2]] = 5
    second[[2, 3]] = 5
    third[[8, 9]] = 5
    overlap = plots.jaccard_of_top(np.stack([first, second, third]), 0.02)
    assert overlap == pytest.approx(np.array([[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 1]]))


def test_smoothing_keeps_constants_and_length() -> None:
    for length in (1, 2, 19, 200):
        assert plots.smoothed(np.full(length, 3.0)) == pytest.approx(np.full(length, 3.0))
    ramp = np.arange(100.0)
    assert plots.smoothed(ramp)[50] == pytest.approx(50.0)


@pytest.mark.parametrize("pairs", [("en-de",), MANY])
def test_one_and_many_pairs(pairs: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> None:
    run = RunDirectory(tmp_path_factory.mktemp("plots"))
    awareness = sample_awareness(pairs)
    phi = awareness.phi().numpy()
    config = SelectConfig(banks=BankChoice(criterion="ratio"))
    write_metrics(run, pairs)
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    figures = [
        plots.awareness_by_layer(phi, pairs, [0, 3]),
        plots.awareness_percentiles(phi),
        plots.neuron_overlap(phi, pairs),
        plots.bank_sizes(build_selection(awareness, config, 1)),
        plots.losses(steps, [], pairs),
        plots.learning_rates(steps[:1]),
        plots.gates_over_steps(steps, pairs),
        plots.final_gates(steps[:1], pairs),
    ]
    for figure in figures:
        assert data_uri(figure).startswith("data:image/svg+xml;base64,")


def test_equal_figures_are_equal_bytes() -> None:
    phi = sample_awareness(("en-de", "en-fr")).phi().numpy()
    first, second = (data_uri(plots.awareness_percentiles(phi)) for _ in range(2))
    assert first == second

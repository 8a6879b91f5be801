"""benchmarks/step.py: what it is asked, what it computes, and a whole run on a tiny model."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import deepspeed
import numpy as np
import pytest
import step
from figures import Measured, ratios, result, table
from step import main, parse, read_workload
from support.scripts import run_script
from support.tiny_models import save, tiny_model
from support.worlds import server
from systems import LORA_RANK, work
from torch import nn
from turns import Facts, Group, StepTime, SystemFailed, Turns, Work
from workload import Workload, chosen_layers

from lander_ds.common.errors import LanderError

WORKLOAD = Workload("m", "d.json", "float32", 2, 32, 8, (0, 1), vocabulary=97, steps=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model("gemma3"), tmp_path_factory.mktemp("model"))


def measured(seconds: list[float], peak: int) -> Measured:
    facts = [Facts(10, 100, 2.0, peak // 2, "steps"), Facts(10, 100, 2.0, peak, "steps")]
    return Measured([StepTime(value, 3 * value) for value in seconds], facts)


def test_layers_by_name_and_number() -> None:
    assert chosen_layers("middle", 18) == (7, 8, 9, 10)
    assert chosen_layers("last", 18) == (14, 15, 16, 17)
    assert chosen_layers("middle", 3) == (0, 1, 2)
    assert chosen_layers("11,0,3", 18) == (0, 3, 11)


@pytest.mark.parametrize("text", ["first", "", "3,18", "-1"])
def test_layers_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"layers 0 to 17|neither middle nor last"):
        chosen_layers(text, 18)


def test_every_rank_gets_as_many_tokens_and_targets() -> None:
    ordered = WORKLOAD.in_order()
    assert len(ordered) == WORKLOAD.steps * WORKLOAD.ranks * WORKLOAD.examples
    assert sum(len(e.input_ids) for e in ordered) == WORKLOAD.steps * WORKLOAD.tokens_per_step
    targets = sum(len(e.input_ids) - e.prompt_length for e in ordered)
    assert targets == WORKLOAD.steps * WORKLOAD.target_tokens_per_step
    assert WORKLOAD.target_tokens_per_step * 2 == WORKLOAD.tokens_per_step


def test_examples_differ_but_not_between_calls() -> None:
    first, second = WORKLOAD.in_order(), WORKLOAD.in_order()
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(first, second, strict=True))
    assert len({e.input_ids.tobytes() for e in first}) == len(first)
    assert {e.pair_id for e in first} == {0, 1, 2, 3}


def test_ratios_stay_within_a_sitting() -> None:
    sittings = [
        {"lander": measured([1.0, 9.0, 2.0], 100), "full": measured([8.0, 4.0, 2.0], 400)},
        {
            "lander": measured([3.0], 150),
            "lora": measured([4.0], 200),
            "replicated": measured([2.4], 300),
            "replicated_cached": measured([1.8], 330),
        },
        {"lander": measured([1.0], 1), "replicated_cached": measured([9.0], 1)},
    ]
    actual = ratios(sittings)
    assert actual["ratio_full"] == 0.5
    assert actual["peak_memory_ratio_full"] == 0.25
    assert actual["ratio_lora"] == actual["processor_ratio_lora"] == 0.75
    assert (actual["ratio_replicated"], actual["peak_memory_ratio_replicated"]) == (0.8, 2.0)
    assert (actual["ratio_replicated_cached"], actual["peak_memory_ratio_replicated_cached"]) == (0.75, 1.1)


def test_table_names_every_system_and_goal() -> None:
    sittings = [{"lander": measured([1.0], 2_000_000), "full": measured([2.0], 8_000_000)}]
    text = table(result(sittings, WORKLOAD, warm_up=2, threads=1, load=0.0))
    row = next(line.split() for line in text.splitlines() if line.startswith("full"))
    assert row == ["full", "10", "2.000", "2.000", "2.000", "0.500", "0.45", "6.000", "0.500", "8", "0.250"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "0"], "--ranks must be at least 1"),
        (["--tokens", "100"], "multiple of --length"),
        (["--against", "full,lorra"], "unknown lorra"),
        (["--layers", "9"], "layers 0 to 2"),
        (["--deepspeed", "nowhere.json"], "nowhere.json"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_refuses(model: Path, arguments: list[str], message: str) -> None:
    with pytest.raises((LanderError, ValueError), match=message):
        read_workload(parse(["--model", str(model), *arguments]))


def _through_gloo(job: Work, own_turns: Turns) -> None:
    """Let a rank work without DeepSpeed's own collectives, which a C++ compiler would make first, for minutes."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    job(own_turns)


@pytest.mark.distributed
def test_systems_start_at_the_same_loss_on_the_same_tokens(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Fresh interpreters are for the memory that they are measured with.
    monkeypatch.setattr("multiprocessing.get_context", lambda method=None: server())
    monkeypatch.setattr(step, "work", lambda *arguments: partial(_through_gloo, work(*arguments)))
    options = ["--ranks", "2", "--tokens", "32", "--length", "8", "--steps", "1", "--dtype", "float32"]
    options += ["--layers", "2", "--together", "4"]
    chosen = ["--model", str(model), "--against", "full_same_logits,lora,replicated,cached", "--json"]
    code = run_script(main, *chosen, *options)
    shown = capsys.readouterr()
    assert code == 0, shown.err
    actual = json.loads(shown.out)
    assert {key for key in actual if "ratio" in key} == {
        f"{kind}_{other}"
        for kind in ("ratio", "processor_ratio", "peak_memory_ratio")
        for other in ("full_same_logits", "lora", "replicated", "cached")
    }
    systems = {entry["system"]: entry for entry in actual["systems"]}
    assert list(systems) == ["lander", "full_same_logits", "lora", "replicated", "cached"]
    losses = [entry["first_loss"] for entry in systems.values()]
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-4)
    plain = tiny_model("gemma3")
    linear = [m for m in plain.modules() if isinstance(m, nn.Linear) and m is not plain.lm_head]
    assert systems["full_same_logits"]["trained_parameters"] == sum(p.numel() for p in plain.parameters())
    assert systems["lora"]["trained_parameters"] == sum(
        LORA_RANK * (m.in_features + m.out_features) for m in linear
    )
    assert actual["target_tokens_per_step"] == 32
    for entry in systems.values():
        assert len(entry["step_seconds"]["all"]) == 1
        assert len(entry["peak_memory_bytes_per_rank"]) == 2


@pytest.mark.distributed
def test_a_rank_that_fails_is_shown_with_its_output(tmp_path: Path) -> None:
    """Started as the benchmark starts ranks, in an interpreter of its own."""
    # abs() of its turns is no work that a rank can do.
    group = Group("broken", abs, ranks=1, steps=1, directory=tmp_path)  # type: ignore[arg-type]
    try:
        with pytest.raises(SystemFailed, match=r"broken has failed.*\n(.*\n)*.*bad operand type for abs"):
            group.wait_until_ready()
    finally:
        group.stop()

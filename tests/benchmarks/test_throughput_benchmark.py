"""benchmarks/throughput.py: what it counts, and a whole run on a tiny model."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import deepspeed
import pytest
import step
from figures import Measured
from support.scripts import run_script
from support.tiny_run import SAMPLE, TinyRun
from support.worlds import server
from systems import work
from throughput import figures, main, parse, workload_of
from turns import Facts, StepTime, Turns, Work
from workload import PAIRS

OPTIONS = ("--tokens", "192", "--steps", "1", "--dtype", "float32", "--layers", "1")


@pytest.fixture(scope="module")
def recipe(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pairs of the sample, on the model of the tiny run."""
    # Without its cache: what others find there stays as it was.
    lines = tiny_run.recipe_path.read_text(encoding="utf-8").splitlines(keepends=True)
    text = "".join(line for line in lines if "cache_dir" not in line)
    before, _, after = text.partition("  corpora:\n")
    corpora = f'  corpora:\n    - {{path: "{SAMPLE}/train.{{pair}}.jsonl", limit: 40}}\n'
    rest = after[after.index("  max_length") :] + "select: {layers: {k: 2}}\n"
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    own = before.replace("[en-de, en-fr, en-es]", f"[{', '.join(PAIRS)}]")
    path.write_text(
        own + corpora + rest.replace("detect_examples: 24", "detect_examples: 1"), encoding="utf-8"
    )
    return path


def test_what_both_learn_from(recipe: Path, tmp_path: Path) -> None:
    workload = workload_of(parse(["--recipe", str(recipe), *OPTIONS]), tmp_path / "data")
    order = workload.in_order()
    assert len(order) == len({example.sample_id for example in order})
    assert len(order) == workload.steps * workload.ranks * workload.examples
    ours, waste_ours = workload.packed_targets_and_waste()
    theirs, waste_padded = workload.padded_targets_and_waste()
    assert waste_ours == 0 < waste_padded < 1
    measured = order[step.WARM_UP * workload.ranks * workload.examples :]
    assert theirs == sum(len(example.input_ids) - example.prompt_length for example in measured)
    facts = [Facts(1, 1, 1.0, 1, "steps")]
    systems = {name: Measured([StepTime(2.0, 4.0)], facts) for name in ("lander", "lora")}
    actual = figures(workload, systems)
    assert actual["ratio"] == actual["processor_ratio"] == pytest.approx(ours / theirs, rel=0.01)


def _through_gloo(job: Work, own_turns: Turns) -> None:
    """Let a rank work without DeepSpeed's own collectives, which a C++ compiler would make first, for minutes."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    job(own_turns)


@pytest.mark.distributed
def test_a_whole_run(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Fresh interpreters are for the memory that the step benchmark measures.
    monkeypatch.setattr("multiprocessing.get_context", lambda method=None: server())
    monkeypatch.setattr(step, "work", lambda *arguments: partial(_through_gloo, work(*arguments)))
    code = run_script(main, "--recipe", str(recipe), *OPTIONS, "--json")
    shown = capsys.readouterr()
    assert code == 0, shown.err
    actual = json.loads(shown.out[shown.out.index("{") :])
    assert {name for name, value in actual["systems"].items() if value["per_second"] > 0} == {
        "lander",
        "lora",
    }


@pytest.mark.parametrize(
    ("options", "message"), [(("--steps", "0"), "at least 1"), (("--tokens", "1"), "less than")]
)
def test_refuses(
    recipe: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(main, "--recipe", str(recipe), *OPTIONS, *options) == 2
    assert message in capsys.readouterr().err

"""Ranks that were started unlike are named on every rank, and nothing waits for ever."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING

import pytest
from support.commands import Command, Ended
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lander_ds.common.errors import ConfigError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.loading import load_recipe
from lander_ds.distributed import agreement
from lander_ds.distributed.agreement import Report, alike, compare, exchange
from lander_ds.distributed.process_group import free_port
from lander_ds.distributed.start import Start
from lander_ds.preflight.facts import collect

if TYPE_CHECKING:
    from support.tiny_run import TinyRun

    from lander_ds.config.recipe import Recipe


def report(host: str = "node-a", **facts: Mapping[str, str]) -> Report:
    return Report(host, facts)


def test_alike_ranks_have_nothing_to_say() -> None:
    assert compare([report(recipe={"seed": "1"}, package={"torch": "2"})] * 3) == ""


def test_the_minority_is_named_with_host_key_both_values_and_cure() -> None:
    right = report(recipe={"seed": "1", "train.clip": "0.5"}, package={"torch": "2.13.0"})
    wrong = report("node-b", recipe={"seed": "1", "train.clip": "1.0"}, package={"torch": "2.12.0"})
    message = compare([wrong, right, right])
    assert "look at rank 0 (node-b):\n" in message
    assert "  rank 0 (node-b): recipe train.clip is 1.0, on most ranks 0.5\n" in message
    assert "  rank 0 (node-b): package torch is 2.12.0, on most ranks 2.13.0\n" in message
    assert "seed" not in message
    assert "\nrecipe: give all ranks the same recipe and the same --set" in message
    assert "\npackage: install the same requirements.txt" in message
    assert "\nbase: " not in message


def test_rank_0_is_right_in_a_tie() -> None:
    one, two = report(recipe={"seed": "1"}), report("node-b", recipe={"seed": "2"})
    assert "rank 1 (node-b): recipe seed is 2, on rank 0 1\n" in compare([one, two])
    assert "ranks 2-3 (node-b): recipe seed is 2, on rank 0 1\n" in compare([one, one, two, two])
    three = report("node-c", recipe={"seed": "3"})
    message = compare([three, one, one, two, two])
    assert "ranks 1-2 (node-a): recipe seed is 1, on rank 0 3\n" in message
    assert "ranks 3-4 (node-b): recipe seed is 2, on rank 0 3\n" in message


def test_a_fact_that_only_some_ranks_have() -> None:
    with_corpus = report(recipe={"data.corpora.0.path": '"a"', "data.corpora.1.path": '"b"'})
    without = report("node-b", recipe={"data.corpora.0.path": '"a"'})
    message = compare([with_corpus, with_corpus, without])
    assert 'rank 2 (node-b): recipe data.corpora.1.path is absent, on most ranks "b"' in message
    message = compare([without, without, with_corpus])
    assert 'rank 2 (node-a): recipe data.corpora.1.path is "b", on most ranks absent' in message


def test_equal_mistakes_share_a_line() -> None:
    right, wrong = report(device={"kind": "cuda"}), report("node-b", device={"kind": "cpu"})
    other = replace(wrong, host="node-c")
    message = compare([right, wrong, wrong, right, right, wrong, other, right, right])
    assert "  ranks 1-2, 5-6 (node-b, node-c): device kind is cpu, on most ranks cuda\n" in message


def test_many_differences_are_cut_off() -> None:
    right = report(code={f"{number}.py": "a" for number in range(50)}, recipe={"seed": "1"})
    wrong = report(code={f"{number}.py": "b" for number in range(50)}, recipe={"seed": "2"})
    lines = compare([right, right, wrong]).splitlines()
    assert "recipe seed" in lines[1]
    assert sum(line.startswith("  rank 2") for line in lines) == 20
    assert lines[21] == "  ... and 31 more"
    assert lines[-1].startswith("code: ")


def facts_of(recipe: Recipe) -> dict[str, dict[str, str]]:
    return collect(Start(recipe, RunDirectory(recipe.run_dir)))


def test_facts_tell_what_is_missing_or_damaged_as_a_value(tiny_run: TinyRun, tmp_path: Path) -> None:
    whole = facts_of(tiny_run.recipe("prepared"))
    assert whole["recipe"]["train.lr.general"] == "0.01"
    assert whole["deepspeed"]["zero_optimization.stage"] == "3"
    assert whole["package"]["torch"]
    assert len(whole["code"]["distributed/agreement.py"]) == 16
    assert set(whole["run_dir"]) == {"prepared data", "selection", "newest checkpoint"}
    assert whole["run_dir"]["newest checkpoint"] == "missing"
    assert {"model", "tokenizer.model"} <= set(whole["base"])

    broken = tmp_path / "model"
    shutil.copytree(tiny_run.model, broken)
    (broken / "model.safetensors").write_bytes(b"short")
    recipe = tiny_run.recipe("damaged", f"model.path={broken}")
    facts = facts_of(recipe)
    assert facts["base"]["model"].startswith("unreadable (")
    assert facts["run_dir"]["prepared data"] == "missing"
    pointer = Path(recipe.run_dir) / "data" / "prepared.json"
    pointer.parent.mkdir(parents=True)
    for damaged in ("{", "[]", "{}", '{"entry": "gone"}'):
        pointer.write_text(damaged)
        assert facts_of(recipe)["run_dir"]["prepared data"].startswith("unreadable (")
    assert facts["base"]["tokenizer.model"] == whole["base"]["tokenizer.model"]


def in_threads(ranks: Sequence[int], of: int, seconds: float, late: Sequence[float] = ()) -> list[str]:
    """What `exchange` answers on some of `of` ranks, over a real store that all of them have opened."""
    port, opened, ended = free_port(), Barrier(len(ranks)), Barrier(len(ranks))

    def run(rank: int) -> str:
        store = TCPStore(
            "127.0.0.1", port, of, rank == 0, timedelta(seconds=10), wait_for_workers=False, multi_tenant=True
        )
        opened.wait(10)
        time.sleep(late[rank] if late else 0.0)
        answer = exchange(store, rank, of, report(recipe={"seed": str(rank // 3)}), seconds)
        # The store of rank 0 is the one that the others talk to.
        ended.wait(10)
        return answer

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(run, ranks))


def test_every_rank_hears_the_same() -> None:
    answers = in_threads(range(4), 4, 10.0, late=(0.0, 0.0, 0.3, 0.1))
    assert "rank 3 (node-a): recipe seed is 1, on most ranks 0" in answers[0]
    assert set(answers) == {answers[0]}
    assert in_threads(range(3), 3, 10.0) == ["", "", ""]


def test_ranks_that_never_arrive_are_named() -> None:
    answers = in_threads([0, 1, 4], 6, 0.5)
    assert set(answers) == {answers[0]}
    assert "ranks 2-3, 5 of 6 did not arrive within 0.5 seconds" in answers[0]


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> int:
    """The environment of a launcher for rank 1 of 2, and its port."""
    port = free_port()
    values = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**values, "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    return port


def test_a_rank_0_that_never_arrives_is_named(
    tiny_run: TinyRun, two_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "ARRIVAL_SECONDS", 0.3)
    with (
        pytest.raises(ConfigError, match=rf"rank 0 did not open 127.0.0.1:{two_ranks} within 0.3 seconds"),
        alike({"command": {"stage": "train"}}, 2),
    ):
        pytest.fail("started without rank 0")


def test_a_port_in_use_is_told(tiny_run: TinyRun, two_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", two_ranks))
        taken.listen()
        with (
            pytest.raises(ConfigError, match=rf"rank 0 cannot use port {two_ranks} .*--master_port"),
            alike({"command": {"stage": "train"}}, 2),
        ):
            pytest.fail("started on a port of another program")


def test_one_rank_gathers_nothing(tiny_run: TinyRun, two_ranks: int) -> None:
    with alike({"command": {"stage": "train"}}, 1):
        pass


@dataclass(frozen=True)
class RankStart:
    """How a rank is started."""

    placement: Path
    """Its working directory, with a recipe."""
    overrides: tuple[str, ...] = ()
    """Its `--set` arguments."""
    path: str = ""
    """Searched for packages before anything else."""


def launch(stage: str, starts: Mapping[int, RankStart], ranks: int) -> list[Ended]:
    """`lander STAGE` as some of `ranks` ranks, by hand; all must end by themselves."""
    gathering = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    commands = []
    for rank, start in starts.items():
        own = {**gathering, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        sets = [part for override in start.overrides for part in ("--set", override)]
        commands.append(
            Command([stage, "--recipe", "recipe.yaml", *sets], start.placement, own, search=start.path)
        )
    return [command.wait() for command in commands]


def own_directory(tiny_run: TinyRun, placement: Path) -> Path:
    """A host's own copy of recipe, model and run, with relative paths as on other hosts."""
    placement.mkdir()
    text = tiny_run.recipe_path.read_text(encoding="utf-8").replace(f"{tiny_run.root}/", "")
    for file in [*tiny_run.root.glob("*.jsonl"), *tiny_run.root.glob("*.json")]:
        shutil.copy(file, placement)
    shutil.copytree(tiny_run.model, placement / "model")
    (placement / "recipe.yaml").write_text(f"{text}select: {{layers: {{k: 2}}}}\n", encoding="utf-8")
    return placement


@pytest.mark.distributed
def test_wrong_ranks_are_named_and_all_end(tiny_run: TinyRun, tmp_path: Path) -> None:
    from lander_ds.common.run_directory import RunDirectory
    from lander_ds.stages import prepare

    right = own_directory(tiny_run, tmp_path / "right")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(right)
        prepare.run(load_recipe(right / "recipe.yaml"), RunDirectory("run"))
    # Another corpus was prepared there, and the model is another one of the same shape.
    wrong = own_directory(tiny_run, tmp_path / "wrong")
    corpus = wrong / "train.en-de.jsonl"
    corpus.write_text(corpus.read_text(encoding="utf-8").replace("a", "b", 1), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(wrong)
        prepare.run(load_recipe(wrong / "recipe.yaml"), RunDirectory("run"))
    weights = wrong / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    # A rank that finds another version of a package first.
    old = tmp_path / "old" / "sacrebleu-2.0.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: sacrebleu\nVersion: 2.0.0\n")

    other = RankStart(right, ("train.clip=0.25",), str(tmp_path / "old"))
    ended = launch(
        "train", {0: RankStart(right), 1: other, 2: RankStart(wrong), 3: RankStart(right)}, ranks=4
    )
    assert [rank.code for rank in ended] == [2, 2, 2, 2], ended[0].errors
    wording = ended[0].errors
    host = socket.gethostname()
    assert f"look at ranks 1-2 ({host}):\n" in wording
    assert f"rank 1 ({host}): recipe train.clip is 0.25, on most ranks 0.0\n" in wording
    assert f"rank 1 ({host}): package sacrebleu is 2.0.0, on most ranks " in wording
    assert f"rank 2 ({host}): base model is " in wording
    assert f"rank 2 ({host}): run_dir prepared data is " in wording
    assert sum(line.startswith("  rank") for line in wording.splitlines()) == 4
    for number, rank in enumerate(ended):
        assert "Traceback" not in rank.errors
        assert "recipe train.clip is 0.25" in rank.errors
        assert f"rank {number} stopped: nothing was started" in rank.errors or number == 0
    assert not (right / "run" / "metrics.jsonl").exists()


@pytest.mark.distributed
def test_ranks_that_are_alike_start(tiny_run: TinyRun, tmp_path: Path) -> None:
    placement = own_directory(tiny_run, tmp_path / "place")
    ended = launch("prepare", {0: RankStart(placement), 1: RankStart(placement)}, ranks=2)
    assert [rank.code for rank in ended] == [0, 0], ended
    assert (placement / "run" / "data" / "prepared.json").exists()


@pytest.mark.distributed
def test_a_rank_with_a_broken_recipe_tells_all_of_it(tiny_run: TinyRun, tmp_path: Path) -> None:
    """A launcher ends the others; here there are none."""
    placement = own_directory(tiny_run, tmp_path / "place")
    [ended] = launch("train", {1: RankStart(placement, ("train.steps=0", "train.clip=-1"))}, ranks=2)
    assert ended.code == 2
    assert "rank 1 stopped: recipe.yaml has 2 problems" in ended.errors
    assert "train.steps: must be at least 1, found 0" in ended.errors
    assert "train.clip: must be at least 0, found -1.0" in ended.errors

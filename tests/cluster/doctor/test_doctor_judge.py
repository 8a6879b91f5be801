"""Injected faults, one by one, in what hosts tell of themselves: each is named with its host and a cure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.doctor_looks import CARD, GIGABYTE, SOUND, look
from support.workspace import Workspace

from lander_ds.cluster.doctor.compare import compare_hosts
from lander_ds.cluster.doctor.finding import Finding
from lander_ds.cluster.doctor.hostfile import Host
from lander_ds.cluster.doctor.judge import Run, judge_bandwidths, judge_clocks, judge_run
from lander_ds.cluster.doctor.judge_host import judge_hosts
from lander_ds.config.loading import load_recipe

HOSTS = (Host("node1", 4), Host("node2", 4), Host("node3", 4))


@pytest.fixture
def run(workspace: Workspace) -> Run:
    """Three hosts with four ranks each."""
    return Run(HOSTS, True, load_recipe(workspace.recipe), {"zero_optimization": {"stage": 3}})


def judged(run: Run, looks: dict[str, dict[str, Any]]) -> list[Finding]:
    return [*compare_hosts(looks), *judge_hosts(run, looks)]


def with_fault(cards: int = 0, **changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Three hosts, of which node2 has `changes`."""
    return {"node1": look(1, cards), "node2": look(2, cards, **changes), "node3": look(3, cards)}


@pytest.mark.parametrize("cards", [0, 4])
def test_sound_hosts_have_no_fault(run: Run, cards: int) -> None:
    findings = judged(run, with_fault(cards))
    assert [finding for finding in findings if finding.status != "ok"] == []
    assert {finding.host for finding in findings} == {"node1", "node2", "node3"}


def facts(kind: str, name: str, value: str) -> dict[str, Any]:
    changed = {**SOUND["recipe"]["facts"], kind: {name: value}}
    return {"recipe": {"facts": changed}}


def accelerator(**changes: Any) -> dict[str, Any]:
    return {"accelerator": changes}


FAULTS: dict[str, tuple[int, dict[str, Any], str, str]] = {
    "python": (0, {"machine": {"python": "3.12.1"}}, "python", "Python is 3.12.1, on node1 3.11.7"),
    "package": (
        0,
        {"packages": {"torch": "2.12.0"}},
        "packages",
        "torch is 2.12.0, on node1 2.13.0",
    ),
    "missing package": (0, {"packages": {"deepspeed": "0.19.8"}}, "packages", "deepspeed is 0.19.8"),
    "code": (0, facts("code", "run.py", "dd"), "code", "run.py is dd, on node1 cc"),
    "recipe": (0, facts("recipe", "seed", "2"), "recipe", "seed is 2, on node1 1"),
    "DeepSpeed JSON": (
        0,
        facts("deepspeed", "zero_optimization.stage", "1"),
        "deepspeed_json",
        "zero_optimization.stage is 1",
    ),
    "model": (0, facts("base", "model", "bb"), "model", "model is bb, on node1 aa"),
    "data": (0, facts("run_dir", "prepared data", "ee"), "data", "prepared data is ee, on node1 missing"),
    "bad recipe": (
        0,
        {"recipe": {"error": "recipe.yaml does not exist"}},
        "recipe",
        "recipe.yaml does not exist",
    ),
    "kind of device": (0, {"machine": {"architecture": "aarch64"}}, "device", "architecture is aarch64"),
    "NCCL version": (4, accelerator(nccl="2.20"), "device", "NCCL is 2.20, on node1 2.27"),
    "too few GPUs": (4, accelerator(cards=[CARD] * 2), "slots", "slots=4, but PyTorch sees 2 GPUs"),
    "no NCCL": (4, accelerator(nccl=None), "accelerator", "this PyTorch has no NCCL"),
    "GPU not seen": (0, accelerator(driver=True), "accelerator", "sees no GPU"),
    "PyTorch broken": (0, {"accelerator": {"error": "ImportError: libx"}}, "accelerator", "libx"),
    "no gloo": (0, accelerator(gloo=False), "accelerator", "without gloo"),
    "name is loopback": (0, {"network": {"resolved": "127.0.1.1"}}, "interface", "resolves to 127.0.1.1"),
    "name unknown": (0, {"network": {"resolved": None}}, "interface", "resolves to nothing"),
    "no such interface": (
        0,
        {"network": {"settings": {"GLOO_SOCKET_IFNAME": "ib0"}}},
        "interface",
        "GLOO_SOCKET_IFNAME=ib0",
    ),
    "DeepSpeed version": (
        0,
        {"topology": {"error": "pipeline_zero3 was never tested with DeepSpeed 0.20"}},
        "topology",
        "0.20",
    ),
    "open files": (0, {"limits": {"open_files": 256}}, "open_files", "at most 256 open files"),
    "locked memory": (
        0,
        {"limits": {"locked_memory": 65536, "infiniband": True}},
        "locked_memory",
        "at most 65.5 kB of locked memory",
    ),
    "memory": (0, {"machine": {"free_memory": GIGABYTE}}, "memory", "1.0 GB are free"),
    "GPU memory": (
        4,
        accelerator(cards=[{**CARD, "free": GIGABYTE // 10}] * 4),
        "gpu_memory",
        "100.0 MB are free",
    ),
    "temporary files": (0, {"temporary": {"/tmp": 10**6}}, "temporary", "1.0 MB free in /tmp"),
    "shared memory": (
        4,
        {"temporary": {"/dev/shm": 64 * 10**6}},
        "shared_memory",
        "64.0 MB free in /dev/shm",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_on_its_host_alone(run: Run, name: str) -> None:
    cards, changes, check, wording = FAULTS[name]
    failed = [finding for finding in judged(run, with_fault(cards, **changes)) if finding.status == "fail"]
    assert {finding.host for finding in failed} == {"node2"}
    assert any(finding.check == check and wording in finding.detail for finding in failed)
    assert all(finding.cure for finding in failed)


WARNINGS: dict[str, tuple[int, dict[str, Any], str, str]] = {
    "idle GPUs": (4, accelerator(cards=[CARD] * 8), "slots", "4 of 8 GPUs stay idle"),
    "few cores": (0, {"machine": {"cores": 2}}, "slots", "slots=4, but only 2 cores"),
    "same machine": (0, {"machine": {"identity": "boot/1"}}, "same_machine", "is the same machine as node1"),
    "unimportant package": (0, {"packages": {"rich": "14.0"}}, "other_packages", "rich is 14.0"),
    "other stages": (0, {"recipe": {"warning": "no corpus"}}, "stages", "no corpus"),
    "little shared memory": (4, {"temporary": {"/dev/shm": 5 * 10**8}}, "shared_memory", "500.0 MB free"),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_a_warning_does_not_fail(run: Run, name: str) -> None:
    cards, changes, check, wording = WARNINGS[name]
    findings = [finding for finding in judged(run, with_fault(cards, **changes)) if finding.status != "ok"]
    assert {finding.status for finding in findings} == {"warn"}
    assert any(
        (finding.check, finding.host) == (check, "node2") and wording in finding.detail
        for finding in findings
    )
    assert all(finding.cure for finding in findings)


@pytest.mark.parametrize(
    ("dtype", "vectors"), [("bfloat16", "AVX2"), ("bfloat16", "AVX512"), ("float32", "AVX2")]
)
def test_a_processor_that_imitates_the_type_is_told(run: Run, dtype: Any, vectors: str) -> None:
    assert run.recipe is not None
    recipe = replace(run.recipe, model=replace(run.recipe.model, dtype=dtype))
    findings = judged(replace(run, recipe=recipe), with_fault(**accelerator(vectors=vectors)))
    slow = [finding.host for finding in findings if "imitates bfloat16" in finding.detail]
    assert slow == (["node2"] if (dtype, vectors) == ("bfloat16", "AVX2") else [])


def test_the_same_machine_twice_fails_where_gpus_would_be_shared(run: Run) -> None:
    findings = judged(run, with_fault(4, machine={"identity": "boot/1"}))
    assert [(f.check, f.host) for f in findings if f.status == "fail"] == [("same_machine", "node2")]


def test_of_two_hosts_the_first_is_held_to_be_right() -> None:
    looks = {"node1": look(1), "node2": look(2, packages={"torch": "2.12.0"})}
    failed = [finding for finding in compare_hosts(looks) if finding.status == "fail"]
    assert [(finding.check, finding.host) for finding in failed] == [("packages", "node2")]


def test_many_differences_are_counted() -> None:
    many = {f"file{number}.py": "x" for number in range(9)}
    looks = with_fault(recipe={"facts": {**SOUND["recipe"]["facts"], "code": many}})
    wording = next(
        finding for finding in compare_hosts(looks) if finding.check == "code" and finding.host == "node2"
    )
    assert "file0.py is x, on node1 absent" in wording.detail
    assert wording.detail.endswith("and 5 more")


def test_an_unreadable_model_fails_and_unreadable_data_warns() -> None:
    unreadable = "unreadable (truncated)"
    changed = {
        **SOUND["recipe"]["facts"],
        "base": {"model": unreadable},
        "run_dir": {"prepared data": unreadable},
    }
    looks = {"node1": look(1, recipe={"facts": changed})}
    actual = {
        finding.check: finding.status
        for finding in compare_hosts(looks)
        if "truncated" in finding.detail and finding.cure
    }
    assert actual == {"model": "fail", "data": "warn"}


@pytest.mark.parametrize("tool", ["compiler", "ninja"])
def test_offloading_needs_a_compiler_and_ninja(run: Run, tool: str) -> None:
    looks = with_fault(tools={tool: None})
    assert not any(finding.status == "fail" for finding in judged(run, looks))
    offloading = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    failed = [f for f in judged(replace(run, deepspeed=offloading), looks) if f.status == "fail"]
    assert [(finding.check, finding.host) for finding in failed] == [("compiler", "node2")]
    assert tool.removesuffix("iler") in failed[0].detail


def test_a_full_disk_is_told_with_what_is_needed(run: Run) -> None:
    looks = with_fault()
    looks["node1"]["disk"]["free"] = GIGABYTE
    failed = [finding for finding in judged(run, looks) if finding.status == "fail"]
    assert [(finding.check, finding.host) for finding in failed] == [("disk", "node1")]
    assert (
        "5.2 GB needed (1 checkpoints of 1.2 GB, exports 4.0 GB), 1.0 GB free in /shared/run"
        in failed[0].detail
    )


def test_ranks_must_fill_the_pipeline(run: Run) -> None:
    assert run.recipe is not None
    assert judge_run(run)[0].status == "ok"
    cut = replace(run, recipe=replace(run.recipe, topology="pipeline", pipeline_stages=5))
    finding = judge_run(cut)[0]
    assert finding.status == "fail"
    assert "pipeline_stages: 5 does not divide 12 ranks" in finding.detail


@pytest.mark.parametrize(("skew", "status"), [(0.2, "ok"), (-3.0, "warn"), (120.0, "fail"), (-120.0, "fail")])
def test_a_wrong_clock_is_found_on_its_host(skew: float, status: str) -> None:
    findings = judge_clocks({"node1": (0.01, 0.002), "node2": (skew, 0.002)})
    assert [finding.status for finding in findings] == ["ok", status]
    assert ("behind" if skew < 0 else "ahead") in findings[1].detail


def test_a_long_round_trip_excuses_a_skew() -> None:
    assert judge_clocks({"node1": (0.0, 0.01), "node2": (15.0, 20.0)})[1].status == "ok"


def test_a_wrong_clock_here_is_not_the_hosts_fault() -> None:
    offsets = {f"node{number}": (500.0, 0.01) for number in range(3)}
    assert {finding.status for finding in judge_clocks(offsets)} == {"ok"}


def test_a_slow_connection_is_told() -> None:
    speeds = {("a", "b"): 10.0e9, ("a", "c"): 1.0e9, ("b", "c"): 11.0e9}
    messages = [{"from": one, "to": two, "bytes_per_second": speed} for (one, two), speed in speeds.items()]
    findings = judge_bandwidths(messages)
    assert [(finding.host, finding.status) for finding in findings] == [("a", "warn")]
    assert "to c: 1.0 GB/s" in findings[0].detail
    assert judge_bandwidths(messages[:2]) == []


def test_without_a_recipe_hosts_are_still_judged(tmp_path: Path) -> None:
    bare = {key: value for key, value in look(1).items() if key not in ("recipe", "disk", "topology", "need")}
    findings = judged(Run([Host("node1", 4)], False), {"node1": bare})
    assert {"slots", "open_files", "packages"} <= {finding.check for finding in findings}
    assert not any(finding.status == "fail" for finding in findings)

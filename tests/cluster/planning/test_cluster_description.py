"""The cluster description: strict, with lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from lander_ds.cluster.planning.cluster import EXAMPLE, load_cluster
from lander_ds.common.errors import ConfigError

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted((ROOT / "examples" / "clusters").glob("*.yaml"))
SOUND = """\
nodes: 2
gpus_per_node: 4
gpu_memory: 80
host_memory: 500
tflops: 312
intra_bandwidth: 300
inter_bandwidth: 25
"""


def refusal(folder: Path, text: str) -> str:
    path = folder / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_cluster(path)
    return str(caught.value)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_load(path: Path) -> None:
    cluster = load_cluster(path)
    assert cluster.nodes * cluster.gpus_per_node == int(path.stem.split("x")[0]) * _rest(path.stem)


def _rest(name: str) -> int:
    second = name.split("x")[1]
    return int(second) if second.isdecimal() else 1


def test_the_message_names_an_example_that_exists(tmp_path: Path) -> None:
    assert EXAMPLE in refusal(tmp_path, "- 1\n")
    assert (ROOT / EXAMPLE).exists()


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(SOUND)
    assert load_cluster(path).efficiency == 0.4


@pytest.mark.parametrize(
    ("before", "after", "fragment"),
    [
        ("tflops: 312", "teraflops: 312", "line 5: teraflops: unknown key; did you mean tflops?"),
        ("nodes: 2\n", "", "nodes: this required key is missing"),
        ("nodes: 2", "nodes: 2.5", "line 1: nodes: expected a whole number"),
        ("nodes: 2", "nodes: 0", "line 1: nodes: must be more than 0, found 0"),
        ("nodes: 2", "nodes: 2\nlatency: -1", "line 2: latency: must be at least 0"),
        ("nodes: 2", "nodes: 2\nefficiency: 40", "line 2: efficiency: is a share of the peak, at most 1"),
        ("gpu_memory: 80", 'gpu_memory: "80"', "line 3: gpu_memory: expected a finite number"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, before: str, after: str, fragment: str) -> None:
    assert fragment in refusal(tmp_path, SOUND.replace(before, after))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: the cluster description does not exist"):
        load_cluster(tmp_path / "none.yaml")

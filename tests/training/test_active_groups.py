"""A bank that no token of a global batch owns is left alone by that step, whatever AdamW remembers of it."""

from __future__ import annotations

import json

import pytest
from support.jobs import WATCHED
from support.tiny_run import TinyRun

from lander_ds.models.parameter_groups import active_groups

GROUPS = ("gates", "general", "specific:en-de", "specific:en-de+en-fr", "specific:en-fr", "dense", "lora")


@pytest.mark.parametrize(
    ("present", "inactive"),
    [
        (("en-de",), {"specific:en-fr"}),
        (("en-fr",), {"specific:en-de"}),
        (("en-de", "en-fr"), set()),
        (("en-es",), {"specific:en-de", "specific:en-de+en-fr", "specific:en-fr"}),
    ],
)
def test_which_groups_a_batch_may_change(present: tuple[str, ...], inactive: set[str]) -> None:
    assert active_groups(GROUPS, present) == set(GROUPS) - inactive


def test_a_general_bank_of_some_pairs_needs_one_of_them() -> None:
    names = ("general", "general:en-de+en-fr")
    assert active_groups(names, ["en-es"]) == {"general"}
    assert active_groups(names, ["en-fr"]) == set(names)


def test_a_pair_whose_name_is_part_of_anothers_owns_nothing_of_it() -> None:
    assert active_groups(["specific:zh-de_AT"], ["zh-de"]) == set()


@pytest.mark.distributed
def test_weights_moments_and_counts_of_inactive_groups_stay_bitwise(world_2: TinyRun) -> None:
    """AdamW with weight decay on two ranks; every tensor of every group is compared after every step."""
    notes = json.loads((world_2.run("none-2").path / WATCHED).read_text())
    used: set[str] = set()
    idle_after_use = 0
    for note in notes:
        assert note["changed"] == note["active"]
        idle = set(note["groups"]) - set(note["changed"])
        idle_after_use += len(idle & used)
        used |= set(note["changed"])
        assert all(set(group.partition(":")[2].split("+")).isdisjoint(note["present"]) for group in idle)
    assert idle_after_use > 0
    assert used == set(notes[0]["groups"])

"""A failed export leaves the good one before it whole: write, verify, describe, and only then swap."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.exports import contents
from support.golden_export import GoldenRun, golden_run

from lander_ds.common.errors import ArtefactError
from lander_ds.export.sources import Merged
from lander_ds.stages import export

FORMATS = "export.formats=[dense, routed, delta]"


@pytest.fixture
def golden(tmp_path: Path) -> GoldenRun:
    return golden_run(tmp_path / "golden")


def spoil_weights(patch: pytest.MonkeyPatch) -> None:
    merged = Merged.tensor

    def wrong(self: Merged, stored: str, dtype: torch.dtype | None) -> torch.Tensor:
        value = merged(self, stored, dtype)
        return value + 1e-2 if "down_proj" in stored else value

    patch.setattr(Merged, "tensor", wrong)


def fail_on_cards(patch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    patch.setattr(export, "write_card", full)


@pytest.mark.parametrize("spoil", [spoil_weights, fail_on_cards])
def test_what_fails_after_writing_replaces_nothing(
    golden: GoldenRun, monkeypatch: pytest.MonkeyPatch, spoil: object
) -> None:
    golden.export(FORMATS)
    before = contents(golden.run.export)
    assert callable(spoil)
    spoil(monkeypatch)
    with pytest.raises((ArtefactError, OSError)):
        golden.export(FORMATS, "export.verify=2")
    assert contents(golden.run.export) == before
    assert {path.name for path in golden.run.export.iterdir()} == {
        *("dense", "routed", "delta", "verification.json")
    }
    monkeypatch.undo()
    golden.export(FORMATS, "export.verify=2")


def test_the_proof_of_other_exports_does_not_stay(golden: GoldenRun) -> None:
    golden.export("export.formats=[routed]")
    export.run(golden.recipe("export.formats=[routed]", "export.verify=0"), golden.run)
    assert not (golden.run.export / "verification.json").exists()


def test_a_first_export_that_fails_leaves_nothing(golden: GoldenRun, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_weights(monkeypatch)
    message = r"routed does not compute what was trained.*was deleted.*unchanged; please report"
    (golden.run.export / "delta" / "README.md").unlink()
    before = contents(golden.run.export)
    with pytest.raises(ArtefactError, match=message):
        golden.export("export.formats=[routed]")
    assert contents(golden.run.export) == before

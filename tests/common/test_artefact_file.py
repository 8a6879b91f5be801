"""Single-file artefacts: what is written is read, by others too, and damage is told."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import replacing, write_text, writing
from lander_ds.common.tensor_file import reading, save_tensors, write

TENSORS = {"a": torch.arange(6.0)}


def read(path: Path, form: str = "thing-1") -> torch.Tensor:
    with reading(path, "thing", form, "make it again") as (file, description):
        assert description["n"] == 6
        return file.get_tensor("a")


def make(path: Path) -> Path:
    write(path, "thing", TENSORS, json.dumps({"format": "thing-1", "n": 6}))
    return path


def test_there_and_back(tmp_path: Path) -> None:
    path = make(tmp_path / "new" / "thing.safetensors")
    assert torch.equal(read(path), TENSORS["a"])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("mask", [0o022, 0o007, 0o077])
def test_files_have_the_rights_that_the_umask_leaves(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        save_tensors(tmp_path / "tensors.safetensors", TENSORS)
        path = make(tmp_path / "thing.safetensors")
    finally:
        os.umask(before)
    for file in (path, tmp_path / "tensors.safetensors"):
        assert file.stat().st_mode & 0o777 == 0o666 & ~mask


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="does not exist: make it again"):
        read(tmp_path / "none")
    path = make(tmp_path / "thing.safetensors")
    with pytest.raises(ArtefactError, match="is not a other-1 file: make it again"):
        read(path, "other-1")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ArtefactError, match=r"is damaged \(.*\): make it again"):
        read(path)
    write(path, "thing", {"b": TENSORS["a"]}, json.dumps({"format": "thing-1", "n": 6}))
    with pytest.raises(ArtefactError, match=r"is damaged \(.*\): make it again"):
        read(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")

    def fail() -> None:
        with writing(tmp_path / "a.txt") as temporary:
            temporary.write_text("half of the n")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_directory_is_brought_back_after_a_crash_between_the_renames(tmp_path: Path) -> None:
    final, hidden = tmp_path / "export", tmp_path / ".export.old.tmp"
    with replacing(final) as new:
        (new / "model").write_text("good")
    final.rename(hidden)  # as a process leaves it that is killed after the first rename
    with pytest.raises(RuntimeError, match="stopped"), replacing(final):
        raise RuntimeError("stopped")
    assert (final / "model").read_text() == "good"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_link_that_stood_in_the_place_of_a_directory_goes_and_its_target_stays(tmp_path: Path) -> None:
    target, final = tmp_path / "target", tmp_path / "export"
    target.mkdir()
    (target / "model").write_text("theirs")
    final.symlink_to(target)
    with replacing(final) as new:
        (new / "model").write_text("ours")
    assert not final.is_symlink()
    assert ((final / "model").read_text(), (target / "model").read_text()) == ("ours", "theirs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "target"]

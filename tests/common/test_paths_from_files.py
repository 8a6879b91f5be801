"""Names of files that were read from a file never lead out of the directory they belong to."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.tiny_run import TinyRun

from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import inside, is_inside
from lander_ds.common.run_directory import RunDirectory
from lander_ds.data.prepared import PreparedData

HOSTILE = ("/etc/passwd", "..", "../x", "a/../../x", "", "x\0y")


@pytest.mark.parametrize("name", [*HOSTILE, None, 5, ["a"]])
def test_what_leads_elsewhere_is_refused(tmp_path: Path, name: object) -> None:
    with pytest.raises(ArtefactError, match=r"source\.json names .* no path inside"):
        inside(tmp_path, name, tmp_path / "source.json")


@pytest.mark.parametrize("name", ["a", "a/b.json", "..a", "a..b", ".hidden"])
def test_what_stays_is_not(tmp_path: Path, name: str) -> None:
    assert is_inside(name)
    assert inside(tmp_path, name, tmp_path / "source.json") == tmp_path / name


def test_a_run_may_lie_on_another_disk_by_links(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    run = RunDirectory(tmp_path / "run")
    (run.checkpoints / "file").write_text("x")
    run.record("train", {}, {}, [run.checkpoints / "file"], 1.0)
    assert run.up_to_date("train", {}, {})


def recorded(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.report.write_text("x")
    run.record("report", {}, {}, [run.report], 1.0)
    assert run.up_to_date("report", {}, {})
    return run


@pytest.mark.parametrize("name", HOSTILE)
def test_outputs_of_a_stage_record(tmp_path: Path, name: str) -> None:
    run = recorded(tmp_path)
    path = run.record_path("report")
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "outputs": {name: "0"}}))
    with pytest.raises(ArtefactError, match=r"report\.json names"):
        run.up_to_date("report", {}, {})


@pytest.mark.parametrize("content", ["[]", "{}", '{"options_hash": 1, "inputs": 5}', "null"])
def test_a_damaged_stage_record_is_told(tmp_path: Path, content: str) -> None:
    run = recorded(tmp_path)
    run.record_path("report").write_text(content)
    with pytest.raises(
        ArtefactError, match=r"report\.json is no stage record: delete it to run stage report again"
    ):
        run.up_to_date("report", {}, {})


@pytest.mark.parametrize("entry", [*HOSTILE, None, 3])
def test_the_pointer_to_prepared_data(tiny_run: TinyRun, tmp_path: Path, entry: object) -> None:
    shutil.copytree(tiny_run.root / "prepared", tmp_path / "run")
    recipe = replace(tiny_run.recipe("prepared"), run_dir=str(tmp_path / "run"))
    run = RunDirectory(tmp_path / "run")
    PreparedData.load(run, recipe)
    path = run.data / "prepared.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "entry": entry}))
    with pytest.raises(ArtefactError, match=r"prepared\.json"):
        PreparedData.load(run, recipe)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd"])
def test_the_files_of_prepared_data(tiny_run: TinyRun, tmp_path: Path, name: str) -> None:
    # Tests that share the cache have put others there.
    pointer = json.loads((tiny_run.root / "prepared" / "data" / "prepared.json").read_text())
    shutil.copytree(pointer["entry"], tmp_path / "entry")
    PreparedData(tmp_path / "entry")
    path = tmp_path / "entry" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "files": {name: 1}}))
    with pytest.raises(ArtefactError, match="no path inside"):
        PreparedData(tmp_path / "entry")
    splits = {f"{name}/x": ["test"]}
    path.write_text(json.dumps({**manifest, "files": {}, "pairs": list(splits), "splits": splits}))
    with pytest.raises(ArtefactError, match="no path inside"):
        PreparedData(tmp_path / "entry").split("test")

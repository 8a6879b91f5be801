"""`lander completion`: the scripts know the commands, and bash completes with them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lander_ds.cli import completion
from lander_ds.cli.main import main
from lander_ds.stages.catalogue import STAGES


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    pytest.importorskip("shtab", reason="shtab is not installed")
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_every_stage_is_in_it(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    actual = script(shell, capsys)
    assert all(stage in actual for stage in STAGES)
    assert "--auto-resume" in actual


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("tr", {"train", "translate"}),
        ("train --auto", {"--auto-resume"}),
        ("train --recipe m", {"mine.yaml", "models"}),
        ("summary m", {"models"}),
        ("delta re", {"revert"}),
    ],
)
def test_bash_completes(
    line: str, expected: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "completion.sh").write_text(script("bash", capsys), encoding="utf-8")
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "models").mkdir()
    words = ["lander", *line.split()]
    ask = (
        f"source completion.sh; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; "
        f"$(complete -p lander | sed 's/.*-F \\([^ ]*\\).*/\\1/') lander {words[-1]} {words[-2]}; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert {reply.strip().rstrip("/") for reply in done.stdout.splitlines()} == expected


def test_without_shtab_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(completion, "find_spec", lambda name: None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'lander-ds[completion]'" in capsys.readouterr().err

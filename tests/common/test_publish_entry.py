"""Several processes publish one cache entry while others open it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lander_ds.common.files import alone, publish_entry

WRITERS, ROUNDS = 4, 8


def made(directory: Path, text: str = "whole") -> Path:
    directory.mkdir()
    (directory / "content").write_text(text)
    return directory


def is_whole(entry: Path) -> Callable[[], bool]:
    def check() -> bool:
        try:
            return (entry / "content").read_text() == "whole"
        except (FileNotFoundError, NotADirectoryError):
            return False

    return check


def publish_all(final: Path) -> list[bool]:
    """Publish from several threads at once; what each of them saw there afterwards."""
    start = threading.Barrier(WRITERS)

    def write(number: int) -> list[bool]:
        new = made(final.with_name(f"{final.name}-new-{number}"))
        start.wait()
        publish_entry(new, final, is_whole(final))
        # From here on this run has an entry, whatever the others still do.
        return [is_whole(final)() for _ in range(50)]

    with ThreadPoolExecutor(WRITERS) as pool:
        return [one for writer in pool.map(write, range(WRITERS)) for one in writer]


@pytest.mark.parametrize("before", [None, "damaged", "whole"])
def test_an_entry_that_was_published_stays(tmp_path: Path, before: str | None) -> None:
    for number in range(ROUNDS):
        final = tmp_path / f"entry-{number}"
        if before is not None:
            made(final, before)
        assert all(publish_all(final))


def test_a_whole_entry_is_not_touched(tmp_path: Path) -> None:
    final, new = made(tmp_path / "final"), made(tmp_path / "new")
    inode = final.stat().st_ino
    publish_entry(new, final, is_whole(final))
    assert final.stat().st_ino == inode
    assert new.exists()


@pytest.mark.parametrize("there", ["directory", "file"])
def test_what_cannot_stay_is_replaced(tmp_path: Path, there: str) -> None:
    final, new = tmp_path / "final", made(tmp_path / "new")
    if there == "directory":
        made(final, "damaged")
    else:
        final.write_text("")
    publish_entry(new, final, is_whole(final))
    assert is_whole(final)()
    assert list(tmp_path.iterdir()) == [final]


def test_alone(tmp_path: Path) -> None:
    inside: list[int] = []

    def work(lock: Path) -> int:
        with alone(lock):
            inside.append(1)
            time.sleep(0.01)
            together = len(inside)
            inside.pop()
        return together

    for lock in (tmp_path, tmp_path / "new" / "lock"):
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(work, [lock] * 8)) == [1] * 8


def test_alone_goes_on_where_there_are_no_locks() -> None:
    with alone(Path("/dev/null/lock")):
        pass

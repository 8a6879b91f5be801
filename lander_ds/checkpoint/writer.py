"""Writing checkpoints: all ranks at once, in the background, complete or not at all.

Every rank writes its files into a hidden directory beside the final one and leaves a report with their hashes. Rank 0
waits for the reports of all ranks, adds state.json and renames the directory: only then is there a checkpoint. Nothing
is agreed on by collectives, because those belong to the training that goes on meanwhile.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lander_ds.checkpoint.checkpoint import (
    AVERAGED,
    DIGEST,
    FORMAT,
    OPTIMIZER,
    SELECTION,
    STATE,
    TRAINED,
    steps,
)
from lander_ds.checkpoint.retention import Retention, superfluous
from lander_ds.common.errors import ExitCode, LanderError
from lander_ds.common.files import file_hash, flush, json_hash, publish, write_json
from lander_ds.common.run_directory import versions
from lander_ds.common.tensor_file import save_tensors
from lander_ds.distributed import collectives, process_group

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05
REPORT_SECONDS = 1800.0
"""How long rank 0 waits for the other ranks' reports."""


class SaveFailed(LanderError):
    """The last checkpoint of a training could not be written."""

    exit_code = ExitCode.NOT_SAVED


@dataclass(frozen=True)
class Parts:
    """What one rank writes."""

    trained: Mapping[str, torch.Tensor]
    """Name -> float32 tensor in host memory that nothing else changes."""
    optimizer: Mapping[str, torch.Tensor]
    """`exp_avg/NAME`, `exp_avg_sq/NAME` -> the same."""
    averaged: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Name -> average of the tensor over steps; empty where there is none."""


class Writer:
    """Writes one checkpoint after the other; at most one at a time."""

    def __init__(self, directory: Path, retention: Retention, background: bool) -> None:
        """Prepare, and remove what a killed run left unfinished (collective).

        Args:
            directory: the run's checkpoints.
            retention: which ones to keep.
            background: return from `save` before anything is written.
        """
        self._directory, self._retention, self._background = directory, retention, background
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._saving: Path | None = None
        if process_group.rank() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            for leftover in directory.glob(".step-*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)
        # A rank of a killed run may live on for a while: it must not write among the files of this one.
        self._start = collectives.from_rank_zero(secrets.token_hex(4))

    def save(self, step: int, parts: Parts, description: Mapping[str, Any], selection: Path | None) -> None:
        """Write `step-N` (collective). Waits for the one before; its failure is logged.

        Args:
            step: optimizer steps done.
            parts: what this rank writes.
            description: JSON values for state.json.
            selection: the selection file to keep with it, or None.
        """
        failure = self._wait()
        if failure and process_group.rank() == 0:
            logger.error("%s; training goes on, the next checkpoint tries again", failure)
        self._saving = self._directory / f"step-{step}"
        work = (
            self._saving,
            step,
            parts,
            dict(description),
            selection,
            process_group.rank(),
            process_group.world_size(),
        )
        self._thread = threading.Thread(target=self._work, args=work, name=f"save step-{step}")
        self._thread.start()
        if not self._background:
            self._thread.join()

    def finish(self) -> None:
        """Wait until the last checkpoint is there (collective).

        Raises:
            SaveFailed: it could not be written.
        """
        if failure := self._wait():
            raise SaveFailed(
                f"{failure}; earlier checkpoints are whole, --auto-resume goes on from the newest"
            )

    def _wait(self) -> str | None:
        """Wait for the checkpoint that is being written; why it failed, or None."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failures, self._failure = collectives.gather_objects(self._failure), None
        return next(filter(None, failures), None)

    def _work(
        self,
        final: Path,
        step: int,
        parts: Parts,
        description: dict[str, Any],
        selection: Path | None,
        rank: int,
        ranks: int,
    ) -> None:
        new, began = final.with_name(f".{final.name}.{self._start}.tmp"), time.monotonic()
        try:
            _write_part(new, parts, rank)
            if rank != 0:
                return
            files = _collect(new, ranks)
            if selection is not None:
                shutil.copyfile(selection, new / SELECTION)
                flush(new / SELECTION)
                files[SELECTION] = _described(new / SELECTION)
            state = {"format": FORMAT, "step": step, **description, "files": files, "versions": versions()}
            write_json(new / STATE, {**state, DIGEST: json_hash(state)})
            # What had the name before (a damaged one) is kept under another.
            publish(new, final, lambda: _free_name(final))
        except (OSError, LanderError) as error:
            self._failure = f"checkpoint {final} could not be written: {error}"
            if rank == 0:
                shutil.rmtree(new, ignore_errors=True)
            return
        size = sum(entry["bytes"] for entry in files.values())
        logger.info("wrote %s: %.1f MB in %.1f s", final, size / 1e6, time.monotonic() - began)
        for old in superfluous(self._directory, self._retention, step):
            try:
                _remove(old)
            except OSError as error:
                logger.warning("cannot delete %s: %s", old, error)


def _write_part(new: Path, parts: Parts, rank: int) -> None:
    """Write one rank's files and its report."""
    report: dict[str, Any] = {}
    try:
        new.mkdir(parents=True, exist_ok=True)
        for kind, tensors in (
            (TRAINED, parts.trained),
            (OPTIMIZER, parts.optimizer),
            (AVERAGED, parts.averaged),
        ):
            if tensors:
                path = new / f"{kind}-{rank}.safetensors"
                save_tensors(path, tensors)
                report[path.name] = _described(path)
        write_json(_report_path(new, rank), report)
    except Exception as error:
        # Whatever it is, rank 0 must hear of it. What was written makes room for the report on a full disk.
        for path in new.glob(f"*-{rank}.safetensors"):
            path.unlink()
        reason = f"rank {rank} on {os.uname().nodename}: {error}"
        _report_path(new, rank).with_suffix(".failed").write_text(reason, encoding="utf-8")


def _collect(new: Path, ranks: int) -> dict[str, dict[str, Any]]:
    """The files of all ranks, once each has reported.

    Raises:
        LanderError: a rank failed, or does not report.
    """
    deadline = time.monotonic() + REPORT_SECONDS
    waiting = set(range(ranks))
    files: dict[str, dict[str, Any]] = {}
    while waiting:
        for rank in sorted(waiting):
            report = _report_path(new, rank)
            failed = report.with_suffix(".failed")
            if failed.exists():
                raise LanderError(failed.read_text(encoding="utf-8") or f"rank {rank} failed")
            if report.exists():
                files.update(json.loads(report.read_text(encoding="utf-8")))
                report.unlink()
                waiting.discard(rank)
        if waiting and time.monotonic() > deadline:
            raise LanderError(
                f"ranks {', '.join(map(str, sorted(waiting)))} did not report in {REPORT_SECONDS:.0f} s"
            )
        time.sleep(POLL_SECONDS if waiting else 0.0)
    return dict(sorted(files.items()))


def _free_name(final: Path) -> Path:
    number = 1
    while (path := final.with_name(f"{final.name}.replaced-{number}")).exists():
        number += 1
    return path


def _described(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_hash(path)}


def _report_path(new: Path, rank: int) -> Path:
    return new / f"report-{rank}.json"


def remove_all(directory: Path) -> None:
    """Delete all checkpoints of a run."""
    for step in steps(directory):
        _remove(directory / f"step-{step}")


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint. Renamed first: a process killed half-way leaves no half checkpoint under a name that is read."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)

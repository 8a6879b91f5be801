"""What training writes down: metrics.jsonl (every step), TensorBoard (through DeepSpeed's monitor), trackers, log lines."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lander_ds.common.files import write_text
from lander_ds.distributed import process_group
from lander_ds.training.trackers import Trackers
from lander_ds.training.validation import Validation

logger = logging.getLogger(__name__)


class MetricsLogger:
    """Rank 0 writes; the other ranks do nothing."""

    def __init__(
        self, path: Path, monitor: Any, log_every: int, done: int = 0, trackers: Trackers | None = None
    ) -> None:
        """Start `path` anew, or go on in it.

        Args:
            path: metrics.jsonl.
            monitor: the DeepSpeed engine's monitor.
            log_every: steps between points in TensorBoard and trackers.
            done: steps already done; what the file says of later ones is dropped, because they are done again.
            trackers: further ones that are told the same; default: none.
        """
        self._monitor, self._log_every, self._trackers = monitor, log_every, trackers or Trackers({})
        self._stream = None
        if process_group.rank() == 0:
            write_text(path, "".join(_until(path, done)))
            self._stream = path.open("a", encoding="utf-8")

    def step(self, record: dict[str, Any]) -> None:
        """Record one optimizer step."""
        self._write(record)
        if record["step"] % self._log_every == 0 and not record["skipped"]:
            scalars = {
                "train/loss": record["loss"],
                "train/grad_norm": record["grad_norm"],
                "train/tokens_per_second": record["tokens_per_second"],
                **{f"loss/{pair}": value for pair, value in record["loss_per_pair"].items()},
                **({"loss/replay": record["replay_loss"]} if "replay_loss" in record else {}),
                **{f"preference/{name}": value for name, value in record.get("preference", {}).items()},
                **{f"lr/{group}": value for group, value in record["lr"].items()},
            }
            for layer, gates in record["gates"].items():
                scalars.update({f"gate/layer{layer}/{pair}": value for pair, value in gates.items()})
            self._scalars(scalars, record["step"])

    def validation(self, step: int, measured: Validation, metric: str | None = None) -> None:
        """Record a validation; `metric`: of its scores."""
        record: dict[str, Any] = {"valid_loss": measured.losses, "valid_loss_mean": measured.mean_loss}
        scalars = {"valid/mean": measured.mean_loss}
        scalars.update({f"valid/{pair}": loss for pair, loss in measured.losses.items()})
        logger.info("step %d: validation loss %.4f (%s)", step, measured.mean_loss, _listed(measured.losses))
        if (preferences := measured.preferences) is not None:
            record["valid_preference"] = values = asdict(preferences)
            scalars.update({f"valid/preference_{name}": value for name, value in values.items()})
            logger.info(
                "step %d: the better translation is the likelier one in %.1f %% of the preferences, by %s nats",
                *(step, 100 * preferences.accuracy, preferences.margin),
            )
        if (mean := measured.mean_score) is not None:
            record |= {f"valid_{metric}": measured.scores, f"valid_{metric}_mean": mean}
            scalars[f"{metric}/mean"] = mean
            scalars.update({f"{metric}/{pair}": score for pair, score in measured.scores.items()})
            logger.info("step %d: validation %s %.4g (%s)", step, metric, mean, _listed(measured.scores))
        self._write({"step": step, **record})
        self._scalars(scalars, step)

    def close(self) -> None:
        """Flush and close the file."""
        if self._stream is not None:
            self._stream.close()

    def _write(self, record: dict[str, Any]) -> None:
        if self._stream is not None:
            self._stream.write(json.dumps(record) + "\n")
            self._stream.flush()

    def _scalars(self, values: dict[str, float], step: int) -> None:
        if process_group.rank() == 0 and self._monitor is not None and self._monitor.enabled:
            self._monitor.write_events([(name, value, step) for name, value in values.items()])
        self._trackers.log(values, step)


def _listed(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{pair} {figure:.3f}" for pair, figure in figures.items())


def _until(path: Path, done: int) -> Iterator[str]:
    """Lines of a metrics file about the first `done` steps; a line that a killed process left half-written ends them."""
    if done == 0 or not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            return
        if record["step"] <= done:
            yield line.rstrip("\n") + "\n"

"""The training loop: one global batch per step, cut over ranks and micro-batches, then one optimizer step."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lander_ds.common import console
from lander_ds.common.errors import LanderError
from lander_ds.data.batching.micro_batches import packed, preferences_in, row_lengths
from lander_ds.data.batching.plan import BatchPlan, GlobalBatch, Replay
from lander_ds.data.prefixes import Prefixes
from lander_ds.data.prepared import PreparedData, PreparedSplit
from lander_ds.data.sources.corpus import TEXT
from lander_ds.distributed import accelerator, collectives, process_group
from lander_ds.distributed.watchdog import Watchdog
from lander_ds.models.parameter_groups import active_groups
from lander_ds.models.routed_ffn import NO_PAIR
from lander_ds.models.translation_model import BatchTotals, GateStatistics
from lander_ds.training.metrics_logger import MetricsLogger
from lander_ds.training.optimizer import learning_rate
from lander_ds.training.preemption import StopRequest
from lander_ds.training.progress import LOSS, Progress
from lander_ds.training.schedule import lr_factor, noise_alpha
from lander_ds.training.session import Session
from lander_ds.training.validation import Preferences, Validation, finite, validation_loss

logger = logging.getLogger(__name__)


class TrainingDiverged(LanderError):
    """Losses or gradients are not finite."""


@dataclass(frozen=True)
class Outcome:
    """How training ended."""

    steps: int
    """Steps done, those of an earlier start included."""
    stopped_early: bool
    """Whether patience ran out."""
    preempted: bool
    """Whether a signal asked to stop."""
    skipped: int
    """Steps whose loss or gradients were not finite."""


Save = Callable[[Progress, Validation | None], None]
"""Writes a checkpoint (collective): progress, and what was measured after this very step, if anything was."""


class Trainer:
    """Steps over the global batch plan."""

    def __init__(
        self,
        session: Session,
        data: PreparedData,
        metrics: MetricsLogger,
        save: Save,
        progress: Progress | None = None,
        watchdog: Watchdog | None = None,
        prefixes: Prefixes | None = None,
        score: Callable[[], Mapping[str, float]] | None = None,
        replay: PreparedData | None = None,
    ) -> None:
        """Prepare.

        Args:
            session: model and engine.
            data: prepared corpora.
            metrics: where figures go.
            save: writes a checkpoint.
            progress: of the checkpoint that training goes on from; default: none.
            watchdog: told of every step.
            prefixes: hidden states of the training examples below what is trained; default: they are computed.
            score: translates validation sentences with the model as it is (collective) and returns their scores by pair, in
                the metric of `train.keep_best`, by which validations are then compared; default: by their losses.
            replay: texts without a pair that are trained on as well; default: none.
        """
        recipe = session.recipe
        self.session, self.metrics, self.save = session, metrics, save
        self.progress, self.watchdog, self.prefixes = progress or Progress(), watchdog, prefixes
        self.score = score
        self.progress.judge_by(recipe.train.translated_metric or LOSS)
        self.train = recipe.train
        self.pairs = recipe.data.pairs
        train = data.split("train")
        self.splits: dict[int, PreparedSplit] = {i: train[pair] for i, pair in enumerate(self.pairs)}
        """Training data by pair id."""
        self.preferred = recipe.train.objective == "cpo"
        """Whether worse translations are trained on too."""
        valid = data.split("valid")
        self.valid = {i: valid[pair] for i, pair in enumerate(self.pairs) if len(valid.get(pair, ()))}
        """Validation data by pair id, of the pairs that have any."""
        self.plan = BatchPlan(
            [row_lengths(split, self.preferred) for split in self.splits.values()],
            [split.target_lengths for split in self.splits.values()],
            batch_tokens=recipe.train.batch_tokens,
            temperature=recipe.train.temperature,
            seed=recipe.seed,
            replay=None if replay is None else self._replay(replay),
        )

    def _replay(self, replay: PreparedData) -> Replay:
        """Add the texts to what is trained on; the batch plan has to know of them."""
        texts = self.splits[NO_PAIR] = replay.split("train")[TEXT]
        return Replay(texts.lengths, texts.target_lengths, self.session.recipe.data.replay.share)

    def run(self) -> Outcome:
        """Train to the end, until patience runs out, or until a signal asks to stop (collective)."""
        progress, train = self.progress, self.train
        started, first = time.monotonic(), progress.done
        stopped, preempted = self._out_of_patience(), False
        with StopRequest() as stop, console.progress("train", train.steps, first) as bar:
            while progress.done < train.steps and not stopped and not preempted:
                self._beat(f"step {progress.done + 1}")
                record, preempted = self._step(progress.done, stop.received)
                progress.done += 1
                self._count(record)
                self._average()
                progress.gated(record["gates"])
                spent = time.monotonic() - started
                left = train.steps - progress.done
                self.metrics.step({**record, "eta_seconds": spent / (progress.done - first) * left})
                bar.advance(note=_note(record))
                measured = None
                if self.valid and self._due(train.valid_every, progress.done):
                    self._beat(f"validation after step {progress.done}")
                    measured = self._validate()
                    stopped = self._out_of_patience()
                last = stopped or preempted or progress.done == train.steps
                if last or self._due(train.save_every, progress.done):
                    self._beat(f"saving step {progress.done}")
                    self.save(progress, measured)
        if stopped:
            logger.info(
                "no better validation %s %d times in a row: stopped at step %d",
                progress.criterion,
                progress.without_gain,
                progress.done,
            )
        return Outcome(progress.done, stopped, preempted, progress.skipped)

    def _validate(self) -> Validation:
        """Measure, record and compare (collective)."""
        measured = validation_loss(self.session, self.valid)
        if self.score is not None:
            measured = replace(measured, scores=self.score())
        self.metrics.validation(self.progress.done, measured, self.train.translated_metric)
        self.progress.validated(measured.mean_loss if measured.mean_score is None else measured.mean_score)
        return measured

    def _out_of_patience(self) -> bool:
        return bool(self.train.patience) and self.progress.without_gain >= self.train.patience

    def _beat(self, doing: str) -> None:
        if self.watchdog is not None:
            self.watchdog.beat(doing)

    def _due(self, every: int, done: int) -> bool:
        return every > 0 and (done % every == 0 or done == self.train.steps)

    def _step(self, step: int, stop: bool) -> tuple[dict[str, Any], bool]:
        """One optimizer step; returns its record for metrics.jsonl, and whether any rank was asked to stop."""
        begun, processor = time.monotonic(), time.process_time()
        session, batch = self.session, self.plan.batch(step)
        rates = self._set_groups(step, batch)
        alpha = (
            noise_alpha(step, self.train.steps, session.recipe.routing.alpha_max) if session.routed else 0.0
        )
        dims, gates = session.dims, GateStatistics()
        # Only LoRA's dropout draws random numbers; so they follow from the step too.
        torch.manual_seed(hash((session.recipe.seed, step, process_group.rank())))
        micro = packed(
            batch,
            self.splits,
            dims.data_parallel_rank,
            dims.data_parallel_ranks,
            session.micro_batches,
            accelerator.device(),
            self.prefixes,
            self.preferred,
        )
        preferences = preferences_in(batch, self.splits) if self.preferred else 0
        totals = BatchTotals(batch.target_tokens, len(batch.indices), preferences)
        figures = session.engine.train_step(list(micro), totals, alpha, gates)
        # One reduction for everything, and the first time in a step that the host waits for the device.
        own = figures.budget.new_tensor([float(stop), time.process_time() - processor])
        mine = torch.cat([figures.per_pair.flatten(), figures.budget.view(1), own])
        reduced = collectives.sum_over_ranks(mine).cpu()
        sums = reduced[:-3].view(figures.per_pair.shape)
        budget, asked, processor_seconds = reduced[-3:].tolist()
        # The last of both are of texts without a pair.
        losses, tokens = sums[:2].tolist()
        seconds = time.monotonic() - begun
        present = [i for i in range(len(self.pairs)) if tokens[i] > 0]
        replayed = {"replay_loss": finite(losses[-1] / tokens[-1])} if tokens[-1] > 0 else {}
        compared = Preferences.of(sums[2:]) if self.preferred else None
        grad_norm = session.engine.grad_norm
        record = {
            "step": step + 1,
            "loss": finite(sum(losses) / sum(tokens)),
            "loss_per_pair": {self.pairs[i]: finite(losses[i] / tokens[i]) for i in present},
            **replayed,
            **({} if compared is None else {"preference": asdict(compared)}),
            "budget_loss": finite(budget),
            "tokens": int(batch.lengths.sum()),
            "target_tokens": batch.target_tokens,
            "examples": len(batch.indices),
            "lr": rates,
            "grad_norm": finite(grad_norm),
            "skipped": not math.isfinite(grad_norm),
            "gates": self._gate_means(gates),
            "alpha": alpha,
            "tokens_per_second": float(batch.lengths.sum()) / seconds,
            "seconds": seconds,
            "processor_seconds": processor_seconds,
        }
        return record, asked > 0

    def _set_groups(self, step: int, batch: GlobalBatch) -> dict[str, float]:
        """Learning rates of this step; only groups that a pair of the batch owns are active."""
        session = self.session
        present = {self.pairs[i] for i in set(batch.pair_ids.tolist()) - {NO_PAIR}}
        active = active_groups(session.group_sizes, present)
        factor = lr_factor(step, self.train)
        rates = {name: learning_rate(name, self.train) * factor for name in session.group_sizes}
        for group in session.engine.param_groups:
            group["lr"], group["active"] = rates[group["name"]], group["name"] in active
        return rates

    def _gate_means(self, gates: GateStatistics) -> dict[str, dict[str, float]]:
        """Mean gate value c per routed layer and pair over the global batch (collective)."""
        if not self.session.model.gated:
            return {}
        layers = self.session.model.routed_layers
        shape = (len(layers), 2, len(self.pairs))
        here = torch.zeros(shape, dtype=torch.float64, device=accelerator.device())
        for i, layer in enumerate(layers):
            if layer in gates.sums:
                here[i] = gates.sums[layer]
        sums = collectives.sum_over_ranks(here).cpu()
        return {
            str(layer): {
                pair: float(sums[i, 0, m] / sums[i, 1, m])
                for m, pair in enumerate(self.pairs)
                if sums[i, 1, m] > 0
            }
            for i, layer in enumerate(layers)
        }

    def _average(self) -> None:
        """Take the weights after this step into the mean over the last steps (collective)."""
        progress, train = self.progress, self.train
        if progress.done <= train.steps - train.average.last:
            progress.averaged = 0
            return
        progress.averaged += 1
        self.session.engine.average(1.0 / progress.averaged)

    def _count(self, record: dict[str, Any]) -> None:
        """Count skipped steps.

        Raises:
            TrainingDiverged: there were too many in a row.
        """
        progress = self.progress
        if not record["skipped"]:
            progress.skipped_in_a_row = 0
            return
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        losses = dict(record["loss_per_pair"])
        if "replay_loss" in record:
            losses["data.replay"] = record["replay_loss"]
        bad = [pair for pair, loss in losses.items() if loss is None]
        what = f"the loss of {', '.join(bad)}" if bad else f"the gradient of a batch of {', '.join(losses)}"
        if process_group.rank() == 0:
            logger.warning("step %d skipped: %s is not finite", record["step"], what)
        if progress.skipped_in_a_row > self.train.max_skipped:
            raise TrainingDiverged(
                f"{what} is not finite at step {record['step']}, after {self.train.max_skipped} skipped steps: lower "
                "train.lr, set train.clip, or check the corpora of these pairs; earlier checkpoints are whole"
            )


def _note(record: dict[str, Any]) -> str:
    loss = "skipped" if record["skipped"] else f"loss {record['loss']:.3f}"
    return f"{loss}, {record['tokens_per_second']:.0f} tokens/s"

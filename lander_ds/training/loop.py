"""The training loop: one global batch per step, cut over ranks and micro-batches, then one optimizer step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lander_ds import console
from lander_ds.data.plan import BatchPlan, GlobalBatch
from lander_ds.data.prepared import PreparedData, PreparedSplit
from lander_ds.errors import LanderError
from lander_ds.parallel import comm
from lander_ds.training.batches import packed
from lander_ds.training.groups import active_groups
from lander_ds.training.journal import Journal
from lander_ds.training.model import Normaliser
from lander_ds.training.optimizer import learning_rate
from lander_ds.training.schedule import lr_factor, noise_alpha
from lander_ds.training.session import Session
from lander_ds.training.validation import validation_loss

logger = logging.getLogger(__name__)


class TrainingDiverged(LanderError):
    """The loss is no number any more."""


@dataclass(frozen=True)
class Outcome:
    """How training ended."""

    steps: int
    """Steps done."""
    stopped_early: bool
    """Whether patience ran out."""


class Loop:
    """Steps over the global batch plan."""

    def __init__(
        self, session: Session, data: PreparedData, journal: Journal, save: Callable[[int], None]
    ) -> None:
        """Prepare.

        Args:
            session: model and engine.
            data: prepared corpora.
            journal: where figures go.
            save: writes a checkpoint after the given number of steps (collective).
        """
        recipe = session.recipe
        self.session, self.journal, self.save = session, journal, save
        self.train = recipe.train
        self.pairs = recipe.data.pairs
        train = data.split("train")
        self.splits: list[PreparedSplit] = [train[pair] for pair in self.pairs]
        valid = data.split("valid")
        self.valid = {i: valid[pair] for i, pair in enumerate(self.pairs) if len(valid.get(pair, ()))}
        """Validation data by pair id, of the pairs that have any."""
        self.plan = BatchPlan(
            [split.lengths for split in self.splits],
            [split.target_lengths for split in self.splits],
            batch_tokens=recipe.train.batch_tokens,
            temperature=recipe.train.temperature,
            seed=recipe.seed,
        )

    def run(self) -> Outcome:
        """Train to the end or until patience runs out (collective)."""
        best, without_gain, stopped = float("inf"), 0, False
        done = 0
        started = time.monotonic()
        self.session.engine.train()
        with console.progress("train", self.train.steps) as bar:
            while done < self.train.steps and not stopped:
                record = self._step(done, started)
                done += 1
                self.journal.step(record)
                bar.advance(note=f"loss {record['loss']:.3f}, {record['tokens_per_second']:.0f} tokens/s")
                if self.valid and self._due(self.train.valid_every, done):
                    mean = self.journal.validation(done, validation_loss(self.session, self.valid))
                    without_gain = 0 if mean < best else without_gain + 1
                    best = min(best, mean)
                    stopped = bool(self.train.patience) and without_gain >= self.train.patience
                if self._due(self.train.save_every, done) or stopped or done == self.train.steps:
                    self.save(done)
        if stopped:
            logger.info("no better validation loss %d times in a row: stopped at step %d", without_gain, done)
        return Outcome(done, stopped)

    def _due(self, every: int, done: int) -> bool:
        return every > 0 and (done % every == 0 or done == self.train.steps)

    def _step(self, step: int, started: float) -> dict[str, Any]:
        """One optimizer step; returns its record for metrics.jsonl."""
        begun = time.monotonic()
        session, batch = self.session, self.plan.batch(step)
        rates = self._set_groups(step, batch)
        self._set_routing(step)
        per_pair = torch.zeros(2, len(self.pairs), dtype=torch.float64)
        budget = torch.zeros((), dtype=torch.float64)
        norm = Normaliser(batch.target_tokens, len(batch.indices))
        ranks = comm.world_size()
        for micro in packed(batch, self.splits, comm.rank(), ranks, session.micro_batches, comm.device()):
            loss, sums, penalty = session.engine(micro, norm)
            # DeepSpeed averages gradients over data-parallel ranks; the loss is normalised over all of them already.
            session.engine.backward(loss * ranks, scale_wrt_gas=False)
            session.engine.step()
            per_pair += sums.cpu()
            budget += penalty.cpu()
        comm.sum_over_ranks(per_pair)
        comm.sum_over_ranks(budget)
        self._refuse_divergence(step, per_pair)
        seconds = time.monotonic() - begun
        present = [i for i in range(len(self.pairs)) if per_pair[1, i] > 0]
        elapsed = time.monotonic() - started
        return {
            "step": step + 1,
            "loss": float(per_pair[0].sum() / per_pair[1].sum()),
            "loss_per_pair": {self.pairs[i]: float(per_pair[0, i] / per_pair[1, i]) for i in present},
            "budget_loss": float(budget),
            "tokens": int(batch.lengths.sum()),
            "target_tokens": batch.target_tokens,
            "examples": len(batch.indices),
            "lr": rates,
            "grad_norm": _number(session.engine.get_global_grad_norm()),
            "gates": self._gate_means(),
            "alpha": session.state.alpha if session.state is not None else 0.0,
            "tokens_per_second": float(batch.lengths.sum()) / seconds,
            "seconds": seconds,
            "eta_seconds": elapsed / (step + 1) * (self.train.steps - step - 1),
        }

    def _set_groups(self, step: int, batch: GlobalBatch) -> dict[str, float]:
        """Learning rates of this step; only groups that a pair of the batch owns are active."""
        optimizer = self.session.engine.optimizer.optimizer
        present = {self.pairs[i] for i in set(batch.pair_ids.tolist())}
        active = active_groups((group["name"] for group in optimizer.param_groups), present)
        factor = lr_factor(step, self.train)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(group["name"], self.train) * factor
            group["active"] = group["name"] in active
        return {group["name"]: group["lr"] for group in optimizer.param_groups}

    def _set_routing(self, step: int) -> None:
        state = self.session.state
        if state is not None:
            state.alpha = noise_alpha(step, self.train.steps, self.session.recipe.routing.alpha_max)
            state.statistics = {}

    def _gate_means(self) -> dict[str, dict[str, float]]:
        """Mean gate value c per routed layer and pair over the global batch (collective)."""
        state = self.session.state
        if state is None or not state.statistics:
            return {}
        layers = sorted(state.statistics)
        sums = torch.stack([state.statistics[layer] for layer in layers]).cpu()
        state.statistics = None
        comm.sum_over_ranks(sums)
        return {
            str(layer): {
                pair: float(sums[i, 0, m] / sums[i, 1, m])
                for m, pair in enumerate(self.pairs)
                if sums[i, 1, m] > 0
            }
            for i, layer in enumerate(layers)
        }

    def _refuse_divergence(self, step: int, per_pair: torch.Tensor) -> None:
        bad = [pair for pair, value in zip(self.pairs, per_pair[0], strict=True) if not torch.isfinite(value)]
        if bad:
            raise TrainingDiverged(
                f"the loss of {', '.join(bad)} is not finite at step {step + 1}: lower train.lr, set train.clip, or "
                "check the corpora of these pairs; earlier checkpoints are whole"
            )


def _number(value: Any) -> float:
    return float(value) if value is not None else 0.0

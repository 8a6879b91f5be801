"""What the ranks of benchmarks/plan.py run: two steps on made-up data, and a note of what was in memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lander_ds.checkpoint.identity import identity_of
from lander_ds.common.files import write_json
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.data.batching.micro_batches import packed
from lander_ds.data.batching.plan import BatchPlan
from lander_ds.data.prepared import PreparedData, PreparedSplit
from lander_ds.distributed import accelerator, collectives, process_group
from lander_ds.distributed.start import Start
from lander_ds.models.translation_model import BatchTotals
from lander_ds.training.metrics_logger import MetricsLogger
from lander_ds.training.saver import Saver
from lander_ds.training.session import Session, open_session
from lander_ds.training.trainer import Trainer

MEASURED = "measured.json"
EXAMPLE_TOKENS, TARGET_SHARE = 16, 0.5
EXAMPLES_PER_PAIR = 64


@dataclass(frozen=True)
class Job:
    """One training to be measured; its selection lies in the run directory already."""

    name: str
    recipe: Recipe

    def __call__(self, root: Path, ranks: int) -> None:
        """Train, and leave what was measured in the run directory (collective)."""
        _measure(self.recipe)


class _Split(PreparedSplit):
    """Examples of equal length, of tokens that every model has."""

    def __init__(self, pair: str) -> None:
        self.pair, self.split = pair, "train"
        self.lengths = np.full(EXAMPLES_PER_PAIR, EXAMPLE_TOKENS, dtype=np.int32)
        self.target_lengths = self.lengths - self._prompt

    _prompt = round(EXAMPLE_TOKENS * (1 - TARGET_SHARE))

    def tokens(self, index: int) -> tuple[np.ndarray, int]:
        """Token ids [length] int32 and the length of the prompt."""
        return np.arange(10, 10 + EXAMPLE_TOKENS, dtype=np.int32), self._prompt


class _Data(PreparedData):
    """Training data of every pair, and no other split."""

    def __init__(self, pairs: tuple[str, ...]) -> None:
        self.pairs = pairs

    def split(self, split: str) -> dict[str, PreparedSplit]:
        """The training split; other splits are empty."""
        return {pair: _Split(pair) for pair in self.pairs} if split == "train" else {}


def _measure(recipe: Recipe) -> None:
    run, data = RunDirectory(recipe.run_dir), _Data(recipe.data.pairs)
    session = open_session(Start(recipe, run))
    saver = Saver(session, run, identity_of(recipe, {"data": "made up", "base": session.fingerprint}))
    metrics = MetricsLogger(run.metrics, None, log_every=recipe.train.steps + 1)
    Trainer(session, data, metrics, saver).run()
    metrics.close()
    saver.finish()
    bytes_of_ranks = collectives.gather_objects(asdict(session.engine.rank_bytes()))
    # Last, because no backward pass follows.
    activations = _activations(session, data) if process_group.world_size() == 1 else None
    if process_group.rank() == 0:
        files = (run.checkpoints / f"step-{recipe.train.steps}").glob("*.safetensors")
        size = sum(path.stat().st_size for path in files)
        write_json(
            run.path / MEASURED, {"ranks": bytes_of_ranks, "checkpoint": size, "activations": activations}
        )
    session.engine.destroy()


def _activations(session: Session, data: PreparedData) -> int:
    """Bytes that the forward pass of one micro-batch saves for the backward pass, every storage once."""
    recipe = session.recipe
    splits = list(data.split("train").values())
    plan = BatchPlan(
        [split.lengths for split in splits],
        [split.target_lengths for split in splits],
        batch_tokens=recipe.train.batch_tokens,
        temperature=1.0,
        seed=recipe.seed,
    )
    batch = next(packed(plan.batch(0), splits, 0, 1, session.micro_batches, accelerator.device()))
    return saved_bytes(session.model, batch)


def saved_bytes(model: nn.Module, batch: Any) -> int:
    """Bytes of the storages that autograd saves in one forward pass, parameters left out."""
    # Kept, so that no other storage gets the same address.
    parameters = [parameter.untyped_storage() for parameter in model.parameters()]
    whole = {storage._cdata for storage in parameters}
    seen: dict[int, torch.UntypedStorage] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage._cdata not in whole:
            seen[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        model(batch, BatchTotals(1, 1))
    return sum(storage.nbytes() for storage in seen.values())

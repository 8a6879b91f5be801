#!/usr/bin/env python3
"""Does detection mean anything? Four questions about the awareness of neurons, asked of the untouched base.

    experiments/detection.py --recipe experiments/recipes/detection.yaml --out experiments/results/detection

1. Knock-out: switch off the top, random or bottom neurons of a direction and measure the loss of every direction.
2. Stability: how alike is the awareness of disjoint halves of the data, and of few sentences and many?
3. Truth: does awareness, a first-order estimate, order neurons as really switching them off does?
4. Overlap: how many of the top neurons do two directions share, against chance?

Runs in one process. What is finished is kept in OUT/detection.json, so that it can be interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from lander_ds.common.console import setup_logging
from lander_ds.common.files import read_json, write_json
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import Recipe
from lander_ds.data.batching.micro_batches import whole_split
from lander_ds.data.batching.plan import GlobalBatch
from lander_ds.data.prepared import PreparedData, PreparedSplit
from lander_ds.distributed import process_group
from lander_ds.distributed.start import Start
from lander_ds.inference.open import open_for_inference
from lander_ds.method.awareness import STATISTICS, Awareness, AwarenessMetadata
from lander_ds.models.catalogue import family_of
from lander_ds.preflight.recipe import load_checked
from lander_ds.stages import prepare
from lander_ds.training.detection import collect

logger = logging.getLogger("lander_ds.detection_study")

SHARE = 0.01
"""Of all neurons: what is switched off together."""
EDGES = (0, 8, 32, 128, 256, 384, 512)
"""Detection sentences per pair are collected in these pieces, which add up to every size that is compared."""
SIZES = (8, 32, 128, 512)
SAMPLED = 120
"""Neurons that are switched off one by one."""
SENTENCES = 24
"""Validation sentences per pair that losses are measured on."""
SEED = 1

Losses = dict[str, float]


class Study:
    """The base model, its data, and what has been found out so far."""

    def __init__(self, recipe: Recipe, out: Path) -> None:
        self.start = Start(recipe, RunDirectory(recipe.run_dir))
        prepare.run(recipe, self.start.run)
        self.pairs = recipe.data.pairs
        self.data = PreparedData.load(self.start.run, recipe)
        self.file = out / "detection.json"
        self.results: dict[str, Any] = read_json(self.file, "delete it") if self.file.exists() else {}

    def keep(self, **figures: Any) -> None:
        """Write what was found out."""
        self.results |= {"date": time.strftime("%Y-%m-%d"), "pairs": list(self.pairs), **figures}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, self.results)

    def awareness(self, begin: int, end: int) -> Awareness:
        """Of the detection sentences `begin` to `end` of every pair; kept in the run directory."""
        path = self.start.run.path / f"awareness-{begin}-{end}.safetensors"
        if not path.exists():
            splits = [self.data.split("detect")[pair] for pair in self.pairs]
            batch = _piece(whole_split(dict(enumerate(splits)), end), begin)
            metadata = AwarenessMetadata(
                self.start.base_fingerprint, self.data.content_hash("detect"), {}, {}
            )
            collect(self.start, splits, batch).finish(self.pairs, metadata).save(path)
        return Awareness.load(path)

    def whole(self, pieces: Sequence[tuple[int, int]]) -> Awareness:
        """The awareness of several pieces together: every statistic is a sum."""
        parts = [self.awareness(*piece) for piece in pieces]
        sums = {name: sum(getattr(part, name) for part in parts) for name in ("tokens", *STATISTICS)}
        return replace(parts[0], **sums)


def _piece(batch: GlobalBatch, begin: int) -> GlobalBatch:
    """The examples of a batch from number `begin` of every pair on."""
    kept = batch.indices >= begin
    return replace(
        batch,
        pair_ids=batch.pair_ids[kept],
        indices=batch.indices[kept],
        sample_ids=batch.sample_ids[kept],
        lengths=batch.lengths[kept],
    )


class Base:
    """The untouched base, with a way to switch neurons off."""

    def __init__(self, study: Study) -> None:
        recipe = study.start.recipe
        # One neuron of thousands changes less than bfloat16 can hold.
        exact = replace(recipe, model=replace(recipe.model, dtype="float32"))
        self.model: PreTrainedModel = open_for_inference(replace(study.start, recipe=exact), "base").model
        self.down = family_of(self.model.config.model_type).down_projections(self.model)
        self.valid = {pair: split for pair, split in study.data.split("valid").items() if pair in study.pairs}

    @contextmanager
    def without(self, neurons: torch.Tensor) -> Iterator[None]:
        """Within this context, `neurons` ([n, 2]: layer, number) contribute nothing."""
        saved: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]] = []
        for layer in sorted(set(neurons[:, 0].tolist())):
            columns = neurons[neurons[:, 0] == layer, 1]
            weight: nn.Parameter = self.down[layer].weight
            saved.append((weight, columns, weight.data[:, columns].clone()))
            weight.data[:, columns] = 0
        try:
            yield
        finally:
            for weight, columns, values in saved:
                weight.data[:, columns] = values

    @torch.no_grad()
    def losses(self, sentences: int = SENTENCES) -> Losses:
        """Pair -> mean loss per target token, in nats."""
        return {pair: self._loss(split, sentences) for pair, split in self.valid.items()}

    def _loss(self, split: PreparedSplit, sentences: int) -> float:
        total, count = 0.0, 0
        # One after the other: neither padding nor the logits of prompts are computed.
        for index in range(min(sentences, len(split))):
            tokens, prompt = split.tokens(index)
            ids = torch.from_numpy(tokens.astype("int64"))
            targets = ids[prompt:]
            output = self.model(input_ids=ids[None], use_cache=False, logits_to_keep=len(targets) + 1)
            total += float(functional.cross_entropy(output.logits[0, :-1], targets, reduction="sum"))
            count += len(targets)
        return total / count


def knock_out(study: Study, base: Base, awareness: Awareness) -> None:
    """Loss of every direction without the neurons that some criterion picks for one of them."""
    phi = awareness.phi()
    count = round(SHARE * phi[0].numel())
    own = phi / phi.flatten(1).mean(1)[:, None, None]
    # How much more a direction depends on a neuron than the directions do on average.
    lead = own - own.mean(0, keepdim=True)
    random = torch.rand(phi.shape, generator=torch.Generator().manual_seed(SEED))
    scores = {"aware": phi, "specific": lead, "random": random, "least aware": -phi}
    known = study.results.get("knock_out", {})
    matrix: dict[str, dict[str, Losses]] = known.get("rise", {})
    untouched: Losses = known.get("loss") or base.losses()
    for name, score in scores.items():
        for m, pair in enumerate(study.pairs):
            if pair in matrix.get(name, {}):
                continue
            with base.without(_top(score[m], count)):
                after = base.losses()
            rises = {other: after[other] - untouched[other] for other in study.pairs}
            matrix.setdefault(name, {})[pair] = rises
            logger.info("without the neurons %s of %s: %s", name, pair, rises)
            study.keep(knock_out={"share": SHARE, "sentences": SENTENCES, "loss": untouched, "rise": matrix})


def _top(score: torch.Tensor, count: int) -> torch.Tensor:
    """[count, 2] layer and number of the neurons with the largest score, of [L, f]."""
    best = score.flatten().topk(count).indices
    return torch.stack([best // score.shape[1], best % score.shape[1]], dim=1)


def stability(study: Study) -> None:
    """Rank correlation and shared top neurons of awareness from different sentences."""
    pieces = list(itertools.pairwise(EDGES))
    half = [piece for piece in pieces if piece[1] <= EDGES[-1] // 2]
    other = [piece for piece in pieces if piece not in half]
    halves = _agreement(study, study.whole(half), study.whole(other))
    everything = study.whole(pieces)
    # Against the half that shares no sentence with it where that is possible.
    curve = [
        {
            "sentences": size,
            **_agreement(
                study,
                study.whole([piece for piece in pieces if piece[1] <= size]),
                study.whole(other) if size <= EDGES[-1] // 2 else everything,
            ),
        }
        for size in SIZES[:-1]
    ]
    study.keep(stability={"halves": halves, "curve": curve, "sentences": EDGES[-1]})


def _agreement(study: Study, a: Awareness, b: Awareness) -> dict[str, Losses]:
    """Per pair: Spearman's rank correlation over all neurons, and the share of the top neurons that both have."""
    count = round(SHARE * a.phi()[0].numel())
    correlation, shared = {}, {}
    for m, pair in enumerate(study.pairs):
        mine, its = a.phi()[m].flatten(), b.phi()[m].flatten()
        correlation[pair] = spearman(mine, its)
        shared[pair] = _shared(mine, its, count)
    return {"spearman": correlation, "top_shared": shared}


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation of two vectors without ties."""
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def _shared(a: torch.Tensor, b: torch.Tensor, count: int) -> float:
    top = [set(x.topk(count).indices.tolist()) for x in (a, b)]
    return len(top[0] & top[1]) / count


def truth(study: Study, base: Base, awareness: Awareness) -> None:
    """Awareness against the change of loss when a neuron is really switched off, for a sample of neurons."""
    done: list[dict[str, Any]] = study.results.get("truth", {}).get("neurons", [])
    phi = awareness.phi()
    generator = torch.Generator().manual_seed(SEED)
    # Equally many from every hundredth of the ranking: most neurons do next to nothing.
    order = phi.mean(0).flatten().argsort()
    step = len(order) // SAMPLED
    picked = [
        int(order[i * step + int(torch.randint(step, (1,), generator=generator))]) for i in range(SAMPLED)
    ]
    # In any order, so that the first ones are spread over the ranking too.
    picked = [picked[i] for i in torch.randperm(SAMPLED, generator=generator)]
    untouched = base.losses(SENTENCES // 3)
    for neuron in picked[len(done) :]:
        layer, number = divmod(neuron, phi.shape[2])
        with base.without(torch.tensor([[layer, number]])):
            after = base.losses(SENTENCES // 3)
        done.append(
            {
                "layer": layer,
                "neuron": number,
                "awareness": {pair: float(phi[m, layer, number]) for m, pair in enumerate(study.pairs)},
                "change": {pair: after[pair] - untouched[pair] for pair in study.pairs},
            }
        )
        if len(done) % 20 == 0 or len(done) == SAMPLED:
            study.keep(truth={"neurons": done, **_truth(study, done)})


def _truth(study: Study, neurons: Sequence[Mapping[str, Any]]) -> dict[str, Losses]:
    correlation = {}
    for pair in study.pairs:
        estimate = torch.tensor([one["awareness"][pair] for one in neurons])
        change = torch.tensor([abs(one["change"][pair]) for one in neurons])
        correlation[pair] = spearman(estimate, change)
    return {"spearman": correlation}


def overlap(study: Study, awareness: Awareness) -> None:
    """Share of the top neurons of a direction that are among the top of another; chance is `share`."""
    phi = awareness.phi()
    count = round(SHARE * phi[0].numel())
    table = {
        one: {
            other: _shared(phi[m].flatten(), phi[n].flatten(), count)
            for n, other in enumerate(study.pairs)
            if n != m
        }
        for m, one in enumerate(study.pairs)
    }
    study.keep(overlap={"share": SHARE, "shared": table})


def main() -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    setup_logging()
    recipe = load_checked(options.recipe, [], ("prepare", "detect"))
    process_group.start()
    study = Study(recipe, options.out)
    everything = study.whole(list(itertools.pairwise(EDGES)))
    stability(study)
    overlap(study, everything)
    base = Base(study)
    knock_out(study, base, everything)
    truth(study, base, everything)
    process_group.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())

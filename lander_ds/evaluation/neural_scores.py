"""Sentence scores of a neural metric: those that are known already from a cache, the others from a worker process.

    CACHE/neural-HASH/*.jsonl     a line per sentence: {"key": ..., "score": ...}

HASH stands for model, package and arithmetic, and a key for the texts of a sentence, so that systems, pairs and runs
share scores. A file is written for every batch of sentences and never changed: what an interrupted run has scored stays.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from lander_ds.common.console import progress
from lander_ds.common.errors import ArtefactError, ModelError
from lander_ds.common.files import json_hash, write_text
from lander_ds.evaluation.neural import NeuralMetric

logger = logging.getLogger(__name__)

BATCH = 1024
"""Sentences that the worker is given at a time; the library sorts them by length."""
WORKER = Path(__file__).with_name("comet_worker.py")
LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_",
    "TORCHELASTIC_",
    "SLURM_",
    "OMPI_",
    "PMI",
)
"""Beginnings of what launchers tell their ranks; PyTorch Lightning would wait for the others."""

Sample = dict[str, str]
"""What a metric reads of a sentence: `src`, `mt`, and perhaps `ref`."""
_Ask = Callable[[Sequence[Sample]], Sequence[float]]


class Segment(NamedTuple):
    """A sentence and one translation of it."""

    src: str
    mt: str
    ref: str


@dataclass(frozen=True)
class NeuralScores:
    """What a metric says."""

    signature: str
    """Of the metric."""
    of: Mapping[Segment, float]
    """Higher is better; most metrics stay between 0 and 1."""


def neural_scores(metric: NeuralMetric, segments: Iterable[Segment], cache: Path) -> NeuralScores:
    """The scores of segments.

    Args:
        metric: the metric.
        segments: in any number; equal ones are scored once.
        cache: directory under which scores are kept.

    Raises:
        ArtefactError: a file of the cache is damaged.
        ModelError: the worker failed, or gave no numbers.
    """
    with scorer(metric, cache) as score:
        return NeuralScores(metric.signature, score(segments))


@contextmanager
def scorer(
    metric: NeuralMetric, cache: Path
) -> Iterator[Callable[[Iterable[Segment]], Mapping[Segment, float]]]:
    """A function from segments to their scores, for as many calls as there are, with one worker process.

    Args, Raises: as `neural_scores`.
    """
    directory = cache / f"neural-{metric.identity[:20]}"
    known = _read(directory)
    with ExitStack() as stack:
        worker: list[_Ask] = []

        def score(segments: Iterable[Segment]) -> Mapping[Segment, float]:
            samples = {segment: metric.sample(*segment) for segment in segments}
            keys = {segment: json_hash(sample) for segment, sample in samples.items()}
            wanted = {
                keys[segment]: sample for segment, sample in samples.items() if keys[segment] not in known
            }
            total = len(set(keys.values()))
            logger.info("%s: %d of %d sentences are known", metric.key, total - len(wanted), total)
            if wanted:
                if not worker:
                    worker.append(stack.enter_context(_worker(metric, directory)))
                known.update(_score(metric, worker[0], wanted, directory))
            return {segment: known[key] for segment, key in keys.items()}

        yield score


def _read(directory: Path) -> dict[str, float]:
    known: dict[str, float] = {}
    for file in sorted(directory.glob("*.jsonl")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                known[str(row["key"])] = float(row["score"])
            except (ValueError, KeyError, TypeError):
                raise ArtefactError(
                    f"{file}, line {number} is no sentence score: delete the file, and its sentences are scored again"
                ) from None
    return known


def _score(
    metric: NeuralMetric, ask: _Ask, wanted: Mapping[str, Sample], directory: Path
) -> dict[str, float]:
    """Scores by key, each batch kept as soon as it is there."""
    scored: dict[str, float] = {}
    keys = list(wanted)
    with progress(f"{metric.key} (sentences)", len(keys)) as bar:
        for start in range(0, len(keys), BATCH):
            batch = keys[start : start + BATCH]
            scores = dict(zip(batch, ask([wanted[key] for key in batch]), strict=True))
            lines = (json.dumps({"key": key, "score": score}) + "\n" for key, score in scores.items())
            write_text(directory / f"{json_hash(batch)[:20]}.jsonl", "".join(lines))
            scored |= scores
            bar.advance(len(batch))
    return scored


@contextmanager
def _worker(metric: NeuralMetric, directory: Path) -> Iterator[_Ask]:
    """A process that has the model loaded, as a function from samples to scores."""
    config = metric.config
    options = (str(metric.checkpoint), str(config.batch_size), config.device, config.dtype)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)
    }
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
        subprocess.Popen(
            [metric.python, "-I", str(WORKER), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=environment,
            text=True,
        ) as process,
    ):
        requests, replies = process.stdin, process.stdout
        assert requests is not None and replies is not None  # noqa: PT018

        def ask(samples: Sequence[Sample]) -> Sequence[float]:
            with suppress(BrokenPipeError):
                requests.write(json.dumps(samples) + "\n")
                requests.flush()
            if not (line := replies.readline()):
                raise ModelError(_failure(metric, process.wait(), said, directory))
            return _finite(metric, samples, json.loads(line))

        try:
            yield ask
        finally:
            with suppress(BrokenPipeError):
                requests.close()
            process.kill()


def _failure(metric: NeuralMetric, code: int, said: IO[str], directory: Path) -> str:
    """Why the worker has ended, with everything that it said in a file."""
    said.seek(0)
    text, log = said.read(), directory / "worker.log"
    write_text(log, text)
    reason = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
    return (
        f"{metric.key}: {metric.python} could not score with {metric.checkpoint} (code {code}; {reason}): "
        f"see {log}; where memory ran out, lower {metric.key}.batch_size"
    )


def _finite(metric: NeuralMetric, samples: Sequence[Sample], scores: Sequence[float]) -> Sequence[float]:
    for sample, score in zip(samples, scores, strict=True):
        if not math.isfinite(score):
            raise ModelError(
                f"{metric.key}: the score of {sample['mt']!r} is {score}: use dtype: float32, or correct "
                f"{metric.checkpoint}"
            )
    return scores

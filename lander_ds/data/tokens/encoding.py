"""Many rows to token ids, in this process or in several, always in the order of the corpus."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from types import TracebackType
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lander_ds.common.errors import DataError
from lander_ds.config.schema.data import PromptConfig
from lander_ds.data.sources.rows import Row
from lander_ds.data.tokens.prompt import shots_for
from lander_ds.data.tokens.prompt_format import prompt_format
from lander_ds.data.tokens.text_encoder import TextEncoder
from lander_ds.data.tokens.tokenizer import load_tokenizer

ROWS_PER_JOB = 512


@dataclass(frozen=True)
class Job:
    """Rows of one pair to encode together."""

    pair: str
    """Translation direction."""
    rows: tuple[Row, ...]
    """Sentence pairs."""
    prompt: PromptConfig
    """How they become prompts."""
    shots: tuple[tuple[str, str], ...]
    """One more few-shot example than a prompt shows, so that no prompt needs to show its own row."""


class Encoded(NamedTuple):
    """A row as token ids."""

    ids: list[int]
    """Of prompt, target and end of sequence."""
    prompt_length: int
    """How many of them are the prompt."""
    rejected: list[int] | None = None
    """Of the worse translation, of rows that have one, and end of sequence, without the prompt."""

    @property
    def longest(self) -> int:
        """Tokens of the prompt with the longer translation."""
        return max(len(self.ids), self.prompt_length + len(self.rejected or ()))


def encode_job(encoder: TextEncoder, job: Job) -> list[Encoded]:
    """Token ids and prompt length of every row of a job."""
    form = prompt_format(job.prompt, encoder.tokenizer)
    prompts = [
        form.prompt(
            job.pair, row.src, shots_for(job.shots, (row.src, row.tgt), job.prompt.shots), row.context
        )
        for row in job.rows
    ]
    better = encoder.examples(prompts, [form.target(row.tgt) for row in job.rows], form.end)
    if all(row.rejected is None for row in job.rows):
        return [Encoded(*one) for one in better]
    worse = encoder.examples(prompts, [form.target(row.rejected or "") for row in job.rows], form.end)
    return [
        Encoded(*one, None if row.rejected is None else ids[length:])
        for row, one, (ids, length) in zip(job.rows, better, worse, strict=True)
    ]


class Encoder:
    """Encodes rows; a context manager that owns its worker processes.

    Args:
        tokenizer: used when there is one worker.
        path: the tokenizer's directory, which further processes load themselves.
        trust_remote_code: as for `load_tokenizer`.
        workers: number of processes; 1 works in this one.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, path: str, trust_remote_code: bool, workers: int
    ) -> None:
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        if workers == 1:
            self._encoder = TextEncoder(tokenizer)
        else:
            # Not forked from here: this process has threads (tokenizers, torch), and a fork of those can hang. The server
            # has none, and imports once what every worker needs.
            context = get_context("forkserver")
            context.set_forkserver_preload([__name__])
            self._pool = ProcessPoolExecutor(
                workers, context, initializer=_start_worker, initargs=(path, trust_remote_code)
            )

    def __enter__(self) -> Encoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def encode(
        self, pair: str, rows: Iterable[Row], prompt: PromptConfig, shots: Sequence[tuple[str, str]]
    ) -> Iterator[tuple[Row, Encoded]]:
        """Every row with its token ids; rows are read ahead only as far as the workers need.

        Raises:
            DataError: a worker process died.
        """
        source = iter(rows)
        jobs = iter(lambda: Job(pair, tuple(islice(source, ROWS_PER_JOB)), prompt, tuple(shots)), None)
        if self._pool is None:
            for job in jobs:
                if not job.rows:
                    return
                yield from zip(job.rows, encode_job(self._encoder, job), strict=True)
            return
        waiting: deque[tuple[Job, Future[list[Encoded]]]] = deque()
        try:
            for job in jobs:
                if job.rows:
                    waiting.append((job, self._pool.submit(_work, job)))
                while waiting and (len(waiting) > 2 * self._workers or not job.rows):
                    done, future = waiting.popleft()
                    yield from zip(done.rows, future.result(), strict=True)
                if not job.rows:
                    return
        except BrokenProcessPool:
            raise DataError(
                "a tokenising process died (out of memory?): lower data.workers, or set it to 1 to see the "
                "reason"
            ) from None


_worker_encoder: TextEncoder | None = None


def _start_worker(path: str, trust_remote_code: bool) -> None:
    global _worker_encoder  # noqa: PLW0603, a process pool has no other place for state
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_encoder = TextEncoder(load_tokenizer(path, trust_remote_code))


def _work(job: Job) -> list[Encoded]:
    assert _worker_encoder is not None
    return encode_job(_worker_encoder, job)

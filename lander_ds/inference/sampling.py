"""Sampling that can be repeated: what is drawn for a sentence depends on the seed, its prompt and the number of the sample.

The token with the largest sum of its logit over the temperature and a Gumbel variate is a sample of the softmax
(Gumbel-max trick, R). So drawing is greedy search over noisy logits, and every row has a stream of noise of its own,
which neither the batch nor the rank nor an interruption touches. Shapes: N rows, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lander_ds.common.files import json_hash
from lander_ds.config.schema.results import SamplingConfig


class Sampler(LogitsProcessor):
    """Makes greedy search draw, and keeps the probability of what was drawn.

    Args:
        config: with a temperature above 0.
        prompts: of the sentences that are decoded together.
        samples: rows per prompt, one behind the other.
        device: of the logits.
    """

    def __init__(
        self, config: SamplingConfig, prompts: Sequence[Sequence[int]], samples: int, device: torch.device
    ) -> None:
        self._warpers = LogitsProcessorList([TemperatureLogitsWarper(config.temperature)])
        if config.top_k:
            self._warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            self._warpers.append(TopPLogitsWarper(config.top_p))
        self._streams = [
            torch.Generator(device).manual_seed(int(json_hash([config.seed, list(prompt), sample])[:16], 16))
            for prompt in prompts
            for sample in range(samples)
        ]
        self._log_probabilities: list[list[float]] = [[] for _ in self._streams]
        self._running = list(range(len(self._streams)))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Noisy logits [N, V] of the rows that still run, float64; `scores`: the model's."""
        # A very low temperature would overflow float32.
        scores = scores.double()
        noise = torch.empty_like(scores)
        for row, index in zip(noise, self._running, strict=True):
            row.uniform_(generator=self._streams[index])
        # The logarithm of 0 is no harm: such a token is not drawn.
        noisy: torch.Tensor = self._warpers(input_ids, scores) - noise.log_().neg_().log_()
        drawn = scores.gather(1, noisy.argmax(1, keepdim=True)).squeeze(1)
        for index, value in zip(self._running, (drawn - scores.logsumexp(1)).tolist(), strict=True):
            self._log_probabilities[index].append(value)
        return noisy

    def keep(self, positions: Sequence[int]) -> None:
        """Go on with these of the running rows alone."""
        self._running = [self._running[position] for position in positions]

    def log_probability(self, row: int, tokens: int) -> float:
        """Of the first `tokens` drawn in a row, under the model itself: temperature 1, nothing cut off."""
        return sum(self._log_probabilities[row][:tokens])

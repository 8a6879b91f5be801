"""Scores of the validation sentences, translated greedily by the model in training: what `train.keep_best: chrf`, or that
of a neural metric, goes by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from sacrebleu.metrics import CHRF
from transformers import PreTrainedModel

from lander_ds.common.errors import LanderError
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.results import SamplingConfig
from lander_ds.data.prepared import PreparedData
from lander_ds.data.tokens.tokenizer import load_tokenizer
from lander_ds.distributed import collectives, process_group
from lander_ds.evaluation.neural import NeuralMetric
from lander_ds.evaluation.neural_scores import Segment, neural_scores
from lander_ds.inference.decoding import Decoder
from lander_ds.inference.open import InferenceModel, generation_config
from lander_ds.inference.requests import requests_for
from lander_ds.inference.translate import Request, batches, longest_first

Scorer = Callable[[Mapping[str, Sequence[Segment]]], dict[str, float]]
"""Pair -> translated sentences, to pair -> score."""


def scorer(recipe: Recipe, cache: Path) -> Scorer:
    """That of `train.keep_best`.

    Args:
        recipe: of the training; it names a metric of translations.
        cache: where sentence scores are kept.

    Raises:
        ConfigError, ModelError: see `NeuralMetric.resolve`.
    """
    name = recipe.train.keep_best
    if name == "chrf":
        return _chrf
    metric = NeuralMetric.resolve(name, recipe.score.neural[name])

    def neural(translated: Mapping[str, Sequence[Segment]]) -> dict[str, float]:
        segments = [segment for of_pair in translated.values() for segment in of_pair]
        scores = neural_scores(metric, segments, cache).of
        return {pair: fmean(scores[segment] for segment in of_pair) for pair, of_pair in translated.items()}

    return neural


def _chrf(translated: Mapping[str, Sequence[Segment]]) -> dict[str, float]:
    """From 0 to 100."""
    return {
        pair: float(CHRF().corpus_score([one.mt for one in of_pair], [[one.ref for one in of_pair]]).score)
        for pair, of_pair in translated.items()
    }


class ValidationTranslations:
    """Translates the same sentences at every call; the ranks share them, and rank 0 scores."""

    def __init__(
        self,
        recipe: Recipe,
        model: PreTrainedModel,
        data: PreparedData,
        score: Scorer,
        beat: Callable[[str], None],
    ) -> None:
        """Prepare.

        Args:
            recipe: of the training.
            model: the whole model, whose layers are those that are trained.
            data: prepared corpora; pairs without validation sentences are left out.
            score: what they are scored by.
            beat: told of every batch.

        Raises:
            ConfigError: a prompt and its translation may need more positions than the model has.
        """
        self._recipe, self._model, self._score, self._beat = recipe, model, score, beat
        tokenizer = load_tokenizer(recipe.model.path, recipe.model.trust_remote_code)
        valid = data.split("valid")
        pairs = tuple(pair for pair in recipe.data.pairs if len(valid.get(pair, ())))
        wanted = replace(recipe.translate, split="valid", limit=recipe.train.valid_examples)
        only = replace(recipe, translate=wanted, data=replace(recipe.data, pairs=pairs))
        self._requests = requests_for("trained", only, data, tokenizer)
        # Under ZeRO-3 every rank takes part in every call of the model.
        self._synced = recipe.topology == "zero3" and process_group.world_size() > 1
        model.generation_config = generation_config(Path(recipe.model.path))
        greedy = replace(recipe.decoding, beams=1, length_penalty=1.0, sampling=SamplingConfig())
        self._decoder = Decoder(model, tokenizer, greedy, synced=self._synced)

    def __call__(self) -> dict[str, float]:
        """Scores by pair (collective).

        Raises:
            LanderError: they could not be computed; on every rank.
        """
        with _generating(self._model):
            translated = {pair: self._translated(pair, requests) for pair, requests in self._requests.items()}
        self._beat("scoring validation sentences")
        scores: dict[str, float] = {}
        failure: LanderError | None = None
        if process_group.rank() == 0:
            try:
                scores = self._score(translated)
            except LanderError as error:
                failure = error
        scores, failure = collectives.from_rank_zero((scores, failure))
        if failure is not None:
            raise failure
        return scores

    def _translated(self, pair: str, requests: Sequence[Request]) -> list[Segment]:
        mine: dict[str, str] = {}
        with InferenceModel(self._model).pair(pair):
            prefix = self._decoder.shared_prefix([request.prompt for request in requests])
            for batch in batches(
                longest_first(requests), self._recipe.translate.batch_size, fill=self._synced
            ):
                self._beat(f"translating validation sentences of {pair}")
                prompts = [request.prompt for request in batch.requests]
                hypotheses = self._decoder.decode(prompts, prefix, batch.requests[0].stop)
                wanted = zip(batch.requests[: batch.wanted], hypotheses, strict=False)
                mine.update({request.id: hypothesis.text for request, hypothesis in wanted})
        texts = {name: text for part in collectives.gather_objects(mine) for name, text in part.items()}
        return [Segment(request.src, texts[request.id], request.ref) for request in requests]


@contextmanager
def _generating(model: PreTrainedModel) -> Iterator[None]:
    """Within this context a model in training generates: with transformers' own attention, not that for packed rows."""
    packed, head = model.config._attn_implementation, model.get_output_embeddings()
    trained = [parameter.requires_grad for parameter in head.parameters()]
    model.set_attn_implementation(model.get_correct_attn_implementation(None))
    model.eval()
    # As in `open_for_inference`: multiplied by a head without gradient, a prompt costs a copy of the head per sentence.
    head.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, before in zip(head.parameters(), trained, strict=True):
            parameter.requires_grad_(before)
        model.set_attn_implementation(packed)

"""chrF of the validation sentences, translated greedily by the model in training: what `train.keep_best: chrf` goes by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from sacrebleu.metrics import CHRF
from transformers import PreTrainedModel

from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.results import SamplingConfig
from lander_ds.data.prepared import PreparedData
from lander_ds.data.tokens.tokenizer import load_tokenizer
from lander_ds.distributed import collectives, process_group
from lander_ds.inference.decoding import Decoder
from lander_ds.inference.open import InferenceModel, generation_config
from lander_ds.inference.requests import requests_for
from lander_ds.inference.translate import Request, batches, longest_first


class ValidationChrf:
    """Translates the same sentences at every call; the ranks share them."""

    def __init__(
        self, recipe: Recipe, model: PreTrainedModel, data: PreparedData, beat: Callable[[str], None]
    ) -> None:
        """Prepare.

        Args:
            recipe: of the training.
            model: the whole model, whose layers are those that are trained.
            data: prepared corpora; pairs without validation sentences are left out.
            beat: told of every batch.

        Raises:
            ConfigError: a prompt and its translation may need more positions than the model has.
        """
        self._recipe, self._model, self._beat = recipe, model, beat
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
        """By pair, 0 to 100 (collective)."""
        with _generating(self._model):
            return {pair: self._chrf(pair, requests) for pair, requests in self._requests.items()}

    def _chrf(self, pair: str, requests: Sequence[Request]) -> float:
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
        translations = [texts[request.id] for request in requests]
        return float(CHRF().corpus_score(translations, [[request.ref for request in requests]]).score)


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

"""Identity 3: awareness ranks neurons as switching them off does."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from lander_ds.distributed import collectives
from lander_ds.method.awareness import AwarenessMetadata
from lander_ds.method.collector import StatisticsCollector

PAIRS = ("en-de", "en-fr")
SENTENCES, LENGTH, PROMPT, NEURONS = 32, 10, 4, 24


def spearman(first: torch.Tensor, second: torch.Tensor) -> float:
    ranks = torch.stack([values.argsort().argsort().double() for values in (first, second)])
    return float(torch.corrcoef(ranks)[0, 1])


def test_awareness_ranks_neurons_like_true_ablation() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=NEURONS,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    downs = [layer.mlp.down_proj for layer in model.model.layers]
    ids = torch.randint(32, (SENTENCES, LENGTH))
    pair_of = torch.arange(SENTENCES) % 2

    def losses(logits: torch.Tensor) -> torch.Tensor:
        predictions = logits[:, PROMPT - 1 : -1].transpose(1, 2)
        return cross_entropy(predictions, ids[:, PROMPT:], reduction="none").sum(1)

    with StatisticsCollector(
        dict(enumerate(downs)), len(downs), pairs=2, device=torch.device("cpu")
    ) as collector:
        collector.set_pairs(pair_of[:, None].expand(-1, LENGTH))
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        losses(model(inputs_embeds=embedded).logits).sum().backward()
        collector.reduce(collectives.sum_over_ranks)
    phi = collector.finish(PAIRS, AwarenessMetadata("", "", {}, {})).phi()

    intact = losses(model(ids).logits)
    for layer, down in enumerate(downs):
        change = torch.zeros(2, NEURONS)
        for neuron in range(NEURONS):

            def switch_off(
                _: torch.nn.Module, inputs: tuple[torch.Tensor], neuron: int = neuron
            ) -> tuple[torch.Tensor]:
                h = inputs[0].clone()
                h[..., neuron] = 0
                return (h,)

            hook = down.register_forward_pre_hook(switch_off)
            difference = (losses(model(ids).logits) - intact).abs()
            hook.remove()
            change[:, neuron] = torch.stack([difference[pair_of == pair].mean() for pair in range(2)])
        for pair in range(2):
            assert spearman(phi[pair, layer], change[pair]) > 0.8

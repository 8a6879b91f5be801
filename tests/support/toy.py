"""A toy decoder without attention and data for it, for ranks too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, silu

from lander_ds.distributed import collectives, process_group
from lander_ds.method.awareness import Awareness, AwarenessMetadata
from lander_ds.method.collector import StatisticsCollector

PAIRS = ("en-de", "en-fr", "en-ru")
METADATA = AwarenessMetadata(
    "fingerprint", "data", dict.fromkeys(PAIRS, 4), dict.fromkeys(PAIRS, 20), {"note": 1}
)
LAYERS, WIDTH, NEURONS, VOCABULARY = 3, 8, 16, 20
CPU = torch.device("cpu")

Sample = tuple[torch.Tensor, torch.Tensor, int]
"""Token ids [T], targets [T] (-100: no loss), pair id."""


class ToyModel(nn.Module):
    """Embeddings, gated residual FFNs, a head; all weights frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.gate = nn.ModuleList(nn.Linear(WIDTH, NEURONS, bias=False) for _ in range(LAYERS))
        self.up = nn.ModuleList(nn.Linear(WIDTH, NEURONS, bias=False) for _ in range(LAYERS))
        self.down = nn.ModuleList(nn.Linear(NEURONS, WIDTH, bias=False) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids).requires_grad_()
        for gate, up, down in zip(self.gate, self.up, self.down, strict=True):
            x = x + down(silu(gate(x)) * up(x))
        return self.head(x)


def samples() -> list[Sample]:
    """Twelve samples of 5 to 16 tokens, pairs in turn; the first third of each has no loss, like a prompt."""
    generator = torch.Generator().manual_seed(1)
    built = []
    for number in range(12):
        length = 5 + number
        ids = torch.randint(VOCABULARY, (length,), generator=generator)
        targets = torch.randint(VOCABULARY, (length,), generator=generator)
        targets[: length // 3] = -100
        built.append((ids, targets, number % len(PAIRS)))
    return built


def backward(model: nn.Module, collector: StatisticsCollector, batch: Sequence[Sample]) -> torch.Tensor:
    """One packed micro-batch [T] through `model`; returns the loss."""
    ids, targets = (torch.cat([tensors[part] for *tensors, _ in batch]) for part in (0, 1))
    collector.set_pairs(torch.cat([torch.full_like(sample[0], sample[2]) for sample in batch]))
    loss = cross_entropy(model(ids), targets, reduction="sum", ignore_index=-100)
    loss.backward()
    return loss


def collect(data: Sequence[Sample], size: int) -> Awareness:
    """The awareness of this rank's share of `data` in micro-batches of `size` samples, summed over ranks."""
    model = ToyModel()
    own = collectives.share(data)
    with StatisticsCollector(dict(enumerate(model.down)), LAYERS, pairs=len(PAIRS), device=CPU) as collector:
        for start in range(0, len(own), size):
            backward(model, collector, own[start : start + size])
        collector.reduce(collectives.sum_over_ranks)
    return collector.finish(PAIRS, METADATA)


def run_rank(rank: int, ranks: int, directory: str, size: int) -> None:
    """What a spawned rank does: join, collect its share, save what it got."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=ranks)
    collect(samples(), size).save(Path(directory) / f"rank{rank}.safetensors")
    process_group.stop()

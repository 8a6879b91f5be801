"""The awareness file: what the detect stage learnt about every FFN neuron, per language pair.

Shapes: M pairs, L decoder layers, f neurons per layer. `awareness.safetensors` holds `{pair}/tokens` (a
scalar) and `{pair}/{statistic}` [L, f], all float64, and JSON metadata. Every statistic is a sum over tokens,
so files made on any number of ranks and any micro-batch size agree, and every criterion is computed from them
without the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from lander_ds.common import tensor_file as artefact_file
from lander_ds.common.errors import ArtefactError

FORMAT = "lander-awareness-1"
STATISTICS = ("sum_h", "sum_abs_h", "active", "sum_abs_gh", "sum_gh2")
CURE = "run stage detect (again)"


@dataclass(frozen=True)
class AwarenessMetadata:
    """What the statistics were collected from."""

    base_fingerprint: str
    """Fingerprint of the base model's weights."""
    data_hash: str
    """Content hash of the prepared detection data."""
    sentences: Mapping[str, int]
    """Sentence pairs per pair, over all ranks."""
    target_tokens: Mapping[str, int]
    """Tokens that carried a loss per pair, over all ranks."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further JSON values for the report."""


@dataclass(frozen=True, eq=False)
class Awareness:
    """Sums over tokens per pair, layer and neuron. h is a neuron's inner activation, g = dL/dh."""

    pairs: tuple[str, ...]
    """Language pairs; a pair's position is its pair id."""
    tokens: torch.Tensor
    """[M] float64: non-padding tokens, prompts included."""
    sum_h: torch.Tensor
    """[M, L, f] float64: sum of h."""
    sum_abs_h: torch.Tensor
    """[M, L, f] float64: sum of |h|."""
    active: torch.Tensor
    """[M, L, f] float64: number of tokens with h > 0."""
    sum_abs_gh: torch.Tensor
    """[M, L, f] float64: sum of |g h|."""
    sum_gh2: torch.Tensor
    """[M, L, f] float64: sum of (g h)^2."""
    metadata: AwarenessMetadata
    """Where it comes from."""

    @property
    def layers(self) -> int:
        """L, the number of decoder layers."""
        return int(self.sum_h.shape[1])

    @property
    def neurons(self) -> int:
        """f, the number of neurons per layer."""
        return int(self.sum_h.shape[2])

    def phi(self) -> torch.Tensor:
        """[M, L, f] awareness: the mean over tokens of |g h|.

        |g h| is the first-order estimate of the loss change when the neuron is switched off (P, eq. 2); the
        absolute value is taken per token, before the mean (R, Xie et al. 2021).
        """
        return self._per_token(self.sum_abs_gh)

    def activation_mean(self) -> torch.Tensor:
        """[M, L, f] mean of h over tokens."""
        return self._per_token(self.sum_h)

    def activation_probability(self) -> torch.Tensor:
        """[M, L, f] share of tokens with h > 0 (R, LAPE, Tang et al. 2024)."""
        return self._per_token(self.active)

    def _per_token(self, total: torch.Tensor) -> torch.Tensor:
        return total / self.tokens[:, None, None]

    def reordered(self, pairs: Sequence[str]) -> Awareness:
        """The same statistics with `pairs` as the order of the pairs.

        Raises:
            ArtefactError: `pairs` are not the pairs that the awareness was collected for.
        """
        if set(pairs) != set(self.pairs) or len(pairs) != len(self.pairs):
            raise ArtefactError(
                f"the awareness was collected for the pairs {', '.join(self.pairs)} but "
                f"data.pairs of the recipe has {', '.join(pairs)}: {CURE} with this recipe"
            )
        rows = [self.pairs.index(pair) for pair in pairs]
        moved = {name: getattr(self, name)[rows] for name in ("tokens", *STATISTICS)}
        return replace(self, pairs=tuple(pairs), **moved)

    def content_hash(self) -> str:
        """SHA-256 of pairs, statistics and metadata (hex); equal for equal contents."""
        digest = hashlib.sha256(self._description().encode())
        for tensor in self._tensors().values():
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write the awareness to a temporary name and rename it to `path`."""
        artefact_file.write(path, "awareness", self._tensors(), self._description())

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{pair}/{name}": getattr(self, name)[row].to("cpu", torch.float64).contiguous()
            for row, pair in enumerate(self.pairs)
            for name in ("tokens", *STATISTICS)
        }

    def _description(self) -> str:
        description = {
            "format": FORMAT,
            "pairs": list(self.pairs),
            "layers": self.layers,
            "neurons": self.neurons,
            **asdict(self.metadata),
        }
        return json.dumps(description, sort_keys=True)

    @staticmethod
    def load(path: Path) -> Awareness:
        """Read an awareness file.

        Raises:
            ArtefactError: the file is missing, damaged, of another format, or holds impossible values.
        """
        keys = ("pairs", "layers", "neurons", *(field.name for field in fields(AwarenessMetadata)))
        with artefact_file.reading(path, "awareness", FORMAT, CURE, keys) as (file, description):
            pairs = tuple(description["pairs"])
            loaded = {
                name: torch.stack([file.get_tensor(f"{pair}/{name}") for pair in pairs])
                for name in ("tokens", *STATISTICS)
            }
            size = (description["layers"], description["neurons"])
            awareness = Awareness(
                pairs=pairs,
                **loaded,
                metadata=AwarenessMetadata(
                    description["base_fingerprint"],
                    description["data_hash"],
                    description["sentences"],
                    description["target_tokens"],
                    description["extra"],
                ),
            )
            if fault := _fault(awareness, size):
                raise ValueError(fault)
        return awareness


def _fault(awareness: Awareness, size: tuple[int, int]) -> str | None:
    """What is impossible about an awareness file that says it holds `size` = (L, f); None when sound."""
    if len(set(awareness.pairs)) < len(awareness.pairs):
        return "a pair is listed twice"
    if awareness.tokens.shape != (len(awareness.pairs),) or awareness.tokens.dtype != torch.float64:
        return "tokens is not one float64 number per pair"
    for row, pair in enumerate(awareness.pairs):
        if not (torch.isfinite(awareness.tokens[row]) and awareness.tokens[row] > 0):
            return f"{pair}/tokens is {awareness.tokens[row].item():g}, not a positive number"
    for name in STATISTICS:
        values: torch.Tensor = getattr(awareness, name)
        if values.shape != (len(awareness.pairs), *size) or values.dtype != torch.float64:
            return f"{name} is not float64 of [layers, neurons] = {list(size)}"
        for row, pair in enumerate(awareness.pairs):
            if not torch.isfinite(values[row]).all():
                return f"{pair}/{name} holds NaN or infinity"
            if name != "sum_h" and (values[row] < 0).any():
                return f"{pair}/{name} holds negative numbers"
            if name == "active" and (values[row] > awareness.tokens[row]).any():
                return f"{pair}/active exceeds the number of tokens"
    return None

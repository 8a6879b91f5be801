"""Verification compares models, whatever the base says about decoding; what is not finite is a difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.exports import rewrite
from support.golden_export import GoldenRun, golden_run

from lander_ds.checkpoint import checkpoint
from lander_ds.common.errors import ArtefactError
from lander_ds.common.files import json_hash, read_json, write_json
from lander_ds.export.sources import Merged
from lander_ds.models.files import SINGLE
from lander_ds.models.weights import base_fingerprint

GENERATION: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.5},
    "num_beams": {"num_beams": 4, "length_penalty": 0.3, "early_stopping": True},
    "suppress_tokens": {"suppress_tokens": list(range(3, 200))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 200))},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words": {"bad_words_ids": [[token] for token in range(3, 200)]},
    "forced": {"forced_bos_token_id": 5, "forced_eos_token_id": 6},
    "min_length": {"min_new_tokens": 20, "eos_token_id": [2, 7, 9]},
    "sampling": {"do_sample": True, "temperature": 0.1, "top_k": 2, "top_p": 0.5},
    "several at once": {
        "num_beam_groups": 1,
        "exponential_decay_length_penalty": [1, 2.0],
        "use_cache": False,
    },
    "static cache": {"cache_implementation": "static", "max_length": 21},
}


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> GoldenRun:
    return golden_run(tmp_path_factory.mktemp("verification") / "golden")


@pytest.mark.parametrize("case", GENERATION)
def test_a_correct_export_is_not_refused_for_the_bases_generation_config(
    golden: GoldenRun, case: str
) -> None:
    kept = {"eos_token_id": 2, **GENERATION[case]}
    write_json(golden.base / "generation_config.json", kept)
    proof = golden.export("export.formats=[routed]", force=True)
    assert proof["routed"]["same_greedy"]
    assert proof["routed"]["expected_exact"]
    assert read_json(golden.run.export / "routed" / "generation_config.json", "") == kept


def test_folding_is_measured_under_one_configuration_too(golden: GoldenRun) -> None:
    """Greedy hypotheses of the folded model must not carry the base's penalties, which the routed one lacks."""
    fold = (
        "export.formats=[routed]",
        "export.fold=[en-de]",
        "export.fold_sentences=4",
        "score.bootstrap_samples=10",
    )
    write_json(golden.base / "generation_config.json", {"eos_token_id": 2})
    plain = golden.export(*fold)["dense-en-de"]["loss"]
    write_json(
        golden.base / "generation_config.json", {"eos_token_id": 2, "suppress_tokens": list(range(3, 400))}
    )
    assert golden.export(*fold, force=True)["dense-en-de"]["loss"] == plain


def test_nan_in_an_export_is_found(golden: GoldenRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """`max(0.0, nan)` is 0.0: such an export passed as exact."""
    tensor = Merged.tensor

    def spoiled(self: Merged, stored: str, dtype: torch.dtype | None) -> torch.Tensor:
        values = tensor(self, stored, dtype).clone()
        if stored == "model.norm.weight":
            values[3] = float("nan")
        return values

    monkeypatch.setattr(Merged, "tensor", spoiled)
    for formats in ("[routed]", "[dense]"):
        with pytest.raises(ArtefactError, match=r"computes NaN or infinity.*deleted.*bfloat16 or float32"):
            golden.export(f"export.formats={formats}", force=True)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"])
@pytest.mark.parametrize("formats", ["[routed]", "[dense]"])
def test_a_value_beyond_float16_is_refused_by_name(tmp_path: Path, name: str, formats: str) -> None:
    golden = golden_run(tmp_path / "golden")
    weights = golden.base / SINGLE
    tensors = load_file(weights)
    tensors[name][2, 1] = -1e5
    save_file(tensors, weights, metadata={"format": "pt"})
    adopt_base(golden)
    with pytest.raises(
        ArtefactError, match=rf"{name} has values up to 1e\+05, .*infinite in float16: .*bfloat16"
    ):
        golden.export(f"export.formats={formats}", "export.dtype=float16", "export.verify=0")
    for dtype in ("bfloat16", "float32"):
        golden.export(f"export.formats={formats}", f"export.dtype={dtype}")


def test_a_trained_value_beyond_float16_is_refused_by_name(tmp_path: Path) -> None:
    golden = golden_run(tmp_path / "golden")
    rewrite(
        golden.run, lambda tensors: next(t for n, t in tensors.items() if n.endswith(".up"))[:1].fill_(7e4)
    )
    with pytest.raises(
        ArtefactError, match=r"up_proj\.weight has values up to 7e\+04, .*infinite in float16"
    ):
        golden.export("export.formats=[routed]", "export.dtype=float16")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_trained_tensor_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    golden = golden_run(tmp_path / "golden")
    rewrite(
        golden.run, lambda tensors: next(t for n, t in tensors.items() if n.endswith(".up"))[:1].fill_(value)
    )
    with pytest.raises(ArtefactError, match=r"up_proj\.weight holds NaN or infinity after training"):
        golden.export("export.formats=[routed]", "export.verify=0")


def adopt_base(golden: GoldenRun) -> None:
    """Make the checkpoint one of the changed base."""
    path = checkpoint.newest(golden.run.checkpoints).path / checkpoint.STATE
    state = read_json(path, "")
    del state[checkpoint.DIGEST]
    state["base_fingerprint"] = base_fingerprint(golden.base)
    write_json(path, {**state, checkpoint.DIGEST: json_hash(state)})

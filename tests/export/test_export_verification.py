"""Verification compares models, whatever the base says about decoding; what is not finite is a difference."""

from __future__ import annotations

from typing import Any

import pytest
from support.golden_export import GoldenRun, golden_run

from lander_ds.common.files import read_json, write_json

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

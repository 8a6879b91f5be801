"""Recipes that are well typed and still cannot work, and those that are unusual but fine."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError
from support.workspace import Workspace

from lander_ds.common.errors import ConfigError
from lander_ds.config.explain import explain
from lander_ds.config.loading import read_recipe
from lander_ds.config.schema.training import TrainConfig
from lander_ds.preflight.recipe import check_recipe


def check(workspace: Workspace, *overrides: str, stage: str | None = None) -> None:
    recipe, document = read_recipe(Path(workspace.recipe.name), overrides)
    check_recipe(recipe, stage, document)


def refusal(workspace: Workspace, *overrides: str, stage: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        check(workspace, *overrides, stage=stage)
    return str(caught.value)


@pytest.mark.parametrize(
    "stage", [None, "all", "prepare", "detect", "select", "train", "translate", "score", "export"]
)
def test_a_sound_recipe_passes_for_every_stage(stage: str | None, workspace: Workspace) -> None:
    check(workspace, stage=stage)


def test_every_number_of_the_schema_has_a_range() -> None:
    without = {key.path for key in explain() if "number" in key.type and "at least" not in key.type}
    without -= {key.path for key in explain() if "above" in key.type}
    checked_with_other_keys = {"select.layers.layers", "pipeline_cut"}
    of_any_metric = {"data.filters.quality.NAME.min"}
    assert without == checked_with_other_keys | of_any_metric


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.temperature=0", "must be above 0, found 0.0"),
        ("train.betas=[0.9, 1]", "train.betas.1: must be at least 0 and below 1, found 1.0"),
        ("select.banks.kappa=0", "must be above 0 and at most 1, found 0.0"),
        ("select.banks.rho=1.5", "must be at least 0 and at most 1, found 1.5"),
        ("train.lr.gates=-1", "train.lr.gates: must be at least 0"),
        ("detect.examples=0", "detect.examples: must be at least 1"),
    ],
)
def test_numbers_out_of_range(override: str, message: str, workspace: Workspace) -> None:
    assert message in refusal(workspace, override)


@pytest.mark.parametrize(
    ("replay", "message"),
    [
        ("{corpora: [{path: general.txt}]}", "data.replay.share: 0 uses none of data.replay.corpora"),
        ("{share: 0.1}", "data.replay.corpora: no corpus to replay"),
        ("{share: 1, corpora: [{path: a.txt}]}", "data.replay.share: must be at least 0 and below 1"),
        ("{share: 0.1, corpora: [{path: ''}]}", "data.replay.corpora.0.path: is empty; name a file"),
        (
            "{share: 0.1, corpora: [{path: 'general.{tgt}.txt'}]}",
            "data.replay.corpora.0.path: unknown placeholder {tgt}; nothing is filled in here",
        ),
        (
            "{share: 0.1, corpora: [{path: a.txt.gz, columns: {text: content}}]}",
            "data.replay.corpora.0.columns: files of plain text have no columns",
        ),
        (
            "{share: 0.1, corpora: [{path: a.jsonl, columns: {prompt: text}}]}",
            "data.replay.corpora.0.columns: prompt and text are the same column 'text'",
        ),
        (
            "{share: 0.1, corpora: [{path: a.jsonl, columns: {prompt: ' '}}]}",
            "data.replay.corpora.0.columns.prompt: is empty; name a column",
        ),
        (
            "{share: 0.1, corpora: [{path: absent.txt}]}",
            "data.replay.corpora.0.path: absent.txt: no such file or directory",
        ),
        ("{share: 0.1, corpora: [{path: a.tsv, format: tsv}]}", "data.replay.corpora.0.format"),
    ],
)
def test_replay_that_cannot_work(replay: str, message: str, workspace: Workspace) -> None:
    assert message in refusal(workspace, f"data.replay={replay}")


def test_a_sound_replay(workspace: Workspace) -> None:
    Path("general.txt").write_text("A text.\n")
    check(workspace, "data.replay={share: 0.1, corpora: [{path: general.txt}]}")


THREE_STAGES = ("topology=pipeline_zero3", "pipeline_stages=3")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pipeline_stages=0"], "pipeline_stages: must be at least 1, found 0"),
        (
            ["pipeline_stages=2"],
            "pipeline_stages: topology: zero3 has one stage, found 2; set topology: pipe",
        ),
        (["pipeline_cut=[3]"], "pipeline_cut: topology: zero3 has no stages to cut"),
        (["topology=pipeline"], "pipeline_stages: topology: pipeline needs at least 2, found 1; set it, or"),
        (["topology=pipeline", "pipeline_stages=0"], "pipeline_stages: must be at least 1, found 0"),
        (
            [*THREE_STAGES, "pipeline_cut=[3]"],
            "pipeline_cut: 3 stages need 2 entries, the first layer of every stage but the first, found 1; "
            "correct it or set pipeline_stages: 2",
        ),
        ([*THREE_STAGES, "pipeline_cut=[0, 3]"], "pipeline_cut.0: the first stage begins with layer 0"),
        ([*THREE_STAGES, "pipeline_cut=[-1, 3]"], "or later, found -1"),
        ([*THREE_STAGES, "pipeline_cut=[3, 3]"], "found [3, 3]; write increasing layers, each once"),
        ([*THREE_STAGES, "pipeline_cut=[4, 2]"], "found [4, 2]; write increasing layers, each once"),
        (
            [*THREE_STAGES, "pipeline_cut=[2, 6]"],
            "pipeline_cut.1: the model has no layer 6; its layers are 0 to",
        ),
        (
            ["topology=pipeline", "pipeline_stages=7"],
            "pipeline_stages: every stage needs a decoder layer and the",
        ),
        (
            ["topology=replicated", "frozen_shards=node"],
            "frozen_shards: topology: replicated does not shard frozen weights, found node; remove it, or set",
        ),
        (
            ["topology=pipeline", "pipeline_stages=2", "model.dtype=float16"],
            "model.dtype: float16 does not work with topology: pipeline",
        ),
    ],
)
def test_topologies_that_cannot_be(overrides: list[str], message: str, workspace: Workspace) -> None:
    assert message in refusal(workspace, *overrides)


@pytest.mark.parametrize("topology", ["pipeline", "pipeline_zero3"])
@pytest.mark.parametrize(
    "overrides",
    [
        ["pipeline_stages=2"],
        ["pipeline_stages=6"],
        ["pipeline_stages=3", "pipeline_cut=[1, 5]"],
        ["pipeline_stages=2", "train.method=lora", "export.formats=[dense]"],
        ["pipeline_stages=2", "train.activation_checkpointing=true", "model.dtype=bfloat16"],
    ],
)
def test_pipelines_that_work(topology: str, overrides: list[str], workspace: Workspace) -> None:
    check(workspace, f"topology={topology}", *overrides)


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ('{"model_type": "llama", "num_hidden_layers": 6}', False),
        ('{"model_type": "llama", "num_hidden_layers": 6, "tie_word_embeddings": true}', True),
        # These families tie unless config.json says otherwise.
        ('{"model_type": "gemma3_text", "num_hidden_layers": 6}', True),
        ('{"model_type": "bloom", "n_layer": 6}', True),
        ('{"model_type": "bloom", "n_layer": 6, "tie_word_embeddings": false}', False),
        (
            '{"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 6}}',
            True,
        ),
    ],
)
def test_a_tied_embedding_cannot_be_trained_in_two_stages(
    config: str, tied: bool, workspace: Workspace
) -> None:
    (workspace.path / "model" / "config.json").write_text(config)
    full = ("train.method=full", "export.formats=[dense]")
    check(workspace, *full)
    check(workspace, "topology=pipeline", "pipeline_stages=2")
    if tied:
        message = refusal(workspace, *full, "topology=pipeline", "pipeline_stages=2")
        assert "train.method: full trains the embedding, which is also the model's head" in message
        assert "set topology: zero3" in message
    else:
        check(workspace, *full, "topology=pipeline", "pipeline_stages=2")


def test_the_tie_of_a_model_that_transformers_cannot_read(workspace: Workspace) -> None:
    (workspace.path / "model" / "config.json").write_text('{"model_type": "no_such", "n_layer": 6}')
    message = refusal(
        workspace, "train.method=full", "export.formats=[dense]", "topology=pipeline", "pipeline_stages=2"
    )
    assert "model.path: " in message
    assert "'no_such' is of no known family" in message


@pytest.mark.parametrize(
    "override",
    [
        "train.temperature=5",
        "train.clip=0",
        "select.banks.rho=1",
        "select.banks.rho=0",
        "train.lr.gates=0",
        "train.banks=[specific]",
        "data.pairs=[en-zh_Hans]",
        "data.prompt.template='{src_lang} {{x}} {src} {tgt_lang}'",
        "train.optimizer=sgd",
        "data.filters.max_length_ratio=0",
        "routing.other_pairs=mask",
        "translate.split=valid",
    ],
)
def test_unusual_but_fine(override: str, workspace: Workspace) -> None:
    for split in ("train", "valid", "test"):
        (workspace.path / f"{split}.en-zh_Hans.jsonl").write_text("")
    check(workspace, override, "translate.systems=[trained]", "data.prompt.language_names={zh_Hans: Chinese}")


def test_problems_of_several_sections_come_together(workspace: Workspace) -> None:
    message = refusal(
        workspace, "train.warmup_steps=10", "routing.gate=none", "routing.alpha_max=1", "data.pairs=[en-en]"
    )
    for key in ("train.warmup_steps", "routing.alpha_max", "data.pairs.0"):
        assert key in message


def test_types_ranges_and_unknown_keys_come_together(workspace: Workspace) -> None:
    message = refusal(workspace, "train.steps=0", "train.clip=-1", "seed=x", "detect.exmples=3", "run_dir=")
    assert message.startswith("recipe.yaml has 5 problems:")
    for fragment in (
        "--set train.steps=0: train.steps: must be at least 1, found 0",
        "--set train.clip=-1: train.clip: must be at least 0, found -1.0",
        "--set seed=x: seed: expected a whole number, found the text 'x'",
        "--set detect.exmples=3: detect.exmples: unknown key; did you mean detect.examples?",
        "--set run_dir=: run_dir: expected text, found nothing; write a value or remove the key",
    ):
        assert f"  {fragment}" in message.splitlines()


def test_a_number_out_of_range_cannot_be_built_in_code_either() -> None:
    with pytest.raises(ValidationError):
        TrainConfig(steps=0)
    with pytest.raises(ValidationError):
        replace(TrainConfig(), betas=(0.9, 1.0))


def test_the_number_of_layers_is_read_from_the_model(workspace: Workspace) -> None:
    assert "at most 5 of the model's 6 layers" in refusal(workspace, "select.layers.k=6")
    check(workspace, "select.layers.k=6", "select.layers.criterion=awareness")
    assert "the model has no layer 6" in refusal(
        workspace, "select.layers.criterion=list", "select.layers.layers=[0, 6]"
    )
    config = '{"text_config": {"num_hidden_layers": 2}}'
    (workspace.path / "model" / "config.json").write_text(config)
    assert "of the model's 2 layers" in refusal(workspace)


def test_a_model_may_be_missing_only_while_the_recipe_is_looked_at(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check(workspace, "model.path=later", stage=None)
    assert "model.path: later does not exist" in caplog.text
    assert (
        "recipe.yaml"
        not in refusal(workspace, "model.path=later", stage="train").split("model.path=later")[0]
    )
    check(workspace, "model.path=later", stage="score")


def test_options_without_effect_are_told(workspace: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check(
            workspace,
            "train.method=full",
            "train.lora.r=4",
            "export.formats=[dense]",
            "translate.length_penalty=2",
            "translate.sampling.top_k=5",
        )
    assert "train.lora: has no effect with train.method: full" in caplog.text
    assert (
        "--set translate.length_penalty=2: translate.length_penalty: has no effect in greedy search"
        in caplog.text
    )
    assert "translate.sampling: has no effect without translate.sampling.temperature" in caplog.text


def test_beams_and_samples_exclude_each_other(workspace: Workspace) -> None:
    both = ("translate.beams=4", "translate.sampling.temperature=0.7")
    for stage in ("translate", "text", "export"):
        assert (
            "translate.sampling.temperature: 0.7 draws translations, and 4 beams search for the best one; set "
            "temperature: 0, or translate.beams: 1" in refusal(workspace, *both, stage=stage)
        )
    check(workspace, *both, stage="train")
    check(workspace, both[1], "translate.length_penalty=0", stage="translate")


@pytest.mark.parametrize(
    ("overrides", "wording"),
    [
        (("shield.share=0.1",), "select.shield.share: has no effect without select.shield.awareness"),
        (("banks.share=0.1",), "select.banks.share: has no effect with criterion: spread"),
        (("banks.criterion=top", "banks.rho=0.5"), "select.banks.rho: has no effect with criterion: top"),
        (
            ("banks.criterion=ratio", "banks.like=top"),
            "select.banks.like: has no effect with criterion: ratio",
        ),
        (
            ("layers.criterion=ends", "layers.cost_aware=true"),
            "select.layers.cost_aware: has no effect with criterion: ends",
        ),
        (("banks.criterion=random", "banks.like=top", "banks.share=0.1"), ""),
        (("layers.criterion=awareness", "layers.cost_aware=true"), ""),
    ],
)
def test_options_of_another_criterion_are_told(
    workspace: Workspace, caplog: pytest.LogCaptureFixture, overrides: tuple[str, ...], wording: str
) -> None:
    with caplog.at_level(logging.WARNING):
        check(workspace, *(f"select.{override}" for override in overrides))
    assert wording in caplog.text
    assert ("has no effect with" in caplog.text) == bool(wording)


def test_a_shield_must_exist_before_anything_is_detected(workspace: Workspace) -> None:
    message = refusal(workspace, "select.shield.awareness=other/awareness.safetensors", stage="all")
    assert "select.shield.awareness: other/awareness.safetensors does not exist; run stage detect" in message
    check(workspace, "select.shield.awareness=other/awareness.safetensors", stage="train")


def test_dense_export_with_gates_is_an_approximation(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check(workspace, "export.formats=[dense, routed]")
    assert "approximates the trained model" in caplog.text
    caplog.clear()
    check(workspace, "export.formats=[dense]", "routing.gate=none")
    assert "approximates" not in caplog.text


def test_the_same_file_cannot_train_and_test(workspace: Workspace) -> None:
    message = refusal(workspace, "data.corpora.2.path=train.{pair}.jsonl")
    assert "data.corpora.2.path" in message
    assert "scores on training data mean nothing" in message


def test_pairs_must_be_told_apart(workspace: Workspace) -> None:
    (workspace.path / "all.jsonl").write_text("")
    message = refusal(workspace, "data.corpora.0.path=all.jsonl")
    assert "en-de and en-fr would read the same lines" in message
    check(workspace, "data.corpora.0.path=all.jsonl", "data.corpora.0.columns={src_lang: s, tgt_lang: t}")
    check(workspace, "data.corpora.0.path=all.jsonl", "data.corpora.0.columns={src: '{src}', tgt: '{tgt}'}")


def test_every_pair_needs_its_splits(workspace: Workspace) -> None:
    message = refusal(workspace, "data.corpora.0.pairs=[en-de]", stage="train")
    assert "no corpus with split: train serves en-fr" in message
    check(workspace, "data.corpora.2.split=valid", stage="train")
    message = refusal(workspace, "data.corpora.2.split=valid", stage="all")
    assert "no corpus with split: test serves en-de, en-fr" in message
    assert "split: test" in refusal(workspace, "data.corpora.2.split=valid", stage="translate")


def test_some_pairs_may_have_no_test_data(workspace: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    for stage in ("all", "translate", None):
        caplog.clear()
        check(workspace, "data.corpora.2.pairs=[en-de]", stage=stage)
        assert (
            "no corpus with split: test serves en-fr; translated and scored are the other pairs"
            in caplog.text
        )


def test_directories_that_are_files(workspace: Workspace) -> None:
    assert "run_dir: zero3.json is a file" in refusal(workspace, "run_dir=zero3.json/run")
    assert "data.cache_dir: zero3.json is a file" in refusal(workspace, "data.cache_dir=zero3.json")
    assert "is the model's directory" in refusal(workspace, "run_dir=./model/")


@pytest.mark.parametrize("name", ["chrf", "BLEU", "my_metric", "22", "sentences"])
def test_a_neural_metric_is_not_called_like_other_figures(name: str, workspace: Workspace) -> None:
    message = refusal(workspace, f"score.neural={{'{name}': {{model: x}}}}", stage="score")
    assert f"score.neural.{name}: a metric's name begins with a letter" in message


def test_a_neural_metric_is_looked_for_before_anything_runs(workspace: Workspace) -> None:
    override = "score.neural.comet={model: x, python: /none/python}"
    assert "score.neural.comet.python: /none/python cannot be run" in refusal(
        workspace, override, stage="all"
    )
    check(workspace, override, stage="train")
    check(workspace, override)


def test_a_threshold_needs_scores_and_scores_a_threshold(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    scores = "data.corpora.0.columns.scores=[quality]"
    message = refusal(workspace, scores, "data.filters.min_score={qualty: 0.5}")
    assert (
        "data.filters.min_score.qualty: no corpus names that column in columns.scores; did you mean quality?"
        in message
    )
    message = refusal(workspace, "data.filters.min_score={qe: 0.5}")
    assert "write for example columns: {scores: [qe]}" in message
    assert "columns.scores.0: is empty; name a column" in refusal(
        workspace, "data.corpora.0.columns.scores=['']"
    )
    caplog.clear()
    check(workspace, scores, "data.filters.min_score={quality: -0.5}")
    assert "scores" not in caplog.text
    check(workspace, scores)
    assert "has no effect: data.filters.min_score does not have quality" in caplog.text


def test_systems_of_sets(workspace: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    sets = 'evaluate.sets={news: {path: "train.{pair}.jsonl"}}'
    only_trained = ("translate.systems=[trained]", "translate.shots=0")
    check(workspace, *only_trained, sets, stage="translate")
    examples = "evaluate.systems=[trained_fewshot]"
    assert "translate.shots: the system trained_fewshot needs at least 1" in refusal(
        workspace, *only_trained, sets, examples, stage="translate"
    )
    assert "evaluate.systems: nothing to translate with" in refusal(
        workspace, sets, "evaluate.systems=[]", stage="score"
    )
    assert "evaluate.systems" in refusal(workspace, sets, "evaluate.systems=[base, base]", stage="translate")
    caplog.set_level(logging.WARNING)
    check(workspace, *only_trained, examples, stage="translate")
    assert "evaluate.systems: has no effect without evaluate.sets" in caplog.text

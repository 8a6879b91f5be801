"""What a user reads who got a recipe, an override or a DeepSpeed JSON wrong: one row per mistake.

Every row runs the real command line. It must end with code 2 before anything is written, name the file and
line or the override, the key and the cure, and show no traceback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.workspace import RECIPE, Workspace

from lander_ds.cli.main import main

EDITS = [
    # What stands in the sound recipe, what stands there instead, fragments of the message.
    (RECIPE, "", "recipe.yaml: the recipe is empty"),
    (RECIPE, "- a\n", "recipe.yaml: a recipe is a mapping"),
    ("pairs: [en-de, en-fr]", "pairs: [en-de", "recipe.yaml, line 8: not valid YAML"),
    ("  path: model", "\tpath: model", "line 4: not valid YAML", "indent with spaces"),
    ("  steps: 10", "  steps: 10\n  steps: 9", "line 15: train.steps: given twice, first on line 14"),
    ("steps:", "stepz:", "line 14: train.stepz: unknown key; did you mean train.steps?"),
    ("train:", "trian:", "line 13: trian: unknown key; did you mean train?"),
    ("general", "genral", "line 17: train.lr.genral: unknown key; did you mean train.lr.general?"),
    ("run_dir: run", "run_dir: run\nshots: 4", "line 2: shots: unknown key here", "translate.shots"),
    ("  path: model\n", "", "line 3: model.path: this required key is missing"),
    ("10", "many", "line 14: train.steps: expected a whole number, found the text 'many'"),
    ("10", "10.5", "train.steps: expected a whole number, found the number 10.5"),
    ("10", "true", "train.steps: expected a whole number, found true"),
    ("float32", "flaot32", "line 5: model.dtype: expected one of", "did you mean float32?"),
    ("[en-de, en-fr]", "en-de", "line 7: data.pairs: expected a list", "write [en-de]"),
    ("run_dir: run", "run_dir: 5", "line 1: run_dir: expected text", "put it in quotes"),
    ("1e-4", ".nan", "line 17: train.lr.general: expected a finite number"),
    ("[en-de", "[en_de", "line 7: data.pairs.0: 'en_de' is no pair; write source-target"),
    ("[en-de", "[en-zh-Hans", "data.pairs.0: 'en-zh-Hans' is no pair", "en-zh_Hans"),
    ("en-fr]", "en-de]", "data.pairs.1: en-de is given twice"),
    ("[en-de, en-fr]", "[]", "data.pairs: no translation direction"),
    ("[en-de", "[en-en", "data.pairs.0: en-en: source and target are the same language"),
    ("[en-de", "[en-xq", "'xq'", "add data.prompt.language_names"),
    ("train.{pair}", "train.{lang}", "data.corpora.0.path: unknown placeholder {lang}", "{pair}"),
    ("max_length: 64", "max_length: 200", "train.pack_tokens: 128 cannot hold", "data.max_length 200"),
    ("batch_tokens: 256", "batch_tokens: 32", "line 15: train.batch_tokens", "cannot hold an example"),
    ("path: model", "path: nowhere", "line 4: model.path: nowhere does not exist"),
    ("run_dir: run", "run_dir: recipe.yaml", "line 1: run_dir: recipe.yaml is a file"),
    ("zero3.json", "zero4.json", "zero4.json", "does not exist; did you mean zero3.json?"),
]

TWO_STAGES = ["topology=pipeline", "pipeline_stages=2"]

NEWS = "evaluate.sets.news.path=x"
SHOTS = "evaluate.shots=[{path: x"

OVERRIDES = [
    # The stage, the overrides, fragments of the message.
    ("train", ["train.lrr=1"], "--set train.lrr=1: train.lrr: unknown key; did you mean train.lr?"),
    ("train", ["seed"], "--set seed: write it as --set key=value"),
    ("train", ["data.corpora.7.limit=1"], "data.corpora is a list of 3"),
    ("train", ["train.steps.a=1"], "train.steps is the number 10 and has no part named a"),
    ("train", ["data.pairs=["], "--set data.pairs=[", "not valid YAML"),
    ("train", ["data.corpora.0.pairs=[en-dd]"], "corpora.0.pairs.0: 'en-dd'", "did you mean en-de?"),
    ("train", ["data.corpora.0.split=valid"], "no corpus with split: train serves en-de, en-fr"),
    ("all", ["data.corpora.2.split=valid"], "no corpus with split: test serves en-de, en-fr"),
    ("train", ["data.corpora.0.limit=0"], "data.corpora.0.limit: must be at least 1, found 0"),
    ("train", ["data.corpora=[]"], "data.corpora: no corpus"),
    ("train", ["data.prompt.template='{source}'"], "data.prompt.template: unknown placeholder {source}"),
    ("train", ["data.prompt.template='{tgt_name}:'"], "data.prompt.template: {src} is missing"),
    ("train", ["data.prompt.template='{src'"], "data.prompt.template: "),
    ("train", ["data.filters.min_chars=9", "data.filters.max_chars=5"], "data.filters: min_chars 9"),
    ("train", ["select.layers.criterion=list"], "select.layers.layers: criterion: list needs layers"),
    ("train", ["select.layers.layers=[1]"], "select.layers.layers: only criterion: list reads it"),
    ("train", ["select.layers={criterion: list, layers: [1, 1]}"], "select.layers.layers: 1 is given twice"),
    ("train", ["select.layers={criterion: list, layers: [-1]}"], "layers count from 0, found -1"),
    ("train", ["select.layers.k=0"], "select.layers.k: must be at least 1, found 0"),
    ("train", ["select.layers.k=40"], "select.layers.k: ", "the model's 6 layers, found 40"),
    ("train", ["select.banks.rho=1.2"], "select.banks.rho: must be at least 0 and at most 1, found 1.2"),
    ("train", ["train.betas=[0.9, 1]"], "train.betas.1: must be at least 0 and below 1"),
    ("train", ["train.warmup_steps=10"], "train.warmup_steps: 10 leaves none of the 10 steps"),
    ("train", ["model.quantize=nf5"], "model.quantize: expected one of", "did you mean nf4?"),
    (
        "train",
        ["model.quantize=nf4"],
        "model.quantize: nf4 does not work with topology: zero3, which shards every weight; set topology: replicated or",
    ),
    (
        "detect",
        ["model.quantize=int8", "topology=pipeline_zero3", "pipeline_stages=2"],
        "model.quantize: int8 does not work with topology: pipeline_zero3",
    ),
    *(
        (
            "train",
            ["model.quantize=int8", "topology=replicated", f"train.method={method}"],
            f"model.quantize: train.method: {method} trains parts of weights that int8 would round; write method: lander",
        )
        for method in ("full", "layers", "shira")
    ),
    (
        "train",
        ["train.patience=3"],
        "train.patience: early stopping needs validations; set train.valid_every",
    ),
    ("train", ["train.valid_every=5", "data.corpora.1.split=test"], "train.valid_every", "split: valid"),
    (
        "train",
        ["train.keep_best=chrf"],
        "train.keep_best: chrf is measured in validations; set train.valid_every, or write loss",
    ),
    (
        "train",
        [*TWO_STAGES, "train.keep_best=chrf", "train.valid_every=5"],
        "train.keep_best: chrf translates, for which topology: pipeline would need the whole model",
        "set topology: replicated or zero3",
    ),
    (
        "train",
        ["train.keep_best=chrff"],
        "train.keep_best: expected one of loss, chrf, off or a metric of score.neural, found 'chrff'; did you mean chrf?",
    ),
    (
        "train",
        ["train.keep_best=comet", "score.neural.kiwi.model=kiwi"],
        "train.keep_best: expected one of loss, chrf, off, kiwi or a metric of score.neural, found 'comet'; describe it",
    ),
    (
        "train",
        ["train.keep_best=comet", "train.valid_every=5", "score.neural.comet.model=nowhere/here"],
        "score.neural.comet.",
    ),
    ("score", ["score.neural.loss.model=kiwi"], "score.neural.loss: a metric's name begins with a letter"),
    ("train", ["train.trackers=[wandb, wandb]"], "train.trackers: wandb is given twice"),
    ("train", ["train.trackers=[wandbd]"], "train.trackers.0: expected one of", "did you mean wandb?"),
    ("train", ["train.lr={general: 0, specific: 0, gates: 0}"], "train.lr: nothing would be trained"),
    ("train", ["train.method=lora", "train.lr.lora=0"], "train.lr: nothing would be trained: train.lr.lora"),
    ("train", ["train.banks=[]"], "train.banks: method: lander needs a bank"),
    ("train", ["data.pairs=[en-de]", "train.banks=[general]"], "train.banks", "every neuron is specific"),
    (
        "train",
        ["routing.gate=none", "routing.budget_weight=1"],
        "routing.budget_weight: a budget loss needs gates",
    ),
    ("train", ["routing.gate=none", "routing.alpha_max=1"], "routing.alpha_max: noise needs gates"),
    ("train", ["routing.gate=none", "routing.gate_eval=hard"], "routing.gate_eval: hard gates need gates"),
    (
        "train",
        ["routing.gate_eval=hard"],
        "routing.gate_eval: hard gates with gate_init: preserve",
        "gates of 0 and 2",
        "set routing.gate_init: paper",
    ),
    ("train", ["pipeline_stages=2"], "pipeline_stages: topology: zero3 has one stage, found 2"),
    (
        "train",
        [*TWO_STAGES, "train.prefix_cache=disk"],
        "train.prefix_cache: topology: pipeline",
        "write off",
    ),
    (
        "train",
        ["train.method=lora", "train.prefix_cache=disk"],
        "train.prefix_cache: method: lora trains every",
    ),
    (
        "train",
        [*TWO_STAGES, "frozen_shards=node"],
        "frozen_shards: topology: pipeline does not shard",
        "zero3",
    ),
    ("train", ["frozen_shards=nod"], "frozen_shards: expected one of world, node", "did you mean node?"),
    ("train", ["pipeline_cut=[3]"], "pipeline_cut: topology: zero3 has no stages", "set topology: pipeline"),
    ("train", ["topology=pipeline"], "pipeline_stages: topology: pipeline needs at least 2, found 1"),
    ("train", [*TWO_STAGES, "pipeline_cut=[2, 4]"], "pipeline_cut: 2 stages need 1 entries", "found 2"),
    ("train", [*TWO_STAGES, "pipeline_cut=[0]"], "pipeline_cut.0: the first stage begins with layer 0"),
    ("train", [*TWO_STAGES, "pipeline_cut=[6]"], "pipeline_cut.0: the model has no layer 6", "0 to 5"),
    ("detect", ["topology=pipeline_zero3", "pipeline_stages=7"], "pipeline_stages: every stage needs", "6"),
    ("train", [*TWO_STAGES, "model.dtype=float16"], "model.dtype: float16", "write bfloat16 or float32"),
    ("train", TWO_STAGES, "zero3.json, line 9: zero_optimization.stage", "topology: pipeline, which needs 1"),
    ("translate", ["translate.shots=0"], "translate.shots: the system fewshot needs at least 1"),
    ("translate", ["translate.systems=[]"], "translate.systems: nothing to translate with"),
    ("translate", ["translate.systems=[base, base]"], "translate.systems: base is given twice"),
    ("score", ["score.tokenizers={de: ja-mecb}"], "score.tokenizers.de", "did you mean ja-mecab?"),
    ("score", ["score.tokenizers={de: no-such}"], "has no tokenizer 'no-such'; use one of 13a, char"),
    ("score", ["score.baseline=theirs.{pair}.txt"], "score.baseline: theirs.en-de.txt does not exist"),
    ("score", ["score.baseline=model"], "score.baseline: model is a directory; name a file"),
    ("score", ["score.baseline=test.en-de.jsonl"], "en-de and en-fr would read the same file", "{pair}"),
    ("score", ["score.baseline='{system}.{pair}'"], "score.baseline: unknown placeholder {system}", "{src}"),
    ("export", ["export.formats=[]"], "export.formats: nothing to export"),
    ("export", ["train.method=full"], "export.formats: routed needs banks", "write [dense]"),
    ("prepare", ["evaluate.sets.news.path=news.{pair}"], "evaluate.sets.news.path: news.en-de: no such file"),
    ("prepare", ["evaluate.sets.news.path=train.{pair}.jsonl"], "scores on training data mean nothing"),
    ("prepare", ["evaluate.sets.news={path: test.en-de.jsonl}"], "en-de and en-fr would read the same lines"),
    (
        "score",
        ["evaluate.sets.news={path: 'a.{lang}'}"],
        "evaluate.sets.news.path: unknown placeholder {lang}",
    ),
    (
        "score",
        [NEWS, "evaluate.sets.news.pairs=[en-xx-y]"],
        "evaluate.sets.news.pairs.0: 'en-xx-y' is no pair",
    ),
    ("score", ["evaluate.sets={a.b: {path: x}}"], "evaluate.sets.a.b: a set's name begins with a letter"),
    (
        "score",
        [NEWS, "evaluate.sets.news.pth=x"],
        "evaluate.sets.news.pth: unknown key",
        "did you mean evaluate.sets.news.path?",
    ),
    ("score", ["evaluate.sets.news.limit=2"], "evaluate.sets.news.path: this required key is missing"),
    ("score", [NEWS, "evaluate.sets.news.limit=0"], "evaluate.sets.news.limit: must be at least 1"),
    (
        "score",
        [NEWS, "evaluate.sets.news.split=train"],
        "evaluate.sets.news.split: expected one of test, valid",
    ),
    (
        "score",
        [NEWS, "evaluate.sets.news.pairs=[en-es]", f"{SHOTS}, pairs: [en-sp]}}]"],
        "shots.0.pairs.0",
        "did you mean en-es?",
    ),
    (
        "score",
        [f"{SHOTS}, pairs: [en-de]}}]"],
        "en-de is among data.pairs: its examples come from its training",
    ),
    ("prepare", ["data.corpora.0.path=t.{pair}"], "data.corpora.0.path: t.en-de: no such file"),
    ("prepare", ["data.corpora.0.path=test.{pair}.jsonl"], "scores on training data mean nothing"),
    ("prepare", ["data.corpora.0.path=train.en-de.jsonl"], "en-de and en-fr would read the same lines"),
]

JSON = [
    # Changes of the sound DeepSpeed JSON, fragments of the message.
    ({"gradient_clipp1ng": 1}, "gradient_clipp1ng", "did you mean gradient_clipping?"),
    ({"zero_optimization": {"stge": 3}}, "zero_optimization.stge", "did you mean zero_optimization.stage?"),
    ({"optimizer": {"type": "Adam", "params": {"betass": "auto"}}}, "did you mean optimizer.params.betas?"),
    (
        {"optimizer": {"type": "Adam", "params": {"lr": 1}}},
        "optimizer.params.lr",
        "set train.lr in the recipe",
    ),
    ({"scheduler": {"type": "WarmupLR"}}, "scheduler: learning rates follow the recipe", "train.schedule"),
    ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage", "topology: zero3"),
    ({"gradient_clipping": "a lot"}, "gradient_clipping", "found the text 'a lot'"),
    ({"gradient_clipping": 3.0}, "gradient_clipping", "train.clip: 1"),
    ({"bf16": {"enabled": True}}, "bf16.enabled", "model.dtype: float32"),
    ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps", "train.batch_tokens"),
    ({"elasticity": {"enabled": True}}, "elasticity", "Remove it"),
    ({"pipeline": {"stages": 4}}, "pipeline.stages", "pipeline_stages: 1"),
    ({"pipeline": {"partition": "uniform"}}, "pipeline.partition", "set pipeline_cut in the recipe"),
    (
        {"activation_checkpointing": {"partition_activations": True}},
        "activation_checkpointing.partition_activations",
        "set train.activation_checkpointing",
    ),
    ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights", "frozen weights"),
]

DAMAGES: list[tuple[Callable[[Workspace], object], str]] = [
    (lambda w: w.recipe.unlink(), "recipe.yaml: the recipe does not exist"),
    (
        lambda w: w.recipe.write_bytes(b"a: 1\nrun_dir: \xe4\n"),
        "recipe.yaml, line 2: the recipe is not UTF-8",
    ),
    (lambda w: (w.path / "model/config.json").unlink(), "line 4: model.path: model has no config.json"),
    (lambda w: (w.path / "model/config.json").write_text("{"), "config.json is not a readable JSON file"),
    (
        lambda w: (w.path / "model/config.json").write_text('{"n_layer": 6, "max_position_embeddings": 32}'),
        "line 12: data.max_length: 64 is more than the model's 32 positions; lower it to 32",
    ),
    (
        lambda w: (w.path / "model/config.json").write_text('{"text_config": {"n_positions": 63}}'),
        "data.max_length: 64 is more than the model's 63 positions",
    ),
    (lambda w: w.deepspeed.write_text("{"), "zero3.json, line 1: not valid JSON"),
    (lambda w: w.deepspeed.write_text('{"fp16": {}, "fp16": {}}'), "zero3.json, line 1: fp16: given twice"),
    (lambda w: w.deepspeed.write_text("[]"), "zero3.json: a DeepSpeed JSON is an object"),
]


@pytest.fixture
def refused(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Runs a stage that must be refused with a message that holds all fragments."""

    def run(stage: str, overrides: list[str], fragments: tuple[str, ...]) -> None:
        arguments = [part for override in overrides for part in ("--set", override)]
        assert main([stage, "--recipe", "recipe.yaml", *arguments]) == 2
        shown = capsys.readouterr()
        message = shown.err.partition("error: ")[2]
        for fragment in fragments:
            assert fragment in message
        assert "Traceback" not in shown.err + shown.out
        assert not (workspace.path / "run").exists()

    return run


@pytest.mark.parametrize(("old", "new", "fragments"), [(old, new, rest) for old, new, *rest in EDITS])
def test_recipe(
    old: str, new: str, fragments: tuple[str, ...], workspace: Workspace, refused: Callable[..., None]
) -> None:
    assert old in RECIPE
    workspace.recipe.write_text(RECIPE.replace(old, new, 1), encoding="utf-8")
    refused("train", [], fragments)


@pytest.mark.parametrize(("stage", "overrides", "fragments"), [(a, b, rest) for a, b, *rest in OVERRIDES])
def test_override(
    stage: str, overrides: list[str], fragments: tuple[str, ...], refused: Callable[..., None]
) -> None:
    refused(stage, overrides, fragments)


@pytest.mark.parametrize(("changes", "fragments"), [(changes, rest) for changes, *rest in JSON])
def test_deepspeed_json(
    changes: dict[str, Any], fragments: tuple[str, ...], workspace: Workspace, refused: Callable[..., None]
) -> None:
    workspace.write_deepspeed(**changes)
    refused("train", [], ("zero3.json, line ", *fragments))


@pytest.mark.parametrize(("damage", "fragment"), DAMAGES)
def test_damaged_file(
    damage: Callable[[Workspace], object], fragment: str, workspace: Workspace, refused: Callable[..., None]
) -> None:
    damage(workspace)
    refused("train", [], (fragment,))


@pytest.mark.parametrize("stage", ["detect", "train", "all"])
def test_a_quantised_base_needs_its_library(
    stage: str, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch, workspace: Workspace
) -> None:
    monkeypatch.setattr("lander_ds.preflight.recipe.installed", lambda name: name != "bitsandbytes")
    refused(
        stage,
        ["model.quantize=nf4", "topology=replicated"],
        (
            "model.quantize: nf4 needs bitsandbytes, which is not installed; pip install 'lander-ds[quantize]'",
        ),
    )


def test_a_tracker_needs_its_client(
    refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch, workspace: Workspace
) -> None:
    monkeypatch.setattr("lander_ds.preflight.recipe.installed", lambda name: name != "mlflow")
    refused(
        "train",
        ["train.trackers=[wandb, mlflow]"],
        ("train.trackers: mlflow is not installed; pip install 'lander-ds[track]', or take it out",),
    )
    # Whoever only looks at a recipe needs no client.
    assert main(["config", "--recipe", workspace.recipe.name, "--set", "train.trackers=[mlflow]"]) == 0


def test_float16_needs_a_gpu(refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lander_ds.distributed.accelerator.kind", lambda: "cpu")
    refused(
        "train", ["model.dtype=float16"], ("--set model.dtype=float16: model.dtype: float16 needs a GPU",)
    )

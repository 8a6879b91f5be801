"""What a model directory says is wrong with it is said before anything is computed, in one line with a cure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.golden_export import GOLDEN, GoldenRun, golden_run
from support.tiny_models import save, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lander_ds.common.errors import ConfigError, ModelError
from lander_ds.export.dense import export_dense
from lander_ds.export.sources import Merged
from lander_ds.export.writer import Form
from lander_ds.models.files import INDEX, SINGLE, weight_files
from lander_ds.models.weights import BaseWeights, base_fingerprint
from lander_ds.preflight.recipe import check_recipe
from lander_ds.stages import prepare


@pytest.fixture
def golden(tmp_path: Path) -> GoldenRun:
    return golden_run(tmp_path / "golden")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_the_weights_is_refused(golden: GoldenRun, name: str) -> None:
    (golden.base / name).write_text("{}")
    message = rf"holds an adapter \({name}\).*merge it first.*merge_and_unload"
    for refuse in (weight_files, BaseWeights, base_fingerprint):
        with pytest.raises(ModelError, match=message):
            refuse(golden.base)
    for stage in ("prepare", "detect", "train", "translate", "export", None):
        with pytest.raises(ConfigError, match=message):
            check_recipe(golden.recipe(), stage)


def test_biases_of_a_gated_ffn_are_refused_before_detection(golden: GoldenRun) -> None:
    path = golden.base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mlp_bias": True}))
    for stage in ("prepare", "detect", "train"):
        with pytest.raises(ConfigError, match=r"mlp_bias: true: a gated FFN with biases is not supported"):
            check_recipe(golden.recipe(), stage)
    check_recipe(golden.recipe("train.method=full"), "detect")


@pytest.mark.parametrize("special", [False, True])
def test_added_tokens_beyond_the_embedding_are_refused_in_prepare(tmp_path: Path, special: bool) -> None:
    root = tmp_path / "golden"
    shutil.copytree(GOLDEN, root)
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    token = "<to>" if special else "the"
    assert tokenizer.add_tokens([token], special_tokens=special) == 1
    tokenizer.save_pretrained(root / "base")
    golden = GoldenRun(root)
    recipe = root / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("./", f"{root}/"))
    template = ('data.prompt.template="<to>{tgt_lang} {src} ="',) if special else ()
    message = rf"data of en-de hold the token '{token}' with id \d+, but the model's embedding has \d+ rows.*resize_token"
    with pytest.raises(ModelError, match=message):
        prepare.run(golden.recipe(*template), golden.run)
    assert not (golden.run.data / "prepared.json").exists()


def test_added_tokens_that_no_text_holds_are_no_matter(tmp_path: Path) -> None:
    root = tmp_path / "golden"
    golden = golden_run(root)
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(root / "base")
    prepare.run(golden.recipe(), golden.run)


def test_an_index_without_metadata(tmp_path: Path) -> None:
    base = save(tiny_model("llama"), tmp_path / "base", max_shard_size="20KB")
    assert not (base / SINGLE).exists()
    content = json.loads((base / INDEX).read_text())
    del content["metadata"]
    (base / INDEX).write_text(json.dumps(content))
    export_dense(Merged(BaseWeights(base), {}), tmp_path / "out", Form())
    written = json.loads((tmp_path / "out" / INDEX).read_text())
    assert written["weight_map"] == content["weight_map"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")

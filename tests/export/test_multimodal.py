"""Multimodal bases: their language model is trained, and their exports keep all that belongs to the model and open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import PAIRS, recipe_for, write_checkpoint
from support.exports import open_trained
from support.tiny_models import examples, save, tiny_model
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from lander_ds.common.errors import ModelError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.distributed.start import Start
from lander_ds.export.companions import companions
from lander_ds.export.dense import export_dense
from lander_ds.export.routed import export_routed
from lander_ds.export.verify import compare
from lander_ds.export.writer import Form
from lander_ds.models.files import SINGLE

VISION = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"image_size": 8, "patch_size": 4},
}
WRAPPERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": (
        "llama",
        {"vision_config": {**VISION, "model_type": "clip_vision_model", "projection_dim": 16}},
    ),
    "mistral3": (
        "mistral",
        {"vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8}, "spatial_merge_size": 1},
    ),
    "paligemma": (
        "gemma",
        {"vision_config": {**VISION, "model_type": "siglip_vision_model"}, "projection_dim": 32},
    ),
    "gemma3": (
        "gemma3",
        {"vision_config": {**VISION, "model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4},
    ),
}


def wrapped(kind: str, directory: Path) -> Path:
    """A tiny random multimodal model."""
    case, options = WRAPPERS[kind]
    config = AutoConfig.for_model(
        kind, text_config=tiny_model(case).config.to_dict(), image_token_index=95, **options
    )
    torch.manual_seed(3)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return save(model, directory)


@pytest.mark.parametrize("method", ["lander", "full", "lora"])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_exports_are_verified(tmp_path: Path, kind: str, method: str) -> None:
    base = wrapped(kind, tmp_path / "base")
    recipe, run = recipe_for(base, tmp_path / "run", method, gate="none"), RunDirectory(tmp_path / "run")
    write_checkpoint(recipe)
    trained = open_trained(recipe)
    export_dense(trained.source, run.export / "dense", Form())
    names = ["dense"]
    if method == "lander":
        export_routed(trained, run.export / "routed", Form())
        names.append("routed")
    prompts = {pair: [examples()[0].tolist()] for pair in PAIRS}
    for name in names:
        proof = compare(Start(recipe, run), run.export / name, prompts, generate=True)
        assert proof["max_logit_difference"] <= 1e-5 * proof["max_logit"]
        assert proof["same_greedy"]
    before, after = load_file(base / SINGLE), load_file(run.export / "dense" / SINGLE)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if "vision" in name)


def test_what_transformers_cannot_open_is_told(tmp_path: Path) -> None:
    base = save(tiny_model("llama"), tmp_path / "base")
    recipe = recipe_for(base, tmp_path / "run")
    write_checkpoint(recipe)
    encoder = tmp_path / "encoder"
    AutoConfig.for_model("siglip_vision_model", **VISION).save_pretrained(encoder)
    with pytest.raises(ModelError, match=r"siglip_vision_model neither as .*set export\.verify: 0"):
        compare(Start(recipe, RunDirectory(tmp_path / "run")), encoder, {}, generate=True)


TOKENIZER = """
from transformers import PreTrainedTokenizer
from .vocabulary_of_mine import load
from .helper_of_mine import split


class TokenizerOfMine(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "words.model"}

    def __init__(self, vocab_file, **kwargs):
        self.words = load(vocab_file)
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return {word: index for index, word in enumerate(self.words)}

    def _tokenize(self, text):
        return split(text)

    def _convert_token_to_id(self, token):
        return self.words.index(token) if token in self.words else 0

    def _convert_id_to_token(self, index):
        return self.words[index]
"""
FILES = {
    "tokenization_of_mine.py": TOKENIZER,
    "vocabulary_of_mine.py": "from .readers_of_mine import read\n\n\ndef load(path):\n    return read(path)\n",
    "readers_of_mine.py": "def read(path):\n    return open(path).read().split()\n",
    "helper_of_mine.py": "def split(text):\n    return text.split()\n",
    "words.model": "<unk> <s> </s> good morning",
    "tokenizer_config.json": '{"tokenizer_class": "TokenizerOfMine", "unk_token": "<unk>", "eos_token": "</s>", '
    '"auto_map": {"AutoTokenizer": ["tokenization_of_mine.TokenizerOfMine", null]}}',
    "preprocessor_config.json": '{"auto_map": {"AutoImageProcessor": "image_processing_of_mine.ImagesOfMine"}}',
    "image_processing_of_mine.py": "from .helper_of_mine import split\n",
    "processor_config.json": '{"auto_map": {"AutoProcessor": "elsewhere/repository--processing.Processor"}}',
    "video_preprocessor_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "chat_template.json": "{}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
}
STRANGERS = {"train_of_mine.py": "raise SystemExit\n", "optimizer.pt": "", "trainer_state.json": "{}"}


def write_all(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)


@pytest.mark.parametrize("form", ["dense", "routed"])
def test_processors_templates_and_tokenizer_code_come_along(tmp_path: Path, form: str) -> None:
    base = save(tiny_model("llama"), tmp_path / "base")
    write_all(base, FILES | STRANGERS)
    recipe = recipe_for(base, tmp_path / "run")
    write_checkpoint(recipe)
    out = tmp_path / f"exported-{form}"
    if form == "dense":
        export_dense(open_trained(recipe).source, out, Form())
    else:
        export_routed(open_trained(recipe), out, Form())
    for name, text in FILES.items():
        assert (out / name).read_text() == text, name
    assert not any((out / name).exists() for name in STRANGERS)
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize("good morning")) == [3, 4]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"auto_map": 5}', '{"auto_map": {"AutoTokenizer": "../evil.Class"}}']
)
def test_odd_auto_maps_name_nothing(tmp_path: Path, content: str) -> None:
    write_all(tmp_path, {"tokenizer_config.json": content, "unrelated.py": "import ("})
    assert companions(tmp_path) == {"tokenizer_config.json"}

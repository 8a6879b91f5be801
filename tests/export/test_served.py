"""Folded and dense exports in CTranslate2 and llama.cpp: their converters, our prompts, the tokens of transformers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from support.checkpoints import LAYERS, PAIRS, recipe_for, write_checkpoint
from support.exports import open_trained
from support.tiny_models import SLIDING, random_model, save
from support.tiny_translator import SPECIAL, WORDS, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from lander_ds.cli.main import main
from lander_ds.config.loading import dump_recipe
from lander_ds.config.schema.data import CorpusConfig
from lander_ds.config.schema.method import LayerChoice, SelectConfig
from lander_ds.export.dense import export_dense
from lander_ds.export.fold import folded
from lander_ds.export.routed import export_routed
from lander_ds.export.writer import Form

PROGRAM = Path(__file__).parents[2] / "examples" / "translate_prompts.py"
NEW_TOKENS = 16
LINES = ["w1 w2 w3", "", "w9 w8 w7 w6", "w40 w41 w50 w4 w4 w59", "w12", "w33 w2"]

COMMON: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=None),
    "qwen3": lambda: Qwen3Config(**GROUPED, tie_word_embeddings=True),
    "gemma": lambda: GemmaConfig(**GROUPED),
    # As in Gemma 3 of 270 million and of a billion parameters.
    "gemma3": lambda: Gemma3TextConfig(
        **{**GROUPED, "num_hidden_layers": 6},
        sliding_window=64,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
        query_pre_attn_scalar=8,
    ),
    "bloom": lambda: BloomConfig(
        **{key: COMMON[key] for key in ("vocab_size", "hidden_size")}, n_layer=3, n_head=4
    ),
    "opt": lambda: OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32),
    "gemma2": lambda: Gemma2Config(
        **GROUPED, sliding_window=64, layer_types=SLIDING, query_pre_attn_scalar=8
    ),
}
"""In the form in which the models were published.
(Transformers opens Qwen2 with a tokenizer class that the tiny tokenizer does not fit.)"""

CTRANSLATE2 = ("llama", "mistral", "qwen3", "gemma", "gemma3", "bloom", "opt")
"""What the converter of CTranslate2 4.8.5 converts rightly."""
LLAMA_CPP = ("llama", "mistral", "gemma", "gemma2", "gemma3")
"""Whose tokenizers the converter of llama.cpp takes from a SentencePiece file; others it must know by name."""


@pytest.fixture(scope="module")
def program() -> ModuleType:
    """The example that docs/serving.md names."""
    spec = importlib.util.spec_from_file_location("translate_prompts", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Served:
    """What a server is given, and what it has to write."""

    content: dict[str, Any]
    """What `lander translate --prompts` wrote."""
    translations: dict[int, str]
    """What `lander translate --model` wrote with the folded export, by line."""
    exports: dict[str, Path]
    """`folded` and `dense`, of one checkpoint."""

    def tokens(self, name: str, activation: Callable[..., torch.Tensor] | None = None) -> list[list[int]]:
        """What transformers writes with an export, the closing tokens included.

        Args:
            name: of the export.
            activation: takes the place of the FFNs' own.
        """
        model = AutoModelForCausalLM.from_pretrained(self.exports[name])
        if activation is not None:
            for layer in model.model.layers:
                del layer.mlp.act_fn
                layer.mlp.act_fn = activation
        written = []
        for prompt in self.content["prompts"]:
            row = torch.tensor([prompt["ids"]])
            output = model.generate(
                row,
                attention_mask=torch.ones_like(row),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=self.content["end_ids"],
                pad_token_id=0,
            )
            written.append(output[0, row.shape[1] :].tolist())
        assert len(set(map(tuple, written))) > 1
        return written

    def check_text(self, program: ModuleType, written: list[list[int]]) -> None:
        """What the folded export wrote, as text."""
        for prompt, ids in zip(self.content["prompts"], written, strict=True):
            text = program.text_of(ids, self.content, tiny_tokenizer())
            assert text == self.translations[prompt["line"]]


def serve(case: str, directory: Path) -> Served:
    """Exports and prompts of a made-up run."""
    base = save(random_model(CONFIGS[case]()), directory / "base")
    tiny_tokenizer().save_pretrained(base)
    write_sentencepiece(base / "tokenizer.model")
    plain = recipe_for(base, directory / "run")
    recipe = replace(
        plain,
        data=replace(plain.data, corpora=(CorpusConfig("absent.{pair}.jsonl"),), max_length=48),
        select=SelectConfig(LayerChoice(k=2)),
    )
    write_checkpoint(recipe)
    (directory / "run" / "recipe.resolved.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    means = {str(layer): dict.fromkeys(PAIRS, 0.6) for layer in LAYERS}
    exports = {name: directory / name for name in ("folded", "dense")}
    export_dense(folded(open_trained(recipe), means, "en-de"), exports["folded"], Form())
    export_dense(open_trained(recipe).source, exports["dense"], Form())

    source, prompts, output = (directory / name for name in ("in.txt", "prompts.json", "out.txt"))
    source.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    text = ["translate", "--run", str(directory / "run"), "--pair", "en-de", "--input", str(source)]
    assert main([*text, "--prompts", "--output", str(prompts)]) == 0
    text += ["--set", f"translate.max_new_tokens={NEW_TOKENS}", "--model", str(exports["folded"])]
    assert main([*text, "--output", str(output)]) == 0
    lines = enumerate(output.read_text(encoding="utf-8").split("\n"), start=1)
    return Served(json.loads(prompts.read_text(encoding="utf-8")), dict(lines), exports)


def write_sentencepiece(path: Path) -> None:
    """The vocabulary of the tiny tokenizer, in the file that published LLaMA 2, Mistral and Gemma come with."""
    model, kinds = ModelProto(), ModelProto.SentencePiece
    for number, piece in enumerate(SPECIAL + WORDS):
        kind = kinds.CONTROL if number < 3 else kinds.UNKNOWN if piece == "w0" else kinds.NORMAL
        model.pieces.add(piece=piece, score=-number, type=kind)
    model.trainer_spec.unk_piece = "w0"
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("case", CTRANSLATE2)
def test_ctranslate2_writes_the_same_tokens(case: str, program: ModuleType, tmp_path: Path) -> None:
    converters = pytest.importorskip("ctranslate2.converters")
    served = serve(case, tmp_path)
    for name, export in served.exports.items():
        converters.TransformersConverter(str(export)).convert(str(tmp_path / "served"), force=True)
        written = program.generate(tmp_path / "served", served.content, "cpu", "float32", NEW_TOKENS)
        assert written == served.tokens(name)
        if name == "folded":
            served.check_text(program, written)


@pytest.mark.parametrize("case", LLAMA_CPP)
def test_llama_cpp_writes_the_same_tokens(case: str, program: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    converter = os.environ.get("LANDER_GGUF_CONVERTER")
    if converter is None:
        pytest.skip("LANDER_GGUF_CONVERTER does not name llama.cpp's convert_hf_to_gguf.py (docs/serving.md)")
    served, file = serve(case, tmp_path), tmp_path / "served.gguf"
    for name, export in served.exports.items():
        command = [sys.executable, converter, str(export), "--outtype", "f32", "--outfile", str(file)]
        subprocess.run(command, check=True, capture_output=True)
        written = program.generate(file, served.content, "cpu", "float32", NEW_TOKENS)
        expected = served.tokens(name, half_gelu if case.startswith("gemma") else None)
        assert written == expected
        if name == "folded" and expected == served.tokens(name):
            served.check_text(program, written)


def half_gelu(values: torch.Tensor) -> torch.Tensor:
    """GELU as llama.cpp's kernels for CPUs look it up between -10 and 10: in a table of float16."""
    looked_up = torch.nn.functional.gelu(values.half().float(), approximate="tanh").half().float()
    return torch.where(values.abs() < 10, looked_up, values.relu())


@pytest.mark.parametrize(
    ("options", "most"),
    [({"load_in_8bit": True}, 0.15), ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 0.75)],
    ids=["int8", "nf4"],
)
@pytest.mark.parametrize("mixture", [False, True])
def test_a_routed_export_is_opened_quantised(
    options: dict[str, Any], most: float, mixture: bool, tmp_path: Path
) -> None:
    """Linear layers are quantised; banks and gates, which are none, keep the type that they were trained in."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    # The kernels for CPUs want widths that are multiples of their blocks.
    wide = {**COMMON, "hidden_size": 128}
    config: PretrainedConfig = LlamaConfig(**wide, intermediate_size=128)
    if mixture:
        config = Qwen3MoeConfig(**wide, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2)
    recipe = recipe_for(save(random_model(config), tmp_path / "base"), tmp_path / "run")
    write_checkpoint(recipe)
    export_routed(open_trained(recipe), tmp_path / "routed", Form())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "routed", trust_remote_code=True)
    narrow = AutoModelForCausalLM.from_pretrained(
        tmp_path / "routed",
        trust_remote_code=True,
        quantization_config=BitsAndBytesConfig(**options),
        device_map="cpu",
    )
    before, after = dict(plain.named_parameters()), dict(narrow.named_parameters())
    routed = [name for name in before if ".banks." in name or ".router." in name]
    assert routed
    assert all(torch.equal(before[name], after[name]) for name in routed)
    assert all(
        after[f"model.model.layers.{layer}.self_attn.q_proj.weight"].dtype in (torch.int8, torch.uint8)
        for layer in range(3)
    )
    ids = torch.tensor([[5, 9, 30, 12]])
    with torch.no_grad():
        close, exact = (model(ids, pair="en-de").logits.float() for model in (narrow, plain))
        other = narrow(ids, pair="de-en").logits.float()
    distance = float((close - exact).norm() / exact.norm())
    # Random weights are far worse to quantise than trained ones.
    assert 0 < distance < most
    assert not torch.equal(other, close)

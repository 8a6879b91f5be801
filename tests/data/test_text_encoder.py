"""Prompts and targets as token ids: one border between them, and corpus text that stays text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.data_helpers import MakeRecipe, make_byte_level, make_sentencepiece, write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, PythonBackend

from lander_ds.common.errors import ConfigError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import ModelConfig
from lander_ds.config.schema.data import CorpusConfig, PromptConfig
from lander_ds.config.schema.results import TranslateConfig
from lander_ds.config.schema.types import Split, System
from lander_ds.data.prepared import PreparedData
from lander_ds.data.tokens.prompt import render_prompt, target_text
from lander_ds.data.tokens.text_encoder import TextEncoder, control_tokens
from lander_ds.data.tokens.tokenizer import load_tokenizer
from lander_ds.inference.requests import requests_for
from lander_ds.inference.translate import Request
from lander_ds.stages import prepare

KINDS = ["trained", "llama-unigram", "llama-bpe", "gemma-unigram", "gemma-bpe", "byte-level"]

CONTROLS = [
    "</s>",
    "<eos>",
    "<s>",
    "<unk>",
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<start_of_turn>",
]


SPLITS: list[tuple[str, Split]] = [("c", "train"), ("t", "test")]


class CharacterTokenizer(PythonBackend):
    """A tokenizer written in Python, with `</s>` as the end of sequence: one id per character."""

    def __init__(self) -> None:
        self._ids = {chr(code): code for code in range(32, 127)}
        super().__init__(eos_token="</s>")

    @property
    def vocab_size(self) -> int:
        return 127

    def get_vocab(self) -> dict[str, int]:
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: object) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids[token]

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)


@pytest.fixture(scope="session")
def tokenizers(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tokenizer of each kind."""
    root = tmp_path_factory.mktemp("tokenizers")

    def directory(kind: str) -> Path:
        if kind == "trained":
            return tokenizer_dir
        if not (root / kind).exists():
            (root / kind).mkdir()
            if kind == "byte-level":
                make_byte_level(root / kind)
            else:
                make_sentencepiece(root / kind, *kind.split("-"))  # type: ignore[arg-type]
        return root / kind

    return directory


def text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("kind", KINDS)
class TestBorder:
    @pytest.mark.parametrize("prefix", [" => ", "\nTranslation: ", "\n", "", " ", "  ", " \n ", "=>", "\t"])
    @pytest.mark.parametrize("target", ["Hallo Welt.", "(Hallo)", "„Ja“", "。日本"])
    def test_prefix_stands_in_the_prompt_and_never_in_the_target(
        self, tokenizers: Callable[[str], Path], kind: str, prefix: str, target: str
    ) -> None:
        tokenizer = load_tokenizer(str(tokenizers(kind)), trust_remote_code=False)
        encoder, config = TextEncoder(tokenizer), PromptConfig(target_prefix=prefix)
        shots = [("one", "eins")]
        prompt = render_prompt(config, "en-de", "Hello", shots)
        [(ids, prompt_length)] = encoder.examples([prompt], [target_text(config, target)])
        # Decoding continues the very ids that stand before the target in training.
        assert encoder.prompts([prompt]) == [ids[:prompt_length]]
        assert text_of(tokenizer, ids[prompt_length:-1]).strip() == target
        shown = f"English: one\nGerman:{prefix}eins\n\nEnglish: Hello\nGerman:{prefix}"
        assert text_of(tokenizer, ids[:prompt_length]).strip(" ") == shown.strip(" ")

    def test_default_ids_are_those_of_the_tokenizer(
        self, tokenizers: Callable[[str], Path], kind: str
    ) -> None:
        tokenizer = load_tokenizer(str(tokenizers(kind)), trust_remote_code=False)
        [(ids, length)] = TextEncoder(tokenizer).examples(
            [("English:", " a  Computer", "\nGerman:")], [" Zwei  W"]
        )
        assert ids[:length] == tokenizer("English: a  Computer\nGerman:")["input_ids"]
        supplied = kind.startswith("llama")
        assert (
            ids[length:-1]
            == tokenizer("Zwei  W" if supplied else " Zwei  W", add_special_tokens=False)["input_ids"]
        )


@pytest.mark.parametrize("kind", KINDS)
class TestControlTokens:
    @pytest.mark.parametrize("control", [*CONTROLS, "<0x0A>"])
    def test_text_that_spells_one_stays_text(
        self, tokenizers: Callable[[str], Path], kind: str, control: str
    ) -> None:
        tokenizer = load_tokenizer(str(tokenizers(kind)), trust_remote_code=False)
        text = f"Das Tag {control} beendet{control} den{control[:2]}{control} Absatz."
        [(ids, length)] = TextEncoder(tokenizer).examples([("English: ", text, "\nGerman:")], [" " + text])
        controls = {tokenizer.convert_tokens_to_ids(name) for name in control_tokens(tokenizer)}
        begun = len(TextEncoder(tokenizer).opening)
        assert not controls.intersection(ids[begun:-1])
        assert text_of(tokenizer, ids[length:-1]).removeprefix(" ") == text
        assert text_of(tokenizer, ids[begun:length]) == f"English: {text}\nGerman:"

    def test_template_may_hold_them(self, tokenizers: Callable[[str], Path], kind: str) -> None:
        tokenizer = load_tokenizer(str(tokenizers(kind)), trust_remote_code=False)
        encoder = TextEncoder(tokenizer)
        mine = sorted(control_tokens(tokenizer).intersection(CONTROLS))
        assert mine
        for control in mine:
            config = PromptConfig(template=f"user{control}\n{{src}}{control}\n{{tgt_name}}:")
            prompt = render_prompt(config, "en-de", "Hello", ())
            assert encoder.prompts([prompt]) == [tokenizer("".join(prompt))["input_ids"]]
            token = tokenizer.convert_tokens_to_ids(control)
            ids = encoder.prompts([render_prompt(config, "en-de", f"say {control}", ())])[0]
            assert ids[len(encoder.opening) :].count(token) == 2

    def test_beginning_of_sequence_is_not_doubled(self, tokenizers: Callable[[str], Path], kind: str) -> None:
        tokenizer = load_tokenizer(str(tokenizers(kind)), trust_remote_code=False)
        encoder, bos = TextEncoder(tokenizer), tokenizer.bos_token
        assert encoder.opening == [tokenizer.bos_token_id]
        config = PromptConfig(template=bos + "{src}\n{tgt_name}:")
        (ids,) = encoder.prompts([render_prompt(config, "en-de", "Hello", ())])
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids == encoder.prompts([("", "Hello", "\nGerman:")])[0]


def test_added_words_are_vocabulary(tokenizers: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(str(tokenizers("byte-level")), trust_remote_code=False)
    assert control_tokens(tokenizer) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    [(ids, length)] = TextEncoder(tokenizer).examples([("a",)], ["Der Computer"])
    assert tokenizer.convert_tokens_to_ids("Computer") in ids[length:]


def test_tokenizers_in_python() -> None:
    encoder = TextEncoder(CharacterTokenizer())
    [(ids, length)] = encoder.examples([("</s>", "a </s>", ":")], ["b </s>"])
    end = encoder.examples([("",)], [""])[0][0][-1]
    assert ids == [end, *map(ord, "a </s>:b </s>"), end]
    assert length == 8


def test_tokenizers_that_end_every_text(tmp_path: Path) -> None:
    word_level = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=word_level, eos_token="<eos>", unk_token="<unk>", add_eos_token=True
    ).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), trust_remote_code=False)
    assert tokenizer("a")["input_ids"] == [2, 1]
    assert TextEncoder(tokenizer).examples([("a a",)], ["b"]) == [([2, 2, 3, 1], 2)]
    assert TextEncoder(tokenizer).examples([("a",)], ["b <eos> b"]) == [([2, 3, 0, 3, 1], 1)]
    assert tokenizer.pad_token_id == 1


class TestRequests:
    """What is decoded, against what was prepared for training."""

    @pytest.fixture
    def requests(
        self, make_recipe: MakeRecipe, tmp_path: Path, tokenizer_dir: Path
    ) -> Callable[..., dict[str, list[Request]]]:
        shutil.copytree(tokenizer_dir, tmp_path / "model")
        config = {"model_type": "llama", "vocab_size": 1500, "max_position_embeddings": 256}
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        write_jsonl(tmp_path / "c.jsonl", [(f"sentence {n}", f"Satz {n} </s>") for n in range(40)])
        write_jsonl(tmp_path / "t.jsonl", [("a test <eos>", "ein Test")])
        corpora = [CorpusConfig(str(tmp_path / f"{name}.jsonl"), split=split) for name, split in SPLITS]
        prompt = PromptConfig(target_prefix="\nTranslation: ")
        recipe = make_recipe(*corpora, prompt=prompt, detect_examples=4)
        recipe = replace(recipe, model=ModelConfig(str(tmp_path / "model")))
        run = RunDirectory(recipe.run_dir)
        prepare.run(recipe, run)
        self.data = PreparedData.load(run, recipe)
        self.tokenizer = load_tokenizer(recipe.model.path, trust_remote_code=False)

        def of(system: System, **translate: int) -> dict[str, list[Request]]:
            changed = replace(recipe, translate=TranslateConfig(**translate))  # type: ignore[arg-type]
            return requests_for(system, changed, self.data, self.tokenizer)

        return of

    @pytest.mark.parametrize("system", ["base", "fewshot"])
    def test_prompts_end_as_in_training(
        self, requests: Callable[..., dict[str, list[Request]]], system: System
    ) -> None:
        (request,) = requests(system, shots=2, max_new_tokens=50)["en-de"]
        ending = "English: a test <eos>\nGerman:\nTranslation:"
        assert text_of(self.tokenizer, list(request.prompt)).endswith(ending)
        ids, length = self.data.split("train")["en-de"].tokens(0)
        assert text_of(self.tokenizer, ids[:length].tolist()).endswith("\nTranslation:")
        end = self.tokenizer.eos_token_id
        assert end not in request.prompt
        assert ids[length:].tolist().count(end) == 1

    def test_more_positions_than_the_model_has(
        self, requests: Callable[..., dict[str, list[Request]]]
    ) -> None:
        (request,) = requests("fewshot", shots=2, max_new_tokens=50)["en-de"]
        fitting = 256 + 1 - len(request.prompt)
        assert requests("fewshot", shots=2, max_new_tokens=fitting)
        with pytest.raises(ConfigError, match=r"translate\.shots: with 2 .* needs 257 of the model's 256"):
            requests("fewshot", shots=2, max_new_tokens=fitting + 1)
        assert requests("base", max_new_tokens=fitting + 1)
        with pytest.raises(ConfigError, match=r"translate\.max_new_tokens: the longest .* model's 256"):
            requests("base", max_new_tokens=256)

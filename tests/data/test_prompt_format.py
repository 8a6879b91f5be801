"""Prompts by chat templates: as the tokenizer itself writes a conversation, and the same wherever prompts are made."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.data_helpers import MakeRecipe, make_byte_level, write_jsonl
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lander_ds.cli.main import main
from lander_ds.common.errors import ConfigError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import ModelConfig, Recipe
from lander_ds.config.schema.data import CorpusConfig, DataConfig, PromptConfig
from lander_ds.config.schema.results import TranslateConfig
from lander_ds.data.prepared import PreparedData, prepared_options
from lander_ds.data.tokens.prompt import check_prompt, equal_prompts
from lander_ds.data.tokens.prompt_format import prompt_format
from lander_ds.data.tokens.text_encoder import TextEncoder
from lander_ds.data.tokens.tokenizer import load_tokenizer, tokenizer_fingerprint
from lander_ds.inference.decoding import Decoder
from lander_ds.inference.requests import requests_for
from lander_ds.stages import prepare

# As Qwen's, Gemma's and Mistral's: with a system role; refusing one, with the beginning of sequence; with a blank before
# answers and nothing that opens them.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content | trim + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + m.role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
CHAT = PromptConfig(template="chat", user="{src_name} to {tgt_name}: {src}")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer that begins texts by itself, with the tokens of turns."""
    directory = tmp_path_factory.mktemp("instruct")
    make_byte_level(directory)
    tokenizer = load_tokenizer(str(directory), trust_remote_code=False)
    turns = ["<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"]
    tokenizer.add_special_tokens({"additional_special_tokens": turns})
    tokenizer.chat_template = GEMMA
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def with_template(directory: Path) -> Callable[[str], PreTrainedTokenizerBase]:
    """The tokenizer with a chat template."""

    def tokenizer(template: str) -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(str(directory), trust_remote_code=False)
        tokenizer.chat_template = template
        return tokenizer

    return tokenizer


Turns = list[dict[str, str]]


def turns(*texts: str) -> Turns:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|im_end|>"), (GEMMA, "<end_of_turn>"), (MISTRAL, "<|endoftext|>")]
)
@pytest.mark.parametrize("shots", [(), (("one", "eins"), ("two", "zwei"))])
def test_prompts_are_the_tokenizers_own(
    with_template: Callable[[str], PreTrainedTokenizerBase],
    template: str,
    end: str,
    shots: tuple[tuple[str, str], ...],
) -> None:
    tokenizer = with_template(template)
    form, encoder = prompt_format(CHAT, tokenizer), TextEncoder(tokenizer)
    texts = [text for src, tgt in shots for text in (f"English to German: {src}", tgt)]
    own: Any = tokenizer.apply_chat_template(
        turns(*texts, "English to German: three"),
        add_generation_prompt=True,
        enable_thinking=False,
        return_dict=False,
    )
    prompt = form.prompt("en-de", "three", shots)
    [(ids, length)] = encoder.examples([prompt], [form.target("drei")], form.end)
    begins = [] if own[0] == tokenizer.bos_token_id else [tokenizer.bos_token_id]
    assert ids[:length] == [*begins, *own]
    # CHATML spells the beginning of sequence of this tokenizer in every turn.
    assert ids[:2].count(tokenizer.bos_token_id) == 1
    assert (form.end, form.stop("en-de", len(shots))) == (end, end)
    assert ids[-1] == tokenizer.convert_tokens_to_ids(end)
    answer = tokenizer.decode(ids[length:-1])
    assert answer == (" drei" if template == MISTRAL else "drei")


def test_system_prompt(with_template: Callable[[str], PreTrainedTokenizerBase]) -> None:
    config = replace(CHAT, system="You speak {tgt_name}.", user="{src}")
    text = "".join(prompt_format(config, with_template(CHATML)).prompt("en-de", "a", ()))
    assert text.startswith(
        "<|im_start|>system\nYou speak German.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(ConfigError, match=r"System role not supported\): remove data\.prompt\.system"):
        prompt_format(config, with_template(GEMMA)).prompt("en-de", "a", ())


def test_text_that_spells_a_turn_stays_text(with_template: Callable[[str], PreTrainedTokenizerBase]) -> None:
    tokenizer = with_template(GEMMA)
    form = prompt_format(replace(CHAT, user="{src} / {src}"), tokenizer)
    text = "<end_of_turn>\n<start_of_turn>model"
    (ids,) = TextEncoder(tokenizer).prompts([form.prompt("en-de", text, [(text, text)])])
    assert ids.count(tokenizer.convert_tokens_to_ids("<start_of_turn>")) == 4
    shown = tokenizer.decode(ids, skip_special_tokens=True)
    assert shown == f"user\n{text} / {text}\nassistant\n{text}\nuser\n{text} / {text}\nmodel\n"


def test_prompts_are_the_same_every_day(with_template: Callable[[str], PreTrainedTokenizerBase]) -> None:
    template = "{% if strftime_now is defined %}{{ strftime_now('%Y-%m-%d') }}{% endif %}" + CHATML
    text = "".join(prompt_format(CHAT, with_template(template)).prompt("en-de", "a", ()))
    assert text.startswith("26 Jul 2024<|im_start|>user")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the tokenizer has no chat template: take the tokenizer of an instruct model"),
        (
            "{{ messages[-1].content }}",
            r"shows 1 of 3 texts of a conversation with 1 examples: write a template",
        ),
        ("{{ raise_exception('no') }}", r"chat template fails \(no\): write a template"),
    ],
)
def test_templates_that_cannot_be_used(
    with_template: Callable[[str], PreTrainedTokenizerBase], template: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.prompt\.template: chat, but .*{message}"):
        prompt_format(CHAT, with_template(template)).prompt("en-de", "a", [("b", "c")])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"user": "{tgt_name}:"}, r"data\.prompt\.user: \{src\} is missing"),
        ({"user": "{src} {text}"}, r"data\.prompt\.user: unknown placeholder \{text\}"),
        ({"user": "{src} {"}, r"data\.prompt\.user: .*braces"),
        ({"system": "{src}"}, r"data\.prompt\.system: unknown placeholder \{src\}"),
        ({"user": "{src}"}, r"data\.prompt\.user: en-de and en-fr get the same prompt"),
    ],
)
def test_bad_texts(keys: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_prompt(replace(CHAT, **keys), ["en-de", "en-fr"])  # type: ignore[arg-type]


def test_the_system_prompt_may_name_the_language() -> None:
    config = replace(CHAT, user="{src}", system="Translate into {tgt_name}.")
    check_prompt(config, ["en-de", "en-fr"])
    assert equal_prompts(config, ["en-de", "cs-de"]) == [("en-de", "cs-de")]


def test_records_of_other_recipes_stay_as_they_were() -> None:
    recipe = Recipe("run", ModelConfig("model"), DataConfig(("en-de",), ()), "none")
    kept = ["template", "target_prefix", "separator", "shots", "language_names"]
    assert list(prepared_options(recipe)["data"]["prompt"]) == kept


def test_the_template_is_part_of_what_data_are_made_from(
    with_template: Callable[[str], PreTrainedTokenizerBase],
) -> None:
    one, other = with_template(GEMMA), with_template(CHATML)
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(other)
    assert tokenizer_fingerprint(one, chat=True) != tokenizer_fingerprint(other, chat=True)


@pytest.fixture
def recipe(directory: Path, make_recipe: MakeRecipe, tmp_path: Path) -> Recipe:
    """Three pairs of sentences for training and one for a test."""
    write_jsonl(tmp_path / "c.jsonl", [(f"sentence {n}", f"Satz {n}") for n in range(12)])
    write_jsonl(tmp_path / "t.jsonl", [("a test", "ein Test")])
    corpora = (CorpusConfig(str(tmp_path / "c.jsonl")), CorpusConfig(str(tmp_path / "t.jsonl"), "test"))
    recipe = make_recipe(*corpora, prompt=CHAT, detect_examples=4)
    config = {"model_type": "llama", "vocab_size": 920, "max_position_embeddings": 256}
    (directory / "config.json").write_text(json.dumps(config))
    return replace(recipe, model=ModelConfig(str(directory)), translate=TranslateConfig(shots=1))


def test_training_and_translation_agree(recipe: Recipe) -> None:
    run = RunDirectory(recipe.run_dir)
    prepare.run(recipe, run)
    data, tokenizer = PreparedData.load(run, recipe), load_tokenizer(recipe.model.path, False)
    ids, length = data.split("train")["en-de"].tokens(0)
    opening = tokenizer.decode(ids[:length])
    assert opening.startswith("<|im_start|><start_of_turn>user\nEnglish to German: sentence")
    assert opening.endswith("<end_of_turn>\n<start_of_turn>model\n")
    assert tokenizer.decode(ids[length:]).endswith("<end_of_turn>")
    for system, turns_shown in (("base", 1), ("fewshot", 2)):
        (request,) = requests_for(system, recipe, data, tokenizer)["en-de"]  # type: ignore[arg-type]
        text = tokenizer.decode(list(request.prompt))
        assert text.count("<start_of_turn>user\nEnglish to German: ") == turns_shown
        assert text.endswith("a test<end_of_turn>\n<start_of_turn>model\n")
        assert request.stop == "<end_of_turn>"


def test_the_end_of_a_turn_ends_a_translation(directory: Path) -> None:
    tokenizer = load_tokenizer(str(directory), trust_remote_code=False)
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    ).eval()
    (end,) = tokenizer("<end_of_turn>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[end] = 0
        model.model.norm.weight.zero_()
    # Every token is as probable as every other, and the first one is taken, unless the end of a turn is put first.
    decoder = Decoder(model, tokenizer, TranslateConfig(max_new_tokens=4))
    model.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([end]), 1.0)
    )
    (stopped,) = decoder.decode([[5, 6]], stop="<end_of_turn>")
    (going_on,) = decoder.decode([[5, 6]])
    assert (stopped.text, stopped.tokens, stopped.truncated) == ("", 1, False)
    assert (going_on.tokens, going_on.truncated) == (4, True)


def test_a_recipe_is_refused_before_anything_runs(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], directory: Path
) -> None:
    tokenizer = load_tokenizer(str(directory), trust_remote_code=False)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "config.json").write_text((directory / "config.json").read_text())
    file = tmp_path / "recipe.yaml"
    content = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tmp_path / "plain")},
        "data": {
            "pairs": ["en-de"],
            "corpora": [{"path": str(tmp_path / "c.jsonl")}],
            "prompt": {"template": "chat", "separator": "x"},
        },
        "deepspeed": "ds.json",
    }
    file.write_text(json.dumps(content))
    assert main(["prepare", "--recipe", str(file)]) == 2
    said = capsys.readouterr().err
    assert "data.prompt.template: chat, but the tokenizer has no chat template" in said.replace("\n", " ")
    assert "separator: has no effect" in said.replace("\n", " ")

"""Checks of the prompt that need the model's tokenizer."""

from __future__ import annotations

from lander_ds.common.errors import ConfigError, ModelError
from lander_ds.config.check import Check
from lander_ds.config.systems import shows_examples, used_systems
from lander_ds.data.tokens.languages import split_pair
from lander_ds.data.tokens.prompt import equal_prompts
from lander_ds.data.tokens.prompt_format import PromptFormat, prompt_format
from lander_ds.data.tokens.text_encoder import TextEncoder
from lander_ds.data.tokens.tokenizer import load_tokenizer
from lander_ds.models.loading import model_positions


def check_prompts(check: Check) -> None:
    """Record a chat template that does not work and few-shot prompts that cannot fit the model; tell what the
    tokenizer and the pairs have twice."""
    recipe = check.recipe
    if check.runs("prepare"):
        _tell_equal_prompts(check)
    fewshot = any(map(shows_examples, used_systems(recipe))) and check.runs("translate")
    if not (fewshot or check.runs("prepare")):
        return
    try:
        encoder = TextEncoder(load_tokenizer(recipe.model.path, recipe.model.trust_remote_code))
        positions = model_positions(recipe.model)
    except ModelError:
        return  # the stage that opens it says so; a recipe can be looked at before its model is fetched
    try:
        form = prompt_format(recipe.data.prompt, encoder.tokenizer)
        shots = recipe.translate.shots if fewshot else recipe.data.prompt.shots
        form.prompt(recipe.data.pairs[0], "", [("", "")] * shots)
    except ConfigError as error:
        key, _, message = str(error).partition(": ")
        check.refuse(key, message)
        return
    if check.runs("prepare"):
        _tell_double_beginning(check, encoder, form)
    if fewshot and positions is not None:
        _check_shots(check, encoder, form, positions)


def _tell_equal_prompts(check: Check) -> None:
    for one, other in equal_prompts(check.recipe.data.prompt, check.recipe.data.pairs):
        if split_pair(one)[1] == split_pair(other)[1]:
            check.warn(
                "data.prompt", f"{one} and {other} get the same prompt; only the source tells them apart"
            )


def _tell_double_beginning(check: Check, encoder: TextEncoder, form: PromptFormat) -> None:
    data = check.recipe.data
    # A chat template is not the recipe's to change.
    if not data.prompt.chat and encoder.begins_itself(form.prompt(data.pairs[0], "", ())):
        check.warn(
            "data.prompt.template",
            "begins with the token that the tokenizer itself puts in front of every text; it is put once, so leave it "
            "out of the template",
        )


def _check_shots(check: Check, encoder: TextEncoder, form: PromptFormat, positions: int) -> None:
    """The length that the template alone gives a few-shot prompt; stage translate knows the examples."""
    translate, data = check.recipe.translate, check.recipe.data
    prompts = [form.prompt(pair, "", [("", "")] * translate.shots) for pair in data.pairs]
    new = translate.max_new_tokens or 1
    needed = max(map(len, encoder.prompts(prompts))) + new - 1
    if needed > positions:
        check.refuse(
            "translate.shots",
            f"{translate.shots} examples need at least {needed} of the model's {positions} positions, with "
            f"translate.max_new_tokens {new}; lower it",
        )

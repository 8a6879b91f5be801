"""Checks of a recipe's `data` that open no file: pairs, corpora, filters, prompt."""

from __future__ import annotations

import re

from lander_ds.config.check import Check
from lander_ds.config.document import nearest
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.data import SACREBLEU, ColumnConfig, CorpusConfig, PromptConfig, TextColumnConfig

_CODE = r"[A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)*"
_PAIR = re.compile(rf"({_CODE})-({_CODE})")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_+-]*")
"""Of a test set: it becomes the name of a directory, and a key of `--set`."""
_PLAIN = re.compile(r"\.txt(\.\w+)?$", re.IGNORECASE)
"""Ends the names of files of plain text."""


def check_data(check: Check) -> None:
    """Record what is wrong with `data`."""
    pairs_are_fine = _check_pairs(check)
    for index, corpus in enumerate(check.recipe.data.corpora):
        _check_corpus(check, f"data.corpora.{index}", corpus)
    _check_min_score(check)
    _check_context(check)
    if pairs_are_fine:
        _check_coverage(check)
        _check_template(check)
        _check_sets(check)
    _check_replay(check)


def served(corpus: CorpusConfig, pairs: tuple[str, ...]) -> tuple[str, ...]:
    """The pairs of the recipe that a corpus serves."""
    return tuple(pair for pair in pairs if not corpus.pairs or pair in corpus.pairs)


def translated_pairs(recipe: Recipe) -> tuple[str, ...]:
    """The pairs that have sentences to translate and to score.

    Every pair is trained, but only some may have a corpus of `translate.split`. Training and detection data are there
    for all.
    """
    data, split = recipe.data, recipe.translate.split
    if split in ("train", "detect"):
        return data.pairs
    corpora = [corpus for corpus in data.corpora if corpus.split == split]
    # Without any, stage translate says what is missing.
    return (
        tuple(p for p in data.pairs if any(p in served(corpus, data.pairs) for corpus in corpora))
        or data.pairs
    )


def is_pair(text: str) -> bool:
    """Whether a text is written like a pair of two languages."""
    match = _PAIR.fullmatch(text)
    return match is not None and match[1] != match[2]


def set_pairs(recipe: Recipe, name: str) -> tuple[str, ...]:
    """The directions of a named test set."""
    return recipe.evaluate.sets[name].pairs or recipe.data.pairs


def evaluated_pairs(recipe: Recipe) -> tuple[str, ...]:
    """Every direction of `data.pairs` and of the test sets, once."""
    of_sets = (pair for name in recipe.evaluate.sets for pair in set_pairs(recipe, name))
    return tuple(dict.fromkeys((*recipe.data.pairs, *of_sets)))


def shown_pairs(recipe: Recipe, corpus: CorpusConfig) -> tuple[str, ...]:
    """The untrained directions for which a corpus of `evaluate.shots` has few-shot examples."""
    return served(corpus, tuple(pair for pair in evaluated_pairs(recipe) if pair not in recipe.data.pairs))


def has_examples(recipe: Recipe, pair: str) -> bool:
    """Whether the recipe says where few-shot examples of a direction come from."""
    return pair in recipe.data.pairs or any(
        pair in shown_pairs(recipe, corpus) for corpus in recipe.evaluate.shots
    )


def _check_pairs(check: Check) -> bool:
    pairs = check.recipe.data.pairs
    if not pairs:
        check.refuse("data.pairs", "no translation direction; write for example pairs: [en-de]")
    return _are_pairs(check, "data.pairs", pairs) and bool(pairs)


def _are_pairs(check: Check, key: str, pairs: tuple[str, ...]) -> bool:
    fine = True
    for index, pair in enumerate(pairs):
        match = _PAIR.fullmatch(pair)
        if not match:
            script = (
                "; write a script or region with an underscore: en-zh_Hans" if pair.count("-") > 1 else ""
            )
            wrong = f"{pair!r} is no pair; write source-target, for example en-de{script}"
        elif match[1] == match[2]:
            wrong = f"{pair}: source and target are the same language; correct one"
        elif pair in pairs[:index]:
            wrong = f"{pair} is given twice; remove one"
        else:
            continue
        fine = False
        check.refuse(f"{key}.{index}", wrong)
    return fine


def _check_sets(check: Check) -> None:
    """The named test sets, and where few-shot examples of their untrained directions come from."""
    recipe = check.recipe
    for name, config in recipe.evaluate.sets.items():
        key = f"evaluate.sets.{name}"
        if not _NAME.fullmatch(name):
            check.refuse(
                key, "a set's name begins with a letter and has letters, digits, _, + and -; rename it"
            )
        _are_pairs(check, f"{key}.pairs", config.pairs)
        _check_source(check, key, config)
    if recipe.evaluate.systems is not None and not recipe.evaluate.sets:
        check.warn("evaluate.systems", "has no effect without evaluate.sets")
    untrained = tuple(pair for pair in evaluated_pairs(recipe) if pair not in recipe.data.pairs)
    for index, corpus in enumerate(recipe.evaluate.shots):
        key = f"evaluate.shots.{index}"
        for number, pair in enumerate(corpus.pairs):
            if pair in recipe.data.pairs:
                check.refuse(
                    f"{key}.pairs.{number}",
                    f"{pair} is among data.pairs: its examples come from its training data; remove it",
                )
            elif pair not in untrained:
                near = nearest(pair, untrained)
                hint = f"did you mean {near}?" if near else "remove it"
                check.refuse(f"{key}.pairs.{number}", f"no set of evaluate.sets has {pair!r}; {hint}")
        if not untrained:
            check.warn(key, "has no effect: every direction of evaluate.sets is among data.pairs")
        _check_source(check, key, corpus)


def _check_replay(check: Check) -> None:
    """Texts without a pair: a share without texts, or texts without a share, is an oversight."""
    replay = check.recipe.data.replay
    if replay.corpora and not replay.share:
        check.refuse("data.replay.share", "0 uses none of data.replay.corpora; write for example share: 0.1")
    if replay.share and not replay.corpora:
        check.refuse(
            "data.replay.corpora", "no corpus to replay; write for example - {path: 'general.en.txt'}"
        )
    for index, corpus in enumerate(replay.corpora):
        key, columns = f"data.replay.corpora.{index}", corpus.columns
        if not corpus.path:
            check.refuse(f"{key}.path", "is empty; name a file or directory")
        check.refuse_placeholders(f"{key}.path", corpus.path, ())
        for name, value in vars(columns).items():
            if value is not None and not value.strip():
                check.refuse(f"{key}.columns.{name}", "is empty; name a column")
        if columns.prompt == columns.text:
            check.refuse(
                f"{key}.columns", f"prompt and text are the same column {columns.text!r}; correct one"
            )
        plain = corpus.format == "text" or (corpus.format == "auto" and _PLAIN.search(corpus.path))
        if plain and columns != TextColumnConfig():
            check.refuse(f"{key}.columns", "files of plain text have no columns; remove it, or use JSONL")


def _check_corpus(check: Check, key: str, corpus: CorpusConfig) -> None:
    pairs = check.recipe.data.pairs
    for number, pair in enumerate(corpus.pairs):
        if pair not in pairs:
            near = nearest(pair, pairs)
            hint = f"did you mean {near}?" if near else f"it has {', '.join(pairs)}"
            check.refuse(f"{key}.pairs.{number}", f"{pair!r} is not among data.pairs; {hint}")
    check.refuse_repeats(f"{key}.pairs", corpus.pairs)
    _check_source(check, key, corpus)


def _check_source(check: Check, key: str, corpus: CorpusConfig) -> None:
    """What is wrong with a corpus, a test set or a source of examples, apart from its pairs."""
    columns = corpus.columns
    if not corpus.path:
        check.refuse(f"{key}.path", "is empty; name a file or directory")
    check.refuse_placeholders(f"{key}.path", corpus.path, ("pair", "src", "tgt"))
    texts = {name: value for name, value in vars(columns).items() if isinstance(value, str)}
    texts |= {f"scores.{index}": name for index, name in enumerate(columns.scores)}
    for name, value in texts.items():
        if not value.strip():
            check.refuse(f"{key}.columns.{name}", "is empty; name a column")
    for index, name in enumerate(columns.scores):
        if name.strip() and name not in check.recipe.data.filters.min_score:
            check.warn(
                f"{key}.columns.scores.{index}", f"has no effect: data.filters.min_score does not have {name}"
            )
    if (
        columns.doc is not None
        and not check.recipe.data.prompt.context
        and corpus.split in ("train", "detect")
    ):
        check.warn(f"{key}.columns.doc", "has no effect: data.prompt.context is 0")
    if columns.rejected is not None:
        if corpus.swap:
            check.refuse(
                f"{key}.columns.rejected",
                "worse translations cannot be swapped with sources; remove it, or swap",
            )
        if check.recipe.train.objective != "cpo" and corpus.split in ("train", "valid"):
            check.warn(f"{key}.columns.rejected", "has no effect on training: train.objective is not cpo")
    check.refuse_placeholders(f"{key}.columns.src", columns.src, ("src", "tgt"))
    check.refuse_placeholders(f"{key}.columns.tgt", columns.tgt, ("src", "tgt"))
    if columns.src == columns.tgt:
        check.refuse(f"{key}.columns", f"src and tgt are the same column {columns.src!r}; correct one")
    if corpus.path.startswith(SACREBLEU):
        if corpus.format != "auto":
            check.refuse(f"{key}.format", "a test set of sacreBLEU needs none; remove it")
        if columns != ColumnConfig():
            check.warn(f"{key}.columns", "has no effect: test sets of sacreBLEU have no columns")
    elif corpus.format == "moses" and columns != ColumnConfig():
        check.warn(f"{key}.columns", "has no effect: Moses files have no columns")


def _check_context(check: Check) -> None:
    """A context needs corpora that know documents."""
    sources = (*check.recipe.data.corpora, *check.recipe.evaluate.sets.values())
    context = check.recipe.data.prompt.context
    if context and not any(one.columns.doc or one.path.startswith(SACREBLEU) for one in sources):
        check.refuse(
            "data.prompt.context",
            f"{context}, but no corpus says which document a line is of; name the column, for example columns: "
            "{doc: doc}",
        )


def _check_min_score(check: Check) -> None:
    """Every threshold needs a corpus that has such a score."""
    recipe = check.recipe
    sources = (*recipe.data.corpora, *recipe.evaluate.sets.values(), *recipe.evaluate.shots)
    known = [name for source in sources for name in source.columns.scores]
    for name in recipe.data.filters.min_score:
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean {near}?" if near else f"write for example columns: {{scores: [{name}]}}"
            check.refuse(
                f"data.filters.min_score.{name}", f"no corpus names that column in columns.scores; {hint}"
            )


def _check_coverage(check: Check) -> None:
    """Every pair needs corpora for what the stage does with it."""
    data = check.recipe.data
    if not data.corpora:
        check.refuse(
            "data.corpora", "no corpus; write for example - {path: 'train.{pair}.jsonl', split: train}"
        )
        return
    if check.runs("prepare", "train", "tokenizer") and (missing := _missing(check, "train")):
        check.refuse(
            "data.corpora", f"no corpus with split: train serves {missing}; add one or drop the pair"
        )
    split = check.recipe.translate.split
    if check.runs("translate") and split in ("test", "valid") and (missing := _missing(check, split)):
        problem = f"no corpus with split: {split} serves {missing}"
        if any(corpus.split == split for corpus in data.corpora):
            check.warn("data.corpora", f"{problem}; translated and scored are the other pairs")
        elif check.stages is not None:
            check.refuse("data.corpora", f"{problem}; add one")
    cut_from_train = not all(_serves(check, "detect", pair) for pair in data.pairs)
    if check.runs("prepare", "detect") and data.detect_examples < 1 and cut_from_train:
        check.refuse(
            "data.detect_examples",
            "must be at least 1 unless a corpus with split: detect serves every pair; raise it or add one",
        )


def _missing(check: Check, split: str) -> str:
    """The pairs that no corpus of a split serves."""
    return ", ".join(pair for pair in check.recipe.data.pairs if not _serves(check, split, pair))


def _serves(check: Check, split: str, pair: str) -> bool:
    data = check.recipe.data
    return any(corpus.split == split and pair in served(corpus, data.pairs) for corpus in data.corpora)


def _check_template(check: Check) -> None:
    data = check.recipe.data
    targets = {pair.partition("-")[2] for pair in data.pairs}
    prompt, default = data.prompt, PromptConfig()
    key, text = "template", prompt.template
    if prompt.chat:
        key, text = "user", prompt.user + prompt.system
    for name in ("target_prefix", "separator") if prompt.chat else ("user", "system"):
        if getattr(prompt, name) != getattr(default, name):
            cause = "the chat template writes turns" if prompt.chat else "it needs template: chat"
            check.warn(f"data.prompt.{name}", f"has no effect: {cause}")
    if len(targets) > 1 and not re.search(r"\{tgt_(name|lang)\}", text):
        check.warn(
            f"data.prompt.{key}",
            "names no target language ({tgt_name} or {tgt_lang}), but the pairs have several",
        )

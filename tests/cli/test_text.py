"""`lander translate --input`: lines in, lines out, from a run and from its exports."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import recipe_for, write_checkpoint
from support.exports import open_trained
from support.tiny_models import save, tiny_model
from support.tiny_translator import tiny_tokenizer

from lander_ds.cli.main import main
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.loading import dump_recipe
from lander_ds.config.recipe import Recipe
from lander_ds.config.schema.data import CorpusConfig
from lander_ds.config.schema.method import LayerChoice, SelectConfig
from lander_ds.config.schema.results import TranslateConfig
from lander_ds.distributed.start import Start
from lander_ds.export.routed import export_routed
from lander_ds.export.writer import Form
from lander_ds.inference import decoding
from lander_ds.inference.open import open_for_inference

LINES = ["w1 w2 w3", "", "w9 w8 w7 w6", "w1 w2 w3", "   ", "w40 w41"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint, its recipe, an export of it, and a text."""
    root = tmp_path_factory.mktemp("text")
    save(tiny_model("llama"), root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    recipe = recipe_of(root)
    write_checkpoint(recipe)
    export_routed(open_trained(recipe), root / "routed", Form())
    (root / "run" / "recipe.resolved.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    (root / "in.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return root


def recipe_of(root: Path) -> Recipe:
    plain = recipe_for(root / "base", root / "run")
    return replace(
        plain,
        data=replace(plain.data, corpora=(CorpusConfig("absent.{pair}.jsonl"),), max_length=48),
        select=SelectConfig(LayerChoice(k=2)),
        translate=TranslateConfig(max_new_tokens=6, batch_size=2),
    )


def lander(root: Path, *flags: str, pair: str = "en-de", source: str | None = None) -> int:
    arguments = ["--run", str(root / "run"), "--pair", pair, "--input", source or str(root / "in.txt")]
    return main(["translate", *arguments, *flags])


def lines(root: Path, *flags: str, **more: str) -> list[str]:
    """What is written for the text."""
    output = root / "out"
    assert lander(root, "--output", str(output), *flags, **more) == 0
    text = output.read_text(encoding="utf-8")
    assert text.endswith("\n")
    assert not list(root.glob("out.*"))
    return text[:-1].split("\n")


def test_as_many_lines_out_as_in(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    translated = lines(root)
    assert len(translated) == len(LINES)
    assert [bool(line) for line in translated] == [bool(line.strip()) for line in LINES]
    assert translated[0] == translated[3] != translated[2]
    # Standard output carries nothing else.
    capsys.readouterr()
    assert lander(root) == 0
    assert capsys.readouterr().out == "\n".join(translated) + "\n"


def scores(root: Path, *flags: str, pair: str = "en-de") -> list[float]:
    """Of the two best translations of every line."""
    rows = [json.loads(line) for line in lines(root, "--n-best", "2", *flags, pair=pair)]
    return [one["score"] for row in rows for one in row["n_best"]]


def test_systems_directions_and_exports(root: Path) -> None:
    export = ("--model", str(root / "routed"))
    systems = {
        "trained": scores(root),
        "base": scores(root, "--system", "base"),
        "another pair": scores(root, pair="en-fr"),
        "untrained": scores(root, "--untrained", pair="en-es"),
    }
    assert len({tuple(values) for values in systems.values()}) == 4
    assert scores(root, *export) == pytest.approx(systems["trained"], rel=1e-5)
    assert scores(root, "--untrained", *export, pair="en-es") == pytest.approx(systems["untrained"], rel=1e-5)


def test_a_pipe(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    expected = lines(root)[0]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"w1 w2 w3")))
    capsys.readouterr()
    assert lander(root, source="-") == 0
    assert capsys.readouterr().out == f"{expected}\n"


def test_line_breaks_inside_segments(root: Path) -> None:
    plain = lines(root)
    rows = [{"id": 7, "src": "w1 w2 w3\n\nw9 w8 w7 w6"}, {"src": ""}, {"src": "w40 w41"}]
    (root / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = [json.loads(line) for line in lines(root, source=str(root / "in.jsonl"))]
    assert [{key: row[key] for key in row if key != "hyp"} for row in written] == rows
    assert [row["hyp"] for row in written] == [f"{plain[0]}\n\n{plain[2]}", "", plain[5]]


def test_lines_before_a_line(root: Path) -> None:
    """The same line has another prompt, and translation, in another document."""
    template = "data.prompt.template='{context}{src} {tgt_lang}'"
    joined = "data.prompt.context_template='{context} '"
    context = [word for one in (template, joined, "data.prompt.context=1") for word in ("--set", one)]
    context += ["--set", "data.corpora.0.columns.doc=doc"]
    asked = json.loads(lines(root, "--prompts", *context)[0])["prompts"]
    tokenizer = tiny_tokenizer()
    texts = [tokenizer.decode(one["ids"], skip_special_tokens=True) for one in asked]
    assert [text.split("de")[0].split() for text in texts] == [
        ["w1", "w2", "w3"],
        ["w9", "w8", "w7", "w6"],
        ["w9", "w8", "w7", "w6", "w1", "w2", "w3"],
        ["w40", "w41"],
    ]
    translated = lines(root, *context)
    assert [bool(line) for line in translated] == [bool(line.strip()) for line in LINES]
    assert scores(root, *context)[4:6] != scores(root, *context)[:2]


def test_the_best_with_their_scores(root: Path) -> None:
    beams = lines(root, "--set", "translate.beams=3")
    written = [json.loads(line) for line in lines(root, "--n-best", "3")]
    assert [row["src"] for row in written] == LINES
    assert [row["hyp"] for row in written] == beams
    for row in written:
        assert len(row["n_best"]) == (3 if row["src"].strip() else 0)
        scores = [one["score"] for one in row["n_best"]]
        assert scores == sorted(scores, reverse=True)
        assert row["hyp"] == (row["n_best"][0]["hyp"] if scores else "")


def test_prompts_for_other_programs(root: Path) -> None:
    plain = lines(root)
    (written,) = lines(root, "--prompts")
    content = json.loads(written)
    assert [(one["line"], one["src"]) for one in content["prompts"]] == [
        (number, line) for number, line in enumerate(LINES, start=1) if line.strip()
    ]
    tokenizer, recipe = tiny_tokenizer(), recipe_of(root)
    start = Start(recipe, RunDirectory(recipe.run_dir))
    model = open_for_inference(start, "trained")
    for one in content["prompts"]:
        assert tokenizer.convert_ids_to_tokens(one["ids"]) == one["tokens"]
        with model.pair("en-de"):
            ids = torch.tensor([one["ids"]], device=model.model.device)
            output = model.model.generate(
                ids, max_new_tokens=6, do_sample=False, eos_token_id=content["end_ids"], pad_token_id=0
            )
        text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert text.partition("\n")[0].strip() == plain[one["line"] - 1]


def test_samples_with_their_scores(root: Path) -> None:
    warm = ("--set", "translate.sampling.temperature=1.0")
    written = [json.loads(line) for line in lines(root, "--n-best", "3", *warm)]
    assert [row["src"] for row in written] == LINES
    # The first sample is the one that is drawn alone, also of a line that stands elsewhere in another batch.
    assert [row["hyp"] for row in written] == lines(root, *warm, "--set", "translate.batch_size=1")
    (root / "other.txt").write_text("\n".join(reversed(LINES)) + "\n", encoding="utf-8")
    again = [json.loads(line) for line in lines(root, "--n-best", "3", *warm, source=str(root / "other.txt"))]
    assert [row["hyp"] for row in reversed(again)] == [row["hyp"] for row in written]
    assert all(len({one["hyp"] for one in row["n_best"]}) == 3 for row in written if row["src"].strip())


@pytest.mark.parametrize("flags", [(), ("--n-best", "2"), ("--set", "translate.sampling.temperature=1.0")])
def test_an_interrupted_translation_goes_on(
    root: Path, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, search, calls = lines(root, *flags), decoding.Decoder.search, []

    def interrupted(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return search(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(decoding.Decoder, "search", interrupted)
    (root / "out").unlink()
    assert lander(root, "--output", str(root / "out"), *flags) != 0
    assert not (root / "out").exists()
    # Three sentences in batches of two: one is left.
    assert lines(root, *flags) == expected
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, (), "absent.txt: no such file: correct the path"),
        (b"", (), "is empty: give at least one line"),
        (b"w1\n\xff\xfe\n", (), "line 2 is not UTF-8"),
        (b"w1\n", ("--jsonl",), "line 1 is not JSON"),
        (b'{"src": "w1"}\n{"tgt": "w1"}\n', ("--jsonl",), 'line 2 has no text under "src"'),
        (b'{"src": "\\ud800"}\n', ("--jsonl",), "line 1 holds half a surrogate pair"),
        (b"w1 " * 80, (), "line 1: its prompt has"),
        (b"w1\n", ("--pair", "en-xx"), "--pair en-xx: the recipe has en-de, en-fr, de-en; add --untrained"),
        (b"w1\n", ("--pair", "german"), "--pair german: is no pair: write source-target, for example en-de"),
        (b"w1\n", ("--output", "absent/out"), "--output absent/out: there is no such directory"),
        (b"w1\n", ("--model", "absent"), "model.path: absent does not exist"),
    ],
)
def test_what_is_refused(
    root: Path,
    content: bytes | None,
    flags: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / ("absent.txt" if content is None else "given.txt")
    if content is not None:
        source.write_bytes(content)
    assert lander(root, *flags, source=str(source)) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert not shown.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pair", "en-de", "--recipe", "x"], "--pair needs --input FILE"),
        (["--prompts", "--recipe", "x"], "--prompts needs --input FILE"),
        ([], "the following arguments are required: --recipe"),
        (["--input", "x", "--pair", "en-de"], "needs either --recipe FILE or --run DIR"),
        (["--input", "x", "--run", "y"], "--input needs --pair PAIR"),
    ],
)
def test_flags_that_belong_together(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["translate", *flags])
    assert message in capsys.readouterr().err

"""Another system's translations as the baseline: file formats, files that do not fit, and what is compared with it."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from lander_ds.common.errors import DataError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import ModelConfig, Recipe
from lander_ds.config.schema.data import DataConfig
from lander_ds.config.schema.results import ScoreConfig, TranslateConfig
from lander_ds.evaluation.baseline import baseline_path, read_baseline
from lander_ds.inference.translations import Translation, write_translations
from lander_ds.report.summary import summarise
from lander_ds.stages import score

PAIRS = ("en-de", "en-fr")
WORDS = ["der", "Zug", "fährt", "morgen", "nach", "Berlin", "und", "hält", "dort", "lange"]
SENTENCES = [Translation(f"en-de:test:{n}", f"source {n}", f"Satz Nummer {n}.", "", 3) for n in range(4)]
TEXTS = ["Satz eins.", "", "Satz\u2028drei.", "Satz vier."]


def lines(**changes: str) -> list[dict[str, str]]:
    """JSON rows of all sentences, the last first."""
    rows = [{"id": item.id, "hyp": hyp} for item, hyp in zip(SENTENCES, TEXTS, strict=True)]
    rows[0] |= changes
    return rows[::-1]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_placeholders() -> None:
    assert baseline_path("other/{pair}/{src}.{tgt}", "en-zh_Hans") == Path("other/en-zh_Hans/en.zh_Hans")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_text_is_read_line_by_line(tmp_path: Path, end: str) -> None:
    text = end.join(TEXTS) + end
    plain, packed = tmp_path / "out.de", tmp_path / "out.de.gz"
    plain.write_bytes(b"\xef\xbb\xbf" + text.encode())
    packed.write_bytes(gzip.compress(text.encode()))
    for path in (plain, packed):
        actual = read_baseline(path, SENTENCES)
        assert [item.hyp for item in actual] == TEXTS
        assert [replace(item, hyp="") for item in actual] == SENTENCES


def test_json_lines_are_matched_by_identifier(tmp_path: Path) -> None:
    assert [item.hyp for item in read_baseline(write(tmp_path / "a.jsonl", lines()), SENTENCES)] == TEXTS
    # The finished translations of another run are such a file, too.
    write_translations(tmp_path / "b.jsonl", [replace(item, hyp="x") for item in SENTENCES])
    assert {item.hyp for item in read_baseline(tmp_path / "b.jsonl", SENTENCES)} == {"x"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "eins\nzwei\n", r"a\.txt has 2 lines, and 4 sentences are scored"),
        ("a.txt", b"eins\nzw\xe4i\nd\nv\n", r"a\.txt, line 2 is not UTF-8"),
        ("a.jsonl", lines()[:-1], r"lacks 1 of the 4 sentences that are scored, such as 'en-de:test:0'"),
        ("a.jsonl", lines(id="en-de:test:9"), r"line 4: 1 ids are not among the 4 .* first 'en-de:test:9'"),
        ("a.jsonl", [*lines(), *lines()[:1]], r"line 5 repeats the id 'en-de:test:3' of line 1"),
        ("a.jsonl", '{"id": "en-de:test:0", "hyp": \n', r"a\.jsonl, line 1 is not JSON"),
        ("a.jsonl", '{"id": "en-de:test:0"}\n', r"line 1 is no translation: write \{\"id\""),
        ("a.jsonl", '["Satz"]\n', r"line 1 is no translation"),
    ],
)
def test_files_that_do_not_fit(
    tmp_path: Path, name: str, content: str | bytes | list[dict[str, str]], message: str
) -> None:
    path = tmp_path / name
    if isinstance(content, list):
        write(path, content)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=rf"score\.baseline: .*{message}"):
        read_baseline(path, SENTENCES)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"score\.baseline: .*none\.txt: no such file"):
        read_baseline(tmp_path / "none.txt", SENTENCES)


@pytest.fixture
def scored(tmp_path: Path) -> tuple[Recipe, RunDirectory]:
    """A run with translations of the base (bad) and the trained system (good), and another system's (as good)."""
    recipe = Recipe(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig("model"),
        data=DataConfig(PAIRS, ()),
        deepspeed="zero3.json",
        translate=TranslateConfig(systems=("base", "trained")),
        score=ScoreConfig(bootstrap_samples=50, ter=False),
    )
    run = RunDirectory(recipe.run_dir)
    generator = random.Random(1)
    for pair in PAIRS:
        references = [" ".join(generator.choices(WORDS, k=8)) for _ in range(20)]
        for system, kept in (("base", 1), ("trained", 6)):
            built = [
                Translation(f"{pair}:test:{n}", "source", text, " ".join(text.split()[:kept]), 5)
                for n, text in enumerate(references)
            ]
            write_translations(run.translations / system / f"{pair}.jsonl", built)
        text = "".join(" ".join(reference.split()[:6]) + "\n" for reference in references)
        (tmp_path / f"other.{pair}.txt").write_text(text, encoding="utf-8")
    return recipe, run


def test_every_system_is_compared_with_the_file(
    scored: tuple[Recipe, RunDirectory], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = scored
    score.run(recipe, run)
    own = json.loads(run.scores.read_text())
    assert (own["baseline"], own["baseline_file"]) == ("base", None)
    assert own["systems"] == ["base", "trained"]
    assert "gain and p over base" in capsys.readouterr().out

    pattern = str(tmp_path / "other.{pair}.txt")
    against = replace(recipe, score=replace(recipe.score, baseline=pattern))
    score.run(against, run)
    actual = json.loads(run.scores.read_text())
    assert (actual["baseline"], actual["baseline_file"]) == ("baseline", pattern)
    assert actual["systems"] == ["baseline", "base", "trained"]
    assert set(actual["mean"]) == set(actual["systems"])
    for pair in PAIRS:
        entry, before = actual["pairs"][pair]["systems"], own["pairs"][pair]["systems"]
        # What a system scores does not depend on what it is compared with; the p-values do.
        assert entry["baseline"]["chrf"] == entry["trained"]["chrf"] == before["trained"]["chrf"]
        for metric in ("bleu", "chrf", "chrfpp"):
            assert f"p_{metric}" not in entry["baseline"]
            assert entry["base"][f"p_{metric}"] < 0.05
            assert actual["pairs"][pair][f"p_{metric}"] == entry["trained"][f"p_{metric}"] == 1.0
            assert own["pairs"][pair][f"p_{metric}"] < 0.05

    figures = summarise(run)
    assert figures["baseline"] == "baseline"
    assert figures["scores"]["en-de"]["base_chrf"] == own["pairs"]["en-de"]["systems"]["base"]["chrf"]
    assert figures["scores"]["en-de"]["baseline_chrf"] == figures["scores"]["en-de"]["chrf"]
    table = capsys.readouterr().out
    assert "gain and p over baseline" in table
    assert "+0.0" in table


def test_a_changed_file_is_scored_again(scored: tuple[Recipe, RunDirectory], tmp_path: Path) -> None:
    recipe, run = scored
    config = ScoreConfig(bootstrap_samples=20, ter=False, baseline=str(tmp_path / "other.{pair}.txt"))
    against = replace(recipe, score=config)
    score.run(against, run)
    first = json.loads(run.scores.read_text())
    stamp = run.scores.stat().st_mtime_ns
    score.run(against, run)
    assert run.scores.stat().st_mtime_ns == stamp
    other = tmp_path / "other.en-de.txt"
    other.write_text(other.read_text(encoding="utf-8").replace("Zug", "Bus"), encoding="utf-8")
    score.run(against, run)
    second = json.loads(run.scores.read_text())
    assert second["pairs"]["en-de"]["systems"]["baseline"] != first["pairs"]["en-de"]["systems"]["baseline"]
    assert second["pairs"]["en-fr"] == first["pairs"]["en-fr"]


def test_a_baseline_without_the_base(scored: tuple[Recipe, RunDirectory], tmp_path: Path) -> None:
    recipe, run = scored
    alone = replace(
        recipe,
        translate=replace(recipe.translate, systems=("trained",)),
        score=replace(recipe.score, baseline=str(tmp_path / "other.{pair}.txt")),
    )
    score.run(alone, run)
    actual = json.loads(run.scores.read_text())
    assert actual["systems"] == ["baseline", "trained"]
    assert actual["pairs"]["en-fr"]["p_chrf"] is not None

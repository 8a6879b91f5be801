"""`lander candidates`: from n-best translations to preferences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sacrebleu.metrics import CHRF

from lander_ds.cli.main import main
from lander_ds.evaluation.candidates import Candidates, preferences, read_candidates
from lander_ds.evaluation.neural_scores import Segment


def line(src: str, tgt: str, *hyps: str, **more: Any) -> dict[str, Any]:
    return {
        "src": src,
        "tgt": tgt,
        "hyp": hyps[0],
        "n_best": [{"hyp": hyp, "score": -1.0} for hyp in hyps],
        **more,
    }


LINES = [
    line("One house.", "Ein Haus.", "Ein Huhn.", "Ein Haus", "Etwas ganz anderes", doc="a"),
    line("One tree.", "Ein Baum.", "Ein Baum.", " Ein Baum. ", ""),
    line("One lake.", "Ein See.", "Ein See!", "Ein See!"),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "candidates.jsonl"
    target.write_text("".join(json.dumps(row) + "\n" for row in LINES))
    return target


def made(path: Path, *options: str) -> list[dict[str, Any]]:
    output = path.with_name("preferred.jsonl")
    assert main(["candidates", str(path), "--output", str(output), *options]) == 0
    return [json.loads(text) for text in output.read_text().splitlines()]


def chrf(hyp: str, ref: str) -> float:
    return float(CHRF().sentence_score(hyp, [ref]).score)


def test_the_reference_against_the_worst(path: Path) -> None:
    house, lake = made(path)
    low = chrf("Etwas ganz anderes", "Ein Haus.")
    assert house == {
        "src": "One house.",
        "tgt": "Ein Haus.",
        "rejected": "Etwas ganz anderes",
        "tgt_score": 100.0,
        "rejected_score": pytest.approx(low),
        "doc": "a",
    }
    assert (lake["tgt"], lake["rejected"]) == ("Ein See.", "Ein See!")


def test_the_best_candidate_against_the_worst(path: Path) -> None:
    (house,) = made(path, "--chosen", "best")
    assert (house["tgt"], house["rejected"]) == ("Ein Haus", "Etwas ganz anderes")
    margin = house["tgt_score"] - house["rejected_score"]
    assert made(path, "--chosen", "best", "--margin", str(margin - 1)) == [house]


def test_of_two_that_are_equally_good_none_is_better() -> None:
    candidates = [Candidates({}, "One house.", "Ein Haus.", ("Das Haus", "Ein Huhn"))]
    scored: list[Segment] = []

    def score(segments: Sequence[Segment]) -> list[float]:
        scored.extend(segments)
        return [0.5 for _ in segments]

    assert list(preferences(candidates, score, "best", 0.0)) == []
    assert [segment.mt for segment in scored] == ["Das Haus", "Ein Huhn"]  # the reference need not be scored
    assert list(preferences(candidates, score, "reference", 0.0)) == []


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", (), "is empty"),
        ("{", (), "line 1 is no JSON object"),
        ("[]", (), 'line 1 lacks a text under "src" or "tgt"'),
        (json.dumps({"src": "a", "tgt": "b"}), (), 'line 1 has no "n_best": translate with --n-best'),
        (json.dumps(LINES[0]), ("--reference", "ref"), 'lacks a text under "src" or "ref"'),
        (json.dumps(LINES[1]), (), "no source has a better and a worse translation"),
        (json.dumps(LINES[0]), ("--margin", "101"), "or lower --margin"),
        (json.dumps(LINES[0]), ("--metric", "comet"), "--metric comet: name the recipe"),
    ],
)
def test_what_is_refused(
    path: Path, capsys: pytest.CaptureFixture[str], text: str, options: tuple[str, ...], message: str
) -> None:
    path.write_text(text)
    output = path.with_name("preferred.jsonl")
    assert main(["candidates", str(path), "--output", str(output), *options]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_a_reference_is_no_candidate(path: Path) -> None:
    _, tree, lake = read_candidates(path, "tgt")
    assert (tree.texts, lake.texts) == ((), ("Ein See!",))

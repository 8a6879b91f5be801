"""Translating is resumable, does not depend on the number of ranks, and never mixes different options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny_translator import (
    CONFIGS,
    COUNTS,
    KEY,
    FailsAfter,
    TinyTranslator,
    requests,
    tiny_tokenizer,
    translate_as_rank,
)
from support.worlds import server

from lander_ds.distributed import process_group
from lander_ds.inference.translate import batches, translate
from lander_ds.inference.translations import read_translations

CONFIG = CONFIGS["greedy"]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of one uninterrupted process, in a directory per way to decode."""
    directory = tmp_path_factory.mktemp("references")
    for name, config in CONFIGS.items():
        translate(TinyTranslator(), tiny_tokenizer(), requests(COUNTS), config, directory / name, KEY)
    return directory


@pytest.fixture(scope="module")
def reference(references: Path) -> Path:
    """Those of greedy search."""
    return references / "greedy"


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_files_hold_every_sentence_in_corpus_order(reference: Path) -> None:
    assert sorted(files(reference)) == ["en-de.jsonl", "en-fr.jsonl"]
    for pair, wanted in requests(COUNTS).items():
        actual = read_translations(reference / f"{pair}.jsonl")
        assert [(t.id, t.src, t.ref) for t in actual] == [(r.id, r.src, r.ref) for r in wanted]
        lines = (reference / f"{pair}.jsonl").read_text().splitlines()
        assert set(json.loads(lines[0])) == {"id", "src", "ref", "hyp", "tokens", "truncated"}


def test_the_model_is_told_every_pair(tmp_path: Path) -> None:
    model = TinyTranslator()
    work = translate(model, tiny_tokenizer(), requests(COUNTS), CONFIG, tmp_path, KEY)
    assert model.pairs == ["en-de", "en-fr"]
    assert work.sentences == 9
    assert work.tokens == sum(
        t.tokens for pair in COUNTS for t in read_translations(tmp_path / f"{pair}.jsonl")
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_an_interrupted_run_goes_on_where_it_stopped(name: str, tmp_path: Path, references: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        translate(FailsAfter(2), tiny_tokenizer(), requests(COUNTS), CONFIGS[name], tmp_path, KEY)
    (partial,) = tmp_path.rglob("en-de.rank-0.jsonl")
    assert len(partial.read_text().splitlines()) == 6
    assert not (tmp_path / "en-de.jsonl").exists()
    # The crash also cut a line short.
    with partial.open("a") as stream:
        stream.write('{"id": "en-de:test:')
    model = FailsAfter(2)
    work = translate(model, tiny_tokenizer(), requests(COUNTS), CONFIGS[name], tmp_path, KEY)
    assert work.sentences == 3
    assert model.calls == 2
    assert files(tmp_path) == files(references / name)


def test_partial_files_of_another_key_are_not_used(tmp_path: Path, reference: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        translate(FailsAfter(2), tiny_tokenizer(), requests(COUNTS), CONFIG, tmp_path, "another key" * 9)
    work = translate(TinyTranslator(), tiny_tokenizer(), requests(COUNTS), CONFIG, tmp_path, KEY)
    assert work.sentences == 9
    assert files(tmp_path) == files(reference)


@pytest.mark.distributed
def test_two_ranks_write_what_one_writes_and_resume_what_one_began(tmp_path: Path, references: Path) -> None:
    for name, config in CONFIGS.items():
        with pytest.raises(KeyboardInterrupt):
            translate(FailsAfter(1), tiny_tokenizer(), requests(COUNTS), config, tmp_path / name, KEY)
    port = process_group.free_port()
    ranks = [server().Process(target=translate_as_rank, args=(tmp_path, rank, 2, port)) for rank in range(2)]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
        assert [process.exitcode for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    assert files(tmp_path) == files(references)


def test_every_rank_gets_the_same_number_of_batches_when_the_model_is_sharded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process_group, "world_size", lambda: 4)
    for count in (1, 2, 5, 8, 13):
        wanted = requests({"en-de": count})["en-de"]
        actual = []
        for rank in range(4):
            monkeypatch.setattr(process_group, "rank", lambda rank=rank: rank)
            actual.append(list(batches(wanted, 2, fill=True)))
        assert len({len(of_rank) for of_rank in actual}) == 1
        real = [
            request for of_rank in actual for batch in of_rank for request in batch.requests[: batch.wanted]
        ]
        assert sorted(request.id for request in real) == sorted(request.id for request in wanted)
        assert all(batch.requests for of_rank in actual for batch in of_rank)

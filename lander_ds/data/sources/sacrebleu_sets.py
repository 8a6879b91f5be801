"""Test sets by sacreBLEU's names: `sacrebleu:wmt23`, from its cache or through its downloader."""

from __future__ import annotations

from pathlib import Path

import portalocker
from sacrebleu.dataset import DATASETS
from sacrebleu.utils import SACREBLEU_DIR

from lander_ds.common.errors import DataError
from lander_ds.config.document import nearest
from lander_ds.config.schema.data import SACREBLEU, CorpusConfig

_PATIENCE = 3600.0
"""Seconds to wait for another process that downloads."""


def sacrebleu_files(path: str, src: str, tgt: str, key: str) -> tuple[Path, ...]:
    """Source and reference of a test set, line by line, and the names of the documents of its lines, where it has them;
    downloaded unless they are in sacreBLEU's cache (`~/.sacrebleu`, or the environment variable `SACREBLEU`). Of several
    references the first by name.

    Args:
        path: `sacrebleu:NAME`.
        src: source language.
        tgt: target language.
        key: where the path stands in the recipe.

    Raises:
        DataError: there is no such test set, it has no such direction, or it is neither in the cache nor to be had.
    """
    name, direction = path.removeprefix(SACREBLEU), f"{src}-{tgt}"
    if name not in DATASETS:
        near = nearest(name, DATASETS)
        hint = f"did you mean {near}?" if near else f"it has {', '.join(sorted(DATASETS))}"
        raise DataError(f"{path}: sacreBLEU has no test set {name!r} ({key}): {hint}")
    dataset = DATASETS[name]
    if direction not in dataset.langpairs:
        raise DataError(
            f"{path}: has no {direction} ({key}): it has {', '.join(sorted(dataset.langpairs))}; set the pairs of this "
            "set, or swap: true to read one of them backwards"
        )
    cache = Path(SACREBLEU_DIR)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # sacreBLEU guards the download, but not what it makes of it; the ranks of a job arrive here together.
        with portalocker.Lock(cache / ".lander.lock", timeout=_PATIENCE):
            source, references = dataset.get_source_file(direction), dataset.get_reference_files(direction)
    # It ends the process when a checksum is wrong, and raises whatever network, archive and parser raise.
    except (Exception, SystemExit) as error:
        reason = "the file has a wrong checksum" if isinstance(error, SystemExit) else error
        raise DataError(
            f"{path}: {direction} is not in sacreBLEU's cache {cache / name} and cannot be made there ({reason}) ({key}): "
            f"run `sacrebleu -t {name} -l {direction} --echo src` where there is a network, and copy the cache or name it "
            "in the environment variable SACREBLEU"
        ) from None
    # Those of WMT21 and later come in no order of their own.
    documents = Path(source).with_suffix(".docid")
    return (Path(source), Path(min(references)), *([documents] if documents.is_file() else []))


def origin(config: CorpusConfig) -> dict[str, str] | None:
    """What sacreBLEU says about a test set: `description`, and `citation` (BibTeX) where it knows one; None for files."""
    if not config.path.startswith(SACREBLEU):
        return None
    dataset = DATASETS[config.path.removeprefix(SACREBLEU)]
    said = {"description": dataset.description, "citation": dataset.citation}
    return {key: text for key, text in said.items() if text}

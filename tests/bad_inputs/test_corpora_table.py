"""Bad corpora and tokenizer directories, and the message each gets: what is wrong, where, and what to do."""

from __future__ import annotations

import gzip
import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lander_ds.common.errors import LanderError
from lander_ds.common.run_directory import RunDirectory
from lander_ds.config.recipe import ModelConfig, Recipe
from lander_ds.config.schema.data import ColumnConfig, CorpusConfig, DataConfig, FilterConfig, PromptConfig
from lander_ds.stages import prepare

GOOD = "".join(json.dumps({"src": f"house {n}", "tgt": f"Haus {n}"}) + "\n" for n in range(20)).encode()
TMX_HEAD = b'<?xml version="1.0"?>\n<tmx version="1.4"><header/><body>\n'


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest tokenizer there is: one token per byte."""
    directory = tmp_path_factory.mktemp("bytes")
    vocabulary = {"<unk>": 0, "<eos>": 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(directory)
    return directory


def run_prepare(directory: Path, model: Path, *corpora: CorpusConfig, **data: Any) -> None:
    options: dict[str, Any] = {"pairs": ("en-de",), "detect_examples": 4} | data
    recipe = Recipe(
        str(directory / "run"), ModelConfig(str(model)), DataConfig(corpora=corpora, **options), "none"
    )
    prepare.run(recipe, RunDirectory(recipe.run_dir))


def file(name: str, content: bytes, **corpus: Any) -> Callable[[Path], CorpusConfig]:
    def make(directory: Path) -> CorpusConfig:
        (directory / name).write_bytes(content)
        return CorpusConfig(str(directory / name), **corpus)

    return make


def missing(name: str, **corpus: Any) -> Callable[[Path], CorpusConfig]:
    return lambda directory: CorpusConfig(str(directory / name), **corpus)


def moses(source: bytes, target: bytes) -> Callable[[Path], CorpusConfig]:
    def make(directory: Path) -> CorpusConfig:
        (directory / "news.en").write_bytes(source)
        (directory / "news.de").write_bytes(target)
        return CorpusConfig(str(directory / "news"))

    return make


def folder(**corpus: Any) -> Callable[[Path], CorpusConfig]:
    def make(directory: Path) -> CorpusConfig:
        (directory / "folder").mkdir()
        (directory / "folder" / "readme.md").write_text("no data")
        return CorpusConfig(str(directory / "folder"), **corpus)

    return make


ONE_LANGUAGE = TMX_HEAD + b'<tu><tuv xml:lang="en"><seg>a</seg></tuv></tu></body></tmx>'
NAMED = ColumnConfig("english", "german")

CORPORA: dict[str, tuple[Callable[[Path], CorpusConfig], str]] = {
    "missing file": (
        missing("a.jsonl"),
        r"a\.jsonl: no such file or directory.*data\.corpora\[0\]\.path.*correct",
    ),
    "missing file of a stated format": (
        missing("a.txt", format="tsv"),
        r"a\.txt: no such file.*correct the path",
    ),
    "empty file": (file("a.jsonl", b""), r"a\.jsonl: is empty \(data\.corpora\[0\]\.path\)"),
    "blank lines only": (file("a.tsv", b"\n\n \n"), r"a\.tsv: is empty"),
    "unknown extension": (file("a.docx", b"x"), r"a\.docx: unknown kind of file.*\.jsonl.*set the format"),
    "not compressed": (file("a.jsonl.gz", GOOD), r"a\.jsonl\.gz: broken \.gz file after line 0.*rename"),
    "truncated gzip": (
        file("a.jsonl.gz", gzip.compress(GOOD)[:-20]),
        r"broken \.gz file after line \d+.*download",
    ),
    "truncated xz": (file("a.jsonl.xz", lzma.compress(GOOD)[:-20]), r"broken \.xz file after line \d+"),
    "garbage zst": (file("a.jsonl.zst", b"nothing of the kind"), r"broken \.zst file after line 0"),
    "compressed but not named so": (file("a.jsonl", gzip.compress(GOOD)), r"not one line holds .*UTF-8"),
    "UTF-16": (
        file("a.jsonl", GOOD.decode().encode("utf-16")),
        r"not one line holds.*check that the file is UTF-8",
    ),
    "JSON array": (
        file("a.json", b'[\n{"src": "a", "tgt": "b"}\n]'),
        r"a\.json: line 1: is a JSON array.*one object per line",
    ),
    "not JSON": (
        file("a.jsonl", b"one\ntwo\n"),
        r"not one line holds a sentence pair \(malformed 2; first: line 1: 'one'",
    ),
    "key never occurs": (
        file("a.jsonl", GOOD, columns=NAMED),
        r"no line has 'english' \(the first has 'src', 'tgt'\)",
    ),
    "nested key never occurs": (
        file("a.jsonl", GOOD, columns=ColumnConfig("translation.{src}", "translation.{tgt}")),
        r"no line has 'translation\.en'.*set data\.corpora\[0\]\.columns",
    ),
    "no row of the language": (
        file("a.jsonl", b'{"src": "a", "tgt": "b", "l": "fr"}\n', columns=ColumnConfig(tgt_lang="l")),
        r"no line is en-de \(found fr\)",
    ),
    "TSV without header": (
        file("a.tsv", b"house\tHaus\n"),
        r"a\.tsv: line 1: no column 'src' in the header.*src: 0, tgt: 1",
    ),
    "TSV with too few columns": (
        file("a.tsv", b"house Haus\n" * 3, columns=ColumnConfig("0", "1")),
        r"not one line holds.*malformed 3",
    ),
    "Moses side missing": (missing("news", format="moses"), r"no Moses pair there.*news\.en and news\.de"),
    "Moses sides of different length": (
        moses(b"a\nb\nc\n", b"d\ne\n"),
        r"news\.en has 3 lines, but .*news\.de has 2: .*line by line",
    ),
    "TMX that is not XML": (file("a.tmx", GOOD), r"a\.tmx: line 1: not well-formed XML"),
    "TMX cut off": (file("a.tmx", TMX_HEAD + b"<tu><tuv>"), r"a\.tmx: line 3: not well-formed XML"),
    "XML that is not TMX": (file("a.tmx", b"<html></html>"), r"its root is <html>, not <tmx>"),
    "TMX of other languages": (file("a.tmx", ONE_LANGUAGE), r"no unit has both en and de \(found en\)"),
    "TMX in an unknown encoding": (
        file("a.tmx", b'<?xml version="1.0" encoding="klingon"?>\n<tmx></tmx>'),
        r"a\.tmx: .*(encoding|convert it)",
    ),
    "empty TMX": (file("a.tmx", TMX_HEAD + b"</body></tmx>"), r"a\.tmx: is empty"),
    "folder without a data set": (folder(), r"folder: `datasets` cannot open it.*parquet"),
    "folder for a file": (folder(format="jsonl"), r"folder: is a directory, but jsonl wants a file"),
    "broken parquet": (file("a.parquet", b"PAR1 broken PAR1"), r"a\.parquet: .*(cannot open|cannot be read)"),
    "everything filtered out": (
        file("a.jsonl", b'{"src": "a", "tgt": "a"}\n'),
        r"nothing is left of 1 lines.*identical 1",
    ),
    "nothing left for training": (
        file("a.jsonl", b"".join(GOOD.splitlines(keepends=True)[:3])),
        r"all 3 examples .* set aside for detection: lower data\.detect_examples",
    ),
    "pair that the recipe lacks": (
        file("a.jsonl", GOOD, pairs=("en-fr",)),
        r"data\.corpora\[0\]\.pairs: 'en-fr' is not",
    ),
}


@pytest.mark.parametrize("case", CORPORA)
def test_bad_corpus(case: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    make, message = CORPORA[case]
    with pytest.raises(LanderError, match=f"(?s){message}"):
        run_prepare(tmp_path, tokenizer_dir, make(tmp_path))
    assert not (tmp_path / "run" / "stages").exists()
    assert not list(tmp_path.glob("run/cache/*"))


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "pair without corpus": (
        {"pairs": ("en-de", "en-fr")},
        r"no corpus with split: train serves en-fr: add one",
    ),
    "template without source": (
        {"prompt": PromptConfig("{tgt_name}:")},
        r"data\.prompt\.template: \{src\} is missing",
    ),
    "unknown language": ({"prompt": PromptConfig(), "pairs": ("en-de", "en-qq")}, r"known for 'qq'"),
    "too many shots": (
        {"prompt": PromptConfig(shots=20)},
        r"data\.prompt\.shots: 20 examples of en-de are wanted",
    ),
    "impossible filter": (
        {"filters": FilterConfig(min_chars=5, max_chars=4)},
        r"data\.filters: min_chars 5 and max_chars 4",
    ),
    "everything too long": (
        {"max_length": 5},
        r"nothing is left of 20 lines.*too_many_tokens 20.*data\.max_length",
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_data_options(case: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    options, message = OPTIONS[case]
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    with pytest.raises(LanderError, match=f"(?s){message}"):
        run_prepare(
            tmp_path, tokenizer_dir, CorpusConfig(str(tmp_path / "a.jsonl"), pairs=("en-de",)), **options
        )
    assert not (tmp_path / "run" / "stages").exists()


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(directory: Path) -> None:
        path = directory / name
        value = json.loads(path.read_text()) if path.exists() else {}
        change(value)
        path.write_text(json.dumps(value))

    return apply


def only(name: str, content: bytes) -> Callable[[Path], object]:
    def apply(directory: Path) -> None:
        for path in directory.iterdir():
            path.unlink()
        (directory / name).write_bytes(content)

    return apply


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"

TOKENIZERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing directory": (shutil.rmtree, r"model: no such directory \(model\.path\)"),
    "no tokenizer": (
        only("config.json", b'{"model_type": "llama"}'),
        r"holds no tokenizer \(tokenizer\.json.*lander tokenizer",
    ),
    "no end of sequence": (
        edit("tokenizer_config.json", lambda config: config.pop("eos_token")),
        r"no end-of-sequence token.*eos_token in tokenizer_config\.json",
    ),
    "vocabulary larger than the embedding": (
        edit("config.json", lambda config: config.update(model_type="llama", vocab_size=200)),
        r"token ids up to 257, but the model's embedding has 200 rows",
    ),
    "nested vocabulary size": (
        edit("config.json", lambda config: config.update(text_config={"vocab_size": 200})),
        r"embedding has 200 rows",
    ),
    "LFS pointer instead of SentencePiece": (
        only("tokenizer.model", LFS_POINTER),
        r"is not a SentencePiece model.*LFS",
    ),
    "empty SentencePiece model": (only("tokenizer.model", b""), r"is not a SentencePiece model"),
    "damaged tokenizer.json": (
        lambda directory: (directory / "tokenizer.json").write_text('{"version": "1.0", "mod'),
        r"its tokenizer cannot be loaded",
    ),
    "damaged config.json": (
        lambda directory: (directory / "config.json").write_text("{"),
        r"model.*cannot be loaded|config\.json: is not valid JSON",
    ),
    "damaged tokenizer_config.json": (
        lambda directory: (directory / "tokenizer_config.json").write_text("[]"),
        r"tokenizer_config\.json: is not a JSON object",
    ),
    "code that may not run": (
        edit(
            "tokenizer_config.json", lambda config: config.update(auto_map={"AutoTokenizer": ["t.T", None]})
        ),
        r"Python code in that directory.*model\.trust_remote_code: true",
    ),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_bad_tokenizer_directory(case: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    spoil, message = TOKENIZERS[case]
    shutil.copytree(tokenizer_dir, tmp_path / "model")
    spoil(tmp_path / "model")
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    with pytest.raises(LanderError, match=f"(?s){message}"):
        run_prepare(tmp_path, tmp_path / "model", CorpusConfig(str(tmp_path / "a.jsonl")))


def test_the_good_case_passes(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Without this the tables above could pass for a wrong reason."""
    run_prepare(tmp_path, tokenizer_dir, file("a.jsonl", GOOD)(tmp_path))
    assert (tmp_path / "run" / "stages" / "prepare.json").exists()

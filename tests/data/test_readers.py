"""Every corpus format, plain and compressed, with the lines that go wrong."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import zstandard

from lander_ds.common.errors import DataError
from lander_ds.config.schema.data import ColumnConfig, CorpusConfig, DataConfig
from lander_ds.data.sources.corpus import resolve
from lander_ds.data.sources.readers import read
from lander_ds.data.sources.rows import Rejection, Row


def read_all(config: CorpusConfig, pair: str = "en-de") -> list[Row | Rejection]:
    (corpus,) = resolve(DataConfig((pair,), (config,)))
    return list(read(corpus))


def texts(items: list[Row | Rejection]) -> list[tuple[int, str, str]]:
    return [(item.line, item.src, item.tgt) for item in items if isinstance(item, Row)]


def rejections(items: list[Row | Rejection]) -> list[tuple[int, str]]:
    return [(item.line, item.reason) for item in items if isinstance(item, Rejection)]


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
    ".bz2": bz2.compress,
}

JSONL = '{"src": "a", "tgt": "ä"}\n{"src": "b c", "tgt": "ß"}\n'.encode()
TSV = "src\ttgt\na\tä\nb c\tß\n".encode()
TMX = """<?xml version="1.0"?><tmx version="1.4"><header/><body>
<tu><tuv xml:lang="en"><seg>a</seg></tuv><tuv xml:lang="de"><seg>ä</seg></tuv></tu>
<tu><tuv xml:lang="en"><seg>b c</seg></tuv><tuv xml:lang="de"><seg>ß</seg></tuv></tu>
</body></tmx>""".encode()


@pytest.mark.parametrize("compression", list(COMPRESS))
@pytest.mark.parametrize(("name", "content"), [("c.jsonl", JSONL), ("c.tsv", TSV), ("c.tmx", TMX)])
def test_formats_and_compressions(tmp_path: Path, name: str, content: bytes, compression: str) -> None:
    path = tmp_path / (name + compression)
    path.write_bytes(COMPRESS[compression](content))
    assert [pair[1:] for pair in texts(read_all(CorpusConfig(str(path))))] == [("a", "ä"), ("b c", "ß")]


@pytest.mark.parametrize("compression", list(COMPRESS))
def test_moses_with_each_side_compressed_or_not(tmp_path: Path, compression: str) -> None:
    (tmp_path / "news.en").write_bytes(b"a\n\nb c\n")
    (tmp_path / f"news.de{compression}").write_bytes(COMPRESS[compression]("ä\n\nß".encode()))
    items = read_all(CorpusConfig(str(tmp_path / "news")))
    assert texts(items) == [(1, "a", "ä"), (2, "", ""), (3, "b c", "ß")]


def test_moses_path_may_name_the_source_side_with_placeholders(tmp_path: Path) -> None:
    (tmp_path / "news.en-de.en.gz").write_bytes(gzip.compress(b"a\n"))
    (tmp_path / "news.en-de.de.gz").write_bytes(gzip.compress(b"b\n"))
    assert texts(read_all(CorpusConfig(str(tmp_path / "news.{pair}.{src}.gz")))) == [(1, "a", "b")]
    assert texts(read_all(CorpusConfig(str(tmp_path / "news.{pair}")))) == [(1, "a", "b")]


def test_swap_reads_the_file_of_the_other_direction(tmp_path: Path) -> None:
    (tmp_path / "c.en-de.jsonl").write_bytes(JSONL)
    items = read_all(CorpusConfig(str(tmp_path / "c.{src}-{tgt}.jsonl"), swap=True), "de-en")
    assert texts(items) == [(1, "ä", "a"), (2, "ß", "b c")]


def test_bad_json_lines_are_rejected_with_their_number(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    lines = [
        b'\xef\xbb\xbf{"src": "a", "tgt": "b"}\r',
        b"{broken",
        b'{"src": "\xff", "tgt": "b"}',
        b"",
        b'{"src": "no target"}',
        b'{"src": 3, "tgt": "b"}',
        b"[1, 2]",
        b'{"src": "\\ud800", "tgt": "b"}',
        b'{"src": "two\\nlines ", "tgt": "d\\te"}',
    ]
    path.write_bytes(b"\n".join(lines))
    items = read_all(CorpusConfig(str(path)))
    assert texts(items) == [(1, "a", "b"), (9, "two lines", "d e")]
    assert rejections(items) == [
        (2, "malformed"),
        (3, "invalid_utf8"),
        (5, "malformed"),
        (6, "malformed"),
        (7, "malformed"),
        (8, "invalid_utf8"),
    ]


def test_unusual_line_separators_do_not_split_lines(tmp_path: Path) -> None:
    (tmp_path / "c.en").write_text("a\u2028b\x0cc\nd\n", encoding="utf-8")
    (tmp_path / "c.de").write_text("e\nf\n", encoding="utf-8")
    assert texts(read_all(CorpusConfig(str(tmp_path / "c")))) == [(1, "a b c", "e"), (2, "d", "f")]


def test_json_columns_with_dots_languages_and_placeholders(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    rows = [
        {"translation": {"en": "a", "de": "b"}, "l1": "en", "l2": "DE"},
        {"translation": {"en": "c", "de": "d"}, "l1": "en", "l2": "fr"},
        {"translation": {"en": "e"}, "l1": "en", "l2": "de"},
        {"translation.en": "f", "translation.de": "g", "l1": "en", "l2": "de"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    columns = ColumnConfig("translation.{src}", "translation.{tgt}", src_lang="l1", tgt_lang="l2")
    items = read_all(CorpusConfig(str(path), columns=columns))
    assert texts(items) == [(1, "a", "b"), (4, "f", "g")]
    assert rejections(items) == [(3, "malformed")]


def test_tsv_by_number_needs_no_header_and_does_not_unquote(tmp_path: Path) -> None:
    path = tmp_path / "c.tsv"
    path.write_text('x\t"a\tb"\n\ny\tc\td\textra\nz\te\nz\tf\tg\n')
    items = read_all(CorpusConfig(str(path), columns=ColumnConfig("1", "2")))
    assert texts(items) == [(1, '"a', 'b"'), (5, "f", "g")]
    assert rejections(items) == [(3, "malformed"), (4, "malformed")]


@pytest.mark.parametrize("stray", [["x\ty\tz"], ["x\ty\tz", "u\tv\tw", "r\ts\tt"], ["alone"]])
def test_most_lines_say_how_wide_a_tsv_without_header_is(tmp_path: Path, stray: list[str]) -> None:
    path = tmp_path / "c.tsv"
    path.write_text("\n".join([*stray, *(f"a {n}\tb {n}" for n in range(30))]))
    items = read_all(CorpusConfig(str(path), columns=ColumnConfig("0", "1")))
    assert [pair[1:] for pair in texts(items)] == [(f"a {n}", f"b {n}") for n in range(30)]
    assert rejections(items) == [(number, "malformed") for number in range(1, len(stray) + 1)]


def test_tsv_by_header_name(tmp_path: Path) -> None:
    path = tmp_path / "c.tsv"
    path.write_text("id\ten\tde\n1\ta\tb\n2\tc\n")
    items = read_all(CorpusConfig(str(path), columns=ColumnConfig("{src}", "{tgt}")))
    assert (texts(items), rejections(items)) == ([(2, "a", "b")], [(3, "malformed")])


def test_unknown_extension_is_read_with_an_explicit_format(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes(JSONL)
    assert len(read_all(CorpusConfig(str(path), format="jsonl"))) == 2


def test_reading_streams(tmp_path: Path) -> None:
    """The first row comes before the rest of the file has been read."""
    path = tmp_path / "c.jsonl"
    path.write_bytes(JSONL * 200_000)
    done: list[int] = []
    (corpus,) = resolve(DataConfig(("en-de",), (CorpusConfig(str(path)),)))
    reader = read(corpus, done.append)
    next(reader)
    assert 0 < sum(done) < path.stat().st_size / 4


def test_progress_adds_up_to_the_size_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(JSONL * 5000))
    done: list[int] = []
    (corpus,) = resolve(DataConfig(("en-de",), (CorpusConfig(str(path)),)))
    assert len(list(read(corpus, done.append))) == 10_000
    assert sum(done) == path.stat().st_size


class TestTmx:
    def test_variants_namespaces_inline_markup_and_other_languages(self, tmp_path: Path) -> None:
        path = tmp_path / "c.tmx"
        path.write_text(
            """<?xml version="1.0" encoding="UTF-8"?>
<tmx xmlns="http://www.lisa.org/tmx14" version="1.4"><header/><body>
<tu><tuv xml:lang="en-US"><seg>Press <bpt i="1">&lt;b&gt;</bpt>OK<ept i="1">&lt;/b&gt;</ept> now</seg></tuv>
<tuv xml:lang="DE_de"><seg>Jetzt <hi>OK</hi> drücken</seg></tuv></tu>
<tu><tuv xml:lang="fr"><seg>x</seg></tuv><tuv xml:lang="en"><seg>y</seg></tuv></tu>
<tu><tuv lang="en-GB"><seg>colour</seg></tuv><tuv lang="en"><seg>color</seg></tuv>
<tuv lang="de"><seg>Farbe</seg></tuv></tu>
</body></tmx>""",
            encoding="utf-8",
        )
        items = read_all(CorpusConfig(str(path)))
        assert texts(items) == [(4, "Press OK now", "Jetzt OK drücken"), (7, "color", "Farbe")]

    def test_other_encodings(self, tmp_path: Path) -> None:
        path = tmp_path / "c.tmx"
        path.write_bytes(TMX.decode().replace("?>", ' encoding="UTF-16"?>', 1).encode("utf-16"))
        assert [t[1:] for t in texts(read_all(CorpusConfig(str(path))))] == [("a", "ä"), ("b c", "ß")]

    def test_an_error_in_the_middle_names_the_line(self, tmp_path: Path) -> None:
        path = tmp_path / "c.tmx"
        path.write_bytes(TMX.replace(b"</seg></tuv></tu>\n</body>", b"</tuv></tu>\n</body>"))
        with pytest.raises(DataError, match=r"c\.tmx: line 3: not well-formed"):
            read_all(CorpusConfig(str(path)))


def test_zstd_with_a_long_window_and_several_frames(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.zst"
    window = zstandard.ZstdCompressionParameters.from_level(1, window_log=31, enable_ldm=True)
    frames = [zstandard.ZstdCompressor(compression_params=window), zstandard.ZstdCompressor()]
    # A stream: where the length is known beforehand, the window is no longer than that.
    compressed = b"".join(
        stream.compress(JSONL) + stream.flush() for stream in (frame.compressobj() for frame in frames)
    )
    path.write_bytes(compressed)
    assert len(texts(read_all(CorpusConfig(str(path))))) == 4
    path.write_bytes(compressed[:-2])
    with pytest.raises(DataError, match=r"broken \.zst file"):
        read_all(CorpusConfig(str(path)))


def test_a_tmx_on_one_line_is_streamed(tmp_path: Path) -> None:
    path = tmp_path / "c.tmx"
    unit = "<tu><tuv xml:lang='en'><seg>one {0}</seg></tuv><tuv xml:lang='de'><seg>eins {0}</seg></tuv></tu>"
    units = 60_000
    with path.open("w") as file:
        file.write("<?xml version='1.0'?><tmx version='1.4'><header/><body>")
        file.writelines(unit.format(number) for number in range(units))
        file.write("</body></tmx>")
    (corpus,) = resolve(DataConfig(("en-de",), (CorpusConfig(str(path)),)))
    tracemalloc.start()
    count = sum(isinstance(item, Row) and item.line == 1 for item in read(corpus))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == units
    # Pieces of 64 KiB as elements; the file has 6 MB.
    assert peak < 3e6

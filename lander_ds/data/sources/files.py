"""Opening corpora: plain, .gz, .bz2, .xz or .zst, line by line, with progress in bytes read from disk."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from lander_ds.common.errors import DataError

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

_ZSTD_BYTES = 1 << 16
"""Compressed bytes that are read at a time; text becomes some four times as many."""

Advance = Callable[[int], None]
"""Called with the number of bytes (of the file as it lies on disk) read since the last call."""


class _CountedFile(io.FileIO):
    """A file that reports how many bytes have been read from it."""

    def __init__(self, path: Path, advance: Advance) -> None:
        super().__init__(path)
        self._advance = advance

    def readinto(self, buffer: bytearray | memoryview, /) -> int | None:  # type: ignore[override]
        count = super().readinto(buffer)
        if count:
            self._advance(count)
        return count


def without_compression(path: Path) -> Path:
    """`path` without the ending of a compression."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path


def read_lines(path: Path, advance: Advance) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of every line, without its line end and without a UTF-8 byte order mark.

    Raises:
        DataError: as `read_raw_lines`.
    """
    for number, line in read_raw_lines(path, advance):
        text = line.rstrip(b"\r\n")
        yield number, text.removeprefix(b"\xef\xbb\xbf") if number == 1 else text


def read_raw_lines(path: Path, advance: Advance, longest: int = -1) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of every line as they stand in the file.

    Args:
        path: the file.
        advance: told of the bytes that were read.
        longest: cut lines into pieces of so many bytes, all of which have the line's number; -1: do not.

    Raises:
        DataError: the file cannot be read, or its compression is broken.
    """
    number, ended = 0, True
    try:
        with (
            io.BufferedReader(_CountedFile(path, advance), 1 << 20) as raw,
            _decompressed(raw, path) as stream,
        ):
            while piece := stream.readline(longest):
                number += ended
                ended = piece.endswith(b"\n")
                yield number, piece
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise _broken(path, number, error) from None
    except OSError as error:
        if path.suffix.lower() in COMPRESSIONS and error.errno is None:
            raise _broken(path, number, error) from None
        raise DataError(f"{path}: cannot be read ({error}): check the file and its permissions") from None


def _decompressed(raw: IO[bytes], path: Path) -> IO[bytes]:
    match path.suffix.lower():
        case ".gz":
            return cast(IO[bytes], gzip.open(raw, "rb"))
        case ".bz2":
            return cast(IO[bytes], bz2.open(raw, "rb"))
        case ".xz":
            return cast(IO[bytes], lzma.open(raw, "rb"))
        case ".zst":
            return cast(IO[bytes], io.BufferedReader(_ZstdFile(raw), 1 << 20))
        case _:
            return raw


class _ZstdFile(io.RawIOBase):
    """What a zstd file holds: several frames one behind the other (pzstd), windows of any size (--long=31), and, unlike
    with zstandard's own reader, an error where the file ends too early."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._begun, self._left = raw, False, b""
        self._frame = self._next_frame()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            if not (compressed := self._frame.unused_data or self._raw.read(_ZSTD_BYTES)):
                if self._begun and not self._frame.eof:
                    raise EOFError("it ends too early")
                return 0
            if self._frame.eof:
                self._frame = self._next_frame()
            self._left, self._begun = self._frame.decompress(compressed), True
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count

    @staticmethod
    def _next_frame() -> zstandard.ZstdDecompressionObj:
        return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def _broken(path: Path, line: int, error: Exception) -> DataError:
    return DataError(
        f"{path}: broken {path.suffix} file after line {line} ({error}): copy or download it again, or "
        "rename it if it is not compressed"
    )

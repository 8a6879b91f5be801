"""Opening corpora: plain, .gz, .xz or .zst, line by line, with progress in bytes read from disk."""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, cast

import pyarrow

from lander_ds.common.errors import DataError

COMPRESSIONS = (".gz", ".xz", ".zst")

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
    """`path` without a .gz, .xz or .zst at its end."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path


def read_lines(path: Path, advance: Advance) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of every line, without its line end and without a UTF-8 byte order mark.

    Raises:
        DataError: as `read_raw_lines`.
    """
    for number, line in read_raw_lines(path, advance):
        text = line.rstrip(b"\r\n")
        yield number, text.removeprefix(b"\xef\xbb\xbf") if number == 1 else text


def read_raw_lines(path: Path, advance: Advance) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of every line as they stand in the file.

    Raises:
        DataError: the file cannot be read, or its compression is broken.
    """
    number = 0
    try:
        with (
            io.BufferedReader(_CountedFile(path, advance), 1 << 20) as raw,
            _decompressed(raw, path) as stream,
        ):
            for number, line in enumerate(stream, start=1):
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
        raise _broken(path, number, error) from None
    except OSError as error:
        if path.suffix.lower() in COMPRESSIONS and error.errno is None:
            raise _broken(path, number, error) from None
        raise DataError(f"{path}: cannot be read ({error}): check the file and its permissions") from None


def _decompressed(raw: IO[bytes], path: Path) -> IO[bytes]:
    match path.suffix.lower():
        case ".gz":
            return cast(IO[bytes], gzip.open(raw, "rb"))
        case ".xz":
            return cast(IO[bytes], lzma.open(raw, "rb"))
        case ".zst":
            # Arrow's reader, unlike some others, refuses a truncated stream and reads concatenated ones.
            compressed = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
            return cast(IO[bytes], io.BufferedReader(compressed, 1 << 20))
        case _:
            return raw


def _broken(path: Path, line: int, error: Exception) -> DataError:
    return DataError(
        f"{path}: broken {path.suffix} file after line {line} ({error}): copy or download it again, or "
        "rename it if it is not compressed"
    )

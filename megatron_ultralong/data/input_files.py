"""Input files of any tool of data preparation: found in folders, opened and decompressed, with one-line
errors."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from megatron_ultralong.errors import UserError
from megatron_ultralong.io.git_lfs import refuse_pointer

COMPRESSIONS = (".gz", ".zst")
REPORTS = ("report.json", "matches.jsonl", "broken.jsonl")
"""Files that decontamination writes next to its output: they quote the text that was removed."""
_LARGEST_WINDOW = 1 << 31  # bytes a zstd decoder may look back: what `zstd --long=31` writes


def compression(path: Path) -> str:
    """One of COMPRESSIONS by the end of the file's name; "" = none."""
    return next((end for end in COMPRESSIONS if path.name.lower().endswith(end)), "")


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, sorted, links followed, without hidden files and decontamination's
    reports."""
    files: set[Path] = set()
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = (
            [] if os.path.realpath(place) in seen else [name for name in folders if not name.startswith(".")]
        )
        seen.add(os.path.realpath(place))
        reports = REPORTS if Path(place, ".decontaminate").is_dir() else ()
        files.update(Path(place, name) for name in names if not name.startswith(".") and name not in reports)
    return sorted(files)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what reading `path` can raise into a UserError; refuse a Git LFS pointer."""
    refuse_pointer(path)
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert it to UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path}: cannot be read: {reason}") from None


def opened(path: Path) -> BufferedReader:
    """Open a file for reading. UserError where that fails."""
    with readable(path):
        return path.open("rb")


def decompressed(file: BinaryIO, compression: str) -> BinaryIO:
    """The content of an open file. compression: one of COMPRESSIONS; "" = none."""
    if compression == ".gz":
        return gzip.open(file)  # type: ignore[return-value]
    if compression == ".zst":
        return io.BufferedReader(_Zstd(file), 1 << 20)  # type: ignore[return-value]
    return file


class _Zstd(io.RawIOBase):
    """Decompressed bytes of a .zst file. zstandard's own stream reader does not notice that a file is
    truncated."""

    def __init__(self, file: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            raise UserError("files in .zst need package zstandard; pip install zstandard") from None

        self._file, self._error = file, zstandard.ZstdError
        self._decoder = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._frame: Any = None
        """The frame being decoded; None between frames."""
        self._input, self._output = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            block = self._input or self._file.read(1 << 16)
            if not block:
                if self._frame is not None:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
                return 0
            self._frame = self._frame or self._decoder.decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(block))
            except self._error as error:
                raise OSError(str(error)) from None
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


def printable(text: str) -> str:
    """The text as UTF-8 can encode it: a lone surrogate as its number."""
    return text.encode("utf-8", "backslashreplace").decode()


def one_line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())

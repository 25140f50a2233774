"""JSON lines, packed or not: the one reader of every file that has a record per line (tables, outputs, replays).

Requests are read by `messcli/files/requests.py`, which goes on after a bad line.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import IO, Any

from messcli.errors import InputError


class BadLine(Exception):
    """What ended the reading, for the caller to tell in its own words.

    Attributes:
        number: of the line, from 1; where `torn`, of the last one that could be read.
        torn: the file itself can't be read on.
    """

    def __init__(self, number: int, why: str, *, torn: bool = False) -> None:
        super().__init__(why)
        self.number = number
        self.torn = torn


def objects(lines: IO[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of each line that isn't empty. Raises BadLine."""
    number = 0
    try:
        for line in lines:
            number += 1
            if line.strip():
                yield number, _object(line, number)
    except (OSError, EOFError, zlib.error) as error:  # a damaged archive shows in the middle of reading
        raise BadLine(number, str(error), torn=True) from error


def _object(line: bytes, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # also what is no UTF-8
        raise BadLine(number, f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadLine(number, "expected an object")
    return value


def unpacked(handle: IO[bytes], path: str) -> IO[bytes]:
    """The bytes in a gzip or zstd file, told by its first ones rather than by its name; others as they are.

    Raises InputError where a library is missing.
    """
    try:
        head = handle.read(4)
        handle.seek(0)
    except OSError:  # a pipe: its name is all there is to go by
        head = b""
    if head.startswith(b"\x1f\x8b") or path.endswith(".gz"):
        return gzip.GzipFile(fileobj=handle)  # type: ignore[return-value]  # reads as IO[bytes], isn't declared so
    if head == b"\x28\xb5\x2f\xfd" or path.endswith(".zst"):
        return _zstd(handle, path)
    return handle


def _zstd(handle: IO[bytes], path: str) -> IO[bytes]:
    try:
        import zstandard
    except ImportError:
        raise InputError(
            f"{path}: reading .zst needs the zstandard package. pip install zstandard, "
            f"or: zstdcat {path} | messcli ... -"
        ) from None

    class Frames(io.RawIOBase):  # its errors as everybody else's
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            try:
                return int(stream.readinto(buffer))
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from None

    stream = zstandard.ZstdDecompressor().stream_reader(handle, read_across_frames=True)
    reader: IO[bytes] = io.BufferedReader(Frames())
    return reader

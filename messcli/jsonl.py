"""JSON lines, packed or not: the one reader of every file that has a JSON value per line.

Lines are parsed by jsonlines; what JSON itself allows, and how long and how deep a line may be, is settled here.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator
from typing import IO, Any

import jsonlines

from messcli.errors import InputError

LONGEST_LINE = 64 << 20  # bytes; a longer line is no record, and must not fill the memory
_DEEPEST = 100  # levels of nesting; Python's own limit depends on its version and on who calls


class BadLine(Exception):
    """A line that holds no JSON value; its text says why.

    Attributes:
        number: of the line, from 1.
        raw: the line, or the beginning of one that is too long.
        ended: by a line end; the last line of a file that is being written isn't.
        too_long: longer than LONGEST_LINE bytes.
    """

    def __init__(
        self, number: int, why: str, raw: bytes = b"", *, ended: bool = True, too_long: bool = False
    ) -> None:
        super().__init__(why)
        self.number = number
        self.raw = raw
        self.ended = ended
        self.too_long = too_long


class TornFile(Exception):
    """The file can't be read on, as a damaged archive can't; `number` is its last line that could be."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(why)
        self.number = number


class Lines:
    """Iterates over a handle's lines, the empty ones too; remembers which is in hand and whether it is whole.

    Of a line that is too long only the first 1,000 bytes are given. Raises TornFile.
    """

    def __init__(self, handle: IO[bytes]) -> None:
        self._handle = handle
        self.number = 0
        self.too_long = False
        self.ended = True

    def __iter__(self) -> Iterator[bytes]:
        while line := self._read():
            self.number += 1
            self.ended = line.endswith(b"\n")
            self.too_long = not self.ended and len(line) > LONGEST_LINE
            yield line[:1000] if self.too_long else line
            while self.too_long and line and not line.endswith(b"\n"):
                line = self._read()

    def _read(self) -> bytes:
        try:
            return self._handle.readline(LONGEST_LINE + 1)
        except (OSError, EOFError, zlib.error) as error:  # a damaged archive shows in the middle of reading
            raise TornFile(self.number, str(error)) from error


def values(handle: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """Number and value of each line that isn't empty; a BadLine stands for a value that isn't there.

    Raises TornFile.
    """
    lines = Lines(handle)
    reader = jsonlines.Reader(lines, loads=decoded)
    while True:
        value: Any
        try:
            value = reader.read(skip_empty=True, allow_none=True)
        except EOFError:
            return
        except jsonlines.InvalidLineError as error:
            raw = error.line if isinstance(error.line, bytes) else error.line.encode("utf-8", "replace")
            why = _why_invalid(error.__cause__, too_long=lines.too_long)
            value = BadLine(lines.number, why, raw, ended=lines.ended, too_long=lines.too_long)
        yield lines.number, value


def objects(handle: IO[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of each line that isn't empty. Raises BadLine at the first that holds none, TornFile."""
    for number, value in values(handle):
        if isinstance(value, BadLine):
            raise value
        if not isinstance(value, dict):
            raise BadLine(number, "expected an object")
        yield number, value


def _why_invalid(cause: BaseException | None, *, too_long: bool) -> str:
    if too_long:
        return f"longer than {LONGEST_LINE >> 20} MB. Is the file JSON lines, one object per line?"
    if isinstance(cause, UnicodeDecodeError):
        return f"not valid UTF-8 (byte {cause.start + 1}). Convert it, for example with iconv"
    what = (
        f"{cause.msg.removesuffix(' at')} at column {cause.colno}"
        if isinstance(cause, json.JSONDecodeError)
        else str(cause)
    )
    return f"not valid JSON: {what}"


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


def decoded(text: str | bytes) -> Any:
    """json.loads of what comes from outside: takes no NaN and no infinity (no JSON).

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        value = _DECODER.decode(text if isinstance(text, str) else text.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    brackets = text.count("[") + text.count("{") if isinstance(text, str) else _DEEPEST
    if brackets >= _DEEPEST and _depth(value) > _DEEPEST:
        raise ValueError(f"nested more than {_DEEPEST} levels deep")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON; write null")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:20]} is too large a number")
    return number


# made once: it is called for every line
_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        level = inner
    return depth

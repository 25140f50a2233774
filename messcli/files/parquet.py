"""Parquet files as JSON lines: a row is a line, so that everything that reads lines reads them."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from messcli.errors import InputError, first_line

_ROWS = 256  # made into lines at a time


def parquet_rows(path: str) -> int | None:
    """How many rows a Parquet file has; None: it is none, or can't be read here."""
    try:
        with Path(path).open("rb") as handle:
            return int(_open(handle, path).metadata.num_rows) if handle.read(4) == b"PAR1" else None
    except (OSError, InputError):
        return None


def parquet_lines(handle: IO[bytes], path: str) -> IO[bytes]:
    """The rows as JSON lines. Dates become ISO text, bytes base64, numbers that JSON lacks null.

    Raises InputError where pyarrow isn't installed or the file is damaged.
    """
    reader: IO[bytes] = io.BufferedReader(_Lines(_open(handle, path), path))
    return reader


def _open(handle: IO[bytes], path: str) -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            f"{path}: is Parquet, and reading it needs pyarrow. pip install 'messcli[parquet]'"
        ) from None
    handle.seek(0)
    try:
        return parquet.ParquetFile(handle)
    except Exception as error:  # pyarrow raises a dozen kinds, not all of them its own
        raise InputError(f"{path}: is damaged Parquet: {first_line(error)}. Copy or write it again") from None


class _Lines(io.RawIOBase):
    def __init__(self, file: Any, path: str) -> None:
        self._lines = self._all(file, path)
        self._left = memoryview(b"")

    def _all(self, file: Any, path: str) -> Iterator[bytes]:
        try:
            for batch in file.iter_batches(batch_size=_ROWS):
                for row in batch.to_pylist():
                    yield json.dumps(_plain(row), ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        except Exception as error:  # pyarrow raises a dozen kinds, not all of them its own
            raise OSError(first_line(error)) from None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            self._left = memoryview(next(self._lines, b""))
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)

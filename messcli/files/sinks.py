"""Where rows go: a plain file, a gzip file, or standard output. Knows bytes, not what a row means.

Handles are unbuffered: what `write` returned from is with the operating system, and closing can't fail.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Sequence
from contextlib import suppress
from io import RawIOBase
from pathlib import Path
from typing import Any, Protocol

from messcli.errors import MessError, UsageError
from messcli.files.standard import data_output

STDOUT = "-"


class Sink(Protocol):
    """Takes rows in order. What `sync` told survives a power cut; what lies beyond may be torn."""

    def write(self, lines: Sequence[str]) -> None:
        """Take the next rows, without their newlines."""
        ...

    def sync(self) -> tuple[int, int]:
        """Force to disk what can be; return (bytes of the whole output, rows since opening) that are safe."""
        ...

    def finish(self) -> None:
        """The input has ended: write what was held back."""
        ...

    def close(self) -> None:
        """Let go of it; what is held back stays unwritten."""
        ...


class FileSink:
    """A plain file: every row that was written is safe after `sync`."""

    def __init__(self, handle: RawIOBase) -> None:
        self._handle = handle
        self._rows = 0

    def write(self, lines: Sequence[str]) -> None:
        _write_all(self._handle, "".join(f"{line}\n" for line in lines).encode())
        self._rows += len(lines)

    def sync(self) -> tuple[int, int]:
        os.fsync(self._handle.fileno())
        return self._handle.tell(), self._rows

    def finish(self) -> None:
        pass

    def close(self) -> None:
        self._handle.close()


class GzipSink:
    """A gzip file made of members of `MEMBER` rows each, so that it can be cut and continued between them."""

    MEMBER = 512

    def __init__(self, handle: RawIOBase) -> None:
        self._handle = handle
        self._pending: list[str] = []
        self._rows = 0

    def write(self, lines: Sequence[str]) -> None:
        self._pending.extend(lines)
        while len(self._pending) >= self.MEMBER:
            self._write_member(self._pending[: self.MEMBER])
            del self._pending[: self.MEMBER]

    def _write_member(self, lines: list[str]) -> None:
        # No time stamp: the same rows give the same bytes.
        _write_all(self._handle, gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))
        self._rows += len(lines)

    def sync(self) -> tuple[int, int]:
        os.fsync(self._handle.fileno())
        return self._handle.tell(), self._rows

    def finish(self) -> None:
        if self._pending:
            self._write_member(self._pending)
            self._pending = []

    def close(self) -> None:
        self._handle.close()


class StandardOutput:
    """Rows for a pipe. Raises BrokenPipeError when the reader has gone."""

    def __init__(self) -> None:
        self._handle = data_output()
        self._rows = 0

    def write(self, lines: Sequence[str]) -> None:
        _write_all(self._handle, "".join(f"{line}\n" for line in lines).encode())
        self._rows += len(lines)

    def sync(self) -> tuple[int, int]:
        return 0, self._rows

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


def open_sink(output: str, keep_bytes: int, *, torn: bool) -> Sink:
    """The sink for `output`, cut back to `keep_bytes`; "-" is standard output.

    Args:
        keep_bytes: how much of the file is known to be good.
        torn: whether more may follow, as after a crash. A file that was closed and has grown since then
            holds somebody else's work, which is not cut off.

    Raises:
        UsageError: it is no regular file.
        MessError: it can't be written, or its length isn't what it must be.
    """
    if output == STDOUT:
        return StandardOutput()
    path = Path(output)
    if path.suffix == ".zst":
        raise UsageError(f"{output}: .zst isn't written. Take .gz, or: -o - | zstd > {output}")
    if path.exists() and not path.is_file():
        raise UsageError(f"{output}: is no regular file. Name a file, or: -o - > {output}")
    handle = _open_cut(path, keep_bytes, torn=torn)
    return GzipSink(handle) if path.suffix == ".gz" else FileSink(handle)


def _open_cut(path: Path, keep_bytes: int, *, torn: bool) -> RawIOBase:
    elsewhere = "or route anew with another output and another --state"
    try:
        is_new = not path.exists()
        if is_new and keep_bytes:
            raise MessError(
                f"{path}: {keep_bytes} bytes of finished rows should be here, and the file is gone. "
                f"Put it back, {elsewhere}"
            )
        handle: Any = path.open("w+b" if is_new else "r+b", buffering=0)
        try:
            size = handle.seek(0, os.SEEK_END)
            if size < keep_bytes:
                raise MessError(
                    f"{path}: has {size} bytes, and {keep_bytes} bytes of finished rows should be here. "
                    f"Put the file back as it was, {elsewhere}"
                )
            if size > keep_bytes and not torn:
                raise MessError(
                    f"{path}: was changed since messcli closed it: {size} bytes instead of {keep_bytes}. "
                    f"Put the file back as it was, {elsewhere}"
                )
            if keep_bytes and path.suffix != ".gz":
                handle.seek(keep_bytes - 1)
                if handle.read(1) != b"\n":
                    raise MessError(
                        f"{path}: was changed: no row ends at byte {keep_bytes}, where one did. "
                        f"Put the file back as it was, {elsewhere}"
                    )
            if size > keep_bytes:
                handle.truncate(keep_bytes)
            handle.seek(keep_bytes)
        except BaseException:
            handle.close()
            raise
        if is_new:
            sync_folder(path)
    except OSError as error:
        raise MessError(
            f"{path}: can't be written: {error.strerror}. Give a writable place with -o"
        ) from None
    opened: RawIOBase = handle
    return opened


def write_text(path: Path, text: str, option: str) -> None:
    """Write a file the user asked for by `option`; raises MessError where that can't be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MessError(
            f"{path}: can't be written: {error.strerror}. Give a writable place with {option}"
        ) from None


def sync_folder(path: Path) -> None:
    """Make a new file's name survive a power cut, where the file system can."""
    with suppress(OSError):  # some network file systems don't sync folders, and some folders can't be read
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _write_all(handle: Any, data: bytes) -> None:
    """A raw write may take a part only: a signal came, or the disk is nearly full."""
    rest = memoryview(data)
    while rest:
        written = handle.write(rest)
        if written is None:
            raise BlockingIOError("it takes no more for now, and is set not to wait")
        rest = rest[written:]

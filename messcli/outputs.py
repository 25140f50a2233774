"""Where rows go: a plain file, a gzip file, or standard output. Knows bytes, not what a row means."""

from __future__ import annotations

import gzip
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Protocol

from messcli.errors import MessError

STDOUT = "-"


class Sink(Protocol):
    """Takes rows in order. What `sync` told survives a power cut; what lies beyond may be torn."""

    def write(self, lines: Sequence[str]) -> None: ...

    def sync(self) -> tuple[int, int]:
        """Force to disk what can be; return (bytes of the whole output, rows since opening) that are safe."""
        ...

    def finish(self) -> None:
        """The input has ended: write what was held back."""
        ...

    def close(self) -> None: ...


class FileSink:
    """A plain file: every row that was written is safe after `sync`."""

    def __init__(self, path: Path, keep_bytes: int) -> None:
        self._handle = _open_cut(path, keep_bytes)
        self._rows = 0

    def write(self, lines: Sequence[str]) -> None:
        self._handle.write("".join(f"{line}\n" for line in lines).encode())
        self._handle.flush()  # `tail -f` shows a row as soon as it is committed
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

    def __init__(self, path: Path, keep_bytes: int) -> None:
        self._handle = _open_cut(path, keep_bytes)
        self._pending: list[str] = []
        self._rows = 0

    def write(self, lines: Sequence[str]) -> None:
        self._pending.extend(lines)
        while len(self._pending) >= self.MEMBER:
            self._write_member(self._pending[: self.MEMBER])
            del self._pending[: self.MEMBER]

    def _write_member(self, lines: list[str]) -> None:
        # No time stamp: the same rows give the same bytes.
        self._handle.write(gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))
        self._handle.flush()
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
        self._rows = 0

    def write(self, lines: Sequence[str]) -> None:
        sys.stdout.buffer.write("".join(f"{line}\n" for line in lines).encode())
        sys.stdout.buffer.flush()
        self._rows += len(lines)

    def sync(self) -> tuple[int, int]:
        return 0, self._rows

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


def open_sink(output: str, keep_bytes: int) -> Sink:
    """The sink for `output`, cut back to `keep_bytes`; "-" is standard output.

    Raises:
        MessError: the file can't be written, or is shorter than what is known to have been in it.
    """
    if output == STDOUT:
        return StandardOutput()
    path = Path(output)
    return GzipSink(path, keep_bytes) if path.suffix == ".gz" else FileSink(path, keep_bytes)


def _open_cut(path: Path, keep_bytes: int) -> IO[bytes]:
    try:
        handle = path.open("r+b" if path.exists() else "w+b")
        if handle.seek(0, os.SEEK_END) < keep_bytes:
            handle.close()
            raise MessError(
                f"{path}: {keep_bytes} bytes of finished rows should be here, and aren't. Put the file back, "
                "or route anew with another output and another --state"
            )
        handle.truncate(keep_bytes)
        handle.seek(keep_bytes)
        if keep_bytes == 0:
            _sync_folder(path)  # so that the new file's name survives a power cut as well
    except OSError as error:
        raise MessError(
            f"{path}: can't be written: {error.strerror}. Give a writable place with -o"
        ) from None
    return handle


def _sync_folder(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

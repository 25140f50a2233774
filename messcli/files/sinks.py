"""Where rows go: a plain file, a gzip file, or standard output. Knows bytes, not what a row means.

Handles are unbuffered: what `write` returned from is with the operating system, and closing can't fail.
"""

from __future__ import annotations

import fcntl
import gzip
import os
import random
import stat
import time
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import RawIOBase
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from messcli.errors import MessError, StateBusy, UsageError
from messcli.files.standard import data_output

SQLITE = b"SQLite format 3\0"  # how a state begins

STDOUT = "-"


class Safe(NamedTuple):
    """What is known to be on disk."""

    size: int  # bytes of the whole output
    rows: int  # since opening
    checksum: int  # CRC-32 of the bytes since the sync before


class Part(NamedTuple):
    """A stretch of an output as it was written."""

    begin: int  # bytes
    end: int
    checksum: int  # CRC-32


class Sink(Protocol):
    """Takes rows in order. What `sync` told survives a power cut; what lies beyond may be torn."""

    def write(self, lines: Sequence[str]) -> None:
        """Take the next rows, without their newlines."""
        ...

    def sync(self) -> Safe:
        """Force to disk what can be, and say how much that is."""
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
        self._rows = self._checksum = 0

    def write(self, lines: Sequence[str]) -> None:
        data = "".join(f"{line}\n" for line in lines).encode()
        _write_all(self._handle, data)
        self._checksum = zlib.crc32(data, self._checksum)
        self._rows += len(lines)

    def sync(self) -> Safe:
        os.fsync(self._handle.fileno())
        checksum, self._checksum = self._checksum, 0
        return Safe(self._handle.tell(), self._rows, checksum)

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
        self._rows = self._checksum = 0

    def write(self, lines: Sequence[str]) -> None:
        self._pending.extend(lines)
        while len(self._pending) >= self.MEMBER:
            self._write_member(self._pending[: self.MEMBER])
            del self._pending[: self.MEMBER]

    def _write_member(self, lines: list[str]) -> None:
        # No time stamp: the same rows give the same bytes.
        data = gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0)
        _write_all(self._handle, data)
        self._checksum = zlib.crc32(data, self._checksum)
        self._rows += len(lines)

    def sync(self) -> Safe:
        os.fsync(self._handle.fileno())
        checksum, self._checksum = self._checksum, 0
        return Safe(self._handle.tell(), self._rows, checksum)

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
        if _ends_torn(
            self._handle
        ):  # a file, and its last writer was killed: the next row isn't the rest of that one
            _write_all(self._handle, b"\n")

    def write(self, lines: Sequence[str]) -> None:
        _write_all(self._handle, "".join(f"{line}\n" for line in lines).encode())
        self._rows += len(lines)

    def sync(self) -> Safe:
        return Safe(0, self._rows, 0)

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


def open_sink(output: str, keep_bytes: int, *, torn: bool, parts: Sequence[Part] = ()) -> Sink:
    """The sink for `output`, cut back to `keep_bytes`; "-" is standard output.

    Args:
        keep_bytes: how much of the file is known to be good.
        torn: whether more may follow, as after a crash. A file that was closed and has grown since then
            holds somebody else's work, which is not cut off.
        parts: what the file held; as many of them are compared as take a second.

    Raises:
        StateBusy: another process is writing it.
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
    handle = _open_cut(path, keep_bytes, torn=torn, parts=parts)
    return GzipSink(handle) if path.suffix == ".gz" else FileSink(handle)


def open_beside(path: Path, beside: Path) -> Sink:
    """A sink for a new file that is to take the place of `path`; another one that it finds is written over."""
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    handle: Any = os.fdopen(os.open(beside, flags, 0o666), "r+b", buffering=0)
    try:
        os.fchmod(handle.fileno(), stat.S_IMODE(path.stat().st_mode))
        _lock(handle, path)
    except BaseException:
        handle.close()
        raise
    return GzipSink(handle) if path.suffix == ".gz" else FileSink(handle)


@contextmanager
def opened_rows(path: Path) -> Iterator[Iterator[str]]:
    """The rows of a file that a sink wrote, without their newlines."""
    with path.open("rb") as file:
        handle: Any = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
        yield (line[:-1].decode() for line in handle)


def _open_cut(path: Path, keep_bytes: int, *, torn: bool, parts: Sequence[Part]) -> RawIOBase:
    elsewhere = "or route anew with another output and another --state"
    try:
        is_new = not path.exists()
        if is_new and keep_bytes:
            raise MessError(
                f"{path}: {keep_bytes} bytes of finished rows should be here, and the file is gone. "
                f"Put it back, {elsewhere}"
            )
        # never truncated on opening: another process may have begun to write it just now
        handle: Any = os.fdopen(
            os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0
        )
        try:
            _lock(handle, path)
        except BaseException:
            handle.close()
            raise
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
            if (changed := changed_part(handle, parts)) is not None:
                raise MessError(
                    f"{path}: was changed: bytes {changed.begin} to {changed.end} aren't what messcli wrote. "
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


def _lock(handle: Any, path: Path) -> None:
    """Hold the file alone, as long as it is open. Raises StateBusy."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StateBusy(
            f"{path}: another process is writing it. Let it end, or name another output and --state"
        ) from None
    except OSError:  # a file system without locks: the state's own is what there is
        return
    ours = weakref.ref(handle)
    os.register_at_fork(after_in_child=lambda: _let_go(ours()))


def _let_go(handle: Any) -> None:
    """A forked child has the lock too, and may outlive us."""
    if handle is not None:
        handle.close()


def _ends_torn(handle: Any) -> bool:
    """Whether rows would go behind a line without an end."""
    try:
        number = handle.fileno()
        if not stat.S_ISREG(os.fstat(number).st_mode):
            return False
        appends = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_APPEND
        end = os.fstat(number).st_size if appends else os.lseek(number, 0, os.SEEK_CUR)
        if not end:
            return False
        with Path(f"/proc/self/fd/{number}").open("rb") as file:  # it is open for writing only
            file.seek(end - 1)
            return file.read(1) != b"\n"
    except (OSError, ValueError):  # no descriptor, or none that can be looked at
        return False


CHECK_SECONDS = 1.0  # at about 1 GB/s


def changed_part(file: Any, parts: Sequence[Part], seconds: float = CHECK_SECONDS) -> Part | None:
    """A part of an open file that isn't as it was written: the last one first, then others by chance, for so long."""
    until = time.monotonic() + seconds
    for part in [*parts[-1:], *random.sample(parts[:-1], len(parts[:-1]))]:
        if _checksum_of(file, part.begin, part.end) != part.checksum:
            return part
        if time.monotonic() > until:
            break
    return None


def _checksum_of(file: Any, begin: int, end: int) -> int:
    """CRC-32 of the bytes from `begin` to `end` of an open file."""
    file.seek(begin)
    checksum, left = 0, end - begin
    while left and (data := file.read(min(left, 1 << 20))):
        checksum = zlib.crc32(data, checksum)
        left -= len(data)
    return checksum


def write_text(path: Path, text: str, option: str, *, read: Iterable[str | None] = ()) -> None:
    """Write a file the user asked for by `option`.

    Args:
        read: what else the command works with. Neither that nor a state is written over.

    Raises:
        UsageError: it would be.
        MessError: it can't be written.
    """
    with suppress(OSError):
        if any(one is not None and Path(one).exists() and path.samefile(one) for one in read):
            raise UsageError(f"{option} {path}: is a file of this command already. Give it another name")
        if path.is_file():
            with path.open("rb") as file:
                is_state = file.read(len(SQLITE)) == SQLITE
            if is_state:
                raise UsageError(f"{option} {path}: is a state. Give it another name")
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

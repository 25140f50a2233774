"""Advisory locks: one process at a time for a state, and for an output. The kernel drops them when a process dies.

Nothing that isn't a lock of messcli's is written to or deleted, whatever its name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import stat
import time
import weakref
from pathlib import Path

from messcli.errors import StateBusy, StateError

# A dead holder's text may be longer than its successor's, which is written over it before it is cut.
_OURS = re.compile(rb"process \d+ on ")
_LONGEST = 4096  # bytes that a lock's text may have; any longer file is none


class Lock:
    """An advisory lock beside a state, held by one process.

    Args:
        path: the lock file; created where it isn't there.
        held: what is locked, for messages.
        wait_seconds: how long to wait for another process to let go.

    Raises:
        StateBusy: another process holds it.
        StateError: it can't be created, or a file of that name is somebody else's.
    """

    def __init__(self, path: Path, held: str, wait_seconds: float) -> None:
        self._path = path
        deadline = time.monotonic() + wait_seconds
        while True:
            self._handle = self._open()
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                text = os.pread(self._handle, 200, 0).decode("utf-8", "replace")
                holder = text.partition("\n")[0] or "another process"
                os.close(self._handle)
                if time.monotonic() >= deadline:
                    raise StateBusy(
                        f"{held}: in use by {holder}. Wait for it with --wait SECONDS, or use another --state"
                    ) from None
                time.sleep(min(0.1, max(0.0, deadline - time.monotonic())))
                continue
            # The holder before us may have deleted the file that we have just locked.
            if self._is_current():
                break
            os.close(self._handle)
        # Written before it is cut, so that it is never seen empty.
        os.ftruncate(self._handle, os.pwrite(self._handle, _holder(), 0))
        forget_in_children(self)

    def _open(self) -> int:
        try:
            # Never through a link: what it points to isn't ours. A pipe must not make us wait.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            handle = os.open(self._path, flags, 0o644)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise self._not_ours() from None
            raise StateError(
                f"{self._path}: can't be created: {error.strerror}. Give --state (and the output) an existing, "
                "writable folder"
            ) from None
        if not _is_lock(handle):
            os.close(handle)
            raise self._not_ours()
        return handle

    def _not_ours(self) -> StateError:
        return StateError(
            f"{self._path}: the state's lock would be here, and this is none of messcli's; it was left as it is. "
            "Move it away, or name another --state"
        )

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._handle), self._path.lstat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let another process have it, and remove the file."""
        if self._handle >= 0 and self._is_current():
            self._path.unlink(missing_ok=True)
        self.drop()

    def drop(self) -> None:
        """Close without touching the file: a child's part."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def forget_in_children(lock: Lock) -> None:
    """A forked child shares the lock, and may outlive us; an executed one doesn't (O_CLOEXEC)."""
    ours = weakref.ref(lock)
    os.register_at_fork(after_in_child=lambda: _let_go(ours()))


def _let_go(lock: Lock | None) -> None:
    if lock:
        lock.drop()


def _is_lock(handle: int) -> bool:
    """Whether it is a regular file that is empty, as a lock of a process that died early, or says a holder."""
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_size > _LONGEST:
        return False
    text = os.pread(handle, _LONGEST, 0)
    return not text or _OURS.match(text) is not None


def _holder() -> bytes:
    return f"process {os.getpid()} on {socket.gethostname()}\n".encode()

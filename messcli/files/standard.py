"""Standard output, kept for data: while it is reserved, what libraries and metrics print goes to standard error.

Knows descriptors; knows nothing of rows or terminals.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

from messcli.errors import MessError

_reserved: Any = None  # the handle, while it is reserved


def data_output() -> Any:
    """Standard output, unbuffered and for bytes: rows that a full disk refused aren't tried again at exit.

    Raises MessError where it is closed.
    """
    if _reserved is not None:
        return _reserved
    if sys.stdout is None:  # `>&-`
        raise MessError("standard output is closed. Name a file with -o")
    buffer = sys.stdout.buffer
    buffer.flush()
    return getattr(buffer, "raw", buffer)


def write_data(data: bytes) -> None:
    """Write all of `data` to standard output.

    Raises:
        MessError: it is closed or full.
        BrokenPipeError: its reader has gone.
    """
    handle, rest = data_output(), memoryview(data)
    try:
        while rest:  # a raw write may take a part only: a signal came, or the disk is nearly full
            rest = rest[handle.write(rest) or 0 :]
        handle.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise MessError(
            f"standard output can't be written: {error.strerror}. What it holds is cut off: run the command again"
        ) from None


@contextmanager
def reserved_output() -> Iterator[None]:
    """Keep standard output for `data_output`; every other way to it leads to standard error meanwhile.

    Descriptor 1 itself is redirected, so that libraries in C and child processes are covered too.
    """
    global _reserved  # there is one standard output
    if sys.stdout is None or _reserved is not None:
        yield
        return
    sys.stdout.flush()
    if _descriptor(sys.stdout) != 1:  # a notebook's or a test's
        _reserved = data_output()
        try:
            with redirect_stdout(sys.stderr):
                yield
        finally:
            _reserved = None
        return
    kept = os.dup(1)  # which no child inherits
    os.dup2(2, 1)
    _reserved = io.FileIO(kept, "w")
    try:
        yield
    finally:
        with suppress(OSError, ValueError):  # standard error may be full or gone
            sys.stdout.flush()
        os.dup2(kept, 1)
        _reserved.close()
        _reserved = None


def _descriptor(stream: Any) -> int | None:
    try:
        return int(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return None

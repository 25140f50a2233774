"""What an earlier run's state says of what was learnt: read without its lock, and changed in nothing.

Knows the tables of the state; of snapshots and events only that they are bytes.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from messcli.errors import StateError
from messcli.state.database import looking_into


@dataclass(frozen=True, slots=True)
class Earlier:
    """What a state knew when it was looked at."""

    signature: Mapping[str, Any]  # what its run was made with
    settings: Mapping[str, Any]  # those last in force
    snapshot: bytes
    events: Sequence[
        tuple[Sequence[bytes], bool]
    ]  # since the snapshot; whether the last of a window is among them
    digest: str  # of all of these


def read_earlier(path: Path) -> Earlier:
    """Look into the state at `path`.

    Raises:
        StateError: it isn't a state, is damaged or newer than this program, or nothing was learnt in it.
    """
    with looking_into(path) as db:
        return _read(db, path)


def _read(db: sqlite3.Connection, path: Path) -> Earlier:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    signature = db.execute("SELECT value FROM meta WHERE name = 'signature'").fetchone()
    settings = db.execute("SELECT value FROM settings ORDER BY rowid DESC LIMIT 1").fetchone()
    snapshot = db.execute("SELECT data FROM snapshot").fetchone()
    if signature is None or settings is None or snapshot is None or version < _FIRST_READABLE:
        raise StateError(
            f"{path}: nothing was learnt in it. Name the state of a run that has routed requests"
        )
    ends = "ends_window" if version > _FIRST_READABLE else "1"
    events = db.execute(f"SELECT data, {ends} FROM events ORDER BY t").fetchall()  # noqa: S608  # no input in it
    digest = blake2b(digest_size=16)
    for data in (signature[0].encode(), settings[0].encode(), snapshot[0], *(data for data, _ in events)):
        digest.update(blake2b(data).digest())
    return Earlier(
        json.loads(signature[0]),
        json.loads(settings[0]),
        zlib.decompress(snapshot[0]),
        [(zlib.decompress(data).split(b"\n"), bool(ends_window)) for data, ends_window in events],
        digest.hexdigest(),
    )


_FIRST_READABLE = 3  # the schema whose snapshots can still be read (messcli/routing/older.py)

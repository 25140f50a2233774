"""The state: one SQLite file that makes a run durable, resumable and exactly-once.

The state is the truth and the output file is its projection. A window's rows, its events and the ledger are
committed together; only then do the rows go to the output. After a crash the output is cut back to what is
known to be on disk and written again from the rows the state kept. Knows nothing of models or the algorithm:
it stores what it's given. The schema is documented in docs/state.md.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from messcli.errors import StateBusy, StateError
from messcli.outputs import STDOUT, Sink, open_sink

SCHEMA_VERSION = 1
APPLICATION_ID = 0x4D455353  # "MESS": `file` and SQLite tools can tell what the database is

SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

-- Every line that is finished, in the order it was routed: the SLA and energy ledger.
CREATE TABLE requests (
    seq INTEGER PRIMARY KEY,
    key BLOB NOT NULL UNIQUE,       -- hash of the id (or of content and occurrence)
    digest BLOB NOT NULL,           -- hash of the prompt: a known key with another digest is a changed request
    t INTEGER,                      -- null for a line that was no request
    plan TEXT,
    model TEXT,                     -- the one served; null when the request failed
    explored INTEGER,
    accuracy REAL,                  -- observed; null without a reference
    estimated_accuracy REAL,
    joules REAL,                    -- the served model's
    billed_joules REAL,             -- the request's whole bill
    queue REAL                      -- Q after this request
);

-- Rows that aren't known to be on disk in the output yet; for standard output, all rows.
CREATE TABLE rows (seq INTEGER PRIMARY KEY, output TEXT NOT NULL, line TEXT NOT NULL);

-- Each output file: how much of it is known to be on disk.
CREATE TABLE outputs (
    path TEXT PRIMARY KEY,          -- relative to the state file; '-' is standard output
    synced_bytes INTEGER NOT NULL,
    synced_seq INTEGER NOT NULL     -- the last row in those bytes
) WITHOUT ROWID;

-- What the controller learnt: the last snapshot, and the events since then, to be folded in again.
CREATE TABLE snapshot (one INTEGER PRIMARY KEY CHECK (one = 1), t INTEGER NOT NULL, data BLOB NOT NULL);
CREATE TABLE events (t INTEGER PRIMARY KEY, data BLOB NOT NULL);

-- Settings in force from request t on.
CREATE TABLE settings (t INTEGER NOT NULL, time TEXT NOT NULL, value TEXT NOT NULL);

-- Joules by model and kind (served, exploration, overhead), over all runs.
CREATE TABLE energy (
    model TEXT NOT NULL, kind TEXT NOT NULL, meter TEXT NOT NULL,
    joules REAL NOT NULL, requests INTEGER NOT NULL,
    PRIMARY KEY (model, kind, meter)
) WITHOUT ROWID;

-- The SLA ledger of each plan in each contract period.
CREATE TABLE accounts (
    period TEXT NOT NULL, plan TEXT NOT NULL, alpha REAL NOT NULL, queue REAL NOT NULL,
    observed INTEGER NOT NULL, observed_sum REAL NOT NULL,
    estimated INTEGER NOT NULL, estimated_sum REAL NOT NULL,
    explored INTEGER NOT NULL, failed INTEGER NOT NULL,
    PRIMARY KEY (period, plan)
) WITHOUT ROWID;
"""

# from version n to n + 1; a released version's schema is never edited, only migrated
MIGRATIONS: dict[int, str] = {}

SYNC_SECONDS = 1.0  # how much finished work a power cut may cost (a crash of the process costs none)
SNAPSHOT_EVERY = 1000  # requests between snapshots


@dataclass(frozen=True, slots=True)
class Done:
    """One finished line, as the ledger keeps it."""

    key: bytes
    digest: bytes
    line: str  # the output row, without its newline
    t: int | None = None
    plan: str | None = None
    model: str | None = None
    explored: bool | None = None
    accuracy: float | None = None
    estimated_accuracy: float | None = None
    joules: float | None = None
    billed_joules: float | None = None
    queue: float | None = None


class Lock:
    """An advisory lock beside the state, held by one process; the kernel drops it when that process dies."""

    def __init__(self, path: Path, wait_seconds: float) -> None:
        self._path = path
        deadline = time.monotonic() + wait_seconds
        while True:
            self._handle = self._open()
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(self._handle, 200).decode("utf-8", "replace").strip() or "another process"
                os.close(self._handle)
                if time.monotonic() >= deadline:
                    state = str(path).removesuffix(".lock")
                    raise StateBusy(
                        f"{state}: in use by {holder}. Wait for it with --wait SECONDS, or use another --state"
                    ) from None
                time.sleep(min(0.1, max(0.0, deadline - time.monotonic())))
                continue
            # The holder before us may have deleted the file that we have just locked.
            if self._is_current():
                break
            os.close(self._handle)
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StateError(
                f"{self._path}: can't be created: {error.strerror}. Give a writable place with --state"
            ) from None

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._handle), self._path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._handle)


class State:
    """An open state. Use as a context manager; one process at a time.

    Args:
        path: the file; None keeps the state in a temporary database that dies with the process.
        wait_seconds: how long to wait for another process to let go.

    Raises:
        StateBusy: another process holds it.
        StateError: it isn't a state, is damaged, newer than this program, or can't be written.
    """

    def __init__(self, path: Path | None, *, wait_seconds: float = 0.0) -> None:
        self.path = path
        self.name = str(path) if path else "the temporary state"
        self._lock = Lock(path.with_name(path.name + ".lock"), wait_seconds) if path else None
        self._sink: Sink | None = None
        self._output = ""
        self._last_sync = time.monotonic()
        self._since_snapshot = 0
        try:
            with self._faults():
                self._db = self._connect()
                self._next_seq = self._scalar("SELECT coalesce(max(seq), 0) + 1 FROM requests")
                self._since_snapshot = self._scalar("SELECT count(*) FROM events")
        except BaseException:
            if self._lock:
                self._lock.release()
            raise

    def _connect(self) -> sqlite3.Connection:
        if self.path and self.path.exists() and self.path.stat().st_size:
            with self.path.open("rb") as handle:
                if handle.read(16) != b"SQLite format 3\0":
                    raise StateError(
                        f"{self.path}: is no messcli state (or a damaged one); nothing was changed. "
                        "Name another file with --state"
                    )
        db = sqlite3.connect(str(self.path) if self.path else "", isolation_level=None)
        version = db.execute("PRAGMA user_version").fetchone()[0]
        application = db.execute("PRAGMA application_id").fetchone()[0]
        tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables and application != APPLICATION_ID:
            raise StateError(
                f"{self.path}: is a database of another program; nothing was changed. "
                "Name another file with --state"
            )
        if version > SCHEMA_VERSION:
            raise StateError(
                f"{self.path}: was written by a newer messcli (schema {version}, this one knows "
                f"{SCHEMA_VERSION}). Upgrade messcli, or name another file with --state"
            )
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA cache_size = -16000")  # 16 MB, however large the state grows
        if not tables:
            script = (
                f"{SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; PRAGMA application_id = {APPLICATION_ID};"
            )
            db.executescript(f"BEGIN IMMEDIATE; {script} COMMIT;")
        for step in range(version if tables else SCHEMA_VERSION, SCHEMA_VERSION):
            db.executescript(f"BEGIN IMMEDIATE; {MIGRATIONS[step]} PRAGMA user_version = {step + 1}; COMMIT;")
        return db

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Turn SQLite's and the disk's errors into ours. What was committed stays committed."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise StateError(self._explain(error)) from error
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            raise StateError(
                f"{self._output or self.name}: {error.strerror}. Nothing that was finished is lost: "
                "make room and run the same command again"
            ) from error

    def _explain(self, error: sqlite3.DatabaseError) -> str:
        text = str(error)
        again = "Nothing that was finished is lost: run the same command again"
        if "full" in text:
            return f"{self.name}: the disk is full. {again} when there is room"
        if "malformed" in text or "not a database" in text or "disk image" in text:
            return (
                f"{self.name}: is damaged ({text}) and was left as it is. Restore it from a copy, try "
                f"`sqlite3 {self.name} .recover`, or route anew with another --state"
            )
        if "readonly" in text or "unable to open" in text:
            return f"{self.name}: can't be written ({text}). Give a writable place with --state"
        return f"{self.name}: {text}. {again}"

    def _scalar(self, query: str, *arguments: Any) -> Any:
        row = self._db.execute(query, arguments).fetchone()
        return row[0] if row else None

    @contextmanager
    def _transaction(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """All or nothing. `durable` also survives a power cut, at the price of a wait for the disk."""
        with self._faults():
            self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    # ---- meta and settings -----------------------------------------------------------------------

    def meta(self, name: str) -> Any:
        """A stored setting, or None."""
        with self._faults():
            value = self._scalar("SELECT value FROM meta WHERE name = ?", name)
        return None if value is None else json.loads(value)

    def set_meta(self, name: str, value: Any) -> None:
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, json.dumps(value, sort_keys=True)))

    def record_settings(self, t: int, value: Mapping[str, Any]) -> None:
        """Note that `value` is in force from request `t` on, unless it was already."""
        text = json.dumps(value, sort_keys=True)
        with self._transaction() as db:
            last = db.execute("SELECT value FROM settings ORDER BY rowid DESC LIMIT 1").fetchone()
            if last is None or last[0] != text:
                now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                db.execute("INSERT INTO settings VALUES (?, ?, ?)", (t, now, text))

    # ---- what is finished ------------------------------------------------------------------------

    def known(self, key: bytes) -> bytes | None:
        """The digest of the finished line with this key; None when it isn't finished."""
        with self._faults():
            digest: bytes | None = self._scalar("SELECT digest FROM requests WHERE key = ?", key)
        return digest

    @property
    def finished(self) -> int:
        """How many lines are finished."""
        return int(self._next_seq) - 1

    def commit(
        self,
        done: Sequence[Done],
        events: Iterable[tuple[int, bytes]],
        *,
        energy: Mapping[tuple[str, str, str], tuple[float, int]],
        accounts: Iterable[Sequence[Any]] = (),
        snapshot: bytes | None = None,
    ) -> None:
        """Finish a window: ledger, rows, events and learnt state together; then write the rows out.

        Args:
            done: the window's lines, in input order.
            events: (t, data) of each request, to be folded in again when the state is opened.
            energy: joules and requests to add, by (model, kind, meter).
            accounts: rows of the accounts table that changed.
            snapshot: everything learnt so far; it replaces all events.
        """
        first = self._next_seq
        t = max((row.t for row in done if row.t is not None), default=0)
        with self._transaction() as db:
            db.executemany(
                "INSERT INTO requests VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        seq, row.key, row.digest, row.t, row.plan, row.model, row.explored, row.accuracy,
                        row.estimated_accuracy, row.joules, row.billed_joules, row.queue,
                    )
                    for seq, row in enumerate(done, first)
                ],
            )  # fmt: skip
            if self.path and self._sink:
                db.executemany(
                    "INSERT INTO rows VALUES (?, ?, ?)",
                    [(seq, self._output_name(self._output), row.line) for seq, row in enumerate(done, first)],
                )
            if self.path and snapshot is None:
                db.executemany(
                    "INSERT INTO events VALUES (?, ?)", [(t, zlib.compress(e, 1)) for t, e in events]
                )
            self._add_energy(db, energy)
            db.executemany("INSERT OR REPLACE INTO accounts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", accounts)
            if snapshot is not None:
                self._put_snapshot(db, t, snapshot)
        self._next_seq += len(done)
        self._since_snapshot += len(done)
        if self._sink:
            with self._faults():
                self._sink.write([row.line for row in done])
            self._unsynced.extend(range(first, self._next_seq))
            if self._output == STDOUT or time.monotonic() - self._last_sync >= SYNC_SECONDS:
                self.sync(durable=time.monotonic() - self._last_sync >= SYNC_SECONDS)

    @property
    def wants_snapshot(self) -> bool:
        """Whether the next commit should carry a snapshot. Depends on what was committed, not on time."""
        return self.path is not None and self._since_snapshot >= SNAPSHOT_EVERY

    def _put_snapshot(self, db: sqlite3.Connection, t: int, data: bytes) -> None:
        db.execute("INSERT OR REPLACE INTO snapshot VALUES (1, ?, ?)", (t, zlib.compress(data, 1)))
        db.execute("DELETE FROM events")
        self._since_snapshot = 0

    def put_snapshot(self, t: int, data: bytes) -> None:
        """Store everything learnt so far; it replaces all events."""
        with self._transaction() as db:
            self._put_snapshot(db, t, data)

    def learnt(self) -> tuple[bytes | None, Iterator[bytes]]:
        """The last snapshot (None: there is none), and the events since, in order."""
        with self._faults():
            data = self._scalar("SELECT data FROM snapshot")
        return (None if data is None else zlib.decompress(data)), self._events()

    def _events(self) -> Iterator[bytes]:
        with self._faults():
            for (data,) in self._db.execute("SELECT data FROM events ORDER BY t"):
                yield zlib.decompress(data)

    def add_energy(self, energy: Mapping[tuple[str, str, str], tuple[float, int]]) -> None:
        """Add joules that belong to no request (overhead of starting and ending)."""
        with self._transaction() as db:
            self._add_energy(db, energy)

    @staticmethod
    def _add_energy(db: sqlite3.Connection, energy: Mapping[tuple[str, str, str], tuple[float, int]]) -> None:
        db.executemany(
            "INSERT INTO energy VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
            "joules = joules + excluded.joules, requests = requests + excluded.requests",
            [(*key, joules, requests) for key, (joules, requests) in energy.items()],
        )

    def energy(self) -> dict[tuple[str, str, str], tuple[float, int]]:
        """Joules and requests by (model, kind, meter), over all runs."""
        with self._faults():
            rows = self._db.execute("SELECT model, kind, meter, joules, requests FROM energy").fetchall()
        return {(model, kind, meter): (joules, requests) for model, kind, meter, joules, requests in rows}

    # ---- the output ------------------------------------------------------------------------------

    def open_output(self, output: str) -> None:
        """Bring the output to what the state knows: cut a torn tail, write again what may be missing.

        Raises:
            MessError: the file holds something that isn't this state's, or lacks finished rows.
        """
        self._output = output
        name = self._output_name(output)
        with self._faults():
            row = self._db.execute(
                "SELECT synced_bytes, synced_seq FROM outputs WHERE path = ?", (name,)
            ).fetchone()
        if row is None and output != STDOUT and _size(output):
            raise StateError(
                f"{output}: has rows that {self.name} knows nothing of. Move it away, or give the --state that "
                "it was written with"
            )
        synced_bytes, synced_seq = row or (0, 0)
        self._unsynced: list[int] = []
        self._synced_rows = 0
        with self._faults():
            self._sink = open_sink(output, synced_bytes)
            missing = self._db.execute(
                "SELECT seq, line FROM rows WHERE output = ? AND seq > ? ORDER BY seq", (name, synced_seq)
            )
            while batch := missing.fetchmany(1000):
                self._sink.write([line for _, line in batch])
                self._unsynced.extend(seq for seq, _ in batch)
        self.sync(durable=True)

    def _output_name(self, output: str) -> str:
        if output == STDOUT or self.path is None:
            return output
        return os.path.relpath(Path(output).resolve(), self.path.resolve().parent)

    def sync(self, *, durable: bool) -> None:
        """Note how much of the output is safe, and forget the rows kept for it."""
        if self._sink is None:
            return
        with self._faults():
            size, rows = self._sink.sync()
        fresh = rows - self._synced_rows
        with self._transaction(durable=durable) as db:
            name = self._output_name(self._output)
            if fresh:
                last = self._unsynced[fresh - 1]
                db.execute("INSERT OR REPLACE INTO outputs VALUES (?, ?, ?)", (name, size, last))
                if self._output != STDOUT:
                    db.execute("DELETE FROM rows WHERE output = ? AND seq <= ?", (name, last))
            else:
                db.execute("INSERT OR IGNORE INTO outputs VALUES (?, 0, 0)", (name,))
        del self._unsynced[:fresh]
        self._synced_rows = rows
        if durable:
            self._last_sync = time.monotonic()

    def finish(self) -> None:
        """The input has ended: write out all that is held back, and wait for the disk."""
        if self._sink:
            with self._faults():
                self._sink.finish()
        self.sync(durable=True)

    def rows(self, output: str | None = None) -> Iterator[str]:
        """The rows the state still keeps: all of them for standard output, for a file those not yet on disk."""
        with self._faults():
            query = "SELECT line FROM rows WHERE output = coalesce(?, output) ORDER BY seq"
            for (line,) in self._db.execute(query, (output,)):
                yield line

    # ---- ending ----------------------------------------------------------------------------------

    def close(self) -> None:
        if self._sink:
            self._sink.close()
            self._sink = None
        self._db.close()
        if self._lock:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> State:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _size(output: str) -> int:
    path = Path(output)
    return path.stat().st_size if path.is_file() else 0

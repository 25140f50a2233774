"""The state: one SQLite file that makes a run durable, resumable and exactly-once.

The state is the truth and the output file is its projection. A window's rows, its events and the ledger are
committed together; only then do the rows go to the output. After a crash the output is cut back to what is
known to be on disk and written again from the rows the state kept. Knows nothing of models or the algorithm:
it stores what it's given. docs/state.md documents the schema and says what is promised.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sqlite3
import time
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from messcli.errors import StateBusy, StateError, UsageError
from messcli.files.sinks import STDOUT, Sink, open_sink, sync_folder
from messcli.files.standard import write_data

SCHEMA_VERSION = 4
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
CREATE INDEX rows_of_files ON rows (output) WHERE output <> '-';

-- Each output: how much of it is known to be on disk.
CREATE TABLE outputs (
    path TEXT PRIMARY KEY,          -- relative to the state file; '-' is standard output
    synced_bytes INTEGER NOT NULL,
    synced_seq INTEGER NOT NULL,    -- the last row in those bytes; for standard output, the last one printed
    open INTEGER NOT NULL DEFAULT 0 -- 1 while a run writes it, and after a crash: more bytes may follow
) WITHOUT ROWID;

-- What the controller learnt: the last snapshot, and the events since then, to be folded in again.
CREATE TABLE snapshot (one INTEGER PRIMARY KEY CHECK (one = 1), t INTEGER NOT NULL, data BLOB NOT NULL);
CREATE TABLE events (t INTEGER PRIMARY KEY, data BLOB NOT NULL); -- a window's; t is its last request's

-- The contract periods; meta's 'period' names the one that is open.
CREATE TABLE periods (
    name TEXT PRIMARY KEY,
    opened TEXT NOT NULL,           -- UTC
    horizon INTEGER,                -- how many requests it is expected to have; null when not named
    requests INTEGER NOT NULL       -- routed in it
) WITHOUT ROWID;

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
MIGRATIONS: dict[int, str] = {
    # What predictors learnt under 1 can't be read any more: they learn anew; all that is finished, t, the
    # queues and the ledger stay.
    1: """
    DELETE FROM snapshot;
    DELETE FROM events;
    CREATE INDEX rows_of_files ON rows (output) WHERE output <> '-';
    ALTER TABLE outputs ADD COLUMN open INTEGER NOT NULL DEFAULT 0;
    UPDATE outputs SET open = 1; -- not known any more: a crash may have left more
    CREATE TABLE periods (
        name TEXT PRIMARY KEY, opened TEXT NOT NULL, horizon INTEGER, requests INTEGER NOT NULL
    ) WITHOUT ROWID;
    INSERT INTO periods SELECT '', (SELECT min(time) FROM settings), NULL, (SELECT count(t) FROM requests)
        WHERE EXISTS (SELECT 1 FROM settings);
    INSERT INTO meta SELECT 'period', '""' FROM periods;
    """,
    # As before: what predictors learnt under 2 lies in other numbers than they look at now.
    2: """
    DELETE FROM snapshot;
    DELETE FROM events;
    """,
    # The snapshot has named, versioned fields: what 3 kept is read (messcli/routing/older.py) and written so.
    3: "",
}

SYNC_SECONDS = 1.0  # how much finished work a power cut may cost (a crash of the process costs none)
SNAPSHOT_EVERY = 2000  # requests between snapshots; folding so many in again takes about a second
_HEADER = b"SQLite format 3\0"


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
                text = os.read(self._handle, 200).decode("utf-8", "replace")
                holder = text.partition("\n")[0] or "another process"
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
        # Written before it is cut, so that it is never seen empty.
        os.ftruncate(self._handle, os.pwrite(self._handle, _holder(), 0))
        # A forked child shares the lock, and may outlive us; an executed one doesn't (O_CLOEXEC).
        ours = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _let_go(ours()))

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StateError(
                f"{self._path}: can't be created: {error.strerror}. Give --state (and the output) an existing, "
                "writable folder"
            ) from None

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._handle), self._path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let another process have it, and remove the file."""
        self._path.unlink(missing_ok=True)
        self.drop()

    def drop(self) -> None:
        """Close without touching the file: a child's part."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _holder() -> bytes:
    return f"process {os.getpid()} on {socket.gethostname()}\n".encode()


def _let_go(lock: Lock | None) -> None:
    if lock:
        lock.drop()


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
        self._output = self._output_name = ""
        self._registered_seq = 0  # the last row before the output's first
        self._marked_open = False  # the state says that the output is being written
        self._unsynced: list[int] = []  # rows of the sink that aren't safe yet
        self._synced_rows = 0  # rows of the sink that are
        self._last_sync = time.monotonic()
        self._durable = True  # as `_prepare` sets it
        try:
            with self._faults():
                self._db = self._connect()
                self._next_seq = self._scalar("SELECT coalesce(max(seq), 0) + 1 FROM requests")
                self._was_new = self._next_seq == 1
                self._since_snapshot = self._scalar(
                    "SELECT coalesce((SELECT max(t) FROM events) - coalesce((SELECT t FROM snapshot), 0), 0)"
                )
                self._period = self.meta("period")
        except BaseException:
            if hasattr(self, "_db"):  # opened, and then found to be damaged
                self._db.close()
            if self._lock:
                self._lock.release()
            raise

    def _connect(self) -> sqlite3.Connection:
        is_new = self.path is not None and not self.path.exists()
        if self.path and not is_new:
            if not self.path.is_file():
                raise StateError(f"{self.path}: is no regular file. Name another with --state")
            with self.path.open("rb") as handle:
                header = handle.read(len(_HEADER))
            if header not in (b"", _HEADER):
                raise StateError(
                    f"{self.path}: is no messcli state, or a damaged one; it was left as it is. Name another "
                    "file with --state, or restore this one from a copy"
                )
        db = sqlite3.connect(str(self.path) if self.path else "", isolation_level=None)
        try:
            self._prepare(db)
        except BaseException:
            db.close()
            raise
        if self.path and is_new:
            sync_folder(self.path)
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        application = db.execute("PRAGMA application_id").fetchone()[0]
        tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if application != APPLICATION_ID and (tables or application or version):
            raise StateError(
                f"{self.path}: is a database of another program; it was left as it is. "
                "Name another file with --state"
            )
        if version > SCHEMA_VERSION:
            raise StateError(
                f"{self.path}: was written by a newer messcli (schema {version}, this one knows "
                f"{SCHEMA_VERSION}). Upgrade messcli, or name another file with --state"
            )
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA cache_size = -16000")  # 16 MB, however large the state grows
        if application != APPLICATION_ID:
            db.executescript(
                f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; "
                f"PRAGMA application_id = {APPLICATION_ID}; COMMIT;"
            )
            return
        for step in range(version, SCHEMA_VERSION):
            db.executescript(f"BEGIN IMMEDIATE; {MIGRATIONS[step]} PRAGMA user_version = {step + 1}; COMMIT;")

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Turn SQLite's and the disk's errors into ours. What was committed stays committed."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise StateError(self._explain(error)) from error
        except (zlib.error, UnicodeDecodeError) as error:
            raise self._damaged(str(error)) from error
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            raise StateError(
                f"{self._output or self.name}: {error.strerror or error}. Nothing that was finished is lost: "
                "mend that and run the same command again"
            ) from error

    def _explain(self, error: sqlite3.DatabaseError) -> str:
        text = str(error)
        again = "Nothing that was finished is lost: run the same command again"
        if "full" in text:
            return f"{self.name}: the disk is full. {again} when there is room"
        # a key that is finished isn't asked for again: where it comes up twice, its index is broken
        broken = isinstance(error, sqlite3.IntegrityError)
        if broken or any(word in text for word in ("malformed", "not a database", "disk image", "no such")):
            return str(self._damaged(text))
        if "readonly" in text or "unable to open" in text:
            return f"{self.name}: can't be written ({text}). Give a writable place with --state"
        if "locked" in text:
            return f"{self.name}: another program is writing to it ({text}). {again} when it has ended"
        return f"{self.name}: {text}. {again}"

    def _damaged(self, how: str) -> StateError:
        return StateError(
            f"{self.name}: is damaged ({how}) and was left as it is. Restore it from a copy, try "
            f"`sqlite3 {self.name} .recover`, or route anew with another --state and output"
        )

    def _scalar(self, query: str, *arguments: Any) -> Any:
        row = self._db.execute(query, arguments).fetchone()
        return row[0] if row else None

    @contextmanager
    def _transaction(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """All or nothing. `durable` also survives a power cut, at the price of a wait for the disk."""
        with self._faults():
            if durable != self._durable:
                self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._durable = durable
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
            return self._plain(self._scalar("SELECT value FROM meta WHERE name = ?", name))

    def set_meta(self, name: str, value: Any) -> None:
        """Store a setting, as JSON."""
        with self._transaction() as db:
            self._set_meta(db, name, value)

    @staticmethod
    def _set_meta(db: sqlite3.Connection, name: str, value: Any) -> None:
        db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, json.dumps(value, sort_keys=True)))

    def _plain(self, text: str | None) -> Any:
        try:
            return None if text is None else json.loads(text)
        except ValueError as error:
            raise self._damaged(str(error)) from error

    def settings(self) -> dict[str, Any] | None:
        """The settings last in force; None in a new state."""
        with self._faults():
            text = self._scalar("SELECT value FROM settings ORDER BY rowid DESC LIMIT 1")
        settings: dict[str, Any] | None = self._plain(text)
        return settings

    def change(
        self, t: int, settings: Mapping[str, Any], snapshot: bytes, accounts: Iterable[Sequence[Any]]
    ) -> None:
        """Put `settings` in force from request `t` on, with what was learnt until then and the ledger.

        The period that `settings` names is opened, or opened again.
        """
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        period, horizon = settings["period"], settings["horizon"]
        with self._transaction() as db:
            db.execute(
                "INSERT INTO settings VALUES (?, ?, ?)", (t, now, json.dumps(settings, sort_keys=True))
            )
            db.execute(
                "INSERT INTO periods VALUES (?, ?, ?, 0) "
                "ON CONFLICT DO UPDATE SET horizon = excluded.horizon",
                (period, now, horizon),
            )
            self._set_meta(db, "period", period)
            self._put_accounts(db, accounts)
            self._put_snapshot(db, t - 1, snapshot)
        self._since_snapshot = 0
        self._period = period

    def period(self, name: str) -> tuple[int | None, int] | None:
        """(horizon, requests routed) of a contract period; None when it was never opened."""
        with self._faults():
            row: tuple[int | None, int] | None = self._db.execute(
                "SELECT horizon, requests FROM periods WHERE name = ?", (name,)
            ).fetchone()
        return row

    def accounts(self, period: str) -> list[tuple[Any, ...]]:
        """The rows of the accounts table of one period."""
        with self._faults():
            return self._db.execute("SELECT * FROM accounts WHERE period = ?", (period,)).fetchall()

    @staticmethod
    def _put_accounts(db: sqlite3.Connection, accounts: Iterable[Sequence[Any]]) -> None:
        db.executemany("INSERT OR REPLACE INTO accounts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", accounts)

    # ---- what is finished ------------------------------------------------------------------------

    def known(self, key: bytes) -> bytes | None:
        """The digest of the line with this key that an earlier run finished; None where none has."""
        if self._was_new:
            return None
        with self._faults():
            digest: bytes | None = self._scalar("SELECT digest FROM requests WHERE key = ?", key)
        return digest

    @property
    def t(self) -> int:
        """The number of the last request."""
        with self._faults():
            return int(self._scalar("SELECT t FROM requests WHERE t > 0 ORDER BY seq DESC LIMIT 1") or 0)

    def commit(
        self,
        done: Sequence[Done],
        events: Sequence[bytes],
        *,
        energy: Mapping[tuple[str, str, str], tuple[float, int]],
        accounts: Iterable[Sequence[Any]] = (),
        snapshot: bytes | None = None,
    ) -> None:
        """Finish a window: ledger, rows, events and learnt state together; then write the rows out.

        Args:
            done: the window's lines, in input order.
            events: of the window's requests, to be folded in again together when the state is opened.
            energy: joules and requests to add, by (model, kind, meter).
            accounts: rows of the accounts table that changed.
            snapshot: everything learnt so far; it replaces all events.
        """
        first = self._next_seq
        routed = [row.t for row in done if row.t is not None]
        # The first commit to an output says that it is being written, before it is.
        opening = self._sink is not None and not self._marked_open
        with self._transaction(durable=opening and self._output != STDOUT) as db:
            if opening:
                self._mark_open(db)
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
                name = self._output_name
                db.executemany(
                    "INSERT INTO rows VALUES (?, ?, ?)",
                    [(seq, name, row.line) for seq, row in enumerate(done, first)],
                )
            if routed and snapshot is not None:
                self._put_snapshot(db, routed[-1], snapshot)
            elif routed and self.path:
                data = zlib.compress(b"\n".join(events), 1)
                db.execute("INSERT INTO events VALUES (?, ?)", (routed[-1], data))
            if routed:
                db.execute(
                    "UPDATE periods SET requests = requests + ? WHERE name = ?", (len(routed), self._period)
                )
            self._add_energy(db, energy)
            self._put_accounts(db, accounts)
        self._next_seq += len(done)
        self._since_snapshot = 0 if snapshot is not None else self._since_snapshot + len(routed)
        if self._sink:
            with self._faults():
                self._sink.write([row.line for row in done])
            self._unsynced.extend(range(first, self._next_seq))
            if self._output == STDOUT or time.monotonic() - self._last_sync >= SYNC_SECONDS:
                self.sync(durable=time.monotonic() - self._last_sync >= SYNC_SECONDS)

    @property
    def wants_snapshot(self) -> bool:
        """Whether the next commit should carry a snapshot."""
        return self.path is not None and self._since_snapshot >= SNAPSHOT_EVERY

    @staticmethod
    def _put_snapshot(db: sqlite3.Connection, t: int, data: bytes) -> None:
        # Stored, not deflated: most of it is numbers that hardly shrink, and every snapshot would pay for the try.
        db.execute("INSERT OR REPLACE INTO snapshot VALUES (1, ?, ?)", (t, zlib.compress(data, 0)))
        db.execute("DELETE FROM events")

    def learnt(self) -> tuple[bytes | None, Iterator[list[bytes]]]:
        """The last snapshot (None: there is none), and the windows of events since, in order."""
        with self._faults():
            data = self._scalar("SELECT data FROM snapshot")
            return (None if data is None else zlib.decompress(data)), self._events()

    def _events(self) -> Iterator[list[bytes]]:
        with self._faults():
            for (data,) in self._db.execute("SELECT data FROM events ORDER BY t"):
                yield zlib.decompress(data).split(b"\n")

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

    def mean_joules(self, model: str) -> float | None:
        """Of a call of `model`, per request, over all runs; None where none was read."""
        with self._faults():
            mean: float | None = self._scalar(
                "SELECT sum(joules) / sum(requests) FROM energy WHERE model = ?", model
            )
        return mean

    # ---- the output ------------------------------------------------------------------------------

    def open_output(self, output: str) -> None:
        """Bring the output to what the state knows: cut a torn tail, write again what may be missing.

        Raises:
            MessError: the file holds something that isn't this state's, or lacks finished rows.
        """
        self._output = output
        self._output_name = name = self._name_of(output)
        with self._faults():
            row = self._db.execute(
                "SELECT synced_bytes, synced_seq, open FROM outputs WHERE path = ?", (name,)
            ).fetchone()
        if row is None and output != STDOUT and _size(output):
            raise StateError(
                f"{output}: has rows that {self.name} knows nothing of. Move it away, or give the --state that "
                "it was written with"
            )
        synced_bytes, synced_seq, is_open = row or (0, self._next_seq - 1, 0)
        self._registered_seq = synced_seq
        self._marked_open = bool(is_open)
        self._unsynced, self._synced_rows = [], 0
        with self._faults():
            self._sink = open_sink(output, synced_bytes, torn=bool(is_open))
            missing = self._missing(name, synced_seq)
            while batch := missing.fetchmany(1000):
                self._unsynced.extend(seq for seq, _ in batch)
                self._sink.write([line for _, line in batch])
        if self._unsynced:
            self.sync(durable=True)

    def _missing(self, name: str, synced_seq: int) -> sqlite3.Cursor:
        # Each by the index that serves it: rows of standard output are many, and kept.
        which = "output = '-'" if name == STDOUT else "output = ? AND output <> '-'"
        names = () if name == STDOUT else (name,)
        return self._db.execute(
            f"SELECT seq, line FROM rows WHERE {which} AND seq > ? ORDER BY seq",  # noqa: S608  # no input in it
            (*names, synced_seq),
        )

    def _mark_open(self, db: sqlite3.Connection) -> None:
        db.execute(
            "INSERT INTO outputs VALUES (?, 0, ?, 1) ON CONFLICT DO UPDATE SET open = 1",
            (self._output_name, self._registered_seq),
        )
        self._marked_open = True

    def _name_of(self, output: str) -> str:
        if output == STDOUT or self.path is None:
            return output
        path = Path(output).resolve()
        state = self.path.resolve()
        if path in (state, *(state.with_name(state.name + end) for end in (".lock", "-wal", "-shm"))):
            raise UsageError(f"{output}: is the state's own file. Give the output another name")
        return os.path.relpath(path, state.parent)

    def sync(self, *, durable: bool, ended: bool = False) -> None:
        """Note how much of the output is safe, and forget the rows kept for it.

        Args:
            durable: wait for the disk.
            ended: nothing more will be written: from now on a longer file is somebody else's doing.
        """
        if self._sink is None:
            return
        with self._faults():
            size, rows = self._sink.sync()
        fresh = rows - self._synced_rows
        # with rows held back for a whole gzip member, more is to be written
        closes = ended and self._marked_open and fresh == len(self._unsynced) and self._output != STDOUT
        with self._transaction(durable=durable) as db:
            name = self._output_name
            if fresh:
                last = self._unsynced[fresh - 1]
                db.execute(
                    "UPDATE outputs SET synced_bytes = ?, synced_seq = ? WHERE path = ?",
                    (size, last, name),
                )
                if self._output != STDOUT:
                    db.execute(
                        "DELETE FROM rows WHERE output = ? AND output <> '-' AND seq <= ?", (name, last)
                    )
            if closes:
                db.execute("UPDATE outputs SET open = 0 WHERE path = ?", (name,))
        if closes:
            self._marked_open = False
        del self._unsynced[:fresh]
        self._synced_rows = rows
        if durable:
            self._last_sync = time.monotonic()

    def finish(self) -> None:
        """The input has ended: write out all that is held back, and wait for the disk."""
        if self._sink:
            with self._faults():
                self._sink.finish()
        self.sync(durable=True, ended=True)

    def suspend(self) -> None:
        """The run ends before its input does: wait for the disk."""
        self.sync(durable=True, ended=True)

    def rows(self, output: str = STDOUT) -> Iterator[str]:
        """The rows the state still keeps: all of standard output's, of a file's those not known to be on disk."""
        with self._faults():
            missing = self._missing(self._name_of(output), 0)
            while batch := missing.fetchmany(1000):
                for _, line in batch:
                    yield line

    def unfinished_outputs(self) -> list[tuple[str, int]]:
        """Other files than the one that is open whose last rows aren't known to be on disk, and how many."""
        if self.path is None:
            return []
        with self._faults():
            rows = self._db.execute(
                "SELECT output, count(*) FROM rows WHERE output <> '-' GROUP BY output"
            ).fetchall()
        folder = self.path.parent
        return [(str(folder / name), count) for name, count in rows if name != self._output_name]

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


def print_rows(path: Path, output: str, *, wait_seconds: float = 0.0) -> None:
    """Print the rows that the state at `path` keeps of `output` to standard output.

    Raises:
        StateError: there is no such state, or it can't be read.
        BrokenPipeError: the reader has gone.
    """
    if not path.exists():
        raise StateError(f"{path}: no such file. Name the --state that the rows were routed with")
    with State(path, wait_seconds=wait_seconds) as state:
        rows = state.rows(output)
        while batch := list(islice(rows, 1000)):
            write_data("".join(f"{line}\n" for line in batch).encode())


def _size(output: str) -> int:
    path = Path(output)
    return path.stat().st_size if path.is_file() else 0

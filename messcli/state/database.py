"""The state's file: an SQLite database with a schema, a lock, and errors that say what to do.

Knows tables and transactions, and nothing of what stands in them. docs/state.md documents the schema and says what
is promised.
"""

from __future__ import annotations

import json
import os
import random
import sqlite3
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from messcli.errors import StateError, first_line
from messcli.files.sinks import SQLITE, sync_folder
from messcli.state.lock import Lock

SCHEMA_VERSION = 5
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
    open INTEGER NOT NULL DEFAULT 0, -- 1 while a run writes it, and after a crash: more bytes may follow
    lines INTEGER NOT NULL DEFAULT 0, -- rows that it has, those that aren't on disk yet included
    anew INTEGER NOT NULL DEFAULT 0 -- 1 while it is written anew beside itself; 2: that is what it is from now on
) WITHOUT ROWID;

-- Error rows that stand in an output: other rows may take their place.
CREATE TABLE failures (
    seq INTEGER PRIMARY KEY,        -- in `requests`
    output TEXT NOT NULL,
    place INTEGER NOT NULL,         -- of the row in the output, from 0
    line INTEGER NOT NULL,          -- of the input, from 1
    id TEXT,                        -- JSON; null where the line names none
    fault TEXT NOT NULL,            -- request, model or run
    tries INTEGER NOT NULL,
    run INTEGER NOT NULL,           -- how many runs had come to an end before it was made (meta's 'runs')
    period TEXT                     -- in whose ledger it counts as failed; null: in none
);
CREATE INDEX failures_of_lines ON failures (line);
CREATE INDEX failures_of_ids ON failures (id);

-- Rows that took the place of error rows, until the output is written anew.
CREATE TABLE mended (
    output TEXT NOT NULL, place INTEGER NOT NULL, line TEXT NOT NULL, PRIMARY KEY (output, place)
) WITHOUT ROWID;

-- What was written to each file, as it was synced: a later change shows.
CREATE TABLE parts (
    output TEXT NOT NULL, begin INTEGER NOT NULL, end INTEGER NOT NULL, checksum INTEGER NOT NULL, -- CRC-32
    PRIMARY KEY (output, begin)
) WITHOUT ROWID;

-- The window that is being worked on: what was decided before any of it ran.
CREATE TABLE window (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    lines INTEGER NOT NULL,
    finished INTEGER NOT NULL,      -- of its lines, from the first on: they are in `requests`
    running TEXT NOT NULL,          -- JSON: joules by meter, read for answers that weren't there yet
    data BLOB NOT NULL              -- per line its key, its digest, and the decision
);
-- Answers to lines of the window that have an unanswered line before them.
CREATE TABLE answers (
    place INTEGER NOT NULL,         -- in the window, from 0
    model INTEGER NOT NULL,         -- in the zoo, from 0
    data BLOB NOT NULL,
    PRIMARY KEY (place, model)
) WITHOUT ROWID;

-- What the controller learnt: the last snapshot, and the events since then, to be folded in again.
CREATE TABLE snapshot (one INTEGER PRIMARY KEY CHECK (one = 1), t INTEGER NOT NULL, data BLOB NOT NULL);
CREATE TABLE events (
    t INTEGER PRIMARY KEY,          -- of the last request of a piece of a window
    data BLOB NOT NULL,
    ends_window INTEGER NOT NULL DEFAULT 1
);

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
    # Under 3 a row of events was a whole window, and nothing was kept of a window that wasn't finished. The snapshot
    # has named, versioned fields now: what 3 kept is read (messcli/routing/older.py) and written so.
    3: """
    ALTER TABLE events ADD COLUMN ends_window INTEGER NOT NULL DEFAULT 1;
    CREATE TABLE window (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        lines INTEGER NOT NULL, finished INTEGER NOT NULL, running TEXT NOT NULL, data BLOB NOT NULL
    );
    CREATE TABLE answers (
        place INTEGER NOT NULL, model INTEGER NOT NULL, data BLOB NOT NULL, PRIMARY KEY (place, model)
    ) WITHOUT ROWID;
    CREATE TABLE parts (
        output TEXT NOT NULL, begin INTEGER NOT NULL, end INTEGER NOT NULL, checksum INTEGER NOT NULL,
        PRIMARY KEY (output, begin)
    ) WITHOUT ROWID;
    """,
    # Under 4 nothing was known of error rows. Where all rows are one output's, their places are theirs in `requests`.
    4: """
    ALTER TABLE outputs ADD COLUMN lines INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE outputs ADD COLUMN anew INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE failures (
        seq INTEGER PRIMARY KEY, output TEXT NOT NULL, place INTEGER NOT NULL, line INTEGER NOT NULL, id TEXT,
        fault TEXT NOT NULL, tries INTEGER NOT NULL, run INTEGER NOT NULL, period TEXT
    );
    CREATE INDEX failures_of_lines ON failures (line);
    CREATE INDEX failures_of_ids ON failures (id);
    CREATE TABLE mended (
        output TEXT NOT NULL, place INTEGER NOT NULL, line TEXT NOT NULL, PRIMARY KEY (output, place)
    ) WITHOUT ROWID;
    UPDATE outputs SET lines = (SELECT count(*) FROM requests) WHERE (SELECT count(*) FROM outputs) = 1;
    INSERT INTO failures
        SELECT seq, path, seq - 1, 0, NULL, CASE WHEN t IS NULL THEN 'request' ELSE 'model' END, 1, -1,
            CASE WHEN t IS NULL THEN NULL ELSE (SELECT json_extract(value, '$') FROM meta WHERE name = 'period') END
        FROM requests, outputs WHERE model IS NULL AND (SELECT count(*) FROM outputs) = 1;
    UPDATE outputs SET lines = -1 WHERE (SELECT count(*) FROM outputs) > 1; -- not known: they get no failures
    """,
}

# Rows up to which opening a state checks all of it (a second for 100,000); beyond that it looks at a sample.
ROWS_CHECKED = 10_000
ROWS_CHECKED_UNCLEAN = 100_000  # after a run that didn't close it


class Database:
    """An open state file; one process at a time.

    Args:
        path: the file; None: a temporary database that dies with the process.
        wait_seconds: how long to wait for another process to let go.

    Raises:
        StateBusy: another process holds it.
        StateError: it isn't a state, is damaged, newer than this program, or can't be written.
    """

    def __init__(self, path: Path | None, *, wait_seconds: float = 0.0) -> None:
        self.path = path
        self.name = str(path) if path else "the temporary state"
        self.notes: list[str] = []  # for the user, of opening it
        self._lock: Lock | None = None
        if path:
            self._lock = Lock(path.with_name(path.name + ".lock"), str(path), wait_seconds)
        self._durable = True  # as `_prepare` sets it
        try:
            with self.faults():
                self._db = self._connect()
        except BaseException:
            self._release()
            raise

    def _connect(self) -> sqlite3.Connection:
        self.is_new = self.path is None or not self.path.exists()
        if self.path and not self.is_new:
            self._examine(self.path)
        # with its folder, so that no name has a meaning of its own to SQLite (":memory:", "file:x")
        db = sqlite3.connect(str(self.path.absolute()) if self.path else "", isolation_level=None)
        try:
            self._prepare(db)
        except BaseException:
            db.close()
            raise
        if self.path and self.is_new:
            sync_folder(self.path)
        return db

    def _examine(self, path: Path) -> None:
        """Refuse what is no state, or a damaged one, before anything is written."""
        if not path.is_file():
            raise StateError(f"{path}: is no regular file. Name another with --state")
        with path.open("rb") as handle:
            header = handle.read(len(SQLITE))
        if header not in (b"", SQLITE):
            raise StateError(
                f"{path}: is no messcli state, or a damaged one; it was left as it is. Name another "
                "file with --state, or restore this one from a copy"
            )
        log = path.with_name(path.name + "-wal")
        unclean = log.exists() and log.stat().st_size > 0
        # A crash while it was made leaves SQLite's rollback journal: to read means to roll back, which writes.
        mode = "rw" if path.with_name(path.name + "-journal").exists() else "ro"
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True)) as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            application = db.execute("PRAGMA application_id").fetchone()[0]
            tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if application != APPLICATION_ID and (tables or application or version):
                raise StateError(
                    f"{path}: is a database of another program; it was left as it is. "
                    "Name another file with --state"
                )
            if version > SCHEMA_VERSION:
                raise StateError(
                    f"{path}: was written by a newer messcli (schema {version}, this one knows "
                    f"{SCHEMA_VERSION}). Upgrade messcli, or name another file with --state"
                )
            if application == APPLICATION_ID:
                self._check(db, unclean=unclean)

    def _check(self, db: sqlite3.Connection, *, unclean: bool) -> None:
        """Compare pages, tables and the index of keys: all of a small state, a sample of a large one."""
        rows = db.execute("SELECT coalesce(max(seq), 0) FROM requests").fetchone()[0]
        if rows <= (ROWS_CHECKED_UNCLEAN if unclean else ROWS_CHECKED):
            ((found,),) = db.execute("PRAGMA integrity_check(1)").fetchall()
            if found != "ok":
                raise self.damaged(found)
            return
        until = time.monotonic() + (1.0 if unclean else 0.1)
        looked = 0
        while time.monotonic() < until:
            seq = rows - looked if looked < min(1000, rows) else random.randint(1, rows)  # noqa: S311  # a sample
            looked += 1
            # rows that took the place of others have left gaps
            at = "SELECT seq, key FROM requests WHERE seq >= ? ORDER BY seq LIMIT 1"
            row = db.execute(at, (seq,)).fetchone() or (None, None)
            if db.execute("SELECT seq FROM requests WHERE key = ?", row[1:]).fetchone() != row[:1]:
                raise self.damaged(f"the index of keys doesn't lead to row {seq}")
        if unclean:
            self.notes.append(
                f"{self.name}: its last run ended unclean; {looked} of its {rows} rows were checked. "
                f'`sqlite3 {self.name} "PRAGMA integrity_check"` checks all'
            )

    def _prepare(self, db: sqlite3.Connection) -> None:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        application = db.execute("PRAGMA application_id").fetchone()[0]
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

    # ---- errors ----------------------------------------------------------------------------------

    @contextmanager
    def faults(self, file: str | None = None) -> Iterator[None]:
        """Turn SQLite's and the disk's errors into ours. What was committed stays committed.

        Args:
            file: the other file that is worked on.
        """
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise StateError(self._explain(error)) from error
        except (zlib.error, UnicodeDecodeError) as error:
            raise self.damaged(str(error)) from error
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            raise StateError(
                f"{file or self.name}: {error.strerror or error}. Nothing that was finished is lost: "
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
            return str(self.damaged(text))
        if "readonly" in text or "unable to open" in text:
            return f"{self.name}: can't be written ({text}). Give a writable place with --state"
        if "locked" in text:
            return f"{self.name}: another program is writing to it ({text}). {again} when it has ended"
        return f"{self.name}: {text}. {again}"

    def damaged(self, how: str) -> StateError:
        """The error that says so."""
        return StateError(
            f"{self.name}: is damaged ({how}) and was left as it is. Restore it from a copy, try "
            f"`sqlite3 {self.name} .recover`, or route anew with another --state and output"
        )

    # ---- reading and writing ---------------------------------------------------------------------

    def rows(self, query: str, *arguments: Any) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        with self.faults():
            return self._db.execute(query, arguments).fetchall()

    def scalar(self, query: str, *arguments: Any) -> Any:
        """The first column of the first row; None where there is no row."""
        with self.faults():
            row = self._db.execute(query, arguments).fetchone()
        return row[0] if row else None

    def each(self, query: str, *arguments: Any) -> Iterator[tuple[Any, ...]]:
        """The rows of a query, one at a time, however many they are."""
        with self.faults(), closing(self._db.execute(query, arguments)) as cursor:
            yield from cursor

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """All or nothing. `durable` also survives a power cut, at the price of a wait for the disk."""
        with self.faults():
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

    def plain(self, text: str | bytes | None) -> Any:
        """What JSON from the database says; None of None. Raises StateError where it is none."""
        try:
            return None if text is None else json.loads(text)
        except ValueError as error:
            raise self.damaged(str(error)) from error

    def meta(self, name: str) -> Any:
        """A stored fact about the state, or None."""
        return self.plain(self.scalar("SELECT value FROM meta WHERE name = ?", name))

    def set_meta(self, name: str, value: Any) -> None:
        """Store a fact, as JSON. One that is known already is no change."""
        text = json.dumps(value, sort_keys=True)
        if text != self.scalar("SELECT value FROM meta WHERE name = ?", name):
            with self.transaction() as db:
                put_meta(db, name, value)

    # ---- ending ----------------------------------------------------------------------------------

    def close(self, *, discard: bool = False) -> None:
        """Close it. `discard`: and leave nothing of it behind."""
        self._db.close()
        if discard and self.path:
            for end in ("", "-wal", "-shm"):
                self.path.with_name(self.path.name + end).unlink(missing_ok=True)
        self._release()

    def _release(self) -> None:
        if self._lock:
            self._lock.release()
            self._lock = None


def put_meta(db: sqlite3.Connection, name: str, value: Any) -> None:
    """`Database.set_meta` within a transaction."""
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, json.dumps(value, sort_keys=True)))


# ---- looking into another run's state ------------------------------------------------------------


def is_database(path: Path) -> bool:
    """Whether the file is one of SQLite. Raises OSError: it can't be read."""
    with path.open("rb") as handle:
        return handle.read(len(SQLITE)) == SQLITE


@contextmanager
def looking_into(path: Path) -> Iterator[sqlite3.Connection]:
    """A state, read-only and without its lock: also while a run goes on.

    Raises:
        StateError: it isn't a state, is damaged or newer than this program; also for what the caller finds in it that
            isn't as it must be.
    """
    # With no writer there is no write-ahead log either, and `immutable` keeps SQLite from leaving an empty one behind.
    file = Path(os.path.realpath(path))
    quiet = "" if file.with_name(file.name + "-wal").exists() else "&immutable=1"
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro{quiet}", uri=True)) as db:
            if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
                raise StateError(f"{path}: is a database of another program. Name a state of messcli")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise StateError(
                    f"{path}: was written by a newer messcli (schema {version}). Upgrade messcli"
                )
            yield db
    except sqlite3.DatabaseError as error:
        raise StateError(f"{path}: can't be read: {first_line(error)}. Restore it from a copy") from None
    except (ValueError, TypeError, LookupError, AttributeError, zlib.error) as error:  # a flipped bit in it
        raise StateError(f"{path}: is damaged: {first_line(error)}. Restore it from a copy") from None

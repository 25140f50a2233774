"""What a run has decided, asked and finished: all that the same command needs to go on at the same place.

Knows the tables of the state; of events, decisions and answers only that they are bytes.
"""

from __future__ import annotations

import json
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from messcli.records import ErrorRow, Rejected, Request
from messcli.state.database import Database, put_meta

SNAPSHOT_EVERY = 2000  # requests between snapshots; folding so many in again takes about a second

Energy = Sequence[tuple[tuple[str, str, str], float, int]]  # (model, kind, meter), joules, requests


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
    fault: str | None = None  # its row has `error`, and whose trouble that is; None: it has none
    identity: str | None = None  # the line's own id, as JSON
    input_line: int = 0
    period: str | None = None  # in whose ledger it counts as failed
    mends: ErrorRow | None = None  # whose place its row takes


@dataclass(frozen=True, slots=True)
class Work:
    """What one transaction adds to a state."""

    done: Sequence[Done] = ()  # lines of the window, in input order
    events: Sequence[bytes] = ()  # of their requests, to be folded in again when the state is opened
    opened: Sequence[bytes] | None = (
        None  # a new window: per line its key, digest and decision; replaces any other
    )
    ahead: Sequence[tuple[int, int, bytes]] = ()  # place in the window, model, answer
    ends_window: bool = True
    running: Mapping[str, float] = field(
        default_factory=dict
    )  # joules by meter, read for what isn't answered
    energy: Energy = ()  # to be added, one after another: the sums don't depend on how work was cut
    accounts: Iterable[Sequence[Any]] = ()  # rows of the accounts table that changed
    snapshot: bytes | None = None  # everything learnt so far; it replaces all events


class Journal:
    """The tables of what was decided and finished."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.next_seq: int = database.scalar("SELECT coalesce(max(seq), 0) + 1 FROM requests")
        self._was_empty = self.next_seq == 1
        self._runs: int = database.meta("runs") or 0
        self._has_failures = bool(database.scalar("SELECT 1 FROM failures LIMIT 1"))
        self._since_snapshot: int = database.scalar(
            "SELECT coalesce((SELECT max(t) FROM events) - coalesce((SELECT t FROM snapshot), 0), 0)"
        )
        self._period = database.meta("period")
        self._energy: dict[tuple[str, str, str], tuple[float, int]] = {
            (model, kind, meter): (joules, requests)
            for model, kind, meter, joules, requests in database.rows("SELECT * FROM energy")
        }
        self.has_window = self.window() is not None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever answered: what was decided then binds nobody."""
        return self.next_seq == 1 and not self._database.scalar("SELECT count(*) FROM answers")

    def start_anew(self) -> None:
        """Forget what was set and decided before anything was answered."""
        with self._database.transaction() as db:
            for table in ("meta", "settings", "snapshot", "events", "periods", "accounts", "window"):
                db.execute(f"DELETE FROM {table}")  # noqa: S608  # no input in it
        self._period, self.has_window = None, False

    # ---- settings and periods --------------------------------------------------------------------

    def settings(self) -> dict[str, Any] | None:
        """The settings last in force; None in a new state."""
        text = self._database.scalar("SELECT value FROM settings ORDER BY rowid DESC LIMIT 1")
        settings: dict[str, Any] | None = self._database.plain(text)
        return settings

    def change(
        self, t: int, settings: Mapping[str, Any], snapshot: bytes, accounts: Iterable[Sequence[Any]]
    ) -> None:
        """Put `settings` in force from request `t` on, with what was learnt until then and the ledger.

        The period that `settings` names is opened, or opened again.
        """
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        period, horizon = settings["period"], settings["horizon"]
        with self._database.transaction() as db:
            db.execute(
                "INSERT INTO settings VALUES (?, ?, ?)", (t, now, json.dumps(settings, sort_keys=True))
            )
            db.execute(
                "INSERT INTO periods VALUES (?, ?, ?, 0) "
                "ON CONFLICT DO UPDATE SET horizon = excluded.horizon",
                (period, now, horizon),
            )
            put_meta(db, "period", period)
            _put_accounts(db, accounts)
            _put_snapshot(db, t - 1, snapshot)
        self._since_snapshot = 0
        self._period = period

    def learn(self, name: str, value: Any, t: int, snapshot: bytes) -> None:
        """Store a fact, and with it all that is known after request `t`."""
        with self._database.transaction() as db:
            put_meta(db, name, value)
            _put_snapshot(db, t, snapshot)
        self._since_snapshot = 0

    def period(self, name: str) -> tuple[int | None, int] | None:
        """(horizon, requests routed) of a contract period; None when it was never opened."""
        found = self._database.rows("SELECT horizon, requests FROM periods WHERE name = ?", name)
        return (found[0][0], found[0][1]) if found else None

    def accounts(self, period: str) -> list[tuple[Any, ...]]:
        """The rows of the accounts table of one period."""
        return self._database.rows("SELECT * FROM accounts WHERE period = ?", period)

    # ---- what is finished ------------------------------------------------------------------------

    def known(self, key: bytes) -> bytes | None:
        """The digest of the line with this key that an earlier run finished; None where none has."""
        if self._was_empty:
            return None
        digest: bytes | None = self._database.scalar("SELECT digest FROM requests WHERE key = ?", key)
        return digest

    @property
    def t(self) -> int:
        """The number of the last request."""
        last = self._database.scalar("SELECT t FROM requests WHERE t > 0 ORDER BY seq DESC LIMIT 1")
        return int(last or 0)

    def known_failure(self, line: Request | Rejected, output: str, *, known: bool) -> ErrorRow | None:
        """The error row in `output` that the row of `line` would take the place of; None where there is none.

        It is the line's own, if the line is known; else that of its id; else that of the line that stood where it
        stands and had no id.
        """
        if not self._has_failures:
            return None
        which, value = "requests.key = ?", line.key
        if known:
            return self._failure(output, which, value)
        if line.has_own_id and (found := self._failure(output, "failures.id = ?", json.dumps(line.id))):
            return found
        return self._failure(output, "failures.line = ? AND failures.id IS NULL", line.line)

    def _failure(self, output: str, which: str, value: object) -> ErrorRow | None:
        found = self._database.rows(
            "SELECT failures.seq, output, place, fault, tries, run < ?, billed_joules, plan, period "  # noqa: S608  # no input in it
            f"FROM failures JOIN requests USING (seq) WHERE output = ? AND {which} LIMIT 1",
            self._runs,
            output,
            value,
        )
        return ErrorRow(*found[0]) if found else None

    def end_run(self) -> None:
        """A run has come to the end of its input: what failed in it may be asked again by the next one."""
        if self._database.scalar("SELECT 1 FROM failures WHERE run = ? LIMIT 1", self._runs):
            self._runs += 1
            self._database.set_meta("runs", self._runs)

    def failures(self, output: str) -> int:
        """How many error rows stand in an output."""
        return int(self._database.scalar("SELECT count(*) FROM failures WHERE output = ?", output))

    def mean_joules(self, model: str) -> float | None:
        """Of a call of `model`, per request, over all runs; None where none was read."""
        mean: float | None = self._database.scalar(
            "SELECT sum(joules) / sum(requests) FROM energy WHERE model = ?", model
        )
        return mean

    # ---- the window in hand ----------------------------------------------------------------------

    def window(self) -> tuple[list[bytes], list[tuple[int, int, bytes]]] | None:
        """The window that was being worked on, as `Work.opened` gave it: its lines that aren't finished, and answers
        to them (place among these lines, model, answer). None where no window was."""
        found = self._database.rows("SELECT finished, data FROM window")
        if not found:
            return None
        ((finished, data),) = found
        with self._database.faults():
            lines = zlib.decompress(data).split(b"\n")[finished:]
        answers = self._database.rows("SELECT place, model, data FROM answers ORDER BY place, model")
        return lines, [(place - finished, model, answer) for place, model, answer in answers]

    def running(self) -> dict[str, float]:
        """Joules by meter that an earlier run had read for answers that it never got."""
        running: dict[str, float] = self._database.plain(self._database.scalar("SELECT running FROM window"))
        return running or {}

    # ---- writing ---------------------------------------------------------------------------------

    def write(
        self, db: sqlite3.Connection, work: Work, *, keeps: bool, places: Sequence[tuple[str, int]]
    ) -> None:
        """Add `work` to the tables, within a transaction.

        Args:
            keeps: False where nobody will ever read what is only needed to go on.
            places: of the rows of `work.done`: the output, and which of its rows it is.
        """
        routed = [row.t for row in work.done if row.t is not None]
        if keeps:
            self._write_window(db, work)
        again = 0  # requests that were counted in the period already
        if mended := [(row.mends.seq,) for row in work.done if row.mends is not None]:
            was_routed = "SELECT count(t) FROM requests WHERE seq = ?"
            again = sum(db.execute(was_routed, row).fetchone()[0] for row in mended)
            db.executemany("DELETE FROM requests WHERE seq = ?", mended)
            db.executemany("DELETE FROM failures WHERE seq = ?", mended)
        db.executemany(
            "INSERT INTO failures VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    seq, *place, row.input_line, row.identity, row.fault,
                    1 if row.mends is None else row.mends.tries + 1, self._runs, row.period,
                )
                for (seq, row), place in zip(enumerate(work.done, self.next_seq), places, strict=True)
                if row.fault is not None
            ],
        )  # fmt: skip
        db.executemany(
            "INSERT INTO requests VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    seq, row.key, row.digest, row.t, row.plan, row.model, row.explored, row.accuracy,
                    row.estimated_accuracy, row.joules, row.billed_joules, row.queue,
                )
                for seq, row in enumerate(work.done, self.next_seq)
            ],
        )  # fmt: skip
        if work.snapshot is not None:
            _put_snapshot(db, routed[-1] if routed else self.t, work.snapshot)
        elif routed and keeps:
            data = zlib.compress(b"\n".join(work.events), 1)
            db.execute("INSERT INTO events VALUES (?, ?, ?)", (routed[-1], data, work.ends_window))
        if routed:
            db.execute(
                "UPDATE periods SET requests = requests + ? WHERE name = ?",
                (len(routed) - again, self._period),
            )
        self._put_energy(db, work.energy)
        _put_accounts(db, work.accounts)

    def _write_window(self, db: sqlite3.Connection, work: Work) -> None:
        if work.opened is not None:
            data = zlib.compress(b"\n".join(work.opened), 1)
            db.execute("DELETE FROM answers")
            db.execute("INSERT OR REPLACE INTO window VALUES (1, ?, 0, '{}', ?)", (len(work.opened), data))
        elif not self.has_window:
            return
        elif work.ends_window:
            db.execute("DELETE FROM window")
            db.execute("DELETE FROM answers")
            return
        else:
            db.execute(
                "UPDATE window SET finished = finished + ?, running = ?",
                (len(work.done), json.dumps(work.running)),
            )
            if work.done:
                db.execute("DELETE FROM answers WHERE place < (SELECT finished FROM window)")
        # an answer comes again when a model has read it
        db.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", work.ahead)

    def written(self, work: Work) -> None:
        """The transaction that `write` was part of is committed."""
        self.next_seq += len(work.done)
        self._energy.update(self._sums(work.energy))
        routed = sum(row.t is not None for row in work.done)
        self._since_snapshot = 0 if work.snapshot is not None else self._since_snapshot + routed
        if work.opened is not None:
            self.has_window = True
        elif work.ends_window:
            self.has_window = False

    @property
    def wants_snapshot(self) -> bool:
        """Whether the next work should carry a snapshot."""
        return self._since_snapshot >= SNAPSHOT_EVERY

    def add_energy(self, energy: Energy) -> None:
        """Add joules that belong to no request (overhead of starting and ending)."""
        with self._database.transaction() as db:
            self._put_energy(db, energy)
        self._energy.update(self._sums(energy))

    def _sums(self, energy: Energy) -> dict[tuple[str, str, str], tuple[float, int]]:
        """The rows of the energy table that change, with what they will say."""
        sums: dict[tuple[str, str, str], tuple[float, int]] = {}
        for key, joules, requests in energy:
            known = sums.get(key) or self._energy.get(key) or (0.0, 0)
            sums[key] = (known[0] + joules, known[1] + requests)
        return sums

    def _put_energy(self, db: sqlite3.Connection, energy: Energy) -> None:
        rows = [(*key, *sums) for key, sums in self._sums(energy).items()]
        db.executemany("INSERT OR REPLACE INTO energy VALUES (?, ?, ?, ?, ?)", rows)

    # ---- what was learnt -------------------------------------------------------------------------

    def snapshot(self) -> bytes | None:
        """The last snapshot; None: there is none."""
        data = self._database.scalar("SELECT data FROM snapshot")
        with self._database.faults():
            return None if data is None else zlib.decompress(data)

    def events(self) -> Iterator[tuple[list[bytes], bool]]:
        """The events since the snapshot in order, in pieces; whether a piece was the last of its window."""
        for data, ends_window in self._database.each("SELECT data, ends_window FROM events ORDER BY t"):
            with self._database.faults():
                yield zlib.decompress(data).split(b"\n"), bool(ends_window)


def _put_accounts(db: sqlite3.Connection, accounts: Iterable[Sequence[Any]]) -> None:
    db.executemany("INSERT OR REPLACE INTO accounts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", accounts)


def _put_snapshot(db: sqlite3.Connection, t: int, data: bytes) -> None:
    # Stored, not deflated: most of it is numbers that hardly shrink, and every snapshot would pay for the try.
    db.execute("INSERT OR REPLACE INTO snapshot VALUES (1, ?, ?)", (t, zlib.compress(data, 0)))
    db.execute("DELETE FROM events")

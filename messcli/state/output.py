"""The output file as the state knows it: how much of it is known to be on disk, and the rows that aren't.

After a crash the output is cut back to what is known to be on disk, and written again from the rows that the state
kept. Knows rows as text, and nothing of what they say.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from messcli.errors import StateError, UsageError
from messcli.files.sinks import (
    STDOUT,
    Part,
    Sink,
    changed_part,
    open_beside,
    open_sink,
    opened_rows,
    sync_folder,
)
from messcli.state.database import Database

SYNC_SECONDS = 1.0  # how much finished work a power cut may cost (a crash of the process costs none)


class Output:
    """Where rows go: a file or standard output, opened by `open`.

    Args:
        next_seq: the number that the next finished line will have.
    """

    def __init__(self, database: Database, next_seq: int) -> None:
        self._database = database
        self._next_seq = next_seq
        self._sink: Sink | None = None
        self._output = self._name = ""
        self._synced_bytes = 0
        self._is_new = False  # the file wasn't there before
        self._registered_seq = 0  # the last row before the output's first
        self._marked_open = False  # the state says that the output is being written
        self.lines = 0  # rows of it, those that aren't written yet included
        self._unsynced: list[int] = []  # rows of the sink that aren't safe yet
        self._synced_rows = 0  # rows of the sink that are
        self._last_sync = time.monotonic()

    def open(self, output: str) -> None:
        """Bring the output to what the state knows: cut a torn tail, write again what may be missing.

        Raises:
            MessError: the file holds something that isn't this state's, or lacks finished rows.
        """
        self._output = output
        self._name = name = self._name_of(output)
        if output != STDOUT and self._database.path and not self._known(name) and _size(output):
            self._adopt(output, name)
        self._put_in_place(output, name)
        synced_bytes, synced_seq, is_open = self._known(name) or (0, self._next_seq - 1, 0)
        known = self._database.scalar("SELECT lines FROM outputs WHERE path = ?", name)
        self.lines = known if known is not None else 0
        if output == STDOUT:
            self.lines = max(self.lines, 0)  # no row of it takes the place of another one
        self._registered_seq = synced_seq
        self._marked_open = bool(is_open)
        self._synced_bytes = synced_bytes
        self._unsynced, self._synced_rows = [], 0
        self._is_new = output != STDOUT and not Path(output).exists()
        with self._database.faults(output):
            self._sink = open_sink(output, synced_bytes, torn=bool(is_open), parts=self._parts(name))
            if self.lines < 0:
                self._count_lines(name, synced_seq)
            missing = self._missing(name, synced_seq)
            while batch := list(islice(missing, 1000)):
                self._unsynced.extend(seq for seq, _ in batch)
                self._sink.write([line for _, line in batch])
        if self._unsynced:
            self.sync(durable=True)

    def _count_lines(self, name: str, synced_seq: int) -> None:
        """How many rows it has, where an earlier version didn't say."""
        with opened_rows(Path(self._output)) as rows:
            self.lines = sum(1 for _ in rows) + sum(1 for _ in self._missing(name, synced_seq))
        with self._database.transaction() as db:
            db.execute("UPDATE outputs SET lines = ? WHERE path = ?", (self.lines, name))

    def _known(self, name: str) -> tuple[int, int, int] | None:
        found = self._database.rows("SELECT synced_bytes, synced_seq, open FROM outputs WHERE path = ?", name)
        return (found[0][0], found[0][1], found[0][2]) if found else None

    def _parts(self, name: str) -> list[Part]:
        query = "SELECT begin, end, checksum FROM parts WHERE output = ? ORDER BY begin"
        return [Part(*row) for row in self._database.rows(query, name)]

    def _adopt(self, output: str, name: str) -> None:
        """Take a file that the state doesn't know for one of its own under another name, where its bytes say so."""
        folder = self._database.path.parent if self._database.path else Path()
        for (known,) in self._database.rows("SELECT path FROM outputs WHERE path <> '-'"):
            parts = self._parts(known)
            if (folder / known).exists() or not parts or parts[-1].end > _size(output):
                continue
            with Path(output).open("rb") as file:
                if changed_part(file, parts) is not None:
                    continue
            with self._database.transaction() as db:
                for table, column in (("outputs", "path"), ("rows", "output"), ("parts", "output")):
                    db.execute(f"UPDATE {table} SET {column} = ? WHERE {column} = ?", (name, known))  # noqa: S608  # no input in it
            return
        raise StateError(
            f"{output}: has rows that {self._database.name} knows nothing of. Move it away, or give the "
            "--state that it was written with"
        )

    def _missing(self, name: str, synced_seq: int) -> Iterator[tuple[int, str]]:
        # Each by the index that serves it: rows of standard output are many, and kept.
        which = "output = '-'" if name == STDOUT else "output = ? AND output <> '-'"
        names = () if name == STDOUT else (name,)
        query = f"SELECT seq, line FROM rows WHERE {which} AND seq > ? ORDER BY seq"  # noqa: S608  # no input in it
        yield from self._database.each(query, *names, synced_seq)

    def _name_of(self, output: str) -> str:
        state = self._database.path
        if output == STDOUT or state is None:
            return output
        path, state = (Path(os.path.realpath(one)) for one in (output, state))  # no error in a loop
        if path in (state, *(state.with_name(state.name + end) for end in (".lock", "-wal", "-shm"))):
            raise UsageError(f"{output}: is the state's own file. Give the output another name")
        return os.path.relpath(path, state.parent)

    # ---- writing ---------------------------------------------------------------------------------

    @property
    def opens_now(self) -> bool:
        """Whether the next rows are the first ones to a file: that must be known before they are written."""
        return self._sink is not None and not self._marked_open and self._is_file

    @property
    def is_due(self) -> bool:
        """Whether it is time to wait for the disk."""
        return time.monotonic() - self._last_sync >= SYNC_SECONDS

    @property
    def _is_file(self) -> bool:
        return self._output != STDOUT

    @property
    def name(self) -> str:
        """What the state calls it."""
        return self._name

    @property
    def mends(self) -> bool:
        """Whether rows can take the place of others; standard output prints them behind the others."""
        return self._is_file and self._sink is not None

    def keep(self, db: sqlite3.Connection, rows: Sequence[tuple[int, str]]) -> None:
        """Keep rows (number, text) within a transaction, until they are known to be on disk."""
        if self._sink is None:
            return
        if not self._marked_open:
            db.execute(
                "INSERT INTO outputs (path, synced_bytes, synced_seq, open) VALUES (?, 0, ?, 1) "
                "ON CONFLICT DO UPDATE SET open = 1",
                (self._name, self._registered_seq),
            )
            self._marked_open = True
        db.execute("UPDATE outputs SET lines = lines + ? WHERE path = ?", (len(rows), self._name))
        if self._database.path:
            db.executemany(
                "INSERT INTO rows VALUES (?, ?, ?)", [(seq, self._name, line) for seq, line in rows]
            )

    def replace(self, db: sqlite3.Connection, mended: Sequence[tuple[int, str]], old: Sequence[int]) -> None:
        """Keep rows (place, text) that take the place of error rows, within a transaction, until `finish`.

        Args:
            old: numbers of the error rows, which standard output prints no more.
        """
        db.executemany(
            "INSERT OR REPLACE INTO mended VALUES (?, ?, ?)", [(self._name, *row) for row in mended]
        )
        if old and not self._is_file:
            db.executemany("DELETE FROM rows WHERE output = '-' AND seq = ?", [(seq,) for seq in old])

    def write(self, rows: Sequence[tuple[int, str]]) -> None:
        """Write rows that were kept, when the transaction is committed."""
        if self._sink is None:
            return
        if rows:
            with self._database.faults(self._output):
                self._sink.write([line for _, line in rows])
            self._unsynced.extend(seq for seq, _ in rows)
            self.lines += len(rows)
        if self.is_due or (rows and not self._is_file):
            self.sync(durable=self.is_due)

    def sync(self, *, durable: bool, ended: bool = False) -> None:
        """Note how much of the output is safe, and forget the rows kept for it.

        Args:
            durable: wait for the disk.
            ended: nothing more will be written: from now on a longer file is somebody else's doing.
        """
        if self._sink is None:
            return
        with self._database.faults(self._output):
            size, rows, checksum = self._sink.sync()
        fresh = rows - self._synced_rows
        # with rows held back for a whole gzip member, more is to be written
        closes = ended and self._marked_open and fresh == len(self._unsynced) and self._is_file
        with self._database.transaction(durable=durable) as db:
            if fresh:
                last = self._unsynced[fresh - 1]
                db.execute(
                    "UPDATE outputs SET synced_bytes = ?, synced_seq = ? WHERE path = ?",
                    (size, last, self._name),
                )
                if self._is_file and self._database.path:
                    part = (self._name, self._synced_bytes, size, checksum)
                    db.execute("INSERT INTO parts VALUES (?, ?, ?, ?)", part)
                if self._is_file:
                    db.execute(
                        "DELETE FROM rows WHERE output = ? AND output <> '-' AND seq <= ?", (self._name, last)
                    )
            if closes:
                db.execute("UPDATE outputs SET open = 0 WHERE path = ?", (self._name,))
        if closes:
            self._marked_open = False
        if fresh:
            self._synced_bytes = size
        del self._unsynced[:fresh]
        self._synced_rows = rows
        if durable:
            self._last_sync = time.monotonic()

    def finish(self) -> None:
        """The input has ended: write out all that is held back, put mended rows in place, and wait for the disk."""
        if self._sink:
            with self._database.faults(self._output):
                self._sink.finish()
        self.sync(durable=True, ended=True)
        if self.mends and self._database.path:
            self._write_anew()

    # ---- rows in the place of others ------------------------------------------------------------

    def _write_anew(self) -> None:
        """Write the file again beside itself, with mended rows in their places; then let it take the file's place.

        A crash leaves the file as it was, or as it is to be: the state says which, before the names change.
        """
        if not self._database.scalar("SELECT count(*) FROM mended WHERE output = ?", self._name):
            return
        path = Path(os.path.realpath(self._output))
        beside = _beside(path)
        if not self._anew and beside.exists():
            raise StateError(f"{beside}: is in the way of writing {path.name} anew. Move it away")
        self._set_anew(1)
        with self._database.faults(str(beside)):
            sink = open_beside(path, beside)
            parts = self._copy(path, sink)
        with self._database.transaction(durable=True) as db:
            db.execute(
                "UPDATE outputs SET synced_bytes = ?, anew = 2 WHERE path = ?", (parts[-1].end, self._name)
            )
            db.execute("DELETE FROM parts WHERE output = ?", (self._name,))
            db.executemany("INSERT INTO parts VALUES (?, ?, ?, ?)", [(self._name, *part) for part in parts])
            db.execute("DELETE FROM mended WHERE output = ?", (self._name,))
        with self._database.faults(self._output):
            os.replace(beside, path)  # noqa: PTH105  # atomic, as Path.replace is; named for what it is
            sync_folder(path)
        self._set_anew(0)
        if self._sink:
            self._sink.close()
        self._sink, self._synced_bytes = sink, parts[-1].end

    def _copy(self, path: Path, sink: Sink) -> list[Part]:
        """The file's rows, or those that take their places, written to `sink`."""
        parts: list[Part] = []
        begin = place = 0

        def note() -> None:
            nonlocal begin
            safe = sink.sync()
            parts.append(Part(begin, safe.size, safe.checksum))
            begin = safe.size

        with opened_rows(path) as rows:
            while batch := list(islice(rows, _COPIED)):
                found = self._database.rows(
                    "SELECT place, line FROM mended WHERE output = ? AND place BETWEEN ? AND ?",
                    self._name, place, place + len(batch) - 1,
                )  # fmt: skip
                for at, line in found:
                    batch[at - place] = line
                sink.write(batch)
                place += len(batch)
                if place % (_COPIED * 64) == 0:
                    note()
        sink.finish()
        note()
        return parts

    @property
    def _anew(self) -> int:
        return self._database.scalar("SELECT anew FROM outputs WHERE path = ?", self._name) or 0

    def _set_anew(self, anew: int) -> None:
        with self._database.transaction(durable=True) as db:
            db.execute("UPDATE outputs SET anew = ? WHERE path = ?", (anew, self._name))

    def _put_in_place(self, output: str, name: str) -> None:
        """End what a crash left of writing the file anew."""
        if output == STDOUT or not self._anew:
            return
        path = Path(os.path.realpath(output))
        with self._database.faults(output):
            if self._anew == 2 and _beside(path).exists():
                os.replace(_beside(path), path)  # noqa: PTH105  # as above
                sync_folder(path)
            else:
                _beside(path).unlink(missing_ok=True)
        self._set_anew(0)

    def suspend(self) -> None:
        """The run ends before its input does: wait for the disk."""
        self.sync(durable=True, ended=True)

    # ---- reading ---------------------------------------------------------------------------------

    def rows(self, output: str = STDOUT) -> Iterator[str]:
        """The rows the state still keeps: all of standard output's, of a file's those not known to be on disk."""
        for _, line in self._missing(self._name_of(output), 0):
            yield line

    def files(self) -> list[str]:
        """The files that rows went to, by name."""
        if self._database.path is None:
            return []
        folder = self._database.path.parent
        return [
            str(folder / name)
            for (name,) in self._database.rows("SELECT path FROM outputs WHERE path <> '-' ORDER BY path")
        ]

    def unfinished(self) -> list[tuple[str, int]]:
        """Other files than the one that is open whose last rows aren't known to be on disk, and how many."""
        if self._database.path is None:
            return []
        rows = self._database.rows("SELECT output, count(*) FROM rows WHERE output <> '-' GROUP BY output")
        folder = self._database.path.parent
        return [(str(folder / name), count) for name, count in rows if name != self._name]

    def close(self, *, discard: bool = False) -> None:
        """Let go of it. `discard`: and leave nothing behind of a file that holds nothing."""
        if self._sink:
            if discard and self._is_new and not _size(self._output):
                Path(self._output).unlink(missing_ok=True)
            self._sink.close()
            self._sink = None


_COPIED = 1024  # rows at a time


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.anew")


def _size(output: str) -> int:
    path = Path(output)
    return path.stat().st_size if path.is_file() else 0

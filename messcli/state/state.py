"""The state: one SQLite file that makes a run durable, resumable and exactly-once.

The state is the truth and the output file is its projection. What was decided, answered and finished is committed
together with the rows and the ledger; only then do the rows go to the output. Knows nothing of models or the
algorithm: it stores what it's given. docs/state.md says what is promised.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from messcli.errors import StateError
from messcli.files.standard import write_data
from messcli.state.database import Database
from messcli.state.journal import Journal, Work
from messcli.state.output import Output


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
        self.database = Database(path, wait_seconds=wait_seconds)
        self.name = self.database.name
        try:
            self.journal = Journal(self.database)
            self.output = Output(self.database, self.journal.next_seq)
        except BaseException:  # opened, and then found to be damaged
            self.database.close()
            raise

    def commit(self, work: Work) -> None:
        """Commit what was decided, answered and finished, all together; then write its rows out."""
        first, places, mended = self.journal.next_seq, [], []
        rows: list[tuple[int, str]] = []  # that go behind the others
        for seq, row in enumerate(work.done, first):
            if row.mends is not None and self.output.mends:
                mended.append((row.mends.place, row.line))
                places.append((self.output.name, row.mends.place))
            else:
                places.append((self.output.name, self.output.lines + len(rows)))
                rows.append((seq, row.line))
        # The first commit to a file says that it is being written, before it is. What is ahead of its turn is as
        # safe as rows are.
        durable = self.output.is_due or (bool(rows) and self.output.opens_now)
        with self.database.transaction(durable=durable) as db:
            self.journal.write(db, work, keeps=self.is_kept, places=places)
            self.output.replace(db, mended, [row.mends.seq for row in work.done if row.mends is not None])
            if rows:
                self.output.keep(db, rows)
        self.journal.written(work)
        self.output.write(rows)

    @property
    def is_kept(self) -> bool:
        """Whether it outlives this process."""
        return self.database.path is not None

    @property
    def wants_snapshot(self) -> bool:
        """Whether the next commit should carry a snapshot."""
        return self.is_kept and self.journal.wants_snapshot

    def close(self, *, failed: bool = False) -> None:
        """Close it. One that was made just now, and in which nothing was decided before it failed, leaves no trace."""
        discard = failed and self.database.is_new and self.journal.is_empty
        self.output.close(discard=discard)
        self.database.close(discard=discard)

    def __enter__(self) -> State:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(failed=kind is not None)


def print_rows(path: Path, output: str, *, wait_seconds: float = 0.0) -> list[str]:
    """Print the rows that the state at `path` keeps of `output` to standard output.

    Returns:
        Where its rows stand, if it keeps none: the files that it wrote.

    Raises:
        StateError: there is no such state, or it can't be read.
        BrokenPipeError: the reader has gone.
    """
    if not path.exists():
        raise StateError(f"{path}: no such file. Name the --state that the rows were routed with")
    with State(path, wait_seconds=wait_seconds) as state:
        rows = state.output.rows(output)
        count = 0
        while batch := list(islice(rows, 1000)):
            write_data("".join(f"{line}\n" for line in batch).encode())
            count += len(batch)
        return [] if count else state.output.files()

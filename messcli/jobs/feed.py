"""The lines of an input that are still to be routed.

Knows the input and what the state has finished of it; nothing of models or decisions.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from queue import Empty, Queue

from messcli.errors import InputError, MessError
from messcli.records import ErrorRow, Rejected
from messcli.routing.line import Line
from messcli.routing.sla import DEFAULT_PLAN
from messcli.signals import Stop
from messcli.state.journal import Journal

PAUSE_SECONDS = 0.05  # without a line, after which `patiently` says so
RETRY_FAILED, RETRY_ALL, RETRY_NONE = "failed", "all", "none"
TRIES = 3  # of a request, each in a run of its own, before its error row is left as it is
_READ_AHEAD = 50_000  # lines that wait while models answer: more than the largest window


def patiently(lines: Iterator[Line]) -> Iterator[Line | None]:
    """The lines as they come, read in a thread; None where none came for a moment.

    Raises what reading them raises.
    """
    queue: Queue[Line | BaseException | None] = Queue(_READ_AHEAD)

    def read() -> None:
        try:
            for line in lines:
                queue.put(line)
        except BaseException as error:  # raised in the thread that takes the lines
            queue.put(error)
        else:
            queue.put(None)

    threading.Thread(target=read, name="messcli-reader", daemon=True).start()
    while True:
        try:
            line = queue.get(timeout=PAUSE_SECONDS)
        except Empty:
            yield None
            continue
        if line is None:
            return
        if isinstance(line, BaseException):
            raise line
        yield line


class Feed:
    """Iterates over the lines that are left. What ends it early stands in `failure`.

    Args:
        lines: of the input; None where no line came for a moment.
        limit: of lines; None: all.
        plan: of requests that name none.
        alphas: the plans that there are.
        stop_on_error: end at the first line that is no request.
        stop: is told while a line is waited for, so that a signal needn't wait too.
        output: what the state calls the output, whose error rows may be mended.
        retry: which failed requests are asked again.
    """

    def __init__(
        self,
        lines: Iterator[Line | None],
        *,
        limit: int | None,
        plan: str | None,
        alphas: Mapping[str, float],
        journal: Journal,
        stop_on_error: bool,
        stop: Stop,
        output: str = "",
        retry: str = RETRY_FAILED,
    ) -> None:
        self._lines = lines
        self._limit = limit
        self._plan = plan
        self._alphas = alphas
        self._journal = journal
        self._stop_on_error = stop_on_error
        self._stop = stop
        self._output = output
        self._retry = retry
        self._mended: set[int] = set()  # error rows that a line of this run takes the place of
        self.read = 0  # lines so far, finished ones included
        self.already_done = 0
        self.failure: MessError | None = None

    def __iter__(self) -> Iterator[Line | None]:
        # A failure waits until the lines before it are routed: it costs no work.
        try:
            self._stop.in_hand = False
            while self._limit is None or self.read < self._limit:
                line = next(self._lines)
                if line is not None:
                    self.read += 1
                    todo = self._todo(line)
                    if todo is None:
                        self.already_done += 1
                        continue
                    if isinstance(todo, Rejected) and self._stop_on_error:
                        self.failure = InputError(todo.error)
                        return
                    line = todo
                self._stop.in_hand = True
                yield line
                self._stop.in_hand = False
        except StopIteration:
            pass
        except InputError as error:
            self.failure = error
        finally:
            self._stop.in_hand = True

    def _todo(self, line: Line) -> Line | None:
        """What is left to do for a line: nothing, when an earlier run finished it."""
        known = self._journal.known(line.key)
        row = self._journal.known_failure(line, self._output, known=known is not None)
        if row is not None and row.seq in self._mended:
            row, known = None, None  # another line has its place: this one is new
        if known == line.digest and (row is None or not self._again(row)):
            return None
        if row is not None:
            self._mended.add(row.seq)
            line = replace(line, mends=row)
        if isinstance(line, Rejected):
            return line
        if known is not None and row is None:
            why = "has another prompt than when it was routed. Give the new prompt a new id"
            return self._unless_done(line.reject(why))
        if line.plan is None and self._plan is not None:
            line = replace(line, plan=self._plan)
        if self._alphas.keys() == {DEFAULT_PLAN}:  # no plans: a field of that name is the user's own
            return line if line.plan is None else replace(line, plan=None)
        plan = DEFAULT_PLAN if line.plan is None else line.plan
        if plan not in self._alphas:
            names = ", ".join(sorted(name for name in self._alphas if name)) or "none"
            what = f'field "plan": unknown plan "{plan}"' if plan else "belongs to no plan"
            return self._unless_done(line.reject(f"{what}. Plans of the zoo file: {names}"))
        return line

    def _again(self, row: ErrorRow) -> bool:
        """Whether the request of an error row is asked again as it is."""
        if self._retry == RETRY_FAILED:
            return bool(row.is_old) and row.fault == "model" and row.tries < TRIES
        return bool(row.is_old) and self._retry == RETRY_ALL

    def _unless_done(self, line: Rejected) -> Rejected | None:
        return None if self._journal.known(line.key) else line

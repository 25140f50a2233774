"""The core of a run: what the loop yields is committed, written and counted, until the input or a signal ends it.

Knows the loop, the state and the tally; nothing of how models, meters or controllers come to be.
"""

from __future__ import annotations

import difflib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from messcli.errors import MessError, StateError, UsageError
from messcli.jobs.feed import Feed
from messcli.jobs.resume import account_rows, keep_means, planned_line, snapshot
from messcli.jobs.tally import Tally
from messcli.records import ROW_FIELDS, Fault, Rejected
from messcli.routing.asking import Pauses, no_pause
from messcli.routing.controller import Controller
from messcli.routing.failures import owner
from messcli.routing.line import Chunk, Look, Reader, Settled, Unfinished
from messcli.routing.loop import chunks
from messcli.routing.sla import DEFAULT_PLAN
from messcli.routing.source import OutcomeSource
from messcli.signals import NothingInHand, Stop
from messcli.state.journal import Done, Energy, Work
from messcli.state.state import State

# (a finished line, names of the zoo) -> the row to be written
MakeRow = Callable[[Settled | Rejected, Sequence[str]], dict[str, Any]]

_PLAIN = json.JSONEncoder(ensure_ascii=False, allow_nan=False)  # made once: it is called for every row


class RowText:
    """Rows as text: what a finished line looks like in the output.

    Args:
        columns: of a row, in order; empty: all.
    """

    def __init__(self, make: MakeRow, names: Sequence[str], columns: Sequence[str]) -> None:
        self._make = make
        self._names = names
        self._columns = columns
        self._checked = False

    def of(self, line: Settled | Rejected) -> str:
        """The row, without its newline."""
        row = self._make(line, self._names)
        if self._columns:
            if not self._checked:  # before anything is committed
                _check_columns(self._columns, row)
                self._checked = True
            row = {
                name: row.get(name) for name in (*self._columns, "error") if name != "error" or name in row
            }
        text = _PLAIN.encode(row)
        try:
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair in a field that passes through
            return json.dumps(row, allow_nan=False)
        return text


def _check_columns(columns: Sequence[str], row: Mapping[str, Any]) -> None:
    """Refuse what looks like a slip. A column that only some of the input's lines have is none."""
    for column in columns:
        close = difflib.get_close_matches(column, ROW_FIELDS, n=1, cutoff=0.8)
        if column not in row and close:
            raise UsageError(f"--fields: no column {column}; did you mean {close[0]}?")
    if not row.keys() & set(columns):
        raise UsageError(f"--fields {','.join(columns)}: no such column; a row has {', '.join(row)}")


class Patience:
    """Waits while no model is there, longer each time; gives up once it has waited so long in all.

    Args:
        seconds: from the first of the pauses that followed one another.
        stop: ends a pause at once.
        tell: takes a line for the user.
    """

    def __init__(
        self,
        seconds: float,
        stop: Stop,
        tell: Callable[[str], None],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._seconds = seconds
        self._stop = stop
        self._tell = tell
        self._sleep = sleep

    def __call__(self, before: int, why: str) -> bool:
        waited = sum(_pause(n) for n in range(before))
        left = min(_pause(before), self._seconds - waited)
        if left <= 0:
            return False
        self._tell(f"warning: no model answers; trying again in {left:.0f} s. {why}")
        while left > 0 and self._stop.signal is None:
            self._sleep(min(left, _TICK_SECONDS))
            left -= _TICK_SECONDS
        return True


_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 60.0
_TICK_SECONDS = 0.1  # how often a pause looks whether a signal came


def _pause(number: int) -> float:
    """Seconds of a pause, counted from 0: each is twice the one before."""
    return float(min(_FIRST_PAUSE_SECONDS * 2.0 ** min(number, 16), _LONGEST_PAUSE_SECONDS))


@dataclass(frozen=True, slots=True)
class Session:
    """A run, with everything that it needs.

    Args:
        period: the contract period whose accounts are kept.
    """

    state: State
    controller: Controller
    source: OutcomeSource
    feed: Feed
    text: RowText
    tally: Tally
    period: str
    stop: Stop
    tell: Callable[[str], None]
    look: Look | None = None
    readers: Sequence[Reader] = ()
    linger: float = math.inf  # seconds from a window's first line, after which it closes with what has come
    pause: Pauses = no_pause  # while no model is there
    scores: bool = False  # a row that the metric failed on has `error`
    halt: Callable[[], None] | None = (
        None  # ends the source at the first request that fails; None: it is a row
    )

    def run(
        self,
        on_chunk: Callable[[], None],
        *,
        unfinished: Unfinished | None,
    ) -> bool:
        """Work until the input ends or a signal came. Everything that is finished is committed.

        Returns:
            Whether the input has ended.
        """
        if unfinished is not None:
            self._tell_of(unfinished)
        work = chunks(
            self.feed,
            self.controller,
            self.source,
            unfinished=unfinished,
            linger=self.linger,
            look=self.look,
            readers=self.readers,
            pause=self.pause,
            halt=self.halt,
        )
        ended = False
        try:
            for chunk in work:
                self._commit(chunk)
                on_chunk()
                self._tell_warnings()
                if self.stop.signal is not None and (chunk.ends_window or chunk.opened is not None):
                    break
            else:
                ended = self.stop.signal is None
        except NothingInHand:  # the lines read for the next window are read again by the next run
            pass
        except StateError:
            raise
        except MessError:  # a model or a meter: what was finished and answered is committed
            self._end()
            self.state.output.suspend()
            raise
        self._end()
        if self.state.is_kept:
            keep_means(self.state, self.controller, self.period)
        if ended:
            self.state.output.finish()
            self.state.journal.end_run()
        else:
            self.state.output.suspend()
        return ended

    def _tell_of(self, unfinished: Unfinished) -> None:
        lost = self.state.journal.running()
        joules = sum(lost.values())
        self.tell(
            f"going on in a window of which {len(unfinished.decisions)} lines aren't finished, and "
            f"{len(unfinished.answers)} answers are here already"
            + (f"; {joules:.4g} J went into answers that were lost, and are overhead" if joules else "")
        )

    def _commit(self, chunk: Chunk) -> None:
        journal = self.state.journal
        overhead = dict(self.source.take_overhead())
        opened = chunk.opened
        if opened is not None:
            for meter, joules in journal.running().items():
                overhead[meter] = overhead.get(meter, 0.0) + joules
            one_stage = all(item.decision is None or item.decision.is_one_stage for item in opened[:1])
            if len(opened) == 1 and one_stage and not journal.has_window and self.linger == math.inf:
                opened = None  # of one line nothing can be ahead: it is finished or it isn't
        done = [self._done(line) for line in chunk.lines]
        for row in done:  # a failure that has gone counts no more
            if row.mends is not None and row.mends.period == self.period:
                account = self.controller.accounts.get(row.mends.plan or DEFAULT_PLAN)
                if account is not None:
                    account.failed -= 1
        for line in chunk.lines:
            self.tally.add(line)
        self.tally.add_overhead(overhead)
        # the end of a window that has no requests left (the input lost them) is no event that could be folded in again
        wants_snapshot = self.state.wants_snapshot or (chunk.ends_window and not chunk.events)
        self.state.commit(
            Work(
                done,
                [event.dumps() for event in chunk.events],
                opened=None if opened is None else [planned_line(item) for item in opened],
                ahead=[(place, m, outcome.dumps()) for place, m, outcome in chunk.ahead],
                ends_window=chunk.ends_window,
                running=self.source.running_joules(),
                energy=[*self._energy(chunk), *_as_energy(overhead)],
                accounts=account_rows(self.controller, self.period) if chunk.lines else (),
                snapshot=snapshot(self.controller) if wants_snapshot and self.state.is_kept else None,
            )
        )
        if wants_snapshot and self.state.is_kept:
            keep_means(self.state, self.controller, self.period)

    def _end(self) -> None:
        """Book the overhead after the last window."""
        overhead = self.source.take_overhead()
        self.tally.add_overhead(overhead)
        self.state.journal.add_energy(_as_energy(overhead))
        self._tell_warnings()

    def _tell_warnings(self) -> None:
        for warning in (*self.source.take_warnings(), *self.tally.take_warnings()):
            self.tell(f"warning: {warning}")

    def _done(self, line: Settled | Rejected) -> Done:
        text = self.text.of(line)
        if isinstance(line, Rejected):
            return Done(
                line.key,
                line.digest,
                text,
                plan=line.plan or None,
                fault="request",
                identity=json.dumps(line.id) if line.has_own_id else None,
                input_line=line.line,
                period=None if line.plan is None else self.period,
                mends=line.mends,
            )
        request, decision, served = line.request, line.decision, line.served
        outcome = None if served is None else line.outcomes[served]
        return Done(
            request.key,
            request.digest,
            text,
            t=decision.t,
            plan=request.plan,
            model=None if served is None else self.source.names[served],
            explored=decision.explored,
            accuracy=None if outcome is None else outcome.accuracy,
            estimated_accuracy=of_model(decision.given or decision.estimates, served),
            joules=None if outcome is None else outcome.joules,
            billed_joules=line.billed_joules,
            queue=line.queue,
            fault=self._fault(line),
            identity=json.dumps(request.id) if request.has_own_id else None,
            input_line=request.line,
            period=self.period if served is None else None,
            mends=request.mends,
        )

    def _fault(self, line: Settled) -> Fault | None:
        """Whose trouble it is that its row has `error`; None: it has none."""
        if line.served is None:
            return owner(list(line.outcomes.values()))
        return "run" if self.scores and line.outcomes[line.served].unscored is not None else None

    def _energy(self, chunk: Chunk) -> Energy:
        names = self.source.names
        return (
            [
                ((names[m], _kind(line, m), outcome.meter), outcome.joules, 1)
                for line in chunk.lines
                if isinstance(line, Settled)
                for m, outcome in line.outcomes.items()
                if outcome.joules is not None and outcome.meter is not None
            ]
            + [
                (("(judge)", "judged", judgement.meter), judgement.joules, 1)
                for line in chunk.lines
                if isinstance(line, Settled)
                for outcome in line.outcomes.values()
                for judgement in outcome.judgements
                if judgement.joules is not None and judgement.meter is not None
            ]
            + [
                ((names[line.decision.checked_by], "check", check.meter), check.joules, 1)
                for line in chunk.lines
                if isinstance(line, Settled) and line.decision.checked_by is not None
                for check in line.checks.values()
                if check.joules is not None and check.meter is not None
            ]
        )


def _kind(line: Settled, m: int) -> str:
    """What a model answered a request for."""
    if m == line.served:
        return "served"
    if m in line.errors:
        return "failed"
    if line.decision.audits(m):
        return "audit"
    if line.decision.given is not None:
        return "look"
    return "audit" if line.decision.audited and not line.decision.explored else "exploration"


def of_model(values: Sequence[float] | None, m: int | None) -> float | None:
    """The value of one model; None where there is none."""
    return None if values is None or m is None else values[m]


def _as_energy(overhead: Mapping[str, float]) -> Energy:
    """Overhead by meter as the state's energy table has it."""
    return [(("", "overhead", meter), joules, 0) for meter, joules in overhead.items()]

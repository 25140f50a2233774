"""`route`: requests in, rows out, every window committed. Wires zoo, meter, state and loop together.

Knows files and signals; prints nothing: it tells its caller, who has the terminal.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

from messcli.calibration.file import Calibration, find_calibration
from messcli.energy.meter import check_choice
from messcli.errors import InputError, MessError, MeterError, UsageError
from messcli.files.dialects import load_dialect
from messcli.files.requests import count_lines, open_input, read_requests
from messcli.files.sinks import STDOUT
from messcli.jobs.config import LOCAL, RouteConfig, Running, Writing
from messcli.jobs.fleet import open_live
from messcli.jobs.resume import (
    CreateController,
    account_rows,
    check_signature,
    resume,
    snapshot,
    terms_in_force,
)
from messcli.jobs.summary import Progress, Summary, Tally
from messcli.metrics import AUTO, Metric, load_metric
from messcli.models.live import Live
from messcli.records import ROW_FIELDS, Outcome, Rejected, Request, rejected_row, row_of
from messcli.routing.controller import DEFAULT_PLAN, Controller
from messcli.routing.loop import Line, Settled, Step, steps
from messcli.routing.setup import create_controller
from messcli.routing.source import Asked
from messcli.signals import NothingInHand, Stop, stop_signals
from messcli.state.database import Done, State
from messcli.tariff import Spent, Tariff
from messcli.zoo import Zoo, load_zoo

# (a finished line, names of the zoo) -> the row to be written
MakeRow = Callable[[Settled | Rejected, Sequence[str]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Job:
    """What differs between the commands that share the loop, the state and the output."""

    controller: CreateController
    row: MakeRow


def route(
    config: RouteConfig,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Summary:
    """Route `config.input` to `config.output`, going on where an earlier run stopped.

    Args:
        on_progress: called after every window. With one, the input's lines are counted first.
        tell: takes lines for the user's eyes (what the meter is, what went wrong and was survived).

    Raises:
        MessError: with what the user can do; all finished windows are kept.
    """
    make = partial(_route_row, writing=config.writing)
    write = None if config.reading.format is None else load_dialect(config.reading.format).write
    row = make if write is None else lambda line, names: write(make(line, names))
    job = Job(create_controller, row)
    return run_job(config, job, on_progress, tell)


def run_job(
    config: RouteConfig,
    job: Job,
    on_progress: Callable[[Progress], None] | None,
    tell: Callable[[str], None],
) -> Summary:
    """`route`, with another controller or other rows: `record` is a job of its own kind."""
    _check(config)
    zoo = load_zoo(config.zoo)
    metric = load_metric(config.promise.metric or zoo.metric or "bleu1", zoo.tokenizer or AUTO)
    alphas = _alphas(config, zoo)
    calibration = _calibration(config, zoo)
    count = cache(partial(_total, config))  # reading all of a long input takes its time
    with ExitStack() as stack:
        stop = stack.enter_context(stop_signals(tell, "window"))
        state = stack.enter_context(State(_state_path(config), wait_seconds=config.keeping.wait_seconds))
        terms = terms_in_force(
            state,
            replace(config.setup, horizon=config.promise.horizon),
            alphas,
            period=config.promise.period,
            calibration=calibration,
            source=config.input,
            count=count,
        )
        check_signature(state, zoo, metric, terms.setup)
        controller = resume(state, terms, job.controller, zoo.names, tell)
        state.open_output(config.output)
        for name, rows in state.unfinished_outputs():
            tell(f"warning: {name}: lacks {rows} finished rows. Run the command that wrote it again")
        total = count() if on_progress else None
        handle = stack.enter_context(open_input(config.input))
        lines = read_requests(handle, config.input, config.reading.fields, config.reading.format, tell)
        feed = _Feed(lines, config, alphas, state, stop)
        source = stack.enter_context(_LazySource(config.running, zoo, metric, calibration, tell))
        if config.running.preload:
            source.open().load()
        tally = Tally(zoo.names, controller, calibration, zoo.tariff)
        writer = _Writer(state, controller, terms.period, tally, zoo.names, job.row, config.writing.columns)
        ended = False
        try:
            for step in steps(feed, controller, source):
                if config.reading.on_error == "stop":
                    _refuse_errors(step)
                writer.commit(step, source.take_overhead())
                if on_progress:
                    on_progress(tally.progress(feed.already_done, total))
                for warning in (*source.take_warnings(), *tally.take_warnings()):
                    tell(f"warning: {warning}")
                if stop.signal is not None:
                    break
            else:
                ended = True
        except NothingInHand:  # the lines read for the next window are read again by the next run
            pass
        writer.end(source.take_overhead())
        _keep_spent(state, tally.spent, zoo.tariff)
        if ended:
            state.finish()
            if feed.failure is not None:
                raise feed.failure
            if source.fault is not None:  # in the last window, so that no other met it
                raise source.fault
        else:
            state.suspend()
        _, period_requests = state.period(terms.period) or (None, 0)
        summary = tally.summary(
            already_done=feed.already_done,
            largest_joules=state.mean_joules(zoo.largest.name),
            metric=metric.signature,
            period=terms.period,
            horizon=terms.horizon,
            period_requests=period_requests,
            stopped_by=None if ended else stop.signal,
        )
        if summary.alone is not None and summary.routed:  # for reports: a state doesn't hold what it rests on
            state.set_meta("alone", summary.alone.as_json())
        return summary


def _keep_spent(state: State, spent: Spent, tariff: Tariff) -> None:
    """Add to the state what this run cost: for reports, which see all runs."""
    if tariff:
        before = state.meta("spent")
        total = spent if before is None else Spent(**before["sum"]).plus(spent)
        kept = {"sum": total.as_json(), "currency": tariff.currency, "basis": tariff.basis}
        state.set_meta("spent", kept)


def _check(config: RouteConfig) -> None:
    """Refuse what can't be meant, before anything is read, loaded or written."""
    if config.promise.alpha is not None:
        check_alpha(config.promise.alpha)
    for name, value in (("--v", config.setup.v), ("--c", config.setup.c)):
        if value is not None and not 0 <= value < math.inf:
            raise UsageError(f"{name} {value:g}: must be a number of at least 0")
    check_choice(config.running.meter)
    if not all(config.writing.columns):
        raise UsageError(
            f"--fields {','.join(config.writing.columns)}: a name is empty. Columns are id, {', '.join(ROW_FIELDS)}"
        )
    written = config.reading.format is not None and load_dialect(config.reading.format).write is not None
    if written and config.writing != Writing():
        raise UsageError(
            f"--format {config.reading.format} writes rows of its own shape: leave out --fields, --rename and "
            "--include-prompt, or let the format be guessed"
        )
    for name, new in config.writing.rename.items():
        if name not in (*ROW_FIELDS, "error"):
            raise UsageError(
                f"--rename {name}={new}: no column {name}. Columns are {', '.join(ROW_FIELDS)}, error"
            )
    if config.output != STDOUT and Path(config.input).resolve() == Path(config.output).resolve():
        raise UsageError(
            f"{config.output}: is both the output and the input. Give the rows a file of their own"
        )


def _check_columns(columns: Sequence[str], row: Mapping[str, Any]) -> None:
    """Refuse what looks like a slip. A column that only some of the input's lines have is none."""
    for column in columns:
        close = difflib.get_close_matches(column, ROW_FIELDS, n=1, cutoff=0.8)
        if column not in row and close:
            raise UsageError(f"--fields: no column {column}; did you mean {close[0]}?")
    if not row.keys() & set(columns):
        raise UsageError(f"--fields {','.join(columns)}: no such column; a row has {', '.join(row)}")


def check_alpha(alpha: float) -> None:
    """Raise UsageError for what is no mean accuracy."""
    if not 0 <= alpha <= 1:  # false for NaN too
        hint = f"; did you mean {alpha / 100:g}?" if 1 < alpha <= 100 else ""
        raise UsageError(f"--alpha {alpha:g}: must be from 0 to 1{hint}")


def _state_path(config: RouteConfig) -> Path | None:
    if config.keeping.state is not None:
        return config.keeping.state
    return None if config.output == STDOUT else Path(config.output + ".state")


def _calibration(config: RouteConfig, zoo: Zoo) -> Calibration | None:
    """Before anything is opened: a calibration that doesn't fit leaves no trace."""
    running = config.running
    if running.no_calibration:
        return None
    if running.engine != LOCAL and running.calibration is None:  # one of this machine says nothing of others
        return None
    found = find_calibration(running.calibration, zoo, running.meter)
    return None if found is None else found.at_window(config.setup.window)


def _alphas(config: RouteConfig, zoo: Zoo) -> dict[str, float]:
    """The target of each plan; requests without a plan belong to the promise's, else to the default one."""
    promise = config.promise
    alpha = zoo.alpha if promise.alpha is None else promise.alpha
    alphas = dict(zoo.plans)
    if promise.plan is not None and promise.plan not in alphas:
        known = ", ".join(sorted(alphas)) or "none"
        raise UsageError(f'unknown plan "{promise.plan}". Plans of the zoo file ([plans]): {known}')
    if alpha is None and config.setup.policy in ("mess+", "random"):
        if not alphas:
            raise UsageError("no target accuracy. Give --alpha, or alpha under [sla] in the zoo file")
        return alphas
    return {DEFAULT_PLAN: 0.0 if alpha is None else alpha, **alphas}


def _total(config: RouteConfig) -> int | None:
    """How many lines are to be routed; None where the input can be read only once."""
    total = count_lines(config.input)
    return total if total is None or config.reading.limit is None else min(total, config.reading.limit)


class _Feed:
    """The lines of the input that are still to be routed. What ends it early stands in `failure`."""

    def __init__(
        self,
        lines: Iterator[Line],
        config: RouteConfig,
        alphas: Mapping[str, float],
        state: State,
        stop: Stop,
    ) -> None:
        self._stop = stop
        self._lines = islice(lines, config.reading.limit)
        self._stop_on_error = config.reading.on_error == "stop"
        self._plan = config.promise.plan
        self._alphas = alphas
        self._state = state
        self.already_done = 0
        self.failure: MessError | None = None

    def __iter__(self) -> Iterator[Line]:
        # A failure waits until the lines before it are routed: it costs no work.
        try:
            self._stop.in_hand = False
            for line in self._lines:
                todo = self._todo(line)
                if todo is None:
                    self.already_done += 1
                elif isinstance(todo, Rejected) and self._stop_on_error:
                    self.failure = InputError(todo.error)
                    return
                else:
                    self._stop.in_hand = True
                    yield todo
                    self._stop.in_hand = False
        except InputError as error:
            self.failure = error
        finally:
            self._stop.in_hand = True

    def _todo(self, line: Line) -> Line | None:
        """What is left to do for a line: nothing, when an earlier run finished it."""
        known = self._state.known(line.key)
        if known == line.digest:
            return None
        if isinstance(line, Rejected):
            return line
        if known is not None:
            why = "has another prompt than when it was routed. Give the new prompt a new id"
            return self._unless_done(line.reject(why))
        if line.plan is None and self._plan is not None:
            line = replace(line, plan=self._plan)
        if self._alphas.keys() == {DEFAULT_PLAN}:  # no plans: a field of that name is the user's own
            return replace(line, plan=None)
        plan = DEFAULT_PLAN if line.plan is None else line.plan
        if plan not in self._alphas:
            names = ", ".join(sorted(name for name in self._alphas if name)) or "none"
            what = f'field "plan": unknown plan "{plan}"' if plan else "belongs to no plan"
            return self._unless_done(line.reject(f"{what}. Plans of the zoo file: {names}"))
        return line

    def _unless_done(self, line: Rejected) -> Rejected | None:
        return None if self._state.known(line.key) else line


class _LazySource:
    """Opens meter and models when the first request asks for them: a finished job loads nothing."""

    def __init__(
        self,
        running: Running,
        zoo: Zoo,
        metric: Metric,
        calibration: Calibration | None,
        tell: Callable[[str], None],
    ) -> None:
        self.names = zoo.names
        self._calibration = calibration
        self._running = running
        self._zoo = zoo
        self._metric = metric
        self._tell = tell
        self._live: Live | None = None

    def open(self) -> Live:
        if self._live is None:
            calibration = self._calibration
            weights = {} if calibration is None else calibration.weights()
            self._live = open_live(self._running, self._zoo, self._metric, self._tell, weights)
            self._tell(
                "energy: not calibrated: E_m(t) is learnt from what is read (`messcli calibrate` gives it a start)"
                if calibration is None
                else f"energy: calibrated by {calibration.path}, made {calibration.made}"
                f"{'' if calibration.converged else '; not all of its cells converged'}"
            )
        return self._live

    def allowed(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        return self.open().allowed(requests) if requests else []

    def query(self, asked: Asked) -> list[dict[int, Outcome]]:
        return self.open().query(asked) if asked else []

    def take_overhead(self) -> Mapping[str, float]:
        return self._live.take_overhead() if self._live else {}

    def take_warnings(self) -> list[str]:
        return self._live.take_warnings() if self._live else []

    @property
    def fault(self) -> MeterError | None:
        return self._live.fault if self._live else None

    def close(self) -> None:
        if self._live:
            self._live.close()

    def __enter__(self) -> _LazySource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_PLAIN = json.JSONEncoder(ensure_ascii=False, allow_nan=False)  # made once: it is called for every row


class _Writer:
    """Commits windows: their rows, events, joules and the ledger, all together."""

    def __init__(
        self,
        state: State,
        controller: Controller,
        period: str,
        tally: Tally,
        names: Sequence[str],
        row: MakeRow,
        columns: Sequence[str],
    ) -> None:
        self._state = state
        self._controller = controller
        self._period = period
        self._tally = tally
        self._names = names
        self._row = row
        self._columns = columns
        self._checked_columns = False

    def commit(self, step: Step, overhead: Mapping[str, float]) -> None:
        """Commit a window with the overhead before its end, and from time to time a snapshot."""
        done = [self._done(line) for line in step.lines]
        for line in step.lines:
            self._tally.add(line)
        self._tally.add_overhead(overhead)
        self._state.commit(
            done,
            [event.dumps() for event in step.events],
            energy={**self._energy(step), **_as_energy(overhead)},
            accounts=account_rows(self._controller, self._period),
            snapshot=snapshot(self._controller) if self._state.wants_snapshot else None,
        )

    def end(self, overhead: Mapping[str, float]) -> None:
        """Book the overhead after the last window."""
        self._tally.add_overhead(overhead)
        self._state.add_energy(_as_energy(overhead))

    def _done(self, line: Settled | Rejected) -> Done:
        text = self._dumps(self._row(line, self._names))
        if isinstance(line, Rejected):
            return Done(line.key, line.digest, text)
        request, decision, served = line.request, line.decision, line.served
        outcome = None if served is None else line.outcomes[served]
        return Done(
            request.key,
            request.digest,
            text,
            t=decision.t,
            plan=request.plan,
            model=None if served is None else self._names[served],
            explored=decision.explored,
            accuracy=None if outcome is None else outcome.accuracy,
            estimated_accuracy=_of_model(decision.estimates, served),
            joules=None if outcome is None else outcome.joules,
            billed_joules=line.billed_joules,
            queue=line.queue,
        )

    def _dumps(self, row: dict[str, Any]) -> str:
        if self._columns:
            if not self._checked_columns:  # before anything is committed
                _check_columns(self._columns, row)
                self._checked_columns = True
            row = {
                name: row.get(name) for name in (*self._columns, "error") if name != "error" or name in row
            }
        text = _PLAIN.encode(row)
        try:
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair in a field that passes through
            return json.dumps(row, allow_nan=False)
        return text

    def _energy(self, step: Step) -> dict[tuple[str, str, str], tuple[float, int]]:
        energy: dict[tuple[str, str, str], tuple[float, int]] = {}
        for line in step.lines:
            if isinstance(line, Rejected):
                continue
            for m, outcome in line.outcomes.items():
                if outcome.joules is None or outcome.meter is None:
                    continue
                kind = "served" if m == line.served else "exploration"
                key = (self._names[m], kind, outcome.meter)
                joules, requests = energy.get(key, (0.0, 0))
                energy[key] = (joules + outcome.joules, requests + 1)
        return energy


def _as_energy(overhead: Mapping[str, float]) -> dict[tuple[str, str, str], tuple[float, int]]:
    """Overhead by meter as the state's energy table has it."""
    return {("", "overhead", meter): (joules, 0) for meter, joules in overhead.items()}


def _route_row(line: Settled | Rejected, names: Sequence[str], *, writing: Writing) -> dict[str, Any]:
    if isinstance(line, Rejected):
        return rejected_row(line, writing.rename)
    include_prompt = writing.include_prompt or not line.request.given.keys().isdisjoint(writing.columns)
    decision, served = line.decision, line.served
    values: dict[str, Any] = {
        "explored": decision.explored,
        "billed_joules": line.billed_joules,
        "queue": line.queue,
    }
    if served is None:
        error = line.outcomes[decision.model].error
        return row_of(
            line.request, None, values, error=error, include_prompt=include_prompt, names=writing.rename
        )
    outcome = line.outcomes[served]
    values.update(
        output=outcome.output,
        accuracy=outcome.accuracy,
        joules=outcome.joules,
        prompt_tokens=outcome.prompt_tokens,
        output_tokens=outcome.output_tokens,
        seconds=outcome.seconds,
        meter=outcome.meter,
        estimated_accuracy=_of_model(decision.estimates, served),
        joules_predicted=_of_model(decision.joules_predicted, served),
    )
    return row_of(line.request, names[served], values, include_prompt=include_prompt, names=writing.rename)


def _of_model(values: Sequence[float] | None, m: int | None) -> float | None:
    return None if values is None or m is None else values[m]


def _refuse_errors(step: Step) -> None:
    """--on-error stop: a window in which a model or the metric failed isn't committed; the next run tries it
    again. Raises MessError."""
    for line in step.lines:
        if isinstance(line, Settled):
            errors = [outcome.error for outcome in line.outcomes.values() if outcome.error]
            if errors:
                raise MessError(f"{line.request.source}:{line.request.line}: {errors[0]}")

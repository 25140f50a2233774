"""`route`: requests in, rows out, every window committed. Wires zoo, meter, state and loop together.

Knows files and signals; prints nothing: it tells its caller, who has the terminal.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from messcli.calibration.file import Calibration, find_calibration
from messcli.energy.meter import check_choice
from messcli.errors import UsageError
from messcli.files.ahead import prompts_ahead
from messcli.files.dialects import load_dialect
from messcli.files.requests import count_lines, open_input, read_requests
from messcli.files.sinks import STDOUT
from messcli.jobs.checks import Checks
from messcli.jobs.config import LOCAL, RouteConfig, Writing
from messcli.jobs.feed import Feed, patiently
from messcli.jobs.fleet import LazyLive
from messcli.jobs.knowledge import Learner, knowledge_of, learnt_from
from messcli.jobs.resume import (
    CreateController,
    check_signature,
    read_ahead,
    resume,
    terms_in_force,
    unfinished_window,
)
from messcli.jobs.row import routed_row
from messcli.jobs.session import MakeRow, Patience, RowText, Session
from messcli.jobs.summary import Energy, Period, Summary
from messcli.jobs.tally import Progress, Tally
from messcli.jobs.truth import truth_of
from messcli.jobs.watch import Watched
from messcli.models.billing import Loads
from messcli.records import ROW_FIELDS, STAGE_FIELDS, Rejected, Request
from messcli.routing.line import Reader
from messcli.routing.setup import create_controller
from messcli.routing.sla import DEFAULT_PLAN
from messcli.signals import Stop, stop_signals
from messcli.state.state import State
from messcli.tariff import Spent
from messcli.zoo import Zoo, load_zoo


@dataclass(frozen=True, slots=True)
class Job:
    """What differs between the commands that share the loop, the state and the output."""

    controller: CreateController
    row: MakeRow
    audits: bool = False  # it may do without references
    scores: bool = False  # a row that the metric failed on has `error`


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
    make = partial(routed_row, writing=config.writing)
    write = None if config.reading.format is None else load_dialect(config.reading.format).write
    row = make if write is None else lambda line, names: write(make(line, names))
    job = Job(create_controller, row, audits=True, scores=True)
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
    truth = truth_of(config.promise, zoo, may_audit=job.audits)
    alphas = _alphas(config, zoo)
    calibration = _calibration(config, zoo)
    count = cache(partial(_total, config))  # reading all of a long input takes its time
    with ExitStack() as stack:
        stop = stack.enter_context(stop_signals(tell, "answers"))
        state = stack.enter_context(_state(config, tell))
        terms = terms_in_force(
            state,
            replace(config.setup, horizon=config.promise.horizon, audits=truth.audits),
            alphas,
            period=config.promise.period,
            calibration=calibration,
            source=config.input,
            count=count,
        )
        learner = Learner(
            zoo.names, terms.setup, zoo, truth.metric, truth.scored, agreement=truth.audits is not None
        )
        begins_with, knowledge = learnt_from(
            state, config.keeping.learn_from, lambda path: knowledge_of(path, learner, tell)
        )
        check_signature(state, zoo, truth.metric, terms.setup, begins_with)
        controller = resume(state, terms, job.controller, zoo.names, tell, knowledge)
        read_ahead(state, controller, config.input, partial(_sample, config))
        _open_output(state, config.output, tell)
        total = count() if on_progress else None
        lines = truth.of(stack.enter_context(_lines(config, tell)))
        feed = _feed(config, lines, alphas, state, stop)
        live = stack.enter_context(
            LazyLive(
                config.running,
                zoo,
                truth.scored,
                calibration,
                tell,
                stop,
                truth.judge,
            )
        )
        readers: list[Reader] = [Checks(zoo), *truth.readers(len(zoo.models), terms.setup.seed)]
        if config.running.preload:
            live.open().load()
        tally = Tally(zoo.names, controller, calibration, zoo.tariff)
        watched = Watched(live, lambda: on_chunk())
        session = Session(
            state=state,
            controller=controller,
            source=watched,
            feed=feed,
            text=RowText(job.row, zoo.names, config.writing.columns),
            tally=tally,
            period=terms.period,
            stop=stop,
            tell=tell,
            look=truth.look(len(zoo.models)),
            readers=readers,
            linger=math.inf if config.reading.linger is None else config.reading.linger,
            scores=job.scores,
            pause=Patience(config.running.patience, stop, tell),
            halt=stop.halt if config.reading.on_error == "stop" else None,
        )

        def on_chunk() -> None:
            if on_progress:
                on_progress(tally.progress(feed.already_done, total, watched.activity))

        ended = session.run(on_chunk, unfinished=unfinished_window(state))
        for reader in readers:
            for line in reader.notes():
                tell(line)
        _, period_requests = state.journal.period(terms.period) or (None, 0)
        summary = tally.summary(
            already_done=feed.already_done,
            largest_joules=state.journal.mean_joules(zoo.largest.name),
            metric=truth.metric.signature,
            period=Period(terms.period, period_requests, terms.horizon),
            stopped_by=None if ended else stop.signal,
            standing=state.journal.failures(state.output.name),
            named_overhead=live.named_overhead,
        )
        _keep_for_reports(state, summary.energy, summary.requests.routed, live.loads)
        # that of the models is of the last window: a later one would have met it
        failure = feed.failure or live.fault
        if ended and failure is not None:
            raise failure
        return summary


@contextmanager
def _state(config: RouteConfig, tell: Callable[[str], None]) -> Iterator[State]:
    with State(_state_path(config), wait_seconds=config.keeping.wait_seconds) as state:
        for note in state.database.notes:
            tell(f"warning: {note}")
        yield state


def _open_output(state: State, output: str, tell: Callable[[str], None]) -> None:
    state.output.open(output)
    for name, rows in state.output.unfinished():
        tell(f"warning: {name}: lacks {rows} finished rows. Run the command that wrote it again")


@contextmanager
def _lines(config: RouteConfig, tell: Callable[[str], None]) -> Iterator[Iterator[Request | Rejected]]:
    with open_input(config.input) as handle:
        yield read_requests(handle, config.input, config.reading.fields, config.reading.format, tell)


def _sample(config: RouteConfig) -> list[tuple[int, str]]:
    reading, setup = config.reading, config.setup
    return prompts_ahead(
        config.input,
        reading.fields,
        reading.format,
        size=setup.tuning.ahead.prompts,
        seed=setup.seed,
    )


def _feed(
    config: RouteConfig,
    lines: Iterator[Request | Rejected],
    alphas: Mapping[str, float],
    state: State,
    stop: Stop,
) -> Feed:
    return Feed(
        lines if config.reading.linger is None else patiently(lines),
        limit=config.reading.limit,
        plan=config.promise.plan,
        alphas=alphas,
        journal=state.journal,
        stop_on_error=config.reading.on_error == "stop",
        stop=stop,
        output=state.output.name,
        retry=config.reading.retry,
    )


def _keep_for_reports(state: State, energy: Energy, routed: int, loads: Loads) -> None:
    """Add to the state what only this run knows: what overhead was for, what it cost, what the largest would have."""
    if named := energy.named_overhead:
        before = state.database.meta("overhead") or {}
        total = {what: before.get(what, 0.0) + named.get(what, 0.0) for what in {**before, **named}}
        state.database.set_meta("overhead", total)
    if loads:
        sums = state.database.meta("loads") or {}
        for model, known in loads.items():
            own = sums.setdefault(model, {})
            for running, numbers in known.items():
                before = own.get(str(running), (0.0, 0, 0))
                own[str(running)] = [a + b for a, b in zip(before, numbers, strict=True)]
        state.database.set_meta("loads", sums)
    if tariff := energy.tariff:
        before = state.database.meta("spent")
        cost = energy.spent if before is None else Spent(**before["sum"]).plus(energy.spent)
        kept = {"sum": cost.as_json(), "currency": tariff.currency, "basis": tariff.basis}
        state.database.set_meta("spent", kept)
    # a run that was killed at its very end left none
    if energy.alone is not None and (routed or state.database.meta("alone") is None):
        state.database.set_meta("alone", energy.alone.as_json())


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
    columns = (*ROW_FIELDS, *STAGE_FIELDS, "error")
    for name, new in config.writing.rename.items():
        if name not in columns:
            raise UsageError(f"--rename {name}={new}: no column {name}. Columns are {', '.join(columns)}")
        others = {config.writing.rename.get(other, other) for other in columns if other != name}
        if new in {"id", *others}:
            raise UsageError(
                f"--rename {name}={new}: another column is called {new}. Give it a name of its own"
            )
    if config.output.endswith(os.sep) or Path(config.output).is_dir():
        raise UsageError(f"{config.output}: is a folder. Name a file in it")
    if config.output != STDOUT and os.path.realpath(config.input) == os.path.realpath(config.output):
        raise UsageError(
            f"{config.output}: is both the output and the input. Give the rows a file of their own"
        )


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
    window = config.setup.window or config.setup.tuning.windows.most  # auto: engines are to be full
    return None if found is None else found.at_window(window)


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

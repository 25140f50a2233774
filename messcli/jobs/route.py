"""`route`: requests in, rows out, every window committed. Wires zoo, meter, state and loop together.

Knows files and signals; prints nothing: it tells its caller, who has the terminal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from messcli.calibration.file import Calibration, find_calibration
from messcli.energy.meter import check_choice
from messcli.errors import UsageError
from messcli.files.dialects import load_dialect
from messcli.files.requests import count_lines, open_input, read_requests
from messcli.files.sinks import STDOUT
from messcli.jobs.config import LOCAL, RouteConfig, Writing
from messcli.jobs.feed import Feed, patiently
from messcli.jobs.fleet import LazyLive
from messcli.jobs.resume import CreateController, check_signature, resume, terms_in_force, unfinished_window
from messcli.jobs.session import MakeRow, RowText, Session, Strict, of_model
from messcli.jobs.summary import Progress, Summary, Tally
from messcli.jobs.truth import (
    REFERENCES,
    Agreement,
    Judging,
    agreement_metric,
    judge_metric,
    without_references,
)
from messcli.jobs.truth import audits as audits_of
from messcli.jobs.watch import Watched
from messcli.metrics import AUTO, DEFAULT_METRIC, load_metric
from messcli.metrics.reasoning import split_reasoning
from messcli.records import ROW_FIELDS, STAGE_FIELDS, Rejected, rejected_row, row_of
from messcli.routing.audit import JUDGE
from messcli.routing.controller import DEFAULT_PLAN
from messcli.routing.loop import Look, Settled
from messcli.routing.setup import create_controller
from messcli.signals import stop_signals
from messcli.state.state import State
from messcli.tariff import Spent, Tariff
from messcli.zoo import Zoo, load_zoo


@dataclass(frozen=True, slots=True)
class Job:
    """What differs between the commands that share the loop, the state and the output."""

    controller: CreateController
    row: MakeRow
    audits: bool = False  # it may do without references


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
    job = Job(create_controller, row, audits=True)
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
    name = config.promise.metric or zoo.metric or DEFAULT_METRIC
    audits = judge = None
    if job.audits:
        audits = audits_of(
            name, config.promise.against or zoo.against or REFERENCES, sure=config.promise.sure
        )
    if name == JUDGE and job.audits:
        judge = zoo.judge
        if judge is None:
            raise UsageError(
                "metric judge: the zoo file names none. Add a table [judge.model] with name and path"
            )
        scored = metric = judge_metric(judge)
    else:
        scored = metric = load_metric(name, zoo.tokenizer or AUTO)
        if audits is not None:
            metric = agreement_metric(scored)
    alphas = _alphas(config, zoo)
    calibration = _calibration(config, zoo)
    count = cache(partial(_total, config))  # reading all of a long input takes its time
    with ExitStack() as stack:
        stop = stack.enter_context(stop_signals(tell, "answers"))
        state = stack.enter_context(State(_state_path(config), wait_seconds=config.keeping.wait_seconds))
        for note in state.database.notes:
            tell(f"warning: {note}")
        terms = terms_in_force(
            state,
            replace(config.setup, horizon=config.promise.horizon, audits=audits),
            alphas,
            period=config.promise.period,
            calibration=calibration,
            source=config.input,
            count=count,
        )
        check_signature(state, zoo, metric, terms.setup)
        controller = resume(state, terms, job.controller, zoo.names, tell)
        state.output.open(config.output)
        for name, rows in state.output.unfinished():
            tell(f"warning: {name}: lacks {rows} finished rows. Run the command that wrote it again")
        total = count() if on_progress else None
        handle = stack.enter_context(open_input(config.input))
        lines = read_requests(handle, config.input, config.reading.fields, config.reading.format, tell)
        if audits is not None:
            lines = without_references(lines)
        feed = Feed(
            lines if config.reading.linger is None else patiently(lines),
            limit=config.reading.limit,
            plan=config.promise.plan,
            alphas=alphas,
            journal=state.journal,
            stop_on_error=config.reading.on_error == "stop",
            stop=stop,
        )
        live = stack.enter_context(
            LazyLive(config.running, zoo, scored, calibration, tell, lambda: stop.signal is not None, judge)
        )
        look: Look | None = None
        if judge is not None:
            look = Judging(live, judge, len(zoo.models), terms.setup.seed)
        elif audits is not None:
            look = Agreement(scored, len(zoo.models))
        if config.running.preload:
            live.open().load()
        tally = Tally(zoo.names, controller, calibration, zoo.tariff)
        watched = Watched(Strict(live) if config.reading.on_error == "stop" else live, lambda: on_chunk())
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
            look=look,
            linger=math.inf if config.reading.linger is None else config.reading.linger,
        )

        def on_chunk() -> None:
            if on_progress:
                on_progress(tally.progress(feed.already_done, total, watched.activity))

        def left() -> int | None:
            lines = count()
            return None if lines is None else lines - feed.read

        ended = session.run(on_chunk, left=left, unfinished=unfinished_window(state))
        if isinstance(look, Judging):
            for line in look.notes():
                tell(line)
        _keep_spent(state, tally.spent, zoo.tariff)
        if ended:
            if feed.failure is not None:
                raise feed.failure
            if live.fault is not None:  # in the last window, so that no other met it
                raise live.fault
        _, period_requests = state.journal.period(terms.period) or (None, 0)
        summary = tally.summary(
            already_done=feed.already_done,
            largest_joules=state.journal.mean_joules(zoo.largest.name),
            metric=metric.signature,
            period=terms.period,
            horizon=terms.horizon,
            period_requests=period_requests,
            stopped_by=None if ended else stop.signal,
            named_overhead=live.named_overhead,
        )
        _keep_named(state, summary.named_overhead)
        # For reports: a state doesn't hold what it rests on. A run that was killed at its very end left none.
        if summary.alone is not None and (summary.routed or state.database.meta("alone") is None):
            state.database.set_meta("alone", summary.alone.as_json())
        return summary


def _keep_named(state: State, named: Mapping[str, float]) -> None:
    """Add to the state what this run's overhead was for."""
    if named:
        before = state.database.meta("overhead") or {}
        total = {what: before.get(what, 0.0) + named.get(what, 0.0) for what in {**before, **named}}
        state.database.set_meta("overhead", total)


def _keep_spent(state: State, spent: Spent, tariff: Tariff) -> None:
    """Add to the state what this run cost: for reports, which see all runs."""
    if tariff:
        before = state.database.meta("spent")
        total = spent if before is None else Spent(**before["sum"]).plus(spent)
        kept = {"sum": total.as_json(), "currency": tariff.currency, "basis": tariff.basis}
        state.database.set_meta("spent", kept)


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
        if name not in (*ROW_FIELDS, *STAGE_FIELDS, "error"):
            raise UsageError(
                f"--rename {name}={new}: no column {name}. Columns are {', '.join(ROW_FIELDS + STAGE_FIELDS)}, error"
            )
    if config.output != STDOUT and Path(config.input).resolve() == Path(config.output).resolve():
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
    answer, reasoning = split_reasoning(outcome.output or "")
    values.update(
        output=answer if reasoning else outcome.output,
        accuracy=outcome.accuracy,
        joules=outcome.joules,
        prompt_tokens=outcome.prompt_tokens,
        output_tokens=outcome.output_tokens,
        seconds=outcome.seconds,
        meter=outcome.meter,
        estimated_accuracy=of_model(decision.given or decision.estimates, served),
        joules_predicted=of_model(decision.joules_predicted, served),
    )
    if decision.chosen is not None:
        values["audited"] = decision.audited
    if decision.given is not None:
        values.update(confidence=_confidence(line, served), asked=[names[m] for m in decision.asked])
    if reasoning:
        values["reasoning"] = reasoning
    return row_of(
        line.request,
        names[served],
        values,
        error=outcome.unscored,
        include_prompt=include_prompt,
        names=writing.rename,
    )


def _confidence(line: Settled, served: int) -> float | None:
    """In the served answer, from 0 to 1: what a check says, else the mean probability of its tokens (geometric)."""
    check, told = line.checks.get(served), line.outcomes[served].confidence
    if check is not None:
        return check.probability
    return None if told is None or "mean" not in told else math.exp(min(told["mean"], 0.0))

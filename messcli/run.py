"""`route`: requests in, rows out, every window committed. Wires zoo, meter, state and loop together.

Knows files and signals; prints nothing: it tells its caller, who has the terminal.
"""

from __future__ import annotations

import difflib
import json
import math
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import safetensors.numpy

from messcli.calibration import Calibration, find_calibration
from messcli.controller import DEFAULT_PLAN, Account, Controller, Event
from messcli.energy.meter import check_choice
from messcli.engine import LOCAL, EngineConfig, open_live
from messcli.errors import InputError, Interrupted, MessError, MeterError, StateError, UsageError
from messcli.factory import Setup, create_controller
from messcli.inputs import InputFields, count_lines, open_input, read_requests
from messcli.loop import Line, Settled, Step, steps
from messcli.metrics import Metric, load_metric
from messcli.outcomes import Asked, Live
from messcli.outputs import STDOUT
from messcli.policy import VirtualQueue
from messcli.records import ROW_FIELDS, Outcome, Rejected, Request, rejected_row, row_of
from messcli.state import Done, State
from messcli.zoo import Zoo, load_zoo


@dataclass(frozen=True, slots=True)
class RouteConfig:
    """What `messcli route` was asked to do. None means: as the zoo file says, or the default."""

    input: str
    output: str
    state: Path | None = None  # None: beside the output; with standard output, none is kept
    zoo: str | None = None
    alpha: float | None = None
    metric: str | None = None
    policy: str = "mess+"
    v: float | None = None
    c: float | None = None
    seed: int = 0
    predictor: str = "ridge"
    learn: str = "all"
    serve: str = "largest"
    window: int = 32
    limit: int | None = None
    plan: str | None = None
    period: str | None = None  # None: the one that is open
    horizon: int | None = None  # requests that the period will have; None: as said before
    counted_horizon: int | None = None  # the same from the input's length, where nobody said it
    on_error: str = "skip"
    meter: str = "auto"
    calibration: Path | None = None  # None: calibration.json beside the zoo file, or in the working folder
    no_calibration: bool = False  # without one, even if it is there
    batch_size: int | None = None
    preload: bool = False
    max_loaded: int | None = None
    engine: str = LOCAL
    address: str | None = None
    wait_seconds: float = 0.0
    input_fields: InputFields = field(default_factory=InputFields)
    include_prompt: bool = False
    columns: tuple[str, ...] = ()  # empty: all


@dataclass(frozen=True, slots=True)
class Progress:
    """What is known between two windows, for whoever watches."""

    finished: int  # lines of this input, those of earlier runs included
    total: int | None  # None where the input can be read only once
    joules: float  # billed in this run
    accuracy: float | None  # observed mean of all plans
    alpha: float | None  # None where there are several plans
    explorations_left: float | None  # expected


@dataclass(slots=True)
class PredictionError:
    """How far E_m(t) was from what was read then, over the calls of a run."""

    calls: int = 0
    relative_errors: float = 0.0  # sum of |predicted - read| / read
    predicted_joules: float = 0.0
    read_joules: float = 0.0

    def add(self, predicted: float, read: float) -> None:
        self.calls += 1
        self.relative_errors += abs(predicted - read) / read
        self.predicted_joules += predicted
        self.read_joules += read

    @property
    def mean(self) -> float:
        """Mean absolute percentage error, as a part of 1."""
        return self.relative_errors / self.calls

    @property
    def bias(self) -> float:
        """Of the sum: positive where too much was predicted."""
        return self.predicted_joules / self.read_joules - 1.0


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run did, and where the promise stands."""

    routed: int  # requests of this run
    already_done: int  # lines of the input that earlier runs had finished
    failed: int  # rows with `error` in this run
    served: Mapping[str, int]  # model -> requests of this run
    explored: int  # requests of this run
    billed_joules: float  # of this run, explorations included
    overhead: Mapping[str, float]  # joules of this run, by meter: loading, learning, idle
    unmetered: int  # requests of this run whose joules aren't known
    meters: tuple[str, ...]
    accounts: Mapping[str, Account]  # plan -> ledger, all runs of the period
    alphas: Mapping[str, float]
    unreachable: tuple[str, ...]  # plans whose alpha is above what the zoo can reach
    largest: str
    largest_joules: float | None  # mean joules of the largest model, over all its calls that were read
    metric: str  # its signature
    serve: str  # what explorations served
    predicted: Mapping[str, PredictionError]  # by how: "calibration" alone, and "adapted" to what was read
    period: str  # "" until one is named
    horizon: int | None
    period_requests: int  # routed in this period, all runs
    stopped_by: int | None = None  # signal number
    first_error: str | None = None  # of this run's rows with `error`

    @property
    def overhead_joules(self) -> float:
        return sum(self.overhead.values())

    @property
    def sla_missed(self) -> bool:
        """Whether any plan's observed mean accuracy is below its alpha."""
        means = {plan: account.observed_mean for plan, account in self.accounts.items()}
        return any(mean is not None and mean < self.alphas[plan] - 1e-9 for plan, mean in means.items())


@dataclass(frozen=True, slots=True)
class Job:
    """What differs between the commands that share the loop, the state and the output."""

    controller: Callable[[RouteConfig, Zoo, Mapping[str, float]], Controller]
    # (line, names of the zoo) -> the row to be written; None: a row of `route`
    row: Callable[[Settled | Rejected, Sequence[str]], dict[str, Any]] | None = None


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
    return run_job(config, Job(_controller), on_progress, tell)


def run_job(
    config: RouteConfig,
    job: Job,
    on_progress: Callable[[Progress], None] | None,
    tell: Callable[[str], None],
) -> Summary:
    """`route`, with another controller or other rows: `record` is a job of its own kind."""
    _check(config)
    zoo = load_zoo(config.zoo)
    metric = load_metric(config.metric or zoo.metric or "bleu1")
    alphas = _alphas(config, zoo)
    calibration = _calibration(config, zoo)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_signals(tell))
        state = stack.enter_context(State(_state_path(config), wait_seconds=config.wait_seconds))
        config = _in_force(config, state, alphas)
        _check_signature(state, config, zoo, metric)
        controller = _resume(state, job, config, zoo, alphas, calibration)
        state.open_output(config.output)
        for name, rows in state.unfinished_outputs():
            tell(f"warning: {name}: lacks {rows} finished rows. Run the command that wrote it again")
        total = _total(config) if on_progress else None
        handle = stack.enter_context(open_input(config.input))
        feed = _Feed(read_requests(handle, config.input, config.input_fields), config, alphas, state, stop)
        source = stack.enter_context(_LazySource(config, zoo, metric, calibration, tell))
        if config.preload:
            source.open().load()
        run = _Run(config, controller, state, source, metric, calibration, job.row)
        ended = False
        try:
            for step in steps(feed, controller, source, config.window):
                run.refuse(step)
                run.commit(step)
                if on_progress:
                    on_progress(run.progress(feed.already_done, total))
                for warning in source.take_warnings():
                    tell(f"warning: {warning}")
                run.check(step, tell)
                if stop.signal is not None:
                    break
            else:
                ended = True
        except _NothingInHand:  # the lines read for the next window are read again by the next run
            pass
        run.end()
        if ended:
            state.finish()
            if feed.failure is not None:
                raise feed.failure
            if source.fault is not None:  # in the last window, so that no other met it
                raise source.fault
        else:
            state.suspend()
        return run.summary(feed.already_done, None if ended else stop.signal)


def _check(config: RouteConfig) -> None:
    """Refuse what can't be meant, before anything is read, loaded or written."""
    if config.alpha is not None:
        check_alpha(config.alpha)
    for name, value in (("--v", config.v), ("--c", config.c)):
        if value is not None and not 0 <= value < math.inf:
            raise UsageError(f"{name} {value:g}: must be a number of at least 0")
    check_choice(config.meter)
    if not all(config.columns):
        raise UsageError(
            f"--fields {','.join(config.columns)}: a name is empty. Columns are id, {', '.join(ROW_FIELDS)}"
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
    if config.state is not None:
        return config.state
    return None if config.output == STDOUT else Path(config.output + ".state")


def _calibration(config: RouteConfig, zoo: Zoo) -> Calibration | None:
    """Before anything is opened: a calibration that doesn't fit leaves no trace."""
    if config.no_calibration:
        return None
    if config.engine != LOCAL and config.calibration is None:  # one of this machine says nothing of others
        return None
    return find_calibration(config.calibration, zoo, config.meter)


def _alphas(config: RouteConfig, zoo: Zoo) -> dict[str, float]:
    """The target of each plan; requests without a plan belong to `config.plan`, else to the default one."""
    alpha = zoo.alpha if config.alpha is None else config.alpha
    alphas = dict(zoo.plans)
    if config.plan is not None and config.plan not in alphas:
        known = ", ".join(sorted(alphas)) or "none"
        raise UsageError(f'unknown plan "{config.plan}". Plans of the zoo file ([plans]): {known}')
    if alpha is None and config.policy in ("mess+", "random"):
        if not alphas:
            raise UsageError("no target accuracy. Give --alpha, or alpha under [sla] in the zoo file")
        return alphas
    return {DEFAULT_PLAN: 0.0 if alpha is None else alpha, **alphas}


def _controller(config: RouteConfig, zoo: Zoo, alphas: Mapping[str, float]) -> Controller:
    setup = Setup(
        policy=config.policy,
        v=config.v,
        c=config.c,
        learn=config.learn,
        predictor=config.predictor,
        seed=config.seed,
        serve=config.serve,
        horizon=config.horizon or config.counted_horizon,
    )
    return create_controller(setup, len(zoo.models), alphas)


def _in_force(config: RouteConfig, state: State, alphas: Mapping[str, float]) -> RouteConfig:
    """`config` with the contract period and the horizon that are in force."""
    period = config.period
    if period is None:
        period = (state.settings() or {}).get("period", "")
    horizon, requests = state.period(period) or (None, 0)
    config = replace(config, period=period, horizon=horizon if config.horizon is None else config.horizon)
    if config.horizon is None and config.policy == "mess+" and config.v is None and len(alphas) == 1:
        config = replace(config, counted_horizon=_counted_horizon(config, state, requests))
    return config


def _counted_horizon(config: RouteConfig, state: State, requests: int) -> int | None:
    """What the period had before this input, and the input's lines. The same when a run is taken up again."""
    total = _total(config)
    if total is None:
        return None
    with open_input(config.input) as handle:
        head = blake2b(handle.readline(1 << 16), digest_size=8).hexdigest()  # stays while the file grows
    this = {"path": str(Path(config.input).resolve()), "head": head, "period": config.period}
    known = state.meta("input") or {}
    before = known.get("before", requests)
    if {**known, **this} != known or before + total < requests:  # another input, or another content of it
        before = requests
        state.set_meta("input", {**this, "before": before})
    return int(before) + total


def _check_signature(state: State, config: RouteConfig, zoo: Zoo, metric: Metric) -> None:
    """Refuse to mix decisions that were made in different ways. Alpha, V and c may change, and others may not."""
    signature = {
        "zoo": zoo.signature(),
        "metric": metric.signature,
        "policy": config.policy,
        "predictor": "mean" if config.policy == "random" else config.predictor,
        "window": config.window,
        "seed": config.seed,
    }
    known = state.meta("signature")
    if known is None:
        state.set_meta("signature", signature)
    elif difference := _difference(known, signature):
        raise StateError(
            f"{state.name}: was made with {difference[0]}, and this run has {difference[1]}: their decisions "
            "don't mix. Run with what it was made with, or start anew with another --state and output"
        )


def _difference(known: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first setting that differs, in words: (as it was, as it is). What `known` doesn't name is new in
    this version of messcli, and no difference."""
    for name, value in known.items():
        if name == "zoo":
            models, others = value["models"], now["zoo"]["models"]
            names, other_names = ([model["name"] for model in zoo] for zoo in (models, others))
            if names != other_names:
                return f"the models {', '.join(names)}", f"the models {', '.join(other_names)}"
            for model, other in zip(models, others, strict=True):
                for field_name, was in model.items():
                    if was != other.get(field_name):
                        what = f'{field_name} of model "{model["name"]}"'
                        return f"{what} = {json.dumps(was)}", json.dumps(other.get(field_name))
        elif value != now.get(name):
            return f"{name} {value}", f"{name} {now.get(name)}"
    return None


def _resume(
    state: State,
    job: Job,
    config: RouteConfig,
    zoo: Zoo,
    alphas: Mapping[str, float],
    calibration: Calibration | None,
) -> Controller:
    """The controller as the last run left it, under this run's settings."""
    controller = job.controller(config, zoo, alphas)
    settings = {
        "alphas": alphas,
        "v": config.v,
        "c": config.c,
        "learn": config.learn,
        "serve": config.serve,
        "period": config.period,
        "horizon": config.horizon,
        "counted_horizon": config.counted_horizon,
        "calibration": None if calibration is None else calibration.identity,
    }
    before = state.settings()
    if before == settings:
        _replay(state, controller)
        return controller
    if before is not None and {"learn", "serve"} <= before.keys():
        # What came of earlier requests is folded in under the settings that were in force then.
        names = ("v", "c", "learn", "serve", "period", "horizon", "counted_horizon")
        then: dict[str, Any] = {name: before.get(name) for name in names}
        earlier = job.controller(replace(config, **then), zoo, before["alphas"])
        _replay(state, earlier)
        _hand_over(earlier, controller)
    if before is None or before.get("calibration") != settings["calibration"]:
        controller.joules.calibrate(None if calibration is None else calibration.prior(zoo.names))
    if controller.t == 0:  # only the ledger is left of a state that an early version wrote
        controller.t = state.t
    if before is None or before.get("period") != config.period:
        kept = {row[1]: _account(row) for row in state.accounts(config.period or "")}
        controller.accounts = {plan: kept.get(plan, Account()) for plan in alphas}
        controller.policy.open_period(_standing(controller.accounts, alphas))
    accounts = account_rows(controller, config.period or "")
    state.change(controller.t + 1, settings, _snapshot(controller), accounts)
    return controller


def _standing(
    accounts: Mapping[str, Account], alphas: Mapping[str, float]
) -> dict[str, tuple[int, int, float]]:
    standing = {}
    for plan, account in accounts.items():
        settled = account.observed + account.estimated
        delivered = account.observed_sum + account.estimated_sum
        standing[plan] = (settled, account.estimated, delivered - alphas[plan] * settled)
    return standing


def _replay(state: State, controller: Controller) -> None:
    snapshot, windows = state.learnt()
    if snapshot is not None:
        controller.load(safetensors.numpy.load(snapshot))
    for events in windows:
        controller.settle([Event.loads(event) for event in events])


def _hand_over(earlier: Controller, controller: Controller) -> None:
    """Let `controller` go on where `earlier` is."""
    arrays = earlier.state()
    if earlier.policy.remembers != controller.policy.remembers:
        arrays |= {name: a for name, a in controller.state().items() if name.startswith("recent.")}
    controller.load(arrays)


def _snapshot(controller: Controller) -> bytes:
    arrays = {name: np.ascontiguousarray(array) for name, array in controller.state().items()}
    return bytes(safetensors.numpy.save(arrays))


def _total(config: RouteConfig) -> int | None:
    total = count_lines(config.input)
    return total if total is None or config.limit is None else min(total, config.limit)


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
        self._lines = islice(lines, config.limit)
        self._stop_on_error = config.on_error == "stop"
        self._plan = config.plan
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
        config: RouteConfig,
        zoo: Zoo,
        metric: Metric,
        calibration: Calibration | None,
        tell: Callable[[str], None],
    ) -> None:
        self.names = zoo.names
        self._calibration = calibration
        self._config = config
        self._zoo = zoo
        self._metric = metric
        self._tell = tell
        self._live: Live | None = None

    def open(self) -> Live:
        if self._live is None:
            config = self._config
            calibration = self._calibration
            engine = EngineConfig(
                config.meter,
                config.batch_size,
                config.max_loaded,
                config.engine,
                config.address,
                weights={} if calibration is None else calibration.weights(),
            )
            self._live = open_live(engine, self._zoo, self._metric, self._tell)
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


class _Run:
    """Turns steps into committed rows, and counts."""

    def __init__(
        self,
        config: RouteConfig,
        controller: Controller,
        state: State,
        source: _LazySource,
        metric: Metric,
        calibration: Calibration | None,
        row: Callable[[Settled | Rejected, Sequence[str]], dict[str, Any]] | None,
    ) -> None:
        self._row = row
        self._calibration = calibration
        self._predicted: dict[str, PredictionError] = {}
        self._other_meter: str | None = None  # than the calibration's
        self._told_other_meter = False
        self._config = config
        self._controller = controller
        self._state = state
        self._source = source
        self._metric = metric
        self._served: Counter[str] = Counter()
        self._routed = self._failed = self._explored = self._unmetered = 0
        self._first_error: str | None = None
        self._billed = 0.0
        self._overhead: Counter[str] = Counter()
        self._meters: dict[str, None] = {}
        self._unreachable: set[str] = set()

    def commit(self, step: Step) -> None:
        """Commit a window: its rows, its events, its energy, and from time to time a snapshot."""
        done = [self._done(line) for line in step.lines]
        energy = self._energy(step)
        snapshot = _snapshot(self._controller) if self._state.wants_snapshot else None
        events = [event.dumps() for event in step.events]
        accounts = account_rows(self._controller, self._config.period or "")
        self._state.commit(done, events, energy=energy, accounts=accounts, snapshot=snapshot)

    def _done(self, line: Settled | Rejected) -> Done:
        if isinstance(line, Rejected):
            self._failed += 1
            self._first_error = self._first_error or line.error
            row = self._row(line, self._source.names) if self._row else rejected_row(line)
            return Done(line.key, line.digest, self._dumps(row))
        request, decision = line.request, line.decision
        model = None if line.served is None else self._source.names[line.served]
        values: dict[str, Any] = {"explored": decision.explored, "billed_joules": line.billed_joules}
        values["queue"] = line.queue
        error = None
        if line.served is None:
            error = line.outcomes[decision.model].error
            self._first_error = self._first_error or error
        else:
            outcome = line.outcomes[line.served]
            values.update(
                output=outcome.output,
                accuracy=outcome.accuracy,
                joules=outcome.joules,
                prompt_tokens=outcome.prompt_tokens,
                output_tokens=outcome.output_tokens,
                seconds=outcome.seconds,
                meter=outcome.meter,
                estimated_accuracy=decision.estimates and decision.estimates[line.served],
                joules_predicted=decision.joules_predicted and decision.joules_predicted[line.served],
            )
        if self._row:
            row = self._row(line, self._source.names)
        else:
            row = row_of(request, model, values, error=error, include_prompt=self._config.include_prompt)
        self._count(line, model)
        return Done(
            request.key,
            request.digest,
            self._dumps(row),
            t=decision.t,
            plan=request.plan,
            model=model,
            explored=decision.explored,
            accuracy=values.get("accuracy"),
            estimated_accuracy=values.get("estimated_accuracy"),
            joules=values.get("joules"),
            billed_joules=line.billed_joules,
            queue=line.queue,
        )

    def _count(self, line: Settled, model: str | None) -> None:
        self._routed += 1
        self._explored += line.decision.explored
        if model is None:
            self._failed += 1
        else:
            self._served[model] += 1
        if line.billed_joules is None:
            self._unmetered += 1
        self._billed += sum(outcome.joules or 0.0 for outcome in line.outcomes.values())
        self._meters.update(dict.fromkeys(o.meter for o in line.outcomes.values() if o.meter))
        for m, outcome in line.outcomes.items():
            if outcome.joules:
                self._compare(line, m, outcome.joules, outcome.meter)

    def _compare(self, line: Settled, m: int, joules: float, meter: str | None) -> None:
        """Book how far the predictions were from what was read."""
        if line.decision.joules_predicted is not None:
            adapted = self._predicted.setdefault("adapted", PredictionError())
            adapted.add(line.decision.joules_predicted[m], joules)
        if self._calibration is not None:
            model = self._calibration.of(self._source.names[m])
            alone = self._predicted.setdefault("calibration", PredictionError())
            alone.add(model.joules(len(line.request.prompt)), joules)
            if meter not in (model.meter, "replay", None):
                self._other_meter = f"{meter}, and its calibration was by {model.meter}"

    def _dumps(self, row: dict[str, Any]) -> str:
        if self._config.columns:
            if self._routed + self._failed <= 1:  # before anything is committed
                _check_columns(self._config.columns, row)
            row = {
                name: row.get(name)
                for name in (*self._config.columns, "error")
                if name != "error" or name in row
            }
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
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
                key = (self._source.names[m], kind, outcome.meter)
                joules, requests = energy.get(key, (0.0, 0))
                energy[key] = (joules + outcome.joules, requests + 1)
        energy.update(self._take_overhead())
        return energy

    def _take_overhead(self) -> dict[tuple[str, str, str], tuple[float, int]]:
        overhead = self._source.take_overhead()
        self._overhead.update(overhead)
        return {("", "overhead", meter): (joules, 0) for meter, joules in overhead.items()}

    def refuse(self, step: Step) -> None:
        """With --on-error stop, a window in which a model or the metric failed isn't committed: the next run
        tries it again."""
        if self._config.on_error == "stop":
            for line in step.lines:
                if isinstance(line, Settled):
                    errors = [outcome.error for outcome in line.outcomes.values() if outcome.error]
                    if errors:
                        raise MessError(f"{line.request.source}:{line.request.line}: {errors[0]}")

    def check(self, step: Step, tell: Callable[[str], None]) -> None:
        """Say what the user should know as soon as it is known."""
        if self._other_meter is not None and not self._told_other_meter:
            self._told_other_meter = True
            tell(f"warning: this run is metered by {self._other_meter}: E_m(t) starts elsewhere, and adapts")
        for plan, alpha in self._controller.settings.alphas.items():
            if plan not in self._unreachable and self._controller.unreachable(plan):
                self._unreachable.add(plan)
                name = f' of plan "{plan}"' if plan else ""
                tell(
                    f"warning: alpha {alpha}{name} is above what this zoo reaches, even with the best answer to "
                    f"every request. The SLA will be missed; {self._source.names[-1]} serves from here on"
                )

    def end(self) -> None:
        """Book the energy of the last steps."""
        self._state.add_energy(self._take_overhead())

    def progress(self, already_done: int, total: int | None) -> Progress:
        accounts = self._controller.accounts.values()
        alphas = set(self._controller.settings.alphas.values())
        observed = sum(account.observed for account in accounts)
        finished = already_done + self._routed + self._failed
        left = None if total is None else self._controller.expected_explorations(total - finished)
        return Progress(
            finished=finished,
            total=total,
            joules=self._billed,
            accuracy=sum(a.observed_sum for a in accounts) / observed if observed else None,
            alpha=next(iter(alphas)) if len(alphas) == 1 else None,
            explorations_left=left,
        )

    def summary(self, already_done: int, stopped_by: int | None) -> Summary:
        largest = self._source.names[-1]
        reads = [value for (model, _, _), value in self._state.energy().items() if model == largest]
        requests = sum(count for _, count in reads)
        alphas = self._controller.settings.alphas
        return Summary(
            routed=self._routed,
            already_done=already_done,
            failed=self._failed,
            served=dict(self._served),
            explored=self._explored,
            billed_joules=self._billed,
            overhead=dict(self._overhead),
            predicted=self._predicted,
            unmetered=self._unmetered,
            meters=tuple(self._meters),
            accounts={plan: a for plan, a in self._controller.accounts.items() if plan in alphas},
            alphas=alphas,
            period=self._config.period or "",
            horizon=self._config.horizon,
            period_requests=(self._state.period(self._config.period or "") or (None, 0))[1],
            unreachable=tuple(sorted(self._unreachable)),
            largest=largest,
            largest_joules=sum(joules for joules, _ in reads) / requests if requests else None,
            metric=self._metric.signature,
            serve=self._config.serve,
            stopped_by=stopped_by,
            first_error=self._first_error,
        )


def account_rows(controller: Controller, period: str) -> list[tuple[Any, ...]]:
    """The controller's accounts as rows of the state's table."""
    return [
        (
            period,
            plan,
            controller.settings.alphas[plan],
            account.queue.length,
            account.observed,
            account.observed_sum,
            account.estimated,
            account.estimated_sum,
            account.explored,
            account.failed,
        )
        for plan, account in controller.accounts.items()
        if plan in controller.settings.alphas
    ]


def _account(row: Sequence[Any]) -> Account:
    """The account that `account_rows` made a row of."""
    _, _, _, queue, observed, observed_sum, estimated, estimated_sum, explored, failed = row
    return Account(VirtualQueue(queue), observed, observed_sum, estimated, estimated_sum, explored, failed)


class _NothingInHand(BaseException):
    """A signal came while the input was being read, maybe for ever: nothing is lost by stopping there."""


class Stop:
    signal: int | None = None
    in_hand: bool | None = None  # a window is being worked on; None before the first line is read


@contextmanager
def stop_signals(tell: Callable[[str], None], work: str = "window") -> Iterator[Stop]:
    """SIGINT and SIGTERM end the run after the window in hand; a second one raises Interrupted at once."""
    stop = Stop()

    def on_signal(number: int, _: FrameType | None) -> None:
        if stop.signal is not None or stop.in_hand is None:
            raise Interrupted(number)
        stop.signal = number
        if not stop.in_hand:
            raise _NothingInHand
        with suppress(RuntimeError):  # the signal came in the middle of a line to the terminal
            tell(f"stopping after the {work} in hand (again: stop now)")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

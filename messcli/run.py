"""`route`: requests in, rows out, every window committed. Wires zoo, meter, state and loop together.

Knows files and signals; prints nothing: it tells its caller, who has the terminal.
"""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import safetensors.numpy

from messcli.backends import create
from messcli.controller import DEFAULT_PLAN, Account, Controller, Event
from messcli.energy import EnergyLedger, open_meter
from messcli.errors import InputError, MessError, StateError, UsageError
from messcli.factory import Setup, create_controller
from messcli.inputs import InputFields, count_lines, open_input, read_requests
from messcli.loop import Line, Settled, Step, steps
from messcli.metrics import Metric, load_metric
from messcli.outcomes import Asked, Live
from messcli.outputs import STDOUT
from messcli.records import Outcome, Rejected, Request, rejected_row, row_of
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
    period: str = ""
    on_error: str = "skip"
    meter: str = "auto"
    batch_size: int | None = None
    preload: bool = False
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


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run did, and where the promise stands."""

    routed: int  # requests of this run
    already_done: int  # lines of the input that earlier runs had finished
    failed: int  # rows with `error` in this run
    served: Mapping[str, int]  # model -> requests of this run
    explored: int  # requests of this run
    billed_joules: float  # of this run, explorations included
    overhead_joules: float  # of this run: loading, learning, idle
    unmetered: int  # requests of this run whose joules aren't known
    meters: tuple[str, ...]
    accounts: Mapping[str, Account]  # plan -> ledger, all runs of the period
    alphas: Mapping[str, float]
    unreachable: tuple[str, ...]  # plans whose alpha is above what the zoo can reach
    largest: str
    largest_joules: float | None  # mean joules of the largest model, over all its calls that were read
    metric: str  # its signature
    stopped_by: int | None = None  # signal number

    @property
    def sla_missed(self) -> bool:
        """Whether any plan's observed mean accuracy is below its alpha."""
        means = {plan: account.observed_mean for plan, account in self.accounts.items()}
        return any(mean is not None and mean < self.alphas[plan] for plan, mean in means.items())


@dataclass(frozen=True, slots=True)
class Job:
    """What differs between the commands that share the loop, the state and the output."""

    controller: Callable[[RouteConfig, Zoo, Mapping[str, float]], Controller]
    # (line, names of the zoo) -> the row to be written; None: a row of `route`
    row: Callable[[Settled | Rejected, Sequence[str]], dict[str, Any]] | None = None


def route(
    config: RouteConfig,
    *,
    on_progress: Callable[[Progress], None] = lambda _: None,
    tell: Callable[[str], None] = lambda _: None,
) -> Summary:
    """Route `config.input` to `config.output`, going on where an earlier run stopped.

    Args:
        on_progress: called after every window.
        tell: takes lines for the user's eyes (what the meter is, what went wrong and was survived).

    Raises:
        MessError: with what the user can do; all finished windows are kept.
    """
    return run_job(config, Job(_controller), on_progress, tell)


def run_job(
    config: RouteConfig, job: Job, on_progress: Callable[[Progress], None], tell: Callable[[str], None]
) -> Summary:
    """`route`, with another controller or other rows: `record` is a job of its own kind."""
    zoo = load_zoo(config.zoo)
    metric = load_metric(config.metric or zoo.metric or "bleu1")
    alphas = _alphas(config, zoo)
    with ExitStack() as stack:
        stop = stack.enter_context(_stop_signals(tell))
        state = stack.enter_context(State(_state_path(config), wait_seconds=config.wait_seconds))
        controller = job.controller(config, zoo, alphas)
        _resume(state, controller, config, zoo, metric)
        state.open_output(config.output)
        total = _total(config)
        handle = stack.enter_context(open_input(config.input))
        feed = _Feed(read_requests(handle, config.input, config.input_fields), config, alphas, state)
        source = stack.enter_context(_LazySource(config, zoo, metric, tell))
        if config.preload:
            source.open().load()
        run = _Run(config, controller, state, source, metric, job.row)
        for step in steps(feed, controller, source, config.window):
            run.commit(step)
            on_progress(run.progress(feed.already_done, total))
            for warning in source.take_warnings():
                tell(f"warning: {warning}")
            run.check(step, tell)
            if stop.signal is not None:
                break
        else:
            state.finish()
        run.end()
        if stop.signal is None and feed.failure is not None:
            raise feed.failure
        return run.summary(feed.already_done, stop.signal)


def _state_path(config: RouteConfig) -> Path | None:
    if config.state is not None:
        return config.state
    return None if config.output == STDOUT else Path(config.output + ".state")


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
        config.policy, config.v, config.c, config.learn, config.predictor, config.seed, config.serve
    )
    return create_controller(setup, len(zoo.models), alphas)


def _resume(state: State, controller: Controller, config: RouteConfig, zoo: Zoo, metric: Metric) -> None:
    """Bring the controller to where the state is, after checking that both belong together."""
    signature = {
        "zoo": zoo.signature(),
        "metric": metric.signature,
        "policy": config.policy,
        "predictor": controller.predictor.name,
        "window": config.window,
        "seed": config.seed,
    }
    known = state.meta("signature")
    if known is None:
        state.set_meta("signature", signature)
    elif differing := [name for name in signature if signature[name] != known.get(name)]:
        name = differing[0]
        raise StateError(
            f"{state.name}: was made with {_shown(name, known.get(name))}, and this run has "
            f"{_shown(name, signature[name])}. Run with what it was made with, or start anew with another "
            "--state and output"
        )
    snapshot, events = state.learnt()
    if snapshot is not None:
        controller.load(safetensors.numpy.load(snapshot))
    for event in events:
        controller.settle([Event.loads(event)])
    settings = {**asdict(controller.settings), "policy": config.policy, "v": config.v}
    state.record_settings(controller.t + 1, settings)


def _shown(name: str, value: Any) -> str:
    if name == "zoo":
        return "the models " + ", ".join(f"{model['name']} ({model['path']})" for model in value["models"])
    return f"{name} {value}"


def _total(config: RouteConfig) -> int | None:
    total = count_lines(config.input)
    return total if total is None or config.limit is None else min(total, config.limit)


class _Feed:
    """The lines of the input that are still to be routed. What ends it early stands in `failure`."""

    def __init__(
        self, lines: Iterator[Line], config: RouteConfig, alphas: Mapping[str, float], state: State
    ) -> None:
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
            for line in self._lines:
                todo = self._todo(line)
                if todo is None:
                    self.already_done += 1
                elif isinstance(todo, Rejected) and self._stop_on_error:
                    self.failure = InputError(todo.error)
                    return
                else:
                    yield todo
        except InputError as error:
            self.failure = error

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

    def __init__(self, config: RouteConfig, zoo: Zoo, metric: Metric, tell: Callable[[str], None]) -> None:
        self.names = zoo.names
        self._config = config
        self._zoo = zoo
        self._metric = metric
        self._tell = tell
        self._live: Live | None = None

    def open(self) -> Live:
        if self._live is None:
            backends = [create(spec, batch_size=self._config.batch_size) for spec in self._zoo.models]
            devices = dict.fromkeys(device for backend in backends for device in backend.devices)
            meter = open_meter(self._config.meter, tuple(devices), self._zoo.energy.get("cpu_watts"))
            for line in meter.describe():
                self._tell(line)
            self._live = Live(backends, EnergyLedger(meter), self._metric)
        return self._live

    def allowed(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        return self.open().allowed(requests) if requests else []

    def query(self, asked: Asked) -> list[dict[int, Outcome]]:
        return self.open().query(asked) if asked else []

    def take_overhead(self) -> Mapping[str, float]:
        return self._live.take_overhead() if self._live else {}

    def take_warnings(self) -> list[str]:
        return self._live.take_warnings() if self._live else []

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
        row: Callable[[Settled | Rejected, Sequence[str]], dict[str, Any]] | None,
    ) -> None:
        self._row = row
        self._config = config
        self._controller = controller
        self._state = state
        self._source = source
        self._metric = metric
        self._served: Counter[str] = Counter()
        self._routed = self._failed = self._explored = self._unmetered = 0
        self._billed = self._overhead = 0.0
        self._meters: dict[str, None] = {}
        self._unreachable: set[str] = set()

    def commit(self, step: Step) -> None:
        """Commit a window: its rows, its events, its energy, and from time to time a snapshot."""
        done = [self._done(line) for line in step.lines]
        energy = self._energy(step)
        snapshot = self._snapshot() if self._state.wants_snapshot else None
        events = ((event.decision.t, event.dumps()) for event in step.events)
        accounts = account_rows(self._controller, self._config.period)
        self._state.commit(done, events, energy=energy, accounts=accounts, snapshot=snapshot)

    def _done(self, line: Settled | Rejected) -> Done:
        if isinstance(line, Rejected):
            self._failed += 1
            row = self._row(line, self._source.names) if self._row else rejected_row(line)
            return Done(line.key, line.digest, self._dumps(row))
        request, decision = line.request, line.decision
        model = None if line.served is None else self._source.names[line.served]
        values: dict[str, Any] = {"explored": decision.explored, "billed_joules": line.billed_joules}
        values["queue"] = line.queue
        error = None
        if line.served is None:
            error = line.outcomes[decision.model].error
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

    def _dumps(self, row: dict[str, Any]) -> str:
        if self._config.columns:
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
        self._overhead += sum(overhead.values())
        return {("", "overhead", meter): (joules, 0) for meter, joules in overhead.items()}

    def _snapshot(self) -> bytes:
        return safetensors.numpy.save(
            {name: np.ascontiguousarray(array) for name, array in self._controller.state().items()}
        )

    def check(self, step: Step, tell: Callable[[str], None]) -> None:
        """Say what the user should know as soon as it is known; stop at a failed request if asked to."""
        for plan, alpha in self._controller.settings.alphas.items():
            if plan not in self._unreachable and self._controller.unreachable(plan):
                self._unreachable.add(plan)
                name = f' of plan "{plan}"' if plan else ""
                tell(
                    f"warning: alpha {alpha}{name} is above what this zoo reaches, even with the best answer to "
                    f"every request. The SLA will be missed; {self._source.names[-1]} serves from here on"
                )
        if self._config.on_error == "stop":
            for line in step.lines:
                if isinstance(line, Settled) and line.served is None:
                    error = line.outcomes[line.decision.model].error
                    raise MessError(f"{self._config.input}:{line.request.line}: {error}")

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
        return Summary(
            routed=self._routed,
            already_done=already_done,
            failed=self._failed,
            served=dict(self._served),
            explored=self._explored,
            billed_joules=self._billed,
            overhead_joules=self._overhead,
            unmetered=self._unmetered,
            meters=tuple(self._meters),
            accounts=self._controller.accounts,
            alphas=self._controller.settings.alphas,
            unreachable=tuple(sorted(self._unreachable)),
            largest=largest,
            largest_joules=sum(joules for joules, _ in reads) / requests if requests else None,
            metric=self._metric.signature,
            stopped_by=stopped_by,
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


class _Stop:
    signal: int | None = None


@contextmanager
def _stop_signals(tell: Callable[[str], None]) -> Iterator[_Stop]:
    """SIGINT and SIGTERM set a flag for the loop; a second one raises KeyboardInterrupt at once."""
    stop = _Stop()

    def on_signal(number: int, _: FrameType | None) -> None:
        if stop.signal is not None:
            raise KeyboardInterrupt
        stop.signal = number
        tell("stopping after the window in hand (again: stop now)")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

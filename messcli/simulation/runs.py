"""The loop over a recorded table: every policy, setting and request order, on all cores.

The loop is `route`'s own, with `Recorded` in place of live models: what is judged here is the code that
runs there. Knows nothing of files or terminals.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from multiprocessing import active_children, get_context, parent_process
from threading import Thread
from typing import Any, TypeVar

import numpy as np

from messcli.errors import MessError, UsageError
from messcli.files.ahead import reservoir
from messcli.metrics import ROUNDING, keeps
from messcli.predict.text import TOGETHER, remember
from messcli.registry import POLICIES
from messcli.routing.audit import Audits
from messcli.routing.bound import ServedMean
from messcli.routing.controller import Controller
from messcli.routing.knowledge import Knowledge
from messcli.routing.line import Chunk, Settled
from messcli.routing.loop import chunks
from messcli.routing.setup import Setup, create_controller
from messcli.routing.sla import DEFAULT_PLAN
from messcli.routing.tuning import TUNING
from messcli.simulation.engines import Asked, Engines, Played
from messcli.simulation.hindsight import ORACLE, oracle
from messcli.simulation.results import Audited, Result
from messcli.simulation.table import OutcomeTable
from messcli.snapshots import Part

BLIND = ("smallest", "largest")  # the same whatever the order, alpha, V and c

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class SimulateConfig:
    """What to simulate: every policy at every alpha, V and c, on every request order."""

    alphas: tuple[float, ...] = ()
    alpha_at: tuple[
        float, ...
    ] = ()  # further ones, as parts of the way from the smallest model to the best one
    policies: tuple[str, ...] = ()  # all
    v: tuple[float | None, ...] = (None,)  # None: the default, or found by the program
    c: tuple[float | None, ...] = (None,)
    orders: int | None = None  # so many shuffled orders; None: the table's own order
    setup: Setup = field(
        default_factory=Setup
    )  # the rest; its seed is the first order's, the next ones count up
    jobs: int | None = 1  # processes; None: one per core
    audit: bool = False  # the table's accuracies are hidden but where an audit finds them
    sure: bool = False  # with `audit`: the bound is to meet alpha
    agreement: bool = False  # the table's accuracies are agreement with the largest model, whose own is known
    knowledge: Knowledge | None = None  # that every run of mess+ begins with

    @property
    def seeds(self) -> range:
        """One per request order."""
        return range(self.setup.seed, self.setup.seed + (self.orders or 1))


@dataclass(frozen=True, slots=True)
class Task:
    """One run of the loop over the table."""

    setup: Setup
    alpha: float
    shuffled: bool  # by setup.seed
    limit: int | None = None  # only so many requests, the first ones of the order
    knowledge: Knowledge | None = None  # that it begins with


# ---- one run -------------------------------------------------------------------------------------


def replay(table: OutcomeTable, task: Task) -> Iterator[Settled]:
    """Run the loop over the table's requests; yield each with all that came of it."""
    for chunk in _chunks(table, task):
        yield from _settled(chunk)


def _settled(chunk: Chunk) -> Iterator[Settled]:
    return (line for line in chunk.lines if isinstance(line, Settled))  # a recorded request always fits


def _chunks(table: OutcomeTable, task: Task) -> Iterator[Chunk]:
    return _run(table, task)[1]


def _run(table: OutcomeTable, task: Task) -> tuple[Controller, Iterator[Chunk]]:
    requests: Sequence[Any] = [table.requests[position] for position in _order(table, task)]
    setup = replace(task.setup, horizon=len(requests))
    controller = create_controller(setup, len(table.names), {DEFAULT_PLAN: task.alpha})
    if task.knowledge is not None:
        controller.learnt.take_over(task.knowledge)
        controller.begin()
    prompts = [request.prompt for request in requests]  # as of a file
    controller.read_ahead(reservoir(prompts, setup.tuning.ahead.prompts, setup.seed))
    if remember(len(requests)):  # every order of the table has the same texts
        controller.learnt.encode([request.prompt for request in requests])
    return controller, chunks(requests, controller, table.source)


def taught(table: OutcomeTable, setup: Setup) -> Part:
    """The state of a controller that has seen what every model did with every request of the table, in its order.

    Args:
        setup: of the run that is to learn from it.
    """
    predictor = "mean" if setup.policy == "random" else setup.predictor
    all_asked = Setup(
        c=math.inf,
        predictor=predictor,
        seed=setup.seed,
        window=TOGETHER,
        no_look=setup.no_look,
        tuning=setup.tuning,
    )
    controller = create_controller(all_asked, len(table.names), {DEFAULT_PLAN: 0.0})
    for _ in chunks(table.requests, controller, table.source):
        pass
    return controller.state()


def _order(table: OutcomeTable, task: Task) -> list[int]:
    """The position in the table of each request of the run."""
    count = len(table.requests)
    if not task.shuffled:
        return list(range(count))[: task.limit]
    order: list[int] = np.random.default_rng(task.setup.seed).permutation(count).tolist()
    return order[: task.limit]


def run_task(table: OutcomeTable, task: Task) -> Result:
    """Run the loop over the table and add up."""
    return run_traced(table, task)[0]


def run_traced(table: OutcomeTable, task: Task) -> tuple[Result, list[Asked]]:
    """... and say who was asked, and when."""
    served = [0] * len(table.names)
    accuracy = billed = paper = 0.0
    explorations = looked = escalated = 0
    trace: list[Asked] = []
    positions = iter(_order(table, task))
    settled = 0
    controller, done = _run(table, task)
    account = controller.accounts[DEFAULT_PLAN]
    watched = None if task.setup.audits is None else _Watched(task.setup.audits.error)
    for chunk in done:
        if chunk.opened is not None:
            settled = len(trace)  # a window is decided when all before it is settled
        for line in _settled(chunk):
            trace.append(_asked(next(positions), settled, line))
            looked += line.decision.given is not None
            escalated += len(trace[-1].stages) > 1
            m = line.decision.model if line.served is None else line.served
            outcome = line.outcomes[m]
            served[m] += 1
            explorations += line.decision.explored
            accuracy += outcome.accuracy or 0.0
            paper += outcome.joules or 0.0
            billed += line.billed_joules or 0.0
            if watched is not None:
                watched.see(line)
        if watched is not None and chunk.ends_window:
            watched.check(account.mean, accuracy)
    count = len(trace)
    result = Result(
        policy=task.setup.policy,
        alpha=task.alpha,
        v=task.setup.v,
        c=task.setup.c,
        seed=task.setup.seed,
        requests=count,
        accuracy=accuracy / count,
        billed_joules=billed / count,
        paper_joules=paper / count,
        explorations=explorations,
        served=dict(zip(table.names, served, strict=True)),
        meets_alpha=keeps(accuracy / count, task.alpha),
        audited=None if watched is None or account.mean is None else watched.result(account.mean, count),
        looked=looked or None,
        escalated=escalated if looked else None,
    )
    return result, trace


class _Watched:
    """What audits take and tell in a run, beside the truth."""

    def __init__(self, error: float) -> None:
        self._error = error
        self._audits = self._later = 0
        self._joules = 0.0
        self._holds = True

    def see(self, line: Settled) -> None:
        decision = line.decision
        if not decision.audited or decision.explored:
            return
        self._audits += 1
        self._later += decision.t > TUNING.audits.beginning
        self._joules += line.audit_joules

    def check(self, mean: ServedMean | None, accuracy: float) -> None:
        """At a window's end, when the accuracies of all that was served add up to `accuracy`."""
        if mean is not None and mean.rules_out(accuracy - mean.observed_sum + ROUNDING, self._error):
            self._holds = False

    def result(self, mean: ServedMean, count: int) -> Audited:
        return Audited(
            share=self._audits / count,
            later=self._later / max(count - TUNING.audits.beginning, 1),
            joules=self._joules / count,
            estimate=mean.mean or 0.0,
            bound=mean.least(self._error) or 0.0,
            holds=float(self._holds),
        )


def _asked(position: int, settled: int, line: Settled) -> Asked:
    decision = line.decision
    # After a look, a larger model is a second stage; all of an exploration are one.
    at_once = tuple(m for m in decision.asked if m != decision.added)
    stages = (at_once,) if decision.added is None else (at_once, (decision.added,))
    checks = (decision.checked_by,) * len(line.checks) if decision.checked_by is not None else ()
    return Asked(position, settled, stages, checks, line.served)


# ---- many runs -----------------------------------------------------------------------------------


def all_policies() -> tuple[str, ...]:
    """What can be simulated, as the comparison lists it."""
    return (*[name for name in POLICIES if name != "mess+"], "mess+", ORACLE)


def in_full(table: OutcomeTable, config: SimulateConfig) -> SimulateConfig:
    """`config` with what it leaves to the table, to the registry and to this machine: alphas, policies, processes.

    Raises UsageError for a policy that there isn't.
    """
    for name in config.policies:
        if name not in all_policies():
            raise UsageError(POLICIES.unknown(name, ORACLE))
    return replace(
        config,
        alphas=(*config.alphas, *alphas_at(table, config.alpha_at)),
        alpha_at=(),
        policies=config.policies or all_policies(),
        jobs=config.jobs or cores(),
    )


def alphas_at(table: OutcomeTable, fractions: Iterable[float]) -> tuple[float, ...]:
    """Targets so far of the way from the smallest model's mean accuracy to the best one's."""
    means = table.accuracies.mean(axis=0)
    smallest, best = float(means[0]), float(means.max())
    return tuple(smallest + fraction * (best - smallest) for fraction in fractions)


def simulate(
    table: OutcomeTable,
    config: SimulateConfig,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    engines: Engines | None = None,
    on_trace: Callable[[Task, Sequence[Asked]], None] | None = None,
) -> list[Result]:
    """Run everything that `config` asks for.

    Args:
        on_progress: called with runs done and runs in all.
        engines: those of the table, to play each run through.
        on_trace: called with each run and who was asked in it.

    Returns:
        One result per policy, setting and request order; settings in the order they were asked for.
    """
    config = in_full(table, config)
    tasks = list(dict.fromkeys(_task_of(cell) for cell in _cells(config) if cell.setup.policy != ORACLE))
    done: dict[Task, Result] = {}
    played: dict[Task, Played] = {}
    if engines is None and on_trace is None:
        done = dict(zip(tasks, each(run_task, tasks, table, config.jobs or 1, on_progress), strict=True))
    else:
        traced = each(run_traced, tasks, table, config.jobs or 1, on_progress)
        for task, (result, trace) in zip(tasks, traced, strict=True):
            done[task] = result
            if engines is not None:
                played[task] = engines.play(trace)
            if on_trace is not None:
                on_trace(task, trace)
    hindsight = {alpha: oracle(table, alpha) for alpha in config.alphas if ORACLE in config.policies}
    results = []
    for cell in _cells(config):
        if cell.setup.policy == ORACLE:
            results.append(replace(hindsight[cell.alpha], seed=cell.setup.seed))
            continue
        result = done[_task_of(cell)]
        meets = keeps(result.accuracy, cell.alpha)
        in_load = None if engines is None else engines.compared(played[_task_of(cell)], cell.alpha)
        results.append(
            replace(result, alpha=cell.alpha, seed=cell.setup.seed, meets_alpha=meets, in_load=in_load)
        )
    return results


def _cells(config: SimulateConfig) -> Iterator[Task]:
    """Every (policy, setting, order) that a result is due for."""
    for alpha, policy in product(config.alphas, config.policies):
        swept_v = config.v if policy == "mess+" else (None,)
        swept_c = config.c if policy == "mess+" else (None,)
        for v, c, seed in product(swept_v, swept_c, config.seeds):
            audits = Audits(agreement=config.agreement, sure=config.sure) if config.audit else None
            setup = replace(config.setup, policy=policy, v=v, c=c, seed=seed, audits=audits)
            known = (
                None if policy in (*BLIND, "random") else config.knowledge
            )  # these have nothing to learn by it
            yield Task(setup, alpha, config.orders is not None, knowledge=known)


def _task_of(cell: Task) -> Task:
    """The run that a cell's result comes from: `smallest` and `largest` need only one for all of them."""
    if cell.setup.policy in BLIND:
        # they don't look at estimates, and what they serve is compared with, not promised
        setup = replace(cell.setup, seed=0, predictor="mean", audits=None)
        return replace(cell, setup=setup, alpha=0.0, shuffled=False)
    return cell


# ---- all cores -----------------------------------------------------------------------------------

# What a worker process works on; set once per process, so that a task travels as a few numbers.
_worker: dict[str, Any] = {}


def each(
    function: Callable[[OutcomeTable, Item], Answer],
    items: Sequence[Item],
    table: OutcomeTable,
    jobs: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """function(table, item) for every item, in order, on `jobs` processes.

    The function has to be importable by its name. With one job or one item everything runs here.
    """
    answers: list[Answer] = []
    with _mapper(function, table, min(jobs, len(items))) as mapper:
        for answer in mapper(items):
            answers.append(answer)
            on_progress(len(answers), len(items))
    return answers


@contextmanager
def _mapper(
    function: Callable[[OutcomeTable, Item], Answer], table: OutcomeTable, jobs: int
) -> Iterator[Callable[[Sequence[Item]], Iterator[Answer]]]:
    if jobs <= 1:
        yield lambda items: (function(table, item) for item in items)
        return
    # Spawned, not forked: a fork of a process with threads (BLAS, tqdm) can hang.
    with (
        _one_thread_each(),
        ProcessPoolExecutor(
            jobs, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(function, table)
        ) as pool,
    ):
        try:
            yield lambda items: _started(pool, items)
        except BrokenProcessPool:
            raise MessError(
                f"one of {jobs} processes was killed, most likely for want of memory. Run with --jobs 1"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in active_children():  # what they work on, nobody waits for
                worker.terminate()
            raise


def _started(pool: ProcessPoolExecutor, items: Sequence[Item]) -> Iterator[Any]:
    """The pool at work. A signal waits until its processes have started: one that is cut off before leaves a traceback.

    They inherit the blocked signals, and let them in when they are ready.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        return pool.map(_in_worker, items)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started meanwhile use one thread each: there is one process per core already."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def _start_worker(function: Callable[..., Any], table: OutcomeTable) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent answers it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    Thread(target=_end_with_parent, daemon=True).start()
    _worker.update(function=function, table=table)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next item for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_worker(item: Any) -> Any:
    return _worker["function"](_worker["table"], item)


def cores() -> int:
    """How many processes this one may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

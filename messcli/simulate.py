"""`simulate`: what policies would have done on a recorded table, over settings and request orders.

The loop is `route`'s own, with `Recorded` in place of live models: what is judged here is the code that
runs there. Beside it stand two yardsticks in hindsight: `static`, the cheapest mix that doesn't look at the
request, and `oracle`, the linear programme that knows every outcome. Knows nothing of files or terminals.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from multiprocessing import get_context
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from messcli.controller import DEFAULT_PLAN
from messcli.errors import MessError, UsageError
from messcli.factory import POLICIES, Setup, create_controller
from messcli.loop import Settled, steps
from messcli.policy import cheapest_mix
from messcli.predictors import Predictor
from messcli.ridge import JoulesPredictor
from messcli.tables import OutcomeTable

ORACLE = "oracle"
BLIND = ("smallest", "largest")  # the same whatever the order, alpha, V and c
ALL_POLICIES = (*[name for name in POLICIES if name != "mess+"], "mess+", ORACLE)
ROUNDING = 1e-9  # how far a mean may be below alpha by summing floats in another order

Floats = NDArray[np.float64]
Choice = NDArray[np.intp]
Item = TypeVar("Item")
Answer = TypeVar("Answer")
Encoder = TypeVar("Encoder", bound=Predictor | JoulesPredictor)


@dataclass(frozen=True, slots=True)
class SimulateConfig:
    """What to simulate: every policy at every alpha, V and c, on every request order."""

    alphas: tuple[float, ...]
    policies: tuple[str, ...] = ALL_POLICIES
    v: tuple[float | None, ...] = (None,)  # None: the default, or found by the program
    c: tuple[float | None, ...] = (None,)
    orders: int | None = None  # so many shuffled orders; None: the table's own order
    seed: int = 0  # of the first order (and of its explorations); the next ones count up
    learn: str = "all"
    predictor: str = "ridge"
    serve: str = "largest"
    window: int = 1
    jobs: int = 1

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + (self.orders or 1))


@dataclass(frozen=True, slots=True)
class Task:
    """One run of the loop over the table."""

    setup: Setup
    alpha: float
    shuffled: bool  # by setup.seed
    window: int = 1


@dataclass(frozen=True, slots=True)
class Result:
    """What one policy at one setting did on one request order: a line of `--out`. Joules per request."""

    policy: str
    alpha: float
    v: float | None
    c: float | None
    seed: int
    requests: int
    accuracy: float  # mean, of what was served, true
    billed_joules: float  # everything billed
    paper_joules: float  # an exploration billed as its served model only
    explorations: int
    served: dict[str, int]
    meets_alpha: bool

    def row(self) -> dict[str, Any]:
        """As it stands in the file."""
        return asdict(self)


# ---- one run -------------------------------------------------------------------------------------


def replay(table: OutcomeTable, task: Task, memo: FeatureMemo | None = None) -> Iterator[Settled]:
    """Run the loop over the table's requests; yield each with all that came of it."""
    requests: Sequence[Any] = table.requests
    if task.shuffled:
        order = np.random.default_rng(task.setup.seed).permutation(len(requests))
        requests = [requests[position] for position in order]
    setup = replace(task.setup, horizon=len(requests))
    controller = create_controller(setup, len(table.names), {DEFAULT_PLAN: task.alpha})
    memo = memo or FeatureMemo()
    controller.predictor = memo.wrap(controller.predictor, controller.predictor.name)
    controller.joules = memo.wrap(controller.joules, "joules")
    for step in steps(requests, controller, table.source, task.window):
        for line in step.lines:
            if isinstance(line, Settled):  # a recorded request always fits
                yield line


def run_task(table: OutcomeTable, task: Task, memo: FeatureMemo | None = None) -> Result:
    """Run the loop over the table and add up."""
    served = [0] * len(table.names)
    accuracy = billed = paper = 0.0
    explorations = 0
    for line in replay(table, task, memo):
        m = line.decision.model if line.served is None else line.served
        outcome = line.outcomes[m]
        served[m] += 1
        explorations += line.decision.explored
        accuracy += outcome.accuracy or 0.0
        paper += outcome.joules or 0.0
        billed += line.billed_joules or 0.0
    count = len(table.requests)
    return Result(
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
        meets_alpha=accuracy / count >= task.alpha - ROUNDING,
    )


class FeatureMemo:
    """Remembers a text's features, which are a pure function of the text, for the next order of the table."""

    MOST = 50_000  # texts; a few hundred features each

    def __init__(self) -> None:
        self._features: dict[tuple[str, str], Any] = {}

    def wrap(self, predictor: Encoder, name: str) -> Encoder:
        """The predictor, but a text that was encoded before isn't encoded again."""
        return cast(Encoder, _Remembering(predictor, name, self._features))


class _Remembering:
    def __init__(self, predictor: Any, name: str, features: dict[tuple[str, str], Any]) -> None:
        self._predictor = predictor
        self._name = name
        self._features = features

    def encode(self, text: str) -> Any:
        key = (self._name, text)
        known = self._features.get(key)
        if known is None:
            known = self._predictor.encode(text)
            if len(self._features) < FeatureMemo.MOST:
                self._features[key] = known
        return known

    def __getattr__(self, name: str) -> Any:
        return getattr(self._predictor, name)


# ---- hindsight -----------------------------------------------------------------------------------


def static_mix(table: OutcomeTable, alpha: float) -> Result:
    """The cheapest request-blind mix in hindsight: the linear programme over the models' means."""
    accuracies, joules = table.accuracies.mean(axis=0), table.joules.mean(axis=0)
    low, high, share = cheapest_mix(accuracies.tolist(), joules.tolist(), alpha)
    mix = np.zeros(len(table.names))
    mix[low] += 1.0 - share
    mix[high] += share
    count = len(table.requests)
    return Result(
        policy="static",
        alpha=alpha,
        v=None,
        c=None,
        seed=0,
        requests=count,
        accuracy=float(mix @ accuracies),
        billed_joules=float(mix @ joules),
        paper_joules=float(mix @ joules),
        explorations=0,
        served={name: round(part * count) for name, part in zip(table.names, mix.tolist(), strict=True)},
        meets_alpha=float(mix @ accuracies) >= alpha - ROUNDING,
    )


def oracle(table: OutcomeTable, alpha: float) -> Result:
    """The cheapest assignment in hindsight, knowing every outcome: equation 1 of the paper, solved."""
    choice = cheapest_assignment(table.accuracies, table.joules, alpha)
    rows = np.arange(len(choice))
    accuracy = float(table.accuracies[rows, choice].mean())
    joules = float(table.joules[rows, choice].mean())
    counts = np.bincount(choice, minlength=len(table.names))
    return Result(
        policy=ORACLE,
        alpha=alpha,
        v=None,
        c=None,
        seed=0,
        requests=len(choice),
        accuracy=accuracy,
        billed_joules=joules,
        paper_joules=joules,
        explorations=0,
        served=dict(zip(table.names, counts.tolist(), strict=True)),
        meets_alpha=accuracy >= alpha - ROUNDING,
    )


def cheapest_assignment(accuracies: Floats, joules: Floats, alpha: float) -> Choice:
    """One model per request, mean accuracy >= alpha, least joules: the linear programme, rounded up.

    The programme's only coupling constraint has one price, joules per unit of accuracy; at a given price
    every request minimises joules - price * accuracy on its own. The price is found by bisection. All
    requests that change their model at it are equally worth it, and one after another is changed until
    alpha is reached: at most one request beyond the relaxed programme's optimum.

    Args:
        accuracies, joules: of shape (requests, models).

    Returns:
        The model of each request. Where alpha can't be reached, the most accurate ones.
    """
    best = accuracies.max(axis=1)
    most: Choice = np.where(accuracies == best[:, None], joules, np.inf).argmin(axis=1)
    if best.mean() <= alpha:
        return most
    rows = np.arange(len(best))

    def at(price: float) -> tuple[Choice, float]:
        choice: Choice = (joules - price * accuracies).argmin(axis=1)
        return choice, float(accuracies[rows, choice].mean())

    low_price, high_price = 0.0, 1.0
    low, reached = at(0.0)
    if reached >= alpha:
        return low
    high, reached = at(high_price)
    while reached < alpha and high_price < 1e15:
        high_price *= 4.0
        high, reached = at(high_price)
    if reached < alpha:  # only prices beyond the floats' precision would buy the rest
        return most
    for _ in range(200):
        price = 0.5 * (low_price + high_price)
        if price in (low_price, high_price):
            break
        choice, reached = at(price)
        if reached >= alpha:
            high, high_price = choice, price
        else:
            low, low_price = choice, price
    changing = np.flatnonzero(low != high)
    gains = (accuracies[changing, high[changing]] - accuracies[changing, low[changing]]) / len(best)
    missing = alpha - float(accuracies[rows, low].mean())
    needed = int(np.searchsorted(np.cumsum(gains), missing - 1e-12)) + 1
    chosen: Choice = low.copy()
    chosen[changing[:needed]] = high[changing[:needed]]
    return chosen


# ---- many runs -----------------------------------------------------------------------------------


def alphas_at(table: OutcomeTable, fractions: Iterable[float]) -> tuple[float, ...]:
    """Targets so far of the way from the smallest model's mean accuracy to the best one's."""
    means = table.accuracies.mean(axis=0)
    smallest, best = float(means[0]), float(means.max())
    return tuple(smallest + fraction * (best - smallest) for fraction in fractions)


def simulate(
    table: OutcomeTable,
    config: SimulateConfig,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Result]:
    """Run everything that `config` asks for.

    Args:
        on_progress: called with runs done and runs in all.

    Returns:
        One result per policy, setting and request order; settings in the order they were asked for.
    """
    for name in config.policies:
        if name not in ALL_POLICIES:
            raise UsageError(f'unknown policy "{name}". Known are {", ".join(ALL_POLICIES)}')
    tasks = list(dict.fromkeys(_task_of(cell) for cell in _cells(config) if cell.setup.policy != ORACLE))
    done = dict(zip(tasks, each(run_task, tasks, table, config.jobs, on_progress), strict=True))
    hindsight = {alpha: oracle(table, alpha) for alpha in config.alphas if ORACLE in config.policies}
    results = []
    for cell in _cells(config):
        if cell.setup.policy == ORACLE:
            results.append(replace(hindsight[cell.alpha], seed=cell.setup.seed))
            continue
        result = done[_task_of(cell)]
        meets = result.accuracy >= cell.alpha - ROUNDING
        results.append(replace(result, alpha=cell.alpha, seed=cell.setup.seed, meets_alpha=meets))
    return results


def _cells(config: SimulateConfig) -> Iterator[Task]:
    """Every (policy, setting, order) that a result is due for."""
    for alpha, policy in product(config.alphas, config.policies):
        swept_v = config.v if policy == "mess+" else (None,)
        swept_c = config.c if policy == "mess+" else (None,)
        for v, c, seed in product(swept_v, swept_c, config.seeds):
            setup = Setup(policy, v, c, config.learn, config.predictor, seed, config.serve)
            yield Task(setup, alpha, config.orders is not None, config.window)


def _task_of(cell: Task) -> Task:
    """The run that a cell's result comes from: `smallest` and `largest` need only one for all of them."""
    if cell.setup.policy in BLIND:
        setup = replace(cell.setup, seed=0, predictor="mean")  # they don't look at estimates
        return replace(cell, setup=setup, alpha=0.0, shuffled=False)
    return cell


# ---- all cores -----------------------------------------------------------------------------------

# What a worker process works on; set once per process, so that a task travels as a few numbers.
_worker: dict[str, Any] = {}


def each(
    function: Callable[[OutcomeTable, Item, FeatureMemo], Answer],
    items: Sequence[Item],
    table: OutcomeTable,
    jobs: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """function(table, item, memo) for every item, in order, on `jobs` processes.

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
    function: Callable[[OutcomeTable, Item, FeatureMemo], Answer], table: OutcomeTable, jobs: int
) -> Iterator[Callable[[Sequence[Item]], Iterator[Answer]]]:
    if jobs <= 1:
        memo = FeatureMemo()
        yield lambda items: (function(table, item, memo) for item in items)
        return
    # Spawned, not forked: a fork of a process with threads (BLAS, tqdm) can hang.
    with (
        _one_thread_each(),
        ProcessPoolExecutor(
            jobs, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(function, table)
        ) as pool,
    ):
        try:
            yield lambda items: pool.map(_in_worker, items)
        except BrokenProcessPool:
            raise MessError(
                f"one of {jobs} processes was killed, most likely for want of memory. Run with --jobs 1"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


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
    _worker.update(function=function, table=table, memo=FeatureMemo())


def _in_worker(item: Any) -> Any:
    return _worker["function"](_worker["table"], item, _worker["memo"])


def cores() -> int:
    """How many processes this one may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- summing up ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """One policy at one setting, over all orders."""

    policy: str
    alpha: float
    v: float | None
    c: float | None
    orders: int
    accuracy: float
    accuracy_deviation: float  # between orders; 0 with one
    billed_joules: float
    billed_deviation: float
    paper_joules: float
    explorations: float
    shares: Mapping[str, float]
    meets: int  # orders in which alpha was met


def lines(results: Iterable[Result]) -> list[Line]:
    """Sum up over orders; settings in the order of their first result."""
    groups: dict[Hashable, list[Result]] = {}
    for result in results:
        groups.setdefault((result.alpha, result.policy, result.v, result.c), []).append(result)
    return [line_of(group) for group in groups.values()]


def line_of(group: Sequence[Result]) -> Line:
    """One setting's results over its orders, summed up."""
    first = group[0]

    def mean(values: Iterable[float]) -> float:
        return float(np.mean(list(values)))

    def deviation(values: Iterable[float]) -> float:
        spread = float(np.std(list(values), ddof=1)) if len(group) > 1 else 0.0
        return spread if spread > ROUNDING else 0.0  # equal numbers, added up in another order

    return Line(
        policy=first.policy,
        alpha=first.alpha,
        v=first.v,
        c=first.c,
        orders=len(group),
        accuracy=mean(r.accuracy for r in group),
        accuracy_deviation=deviation(r.accuracy for r in group),
        billed_joules=mean(r.billed_joules for r in group),
        billed_deviation=deviation(r.billed_joules for r in group),
        paper_joules=mean(r.paper_joules for r in group),
        explorations=mean(r.explorations for r in group),
        shares={name: mean(r.served[name] / r.requests for r in group) for name in first.served},
        meets=sum(r.meets_alpha for r in group),
    )


def table_lines(table: OutcomeTable, config: SimulateConfig, results: Sequence[Result]) -> list[str]:
    """The comparison, for people: a block per alpha, yardsticks included."""
    means = table.accuracies.mean(axis=0)
    joules = table.joules.mean(axis=0)
    models = ", ".join(
        f"{name} {accuracy:.3f} at {cost:.4g} J"
        for name, accuracy, cost in zip(table.names, means.tolist(), joules.tolist(), strict=True)
    )
    orders = "its own order" if config.orders is None else f"{config.orders} orders"
    text = [
        f"{len(table.requests)} requests, {orders}, seed {config.seed}; "
        f"predictor {config.predictor}, learning from {config.learn}, window {config.window}",
        f"models: {models}",
    ]
    if table.left_out:
        text.append(f"{table.left_out} incomplete requests left out")
    summed = lines(results)
    for alpha in dict.fromkeys(line.alpha for line in summed):
        static = line_of([static_mix(table, alpha)])
        block = [line for line in summed if line.alpha == alpha]
        rows = [_HEADER + [_short(name) for name in table.names]]
        rows += [_cells_of(line, static) for line in (*block, static)]
        text += ["", f"alpha {alpha:.4f}", *_aligned(rows)]
    text += [
        "",
        "J billed: joules per request, every model of every exploration included; J paper: an exploration "
        "counts as its served model only.",
        "static: the cheapest request-blind mix in hindsight; oracle: the linear programme that knows every "
        "outcome. Both are bounds to compare with, not policies to run.",
    ]
    return text


_HEADER = ["policy", "V", "c", "accuracy", "J billed", "J paper", "of static", "meets", "explored"]


def _cells_of(line: Line, static: Line) -> list[str]:
    accuracy = f"{line.accuracy:.4f}" + (
        f" ± {line.accuracy_deviation:.4f}" if line.accuracy_deviation else ""
    )
    billed = f"{line.billed_joules:.2f}" + (
        f" ± {line.billed_deviation:.2f}" if line.billed_deviation else ""
    )
    auto = "auto" if line.policy == "mess+" else ""
    return [
        line.policy,
        auto if line.v is None else f"{line.v:g}",
        auto if line.c is None else f"{line.c:g}",
        accuracy,
        billed,
        f"{line.paper_joules:.2f}",
        f"{line.billed_joules / static.billed_joules:.2f}",
        f"{line.meets}/{line.orders}",
        f"{line.explorations:.0f}",
        *(f"{share:.1%}" for share in line.shares.values()),
    ]


def _short(name: str) -> str:
    return name if len(name) <= 16 else name[:15] + "…"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]

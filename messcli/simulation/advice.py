"""`simulate --best`: the V and c that keep the promise for the least energy, and whether it can be kept at all.

Settings are chosen on some request orders and checked on others. Knows the simulator; nothing of terminals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from messcli.routing.setup import Setup
from messcli.simulation.engines import Asked, Engines
from messcli.simulation.hindsight import oracle, static_mix
from messcli.simulation.results import Line, Result, line_of, lines
from messcli.simulation.runs import SimulateConfig, Task, each, run_traced
from messcli.simulation.table import OutcomeTable

DEFAULT_ORDERS = 20
DEFAULT_V = (None, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # None: found by the program
DEFAULT_C = (0.1, 1.0, 3.0)
TOLERATED = 0.05  # the part of all orders that may miss alpha
FIRST_ORDERS = 5  # all settings run these; those that have missed too often by then run no more
LENGTH_ORDERS = 3  # of each shorter job that is tried
SHORTEST = 64  # requests; a shorter job isn't tried


@dataclass(frozen=True, slots=True)
class Advice:
    """What is best at one alpha."""

    alpha: float
    best_model: str
    best_model_accuracy: float  # alpha is sure to be within reach up to here
    limit: float  # mean accuracy of the best answer to every request: beyond it, nothing helps
    static_joules: float
    largest_joules: float
    tried: int  # settings
    chosen: Line | None  # on the orders used for choosing; None: no setting met alpha often enough
    check: Line | None  # the same setting on as many other orders
    nearest: Line | None  # without a choice: what met alpha most often
    command: str  # `route` with the choice, or with the one model that takes less; "" without either
    lengths: Lengths | None  # None: no setting was chosen, or no model alone keeps alpha

    @property
    def confirmed(self) -> bool:
        """Whether the other orders bear the choice out."""
        return self.check is not None and self.check.meets >= _required(self.check.orders)


@dataclass(frozen=True, slots=True)
class Lengths:
    """From how many requests on routing takes less than the cheapest model that keeps alpha by itself."""

    model: str
    tried: tuple[tuple[int, float], ...]  # requests, rising, and joules of routing / of the model

    @property
    def enough(self) -> int | None:
        """The fewest of the tried numbers from which on it does; None: not even with all requests."""
        found = None
        for requests, ratio in reversed(self.tried):
            if ratio >= 1.0:
                break
            found = requests
        return found


def _required(orders: int) -> int:
    return orders - math.floor(TOLERATED * orders)


def advise(
    table: OutcomeTable,
    config: SimulateConfig,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    engines: Engines | None = None,
) -> list[Advice]:
    """The best setting at each alpha, over `config.v` x `config.c`; (None,) for either means a grid of ours.

    With `engines` the best is what takes the fewest joules in load, else what bills the fewest.
    """
    config = replace(config, orders=config.orders or DEFAULT_ORDERS)
    return [_advise(table, config, alpha, on_progress, engines) for alpha in config.alphas]


def _settings(config: SimulateConfig) -> list[tuple[float | None, float | None]]:
    swept_v = DEFAULT_V if config.v == (None,) else config.v
    swept_c = DEFAULT_C if config.c == (None,) else config.c
    # without V the program also sets its own c
    own = [(None, None)] if None in swept_v and config.c == (None,) else []
    return [*own, *((v, c) for v, c in product(swept_v, swept_c) if v is not None or not own)]


def _advise(
    table: OutcomeTable,
    config: SimulateConfig,
    alpha: float,
    on_progress: Callable[[int, int], None],
    engines: Engines | None,
) -> Advice:
    orders = config.orders or DEFAULT_ORDERS
    settings = _settings(config)
    first = min(FIRST_ORDERS, orders)
    seeds = range(config.setup.seed, config.setup.seed + orders)

    def results(wanted: Sequence[tuple[float | None, float | None]], seeds: range) -> list[Result]:
        tasks = [
            Task(
                replace(config.setup, policy="mess+", v=v, c=c, seed=seed),
                alpha,
                shuffled=True,
            )
            for v, c in wanted
            for seed in seeds
        ]
        traced = each(run_traced, tasks, table, config.jobs or 1, on_progress)
        if engines is None:
            return [result for result, _ in traced]
        return [
            replace(result, in_load=engines.compared(engines.play(trace), alpha)) for result, trace in traced
        ]

    def missed(line: Line) -> int:
        return line.orders - line.meets

    begun = results(settings, seeds[:first])
    after_first = lines(begun)
    hopeful = [(line.v, line.c) for line in after_first if missed(line) <= orders - _required(orders)]
    rest = results(hopeful, seeds[first:]) if hopeful and orders > first else []
    kept = lines([r for r in begun if (r.v, r.c) in hopeful] + rest)
    good = [line for line in kept if line.meets >= _required(orders)]
    chosen = min(good, key=_joules, default=None)
    check = lengths = None
    if chosen is not None:
        setup = replace(config.setup, policy="mess+", v=chosen.v, c=chosen.c)
        lengths = _lengths(table, Task(setup, alpha, shuffled=True), config.jobs or 1, on_progress, engines)
        others = range(config.setup.seed + orders, config.setup.seed + 2 * orders)
        check = line_of(results([(chosen.v, chosen.c)], others))
    nearest = None
    if chosen is None:
        nearest = max(kept or after_first, key=lambda line: (line.meets / line.orders, line.accuracy))
    means = table.accuracies.mean(axis=0)
    best = int(means.argmax())
    return Advice(
        alpha=alpha,
        best_model=table.names[best],
        best_model_accuracy=float(means[best]),
        limit=float(table.accuracies.max(axis=1).mean()),
        static_joules=static_mix(table, alpha).billed_joules,
        largest_joules=float(table.joules[:, -1].mean()),
        tried=len(settings),
        chosen=chosen,
        check=check,
        nearest=nearest,
        command=_advised(table, chosen, lengths, config),
        lengths=lengths,
    )


def _advised(
    table: OutcomeTable, chosen: Line | None, lengths: Lengths | None, config: SimulateConfig
) -> str:
    if chosen is None:
        return ""
    if lengths is None or lengths.enough is not None:
        return _command(chosen, config)
    alone = {table.names[0]: "smallest", table.names[-1]: "largest"}.get(lengths.model)
    # `route` has no policy for a model between them: it needs a zoo of its own
    return "" if alone is None else f"messcli route --policy {alone}"


def _joules(line: Line) -> float:
    """What a line is judged by."""
    return line.billed_joules if line.in_load is None else line.in_load.joules


def _lengths(
    table: OutcomeTable,
    task: Task,
    jobs: int,
    on_progress: Callable[[int, int], None],
    engines: Engines | None,
) -> Lengths | None:
    """The job at its whole length, at half of it, and so on, each over LENGTH_ORDERS orders, beside one model alone."""
    means = table.accuracies.mean(axis=0)
    alone = table.joules.sum(axis=0) if engines is None else [played.joules for played in engines.alone]
    able = [m for m in range(len(table.names)) if means[m] >= task.alpha]
    if not able:
        return None
    model = min(able, key=lambda m: float(alone[m]))
    lengths = [len(table.requests)]
    while lengths[-1] // 2 >= SHORTEST:
        lengths.append(lengths[-1] // 2)
    first = task.setup.seed
    tasks = [
        replace(task, limit=limit, setup=replace(task.setup, seed=seed))
        for limit in reversed(lengths)
        for seed in range(first, first + LENGTH_ORDERS)
    ]
    ratios: dict[int, list[float]] = {}
    for result, trace in each(run_traced, tasks, table, jobs, on_progress):
        ratios.setdefault(len(trace), []).append(_ratio(table, result, trace, model, engines))
    return Lengths(table.names[model], tuple((n, sum(r) / len(r)) for n, r in ratios.items()))


def _ratio(
    table: OutcomeTable, result: Result, trace: Sequence[Asked], model: int, engines: Engines | None
) -> float:
    """Joules of a run / of the same requests with one model, in one go."""
    if engines is None:
        alone = float(table.joules[[asked.request for asked in trace], model].sum())
        return result.billed_joules * len(trace) / alone
    at_once = [replace(asked, settled=0, stages=((model,),), checks=()) for asked in trace]
    return engines.play(trace).joules / engines.play(at_once).joules


def advice_lines(table: OutcomeTable, advice: Advice) -> list[str]:
    """The advice, for people."""
    text = [f"alpha {advice.alpha:.4f}"]
    bound = oracle(table, advice.alpha)
    if advice.alpha > advice.limit:
        text.append(
            f"  out of reach: even the best answer to every request reaches only {advice.limit:.4f}. "
            "Lower alpha, or add a better model"
        )
    elif advice.alpha > advice.best_model_accuracy:
        text.append(
            f"  within reach only by choosing well: {advice.best_model} alone reaches "
            f"{advice.best_model_accuracy:.4f}, the best answer to every request {advice.limit:.4f}"
        )
    else:
        text.append(
            f"  feasible: {advice.best_model} alone reaches {advice.best_model_accuracy:.4f}; static mix "
            f"{advice.static_joules:.4g} J per request, oracle {bound.billed_joules:.4g} J"
        )
    if advice.chosen is None:
        text.append(
            f"  none of {advice.tried} settings met alpha in {1 - TOLERATED:.0%} of the orders. "
            "Lower alpha, take a smaller V, or promise a margin less than you aim for"
        )
        if advice.nearest is not None:
            text.append(f"  nearest: {_told(advice.nearest)}")
        return text
    text.append(f"  best of {advice.tried} settings: {_told(advice.chosen)}")
    load = advice.chosen.in_load
    if load is None:
        of_largest = advice.chosen.billed_joules / advice.largest_joules
        against = advice.chosen.billed_joules / advice.static_joules
        text.append(
            f"    {of_largest:.2f} of the largest model alone, {against:.2f} of the static mix, all billed"
        )
    else:
        text.append(
            f"    in load {load.joules:.4g} J per request: {load.of_largest:.2f} of the largest model alone, "
            f"{load.of_blind_mix:.2f} of the blind mix, both in one go"
        )
    if advice.check is not None:
        verdict = "confirmed" if advice.confirmed else "NOT confirmed: take a smaller V or aim above alpha"
        text.append(f"  on {advice.check.orders} orders not used for choosing: {_told(advice.check)}")
        text.append(f"    {verdict}")
    if advice.lengths is not None:
        text.append(f"  {_told_lengths(advice.lengths, load is not None)}")
    if advice.command:
        text.append(f"  {advice.command}")
    return text


def _told_lengths(lengths: Lengths, in_load: bool) -> str:
    how = "in load" if in_load else "billed"
    enough = lengths.enough
    whole, ratio = lengths.tried[-1]
    if enough is None:
        return (
            f"too short to route: with all {whole} requests it takes {ratio:.2f} of {lengths.model} alone, {how}. Use "
            f"{lengths.model}"
        )
    ratios = dict(lengths.tried)
    place = list(ratios).index(enough)
    if place == 0:
        beside = f"{ratios[enough]:.2f} of {lengths.model} alone, {how}"
        return f"long enough: with {enough} requests, the fewest tried, it takes {beside}"
    before = list(ratios)[place - 1]
    return (
        f"under {enough} requests: use {lengths.model} (with {before} routing takes {ratios[before]:.2f} of it, with "
        f"{enough} {ratios[enough]:.2f}, {how})"
    )


def _command(line: Line, config: SimulateConfig) -> str:
    given = {
        "--v": None if line.v is None else f"{line.v:g}",
        "--c": None if line.c is None else f"{line.c:g}",
        "--learn": config.setup.learn if config.setup.learn != Setup().learn else None,
        "--predictor": config.setup.predictor if config.setup.predictor != Setup().predictor else None,
    }
    options = "".join(f" {name} {value}" for name, value in given.items() if value is not None)
    return f"messcli route --alpha {line.alpha:.4g}{options}"


def _told(line: Line) -> str:
    v = "found by the program" if line.v is None else f"{line.v:g}"
    c = "its own" if line.c is None else f"{line.c:g}"
    return (
        f"V {v}, c {c}: alpha met in {line.meets}/{line.orders} orders, accuracy {line.accuracy:.4f}"
        f" ± {line.accuracy_deviation:.4f}, {line.billed_joules:.4g} J per request, all billed"
    )

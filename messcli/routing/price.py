"""The policy without tuning flags: the multiplier lambda = Q / V is solved for, not accumulated.

Equation 3 serves argmin V e_m + Q (alpha - Â_m), which is argmin e_m - lambda Â_m with lambda = Q / V: lambda is
the price, in joules, that a unit of accuracy is worth. The best constant price is the smallest one whose choices
reach alpha; here it is solved for on the latest requests' estimates, again and again. docs/how-it-decides.md has
the mathematics, and what is guaranteed and what isn't. Pure numbers: knows no prompts, models or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from messcli.routing.policy import Recent, Served, View, Window, exploration_probability

Array = NDArray[np.float64]

MOST = 1e6  # the highest price, in mean joules of an answer: there, joules don't count any more


@dataclass(slots=True)
class Promise:
    """What is remembered of one plan. Accuracies are in [0, 1], prices in joules."""

    settled: int = 0
    price: float = 0.0  # lambda
    surplus: float = 0.0  # sum of A - alpha where observed, of Â - alpha where not
    unobserved: int = 0  # settled without a reference
    residual_sum: float = 0.0  # of A - Â over served requests that weren't explored
    residuals: int = 0
    near_sum: float = 0.0  # the same, fading over about 500 requests
    near_weight: float = 0.0
    variance: float = 0.15  # of A - Â; starts at a pessimist's guess
    variance_weight: float = 10.0
    reach: float = 0.1  # how far above alpha the zoo can go, on average
    reachable: bool = True  # some price reaches the target, on the latest requests' estimates
    whole_zoo: float = 0.0  # what all models' answers cost, in chosen models' answers; 0 while not known
    solve_at: int = 0  # settled requests at which the price is solved anew

    @property
    def due(self) -> bool:
        """Whether the price is to be solved at the end of this window."""
        return self.settled >= self.solve_at


class Auto:
    """MESS+ with the price of accuracy found by the program.

    Args:
        horizon: how many requests there will be in all; None where that isn't known. With a horizon the
            safety margin above alpha is given back towards the end.
        c: exploration after the first ones, which settle the models' levels: p_t = min(1, c * t^(-1/3)). None: 0.05,
            as far as it stays affordable.
    """

    name = "mess+"
    remembers = 1000  # requests that the price is solved on

    OPTIMISM = 2.0  # standard errors added to an estimate that rests on little: try what isn't known
    STRAINED = 1.0  # ... while no price reaches the target: only accuracy counts then, and hopes come dear
    KNOWN = 30.0  # ... which fade sooner when there are more samples than that: then hope costs more than it finds
    SAFETY = 3.0  # standard deviations of margin above alpha
    END = 2.0  # ... of which so many stay until the last request
    REACH = 0.6  # the part of what is left over which a debt is paid back
    EVERY = 16  # requests between solutions
    BIAS = 0.02  # how far off the served estimates are expected to be on average: shrinks what was seen of it
    AUDIT = 1.65  # standard errors of margin for what isn't observed
    EXPLORED = 0.02  # the part of the bill that the first explorations may take, and the later ones as well
    LEAST = 8  # explorations, whatever they cost

    def __init__(self, horizon: int | None = None, c: float | None = None) -> None:
        self._c = c
        self.horizon = horizon
        self._first = max(self.LEAST, int(0.45 * math.sqrt(horizon))) if horizon else 24
        self._promises: dict[str, Promise] = {}

    # ---- deciding --------------------------------------------------------------------------------

    def exploration_probability(self, t: int, explored: int) -> float:
        affordable = self._affordable()
        requests = self.horizon or sum(p.settled + self._left(p) for p in self._promises.values()) or math.inf
        if explored < min(float(self._first), max(float(self.LEAST), affordable * requests)):
            return 1.0
        if self._c is not None:
            return exploration_probability(t, self._c)
        return min(exploration_probability(t, 0.05), affordable)

    def _affordable(self) -> float:
        """The part of the requests that may be explored, as EXPLORED of the bill; 1 while nothing is known."""
        dearest = max((promise.whole_zoo for promise in self._promises.values()), default=0.0)
        return self.EXPLORED / dearest if dearest else 1.0

    def window(self, t: int, left: int | None) -> float:
        return max(self.LEAST, t)  # the first ones go to the largest model: no more of them than are explored

    def choose(self, view: View) -> int:
        if view.estimates is None or view.joules is None:
            return view.allowed[-1]
        promise = self._promise(view.plan)
        estimates, joules, samples, price = view.estimates, view.joules, view.samples, promise.price
        errors = self.OPTIMISM if promise.reachable else self.STRAINED

        def cost(m: int) -> tuple[float, float]:
            hope = errors * self._error(promise, samples[m])
            return joules[m] - price * (estimates[m] + hope), joules[m]

        return min(view.allowed, key=cost)

    def _error(self, promise: Promise, samples: float) -> float:
        """The standard error of a level that rests on so many samples, less and less of it when they are many."""
        return math.sqrt(promise.variance / (max(samples, 1.0) * (1.0 + samples / self.KNOWN)))

    def _promise(self, plan: str) -> Promise:
        return self._promises.get(plan) or Promise()

    # ---- learning --------------------------------------------------------------------------------

    def settle(self, served: Served) -> None:
        promise = self._promises.setdefault(served.plan, Promise())
        promise.settled += 1
        if served.accuracy is not None:
            promise.surplus += served.accuracy - served.alpha
            if served.estimate is not None:
                self._learn_residual(promise, served.accuracy - served.estimate, served.explored)
        elif served.estimate is not None:
            promise.unobserved += 1
            promise.surplus += served.estimate - served.alpha

    @property
    def wants_recent(self) -> bool:
        return any(promise.due for promise in self._promises.values())

    def window_closed(self, window: Window) -> None:
        if window.recent is None:
            return
        for plan, promise in self._promises.items():
            if promise.due:
                self._solve(promise, window.alphas[plan], window.requests, window.recent)
                promise.solve_at = promise.settled + int(self._pace(promise))

    @staticmethod
    def _learn_residual(promise: Promise, residual: float, explored: bool) -> None:
        promise.variance += (residual * residual - promise.variance) / promise.variance_weight
        promise.variance_weight = min(promise.variance_weight + 1.0, 500.0)
        if not explored:  # explorations serve the largest whatever its estimate: they tell nothing of choices
            promise.residual_sum += residual
            promise.residuals += 1
            promise.near_sum = 0.998 * promise.near_sum + residual
            promise.near_weight = 0.998 * promise.near_weight + 1.0

    def _left(self, promise: Promise) -> float:
        if self.horizon:
            return max(float(self.horizon - promise.settled), 1.0)
        return max(float(promise.settled), 200.0)

    def _pace(self, promise: Promise) -> float:
        if promise.settled < self._first:
            return 1.0
        if not self.horizon:
            return float(self.EVERY)
        return min(float(self.EVERY), max(1.0, self._left(promise) // 8))

    def target(self, promise: Promise, alpha: float, window: int) -> float:
        """The mean accuracy that the requests to come should have: alpha, the margin, less what is saved up."""
        left = self._left(promise)
        ahead = max(left * self.REACH, 1.0)
        gain = max(0.7 * promise.reach, 0.005)
        blind = max(float(window), self._pace(promise))
        deviation = self.SAFETY * math.sqrt(promise.variance)
        span = min(ahead, max((deviation / (2.0 * gain)) ** 2, blind))
        # The debt from which full effort, gaining `gain` a request, still recovers: the worst over all spans of
        # SAFETY deviations of chance less what is gained meanwhile.
        margin = deviation * math.sqrt(span) - gain * max(span - blind, 0.0)
        margin += self.END * math.sqrt(promise.variance)
        surplus = promise.surplus
        if promise.unobserved:
            # What wasn't observed is worth its estimate corrected by how the observed ones turned out.
            surplus += promise.unobserved * promise.residual_sum / max(promise.residuals, 10)
            grown = (promise.settled + left) / promise.settled
            observed = max(promise.settled - promise.unobserved, 1)
            standard_error = math.sqrt(promise.variance / (observed * grown))
            margin += self.AUDIT * standard_error * promise.unobserved * grown
        return alpha + (margin - surplus) / ahead

    def _solve(self, promise: Promise, alpha: float, window: int, recent: Recent) -> None:
        """The smallest price at which the choices on the latest requests reach the target."""
        estimates, joules = recent.estimates, recent.joules
        rows = np.arange(len(estimates)) * estimates.shape[1]
        errors = np.array([self._error(promise, samples) for samples in recent.samples.tolist()])
        hope = estimates + self.OPTIMISM * errors
        drift = promise.near_sum / (promise.near_weight + promise.variance / self.BIAS**2)
        columns = estimates.T.copy()  # of a model each: numpy is slow along the few numbers of a row
        promise.reach = 0.5 * float(columns.max(axis=0).mean() + columns.mean(axis=1).max()) - alpha
        need = self.target(promise, alpha, window) - drift

        def of_chosen(values: Array, price: float) -> float:
            chosen = np.argmin(joules - price * hope, axis=1)
            return float(values.ravel().take(rows + chosen).mean())

        def reached(price: float) -> bool:
            return of_chosen(estimates, price) >= need

        unit = float(joules.mean()) or 1.0  # 0 where a meter counts nothing: then any price is as good
        promise.price = _smallest(reached, start=promise.price, unit=unit)
        promise.reachable = promise.price < MOST * unit
        promise.whole_zoo = len(joules.T) * unit / (of_chosen(joules, promise.price) or unit)

    # ---- remembering -----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {plan: asdict(promise) for plan, promise in self._promises.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        self._promises = {plan: Promise(**kept) for plan, kept in state.items()}

    def open_period(self, standing: Mapping[str, tuple[int, int, float]]) -> None:
        for plan, (settled, unobserved, surplus) in standing.items():
            promise = self._promises.setdefault(plan, Promise())
            promise.settled, promise.unobserved, promise.surplus = settled, unobserved, surplus
            promise.solve_at = settled


def _smallest(reached: Callable[[float], bool], start: float, unit: float) -> float:
    """The smallest price, to about 1 %, at which `reached` holds; a million units where it never does."""
    most = MOST * unit
    if reached(0.0):
        return 0.0
    high = start if 0.0 < start < most else unit
    factor = 1.2
    while not reached(high):
        high, factor = high * factor, min(factor * 1.5, 8.0)
        if high > most:
            return most
    low, factor = high / 1.2, 1.2
    while low > 1e-6 * unit and reached(low):
        high, factor = low, min(factor * 1.5, 8.0)
        low /= factor
    for _ in range(7):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high

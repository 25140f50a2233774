"""The price of accuracy: what a unit of it is expected to cost later, in joules.

Equation 3 serves argmin V e_m + Q (alpha - Â_m), which is argmin e_m - lambda Â_m with lambda = Q / V, the price. The
cheapest way to a mean accuracy has one price throughout (the multiplier of the linear programme), so the best price now
is the one that is expected to hold later, when it is known what is still missing: the price is a martingale.
docs/how-it-decides.md has the mathematics. Pure numbers: knows no prompts, models, plans or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from messcli.predict.answer import Look
from messcli.routing import tuning
from messcli.routing.look import options

Array = NDArray[np.float64]

_GOLDEN = 0.5 * (math.sqrt(5.0) - 1.0)  # t times it, modulo 1, is spread evenly over [0, 1)


def _normal(most: float, points: int) -> tuple[Array, Array]:
    """Places and weights of a normal distribution cut at `most` deviations."""
    places = np.linspace(-most, most, points)
    weights = np.exp(-0.5 * places * places)
    return places, weights / weights.sum()


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a plan stands when a price is looked for. Accuracies are in [0, 1]."""

    alpha: float
    surplus: float  # sum of A - alpha so far
    surplus_error: float  # standard error of what of it wasn't observed
    left: float  # requests to come, as far as known
    window: float  # of those, decided before a price can react
    variance: float  # of A - Â of one request
    drift: float  # mean A - Â of chosen models
    spent: float  # joules so far
    blind: bool = False  # the window's size was found by the policy, and is large
    dearer: float = 1.0  # joules of a request after the window, in those of one of the window


@dataclass(frozen=True, slots=True)
class Solution:
    """What was found. Where no single price buys what is wanted, requests are shared out between two."""

    price: float = 0.0  # joules per unit of accuracy
    low: float = 0.0  # the smaller one of two, or the same
    share: float = 1.0  # of the requests that are decided at `price`; the others at `low`
    reachable: bool = True  # some price buys what is missing, on average

    def price_at(self, t: int) -> float:
        """Of the t-th request."""
        return self.price if t * _GOLDEN % 1.0 < self.share else self.low


@dataclass(frozen=True, slots=True)
class Curve:
    """What choices at each of some ascending prices buy, means over the requests: (prices,) each."""

    prices: Array
    accuracy: Array  # as estimated
    hoped: Array  # with the optimism that the choices have
    joules: Array
    doubt: Array  # standard error of the chosen models' levels

    def with_more(self, place: int, between: Curve) -> Curve:
        """With the prices of `between`, which lie before the one at `place`. Accuracies still rise."""

        def merged(values: Array, more: Array) -> Array:
            return np.insert(values, place, more)

        return Curve(
            merged(self.prices, between.prices),
            np.maximum.accumulate(merged(self.accuracy, between.accuracy)),
            np.maximum.accumulate(merged(self.hoped, between.hoped)),
            merged(self.joules, between.joules),
            merged(self.doubt, between.doubt),
        )

    def until(self, end: int) -> Curve:
        """The first `end` prices."""
        return Curve(
            *(getattr(self, name)[:end] for name in ("prices", "accuracy", "hoped", "joules", "doubt"))
        )


def curve(
    estimates: Array,
    joules: Array,
    bonus: Array,
    errors: Array,
    prices: Array,
    looks: Sequence[Look] = (),
) -> Curve:
    """What is bought at each price.

    Args:
        estimates, joules: (requests, models).
        bonus: (models,): the optimism that choices add to Â.
        errors: (models,): standard errors of the models' levels.
        prices: ascending.
        looks: at answers, that choices count on.
    """
    hoped = estimates + bonus
    if looks:
        return _looking(estimates, joules, hoped, errors, prices, looks)
    chosen = np.argmin(joules - prices[:, None, None] * hoped, axis=2)
    places = np.arange(len(estimates)) * estimates.shape[1] + chosen

    def mean(values: Array) -> Array:
        found: Array = values.ravel().take(places).mean(axis=1)
        return found

    return Curve(
        prices,
        np.maximum.accumulate(mean(estimates)),
        np.maximum.accumulate(mean(hoped)),
        mean(joules),
        errors[chosen].mean(axis=1),
    )


def _looking(
    estimates: Array, joules: Array, hoped: Array, errors: Array, prices: Array, looks: Sequence[Look]
) -> Curve:
    """`curve` where choices count on looking at answers."""
    found = options(estimates, joules, looks, prices, hoped - estimates)
    chosen = np.argmin(joules - prices[:, None, None] * hoped - found.worth, axis=2)[:, :, None]

    def mean(values: Array) -> Array:
        taken: Array = np.take_along_axis(values, chosen, axis=2).mean(axis=(1, 2))
        return taken

    return Curve(
        prices,
        np.maximum.accumulate(mean(estimates + found.accuracy)),
        np.maximum.accumulate(mean(hoped + found.accuracy)),
        mean(joules + found.joules),
        errors[chosen[:, :, 0]].mean(axis=1),
    )


def solve(
    estimates: Array,
    joules: Array,
    bonus: Array,
    errors: Array,
    standing: Standing,
    search: tuning.Price,
    looks: Sequence[Look] = (),
) -> Solution:
    """The smallest price that isn't below the price that is expected after the window, if it buys at this one.

    Args:
        estimates, joules: of requests like those to come, (requests, models); joules of a model that sleeps are inf.
        bonus: (models,): the optimism that choices add to Â.
        errors: (models,): standard errors of the models' levels.
        looks: at answers, that choices count on.
    """
    if looks:
        answers = sum(look.shifts[:, look.model + 1 :].size for look in looks)
        most = min(len(estimates), max(1, search.looked // max(answers, 1)))
        rows = ((np.arange(most) + 0.5) / most * len(estimates)).astype(int)
        estimates, joules, bonus = (
            estimates[rows],
            joules[rows],
            np.broadcast_to(bonus, estimates.shape)[rows],
        )
    means = joules.mean(axis=0)
    means = means[np.isfinite(means)]
    dearest = float(means.max()) or 1.0  # 0 where a meter counts nothing: then any price is as good
    cheapest = float(means.min()) or 1e-3 * dearest
    grid = np.geomspace(search.least * cheapest, search.most * dearest, search.cells)
    bought = curve(estimates, joules, bonus, errors, grid, looks)
    # Beyond the price that buys nearly everything only the estimates' noise is bought.
    last = max(_nearly_all(bought.accuracy, search.nearly), _nearly_all(bought.hoped, search.nearly))
    if last == 0:  # the cheapest model is the best one
        return Solution(float(grid[0]), float(grid[0]), 1.0, True)
    bought = bought.until(last + 1)
    expected = _expected(bought, standing, search)
    owed = standing.alpha * standing.left - standing.surplus
    reachable = bool(owed <= standing.left * (bought.accuracy[-1] + standing.drift))
    place = _first_enough(bought, expected)
    for _ in range(search.closer if standing.blind else 0):
        if not place or expected[place - 1] <= search.steep * expected[place]:
            break
        between = np.geomspace(bought.prices[place - 1], bought.prices[place], search.fine)[1:-1]
        bought = bought.with_more(place, curve(estimates, joules, bonus, errors, between, looks))
        expected = _expected(bought, standing, search)
        place = _first_enough(bought, expected)
    if place is None:
        price = float(expected[-1])
        return Solution(price, price, 1.0, reachable)
    if place == 0:
        return Solution(float(bought.prices[0]), float(bought.prices[0]), 1.0, reachable)
    logs = np.log(bought.prices)
    # Where the line of the expected price crosses that of the price, in logarithms.
    under = math.log(expected[place - 1]) - logs[place - 1]
    over = logs[place] - math.log(expected[place])
    part = under / max(under + over, 1e-9)
    price = math.exp(logs[place - 1] + part * (logs[place] - logs[place - 1]))
    if expected[place - 1] - expected[place] <= search.flat * expected[place]:
        return Solution(price, price, 1.0, reachable)
    # What the window buys changes what is missing later. Between two prices at which many requests change their
    # model, as many of them are decided at the higher one as are worth it.
    fine = np.geomspace(bought.prices[place - 1], bought.prices[place], search.fine)
    accuracy = curve(estimates, joules, bonus, errors, fine, looks).accuracy + standing.drift
    around = slice(place - 1, place + 1)
    aim = float(np.interp(price, bought.prices[around], bought.accuracy[around])) + standing.drift
    spot = min(max(int(np.searchsorted(accuracy, aim)) - 1, 0), len(fine) - 2)
    step = accuracy[spot + 1] - accuracy[spot]
    share = min(max((aim - accuracy[spot]) / step, 0.0), 1.0) if step > 0.0 else 1.0
    return Solution(float(fine[spot + 1]), float(fine[spot]), float(share), reachable)


def _first_enough(bought: Curve, expected: Array) -> int | None:
    """The first price that isn't below the one that is expected if the window buys at it."""
    enough = np.flatnonzero(bought.prices >= expected)
    return int(enough[0]) if len(enough) else None


def _nearly_all(accuracy: Array, part: float) -> int:
    """The first place that has `part` of the way from the first to the last."""
    return int(np.searchsorted(accuracy, accuracy[0] + part * (accuracy[-1] - accuracy[0])))


def _expected(bought: Curve, now: Standing, search: tuning.Price) -> Array:
    """The price that is expected to hold after the window, if the window buys at each of the prices: (prices,).

    Averaged over the accuracies of what is to come, which scatter, and over the levels, which may be off. A way of
    things counts by how much its joules matter to what the whole job takes in it: what is kept small is the
    relative excess, whatever the right price turns out to be.
    """
    chance, chances = _normal(search.chance_most, search.chances)
    doubt, doubts = _normal(search.doubt_most, search.doubts)
    logs, accuracy = np.log(bought.prices), bought.accuracy + now.drift
    window = min(now.window, now.left)
    rest = now.left - window
    scatter = math.sqrt(now.variance * now.left + now.surplus_error**2)
    missed = search.miss * bought.prices[-1]
    owed = now.alpha * now.left - now.surplus + search.end * math.sqrt(now.variance) + scatter * chance
    total = np.zeros(len(logs))
    weight = np.zeros(len(logs))
    for off, probability in zip(doubt, doubts, strict=True):
        truly = np.maximum.accumulate(accuracy + off * bought.doubt)
        missing = owed - window * truly[:, None]  # (prices, chances), after the window
        if rest >= 1.0:
            wanted = missing / rest
            later = now.dearer * np.exp(np.interp(wanted, truly, logs))
            then = np.interp(wanted, truly, bought.joules)
            short = missing - rest * truly[-1]
        else:
            short = missing
            later = np.where(short > 0.0, bought.prices[-1], bought.prices[0])
            then = np.zeros(missing.shape)
        # A little short of what full effort reaches: there a unit of accuracy decides whether alpha is kept.
        decides = (short > 0.0) & (short < search.pivotal * scatter)
        later = np.where(decides, missed, later)
        job = now.spent + window * bought.joules[:, None] + rest * then
        weights = probability * chances / np.where(job > 0.0, job, 1.0)
        total += (weights * later).sum(axis=1)
        weight += weights.sum(axis=1)
    found: Array = total / weight
    return found

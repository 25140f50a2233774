"""The price of accuracy: the smallest one, in joules per unit of accuracy, whose choices reach what is needed.

Equation 3 serves argmin V e_m + Q (alpha - Â_m), which is argmin e_m - lambda Â_m with lambda = Q / V, the price. Here
lambda is solved for on the latest requests' estimates. docs/how-it-decides.md has the mathematics. Pure numbers:
knows no prompts, models, plans or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from messcli.routing import tuning

Array = NDArray[np.float64]


def optimism(samples: float, variance: float, errors: float, known: float) -> float:
    """What is added to the Â of a model whose level rests on so many observations.

    `errors` standard errors sqrt(variance / n) of the level, fading faster than that beyond `known` observations.
    """
    return errors * math.sqrt(variance / (max(samples, 1.0) * (1.0 + samples / known)))


@dataclass(frozen=True, slots=True)
class Solution:
    """What was found on the recent requests."""

    price: float  # joules per unit of accuracy
    reachable: bool  # some price reaches what is needed
    whole_zoo: float  # joules of all models' answers to a request, in units of the chosen model's


def solve(
    estimates: Array, joules: Array, bonus: Array, need: float, start: float, search: tuning.Price
) -> Solution:
    """The smallest price at which the choices on the recent requests have a mean Â of `need`.

    Args:
        estimates, joules: (requests, models).
        bonus: (models,): the optimism that choices add to Â. The mean Â that must reach `need` goes without.
        start: the price of before, from which it is looked for.
    """
    rows = np.arange(len(estimates)) * estimates.shape[1]
    hoped = estimates + bonus

    def of_chosen(values: Array, price: float) -> float:
        chosen = np.argmin(joules - price * hoped, axis=1)
        return float(values.ravel().take(rows + chosen).mean())

    def reached(price: float) -> bool:
        return of_chosen(estimates, price) >= need

    unit = float(joules.mean()) or 1.0  # 0 where a meter counts nothing: then any price is as good
    price = _smallest(reached, start, unit, search)
    whole_zoo = len(joules.T) * unit / (of_chosen(joules, price) or unit)
    return Solution(price, price < search.most * unit, whole_zoo)


def _smallest(reached: Callable[[float], bool], start: float, unit: float, search: tuning.Price) -> float:
    """The smallest price at which `reached` holds; `search.most` units where it never does."""
    most = search.most * unit
    if reached(0.0):
        return 0.0
    high = start if 0.0 < start < most else unit
    factor = search.step
    while not reached(high):
        high, factor = high * factor, min(factor * search.step_growth, search.step_most)
        if high > most:
            return most
    low, factor = high / search.step, search.step
    while low > search.least * unit and reached(low):
        high, factor = low, min(factor * search.step_growth, search.step_most)
        low /= factor
    for _ in range(search.halvings):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def reach(estimates: Array, best_weight: float) -> float:
    """The mean accuracy of full effort: between the best model of each request and the best single model.

    Args:
        estimates: (requests, models).
        best_weight: of the former.
    """
    columns = estimates.T.copy()  # of a model each: numpy is slow along the few numbers of a row
    best_each, best_single = columns.max(axis=0).mean(), columns.mean(axis=1).max()
    return best_weight * float(best_each) + (1.0 - best_weight) * float(best_single)

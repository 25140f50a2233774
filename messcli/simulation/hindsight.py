"""Two yardsticks in hindsight, bounds to compare with: neither is a policy that could be run.

`static_mix` is the cheapest mix that doesn't look at the request; `oracle` knows every outcome. Both are the
exact solution of a linear programme over the table.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from messcli.metrics import keeps
from messcli.routing.policy import cheapest_mix
from messcli.simulation.results import Result
from messcli.simulation.table import OutcomeTable

ORACLE = "oracle"

Floats = NDArray[np.float64]
Choice = NDArray[np.intp]


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
        meets_alpha=keeps(float(mix @ accuracies), alpha),
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
        meets_alpha=keeps(accuracy, alpha),
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

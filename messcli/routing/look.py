"""The worth of a second look: what the option to ask a larger model adds, once a model's answer is there.

After model m answered with signals s, its answer is kept if lambda (Â_l(x, s) - Â_m(x, s)) < E_l for every larger l;
else the best l is asked. So before m is asked, the option is worth the mean over typical answers of

    max(0, max over l of lambda (Â_l(x, s) - Â_m(x, s)) - E_l)

joules, less those of a check where s holds one. Pure functions of numbers: knows no prompts, models, plans or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from messcli.predict.answer import Look

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Options:
    """The best look of each model at each price: (prices, requests, models) each; 0 where none pays."""

    worth: Array  # joules: price times accuracy, less joules
    accuracy: Array  # expected gain
    joules: Array  # expected, of checks and of larger models
    checked: NDArray[np.bool_]  # the best look has a check


@dataclass(frozen=True, slots=True)
class Looked:
    """A model's answer that is to be looked at."""

    larger: tuple[int, ...]  # the models that may be asked after it
    checked: bool  # by a larger model
    gain: float  # expected, in accuracy
    price: float  # joules that a unit of accuracy is worth


def options(
    estimates: Array,
    joules: Array,
    looks: Sequence[Look],
    prices: Array,
    bonus: Array | None = None,
) -> Options:
    """What looks are worth.

    Args:
        estimates: Â(x), (requests, models).
        joules: E_m(x), the same; inf for a model that can't take the request.
        looks: as far as known.
        prices: joules per unit of accuracy, (prices,).
        bonus: the optimism that choices add to Â, as `estimates`. A model's own doesn't count where a larger one
            serves.
    """
    bonus = np.zeros_like(estimates) if bonus is None else np.broadcast_to(bonus, estimates.shape)
    shape = (len(prices), *estimates.shape)
    worth, accuracy, spent = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    checked = np.zeros(shape, bool)
    for look in looks:
        m = look.model
        gain, hoped, more = _expected(
            estimates[:, m:], joules[:, m + 1 :], look.shifts[:, m:], prices, bonus[:, m:]
        )
        more += look.joules
        found = prices[:, None] * hoped - more
        better = found > worth[:, :, m]
        for kept, new in ((worth, found), (accuracy, gain), (spent, more), (checked, look.checked)):
            kept[:, :, m] = np.where(better, new, kept[:, :, m])
    return Options(worth, accuracy, spent, checked)


def _expected(
    estimates: Array, joules: Array, shifts: Array, prices: Array, bonus: Array
) -> tuple[Array, Array, Array]:
    """Mean (gain in accuracy, the same less the optimism that is lost, joules) over typical answers.

    (prices, requests) each.

    Args:
        estimates, bonus: of the model and the larger ones, (requests, 1 + larger).
        joules: of the larger ones, (requests, larger).
        shifts: (typical, 1 + larger).
    """
    given = np.clip(estimates[:, None, :] + shifts, 0.0, 1.0)
    gains = given[:, :, 1:] - given[:, :, :1]  # (requests, typical, larger)
    best = np.full((len(prices), *gains.shape[:2]), 0.0)
    gain, hoped, more = np.zeros_like(best), np.zeros_like(best), np.zeros_like(best)
    for k in range(gains.shape[2]):
        own = gains[:, :, k]
        worth = prices[:, None, None] * own - joules[:, k, None]
        better = worth > best
        best = np.where(better, worth, best)
        gain = np.where(better, own, gain)
        hoped = np.where(
            better, own - bonus[:, :1], hoped
        )  # the model's own optimism is lost with its answer
        more = np.where(better, joules[:, k, None], more)
    return gain.mean(axis=2), hoped.mean(axis=2), more.mean(axis=2)


def escalate(
    model: int, given: Sequence[float], joules: Sequence[float], larger: Sequence[int], price: float
) -> int | None:
    """The larger model that is worth asking after `model` has answered; None: the answer is kept.

    Args:
        given: Â(x, s) of every model.
        joules: E_m(x) of every model.
        larger: those that may be asked, ascending. Ties go to the cheaper one.
        price: joules per unit of accuracy.
    """

    def worth(m: int) -> tuple[float, float]:
        return price * (given[m] - given[model]) - joules[m], -joules[m]

    best = max(larger, key=worth, default=None)
    return best if best is not None and worth(best)[0] > 0.0 else None

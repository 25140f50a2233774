"""The algorithm: the virtual queue, exploration, and how a model is chosen. Pure functions of numbers.

Knows nothing of prompts, models, files or meters. Models are indices into the zoo, smallest first.
Equations and lines are those of the MESS+ paper (its Algorithm 1 as restored in docs/how-it-decides.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol


@dataclass(frozen=True, slots=True)
class VirtualQueue:
    """The SLA violations accumulated so far, Q(t) >= 0, in units of accuracy."""

    length: float = 0.0

    def after(self, alpha: float, accuracy: float) -> VirtualQueue:
        """Q(t+1) = max(0, Q(t) + alpha - A(t)): equation 2."""
        return VirtualQueue(max(0.0, self.length + alpha - accuracy))


def exploration_probability(t: int, c: float) -> float:
    """p_t = min(1, c * t^(-1/3)): line 3 of Algorithm 1. `t` counts from 1."""
    fading: float = t ** (-1.0 / 3.0)
    return min(1.0, c * fading)


def coin(seed: int, t: int, purpose: bytes = b"explore") -> float:
    """A number in [0, 1) that depends on nothing but (seed, t, purpose): no generator state to save."""
    digest = blake2b(b"%d/%d/" % (seed, t) + purpose, digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


@dataclass(frozen=True, slots=True)
class View:
    """What a policy may look at when it chooses. Arrays run over the zoo; only `allowed` may be chosen."""

    t: int
    queue: float
    alpha: float
    allowed: Sequence[int]  # the models whose context the prompt fits, ascending; never empty
    estimates: Sequence[float] | None  # Â_m(t); None while nothing is learnt
    joules: Sequence[float] | None  # E_m(t), joules; None while nothing was read
    joules_unit: float  # the cheapest model's mean joules, which makes V a pure number


class Policy(Protocol):
    """Chooses the model to serve, as a function of the View alone."""

    @property
    def name(self) -> str: ...

    @property
    def explores(self) -> bool:
        """Whether requests are spent on asking the whole zoo."""
        ...

    def choose(self, view: View) -> int: ...


def drift_plus_penalty(view: View, v: float) -> int:
    """argmin over m of V * e_m + Q * (alpha - Â_m): equation 3. Ties go to the cheaper model.

    With nothing learnt, the largest model: it is the only one that is known to be good.
    """
    if view.estimates is None or view.joules is None:
        return view.allowed[-1]
    estimates, joules = view.estimates, view.joules

    def objective(m: int) -> tuple[float, float]:
        return v * joules[m] / view.joules_unit + view.queue * (view.alpha - estimates[m]), joules[m]

    return min(view.allowed, key=objective)


@dataclass(frozen=True, slots=True)
class MessPlus:
    """The paper's policy with a constant V."""

    v: float
    name: str = "mess+"
    explores: bool = True

    def choose(self, view: View) -> int:
        return drift_plus_penalty(view, self.v)


@dataclass(frozen=True, slots=True)
class Smallest:
    """Always the first model of the zoo."""

    name: str = "smallest"
    explores: bool = False

    def choose(self, view: View) -> int:
        return view.allowed[0]


@dataclass(frozen=True, slots=True)
class Largest:
    """Always the last model of the zoo."""

    name: str = "largest"
    explores: bool = False

    def choose(self, view: View) -> int:
        return view.allowed[-1]


@dataclass(frozen=True, slots=True)
class RandomConstrained:
    """The paper's random-with-constraint: a coin between models, blind to the request, that just meets alpha.

    The cheapest mix of at most two models whose mean accuracy covers alpha and, over the next `HORIZON`
    requests, what the queue says is missing.
    """

    seed: int
    name: str = "random"
    explores: bool = True

    HORIZON = 100

    def choose(self, view: View) -> int:
        if view.estimates is None or view.joules is None:
            return view.allowed[-1]
        target = view.alpha + view.queue / self.HORIZON
        low, high, share = cheapest_mix(
            [view.estimates[m] for m in view.allowed], [view.joules[m] for m in view.allowed], target
        )
        return view.allowed[high if coin(self.seed, view.t, b"mix") < share else low]


def cheapest_mix(
    accuracies: Sequence[float], joules: Sequence[float], target: float
) -> tuple[int, int, float]:
    """The cheapest way to reach a mean accuracy of `target` without looking at requests.

    A linear programme with one constraint has a solution that mixes at most two models.

    Returns:
        (low, high, share): the model `high` with probability `share`, else `low`. Where no mix reaches the
        target, the most accurate model.
    """
    models = range(len(accuracies))
    best = max(models, key=lambda m: (accuracies[m], -joules[m]))
    found = (best, best, 1.0)
    least = joules[best] if accuracies[best] >= target else float("inf")
    for low in models:
        if accuracies[low] >= target and joules[low] < least:
            found, least = (low, low, 1.0), joules[low]
        for high in models:
            if not accuracies[low] < target <= accuracies[high]:
                continue
            share = (target - accuracies[low]) / (accuracies[high] - accuracies[low])
            cost = (1.0 - share) * joules[low] + share * joules[high]
            if cost < least:
                found, least = (low, high, share), cost
    return found

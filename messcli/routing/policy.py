"""How a model is chosen: what a policy is asked, the paper's policy, and the yardsticks.

Knows numbers; knows nothing of prompts, models, files or meters. Models are indices into the zoo, smallest first.
Equations and lines are those of the MESS+ paper (its Algorithm 1 as restored in docs/how-it-decides.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from messcli.predict.answer import Look
from messcli.records import Decision
from messcli.routing import tuning
from messcli.routing.exploration import coin, exploration_probability
from messcli.routing.look import Looked
from messcli.routing.price import Solution
from messcli.routing.sla import Account
from messcli.snapshots import Part


@dataclass(frozen=True, slots=True)
class View:
    """What a policy may look at when it chooses. Arrays run over the zoo; only `allowed` may be chosen."""

    t: int
    plan: str
    queue: float
    alpha: float
    allowed: Sequence[int]  # the models whose context the prompt fits, ascending; never empty
    estimates: Sequence[float] | None  # Â_m(t); None while nothing is learnt
    joules: Sequence[float] | None  # E_m(t), joules; None while nothing was read
    joules_unit: float  # the cheapest model's mean joules, which makes V a pure number
    samples: Sequence[float]  # how many accuracies each model's estimate rests on
    looks: Sequence[Look] = ()  # at answers, as far as they are known to tell something
    aim: Solution | None = None  # the price of the window, where it was solved on its own requests


@dataclass(frozen=True, slots=True)
class Served:
    """What came of one served request, for policies that learn from it."""

    plan: str
    accuracy: float | None  # observed; None without a reference or audit
    estimate: float | None  # what was counted on when its model was chosen; None while nothing was learnt
    explored: bool
    billed_joules: float  # of all models that ran, as far as they were read


@dataclass(frozen=True, slots=True)
class Recent:
    """The latest requests as the predictors see them now: (requests, models) each."""

    estimates: NDArray[np.float64]
    joules: NDArray[np.float64]
    samples: NDArray[np.float64]  # (models,): how many accuracies each model's estimates rest on


@dataclass(frozen=True, slots=True)
class Window:
    """A window whose requests are all settled."""

    requests: int  # decided together, before any outcome of them was known
    alphas: Mapping[str, float]  # plan -> target
    accounts: Mapping[str, Account]  # by plan
    recent: Recent | None  # None where the policy doesn't want them, and while nothing is learnt
    next: float  # requests of the window to come, as far as known
    looks: Sequence[Look] = ()  # at answers, from now on
    blind: bool = False  # the next one's size is found by the policy: it may be large


class Policy(Protocol):
    """How often the whole zoo is asked, and which model serves otherwise.

    `exploration_probability`, `window`, `choose` and `companions` are pure: they change nothing, so that a whole
    window can be decided before anything of it is settled. `settle` is called for each served request, in input
    order, and `window_closed` after the last one of each window.
    """

    @property
    def name(self) -> str: ...

    @property
    def begins(self) -> bool:
        """Whether it chooses by what is expected of a zoo before anything was learnt."""
        ...

    def begin(self, alphas: Mapping[str, float], recent: Recent) -> None:
        """Nothing of this job was seen yet. Called where `begins`.

        Args:
            recent: requests as they are expected to be. Where nothing is known, one, with what is expected of the
                zoo's order and calibration.
        """
        ...

    @property
    def remembers(self) -> int:
        """How many of the latest requests `window_closed` wants to look at; 0: none."""
        ...

    def exploration_probability(self, t: int, explored: int, accounts: Mapping[str, Account]) -> float:
        """p_t, after `explored` explorations.

        Args:
            accounts: by plan, as of the last window's end.
        """
        ...

    def window(self, t: int, left: int | None) -> float:
        """How many requests, after the first t, may be decided before anything of them is known.

        Args:
            left: requests of the period still to come; None where that isn't known.
        """
        ...

    def choose(self, view: View) -> int:
        """The model that is to serve."""
        ...

    def aim(
        self,
        plan: str,
        alpha: float,
        account: Account,
        upcoming: Recent,
        window: int,
        looks: Sequence[Look] = (),
    ) -> Solution | None:
        """The price of the plan's requests of a window, solved on these; None: that of the last window's end. Pure.

        Args:
            upcoming: what the predictors say of them.
            window: how many they are.
            looks: at answers, as far as they are known to tell something.
        """
        ...

    def companions(self, view: View, served: int) -> tuple[int, ...]:
        """Models smaller than `served` that are asked as well, ascending. Then the request counts as explored."""
        ...

    @property
    def price(self) -> float | None:
        """Joules that a unit of accuracy is worth now, a mean over plans; None where that isn't known."""
        ...

    def look(self, view: View, served: int) -> Looked | None:
        """What is counted on where the answer of `served` is looked at; None: it is served as it is. Pure."""
        ...

    def second(self, plan: str, decision: Decision) -> int | None:
        """The larger model that is asked as well, once the answer is there; None: none. Pure.

        It is the same until the window is closed.

        Args:
            decision: with what the answer told.
        """
        ...

    def settle(self, served: Served) -> None:
        """Take in one served request."""
        ...

    def wants_recent(self, accounts: Mapping[str, Account]) -> bool:
        """Whether `window_closed` would use the recent requests now. Predicting for them again costs time."""
        ...

    def window_closed(self, window: Window) -> None:
        """Every request of the window is settled; the next window isn't decided yet."""
        ...

    def state(self) -> Part:
        """What it remembers, as named fields. A part of another name begins anew."""
        ...

    def load(self, part: Part) -> None:
        """Go on from `part`. Raises StateError: it isn't what `state` gives."""
        ...

    def open_period(self, accounts: Mapping[str, Account]) -> None:
        """A contract period begins, or an earlier one is taken up again. What was learnt stays.

        Args:
            accounts: by plan, of the period as far as it has come.
        """
        ...


@runtime_checkable
class JoinsWindows(Protocol):
    """A Policy that weighs what a window takes whatever it holds."""

    def not_worth_splitting(self, waking: float, samples: NDArray[np.float64]) -> float:
        """Requests up to which a last window loses less in one go than two halves take for their steps.

        Args:
            waking: joules that a window takes whatever it holds; 0: not known.
            samples: how many accuracies each model's estimates rest on.
        """
        ...


class _Stateless:
    """What policies share that look at nothing but the View."""

    remembers = 0
    price: float | None = None
    begins = False

    def begin(self, alphas: Mapping[str, float], recent: Recent) -> None:
        pass

    def aim(
        self,
        plan: str,
        alpha: float,
        account: Account,
        upcoming: Recent,
        window: int,
        looks: Sequence[Look] = (),
    ) -> Solution | None:
        return None

    def companions(self, view: View, served: int) -> tuple[int, ...]:
        return ()

    def look(self, view: View, served: int) -> Looked | None:
        return None

    def second(self, plan: str, decision: Decision) -> int | None:
        return None

    def exploration_probability(self, t: int, explored: int, accounts: Mapping[str, Account]) -> float:
        return 0.0

    def window(self, t: int, left: int | None) -> float:
        return math.inf

    def settle(self, served: Served) -> None:
        pass

    def wants_recent(self, accounts: Mapping[str, Account]) -> bool:
        return False

    def window_closed(self, window: Window) -> None:
        pass

    def state(self) -> Part:
        return Part("nothing")

    def load(self, part: Part) -> None:
        part.check(self.state())

    def open_period(self, accounts: Mapping[str, Account]) -> None:
        pass


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


@dataclass(frozen=True)
class MessPlus(_Stateless):
    """The paper's policy: a constant V, and exploration that fades as t^(-1/3)."""

    v: float
    c: float
    name: str = "mess+"

    def exploration_probability(self, t: int, explored: int, accounts: Mapping[str, Account]) -> float:
        return exploration_probability(t, self.c)

    def choose(self, view: View) -> int:
        return drift_plus_penalty(view, self.v)


@dataclass(frozen=True)
class Smallest(_Stateless):
    """Always the first model of the zoo."""

    name: str = "smallest"

    def choose(self, view: View) -> int:
        return view.allowed[0]


@dataclass(frozen=True)
class Largest(_Stateless):
    """Always the last model of the zoo."""

    name: str = "largest"

    def choose(self, view: View) -> int:
        return view.allowed[-1]


@dataclass(frozen=True)
class RandomConstrained(_Stateless):
    """The paper's random-with-constraint: a coin between models, blind to the request, that just meets alpha.

    The cheapest mix of at most two models whose mean accuracy covers alpha and, over the next `mix.payback`
    requests, what the queue says is missing.
    """

    seed: int
    mix: tuning.Mix = tuning.TUNING.mix
    name: str = "random"

    def exploration_probability(self, t: int, explored: int, accounts: Mapping[str, Account]) -> float:
        return 1.0 if explored < self.mix.first else exploration_probability(t, self.mix.c)

    def choose(self, view: View) -> int:
        if view.estimates is None or view.joules is None:
            return view.allowed[-1]
        target = view.alpha + view.queue / self.mix.payback
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

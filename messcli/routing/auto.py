"""The policy without V: the price that a unit of accuracy is worth is solved for, not accumulated.

Puts together what is found in `price`, `margin` and `exploration`; remembers what each plan's price rests on. Knows
no prompts, models or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from messcli.routing.audit import Audits
from messcli.routing.exploration import Exploration
from messcli.routing.margin import Residuals, needed_accuracy
from messcli.routing.policy import Recent, Served, View, Window
from messcli.routing.price import optimism, reach, solve
from messcli.routing.sla import Account
from messcli.routing.tuning import TUNING, Tuning
from messcli.snapshots import Part


@dataclass(slots=True)
class Promise:
    """What was found out about one plan. Accuracies are in [0, 1], prices in joules."""

    residuals: Residuals
    gain: float  # how far above alpha the zoo can go, on average
    price: float = 0.0  # lambda
    reachable: bool = True  # some price reaches the target, on the latest requests' estimates
    whole_zoo: float = 0.0  # what all models' answers cost, in chosen models' answers; 0 while not known
    solve_at: int = 0  # settled requests of the plan at which the price is solved anew

    def state(self) -> Part:
        """For a snapshot."""
        return Part(
            "promise",
            values={
                "gain": float(self.gain),
                "price": float(self.price),
                "reachable": self.reachable,
                "whole_zoo": float(self.whole_zoo),
                "solve_at": self.solve_at,
            },
            parts={"residuals": self.residuals.state()},
        )

    def load(self, part: Part) -> None:
        """Go on from `part`. Raises StateError: it isn't what `state` gives."""
        part.check(self.state())
        values = part.values
        self.gain, self.price, self.reachable = values["gain"], values["price"], values["reachable"]
        self.whole_zoo, self.solve_at = values["whole_zoo"], values["solve_at"]
        self.residuals.load(part.parts["residuals"])


class Auto:
    """MESS+ with the price of accuracy found by the program.

    Args:
        horizon: how many requests there will be in all; None where that isn't known. With a horizon the
            margin above alpha is given back towards the end.
        c: exploration after the first ones, which settle the models' levels: p_t = min(1, c * t^(-1/3)). None: as
            much as is affordable.
        audits: how answers are looked at that have no reference. Then audits are the explorations: without one,
            an answer teaches nothing.
    """

    name = "mess+"

    def __init__(
        self,
        horizon: int | None = None,
        c: float | None = None,
        tuning: Tuning = TUNING,
        audits: Audits | None = None,
    ) -> None:
        self.horizon = horizon
        self.audits = audits
        self.tuning = tuning
        self.remembers = tuning.price.recent
        self._exploration = Exploration(horizon, c, tuning.exploration)
        self._promises: dict[str, Promise] = {}

    # ---- deciding --------------------------------------------------------------------------------

    def exploration_probability(self, t: int, explored: int, accounts: Mapping[str, Account]) -> float:
        if self.audits is not None and self._exploration.c is None:
            return 0.0
        whole_zoo = max((promise.whole_zoo for promise in self._promises.values()), default=0.0)
        return self._exploration.probability(t, explored, self._requests(accounts), whole_zoo)

    def _requests(self, accounts: Mapping[str, Account]) -> float:
        """In all, as far as known."""
        if self.horizon:
            return float(self.horizon)
        return sum(account.settled + self._left(account) for account in accounts.values())

    def window(self, t: int, left: int | None) -> float:
        # The first requests go to the largest model: no more of them than are explored in any case.
        return max(self.tuning.exploration.least, t)

    def choose(self, view: View) -> int:
        """argmin of e_m - lambda (Â_m + optimism); ties go to the cheaper model. Nothing learnt: the largest."""
        if view.estimates is None or view.joules is None:
            return view.allowed[-1]
        promise = self._promise(view.plan)
        estimates, joules, samples, price = view.estimates, view.joules, view.samples, promise.price
        # Not in the search of the price: that must find out whether some price reaches the target with full optimism.
        strained = not promise.reachable

        def cost(m: int) -> tuple[float, float]:
            bonus = self._optimism(promise, samples[m], strained=strained)
            return joules[m] - price * (estimates[m] + bonus), joules[m]

        return min(view.allowed, key=cost)

    @property
    def price(self) -> float | None:
        solved = [p.price for p in self._promises.values() if p.reachable and p.whole_zoo]
        return sum(solved) / len(solved) if solved else None

    def _optimism(self, promise: Promise, samples: float, *, strained: bool) -> float:
        tuning = self.tuning.optimism
        errors = tuning.errors_unreachable if strained else tuning.errors
        return optimism(samples, promise.residuals.variance, errors, tuning.known)

    def _promise(self, plan: str) -> Promise:
        return self._promises.get(plan) or self._unknown()

    def _unknown(self) -> Promise:
        margin = self.tuning.margin
        return Promise(Residuals(margin.variance, margin.variance_weight), margin.reach_unknown)

    # ---- learning --------------------------------------------------------------------------------

    def settle(self, served: Served) -> None:
        if served.accuracy is None or served.estimate is None:
            return
        promise = self._promises.setdefault(served.plan, self._unknown())
        residual = served.accuracy - served.estimate
        promise.residuals.add(residual, self.tuning.margin, explored=served.explored)

    def wants_recent(self, accounts: Mapping[str, Account]) -> bool:
        return any(self._due(plan, account) for plan, account in accounts.items())

    def _due(self, plan: str, account: Account) -> bool:
        return account.settled >= self._promise(plan).solve_at

    def window_closed(self, window: Window) -> None:
        if window.recent is None:
            return
        for plan, alpha in window.alphas.items():
            account = window.accounts[plan]
            if self._due(plan, account):
                promise = self._promises.setdefault(plan, self._unknown())
                self._solve(promise, alpha, account, window.requests, window.recent)
                promise.solve_at = account.settled + int(self._pace(account))

    def _solve(self, promise: Promise, alpha: float, account: Account, window: int, recent: Recent) -> None:
        margin, residuals = self.tuning.margin, promise.residuals
        promise.gain = reach(recent.estimates, margin.reach_of_best) - alpha
        blind = max(float(window), self._pace(account))
        left = self._left(account)
        need = needed_accuracy(alpha, account, residuals, promise.gain, left, blind, margin, self.audits)
        need -= residuals.drift(margin)
        bonus = np.array(
            [self._optimism(promise, samples, strained=False) for samples in recent.samples.tolist()]
        )
        found = solve(recent.estimates, recent.joules, bonus, need, promise.price, self.tuning.price)
        promise.price, promise.reachable, promise.whole_zoo = found.price, found.reachable, found.whole_zoo

    def _left(self, account: Account) -> float:
        """Requests to come, as far as known."""
        if self.horizon:
            return max(float(self.horizon - account.settled), 1.0)
        return max(float(account.settled), self.tuning.margin.least_left)

    def _pace(self, account: Account) -> float:
        """Requests until the price is solved again."""
        price = self.tuning.price
        if account.settled < self._exploration.first:
            return 1.0
        if not self.horizon:
            return float(price.every)
        return min(float(price.every), max(1.0, self._left(account) // price.left_per_solution))

    # ---- remembering -----------------------------------------------------------------------------

    def state(self) -> Part:
        return Part("auto", parts={plan: promise.state() for plan, promise in self._promises.items()})

    def load(self, part: Part) -> None:
        part.check(self.state(), any_parts=True)
        self._promises = {plan: self._unknown() for plan in part.parts}
        for plan, promise in self._promises.items():
            promise.load(part.parts[plan])

    def open_period(self, accounts: Mapping[str, Account]) -> None:
        for plan, account in accounts.items():
            self._promises.setdefault(plan, self._unknown()).solve_at = account.settled

"""The policy without tuning flags: the price of accuracy is found by the program.

It puts together what was seen of estimates (margin.py), the price that is expected later (price.py) and which cheaper
models are asked as well (exploration.py). Knows no prompts, models or files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from messcli.predict.answer import Look
from messcli.predict.levels import deviations
from messcli.records import Decision
from messcli.routing.audit import Audits
from messcli.routing.exploration import companions, exploration_probability
from messcli.routing.look import Looked, Options, escalate, options
from messcli.routing.margin import Residuals, known_surplus
from messcli.routing.policy import Recent, Served, View, Window
from messcli.routing.price import Array, Solution, Standing, solve
from messcli.routing.sla import Account
from messcli.routing.tuning import TUNING, Tuning
from messcli.snapshots import Part


@dataclass(slots=True)
class Promise:
    """What was found out about one plan. Accuracies are in [0, 1], prices in joules."""

    residuals: Residuals
    found: Solution = field(default_factory=Solution)  # as it was solved last
    spent: float = 0.0  # joules billed
    solve_at: int = 0  # settled requests of the plan at which the price is solved anew

    def state(self) -> Part:
        """For a snapshot."""
        return Part(
            "promise",
            version=2,
            values={
                "price": float(self.found.price),
                "low": float(self.found.low),
                "share": float(self.found.share),
                "reachable": self.found.reachable,
                "spent": float(self.spent),
                "solve_at": self.solve_at,
            },
            parts={"residuals": self.residuals.state()},
        )

    def load(self, part: Part) -> None:
        """Go on from `part`. Raises StateError: it isn't what `state` gives."""
        if part.version == 1:  # of 0.2's first days: a price of another kind, which is looked for anew
            self.residuals.load(part.parts["residuals"])
            return
        part.check(self.state())
        values = part.values
        self.found = Solution(values["price"], values["low"], values["share"], values["reachable"])
        self.spent, self.solve_at = values["spent"], values["solve_at"]
        self.residuals.load(part.parts["residuals"])


def _options(view: View, price: float, bonus: Sequence[float]) -> Options:
    """What looks are worth for one request, with the optimism `bonus` of each model."""
    can = np.full(len(view.samples), np.inf)
    for m in view.allowed:
        can[m] = 0.0
    estimates, joules = np.array([view.estimates], float), np.array([view.joules], float) + can
    return options(estimates, joules, view.looks, np.array([price]), np.array([bonus]))


class Auto:
    """MESS+ with the price of accuracy found by the program, from the first request.

    Args:
        horizon: how many requests there will be in all; None where that isn't known. With a horizon alpha is met
            at its end; without, requests settled are taken to be half of all.
        c: the whole zoo is asked with the paper's p_t = min(1, c * t^(-1/3)). None: cheaper models are asked as well,
            at a small part of the bill.
        audits: how answers are looked at that have no reference. Then audits are the explorations: without one,
            an answer teaches nothing.
        seed: of the coins.
    """

    name = "mess+"
    begins = True

    def __init__(
        self,
        horizon: int | None = None,
        c: float | None = None,
        tuning: Tuning = TUNING,
        audits: Audits | None = None,
        seed: int = 0,
    ) -> None:
        self.horizon = horizon
        self.audits = audits
        self.tuning = tuning
        self.remembers = tuning.price.recent
        self._c = c
        self._seed = seed
        self._promises: dict[str, Promise] = {}
        self._last_optimism: tuple[tuple[float, ...], list[float]] = (), []  # what it is of, and the optimism

    # ---- deciding --------------------------------------------------------------------------------

    def exploration_probability(self, t: int, explored: int, accounts: Mapping[str, Account]) -> float:
        return 0.0 if self._c is None else exploration_probability(t, self._c)

    def companions(self, view: View, served: int) -> tuple[int, ...]:
        if self._c is not None or view.joules is None:
            return ()
        share = self.tuning.exploration.share
        return companions(self._seed, view.t, served, view.allowed, view.joules, share)

    def window(self, t: int, left: int | None) -> float:
        windows = self.tuning.windows
        if not self.horizon or left is None:
            return float(min(max(windows.first, t), windows.most))
        growth = min(max(1.0, self.horizon / windows.few), windows.growth)
        size = max(min(windows.first, windows.start * self.horizon), growth * t)
        if left > windows.end * self.horizon:
            kept = min(max(windows.least_kept, windows.kept / self.horizon), windows.most_kept)
            size = min(size, (1.0 - kept) * left)
        else:
            size = left
        return max(1.0, min(size, windows.most))

    def not_worth_splitting(self, waking: float, samples: Array) -> float:
        """What is lost by a window in one go: chance that its second half could have made good, and that half's choices
        by better levels."""
        price, windows = self.price, self.tuning.windows
        if not waking or not price:
            return 0.0
        variance = float(np.mean([promise.residuals.variance for promise in self._promises.values()]))
        chance = price * windows.spared * math.sqrt(variance)  # times sqrt(W)
        doubt = 0.5 * price * float(deviations(self.tuning.levels, samples, variance).mean())  # times W
        root = (math.sqrt(chance**2 + 4.0 * doubt * waking) - chance) / (2.0 * doubt)
        return root**2

    def choose(self, view: View) -> int:
        """argmin of e_m - lambda (Â_m + optimism); ties go to the cheaper model."""
        if view.estimates is None or view.joules is None:
            return view.allowed[-1]
        estimates, joules = view.estimates, view.joules
        price = self._aim_of(view).price_at(view.t)
        bonus = self._bonus(view, estimates)
        worth = _options(view, price, bonus).worth[0, 0].tolist() if view.looks else [0.0] * len(joules)

        def cost(m: int) -> tuple[float, float]:
            return joules[m] - price * (estimates[m] + bonus[m]) - worth[m], joules[m]

        return min(view.allowed, key=cost)

    @property
    def price(self) -> float | None:
        # Those of `begin` are in joules that nobody has read.
        solved = [p.found.price for p in self._promises.values() if p.found.reachable and p.solve_at]
        return sum(solved) / len(solved) if solved else None

    def look(self, view: View, served: int) -> Looked | None:
        larger = tuple(m for m in view.allowed if m > served)
        looks = [look for look in view.looks if look.model == served]
        if not larger or not looks or view.estimates is None or view.joules is None:
            return None
        price = self._aim_of(view).price_at(view.t)
        found = _options(replace(view, looks=looks), price, self._bonus(view, view.estimates))
        place = (0, 0, served)
        return Looked(larger, bool(found.checked[place]), float(found.accuracy[place]), price)

    def second(self, plan: str, decision: Decision) -> int | None:
        if decision.given is None or decision.joules_predicted is None:
            return None
        price = decision.price
        if price is None:  # decided by an earlier version
            price = self._promise(plan).found.price_at(decision.t)
        return escalate(decision.looks_at, decision.given, decision.joules_predicted, decision.larger, price)

    def _aim_of(self, view: View) -> Solution:
        """The window's own, or that of the last one's end."""
        return view.aim or self._promise(view.plan).found

    def _bonus(self, view: View, estimates: Sequence[float]) -> list[float]:
        """What is added to the estimates of one request: none is hoped to be above 1."""
        promise, reachable = self._promise(view.plan), self._aim_of(view).reachable
        optimism = self._optimism(promise, view.samples, reachable=reachable)
        return [min(more, max(1.0 - known, 0.0)) for known, more in zip(estimates, optimism, strict=True)]

    def _optimism(self, promise: Promise, samples: Sequence[float], *, reachable: bool) -> list[float]:
        """What is added to the models' Â: standard errors of their levels, which fade sooner where much is known."""
        variance = promise.residuals.variance
        known = (*samples, variance, reachable)
        if known != self._last_optimism[0]:  # all requests of a window have the same
            optimism = self.tuning.optimism
            errors = deviations(self.tuning.levels, np.array(samples), variance)
            fading = optimism.errors / np.sqrt(1.0 + variance / (errors**2 * optimism.known))
            more = errors * (fading if reachable else optimism.errors_unreachable)
            self._last_optimism = known, more.tolist()
        return self._last_optimism[1]

    def _promise(self, plan: str) -> Promise:
        return self._promises.get(plan) or self._unknown()

    def _unknown(self) -> Promise:
        margin = self.tuning.margin
        return Promise(Residuals(margin.variance, margin.variance_weight))

    # ---- learning --------------------------------------------------------------------------------

    def begin(self, alphas: Mapping[str, float], recent: Recent) -> None:
        for plan, alpha in alphas.items():
            promise = self._promises.setdefault(plan, self._unknown())
            self._solve(promise, alpha, Account(), recent)

    def settle(self, served: Served) -> None:
        promise = self._promises.setdefault(served.plan, self._unknown())
        promise.spent += served.billed_joules
        if served.accuracy is None or served.estimate is None:
            return
        residual = served.accuracy - served.estimate
        promise.residuals.add(residual, self.tuning.margin, explored=served.explored)

    def wants_recent(self, accounts: Mapping[str, Account]) -> bool:
        return any(self._due(plan, account) for plan, account in accounts.items())

    def _due(self, plan: str, account: Account) -> bool:
        return account.settled >= self._promise(plan).solve_at

    def window_closed(self, window: Window) -> None:
        if window.blind:
            settled = sum(account.settled for account in window.accounts.values())
            for promise in self._promises.values():
                promise.residuals.learnt(window.requests / max(settled, window.requests, 1))
        if window.recent is None:
            return
        for plan, alpha in window.alphas.items():
            account = window.accounts[plan]
            if self._due(plan, account):
                promise = self._promises.setdefault(plan, self._unknown())
                self._solve(
                    promise, alpha, account, window.recent, window.next, window.looks, blind=window.blind
                )
                promise.solve_at = account.settled + int(self._pace(account))

    def aim(
        self,
        plan: str,
        alpha: float,
        account: Account,
        upcoming: Recent,
        window: int,
        looks: Sequence[Look] = (),
    ) -> Solution | None:
        windows, promise = self.tuning.windows, self._promise(plan)
        errors = deviations(self.tuning.levels, upcoming.samples, promise.residuals.variance)
        if window < windows.own or errors.max() > windows.known:
            return None
        left = self._left(account)
        twice = windows.emptier * (
            account.settled + left
        )  # requests of a window that take twice their joules
        dearer = max(1.0, (1.0 + twice / max(left - window, 1.0)) / (1.0 + twice / window))
        return self._solution(promise, alpha, account, upcoming, window, looks, blind=True, dearer=dearer)

    def _solve(
        self,
        promise: Promise,
        alpha: float,
        account: Account,
        recent: Recent,
        window: float = 1.0,
        looks: Sequence[Look] = (),
        *,
        blind: bool = False,
    ) -> None:
        promise.found = self._solution(promise, alpha, account, recent, window, looks, blind=blind)

    def _solution(
        self,
        promise: Promise,
        alpha: float,
        account: Account,
        recent: Recent,
        window: float,
        looks: Sequence[Look],
        *,
        blind: bool,
        dearer: float = 1.0,
    ) -> Solution:
        margin, residuals = self.tuning.margin, promise.residuals
        left = self._left(account)
        there = np.isfinite(recent.joules).all(axis=0)
        gain = max(float(recent.estimates[:, there].mean(axis=0).max()) - alpha, 0.0)
        surplus, surplus_error = known_surplus(alpha, account, residuals, gain, left, margin, self.audits)
        standing = Standing(
            alpha=alpha,
            surplus=surplus,
            surplus_error=surplus_error,
            left=left,
            window=max(float(window), self._pace(account)),
            variance=residuals.variance,
            drift=residuals.drift_of(margin.blind_deviation if blind else margin.drift_deviation),
            spent=promise.spent,
            blind=blind,
            dearer=dearer,
        )
        optimism = self._optimism(promise, recent.samples.tolist(), reachable=True)
        bonus = np.minimum(optimism, np.maximum(1.0 - recent.estimates, 0.0))
        errors = deviations(self.tuning.levels, recent.samples, residuals.variance)
        return solve(recent.estimates, recent.joules, bonus, errors, standing, self.tuning.price, looks)

    def _left(self, account: Account) -> float:
        """Requests to come, as far as known."""
        if self.horizon:
            return max(float(self.horizon - account.settled), 1.0)
        return max(float(account.settled), self.tuning.margin.least_left)

    def _pace(self, account: Account) -> float:
        """Requests until the price is solved again."""
        price = self.tuning.price
        pace = min(float(price.every), max(1.0, account.settled // price.part))
        if not self.horizon:
            return pace
        return min(pace, max(1.0, self._left(account) // price.part))

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

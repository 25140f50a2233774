"""The controller: decides windows of requests, and folds in what came of them.

It holds everything that MESS+ remembers between requests: t, a queue per plan, what was learnt.
Knows nothing of models, meters or files. `decide` is pure; `settle` is the only thing that changes it, and
does so as a function of its arguments alone, so that replaying the same events gives the same controller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from messcli.predict.answer import AnswerPredictor
from messcli.predict.base import Predictor
from messcli.predict.joules import JoulesPredictor
from messcli.records import Decision, Request
from messcli.routing.audit import Auditor
from messcli.routing.bound import ServedMean
from messcli.routing.deciding import Decider, Settings, Standing
from messcli.routing.event import Event
from messcli.routing.failures import Absences
from messcli.routing.learnt import Learnt
from messcli.routing.policy import JoinsWindows, Policy, Served, Window
from messcli.routing.sla import Account
from messcli.routing.tuning import TUNING, Tuning
from messcli.snapshots import Part

_NONE: Mapping[int, int] = {}
# Parts of a snapshot that are there when they hold something
_OPTIONAL = ("answers", "absences", "ahead", "drift", "loads")


class Controller:
    """Algorithm 1 over windows of requests.

    Args:
        models: the size of the zoo.
        policy: how a model is chosen.
        predictor: Â of every model.
        joules: E_m(t) of every model.
        settings: what is promised.
        tuning: of what the controller decides itself; a policy has its own.
        answers: Â given an answer; None: no answer is looked at.
    """

    def __init__(
        self,
        models: int,
        policy: Policy,
        predictor: Predictor,
        joules: JoulesPredictor,
        settings: Settings,
        tuning: Tuning = TUNING,
        answers: AnswerPredictor | None = None,
    ) -> None:
        self.models = models
        self.policy = policy
        self.settings = settings
        self.tuning = tuning
        self.t = 0  # requests decided so far
        self.explored = 0
        self.owed = False  # an exploration fell on a request without a reference
        self.auditor = (
            Auditor(settings.audits, models, settings.seed, settings.horizon, tuning.audits)
            if settings.audits
            else None
        )
        self._in_window = 0  # requests settled since a window was closed
        self._absences = Absences(models)
        self.learnt = Learnt(
            models,
            policy,
            predictor,
            joules,
            answers,
            tuning,
            explored_only=settings.learn_from != "all",
            audited=settings.audits is not None,
        )
        self._decider = Decider(models, policy, self.learnt, settings, tuning, self.auditor)
        self.accounts = {plan: Account() for plan in settings.alphas}
        # What even the best answer of the whole zoo reached, over explorations: how far alpha can go.
        self._best = _Running()
        self.begin()

    def begin(self) -> None:
        """Expect what an earlier job taught, and of the rest what the zoo's order and its calibration make likely.
        Nothing was decided yet."""
        if not self.policy.begins:
            return
        self.learnt.begin()
        self.policy.begin(self.settings.alphas, self.learnt.of_recent(self.t) or self.learnt.of_order())

    def read_ahead(self, sample: Sequence[tuple[int, str]]) -> None:
        """Take note of prompts that are to come: directions are fitted on them, if they aren't settled yet, and prices
        are solved on those of them that are still to come.

        Args:
            sample: prompts with their places among the requests from here on, ascending. None: of what is to come,
                nothing is known.
        """
        self.learnt.read_ahead(self.t, sample)
        if self.policy.begins and sample and not self.t:
            self.begin()

    # ---- deciding -------------------------------------------------------------------------------

    def window(self) -> int:
        """How many requests the next window takes: a function of t, of the period's requests and of settings."""
        horizon = self.settings.horizon
        done = sum(account.settled + account.failed for account in self.accounts.values())
        left = None if horizon is None else max(horizon - done, 0)
        size = self.policy.window(self.t, left)
        if self.settings.window is None:
            if left and left <= self._joined:
                size = left
            return int(min(size, self.tuning.windows.most))
        if self.policy.begins:  # the first ones are decided on little
            size = max(self.tuning.windows.least, self.t)
        return int(min(self.settings.window, size))

    @property
    def _joined(self) -> float:
        """Requests up to which the last ones are one window: two would take more for their steps than they save."""
        if not isinstance(self.policy, JoinsWindows):
            return 0.0
        most = self.policy.not_worth_splitting(self.learnt.loads.waking, self.learnt.predictor.samples)
        return min(most, self.tuning.windows.blind * self.t)

    @property
    def looks(self) -> bool:
        """Whether answers are looked at."""
        return self.learnt.answers is not None

    @property
    def has_answers_read(self) -> bool:
        """Whether larger models may be asked to read answers."""
        return self.looks

    def decide(
        self,
        requests: Sequence[Request],
        allowed: Sequence[Sequence[int]],
        checkers: Mapping[int, int] = _NONE,
    ) -> list[Decision]:
        """Decide a whole window, in order. Inside it, Q moves by the estimates of what was decided. Pure.

        Args:
            requests: the window's requests.
            allowed: for each, the models that can take it, ascending; never empty.
            checkers: model -> the larger one that can check its answers.
        """
        present = [self.present(can) for can in allowed]
        return self._decider.decide(self._standing(), requests, present, checkers)

    def _standing(self) -> Standing:
        unreachable = [plan for plan in self.settings.alphas if self.unreachable(plan)]
        return Standing(self.t, self.explored, self.owed, self.accounts, unreachable)

    def present(self, allowed: Sequence[int]) -> Sequence[int]:
        """`allowed` without the models that are left out of this window, as they failed many times in a row."""
        return self._absences.present(allowed)

    def second(self, plan: str, decision: Decision, signals: Mapping[str, float]) -> Decision:
        """The decision once its model has answered: a larger model is asked as well where that is worth it.

        Pure, and the same until the window is closed, whatever is settled meanwhile.

        Args:
            signals: of the answer, a check's probability among them.
        """
        return self._decider.second(plan, decision, signals)

    def expected_explorations(self, requests: int) -> float:
        """How many of the next requests are likely to be explorations. Sampled, so that it stays cheap."""
        if requests <= 0:
            return 0.0
        points = [self.t + 1 + round((k + 0.5) * requests / 16 - 0.5) for k in range(16)]
        standing, explored = self._standing(), self.explored - self.t
        chances = [self._decider.exploration_probability(standing, t, explored + t) for t in points]
        return requests * sum(chances) / len(chances)

    def unreachable(self, plan: str) -> bool:
        """Whether alpha is above what the best answer of the whole zoo reaches, as far as explorations tell.

        Then no choice can keep it. See `tuning.Reach`.
        """
        best, reach = self._best, self.tuning.reach
        if best.count < reach.explorations:
            return False
        return best.mean + reach.errors * math.sqrt(best.variance / best.count) < self.settings.alphas[plan]

    def sees(self, decision: Decision) -> bool:
        """Whether the accuracies of the answers are found out, where that isn't a matter of references alone."""
        return self.auditor is None or self.auditor.sees(decision)

    # ---- folding in what came of it --------------------------------------------------------------

    def settle(self, events: Sequence[Event]) -> list[float]:
        """Fold outcomes in, in request order: equation 2, then the learning steps.

        A window may be folded in piece by piece: the result is that of folding it in at once.

        Returns:
            Q after each request.
        """
        queues = []
        # of a window that was too large to be remembered: together
        self.learnt.encode([event.text for event in events])
        for event in events:
            account = self.accounts[event.plan]
            if self.auditor is not None:
                self.auditor.settle(event.decision, event.accuracies, event.judged)
            account.explored += event.decision.explored
            self.learnt.settle(event)
            self._see_best(event)
            if event.served is None:
                account.failed += 1
            else:
                self._book(account, event, event.served)
            self._absences.settle(event.decision.t, event.decision.asked, event.faults or {})
            self._in_window += 1
            self.explored += event.decision.explored
            self.t = event.decision.t
            self.owed = event.decision.owed
            queues.append(account.queue.length)
        return queues

    def _see_best(self, event: Event) -> None:
        """Where all of the zoo answered, or the largest beside the others: how far accuracy can go."""
        known = [value for value in event.accuracies if not math.isnan(value)]
        everyone = event.decision.explored and len(event.decision.asked) == self.models
        if known and (event.decision.audited or everyone):
            self._best.add(max(known))

    def _book(self, account: Account, event: Event, served: int) -> None:
        accuracy, estimates = event.accuracies[served], event.decision.estimates
        observed = None if math.isnan(accuracy) else accuracy
        given, counted_on = event.decision.given, event.decision.counted_on
        estimate = None if estimates is None else (given or estimates)[served]
        account.serve(self.settings.alphas[event.plan], observed, estimate)
        if counted_on is not None:
            estimate = counted_on  # so that a policy learns what comes of looking, too
        decision = event.decision
        if self.auditor is not None and decision.chosen is not None:
            account.mean = account.mean or ServedMean()
            self.auditor.book(account.mean, decision, event.accuracies, served)
            observed = self.auditor.found(decision, event.accuracies)
            if (
                counted_on is not None
                and decision.audited
                and not math.isnan(event.accuracies[decision.chosen])
            ):
                observed = event.accuracies[decision.chosen]  # the largest's, too: it was counted on
            elif counted_on is None:
                estimate = None if estimates is None else estimates[decision.chosen]
        billed = math.fsum(joules for joules in event.joules if not math.isnan(joules))
        billed += math.fsum((event.check_joules or {}).values())
        self.policy.settle(Served(event.plan, observed, estimate, decision.explored, billed))

    def close_window(self) -> None:
        """End the window: all its requests are settled. The policy solves its prices now."""
        self.learnt.close_window(self.t)
        self._absences.close_window(self.t)
        recent = self.learnt.of_recent(self.t) if self.policy.wants_recent(self.accounts) else None
        looks = self.learnt.looks()
        upcoming = float(self.window())
        self.policy.window_closed(
            Window(
                self._in_window,
                self.settings.alphas,
                self.accounts,
                recent,
                upcoming,
                looks,
                blind=self.settings.window is None,
            )
        )
        if self.auditor is not None:
            self.auditor.close_window(self.policy.price, self._in_window)
        self._in_window = 0

    def open_period(self, accounts: Mapping[str, Account]) -> None:
        """Begin a contract period, or take an earlier one up again. t and what was learnt stay.

        Args:
            accounts: of the plans that have any in it.
        """
        self.accounts = {plan: accounts.get(plan) or Account() for plan in self.settings.alphas}
        self.policy.open_period(self.accounts)

    # ---- remembering -----------------------------------------------------------------------------

    def state(self) -> Part:
        """Everything, as named fields, for a snapshot; `load` of it continues exactly."""
        accounts = {plan: account.state() for plan, account in self.accounts.items()}
        return Part(
            "controller",
            version=2,
            values={
                "t": self.t,
                "explored": self.explored,
                "owed": self.owed,
                "in_window": self._in_window,
            },
            parts={
                "accounts": Part("accounts", parts=accounts),
                "best": self._best.state(),
                "policy": self.policy.state(),
                **self.learnt.parts(),
                **({} if self.auditor is None else {"auditor": self.auditor.state()}),
                **({} if self._absences.is_empty else {"absences": self._absences.state()}),
            },
        )

    def load(self, part: Part) -> list[str]:
        """Go on from `part`.

        Returns:
            What begins anew: it was learnt under other tuned numbers, or by another policy.

        Raises:
            StateError: it isn't what `state` gives.
        """
        own = self.state()
        if part.version == 1:  # each predictor had a space of its own: what was learnt there is learnt anew
            part = replace(part, parts={**part.parts, "space": replace(own.parts["space"], tuning="")})
        _without_optional(part).check(_without_optional(own))
        values, parts = part.values, part.parts
        self.t, self.explored = values["t"], values["explored"]
        self.owed, self._in_window = values["owed"], values["in_window"]
        parts["accounts"].check(own.parts["accounts"], any_parts=True)
        self.accounts |= {plan: Account.of(kept) for plan, kept in parts["accounts"].parts.items()}
        self._best.load(parts["best"])
        if self.auditor is not None:
            self.auditor.load(parts["auditor"])
        self._absences = Absences(self.models)
        if "absences" in parts:
            self._absences.load(parts["absences"])
        anew = self.learnt.load(part)
        if parts["policy"].name == own.parts["policy"].name:
            self.policy.load(parts["policy"])
        else:
            anew.append("policy")
        return anew


def _without_optional(part: Part) -> Part:
    return replace(part, parts={name: kept for name, kept in part.parts.items() if name not in _OPTIONAL})


@dataclass(slots=True)
class _Running:
    """Mean and variance of numbers seen one at a time (Welford's method)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        step = value - self.mean
        self.mean += step / self.count
        self.squares += step * (value - self.mean)

    @property
    def variance(self) -> float:
        return self.squares / (self.count - 1) if self.count > 1 else 0.0

    def state(self) -> Part:
        return Part(
            "running", values={"count": self.count, "mean": float(self.mean), "squares": float(self.squares)}
        )

    def load(self, part: Part) -> None:
        part.check(self.state())
        values = part.values
        self.count, self.mean, self.squares = values["count"], values["mean"], values["squares"]

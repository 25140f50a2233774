"""Deciding a window of requests. Pure: a function of what was learnt, of where the promises stand, and of a coin.

Knows policies, predictors and audits; knows nothing of models, meters or files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from messcli.predict.answer import Look
from messcli.predict.text import LATEST, MOST_REMEMBERED, remember
from messcli.records import Decision, Request
from messcli.routing.audit import Auditor, Audits
from messcli.routing.exploration import coin
from messcli.routing.learnt import Learnt, Row
from messcli.routing.load import Share
from messcli.routing.look import Looked
from messcli.routing.policy import Policy, Recent, View
from messcli.routing.price import Solution
from messcli.routing.sla import DEFAULT_PLAN, Account
from messcli.routing.tuning import Tuning


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run promises and how it explores. Changing it between runs is allowed and recorded."""

    alphas: Mapping[str, float]  # plan -> target mean accuracy; DEFAULT_PLAN for requests without a plan
    seed: int = 0
    learn_from: str = "all"  # "explored": only from explorations, as the paper; "all": from every reference
    serve: str = "largest"  # what an exploration serves; "best" leaks the reference into the accuracy
    window: int | None = 1  # requests decided together, at most; None: as many as the policy finds right
    horizon: int | None = None  # requests in all; None where that isn't known
    audits: Audits | None = None  # None: references tell what answers are worth


@dataclass(frozen=True, slots=True)
class Standing:
    """What was settled, as far as decisions depend on it."""

    t: int  # requests
    explored: int
    owed: bool  # an exploration fell on a request without a reference
    accounts: Mapping[str, Account]  # by plan
    unreachable: Collection[str]  # plans whose alpha is above what the zoo can reach


@dataclass(frozen=True, slots=True)
class _Window:
    """A window that is to be decided, and what is expected of it."""

    standing: Standing
    requests: Sequence[Request]
    allowed: Sequence[Sequence[int]]  # models, ascending
    predicted: Sequence[tuple[Row, Row]]  # estimates and joules
    looks: Sequence[Look]
    checkers: Mapping[int, int]


class Decider:
    """Decides windows of requests.

    Args:
        models: the size of the zoo.
        policy: how a model is chosen.
        learnt: what models are expected to do with a prompt.
        settings: what is promised.
        tuning: of what isn't the policy's.
        auditor: who has answers looked at without references; None: nobody does.
    """

    def __init__(
        self,
        models: int,
        policy: Policy,
        learnt: Learnt,
        settings: Settings,
        tuning: Tuning,
        auditor: Auditor | None,
    ) -> None:
        self._models = models
        self._policy = policy
        self._learnt = learnt
        self._settings = settings
        self._tuning = tuning
        self._auditor = auditor

    def decide(
        self,
        standing: Standing,
        requests: Sequence[Request],
        allowed: Sequence[Sequence[int]],
        checkers: Mapping[int, int],
    ) -> list[Decision]:
        """Decide a whole window, in order. Inside it, Q moves by the estimates of what was decided. Pure.

        Args:
            standing: what was settled before.
            requests: the window's requests.
            allowed: for each, the models that can take it, ascending; never empty.
            checkers: model -> the larger one that can check its answers.
        """
        looks = [look for look in self._learnt.looks() if not look.checked or look.model in checkers]
        # they are looked at again when they are learnt from, after the last of the window
        remember(min(len(requests) + LATEST, MOST_REMEMBERED))
        predicted = list(self._learnt.predict([request.prompt for request in requests]))
        window = _Window(standing, requests, allowed, predicted, looks, checkers)
        everyone = frozenset(range(self._models))
        aims = self._aims(window, everyone)
        decisions = self._decide(window, everyone, aims)
        shares = self._learnt.loads.shares
        if shares is None:
            return decisions
        if all((request.plan or DEFAULT_PLAN) in aims for request in requests):
            decisions = self._awake(window, decisions, aims, shares)
        return at_their_loads(decisions, shares)

    def _aims(self, window: _Window, awake: Collection[int]) -> Mapping[str, Solution]:
        """By plan: the price of this window, where its size was found by the policy, on its own prompts."""
        if self._settings.window is not None:
            return {}
        rows: dict[str, list[tuple[Row, Row]]] = {}
        for request, row in zip(window.requests, window.predicted, strict=True):
            rows.setdefault(request.plan or DEFAULT_PLAN, []).append(row)
        asleep = [m for m in range(self._models) if m not in awake]
        found = {}
        for plan, of_plan in rows.items():
            estimates, joules = zip(*of_plan, strict=True)
            if None in estimates or None in joules:
                continue
            expected = np.array(joules)
            expected[:, asleep] = np.inf
            upcoming = Recent(np.array(estimates), expected, self._learnt.predictor.samples)
            alpha, account = self._settings.alphas[plan], window.standing.accounts[plan]
            found[plan] = self._policy.aim(plan, alpha, account, upcoming, len(of_plan), window.looks)
        return {plan: aim for plan, aim in found.items() if aim is not None}

    def _awake(
        self,
        window: _Window,
        decisions: list[Decision],
        aims: Mapping[str, Solution],
        shares: Sequence[Share],
    ) -> list[Decision]:
        """The decisions for a window in which models sleep that would get too few requests to pay for their steps,
        where the others are expected to do as well.
        """
        models = frozenset(range(self._models))

        def total(decided: Sequence[Decision]) -> tuple[float, float]:
            """Joules, and sum of accuracies."""
            given = Counter(m for decision in decided for m in decision.asked)
            joules = [share.idle(given[m]) for m, share in enumerate(shares)]
            accuracy = 0.0
            for decision in decided:
                if decision.estimates is None or decision.joules_predicted is None:
                    return math.inf, 0.0
                joules += [decision.joules_predicted[m] for m in decision.asked]
                counted = decision.counted_on
                accuracy += decision.estimates[decision.model] if counted is None else counted
            return math.fsum(joules), accuracy

        least, wanted = total(decisions)
        for m in sorted(models, key=lambda m: -shares[m].steps):
            given = sum(m in decision.asked for decision in decisions)
            if not 0 < given < shares[m].room or len(models) == 1:
                continue
            without = self._aims(window, models - {m})
            if any(aims[plan].reachable and not aim.reachable for plan, aim in without.items()):
                continue
            others = self._decide(window, models - {m}, without)
            joules, accuracy = total(others)
            if joules < least and accuracy > wanted - self._tuning.loads.slack:
                least, decisions, models = joules, others, models - {m}
        return decisions

    def _decide(
        self, window: _Window, awake: Collection[int], aims: Mapping[str, Solution]
    ) -> list[Decision]:
        """Decide a window with the models that are awake; others serve what these can't."""
        requests, looks, checkers = window.requests, window.looks, window.checkers
        standing, settings = window.standing, self._settings
        queues = {plan: account.queue for plan, account in standing.accounts.items()}
        owed, explorations = standing.owed, standing.explored
        decisions = []
        samples = self._learnt.predictor.samples.tolist()
        auditor = self._auditor
        later = auditor.later if auditor else 0
        for t, (request, can, (estimates, joules)) in enumerate(
            zip(requests, window.allowed, window.predicted, strict=True), start=standing.t + 1
        ):
            plan = request.plan or DEFAULT_PLAN
            due = owed or coin(settings.seed, t) < self.exploration_probability(standing, t, explorations)
            tells = bool(request.references) or auditor is not None
            explored, owed = due and tells, due and not tells
            explorations += explored
            looked = None
            if explored:
                asked = tuple(can)
                model = can[-1]
            else:
                view = View(
                    t=t,
                    plan=plan,
                    queue=queues[plan].length,
                    alpha=settings.alphas[plan],
                    allowed=[m for m in can if m in awake] or can,
                    estimates=estimates,
                    joules=joules,
                    joules_unit=self._learnt.joules.unit,
                    samples=samples,
                    looks=looks,
                    aim=aims.get(plan),
                )
                model, others, looked = self._choose(view, standing)
                taught = (
                    bool(request.references) and auditor is None
                )  # audits choose what they ask themselves
                asked = (*others, model) if taught else (model,)
                explored = len(asked) > 1
                # So many answers will be known then: what is little known is tried, but not by all at once. A price
                # that was solved on these requests has counted on all of them.
                for m in asked if taught and plan not in aims else ():
                    samples[m] += 1.0
            # Before a calibration or a reading, joules are the zoo's order in some unit: to choose by, not to tell.
            told = joules if self._learnt.joules.measured else None
            decision = Decision(t, model, asked, explored, estimates, told, owed)
            if looked is not None and not explored and estimates is not None:
                decision = replace(
                    decision,
                    larger=looked.larger,
                    checked_by=checkers[model] if looked.checked else None,
                    counted_on=estimates[model] + looked.gain,
                    price=looked.price,
                )
            if auditor is not None:
                decision = auditor.decide(decision, can, samples, later)
                later += auditor.is_later(decision)
            seen = tells if auditor is None else decision.audited
            if decision.checked_by is None and seen:
                reader = self._reads(t, asked if explored else (model,), joules, checkers)
                if reader is not None:
                    decision = replace(decision, checked_by=reader)
            decisions.append(decision)
            if estimates is not None:
                counts = decision.counted_on is not None and decision.model == model
                expected = (decision.counted_on if counts else None) or estimates[decision.model]
                queues[plan] = queues[plan].after(settings.alphas[plan], expected)
        return decisions

    def _choose(self, view: View, standing: Standing) -> tuple[int, tuple[int, ...], Looked | None]:
        """(the model that serves, the ones that are asked as well, whether its answer is looked at)."""
        if view.plan in standing.unreachable:
            return view.allowed[-1], (), None
        served = self._policy.choose(view)
        looked = self._policy.look(view, served) if view.looks else None
        return served, self._policy.companions(view, served), looked

    def _reads(
        self,
        t: int,
        asked: Sequence[int],
        joules: Sequence[float] | None,
        checkers: Mapping[int, int],
    ) -> int | None:
        """The larger model that reads these answers to learn what checks of them are worth; None: nobody does."""
        answers = self._learnt.answers
        readers = {checkers[m] for m in asked if m in checkers}
        if answers is None or len(readers) != 1:
            return None
        (reader,) = readers
        read = [m for m in asked if checkers.get(m) == reader]
        known = [answers.checks_of(m) for m in read]
        if any(checks.mute for checks in known):
            return None
        tuning = self._tuning.exploration
        spent = sum(checks.joules for checks in known)
        room = tuning.checks * (joules[reader] if joules else math.inf)
        fading = tuning.checks_known / (tuning.checks_known + min(checks.made for checks in known))
        likely = fading if spent <= 0.0 else fading * min(1.0, room / spent)
        return reader if coin(self._settings.seed, t, b"check") < likely else None

    def exploration_probability(self, standing: Standing, t: int, explored: int) -> float:
        """p_t, after `explored` explorations."""
        return self._policy.exploration_probability(t, explored, standing.accounts)

    def second(self, plan: str, decision: Decision, signals: Mapping[str, float]) -> Decision:
        """The decision once its model has answered: a larger model is asked as well where that is worth it.

        Pure, and the same until the window is closed, whatever is settled meanwhile.

        Args:
            signals: of the answer, a check's probability among them.
        """
        answers = self._learnt.answers
        if answers is None or decision.estimates is None or not decision.larger:
            return decision
        first = decision.looks_at
        shifts = answers.given(first, signals)
        given = tuple(np.clip(np.array(decision.estimates) + shifts, 0.0, 1.0).tolist())
        looked = replace(decision, larger=(), given=given, first=first)
        larger = self._policy.second(plan, replace(looked, larger=decision.larger))
        if larger is None:
            return looked
        chosen = None if decision.chosen is None else larger
        if decision.audited and decision.model != first:  # it serves what it asked for, whatever is found out
            looked = replace(looked, chosen=chosen)
        else:
            looked = replace(looked, chosen=chosen, model=larger)
        if larger in decision.asked:
            return looked
        return replace(looked, asked=tuple(sorted({*decision.asked, larger})), added=larger)


def at_their_loads(decisions: Sequence[Decision], shares: Sequence[Share]) -> list[Decision]:
    """With the joules that are expected of each asked model's share of the window, instead of those on full engines.

    Models that may be asked later, because of an answer, stay at full engines: prices were solved for these, and how
    many they will get isn't known.
    """
    given = Counter(m for decision in decisions for m in decision.asked)
    times = [share.of(given[m]) / share.full for m, share in enumerate(shares)]
    return [
        decision
        if decision.joules_predicted is None
        else replace(
            decision,
            joules_predicted=tuple(
                e * times[m] if m in decision.asked else e for m, e in enumerate(decision.joules_predicted)
            ),
        )
        for decision in decisions
    ]

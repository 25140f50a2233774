"""The controller: decides windows of requests, and folds in what came of them.

It holds everything that MESS+ remembers between requests: t, a queue per plan, what the predictors learnt.
Knows nothing of models, meters or files. `decide` is pure; `settle` is the only thing that changes it, and
does so as a function of its arguments alone, so that replaying the same events gives the same controller.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from messcli.errors import StateError
from messcli.predict.answer import AnswerPredictor, Look
from messcli.predict.base import Begins, Fades, InSpace, Predictor
from messcli.predict.joules import JoulesPredictor
from messcli.predict.latent import LatentSpace
from messcli.predict.levels import levels
from messcli.predict.text import LATEST, MOST_REMEMBERED, TOGETHER, remember
from messcli.records import Decision, Fault, Request, dumps, loads
from messcli.routing.audit import Auditor, Audits
from messcli.routing.bound import ServedMean
from messcli.routing.exploration import coin
from messcli.routing.failures import Absences
from messcli.routing.knowledge import Knowledge
from messcli.routing.load import Loads, Share
from messcli.routing.look import Looked
from messcli.routing.policy import JoinsWindows, Policy, Recent, Served, View, Window
from messcli.routing.price import Solution
from messcli.routing.prompts import Ahead, Latest
from messcli.routing.sla import Account
from messcli.routing.tuning import TUNING, Tuning
from messcli.snapshots import Part

DEFAULT_PLAN = ""

_NONE: Mapping[int, int] = {}
_OPTIONAL = (
    "answers",
    "absences",
    "ahead",
    "drift",
    "loads",
)  # parts of a snapshot that are there when they hold something
_Row = tuple[float, ...] | None  # a number for every model


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
class Event:
    """What `settle` needs to know of one request: what was decided, and what came of it. Plain data.

    Arrays run over the zoo; NaN where a model didn't run or nothing was read.
    """

    text: str
    plan: str
    decision: Decision
    accuracies: tuple[float, ...]
    joules: tuple[float, ...]
    served: int | None  # the model whose output was served; None when every one asked failed
    # What answers told of themselves, by model (as JSON has keys); None where nobody wants to know
    signals: Mapping[str, Mapping[str, float]] | None = None
    check_joules: Mapping[str, float] | None = None  # of larger models that read answers: the same
    judged: float = 0.0  # joules of judging its answers
    faults: Mapping[str, Fault] | None = None  # of models that failed, by model; None where none did
    running: Mapping[str, float] | None = (
        None  # requests that ran at a time, by model; None where nothing is known
    )

    def dumps(self) -> bytes:
        """As JSON; NaN becomes null. Floats come back exactly."""
        return dumps(self)

    @classmethod
    def loads(cls, data: bytes) -> Event:
        plain = loads(data)
        decision = plain.pop("decision")
        plain.pop("has_reference", None)  # of states that earlier versions wrote
        for name in ("accuracies", "joules"):
            plain[name] = tuple(math.nan if value is None else value for value in plain[name])
        return cls(decision=Decision.of(decision), **plain)


@dataclass(frozen=True, slots=True)
class _Window:
    """A window that is to be decided, and what is expected of it."""

    requests: Sequence[Request]
    allowed: Sequence[Sequence[int]]  # models, ascending
    predicted: Sequence[tuple[_Row, _Row]]  # estimates and joules
    looks: Sequence[Look]
    checkers: Mapping[int, int]


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
        self.predictor = predictor
        self.joules = joules
        self.settings = settings
        self.tuning = tuning
        self.answers = answers
        self.space = LatentSpace()  # that all predictors look at prompts in
        self._in_space = [one for one in (predictor, joules) if isinstance(one, InSpace)]
        for one in self._in_space:
            one.join(self.space)
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
        self._loads = Loads(models, tuning.loads)
        self._recent = Latest(models, policy.remembers, begun=policy.begins)
        self._ahead: Ahead | None = None
        self._look_at = (
            0  # t at which it is looked whether prompts still differ along the directions; 0: not yet known
        )
        self._usual_share = 0.0  # of their variance that lay along these at the first look; 0: there was none
        self.accounts = {plan: Account() for plan in settings.alphas}
        # What even the best answer of the whole zoo reached, over explorations: how far alpha can go.
        self._best = _Running()
        self.begin()

    def begin(self) -> None:
        """Expect what an earlier job taught, and of the rest what the zoo's order and its calibration make likely.
        Nothing was decided yet."""
        if not self.policy.begins:
            return
        if isinstance(self.predictor, Begins) and not self.predictor.samples.any():
            self.predictor.begin(self.tuning.levels)
        self.joules.begin(self.tuning.levels)
        self.policy.begin(self.settings.alphas, self._of_recent() or self._of_order())

    def _of_order(self) -> Recent:
        """A request of which nothing is known."""
        nothing = np.zeros(self.models)
        expected = np.clip(levels(self.tuning.levels, nothing, nothing, 1.0), 0.0, 1.0)
        return Recent(expected[None, :], self.joules.typical[None, :], nothing)

    def _of_recent(self) -> Recent | None:
        """What requests to come are like now: those that were read ahead, and the latest ones where these are few; None
        while one of them isn't known."""
        recent = self._recent.seen_by(self.predictor, self.joules)
        if self._ahead is not None and (recent is None or self.t >= self.tuning.ahead.after):
            recent = self._ahead.before(recent, self.t, self.predictor, self.joules, self.tuning.ahead.least)
        return None if recent is None else replace(recent, estimates=self._of_all(recent.estimates))

    def read_ahead(self, sample: Sequence[tuple[int, str]]) -> None:
        """Take note of prompts that are to come: directions are fitted on them, if they aren't settled yet, and prices
        are solved on those of them that are still to come.

        Args:
            sample: prompts with their places among the requests from here on, ascending. None: of what is to come,
                nothing is known.
        """
        self._ahead = None
        if not self.policy.begins or not sample:
            return
        seen = self.space.settle([text for _, text in sample])
        if seen is not None:
            for one in self._in_space:
                one.learn_again(seen)
        self._ahead = Ahead(self.models, self.t, sample)
        if not self.t:
            self.begin()

    def learn_from(self, earlier: Knowledge) -> None:
        """Begin with what an earlier job taught. t, queues, accounts and prices are this job's own. Before `begin`.

        Raises:
            StateError: what was learnt isn't known to this messcli.
        """
        most = self.tuning.knowledge.answers
        space = earlier.part.find("space", like=self.space.state())
        owners: Mapping[str, Predictor | JoulesPredictor | AnswerPredictor | None] = {
            "predictor": self.predictor,
            "joules": self.joules,
            "answers": self.answers,
        }
        if space is not None:
            self.space.load(space)
        for name, owner in owners.items():
            if owner is None or name not in earlier.part.parts:
                continue
            kept = earlier.part.find(name, like=owner.state())
            if kept is None or space is None:
                raise StateError(
                    f"{earlier.name}: was learnt under other tuned numbers of messcli. Learn from a table of "
                    "`messcli record`, or begin without it"
                )
            owner.load(kept)
            if isinstance(owner, Fades):
                owner.discount(most)
        self._take_up_loads(earlier.part)
        if earlier.part.parts["recent"].tuning == self._recent.state().tuning:
            self._recent.load(earlier.part.parts["recent"])

    def _take_up_loads(self, part: Part | None) -> None:
        """Those that the joules of `part` were read at; None: these are learnt anew."""
        self._loads = Loads(self.models, self.tuning.loads)
        if part is not None and "loads" in part.parts:
            kept = part.find("loads", like=self._loads.state())
            if kept is not None:
                self._loads.load(kept)
        self.joules.scale = self._loads.scale

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
        most = self.policy.not_worth_splitting(self._loads.waking, self.predictor.samples)
        return min(most, self.tuning.windows.blind * self.t)

    def joules_of_many(self, m: int, requests: int) -> tuple[float, float] | None:
        """Joules of a request that model m is given with so many others at once, and their relative error: by a line
        through what was read of it at three loads or more."""
        shares = self._loads.shares
        if shares is None or math.isnan(shares[m].error) or not requests:
            return None
        return shares[m].of(requests), shares[m].error

    @property
    def looks(self) -> bool:
        """Whether answers are looked at."""
        return self.answers is not None

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
        allowed = [self.present(can) for can in allowed]
        looks = [
            look
            for look in (self.answers.looks() if self.answers is not None else ())
            if not look.checked or look.model in checkers
        ]
        # they are looked at again when they are learnt from, after the last of the window
        remember(min(len(requests) + LATEST, MOST_REMEMBERED))
        predicted = list(self._predict([request.prompt for request in requests]))
        window = _Window(requests, allowed, predicted, looks, checkers)
        everyone = frozenset(range(self.models))
        aims = self._aims(window, everyone)
        decisions = self._decide(window, everyone, aims)
        shares = self._loads.shares
        if shares is None:
            return decisions
        if all((request.plan or DEFAULT_PLAN) in aims for request in requests):
            decisions = self._awake(window, decisions, aims, shares)
        return _at_their_loads(decisions, shares)

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
        models = frozenset(range(self.models))

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
            if joules < least and accuracy > wanted - self.tuning.loads.slack:
                least, decisions, models = joules, others, models - {m}
        return decisions

    def _decide(
        self, window: _Window, awake: Collection[int], aims: Mapping[str, Solution]
    ) -> list[Decision]:
        """Decide a window with the models that are awake; others serve what these can't."""
        requests, looks, checkers = window.requests, window.looks, window.checkers
        queues = {plan: account.queue for plan, account in self.accounts.items()}
        owed, explorations = self.owed, self.explored
        decisions = []
        samples = self.predictor.samples.tolist()
        auditor = self.auditor
        later = auditor.later if auditor else 0
        for t, (request, can, (estimates, joules)) in enumerate(
            zip(requests, window.allowed, window.predicted, strict=True), start=self.t + 1
        ):
            plan = request.plan or DEFAULT_PLAN
            due = owed or coin(self.settings.seed, t) < self._exploration_probability(t, explorations)
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
                    alpha=self.settings.alphas[plan],
                    allowed=[m for m in can if m in awake] or can,
                    estimates=estimates,
                    joules=joules,
                    joules_unit=self.joules.unit,
                    samples=samples,
                    looks=looks,
                    aim=aims.get(plan),
                )
                model, others, looked = self._choose(view)
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
            told = joules if self.joules.measured else None
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
                decision = replace(
                    decision, checked_by=self._reads(t, asked if explored else (model,), joules, checkers)
                )
            decisions.append(decision)
            if estimates is not None:
                counts = decision.counted_on is not None and decision.model == model
                expected = (decision.counted_on if counts else None) or estimates[decision.model]
                queues[plan] = queues[plan].after(self.settings.alphas[plan], expected)
        return decisions

    def present(self, allowed: Sequence[int]) -> Sequence[int]:
        """`allowed` without the models that are left out of this window, as they failed many times in a row."""
        return self._absences.present(allowed)

    def second(self, plan: str, decision: Decision, signals: Mapping[str, float]) -> Decision:
        """The decision once its model has answered: a larger model is asked as well where that is worth it.

        Pure, and the same until the window is closed, whatever is settled meanwhile.

        Args:
            signals: of the answer, a check's probability among them.
        """
        if self.answers is None or decision.estimates is None or not decision.larger:
            return decision
        first = decision.looks_at
        shifts = self.answers.given(first, signals)
        given = tuple(np.clip(np.array(decision.estimates) + shifts, 0.0, 1.0).tolist())
        looked = replace(decision, larger=(), given=given, first=first)
        larger = self.policy.second(plan, replace(looked, larger=decision.larger))
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

    def _reads(
        self,
        t: int,
        asked: Sequence[int],
        joules: Sequence[float] | None,
        checkers: Mapping[int, int],
    ) -> int | None:
        """The larger model that reads these answers to learn what checks of them are worth; None: nobody does."""
        readers = {checkers[m] for m in asked if m in checkers}
        if self.answers is None or len(readers) != 1:
            return None
        (reader,) = readers
        read = [m for m in asked if checkers.get(m) == reader]
        known = [self.answers.checks_of(m) for m in read]
        if any(checks.mute for checks in known):
            return None
        tuning = self.tuning.exploration
        spent = sum(checks.joules for checks in known)
        room = tuning.checks * (joules[reader] if joules else math.inf)
        fading = tuning.checks_known / (tuning.checks_known + min(checks.made for checks in known))
        likely = fading if spent <= 0.0 else fading * min(1.0, room / spent)
        return reader if coin(self.settings.seed, t, b"check") < likely else None

    def encode(self, texts: Sequence[str]) -> None:
        """Have the features of `texts` at hand when they are asked for: together faster than one by one."""
        for first in range(0, len(texts), TOGETHER):  # both look at the same texts, which are hashed once
            batch = texts[first : first + TOGETHER]
            self.predictor.encode_many(batch)
            self.joules.encode_many(batch)

    def _predict(self, texts: Sequence[str]) -> Iterator[tuple[_Row, _Row]]:
        """Â and E_m(t) of every model, for each text; None while nothing is learnt."""

        def rows(predictor: Predictor | JoulesPredictor) -> Iterable[_Row]:
            predicted = predictor.predict_many(predictor.encode_many(texts))
            if predictor is self.predictor and self.policy.begins:
                predicted = self._of_all(
                    np.zeros((len(texts), self.models)) if predicted is None else predicted
                )
            return repeat(None, len(texts)) if predicted is None else map(tuple, predicted.tolist())

        return zip(rows(self.predictor), rows(self.joules), strict=True)

    def _of_all(self, estimates: NDArray[np.float64]) -> NDArray[np.float64]:
        """Where a policy begins: of models that aren't seen yet, what the others make likely; (..., models)"""
        samples = self.predictor.samples
        if not self.policy.begins or isinstance(self.predictor, Begins) or samples.all():
            return estimates
        prior = self.tuning.levels
        expected = np.clip(levels(prior, samples, estimates, prior.variance), 0.0, 1.0)
        return np.where(samples > 0, estimates, expected)

    def _aims(self, window: _Window, awake: Collection[int]) -> Mapping[str, Solution]:
        """By plan: the price of this window, where its size was found by the policy, on its own prompts."""
        if self.settings.window is not None:
            return {}
        rows: dict[str, list[tuple[_Row, _Row]]] = {}
        for request, row in zip(window.requests, window.predicted, strict=True):
            rows.setdefault(request.plan or DEFAULT_PLAN, []).append(row)
        asleep = [m for m in range(self.models) if m not in awake]
        found = {}
        for plan, of_plan in rows.items():
            estimates, joules = zip(*of_plan, strict=True)
            if None in estimates or None in joules:
                continue
            expected = np.array(joules)
            expected[:, asleep] = np.inf
            upcoming = Recent(np.array(estimates), expected, self.predictor.samples)
            alpha, account = self.settings.alphas[plan], self.accounts[plan]
            found[plan] = self.policy.aim(plan, alpha, account, upcoming, len(of_plan), window.looks)
        return {plan: aim for plan, aim in found.items() if aim is not None}

    def _choose(self, view: View) -> tuple[int, tuple[int, ...], Looked | None]:
        """(the model that serves, the ones that are asked as well, whether its answer is looked at)."""
        if self.unreachable(view.plan):
            return view.allowed[-1], (), None
        served = self.policy.choose(view)
        looked = self.policy.look(view, served) if view.looks else None
        return served, self.policy.companions(view, served), looked

    def expected_explorations(self, requests: int) -> float:
        """How many of the next requests are likely to be explorations. Sampled, so that it stays cheap."""
        if requests <= 0:
            return 0.0
        points = [self.t + 1 + round((k + 0.5) * requests / 16 - 0.5) for k in range(16)]
        chances = [self._exploration_probability(t, self.explored + t - self.t) for t in points]
        return requests * sum(chances) / len(chances)

    def _exploration_probability(self, t: int, explored: int) -> float:
        return self.policy.exploration_probability(t, explored, self.accounts)

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
        self.encode([event.text for event in events])  # of a window too large to be remembered: together
        for event in events:
            account = self.accounts[event.plan]
            if self.auditor is not None:
                self.auditor.settle(event.decision, event.accuracies, event.judged)
            account.explored += event.decision.explored
            self._learn(event)
            if self.policy.remembers:
                self._recent.add(event.text, event.decision)
            if event.served is None:
                account.failed += 1
            else:
                self._book(account, event, event.served)
            self._absences.settle(event.decision.t, event.decision.asked, event.faults or {})
            if event.running:
                running = [event.running.get(str(m), math.nan) for m in range(self.models)]
                self._loads.settle(event.joules, running)
            self._in_window += 1
            self.explored += event.decision.explored
            self.t = event.decision.t
            self.owed = event.decision.owed
            queues.append(account.queue.length)
        return queues

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

    def _follow(self) -> None:
        """Fit the directions anew where the latest prompts differ along others, and carry over what was learnt."""
        drift = self.tuning.drift
        if not self.policy.remembers or not self.space.settled or self.t < self._look_at:
            return
        first = not self._look_at
        self._look_at = self.t + max(drift.every, int(drift.part * self.t))
        if first:
            return
        share = self.space.share(self._recent.texts(drift.looked))
        if not self._usual_share:
            self._usual_share = share
        elif share < drift.share * self._usual_share:
            move = self.space.fit_anew(self._recent.texts(drift.fitted))
            for one in self._in_space:
                one.move(move)
            self._usual_share = 0.0

    def close_window(self) -> None:
        """End the window: all its requests are settled. The policy solves its prices now."""
        self._follow()
        self._absences.close_window(self.t)
        if not self._loads.is_empty:
            self._loads.close_window()
            self.joules.expect(self._loads.scale)
        recent = self._of_recent() if self.policy.wants_recent(self.accounts) else None
        looks: Sequence[Look] = ()
        if self.answers is not None:
            self.answers.take_in()
            looks = self.answers.looks()
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

    def _learn(self, event: Event) -> None:
        texts = self.space.see(event.text)
        if texts is not None:
            for one in self._in_space:
                one.learn_again(texts)
        read = self._of_asking(event)
        if not np.isnan(read).all():
            self.joules.learn_one(self.joules.encode(event.text), read)
        accuracies = self._of_prompt(event)
        if np.isnan(accuracies).all():
            return
        if event.decision.explored or self.settings.learn_from == "all":
            self.predictor.learn_one(self.predictor.encode(event.text), accuracies)
        if all(map(math.isnan, event.accuracies)):
            return
        if self.answers is not None and event.decision.estimates is not None:
            signals, joules = event.signals or {}, event.check_joules or {}
            for name in dict.fromkeys([*signals, *joules]):
                self.answers.learn_one(
                    int(name),
                    signals.get(name, {}),
                    event.decision.estimates,
                    event.accuracies,
                    joules.get(name, math.nan),
                )
        asked = event.decision.asked
        if event.decision.audited or (event.decision.explored and len(asked) == self.models):
            self._best.add(max(value for value in event.accuracies if not math.isnan(value)))

    def _of_asking(self, event: Event) -> NDArray[np.float64]:
        """Joules that tell what it takes to ask each model. What a model failed to answer took the answer of the larger
        one that it went on to, too; where it went to a smaller one, it tells nothing of an answer's joules."""
        read = np.array(event.joules)
        failed = {int(m): fault for m, fault in (event.faults or {}).items()}
        for m, fault in failed.items():
            larger = [n for n in event.decision.asked if n > m and n not in failed]
            read[m] = read[m] + event.joules[min(larger)] if larger and fault != "away" else math.nan
        return read

    def _of_prompt(self, event: Event) -> NDArray[np.float64]:
        """Accuracies that tell what prompts tell. Where a larger model was asked because of an answer, what that
        answer told is taken off: else it would be known from what smaller ones can't do alone.

        What a model fails to answer has accuracy 0: that is what it would have delivered alone. So a model that fails
        on some prompts is expected to be worth less on such prompts, in the unit that decisions are made in, without a
        reference being needed. A model that isn't there at all tells nothing of prompts: it is left out instead.
        """
        accuracies = np.array(event.accuracies)
        for m, fault in (event.faults or {}).items():
            if fault in ("request", "model"):
                accuracies[int(m)] = 0.0
        decision = event.decision
        if decision.given is not None and decision.estimates is not None:
            told = np.array(decision.given) - np.array(decision.estimates)
            because = [] if decision.added is None else [decision.added]
            if (
                self.auditor is not None and not decision.audited
            ):  # the first one's is known as the largest agrees
                because.append(decision.looks_at)
            accuracies[because] -= told[because]
        return accuracies

    # ---- remembering -----------------------------------------------------------------------------

    def state(self) -> Part:
        """Everything, as named fields, for a snapshot; `load` of it continues exactly."""
        looked = self.answers is not None and self.answers.knows_something
        answers = {"answers": self.answers.state()} if self.answers is not None and looked else {}
        absences = {} if self._absences.is_empty else {"absences": self._absences.state()}
        loads = {} if self._loads.is_empty else {"loads": self._loads.state()}
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
                "accounts": Part(
                    "accounts", parts={plan: account.state() for plan, account in self.accounts.items()}
                ),
                "best": self._best.state(),
                "space": self.space.state(),
                "policy": self.policy.state(),
                "predictor": self.predictor.state(),
                "joules": self.joules.state(),
                "recent": self._recent.state(),
                **({} if self.auditor is None else {"auditor": self.auditor.state()}),
                **answers,
                **absences,
                **loads,
                **({} if self._ahead is None else {"ahead": self._ahead.state()}),
                **({} if not self._look_at else {"drift": self._drift()}),
            },
        )

    def _drift(self) -> Part:
        return Part("drift", values={"look_at": self._look_at, "usual_share": self._usual_share})

    def load(self, part: Part) -> list[str]:
        """Go on from `part`.

        Returns:
            What begins anew: it was learnt under other tuned numbers, or by another policy.

        Raises:
            StateError: it isn't what `state` gives.
        """
        own = self.state()
        parts = {name: kept for name, kept in part.parts.items() if name not in _OPTIONAL}
        if part.version == 1:  # each predictor had a space of its own: what was learnt there is learnt anew
            parts["space"] = replace(own.parts["space"], tuning="")
        known = {name: kept for name, kept in own.parts.items() if name not in _OPTIONAL}
        replace(part, parts=parts).check(replace(own, parts=known))
        values = part.values
        self.t, self.explored = values["t"], values["explored"]
        self.owed, self._in_window = values["owed"], values["in_window"]
        parts["accounts"].check(own.parts["accounts"], any_parts=True)
        self.accounts |= {plan: Account.of(kept) for plan, kept in parts["accounts"].parts.items()}
        self._best.load(parts["best"])
        if self.auditor is not None:
            self.auditor.load(parts["auditor"])
        anew = []
        if self.answers is not None and "answers" in part.parts:
            if (kept := part.find("answers", like=self.answers.state())) is None:
                anew.append("answers")
            else:
                self.answers.load(kept)
        self._absences = Absences(self.models)
        if "absences" in part.parts:
            self._absences.load(part.parts["absences"])
        if parts["policy"].name == own.parts["policy"].name:
            self.policy.load(parts["policy"])
        else:
            anew.append("policy")
        space = replace(part, parts=parts).find("space", like=own.parts["space"])
        if space is not None:
            self.space.load(space)
        for name, owner in (("predictor", self.predictor), ("joules", self.joules)):
            kept = part.find(name, like=own.parts[name])
            if kept is None or (space is None and owner in self._in_space):
                anew.append(name)
            else:
                owner.load(kept)
        self._take_up_loads(part if "joules" not in anew else None)
        recent = part.find("recent", like=own.parts["recent"])
        if recent is None or {"predictor", "joules"} & {*anew}:
            anew.append("recent")
        else:
            self._recent.load(recent)
        if "drift" in part.parts:
            part.parts["drift"].check(self._drift())
            drift = part.parts["drift"].values
            self._look_at, self._usual_share = drift["look_at"], drift["usual_share"]
        if "ahead" in part.parts:
            self._ahead = Ahead.of(self.models, part.parts["ahead"])
        return anew


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


def _at_their_loads(decisions: Sequence[Decision], shares: Sequence[Share]) -> list[Decision]:
    """With the joules that are expected of each model's share of the window, instead of those on full engines."""
    given = Counter(m for decision in decisions for m in decision.asked)
    times = [share.of(given[m]) / share.full for m, share in enumerate(shares)]
    return [
        decision
        if decision.joules_predicted is None
        else replace(
            decision,
            joules_predicted=tuple(
                e * more for e, more in zip(decision.joules_predicted, times, strict=True)
            ),
        )
        for decision in decisions
    ]

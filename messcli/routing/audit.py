"""Audits: some served answers are looked at, by a coin with a known probability, where no reference tells their worth.

An audit asks the largest model (and serves its answer, which is paid for), or a judge. It costs joules, and narrows
what is known of the mean accuracy. Knows numbers and decisions; knows no models, files or policies. What audits
prove is in `bound`.

How many: with n audits the mean of T requests is known to z sigma / sqrt(n), and so much above alpha the policy must
aim: z sigma / sqrt(n) * price * T joules. n audits cost n * cost. The sum is least at n = (z sigma price T /
(2 cost))^(2/3).

When: as many of them as possible among the first requests, where they teach what all later ones need; the rest evenly.

Which: at a given expense the estimate's variance, the sum of d^2 (1 - p) / p, is least with p proportional to
|d| / sqrt(cost) (Neyman 1934, optimal allocation). Of d only the deviation is known: sqrt(Â (1 - Â)) for accuracies
of 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from messcli.records import Decision
from messcli.routing import tuning
from messcli.routing.bound import ServedMean
from messcli.routing.exploration import coin
from messcli.snapshots import Part

LARGEST, JUDGE = "largest", "judge"

_BLIND = 0.5  # Â while nothing is learnt: any number is allowed, and this one errs by half at most


@dataclass(frozen=True, slots=True)
class Audits:
    """How answers are looked at, and what is promised of their mean."""

    by: str = LARGEST  # who answers as well or looks at the answer: "largest" or "judge"
    agreement: bool = (
        False  # accuracy is agreement with the largest model's answer: its own is 1, by definition
    )
    error: float = 0.05  # the chance that the bound on the mean is wrong at any moment
    sure: bool = False  # the bound is to meet alpha, not the estimate alone

    def standing(self, mean: ServedMean) -> float | None:
        """What a promise is judged by: the estimated mean accuracy, or its bound. None before anything is served."""
        return mean.least(self.error) if self.sure else mean.mean


@dataclass(slots=True)
class _Means:
    """Sums over settled requests that something was predicted for: joules and accuracies of one request."""

    requests: int = 0
    chosen: float = 0.0  # joules predicted of what was chosen
    extra: float = 0.0  # joules predicted of what an audit asks besides
    gain: float = 0.0  # Â of the largest model, less Â of the chosen one
    price: float = 0.0  # price, times requests decided at it
    priced: int = 0  # these requests
    judged: float = 0.0  # joules read of judging
    judgements: int = 0
    squares: float = 0.0  # of A - Â of audited answers
    audits: int = 0
    later: int = 0  # requests audited after `tuning.beginning`


class Auditor:
    """Throws the coins, as a pure function of (seed, t) and of what was settled, and books what they showed.

    Args:
        audits: what is audited, and by whom.
        models: the size of the zoo.
        seed: of the coins.
        horizon: requests in all; None where that isn't known.
    """

    def __init__(
        self, audits: Audits, models: int, seed: int, horizon: int | None, tuning: tuning.Audits
    ) -> None:
        self.audits = audits
        self._models = models
        self._seed = seed
        self._horizon = horizon
        self._tuning = tuning
        self._means = _Means()

    # ---- deciding ----------------------------------------------------------------------------------

    @property
    def later(self) -> int:
        """Requests audited after the beginning, so far."""
        return self._means.later

    def is_later(self, decision: Decision) -> bool:
        """Whether a decision adds to `later`."""
        return decision.audited and decision.t > self._tuning.beginning

    def decide(
        self, decision: Decision, allowed: Sequence[int], samples: Sequence[float], later: int
    ) -> Decision:
        """Throw the coin for a request that a model was chosen for. Pure.

        Args:
            allowed: models that can take it, ascending.
            samples: how many accuracies each model's estimate rests on.
            later: `later`, with the requests decided before this one.
        """
        chosen = decision.model
        if self.audits.by == LARGEST and allowed[-1] != self._models - 1:
            return replace(decision, chosen=chosen)  # the largest can't take it: nothing to compare with
        if decision.explored:
            return replace(decision, audited=True, chosen=chosen)
        companions = self._companions(decision, allowed)
        rate = self.rate(decision.t, later)
        probability = min(1.0, rate * self._tilt(decision, companions, samples))
        audited = coin(self._seed, decision.t, b"audit") < probability
        if audited and self.audits.by == LARGEST:
            decision = replace(decision, model=allowed[-1], asked=companions)
        return replace(decision, audited=audited, audit_probability=probability, chosen=chosen)

    def rate(self, t: int, later: int) -> float:
        """The part of the requests about t that is audited, whichever they are.

        Args:
            later: as of `decide`.
        """
        tuning, beginning = self._tuning, self._tuning.beginning
        wanted, requests = self._wanted(t), self._requests(t)
        if wanted is None:
            return min(1.0, tuning.first / t)
        after = max(requests - beginning, 0.0)
        steady = min(tuning.aim * tuning.most, max(wanted / requests, tuning.least))
        if t <= beginning:
            return min(max((wanted - steady * after) / min(requests, float(beginning)), steady), 1.0)
        # Coins scatter: where more fell than were meant to, what is left is spread over what is to come.
        ahead = max(requests - t, 1.0) if self._horizon else 0.25 * beginning
        room = max(tuning.most * (t - beginning + ahead) - later, tuning.least)
        return min(steady, tuning.aim * room / ahead)

    def _requests(self, t: int) -> float:
        return float(self._horizon or max(2 * t, self._tuning.beginning))

    def _wanted(self, t: int) -> float | None:
        """How many audits are worth their joules in all; None while prices or costs aren't known."""
        means, tuning = self._means, self._tuning
        if not means.requests:
            return None
        extra, gain = means.extra / means.requests, max(means.gain / means.requests, tuning.least_gain)
        price = means.price / means.priced if means.priced else extra / gain
        if self.audits.by == JUDGE:
            cost = means.judged / means.judgements if means.judgements else 0.0
        else:
            cost = max(
                extra - price * gain, tuning.least_cost * extra
            )  # its answer is served, and worth something
        requests = self._requests(t)
        if cost <= 0.0:
            return requests
        spread = math.sqrt(
            (means.squares + tuning.spread_weight * tuning.spread**2) / (means.audits + tuning.spread_weight)
        )
        worth = max(price / cost, tuning.least_price)  # of a unit of accuracy, in audits
        best = float((0.5 * tuning.errors * spread * worth * requests) ** (2.0 / 3.0))
        affordable = tuning.share * requests * (means.chosen / means.requests) / cost
        return min(best, affordable, requests)

    def _tilt(self, decision: Decision, companions: Sequence[int], samples: Sequence[float]) -> float:
        """How many times as often as the mean request this one is audited."""
        tuning, means, chosen = self._tuning, self._means, decision.model
        if decision.estimates is None or not means.requests:
            return 1.0
        estimate = decision.estimates[chosen]
        variance = max(estimate * (1.0 - estimate), 0.0) + tuning.unsure / max(samples[chosen], 1.0)
        worth = math.sqrt(variance) / tuning.spread
        if self.audits.by == LARGEST:
            extra, typical = self._extra(decision, companions), means.extra / means.requests
            worth *= math.sqrt(typical / extra) if extra > 0.0 else tuning.tilt
        return min(max(worth, 1.0 / tuning.tilt), tuning.tilt)

    def _companions(self, decision: Decision, allowed: Sequence[int]) -> tuple[int, ...]:
        """Who answers in an audit by the largest model: it, the chosen one, and cheap ones, which learn from it."""
        joules, largest = decision.joules_predicted, allowed[-1]
        if joules is None:
            return tuple(allowed)
        room = self._tuning.companions * joules[largest]
        asked = {*decision.asked, largest}
        for m in sorted(allowed, key=lambda m: joules[m]):
            if m not in asked and joules[m] <= room:
                room -= joules[m]
                asked.add(m)
        return tuple(sorted(asked))

    @staticmethod
    def _extra(decision: Decision, companions: Sequence[int]) -> float:
        joules = decision.joules_predicted
        if joules is None:
            return 0.0
        return sum(joules[m] for m in companions if m not in decision.asked)

    # ---- what came of it ---------------------------------------------------------------------------

    def sees(self, decision: Decision) -> bool:
        """Whether the accuracies of a request's answers are found out."""
        return decision.audited or (self.audits.agreement and self._models - 1 in decision.asked)

    def found(self, decision: Decision, accuracies: Sequence[float]) -> float | None:
        """What an audit says of the answer that the policy chose; None without one. By definition is no finding."""
        chosen = decision.chosen
        if not decision.audited or decision.explored or chosen is None:
            return None
        if math.isnan(accuracies[chosen]) or (self.audits.agreement and chosen == self._models - 1):
            return None
        return accuracies[chosen]

    def settle(self, decision: Decision, accuracies: Sequence[float], judged: float = 0.0) -> None:
        """Learn what audits cost and how far estimates are off.

        Args:
            judged: joules of judging the answers.
        """
        means, chosen, joules = self._means, decision.chosen, decision.joules_predicted
        means.later += self.is_later(decision)
        if judged > 0.0:
            means.judged += judged
            means.judgements += 1
        if decision.explored or chosen is None or joules is None or decision.estimates is None:
            return
        means.requests += 1
        means.chosen += joules[chosen]
        largest = self._models - 1
        if self.audits.by == LARGEST:
            without = replace(decision, model=chosen, asked=(chosen,))
            means.extra += self._extra(without, self._companions(without, range(self._models)))
            means.gain += max(decision.estimates[largest] - decision.estimates[chosen], 0.0)
        found = self.found(decision, accuracies)
        if found is not None:
            means.squares += (found - (decision.given or decision.estimates)[chosen]) ** 2
            means.audits += 1

    def book(self, mean: ServedMean, decision: Decision, accuracies: Sequence[float], served: int) -> None:
        """Book a served request."""
        accuracy, chosen = accuracies[served], decision.chosen
        known = not math.isnan(accuracy)
        certain = decision.explored or decision.audit_probability >= 1.0
        if chosen is None or (known and (certain or (self.audits.agreement and chosen == self._models - 1))):
            mean.observe(accuracy)
            return
        # Given an answer, too: what the answer tells knows nothing of the coin.
        estimates = decision.given or decision.estimates
        estimate = _BLIND if estimates is None else estimates[chosen]
        probability = 1.0 if decision.explored else decision.audit_probability
        if not decision.audited:
            mean.pass_by(estimate, probability)
        elif math.isnan(accuracies[chosen]):
            mean.audit_failed(estimate, probability)
        else:
            mean.audit(estimate, probability, accuracies[chosen], accuracy)

    def close_window(self, price: float | None, requests: int) -> None:
        """The policy's price at the end of a window of so many requests; None where it isn't known."""
        if price is not None:
            self._means.price += price * requests
            self._means.priced += requests

    # ---- remembering -------------------------------------------------------------------------------

    def state(self) -> Part:
        """For a snapshot."""
        return Part("auditor", values=asdict(self._means))

    def load(self, part: Part) -> None:
        """Go on from `part`. Raises StateError: it isn't what `state` gives."""
        part.check(self.state())
        self._means = _Means(**part.values)

"""What the mean accuracy of everything served is, and at least is, when only some of it was looked at.

Request i is looked at (audited) with a known probability p > 0: a coin that knows nothing of its accuracy. Then
the sums below hold whatever the predictor says, whatever p depends on, and however models were chosen. Pure numbers:
knows no prompts, models or policies. docs/how-it-decides.md#what-is-promised says it for users.

Â is an estimate made before the coin fell, d = A - Â how far it is off, x the coin (1: audited).

- Estimate of the sum of A: the sum of Â + x d / p. Its mean over the coins is that of A, right or wrong as Â may be
  (Horvitz and Thompson 1952, with Â as control variate; doubly robust: Robins, Rotnitzky and Zhao 1994).
- Lower bound: for a rate r > 0 put f = exp(-r d) where x = 0, f = (1 - (1 - p) exp(-r d)) / p where x = 1. The mean
  of f over the coin is (1 - p) exp(-r d) + 1 - (1 - p) exp(-r d) = 1 for every A. So the product of all f is a
  nonnegative martingale: the chance that it ever exceeds 1 / error is at most `error` (Ville's inequality), and so it
  is for a mixture over rates (Howard, Ramdas, McAuliffe and Sekhon 2021, "Time-uniform, nonparametric, nonasymptotic
  confidence sequences", section 3.2). The unknown accuracies stand in it as exp(r * their sum) alone; solved for that
  sum it is a bound that holds at every moment. It is a bet on the coins (Waudby-Smith and Ramdas 2024, "Estimating
  means of bounded random variables by betting", equation 19, bets on draws). An empirical-Bernstein sequence for
  weighted data (Waudby-Smith and others 2024, "Anytime-valid off-policy inference for contextual bandits", theorem 3)
  holds too; it is wider, because exp(-r d) is replaced by a bound with a second-order term there.
- f must not be negative, and should stay away from 0, where one audit takes what all others won. So the estimate that
  enters it is capped, for each rate, so that f >= LEAST at A = 0. Every estimate made before the coin is allowed.

The package `confseq` (0.0.11) was considered: it has wheels for Python 3.10 alone, and its sequences are of draws of
equal weight, while p and Â differ from request to request here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from messcli.snapshots import Part

# Rates, per unit of accuracy. The best one is about sqrt(2 log(1 / error) / sum of d^2 (1 - p) / p): 0.5 for a hundred
# requests at p = 0.5, 0.002 for a million at p = 0.05. One of these is never further off than a factor of sqrt(2),
# which widens the bound by 6 % of its distance.
RATES = tuple(2.0**-k for k in range(1, 12))
_RATES = np.array(RATES)

# How much each rate is believed in before anything was seen: most in the middle (2^-5 suits several thousand requests).
# A rate with share w is found out log(1 / w) later; the mixture's shares sum to 1.
_BELIEFS = np.array([0.6 ** abs(k - 5) for k in range(1, 12)])
_LOG_SHARES = np.log(_BELIEFS / _BELIEFS.sum())

LEAST = 0.25  # of f: an audit that finds A = 0 takes three quarters of what a rate has won, at most


def _zeros() -> list[float]:
    return [0.0] * len(RATES)


@dataclass(slots=True)
class ServedMean:
    """What is known of the mean accuracy of the requests served so far. Plain sums."""

    observed: int = 0  # served requests whose accuracy is known, audited ones among them
    observed_sum: float = 0.0  # of their accuracies
    estimated: int = 0  # served requests whose accuracy isn't known
    estimated_sum: float = 0.0  # of their estimates, as they were made
    audited: int = 0
    correction: float = (
        0.0  # what audits say is to be added to `estimated_sum`: sum of (1 - p) / p d over audits
    )
    variance: float = 0.0  # of `correction` over the coins, as audits say: sum of (1 - p) / p^2 d^2
    controls: list[float] = field(
        default_factory=_zeros
    )  # capped estimates of what wasn't audited, for each rate
    gains: list[float] = field(default_factory=_zeros)  # log f of what was audited, for each rate

    # ---- taking in ---------------------------------------------------------------------------------

    def observe(self, accuracy: float) -> None:
        """A request whose accuracy is known without a coin: by a reference, or by definition."""
        self.observed += 1
        self.observed_sum += accuracy

    def pass_by(self, estimate: float, probability: float) -> None:
        """A request that wasn't audited.

        Args:
            estimate: Â of what was served, made before the coin fell; in [0, 1].
            probability: of having been audited; 0: it never would have been, and the bound takes A = 0 for it.
        """
        self.estimated += 1
        self.estimated_sum += estimate
        for k, rate in enumerate(RATES):
            self.controls[k] += _capped(estimate, rate, probability)

    def audit(
        self, estimate: float, probability: float, accuracy: float, served: float | None = None
    ) -> None:
        """A request that was audited.

        Args:
            estimate: as of `pass_by`, of what is served without an audit.
            probability: of the audit; in (0, 1].
            accuracy: what the audit found of that answer.
            served: the accuracy of what was served in the end, where the audit brought a better answer.
        """
        self.audited += 1
        self.observe(accuracy if served is None else served)
        off = accuracy - estimate
        others = (1.0 - probability) / probability  # how many unaudited requests this one speaks for
        self.correction += others * off
        self.variance += others / probability * off * off
        self._gain(estimate, probability, accuracy)

    def audit_failed(self, estimate: float, probability: float) -> None:
        """A request whose audit found nothing: perhaps because its answer is bad. The bound takes A = 0 for it."""
        self.estimated += 1
        self.estimated_sum += estimate
        self._gain(estimate, probability, 0.0)

    def _gain(self, estimate: float, probability: float, accuracy: float) -> None:
        for k, rate in enumerate(RATES):
            off = accuracy - _capped(estimate, rate, probability)
            # expm1: 1 - p and exp(-r d) are close to 1, and so would be their product
            self.gains[k] += math.log1p(-(1.0 - probability) / probability * math.expm1(-rate * off))

    # ---- remembering -------------------------------------------------------------------------------

    def state(self) -> Part:
        """For a snapshot."""
        values = {name: getattr(self, name) for name in _VALUES}
        return Part(
            "served_mean", values=values, arrays={name: np.array(getattr(self, name)) for name in _LISTS}
        )

    @classmethod
    def of(cls, part: Part) -> ServedMean:
        """What `state` gave `part` of. Raises StateError: there is none."""
        part.check(cls().state())
        return cls(**part.values, **{name: part.arrays[name].tolist() for name in _LISTS})

    # ---- what follows from it ----------------------------------------------------------------------

    @property
    def served(self) -> int:
        return self.observed + self.estimated

    @property
    def mean(self) -> float | None:
        """The unbiased estimate of the mean accuracy of everything served; None before anything was.

        It can lie outside [0, 1] while audits are few.
        """
        if not self.served:
            return None
        return (self.observed_sum + self.estimated_sum + self.correction) / self.served

    @property
    def standard_error(self) -> float | None:
        """Of `mean`, over the coins: accuracies of what was observed are known, and add nothing."""
        return math.sqrt(self.variance) / self.served if self.served else None

    def least(self, error: float) -> float | None:
        """What that mean is at least; wrong at any moment of a whole period with probability at most `error`."""
        if not self.served:
            return None
        return (self.observed_sum + self._least_unknown(error)) / self.served

    def rules_out(self, unknown: float, error: float) -> bool:
        """Whether the accuracies that aren't known can't have so small a sum: the mixture at it is 1 / error."""
        exponents = _RATES * (np.array(self.controls) - unknown) + self.gains + _LOG_SHARES
        most = float(exponents.max())
        return most + math.log(float(np.exp(exponents - most).sum())) >= -math.log(error)

    def _least_unknown(self, error: float) -> float:
        low, high = 0.0, float(self.estimated)
        if not self.rules_out(low, error):
            return 0.0
        for _ in range(50):  # bisection: the larger the sum, the smaller the mixture
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self.rules_out(middle, error) else (low, middle)
        return low


_VALUES = ("observed", "observed_sum", "estimated", "estimated_sum", "audited", "correction", "variance")
_LISTS = ("controls", "gains")


def _capped(estimate: float, rate: float, probability: float) -> float:
    """The estimate, or the largest with which f >= LEAST at A = 0: 1 - (1 - p) exp(rate * estimate) = LEAST * p."""
    if probability >= 1.0:
        return estimate
    return min(estimate, math.log((1.0 - LEAST * probability) / (1.0 - probability)) / rate)

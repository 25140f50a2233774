"""How estimates turn out: the scatter and the drift of A - Â, and the surplus where not all accuracies are observed.

Pure numbers: knows accounts and residuals, no models, prices or files. docs/how-it-decides.md has the mathematics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from messcli.routing import tuning
from messcli.routing.audit import Audits
from messcli.routing.sla import Account
from messcli.snapshots import Part


@dataclass(slots=True)
class Residuals:
    """A - Â of one plan's served requests with a reference."""

    variance: float  # of all, explored ones too
    variance_weight: float
    total: float = 0.0  # sum over those that weren't explored
    count: int = 0  # of these
    recent_total: float = 0.0  # the same with weights that fade
    recent_weight: float = 0.0

    def add(self, residual: float, margin: tuning.Margin, *, explored: bool) -> None:
        """Take in A - Â of one request."""
        self.variance += (residual * residual - self.variance) / self.variance_weight
        self.variance_weight = min(self.variance_weight + 1.0, margin.variance_memory)
        if (
            not explored
        ):  # an exploration serves the largest whatever its Â: it says nothing of how choices turn out
            self.total += residual
            self.count += 1
            self.recent_total = margin.drift_fading * self.recent_total + residual
            self.recent_weight = margin.drift_fading * self.recent_weight + 1.0

    def learnt(self, part: float) -> None:
        """A window was learnt from that is such a part of all settled requests: by about as much are estimates better
        than those that its residuals are of."""
        self.recent_total *= 1.0 - part

    def drift_of(self, deviation: float) -> float:
        """The recent mean residual of chosen models, below 0 where choices favour what is overestimated; shrunk, as if
        it were expected to be so far from 0."""
        return self.recent_total / (self.recent_weight + self.variance / deviation**2)

    def state(self) -> Part:
        """For a snapshot."""
        return Part(
            "residuals",
            values={
                "variance": float(self.variance),
                "variance_weight": float(self.variance_weight),
                "total": float(self.total),
                "count": self.count,
                "recent_total": float(self.recent_total),
                "recent_weight": float(self.recent_weight),
            },
        )

    def load(self, part: Part) -> None:
        """Go on from `part`. Raises StateError: it isn't what `state` gives."""
        part.check(self.state())
        values = part.values
        self.variance, self.variance_weight = values["variance"], values["variance_weight"]
        self.total, self.count = values["total"], values["count"]
        self.recent_total, self.recent_weight = values["recent_total"], values["recent_weight"]


def known_surplus(
    alpha: float,
    account: Account,
    residuals: Residuals,
    gain: float,
    left: float,
    margin: tuning.Margin,
    audits: Audits | None = None,
) -> tuple[float, float]:
    """(what is saved up, how far off that may be), sums of A - alpha. What may be missing of it is taken off.

    Args:
        gain: how far above alpha the zoo gets on average with full effort.
        left: requests to come, as far as known.
        audits: how answers are looked at that have no reference; None: they aren't.
    """
    if audits is None:
        surplus, doubt = _unaudited(account, residuals, left, margin)
        return surplus - doubt, doubt / margin.audit
    surplus, doubt = _audited(alpha, account, residuals, left, margin, audits)
    # A doubt that full effort can't pay for would send everything to the largest model, whatever it costs.
    gain = max(margin.gain_kept * gain, margin.least_gain)
    return surplus - min(doubt, margin.most_doubt * gain * (account.settled + left)), 0.0


def _unaudited(
    account: Account, residuals: Residuals, left: float, margin: tuning.Margin
) -> tuple[float, float]:
    """What is saved up, and what is kept because a part of it is estimated: sums of accuracies."""
    unobserved = account.estimated
    if not unobserved:
        return account.surplus, 0.0
    # An estimate is corrected by how the estimates of observed requests turned out.
    correction = unobserved * residuals.total / max(residuals.count, margin.least_residuals)
    grown = (account.settled + left) / account.settled
    observed = max(account.observed, 1)
    standard_error = math.sqrt(residuals.variance / (observed * grown))
    return account.surplus + correction, margin.audit * standard_error * unobserved * grown


def _audited(
    alpha: float,
    account: Account,
    residuals: Residuals,
    left: float,
    margin: tuning.Margin,
    audits: Audits,
) -> tuple[float, float]:
    """The same where requests are audited: the doubt is that of the period's end.

    The unbiased estimate of `bound` scatters more than need be: it uses an audit only for requests of its time. The
    predictor has learnt from all audits, so that its estimates are right on average but for a small drift.
    """
    mean = account.mean
    if mean is None or not account.settled:
        return account.surplus, 0.0
    grown = (account.settled + left) / account.settled
    if audits.sure:
        estimate = mean.observed_sum + mean.estimated_sum + mean.correction
        return estimate - alpha * mean.served, margin.sure_errors * math.sqrt(mean.variance * grown)
    surplus = account.surplus + account.estimated * residuals.drift_of(margin.audited_deviation)
    found = residuals.count * (1.0 + margin.audited_later * left / account.settled)
    return surplus, margin.audited_errors * math.sqrt(
        residuals.variance / max(found, 1.0)
    ) * account.estimated * grown
